"""AWQ's clipping search (arXiv 2306.00978, code `auto_clip`): shrink each group's range where its output gains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.calibration.statistics import Hessian
from qbench.formats import Range, RangeFit, TensorFormat, fake_quantize, shared_scale
from qbench.formats.ranges import extrema
from qbench.stages.base import BlockView, Kind, Need, Outcome, Stage, require

ClipRange = Literal["symmetric", "asymmetric"]
CLIP_RANGES = ("symmetric", "asymmetric")

#: Rows searched at once: bounds the temporaries of one step.
ROWS = 4096


def awq_clip(
    weight: Tensor,
    hessian: Tensor,
    fmt: TensorFormat,
    *,
    n_grid: int = 20,
    max_shrink: float = 0.5,
    clip_range: ClipRange = "symmetric",
) -> Range:
    """Best range of every block of `weight` (float32 [out, in]) among 1, 1 - 1/n_grid, … of the full one, down to
    above 1 - max_shrink.

    Criterion: mean over tokens of (Σ_j in group x_j (Q(W)_j - W_j))², the change of the group's share of the output,
    which is Δᵀ H_gg Δ with the group's diagonal block of hessian = E[x xᵀ] [in, in]: exact over all tokens (the
    authors sample 512). Q has its scale and zero point from the range and saturates, as the final rounding does. (The
    authors clamp W to the range first; the outermost codes lie up to half a step from its ends, so a clipped weight
    may get the code beside theirs.) symmetric: the range is cut at ±M with M from max|W| (authors). asymmetric:
    shrink min and max by the same factor. The full range is in the grid, so the criterion never gets worse; ties
    keep the wider range.
    """
    if not fmt.by_row or fmt.scale.needs_outer:
        return _search(weight, hessian, fmt, n_grid, max_shrink, clip_range)
    parts = [_search(rows, hessian, fmt, n_grid, max_shrink, clip_range) for rows in weight.split(ROWS)]
    return Range(torch.cat([p.lower for p in parts]), torch.cat([p.upper for p in parts]))


def _search(
    weight: Tensor, hessian: Tensor, fmt: TensorFormat, n_grid: int, max_shrink: float, clip_range: ClipRange
) -> Range:
    full, outer = extrema(weight, fmt), shared_scale(weight, fmt)
    diagonal = diagonal_blocks(hessian, fmt.width(weight.shape[1]))
    bound = torch.maximum(-full.lower, full.upper)
    best, lower, upper = None, full.lower.clone(), full.upper.clone()
    for step in range(int(max_shrink * n_grid)):
        share = 1 - step / n_grid
        if clip_range == "symmetric":
            candidate = Range(torch.maximum(full.lower, -share * bound), torch.minimum(full.upper, share * bound))
        else:
            candidate = Range(share * full.lower, share * full.upper)
        error = block_error(fake_quantize(weight, fmt, candidate, outer).sub_(weight), diagonal, fmt)
        if best is None:
            best = error
            continue
        better = error < best
        best = torch.where(better, error, best)
        lower = torch.where(better, candidate.lower, lower)
        upper = torch.where(better, candidate.upper, upper)
    return Range(lower, upper)


def diagonal_blocks(hessian: Tensor, width: int) -> Tensor:
    """[groups, width, width] diagonal blocks of hessian [in, in], zero-padded where the last group is short."""
    groups = -(-hessian.shape[0] // width)
    missing = groups * width - hessian.shape[0]
    padded = F.pad(hessian, (0, missing, 0, missing)) if missing else hessian
    return padded.view(groups, width, groups, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def block_error(delta: Tensor, diagonal: Tensor, fmt: TensorFormat) -> Tensor:
    """Δᵀ H_gg Δ of every block, summed over the rows that share its scale: [block rows, groups]."""
    width, groups = diagonal.shape[-1], diagonal.shape[0]
    missing = groups * width - delta.shape[1]
    delta = (F.pad(delta, (0, missing)) if missing else delta).reshape(-1, groups, width)
    by_group = delta.transpose(0, 1)
    error = (torch.bmm(by_group, diagonal) * by_group).sum(dim=-1).t()
    height = fmt.block.rows or error.shape[0]
    if height == 1:
        return error
    return F.pad(error, (0, 0, 0, -error.shape[0] % height)).view(-1, height, groups).sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class AwqClip(Stage):
    """Clipping search on every weight but the rows that make queries and keys, whose errors meet inside the softmax
    and which the authors leave alone."""

    name: ClassVar[str] = "awq_clip"
    kind: ClassVar[Kind] = Kind.RANGE
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Need]] = frozenset({Need(Hessian, "full")})

    n_grid: int = 20
    max_shrink: float = 0.5
    clip_range: ClipRange = "symmetric"

    @property
    def uses_ranges(self) -> bool:
        return False

    def check(self, formats: frozenset[TensorFormat]) -> None:
        require(self.n_grid >= 2, "algo.clip_n_grid", self.n_grid, "a number of steps >= 2 (authors: 20)")
        require(0 < self.max_shrink < 1, "algo.max_shrink", self.max_shrink, "a share between 0 and 1 (authors: 0.5)")
        steps = int(self.max_shrink * self.n_grid)
        require(
            steps >= 2,
            "algo.max_shrink",
            self.max_shrink,
            f"with clip_n_grid={self.n_grid} at least {2 / self.n_grid:g}",
        )
        for fmt in formats:
            require(
                fmt.range.method == RangeFit().method,
                "range.method",
                fmt.range.method,
                "minmax with awq_clip, which chooses the ranges itself (algo=awq: or clip=false)",
            )
            require(
                fmt.zero != "float",
                "zero_point",
                fmt.zero,
                "int with awq_clip (algo=awq: or clip=false): its ranges include 0, those of floats need not",
            )
            require(
                not fmt.scale.whole,
                "format",
                fmt.label,
                "with awq_clip, one whose scales are stored independently (algo=awq: or clip=false)",
            )
        require(self.clip_range in CLIP_RANGES, "algo.clip_range", self.clip_range, f"one of {', '.join(CLIP_RANGES)}")

    def apply(self, view: BlockView) -> Outcome:
        ranges: dict[str, Range] = {}
        metrics = []
        for group in view.groups:
            hessian = view.statistic(group, Hessian).value()
            for ref in group.weights:
                fmt, weight = view.format(ref), view.weight(ref).float()
                full = extrema(weight, fmt)
                kept = group.query_key_rows.get(ref.name)
                if kept is not None and (bool(kept.all()) or (fmt.block.rows != 1 and bool(kept.any()))):
                    continue
                found = awq_clip(
                    weight,
                    hessian,
                    fmt,
                    n_grid=self.n_grid,
                    max_shrink=self.max_shrink,
                    clip_range=self.clip_range,
                )
                if kept is not None and bool(kept.any()):
                    mask = kept.to(weight.device)[:, None]
                    found = Range(
                        torch.where(mask, full.lower, found.lower), torch.where(mask, full.upper, found.upper)
                    )
                ranges[ref.name] = found
                clipped = (found.upper < full.upper) | (found.lower > full.lower)
                metrics.append((ref.name, "awq_clipped", clipped.float().mean().item()))
        return Outcome(ranges=ranges, metrics=tuple(metrics))
