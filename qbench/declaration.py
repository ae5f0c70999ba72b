"""Tables of a paper as data: a YAML file says rows x columns x metric, and thereby which runs it needs.

Nothing is composed here: a cell is the list of `key=value` settings that rows, columns, the size and the table add up
to. `qbench.fill` makes points of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

import qbench
from qbench.checks import choice
from qbench.errors import AssetError, SpecError

SIZES = ("demo", "paper", "tiny")
AGGREGATES = ("none", "mean")
BEST = ("column", "group", "row", "none")

#: What all tables of a size have in common: a file beside them.
SHARED = "sizes.yaml"

_TABLE_KEYS = (
    *("title", "caption", "metric", "aggregate", "best", "set", "rows", "columns", "except", "repeat", "sizes"),
    "static",
)
_SHARED_KEYS = ("set", "models")
_SIZE_KEYS = (*_SHARED_KEYS, "axes", "repeat", "caption")

#: The axis of rows of several models.
_MODEL = "Model"

#: Settings of the whole invocation, which no cell can have of its own.
_OF_INVOCATION = ("store", "results", "dry_run", "hydra")


@dataclass(frozen=True, kw_only=True)
class Level:
    """One place on an axis: its label, the settings it adds and, where its cells show another one, its metrics.
    variant: what stands behind the comma of the names of its cells' metrics."""

    label: str
    settings: tuple[str, ...]
    metric: tuple[str, ...] = ()
    variant: str = ""


@dataclass(frozen=True, kw_only=True)
class Axis:
    name: str
    levels: tuple[Level, ...]


@dataclass(frozen=True, kw_only=True)
class CellWish:
    """What one cell needs: several lists of settings where it is the mean of repeats. `metric` are the names of which
    the first that was measured is shown; `reason` says why the combination makes no sense (then nothing is run)."""

    repeats: tuple[tuple[str, ...], ...]
    metric: tuple[str, ...]
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Undefined:
    """A combination that makes no sense: by axis the labels for which it does not."""

    where: Mapping[str, tuple[str, ...]]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """One table in one size. With `static`, stages by strategy, it is drawn from the code itself: without axes or runs.

    Rows are the combinations of all row axes' levels, the last axis fastest; columns likewise.
    """

    name: str
    size: str
    title: str
    caption: str
    metric: tuple[str, ...] = ()
    aggregate: str = "none"
    best: str = "column"
    settings: tuple[str, ...] = ()
    rows: tuple[Axis, ...] = ()
    columns: tuple[Axis, ...] = ()
    repeat: tuple[tuple[str, ...], ...] = ((),)
    undefined: tuple[Undefined, ...] = ()
    static: Mapping[str, tuple[str, ...]] | None = None

    def places(self, axes: Sequence[Axis]) -> list[tuple[Level, ...]]:
        """All rows (or columns), each as one level per axis."""
        return list(product(*(axis.levels for axis in axes)))

    def cells(self) -> Iterator[tuple[tuple[Level, ...], tuple[Level, ...], CellWish]]:
        """(row, column, what it needs), row by row."""
        for row, column in product(self.places(self.rows), self.places(self.columns)):
            yield row, column, self._wish(row, column)

    def _wish(self, row: tuple[Level, ...], column: tuple[Level, ...]) -> CellWish:
        added = [setting for level in (*row, *column) for setting in level.settings]
        metric = next((level.metric for level in (*column[::-1], *row[::-1]) if level.metric), self.metric)
        if variant := next((level.variant for level in (*column[::-1], *row[::-1]) if level.variant), ""):
            metric = tuple(f"{name},{variant}" for name in metric)
        repeats = tuple(last_wins([*self.settings, *added, *more]) for more in self.repeat)
        axes = (*self.rows, *self.columns)
        labels = {axis.name: level.label for axis, level in zip(axes, (*row, *column), strict=True)}
        reason = next((each.reason for each in self.undefined if _applies(each, labels)), None)
        return CellWish(repeats=repeats, metric=metric, reason=reason)


