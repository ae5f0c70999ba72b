"""Statistics against scipy and statsmodels, and against published numbers."""

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats as reference
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW, ttost_paired

from analysis import stats
from qbench.errors import EvaluationError


def items(both: int, only_first: int, only_second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Right and wrong answers of two runs that fall together so often."""
    counts = (both, only_first, only_second, neither)
    return np.repeat([1.0, 1.0, 0.0, 0.0], counts), np.repeat([1.0, 0.0, 1.0, 0.0], counts)


def pairs(n: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shared = rng.normal(3.0, 0.5, n)
    return shared + rng.normal(0.02, 0.1, n), shared + rng.normal(0.0, 0.1, n)


@pytest.mark.parametrize("discordant", [(0, 0), (1, 0), (8, 0), (3, 9), (12, 12), (13, 11), (30, 12), (200, 260)])
@pytest.mark.parametrize("exact", [True, False])
def test_mcnemar(discordant, exact):
    b, c = discordant
    if not exact and b + c == 0:
        return  # statsmodels divides by zero
    a, other = items(40, b, c, 5)
    found = stats.mcnemar(a, other, method="exact" if exact else "chi2")
    expected = reference_mcnemar([[40, b], [c, 5]], exact=exact, correction=False)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-12)
    assert found.statistic == pytest.approx(expected.statistic, rel=1e-12)
    assert stats.flips(a, other) == stats.Flips(both=40, only_first=b, only_second=c, neither=5)


def test_answers_that_belong_together_are_not_tested_as_if_they_did_not():
    a, b = items(40, 12, 3, 5)
    clusters = np.arange(60) // 4
    assert stats.paired_test(a, b) == stats.mcnemar(a, b)
    assert stats.paired_test(a, b, clusters) == stats.paired_t(a, b, clusters)


def test_mcnemar_says_which_of_its_forms_was_used():
    few, many = stats.mcnemar(*items(50, 14, 10, 50)), stats.mcnemar(*items(50, 14, 11, 50))
    assert (few.method, many.method) == ("McNemar exact", "McNemar χ²")
    assert stats.mcnemar(*items(5, 0, 0, 5)).p == stats.mcnemar(*items(5, 0, 0, 5), method="chi2").p == 1.0


@pytest.mark.parametrize("n", [1, 7, 220])
def test_wilson_interval(n):
    for successes in range(n + 1):
        for confidence in (0.8, 0.95):
            expected = proportion_confint(successes, n, alpha=1 - confidence, method="wilson")
            assert stats.wilson(successes, n, confidence) == pytest.approx(expected, abs=1e-12)
    assert stats.wilson(0, n)[0] == 0.0
    assert stats.wilson(n, n)[1] == 1.0


@pytest.mark.parametrize("seed", range(8))
def test_holm(seed):
    p_values = np.random.default_rng(seed).choice([0.0, 1e-9, 0.004, 0.01, 0.02, 0.03, 0.5, 1.0], seed + 1).tolist()
    expected = multipletests(p_values, method="holm")[1]
    assert stats.holm(p_values).tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    with_gap = stats.holm([*p_values, np.nan])
    assert with_gap[:-1].tolist() == stats.holm(p_values).tolist()
    assert np.isnan(with_gap[-1])


@pytest.mark.parametrize("n", [2, 3, 60])
def test_paired_t_and_its_interval(n):
    a, b = pairs(n)
    found, expected = stats.paired_t(a, b), reference.ttest_rel(a, b)
    assert (found.statistic, found.p) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-10)
    for confidence in (0.9, 0.95):
        ends = stats.interval(stats.nll_difference(a, b), confidence)
        assert ends == pytest.approx(tuple(expected.confidence_interval(confidence)), rel=1e-10)


def test_clustered_standard_error_and_test():
    a, b = pairs(90)
    clusters = np.repeat(np.arange(23), 4)[:90] * 7 + 3
    fit = sm.OLS(a - b, np.ones((90, 1))).fit(cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True)
    found = stats.nll_difference(a, b, clusters)
    assert (found.value, found.stderr) == pytest.approx((fit.params[0], fit.bse[0]), rel=1e-10)
    assert (found.n, found.clusters, found.df) == (90, 23, 22)
    assert stats.paired_t(a, b, clusters).p == pytest.approx(fit.pvalues[0], rel=1e-10)
    assert stats.interval(found) == pytest.approx(tuple(fit.conf_int()[0]), rel=1e-10)
    ppl = stats.perplexity(a, clusters)
    assert ppl.stderr == pytest.approx(ppl.value * stats.mean_nll(a, clusters).stderr)


@pytest.mark.parametrize(("link", "of"), [("mean", lambda m: m), ("exp_mean", np.exp)])
def test_bootstrap_is_that_of_scipy_to_the_last_resample(link, of):
    a, b = pairs(40)
    found = stats.paired_bootstrap(a, b, link=link, resamples=999, seed=3)
    expected = reference.bootstrap(
        (a, b), lambda x, y, axis: of(x.mean(axis)) - of(y.mean(axis)), paired=True, vectorized=True,
        method="percentile", n_resamples=999, rng=np.random.default_rng(3),
    )  # fmt: skip
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval), rel=1e-12)
    assert found.stderr == pytest.approx(expected.standard_error, rel=1e-12)
    assert found.value == pytest.approx(stats.difference(a, b, link=link).value, rel=1e-12)


def test_bootstrap_of_whole_clusters_by_hand():
    a, b = pairs(12)
    clusters = np.array([5, 5, 5, 1, 1, 9, 9, 9, 9, 2, 2, 2])
    rng, groups = np.random.default_rng(0), [np.flatnonzero(clusters == c) for c in (1, 2, 5, 9)]
    drawn = [np.concatenate([groups[i] for i in row]) for row in rng.integers(0, 4, (500, 4))]
    differences = [a[index].mean() - b[index].mean() for index in drawn]
    found = stats.paired_bootstrap(a, b, clusters, resamples=500)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(differences, [2.5, 97.5])), rel=1e-12)


@pytest.mark.parametrize("margin", [0.001, 0.03, 0.1])
def test_equivalence(margin):
    a, b = pairs()
    expected = ttost_paired(a, b, -margin, margin)[0]
    assert stats.equivalence(stats.nll_difference(a, b), margin).p == pytest.approx(expected, rel=1e-10)


def test_unpaired_z():
    a, b = pairs()
    expected = CompareMeans(DescrStatsW(a), DescrStatsW(b)).ztest_ind(usevar="unequal")
    found = stats.unpaired_z(stats.mean(a), stats.mean(b))
    assert (found.statistic, found.p) == pytest.approx(expected, rel=1e-10)


def test_kendall_with_and_without_ties():
    a, b = [1, 2, 2, 4, 5, 6], [1, 3, 2, 3, 6, 5]
    expected = reference.kendalltau(a, b, variant="b")
    found = stats.kendall_tau(a, b)
    assert (found.statistic, found.p) == (expected.statistic, expected.pvalue)
    concordant = sum(np.sign((a[i] - a[j]) * (b[i] - b[j])) for i in range(6) for j in range(i))
    assert found.statistic == pytest.approx(concordant / np.sqrt(14 * 14))  # one tie of 15 pairs in each
    assert np.isnan(stats.kendall_tau([1, 1, 1], [1, 2, 3]).statistic)
    with pytest.raises(EvaluationError):
        stats.kendall_tau([1, 2], [1, 2, 3])


@pytest.mark.parametrize("n", [3, 8, 20, 500, 9_000, 20_000])
@pytest.mark.parametrize(("power", "alpha"), [(0.8, 0.05), (0.95, 0.01)])
def test_detectable_effect_and_the_items_it_takes(n, power, alpha):
    found = stats.Estimate(value=0.1, stderr=2.0 / np.sqrt(n), n=n)  # sd 2
    effect = stats.smallest_effect(found, power=power, alpha=alpha)
    assert TTestPower().power(effect / 2.0, n, alpha) == pytest.approx(power, abs=2e-4)
    assert stats.items_needed(found, effect * (1 + 1e-6), power=power, alpha=alpha) == n
    assert stats.items_needed(found, effect * (1 - 1e-6), power=power, alpha=alpha) == n + 1
    twice = stats.smallest_effect(found, n=4 * n, power=power, alpha=alpha)
    assert twice <= effect / 2
    assert stats.items_needed(found, 0.0) is None


def test_power_counts_clusters():
    a, b = pairs(80)
    alone, paired_up = np.arange(40).repeat(2), np.arange(80)
    single = stats.nll_difference(a, b)
    assert stats.smallest_effect(stats.nll_difference(a, b, paired_up)) == pytest.approx(stats.smallest_effect(single))
    doubled = stats.nll_difference(a.repeat(2), b.repeat(2), np.arange(80).repeat(2))
    assert stats.smallest_effect(doubled) == pytest.approx(stats.smallest_effect(single)), "repeating adds nothing"
    assert stats.items_needed(doubled) == pytest.approx(2 * stats.items_needed(single), abs=2)
    assert stats.nll_difference(a, b, alone).df == 39


@pytest.mark.parametrize("counts", [(68, 30, 12, 110), (110, 30, 12, 68)])
def test_the_published_example_of_what_pairing_finds(counts):
    """lm-evaluation-harness, pull request 3868: accuracies on n = 220 items whose unpaired z test, from the two
    standard errors, gives p = .080 and McNemar's test p = .008. The counts are not published: these give both, and
    accuracies (45 % and 36 %, or 64 % and 55 %) of the usual size."""
    a, b = items(*counts)
    assert len(a) == 220
    assert stats.unpaired_z(stats.mean(a), stats.mean(b)).p == pytest.approx(0.080, abs=0.0005)
    assert stats.mcnemar(a, b, method="exact").p == pytest.approx(0.008, abs=0.0005)
    assert stats.paired_test(a, b).p < 0.01, "whichever form the number of discordant pairs selects"


def test_the_errors_of_accuracies_are_those_of_lm_eval():
    """Its `mean_stderr`: the sample standard deviation, n - 1 in it, over the root of n."""
    answers, _ = items(3, 4, 5, 6)
    share = answers.mean()
    assert stats.mean(answers).stderr == pytest.approx(np.sqrt(share * (1 - share) / 17), rel=1e-12)
