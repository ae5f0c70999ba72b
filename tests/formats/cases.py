"""Formats and tensors that several tests go through, and definitions told again in another way."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qbench.formats import Block, Codebook, Element, Float, Int, TensorFormat
from qbench.formats.named import TABLES, TERNARY
from qbench.formats.scale import dynamic_map

FLOATS = [
    Float(exponent, mantissa, specials)
    for exponent in range(1, 8)
    for mantissa in range(7)
    for specials in ("finite", "fn", "ieee", "fnuz")
    if 3 <= 1 + exponent + mantissa <= 8
]
INTS = [Int(bits, signed) for bits in range(2, 9) for signed in (False, True)]
CODEBOOKS: list[Codebook] = [*TABLES.values(), TERNARY, dynamic_map()]
ELEMENTS: list[Element] = [*INTS, *FLOATS, *CODEBOOKS]


def name_of(element: object) -> str:
    """A test's id."""
    if isinstance(element, Int):
        return f"{'' if element.signed else 'u'}{element.name}"
    if isinstance(element, TensorFormat):
        return element.label
    return element.name if isinstance(element, Element) else str(element)


def all_codes(element: Element) -> Tensor:
    """Every code of an element of at most 8 bits, in its storage dtype."""
    if isinstance(element, Float):
        return torch.arange(1 << element.bits).to(element.storage)
    if isinstance(element, Int):
        return torch.arange(element.minimum, element.maximum + 1).to(element.storage)
    return torch.arange(len(element.values)).to(element.storage)


def awkward_floats(seed: int = 0, patterns: int = 1 << 16) -> Tensor:
    """Every float16 that is a number and random float32 bit patterns, float32, no NaN."""
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    generator = torch.Generator().manual_seed(seed)
    random = torch.randint(-(1 << 31), 1 << 31, (patterns,), generator=generator).to(torch.int32).view(torch.float32)
    both = torch.cat([halves, random])
    return both[~both.isnan()]


def nearest_index(levels: np.ndarray, parity: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Index of the level nearest to x, of a tie the one with an even code, by comparing with midpoints in float64.

    levels: float32 ascending. parity: lowest bit of each one's code."""
    wide = levels.astype(np.float64)
    middle = (wide[1:] + wide[:-1]) / 2
    assert np.array_equal(middle * 2 - wide[1:], wide[:-1]), "midpoints are not exact in float64"
    index = np.searchsorted(middle, x.astype(np.float64), side="left")
    tie = (index < len(middle)) & (x == middle[np.minimum(index, len(middle) - 1)])
    return index + (tie & (parity[index] == 1))


def weights(rows: int = 24, columns: int = 64, seed: int = 0, kind: str = "normal") -> Tensor:
    """float32 [rows, columns]: "normal", or "outliers": with a few columns, rows and elements far out."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    if kind == "outliers":
        w[:, ::13] *= 20
        w[rows // 2] *= 50
        w[0, columns // 3] = 300.0
    return w


def block_of(block: Block, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row and column of the scale that every element of a tensor uses, by the definition of a block."""
    rows, columns = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    down = rows // block.rows if block.rows else torch.zeros_like(rows)
    across = columns // block.columns if block.columns else torch.zeros_like(columns)
    return down, across


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Both absent, or equal bit for bit (so that -0 is not 0 and a NaN is itself) with one dtype and shape."""
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
