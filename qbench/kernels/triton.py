"""What the Triton kernels share: rounding and fitting that agree with the reference bit for bit on every device.

Why not the obvious instructions: `/` on float32 is off by up to 2 ulp on a GPU, so codes would differ near ties; there
is no portable rint; a cast to bfloat16 truncates in Triton's CPU interpreter. Contraction to a fused multiply-add can
break none of this: what the magic number is added to is a quotient, never a product, and s (q - z) ends in a product.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_even(x: tl.tensor) -> tl.tensor:
    """Nearest integer, ties to even, of float32 |x| <= 2^22: at 1.5 * 2^23 float32 has no bits for a fraction.

    Larger numbers, infinities included, come out as large as they are, which is all that saturation asks for.
    """
    return (x + 12582912.0) - 12582912.0


@triton.jit
def round_to(x: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """float32 x rounded to the numbers of "float32", "float16" or "bfloat16", still as float32."""
    if DTYPE == "float16":
        return x.to(tl.float16).to(tl.float32)
    elif DTYPE == "bfloat16":  # noqa: RET505  (Triton wants one return per branch of a constant condition)
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # the carry would turn a NaN into a number
    else:
        return x


@triton.jit
def store_rounded(pointers: tl.tensor, x: tl.tensor, mask: tl.tensor) -> None:
    """Store float32 x as the element type of the pointers."""
    element: tl.constexpr = pointers.dtype.element_ty
    if element == tl.bfloat16:
        x = round_to(x, "bfloat16")
    tl.store(pointers, x.to(element), mask=mask)


@triton.jit
def fit_scale(spread: tl.tensor, extent: tl.tensor, finite: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """spread / extent rounded to DTYPE; the smallest subnormal where that underflows, 1 for a block of zeros, NaN where
    the block (`finite` false) or the scale is not finite."""
    smallest: tl.constexpr = 2.0**-24 if DTYPE == "float16" else (2.0**-133 if DTYPE == "bfloat16" else 2.0**-149)
    exact = tl.div_rn(spread, extent)
    scale = round_to(exact, DTYPE)
    scale = tl.where((scale == 0) & (exact > 0), smallest, scale)
    scale = tl.where(scale == 0, 1.0, scale)
    return tl.where(finite & (scale < float("inf")), scale, float("nan"))


@triton.jit
def all_finite(x: tl.tensor, AXIS: tl.constexpr) -> tl.tensor:
    """Whether no element along the axis is NaN or infinite."""
    return tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), axis=AXIS) == 0
