"""What stands below the report's results: declared tables, best practice, attribution, published figures, fronts.

Each section is titles, sentences, tables and figures as JSON values. One that has nothing to show says what is missing;
one whose numbers must not stand in one table says which mixture forbids it.
"""

import base64
import io
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from analysis.pairing import info_of
from analysis.report.tables import declared_table, plain_table, words_table
from analysis.style import house_style
from analysis.tables.declared import FilledTable
from analysis.tables.plain import PlainTable
from analysis.tables.render import Plain
from qbench.errors import EvaluationError, QbenchError
from qbench.store import queries
from qbench.store.database import Database

Section = dict[str, Any]

#: Declared tables as they were drawn, or, by name, why they were not.
Shown = FilledTable | PlainTable | tuple[str, str]

_FIGURES = 12  # of one section: more would hide each other and make the file large
_POINTS = 1500  # beyond which the shares of an attribution take minutes
_RESAMPLES = 199  # of its intervals: the page's are rougher than the command's


def sections(database: Database, declared: Sequence[Shown] | None = None, allow: Collection[str] = ()) -> list[Section]:
    """All sections in the order in which they are read; `declared` is None where nobody looked for declared tables."""
    counts = measured_points(database)
    metrics = tuple(dict.fromkeys(metric for metric, _ in counts))
    return [
        _declared(declared),
        _takeaways(database, declared),
        _answer("best", "Best practice", metrics, lambda metric: _best(database, metric, allow)),
        _answer(
            "attribution",
            "What the loss is due to",
            metrics,
            lambda metric: _attribution(database, metric, counts, allow),
        ),
        _answer("align", "Published numbers and ours", ("",), lambda _: _aligned(database)),
        _fronts(database, metrics, allow),
    ]


def measured_points(database: Database) -> dict[tuple[str, str], int]:
    """Of every metric that gets figures and every model how many runs were measured the same way, the most first."""
    runs = {run.id: run for run in queries.runs(database, status="done")}
    counts: Counter[tuple[str, str, str]] = Counter()
    for each in queries.metrics(database, runs):
        info = info_of(each)
        if info.headline and info.higher_is_better is not None:
            counts[each.name, runs[each.run_id].model, each.spec_key] += 1
    found: dict[tuple[str, str], int] = {}
    for (name, model, _), count in counts.most_common():
        found.setdefault((name, model), count)
    return found


def _section(
    anchor: str, title: str, tables: Sequence[Any] = (), figures: Sequence[Any] = (), text: Sequence[str] = ()
) -> Section:
    return {"id": anchor, "title": title, "text": list(text), "tables": list(tables), "figures": list(figures)}


def _declared(declared: Sequence[Shown] | None) -> Section:
    tables, text = [], []
    for each in declared or ():
        if isinstance(each, PlainTable):
            tables.append(words_table(each))
        elif isinstance(each, FilledTable):
            drawn = declared_table(each)
            tables.append(drawn | {"figure": _figure_of(each, drawn["title"])})
        else:
            text.append(f"{each[0]} is not shown: {each[1]}")
    if declared is None:
        text.append("Declared tables were left out of this report (--tables none).")
    elif not any(isinstance(each, FilledTable) for each in declared):
        text.append("No run of a declared table is in the database: qbench fill t7 runs and draws one.")
    return _section("declared", "Declared tables", tables, text=text)


def _takeaways(database: Database, declared: Sequence[Shown] | None) -> Section:
    """What the declared tables say about the paper's takeaways, by size."""
    from analysis.findings.takeaways import takeaways
    from analysis.findings.verdicts import findings
    from analysis.findings.words import takeaways_table

    by_size: dict[str, dict[str, FilledTable]] = {}
    for each in declared or ():
        if isinstance(each, FilledTable):
            by_size.setdefault(each.declared.size, {})[each.declared.name] = each
    tables = [
        plain_table(takeaways_table(findings(database, takeaways(), some), size)) for size, some in by_size.items()
    ]
    text = [] if tables else ["Nothing to test: takeaways are about declared tables, of which none is shown."]
    return _section("takeaways", "Takeaways of the literature", tables, text=text)


