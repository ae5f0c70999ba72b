"""lm-eval's task definitions, read as data: which names there are, what each means, and a fingerprint of that.

lm-eval itself is not imported: a plan of runs needs names and fingerprints, in milliseconds. Its 14 thousand YAML
files are read once per version and remembered by name.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from qbench.assets import cache_dir, scratch_dir
from qbench.errors import AssetError, SpecError
from qbench.spec import digest

#: Format of the remembered index.
_INDEX = 1
#: Fields of a group; all others are overrides for its tasks.
_GROUP_FIELDS = {"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag"}
#: Fields of a task that say where its data is, what it is called, or how it is listed: not what is asked.
_NOT_MEANING = {"dataset_path", "dataset_name", "dataset_kwargs", "task", "task_alias", "tag", "group"}
_FUNCTION = "!function "

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Leaf:
    """One task. `path` is its YAML file (None: written out inside a group); `overrides` are fields that a group sets.

    `config` has all fields, includes and overrides merged; a field that names a Python function holds
    "!function <module>.<name>". `sources` are the sha256 of the Python files that such fields refer to.
    """

    name: str
    path: Path | None
    overrides: Config
    config: Config
    sources: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        """lm-eval's version of the task: raised there when its numbers change."""
        return str((self.config.get("metadata") or {}).get("version", "none"))

    @property
    def fingerprint(self) -> str:
        """sha256 of prompts, metrics, filters, splits and the code they refer to."""
        meaning = {name: value for name, value in self.config.items() if name not in _NOT_MEANING}
        return digest([json.loads(json.dumps(meaning, default=str)), list(self.sources)])

    @property
    def generates(self) -> bool:
        return self.config.get("output_type", "generate_until") == "generate_until"

    @property
    def evaluated_split(self) -> str | None:
        """The split that is measured: lm-eval takes the test split where there is one."""
        return self.config.get("test_split") or self.config.get("validation_split")

    @property
    def example_split(self) -> str | None:
        """The split that few-shot examples come from; None: the definition lists them itself, or names none."""
        examples = self.config.get("fewshot_config") or {}
        if examples.get("samples") is not None:
            return None
        return examples.get("split") or self.config.get("fewshot_split") or self.config.get("training_split")

    @property
    def splits(self) -> set[str]:
        """All splits that the definition names."""
        named = {self.config.get(f"{use}_split") for use in ("training", "validation", "test", "fewshot")}
        return (named | {(self.config.get("fewshot_config") or {}).get("split")}) - {None}

    @property
    def lists_examples(self) -> bool:
        return (self.config.get("fewshot_config") or {}).get("samples") is not None


@dataclass(frozen=True)
class Group:
    """Several tasks with a common score, such as mmlu. `aggregates`: metric, filters and weighting of each score."""

    name: str
    children: tuple[Leaf | Group, ...]
    aggregates: tuple[Config, ...]

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return tuple(
            leaf for child in self.children for leaf in ((child,) if isinstance(child, Leaf) else child.leaves)
        )


