"""The findings as one Markdown page: a summary, then every declared table with its figure and what it says."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from analysis.claims import code_of
from analysis.findings.takeaways import Takeaway
from analysis.findings.verdicts import ALPHA, Compared, Finding, findings
from analysis.findings.words import counted, many, p_range, p_text, said
from analysis.tables.declared import FilledTable
from analysis.tables.declared_text import markdown, md
from analysis.tables.figure import write_figure
from analysis.tables.labels import is_baseline
from analysis.tables.render import number, with_error
from qbench.errors import AssetError
from qbench.metrics import items_of
from qbench.store import queries
from qbench.store.database import Database
from qbench.store.records import RunRow

_FOLDED = 6  # comparisons from which on a list is closed until it is opened
_NAMED = 2  # cells that are named of all that lack a value for one reason


def check_out(out: Path) -> None:
    """AssetError where no page can be written to `out`; nothing is created yet."""
    there = next(each for each in (out, *out.parents) if os.path.exists(each))  # Path.exists raises in closed folders
    if there.is_dir() == (there == out):
        raise _unwritable(out, f"{there} is {'a directory' if there.is_dir() else 'no directory'}")
    if not os.access(there, os.W_OK):
        raise _unwritable(out, f"{there} cannot be written to")


def write_page(
    database: Database,
    takeaways: Sequence[Takeaway],
    tables: Mapping[str, FilledTable],
    out: Path,
    allow: Sequence[str] = (),
) -> tuple[tuple[Finding, ...], list[Path]]:
    """The findings, and the files written: the page, and figures in `img/` beside it. Equal rows give equal files.

    `allow`: the mixtures that were allowed in the tables, for the command that makes the page again. AssetError where
    a file cannot be written.
    """
    found = findings(database, takeaways, tables)
    shown = {name: table for name, table in tables.items() if table.counts["done"]}
    written, pictures = [], {}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for name, table in shown.items():
            base = out.parent / "img" / out.stem / f"{name}-{table.declared.size}"
            (png,) = write_figure(table, base, ["png"])
            written.append(png)
            pictures[name] = Path(os.path.relpath(png, out.parent)).as_posix()
        out.write_text(page(database, found, tables, pictures, allow), encoding="utf-8")
    except OSError as error:
        raise _unwritable(out, str(error)) from error
    return found, [out, *written]


def _unwritable(out: Path, why: str) -> AssetError:
    return AssetError(f"--out={out}: {why}; name a place you can write to")


def page(
    database: Database,
    found: Sequence[Finding],
    tables: Mapping[str, FilledTable],
    pictures: Mapping[str, str],
    allow: Sequence[str] = (),
) -> str:
    """The text of the page; `pictures` has the address of each table's figure."""
    size = next((table.declared.size for table in tables.values()), "demo")
    shown = [name for name, table in tables.items() if table.counts["done"]]
    lines = [
        "# Findings",
        "",
        f"Written by `qbench findings --size {size}` from the rows of a database; do not edit.",
        "",
    ]
    lines += [*_scope(database, [tables[name] for name in shown]), "", *_method(found), "", "## Summary", ""]
    lines += [*_summary(found), "", *_again(tables, size, allow)]
    for name in shown:
        here = [each for each in found if each.takeaway.expects and each.takeaway.expects[0].table == name]
        lines += ["", *_section(database, tables[name], pictures.get(name), here)]
    rest = [each for each in found if not each.takeaway.expects or each.takeaway.expects[0].table not in shown]
    if rest:
        lines += ["", "## Not tested", ""]
        for each in rest:
            lines += [*_finding(each), ""]
    return "\n".join(lines).rstrip() + "\n"


