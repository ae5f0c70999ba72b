"""`algo=a+b+c`: an ordered pipeline from named algorithms and single stages, written on the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qbench.errors import SpecError

#: Short names that papers' recipes use.
ALIASES = {"smooth": "smoothquant"}

Node = dict[str, Any]


def is_composition(group: str, name: str) -> bool:
    """Whether a choice of a configuration group is put together from its files, and not one of them."""
    return (group in ("algo", "eval") and "+" in name) or (group == "algo" and name in ALIASES)


def composed_evaluations(name: str, folder: Path) -> Node:
    """The configuration node of `eval=a+b`: the parts' nodes by name, so that options are set as `eval.a.length`."""
    parts = [part.strip() for part in name.split("+")]
    files = {path.stem: path for path in folder.glob("*.yaml")}
    for part in parts:
        if part not in files:
            raise SpecError("eval", name, f"{part or 'an empty part'} is unknown; one of {', '.join(sorted(files))}")
        if parts.count(part) > 1:
            raise SpecError("eval", name, f"every part once; {part} comes twice")
    nodes = {part: OmegaConf.to_container(OmegaConf.load(files[part]), resolve=False) for part in parts}
    return {"name": "+".join(parts), **nodes}


def composed(name: str, folder: Path) -> Node:
    """The configuration node of `algo=<name>`; `folder` holds the named algorithms, a file each.

    Parts follow each other in the given order. A part that is a named algorithm brings its whole pipeline, but what its
    file marks as a `companion` (the rounding behind AWQ's scales) stays out where another part brings a stage of that
    kind. Options are set by part: `algo=smoothquant+gptq algo.smoothquant.alpha=0.8 algo.gptq.damp=0.1`. Whether the
    order is legal is the pipeline's to say. Raises SpecError for unknown parts and for a part that comes twice.
    """
    parts = [ALIASES.get(part, part) for part in map(str.strip, name.split("+"))]
    for part in parts:
        if parts.count(part) > 1:
            raise SpecError("algo", name, f"every part once; {part} comes twice")
        if part == "none" and len(parts) > 1:
            raise SpecError("algo", name, "none stands alone: it is full precision")
    nodes = {part: _part(part, name, folder) for part in parts}
    if len(parts) == 1:  # an alias is its algorithm
        return nodes[parts[0]]
    entries = [(part, entry) for part, node in nodes.items() for entry in node["pipeline"]]
    arranged = _arranged(entries)
    options: Node = {}
    for part, entry in arranged:  # an option of what stays out is none
        used = [name for name in nodes[part] if f"${{algo.{name}}}" in entry.values()]
        options.setdefault(part, {}).update({name: nodes[part][name] for name in used})
    pipeline = [{"part": part, **_inside(entry, part)} for part, entry in arranged]
    return {"name": "+".join(parts), **{part: node for part, node in options.items() if node}, "pipeline": pipeline}


def _arranged(entries: list[tuple[str, Node]]) -> list[tuple[str, Node]]:
    """The entries (part, stage with options) without companions that another part replaces. What stays of them comes
    before the next stage of its own part and before the first stage that has to come later."""
    kinds = _kinds({entry["stage"] for _, entry in entries})
    arranged = [found for found in entries if not _accompanies(found)]
    for place, (part, entry) in enumerate(entries):
        kind = kinds[entry["stage"]]
        others = [found for found in entries if found[0] != part and kinds[found[1]["stage"]] == kind]
        later = {name for name, _ in entries[place:]} - {part}
        if not _accompanies((part, entry)):
            continue
        if any(not _accompanies(found) or found[0] in later for found in others):
            continue
        own = [found for found in entries[place + 1 :] if found[0] == part and not _accompanies(found)]
        before = (k for k, found in enumerate(arranged) if kinds[found[1]["stage"]] > kind or found in own)
        arranged.insert(next(before, len(arranged)), (part, entry))
    return arranged


def _accompanies(found: tuple[str, Node]) -> bool:
    return bool(found[1].get("companion", False))


def _part(part: str, name: str, folder: Path) -> Node:
    """The node of one part: a named algorithm's, or a pipeline of the one stage."""
    path = folder / f"{part}.yaml"
    if path.is_file():
        return OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    from qbench.stages.pipeline import stage_types

    types = stage_types()
    if part not in types:
        named = sorted(path.stem for path in folder.glob("*.yaml"))
        stages = sorted(set(types) - set(named))
        known = f"{', '.join(named)}; stages {', '.join(stages)}"
        raise SpecError("algo", name, f"{part or 'an empty part'} is unknown; {known}")
    options = types[part].options()
    return {**options, "pipeline": [{"stage": part, **{option: f"${{algo.{option}}}" for option in options}}]}


def _kinds(names: set[str]) -> Mapping[str, object]:
    from qbench.stages.pipeline import stage_types

    types = stage_types()
    return {name: types[name].kind for name in names}


def _inside(value: Any, part: str) -> Any:
    """A pipeline entry whose references to options point into the part's own."""
    if isinstance(value, dict):
        return {key: _inside(inner, part) for key, inner in value.items()}
    if isinstance(value, list):
        return [_inside(inner, part) for inner in value]
    if isinstance(value, str):
        return re.sub(r"\$\{algo\.", f"${{algo.{part}.", value)
    return value
