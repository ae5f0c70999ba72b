"""Fake quantization: values of x after one trip to integer codes and back, in groups along the last axis."""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.errors import SpecError
from qbench.kernels.backend import Backend, check_float, choose
from qbench.kernels.fake_quant import reference

SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fake_quant(
    x: Tensor,
    *,
    bits: int,
    group_size: int = -1,
    symmetric: bool = True,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
    backend: Backend | None = None,
) -> Tensor:
    """x [rows, columns] (float32, float16, bfloat16) quantized and decoded, in x's dtype; computed in float32.

    Groups of `group_size` consecutive elements of a row (-1: the row; the last may be shorter) share a scale s and,
    unless symmetric, an integer zero z: values are s (q - z), q = clamp(round(x / s) + z), ties to even. Symmetric
    codes are -2^(b-1) ... 2^(b-1)-1 with z = 0, the others 0 ... 2^b - 1.

    Without `scale` they are fitted to each group: s = 2 max|x| / (2^b - 1), or s = (hi - lo) / (2^b - 1) with
    lo <= 0 <= hi and z = round(-lo / s), the conventions of `formats.fit`. s is rounded to `scale_dtype` before its
    first use; it becomes the smallest subnormal where it would underflow and 1 for a group of zeros. A group with a NaN
    or an infinity, or whose scale overflows, comes out as NaN throughout (a check that raised would stall a GPU).

    With `scale` (and, unless symmetric, `zero`), float [rows or 1, groups or 1], these are used as they are: infinities
    saturate, NaN stays NaN.

    Raises SpecError for arguments that contradict each other or x.
    """
    check_float("fake_quant", x, 2)
    if not 2 <= bits <= 8:
        raise SpecError("bits", bits, "accepted: 2 to 8")
    if group_size != -1 and group_size < 1:
        raise SpecError("group_size", group_size, "accepted: -1 (the row) or a positive number of columns")
    if scale_dtype not in SCALE_DTYPES:
        raise SpecError("scale_dtype", scale_dtype, f"accepted: {', '.join(map(str, SCALE_DTYPES))}")
    groups = 1 if group_size == -1 else -(-x.shape[1] // group_size)
    if (zero is None) != (symmetric or scale is None):
        wanted = "none" if symmetric else "given with scale, and only then"
        raise SpecError("zero", "none" if zero is None else "given", f"symmetric={symmetric}: accepted: {wanted}")
    scale, zero = (_expanded(name, t, x.shape[0], groups) for name, t in (("scale", scale), ("zero", zero)))
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    if choose(backend, x) == "triton":
        from qbench.kernels.fake_quant import triton

        return triton.fake_quant(x, bits, group_size, symmetric, scale, zero, scale_dtype)
    return reference.fake_quant(x, bits, group_size, symmetric, scale, zero, scale_dtype)


def _expanded(name: str, parameter: Tensor | None, rows: int, groups: int) -> Tensor | None:
    """float32 view [rows, groups]; one row or one group may stand for all."""
    if parameter is None:
        return None
    fits = parameter.dim() == 2 and parameter.shape[0] in (1, rows) and parameter.shape[1] in (1, groups)
    if not fits:
        raise SpecError(f"{name} shape", tuple(parameter.shape), f"accepted: [{rows} or 1, {groups} or 1]")
    return parameter.float().expand(rows, groups)
