"""DGQ (arXiv 2310.04836): INT4 groups inside INT8 channels, with both scales searched for the layer's output.

A weight decodes to (q - z) S s: code q, zero point z and integer S of a group, s of a row. (q - z) S is an int8 number,
so that the matmul with int8 inputs needs integers only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qbench.calibration.statistics import Hessian
from qbench.formats import SCALES, Int, QTensor, Range, RangeFit, TensorFormat, fit, quantize
from qbench.formats.ranges import extrema
from qbench.formats.scale import FLOAT16
from qbench.formats.scheme import Scheme
from qbench.stages.base import BlockView, Kind, Need, Outcome, Stage, require
from qbench.stages.range_awq_clip import block_error, diagonal_blocks

#: Rows whose channel scale is searched at once: bounds the temporaries of one step.
ROWS = 4096
#: The shares of a range that the authors try: 1.02 less 1/n, 2/n … n/n of these.
WIDEST, GROUP_SPAN, CHANNEL_SPAN = 1.02, 0.22, 0.82


def dgq(
    weight: Tensor,
    hessian: Tensor,
    fmt: TensorFormat,
    *,
    clip: Range | None = None,
    n_grid: int = 20,
    n_grid_channel: int = 80,
) -> QTensor:
    """`weight` (float32 [out, in]) in the two-level format `fmt`, given hessian = E[x xᵀ] [in, in].

    Phase 1: every group's range is 1.02 - 0.22 k/n_grid of the full one (k = 1 … n_grid), or all of it; the one with
    the least E(Σ_j in group Δ_j x_j)², by a float scale s4 and a zero point z. Phase 2: every row's int8 scale is
    s = (1.02 - 0.82 k/n_grid_channel) max|w| / 127, S = round(s4/s) within 1 … 127, and q the nearest code to
    w/(S s) + z for which (q - z) S fits int8; the k with the row's least E(Δ x)² wins.

    Departures: both errors are exact, over all tokens, from the Hessian; the full range is among those of phase 1, and
    rounding to nearest in the format (codes of codes, min-max scales) among the candidates of phase 2, which so never
    gives a worse output than that. clip: the full ranges, [out, groups]; min-max without.
    """
    parts = [
        _rows(rows, hessian, fmt, _part(clip, start, len(rows)), n_grid, n_grid_channel)
        for start, rows in zip(range(0, len(weight), ROWS), weight.split(ROWS))
    ]
    if len(parts) == 1:
        return parts[0]

    def joined(get: Callable[[QTensor], Tensor]) -> Tensor:
        return torch.cat([get(part) for part in parts])

    return QTensor(
        joined(lambda part: part.codes),
        joined(lambda part: part.scale),
        joined(lambda part: part.zero),
        fmt,
        scale_codes=joined(lambda part: part.scale_codes),
        outer=joined(lambda part: part.outer),
    )


def _part(clip: Range | None, start: int, count: int) -> Range | None:
    rows = slice(start, start + count)
    return None if clip is None else Range(clip.lower[rows], clip.upper[rows])


def _rows(
    weight: Tensor, hessian: Tensor, fmt: TensorFormat, clip: Range | None, n_grid: int, n_grid_channel: int
) -> QTensor:
    """`dgq` of some rows."""
    step, zero = group_scales(weight, hessian, fmt, clip or extrema(weight, fmt), n_grid)
    plain = quantize(weight, fmt) if clip is None else quantize(weight, fmt, fit(weight, fmt, clip))
    found = {
        "levels": fmt.element.from_codes(plain.codes),
        "zero": plain.zero,
        "inner": plain.scale_codes.float(),
        "outer": plain.outer,
    }
    least = _row_error(plain.dequantize() - weight, hessian)
    largest = weight.abs().amax(dim=1, keepdim=True)
    for k in range(1, n_grid_channel + 1):
        share = WIDEST - CHANNEL_SPAN * k / n_grid_channel
        outer = FLOAT16.store(share * largest, 127).value
        inner = (step / outer).round_().clamp_(1, 127)
        levels, values = two_level(weight, fmt, inner, outer, zero)
        error = _row_error(values - weight, hessian)
        better = (error < least)[:, None]
        least = torch.minimum(error, least)
        candidate = {"levels": levels, "zero": zero, "inner": inner, "outer": outer}
        found = {name: torch.where(better, candidate[name], value) for name, value in found.items()}
    return QTensor(
        fmt.element.to_codes(found["levels"]),
        found["inner"] * found["outer"],
        found["zero"],
        fmt,
        scale_codes=found["inner"].to(torch.uint8),
        outer=found["outer"],
    )


def group_scales(weight: Tensor, hessian: Tensor, fmt: TensorFormat, full: Range, n_grid: int) -> tuple[Tensor, Tensor]:
    """Phase 1: float scale and zero point of every group, float32 [out, groups] each."""
    one_level = TensorFormat(element=fmt.element, block=fmt.block, zero=fmt.zero, scale=SCALES["float32"])
    diagonal = diagonal_blocks(hessian, fmt.width(weight.shape[1]))
    least = scale = zero = None
    for share in (1.0, *(WIDEST - GROUP_SPAN * k / n_grid for k in range(1, n_grid + 1))):
        params = fit(weight, one_level, Range(share * full.lower, share * full.upper))
        delta = quantize(weight, one_level, params).dequantize().sub_(weight)
        error = block_error(delta, diagonal, one_level)
        if least is None:
            least, scale, zero = error, params.scale, params.zero
            continue
        better = error < least
        least = torch.where(better, error, least)
        scale, zero = torch.where(better, params.scale, scale), torch.where(better, params.zero, zero)
    return scale, zero


def two_level(weight: Tensor, fmt: TensorFormat, inner: Tensor, outer: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Levels q and values (q - z) S s, float32 [out, in]: the nearest to w whose (q - z) S lies within ±127.

    inner: S, integers [out, groups]; outer: s [out, 1]; zero: z [out, groups].
    """
    step = (inner * outer)[..., None]
    limit = torch.floor(127 / inner)[..., None]
    steps = fmt.blocks(weight) / step
    steps = torch.clamp(steps.round_(), -limit, limit)
    levels = (steps + zero[..., None]).clamp_(fmt.element.minimum, fmt.element.maximum)
    values = (levels - zero[..., None]) * step
    return fmt.unblocks(levels, weight.shape), fmt.unblocks(values, weight.shape)


