"""Scales that can move from a weight's columns into what produces its input: found, then proved."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from qbench.errors import NumericsError
from qbench.structure.blocks import BlockCall
from qbench.structure.float64 import run_exactly
from qbench.structure.skeleton import Skeleton, WeightKey, distinct_factors, find_readers
from qbench.structure.trace import BlockStructure
from qbench.structure.weights import WeightRef


@dataclass(frozen=True, kw_only=True)
class Divided:
    """A part of a producer: entries of a vector, or rows of a linear weight, divided by the free scales."""

    parameter: str
    """Path in the block."""
    weight: WeightRef | None = None
    """The linear weight whose rows are meant; None for a parameter with one dimension."""
    rows: Tensor = field(compare=False)
    """int64 `[n_free]`: entry or row that free scale k divides."""
    offset: float = 0.0
    """What the block adds to the parameter before it multiplies by it: 1 for norms that store `w - 1`."""


@dataclass(frozen=True, kw_only=True)
class Fold:
    """A freedom of a block: input channel j of some groups can be divided by a scale in what produces it.

    Column j of every weight that reads the channel is multiplied by the same scale, and the block computes
    the same function. Channels may be tied: with grouped-query attention, channel d of all query heads of one
    key/value head shares a scale. Free scales are numbered 0 to n_free - 1.
    """

    group: int
    """Index of the LinearGroup whose input is rescaled (the first, if there are several)."""
    extra_groups: tuple[int, ...] = ()
    """The other groups that read the rescaled channels, such as all experts behind one norm."""
    producer: tuple[Divided, ...]
    consumers: tuple[WeightRef, ...]
    """All weights of these groups and the excluded weights that read the same channels, such as a router."""
    channels: Tensor = field(compare=False)
    """int64 `[in_features]`: input channel -> free scale."""
    kind: Literal["norm", "linear"]
    grouped: bool
    """Whether channels are tied."""
    bias: str | None = None
    """The producer's vector from which a shift of the channels can be subtracted, because every consumer has a bias
    that takes it back (see `apply_shift`); None where there is none."""

    @property
    def n_free(self) -> int:
        """Number of free scales."""
        return int(self.channels.max()) + 1

    def apply(self, parameters: Mapping[str, Tensor], scale: Tensor) -> dict[str, Tensor]:
        """The parameters that change, by path, when the free scales are `scale` `[n_free]`, all > 0.

        `parameters` are the block's by path, any dtype and device, and are left alone; results are as they
        are. Raises NumericsError for a scale of another shape or not finite and positive.
        """
        if scale.shape != (self.n_free,) or not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise NumericsError(f"fold of group {self.group}: scales must be {self.n_free} finite numbers > 0")
        changed: dict[str, Tensor] = {}
        for part in self.producer:
            if part.weight is None:
                changed[part.parameter] = self.vector(part.parameter, parameters[part.parameter], scale)
        divided = [part.weight for part in self.producer if part.weight is not None]
        for ref in dict.fromkeys((*divided, *self.consumers)):
            if ref.parameter not in changed:
                changed[ref.parameter] = parameters[ref.parameter].detach().clone()
            view = ref.of(changed[ref.parameter])
            view.copy_(self.matrix(ref, view, scale))
        return changed

    def apply_shift(self, parameters: Mapping[str, Tensor], shift: Tensor) -> dict[str, Tensor]:
        """The parameters that change, by path, when `shift` z `[n_free]` is subtracted from the channels.

        The producer's bias loses z, every consumer's bias gains W z. Like `apply` it leaves `parameters` alone. Raises
        NumericsError for a shift of another shape or not finite, and where the fold has no `bias`.
        """
        if self.bias is None:
            raise NumericsError(f"fold of group {self.group}: no bias that a shift could be moved to")
        if shift.shape != (self.n_free,) or not bool(torch.isfinite(shift).all()):
            raise NumericsError(f"fold of group {self.group}: shifts must be {self.n_free} finite numbers")
        paths = (self.bias, *(ref.bias for ref in self.consumers))
        return {
            path: self.shifted(path, parameters[path], shift, lambda ref: ref.of(parameters[ref.parameter].detach()))
            for path in paths
        }

    def matrix(self, ref: WeightRef, weight: Tensor, scale: Tensor) -> Tensor:
        """New value `[out, in]` of one linear weight; `weight` itself if the fold does not touch it."""
        for part in self.producer:
            if part.weight == ref:
                weight = weight.clone()
                weight[part.rows.to(weight.device)] /= scale.to(weight)[:, None]
        if ref in self.consumers:
            weight = weight * scale.to(weight)[self.channels.to(weight.device)]
        return weight

    def vector(self, parameter: str, value: Tensor, scale: Tensor) -> Tensor:
        """New value `[n]` of a norm weight or bias; `value` itself if the fold does not touch it."""
        for part in self.producer:
            if part.weight is None and part.parameter == parameter:
                rows = part.rows.to(value.device)
                value = value.detach().clone()
                value[rows] = (value[rows] + part.offset) / scale.to(value) - part.offset
        return value

    def shifted(self, parameter: str, value: Tensor, shift: Tensor, weight_of: Callable[[WeightRef], Tensor]) -> Tensor:
        """New value `[n]` of a vector under a shift; `value` itself if that does not touch it. weight_of: a consumer's
        weight `[out, in]`."""
        for part in self.producer:
            if part.weight is None and part.parameter == parameter == self.bias:
                value = value.detach().clone()
                value[part.rows.to(value.device)] -= shift.to(value)
        for ref in self.consumers:
            if ref.bias == parameter:
                weight = weight_of(ref).double()
                channels = shift.to(weight)[self.channels.to(weight.device)]
                value = (value.detach().double() + weight @ channels).to(value.dtype)
        return value


def find_folds(block: nn.Module, call: BlockCall, hidden: Tensor, structure: BlockStructure) -> tuple[Fold, ...]:
    """The folds of a block, at most one per group, sorted by group; every one proved.

    Two proofs. On the skeleton of the block, where noise stands for the linear weights, a producer that is
    multiplied by distinct factors must multiply each channel of its readers by exactly one of them and change
    nothing else: no other weight's input and not the output. Then the block itself in float64, with random
    scales folded in, must give the same output on `hidden` `[batch, tokens, features]`.
    """
    skeleton = Skeleton(block, call, hidden, structure)
    chosen: list[Fold] = []
    covered: set[int] = set()
    for fold in (*_norm_folds(block, skeleton, structure), *_linear_folds(skeleton, structure)):
        groups = {fold.group, *fold.extra_groups}
        if not groups & covered:
            chosen.append(fold)
            covered |= groups
    if not _preserves_output(block, call, hidden, structure, chosen):
        chosen = [fold for fold in chosen if _preserves_output(block, call, hidden, structure, [fold])]
    shiftable = [_with_bias(block, call, hidden, structure, fold) for fold in chosen]
    return tuple(sorted(shiftable, key=lambda fold: fold.group))


# The greatest relative change of the output by a true fold; norms that compute in float32 err by 1e-7.
_TOLERANCE = 1e-6


def _preserves_output(
    block: nn.Module, call: BlockCall, hidden: Tensor, structure: BlockStructure, folds: list[Fold]
) -> bool:
    generator = torch.Generator().manual_seed(0)
    scales = [0.5 + 1.5 * torch.rand(fold.n_free, generator=generator, dtype=torch.float64) for fold in folds]

    def matrix(ref: WeightRef, weight: Tensor) -> Tensor:
        for fold, scale in zip(folds, scales, strict=True):
            weight = fold.matrix(ref, weight, scale)
        return weight

    def vector(parameter: str, value: Tensor) -> Tensor:
        for fold, scale in zip(folds, scales, strict=True):
            value = fold.vector(parameter, value, scale)
        return value

    return _same_output(block, call, hidden, structure, matrix=matrix, vector=vector)


def _with_bias(block: nn.Module, call: BlockCall, hidden: Tensor, structure: BlockStructure, fold: Fold) -> Fold:
    """The fold with its `bias`, if one of the producer's vectors proves to be one."""
    biases = {ref.bias for ref in fold.consumers}
    if fold.kind != "norm" or None in biases or len(biases) < len(fold.consumers):
        return fold
    generator = torch.Generator().manual_seed(0)
    shift = 2 * torch.rand(fold.n_free, generator=generator, dtype=torch.float64) - 1
    for part in fold.producer:
        trial = replace(fold, bias=part.parameter)

        def vector(path: str, value: Tensor, trial: Fold = trial) -> Tensor:
            return trial.shifted(path, value, shift, lambda ref: ref.read(block))

        if _same_output(block, call, hidden, structure, matrix=lambda _, weight: weight, vector=vector):
            return trial
    return fold


