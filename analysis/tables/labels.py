"""Short names for the points of a sweep: what differs goes into the label, what they share into the
caption."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qbench.spec import difference
from qbench.store.records import RunRow

# The algorithm and its bits are in every label; the rest where it varies, in this order.
_WORDS: Mapping[str, Callable[[Any], str]] = {
    "group_size": lambda size: {-1: "per-channel", 0: "per-tensor"}.get(size, f"g{size}"),
    "symmetric": lambda symmetric: "sym" if symmetric else "asym",
    "act_format": lambda name: f"act {name}",
    "kv_format": lambda name: f"kv {name}",
    "calib": lambda name: f"calib {name}",
    "calib_n": lambda n: f"n {n}",
    "calib_length": lambda length: f"length {length}",
    "calib_seed": lambda seed: f"calib seed {seed}",
    "dtype": str,
    "device": str,
    "source": lambda name: f"source {name}",
}
_OF_INTEGERS = ("group_size", "symmetric")  # the name of another weight format says them
_OF_THE_MODEL = ("dtype", "device", "source")  # the full-precision row is told apart by these only


def is_baseline(row: RunRow) -> bool:
    """Whether this is the full-precision model, which all differences are taken against."""
    return row.algo == "none"


def point_labels(rows: Sequence[RunRow]) -> list[str]:
    """A label per row, for instance "gptq 4-bit g64"; different specs get different labels.

    Where the columns do not tell two rows apart, the options that differ in their specs are added.
    """
    models = {row.model for row in rows}
    varying = [name for name in _WORDS if len(_values(rows, name)) > 1]
    labels = []
    for row in rows:
        baseline = is_baseline(row)
        words = ["full precision"] if baseline else [row.algo, *_weights(row)]
        for name in varying:
            value = None if name in _OF_INTEGERS and not _is_integer(row) else getattr(row, name)
            if value is not None and (not baseline or name in _OF_THE_MODEL):
                words.append(_WORDS[name](value))
        labels.append((f"{row.model}: " if len(models) > 1 else "") + " ".join(words))

    return _told_apart(labels, [row.spec for row in rows])


def pipeline_labels(rows: Sequence[RunRow]) -> list[str]:
    """The algorithm of each row, with the stages and options in which rows of the same algorithm differ."""
    return _told_apart([row.algo for row in rows], [{"pipeline": row.spec.get("pipeline", [])} for row in rows])


def _told_apart(labels: Sequence[str], specs: Sequence[Mapping[str, Any]]) -> list[str]:
    """`labels`, with what differs in the specs of those that are equal."""
    alike = defaultdict(list)
    for index, label in enumerate(labels):
        alike[label].append(index)
    found = list(labels)
    for indices in alike.values():
        if len(indices) > 1:
            for index, words in zip(indices, _spec_differences([specs[i] for i in indices]), strict=True):
                found[index] += "".join(f" {word}" for word in words)
    return found


def _is_integer(row: RunRow) -> bool:
    """Whether bits, group size and symmetry say what the weights are."""
    return re.fullmatch(r"int\d_(g\d+|channel|tensor)_a?sym", row.weight_format or "int4_tensor_sym") is not None


def _weights(row: RunRow) -> list[str]:
    """What the weights are: "4-bit" for integers, else the format's name ("mxfp4"; "float" for full precision)."""
    if row.bits and _is_integer(row):
        return [f"{row.bits:g}-bit"]
    return [row.weight_format] if row.weight_format else []


def shared_settings(rows: Sequence[RunRow]) -> list[str]:
    """What all rows have in common and no label says, for a caption: ["model tiny", "g64", …]."""
    models = {row.model for row in rows}
    shared = [f"model {row_model}" for row_model in models if len(models) == 1]
    for name, word in _WORDS.items():
        values = _values(rows, name)
        if len(values) == 1:
            shared.append(word(values.pop()))
    return shared


def _values(rows: Sequence[RunRow], name: str) -> set[object]:
    """The values of a column, leaving out rows that it says nothing about (full precision has no group
    size)."""
    relevant = rows if name in _OF_THE_MODEL else [row for row in rows if not is_baseline(row)]
    return {getattr(row, name) for row in relevant} - {None}


def setting_differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[tuple[str, object, object]]:
    """(dotted path, left's value, right's value) wherever two specs differ; stages and options go by their names."""
    return list(difference(_named(left), _named(right)))


def _named(value: Any) -> Any:
    """`value` with lists of named items, and of [name, value] pairs, as mappings."""
    if isinstance(value, Mapping):
        return {key: _named(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and value:
        if all(isinstance(item, Mapping) and "name" in item for item in value):
            names = [item["name"] for item in value]
            if len(set(names)) == len(names):
                return {item["name"]: _named({k: v for k, v in item.items() if k != "name"}) for item in value}
        if all(isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], str) for item in value):
            return {name: _named(item) for name, item in value}
    return value


def _spec_differences(specs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """For each spec what is not the same in all of them: "+stage" where some lack it, "option=value" for a leaf.

    The options of such a stage are compared among the specs that have it.
    """
    pipelines = [{stage["name"] for stage in spec.get("pipeline", ())} for spec in specs]
    partial = set().union(*pipelines) - set.intersection(*pipelines)
    leaves = [dict(_leaves(spec)) for spec in specs]
    paths = {path: None for each in leaves for path in each}  # a dict keeps the order
    words: list[list[str]] = [[] for _ in specs]
    for path in paths:
        parts = path.split(".")
        stage = parts[2] if parts[1] == "pipeline" and parts[2] in partial else None
        owners = [place for place, pipeline in enumerate(pipelines) if stage is None or stage in pipeline]
        if stage is not None and parts[-1] == "name":
            for place in owners:
                words[place].append(f"+{stage}")
        elif len({repr(leaves[place].get(path)) for place in owners}) > 1:
            for place in owners:
                if path in leaves[place]:
                    words[place].append(f"{parts[-1]}={leaves[place][path]}")
    return words


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """(dotted path, value) of everything that is not a container.

    In a list, an item with a name goes by it, and [name, value] is an option; others go by their position.
    """
    if isinstance(value, Mapping) and "label" in value and ".overrides." in path:
        yield f"{path}.override", value["label"]
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            if isinstance(item, Mapping) and "name" in item:
                yield from _leaves(item, f"{path}.{item['name']}")
            elif isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], str):
                yield from _leaves(item[1], f"{path}.{item[0]}")
            else:
                yield from _leaves(item, f"{path}.{position}")
    else:
        yield path, value
