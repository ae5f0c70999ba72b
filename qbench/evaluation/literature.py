"""Perplexities under their literature names: WikiText-2, PTB and C4 exactly as the GPTQ line of papers reads them.

| name      | file                                     | text                        | windows                        |
|-----------|------------------------------------------|-----------------------------|--------------------------------|
| wikitext2 | raw test split, all rows                 | rows joined by two newlines | one after the other, all       |
| ptb       | test split (Mikolov's), sentences        | rows joined by a space      | one after the other, all       |
| c4        | first validation shard                   | a window of one document    | 256 at random (seed 0)         |
| c4_new    | first validation shard, first 1100 rows  | rows joined by a space      | one after the other, first 256 |

`ptb` is what the authors' code calls `ptb_new`; `c4_new` is its own name there, and some papers print it as C4. That a
file holds the rows that its name promises is the user's word. All but `c4` give the protocol `window-<length>` and the
numbers of `eval=perplexity` on the same text; `c4` has a protocol of its own, `documents-<length>`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from qbench.calibration.corpora import Corpus, text_fingerprint
from qbench.calibration.documents import SEPARATOR, document_windows, join, read_rows
from qbench.checks import choice, integer
from qbench.errors import SpecError
from qbench.evaluation.base import Context, Evaluation, Report, Subject, WindowEvaluation
from qbench.evaluation.perplexity import VERSION, WindowPerplexity, perplexity, window_nll
from qbench.spec import EvaluationSpec, digest
from qbench.store.records import Measurement

DEFINITIONS = ("wikitext2", "ptb", "c4", "c4_new")

#: Rows and windows of C4 that are read.
C4_ROWS, C4_WINDOWS, C4_SEED = 1100, 256, 0

#: Between the rows of PTB, and of C4.
SPACE = " "


def literature_text(definition: str, rows: list[str], *, raw_lines: bool) -> str:
    """The text of `wikitext2`, `ptb` or `c4_new` from the rows of its file. `raw_lines`: the rows are lines of a text
    file; the published rows of WikiText keep their line ends, and blank lines are empty rows."""
    if definition == "wikitext2":
        return join((row + "\n" if row.strip() else "" for row in rows) if raw_lines else rows)
    return join(rows if definition == "ptb" else rows[:C4_ROWS], SPACE)


@dataclass(frozen=True, kw_only=True)
class DocumentPerplexity(WindowEvaluation):
    """Perplexity of random windows, each from a document of its own."""

    metrics = ("ppl",)

    rows: tuple[str, ...] = field(compare=False, repr=False)

    def preflight(self, context: Context) -> None:
        self.windows(context)

    def windows(self, context: Context) -> Tensor:
        return self._drawn(context)[0]

    def _drawn(self, context: Context) -> tuple[Tensor, np.ndarray]:
        tokenizer, options = context.tokenizer(), dict(self.spec.options)

        def tokenize(text: str) -> list[int]:
            return tokenizer(text, verbose=False)["input_ids"]

        return document_windows(self.rows, tokenize, self.spec.length, self.spec.n, options["seed"])

    def measure(self, subject: Subject, report: Report) -> list[Measurement]:
        windows = self.windows(subject.context)
        with subject.quantized() as model:
            return self.measurements(window_nll(model, windows, self.batch, report), subject.context)

    def measurements(self, nll: Tensor, context: Context) -> list[Measurement]:
        return [perplexity(nll, self.spec, self.clusters(context, len(nll)))]

    def clusters(self, context: Context, n: int) -> np.ndarray | None:
        return self._drawn(context)[1][:n]


def build(options: Mapping[str, Any], source: str) -> tuple[Evaluation, ...]:
    """The evaluation that `conf/eval/wikitext2.yaml`, `ptb.yaml` or `c4.yaml` describes. SpecError, AssetError."""
    definition = choice("eval.definition", options["definition"], DEFINITIONS)
    length = integer("eval.length", options["length"], 2)
    n = None if options["n"] is None else integer("eval.n", options["n"], 1)
    if options["path"] is None:
        needs = "the path of a .jsonl or .txt file with the rows of the published data set: no package carries them"
        raise SpecError("eval.path", None, f"with eval={options['name']}: {needs}")
    path = Path(str(options["path"])).expanduser()
    rows = read_rows(path, "eval.path")
    spec = partial(EvaluationSpec, evaluator="perplexity", version=VERSION, task=definition, length=length)
    if definition == "c4":
        wanted = spec(fingerprint=digest(rows), n=n or C4_WINDOWS, mode="documents", options=(("seed", C4_SEED),))
        return (DocumentPerplexity(spec=wanted, rows=tuple(rows)),)
    read: Callable[[], str] = partial(_text, definition, path)
    fingerprint = text_fingerprint(read())
    corpus = Corpus(name=definition, path=path, fingerprint=fingerprint, served_by="local path", _read=read)
    between = SEPARATOR if definition == "wikitext2" else SPACE
    return (WindowPerplexity(spec=spec(fingerprint=fingerprint, n=n), corpus=corpus, separator=between),)


def _text(definition: str, path: Path) -> str:
    return literature_text(definition, read_rows(path, "eval.path"), raw_lines=path.suffix == ".txt")
