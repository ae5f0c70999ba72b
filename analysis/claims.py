"""Which numbers may stand in one table: mixtures are refused, deviations become footnotes.

Refused, unless allowed by name: numbers of one column under several protocols or of several sets of items, numbers of
several versions of the code, numbers of a checkout with uncommitted changes. What is not wrong but would surprise a
reader who compares two cells (another dtype, machine, calibration length, option of a stage) is footnoted.
"""

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from analysis.tables.labels import is_baseline
from qbench.errors import EvaluationError, SpecError
from qbench.store import queries
from qbench.store.database import Database
from qbench.store.records import Environment, MetricRow, RunRow

Mixture = Literal["protocol", "items", "code", "dirty"]
MIXTURES: tuple[Mixture, ...] = ("protocol", "items", "code", "dirty")

_SHOWN = 3  # cells that a message names
_IMPLIED = {
    **{"model": "weights", "bits": "weight_format", "act_bits": "act_format", "kv_bits": "kv_format"},
    "calib_seed": "seed",
}
_OURS = "qbench"  # whose version the code stands for


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number of a table: `where` names the cell to a reader, `column` what it is compared with (cells of one column
    must be of one protocol and one set of items). `metric` is None for a number that is the run's own (bits, seconds).
    """

    where: str
    run: RunRow
    metric: MetricRow | None = None
    column: str = ""


@dataclass(frozen=True, kw_only=True)
class Violation:
    """A mixture that a table must not have, in one sentence."""

    kind: Mixture
    text: str


@dataclass(frozen=True, kw_only=True)
class Footnote:
    """In what some cells deviate from most; `cells` are positions in the checked sequence, `number` counts from 1."""

    number: int
    text: str
    cells: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What a table has to say about its cells: footnotes, first of mixtures that were allowed, then of deviations."""

    footnotes: tuple[Footnote, ...] = ()

    def marks(self, cell: int) -> tuple[int, ...]:
        """Numbers of the footnotes of the cell at this position."""
        return tuple(each.number for each in self.footnotes if cell in each.cells)


def check(
    database: Database, cells: Sequence[Cell], *, varied: Collection[str] = (), allow: Collection[str] = ()
) -> Checked:
    """Footnotes of the cells of one table; EvaluationError where they must not stand in one.

    `varied` names what differs on purpose, being the table's rows or columns: columns of `run` ("bits", "calib"),
    "algo" for everything about the pipeline. `allow` names mixtures (`MIXTURES`, or "all") that are footnoted instead
    of refused. Raises SpecError for another name in `allow`.
    """
    for name in allow:
        if name not in (*MIXTURES, "all"):
            raise SpecError("allow", name, f"one of {', '.join(MIXTURES)}, or all")
    environments = _environments(database, cells)
    found = list(_violations(cells, environments))
    refused = [each for each, _ in found if each.kind not in allow and "all" not in allow]
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise EvaluationError(
            f"{refused[0].text}{more}: a table must not mix them unless told to, allow={_kinds(refused)}"
        )
    notes = [(each.text, where) for each, where in found]
    notes += _deviations(
        cells, environments, frozenset(varied) | {_IMPLIED[name] for name in varied if name in _IMPLIED}
    )
    return Checked(
        footnotes=tuple(
            Footnote(number=number, text=text, cells=tuple(where)) for number, (text, where) in enumerate(notes, 1)
        )
    )


def violations(database: Database, cells: Sequence[Cell]) -> tuple[Violation, ...]:
    """All mixtures among the cells, for a report that lists them instead of refusing."""
    environments = _environments(database, cells)
    return tuple(each for each, _ in _violations(cells, environments))


def _environments(database: Database, cells: Sequence[Cell]) -> dict[int, Environment]:
    return {number: queries.environment(database, number) for number in sorted({n for c in cells for n in _places(c)})}


def _places(cell: Cell) -> tuple[int, ...]:
    """Where the run was made and, where that was elsewhere, its number measured: ids of environments."""
    measured = cell.metric.environment_id if cell.metric is not None else None
    return tuple(dict.fromkeys((cell.run.environment_id, measured or cell.run.environment_id)))


def code_of(environment: Environment) -> str:
    """What names the code that made a number: the commit, or the installed version outside a checkout."""
    return environment.git_commit or f"{_OURS} {environment.versions.get(_OURS, 'of unknown version')}"


def _violations(
    cells: Sequence[Cell], environments: Mapping[int, Environment]
) -> Iterator[tuple[Violation, tuple[int, ...]]]:
    """(violation, positions of the cells that deviate from most)."""
    for column in dict.fromkeys(each.column for each in cells):
        places = [i for i, each in enumerate(cells) if each.column == column and each.metric is not None]
        by_name = {i: (cells[i].metric.evaluator, cells[i].metric.task, cells[i].metric.name) for i in places}
        if len(set(by_name.values())) > 1:
            yield _mixed("protocol", "metrics", cells, {i: f"{n} on {t}" for i, (_, t, n) in by_name.items()}, column)
            continue
        protocols = {i: cells[i].metric.protocol for i in places}
        if len(set(protocols.values())) > 1:
            yield _mixed("protocol", "protocols", cells, protocols, column)
        elif len({(cells[i].metric.spec_key, cells[i].metric.n) for i in places}) > 1:
            items = {i: f"n = {cells[i].metric.n} of {cells[i].metric.spec_key[:8]}" for i in places}
            yield _mixed("items", "items", cells, items, column)
    codes = {
        i: " measured by ".join(dict.fromkeys(code_of(environments[place])[:12] for place in _places(each)))
        for i, each in enumerate(cells)
    }
    if len(set(codes.values())) > 1:
        yield _mixed("code", "code versions", cells, codes)
    versions: dict[str, dict[int, str]] = {}
    for i, each in enumerate(cells):
        for stage in each.run.spec.get("pipeline") or ():
            versions.setdefault(stage["name"], {})[i] = str(stage.get("version"))
    for name, by_cell in versions.items():
        if len(set(by_cell.values())) > 1:
            yield _mixed("code", f"versions of stage {name}", cells, by_cell)
    dirty = tuple(i for i, each in enumerate(cells) if any(environments[place].git_dirty for place in _places(each)))
    if dirty:
        text = f"{_named(cells, dirty)}: made from a checkout with uncommitted changes, which no commit describes"
        yield Violation(kind="dirty", text=text), dirty


