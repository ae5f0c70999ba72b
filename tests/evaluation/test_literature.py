"""Literature definitions against the rows they are made of."""

import json
import random
import re

import numpy as np
import pytest
import torch

from qbench.calibration.documents import document_windows
from qbench.errors import AssetError, SpecError
from qbench.evaluation import literature, perplexity
from qbench.evaluation.literature import DocumentPerplexity, build, literature_text
from qbench.evaluation.perplexity import WindowPerplexity, window_nll
from qbench.models.load import load_model
from tests.engine.helpers import tiny_asset
from tests.evaluation.subjects import full_precision

OPTIONS = {"name": "wikitext2", "definition": "wikitext2", "path": None, "length": 16, "n": None, "batch": None}


@pytest.fixture(scope="module")
def model():
    return load_model(tiny_asset(), dtype=torch.float32, device="cpu")


def _write(path, rows, field="text"):
    path.write_text("".join(json.dumps({field: row}) + "\n" for row in rows))
    return str(path)


def _words(seed, count):
    generator = random.Random(seed)
    return " ".join(generator.choice(["alpha", "beta", "gamma", "delta", "epsilon"]) for _ in range(count))


def test_texts_are_joined_as_published():
    rows = ["", " = Title = \n", "", " Text . \n"]
    assert literature_text("wikitext2", rows, raw_lines=False) == "\n\n = Title = \n\n\n\n\n Text . \n"
    # The original file, whose blank lines hold a space, gives the same text.
    raw = [" ", " = Title = ", " ", " Text . "]
    assert literature_text("wikitext2", raw, raw_lines=True) == literature_text("wikitext2", rows, raw_lines=False)
    assert literature_text("ptb", ["a b", "c"], raw_lines=True) == "a b c"
    many = [str(number) for number in range(2000)]
    assert literature_text("c4_new", many, raw_lines=False) == " ".join(many[:1100])


@pytest.mark.parametrize(("definition", "field", "joint"), [("wikitext2", "text", "\n\n"), ("ptb", "sentence", " ")])
def test_the_number_is_that_of_the_text_itself(definition, field, joint, tmp_path, model):
    rows = [_words(seed, 30) for seed in range(6)]
    path = _write(tmp_path / "rows.jsonl", rows, field)
    (only,) = build({**OPTIONS, "definition": definition, "path": path}, "memory")
    assert isinstance(only, WindowPerplexity)
    assert (only.spec.task, only.spec.protocol) == (definition, "window-16")
    subject = full_precision(tmp_path, model)
    only.preflight(subject.context)
    (found,) = only.measure(subject, lambda done, total: None)
    ids = torch.tensor(subject.tokenizer(joint.join(rows))["input_ids"])
    windows = ids[: len(ids) // 16 * 16].view(-1, 16)
    assert found.samples == pytest.approx(window_nll(model, windows).numpy(), rel=1e-5)
    # The same measurement as that of a file that holds the text.
    (tmp_path / "joined.txt").write_text(joint.join(rows))
    plain = {"corpora": None, "path": str(tmp_path / "joined.txt"), "length": 16, "n": None, "mode": "prefill"}
    assert perplexity.build(plain, "memory")[0].spec.key() == only.spec.key()


def test_c4_takes_windows_of_single_documents(tmp_path, model):
    rows = [_words(seed, 5 + 9 * seed) for seed in range(5)]
    options = {**OPTIONS, "definition": "c4", "path": _write(tmp_path / "c4.jsonl", rows), "n": 7}
    (only,) = build(options, "memory")
    assert isinstance(only, DocumentPerplexity)
    assert only.spec.protocol == "documents-16"
    subject = full_precision(tmp_path, model)
    windows = only.windows(subject.context)
    assert windows.shape == (7, 16)
    tokenized = [subject.tokenizer(row)["input_ids"] for row in rows]
    for window in windows.tolist():
        assert any(window == ids[at : at + 16] for ids in tokenized for at in range(len(ids)))
    expected, _ = document_windows(rows, lambda text: subject.tokenizer(text)["input_ids"], 16, 7, 0)
    assert torch.equal(windows, expected)
    (found,) = only.measure(subject, lambda done, total: None)
    assert found.samples == pytest.approx(window_nll(model, windows).numpy(), rel=1e-6)
    assert build({**options, "n": None}, "memory")[0].spec.n == 256
    (joined,) = build({**options, "definition": "c4_new"}, "memory")
    assert joined.spec.protocol == "window-16"
    assert joined.spec.key() != only.spec.key()
    (longer,) = build({**options, "length": 10**5}, "memory")
    with pytest.raises(SpecError, match=r"eval.length=100000: less than \d+, the tokens of the longest document"):
        longer.preflight(subject.context)


def test_streams_can_be_measured(tmp_path):
    """Whatever reads whole windows works with a model that is read block by block."""
    path = _write(tmp_path / "rows.jsonl", [_words(0, 100)])
    for definition in literature.DEFINITIONS:
        assert build({**OPTIONS, "definition": definition, "path": path}, "stream")[0].streams


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({}, SpecError, "eval.path=null: with eval=wikitext2: the path of a .jsonl or .txt file"),
        ({"definition": "pile"}, SpecError, "eval.definition=pile: must be one of wikitext2, ptb, c4, c4_new"),
        ({"path": "missing.jsonl"}, AssetError, "eval.path=missing.jsonl: no such file"),
        ({"length": 1}, SpecError, "eval.length=1"),
        ({"n": 0}, SpecError, "eval.n=0"),
    ],
)
def test_bad_options_are_refused_in_one_line(change, error, message):
    with pytest.raises(error, match=re.escape(message)):
        build({**OPTIONS, **change}, "memory")


def test_windows_of_one_document_are_one_cluster(tmp_path, model):
    """The standard error of a text with documents counts them, whatever stands between them."""
    rows = [f"Row {number} says that {number} follows {number - 1}, as it always has. " * 6 for number in range(1, 9)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"sentence": row, "text": row}) + "\n" for row in rows))
    options = {"path": str(path), "length": 16, "n": None, "batch": None}
    for name in ("wikitext2", "ptb"):
        (evaluation,) = build({**options, "name": name, "definition": name}, "memory")
        (found,) = evaluation.measure(full_precision(tmp_path, model), lambda done, total: None)
        groups = np.unique(found.clusters)
        assert len(groups) == len(rows)
        assert (np.diff(found.clusters) >= 0).all()
        sums = np.array([(found.samples - found.samples.mean())[found.clusters == each].sum() for each in groups])
        expected = np.sqrt((sums**2).sum() * len(groups) / (len(groups) - 1)) / found.n
        assert found.stderr == pytest.approx(found.value * expected)
