"""A named dataset becomes an identity; the decoded weights reach OpenCompass; its scores come back as measurements."""

import json

import numpy as np
import pytest
import torch

from qbench.errors import AssetError, EvaluationError, SpecError
from qbench.evaluation import evaluator
from qbench.evaluation.opencompass import evaluator as module
from qbench.evaluation.opencompass.driver import TaskFailed
from tests.evaluation.opencompass.fakes import PIQA, RACE, Fake, outputs, part
from tests.evaluation.subjects import FakeContext, quantized

ROW = {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}


@pytest.fixture(autouse=True)
def fake(tmp_path, monkeypatch):
    monkeypatch.setenv("QBENCH_CACHE", str(tmp_path / "cache"))
    fake = Fake(tmp_path / "environment")
    monkeypatch.setattr(module, "require_environment", lambda: fake.environment)
    return fake


@pytest.fixture
def data(tmp_path):
    for name in ("piqa", "race", "lambada"):
        (tmp_path / "own" / "data" / name).mkdir(parents=True)
        (tmp_path / "own" / "data" / name / "test.jsonl").write_text("{}")
    (tmp_path / "hub" / "piqa").mkdir(parents=True)
    (tmp_path / "hub" / "piqa" / "validation.jsonl").write_text(json.dumps(ROW))
    return tmp_path / "own"


def build(data, **options):
    values = {"name": "opencompass", "datasets": ["piqa"], "limit": None, "data_dir": str(data), "batch": None}
    return evaluator("opencompass").build(values | options, "memory")


def test_every_dataset_is_a_measurement_of_its_own(data):
    found = build(data, datasets=["piqa", "race", "piqa"], limit=20)
    assert [each.spec.task for each in found] == ["piqa", "race"]
    assert [each.spec.protocol for each in found] == ["ppl-1cf9f0", "ppl-1cf9f0"]
    assert {each.spec.n for each in found} == {20}
    assert len({each.spec.key() for each in found}) == 2


def test_the_identity_is_items_prompts_and_version(data, fake, monkeypatch):
    def key(**options):
        return build(data, **options)[0].spec.key()

    before = key()
    assert key(datasets=[PIQA]) == before  # a name is a label
    assert key(batch=3) == before
    assert key(limit=5) != before
    (data / "data" / "piqa" / "test.jsonl").write_text("{ }")
    assert key() != before
    (data / "data" / "piqa" / "test.jsonl").write_text("{}")
    assert key() == before
    with monkeypatch.context() as patch:
        patch.setattr(module, "OPENCOMPASS_VERSION", "9")
        assert key() != before
    next(fake.folder.glob(f"described-*/{PIQA}.json")).write_text(json.dumps([{**part(), "definition": "another"}]))
    assert key() != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"datasets": []}, "eval.datasets="),
        ({"datasets": "piqa"}, "eval.datasets=piqa: a list"),
        ({"datasets": ["piqua"]}, "eval.datasets=piqua: no dataset of OpenCompass; near: piqa"),
        ({"limit": 0}, "eval.limit=0: must be an integer, 1 or more"),
        ({"limit": True}, "eval.limit=true: must be an integer"),
    ],
)
def test_what_makes_no_sense_is_refused(data, options, message):
    with pytest.raises(SpecError, match=f"^{message}"):
        build(data, **options)


def test_without_environment_or_data_it_is_refused(data, monkeypatch, tmp_path):
    with pytest.raises(AssetError, match="no data for race; looked for"):
        build(tmp_path / "hub", datasets=["race"])
    monkeypatch.undo()
    monkeypatch.setenv("QBENCH_CACHE", str(tmp_path / "empty"))
    with pytest.raises(AssetError, match="run qbench doctor --install opencompass"):
        build(data)


def test_what_a_checkpoint_cannot_say_is_refused_before_loading(data, tmp_path):
    class RunTime(FakeContext):
        def quantizes_at_run_time(self):
            return "inputs"

    (evaluation,) = build(data)
    evaluation.preflight(FakeContext(tmp_path))
    with pytest.raises(SpecError, match=r"^eval=opencompass: .*cannot say inputs"):
        evaluation.preflight(RunTime(tmp_path))