def _scope(database: Database, shown: Sequence[FilledTable]) -> list[str]:
    """What all this is about, and how little that is."""
    runs = _runs(database, shown)
    if not runs:
        return ["The database has none of the declared tables' runs yet: nothing is tested."]
    models = []
    for name in dict.fromkeys(run.model for run in runs):
        full = next((run for run in runs if run.model == name and is_baseline(run)), None)
        bits = full.bits_per_weight_model if full is not None else None
        if full is None or not full.model_bytes or not bits:
            models.append(name)
        else:
            models.append(f"{name} ({number(full.model_bytes * 8 / bits / 1e6, 3)} million parameters)")
    texts: dict[str, set[int]] = {}
    for metric in queries.metrics(database, [run.id for run in runs]):
        texts.setdefault(f"{items_of(metric.evaluator)} of {metric.task} ({metric.protocol})", set()).add(metric.n)
    items = ", ".join(f"{' or '.join(map(str, sorted(n)))} {text}" for text, n in texts.items())
    quantized = sum(not is_baseline(run) for run in runs)
    only = "This is one model" if len(models) == 1 else f"These are {len(models)} models"
    return [
        f"**{only}: {md(', '.join(models))}.** {many(quantized, 'quantized run')}, measured on few items: {md(items)}."
        " What holds here need not hold for larger models. The p values are over the test items alone: another draw"
        " of the calibration text, or another seed, is not in them."
    ]


def _method(found: Sequence[Finding]) -> list[str]:
    tested = sum(len(each.tested) for each in found)
    return [
        "Each takeaway predicts comparisons between cells (`analysis/data/takeaways.yaml`). A comparison is a paired"
        " test on the items that its cells share ([statistics](statistics.md)); p values are Holm-corrected over the"
        f" comparisons of a takeaway, α = {ALPHA:g}. *Confirmed*: all comparisons speak for it. *Partly confirmed*:"
        " some speak for it, the others say nothing. *Mixed*: some speak for it, some against. *Contradicted*: some"
        " speak against it, none for it. *Undecided*: none says anything, and that is no sign of no effect. *So far*:"
        " cells lack a value. *In part not tested*: tables of this size lack what some of it is about. The last column"
        f" of the summary corrects over the whole page ({many(tested, 'comparison')}) instead.",
        "",
        "Effects count in the direction of the takeaway. Of perplexities they are differences of log perplexity in nats"
        " (0.05: about 5 %); of advantages that are compared, their difference; of a loss, its distance from the share"
        " that is named.",
    ]


def _summary(found: Sequence[Finding]) -> list[str]:
    lines = ["| takeaway | verdict | comparisons | p, smallest to largest | over the page |", "|---|---|---|---|---|"]
    for each in found:
        link = f"[{each.takeaway.id}. {md(each.takeaway.title)}](#{_anchor(each.takeaway)})"
        on_page = "" if each.verdict == "not tested" else said(each, each.on_page)
        lines.append(f"| {link} | **{said(each)}** | {counted(each)} | {p_range(each)} | {on_page} |")
    return lines


def _again(tables: Mapping[str, FilledTable], size: str, allow: Sequence[str]) -> list[str]:
    allowed = f" --allow {','.join(allow)}" if allow else ""
    lines = ["To make this page:", "", "```sh"]
    lines += [
        f"qbench fill {' '.join(tables)} --size {size}{allowed}",
        f"qbench findings --size {size}{allowed} --out docs/findings.md",
        "```",
    ]
    counts = {
        name: sum(number for state, number in table.counts.items() if state not in ("done", "undefined"))
        for name, table in tables.items()
    }
    cells = {name: many(_cells(table), "cell") for name, table in tables.items()}
    incomplete = [f"{name} ({count} of {cells[name]})" for name, count in counts.items() if count]
    return [*lines, *(["", f"Without a value: {', '.join(incomplete)}."] if incomplete else [])]


def _cells(table: FilledTable) -> int:
    return sum(number for state, number in table.counts.items() if state != "undefined")


def _section(database: Database, table: FilledTable, picture: str | None, here: Sequence[Finding]) -> list[str]:
    declared = table.declared
    _, _, body = markdown(table).partition("\n")  # the title line is the heading and the caption here
    lines = [
        f"## {declared.name.upper()}. {declared.title}",
        "",
        md(table.caption),
        "",
        _provenance(database, table),
        "",
    ]
    lines += [*body.strip().splitlines(), ""]
    if picture:
        lines += [f"![{declared.name.upper()}: {md(declared.title)}]({picture})", ""]
    for each in here:
        lines += [*_finding(each), ""]
    return lines[:-1]


