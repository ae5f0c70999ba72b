"""`eval=zeroshot` against lm-eval's own model class, definitions and results, on model=tiny with written items."""

import math
import random

import numpy as np
import pytest

from qbench.errors import EvaluationError
from qbench.evaluation.lm_eval import definitions, harness
from qbench.evaluation.lm_eval.scoring import score
from qbench.formats import Block, Int, TensorFormat
from qbench.formats.named import activation_format
from qbench.formats.scale import SCALES
from qbench.formats.scheme import CacheFormat, InputFormat
from tests.engine.helpers import tiny_windows
from tests.evaluation.subjects import full_precision, quantized
from tests.evaluation.zeroshot_items import build, measure, sentences, write_items

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    folder = tmp_path_factory.mktemp("items")
    write_items(folder)
    return folder


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return full_precision(tmp_path_factory.mktemp("cache"))


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
    (evaluation,) = build(items, [task])
    found = measure(evaluation, subject)
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

    text = sentences()
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

    text = sentences()
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
    (evaluation,) = build(items, ["lambada_openai"])
    found = measure(evaluation, subject)
    expected = _reference(evaluation, subject)["results"]["lambada_openai"]
    row = found["lambada_openai", "perplexity"]
    assert row.value == pytest.approx(expected["perplexity,none"], rel=1e-5)
    assert row.stderr == pytest.approx(expected["perplexity_stderr,none"], rel=1e-4)
    assert row.samples is None
    assert row.unit == "ppl"
    assert found["lambada_openai", "acc"].samples is not None


def test_rolling_perplexity(items, subject):
    (evaluation,) = build(items, ["wikitext"])
    found = measure(evaluation, subject)
    expected = _reference(evaluation, subject)["results"]["wikitext"]
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        row = found["wikitext", name]
        assert row.value == pytest.approx(expected[f"{name},none"], rel=1e-6)
        assert row.stderr is None
        assert row.samples is None


def test_generation_with_examples_and_filters(items, subject):
    (evaluation,) = build(items, ["gsm8k"], num_fewshot=2, limit=2)
    found = measure(evaluation, subject)
    expected = _reference(evaluation, subject, limit=2)["results"]["gsm8k"]
    assert {name for _, name in found} == {"exact_match,strict-match", "exact_match,flexible-extract"}
    for (_, name), row in found.items():
        assert row.value == expected[name]
        assert row.protocol == "2-shot"
        assert row.n == 2


def test_examples_are_those_of_lm_eval(items, subject):
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    assert harness.FEWSHOT_SEED == DEFAULT_OTHER_SEED
    (evaluation,) = build(items, ["arc_easy"], num_fewshot=3, limit=10)
    found = measure(evaluation, subject)
    expected = _reference(evaluation, subject, limit=10)["results"]["arc_easy"]
    assert found["arc_easy", "acc"].value == expected["acc,none"]
    assert found["arc_easy", "acc_norm"].value == expected["acc_norm,none"]


def test_a_group_is_the_sum_of_its_tasks(items, subject, monkeypatch):
    from lm_eval.api.metrics import pooled_sample_stderr

    known = definitions.installed()
    leaves = [known.resolve(name)[0] for name in ("mmlu_abstract_algebra", "mmlu_anatomy")]
    small = definitions.Group("mmlu_two", tuple(leaves), ({"metric": "acc", "weight_by_size": True},))
    monkeypatch.setattr(definitions.Definitions, "resolve", lambda self, name: (small,))
    (evaluation,) = build(items, ["mmlu_two"])
    found = measure(evaluation, subject)
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
    (alone,) = build(items, ["mmlu_anatomy"])
    assert alone.spec.key() == found["mmlu_anatomy", "acc"].spec_key


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
    noise = sorted(abs(a[0] - b[0]) for a, b in zip(alone, together, strict=True))
    # Where float noise meets a tie, a rounding decision flips, for all pairs of that context. What leaked through
    # padding or a shared cache would change every context but one.
    assert noise[len(pairs) // 2] < 1e-4 * change
    assert noise[-1] < 0.1 * change


def test_contexts_are_shared_only_where_the_cache_is_what_it_seems(items, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "qbench.evaluation.lm_eval.adapter.score",
        lambda model, pairs, share, **rest: seen.append(share) or [(0.0, False)] * len(pairs),
    )
    (evaluation,) = build(items, ["piqa"], limit=3)
    measure(evaluation, full_precision(tmp_path))
    measure(evaluation, quantized(tmp_path, 4, cache=KIVI))
    measure(evaluation, quantized(tmp_path, 4, inputs=TOKEN))
    assert seen == [True, False, True]


def test_generation_goes_through_the_quantized_cache(items, tmp_path):
    (evaluation,) = build(items, ["gsm8k"], num_fewshot=0, limit=1)
    subject = quantized(tmp_path, 4, cache=KIVI)
    assert measure(evaluation, subject)["gsm8k", "exact_match,strict-match"].n == 1
    kinds = []
    with subject.decoding() as (_, empty):
        kinds.append(type(empty()).__name__)
    assert kinds == ["QuantizedCache"]


def test_limit_takes_the_first_items(items, subject):
    (whole,), (first,) = build(items, ["piqa"]), build(items, ["piqa"], limit=7)
    everything, some = measure(whole, subject)["piqa", "acc"], measure(first, subject)["piqa", "acc"]
    assert some.n == 7
    assert np.array_equal(everything.samples[:7], some.samples)


def test_nothing_is_printed_and_nothing_stays_changed(items, subject, capfd):
    import logging

    from tqdm import tqdm

    before = tqdm.__init__, logging.getLogger("lm_eval").level
    (evaluation,) = build(items, ["piqa"], limit=3)
    measure(evaluation, subject)
    assert capfd.readouterr() == ("", "")
    assert (tqdm.__init__, logging.getLogger("lm_eval").level) == before


def test_values_are_plain_numbers(items, subject):
    (evaluation,) = build(items, ["piqa"])
    for row in measure(evaluation, subject).values():
        assert type(row.value) is float
        assert math.isfinite(row.stderr)
        assert row.samples.dtype == np.float64
