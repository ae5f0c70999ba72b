"""Token distributions against scipy's divergence, and measuring them without a model."""

import json
import math
import sqlite3

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

import qbench.run
from qbench.__main__ import main
from qbench.calibration.corpora import resolve_corpus
from qbench.errors import EvaluationError, SpecError
from qbench.evaluation import literature, perplexity
from qbench.evaluation.token_kl import TokenDistance, build, shared_runs, token_distance
from qbench.models.load import load_model
from tests.engine.helpers import tiny_asset
from tests.evaluation.subjects import FakeContext

OPTIONS = {
    "name": "token_kl",
    "definition": None,
    "corpora": ["pydoc-heldout"],
    "path": None,
    "length": 64,
    "n": 6,
    "batch": None,
    "alpha": 0.1,
}
BASE = ["model=tiny", "bits=3", "calib=pydoc", "calib.n=3", "calib.length=32"]
TEXT = ["eval.corpora=[pydoc-heldout]", "eval.n=4", "eval.length=64"]


@pytest.fixture(scope="module")
def skeleton():
    return load_model(tiny_asset(), dtype=torch.float32, device="cpu")


def context_of(folder, skeleton, calib="pydoc", n=700):
    context = FakeContext(folder, skeleton=skeleton)
    ids = context.tokens(resolve_corpus(calib))[:n]
    return FakeContext(folder, skeleton=skeleton, ids=context.ids, windows=ids.view(7, -1), pipeline="gptq")


ids = st.lists(st.integers(0, 11), min_size=6, max_size=60)


