"""An input that several weights read is quantized once, and no result is ever taken for another tensor's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qbench.engine.activations import InputQuantizer
from qbench.engine.runtime import Runtime
from qbench.formats.scheme import InputFormat
from qbench.structure.trace import BlockStructure, LinearGroup
from qbench.structure.weights import WeightRef
from tests.engine.runtime_cases import INT4, INT8, Case, dynamic, fake


class _Counter(InputQuantizer):
    """Counts its calls."""

    calls = None

    def __call__(self, x):
        self.calls.append(x.shape)
        return super().__call__(x)


@pytest.mark.parametrize(("name", "expected"), [("llama", 4), ("gpt2", 4), ("phi", 4), ("opt", 4)])
def test_an_input_that_several_weights_read_is_quantized_once(name, expected, monkeypatch):
    case, calls = Case(name), []
    monkeypatch.setattr(_Counter, "calls", calls)
    inputs = {weight: _Counter(format=InputFormat(format=INT8)) for weight in case.refs}
    case.run(Runtime(case.block, case.structure, inputs))
    shared = 1 if name == "phi" else 0  # attention comes between two reads of phi's normalized input
    assert len(calls) == expected <= len(case.structure.groups) + shared


class _Tricky(nn.Module):
    """Reads inputs that look alike: changed in place, transposed, freed and allocated anew."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x, way):
        h = x * 2
        first = self.a(h)
        match way:
            case "in place":
                h.mul_(3).add_(x)
            case "by operator":
                h *= 3
            case "by item":
                h[0, 0] = 5.0
            case "by out":
                torch.mul(x, 7, out=h)
            case "by option":
                F.relu(h, inplace=True)
            case "by no name":
                torch.ops.aten.mul_.Tensor(h, 3)
            case "transposed":
                h = h.transpose(0, 1)
                return first + self.b(h).transpose(0, 1)
            case "freed":
                address = h.data_ptr()
                del h
                h = x * 5
                del address
            case "reshaped":
                return first + self.b(h.flatten(0, 1)).view(x.shape)
        return first + self.b(h)


WAYS = [
    "same",
    "in place",
    "by operator",
    "by item",
    "by out",
    "by option",
    "by no name",
    "transposed",
    "freed",
    "reshaped",
]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", WAYS)
def test_results_are_never_those_of_another_tensor(way, mode):
    if way == "by no name" and mode is torch.inference_mode:
        pytest.skip("inference tensors do not count changes, so only the function's name can tell")
    torch.manual_seed(0)
    block = _Tricky()
    runtime = Runtime(block, _two_weights(), dynamic(["a.weight", "b.weight"], INT4))
    with mode():
        x = torch.randn(3, 3, 8)  # as long as wide: a transpose has the same shape
        hooks = [
            layer.register_forward_pre_hook(lambda _, args: (fake(args[0].contiguous(), INT4),))
            for layer in (block.a, block.b)
        ]
        expected = block(x, way)
        for hook in hooks:
            hook.remove()
        for _ in range(2):
            with runtime:
                assert torch.equal(block(x, way), expected)
    assert runtime._memo is None


def _two_weights():
    refs = tuple(WeightRef(name=n, parameter=n, out_features=8, in_features=8) for n in ("a.weight", "b.weight"))
    group = LinearGroup(index=0, weights=refs, in_features=8, scopes=(), query_key_rows={})
    return BlockStructure(groups=(group,))
