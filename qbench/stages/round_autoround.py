"""AutoRound (SignRound, arXiv 2309.05516): rounding and clipping of a block, learned by signed gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qbench.formats import QTensor, Range, TensorFormat
from qbench.formats.differentiable import quantize_learned, require_supported, ste_quantize
from qbench.formats.ranges import find_range
from qbench.stages.base import BlockView, Kind, Need, Outcome, Stage, require
from qbench.stages.block_learning import count_sequences, gain, mean_loss, squared_error, weights_loss
from qbench.stages.training import Learned, check_training, train

#: Largest rounding offset, in steps: half a step either way is all that rounding decides (paper, eq. 4).
HALF_STEP = 0.5


@dataclass(frozen=True)
class Rounding:
    """What is learned about one weight W [out, in] with range `bounds` [rows, groups].

    offset: V, float32 [out, in], in steps, within ±0.5. lower, upper: beta and alpha, float32 [rows, groups], within
    [0, 1], the shares of the range's ends that are kept.
    """

    bounds: Range
    offset: Tensor
    lower: Tensor
    upper: Tensor

    @classmethod
    def start(
        cls, weight: Tensor, fmt: TensorFormat, bounds: Range | None = None, *, learn_range: bool = True
    ) -> Rounding:
        """Round to nearest on `bounds`, or on the range that the format's own method finds: V = 0, shares 1."""
        bounds = find_range(weight, fmt) if bounds is None else Range(bounds.lower.float(), bounds.upper.float())
        shares = (torch.ones_like(end, requires_grad=learn_range) for end in (bounds.lower, bounds.upper))
        return cls(bounds, torch.zeros_like(weight, requires_grad=True), *shares)

    @property
    def range(self) -> Range:
        """What is left of the range, with gradients to the shares."""
        return Range(self.bounds.lower * self.lower, self.bounds.upper * self.upper)

    @torch.no_grad()
    def confine(self) -> None:
        """Puts what a step moved out of its interval onto its edge, in place."""
        self.offset.clamp_(-HALF_STEP, HALF_STEP)
        self.lower.clamp_(0, 1)
        self.upper.clamp_(0, 1)

    @torch.no_grad()
    def reset(self) -> None:
        """Back to round to nearest, in place."""
        self.offset.zero_()
        self.lower.fill_(1)
        self.upper.fill_(1)

    def fake_quantize(self, weight: Tensor, fmt: TensorFormat) -> Tensor:
        """s (clamp(round(W / s + V) + z) - z) [out, in] with s and z from what is left of the range (paper, eq. 3 and
        5); gradients to V and both shares, straight through all rounding."""
        left = self.range
        return ste_quantize(weight, fmt, lower=left.lower, upper=left.upper, offset=self.offset)

    def quantize(self, weight: Tensor, fmt: TensorFormat) -> QTensor:
        """The codes of `fake_quantize`."""
        return quantize_learned(weight, fmt, self.range, self.offset)


@dataclass(frozen=True, kw_only=True)
class AutoRound(Stage):
    """All weights of a block are rounded together, on the quantized stream against the full-precision one.

    Departures from the authors: V is kept within half a step whatever the rates are (at their rates it cannot leave);
    what is learned is compared with plain rounding over all sequences in the end and dropped unless it is better (the
    best minibatch, which is what they keep, may have been an easy one).
    """

    name: ClassVar[str] = "autoround"
    kind: ClassVar[Kind] = Kind.ROUND
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Need]] = frozenset()
    uses_random: ClassVar[bool] = True
    trains: ClassVar[bool] = True

    iters: int = 200
    lr: float | None = None
    minmax_lr: float | None = None
    enable_minmax_tuning: bool = True
    batch_size: int = 8
    autocast: bool = False

    @property
    def rates(self) -> tuple[float, float]:
        """Of V and of the range's shares: 1 / iters unless given, so that V can just reach half a step."""
        lr = self.lr if self.lr is not None else 1 / max(self.iters, 1)
        return lr, self.minmax_lr if self.minmax_lr is not None else lr

    def check(self, formats: frozenset[TensorFormat]) -> None:
        lr, minmax_lr = self.rates
        check_training(lr={"lr": lr, "minmax_lr": minmax_lr}, batch_size=self.batch_size, iters=self.iters)
        require(
            self.enable_minmax_tuning or self.minmax_lr is None,
            "algo.minmax_lr",
            self.minmax_lr,
            "null with enable_minmax_tuning=false, which learns no ranges",
        )
        for fmt in formats:
            require_supported(fmt, self.name)

    def apply(self, view: BlockView) -> Outcome:
        refs = [ref for group in view.groups for ref in group.weights]
        weights = {ref.name: view.weight(ref) for ref in refs}
        learned = {
            name: Rounding.start(
                weight.float(), view.formats[name], view.ranges.get(name), learn_range=self.enable_minmax_tuning
            )
            for name, weight in weights.items()
        }

        def value(name: str) -> Tensor:
            return learned[name].fake_quantize(weights[name].float(), view.formats[name])

        def confine() -> None:
            for rounding in learned.values():
                rounding.confine()

        loss = weights_loss(view, refs, value, squared_error)
        before = mean_loss(loss, view.data, self.batch_size, view.where)
        lr, minmax_lr = self.rates
        offsets = Learned([rounding.offset for rounding in learned.values()], lr, kept=torch.float16)
        shares = Learned([end for rounding in learned.values() for end in (rounding.lower, rounding.upper)], minmax_lr)
        report = train(
            [offsets, shares],
            loss,
            count_sequences(view.data),
            steps=self.iters,
            batch_size=self.batch_size,
            generator=view.generator,
            autocast=self.autocast,
            optimizer="signsgd",
            schedule="linear",
            keep_best="step",
            project=confine,
            report=view.data.report,
            where=f"{view.where}, {self.name}",
        )
        after = mean_loss(loss, view.data, self.batch_size, view.where)
        if not after < before:
            after = before
            for rounding in learned.values():
                rounding.reset()
        metrics = {"loss_vs_rtn": gain(after, before), "best_step": float(report.best_step), "loss": after}
        return Outcome(
            codes={name: learned[name].quantize(weights[name].float(), view.formats[name]) for name in learned},
            metrics=tuple(("", f"{self.name}_{metric}", value) for metric, value in metrics.items()),
        )
