"""What the Triton kernels share: rounding that is the same bit for bit on every backend.

Why not the obvious instructions: `/` on float32 is not correctly rounded on a GPU (2 ulp), so codes would differ from
the reference near ties; there is no portable rint; a cast to bfloat16 truncates in Triton's CPU interpreter.
None of it can be broken by contraction to a fused multiply-add: no product is ever followed by the magic addition.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: float32 has no fraction bits there
_SMALLEST = tl.constexpr({"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133})


@triton.jit
def round_even(x):  # noqa: ANN001, ANN201
    """Nearest integer, ties to even, of float32 |x| < 2^22: adding the magic number shifts the fraction out."""
    return (x + _MAGIC) - _MAGIC
