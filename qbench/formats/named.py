"""Formats by their published names: a new one is a literal here."""

from __future__ import annotations

import re

import torch

from qbench.formats.element import Codebook, Element, Float, Int, default_specials
from qbench.formats.ranges import RangeFit
from qbench.formats.scale import SCALES
from qbench.formats.tensor import Block, TensorFormat

FLOAT_NAME = re.compile(r"e(\d)m(\d{1,2})(finite|fn|ieee|fnuz)?")

#: What `format=fp` means for a number of bits: the OCP element formats.
FP_BY_BITS = {8: "e4m3", 6: "e3m2", 4: "e2m1"}


def normal_float(bits: int) -> Codebook:
    """NF2, NF3, … (QLoRA, arXiv 2305.14314): quantiles of N(0, 1) at equally spaced probabilities, 2^(bits-1) positive
    and 2^(bits-1) - 1 negative ones, and 0, divided by the largest."""
    half = 1 << (bits - 1)
    count = 2 * half
    offset = 1 - (1 / (count - 1) + 1 / count) / 4
    positive = torch.special.ndtri(torch.linspace(offset, 0.5, half + 1, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(offset, 0.5, half, dtype=torch.float64)[:-1])
    values = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive]).sort().values
    return Codebook(f"nf{bits}", tuple((values / values.max()).float().tolist()), bits)


# fmt: off
# As published; the quantiles of `normal_float(4)` differ from it in the seventh digit.
NF4 = Codebook("nf4", (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
), 4)
# AF4 for blocks of 64 (arXiv 2306.06965, table of the abnormal float).
AF4 = Codebook("af4", (
    -1.0, -0.69441, -0.51244, -0.37370, -0.25608, -0.14982, -0.04935, 0.0,
    0.04273, 0.12934, 0.21961, 0.31676, 0.42564, 0.55496, 0.72425, 1.0,
), 4)
# fmt: on
# The 4-bit float of bitsandbytes: magnitudes in twelfths, and 1/192.
BNB_FP4_MAGNITUDES = (1 / 192, 2 / 12, 3 / 12, 4 / 12, 6 / 12, 8 / 12, 1.0)
FP4 = Codebook("fp4bnb", tuple(sorted([0.0, *BNB_FP4_MAGNITUDES, *(-value for value in BNB_FP4_MAGNITUDES)])), 4)
TERNARY = Codebook("ternary", (-1.0, 0.0, 1.0), 1.6)

TABLES: dict[str, Element] = {
    "nf2": normal_float(2),
    "nf3": normal_float(3),
    "nf4": NF4,
    "af4": AF4,
    "fp4bnb": FP4,
}


def _mx(name: str, element: Element) -> TensorFormat:
    return TensorFormat(element=element, block=Block(1, 32), scale=SCALES["e8m0"], name=name)


#: Formats whose blocks and scales are part of the name; `group_size`, `symmetric` and `scale_dtype` don't apply.
COMPOSITE: dict[str, TensorFormat] = {
    format.name: format
    for format in (
        _mx("mxfp8", Float(4, 3, "fn")),
        _mx("mxfp8e5m2", Float(5, 2, "ieee")),
        _mx("mxfp6", Float(3, 2)),
        _mx("mxfp6e2m3", Float(2, 3)),
        _mx("mxfp4", Float(2, 1)),
        # Elements in units of 2^-6, which the power-of-two scale absorbs.
        _mx("mxint8", Int(8, signed=True)),
        TensorFormat(element=Float(2, 1), block=Block(1, 16), scale=SCALES["e4m3"], name="nvfp4"),
        # DeepSeek-V3 (arXiv 2412.19437): tiles at the edge may be smaller.
        TensorFormat(
            element=Float(4, 3, "fn"), block=Block(128, 128), scale=SCALES["float32"], partial=True, name="fp8block"
        ),
        TensorFormat(element=NF4, block=Block(1, 64), scale=SCALES["float32"], name="nf4"),
        TensorFormat(element=NF4, block=Block(1, 64), scale=SCALES["dq8"], name="nf4dq"),
        TensorFormat(element=AF4, block=Block(1, 64), scale=SCALES["float32"], name="af4"),
        TensorFormat(element=FP4, block=Block(1, 64), scale=SCALES["float32"], name="fp4bnb"),
        # BitNet b1.58 (arXiv 2402.17764) as a format: one scale per weight, mean|w|.
        TensorFormat(element=TERNARY, block=Block(0, 0), range=RangeFit(method="absmean"), name="ternary"),
        # QServe (arXiv 2405.04532): INT4 groups inside INT8 channels, so that the matmul can run in INT8.
        TensorFormat(
            element=Int(4, signed=False), block=Block(1, 128), zero="int", scale=SCALES["int8"], name="int4in8"
        ),
    )
}


def float_element(name: str) -> Float | None:
    """`e4m3`, `e3m4ieee`, … ; None if the name is not of that form or the format cannot be held exactly."""
    match = FLOAT_NAME.fullmatch(name)
    if match is None:
        return None
    exponent, mantissa = int(match[1]), int(match[2])
    if not (1 <= exponent <= 7 and 0 <= mantissa <= 10 and 3 <= 1 + exponent + mantissa <= 16):
        return None
    return Float(exponent, mantissa, match[3] or default_specials(exponent, mantissa))


def activation_format(name: str) -> TensorFormat:
    """The composite format `name` as it is used for activations `[tokens, features]`.

    Blocks run along the features; FP8 tiles become groups of 128 features per token.
    """
    if name == "fp8block":
        return TensorFormat(
            element=Float(4, 3, "fn"), block=Block(1, 128), scale=SCALES["float32"], partial=True, name=name
        )
    return COMPOSITE[name]
