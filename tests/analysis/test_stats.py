import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import stats
from qbench.errors import EvaluationError

LOSSES = st.lists(st.floats(0.5, 12.0), min_size=2, max_size=30).map(np.array)


def windows(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Losses of two runs on the same n windows: hard windows are hard for both."""
    rng = np.random.default_rng(seed)
    hardness = rng.normal(3.0, 0.5, n)
    return hardness + rng.normal(0.2, 0.05, n), hardness + rng.normal(0.0, 0.02, n)


def test_perplexity_is_that_of_all_tokens_together():
    tokens = np.random.default_rng(0).exponential(3.0, (7, 11))  # 7 windows of 11 predicted tokens
    direct = np.prod(np.exp(tokens / tokens.size))  # the geometric mean of inverse probabilities
    assert stats.perplexity(tokens.mean(axis=1)).value == pytest.approx(direct, rel=1e-12)


def test_by_hand():
    found = stats.mean_nll(np.array([1.0, 2.0, 6.0]))
    assert (found.value, found.n) == (3.0, 3)
    assert found.stderr == pytest.approx(np.sqrt(7.0 / 3.0))  # variance (4 + 1 + 9) / 2
    assert stats.perplexity(np.log([2.0, 8.0])).value == pytest.approx(4.0)


def jackknife(statistic, *losses) -> float:
    """Standard error of a statistic of windows by leaving out one at a time: knows nothing of the delta
    method."""
    n = len(losses[0])
    left_out = np.array([statistic(*(np.delete(each, i) for each in losses)) for i in range(n)])
    return float(np.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum()))


def test_standard_errors_agree_with_the_jackknife():
    a, b = windows(400)
    ppl = lambda x: np.exp(x.mean())  # noqa: E731
    assert stats.perplexity(a).stderr == pytest.approx(jackknife(ppl, a), rel=0.01)
    assert stats.perplexity_difference(a, b).stderr == pytest.approx(
        jackknife(lambda x, y: ppl(x) - ppl(y), a, b), rel=0.01
    )
    assert stats.nll_difference(a, b).stderr == pytest.approx(
        jackknife(lambda x, y: x.mean() - y.mean(), a, b), rel=1e-9
    )


def test_the_paired_interval_covers_the_truth_as_often_as_it_says():
    truth = np.exp(3.2) - np.exp(3.0)
    hits = 0
    for seed in range(400):
        found = stats.perplexity_difference(*windows(200, seed))
        hits += abs(found.value - truth) <= 1.96 * found.stderr
    assert 0.92 <= hits / 400 <= 0.975


def test_pairing_removes_what_the_windows_share():
    a, b = windows(200)
    unpaired = np.hypot(stats.perplexity(a).stderr, stats.perplexity(b).stderr)
    assert stats.perplexity_difference(a, b).stderr < unpaired / 3


@given(LOSSES)
def test_a_run_does_not_differ_from_itself(losses):
    found = stats.perplexity_difference(losses, losses)
    assert (found.value, found.stderr) == (0.0, 0.0)


@given(LOSSES, st.data())
def test_swapping_runs_turns_the_sign_and_order_of_windows_does_not_matter(a, data):
    b = np.array(data.draw(st.lists(st.floats(0.5, 12.0), min_size=len(a), max_size=len(a))))
    for difference in (stats.perplexity_difference, stats.nll_difference):
        forth, back = difference(a, b), difference(b, a)
        assert forth.value == -back.value
        assert forth.stderr == pytest.approx(back.stderr)
        turned = difference(a[::-1], b[::-1])
        assert turned.value == pytest.approx(forth.value, rel=1e-9, abs=1e-6 * np.exp(12))
        assert turned.stderr == pytest.approx(forth.stderr, rel=1e-6, abs=1e-9)


def test_one_window_has_no_standard_error():
    one = np.array([2.0])
    for found in (stats.perplexity(one), stats.mean_nll(one), stats.perplexity_difference(one, one)):
        assert found.stderr is None
        assert found.n == 1


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.ones(3), np.ones(4)),
        (np.ones(0), np.ones(0)),
        (np.ones((2, 2)), np.ones((2, 2))),
        (np.array([1.0, np.nan]), np.ones(2)),
        (np.array([1.0, np.inf]), np.ones(2)),
        (np.array([800.0]), np.ones(1)),
    ],
)
def test_what_cannot_be_compared_is_refused(a, b):
    with pytest.raises(EvaluationError):
        stats.perplexity_difference(a, b)
