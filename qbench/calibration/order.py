"""Calibration windows with their order destroyed: the same tokens, in another one.

What calibration learns from a text is which tokens there are and how they follow each other. Windows whose tokens are
permuted have the first and not the second: exactly the same number of every token, so that a difference in the result
is the order's alone (the ablation "intra-sentence logic" of LLMC, arXiv 2405.06001).

| kind      | what moves                     | within              | what stays                          |
|-----------|--------------------------------|---------------------|-------------------------------------|
| sentences | sentences                      | a window            | the order inside every sentence     |
| words     | words                          | a sentence          | which words make up which sentence  |
| tokens    | tokens                         | a window            | nothing                             |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qbench.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHUFFLES = ("none", "sentences", "words", "tokens")

#: A sentence ends with its full stop and the white space behind it (closing quotes in between), or with a paragraph.
#: An abbreviation before a space is taken for an end too; the end of a line is none, because texts are wrapped.
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*\s+|[。！？]+[」』”’）]*\s*|\s*\n\s*\n\s*")

#: A word is what stands between white space, with its punctuation.
_WORD_START = re.compile(r"(?<!\S)\S")


@dataclass(frozen=True)
class Units:
    """To which word and which sentence of its text every token belongs: numbers in ascending order, int64 [tokens]."""

    words: Tensor
    sentences: Tensor

    def at(self, places: Tensor) -> Units:
        """Those of the tokens at these places of the text."""
        return Units(self.words[places], self.sentences[places])


def find_units(tokenizer: PreTrainedTokenizerBase, text: str) -> Units:
    """The words and sentences of a text, token by token.

    A token belongs where its last character does: with the space before a word to the word, alone to what is before.
    The tokenizer must be a fast one, which knows where its tokens are.
    """
    offsets = tokenizer(text, verbose=False, return_offsets_mapping=True)["offset_mapping"]
    last = np.array([end for _, end in offsets], dtype=np.int64) - 1
    words = [found.start() for found in _WORD_START.finditer(text)]
    sentences = [found.end() for found in _SENTENCE_END.finditer(text)]
    return Units(*(torch.from_numpy(np.searchsorted(starts, last, side="right")) for starts in (words, sentences)))


def shuffle(windows: Tensor, kind: str, seed: int, units: Units | None = None) -> Tensor:
    """The windows, int64 [n, length], each with its order destroyed (`kind`, not "none"); the same for a seed.

    `units` are those of the windows' tokens, [n, length] each; shuffling tokens does without. SpecError where no window
    has anything that could stand elsewhere.
    """
    generator = torch.Generator().manual_seed(seed)  # its own: which windows are drawn does not depend on the kind
    everything = torch.zeros_like(windows)
    if kind == "tokens":
        within, moved = everything, torch.arange(windows.shape[1]).expand_as(windows)
    elif kind == "words":
        within, moved = units.sentences, units.words
    else:
        within, moved = everything, units.sentences
    orders = [_order(*each, generator) for each in zip(within, moved, strict=True)]
    found = torch.stack([window[order] for window, order in zip(windows, orders, strict=True)])
    if torch.equal(found, windows):
        raise SpecError("calib.shuffle", kind, f"windows in which {kind} can change places: a larger calib.length")
    return found


def _order(within: Tensor, moved: Tensor, generator: torch.Generator) -> Tensor:
    """Places int64 [length] in their new order: what has one number in `moved` stays together and in order, and moves
    at random among what has the same number in `within`, whose numbers stay in order."""
    names, unit = moved.unique(return_inverse=True)
    rank = torch.randperm(len(names), generator=generator)[unit]
    order = rank.argsort(stable=True)
    return order[within[order].argsort(stable=True)]
