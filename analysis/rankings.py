"""Whether metrics rank the points of a sweep alike: where they do not, one of them hides damage."""

import itertools

import pandas as pd

from analysis import stats
from analysis.tables.sweep import SweepTable


def rank_agreement(table: SweepTable) -> pd.DataFrame:
    """Kendall's tau-b of every two metrics over the points that have both, full precision left out.

    Columns `first` and `second` (the metrics' columns), `tau` (1: both prefer the points in the same order, whatever
    their directions), `p`, `p_holm` over all rows, and the number of `points`. Metrics without a better direction,
    pairs with fewer than three points or with no differences among them are left out.
    """
    points = table.frame[table.frame["algo"] != "none"]
    ranked = [each for each in table.evaluations if each.metric.higher_is_better is not None]
    records = []
    for first, second in itertools.combinations(ranked, 2):
        values = points[[first.value, second.value]].dropna()
        if len(values) < 3 or (values.nunique() < 2).any():
            continue
        signs = [1 if each.metric.higher_is_better else -1 for each in (first, second)]
        found = stats.kendall_tau(signs[0] * values[first.value], signs[1] * values[second.value])
        records.append(
            {"first": first.value, "second": second.value, "tau": found.statistic, "p": found.p, "points": len(values)}
        )
    frame = pd.DataFrame.from_records(records, columns=["first", "second", "tau", "p", "points"])
    frame.insert(4, "p_holm", stats.holm(frame["p"].to_numpy(dtype="float64")))
    return frame
