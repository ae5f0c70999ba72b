"""`eval=zeroshot` against lm-eval's own model class, definitions and results, on model=tiny with written items."""

import json
import math
import random

import numpy as np
import pytest

from qbench.calibration.corpora import pydoc_split
from qbench.errors import AssetError, EvaluationError, SpecError
from qbench.evaluation.lm_eval import build, data, definitions, harness
from qbench.evaluation.lm_eval.scoring import score
from qbench.formats import Block, Int, TensorFormat
from qbench.formats.named import activation_format
from qbench.formats.scale import SCALES
from qbench.formats.scheme import CacheFormat, InputFormat
from tests.engine.helpers import tiny_windows
from tests.evaluation.subjects import FakeContext, full_precision, quantized

pytest.importorskip("lm_eval")

DEFAULTS = {"tasks": ["piqa"], "limit": None, "num_fewshot": None, "data_dir": None, "batch": None}


def _sentences():
    words = pydoc_split()[1].split()
    place, draw = 0, random.Random(0)
    while True:
        size = draw.randint(1, 12)
        yield " ".join(words[place : place + size])
        place += size


def _write(folder, task, split, rows):
    (folder / task).mkdir(exist_ok=True)
    (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """Items of several tasks in the hub's schemas; labels are drawn."""
    folder, text, draw = tmp_path_factory.mktemp("items"), _sentences(), random.Random(1)
    piqa = [{"goal": next(text), "sol1": next(text), "sol2": next(text), "label": draw.randrange(2)} for _ in range(30)]
    _write(folder, "piqa", "validation", piqa)
    for task in ("arc_easy", "arc_challenge"):
        rows = []
        for _ in range(25):
            labels = ["A", "B", "C", "D"][: draw.randint(3, 4)]
            choices = {"text": [next(text) for _ in labels], "label": labels}
            rows.append({"id": "x", "question": next(text), "choices": choices, "answerKey": draw.choice(labels)})
        _write(folder, task, "test", rows)
        _write(folder, task, "train", rows[:9])
    boolq = [{"question": next(text), "passage": next(text), "idx": 0, "label": draw.randrange(2)} for _ in range(20)]
    _write(folder, "boolq", "validation", boolq)
    wino = []
    for _ in range(20):
        sentence = f"{next(text)} _ {next(text)}"
        wino.append({"sentence": sentence, "option1": next(text), "option2": next(text), "answer": draw.choice("12")})
    _write(folder, "winogrande", "validation", wino)
    hella = []
    for place in range(20):
        row = {
            "ind": place,
            "activity_label": next(text),
            "ctx_a": next(text),
            "ctx_b": next(text),
            "ctx": "",
            "split": "val",
        }
        row |= {
            "endings": [next(text) for _ in range(4)],
            "label": str(draw.randrange(4)),
            "source_id": "",
            "split_type": "",
        }
        hella.append(row)
    _write(folder, "hellaswag", "validation", hella)
    _write(folder, "lambada_openai", "test", [{"text": f"{next(text)} {next(text)} end"} for _ in range(12)])
    _write(folder, "wikitext", "test", [{"page": (next(text) + "\n") * 60} for _ in range(3)])
    gsm = [{"question": next(text), "answer": f"so it is #### {draw.randrange(9)}"} for _ in range(5)]
    _write(folder, "gsm8k", "test", gsm)
    _write(folder, "gsm8k", "train", gsm * 3)
    for subject in ("mmlu_abstract_algebra", "mmlu_anatomy"):
        rows = [
            {
                "question": next(text),
                "choices": [next(text) for _ in range(4)],
                "answer": draw.randrange(4),
                "subject": "s",
            }
            for _ in range(8 if subject.endswith("anatomy") else 12)
        ]
        _write(folder, subject, "test", rows)
        _write(folder, subject, "dev", rows[:5])
    return folder


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return full_precision(tmp_path_factory.mktemp("cache"))


def _build(items, tasks, **options):
    return build({**DEFAULTS, "tasks": tasks, "data_dir": str(items), **options}, "memory")


def _measure(evaluation, subject):
    evaluation.preflight(subject.context)
    return {(row.task, row.name): row for row in evaluation.measure(subject, lambda done, total: None)}


def _reference(evaluation, subject, limit=None):
    """The same tasks with lm-eval's own class for transformers models and its own standard errors."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from qbench.evaluation.lm_eval.harness import loaded

    lm = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=3)
    with loaded(evaluation.tasks) as tasks:
        for task in tasks.values():
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        return evaluate(lm, {"tasks": tasks}, limit=limit, bootstrap_iters=100_000)


@pytest.mark.parametrize("task", ["piqa", "arc_easy", "arc_challenge", "boolq", "winogrande", "hellaswag"])
def test_gives_what_lm_eval_gives(task, items, subject):
    (evaluation,) = _build(items, [task])
    found = _measure(evaluation, subject)
    expected = _reference(evaluation, subject)["results"][task]
    names = {key.partition(",")[0] for key in expected if key.endswith(",none")} - {"acc_stderr", "acc_norm_stderr"}
    assert {name for _, name in found} == names
    assert "acc" in names
    for (_, name), row in found.items():
        assert row.value == expected[f"{name},none"]
        assert row.stderr == expected[f"{name}_stderr,none"]
        assert row.samples.mean() == row.value
        assert row.n == len(row.samples)
        assert row.unit == "fraction"
        assert row.protocol == "0-shot"
        assert row.spec_key == evaluation.spec.key()


def test_log_likelihoods_and_greedy_flags_are_those_of_its_own_class(items, subject):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from qbench.evaluation.lm_eval.adapter import SubjectLM

    text = _sentences()
    pairs = [
        ("", next(text)),
        (next(text) + "  ", next(text)),
        ("a" * 3, " b"),
        (next(text), " a"),
        (next(text), " a b"),
    ]
    context = " ".join(next(text) for _ in range(200))  # more than the model reads
    pairs += [(context, " " + next(text)) for _ in range(3)] + [(next(text), " " + next(text)) for _ in range(20)]
    requests = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]
    ours = SubjectLM(subject, None, lambda done, total: None)
    assert len(ours.tok_encode(context)) > ours.max_length
    theirs = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=1)
    found, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4, rel=1e-6)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in (context, "a b c")]
    rolling = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(rolling, rel=1e-6)


def test_generates_what_its_own_class_generates(items, subject):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from qbench.evaluation.lm_eval.adapter import SubjectLM

    text = _sentences()
    wishes = [{"until": ["\n\n", "the"], "max_gen_toks": 24}, {"until": "\n", "max_gen_toks": 9}]
    requests = [Instance("generate_until", {}, (next(text), wishes[place % 2]), 0) for place in range(10)]
    done = []
    ours = SubjectLM(subject, None, lambda done_, total: done.append((done_, total)))
    theirs = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=1)
    assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)
    assert done[-1] == (10, 10)
    sampled = Instance("generate_until", {}, ("a", {"do_sample": True, "temperature": 1.0}), 0)
    with pytest.raises(EvaluationError, match="sampled"):
        ours.generate_until([sampled])


def test_metrics_that_are_no_means_and_bootstrapped_errors(items, subject):
    (evaluation,) = _build(items, ["lambada_openai"])
    found = _measure(evaluation, subject)
    expected = _reference(evaluation, subject)["results"]["lambada_openai"]
    row = found["lambada_openai", "perplexity"]
    assert row.value == pytest.approx(expected["perplexity,none"], rel=1e-5)
    assert row.stderr == pytest.approx(expected["perplexity_stderr,none"], rel=1e-4)
    assert row.samples is None
    assert row.unit == "ppl"
    assert found["lambada_openai", "acc"].samples is not None


def test_rolling_perplexity(items, subject):
    (evaluation,) = _build(items, ["wikitext"])
    found = _measure(evaluation, subject)
    expected = _reference(evaluation, subject)["results"]["wikitext"]
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        row = found["wikitext", name]
        assert row.value == pytest.approx(expected[f"{name},none"], rel=1e-6)
        assert row.stderr is None
        assert row.samples is None


def test_generation_with_examples_and_filters(items, subject):
    (evaluation,) = _build(items, ["gsm8k"], num_fewshot=2, limit=2)
    found = _measure(evaluation, subject)
    expected = _reference(evaluation, subject, limit=2)["results"]["gsm8k"]
    assert {name for _, name in found} == {"exact_match,strict-match", "exact_match,flexible-extract"}
    for (_, name), row in found.items():
        assert row.value == expected[name]
        assert row.protocol == "2-shot"
        assert row.n == 2


def test_examples_are_those_of_lm_eval(items, subject):
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    assert harness.FEWSHOT_SEED == DEFAULT_OTHER_SEED
    (evaluation,) = _build(items, ["arc_easy"], num_fewshot=3, limit=10)
    found = _measure(evaluation, subject)
    expected = _reference(evaluation, subject, limit=10)["results"]["arc_easy"]
    assert found["arc_easy", "acc"].value == expected["acc,none"]
    assert found["arc_easy", "acc_norm"].value == expected["acc_norm,none"]


def test_a_group_is_the_sum_of_its_tasks(items, subject, monkeypatch):
    from lm_eval.api.metrics import pooled_sample_stderr

    known = definitions.installed()
    leaves = [known.resolve(name)[0] for name in ("mmlu_abstract_algebra", "mmlu_anatomy")]
    small = definitions.Group("mmlu_two", tuple(leaves), ({"metric": "acc", "weight_by_size": True},))
    monkeypatch.setattr(definitions.Definitions, "resolve", lambda self, name: (small,))
    (evaluation,) = _build(items, ["mmlu_two"])
    found = _measure(evaluation, subject)
    parts = [found[leaf.name, "acc"] for leaf in leaves]
    whole = found["mmlu_two", "acc"]
    assert [part.n for part in parts] == [12, 8]
    assert whole.n == 20
    assert whole.value == pytest.approx(sum(part.value * part.n for part in parts) / 20, abs=1e-12)
    assert np.array_equal(whole.samples, np.concatenate([part.samples for part in parts]))
    assert whole.stderr == pytest.approx(pooled_sample_stderr([p.stderr for p in parts], [12, 8]))
    assert len({row.spec_key for row in found.values()}) == 3
    assert whole.spec_key == evaluation.spec.key()
    monkeypatch.undo()
    (alone,) = _build(items, ["mmlu_anatomy"])
    assert alone.spec.key() == found["mmlu_anatomy", "acc"].spec_key


def test_real_groups_and_tags_are_found():
    known = definitions.installed()
    (mmlu,) = known.resolve("mmlu")
    assert len(mmlu.leaves) == 57
    assert len(mmlu.children) == 4
    assert [leaf.name for leaf in known.resolve("ai2_arc")] == ["arc_challenge", "arc_easy"]
    leaves = {each.name: each for each in known.resolve("openllm")}
    assert leaves["hellaswag"].config["num_fewshot"] == 10  # as the group sets it
    assert leaves["mmlu"].leaves[0].config["num_fewshot"] == 5


def test_the_index_is_that_of_lm_eval(tmp_path):
    """On one of its folders, where reading all takes it long."""
    from lm_eval.tasks import TaskManager

    known = definitions.installed()
    manager = TaskManager(include_defaults=False, include_path=str(known.folder / "mmlu" / "default"))
    index = definitions.scan(known.folder / "mmlu" / "default")
    assert index.keys() == set(manager.all_tasks)
    for name, (kind, path, members) in index.items():
        entry = manager.task_index[name]
        assert kind == {"TASK": "task", "PY_TASK": "task", "GROUP": "group", "TAG": "tag"}[entry.kind.name]
        assert (
            set(members) == entry.tags if kind == "tag" else known.folder / "mmlu" / "default" / path == entry.yaml_path
        )


KIVI = CacheFormat(
    key=TensorFormat(element=Int(2, signed=False), block=Block(4, 1), zero="float"),
    value=TensorFormat(element=Int(2, signed=False), block=Block(1, 8), zero="float"),
    residual=8,
    layout="kivi",
)
TOKEN = InputFormat(format=TensorFormat(element=Int(4, signed=True), block=Block(1, 0), scale=SCALES["float32"]))
NVFP4 = InputFormat(format=activation_format("nvfp4"))


@pytest.mark.parametrize(
    "scheme", [{"cache": KIVI}, {"inputs": TOKEN}, {"inputs": NVFP4}], ids=["kivi", "int4", "nvfp4"]
)
def test_what_is_quantized_at_run_time_does_not_depend_on_padding_and_sharing(scheme, tmp_path):
    subject = quantized(tmp_path, 8, windows=tiny_windows(2, 32), **scheme)  # nvfp4: one scale of its two is static
    draw = random.Random(3)
    contexts = [[draw.randrange(9, 200) for _ in range(size)] for size in (41, 40, 23, 7)]
    pairs = [(context, [draw.randrange(9, 200) for _ in range(draw.randint(1, 9))]) for context in contexts * 3]
    pairs.sort()
    with subject.quantized() as model:
        alone = [score(model, [pair], max_length=60)[0] for pair in pairs]
        together = score(model, pairs, max_length=60, share="inputs" in scheme)
    plain = score(subject.full_precision(), pairs, max_length=60)
    change = max(abs(a[0] - b[0]) for a, b in zip(alone, plain, strict=True))
    noise = max(abs(a[0] - b[0]) for a, b in zip(alone, together, strict=True))
    assert noise < 0.02 * change  # a rounding decision may flip where float noise meets a tie


def test_contexts_are_shared_only_where_the_cache_is_what_it_seems(items, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "qbench.evaluation.lm_eval.adapter.score",
        lambda model, pairs, share, **rest: seen.append(share) or [(0.0, False)] * len(pairs),
    )
    (evaluation,) = _build(items, ["piqa"], limit=3)
    _measure(evaluation, full_precision(tmp_path))
    _measure(evaluation, quantized(tmp_path, 4, cache=KIVI))
    _measure(evaluation, quantized(tmp_path, 4, inputs=TOKEN))
    assert seen == [True, False, True]


def test_generation_goes_through_the_quantized_cache(items, tmp_path):
    (evaluation,) = _build(items, ["gsm8k"], num_fewshot=0, limit=1)
    subject = quantized(tmp_path, 4, cache=KIVI)
    assert _measure(evaluation, subject)["gsm8k", "exact_match,strict-match"].n == 1
    kinds = []
    with subject.decoding() as (_, empty):
        kinds.append(type(empty()).__name__)
    assert kinds == ["QuantizedCache"]


def test_limit_and_key(items):
    def key(tasks=("piqa",), **options):
        return _build(items, list(tasks), **options)[0].spec.key()

    base = key()
    assert base == key(batch=7)
    different = {key(limit=5), key(limit=6), key(("arc_easy",)), key(("arc_easy",), num_fewshot=2)}
    assert len(different) == 4
    assert base not in different


def test_other_items_are_another_key(items, tmp_path):
    for folder, rows in (("a", 3), ("b", 4)):
        (tmp_path / folder).mkdir()
        _write(tmp_path / folder, "piqa", "validation", [{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}] * rows)
    one, two = (_build(tmp_path / folder, ["piqa"])[0].spec for folder in "ab")
    assert one.key() != two.key()
    assert one.fingerprint != two.fingerprint


def test_limit_takes_the_first_items(items, subject):
    (whole,), (first,) = _build(items, ["piqa"]), _build(items, ["piqa"], limit=7)
    everything, some = _measure(whole, subject)["piqa", "acc"], _measure(first, subject)["piqa", "acc"]
    assert some.n == 7
    assert np.array_equal(everything.samples[:7], some.samples)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tasks": ["winogrand"]}, "near: winogrande"),
        ({"tasks": ["piqa", "zzqqxx"]}, "no task of lm-eval"),
        ({"tasks": []}, "a list"),
        ({"tasks": "piqa"}, "a list"),
        ({"limit": 0}, "1 or more"),
        ({"limit": -3}, "1 or more"),
        ({"limit": 0.5}, "1 or more"),
        ({"num_fewshot": -1}, "0 or more"),
        ({"tasks": ["ai2_arc", "arc_easy"]}, "every task once"),
        ({"tasks": ["humaneval"]}, "generated code"),
    ],
)
def test_refuses_before_anything_is_loaded(options, says, items):
    with pytest.raises(SpecError, match=says) as caught:
        _build(items, **{"tasks": ["piqa"], **options})
    assert "\n" not in str(caught.value)


def test_missing_items_name_the_file_and_the_other_way(items, tmp_path):
    with pytest.raises(AssetError, match=r"openbookqa/test\.jsonl is missing; .*eval\.data_dir=null .*hub"):
        _build(items, ["openbookqa"])
    with pytest.raises(AssetError, match=r"piqa/train\.jsonl is missing, which the 2 examples come from"):
        _build(items, ["piqa"], num_fewshot=2)
    with pytest.raises(AssetError, match="no such folder"):
        _build(tmp_path / "nowhere", ["piqa"])
    with pytest.raises(SpecError, match="no split to take examples from"):
        _build(items, ["lambada_openai"], num_fewshot=2)


def test_an_unreachable_hub_names_the_folder_to_give(tmp_path, monkeypatch):
    leaf = definitions.installed().resolve("piqa")[0]
    monkeypatch.setenv("QBENCH_CACHE", str(tmp_path))

    def unreachable(self, *args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    with pytest.raises(AssetError, match=r"Name or service not known.*<folder>/piqa/<split>\.jsonl"):
        data.hub(leaf, 0)


def test_the_hub_s_revision_is_fixed_once(tmp_path, monkeypatch):
    leaf = definitions.installed().resolve("piqa")[0]
    monkeypatch.setenv("QBENCH_CACHE", str(tmp_path))
    asked = []

    class Info:
        sha = "c0ffee"

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, **k: asked.append(name) or Info)
    first, second = data.hub(leaf, 0), data.hub(leaf, 0)
    assert first == second
    assert asked == ["baber/piqa"]
    assert first.fields["dataset_kwargs"] == {"revision": "c0ffee"}


def test_damaged_items_are_refused_before_the_model_loads(items, tmp_path):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text('{"goal": "g", "sol1": "a"')
    (evaluation,) = _build(tmp_path, ["piqa"])
    with pytest.raises(AssetError, match="task piqa from") as caught:
        evaluation.preflight(FakeContext(tmp_path))
    assert "\n" not in str(caught.value)


def test_generation_needs_a_model_that_generates(items, tmp_path, subject):
    class Mute:
        config = subject.model.config

        def can_generate(self):
            return False

    (evaluation,) = _build(items, ["gsm8k"])
    with pytest.raises(SpecError, match="generates no text"):
        evaluation.preflight(FakeContext(tmp_path, skeleton=Mute()))


def test_nothing_is_printed_and_nothing_stays_changed(items, subject, capfd):
    import logging

    from tqdm import tqdm

    before = tqdm.__init__, logging.getLogger("lm_eval").level
    (evaluation,) = _build(items, ["piqa"], limit=3)
    _measure(evaluation, subject)
    assert capfd.readouterr() == ("", "")
    assert (tqdm.__init__, logging.getLogger("lm_eval").level) == before


def test_planning_imports_neither_lm_eval_nor_datasets(items):
    import subprocess
    import sys

    program = (
        "import sys\nfrom qbench.evaluation.lm_eval import build\n"
        f"build({ {**DEFAULTS, 'data_dir': str(items)}!r}, 'memory')\n"
        "assert not {'lm_eval', 'datasets'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_values_are_plain_numbers(items, subject):
    (evaluation,) = _build(items, ["piqa"])
    for row in _measure(evaluation, subject).values():
        assert type(row.value) is float
        assert math.isfinite(row.stderr)
        assert row.samples.dtype == np.float64
