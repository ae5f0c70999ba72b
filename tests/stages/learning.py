"""A block as the engine shows it to a stage that learns, and what its outcome is worth."""

import copy

import torch

from qbench.calibration.extremes import Extremes
from qbench.engine.activations import InputQuantizer
from qbench.engine.passes import StructureCache, embed
from qbench.engine.source import MemorySource
from qbench.engine.student import make_student
from qbench.formats import fake_quantize, uniform
from qbench.formats.scheme import InputFormat, Scheme
from qbench.stages.base import BlockData, BlockView
from qbench.stages.training import gather
from qbench.structure.blocks import capture_calls
from tests.architectures import tiny_model, tokens

W2 = uniform(2, 8, False)
W4 = uniform(4, -1, True)
A4 = InputFormat(format=uniform(4, -1, True, scale="float32"))
WEIGHT_ONLY, BOTH = Scheme(weight=W2), Scheme(weight=W4, input=A4)


def learning_view(name="llama", scheme=WEIGHT_ONLY, *, batch=4, length=12, dtype=torch.float32, model=None, **tiny):
    """The first block as the engine shows it to a stage that learns."""
    if model is None:
        model, _ = tiny_model(name, dtype=dtype, **tiny)
    calibration = tokens(model.config, batch=batch, length=length)
    with torch.no_grad():
        source = MemorySource(model)
        hidden, calls = capture_calls(model, calibration[:2])
        block = source.block(0)
        structure = StructureCache().structure(block, calls[0], hidden, folds=True)
        stream = embed(source, model, calibration, (1, 2, 3))
        inputs, untouched = tuple(stream.chunks), copy.deepcopy(block)
        seen = {g.index: {Extremes: Extremes(g.in_features, torch.device("cpu"))} for g in structure.groups}
        stream.observe(block, 0, structure, lambda group, x: seen[group.index][Extremes].update(x))
    names = [ref.name for group in structure.groups for ref in group.weights]
    formats = dict.fromkeys(names, scheme.input) if scheme.input is not None else {}
    quantizers = {path: _quantizer(fmt) for path, fmt in formats.items()}
    generator = torch.Generator().manual_seed(0)
    entering = tuple(x + 0.05 * torch.randn(x.shape, generator=generator).to(x.dtype) for x in inputs)

    def call_of(x):
        return stream.call(0, x)

    data = BlockData(
        inputs=entering,
        full_inputs=inputs,
        targets=tuple(stream.chunks),
        student=make_student(block, structure, quantizers, None, call_of),
        teacher=torch.no_grad()(lambda x: call_of(x)(untouched, x)),
    )
    return BlockView(
        block=block,
        structure=structure,
        groups=structure.groups,
        formats=dict.fromkeys(names, scheme.weight),
        inputs=formats,
        statistics=seen,
        data=data,
        where="block 0",
    )


def _quantizer(fmt):
    return InputQuantizer(format=fmt)


def refs_of(view):
    return {ref.name: ref for group in view.groups for ref in group.weights}


@torch.no_grad()
def loss_of(view, outcome, augmented=False):
    """Of the block with the outcome installed and rounded to nearest on its ranges, over all sequences."""
    block = copy.deepcopy(view.block)
    for path, value in outcome.parameters.items():
        block.get_parameter(path).copy_(value)
    for name, ref in refs_of(view).items():
        value = ref.read(block).float()
        ref.write(block, fake_quantize(value, view.formats[name], outcome.ranges.get(name)))
    replaced = dict(block.named_parameters())
    total = count = 0.0
    sequences = range(sum(map(len, view.data.inputs)))  # one by one, as it trains: products of other shapes differ
    for hidden, target in [(gather(view.data.inputs, [k]), gather(view.data.targets, [k])) for k in sequences]:
        output = view.data.student(replaced, hidden)
        goals = [target, *([view.data.teacher(hidden)] if augmented else [])]
        total += sum((output - goal).float().square().sum().item() for goal in goals)
        count += target.numel()
    return total / count


def metric_of(outcome, name):
    return next(value for module, metric, value in outcome.metrics if (module, metric) == ("", f"omniquant_{name}"))
