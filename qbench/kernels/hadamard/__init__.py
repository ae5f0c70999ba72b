"""Fast Walsh-Hadamard transform of the last axis, for lengths k * 2^a."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qbench.errors import SpecError
from qbench.kernels.backend import Backend, check_float, choose
from qbench.kernels.hadamard import reference


def hadamard(x: Tensor, base: Tensor | None = None, *, backend: Backend | None = None) -> Tensor:
    """x [..., n] times H^T / sqrt(n) with H = kron(base, Sylvester 2^a), n = k * 2^a, in x's dtype.

    base: Hadamard matrix [k, k] (`qbench.hadamard.hadamard(k)` with (k, a) = `decompose(n)`) of any real dtype, best
    kept on x's device; None: k = 1, n a power of two. That H is `qbench.hadamard.hadamard(n)`, so a weight [out, n]
    that meets transformed inputs is transformed along `in` by the same call. The inverse is `hadamard(y, base.T)`:
    Sylvester's matrix is symmetric, a base need not be.

    x is float32, float16 or bfloat16 (the reference also takes float64); computed in float32 at least. n (a + k)
    additions per row instead of n^2. Raises SpecError for another dtype and for an n that is not k * 2^a.
    """
    if x.dtype != torch.float64 or backend == "triton":
        check_float("hadamard", x)
    k, n = 1 if base is None else base.shape[0], x.shape[-1]
    if base is not None and base.shape != (k, k):
        raise SpecError("base shape", tuple(base.shape), "a Hadamard matrix is square")
    length = n // k
    if n == 0 or n % k or length & (length - 1):
        raise SpecError("hadamard length", n, f"with a base of order {k}: accepted: {k} * 2^a")
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    if base is None:
        base = torch.ones(1, 1, device=x.device)
    rows = x.reshape(-1, n)
    if x.dtype != torch.float64 and choose(backend, x) == "triton":
        return _Kernel.apply(rows, base).view(x.shape)
    return reference.hadamard(rows, base).view(x.shape)


class _Kernel(torch.autograd.Function):
    """The Triton kernel with its gradient: the transform is linear and orthogonal, so that is its inverse."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, base: Tensor) -> Tensor:
        from qbench.kernels.hadamard import triton

        ctx.save_for_backward(base)
        return triton.hadamard(rows, base)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        from qbench.kernels.hadamard import triton

        (base,) = ctx.saved_tensors
        return triton.hadamard(gradient.contiguous(), base.mT.contiguous()), None
