"""What OpenCompass reads: a folder in its own layout, or one in the hub's schema, converted. Does not import torch.

OpenCompass's layout is a folder `data` that holds `piqa/dev.jsonl`, `winogrande/dev.jsonl`, `ARC/ARC-c/…` and so on.
The hub's schema is a folder per task with `<split>.jsonl`, as `eval=zeroshot` reads it: the same items serve both.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbench.assets import file_sha256
from qbench.errors import AssetError
from qbench.spec import digest

#: Raise when the same rows are converted to other ones.
CONVERSION = 1

Row = Mapping[str, Any]
#: Names of files, relative to the converted path (empty: the path itself is the file), and their text.
Files = dict[str, str]


@dataclass(frozen=True)
class Conversion:
    """How a path of OpenCompass is made of a task's rows; of its splits the first that exists."""

    task: str
    splits: tuple[str, ...]
    convert: Callable[[Sequence[Row]], Files]


def _lines(rows: Iterable[object]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _piqa(rows: Sequence[Row]) -> Files:
    """Questions and labels apart; the loader wants a training split too, which zero-shot prompts never look into."""
    questions = _lines({"id": str(i), **{k: row[k] for k in ("goal", "sol1", "sol2")}} for i, row in enumerate(rows))
    labels = "".join(f"{row['label']}\n" for row in rows)
    return {f"{split}{end}": text for split in ("train", "dev") for end, text in (
        (".jsonl", questions), ("-labels.lst", labels))}  # fmt: skip


def _winogrande(rows: Sequence[Row]) -> Files:
    return {"dev.jsonl": _lines({k: row[k] for k in ("sentence", "option1", "option2", "answer")} for row in rows)}


def _arc(rows: Sequence[Row]) -> Files:
    """Choices as pairs of text and label. The loader drops questions that have not four."""
    return {
        "": _lines(
            {
                "question": {
                    "stem": row["question"],
                    "choices": [
                        {"text": text, "label": label}
                        for text, label in zip(row["choices"]["text"], row["choices"]["label"], strict=True)
                    ],
                },
                "answerKey": row["answerKey"],
            }
            for row in rows
        )
    }


def _hellaswag(rows: Sequence[Row]) -> Files:
    """Activity, context and endings in one line each, WikiHow's tags taken out."""
    return {
        "": _lines(
            {
                "query": _untagged(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"),
                "choices": [_untagged(ending) for ending in row["endings"]],
                "gold": int(row["label"]),
            }
            for row in rows
        )
    }


def _untagged(text: str) -> str:
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _boolq(rows: Sequence[Row]) -> Files:
    return {
        "": _lines(
            {
                "question": row["question"],
                "passage": row["passage"],
                "idx": i,
                "label": "true" if row["label"] else "false",
            }
            for i, row in enumerate(rows)
        )
    }


CONVERSIONS = {
    "data/piqa": Conversion("piqa", ("validation",), _piqa),
    "data/winogrande": Conversion("winogrande", ("validation",), _winogrande),
    "data/ARC/ARC-e/ARC-Easy-Dev.jsonl": Conversion("arc_easy", ("validation", "test"), _arc),
    "data/ARC/ARC-c/ARC-Challenge-Dev.jsonl": Conversion("arc_challenge", ("validation", "test"), _arc),
    "data/ARC/ARC-c/ARC-Challenge-Test.jsonl": Conversion("arc_challenge", ("test",), _arc),
    "data/hellaswag/hellaswag.jsonl": Conversion("hellaswag", ("validation",), _hellaswag),
    "data/SuperGLUE/BoolQ/val.jsonl": Conversion("boolq", ("validation",), _boolq),
}


@dataclass(frozen=True)
class Located:
    """The data of one dataset, found: in OpenCompass's layout under `folder`, or as `rows` to be converted (path →
    file)."""

    folder: Path
    paths: tuple[str, ...]
    rows: tuple[tuple[str, Path], ...] = ()

    def fingerprint(self) -> str:
        """sha256 (hex) over the names and contents of all files that are read."""
        if self.rows:
            return digest([CONVERSION, [[path, file_sha256(file)] for path, file in self.rows]])
        files = [file for path in self.paths for file in _files(self.folder / path)]
        return digest([[file.relative_to(self.folder).as_posix(), file_sha256(file)] for file in files])

    def prepared(self, scratch: Path) -> Path:
        """The folder that holds `data`; converted rows are written into `scratch`."""
        if not self.rows:
            return self.folder
        for path, file in self.rows:
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
            try:
                converted = CONVERSIONS[path].convert(rows)
            except (KeyError, TypeError, ValueError) as error:
                raise AssetError(f"{file}: not in the schema of {CONVERSIONS[path].task} ({error!r})") from None
            for name, text in converted.items():
                target = scratch / path / name if name else scratch / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text, encoding="utf-8")
        return scratch


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(Path(folder, name) for folder, _, names in os.walk(path) for name in names)


def default_folder() -> Path:
    """Where OpenCompass itself looks."""
    return Path(os.environ.get("COMPASS_DATA_CACHE") or "~/.cache/opencompass").expanduser()


def locate(dataset: str, paths: Sequence[str], folder: Path | None) -> Located:
    """The data of `dataset`, which reads `paths`, under `folder` (None: where OpenCompass looks).

    AssetError, which names the file, where they are not.
    """
    where = f"eval.data_dir={'null' if folder is None else folder}"
    root = default_folder() if folder is None else folder.expanduser()
    if folder is not None and not root.is_dir():
        raise AssetError(f"{where}: no such folder")
    if folder is None or (root / "data").is_dir():
        for path in paths:
            if not (root / path).exists():
                raise AssetError(
                    f"{where}: no data for {dataset}; looked for {root / path} (from the data that OpenCompass's "
                    "releases carry; or give a folder in the hub's schema)"
                )
        return Located(root, tuple(paths))
    return Located(root, tuple(paths), tuple((path, _row_file(dataset, path, root, where)) for path in paths))


def _row_file(dataset: str, path: str, root: Path, where: str) -> Path:
    conversion = CONVERSIONS.get(path)
    if conversion is None:
        raise AssetError(f"{where}: no data for {dataset}; looked for {root / path}")
    candidates = [root / conversion.task / f"{split}.jsonl" for split in conversion.splits]
    for file in candidates:
        if file.is_file():
            return file
    raise AssetError(f"{where}: no data for {dataset}; looked for {' and '.join(map(str, candidates))}")
