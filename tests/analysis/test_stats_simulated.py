"""Intervals cover and tests reject as often as they say, in simulations with fixed seeds.

Bounds are those of the binomial distribution of the number of hits: a right procedure leaves them once in ten
thousand. Where a procedure is known to be off (exact tests are conservative, few clusters liberal) the bound says by
how much.
"""

import numpy as np
import pytest
from scipy.stats import binom

from analysis import stats

TRIALS = 1500


def in_bounds(hits: int, rate: float, trials: int = TRIALS) -> bool:
    return binom.ppf(5e-5, trials, rate) <= hits <= binom.ppf(1 - 5e-5, trials, rate)


def losses(n: int, seed: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """[TRIALS, n] losses of two runs on the same windows."""
    rng = np.random.default_rng(seed)
    hard = rng.normal(3.0, 0.5, (TRIALS, n))
    return hard + rng.normal(shift, 0.1, (TRIALS, n)), hard + rng.normal(0.0, 0.1, (TRIALS, n))


def answers(n: int, seed: int, gain: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """[TRIALS, n] right and wrong: half the items hard, half easy, for both runs."""
    rng = np.random.default_rng(seed)
    chance = np.where(np.arange(n) % 2, 0.45, 0.85)
    return (rng.random((TRIALS, n)) < chance + gain).astype(float), (rng.random((TRIALS, n)) < chance).astype(float)


def rejections(test, a: np.ndarray, b: np.ndarray, alpha: float = 0.05) -> int:
    return sum(test(x, y).p < alpha for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("n", [4, 20])
def test_intervals_of_means_and_differences_cover(n):
    a, b = losses(n, seed=1, shift=0.07)
    covered = {"mean": 0, "difference": 0, "ppl": 0}
    for x, y in zip(a, b, strict=True):
        low, high = stats.interval(stats.mean_nll(x), 0.9)
        covered["mean"] += low < 3.07 < high
        low, high = stats.interval(stats.nll_difference(x, y), 0.9)
        covered["difference"] += low < 0.07 < high
        low, high = stats.perplexity_interval(x, confidence=0.9)
        covered["ppl"] += low < np.exp(3.07) < high
    for name, hits in covered.items():
        assert in_bounds(hits, 0.9), (name, hits / TRIALS)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5])
def test_wilson_intervals_cover(share):
    """By enumeration: coverage is a sum over all outcomes. It swings about the nominal rate."""
    n = 220
    weights = binom.pmf(np.arange(n + 1), n, share)
    ends = [stats.wilson(k, n) for k in range(n + 1)]
    coverage = sum(w for w, (low, high) in zip(weights, ends, strict=True) if low <= share <= high)
    assert 0.93 < coverage < 0.98


@pytest.mark.parametrize("n", [3, 30])
def test_the_paired_t_test_rejects_no_more_than_it_says(n):
    assert in_bounds(rejections(stats.paired_t, *losses(n, seed=2)), 0.05)


def test_clusters_that_are_ignored_are_taken_for_evidence():
    rng = np.random.default_rng(3)
    clusters = np.repeat(np.arange(30), 5)
    shared = rng.normal(0.0, 0.1, (TRIALS, 30)).repeat(5, axis=1)
    a, b = shared + rng.normal(0.0, 0.1, (TRIALS, 150)), np.zeros((TRIALS, 150))
    aware = rejections(lambda x, y: stats.paired_t(x, y, clusters), a, b)
    assert in_bounds(aware, 0.05), aware / TRIALS
    assert rejections(stats.paired_t, a, b) > 3 * 0.05 * TRIALS


def test_clusters_of_unequal_size():
    rng = np.random.default_rng(4)
    sizes = rng.integers(1, 8, 40)
    clusters = np.repeat(np.arange(40), sizes)
    shared = np.repeat(rng.normal(0.0, 0.1, (TRIALS, 40)), sizes, axis=1)
    a = shared + rng.normal(0.0, 0.1, shared.shape)
    rate = rejections(lambda x, y: stats.paired_t(x, y, clusters), a, np.zeros_like(a)) / TRIALS
    assert 0.03 < rate < 0.075  # the t distribution is an approximation here


@pytest.mark.parametrize(("n", "method"), [(60, "exact"), (200, "exact"), (60, "chi2"), (200, "chi2"), (200, "auto")])
def test_mcnemar_rejects_no_more_than_it_says(n, method):
    hits = rejections(lambda x, y: stats.mcnemar(x, y, method), *answers(n, seed=5))
    assert hits <= binom.ppf(1 - 5e-5, TRIALS, 0.05), hits / TRIALS
    assert method == "exact" or hits >= binom.ppf(5e-5, TRIALS, 0.035), "discrete, but not as conservative as exact"


def test_mcnemar_finds_what_the_unpaired_test_misses():
    """Items hard for both runs: as in evaluations, outcomes go together."""
    rng = np.random.default_rng(6)
    hard = rng.random((TRIALS, 220)) < 0.5
    flip_a, flip_b = rng.random((2, TRIALS, 220))
    a, b = np.where(hard, flip_a < 0.2, flip_a < 0.95) * 1.0, np.where(hard, flip_b < 0.1, flip_b < 0.89) * 1.0
    paired = rejections(stats.mcnemar, a, b)
    unpaired = rejections(lambda x, y: stats.unpaired_z(stats.mean(x), stats.mean(y)), a, b)
    assert paired > 1.5 * unpaired


@pytest.mark.parametrize("clustered", [False, True])
def test_bootstrap_intervals_cover(clustered):
    trials, groups = 400, 40
    rng = np.random.default_rng(7)
    clusters = np.repeat(np.arange(groups), 3)
    shared = rng.normal(0.0, 0.1 if clustered else 0.0, (trials, groups)).repeat(3, axis=1)
    a = 3.0 + shared + rng.normal(0.0, 0.1, shared.shape)
    covered = rejected = 0
    for seed, x in enumerate(a):
        found = stats.paired_bootstrap(
            x, np.full(len(x), 3.0), clusters if clustered else None, link="exp_mean", resamples=499, seed=seed
        )
        covered += found.low < 0.0 < found.high
        rejected += found.p < 0.05
    # Percentile intervals of 40 clusters are a little short: √((G - 1) / G) and a normal for a t distribution.
    assert 0.90 * trials <= covered <= binom.ppf(1 - 5e-5, trials, 0.95)
    assert 0.02 * trials <= rejected <= 0.10 * trials


def test_the_bootstraps_p_value_is_small_where_the_difference_is_large():
    a, b = (each[0] for each in losses(40, seed=12, shift=1.0))
    assert stats.paired_bootstrap(a, b, resamples=999).p == 1 / 1000
    assert stats.paired_bootstrap(a, a, resamples=999).p == 1.0


@pytest.mark.parametrize(("shift", "rate"), [(0.05, 0.05), (0.0, None)])
def test_equivalence_is_claimed_wrongly_as_seldom_as_it_says(shift, rate):
    a, b = losses(60, seed=8, shift=shift)
    claimed = sum(stats.equivalence(stats.nll_difference(x, y), 0.05).p < 0.05 for x, y in zip(a, b, strict=True))
    if rate is None:
        assert claimed > 0.6 * TRIALS, "where there is no difference at all the test has power"
    else:
        assert in_bounds(claimed, rate), "a true difference at the margin is the hardest case"


def test_the_promised_power_is_had():
    spread = 0.1 * np.sqrt(2)
    effect = stats.smallest_effect(stats.Estimate(value=0.0, stderr=spread / np.sqrt(20), n=20))
    assert in_bounds(rejections(stats.paired_t, *losses(20, seed=9, shift=effect)), 0.8)


def test_holm_keeps_the_chance_of_any_false_rejection():
    rng = np.random.default_rng(10)
    any_rejected = none_corrected = 0
    for _ in range(TRIALS):
        shared = rng.normal(3.0, 0.5, 30)
        base = shared + rng.normal(0.0, 0.1, 30)  # one baseline for all: the tests depend on each other
        p_values = [stats.paired_t(shared + rng.normal(0.0, 0.1, 30), base).p for _ in range(6)]
        any_rejected += (stats.holm(p_values) < 0.05).any()
        none_corrected += min(p_values) < 0.05
    assert any_rejected <= binom.ppf(1 - 5e-5, TRIALS, 0.05)
    assert none_corrected > 2 * any_rejected


def test_the_truly_best_is_marked_and_the_far_worse_are_not():
    rng = np.random.default_rng(11)
    for higher in (False, True):
        marked = np.zeros(4)
        sign = -1.0 if higher else 1.0
        for _ in range(300):
            shared = rng.normal(3.0, 0.5, 25)
            samples = [shared + sign * shift + rng.normal(0.0, 0.1, 25) for shift in (0.0, 0.0, 0.02, 0.3)]
            marked += stats.tied_best(samples, higher_is_better=higher)
        assert (marked[:2] >= 0.95 * 300).all()
        assert marked[2] > 0.5 * 300, "25 windows do not show a fifth of a standard deviation"
        assert marked[3] == 0


def test_ties_are_those_of_corrected_tests():
    rng = np.random.default_rng(13)
    shared = rng.normal(3.0, 0.5, 30)
    samples = [shared + shift + rng.normal(0.0, 0.1, 30) for shift in (0.0, *np.linspace(0.03, 0.1, 9))]
    best = int(np.argmin([each.mean() for each in samples]))
    p_values = [stats.paired_t(each, samples[best]).p for i, each in enumerate(samples) if i != best]
    corrected = stats.holm(p_values)
    assert ((np.array(p_values) < 0.05) & (corrected >= 0.05)).any(), "the seed shows the correction"
    tied = stats.tied_best(samples, higher_is_better=False)
    assert np.delete(tied, best).tolist() == (corrected >= 0.05).tolist()
    assert tied[best]


def test_tied_best_of_few():
    one = np.array([1.0])
    assert stats.tied_best([], higher_is_better=True).tolist() == []
    assert stats.tied_best([one, one + 1, one], higher_is_better=False).tolist() == [True, False, True]
    same = np.array([1.0, 2.0, 4.0])
    assert stats.tied_best([same, same], higher_is_better=False).tolist() == [True, True]
