"""Documents of a text: rows of a file, articles of WikiText, and which document a window of tokens begins in.

Windows of one document resemble each other; standard errors that know the documents count them as one. Rolling
perplexity reads document by document, and GPTQ's C4 draws each window from a document of its own.
"""

from __future__ import annotations

import json
import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qbench.calibration.corpora import read_utf8
from qbench.errors import AssetError, SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qbench.calibration.corpora import Corpus

#: Between the rows of a text file.
SEPARATOR = "\n\n"

#: Names under which the rows of published data sets keep their text.
FIELDS = ("text", "sentence", "page")


def read_rows(path: str | Path, option: str, fields: Sequence[str] = FIELDS) -> list[str]:
    """The rows of a text file: of a `.jsonl` the first of `fields` that each has, of a `.txt` its lines.

    Empty rows are kept. AssetError (naming `option`, the path, the line) for a file that is missing, not UTF-8,
    without text, or whose rows have no such field; SpecError for another kind of file.
    """
    path = Path(path).expanduser()
    text = read_utf8(path, option)
    # Only "\n" ends a row: str.splitlines would also cut at U+2028, which JSON allows inside a string.
    lines = text.removesuffix("\n").split("\n")
    rows = lines
    if path.suffix == ".jsonl" and text.strip():
        rows = [_row(line, f"{option}={path}: line {number}", fields) for number, line in enumerate(lines, start=1)]
    if not any(row.strip() for row in rows):
        raise AssetError(f"{option}={path}: the file is empty; a text corpus is needed")
    return rows


def _row(line: str, where: str, fields: Sequence[str]) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise AssetError(f"{where} is not JSON ({error.msg})") from None
    found = [row[name] for name in fields if name in row] if isinstance(row, dict) else []
    if not found or not isinstance(found[0], str):
        raise AssetError(f"{where} has no string in any of {', '.join(fields)}; every row needs one")
    return found[0]


def is_wikitext(rows: Sequence[str]) -> bool:
    """Whether the first row with text is the title of an article, as in WikiText: ` = Title = `."""
    first = next((row for row in rows if row.strip()), "")
    return _is_title(first)


def _is_title(row: str) -> bool:
    """` = Title = `, but not ` = = Section = = `: the rule of the data set's published version by documents, which
    takes two formulas of the test split for titles (62 documents, where there are 60 articles)."""
    line = row.replace("= = =", "===").replace("= =", "==").strip()
    return line.startswith("= ") and line.endswith(" =")


def wikitext_pages(rows: Sequence[str]) -> list[str]:
    """The articles of WikiText's rows as single texts, with the lines of the original file: an empty row was a line
    that held a space."""
    lines = [row.removesuffix("\n") or " " for row in rows]
    starts = [place for place, line in enumerate(lines) if _is_title(line)]
    bounds = [0, *starts, len(lines)]
    pages = ["\n".join(lines[low:high]) for low, high in pairwise(bounds)]
    if pages:
        pages[-1] += "\n"  # the file ends with a line end
    return [page for page in pages if page.strip()]


def documents(rows: Sequence[str]) -> list[str]:
    """The texts that belong together: articles of WikiText, otherwise the rows that hold text."""
    return wikitext_pages(rows) if is_wikitext(rows) else [row for row in rows if row.strip()]


def document_starts(rows: Sequence[str], separator: str = SEPARATOR) -> list[int]:
    """Where documents begin in `separator.join(rows)`, in characters, ascending; the first is 0."""
    places = accumulate((len(row) + len(separator) for row in rows), initial=0)
    begins = _is_title if is_wikitext(rows) else str.strip
    starts = [place for place, row in zip(places, rows) if begins(row)]
    return [0, *starts[1:]]


def window_documents(offsets: Sequence[int] | Tensor, starts: Sequence[int], length: int, n: int) -> np.ndarray:
    """For `n` non-overlapping windows of `length` tokens, the document in which each begins, int64 [n].

    `offsets` are the first characters of all tokens, `starts` those of the documents.
    """
    return np.array([bisect_right(starts, int(offsets[place * length])) - 1 for place in range(n)], dtype=np.int64)


def window_clusters(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, length: int, n: int, separator: str = SEPARATOR
) -> np.ndarray | None:
    """For the first `n` windows of `length` tokens of a text, the document in which each begins, int64 [n].

    `separator` is what stands between the rows in the text.

    None where nothing is known of documents or all windows begin in the same: texts that are no `.jsonl` file, and
    tokenizers that cannot say where their tokens come from.
    """
    if corpus.path is None or corpus.path.suffix != ".jsonl" or not tokenizer.is_fast:
        return None
    starts = document_starts(read_rows(corpus.path, "eval.path"), separator)
    offsets = tokenizer(corpus.text(), verbose=False, return_offsets_mapping=True)["offset_mapping"]
    found = window_documents([first for first, _ in offsets], starts, length, n)
    return found if len(set(found.tolist())) > 1 else None


def document_windows(
    texts: Sequence[str], tokenize: Callable[[str], Sequence[int]], length: int, n: int = 256, seed: int = 0
) -> tuple[Tensor, np.ndarray]:
    """Windows int64 [n, length], each at a random place of a random document with more than `length` tokens, and their
    documents' numbers int64 [n].

    C4 as GPTQ's authors evaluate on it, drawing for drawing (Python's generator, seed 0, 256 windows), from the first
    validation shard. SpecError when no document is long enough.
    """
    generator, known = random.Random(seed), {}
    windows, chosen = [], []
    while len(windows) < n:
        number = generator.randint(0, len(texts) - 1)
        if number not in known:
            known[number] = tokenize(texts[number])
        ids = known[number]
        if len(ids) <= length:
            if len(known) == len(texts) and all(len(ids) <= length for ids in known.values()):
                longest = max(map(len, known.values()))
                raise SpecError("eval.length", length, f"less than {longest}, the tokens of the longest document")
            continue
        start = generator.randint(0, len(ids) - length - 1)
        windows.append(list(ids[start : start + length]))
        chosen.append(number)
    return torch.tensor(windows, dtype=torch.int64), np.array(chosen, dtype=np.int64)


def join(rows: Iterable[str], separator: str = SEPARATOR) -> str:
    """One text of all rows, empty ones included."""
    return separator.join(rows)
