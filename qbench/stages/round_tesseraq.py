"""TesseraQ (arXiv 2410.19103): all roundings of a block, decided progressively while the others make up for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from qbench.formats import QTensor, TensorFormat, quantize
from qbench.formats.differentiable import require_supported
from qbench.stages.base import BlockView, Kind, Need, Outcome, Stage, require
from qbench.stages.block_learning import Loss, count_sequences, gain, mean_loss, weights_loss
from qbench.stages.tesseraq_core import SoftRounding
from qbench.stages.training import Learned, check_training, train

#: The authors' weight decay of the scales' variables, with Adam's gradient.
SCALE_DECAY = 1e-4
#: Shares that stay soft: the authors' ten rounds in LLMC.
THRESHOLDS = "0.75 0.5 0.375 0.25 0.125 0.09 0.06 0.04 0.02 0.005"


def token_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared distance of the outputs [sequences, length, hidden], summed over features, mean over tokens."""
    return (output - target).square().sum(dim=-1).mean()


@dataclass(frozen=True, kw_only=True)
class TesseraQ(Stage):
    """All weights of a block are decided together, on the quantized stream against the full-precision one.

    Departures from the authors: decoding scales are rounded to their storage while they are learned, so that what is
    trained is what is stored; the result is compared with plain rounding over all sequences in the end and dropped
    unless it is better.
    """

    name: ClassVar[str] = "tesseraq"
    kind: ClassVar[Kind] = Kind.ROUND
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Need]] = frozenset()
    uses_random: ClassVar[bool] = True
    trains: ClassVar[bool] = True

    iterations: int = 250
    thresholds: str = THRESHOLDS
    lr: float = 5e-4
    scale_lr: float | None = None
    optimize_scale: bool = True
    batch_size: int = 4
    autocast: bool = False

    @property
    def soft_shares(self) -> tuple[float, ...]:
        """Shares of the roundings that stay soft in each round. Raises ValueError for what is no number."""
        return tuple(float(word) for word in self.thresholds.split())

    def check(self, formats: frozenset[TensorFormat]) -> None:
        scale_lr = self.lr if self.scale_lr is None else self.scale_lr
        check_training(lr={"lr": self.lr, "scale_lr": scale_lr}, batch_size=self.batch_size, iterations=self.iterations)
        accepted = "falling shares of soft weights from below 1 to 0, between spaces, such as 0.5 0.25 0.1"
        try:
            shares = self.soft_shares
        except ValueError:
            shares = ()
        falling = all(a > b for a, b in pairwise((1.0, *shares, -math.ulp(0.0))))
        require(bool(shares) and falling, "algo.thresholds", self.thresholds, accepted)
        require(
            self.optimize_scale or self.scale_lr is None,
            "algo.scale_lr",
            self.scale_lr,
            "null with optimize_scale=false, which learns no scales",
        )
        for fmt in formats:
            require_supported(fmt, self.name)

    def apply(self, view: BlockView) -> Outcome:
        refs = [ref for group in view.groups for ref in group.weights]
        weights, formats = {ref.name: view.weight(ref) for ref in refs}, view.formats
        learned = {
            name: SoftRounding.start(weight, formats[name], view.ranges.get(name), learn_scale=self.optimize_scale)
            for name, weight in weights.items()
        }
        params = {name: rounding.params for name, rounding in learned.items()}

        def nearest(name: str) -> QTensor:
            return quantize(weights[name].float(), formats[name], params[name])

        def loss_of(codes: Mapping[str, QTensor]) -> float:
            loss = weights_loss(view, refs, lambda name: codes[name].dequantize(), token_error)
            return mean_loss(loss, view.data, self.batch_size, view.where)

        def soft(name: str) -> Tensor:
            return learned[name].fake_quantize(weights[name], formats[name])

        before = loss_of({name: nearest(name) for name in weights})
        self._learn(view, learned, weights_loss(view, refs, soft, token_error))
        codes = {name: rounding.quantize(weights[name], formats[name]) for name, rounding in learned.items()}
        after = loss_of(codes)
        if not after < before:
            codes, after = {name: nearest(name) for name in weights}, before
        metrics = [("", "tesseraq_loss", after), ("", "tesseraq_loss_vs_rtn", gain(after, before))]
        for name, code in codes.items():
            changed = (code.codes != nearest(name).codes).float().mean()
            metrics.append((name, "tesseraq_changed", changed.item()))
        return Outcome(codes=codes, metrics=tuple(metrics))

    def _learn(self, view: BlockView, learned: dict[str, SoftRounding], loss: Loss) -> None:
        """The rounds of algorithm 1: decide a share, let the others and the scales make up for it. Leaves the result in
        `learned`, which `loss` reads."""
        scale_lr = self.lr if self.scale_lr is None else self.scale_lr
        rounds = len(self.soft_shares)
        for done, share in enumerate(self.soft_shares):
            for name in learned:
                learned[name] = learned[name].harden(share)
            train(
                [
                    Learned([rounding.up for rounding in learned.values()], self.lr),
                    Learned([rounding.factor for rounding in learned.values()], scale_lr, SCALE_DECAY),
                ],
                loss,
                count_sequences(view.data),
                steps=self.iterations,
                batch_size=self.batch_size,
                generator=view.generator,
                autocast=self.autocast,
                optimizer="adam",
                keep_best="none",
                report=lambda step, steps, value, done=done: view.data.report(
                    done * steps + step, rounds * steps, value
                ),
                where=f"{view.where}, {self.name} at {share:g} soft",
            )
