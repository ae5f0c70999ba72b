"""Takeaways as data: what is concluded somewhere, and what that predicts about the cells of declared tables.

The file `analysis/data/takeaways.yaml` says what its entries mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from qbench.errors import AssetError, SpecError

TAKEAWAYS = Path(__file__).parents[1] / "data" / "takeaways.yaml"

#: By axis the labels, or patterns of labels, of cells.
Selector = Mapping[str, tuple[str, ...]]
#: By axis the labels that a table has there, in order.
Axes = Mapping[str, Sequence[str]]
#: A label that stands for the one (or all but the one) that another axis has.
SAME, OTHER = "same as ", "other than "

_KEYS = ("id", "title", "statement", "source", "here", "needs", "expects")
_SIDES = ("better", "larger", "smaller", "cell")
_LOSSES = ("loses_less_than", "loses_more_than")
_EXPECTATION_KEYS = ("table", *_SIDES, "than", "at", "more_at", "less_at", *_LOSSES)


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """Comparisons of the cells of a table. `kind` says in what cells of `first` are ahead of those of `second`: by
    being better, or by their value; "less" and "more": `first` loses less or more than `share` of full precision's
    value. With `more_at` and `less_at` the advantage is to be larger there than here."""

    table: str
    kind: Literal["better", "larger", "smaller", "less", "more"]
    first: Selector
    second: Selector = field(default_factory=dict)
    at: Selector = field(default_factory=dict)
    more_at: Selector = field(default_factory=dict)
    less_at: Selector = field(default_factory=dict)
    share: float | None = None

    @property
    def selectors(self) -> tuple[Selector, ...]:
        return self.first, self.second, self.at, self.more_at, self.less_at


@dataclass(frozen=True, kw_only=True)
class Takeaway:
    """`here` says in what the test departs from the source, `needs` what is missing where there is no expectation."""

    id: str
    title: str
    statement: str
    source: str
    here: str = ""
    needs: str = ""
    expects: tuple[Expectation, ...] = ()


def takeaways(path: Path = TAKEAWAYS) -> tuple[Takeaway, ...]:
    """All takeaways of a file; SpecError for anything not as expected."""
    import yaml  # here: nothing else of the findings needs it

    if not path.is_file():
        raise AssetError(f"{path}: no such file")
    try:
        node = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        why = f"not UTF-8 (byte {error.start}: {error.reason}); convert the file to UTF-8"
        raise AssetError(f"{path}: {why}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that there is not
        raise SpecError("takeaways", path, " ".join(str(error).split())) from error
    given = _keys("takeaways", node, ("takeaways",)).get("takeaways")
    found = []
    for each in _list("takeaways", given, "a list of takeaways"):
        where = f"takeaway {_keys('takeaways', each, _KEYS).get('id')}"
        texts = {name: _text(f"{where}.{name}", each.get(name)) for name in _KEYS if name != "expects"}
        for name in ("id", "title", "statement", "source"):
            if not texts[name]:
                raise SpecError(f"{where}.{name}", each.get(name), "a text")
        some = _list(f"{where}.expects", each.get("expects", []), "a list of expectations")
        expects = tuple(_expectation(where, one) for one in some)
        if bool(expects) == bool(texts["needs"]):
            raise SpecError(where, texts["title"], "either expects, or needs, which says why nothing is tested")
        found.append(Takeaway(**texts, expects=expects))
    ids = [each.id for each in found]
    if len(set(ids)) < len(ids):
        raise SpecError("takeaways", ids, "every id once")
    return tuple(found)


def check(given: Sequence[Takeaway], tables: Mapping[str, Mapping[str, Axes]]) -> None:
    """SpecError, naming the takeaway, for a table, axis or label that no size has; `tables` by name and size."""
    for takeaway in given:
        for each in takeaway.expects:
            where = f"takeaway {takeaway.id}"
            if each.table not in tables:
                raise SpecError(where, each.table, f"a declared table: {', '.join(tables)}")
            sizes = tables[each.table]
            if not any(sides_have_the_same_axes(each, axes) for axes in sizes.values()):
                raise SpecError(where, each.table, "both sides by the same axes, and at by others")
            for selector in each.selectors:
                for axis, patterns in selector.items():
                    known = list(dict.fromkeys(label for axes in sizes.values() for label in axes.get(axis, ())))
                    if not known:
                        names = dict.fromkeys(name for axes in sizes.values() for name in axes)
                        raise SpecError(f"{where}, {each.table}", axis, f"an axis: {', '.join(names)}")
                    for pattern in patterns:
                        twin = other_axis(pattern)
                        if twin is None and not matching(pattern, known):
                            raise SpecError(f"{where}, {each.table}.{axis}", pattern, f"one of {', '.join(known)}")
                        if twin is not None and (
                            twin in each.first or not any(twin in axes for axes in sizes.values())
                        ):
                            raise SpecError(f"{where}, {each.table}.{axis}", pattern, "an axis that is not compared")


def sides_have_the_same_axes(each: Expectation, axes: Axes) -> bool:
    """Whether the sides name the same axes, so that everything else can be the same on both, and `at` none of them."""
    compared = {*each.first, *each.more_at}
    paired = each.share is not None or set(each.first) == set(each.second)
    alike = paired and set(each.more_at) == set(each.less_at) and not {*each.first} & {*each.more_at}
    return alike and not compared & {*each.at} and compared <= {*axes}


def matching(pattern: str, labels: Sequence[str]) -> list[str]:
    """The labels that a pattern means, in order."""
    return [label for label in labels if fnmatchcase(label, pattern)]


def other_axis(pattern: str) -> str | None:
    """The axis that `same as …` and `other than …` name."""
    word = next((each for each in (SAME, OTHER) if pattern.startswith(each)), None)
    return None if word is None else pattern.removeprefix(word)


def _expectation(where: str, node: object) -> Expectation:
    _keys(f"{where}.expects", node, _EXPECTATION_KEYS)
    sides, losses = [name for name in _SIDES if name in node], [name for name in _LOSSES if name in node]
    if len(sides) != 1 or "table" not in node:
        raise SpecError(f"{where}.expects", node, f"a table, and one of {', '.join(_SIDES)}")
    side, share = sides[0], None
    if (side == "cell") != (len(losses) == 1) or (side == "cell") == ("than" in node):
        raise SpecError(f"{where}.expects", node, f"{side} with {' or '.join(_LOSSES) if side == 'cell' else 'than'}")
    if side == "cell" and ("more_at" in node or "less_at" in node):
        raise SpecError(f"{where}.expects", node, "cell without more_at and less_at")
    if losses:
        share = node[losses[0]]
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
            raise SpecError(f"{where}.{losses[0]}", share, "a share between 0 and 1")
    names = {"first": side, "second": "than", "at": "at", "more_at": "more_at", "less_at": "less_at"}
    return Expectation(
        table=str(node["table"]),
        kind=losses[0].split("_")[1] if losses else side,
        share=share,
        **{name: _selector(f"{where}.{key}", node.get(key, {})) for name, key in names.items()},
    )


def _selector(where: str, node: object) -> Selector:
    if not isinstance(node, Mapping) or [] in node.values():
        raise SpecError(where, node, "a mapping of axes to labels")
    return {str(axis): tuple(map(str, value if isinstance(value, list) else [value])) for axis, value in node.items()}


def _list(where: str, node: object, accepted: str) -> list[Any]:
    if not isinstance(node, list):
        raise SpecError(where, node, accepted)
    return node


def _text(where: str, value: object) -> str:
    """Empty for null."""
    if isinstance(value, (Mapping, list)):
        raise SpecError(where, value, "a text")
    return "" if value is None else " ".join(str(value).split())


def _keys(where: str, node: Any, keys: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(node, Mapping):
        raise SpecError(where, node, f"a mapping with {', '.join(keys)}")
    unknown = [key for key in node if key not in keys]
    if unknown:
        raise SpecError(f"{where}.{unknown[0]}", node[unknown[0]], f"unknown; one of {', '.join(keys)}")
    return node
