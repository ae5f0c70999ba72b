"""Element formats: the values that one code can stand for, in units of the scale."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from qbench.errors import NumericsError

Reach = Literal["midpoint", "narrow", "full"]
Specials = Literal["finite", "fn", "ieee", "fnuz"]


class Element(ABC):
    """Values that one code can stand for. A *level* is such a value, float32, in units of the scale."""

    name: str
    bits: float
    """Bits that one packed code takes."""

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """float32, ascending: every finite level. The definition of the format."""

    @property
    @abstractmethod
    def extent(self) -> float:
        """A symmetric scale is max|x| / extent."""

    @property
    @abstractmethod
    def storage(self) -> torch.dtype:
        """dtype that holds one unpacked code."""

    @abstractmethod
    def nearest(self, x: Tensor) -> Tensor:
        """Nearest level of every x (float32, overwritten): ties to the even code, beyond the ends the end.

        NaN stays NaN.
        """

    @abstractmethod
    def to_codes(self, levels: Tensor) -> Tensor:
        """Codes, in `storage`, of values that are levels."""

    @abstractmethod
    def from_codes(self, codes: Tensor) -> Tensor:
        """Levels, float32."""

    def encode(self, x: Tensor) -> Tensor:
        """Codes of the levels nearest to x (float32, in units of the scale). NumericsError for a NaN that the format
        cannot represent."""
        return self.to_codes(self.nearest(x.float().clone()))


@dataclass(frozen=True)
class Int(Element):
    """Uniform integers of `bits` bits.

    Unsigned (0 … 2^bits-1) codes go with a zero point; signed ones (-2^(bits-1) … 2^(bits-1)-1) without. `reach` is
    where a symmetric scale puts max|x|: "midpoint" on (2^bits-1)/2 (GPTQ's authors, compressed-tensors), "narrow" on
    2^(bits-1)-1 (QuaRot, LLMC), "full" on -2^(bits-1), with a negative scale where the largest is positive (AutoRound).
    """

    bits: int
    signed: bool
    reach: Reach = "midpoint"

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def minimum(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def maximum(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def steps(self) -> int:
        """Number of steps between the smallest and the largest value: 2^bits - 1."""
        return (1 << self.bits) - 1

    @property
    def codebook(self) -> Tensor:
        return torch.arange(self.minimum, self.maximum + 1, dtype=torch.float32)

    @property
    def extent(self) -> float:
        return {"midpoint": self.steps / 2, "narrow": float(self.maximum), "full": float(1 << (self.bits - 1))}[
            self.reach
        ]

    @property
    def storage(self) -> torch.dtype:
        return torch.int8 if self.signed else torch.uint8

    def nearest(self, x: Tensor) -> Tensor:
        return x.round_().clamp_(self.minimum, self.maximum)

    def to_codes(self, levels: Tensor) -> Tensor:
        _refuse_nan(levels, self.name)
        return levels.to(self.storage)

    def from_codes(self, codes: Tensor) -> Tensor:
        return codes.float()


@dataclass(frozen=True)
class Float(Element):
    """Floats of one sign bit, `exponent` and `mantissa` bits, with subnormals (OFP8, arXiv 2209.05433).

    Value (-1)^sign 2^(e-bias) (1 + f/2^M), or 2^(1-bias) f/2^M where e = 0; bias 2^(E-1)-1. `specials` says which codes
    are no numbers: "finite" none, "fn" the all-ones magnitude (NaN), "ieee" the whole top exponent (infinities and
    NaN), "fnuz" minus zero (NaN; bias 2^(E-1)). Encoding saturates: nothing becomes infinite.
    """

    exponent: int
    mantissa: int
    specials: Specials = "finite"

    @property
    def name(self) -> str:
        plain = f"e{self.exponent}m{self.mantissa}"
        return plain if self.specials == default_specials(self.exponent, self.mantissa) else plain + self.specials

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        return (1 << (self.exponent - 1)) - (0 if self.specials == "fnuz" else 1)

    @property
    def largest_code(self) -> int:
        """Magnitude code of the largest finite value."""
        top = (1 << (self.exponent + self.mantissa)) - 1
        if self.specials == "fn":
            return top - 1
        return ((1 << self.exponent) - 1 << self.mantissa) - 1 if self.specials == "ieee" else top

    @property
    def maximum(self) -> float:
        e, f = divmod(self.largest_code, 1 << self.mantissa)
        step = 2.0 ** (max(e, 1) - self.bias - self.mantissa)
        return step * (f + (1 << self.mantissa) * (e > 0))

    @property
    def has_nan(self) -> bool:
        return self.specials in ("fn", "fnuz") or (self.specials == "ieee" and self.mantissa > 0)

    @property
    def extent(self) -> float:
        return self.maximum

    @property
    def codebook(self) -> Tensor:
        magnitudes = self._magnitudes[: self.largest_code + 1]
        return torch.cat([-magnitudes.flip(0)[:-1], magnitudes])

    @property
    def storage(self) -> torch.dtype:
        return torch.uint8 if self.bits <= 8 else torch.int16

    @property
    def _magnitudes(self) -> Tensor:
        """float32 value of every magnitude code, specials read as numbers."""
        code = torch.arange(1 << (self.exponent + self.mantissa), dtype=torch.float64)
        e, f = torch.floor(code / 2**self.mantissa), code % 2**self.mantissa
        value = torch.where(e == 0, 2.0 * f, 2.0**e * (f + 2**self.mantissa))
        return (value * 2.0 ** (-self.bias - self.mantissa)).float()

    def nearest(self, x: Tensor) -> Tensor:
        magnitude = x.abs().clamp_max_(self.maximum)
        # Normal values: round the float32 mantissa to M bits in integer arithmetic, half to even; a carry moves on to
        # the next binade by itself.
        shift = 23 - self.mantissa
        pattern = magnitude.view(torch.int32)
        # Without mantissa bits the last bit of a code is that of its exponent, whose bias may be odd.
        odd = ((pattern >> shift) + (127 - self.bias << self.mantissa)) & 1
        normal = ((pattern + (odd + ((1 << (shift - 1)) - 1))) >> shift << shift).view(torch.float32)
        # Subnormal values: adding 2^23 steps leaves no room for anything below one step.
        magic = 2.0 ** (23 + 1 - self.bias - self.mantissa)
        subnormal = (magnitude + magic) - magic
        rounded = torch.where(magnitude < 2.0 ** (1 - self.bias), subnormal, normal)
        rounded = torch.where(torch.isnan(magnitude), magnitude, rounded)
        return torch.copysign(rounded, x, out=x) if not x.requires_grad else torch.copysign(rounded, x)

    def to_codes(self, levels: Tensor) -> Tensor:
        nan = torch.isnan(levels)
        if not self.has_nan:
            _refuse_nan(levels, self.name)
        magnitude = levels.abs()
        normal = (magnitude.view(torch.int32) >> (23 - self.mantissa)) - ((127 - self.bias) << self.mantissa)
        subnormal = (magnitude.nan_to_num(0) * 2.0 ** (self.bias + self.mantissa - 1)).to(torch.int32)
        code = torch.where(magnitude < 2.0 ** (1 - self.bias), subnormal, normal)
        sign = 1 << (self.exponent + self.mantissa)
        negative = torch.signbit(levels)
        if self.specials == "fnuz":
            negative = negative & (magnitude != 0)
            return torch.where(nan, sign, code + sign * negative).to(self.storage)
        code = torch.where(nan, sign - 1, code)  # all ones is a NaN wherever there is one
        return (code + sign * negative).to(self.storage)

    def from_codes(self, codes: Tensor) -> Tensor:
        magnitudes = self._magnitudes
        if self.specials == "fn":
            magnitudes[-1] = torch.nan
        elif self.specials == "ieee":
            magnitudes[self.largest_code + 1 :] = torch.nan
            magnitudes[self.largest_code + 1] = torch.inf
        table = torch.cat([magnitudes, -magnitudes])
        if self.specials == "fnuz":
            table[len(magnitudes)] = torch.nan
        return table.to(codes.device)[codes.to(torch.int32) & ((1 << self.bits) - 1)]


@dataclass(frozen=True)
class Codebook(Element):
    """Levels by value, ascending; the code is the index (NF4, AF4, ternary, anything learned)."""

    label: str = field(compare=False)
    values: tuple[float, ...]
    bits: float

    @property
    def name(self) -> str:
        return self.label

    @property
    def codebook(self) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float32)

    @property
    def extent(self) -> float:
        return max(abs(self.values[0]), abs(self.values[-1]))

    @property
    def storage(self) -> torch.dtype:
        return torch.uint8

    def nearest(self, x: Tensor) -> Tensor:
        levels = self.codebook.to(x.device)[self._index(x)]
        return torch.where(torch.isnan(x), x, levels)

    def to_codes(self, levels: Tensor) -> Tensor:
        _refuse_nan(levels, self.name)
        return self._index(levels).to(self.storage)

    def from_codes(self, codes: Tensor) -> Tensor:
        return self.codebook.to(codes.device)[codes.to(torch.int32)]

    def _index(self, x: Tensor) -> Tensor:
        """Index of the nearest level; exactly between two, the even one."""
        return torch.bucketize(x.contiguous(), self._last_below.to(x.device))

    @cached_property
    def _last_below(self) -> Tensor:
        """For every level but the last the largest float32 that is rounded to it: the midpoint to the next one if
        that belongs to it, otherwise the number before. A midpoint is exact in float64 but often not in float32."""
        levels = torch.tensor(self.values, dtype=torch.float64).float().double()
        midpoints = (levels[1:] + levels[:-1]) / 2
        below = midpoints.float()
        not_its_own = (below.double() > midpoints) | (
            (below.double() == midpoints) & (torch.arange(len(below)) % 2 == 1)
        )
        return torch.where(not_its_own, torch.nextafter(below, torch.tensor(-torch.inf)), below)


def default_specials(exponent: int, mantissa: int) -> Specials:
    """What a plain `eXmY` means: OCP's E4M3 (448, one NaN) and E5M2 (57344, IEEE), numbers only in every other."""
    return {(4, 3): "fn", (5, 2): "ieee"}.get((exponent, mantissa), "finite")


def _refuse_nan(levels: Tensor, name: str) -> None:
    if bool(torch.isnan(levels).any()):
        raise NumericsError(f"NaN cannot be encoded in {name}, which has no code for it")
