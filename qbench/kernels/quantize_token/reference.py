"""The definition of per-token quantization, on any device; see the package for what it means."""

from __future__ import annotations

import torch
from torch import Tensor

EXTENT = {"int8": 127.5, "float8_e4m3fn": 448.0}
"""Units of the scale that reach max|x|: half of the 255 steps of int8, the largest float8_e4m3fn."""


def quantize_token(x: Tensor, code: str) -> tuple[Tensor, Tensor]:
    """x [tokens, features], both at least 1."""
    x = x.float()
    largest = x.abs().amax(dim=1, keepdim=True)
    exact = largest / EXTENT[code]
    scale = torch.where(exact == 0, torch.ones_like(exact), exact)
    finite = torch.isfinite(largest)
    levels = torch.where(finite, x / scale, torch.zeros_like(x))
    if code == "int8":
        codes = levels.round_().clamp_(-128, 127).to(torch.int8)
    else:
        codes = levels.clamp_(-448, 448).to(torch.float8_e4m3fn)  # whether the cast saturates depends on torch
    return codes, torch.where(finite, scale, torch.full_like(scale, torch.nan))