#: Groups of which a new choice has options of its own: what was set of the earlier one no longer counts.
_REPLACED = ("algo", "eval")


def last_wins(settings: Sequence[str]) -> tuple[str, ...]:
    """Every key once, with the value that was given last.

    `algo+=gptq` puts a part behind the algorithm so far (alone where there is none yet). Options may be given by part
    whether there are several or one: `algo.awq.clip=false` of a lone awq becomes `algo.clip=false`.
    """
    found: dict[str, str] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key.endswith("+"):  # stays before the options that belong to it
            key = key.removesuffix("+")
            value = f"{found[key]}+{value}" if key in found else value
        elif key in _REPLACED:
            found = {name: old for name, old in found.items() if name != key and not name.startswith(f"{key}.")}
        found[key] = value
    alone = f"algo.{found.get('algo', '')}."
    return tuple(f"{key.replace(alone, 'algo.') if key.startswith(alone) else key}={found[key]}" for key in found)


def tables_dir() -> Path:
    """The folder of declarations: the checkout's `experiments/tables/`, else the installed package's."""
    package = Path(qbench.__file__).resolve().parent
    for candidate in (package.parent / "experiments" / "tables", package / "tables"):
        if (candidate / SHARED).is_file():
            return candidate
    raise AssetError("no declared tables are installed here; give the path of a declaration (.yaml)")


def declared_names(folder: Path) -> list[str]:
    """The tables of a folder in reading order: t2 before t10 before t10b, then those without number."""

    def place(name: str) -> tuple[float, str]:
        found = re.fullmatch(r"[a-z](\d+)([a-z]*)", name)
        return (int(found[1]), found[2]) if found else (math.inf, name)

    return sorted((path.stem for path in folder.glob("*.yaml") if path.name != SHARED), key=place)


def load(name: str, size: str, folder: Path | None = None) -> Declaration:
    """The table called `name` (or at the path `name`, if it ends in .yaml). SpecError for anything not as expected."""
    choice("--size", size, SIZES)
    given = Path(name) if name.endswith(".yaml") else None
    folder = folder or (given.parent if given and (given.parent / SHARED).is_file() else tables_dir())
    path = given or folder / f"{name}.yaml"
    if not path.is_file():
        accepted = f"unknown; one of all, {', '.join(declared_names(folder))}, or the path of a .yaml"
        raise SpecError("table", name, accepted)
    shared = _sizes(str(folder / SHARED), _read(folder / SHARED), _SHARED_KEYS)
    return _declaration(path.stem, size, _read(path), shared)


def _declaration(name: str, size: str, node: Mapping[str, Any], shared: Mapping[str, Mapping]) -> Declaration:
    _only(name, node, _TABLE_KEYS)
    own = _sizes(f"{name}.sizes", node.get("sizes", {}), _SIZE_KEYS)
    common = {key: _text(f"{name}.{key}", node.get(key)) for key in ("title", "caption")}
    common |= {"name": name, "size": size}
    if "caption" in own[size]:
        common["caption"] += f" {_text(f'{name}.sizes.{size}.caption', own[size]['caption'])}"
    if "static" in node:
        return Declaration(**common, static=_strategies(f"{name}.static", node["static"]))
    places = {place: _axes(f"{name}.{place}", node.get(place)) for place in ("rows", "columns")}
    declared = [axis for axes in places.values() for axis in axes]
    replaced = {each: _replaced(f"{name}.sizes.{each}.axes", own[each].get("axes", {}), declared) for each in SIZES}
    models = {each: _models(name, each, own[each], shared[each]) for each in SIZES}
    rows, columns = (_in_size(f"{name}.{place}", axes, replaced[size]) for place, axes in places.items())
    given = ((f"sizes.{size}", shared[size]), (name, node), (f"{name}.sizes.{size}", own[size]))
    settings = [each for where, of in given for each in _settings(f"{where}.set", of.get("set", []))]
    if len(models[size].levels) == 1:
        settings += models[size].levels[0].settings
    elif models[size].levels:
        rows = (models[size], *rows)
    names = [axis.name for axis in (*rows, *columns)]
    if len(set(names)) < len(names):
        raise SpecError(f"{name}.rows and columns", names, f"every axis once; {_MODEL} is that of several models")
    repeats = f"{name}.sizes.{size}" if "repeat" in own[size] else name
    somewhere = [*rows, *columns, *declared, *(axis for each in SIZES for axis in (*replaced[each], models[each]))]
    labels = {axis: _labels(axis, somewhere) for axis in names}
    return Declaration(
        **common,
        metric=_metric(f"{name}.metric", node.get("metric")),
        aggregate=choice(f"{name}.aggregate", node.get("aggregate", "none"), AGGREGATES),
        best=choice(f"{name}.best", node.get("best", "column"), BEST),
        settings=tuple(settings),
        rows=rows,
        columns=columns,
        repeat=_repeats(f"{repeats}.repeat", own[size].get("repeat", node.get("repeat", [[]]))),
        undefined=_undefined(f"{name}.except", node.get("except", []), labels),
    )