@dataclass(frozen=True)
class Definitions:
    """The tasks, groups and tags of an installed lm-eval, by name. `folder` holds the YAML files."""

    folder: Path
    version: str
    #: name -> (kind, path below the folder or "", names of a tag's tasks)
    _known: dict[str, tuple[str, str, list[str]]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def index(self) -> Mapping[str, tuple[str, str, list[str]]]:
        return self._known or _remembered(self.folder, self.version)

    def resolve(self, name: str, option: str = "eval.tasks") -> tuple[Leaf | Group, ...]:
        """What a name stands for: a task, a group, or the tasks of a tag or of a group without a common score.

        SpecError with near matches for a name that lm-eval does not know.
        """
        if name not in self.index:
            near = difflib.get_close_matches(name, self.index, n=4, cutoff=0.6)
            hint = f"near: {', '.join(near)}; " if near else ""
            raise SpecError(option, name, f"no task of lm-eval {self.version}; {hint}lm-eval ls tasks lists all")
        try:
            return self._resolve(name, {}, option)
        except (OSError, yaml.YAMLError) as error:
            reason = str(error).splitlines()[0]
            raise AssetError(f"{option}={name}: lm-eval's definition cannot be read ({reason})") from error

    def _resolve(self, name: str, overrides: Config, option: str) -> tuple[Leaf | Group, ...]:
        kind, path, members = self.index[name]
        if kind == "tag":
            return tuple(found for member in sorted(members) for found in self._resolve(member, overrides, option))
        file = self.folder / path
        config, sources = read_definition(file)
        if kind == "group":
            return self._group(name, config, overrides, option)
        return (Leaf(name, file, overrides, {**config, **overrides}, sources),)

    def _group(self, name: str, config: Config, overrides: Config, option: str) -> tuple[Leaf | Group, ...]:
        inherited = {key: value for key, value in config.items() if key not in _GROUP_FIELDS} | dict(overrides)
        if any(value.startswith(_FUNCTION) for value in _texts(inherited)):
            raise SpecError(option, name, "a group that sets no functions for its tasks: name its tasks instead")
        members = config.get("task")
        children: list[Leaf | Group] = []
        for member in members if isinstance(members, list) else []:
            children += self._member(name, member, inherited, option)
        if not children:
            raise SpecError(option, name, "a group with tasks: lm-eval lists none in this one")
        aggregates = config.get("aggregate_metric_list") or ()
        if not aggregates:
            return tuple(children)
        listed = [aggregates] if isinstance(aggregates, Mapping) else aggregates
        return (Group(name, tuple(children), tuple(listed)),)

    def _member(self, group: str, member: object, inherited: Config, option: str) -> tuple[Leaf | Group, ...]:
        if isinstance(member, str):
            member = {"task": member}
        own = {key: value for key, value in member.items() if key not in ("task", "group")}
        name = member.get("group") or member["task"]
        if name in self.index:
            return self._resolve(name, {**inherited, **own}, option)
        if "group" in member:
            return self._group(f"{group}::{name}", member, inherited, option)
        config = {**inherited, **own}
        if any(value.startswith(_FUNCTION) for value in _texts(config)):
            raise SpecError(option, group, f"a group whose task {name} has a file of its own")
        return (Leaf(f"{group}::{name}", None, config, config),)


def installed() -> Definitions:
    """The definitions of the lm-eval of this Python; SpecError where there is none."""
    found = find_spec("lm_eval")  # of a top-level package: finds it, imports nothing
    try:
        if found is None or not found.submodule_search_locations:
            raise PackageNotFoundError("lm_eval")
        number = version("lm_eval")
    except PackageNotFoundError as error:
        raise SpecError("eval", "zeroshot", "needs lm-eval, which is not here: pip install lm_eval") from error
    return Definitions(Path(next(iter(found.submodule_search_locations))) / "tasks", number)


def read_definition(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A YAML file with its includes merged (nearer fields win), and the sha256 of the Python files it refers to."""
    config, files = _merged(path, {})
    return config, tuple(sorted({hashlib.sha256(file.read_bytes()).hexdigest() for file in files}))


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """YAML in which a function is its name."""


_Loader.add_constructor("!function", lambda loader, node: _FUNCTION + loader.construct_scalar(node))


def _merged(path: Path, seen: dict[Path, tuple[dict[str, Any], set[Path]]]) -> tuple[dict[str, Any], set[Path]]:
    """Fields of a file and its includes, and the Python files beside them that they name."""
    path = path.resolve()
    if path in seen:
        return dict(seen[path][0]), set(seen[path][1])
    own = yaml.load(path.read_bytes(), Loader=_Loader)
    if not isinstance(own, dict):
        raise yaml.YAMLError(f"{path.name} holds no mapping")
    included = own.pop("include", [])
    config: dict[str, Any] = {}
    files = set(_python_files(path.parent, own))
    for each in included if isinstance(included, list) else [included]:
        fields, more = _merged(path.parent / each, seen)
        fields.pop("task_list", None)
        config |= fields
        files |= more
    config |= own
    seen[path] = config, files
    return dict(config), set(files)


def _python_files(folder: Path, config: object) -> Iterator[Path]:
    for text in _texts(config):
        if text.startswith(_FUNCTION):
            module = text.removeprefix(_FUNCTION).rpartition(".")[0]
            if (file := folder / f"{module.replace('.', '/')}.py").is_file():
                yield file


def _texts(value: object) -> Iterator[str]:
    """All strings inside nested plain values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _texts(inner)


def _remembered(folder: Path, number: str) -> dict[str, tuple[str, str, list[str]]]:
    """The index of `folder`, from the cache folder if this version was read before."""
    state = [_INDEX, number, str(folder), folder.stat().st_mtime_ns]
    file = cache_dir() / "lm_eval" / f"tasks-{digest(state)[:16]}.json"
    if file.is_file():
        return json.loads(file.read_text())
    index = scan(folder)
    try:
        with scratch_dir() as scratch:
            (scratch / "index").write_text(json.dumps(index))
            file.parent.mkdir(parents=True, exist_ok=True)
            os.replace(scratch / "index", file)
    except (AssetError, OSError):  # a cache folder that cannot be written: slower, yet the same
        pass
    return index


def scan(folder: Path) -> dict[str, tuple[str, str, list[str]]]:
    """All names defined below `folder`, as lm-eval's own index has them: of two files with one name the first."""
    index: dict[str, tuple[str, str, list[str]]] = {}
    tagged: dict[str, list[str]] = {}
    seen: dict[Path, tuple[dict[str, Any], set[Path]]] = {}
    for path in sorted(folder.rglob("*.yaml"), key=lambda each: each.as_posix()):
        try:
            config, _ = _merged(path, seen)
        except (OSError, yaml.YAMLError, TypeError):  # lm-eval leaves such files out, too
            continue
        kind = "task" if "class" in config or "group" not in config else "group"
        name = config.get(kind)
        if not isinstance(name, str) or name in index:
            continue
        index[name] = (kind, path.relative_to(folder).as_posix(), [])
        tags = config.get("tag") or []
        for tag in tags if isinstance(tags, list) and kind == "task" else [tags] if kind == "task" else []:
            tagged.setdefault(tag, []).append(name)
    for tag, names in tagged.items():
        index.setdefault(tag, ("tag", "", names))
    return index
