"""Pipelines: ordered stages, built from plain options and checked before anything heavy happens."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import pairwise, zip_longest
from types import NoneType
from typing import Literal, get_args, get_origin, get_type_hints

import qbench.stages
from qbench.calibration.statistics import Hessian
from qbench.errors import SpecError, written
from qbench.formats import TensorFormat
from qbench.formats.scheme import Scheme
from qbench.spec import StageSpec
from qbench.stages.base import Kind, Need, Stage, StreamName, WeightShape

#: How an option's type is named to a user.
EXPECTED = {float: "a number", int: "an integer", bool: "true or false", str: "a text"}


def stage_types() -> dict[str, type[Stage]]:
    """Every stage in this folder by name: adding a file adds a stage."""
    found: dict[str, type[Stage]] = {}
    for module in pkgutil.iter_modules(qbench.stages.__path__):
        prefix = module.name.partition("_")[0].upper()
        if prefix in Kind.__members__:
            namespace = vars(importlib.import_module(f"qbench.stages.{module.name}"))
            types = [v for v in namespace.values() if isinstance(v, type) and issubclass(v, Stage)]
            found |= {t.name: t for t in types if t.__module__ == f"qbench.stages.{module.name}"}
    return found


@dataclass(frozen=True)
class Pipeline:
    """Stages in legal order, with exactly one that rounds; empty for the full-precision baseline."""

    stages: tuple[Stage, ...]
    parts: tuple[str | None, ...] = field(default=(), compare=False)
    """Per stage, what its options go by on the command line when `algo` has several parts."""

    def __post_init__(self) -> None:
        names = "+".join(stage.name for stage in self.stages)
        kinds = [stage.kind for stage in self.stages]
        for first, second in pairwise(self.stages):
            if first.kind > second.kind:
                order = " < ".join(kind.name for kind in Kind)
                early, late = f"{second.name} ({second.kind.name})", f"{first.name} ({first.kind.name})"
                raise SpecError("algo.pipeline", names, f"{early} before {late}: stages in the order {order}")
        if self.stages and kinds.count(Kind.ROUND) != 1:
            raise SpecError("algo.pipeline", names, "exactly one stage that rounds, such as rtn or gptq")
        for name in {stage.name for stage in self.stages}:
            if [stage.name for stage in self.stages].count(name) > 1:
                raise SpecError("algo.pipeline", names, f"every stage once; {name} comes twice")
        for place, stage in enumerate(self.stages):
            later = [other for other in self.stages[place + 1 :] if stage.online and stage.kind == Kind.TRANSFORM]
            for other in later:
                wanted = {need.statistic for need in other.needs if need.stream == "full"} - {Hessian}
                if wanted or other.scope_tokens or other.transforms:
                    reason = f"{other.name} before {stage.name}: it looks at inputs as they are, or scales them"
                    raise SpecError("algo.pipeline", names, reason)
        rotating = [stage.name for stage in self.stages if stage.kind == Kind.ROTATE]
        if len(rotating) > 1:  # the second would undo what the first is good for
            raise SpecError("algo.pipeline", names, f"one stage at most that rotates the model; {rotating} do")
        for place, stage in enumerate(self.stages):
            chosen = [other.name for other in self.stages[:place] if other.kind == Kind.RANGE]
            if chosen and not stage.uses_ranges:
                raise SpecError("algo.pipeline", names, f"no {chosen[0]}: {stage.name} chooses ranges by itself")
        behind = [stage.name for stage in self.stages if any(need.stream == "quantized" for need in stage.needs)]
        if len(behind) > 1:  # each would push that stream through the block once more
            raise SpecError("algo.pipeline", names, f"one stage at most behind quantized groups; {behind} are")

    def needs(self, stream: StreamName) -> frozenset[type]:
        """Statistics wanted on one stream."""
        every: frozenset[Need] = frozenset().union(*(stage.needs for stage in self.stages))
        return frozenset(need.statistic for need in every if need.stream == stream)

    @property
    def samples(self) -> frozenset[int]:
        """Tokens of every sample of the full-precision stream that a stage searches on; 0 where none does: one
        sequence, to prove transforms on."""
        return frozenset(stage.scope_tokens for stage in self.stages if stage.scope_tokens > 0) or frozenset({0})

    @property
    def scope_tokens(self) -> int:
        """Tokens of the largest of the `samples`."""
        return max(self.samples)

    @property
    def needs_data(self) -> bool:
        """Whether calibration text changes the result."""
        return any(stage.needs_data for stage in self.stages)

    @property
    def zero_point(self) -> str:
        """Zero points of asymmetric integers where the configuration leaves their kind open."""
        return next((stage.zero_point for stage in self.stages if stage.zero_point is not None), "int")

    @property
    def online(self) -> bool:
        """Whether the result needs more at run time than its weights."""
        return any(stage.online for stage in self.stages)

    @property
    def trains(self) -> bool:
        """Whether a stage learns."""
        return any(stage.trains for stage in self.stages)

    @property
    def batch_sizes(self) -> frozenset[int]:
        """Sequences per minibatch of the stages that learn."""
        return frozenset(stage.batch_size for stage in self.stages if stage.trains)

    @property
    def transforms(self) -> bool:
        """Whether a stage moves scales through folds."""
        return any(stage.transforms or stage.kind == Kind.TRANSFORM for stage in self.stages)

    def keeps_ranges(self, stage: Stage) -> bool:
        """Whether every stage behind `stage` looks at the ranges that it chose; otherwise a later one chooses its own,
        for all weights."""
        return all(later.uses_ranges for later in self.stages[self.stages.index(stage) + 1 :])

    @property
    def uses_random(self) -> bool:
        return any(stage.uses_random for stage in self.stages)

    def check(self, formats: frozenset[TensorFormat], scheme: Scheme | None = None) -> None:
        """Raises SpecError for formats that a stage cannot serve; `formats` are those of all quantized weights."""
        names = "+".join(stage.name for stage in self.stages)
        idle = [stage.name for stage in self.stages if stage.kind != Kind.ROTATE and stage.name != "rtn"]
        if not formats and idle:
            raise SpecError("format", "none", f"a weight format: {names} has nothing to do without one (algo=rtn can)")
        for place, (stage, part) in enumerate(zip_longest(self.stages, self.parts)):
            with _named(part):
                stage.check_later(self.stages[place + 1 :])
                stage.check(formats)
                if scheme is not None:
                    stage.check_scheme(scheme)

    def check_shapes(self, shapes: Sequence[WeightShape]) -> None:
        """Raises SpecError for quantized weights of the blocks that a stage cannot serve."""
        for stage, part in zip_longest(self.stages, self.parts):
            with _named(part):
                stage.check_shapes(shapes)

    def specs(self) -> tuple[StageSpec, ...]:
        return tuple(
            StageSpec(
                name=stage.name,
                version=stage.version,
                options=tuple((f.name, getattr(stage, f.name)) for f in fields(stage)),
            )
            for stage in self.stages
        )


def build_pipeline(nodes: Sequence[Mapping[str, object]]) -> Pipeline:
    """Pipeline from `[{stage: name, enabled: bool, option: value, …}, …]`; disabled entries are left out.

    Raises SpecError for unknown stages and options and for values of the wrong type.
    """
    types = stage_types()
    stages, parts, own = [], [], []
    for node in nodes:
        options = dict(node)
        name = options.pop("stage", None)
        if name not in types:
            raise SpecError("algo.pipeline.stage", name, f"one of {', '.join(sorted(types))}")
        part = options.pop("part", None)
        if not options.pop("companion", False):
            own.append((part, name))
        enabled = options.pop("enabled", True)
        if not isinstance(enabled, bool):
            raise SpecError(f"algo ({name})", enabled, "true or false")
        defaults = types[name].options() | options.pop("defaults", {})  # a pipeline's own, where it has others
        with _named(part):
            values = _typed(types[name], options)
            stage = types[name](**values)
            changed = [option for option, value in values.items() if value != defaults.get(option, value)]
            if not enabled and changed:
                raise SpecError(f"algo ({name}) {changed[0]}", values[changed[0]], f"nothing: {name} is switched off")
        if enabled:
            stages.append(stage)
            parts.append(part)
    try:
        return Pipeline(tuple(stages), tuple(parts))
    except SpecError as error:
        ordered = _in_order(stages, own)
        if ordered is None:
            raise
        remedy = f"{error.accepted}; write the single stages: algo={'+'.join(ordered)}"
        raise SpecError(error.option, error.value, remedy) from error


def _in_order(stages: Sequence[Stage], own: Sequence[tuple[str | None, str]]) -> list[str] | None:
    """Names that compose to the same stages in legal order; None where that is impossible or not what is wrong. Parts
    that bring several stages cannot be interleaved. own: (part, stage) of every entry that is not a companion."""
    ordered = sorted(stages, key=lambda stage: stage.kind)
    names = [stage.name for stage in ordered]
    whole = {part for part, stage in own if stage != part}  # brings other stages than the one of its name
    if ordered == list(stages) or whole & {None, *names}:
        return None
    try:
        Pipeline(tuple(ordered))
    except SpecError:  # the order is not all that is wrong with it
        return None
    return names


@contextmanager
def _named(part: str | None) -> Iterator[None]:
    """Options in errors go by their part of a composed `algo`."""
    try:
        yield
    except SpecError as error:
        if part is None or not error.option.startswith("algo."):
            raise
        accepted = re.sub(r"\balgo\.(?=\w)", f"algo.{part}.", error.accepted)
        raise SpecError(f"algo.{part}.{error.option.removeprefix('algo.')}", error.value, accepted) from error


def _typed(stage: type[Stage], options: Mapping[str, object]) -> dict[str, object]:
    """Options checked against the fields' annotations; integers are accepted where a float is meant."""
    hints = get_type_hints(stage)
    known = {f.name for f in fields(stage)}
    values: dict[str, object] = {}
    for name, value in options.items():
        if name not in known:
            raise SpecError(
                f"algo ({stage.name}) {name}", value, f"options of {stage.name}: {', '.join(sorted(known))}"
            )
        wanted, alternatives = hints[name], get_args(hints[name])
        optional = NoneType in alternatives
        if optional:
            (wanted,) = (kind for kind in alternatives if kind is not NoneType)
        if get_origin(wanted) is Literal:
            if value not in get_args(wanted):
                raise SpecError(f"algo.{name}", value, f"one of {', '.join(map(written, get_args(wanted)))}")
        elif wanted is float and type(value) in (int, float):
            value = float(value)
        elif wanted is str and type(value) in (int, float):
            value = str(value)
        elif type(value) is not wanted and not (optional and value is None):
            raise SpecError(f"algo.{name}", value, f"must be {EXPECTED[wanted]}{' or null' if optional else ''}")
        values[name] = value
    return values