def _axes(where: str, node: object) -> tuple[Axis, ...]:
    """As the table has them, without levels where only its sizes say them."""
    if not isinstance(node, list) or not node:
        raise SpecError(where, node, "a list of axes, each with a name and its values")
    found = []
    for each in node:
        _only(where, each, ("name", "values"))
        name = _text(f"{where}.name", each.get("name"))
        found.append(Axis(name=name, levels=_levels(f"{where}.{name}", each.get("values", []))))
    return tuple(found)


def _replaced(where: str, node: object, declared: Sequence[Axis]) -> tuple[Axis, ...]:
    """The axes of which a size has levels of its own."""
    names = [axis.name for axis in declared]
    _only(where, node, names)
    return tuple(Axis(name=name, levels=_levels(f"{where}.{name}", levels)) for name, levels in node.items())


def _in_size(where: str, axes: Sequence[Axis], replaced: Sequence[Axis]) -> tuple[Axis, ...]:
    """The axes with the levels of a size."""
    own = {axis.name: axis for axis in replaced}
    found = tuple(own.get(axis.name, axis) for axis in axes)
    for axis in found:
        if not axis.levels:
            raise SpecError(f"{where}.{axis.name}", [], "at least one value")
    return found


def _models(name: str, size: str, own: Mapping[str, Any], shared: Mapping[str, Any]) -> Axis:
    where, of = (f"{name}.sizes.{size}", own) if "models" in own else (f"sizes.{size}", shared)
    return Axis(name=_MODEL, levels=_levels(f"{where}.models", of.get("models", [])))


def _labels(name: str, axes: Sequence[Axis]) -> list[str]:
    """All labels of the axes of this name."""
    return list(dict.fromkeys(level.label for axis in axes if axis.name == name for level in axis.levels))


def _levels(where: str, node: object) -> tuple[Level, ...]:
    if not isinstance(node, list):
        raise SpecError(where, node, "a list of values, each with a label and what it sets")
    found = []
    for each in node:
        _only(where, each, ("label", "set", "metric", "variant"))
        metric = _metric(f"{where}.metric", each["metric"]) if "metric" in each else ()
        settings = _settings(f"{where}.set", each.get("set", []))
        variant = _text(f"{where}.variant", each["variant"]) if "variant" in each else ""
        label = _text(f"{where}.label", each.get("label"))
        found.append(Level(label=label, settings=settings, metric=metric, variant=variant))
    labels = [level.label for level in found]
    if len(set(labels)) < len(labels):
        raise SpecError(where, labels, "every label once")
    return tuple(found)


