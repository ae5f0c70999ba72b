"""Views for stages that learn: of a block of a tiny model, and of a block that is one linear layer."""

import copy

import torch
from torch import nn

from qbench.engine.passes import StructureCache, embed
from qbench.engine.runtime import calibrate
from qbench.engine.source import MemorySource
from qbench.engine.student import make_student
from qbench.stages.base import BlockData, BlockView
from qbench.structure.blocks import capture_calls
from qbench.structure.trace import BlockStructure, LinearGroup
from qbench.structure.weights import WeightRef
from tests.architectures import tiny_model, tokens


@torch.no_grad()
def learning_view(name, fmt, *, dtype=torch.float32, batch_sizes=(4,), n=6, inputs=None, seed=0, noise=0.0):
    """Block 0 of a tiny model with its data; noise: how far the quantized stream lies from the full-precision one."""
    model, config = tiny_model(name, dtype=dtype)
    calibration = tokens(config, batch=n, length=12, seed=1)
    source = MemorySource(model)
    hidden, calls = capture_calls(model, calibration[:2])
    block = source.block(0)
    structure = StructureCache().structure(block, calls[0], hidden, folds=True)
    sizes = {min(size, n) for size in batch_sizes}
    stream = embed(source, model, calibration, {*sizes, *(n % size for size in sizes)} - {0})
    targets = copy.copy(stream)
    targets.chunks = list(stream.chunks)
    targets.advance(block, 0)
    generator = torch.Generator().manual_seed(seed + 7)
    behind = tuple(x + noise * torch.randn(x.shape, generator=generator).to(x) for x in stream.chunks)
    refs = [ref for group in structure.groups for ref in group.weights]
    wanted = {} if inputs is None else {ref.name: inputs for ref in refs}
    quantizers, cache = calibrate(block, 0, structure, stream, wanted, None)

    def call_of(x):
        return stream.call(0, x)

    data = BlockData(
        inputs=behind,
        full_inputs=tuple(stream.chunks),
        targets=tuple(targets.chunks),
        student=make_student(block, structure, quantizers, cache, call_of),
        teacher=lambda x: call_of(x)(block, x),
    )
    return BlockView(
        block=block,
        structure=structure,
        groups=structure.groups,
        formats={ref.name: fmt for ref in refs},
        inputs=wanted,
        data=data,
        generator=torch.Generator().manual_seed(seed),
        where="block 0",
    )


class Linear(nn.Module):
    """A block that is one linear layer behind a norm."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.norm = nn.RMSNorm(weight.shape[1], eps=1e-6)

    def forward(self, x):
        return self.norm(x) @ self.weight.mT


@torch.no_grad()
def linear_view(weight, fmt, *, n=5, length=7, seed=0, ranges=None):
    """View of `Linear(weight)`, whose calibration sequences [n, length, in] come in chunks of 3."""
    block = Linear(weight.clone())
    rows, columns = weight.shape
    ref = WeightRef(name="weight", parameter="weight", out_features=rows, in_features=columns)
    group = LinearGroup(index=0, weights=(ref,), in_features=columns, scopes=("",), query_key_rows={"weight": None})
    generator = torch.Generator().manual_seed(seed + 3)
    full = torch.randn(n, length, columns, generator=generator)
    seen = full + 0.1 * torch.randn(full.shape, generator=generator)

    def student(parameters, hidden):
        return torch.func.functional_call(block, dict(parameters), (hidden,))

    data = BlockData(
        inputs=seen.split(3),
        full_inputs=full.split(3),
        targets=tuple(block(x) for x in full.split(3)),
        student=student,
        teacher=block,
    )
    return BlockView(
        block=block,
        structure=BlockStructure(groups=(group,)),
        groups=(group,),
        formats={"weight": fmt},
        ranges=ranges or {},
        data=data,
        generator=torch.Generator().manual_seed(seed),
        where="block 3",
    )


def state(view):
    """Everything in a view that a stage could spoil."""
    tensors = dict(view.block.state_dict())
    tensors |= {f"{kind} {k}": x for kind in ("inputs", "targets") for k, x in enumerate(getattr(view.data, kind))}
    tensors |= {f"{name} {end}": getattr(r, end) for name, r in view.ranges.items() for end in ("lower", "upper")}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def unchanged(view, before):
    """Whether the view is as it was, down to hooks and gradients."""
    after = state(view)
    clean = all(p.grad is None and not p.requires_grad for p in view.block.parameters())
    hooks = not any(m._forward_hooks or m._forward_pre_hooks for m in view.block.modules())
    return clean and hooks and before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in after)


def digests(outcome):
    return {name: codes.sha256() for name, codes in outcome.codes.items()}