@given(test=ids, calibration=ids, alpha=st.sampled_from([0.01, 0.1, 1, 3.5]))
def test_the_mean_over_windows_is_scipys_divergence(test, calibration, alpha):
    windows = torch.tensor(test[: len(test) // 3 * 3]).view(3, -1)
    distance, unseen = token_distance(windows, torch.tensor(calibration), 12, alpha)
    p = np.bincount(windows.ravel(), minlength=12)
    q = np.bincount(calibration, minlength=12) + alpha
    assert distance.mean() == pytest.approx(entropy(p, q), abs=1e-12)  # scipy makes shares of both
    assert distance.mean() >= -1e-12
    assert unseen.mean() == pytest.approx(np.mean([each not in calibration for each in windows.ravel().tolist()]))
    for row, some in zip(windows.tolist(), unseen, strict=True):
        assert some == pytest.approx(np.mean([each not in calibration for each in row]))


def test_the_same_tokens_are_at_no_distance_in_the_limit():
    tokens = torch.randint(50, (4, 100), generator=torch.Generator().manual_seed(0))
    found = [token_distance(tokens, tokens.flip(0, 1), 64, alpha)[0].mean() for alpha in (1, 1e-3, 1e-9)]
    assert found[0] > found[1] > found[2] >= -1e-12
    assert found[2] < 1e-8
    assert not token_distance(tokens, tokens, 64, 1)[1].any()


@given(st.lists(st.integers(0, 2), min_size=24, max_size=24), st.lists(st.integers(0, 2), min_size=12, max_size=12))
def test_shared_runs_are_those_that_a_search_finds(test, calibration):
    windows, calibrated = torch.tensor(test).view(3, 8), torch.tensor(calibration).view(2, 6)
    for run in (1, 3, 6, 7, 9):
        texts = ["".join(map(str, row)) for row in calibrated.tolist()]
        expected = []
        for row in windows.tolist():
            line = "".join(map(str, row))
            starts = [i for i in range(9 - run) if any(line[i : i + run] in text for text in texts)]
            expected.append(len({i + k for i in starts for k in range(run)}) / 8)
        assert shared_runs(windows, calibrated, run).tolist() == expected


def test_its_standard_error_is_that_of_the_mean_over_windows(skeleton, tmp_path):
    context = context_of(tmp_path, skeleton)
    (only,) = build(OPTIONS, "memory")
    only.preflight(context)
    kl, unseen, overlap = only.of_texts(context)
    windows = context.tokens(resolve_corpus("pydoc-heldout"))[: 6 * 64].view(6, 64)
    distance, share = token_distance(windows, context.windows, skeleton.config.vocab_size, 0.1)
    assert (kl.name, kl.unit, unseen.name, unseen.unit) == ("token_kl", "nats", "unseen_tokens", "share")
    assert (overlap.name, overlap.unit) == ("token_overlap", "share")
    assert (kl.protocol, kl.task, kl.n) == ("unigram-64", "pydoc-heldout", 6)
    for measured, samples in ((kl, distance), (unseen, share), (overlap, shared_runs(windows, context.windows))):
        assert measured.value == pytest.approx(samples.mean())
        assert measured.stderr == pytest.approx(samples.std(ddof=1) / math.sqrt(6))
        assert measured.samples.tolist() == samples.tolist()


def test_the_texts_own_calibration_is_nearest(skeleton, tmp_path):
    """The held-out half of a text is nearer to its other half than to another text, at equal numbers of tokens."""
    (only,) = build({**OPTIONS, "n": 40}, "memory")
    own, other = (
        only.of_texts(context_of(tmp_path, skeleton, calib, 7000))[0] for calib in ("pydoc", "tinystories-sample")
    )
    assert own.value < other.value - 5 * math.hypot(own.stderr, other.stderr)


def test_windows_of_documents_are_clustered(skeleton, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [f"row {number} " + "and more of it " * 30 for number in range(9)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (only,) = build({**OPTIONS, "path": str(path), "n": None}, "memory")
    (of,) = perplexity.build({**OPTIONS, "path": str(path), "n": None, "mode": "prefill"}, "memory")
    context = context_of(tmp_path, skeleton)
    found = only.of_texts(context)[0]
    assert found.clusters.tolist() == of.clusters(context, found.n).tolist()
    assert len(set(found.clusters.tolist())) > 1


@pytest.mark.parametrize("definition", ["wikitext2", "ptb", "c4", "c4_new"])
def test_literature_texts_are_read_as_their_perplexities_read_them(skeleton, tmp_path, definition):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {n} " + "and more of it " * 30}) + "\n" for n in range(9)))
    options = {**OPTIONS, "path": str(path), "definition": definition, "n": 3, "length": 40}
    (only,) = build(options, "memory")
    (of,) = literature.build(options, "memory")
    context = context_of(tmp_path, skeleton)
    assert torch.equal(only.of.windows(context), of.windows(context))
    assert (only.spec.task, only.spec.fingerprint) == (definition, of.spec.fingerprint)
    assert [each.n for each in only.of_texts(context)] == [3, 3, 3]


def test_what_makes_no_sense_is_refused_in_one_line(skeleton, tmp_path):
    for alpha in (0, -1, True, "x", math.nan, math.inf, None):
        with pytest.raises(SpecError, match=r"^eval.alpha=.*a number > 0"):
            build({**OPTIONS, "alpha": alpha}, "memory")
    with pytest.raises(SpecError, match=r"^eval.definition=odd: must be one of wikitext2"):
        build({**OPTIONS, "definition": "odd"}, "memory")
    (only,) = build(OPTIONS, "memory")
    with pytest.raises(SpecError, match=r"^eval=token_kl: a run that is calibrated; none looks at no text$"):
        only.preflight(FakeContext(tmp_path, skeleton=skeleton))
    with pytest.raises(SpecError, match=r"^eval.n=99999"):
        build({**OPTIONS, "n": 99999}, "memory")[0].preflight(context_of(tmp_path, skeleton))


def test_alpha_is_part_of_what_is_measured():
    specs = [build({**OPTIONS, "alpha": alpha}, "memory")[0].spec for alpha in (1, 1.0, 0.5)]
    assert specs[0].key() == specs[1].key() != specs[2].key()


def measured(*names):
    with sqlite3.connect("results/results.db") as connection:
        query = "select run_id, name, task, value, stderr from metric where name in ({}) order by run_id, task, name"
        return connection.execute(query.format(",".join("?" * len(names))), names).fetchall()


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A database with full precision (1), GPTQ (2) and round to nearest (3)."""
    monkeypatch.chdir(tmp_path)
    assert main(["-m", "algo=gptq,rtn", *TEXT, *BASE]) == 0


def test_a_finished_run_is_measured_without_being_rebuilt(finished, monkeypatch, capfd):
    def refuse(*_):
        raise AssertionError("carried out again")

    with monkeypatch.context() as patch:
        patch.setattr(qbench.run, "compute", refuse)
        patch.setattr("qbench.session.load_model", refuse)
        assert main(["eval", "2", "eval=token_kl", *TEXT]) == 0
        found = measured("token_kl", "unseen_tokens")
        assert [(run, name) for run, name, *_ in found] == [(2, "token_kl"), (2, "unseen_tokens")]
        assert "token KL, nats" in capfd.readouterr().out
        assert main(["eval", "2", "eval=token_kl", *TEXT]) == 0
        assert "Nothing to do" in capfd.readouterr().out
        assert main(["eval", "3", "eval=token_kl", *TEXT]) == 2
        assert "eval=token_kl: a run that is calibrated; rtn looks at no text" in capfd.readouterr().err
        assert main(["eval", "1", "eval=token_kl", *TEXT]) == 2
        assert measured("token_kl", "unseen_tokens") == found


def test_measured_with_the_run_in_memory_or_streamed_it_is_the_same_number(finished):
    both = [
        "eval=perplexity+token_kl",
        *(f"eval.{part}.{each[5:]}" for part in ("perplexity", "token_kl") for each in TEXT),
    ]
    assert main(["eval", "2", "eval=token_kl", *TEXT]) == 0
    ((_, *appended),) = measured("token_kl")
    for number, source in enumerate(("memory", "stream")):
        store = f"store.url=sqlite:///{source}.db"
        assert main(["algo=gptq", f"source={source}", store, *both, *BASE]) == 0
        with sqlite3.connect(f"{source}.db") as connection:
            query = "select algo, name, task, value, m.stderr from run r join metric m on m.run_id = r.id order by m.id"
            found = [(algo, *rest) for algo, *rest in connection.execute(query)]
        names = ("ppl", "token_kl", "unseen_tokens", "token_overlap")
        assert [each[:2] for each in found] == [("none", "ppl"), *(("gptq", name) for name in names)]
        assert found[2][1:] == tuple(appended), number


def test_shuffling_a_calibration_text_leaves_its_tokens_where_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shuffles = ["calib.shuffle=none,sentences,words,tokens", "calib.length=64"]
    assert main(["-m", "algo=gptq", *BASE[:-1], *shuffles, "eval=token_kl", *TEXT]) == 0
    values = [value for *_, value, _ in measured("token_kl")]
    assert len(values) == 4
    assert len(set(values)) == 1
    with sqlite3.connect("results/results.db") as connection:
        codes = connection.execute("select calib, codes_sha256 from run where calib_length = 64").fetchall()
    assert len({each for _, each in codes}) == 4
    assert {each for each, _ in codes} == {"pydoc", *(f"pydoc, {k} shuffled" for k in ("sentences", "words", "tokens"))}


def test_a_failure_is_recorded_and_costs_no_other_measurement(finished, monkeypatch):
    def fail(*_):
        raise EvaluationError("no such thing")

    monkeypatch.setattr(TokenDistance, "of_texts", fail)
    both = [
        "eval=perplexity+token_kl",
        "eval.perplexity.corpora=[pydoc]",
        "eval.perplexity.n=2",
        "eval.perplexity.length=32",
    ]
    assert main(["eval", "2", *both, "eval.token_kl.corpora=[pydoc]"]) == 1
    assert [(run, task) for run, _, task, *_ in measured("ppl") if task == "pydoc"] == [(1, "pydoc"), (2, "pydoc")]
    with sqlite3.connect("results/results.db") as connection:
        found = connection.execute("select run_id, evaluator, message from failure").fetchall()
    assert found == [(2, "token_kl", "no such thing")]
