"""Matrix product with a weight that stays packed: 4- or 8-bit integer codes, one scale per group of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.errors import SpecError
from qbench.kernels.backend import FLOATS, Backend, check_float, choose
from qbench.kernels.dequant_matmul import reference


def dequant_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    bits: int,
    group_size: int = -1,
    backend: Backend | None = None,
) -> Tensor:
    """y = x Wᵀ, [..., out] in x's dtype, for x [..., in] and W = scale * (code - zero), [out, in] (W4A16, W8A16).

    packed: uint8 [out, ceil(in * bits / 8)] from `pack`, bits 4 or 8: of uint8 codes where `zero` is given, else of
    int8 codes. scale: float32, float16 or bfloat16 [out, groups]; zero: integers 0 ... 2^bits - 1 of any dtype, [out,
    groups]. Column j of a row belongs to group j // group_size (-1: one group per row); the last may be shorter.

    x is float32, float16 or bfloat16; products are summed in float32 and W is never rounded to x's dtype: code - zero
    is exact in all three, and each group's sum meets its scale in float32. Raises SpecError for shapes and dtypes that
    do not fit together.
    """
    check_float("dequant_matmul", x)
    if bits not in (4, 8):
        raise SpecError("bits", bits, "accepted: 4, 8")
    if group_size != -1 and group_size < 1:
        raise SpecError("group_size", group_size, "accepted: -1 (the row) or a positive number of columns")
    columns = x.shape[-1]
    size = -(-columns * bits // 8)
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != size:
        found = f"{packed.dtype} {list(packed.shape)}"
        raise SpecError("packed", found, f"x has {columns} features of {bits} bits: accepted: uint8 [out, {size}]")
    rows = packed.shape[0]
    groups = 1 if group_size == -1 else -(-columns // group_size)
    for name, parameter in (("scale", scale), ("zero", zero)):
        if parameter is not None and parameter.shape != (rows, groups):
            raise SpecError(f"{name} shape", tuple(parameter.shape), f"accepted: [{rows}, {groups}]")
    if scale.dtype not in FLOATS:
        raise SpecError("scale dtype", scale.dtype, "accepted: float32, float16, bfloat16")
    tokens = x.reshape(-1, columns) if columns else x.new_empty(x.shape[:-1].numel(), 0)
    if tokens.numel() == 0 or rows == 0:
        return x.new_zeros((*x.shape[:-1], rows))
    if choose(backend, x) == "triton":
        from qbench.kernels.dequant_matmul import triton

        y = triton.dequant_matmul(tokens, packed, scale, zero, bits, group_size)
    else:
        y = reference.dequant_matmul(tokens, packed, scale, zero, bits, group_size)
    return y.view(*x.shape[:-1], rows)