def _undefined(where: str, node: object, labels: Mapping[str, Sequence[str]]) -> tuple[Undefined, ...]:
    """`labels`: by axis those of all sizes, as a combination may have some that this size lacks."""
    if not isinstance(node, list):
        raise SpecError(where, node, "a list of combinations, each with where and reason")
    found = []
    for each in node:
        _only(where, each, ("where", "reason"))
        if not isinstance(each.get("where"), Mapping) or not each["where"]:
            raise SpecError(f"{where}.where", each.get("where"), "a mapping of axes to labels")
        chosen = {axis: _chosen(where, axis, value, labels) for axis, value in each["where"].items()}
        found.append(Undefined(where=chosen, reason=_text(f"{where}.reason", each.get("reason"))))
    return tuple(found)


def _chosen(where: str, axis: str, node: object, labels: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    if axis not in labels:
        raise SpecError(where, axis, f"an axis of the table: {', '.join(labels)}")
    given = node if isinstance(node, list) else [node]
    found = tuple(_text(f"{where}.{axis}", each) for each in given)
    unknown = [each for each in found if each not in labels[axis]]
    if unknown or not found:
        raise SpecError(f"{where}.{axis}", unknown[0] if unknown else node, f"one of {', '.join(labels[axis])}")
    return found


def _applies(undefined: Undefined, labels: Mapping[str, str]) -> bool:
    return all(labels[axis] in values for axis, values in undefined.where.items())


def _sizes(where: str, node: object, keys: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """What a file says of every size."""
    _only(where, node, SIZES)
    found = {size: node.get(size, {}) for size in SIZES}
    for size, of in found.items():
        _only(f"{where}.{size}", of, keys)
    return found


def _only(where: str, node: object, keys: Sequence[str]) -> None:
    if not isinstance(node, Mapping):
        raise SpecError(where, node, f"a mapping with {', '.join(keys)}")
    unknown = [key for key in node if key not in keys]
    if unknown:
        raise SpecError(f"{where}.{unknown[0]}", node[unknown[0]], f"unknown; one of {', '.join(keys)}")


def _settings(where: str, node: object) -> tuple[str, ...]:
    if not isinstance(node, list) or not all(isinstance(each, str) and "=" in each for each in node):
        raise SpecError(where, node, "a list of settings such as [algo=gptq, bits=4]")
    for each in node:
        if re.split(r"[=+./\s]", each.lstrip(), maxsplit=1)[0] in _OF_INVOCATION:
            accepted = "the command line's --store, results=... or --dry-run, as cells have none of their own"
            raise SpecError(where, each, f"{', '.join(_OF_INVOCATION)} belong to the whole invocation: {accepted}")
    return tuple(node)


def _repeats(where: str, node: object) -> tuple[tuple[str, ...], ...]:
    if not isinstance(node, list) or not node or not all(isinstance(each, list) for each in node):
        raise SpecError(where, node, "a list of lists of settings such as [[seed=0], [seed=1]], at least one")
    return tuple(_settings(where, each) for each in node)


def _strategies(where: str, node: object) -> Mapping[str, tuple[str, ...]]:
    if not isinstance(node, Mapping) or not all(isinstance(each, list) for each in node.values()):
        raise SpecError(where, node, "strategies, each with a list of stages")
    return {str(name): tuple(map(str, stages)) for name, stages in node.items()}


def _metric(where: str, node: object) -> tuple[str, ...]:
    found = (node,) if isinstance(node, str) else tuple(node) if isinstance(node, list) else ()
    if not found or not all(isinstance(each, str) for each in found):
        raise SpecError(where, node, "the name of a metric such as ppl, or a list of names: the first that there is")
    return found


def _text(where: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value == "":
        raise SpecError(where, value, "a text")
    return " ".join(str(value).split())


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise AssetError(f"{path}: no such file")
    try:
        node = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        why = f"not UTF-8 (byte {error.start}: {error.reason}); convert the file to UTF-8"
        raise AssetError(f"{path}: {why}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that there is not
        raise SpecError("table", path, " ".join(str(error).split())) from error
    if not isinstance(node, Mapping):
        raise SpecError("table", path, "a mapping")
    return node
