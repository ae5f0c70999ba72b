"""Where a task's items come from: files in the hub's schema, or the hub. Only the location changes, not the task."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbench.assets import cache_dir, file_sha256, scratch_dir
from qbench.errors import AssetError, SpecError
from qbench.evaluation.lm_eval.definitions import Leaf
from qbench.spec import digest

#: `dataset_path` values that name a file format of `datasets`, not a repository.
_FORMATS = {"json", "csv", "parquet", "text", "arrow", "pandas", "xml", "webdataset"}


@dataclass(frozen=True)
class Source:
    """Items of one task. `fingerprint` is the sha256 of what they are; `fields` replace those of the definition;
    `where` names the place, for messages. `files`: splits by name, None from the hub."""

    fingerprint: str
    fields: Mapping[str, Any]
    where: str
    files: Mapping[str, Path] | None = None


def local(leaf: Leaf, folder: Path, shots: int) -> Source:
    """The files `<folder>/<task>/<split>.jsonl`.

    The split that is evaluated has to be there, and with `shots` > 0 the one that examples come from. Raises
    AssetError that names the file otherwise; SpecError for a task whose items do not come from a data set.
    """
    split = leaf.evaluated_split
    if "class" in leaf.config or split is None:
        raise SpecError("eval.data_dir", folder, f"null: {leaf.name} brings its items by code of its own")
    home = folder / leaf.name
    needed = [split]
    if shots and not leaf.lists_examples:
        if leaf.example_split is None:
            raise SpecError("eval.num_fewshot", shots, f"0: {leaf.name} has no split to take examples from")
        needed.append(leaf.example_split)
    files: dict[str, Path] = {}
    for name in dict.fromkeys(needed):
        files[name] = home / f"{name}.jsonl"
        if not files[name].is_file():
            use = "" if name == split else f", which the {shots} examples come from"
            hub = leaf.config.get("dataset_path")
            other = f"; eval.data_dir=null takes it from the hub ({hub})" if hub else ""
            raise AssetError(f"task {leaf.name}: {files[name]} is missing{use}{other}")
    fingerprint = digest({name: file_sha256(file) for name, file in files.items()})
    fields: dict[str, Any] = {"dataset_path": "json", "dataset_name": None, "custom_dataset": None}
    return Source(fingerprint, fields, str(home), files)


def hub(leaf: Leaf, shots: int) -> Source:
    """The hub's data set at a revision that is fixed the first time it is used on this machine.

    Raises AssetError where the hub cannot be reached and the revision is not known yet.
    """
    if shots and not leaf.lists_examples and leaf.example_split is None:
        raise SpecError("eval.num_fewshot", shots, f"0: {leaf.name} has no split to take examples from")
    path, name = leaf.config.get("dataset_path"), leaf.config.get("dataset_name")
    own = dict(leaf.config.get("dataset_kwargs") or {})
    where = f"the hub ({path})"
    if path is None or path in _FORMATS or leaf.config.get("custom_dataset") is not None or "revision" in own:
        # Code, named addresses or a named revision: all of it is in the definition.
        return Source(digest([path, name, json.loads(json.dumps(own, default=str))]), {}, where)
    revision = _revision(leaf.name, path)
    return Source(digest([path, name, revision]), {"dataset_kwargs": {**own, "revision": revision}}, where)


def _revision(task: str, repository: str) -> str:
    """The commit of a data set: remembered, or else asked of the hub and remembered."""
    file = cache_dir() / "lm_eval" / "revisions" / f"{digest(repository)[:16]}.json"
    if file.is_file():
        return json.loads(file.read_text())["commit"]
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(repository, timeout=20).sha
    except Exception as error:  # the hub, its HTTP client or the system: for the user one and the same
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise AssetError(
            f"task {task}: its data set {repository} is not to be had from the hub ({reason}); with "
            f"eval.data_dir=<folder> it is read from <folder>/{task}/<split>.jsonl"
        ) from error
    with scratch_dir() as scratch:
        (scratch / "commit").write_text(json.dumps({"repository": repository, "commit": commit}))
        file.parent.mkdir(parents=True, exist_ok=True)
        os.replace(scratch / "commit", file)
    return commit
