"""Documents by hand; C4's windows against a plain loop over Python's generator; WikiText-2 as its authors count it."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbench.calibration.documents import (
    document_starts,
    document_windows,
    documents,
    is_wikitext,
    join,
    read_rows,
    wikitext_pages,
    window_documents,
)
from qbench.errors import AssetError, SpecError

ARTICLES = [
    "",
    " = One = \n",
    "",
    " Text . \n",
    " = = Part = = \n",
    " More . \n",
    "",
    "",
    " = Two = \n",
    "",
    " End . \n",
]


def test_rows_of_files(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = ["first\nline", "", "\u2028 third", "text wins"]
    written = [{"text": rows[0]}, {"sentence": ""}, {"page": rows[2]}, {"sentence": "no", "text": rows[3]}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in written), encoding="utf-8")
    assert read_rows(path, "eval.path") == rows
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert read_rows(path, "eval.path") == rows
    text = tmp_path / "lines.txt"
    text.write_text("a\n\nb \n")
    assert read_rows(text, "eval.path") == ["a", "", "b "]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\nnot json', "line 2 is not JSON"),
        ("a.jsonl", '{"text": "x"}\n{"words": "y"}', "line 2 has no string in any of text, sentence, page"),
        ("a.jsonl", '{"text": 3}', "line 1 has no string"),
        ("a.jsonl", "[1]", "line 1 has no string"),
        ("a.jsonl", "", "the file is empty"),
        ("a.txt", " \n", "the file is empty"),
        ("a.txt", b"\xff", "not UTF-8"),
        ("a.csv", "x", "must end in .txt or .jsonl"),
        ("a.txt", None, "no such file"),
    ],
)
def test_bad_files_are_refused_in_one_line(name, content, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((AssetError, SpecError)) as error:
        read_rows(path, "eval.path")
    assert message in str(error.value)
    assert str(error.value).startswith(f"eval.path={path}")
    assert "\n" not in str(error.value)


def test_articles_and_rows():
    assert is_wikitext(ARTICLES)
    assert not is_wikitext(["Some text", " = One = \n"])
    assert documents(ARTICLES) == [
        " = One = \n \n Text . \n = = Part = = \n More . \n \n ",
        " = Two = \n \n End . \n",
    ]
    assert wikitext_pages([]) == []
    assert documents(["a", "", " \n", "b"]) == ["a", "b"]


def test_where_documents_begin():
    text, starts = join(ARTICLES), document_starts(ARTICLES)
    assert len(starts) == 2
    assert starts[0] == 0
    assert text[starts[1] :].startswith(" = Two = ")
    rows = ["", "first", "", "second", "third"]
    for separator in ("\n\n", " "):
        text, starts = join(rows, separator), document_starts(rows, separator)
        assert [text[start:].split(separator)[0] for start in starts[1:]] == ["second", "third"]
        assert starts[0] == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("ab ", max_size=9), min_size=1, max_size=12), st.integers(1, 4))
def test_every_window_is_in_the_document_of_its_first_token(rows, length):
    """A token a character, so that positions can be counted by hand."""
    text, starts = join(rows), document_starts(rows)
    n = len(text) // length
    found = window_documents(range(len(text)), starts, length, n)
    assert found.dtype == np.int64
    for place, number in enumerate(found):
        assert starts[number] <= place * length
        assert number + 1 == len(starts) or place * length < starts[number + 1]


def test_windows_of_c4_are_drawn_as_the_authors_do():
    texts = ["x" * size for size in (3, 40, 12, 7, 25, 11)]
    found, numbers = document_windows(texts, lambda text: list(range(len(text))), 10, n=40, seed=0)
    random.seed(0)
    for window, number in zip(found.tolist(), numbers.tolist(), strict=True):
        while True:
            drawn = random.randint(0, len(texts) - 1)
            if len(texts[drawn]) >= 10:
                break
        start = random.randint(0, len(texts[drawn]) - 10 - 1)
        assert (number, window) == (drawn, list(range(start, start + 10)))
    assert set(numbers.tolist()) == {1, 2, 4, 5}
    other, _ = document_windows(texts, lambda text: list(range(len(text))), 10, n=20, seed=1)
    assert not torch.equal(found, other)


def test_documents_are_tokenized_once_and_may_all_be_too_short():
    calls = []
    with pytest.raises(SpecError, match=r"eval.length=10: less than 10, the tokens of the longest document"):
        document_windows(["x" * 10, "y" * 3], lambda text: calls.append(text) or list(text.encode()), 10)
    assert len(calls) == 2


def _wikitext2():
    """$QBENCH_TEST_DATA/corpora/wikitext2.test.jsonl: the published rows, which the package doesn't carry."""
    path = Path(os.environ.get("QBENCH_TEST_DATA", "../shared/data")) / "corpora" / "wikitext2.test.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path


def test_wikitext2_is_complete_as_published():
    """245,569 words with an end mark per line (Merity et al. 2017, table 1); 62 documents in lm-eval's version."""
    rows = read_rows(_wikitext2(), "eval.path")
    assert len(rows) == 4358
    assert sum(len(row.split()) for row in rows) + len(rows) == 245_569
    pages = documents(rows)
    assert len(pages) == 62
    assert all(page.startswith(" = ") for page in pages)
    starts = document_starts(rows)
    assert len(starts) == 62
    assert sum(len(row.split()) for row in pages) == 245_569 - 4358
