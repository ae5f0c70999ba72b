"""Analyses of variance as a table: one part for each model and evaluation."""

from collections.abc import Sequence

import pandas as pd

from analysis.attribution import Attribution, Term
from analysis.tables.render import Entry, Plain, number


def attribution_table(found: Sequence[Attribution], alpha: float = 0.05) -> Plain:
    """Terms by their share, largest first, then what is left; significant ones stand out. Notes on what a design could
    not answer are footnotes."""
    rows, groups, records, notes = [], [], [], {}
    for each in found:
        group = (
            f"{each.field.name} · {each.response} on {each.field.task} ({each.field.protocol}), {each.points} points"
        )
        texts = [*each.notes, *(note.text for note in each.checked.footnotes)]
        marks = tuple(notes.setdefault(text, len(notes) + 1) for text in texts)
        listed = sorted((term for term in each.terms if term.df), key=lambda term: -term.share)
        rows += [_row(term, alpha, marks if place == 0 else ()) for place, term in enumerate(listed)]
        if each.terms:
            rows.append(_rest("residual", each.residual, each.residual_df))
            rows.append(_rest("shared by several terms", each.shared, None))
        else:
            rows.append((Entry("no answer", notes=marks), *(Entry() for _ in range(6))))
        groups += [group] * (len(rows) - len(groups))
        records += [_record(each, term) for term in listed] or [_record(each, None)]
    return Plain(
        title="What the loss of quality is due to",
        columns=("term", "levels", "share of variance", "95 % interval", "df", "F", "p (Holm)"),
        numeric=(False, True, True, True, True, True, True),
        rows=tuple(rows),
        groups=tuple(groups),
        caption=_caption(found),
        footnotes=tuple((mark, text) for text, mark in notes.items()),
        frame=pd.DataFrame.from_records(records),
    )


def _row(term: Term, alpha: float, marks: tuple[int, ...]) -> tuple[Entry, ...]:
    sure = term.p_holm is not None and term.p_holm < alpha
    interval = "" if term.low is None or term.high is None else f"{100 * term.low:.1f} to {100 * term.high:.1f} %"
    return (
        Entry(term.name, bold=sure, notes=marks),
        Entry("" if len(term.factors) > 1 else str(term.levels)),
        Entry(f"{100 * term.share:.1f} %", bold=sure),
        Entry(interval),
        Entry(str(term.df)),
        Entry(number(term.f, 3)),
        Entry(number(term.p_holm, 2)),
    )


def _rest(name: str, share: float | None, df: int | None) -> tuple[Entry, ...]:
    text = "" if share is None else f"{100 * share:.1f} %".replace("-0.0 %", "0.0 %")
    return Entry(name), Entry(), Entry(text), Entry(), Entry("" if df is None else str(df)), Entry(), Entry()


def _record(each: Attribution, term: Term | None) -> dict[str, object]:
    field = each.field
    what = {"model": field.model, "task": field.task, "protocol": field.protocol, "response": each.response}
    what |= {"points": each.points, "residual_df": each.residual_df, "residual": each.residual, "shared": each.shared}
    if term is not None:
        what |= {"term": term.name, "df": term.df, "sum_of_squares": term.sum_of_squares, "share": term.share}
        what |= {"low": term.low, "high": term.high, "f": term.f, "p": term.p, "p_holm": term.p_holm}
    keys = " ".join(key for candidate in field.candidates for key in candidate.keys)
    return what | {"notes": "; ".join(each.notes), "spec_key": field.spec_key, "keys": keys}


def _caption(found: Sequence[Attribution]) -> str:
    if not found:
        return "No finished run has this metric: nothing to attribute."
    return (
        "Shares of the variance between points, type II, less what chance gives; intervals by a bootstrap of the items "
        "and the residuals. Bold: p below α after Holm's correction. They speak of these levels and these points: a "
        "wider range of bits would make the share of the format larger."
    )
