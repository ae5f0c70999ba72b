"""Published numbers against ours: compared where model, protocol and settings are the same, else what is missing.

The numbers that qbench knows are in `analysis/data/anchors.yaml`; `qbench align` stores them, and those of other files
of that form, in table `anchor`. An agreement is within the tolerance that the file gives; it vouches for the settings
that the source states, not for those it leaves out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from analysis.axes import scheme_of
from analysis.tables.labels import is_baseline
from analysis.tables.render import Entry, Plain, with_error
from qbench.errors import AssetError, SpecError
from qbench.metrics import metric_info
from qbench.store import queries
from qbench.store.database import Database
from qbench.store.records import Anchor, MetricRow, RunRow, field_names

Status = Literal["agrees", "differs", "missing"]
FULL_PRECISION = "full precision"
ANCHORS = Path(__file__).parent / "data" / "anchors.yaml"
_NEEDED = ("source", "url", "model", "task", "protocol", "metric", "tolerance", "values")
_KEYS = (*_NEEDED, "n", "calibration", "stages", "reading")


@dataclass(frozen=True, kw_only=True)
class Aligned:
    """An anchor, the run and metric of ours that it is compared with, and what they say; `why` is what is missing."""

    anchor: Anchor
    status: Status
    run: RunRow | None = None
    ours: MetricRow | None = None
    why: str = ""


def anchors(path: Path = ANCHORS) -> tuple[Anchor, ...]:
    """All published numbers of a data file; AssetError if there is none, SpecError for anything not as expected."""
    import yaml  # here: nothing else of the analysis needs it

    try:
        node = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AssetError(f"{path}: {error.strerror or error}; --anchors takes a file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError("anchors", path, f"YAML in UTF-8; {' '.join(str(error).split())}") from error
    if not isinstance(node, Mapping) or set(node) != {"tables"} or not isinstance(node["tables"], list):
        raise SpecError("anchors", path, "a mapping with the list `tables`, as in analysis/data/anchors.yaml")
    return tuple(each for i, table in enumerate(node["tables"]) for each in _of_table(f"tables.{i}", table))


def _of_table(where: str, table: Mapping[str, Any]) -> Iterator[Anchor]:
    """The numbers of one table of a data file."""
    if not isinstance(table, Mapping):
        raise SpecError(where, table, f"a mapping with {', '.join(_NEEDED)}")
    for name in (*(each for each in table if each not in _KEYS), *(each for each in _NEEDED if each not in table)):
        accepted = f"needed: {', '.join(_NEEDED)}; accepted: {', '.join(_KEYS)}"
        raise SpecError(f"{where}.{name}", table.get(name), accepted)
    shared = {name: str(table[name]) for name in ("source", "url", "model", "protocol", "metric")}
    shared |= {"tolerance": _number(f"{where}.tolerance", table["tolerance"]), "reading": table.get("reading")}
    if shared["tolerance"] < 0:
        raise SpecError(f"{where}.tolerance", table["tolerance"], "0 or more, a share of the value")
    items = _mapping(f"{where}.n", table.get("n") or {})
    for formats, values in _mapping(f"{where}.values", table["values"]).items():
        weights, _, inputs = str(formats).partition(",")
        for algo, given in _mapping(f"{where}.values.{formats}", values).items():
            calibration, stages = (_of_algo(where, table, each, algo) for each in ("calibration", "stages"))
            calibration = _mapping(f"{where}.calibration.{algo}", calibration or {})
            tasks, numbers = (each if isinstance(each, list) else [each] for each in (table["task"], given))
            if len(tasks) != len(numbers):
                raise SpecError(f"{where}.values.{formats}.{algo}", given, f"a value for each of {', '.join(tasks)}")
            for task, value in zip(tasks, numbers, strict=True):
                yield Anchor(
                    **shared,
                    task=str(task),
                    algo=str(algo),
                    weight_format=weights,
                    act_format=inputs.strip() or None,
                    value=_number(f"{where}.values.{formats}.{algo}", value),
                    n=items.get(task),
                    calib=calibration.get("text"),
                    calib_n=calibration.get("n"),
                    calib_length=calibration.get("length"),
                    stages=tuple(stages) if stages else None,
                )


def _of_algo(where: str, table: Mapping[str, Any], key: str, algo: str) -> Any:
    """What a table says for this algorithm, or for all."""
    given = _mapping(f"{where}.{key}", table.get(key) or {})
    return given.get(algo, given.get("all"))


def _mapping(where: str, node: object) -> Mapping[str, Any]:
    if not isinstance(node, Mapping):
        raise SpecError(where, node, "a mapping")
    return node


def _number(where: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SpecError(where, value, "a number")
    return float(value)


def align(database: Database, published: Sequence[Anchor] | None = None) -> tuple[Aligned, ...]:
    """Every published number against the newest finished run with its settings (None: those of `known`)."""
    runs = queries.runs(database, status="done")
    measured: dict[int, list[MetricRow]] = {}
    for each in queries.metrics(database, [run.id for run in runs]):
        measured.setdefault(each.run_id, []).append(each)
    return tuple(_aligned(each, runs, measured) for each in (known(database) if published is None else published))


def known(database: Database) -> tuple[Anchor, ...]:
    """The numbers of the data file, then those that the database has of other sources."""
    ours = anchors()
    sources = {each.source for each in ours}
    return ours + tuple(each for each in queries.anchors(database) if each.source not in sources)


def align_table(found: Sequence[Aligned]) -> Plain:
    """One row per published number, grouped by source."""
    rows, records = [], []
    for each in found:
        anchor, ours = each.anchor, each.ours
        gap = None if ours is None or anchor.value == 0 else ours.value / anchor.value - 1
        rows.append(
            (
                Entry(anchor.formats if anchor.algo == "none" else f"{anchor.algo} {anchor.formats}"),
                Entry(f"{anchor.value:g}"),
                Entry("" if ours is None else with_error(ours.value, ours.stderr, least=2)),
                Entry("" if gap is None else f"{100 * gap:+.2f} %"),
                Entry(each.status, bold=each.status == "differs"),
                Entry(each.why or (each.run.key[:8] if each.run else "")),
            )
        )
        records.append(
            {
                **{name: getattr(anchor, name) for name in field_names(Anchor)},
                **{"ours": None if ours is None else ours.value, "stderr": None if ours is None else ours.stderr},
                **{"key": each.run.key if each.run else None, "status": each.status, "why": each.why},
            }
        )
    counts = {status: sum(each.status == status for each in found) for status in ("agrees", "differs", "missing")}
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    groups = []
    for anchor in (each.anchor for each in found):
        label = metric_info(anchor.metric).label
        groups.append(f"{anchor.source}: {anchor.model}, {label} on {anchor.task} ({anchor.protocol})")
    return Plain(
        title="Published numbers and ours",
        columns=("recipe", "published", "ours ± SE", "difference", "", "run, or what is missing"),
        numeric=(False, True, True, True, False, False),
        rows=tuple(rows),
        groups=tuple(groups),
        caption=f"{len(found)} published numbers: {said}. Agreement: within the tolerance of the data file.",
        frame=pd.DataFrame.from_records(records),
    )


def _aligned(anchor: Anchor, runs: Sequence[RunRow], measured: dict[int, list[MetricRow]]) -> Aligned:
    """The anchor and what the first demand that no run meets is."""
    left = list(runs)
    for what, meets in _demands(anchor):
        left = [run for run in left if meets(run)]
        if not left:
            return Aligned(anchor=anchor, status="missing", why=what)
    wanted, partly = (anchor.metric, anchor.task, anchor.protocol), None
    for run in reversed(left):
        for ours in measured.get(run.id, []):
            if (ours.name, _stem(ours.task), ours.protocol) != wanted:
                continue
            if ours.whole if anchor.n is None else ours.n == anchor.n:
                near = abs(ours.value - anchor.value) <= anchor.tolerance * abs(anchor.value)
                return Aligned(anchor=anchor, status="agrees" if near else "differs", run=run, ours=ours)
            partly = partly or (run, ours)
    if partly is not None:
        run, ours = partly
        every = "all" if anchor.n is None else anchor.n
        why = f"all items: measured on n = {ours.n}, the source on {every}; eval.n={anchor.n or 'null'} takes them"
        return Aligned(anchor=anchor, status="missing", run=run, why=why)
    command = f"qbench eval {left[-1].id} eval={anchor.task} eval.path=<file> eval.length={anchor.protocol[7:]}"
    missing = anchor.reading or f"on {anchor.task} by {anchor.protocol}: {command}"
    return Aligned(anchor=anchor, status="missing", run=left[-1], why=f"{anchor.metric} {missing}")


def _demands(anchor: Anchor) -> Iterator[tuple[str, Callable[[RunRow], bool]]]:
    """(in words, whether a run meets it) for everything that a run must have to be compared, from coarse to fine."""
    yield f"a run of {anchor.model}", lambda run: model_name(run.model) == anchor.model
    if anchor.weight_format == FULL_PRECISION:
        yield f"{FULL_PRECISION} of it", is_baseline
        return
    formats = (anchor.weight_format, anchor.act_format, None)
    yield f"the format {anchor.formats}", lambda run: _formats(run) == formats
    yield f"the algorithm {anchor.algo}", lambda run: run.algo == anchor.algo
    if anchor.stages:
        yield f"a pipeline of {' + '.join(anchor.stages)}", lambda run: _stages(run) == anchor.stages
    if anchor.calib:
        sequences = "" if anchor.calib_n is None else f"{anchor.calib_n} × "
        words = f"calibration with {anchor.calib}, {sequences}{anchor.calib_length} tokens"
        wanted = (anchor.calib, anchor.calib_n, anchor.calib_length)
        yield words, lambda run: all(w in (None, own) for w, own in zip(wanted, _calibration(run), strict=True))


def model_name(name: str) -> str:
    """A model's name without folders, capitals, publisher and what marks the format of the checkpoint: "llama-2-7b"."""
    return name.rstrip("/").rpartition("/")[2].lower().removesuffix("-hf").removeprefix("meta-")


def _formats(run: RunRow) -> tuple[str, str | None, str | None]:
    return scheme_of(run).partition(",")[0].removesuffix("_narrow"), run.act_format, run.kv_format


def _calibration(run: RunRow) -> tuple[str | None, int | None, int | None]:
    return run.calib and _stem(run.calib), run.calib_n, run.calib_length


def _stages(run: RunRow) -> tuple[str, ...]:
    return tuple(each["name"] for each in run.spec.get("pipeline") or ())


def _stem(text: str) -> str:
    """A text's name without its split: "wikitext2.test" is "wikitext2"; "c4-sample" is not "c4"."""
    return text.partition(".")[0]
