"""OmniQuant (arXiv 2308.13137): clipping of weights and scales of inputs, learned block by block by gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qbench.calibration.extremes import Extremes
from qbench.errors import NumericsError, StructureError
from qbench.formats import Range, RangeFit, TensorFormat
from qbench.formats.differentiable import require_supported, ste_quantize
from qbench.formats.ranges import extrema, find_range
from qbench.formats.scheme import Scheme
from qbench.stages.base import BlockView, Kind, Need, Outcome, Stage, require
from qbench.stages.block_learning import count_sequences, replaced_parameters, squared_error
from qbench.stages.learned_clipping import Clipping
from qbench.stages.learned_folds import LearnedFold, apply_folds, fold_in, letable_folds, touched
from qbench.stages.training import Learned, check_training, gather, train
from qbench.stages.transform_smoothquant import smooth_scale
from qbench.structure.folds import Fold

#: Options that mean nothing without LET.
LET_OPTIONS = ("let_lr", "let_init", "alpha", "shift", "grouped_heads")


@dataclass(frozen=True, kw_only=True)
class OmniQuant(Stage):
    """Learned weight clipping (LWC) and the learned equivalent transformation (LET) of one block, trained together.

    Loss: mean squared error between the quantized block on the quantized stream and the full-precision block on the
    full-precision stream; with `aug_loss` plus that against the full-precision block on the quantized stream. Scales
    and shifts end up in the parameters; the ranges go to whatever rounds.

    let "auto": where inputs are quantized, as the authors' scripts for Llama (weights alone: LWC alone). Shifts, as
    theirs: only with quantized inputs, where producer and consumers have biases. Where an earlier stage has searched
    ranges, clipping starts from those, and LET (let_init "auto") from what that search has folded in: s = 1, d = 0.

    Departures from the authors: no scale between queries and keys (no fold proves it); scales stay positive instead of
    being truncated with their sign; a shift starts from the middle of the extremes over all tokens instead of a moving
    average over sequences; the best epoch is kept (`keep_best` false: the last, as theirs); NaN is an error.
    """

    name: ClassVar[str] = "omniquant"
    kind: ClassVar[Kind] = Kind.RANGE
    version: ClassVar[int] = 1
    trains: ClassVar[bool] = True

    lwc: bool = True
    let: Literal["auto", True, False] = "auto"
    epochs: int = 20
    batch_size: int = 1
    lwc_lr: float = 1e-2
    let_lr: float = 5e-3
    weight_decay: float = 0.0
    lwc_init: float = 4.0
    let_init: Literal["auto", "smooth", "identity"] = "auto"
    alpha: float = 0.5
    shift: bool = True
    grouped_heads: bool = False
    aug_loss: bool = False
    keep_best: bool = True
    autocast: bool = False

    @property
    def needs(self) -> frozenset[Need]:
        """What LET starts from."""
        starts = self.let is not False and self.let_init != "identity"
        return frozenset({Need(Extremes, "full")}) if starts else frozenset()

    @property
    def transforms(self) -> bool:
        """Clipping alone moves nothing."""
        return self.let is not False

    @property
    def moves_inputs(self) -> bool:
        return self.shift and self.let is not False

    def check(self, formats: frozenset[TensorFormat]) -> None:
        rates = {"lwc_lr": self.lwc_lr, "let_lr": self.let_lr, "weight_decay": self.weight_decay}
        check_training(lr=rates, batch_size=self.batch_size, epochs=self.epochs)
        require(0 <= self.alpha <= 1, "algo.alpha", self.alpha, "a share from 0 to 1 (authors: 0.5)")
        require(math.isfinite(self.lwc_init), "algo.lwc_init", self.lwc_init, "a finite logit (authors: 4)")
        require(self.lwc or self.let is not False, "algo.lwc", self.lwc, "true, or algo.let=true: nothing is learned")
        if not self.lwc:
            self._require_default("algo.lwc=true", "lwc_lr", "lwc_init")
        if self.let is False:
            self._require_default("algo.let=true", *LET_OPTIONS)
        elif self.let_init == "identity":
            self._require_default("algo.let_init=smooth", "alpha")
        for fmt in formats:
            require_supported(fmt, self.name)
            accepted = "int, or none with symmetric=true: omniquant shrinks ranges around 0"
            require(fmt.zero != "float", "zero_point", fmt.zero, accepted)

    def check_scheme(self, scheme: Scheme) -> None:
        roles = (scheme, *scheme.overrides)
        if self.let == "auto" and not any(role.input is not None for role in roles):
            require(self.lwc, "algo.lwc", self.lwc, "true, or algo.let=true: nothing is learned from weights alone")
            self._require_default("algo.let=true, as only weights are quantized", *LET_OPTIONS)
        elif self.let is not False:
            if not any(role.input is not None for role in roles):
                self._require_default("an act_bits, as shifts are for quantized inputs", "shift")
            fitted = any(role.input is not None and role.input.needs_data for role in roles)
            static = any(role.cache is not None and role.cache.needs_data for role in roles)
            for option, found in (("act", fitted), ("kv", static)):
                accepted = "dynamic ranges, or algo.let=false: LET changes what static ones were taken from"
                require(not found, f"{option}.mode", "static", accepted)

    def _require_default(self, remedy: str, *options: str) -> None:
        for option in options:
            value = getattr(self, option)
            require(value == self.options()[option], f"algo.{option}", value, f"{remedy}: only then it has an effect")

    def apply(self, view: BlockView) -> Outcome:
        folds = self._folds(view)
        student = _Student(view, folds, self.lwc, self.lwc_init)
        report = train(
            self._groups(student),
            self._loss(view, student.parameters),
            count_sequences(view.data),
            epochs=self.epochs,
            batch_size=self.batch_size,
            shuffle=False,  # the authors take the sequences in order
            keep_best="epoch" if self.keep_best else "none",
            autocast=self.autocast,
            project=student.confine,
            report=view.data.report,
            where=f"{view.where}, {self.name}",
        )
        changed, scales = apply_folds(view.block, folds)
        shares = [(name, "lwc_share", share) for name, share in student.shares().items()] if self.lwc else []
        spreads = [
            (learned.fold.consumers[0].name, "let_spread", (learned.scale.max() / learned.scale.min()).item())
            for learned in folds
        ]
        return Outcome(
            parameters=changed,
            input_scales=scales,
            ranges=student.ranges(changed),
            metrics=(*report.metrics(self.name), *shares, *spreads),
            observe_again=any(learned.shift is not None for learned in folds),
        )

    def _groups(self, student: _Student) -> list[Learned]:
        logits = [end for clip in student.clipping.values() for end in (clip.lower, clip.upper)] if self.lwc else []
        moved = [tensor for learned in student.folds for tensor in learned.tensors]
        rates = [(logits, self.lwc_lr), (moved, self.let_lr)]
        return [Learned(tensors, lr, self.weight_decay) for tensors, lr in rates if tensors]

    def _loss(self, view: BlockView, parameters: Callable[[], Mapping[str, Tensor]]) -> Callable[[list[int]], Tensor]:
        data = view.data

        def loss(sequences: list[int]) -> Tensor:
            hidden = gather(data.inputs, sequences)
            output = data.student(parameters(), hidden).float()
            value = squared_error(output, gather(data.targets, sequences).float())
            return value + squared_error(output, data.teacher(hidden).float()) if self.aug_loss else value

        return loss

    def _folds(self, view: BlockView) -> list[LearnedFold]:
        """Where LET begins; none where it has no part."""
        if self.let is False or (self.let == "auto" and not view.inputs):
            return []
        folds = letable_folds(view, self.grouped_heads)
        if not folds and (self.let is True or not self.lwc):
            raise StructureError(
                f"{view.where}: omniquant has no fold for algo.let=true; algo.let=false learns clipping"
            )
        return [self._begin(view, fold) for fold in folds]

    def _begin(self, view: BlockView, fold: Fold) -> LearnedFold:
        device = view.weight(fold.consumers[0]).device
        shifts = self.shift and bool(view.inputs) and fold.bias is not None
        if self.let_init == "identity" or (self.let_init == "auto" and view.ranges):
            none = torch.zeros(fold.n_free, device=device)
            return LearnedFold.start(fold, none + 1, none if shifts else None)
        lower, upper = _extremes(view, fold)
        weights = torch.stack([view.weight(ref).float().abs().amax(dim=0) for ref in fold.consumers]).amax(dim=0)
        scale = smooth_scale(torch.maximum(-lower, upper), _tied(weights, fold, "amax"), self.alpha)
        return LearnedFold.start(fold, scale, (lower + upper) / 2 if shifts else None)


class _Student:
    """A block's parameters as what is learned makes them. `clipping` by weight name."""

    def __init__(self, view: BlockView, folds: list[LearnedFold], lwc: bool, init: float) -> None:
        self._view, self._lwc, self.folds = view, lwc, folds
        self._quantized = {ref.name: ref for group in view.groups for ref in group.weights}
        self._refs = touched(folds) | self._quantized
        self._weights = {name: ref.read(view.block) for name, ref in self._refs.items()}
        self._full = {name: extrema(self._weights[name].float(), view.formats[name]) for name in self._quantized}
        self._bounds = {name: self._earlier(name) for name in self._quantized}
        self.clipping = {name: Clipping.start(self._full[name], self._bounds[name], init) for name in self._quantized}

    def parameters(self) -> dict[str, Tensor]:
        """Those that change, by path, with gradients to all that is learned."""
        weights, vectors = fold_in(self._view.block, self.folds, self._weights)
        for name in self._quantized:
            found = self._range(name, weights[name])
            ends = {} if found is None else {"lower": found.lower, "upper": found.upper}
            weights[name] = ste_quantize(weights[name].float(), self._view.formats[name], **ends)
        return vectors | replaced_parameters(self._view.block, self._refs.values(), weights)

    @torch.no_grad()
    def ranges(self, changed: Mapping[str, Tensor]) -> dict[str, Range]:
        """Learned ranges of the weights, some of whose parameters are now `changed`; none where the format's own
        method is meant to find them."""
        ranges: dict[str, Range] = {}
        for name, ref in self._quantized.items():
            weight = ref.of(changed[ref.parameter]) if ref.parameter in changed else self._weights[name]
            if (found := self._range(name, weight)) is not None:
                ranges[name] = found
        return ranges

    @torch.no_grad()
    def shares(self) -> dict[str, float]:
        """Mean share of the extremes that is left, by weight."""
        return {name: torch.stack(clip.shares).mean().item() for name, clip in self.clipping.items()}

    @torch.no_grad()
    def confine(self) -> None:
        for learned in self.folds:
            learned.confine()

    def _range(self, name: str, weight: Tensor) -> Range | None:
        if not self._lwc and self._bounds[name] is None:
            return None
        moved = weight is not self._weights[name]
        full = extrema(weight.float(), self._view.formats[name]) if moved else self._full[name]
        return self.clipping[name].range(full)

    def _earlier(self, name: str) -> Range | None:
        """The range that clipping starts from: an earlier stage's (all of a weight that it left alone), else one that
        the format's own search finds; None for the authors' start."""
        fmt = self._view.formats[name]
        if self._view.ranges:
            return self._view.ranges.get(name, self._full[name])
        return None if fmt.range.method == RangeFit().method else find_range(self._weights[name].float(), fmt)


def _extremes(view: BlockView, fold: Fold) -> tuple[Tensor, Tensor]:
    """Smallest and largest input of every free scale's channels, [n_free] each; experts without tokens count as 0."""
    statistics = [
        view.statistics[index][Extremes]
        for index in (fold.group, *fold.extra_groups)
        if view.structure.groups[index].weights
    ]
    ends = torch.stack([statistic.value() for statistic in statistics])
    if not torch.isfinite(ends).all():
        raise NumericsError(f"{view.where}, {fold.consumers[0].name}: input of the layer is not finite")
    return _tied(ends[:, 0].amin(dim=0), fold, "amin"), _tied(ends[:, 1].amax(dim=0), fold, "amax")


def _tied(values: Tensor, fold: Fold, reduce: Literal["amin", "amax"]) -> Tensor:
    """[n_free] from [in]: the extreme among channels that share a scale."""
    channels = fold.channels.to(values.device)
    return values.new_zeros(fold.n_free).scatter_reduce_(0, channels, values, reduce, include_self=False)
