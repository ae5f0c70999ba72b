"""A recommendation as a table: recipes that fit with their evidence, and why the others are not first or do not fit."""

import pandas as pd

from analysis.axes import axis_levels
from analysis.recommend import Recommendation, as_plain, everyone, megabytes
from analysis.tables.labels import pipeline_labels
from analysis.tables.render import Entry, Plain, number, with_error


def recommendation_table(found: Recommendation | None, *, rejected: int = 5) -> Plain:
    """The recipes, then the first `rejected` of those that do not fit."""
    columns = (
        "",
        "pipeline",
        "calibration",
        "format",
        "value ± SE",
        "recovery",
        "MB",
        "quantize s",
        "runs",
        "remarks",
    )
    numeric = (True, False, False, False, True, True, True, True, False, False)
    if found is None:
        text = "No finished run of a quantized model has this metric: nothing to recommend."
        return Plain(title="Recommendation", columns=columns, numeric=numeric, rows=(), caption=text)
    info, field_ = found.field.info, found.field
    title = f"Recommendation for {field_.model} by {info.label} {info.arrow} on {field_.task} ({field_.protocol})"
    shown = found.rejected[:rejected]
    listed = [*(each.candidate for each in found.ranked), *(each.candidate for each in shown)]
    levels = axis_levels([each.runs[0] for each in listed])
    pipelines = pipeline_labels([each.runs[0] for each in listed])
    reasons = [*(each.reason for each in found.ranked), *("; ".join(each.reasons) for each in shown)]
    ranks = [*map(str, range(1, len(found.ranked) + 1)), *("" for _ in shown)]
    places = {key: i for i, key in enumerate(k for c in everyone(field_) for k in c.keys)}
    rows = []
    for rank, each, level, pipeline, reason in zip(ranks, listed, levels, pipelines, reasons, strict=True):
        marks = {mark for key in each.keys for mark in found.checked.marks(places[key])}
        low = "" if each.recovery_low is None else f" (≥ {each.recovery_low:.4f})"
        rows.append(
            (
                Entry(rank),
                Entry(pipeline, bold=rank == "1", notes=tuple(sorted(marks))),
                Entry(level["calibration"]),
                Entry(each.scheme),
                Entry(with_error(each.value, each.metric.stderr, least=2), bold=rank == "1"),
                Entry("" if each.recovery is None else f"{each.recovery:.4f}{low}"),
                Entry("" if each.model_bytes is None else number(each.model_bytes / 1e6)),
                Entry(number(each.quantize_s, 3)),
                Entry(", ".join(key[:8] for key in each.keys)),
                Entry(reason),
            )
        )
    groups = ("fits",) * len(found.ranked) + ("does not fit",) * len(shown)
    records = [
        {"rank": rank or None, **as_plain(each), "reason": reason}
        for rank, each, reason in zip(ranks, listed, reasons, strict=True)
    ]
    return Plain(
        title=title,
        columns=columns,
        numeric=numeric,
        rows=tuple(rows),
        groups=groups,
        caption=_caption(found, len(shown)),
        footnotes=tuple((each.number, each.text) for each in found.checked.footnotes),
        frame=pd.DataFrame.from_records(records),
    )


def _caption(found: Recommendation, shown: int) -> str:
    wishes = found.wishes
    words = [f"at most {megabytes(wishes.max_bytes)}"] if wishes.max_bytes is not None else []
    words += [f"kernel {wishes.kernel}"] if wishes.kernel is not None else []
    if wishes.min_recovery is not None:
        words.append(
            f"recovery of at least {wishes.min_recovery:g}" + (" with 95 % confidence" if wishes.certain else "")
        )
    words += [f"quantized within {number(wishes.max_calib_s, 3)} s"] if wishes.max_calib_s is not None else []
    total = len(found.ranked) + len(found.rejected)
    text = f"{len(found.ranked)} of {total} recipes fit" + (f" ({', '.join(words)})." if words else ".")
    text += f" n = {found.field.n} {found.field.items}; recovery with the end of its 95 % interval."
    if not found.ranked and found.rejected:
        near = found.rejected[0]
        text += f" Nearest: {near.candidate.label} ({'; '.join(near.reasons)})."
    hidden = len(found.rejected) - shown
    return text + (f" {hidden} more that do not fit are not shown." if hidden > 0 else "")