def _same_output(
    block: nn.Module,
    call: BlockCall,
    hidden: Tensor,
    structure: BlockStructure,
    *,
    matrix: Callable[[WeightRef, Tensor], Tensor],
    vector: Callable[[str, Tensor], Tensor],
) -> bool:
    """Whether changed parameters (see `run_exactly`) leave the block's output alone."""
    before = run_exactly(block, call, hidden, structure, matrix=lambda _, weight: weight, vector=lambda _, value: value)
    after = run_exactly(block, call, hidden, structure, matrix=matrix, vector=vector)
    return bool((after - before).abs().max() <= _TOLERANCE * before.abs().max())


def _norm_folds(block: nn.Module, skeleton: Skeleton, structure: BlockStructure) -> Iterator[Fold]:
    """Folds into the vectors of one module: all multiply or add as they are, or one multiplies as 1 + w."""
    biases = {ref.bias for group in structure.groups for ref in group.weights}
    sizes = {group.in_features for group in structure.groups}
    by_module: dict[str, list[str]] = {}
    for name, value in skeleton.vectors.items():
        if name not in biases and len(value) in sizes:
            by_module.setdefault(name.rpartition(".")[0], []).append(name)
    for names in by_module.values():
        n = len(skeleton.vectors[names[0]])
        for one_plus in (None, *names):
            offsets = {name: float(name == one_plus) for name in names}
            vectors = {
                name: (skeleton.vectors[name] + offset) * distinct_factors(n).to(skeleton.vectors[name]) - offset
                for name, offset in offsets.items()
            }
            readers = find_readers(skeleton, n, vectors=vectors)
            if readers:
                used, channels = _free_scales(readers)
                producer = tuple(Divided(parameter=name, rows=used, offset=offset) for name, offset in offsets.items())
                yield from _as_fold(structure, readers, producer, channels, "norm")
                break


