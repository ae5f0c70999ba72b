"""`qbench why` on a terminal: `rich.print(RenderedExplanation(explanation))`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from analysis.divergence import FLOAT_NOISE, Divergence, Parting, StagePair
from analysis.layers import Layer
from analysis.tables.comparison import RenderedComparison, difference_table, short_setting
from analysis.tables.render import Entry, OnTerminal, Plain, number
from analysis.why import PARTED, ErrorContrast, Explanation


@dataclass(frozen=True)
class RenderedExplanation:
    """The reasons in short, then settings, environments, stages, layers and metrics."""

    explanation: Explanation

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        found = self.explanation
        for side, run, label in zip("AB", (found.a, found.b), found.labels, strict=True):
            yield Text(f"{side}: run {run.id}, {label} ({run.model}, key {run.key[:12]})", style="bold")
        for line in in_short(found):
            yield Text(f"  {line}")
        for note in found.notes:
            yield Text(f"  {note}", style="yellow")
        yield Text("")
        for title, differences in (("settings", found.settings), ("environment", found.environment)):
            if differences:
                yield difference_table(f"{title} that differ", differences)
        if found.parting.stages:
            yield OnTerminal(stages_table(found.parting))
        for each in found.errors[:1]:
            yield OnTerminal(kinds_table(each))
            yield OnTerminal(layers_table(each))
        if len(found.errors) > 1:
            yield OnTerminal(errors_table(found.errors))
        if found.comparison is not None:
            yield RenderedComparison(found.comparison, heading=False)


def in_short(found: Explanation) -> list[str]:
    """The answer in a few sentences."""
    said = [_settings_line(found), _environment_line(found), _parting_line(found)]
    if found.errors:
        said.append(_error_line(found.errors[0]))
    for each in found.errors:
        if each.info.name == "stream_error":
            apart = f"stay more than {100 * PARTED:g} % apart"
            said.append(
                f"the quantized streams {apart} from block {each.parted} on"
                if each.parted is not None
                else f"the quantized streams do not {apart}"
            )
    if found.comparison is not None:
        said += [
            f"{row.task} {row.metric.label}: {number(row.a)} against {number(row.b)}, {row.verdict.partition(';')[0]}"
            for row in found.comparison.rows
            if row.metric.headline
        ]
    return [each for each in said if each]


def _settings_line(found: Explanation) -> str:
    if found.same_experiment:
        return "settings: the same experiment, run twice (one key)"
    paths = [path for path, _, _ in found.settings]
    for pair in found.parting.stages:
        paths += [pair.name] if pair.a != pair.b else [f"{pair.a}.{option}" for option, _, _ in pair.settings]
    if found.seeds_alone:
        return f"settings: seeds alone differ ({', '.join(paths)})"
    shown = ", ".join(paths[:4]) + (", …" if len(paths) > 4 else "")
    return f"settings: {len(paths)} differ ({shown})" if paths else "settings: the same"


def _environment_line(found: Explanation) -> str:
    paths = [path for path, _, _ in found.environment]
    return f"environment: {', '.join(paths)} differ" if paths else "environment: the same"


def _parting_line(found: Explanation) -> str:
    """The first difference of states, as far as it is known."""
    parting = found.parting
    codes = "codes: the same to the bit" if found.same_codes else ""
    unseen = f"first difference, by settings alone: stage {parting.unseen.name}" if parting.unseen is not None else ""
    if parting.evidence is None:
        return "; ".join(filter(None, (codes, unseen)))
    if parting.first is None:
        what = {"fingerprints": "state", "layer metrics": "layer metric"}[parting.evidence]
        nothing = f"no {what} of any stage differs"
        if found.same_codes is False and parting.evidence == "fingerprints":
            nothing += ": the codes that do lie outside the blocks (the head)"
        return f"{codes}, {nothing}" if codes else nothing
    lines = f"{f'{unseen}; by layer metrics' if unseen else 'first difference'}: {_place(parting.first, parting)}"
    if parting.beyond_noise is not None and parting.beyond_noise != parting.first:
        lines += f"; beyond float noise: {_place(parting.beyond_noise, parting)}"
    elif parting.beyond_noise is None and parting.evidence == "layer metrics":
        lines += "; none is beyond float noise"
    return f"{codes}; {lines}" if codes else lines


def _place(found: Divergence, parting: Parting) -> str:
    stage = "behind all stages" if found.stage is None else f"stage {parting.stages[found.stage].name}"
    where = f"block {found.block}, {stage}" + (f", {found.module}" if found.module else "")
    if parting.evidence == "fingerprints":
        only = "" if None not in (found.a, found.b) else f", only in {'A' if found.b is None else 'B'}"
        return f"{where}{only}"
    values = f"{found.metric} {number(found.a, 7)} against {number(found.b, 7)}"
    return f"{where}: {values} (relative difference {found.relative:.1g})"


def _error_line(found: ErrorContrast) -> str:
    if found.n and not found.a_better + found.b_better:
        return f"{found.info.name}: the same in all {found.n} layers"
    parts = f"{found.info.name}: A better in {found.a_better} of {found.n} layers, B in {found.b_better}"
    if alike := found.n - found.a_better - found.b_better:
        parts += f", the same in {alike}"
    if found.typical is not None and found.info.ratio:
        parts += f", A / B typically {number(found.typical, 3)}"
    if found.by_difference:
        parts += f"; furthest apart in {found.by_difference[0].where}"
    return parts


def stages_table(parting: Parting) -> Plain:
    """The two pipelines step by step, and how much of what each step decided differs."""
    first = parting.first
    rows = []
    for k, pair in enumerate(parting.stages):
        here = first is not None and first.stage == k
        where = "" if pair.first is None else f"block {pair.first[0]} {pair.first[1]}".strip()
        differs = f"{pair.differ} of {pair.places}" if pair.places else "nothing stored"
        cells = (str(k + 1), pair.name, _options(pair), differs, where)
        rows.append(tuple(Entry(cell, bold=here) for cell in cells))
    if parting.evidence is None:
        said = "The runs have no layer metrics in common: only settings can be told apart."
    elif parting.evidence == "fingerprints":
        said = (
            f"Fingerprints of what every stage decided, to the bit: {parting.differing} of {parting.compared} differ."
        )
    else:
        said = (
            "A run without stored fingerprints: layer metrics that both have are compared instead, to the last bit; "
            f"{parting.differing} of {parting.compared} differ. Equal ones make equal states likely, not certain. "
            f"Relative differences up to {FLOAT_NOISE:g} can be the order of summing."
        )
    return Plain(
        title="Stages, in the order of work within every block",
        columns=("", "stage A / B", "settings A → B", "differ", "first"),
        rows=tuple(rows),
        caption=said,
    )


def _options(pair: StagePair) -> str:
    if pair.a != pair.b:
        return f"only in {'A' if pair.b is None else 'B'}" if None in (pair.a, pair.b) else "another stage"
    words = [f"{name}: {short_setting(a)} → {short_setting(b)}" for name, a, b in pair.settings]
    return ", ".join(words) or "the same"


def kinds_table(found: ErrorContrast) -> Plain:
    """One error by kind of module."""
    rows = [
        tuple(map(Entry, (each.kind, str(each.n), number(each.mean_a), number(each.mean_b),
                          number(each.typical, 3), f"{100 * each.share:.0f} %")))
        for each in sorted(found.kinds, key=lambda each: -each.share)
    ]  # fmt: skip
    typical = "A / B" if found.info.ratio else "A − B"
    return Plain(
        title=f"{found.info.label}, by kind of module",
        columns=("module", "n", "mean A", "mean B", typical, "share of |A − B|"),
        rows=tuple(rows),
        numeric=(False, True, True, True, True, True),
        caption=f"{typical}: {'geometric mean' if found.info.ratio else 'mean'} over layers that both runs have.",
    )


def layers_table(found: ErrorContrast) -> Plain:
    """The layers that are furthest apart in one error."""
    chosen: dict[Layer, list[str]] = {}
    for word, layers in (("ratio", found.by_ratio), ("difference", found.by_difference)):
        for each in layers:
            chosen.setdefault(each, []).append(word)
    rows = []
    for each, words in chosen.items():
        a, b = each.values
        ratio = number(a / b, 3) if b else "∞"
        cells = (each.where, number(a), number(b), ratio, number(a - b, 3, sign=True), " and ".join(words))
        rows.append(tuple(map(Entry, cells)))
    return Plain(
        title=f"{found.info.title}: layers furthest apart",
        columns=("layer", "A", "B", "A / B", "A − B", "by"),
        rows=tuple(rows),
        numeric=(False, True, True, True, True, False),
        caption="" if rows else f"The same in all {found.n} layers.",
    )


def errors_table(errors: Sequence[ErrorContrast]) -> Plain:
    """All errors that both runs have."""
    rows = []
    for each in errors:
        by = "" if each.typical is None else f"{'A / B' if each.info.ratio else 'A − B'} = {number(each.typical, 3)}"
        furthest = each.by_difference[0].where if each.by_difference else "none differs"
        cells = (each.info.label, str(each.n), str(each.a_better), str(each.b_better), by, furthest)
        rows.append(tuple(map(Entry, cells)))
    return Plain(
        title="All errors of layers that both runs have",
        columns=("error", "n", "A better", "B better", "typically", "furthest apart"),
        rows=tuple(rows),
        numeric=(False, True, True, True, False, False),
        caption="Typically: geometric mean of ratios, mean of differences.",
    )