def test_generation_needs_a_model_that_generates(data, tmp_path):
    class Mute:
        def can_generate(self):
            return False

    (data / "data" / "lambada" / "test.jsonl").write_text("{}")
    (evaluation,) = build(data, datasets=["lambada"])
    with pytest.raises(SpecError, match=r"eval\.datasets=lambada: a model that generates; tiny does not"):
        evaluation.preflight(FakeContext(tmp_path, skeleton=Mute()))
    build(data)[0].preflight(FakeContext(tmp_path, skeleton=Mute()))


def test_rows_of_another_schema_are_refused_before_loading(data, tmp_path):
    hub = tmp_path / "hub"
    build(hub)[0].preflight(FakeContext(tmp_path))
    (hub / "piqa" / "validation.jsonl").write_text("{}")
    with pytest.raises(AssetError, match="not in the schema"):
        build(hub)[0].preflight(FakeContext(tmp_path))


def test_the_decoded_weights_are_scored(data, fake, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kept = tmp_path / "kept"
    fake.behave(files=outputs({"piqa": [True, False, True, True]}), keep=str(kept))
    subject = quantized(tmp_path, 3)
    (evaluation,) = build(data, limit=4)
    (found,) = evaluation.measure(subject, lambda done, total: None)

    assert (found.evaluator, found.protocol, found.task, found.name) == (
        "opencompass",
        "ppl-1cf9f0",
        "piqa",
        "accuracy",
    )
    assert (found.value, found.n, found.unit) == (0.75, 4, "fraction")
    assert found.stderr == pytest.approx(np.std([1, 0, 1, 1], ddof=1) / 2)
    assert found.samples.tolist() == [1, 0, 1, 1]
    assert found.spec_key == evaluation.spec.key()

    (call,) = [each["request"] for each in fake.calls if each["arguments"][0] == "run"]
    assert (call["limit"], call["model"]["max_seq_len"]) == (4, subject.model.config.max_position_embeddings)
    loaded = AutoModelForCausalLM.from_pretrained(kept, dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(kept)("a b").input_ids == subject.tokenizer("a b").input_ids
    ids = torch.arange(20)[None]
    with torch.no_grad(), subject.quantized() as model:
        wanted = model(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, wanted, rtol=0, atol=1e-5)
        assert (subject.model(ids).logits - wanted).abs().max() > 0.1  # and not those in full precision
    assert not list((tmp_path / "cache").glob("partial-*"))  # the checkpoint is gone


def test_parts_have_a_mean_as_opencompass_averages(data, fake, tmp_path):
    fake.behave(files=outputs({"race-middle": [True, False], "race-high": [True, True, True, False]}))
    found = build(data, datasets=["race"])[0].measure(quantized(tmp_path, 4), lambda done, total: None)
    assert [(each.task, each.name, each.n) for each in found] == [
        ("race-middle", "accuracy", 2),
        ("race-high", "accuracy", 4),
        ("race", "naive_average", 6),
    ]
    assert found[2].value == pytest.approx((0.5 + 0.75) / 2)
    assert found[2].stderr == pytest.approx(np.hypot(found[0].stderr, found[1].stderr) / 2)


def test_a_failure_brings_the_end_of_the_log(data, fake, tmp_path):
    fake.behave(log="KeyError: 'goal'\n", code=1)
    subject = quantized(tmp_path, 4)
    with pytest.raises(TaskFailed, match="opencompass piqa: KeyError: 'goal'; log: ") as raised:
        build(data)[0].measure(subject, lambda done, total: None)
    assert raised.value.log.is_relative_to(tmp_path / "opencompass-logs")
    assert isinstance(raised.value, EvaluationError)


def test_runtime_quantization_never_slips_through(data, tmp_path):
    subject = quantized(tmp_path, 4)
    subject.weights.running[0] = None
    with pytest.raises(EvaluationError, match="while it runs"):
        build(data)[0].measure(subject, lambda done, total: None)


def test_race_is_known_by_module_too(data):
    assert build(data, datasets=[RACE])[0].spec.key() == build(data, datasets=["race"])[0].spec.key()
