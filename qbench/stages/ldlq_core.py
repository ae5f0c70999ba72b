"""LDLQ (QuIP, arXiv 2307.13304, section 3) as a pure function on one weight matrix and its Hessian."""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.errors import NumericsError
from qbench.formats import QParams, QTensor, TensorFormat
from qbench.formats.tensor import decode, encode
from qbench.stages.gptq_core import PIVOT_NOISE, ColumnParameters, excited

#: Columns per lazy update: speed only.
BLOCK = 128


def unit_lower(hessian: Tensor) -> Tensor:
    """L + I, unit lower triangular, of H = (L + I) D (L + I)ᵀ with D diagonal: the Cholesky factor, every column
    divided by its diagonal entry; float32 [n, n].

    Raises NumericsError where H is singular.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian)
    pivots = lower.diagonal()
    if failed.item() or not bool((pivots.square() / hessian.diagonal() > PIVOT_NOISE).all()):
        raise NumericsError(
            f"singular Hessian ({len(hessian)} x {len(hessian)}): use more calibration tokens than in_features "
            "or a larger damp (authors: 0.01)"
        )
    return lower / pivots


def ldlq(
    weight: Tensor,
    hessian: Tensor,
    fmt: TensorFormat,
    params: QParams,
    *,
    damp: float = 0.01,
    act_order: bool = False,
    greedy_passes: int = 0,
) -> QTensor:
    """Quantize `weight` (float32 [out, in]) with `params`, each column after what rounding the ones behind it cost.

    hessian: float32 [in, in], E[x xᵀ]; `damp` · mean(diag H) is added to its diagonal. With H = (L + I) D (L + I)ᵀ the
    output error tr(E H Eᵀ), E = Q - W, is Σ_k D_k ‖E_k + Σ_{j>k} E_j L_jk‖²: so from the last column to the first
    Q_k = nearest(W_k - Σ_{j>k} E_j L_jk) (Algorithm 3, equation 2), best among all linear feedbacks on an unbounded
    grid, where it is GPTQ with the columns in reverse. act_order: columns in order of decreasing diag H, as LDLQ-RG
    sorts them. greedy_passes (LDLQ-RG): how often each column is rounded once more, to what is best while the others
    stay, nearest(Q_k - (E H)_k / H_kk); none can make tr(E H Eᵀ) larger. O(out·in²) each.

    A column that no token excites is rounded to nearest. Ties go to even codes; the authors' go up.
    """
    hessian = excited(hessian)
    hessian = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), device=hessian.device)
    # The largest last, since the last is rounded first.
    order = torch.argsort(hessian.diagonal(), stable=True) if act_order else torch.arange(len(hessian))
    order = order.to(hessian.device)
    if act_order:
        hessian = hessian[order][:, order]
    rounding = _Rounding(weight.float(), fmt, params, order)
    rounding.feed_back(unit_lower(hessian))
    if greedy_passes:
        rounding.improve(hessian, greedy_passes)
    return rounding.result()


class _Rounding:
    """One weight on its way, transposed so that a column is contiguous: `wanted` and `decoded` [in, out], columns in
    `order`; parameters go by original column."""

    def __init__(self, weight: Tensor, fmt: TensorFormat, params: QParams, order: Tensor) -> None:
        self.fmt, self.params, self.order = fmt, params, order
        self.wanted = weight.t()[order].contiguous()
        self.decoded, self.levels = torch.zeros_like(self.wanted), torch.empty_like(self.wanted)
        self.group_of = (order // fmt.width(weight.shape[1])).tolist()
        self.columns = ColumnParameters.empty(weight.shape[0], fmt, weight.shape[1], self.wanted, params.outer)
        self.columns.fill(params)

    def feed_back(self, lower: Tensor) -> None:
        target = self.wanted.clone()
        for end in range(len(target), 0, -BLOCK):
            start = max(end - BLOCK, 0)
            local = lower[start:end, start:end]
            for column in range(end - 1, start - 1, -1):
                self._round(column, target[column])
                error = self.wanted[column] - self.decoded[column]
                target[start:column].addr_(local[column - start, : column - start], error)
            target[:start].addmm_(lower[start:end, :start].t(), self.wanted[start:end] - self.decoded[start:end])

    def improve(self, hessian: Tensor, passes: int) -> None:
        slope = hessian @ (self.decoded - self.wanted)  # (E H)ᵀ
        for _ in range(passes):
            for end in range(len(slope), 0, -BLOCK):
                start = max(end - BLOCK, 0)
                before = self.decoded[start:end].clone()
                inside = slope[start:end].clone()
                for column in range(end - 1, start - 1, -1):
                    i = column - start
                    self._round(column, before[i] - inside[i] / hessian[column, column])
                    inside.addr_(hessian[start:end, column], self.decoded[column] - before[i])
                slope.addmm_(hessian[:, start:end], self.decoded[start:end] - before)

    def _round(self, column: int, target: Tensor) -> None:
        params = self.columns.at(self.group_of[column])
        levels = encode(target[:, None, None], self.fmt, params)
        self.levels[column] = levels[:, 0, 0]
        self.decoded[column] = decode(levels, params)[:, 0, 0]

    def result(self) -> QTensor:
        codes = torch.empty_like(self.levels, dtype=self.fmt.element.storage)
        codes[self.order] = self.fmt.element.to_codes(self.levels)
        p = self.params
        return QTensor(codes.t().contiguous(), p.scale, p.zero, self.fmt, scale_codes=p.scale_codes, outer=p.outer)
