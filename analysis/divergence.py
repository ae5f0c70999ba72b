"""Where two runs part: the first stage, block and module, in the order in which they were worked on, that differ.

What a stage decided is stored as fingerprints (`<stage>_fingerprint`, equal for equal bits). Runs from before there
were any are compared by their layer metrics, to the last bit: equal numbers then make equal states likely, not certain.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

from analysis.layers import FINGERPRINT
from qbench.store.records import LayerMetric, RunRow

#: Relative differences up to here can be the order in which float32 numbers were summed: another number of threads, a
#: GPU, another version of a library.
FLOAT_NOISE = 1e-4

Evidence = Literal["fingerprints", "layer metrics"]

_OF_ROTATIONS = ("rotation_error", "cross_heads")


@dataclass(frozen=True, kw_only=True)
class StagePair:
    """One step of both pipelines; None where one has no such step. `settings`: (option, A's value, B's value) where
    they differ, "version" among them. places: (block, module, metric) that both have of it, and how many of these
    differ; `first` is the first of these in the order of work."""

    a: str | None
    b: str | None
    settings: tuple[tuple[str, object, object], ...] = ()
    places: int = 0
    differ: int = 0
    first: tuple[int, str, str] | None = None

    @property
    def name(self) -> str:
        return " / ".join(dict.fromkeys(name for name in (self.a, self.b) if name is not None))

    @property
    def same_settings(self) -> bool:
        return self.a == self.b and not self.settings


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The first place at which two runs differ. `stage` is the position in `StagePair`s, None for what lies behind all
    stages of a block; a and b are the values there, None where a run has none. relative: |a - b| over the larger one,
    None for fingerprints, which have no distance."""

    block: int
    module: str
    stage: int | None
    metric: str
    a: float | None
    b: float | None
    relative: float | None


@dataclass(frozen=True, kw_only=True)
class Parting:
    """All that is known of where two runs part. evidence: None where they have no layer metrics in common, so that only
    `stages` speaks. beyond_noise: the first place whose relative difference is more than float noise, by metrics."""

    stages: tuple[StagePair, ...]
    evidence: Evidence | None
    first: Divergence | None = None
    beyond_noise: Divergence | None = None
    compared: int = 0
    differing: int = 0

    @property
    def unseen(self) -> StagePair | None:
        """The first step that differs by its settings, if no number shows whether that changed anything and all that do
        show something come behind it."""
        last = len(self.stages) if self.first is None or self.first.stage is None else self.first.stage
        if self.evidence == "fingerprints":  # what has none decided nothing
            return None
        return next((pair for pair in self.stages[:last] if not pair.same_settings and not pair.places), None)


@dataclass(frozen=True)
class _Place:
    """Sorts in the order of work: block by block, stage by stage (behind all stages: last), as recorded."""

    block: int
    stage: int
    module: str
    metric: str


def part(a: RunRow, b: RunRow, of_a: Sequence[LayerMetric], of_b: Sequence[LayerMetric]) -> Parting:
    """Where A and B part, by their specs and their layer metrics in the order of recording."""
    pipelines = [_pipeline(run) for run in (a, b)]
    pairs = _aligned(*([stage["name"] for stage in each] for each in pipelines))
    stages = [_pair(i, j, *pipelines) for i, j in pairs]
    prints = [[row for row in rows if row.name.endswith(FINGERPRINT)] for rows in (of_a, of_b)]
    evidence: Evidence | None = "fingerprints"
    rows = prints
    if not all(prints):
        evidence = "layer metrics"
        rows = [[row for row in rows if not row.name.endswith((FINGERPRINT, "_s"))] for rows in (of_a, of_b)]
        if not all(rows):
            return Parting(stages=tuple(stages), evidence=None)
    positions = [{pair[side]: k for k, pair in enumerate(pairs) if pair[side] is not None} for side in (0, 1)]
    exact = evidence == "fingerprints"
    found = [
        _placed(mine, every, pipeline, position, exact=exact)
        for mine, every, pipeline, position in zip(rows, (of_a, of_b), pipelines, positions, strict=True)
    ]
    return _parting(stages, evidence, *found)


