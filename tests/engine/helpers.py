"""Recipes by name, and inputs of linear layers found without the package's own interception."""

from itertools import pairwise

import torch
from torch.overrides import TorchFunctionMode

from qbench.assets import resolve_model
from qbench.calibration.corpora import pydoc_split
from qbench.engine.loop import Recipe
from qbench.formats import uniform
from qbench.formats.scheme import Scheme
from qbench.models.load import load_tokenizer
from qbench.stages.pipeline import build_pipeline
from qbench.structure.blocks import capture_calls, find_blocks
from qbench.structure.trace import trace_block

ALGORITHMS = {
    "rtn": ("rtn",),
    "gptq": ("gptq",),
    "awq": ("awq_scale", "awq_clip", "rtn"),
    "awq_scale": ("awq_scale", "rtn"),
    "awq_clip": ("awq_clip", "rtn"),
    "awq_gptq": ("awq_scale", "awq_clip", "gptq"),
}


def recipe(algorithm, *, bits=3, group_size=8, symmetric=False, scale="float16", **options):
    """A recipe; `options` are {stage: {option: value}}."""
    fmt = uniform(bits=bits, group_size=group_size, symmetric=symmetric, scale=scale)
    nodes = [{"stage": name, **options.get(name, {})} for name in ALGORITHMS[algorithm]]
    pipeline = build_pipeline(nodes)
    pipeline.check(frozenset({fmt}))
    return Recipe(pipeline, Scheme(weight=fmt))


@torch.no_grad()
def structure_of(model, tokens, block=0):
    hidden, calls = capture_calls(model, tokens)
    return trace_block(find_blocks(model)[1][block], calls[block], hidden)


class InputsOf(TorchFunctionMode):
    """Collects in `seen` the inputs [tokens, in] of one weight of a block, known by its address, while it runs."""

    def __init__(self, block, ref):
        super().__init__()
        self.seen, self._address = [], ref.read(block).data_ptr()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if len(tensors) > 1:  # x, weight[, bias] or bias, x, weight; one alone is a view being made
            for x, weight in pairwise(tensors):
                if weight.data_ptr() == self._address and weight.ndim == 2 and x.numel():
                    self.seen.append(x.detach().flatten(0, -2).clone())
        return func(*args, **(kwargs or {}))


def decoded(model, weights):
    """A copy of the model's parameters by name with those of `weights` (a `Weights`) in their place."""
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert weights.tensors.keys() <= values.keys()
    return values | weights.tensors


def comparable(ledger):
    """A ledger without the seconds that stages took."""
    metrics = [metric for metric in ledger.metrics if not metric[2].endswith("_s")]
    return ledger.weight_bits, ledger.weight_count, ledger.digests, metrics


def tiny_asset():
    """`model=tiny`: a trained llama of four blocks with grouped-query attention and tied embeddings."""
    return resolve_model(name="tiny", asset="package:tiny")


def tiny_windows(n, length, *, skip=0):
    """Token windows [n, length] of text that the tiny model was not trained on."""
    text = pydoc_split()[1][: 8 * (skip + n * length)]
    ids = torch.tensor(load_tokenizer(tiny_asset())(text, verbose=False)["input_ids"])
    return ids[skip : skip + n * length].view(n, length)
