"""From an expectation to the cells that it compares: every choice of labels that it leaves open, in one table."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from analysis.findings.takeaways import SAME, Axes, Expectation, Selector, matching, other_axis
from analysis.tables.declared import Declared

#: A cell: its row and its column in `Declared.cells`.
Place = tuple[int, int]

_WORDS = {"better": "better than", "larger": "larger than", "smaller": "smaller than"}


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """One comparison. `pairs` are (ahead, behind): one, or two of which the first one's advantage is to be the larger.
    Behind is None where full precision is meant. `what` says it, `where` names the labels that all its cells share."""

    expectation: Expectation
    pairs: tuple[tuple[Place, Place | None], ...]
    what: str
    where: str


def axes_of(declared: Declared) -> dict[str, list[str]]:
    """The labels of every axis of a table, in order."""
    names = (*declared.row_axes, *declared.column_axes)
    columns = (*zip(*declared.rows, strict=True), *zip(*declared.columns, strict=True))
    return {name: list(dict.fromkeys(labels)) for name, labels in zip(names, columns, strict=True)}


def contrasts(expectation: Expectation, declared: Declared) -> tuple[list[Contrast], list[str]]:
    """(comparisons, what the table does not have in this size). Cells that make no sense are compared with nothing."""
    axes = axes_of(declared)
    absent = _absent(expectation, axes)
    if any(name not in axes for selector in expectation.selectors for name in selector):
        return [], absent
    compared = {*expectation.first, *expectation.more_at}
    shared = [name for name in axes if name not in compared]
    kept = {name: _matching(expectation.at.get(name, ("*",)), axes[name]) for name in shared}
    names = (*declared.row_axes, *declared.column_axes)
    places = {row + column: (i, j) for i, row in enumerate(declared.rows) for j, column in enumerate(declared.columns)}

    def place_of(labels: Mapping[str, str]) -> Place | None:
        return places.get(tuple(labels[name] for name in names))

    found = []
    for labels in product(*(kept[name] for name in shared)):
        base = dict(zip(shared, labels, strict=True))
        there_and_here = product(_choices(expectation.more_at, base, axes), _choices(expectation.less_at, base, axes))
        for more, less in there_and_here if expectation.more_at else [({}, None)]:
            for first, second in _sides(expectation, base, axes):
                bases = [base | more, *([base | less] if less is not None else [])]
                ahead = [place_of(each | first) for each in bases]
                behind = [] if second is None else [place_of(each | second) for each in bases]
                if any(place is None or declared.cells[place[0]][place[1]].reason for place in (*ahead, *behind)):
                    continue
                pairs = tuple(zip(ahead, behind or [None] * len(ahead), strict=True))
                what = _what(expectation, first, second, more, less)
                where = ", ".join(f"{name} {label}" for name, label in base.items() if len(axes[name]) > 1)
                found.append(Contrast(expectation=expectation, pairs=pairs, what=what, where=where))
    if not found and not absent:
        absent = [f"{declared.name} ({declared.size}) has no cells of this kind"]
    return found, absent


def _sides(each: Expectation, base: Mapping[str, str], axes: Axes) -> Iterator[tuple[dict, dict | None]]:
    """The labels of both sides (None: full precision), where they differ."""
    for first in _choices(each.first, base, axes):
        if each.share is not None:
            yield first, None
            continue
        for second in _choices(each.second, base, axes):
            if first != second:
                yield first, second


def _choices(selector: Selector, base: Mapping[str, str], axes: Axes) -> list[dict[str, str]]:
    """Every way to choose one label for each axis of a selector; `base` has those of the other axes."""
    labels = []
    for name, patterns in selector.items():
        twin = other_axis(patterns[0])
        if twin is None:
            labels.append(_matching(patterns, axes[name]))
        else:
            same = patterns[0].startswith(SAME)
            labels.append(
                [label for label in axes[name] if (label == base.get(twin)) == same and base[twin] in axes[name]]
            )
    return [dict(zip(selector, each, strict=True)) for each in product(*labels)]


def _matching(patterns: Sequence[str], labels: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(label for pattern in patterns for label in matching(pattern, labels)))


def _absent(each: Expectation, axes: Axes) -> list[str]:
    """What the expectation names and the table does not have."""
    found = []
    for selector in each.selectors:
        for name, patterns in selector.items():
            if name not in axes:
                found.append(f"{each.table} has no axis {name} in this size")
                continue
            lacking = [pattern for pattern in patterns if not other_axis(pattern) and not matching(pattern, axes[name])]
            found += [f"{each.table} has no {name} “{pattern}” in this size" for pattern in lacking]
    return found


def _what(
    each: Expectation, first: Mapping[str, str], second: Mapping[str, str] | None, more: Mapping, less: Mapping | None
) -> str:
    ahead = " / ".join(first.values())
    if second is None:
        return f"{ahead} loses {each.kind} than {100 * each.share:g} %"
    text = f"{ahead} {_WORDS[each.kind]} {' / '.join(second.values())}"
    return (
        text if less is None else f"{text}, for {' / '.join(more.values())} more than for {' / '.join(less.values())}"
    )