def _row_error(delta: Tensor, hessian: Tensor) -> Tensor:
    """E(Δ x)² of every row, [out]."""
    return (delta @ hessian * delta).sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class Dgq(Stage):
    """Both searches on every weight, from the inputs of the full-precision stream."""

    name: ClassVar[str] = "dgq"
    kind: ClassVar[Kind] = Kind.ROUND
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Need]] = frozenset({Need(Hessian, "full")})

    n_grid: int = 20
    n_grid_channel: int = 80

    def check(self, formats: frozenset[TensorFormat]) -> None:
        require(self.n_grid >= 1, "algo.n_grid", self.n_grid, "a number of ranges per group >= 1 (authors: 20)")
        accepted = "a number of scales per channel >= 1 (authors: 80)"
        require(self.n_grid_channel >= 1, "algo.n_grid_channel", self.n_grid_channel, accepted)
        for fmt in formats:
            remedy = "int8 with dgq (scheme=w4a8): integer scales of groups inside int8 channels"
            require(fmt.scale.name == "int8", "scale_dtype", fmt.scale.name, remedy)
            asymmetric = isinstance(fmt.element, Int) and fmt.zero == "int"
            require(asymmetric, "symmetric", fmt.zero == "none", "false with dgq: its groups have zero points")
            remedy = "minmax with dgq, which searches the ranges itself"
            require(fmt.range.method == RangeFit().method, "range.method", fmt.range.method, remedy)

    def check_scheme(self, scheme: Scheme) -> None:
        skipped = [o for o in scheme.overrides if "weight" in o.roles and o.weight is None]
        changed = [o for o in scheme.overrides if "input" in o.roles and o not in skipped]
        for inputs in (scheme.input, *(o.input for o in changed)):
            int8 = inputs is not None and inputs.format.element.name == "int8"
            value = 16 if inputs is None else inputs.label
            require(int8, "act_bits", value, "8 with dgq (scheme=w4a8): two-level weights are for int8 inputs")

    def apply(self, view: BlockView) -> Outcome:
        codes: dict[str, QTensor] = {}
        for group in view.groups:
            hessian = view.statistic(group, Hessian).value()
            for ref in group.weights:
                codes[ref.name] = dgq(
                    view.weight(ref).float(),
                    hessian,
                    view.format(ref),
                    clip=view.ranges.get(ref.name),
                    n_grid=self.n_grid,
                    n_grid_channel=self.n_grid_channel,
                )
        return Outcome(codes=codes)