def _figure_of(table: FilledTable, title: str) -> dict[str, str]:
    from analysis.tables.figure import figure

    return vector(figure(table), f"{title}, drawn", "The cells of the table above; the drawing has its own caption.")


def _answer(anchor: str, title: str, metrics: Sequence[str], table: Callable[[str], Iterator[Any]]) -> Section:
    """A section with a table per metric; where one is refused, the sentence that says why."""
    tables, text = [], []
    for metric in metrics:
        try:
            tables += list(table(metric))
        except QbenchError as error:
            text.append(_refused(error, metric))
    if not metrics:
        text.append("Nothing to show: no finished run has been measured.")
    return _section(anchor, title, tables, text=text)


def _refused(error: QbenchError, metric: str) -> str:
    what = f"{metric}: " if metric else ""
    how = " (qbench report --allow code,dirty shows it with footnotes)" if isinstance(error, EvaluationError) else ""
    return f"{what}{error}{how}"


def _best(database: Database, metric: str, allow: Collection[str]) -> Iterator[Any]:
    from analysis.tables.best_practice import best_practice, best_practice_table

    table = best_practice_table(best_practice(database, metric=metric, allow=allow), worse=3)
    yield plain_table(table, command=f"qbench best --metric {metric}")


def _attribution(
    database: Database, metric: str, counts: Mapping[tuple[str, str], int], allow: Collection[str]
) -> Iterator[Any]:
    from analysis.attribution import attribute
    from analysis.tables.attribution import attribution_table

    for model in (model for name, model in counts if name == metric):
        if counts[metric, model] > _POINTS:
            command = f"qbench attribute --model {model} --metric {metric}, with --algo to choose some"
            text = f"{counts[metric, model]} points are too many for a page: {command}"
            yield plain_table(Plain(title=f"{model}: {metric}", columns=(), rows=(), caption=text))
            continue
        found = attribute(database, metric=metric, model=model, resamples=_RESAMPLES, allow=allow)
        yield plain_table(attribution_table(found))


def _aligned(database: Database) -> Iterator[Any]:
    from analysis.anchors import align, align_table

    yield plain_table(align_table(align(database)))


def _fronts(database: Database, metrics: Sequence[str], allow: Collection[str]) -> Section:
    """Figures that do not move, for print and for papers: what the figure above shows, for every model and metric."""
    from analysis.pareto import caption, figure
    from analysis.tables.front import fronts

    figures, text = [], []
    left_out = 0
    for metric in metrics:
        try:
            found = fronts(database, metric=metric, allow=allow)
        except QbenchError as error:
            text.append(_refused(error, metric))
            continue
        for each in found:
            if len(figures) == _FIGURES:
                left_out += 1
                continue
            title = (
                f"{each.model}: {each.evaluation.metric.quantity} on {each.evaluation.task} against {each.cost.label}"
            )
            drawn = figure(each.points, each.evaluation, each.cost)
            figures.append(vector(drawn, title, caption(each.points, each.evaluation, each.notes)))
    if left_out:
        text.append(f"{left_out} more are left out: qbench pareto --out <folder> draws any.")
    if not figures and not text:
        text.append("Nothing to draw: no finished run of a quantized model has been measured.")
    return _section("fronts", "Pareto fronts", figures=figures, text=text)


def vector(drawn: Figure, title: str, text: str) -> dict[str, str]:
    """A figure as an address of its own content (SVG), its name and its caption."""
    file = io.BytesIO()
    with house_style():
        drawn.savefig(file, format="svg", metadata={"Date": None})
    source = re.sub(rb">\s+<", b"><", file.getvalue())
    return {
        "source": f"data:image/svg+xml;base64,{base64.b64encode(source).decode('ascii')}",
        "title": title,
        "caption": text,
    }