def _provenance(database: Database, table: FilledTable) -> str:
    """Which runs, of which code, on which machine."""
    runs = _runs(database, [table])
    environments = [
        queries.environment(database, number) for number in dict.fromkeys(run.environment_id for run in runs)
    ]
    codes = dict.fromkeys(
        f"{code_of(each)[:12]}{' with uncommitted changes' if each.git_dirty else ''}" for each in environments
    )
    machines = dict.fromkeys(
        f"{each.gpu or each.cpu}, {each.threads} threads, torch {each.versions.get('torch', '?')}"
        for each in environments
    )
    days = sorted({run.finished[:10] for run in runs if run.finished})
    when = " to ".join(dict.fromkeys([*days[:1], *days[-1:]])) or "unknown"
    where = md(f"code {', '.join(codes)}; {'; '.join(machines)}")
    ids = f"id{'' if len(runs) == 1 else 's'} {_ids([run.id for run in runs])}"
    return f"{many(len(runs), 'run')} ({ids}), finished {when}; {where}."


def _finding(each: Finding) -> list[str]:
    takeaway = each.takeaway
    lines = [f"### {takeaway.id}. {md(takeaway.title)}: {said(each)}", ""]
    lines[0] = f'<a id="{_anchor(takeaway)}"></a>\n\n{lines[0]}'
    text = f"{md(takeaway.statement)} *{md(takeaway.source)}.*"
    lines += [f"{text} Here: {md(takeaway.here)}" if takeaway.here else text, ""]
    if takeaway.needs:
        return [*lines, f"Not tested: {md(takeaway.needs)}"]
    if each.tested:
        counts = f"{counted(each)}; p {p_range(each)}."
        rows = _comparisons(each.tested)
        folded = len(each.tested) >= _FOLDED
        opened = [f"<details><summary>{counts}</summary>", "", *rows, "", "</details>"]
        lines += [*(opened if folded else [counts, "", *rows]), ""]
    lines += _untested(each)
    return lines[:-1] if lines[-1] == "" else lines


def _comparisons(tested: Sequence[Compared]) -> list[str]:
    lines = ["| | where | values | effect ± SE | p | says |", "|---|---|---|---:|---:|---|"]
    for each in tested:
        values = "; ".join(f"{number(ahead)} and {number(behind)}" for ahead, behind in each.values)
        effect = f"{with_error(each.effect, each.stderr, sign=True)} {each.unit}".strip()
        says = each.says(each.p_holm)
        shown = f"**{says}**" if says != "open" else says
        cells = (md(each.contrast.what), md(each.contrast.where), values, effect, p_text(each.p_holm), shown)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _untested(each: Finding) -> list[str]:
    """Reasons, each once, with the first cells that it holds for."""
    cells: dict[str, dict[str, None]] = {}
    for one in each.untested:
        cells.setdefault(one.reason, {})[one.cell] = None
    reasons = list(each.absent)
    for reason, some in cells.items():
        named = [cell for cell in some if cell]
        more = f", and {many(len(named) - _NAMED, 'more cell')}" if len(named) > _NAMED else ""
        reasons.append(f"{reason}{' (' if named else ''}{'; '.join(named[:_NAMED])}{more}{')' if named else ''}")
    return [f"Not tested: {md('; '.join(reasons))}.", ""] if reasons else []


def _runs(database: Database, tables: Sequence[FilledTable]) -> list[RunRow]:
    ids = {run_id for table in tables for run_id in table.run_ids}
    return [run for run in queries.runs(database) if run.id in ids]


def _ids(ids: Sequence[int]) -> str:
    """1-4, 7"""
    parts: list[list[int]] = []
    for each in sorted(ids):
        if parts and each == parts[-1][-1] + 1:
            parts[-1].append(each)
        else:
            parts.append([each])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _anchor(takeaway: Takeaway) -> str:
    return f"takeaway-{re.sub(r'[^a-z0-9]+', '-', takeaway.id.lower())}"
