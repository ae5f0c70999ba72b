"""The definition of the fast transform, on any device; see the package for what it computes."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(x: Tensor, base: Tensor) -> Tensor:
    """x [rows, k * 2^a], base [k, k]."""
    rows, n = x.shape
    k = base.shape[0]
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    step = 1
    while step < n // k:
        # Butterflies (u, v) -> (u + v, u - v) between elements that are `step` apart.
        u, v = y.reshape(-1, 2, step).unbind(1)
        y = torch.stack((u + v, u - v), dim=1)
        step *= 2
    y = y.reshape(rows, k, n // k)
    if k > 1:
        y = base.to(y.device, y.dtype) @ y
    return (y.reshape(rows, n) * n**-0.5).to(x.dtype)
