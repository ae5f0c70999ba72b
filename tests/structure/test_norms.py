"""Every norm of the tiny architectures is recognized by what it computes, and loses its gain; other modules are not."""

import copy

import pytest
import torch
from torch import nn

from qbench.errors import StructureError
from qbench.structure.norms import recognize_norm
from tests.architectures import ARCHITECTURES, tiny_model

CENTRED = {"opt", "gpt2", "gpt_neox", "bloom", "falcon", "phi", "stablelm", "starcoder2"}
ONE_PLUS = {"gemma2", "gemma3_text"}


def _norms(model):
    return [path for path, module in model.named_modules() if "norm" in type(module).__name__.lower()]


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_norms_are_what_they_are_recognized_as(name):
    model, _ = tiny_model(name, dtype=torch.float64)
    assert _norms(model)
    for path in _norms(model):
        norm = recognize_norm(model, path)
        module = model.get_submodule(path)
        assert norm.centred == (name in CENTRED)
        assert norm.offset == (1.0 if name in ONE_PLUS else 0.0)
        assert (norm.shift is None) == (getattr(module, "bias", None) is None)
        gain, shift = norm.gain_of(model), norm.shift_of(model)
        x = torch.randn(5, len(gain), generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.01 + 0.02
        rows = x - x.mean(dim=-1, keepdim=True) if norm.centred else x
        unit = rows / (rows.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()  # small rows: eps counts
        expected = unit * gain + (0 if shift is None else shift)
        assert torch.allclose(module(x), expected, atol=1e-6)
        plain = copy.deepcopy(model)
        norm.make_plain(plain)
        once = x / (x.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()
        assert torch.allclose(plain.get_submodule(path)(x), once, atol=1e-6)
        again = recognize_norm(plain, path)
        assert not again.centred
        assert torch.equal(again.gain_of(plain), torch.ones_like(gain))
        assert again.shift_of(plain) is None or not again.shift_of(plain).any()


class _Scaled(nn.Module):
    """Not a norm: x times a gain."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(6)), 1e-6

    def forward(self, x):
        return x * self.weight


class _L1(_Scaled):
    def forward(self, x):
        return x / x.abs().mean(dim=-1, keepdim=True) * self.weight


class _Nameless(_Scaled):
    """A norm whose eps cannot be found."""

    def __init__(self):
        super().__init__()
        del self.eps

    def forward(self, x):
        return x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt() * self.weight


@pytest.mark.parametrize(
    "module", [nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.ReLU(), _Scaled(), _L1(), _Nameless()]
)
def test_other_modules_are_refused(module):
    with pytest.raises(StructureError, match=r"^0: "):
        recognize_norm(nn.Sequential(module), "0")