def _parting(
    stages: list[StagePair], evidence: Evidence, first: Mapping[_Place, float], second: Mapping[_Place, float]
) -> Parting:
    order = {place: k for k, place in enumerate(dict.fromkeys((*first, *second)))}
    places = sorted(order, key=lambda place: (place.block, place.stage, order[place]))
    exact = evidence == "fingerprints"
    if not exact:  # other methods record other numbers: only a number that both have can differ
        places = [place for place in places if place in first and place in second]
    differing = [place for place in places if first.get(place) != second.get(place)]
    for k, pair in enumerate(stages):
        mine = [place for place in places if place.stage == k]
        differ = [place for place in differing if place.stage == k]
        at = (differ[0].block, differ[0].module, differ[0].metric) if differ else None
        stages[k] = StagePair(
            a=pair.a, b=pair.b, settings=pair.settings, places=len(mine), differ=len(differ), first=at
        )

    def at(place: _Place) -> Divergence:
        values = first.get(place), second.get(place)
        return Divergence(
            block=place.block,
            module=place.module,
            stage=place.stage if place.stage < len(stages) else None,
            metric=place.metric,
            **dict(zip("ab", values, strict=True)),
            relative=None if exact else _relative(*values),
        )

    large = [] if exact else [place for place in differing if _relative(first[place], second[place]) > FLOAT_NOISE]
    return Parting(
        stages=tuple(stages),
        evidence=evidence,
        first=at(differing[0]) if differing else None,
        beyond_noise=at(large[0]) if large else None,
        compared=len(places),
        differing=len(differing),
    )


def _placed(
    rows: Sequence[LayerMetric],
    every: Sequence[LayerMetric],
    pipeline: Sequence[Mapping[str, Any]],
    position: Mapping[int, int],
    *,
    exact: bool,
) -> dict[_Place, float]:
    """The values by place. position: of each of the pipeline's stages, its number among the pairs."""
    names = [stage["name"] for stage in pipeline]
    owners, behind = _owners(every, names), len(position) + len(names) + 1
    found: dict[_Place, float] = {}
    for row in rows:
        stage = owners.get((row.block, row.module, row.name))
        number = behind if stage is None else position[stage]
        # Fingerprints of two stages in one position are of the same thing, whatever the stages' names.
        metric = FINGERPRINT.strip("_") if exact else row.name
        found[_Place(row.block, number, row.module, metric)] = row.value
    return found


def _owners(rows: Sequence[LayerMetric], names: Sequence[str]) -> dict[tuple[int, str, str], int | None]:
    """The stage that each number comes from, None for what lies behind all of them.

    A stage's name in front says it; else the order of recording: every stage of a block ends with its `<stage>_s`.
    """
    by_length = sorted(range(len(names)), key=lambda i: -len(names[i]))
    ends = {f"{name}_s": i for i, name in enumerate(names)}
    found: dict[tuple[int, str, str], int | None] = {}
    waiting: dict[int, list[tuple[int, str, str]]] = {}
    for row in rows:
        key = (row.block, row.module, row.name)
        if row.module == "" and row.name in ends:
            found |= dict.fromkeys(waiting.pop(row.block, ()), ends[row.name])
        owner = next((i for i in by_length if row.name.startswith(f"{names[i]}_")), None)
        if owner is not None:
            found[key] = owner
        elif row.name in _OF_ROTATIONS and names:
            found[key] = 0
        else:
            found[key] = None
            waiting.setdefault(row.block, []).append(key)
    return found


def _aligned(first: Sequence[str], second: Sequence[str]) -> list[tuple[int | None, int | None]]:
    """Positions in both pipelines that are the same step, or take each other's place; None for a step without a
    partner."""
    pairs: list[tuple[int | None, int | None]] = []
    for tag, a, a_end, b, b_end in SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        mine, theirs = list(range(a, a_end)), list(range(b, b_end))
        if tag == "replace":  # what comes last rounds: the last take each other's place
            extra = len(mine) - len(theirs)
            mine, theirs = [None] * max(0, -extra) + mine, [None] * max(0, extra) + theirs
        width = max(len(mine), len(theirs))
        pairs += zip(mine or [None] * width, theirs or [None] * width, strict=True)
    return pairs


def _pair(
    i: int | None, j: int | None, of_a: Sequence[Mapping[str, Any]], of_b: Sequence[Mapping[str, Any]]
) -> StagePair:
    a, b = (None if k is None else stages[k] for k, stages in ((i, of_a), (j, of_b)))
    settings = []
    if a is not None and b is not None and a["name"] == b["name"]:
        mine, theirs = ({"version": each.get("version"), **dict(each.get("options") or {})} for each in (a, b))
        settings = [
            (name, mine.get(name), theirs.get(name))
            for name in dict.fromkeys((*mine, *theirs))
            if mine.get(name) != theirs.get(name)
        ]
    return StagePair(a=a and a["name"], b=b and b["name"], settings=tuple(settings))


def _pipeline(run: RunRow) -> Sequence[Mapping[str, Any]]:
    return run.spec.get("pipeline") or []


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0
