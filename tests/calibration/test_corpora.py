"""Corpora: what a text is, what its fingerprint means, and every way in which a file can be unusable."""

import hashlib
import json
import subprocess
import sys

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from qbench.calibration import corpora
from qbench.calibration.corpora import Corpus, corpus_names, pydoc_split, resolve_corpus, tokenize
from qbench.errors import AssetError, SpecError


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("text", ["a", "zwei\r\nZeilen\n", "\ufeffmark", "  日本 \u2028 語\n\n\n"])
def test_a_txt_is_one_string_as_it_is(tmp_path, text):
    file = tmp_path / "my.notes.txt"
    file.write_bytes(text.encode())
    corpus = resolve_corpus("text", file)
    assert corpus.text() == text
    assert (corpus.name, corpus.path, corpus.served_by) == ("my.notes", file, "local path")
    assert corpus.fingerprint == hashlib.sha256(file.read_bytes()).hexdigest()


# Surrogates cannot be stored in UTF-8; everything else can, escaped or not.
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1).filter(
    lambda t: "".join(t).strip()
)


@example(rows=["a\u2028b\x85c", "", "d\r\ne"], escaped=False, last_newline=True)
@given(rows=TEXTS, escaped=st.booleans(), last_newline=st.booleans())
def test_a_jsonl_is_its_rows_joined_by_two_newlines(tmp_path_factory, rows, escaped, last_newline):
    file = tmp_path_factory.mktemp("corpus") / "wikitext2.test.jsonl"
    lines = [json.dumps({"n": i, "text": row}, ensure_ascii=escaped) for i, row in enumerate(rows)]
    file.write_bytes(("\n".join(lines) + "\n" * last_newline).encode())
    corpus = resolve_corpus("anything", file)
    assert corpus.text() == "\n\n".join(rows)
    assert corpus.name == "wikitext2.test"


def test_the_fingerprint_is_the_texts_not_the_files(tmp_path):
    row = json.dumps({"text": "one text"})
    (tmp_path / "a.jsonl").write_text(row)
    (tmp_path / "b.txt").write_text("one text")
    (tmp_path / "a.txt").write_text(row)
    a_jsonl, b_txt, a_txt = (resolve_corpus(str(tmp_path / name)) for name in ("a.jsonl", "b.txt", "a.txt"))
    assert a_jsonl.fingerprint == b_txt.fingerprint  # the same text
    assert a_jsonl.fingerprint != a_txt.fingerprint  # the same bytes, read as another text


def test_a_file_that_changes_after_planning_is_an_error(tmp_path):
    file = tmp_path / "c.txt"
    file.write_text("before")
    corpus = resolve_corpus("text", file)
    file.write_text("after!")
    with pytest.raises(AssetError, match="changed since") as error:
        corpus.text()
    one_line(error)


