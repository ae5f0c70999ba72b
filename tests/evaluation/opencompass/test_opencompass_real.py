"""The real OpenCompass, where it is installed (`qbench doctor --install opencompass`): opt in with -m slow."""

import json
import re
import string

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from qbench.evaluation import evaluator
from qbench.evaluation.opencompass.driver import TaskFailed
from qbench.evaluation.opencompass.environment import find_environment
from tests.evaluation.subjects import FakeContext, quantized

pytestmark = pytest.mark.slow
WORDS = ("the", "list", "returns", "a", "new", "value", "when", "function", "is", "called", "with", "an", "empty")


@pytest.fixture(autouse=True)
def _wanted(request):
    if "slow" not in request.config.getoption("markexpr"):
        pytest.skip("takes a minute: -m slow")
    if find_environment() is None:
        pytest.skip("OpenCompass is not installed")


@pytest.fixture
def data(tmp_path):
    """Questions of different lengths, so that batches are padded."""
    rng = np.random.default_rng(0)

    def words():
        return " ".join(rng.choice(WORDS, size=rng.integers(2, 25)))

    rows = [{"goal": words(), "sol1": words(), "sol2": words(), "label": int(rng.integers(2))} for _ in range(12)]
    folder = tmp_path / "hub" / "piqa"
    folder.mkdir(parents=True)
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder.parent, rows


def build(data, *names, limit=None):
    options = {"name": "opencompass", "datasets": list(names), "limit": limit, "data_dir": str(data), "batch": None}
    return evaluator("opencompass").build(options, "memory")


def test_piqa_is_the_lower_of_two_perplexities(data, tmp_path):
    folder, rows = data
    subject = quantized(tmp_path, 3)
    (evaluation,) = build(folder, "piqa", limit=9)
    evaluation.preflight(FakeContext(tmp_path, skeleton=subject.model))
    reports = []
    (found,) = evaluation.measure(subject, lambda done, total: reports.append((done, total)))

    def loss(model, row, solution):
        text = f"The following makes sense: \nQ: {row['goal']}\nA: {row[solution]}\n"
        ids = subject.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            losses = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        return losses.item() / ids.shape[1]

    with subject.quantized() as model:
        chosen = [int(loss(model, row, "sol2") < loss(model, row, "sol1")) for row in rows[:9]]
    wanted = [float(each == row["label"]) for each, row in zip(chosen, rows, strict=False)]
    assert found.samples.tolist() == wanted
    assert found.value == pytest.approx(np.mean(wanted))
    assert found.n == 9
    assert reports[-1] == (4, 4)  # two labels, two batches each


def test_generation_continues_padded_prompts_as_single_ones(tmp_path):
    subject = quantized(tmp_path, 4)
    rng = np.random.default_rng(1)
    prompts = [" ".join(rng.choice(WORDS, size=size)) for size in (3, 40, 9, 21, 14, 5)]

    def first_word(prompt):
        ids = subject.tokenizer(f"Please complete the following sentence:\n{prompt}", return_tensors="pt").input_ids
        with subject.quantized() as model:
            made = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        text = subject.tokenizer.decode(made, skip_special_tokens=True).strip().split(" ")[0]
        return re.split(f"[{string.punctuation}]", text)[0]

    labels = [first_word(prompt) if place % 3 else "zzz" for place, prompt in enumerate(prompts)]
    file = tmp_path / "own" / "data" / "lambada" / "test.jsonl"
    file.parent.mkdir(parents=True)
    rows = [{"prompt": prompt, "label": label} for prompt, label in zip(prompts, labels, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (evaluation,) = build(tmp_path / "own", "lambada")
    (found,) = evaluation.measure(subject, lambda done, total: None)
    assert (found.protocol, found.n) == ("gen-217e11", 6)
    assert found.value == pytest.approx(4 / 6)


def test_the_log_of_a_broken_dataset_is_shown(data, tmp_path):
    folder, _ = data
    file = folder / "winogrande" / "validation.jsonl"
    file.parent.mkdir()
    file.write_text(json.dumps({"sentence": "No gap.", "option1": "a", "option2": "b", "answer": "1"}))
    with pytest.raises(TaskFailed, match="opencompass winogrande: IndexError: list index out of range") as raised:
        build(folder, "winogrande")[0].measure(quantized(tmp_path, 4), lambda done, total: None)
    assert "continue_prompt" in raised.value.log_tail
