"""Findings in few words, for every place that lists them."""

import math
from collections import Counter
from collections.abc import Sequence

import pandas as pd

from analysis.findings.verdicts import ALPHA, Finding, Verdict
from analysis.tables.render import Entry, Plain


def said(each: Finding, verdict: Verdict | None = None) -> str:
    """The verdict (its own by default), and whether it may still change."""
    verdict = verdict or each.verdict
    return f"{verdict} so far" if each.untested and each.tested else verdict


def counted(each: Finding) -> str:
    """2 for, 1 open, 3 not tested; in part not tested: where tables lack what some of it is about."""
    counts = Counter(one.says(one.p_holm) for one in each.tested)
    parts = [f"{counts[word]} {word}" for word in ("for", "against", "open") if counts[word]]
    if each.untested:
        parts.append(f"{len(each.untested)} not tested")
    lacking = "; in part not tested" if each.absent and each.tested else ""
    return f"{', '.join(parts) or 'none'}{lacking}"


def many(number: int, what: str) -> str:
    """1 run, 2 runs"""
    return f"{number} {what}{'' if number == 1 else 's'}"


def p_range(each: Finding) -> str:
    """The smallest and the largest corrected p value."""
    values = sorted(one.p_holm for one in each.tested)
    return " to ".join(dict.fromkeys(p_text(value) for value in (values[:1] + values[-1:])))


def p_text(value: float) -> str:
    """Two digits, as far as they are worth telling; empty for NaN."""
    if math.isnan(value):
        return ""
    return "< 0.0001" if value < 1e-4 else f"{value:.{1 - math.floor(math.log10(value)) if value < 0.1 else 2}f}"


def takeaways_table(found: Sequence[Finding], size: str) -> Plain:
    """One row per takeaway: what became of it on the rows of tables of this size."""
    columns = ("takeaway", "", "verdict", "comparisons", "p, smallest to largest", "over all")
    records = [
        (
            *(each.takeaway.id, each.takeaway.title, said(each), counted(each), p_range(each)),
            "" if each.verdict == "not tested" else said(each, each.on_page),
        )
        for each in found
    ]
    tested = sum(len(each.tested) for each in found)
    names = ("takeaway", "title", "verdict", "comparisons", "p", "verdict_over_all")
    return Plain(
        title=f"The paper's takeaways ({size})",
        columns=columns,
        numeric=(False,) * len(columns),
        rows=tuple(tuple(Entry(text) for text in record) for record in records),
        caption=(
            "Each predicts comparisons of cells, tested on the items that the cells share; p values Holm-corrected over"
            f" the comparisons of a takeaway, in the last column over all {tested}; α = {ALPHA:g}. Another draw of the"
            f" calibration text is not in them. qbench findings --size {size} writes every comparison."
        ),
        frame=pd.DataFrame.from_records(records, columns=names),
    )