def _mixed(
    kind: Mixture, what: str, cells: Sequence[Cell], values: Mapping[int, str], column: str = ""
) -> tuple[Violation, tuple[int, ...]]:
    counts = Counter(values.values()).most_common()
    usual = counts[0][0]
    others = "; ".join(
        f"{value}: {_named(cells, [i for i, own in values.items() if own == value])}" for value, _ in counts[1:]
    )
    place = f" in column {column}" if column else ""
    text = f"several {what}{place}: {usual} in {counts[0][1]} of {len(values)} cells, but {others}"
    return Violation(kind=kind, text=text), tuple(i for i, value in values.items() if value != usual)


def _deviations(
    cells: Sequence[Cell], environments: Mapping[int, Environment], varied: frozenset[str]
) -> Iterator[tuple[str, list[int]]]:
    """(text, positions of the cells that differ from most), one for each value that is not the usual one."""
    for name, (title, read, of_baselines) in _ASPECTS.items():
        if name in varied:
            continue
        values = {
            i: value
            for i, each in enumerate(cells)
            if (of_baselines or not is_baseline(each.run))
            and (value := read(each.run, environments[each.run.environment_id])) is not None
        }
        yield from _unusual(title, values)
    of_run = [environments[each.run.environment_id].versions for each in cells]
    for package in dict.fromkeys(name for versions in of_run for name in versions if name != _OURS):
        known = {i: versions[package] for i, versions in enumerate(of_run) if package in versions}
        yield from _unusual(package, known)
    if "algo" not in varied:
        yield from _unusual("pipeline", {i: c.run.algo for i, c in enumerate(cells) if not is_baseline(c.run)})
    if "options" not in varied:
        options: dict[str, dict[int, Hashable]] = {}
        for i, each in enumerate(cells):
            for stage in each.run.spec.get("pipeline") or ():
                for option, value in dict(stage.get("options") or {}).items():
                    options.setdefault(f"{stage['name']}.{option}", {})[i] = str(value)
        for name, values in options.items():
            yield from _unusual(name, values)


def _unusual(title: str, values: Mapping[int, Hashable]) -> Iterator[tuple[str, list[int]]]:
    counts = Counter(values.values()).most_common()
    for value, _ in counts[1:]:
        yield f"{title} {value}, elsewhere {counts[0][0]}", [i for i, own in values.items() if own == value]


# What is footnoted where it varies: title, how to read it, whether it is said of full precision too.
_ASPECTS: Mapping[str, tuple[str, Callable[[RunRow, Environment], Hashable], bool]] = {
    "model": ("model", lambda run, _: run.model, True),
    "weights": (
        "checkpoint",
        lambda run, _: (run.spec.get("model") or {}).get("fingerprint", "")[:12] or None,
        True,
    ),
    "dtype": ("dtype", lambda run, _: run.dtype, True),
    "bits": ("bits", lambda run, _: run.bits, False),
    "weight_format": ("weight format", lambda run, _: run.weight_format, False),
    "act_format": ("inputs", lambda run, _: run.act_format or "in full precision", False),
    "kv_format": ("cache", lambda run, _: run.kv_format or "in full precision", False),
    "calib": ("calibration text", lambda run, _: run.calib, False),
    "calib_n": ("calibration sequences", lambda run, _: run.calib_n, False),
    "calib_length": ("calibration length", lambda run, _: run.calib_length, False),
    "calib_seed": ("calibration seed", lambda run, _: run.calib_seed, False),
    "calib_sampler": (
        "calibration sampler",
        lambda run, _: (run.spec.get("calibration") or {}).get("sampler"),
        False,
    ),
    "seed": ("seed", lambda run, _: run.spec.get("seed"), False),
    "source": ("source", lambda run, _: run.source, True),
    "device": ("device", lambda run, _: run.device, True),
    "gpu": ("GPU", lambda _, environment: environment.gpu, True),
    "cpu": ("processor", lambda _, environment: environment.cpu, True),
    "threads": ("threads", lambda _, environment: environment.threads, True),
    "driver": ("driver", lambda _, environment: environment.driver, True),
    "platform": ("platform", lambda _, environment: environment.platform, True),
}


def _named(cells: Sequence[Cell], places: Sequence[int]) -> str:
    """The first few cells by name."""
    if len(cells) > 1 and len(places) == len(cells):
        return "all cells"
    names = list(dict.fromkeys(cells[i].where for i in places))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _kinds(found: Sequence[Violation]) -> str:
    return ",".join(dict.fromkeys(each.kind for each in found))
