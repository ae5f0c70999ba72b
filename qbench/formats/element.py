"""Element formats: the values that one code can stand for, in units of the scale."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Int:
    """Uniform integers of `bits` bits.

    Unsigned (0 … 2^bits-1) codes go with a zero point; signed ones (-2^(bits-1) … 2^(bits-1)-1) without.
    """

    bits: int
    signed: bool

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
        """float32 [2^bits], ascending: the definition of the format."""
        return torch.arange(self.minimum, self.maximum + 1, dtype=torch.float32)

    @property
    def storage(self) -> torch.dtype:
        """dtype that holds one code of at most 8 bits."""
        return torch.int8 if self.signed else torch.uint8
