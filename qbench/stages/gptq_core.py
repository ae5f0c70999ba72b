"""GPTQ (arXiv 2210.17323) and GPTAQ (arXiv 2504.02692) as a pure function on one weight matrix and its Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qbench.errors import NumericsError
from qbench.formats import QParams, QTensor, Range, TensorFormat, fit, shared_scale
from qbench.formats.tensor import decode, encode

ScaleSource = Literal["compensated", "stale", "original"]

#: A pivot below this share of its diagonal entry is rounding noise of a float32 Hessian: the matrix is singular.
PIVOT_NOISE = 1e-6


@dataclass(frozen=True)
class GptqResult:
    """Quantized weight and `loss`: sum over rows of (1/2) sum_i e_i^2, the layer error in units of the Hessian (with a
    drift: what rounding alone adds to it)."""

    weight: QTensor
    loss: float


def inverse_cholesky(hessian: Tensor, damp: float) -> Tensor:
    """Upper triangular U with UᵀU = (H + damp · mean(diag H) · I)⁻¹, float32 [n, n] from float32 H [n, n].

    H = M Mᵀ with M upper triangular (Cholesky of H with rows and columns reversed, reversed back), so U = M⁻¹: one
    factorization and one triangular inverse instead of inverting H and factorizing again. H is left alone; matrices are
    dropped as soon as they have served, which matters where n is 10,000.
    Raises NumericsError where H is singular at this damping.
    """
    n = hessian.shape[0]
    diagonal = hessian.diagonal().clone()
    diagonal += damp * diagonal.mean()
    flipped = hessian.flip(0, 1)
    flipped.diagonal().copy_(diagonal.flip(0))
    lower, failed = torch.linalg.cholesky_ex(flipped)
    del flipped
    pivots = lower.diagonal().square() / diagonal.flip(0)
    if failed.item() or not bool((pivots > PIVOT_NOISE).all()):
        raise NumericsError(
            f"singular Hessian ({n} x {n}) at damp={damp}: use more calibration tokens than in_features "
            "or a larger damp (authors: 0.01)"
        )
    upper = lower.flip(0, 1)
    del lower
    return torch.linalg.solve_triangular(upper, torch.eye(n, dtype=upper.dtype, device=upper.device), upper=True)


def excited(hessian: Tensor) -> Tensor:
    """The Hessian with the mean of the other diagonal entries (the authors: 1, which would make the damping depend on
    the overall factor of H) where no token excites a column (H_jj = 0); itself where there is no such column."""
    dead = hessian.diagonal() == 0
    if bool(dead.any()):
        hessian = hessian.clone()
        hessian.diagonal()[dead] = 1.0 if dead.all() else hessian.diagonal()[~dead].mean()
    return hessian


def toward_full(weight: Tensor, hessian: Tensor, drift: Tensor, damp: float) -> Tensor:
    """The weight, float32 [out, in], whose outputs on quantized inputs x come closest to those of `weight` on the
    full-precision inputs: W (I + C (H + damping)⁻¹) with drift C = E[(x_full - x) xᵀ], float32 [in, in].

    The exact minimum over W' of E‖W' x - W x_full‖² at damp=0, before anything is rounded.
    """
    upper = inverse_cholesky(excited(hessian), damp)
    return weight.float() + weight.float() @ drift @ upper.t() @ upper


def gptq(
    weight: Tensor,
    hessian: Tensor,
    fmt: TensorFormat,
    *,
    damp: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    block_size: int = 128,
    scale_source: ScaleSource = "compensated",
    clip: Range | None = None,
    drift: Tensor | None = None,
) -> GptqResult:
    """Quantize `weight` column by column, spreading each column's error over the columns not yet quantized.

    weight: float [out, in]. hessian: float32 [in, in], E[x xᵀ] over the layer's inputs; its overall factor cancels
    (the authors' 2/N), damping is relative to mean(diag H). Algorithm 1 of the paper; O(out·in² + in³).

    act_order: columns in order of decreasing diag(H). static_groups: scales of all groups from the original weight
    by original column index, so that act_order needs no permutation at run time. scale_source, for groups along the
    input: "compensated" fits each group on its columns with all compensation so far, exactly, which makes the result
    independent of block_size; "stale" is the authors' code, whose columns inside the running block lack that block's
    compensation; "original" fits on the original weight in quantization order. Per row and per tensor scales always
    come from the original weight. clip: ranges fitted earlier (per original group), used instead of min-max; needs
    scales by original column index.

    A column that no calibration token excites (H_jj = 0) is rounded to nearest and spreads no error. (The authors set
    it to 0, which changes the function on every input that does excite it.)

    drift: GPTAQ's asymmetric calibration, C = alpha · E[(x_full - x) xᵀ], float32 [in, in] in the units of the Hessian:
    before column j is rounded, the columns behind it take over w_j (x_full - x)_j as well as they can, so that the
    output follows the full-precision stream's. With P = triu(C Uᵀ, 1) U (the paper's equation of P) this adds w_j P_j:.
    A drift of 0 is GPTQ, bit for bit. Departure: w_j is the weight just before it is rounded everywhere; behind the
    running block the authors' code takes the rounded one, which makes the result depend on block_size.
    """
    original = weight.float()
    rows, columns = original.shape
    hessian = excited(hessian)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else None
    grouped = fmt.block.columns > 0
    by_index = static_groups or clip is not None or not grouped  # parameters by original column index
    if order is not None:
        hessian = hessian[order][:, order]
    upper = inverse_cholesky(hessian, damp)
    del hessian
    pull = None
    if drift is not None:
        pull = drift if order is None else drift[order][:, order]
        pull = (pull @ upper.t()).triu_(1) @ upper

    # Work on the transpose: a column of the weight is then contiguous.
    work = (original if order is None else original[:, order]).t().contiguous()
    width = fmt.width(columns)
    group_of = torch.arange(columns, device=work.device) // width
    # What scales share (NVFP4's tensor scale) is the original weight's, whatever compensation does to it.
    fitted = ColumnParameters.empty(rows, fmt, columns, work, shared_scale(original, fmt))
    fixed = by_index or scale_source == "original"
    if fixed:
        source = original if by_index or order is None else original[:, order]
        fitted.fill(fit(source, fmt, clip))
        if by_index and order is not None:
            group_of = order // width
    group_index = group_of.tolist()

    codes = torch.empty_like(work, dtype=fmt.element.storage)
    loss = torch.zeros((), dtype=torch.float64, device=work.device)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        block, errors, levels = (torch.empty_like(work[start:end]) for _ in range(3))
        block.copy_(work[start:end])
        local = upper[start:end, start:end]
        for i in range(end - start):
            column = start + i
            if not fixed and column % width == 0:
                stop = min(column + width, columns)
                current = _current(work, block, errors, upper, pull, start, i, stop, scale_source)
                fitted.set(column // width, current, fmt)
            params = fitted.at(group_index[column])
            w = block[i]
            level = encode(w[:, None, None], fmt, params)
            levels[i] = level[:, 0, 0]
            error = (w - decode(level, params)[:, 0, 0]).div_(local[i, i])
            errors[i] = error
            block[i + 1 :].addr_(local[i, i + 1 :], error, alpha=-1)
            if pull is not None:
                block[i + 1 :].addr_(pull[column, column + 1 : end], w)
        codes[start:end] = fmt.element.to_codes(levels)
        loss += errors.double().square().sum()
        work[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1)
        if pull is not None:
            work[end:].addmm_(pull[start:end, end:].t(), block)  # its rows are the weights just before rounding

    stored = codes.t()
    if order is not None:
        restored = torch.empty_like(stored)
        restored[:, order] = stored
        stored = restored
    keeps_order = order is not None and not by_index
    params = fitted.params()
    quantized = QTensor(
        stored.contiguous(),
        params.scale,
        params.zero,
        fmt,
        order if keeps_order else None,
        params.scale_codes,
        params.outer,
    )
    return GptqResult(quantized, loss.item() / 2)


def _current(
    work: Tensor,
    block: Tensor,
    errors: Tensor,
    upper: Tensor,
    pull: Tensor | None,
    start: int,
    i: int,
    stop: int,
    source: ScaleSource,
) -> Tensor:
    """Columns start+i … stop of the weight, [out, width], as the group that begins there should see them.

    `work` lacks the running block's compensation; `block` has it for the block's own columns, and what the block owes
    to columns behind its end is the first i errors times their row of U (and the first i weights times theirs of P).
    """
    first = start + i
    if source == "stale":
        return work[first:stop].t()
    inside = block[i : stop - start]
    end = start + block.shape[0]
    if stop <= end:
        return inside.t()
    outside = work[end:stop] - upper[start:first, end:stop].t() @ errors[:i]
    if pull is not None:
        outside = outside + pull[start:first, end:stop].t() @ block[:i]
    return torch.cat([inside, outside]).t()


@dataclass
class ColumnParameters:
    """Parameters by group, one contiguous row per group, [groups, block rows]; `repeat` weight rows share each: for
    algorithms that go through a weight column by column."""

    scale: Tensor
    zero: Tensor | None
    codes: Tensor | None
    outer: Tensor | None
    rows: int
    repeat: int

    @classmethod
    def empty(cls, rows: int, fmt: TensorFormat, columns: int, like: Tensor, outer: Tensor | None) -> ColumnParameters:
        down, across = fmt.grid((rows, columns))
        scale = like.new_empty(across, down)
        zero = None if fmt.zero == "none" else torch.empty_like(scale)
        return cls(scale, zero, None, outer, rows, fmt.block.rows or rows)

    def fill(self, params: QParams) -> None:
        self.scale.copy_(params.scale.t())
        if self.zero is not None:
            self.zero.copy_(params.zero.t())
        if params.scale_codes is not None:
            self.codes = params.scale_codes.t().contiguous()
        self.outer = params.outer

    def set(self, group: int, columns: Tensor, fmt: TensorFormat) -> None:
        params = fit(columns, fmt, outer=self.outer)
        self.scale[group] = params.scale[:, 0]
        if self.zero is not None:
            self.zero[group] = params.zero[:, 0]
        if params.scale_codes is not None:
            if self.codes is None:
                self.codes = torch.empty_like(self.scale, dtype=params.scale_codes.dtype)
            self.codes[group] = params.scale_codes[:, 0]

    def at(self, group: int) -> QParams:
        """Parameters of one column, [out, 1] each."""
        scale, zero = self._rows(self.scale[group]), None if self.zero is None else self._rows(self.zero[group])
        return QParams(scale, zero, outer=self.outer)

    def _rows(self, values: Tensor) -> Tensor:
        if self.repeat > 1 and len(values) > 1:
            values = values.repeat_interleave(self.repeat)[: self.rows]
        return values[:, None]

    def params(self) -> QParams:
        """Parameters as formats hold them, [block rows, groups]."""
        parts = (None if part is None else part.t().contiguous() for part in (self.scale, self.zero, self.codes))
        return QParams(*parts, outer=self.outer)