def _linear_folds(skeleton: Skeleton, structure: BlockStructure) -> Iterator[Fold]:
    """Folds into rows of a linear weight, of an expert into its own; the last executed comes first."""
    by_parameter: dict[str, list[WeightRef]] = {}
    rows_of: dict[str, Tensor] = {}
    for group in structure.groups:
        for ref in group.weights:
            by_parameter.setdefault(ref.parameter, []).append(ref)
            rows_of.setdefault(ref.parameter, group.query_key_rows[ref.name])
    for parameter, refs in reversed(by_parameter.items()):
        for rows in _row_candidates(rows_of[parameter]):
            factor = torch.ones(refs[0].out_features, dtype=torch.float64)
            factor[rows] = distinct_factors(len(rows))
            vectors = {
                ref.bias: skeleton.vectors[ref.bias] * factor.to(skeleton.vectors[ref.bias])
                for ref in refs
                if ref.bias is not None
            }
            readers = find_readers(skeleton, len(rows), rows={_key(ref): factor for ref in refs}, vectors=vectors)
            if readers:
                yield from _per_expert(structure, refs, rows, readers)
                break


def _row_candidates(query_key_rows: Tensor) -> Iterator[Tensor]:
    """int64 row sets of a weight that may feed channels linearly: all rows, or one half of a fused pair.

    Rows that reach attention scores do so through a softmax.
    """
    out_features = len(query_key_rows)
    rows = torch.arange(out_features)
    if bool(query_key_rows.any()):
        if not bool(query_key_rows.all()):
            yield rows[~query_key_rows]
        return
    yield rows
    if out_features % 2 == 0:
        half = out_features // 2
        yield from (rows[half:], rows[:half], rows[1::2], rows[::2])


def _free_scales(readers: Mapping[WeightKey, Tensor]) -> tuple[Tensor, Tensor]:
    """Positions that are read, ascending, and per input channel the index of its position among them."""
    return torch.unique(next(iter(readers.values())), return_inverse=True)


def _key(ref: WeightRef) -> WeightKey:
    return ref.parameter, ref.index


def _per_expert(
    structure: BlockStructure, refs: list[WeightRef], rows: Tensor, readers: Mapping[WeightKey, Tensor]
) -> Iterator[Fold]:
    """The fold of one weight, or one for each expert of a parameter that feeds weights of the same expert."""
    for ref in refs:
        own = readers if ref.index is None else {key: value for key, value in readers.items() if key[1] == ref.index}
        if not own:
            continue
        used, channels = _free_scales(own)
        divided = rows[used]
        producer = [Divided(parameter=ref.parameter, weight=ref, rows=divided)]
        if ref.bias is not None:
            producer.append(Divided(parameter=ref.bias, rows=divided))
        yield from _as_fold(structure, own, tuple(producer), channels, "linear")


def _as_fold(
    structure: BlockStructure,
    readers: Mapping[WeightKey, Tensor],
    producer: tuple[Divided, ...],
    channels: Tensor,
    kind: Literal["norm", "linear"],
) -> Iterator[Fold]:
    """The fold, unless its readers disagree about the channels or are no group's (a router alone)."""
    groups = [group for group in structure.groups if any(_key(ref) in readers for ref in group.weights)]
    weights = [ref for group in groups for ref in group.weights]
    routers = [ref for ref in structure.routers if _key(ref) in readers]
    first = next(iter(readers.values()))
    if not groups or any(not torch.equal(positions, first) for positions in readers.values()):
        return
    yield Fold(
        group=groups[0].index,
        extra_groups=tuple(group.index for group in groups[1:]),
        producer=producer,
        consumers=(*weights, *routers),
        channels=channels,
        kind=kind,
        grouped=int(channels.max()) + 1 < len(channels),
    )
