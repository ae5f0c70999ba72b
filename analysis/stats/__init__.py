"""Estimates with standard errors, paired tests, corrections for many tests, and how much data an effect takes.

All from stored per-item values: mean NLLs of windows, right and wrong answers of tasks. `estimates` holds values with
their errors and intervals, `paired` tests of two runs on the same items, `bootstrap` the same by resampling,
`families` many tests at once, `power` what n can show.
"""

from analysis.stats.bootstrap import Bootstrap, paired_bootstrap
from analysis.stats.estimates import (
    Estimate,
    interval,
    mean,
    mean_nll,
    perplexity,
    perplexity_interval,
    wilson,
)
from analysis.stats.families import holm, kendall_tau, tied_best
from analysis.stats.paired import (
    Flips,
    Test,
    difference,
    equivalence,
    flips,
    is_binary,
    mcnemar,
    nll_difference,
    paired_t,
    paired_test,
    perplexity_difference,
    unpaired_z,
)
from analysis.stats.power import items_needed, smallest_effect

__all__ = [
    "Bootstrap",
    "Estimate",
    "Flips",
    "Test",
    "difference",
    "equivalence",
    "flips",
    "holm",
    "interval",
    "is_binary",
    "items_needed",
    "kendall_tau",
    "mcnemar",
    "mean",
    "mean_nll",
    "nll_difference",
    "paired_bootstrap",
    "paired_t",
    "paired_test",
    "perplexity",
    "perplexity_difference",
    "perplexity_interval",
    "smallest_effect",
    "tied_best",
    "unpaired_z",
    "wilson",
]