BAD_FILES = {
    "missing.txt": (None, "no such file"),
    "empty.txt": (b"", "empty"),
    "blank.txt": (b" \n\n", "empty"),
    "empty.jsonl": (b"\n", "empty"),
    "blank-rows.jsonl": (b'{"text": ""}\n{"text": " "}\n', "empty"),
    "latin1.txt": ("Größe".encode("latin-1"), "not UTF-8 (byte 2"),
    "latin1.jsonl": ('{"text": "Größe"}'.encode("latin-1"), "not UTF-8 (byte 12"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": "b"', "line 2 is not JSON"),
    "gap.jsonl": (b'{"text": "a"}\n\n{"text": "b"}\n', "line 2 is not JSON"),
    "other.jsonl": (b'{"text": "a"}\n{"text": "b"}\n{"content": "c"}\n', 'line 3 has no "text"'),
    "number.jsonl": (b'{"text": 7}\n', 'line 1 has no "text"'),
    "list.jsonl": (b'["text"]\n', 'line 1 has no "text"'),
}


@pytest.mark.parametrize("option", ["calib.path", "eval.path"])
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_at_once_in_one_line(tmp_path, name, option):
    content, problem = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(AssetError) as error:
        resolve_corpus("text", tmp_path / name, option=option)
    message = one_line(error)
    assert message.startswith(f"{option}={tmp_path / name}: ")
    assert problem in message


def test_directories_and_other_suffixes_are_refused(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(AssetError, match="cannot be read") as error:
        resolve_corpus("text", tmp_path / "folder.txt")
    one_line(error)
    (tmp_path / "text.parquet").write_text("x")
    with pytest.raises(SpecError, match=r"calib.path=.*parquet: .*\.txt or \.jsonl"):
        resolve_corpus("text", tmp_path / "text.parquet")


@pytest.mark.parametrize("name", ["wikitext2", "ptb", "c4", "pileval", "c4-samples", ""])
def test_literature_names_are_never_served_by_a_substitute(name):
    with pytest.raises(SpecError) as error:
        resolve_corpus(name, option="eval.corpora")
    message = one_line(error)
    assert message.startswith(f"eval.corpora={name}: ")
    assert all(known in message for known in corpus_names())


def test_the_text_corpus_needs_a_path():
    with pytest.raises(SpecError, match=r"calib.path=null: .*needs"):
        resolve_corpus("text")


def test_a_wheels_corpus_is_known_without_being_there(tmp_path, monkeypatch):
    monkeypatch.setenv("QBENCH_CACHE", str(tmp_path / "cache"))
    found = {name: resolve_corpus(name) for name in corpora.WHEEL_CORPORA}
    assert not (tmp_path / "cache").exists()
    assert len({corpus.fingerprint for corpus in found.values()}) == 6
    monkeypatch.setattr(corpora, "read_wheel_file", lambda file: b"something else")
    with pytest.raises(AssetError, match=r"exllamav3==1\.6\.5"):
        found["c4-sample"].text()


def test_a_plan_needs_no_torch():
    code = (
        "import sys; from qbench.calibration.corpora import resolve_corpus; resolve_corpus('pydoc');"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_pydoc_is_every_topic_once_in_order():
    topics = corpora._topics()
    text = resolve_corpus("pydoc").text()
    places = [text.index(topics[name]) for name in sorted(topics)]
    assert len(text) == sum(map(len, topics.values())) + 2 * (len(topics) - 1)
    assert places[0] == 0
    held_out = resolve_corpus("pydoc-heldout").text()
    assert text.endswith(held_out)
    assert 0.05 < len(held_out) / len(text) < 0.2


def test_no_paragraph_is_both_trained_on_and_held_out():
    training, held_out = ([" ".join(p.split()) for p in text.split("\n\n")] for text in pydoc_split())
    assert not {p for p in training if p} & set(held_out)
    assert len(training) == len(set(training))
    assert held_out
    assert len(" ".join(training)) > 200_000


class RecordingTokenizer:
    """Stands for a tokenizer: code points as ids, after a leading BOS of -1; records the calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, text, **options):
        self.calls.append((text, options))
        return {"input_ids": [-1, *map(ord, text)]}


def test_the_whole_text_is_tokenized_at_once_with_the_defaults(tmp_path):
    (tmp_path / "t.txt").write_text("ab\n\nc")
    tokenizer = RecordingTokenizer()
    ids = tokenize(resolve_corpus("text", tmp_path / "t.txt"), tokenizer)
    assert ids.tolist() == [-1, 97, 98, 10, 10, 99]
    assert str(ids.dtype) == "torch.int64"
    assert tokenizer.calls == [("ab\n\nc", {"verbose": False})]


def test_every_calibration_file_names_a_corpus(pytestconfig):
    files = sorted((pytestconfig.rootpath / "conf" / "calib").glob("*.yaml"))
    assert {file.stem for file in files} == {"text", *corpus_names()} - {"pydoc-heldout"}
    for file in files:
        content = yaml.safe_load(file.read_text())
        assert list(content) == ["name", "path", "n", "length", "sampler", "shuffle", "seed"], file
        assert content["name"] == file.stem
        if file.stem != "text":
            assert isinstance(resolve_corpus(content["name"], content["path"]), Corpus)
