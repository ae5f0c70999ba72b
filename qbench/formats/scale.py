"""How scales are stored: a scale is a number in a format of its own, which may need a scale again."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qbench.errors import NumericsError
from qbench.formats.element import Codebook, Float

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
E4M3 = Float(4, 3, "fn")


@dataclass(frozen=True)
class Stored:
    """Scales of all blocks: `value` float32 [rows, groups] as they are used, `codes` uint8 as they are stored (None
    where the value itself is), `outer` what gives the codes meaning (None where nothing does)."""

    value: Tensor
    codes: Tensor | None = None
    outer: Tensor | None = None


class ScaleFormat(ABC):
    """What scales are rounded to. `spread` is the length in x that `extent` levels cover, so the ideal scale is
    spread / extent, [rows, groups] per block.

    needs_outer: scales share a number (see `outer`) that has to be known before the first is stored. whole: scales are
    stored together, so that no block's scale is known before all are. by_row: scales of different rows share nothing.
    dtype_stored, dtype_outer: what a scale (its code or itself) and what gives codes meaning are stored as.
    """

    name: str
    needs_outer: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    by_row: ClassVar[bool] = True
    dtype_outer: ClassVar[torch.dtype] = torch.float32

    @property
    def dtype_stored(self) -> torch.dtype:
        return torch.uint8

    def shape_outer(self, rows: int, groups: int) -> tuple[int, ...] | None:
        """Shape of `Stored.outer` for scales [rows, groups]; None where there is none."""
        return None

    def bits(self, rows: int, groups: int) -> int:
        """Storage of all scales and of what gives them meaning."""
        shape = self.shape_outer(rows, groups)
        outer = 0 if shape is None else math.prod(shape) * self.dtype_outer.itemsize
        return 8 * (rows * groups * self.dtype_stored.itemsize + outer)

    @abstractmethod
    def store(self, spread: Tensor, extent: float, outer: Tensor | None = None) -> Stored:
        """Rounded scales, never 0; a block of zeros (spread 0) gets one that decodes zeros to zeros."""

    def outer(self, amax: Tensor, extent: float) -> Tensor | None:
        """What all scales share, from max|x| of every block, [rows, groups]."""
        return None

    def value(self, codes: Tensor, outer: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """float32 [rows, groups] from what was stored: itself, unless codes stand for it."""
        return codes.float()


@dataclass(frozen=True)
class FloatScale(ScaleFormat):
    """float32, float16 or bfloat16. What would underflow becomes the smallest subnormal number."""

    dtype: str = "float16"

    @property
    def name(self) -> str:
        return self.dtype

    @property
    def dtype_stored(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def store(self, spread: Tensor, extent: float, outer: Tensor | None = None) -> Stored:
        scale = spread / extent
        stored = scale.to(DTYPES[self.dtype])
        info = torch.finfo(stored.dtype)
        tiny = info.smallest_normal * info.eps  # the smallest subnormal
        underflowed = (stored == 0) & (scale != 0)
        value = torch.where(underflowed, torch.copysign(torch.full_like(scale, tiny), scale), stored.float())
        _require_finite(value, spread, f"in {self.dtype}", "scale_dtype=float32 is needed")
        return Stored(torch.where(value == 0, torch.ones_like(value), value))


@dataclass(frozen=True)
class PowerOfTwo(ScaleFormat):
    """E8M0 (OCP MX v1.0): 2^(code - 127). "floor" is the standard's rule, floor(log2 max|x|) less the exponent of the
    largest level, which saturates the top values; "ceil" takes the smallest power that saturates nothing."""

    rounding: Literal["floor", "ceil"] = "floor"

    @property
    def name(self) -> str:
        return "e8m0" if self.rounding == "floor" else "e8m0ceil"

    def store(self, spread: Tensor, extent: float, outer: Tensor | None = None) -> Stored:
        _require_finite(spread, spread, "in e8m0", "they cannot be quantized")
        _, largest = torch.frexp(spread)  # spread = m 2^e with m in [1/2, 1)
        top = math.frexp(extent)[1]
        exponent = largest - top
        if self.rounding == "ceil":
            # One more where the exponents alone would let spread / 2^exponent exceed the extent.
            exponent = exponent + (torch.ldexp(spread, -exponent) > extent).int()
        exponent = torch.where(spread == 0, -127, exponent.clamp(-127, 127))
        codes = (exponent + 127).to(torch.uint8)
        return Stored(self.value(codes, None, tuple(codes.shape)), codes)

    def value(self, codes: Tensor, outer: Tensor | None, shape: tuple[int, int]) -> Tensor:
        exponent = codes.to(torch.int32) - 127
        return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


@dataclass(frozen=True)
class Fp8Scale(ScaleFormat):
    """E4M3 with one float32 number per tensor (NVFP4): G = 448 extent / max|x| over the tensor, code = e4m3(G · ideal),
    scale = code / G. A block too small for E4M3 gets its smallest subnormal, so that no scale is 0."""

    needs_outer: ClassVar[bool] = True
    by_row: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "e4m3"

    def shape_outer(self, rows: int, groups: int) -> tuple[int, ...]:
        return 1, 1

    def outer(self, amax: Tensor, extent: float) -> Tensor:
        largest = amax.max().float()
        _require_finite(largest, largest, "in e4m3", "they cannot be quantized")
        found = E4M3.maximum * extent / largest
        return torch.where(torch.isfinite(found), found, torch.ones_like(found)).view(1, 1)

    def store(self, spread: Tensor, extent: float, outer: Tensor | None = None) -> Stored:
        ideal = (spread / extent * outer).clamp_min_(2.0**-9)
        _require_finite(ideal, spread, "in e4m3", "they cannot be quantized")
        codes = E4M3.encode(ideal)
        return Stored(self.value(codes, outer, tuple(codes.shape)), codes, outer)

    def value(self, codes: Tensor, outer: Tensor | None, shape: tuple[int, int]) -> Tensor:
        return E4M3.from_codes(codes) / outer


@dataclass(frozen=True)
class IntegerScale(ScaleFormat):
    """Integers 1 … 255 in units of one float16 scale per row: two-level formats such as INT4 groups inside INT8
    channels (QServe, arXiv 2405.04532, §4.1; DGQ, arXiv 2310.04836), for integer elements.

    The row's scale is max|x| / `protected`, rounded up: 119 instead of 127 for INT4 leaves room, so that no decoded
    value of min-max ranges leaves int8. (Other ranges may: encoding clips what would.)
    """

    needs_outer: ClassVar[bool] = True
    dtype_outer: ClassVar[torch.dtype] = torch.float16

    @property
    def name(self) -> str:
        return "int8"

    @staticmethod
    def protected(extent: float) -> int:
        """Largest int8 code p: rounded to multiples of s it moves by s/2, and the widest range of a group, from -p to
        p, has steps of s = p / extent; so p + s/2 = 127."""
        return int(127 * 2 * extent / (2 * extent + 1))

    def shape_outer(self, rows: int, groups: int) -> tuple[int, ...]:
        return rows, 1

    def outer(self, amax: Tensor, extent: float) -> Tensor:
        """float32 [rows, 1], representable in float16."""
        largest, protected = amax.amax(dim=1, keepdim=True).float(), self.protected(extent)
        value = FLOAT16.store(largest, protected).value
        # Rounded down, a scale would let codes beyond `protected`; positive float16 patterns count upwards.
        above = (value.to(torch.float16).view(torch.int16) + 1).view(torch.float16).float()
        value = torch.where(value.double() * protected < largest.double(), above, value)
        _require_finite(value, largest, "in float16", "they cannot be quantized in int8 channels")
        return value

    def store(self, spread: Tensor, extent: float, outer: Tensor | None = None) -> Stored:
        _require_finite(spread, spread, "in int8", "they cannot be quantized")
        codes = (spread / extent / outer).round_().clamp_(1, 255).to(torch.uint8)
        return Stored(self.value(codes, outer, tuple(codes.shape)), codes, outer)

    def value(self, codes: Tensor, outer: Tensor | None, shape: tuple[int, int]) -> Tensor:
        return codes.float() * outer


@dataclass(frozen=True)
class DoubleQuantized(ScaleFormat):
    """QLoRA's double quantization (arXiv 2305.14314): scales less their mean, in blocks of 256 over the whole tensor,
    each divided by its largest magnitude and rounded to an 8-bit dynamic map; mean and magnitudes are float32."""

    block: int = 256
    whole: ClassVar[bool] = True
    by_row: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "dq8"

    def shape_outer(self, rows: int, groups: int) -> tuple[int, ...]:
        return (1 + -(-rows * groups // self.block),)

    def store(self, spread: Tensor, extent: float, outer: Tensor | None = None) -> Stored:
        ideal = spread / extent
        _require_finite(ideal, spread, "in dq8", "they cannot be quantized")
        mean = ideal.mean()
        flat = (ideal - mean).flatten()
        padded = torch.nn.functional.pad(flat, (0, -len(flat) % self.block)).view(-1, self.block)
        largest = padded.abs().amax(dim=1)
        codes = dynamic_map().encode(padded / torch.where(largest == 0, 1.0, largest)[:, None])
        codes = codes.flatten()[: len(flat)].view(ideal.shape)
        outer = torch.cat([mean[None], largest])
        value = self.value(codes, outer, tuple(ideal.shape))
        return Stored(value, codes, outer)

    def value(self, codes: Tensor, outer: Tensor | None, shape: tuple[int, int]) -> Tensor:
        flat = dynamic_map().from_codes(codes.flatten())
        largest = outer[1:].repeat_interleave(self.block)[: len(flat)]
        # What is far below the mean may come out as 0 or less, which could not divide; its block decodes to nothing.
        return (flat * largest + outer[0]).view(shape).clamp_min(torch.finfo(torch.float32).smallest_normal)


def dynamic_map() -> Codebook:
    """The signed 8-bit dynamic data type (Dettmers, arXiv 2110.02861): for i = 0 … 6, the middles of 2^i equal parts of
    [0.1, 1], times 10^(i-6), with both signs; 0; and 1."""
    values = [0.0, 1.0]
    for i in range(7):
        count = 2**i
        for k in range(count):
            middle = 0.1 + 0.9 * (k + 0.5) / count
            values += [middle * 10.0 ** (i - 6), -middle * 10.0 ** (i - 6)]
    return Codebook("dynamic8", tuple(sorted(values)), 8)


FLOAT16 = FloatScale("float16")
SCALES: dict[str, ScaleFormat] = {
    "float16": FLOAT16,
    "bfloat16": FloatScale("bfloat16"),
    "float32": FloatScale("float32"),
    "e8m0": PowerOfTwo("floor"),
    "e8m0ceil": PowerOfTwo("ceil"),
    "e4m3": Fp8Scale(),
    "int8": IntegerScale(),
    "dq8": DoubleQuantized(),
}


def _require_finite(value: Tensor, spread: Tensor, where: str, remedy: str) -> None:
    if not torch.isfinite(value).all():
        raise NumericsError(
            f"scale is not finite {where}: largest range {spread.max().item():g}; NaN or infinite weights, or {remedy}"
        )
