"""Rows in the hub's schema reach OpenCompass's loaders as they are; what is missing is named."""

import json

import pytest

from qbench.errors import AssetError
from qbench.evaluation.opencompass.data import CONVERSIONS, locate

ROWS = {
    "piqa": [
        {"goal": "Öffne {it}", "sol1": "so", "sol2": "or", "label": 1},
        {"goal": "b", "sol1": "x\ny", "sol2": "z", "label": 0},
    ],
    "winogrande": [{"sentence": "A _ b", "option1": "x", "option2": "y", "answer": "2"}],
    "arc_easy": [
        {"id": "1", "question": "Q?", "choices": {"text": list("wxyz"), "label": list("1234")}, "answerKey": "3"}
    ],
    "hellaswag": [
        {
            "activity_label": "Cleaning",
            "ctx_a": "A man [step] sits [title] and then",
            "ctx_b": "he",
            "endings": ["goes [substeps] on.", "b", "c", "d"],
            "label": "2",
        }
    ],
    "boolq": [{"question": "is it", "passage": "It is.", "label": 1}, {"question": "q", "passage": "p", "label": 0}],
}
SPLITS = {"arc_easy": "test"}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "hub"
    for task, rows in ROWS.items():
        file = root / task / f"{SPLITS.get(task, 'validation')}.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def _prepared(folder, path, tmp_path):
    return locate("name", [path], folder).prepared(tmp_path / "scratch") / path


def _rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_piqa_has_questions_and_labels_apart_in_both_splits(folder, tmp_path):
    target = _prepared(folder, "data/piqa", tmp_path)
    for split in ("train", "dev"):
        labels = (target / f"{split}-labels.lst").read_text().split()
        rows = _rows(target / f"{split}.jsonl")
        assert all(isinstance(row.pop("id"), str) for row in rows)
        assert [{**row, "label": int(label)} for row, label in zip(rows, labels, strict=True)] == ROWS["piqa"]


def test_winogrande_is_as_it_was(folder, tmp_path):
    assert _rows(_prepared(folder, "data/winogrande", tmp_path) / "dev.jsonl") == ROWS["winogrande"]


def test_arc_pairs_choices_with_labels(folder, tmp_path):
    (row,) = _rows(_prepared(folder, "data/ARC/ARC-e/ARC-Easy-Dev.jsonl", tmp_path))
    assert row["question"]["stem"] == "Q?"
    assert [(c["label"], c["text"]) for c in row["question"]["choices"]] == list(zip("1234", "wxyz", strict=True))
    assert row["answerKey"] == "3"


def test_hellaswag_has_one_line_of_context_without_tags(folder, tmp_path):
    (row,) = _rows(_prepared(folder, "data/hellaswag/hellaswag.jsonl", tmp_path))
    assert row["query"] == "Cleaning: A man sits. and then He"
    assert row["choices"] == ["goes on.", "b", "c", "d"]
    assert row["gold"] == 2


def test_boolq_spells_the_answer(folder, tmp_path):
    rows = _rows(_prepared(folder, "data/SuperGLUE/BoolQ/val.jsonl", tmp_path))
    assert [(row["question"], row["passage"], row["label"]) for row in rows] == [
        ("is it", "It is.", "true"),
        ("q", "p", "false"),
    ]


def test_the_fingerprint_is_that_of_the_contents_not_of_the_place(folder, tmp_path):
    first = locate("piqa", ["data/piqa"], folder).fingerprint()
    moved = folder.rename(tmp_path / "elsewhere")
    assert locate("piqa", ["data/piqa"], moved).fingerprint() == first
    (moved / "piqa" / "validation.jsonl").write_text(json.dumps(ROWS["piqa"][0]))
    assert locate("piqa", ["data/piqa"], moved).fingerprint() != first


def test_its_own_layout_is_read_where_it_is(tmp_path):
    (tmp_path / "data" / "piqa").mkdir(parents=True)
    (tmp_path / "data" / "piqa" / "dev.jsonl").write_text("{}")
    located = locate("piqa", ["data/piqa"], tmp_path)
    assert located.prepared(tmp_path / "scratch") == tmp_path
    prints = {located.fingerprint()}
    for name, text in [("dev-labels.lst", "0"), ("dev-labels.lst", "1"), ("dev.jsonl", "{ }"), ("inner/a", "1")]:
        (tmp_path / "data" / "piqa" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / "piqa" / name).write_text(text)
        prints.add(located.fingerprint())
    assert len(prints) == 5


def test_what_is_missing_is_named(folder, tmp_path, monkeypatch):
    (folder / "piqa" / "validation.jsonl").unlink()
    monkeypatch.setenv("COMPASS_DATA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own" / "data").mkdir(parents=True)
    for root, path, looked in [
        (folder, "data/piqa", folder / "piqa" / "validation.jsonl"),
        (folder, "data/race", folder / "data" / "race"),
        (tmp_path / "own", "data/piqa", tmp_path / "own" / "data" / "piqa"),
        (None, "data/piqa", tmp_path / "cache" / "data" / "piqa"),
    ]:
        with pytest.raises(AssetError, match="no data for name") as raised:
            locate("name", [path], root)
        assert str(looked) in str(raised.value)
        assert f"eval.data_dir={'null' if root is None else root}:" in str(raised.value)
        assert "\n" not in str(raised.value)
    with pytest.raises(AssetError, match="no such folder"):
        locate("piqa", ["data/piqa"], tmp_path / "nowhere")


def test_rows_of_another_schema_are_refused(folder, tmp_path):
    (folder / "piqa" / "validation.jsonl").write_text('{"question": 1}\n')
    with pytest.raises(AssetError, match=r"validation\.jsonl: not in the schema of piqa"):
        _prepared(folder, "data/piqa", tmp_path)


def test_every_conversion_reads_a_task_of_its_own_schema():
    for path, conversion in CONVERSIONS.items():
        rows = ROWS["arc_easy" if conversion.task.startswith("arc") else conversion.task]
        assert all(text.endswith("\n") for text in conversion.convert(rows).values()), path
