"""Shuffled windows: the same tokens in another order, and exactly the order that was to be destroyed."""

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qbench.calibration.order import SHUFFLES, Units, find_units, shuffle
from qbench.errors import SpecError
from qbench.models.load import load_tokenizer
from tests.engine.helpers import tiny_asset

KINDS = SHUFFLES[1:]
TEXT = (
    'The first sentence is here. "Is this the second one?" Yes! It has, in all, nine words (or ten). A line\n'
    "that is wrapped goes on.\n\nA heading without a stop\n\nAnd 3.14 is no end, but 你好。再见。 are two. The end"
)
SENTENCES = [
    "The first sentence is here. ",
    '"Is this the second one?" ',
    "Yes! ",
    "It has, in all, nine words (or ten). ",
    "A line\nthat is wrapped goes on.\n\n",
    "A heading without a stop\n\n",
    "And 3.14 is no end, but 你好。",
    "再见。 ",
    "are two. ",
    "The end",
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(tiny_asset())


def _pieces(ids, numbers, tokenizer):
    """The text of every run of tokens with the same number."""
    cuts = [0, *((numbers.diff() != 0).nonzero()[:, 0] + 1).tolist(), len(numbers)]
    return [tokenizer.decode(ids[low:high]) for low, high in itertools.pairwise(cuts)]


@pytest.fixture(scope="module")
def text(tokenizer):
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    return ids, find_units(tokenizer, TEXT)


def test_words_and_sentences_are_those_of_the_text(text, tokenizer):
    ids, units = text
    assert tokenizer.decode(ids) == TEXT
    sentences = _pieces(ids, units.sentences, tokenizer)
    # The space before a word is the word's own: it moves to the next piece.
    assert [each.strip() for each in sentences] == [each.strip() for each in SENTENCES]
    words = _pieces(ids, units.words, tokenizer)
    assert [each.strip() for each in words] == TEXT.split()
    assert (units.words.diff() >= 0).all()
    assert (units.sentences.diff() >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_windows_keep_their_tokens_and_lose_their_order(kind, text):
    ids, units = text
    windows, units = ids.repeat(3, 1), Units(units.words.repeat(3, 1), units.sentences.repeat(3, 1))
    found = shuffle(windows, kind, 0, units)
    assert found.dtype == torch.int64
    assert torch.equal(found.sort().values, windows.sort().values)
    assert not (found == windows).all(1).any()
    assert len({tuple(row.tolist()) for row in found}) == 3  # every window by itself
    assert torch.equal(found, shuffle(windows, kind, 0, units))
    assert not torch.equal(found, shuffle(windows, kind, 1, units))


def test_sentences_move_as_they_are(text, tokenizer):
    ids, units = text
    (found,) = shuffle(ids[None], "sentences", 0, Units(units.words[None], units.sentences[None]))
    rest = tokenizer.decode(found)
    for sentence in SENTENCES:
        assert rest.count(sentence.strip()) == 1
    bounds = _pieces(ids, units.sentences, tokenizer)
    assert sorted(rest) == sorted("".join(bounds))


def test_words_move_inside_their_sentence_alone(text, tokenizer):
    ids, units = text
    (found,) = shuffle(ids[None], "words", 0, Units(units.words[None], units.sentences[None]))
    for number, sentence in enumerate(SENTENCES):
        here = units.sentences == number
        assert torch.equal(found[here].sort().values, ids[here].sort().values)
        words = re.findall(r"\S+", tokenizer.decode(found[here]))
        assert sorted("".join(words)) == sorted("".join(sentence.split()))
    assert tokenizer.decode(found[units.sentences == 9]).split() in (["The", "end"], ["end", "The"], ["endThe"])


numbers = st.lists(st.integers(0, 1), min_size=2, max_size=30)


@given(steps=numbers, more=numbers, seed=st.integers(0, 9), kind=st.sampled_from(KINDS))
def test_what_belongs_together_stays_together_and_within_its_bounds(steps, more, seed, kind):
    length = min(len(steps), len(more))
    sentences = torch.tensor(steps[:length]).cumsum(0)
    words = torch.tensor(more[:length]).cumsum(0) + sentences  # a sentence begins with a word
    window = torch.arange(length)  # a token is its place
    try:
        (found,) = shuffle(window[None], kind, seed, Units(words[None], sentences[None]))
    except SpecError:  # nothing moved; one thing alone cannot, and of few the drawn order may be the old one
        return
    assert found.sort().values.tolist() == list(range(length))
    if kind == "words":
        assert sentences[found].tolist() == sentences.tolist()
    moved = {"tokens": window, "words": words, "sentences": sentences}[kind]
    for unit in moved.unique():
        places = (moved[found] == unit).nonzero()[:, 0]
        assert (places.diff() == 1).all()
        assert (found[places].diff() == 1).all()


def test_every_order_of_tokens_is_equally_likely():
    windows = torch.arange(3).repeat(6000, 1)
    found = shuffle(windows, "tokens", 0)
    _, counts = found.unique(dim=0, return_counts=True)
    assert counts.tolist() == pytest.approx([1000] * 6, rel=0.15)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_without_anything_to_move_are_refused_in_one_line(kind):
    windows = torch.full((2, 5), 7)
    one = torch.zeros_like(windows)
    with pytest.raises(SpecError, match=f"^calib.shuffle={kind}: .* a larger calib.length$"):
        shuffle(windows, kind, 0, Units(one, one))
