"""Norms by what they compute: x / rms(x), in LayerNorm of x - mean(x), times a gain, plus a shift."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qbench.errors import StructureError


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A module that computes u g + b of rows x [n] with u = x / sqrt(mean x² + eps), of x - mean(x) where `centred`."""

    path: str
    gain: str
    """Name in the module of the stored gain w: g = offset + w."""
    offset: float
    shift: str | None
    """Name in the module of b; None without one."""
    centred: bool
    eps: float

    def gain_of(self, owner: nn.Module) -> Tensor:
        """g float64 `[n]` of the module at `path` in `owner`."""
        return owner.get_submodule(self.path).get_parameter(self.gain).detach().double() + self.offset

    def shift_of(self, owner: nn.Module) -> Tensor | None:
        """b float64 `[n]`."""
        return (
            None if self.shift is None else owner.get_submodule(self.path).get_parameter(self.shift).detach().double()
        )

    def make_plain(self, owner: nn.Module) -> None:
        """From now on the module at `path` in `owner` computes x / rms(x): a gain of 1, no shift, no mean subtracted.

        It keeps a weight, into which later stages can fold scales.
        """
        module = owner.get_submodule(self.path)
        weight = module.get_parameter(self.gain)
        if self.centred:
            plain = nn.RMSNorm(len(weight), self.eps, device=weight.device, dtype=weight.dtype)
            owner.set_submodule(self.path, plain.requires_grad_(False).eval())
            return
        with torch.no_grad():
            weight.fill_(1 - self.offset)
            if self.shift is not None:
                module.get_parameter(self.shift).zero_()


def recognize_norm(owner: nn.Module, path: str) -> Norm:
    """The norm at `path`, from what it computes in float64; StructureError where that is something else."""
    module = owner.get_submodule(path)
    vectors = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 1}
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    shifts = [name for name in vectors if name.endswith("bias")]
    gains = [name for name in vectors if name not in shifts]
    if len(gains) != 1 or len(shifts) > 1 or len(list(module.parameters())) != len(vectors):
        raise StructureError(f"{path}: {type(module).__name__} is no norm with one gain, which alone can be rotated")
    gain, shift = gains[0], shifts[0] if shifts else None
    n, device = len(vectors[gain]), vectors[gain].device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, n, generator=generator, dtype=torch.float64).to(device) + 1

    def compute(inputs: Tensor, stored: float) -> Tensor:
        values = {gain: inputs.new_full((n,), stored)} | ({shift: inputs.new_zeros(n)} if shift else {})
        with torch.no_grad():
            return torch.func.functional_call(module, values, (inputs,))

    offset = 0.0 if not compute(x, 0.0).any() else 1.0
    found = compute(x, 1 - offset)
    centred = bool((compute(x + 3, 1 - offset) - found).abs().max() < 1e-3)
    rows = x - x.mean(dim=-1, keepdim=True) if centred else x
    # With the eps of the module, which is 1e-5 or so, up to what float32 loses on the way.
    expected = rows / (rows.square().mean(dim=-1, keepdim=True) + (eps or 0.0)).sqrt()
    if compute(x, -offset).any() or eps is None or (found - expected).abs().max() > 1e-5:
        raise StructureError(f"{path}: {type(module).__name__} does not compute x / rms(x) times a gain")
    return Norm(path=path, gain=gain, offset=offset, shift=shift, centred=centred, eps=float(eps))
