"""Which metrics of two runs measure the same, and what would be needed for the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qbench.metrics import TOKENIZER_FREE
from qbench.store.records import MetricRow, RunRow

_FROM_A_PATH = ("wikitext2", "ptb", "c4")  # evaluations of published definitions, whose data nobody but the user has


@dataclass(frozen=True, kw_only=True)
class Lacking:
    """A metric that only one run has, and the command that would measure the other one."""

    has: Literal["A", "B"]
    what: str
    command: str


def matched(
    a: RunRow, b: RunRow, of_a: Sequence[MetricRow], of_b: Sequence[MetricRow]
) -> tuple[list[tuple[MetricRow, MetricRow]], list[tuple[str, str]], list[Lacking]]:
    """(pairs with equal spec key and name, pairs of one name under other protocols with the reason, the rest)."""
    first, second = ({(each.spec_key, each.name): each for each in some} for some in (of_a, of_b))
    shared = [(first[key], second[key]) for key in first if key in second]
    alone = [[each for key, each in some.items() if key not in other] for some, other in
             ((first, second), (second, first))]  # fmt: skip
    refused, lacking = [], []
    for side, run, mine, theirs in (("A", b, *alone), ("B", a, *alone[::-1])):
        for each in mine:
            kin = [o for o in theirs if (o.evaluator, o.task, o.name) == (each.evaluator, each.task, each.name)]
            if not kin:
                lacking.append(Lacking(has=side, what=named(each), command=_command(run, each)))
            elif side == "A":
                others = ", ".join(f"{o.protocol} with n = {o.n}" for o in kin)
                reason = f"measured differently: A by {each.protocol} with n = {each.n}, B by {others}"
                alike = {(o.protocol, o.n) for o in kin} == {(each.protocol, each.n)}
                refused.append((named(each), reason + (", of other data or options" if alike else "")))
    return shared, refused, lacking


def incomparable(a: RunRow, b: RunRow, first: MetricRow, second: MetricRow) -> str | None:
    """Why two values under one spec key must not be compared; None if they may."""
    if first.n != second.n:
        return f"A has n = {first.n}, B n = {second.n}: not the same items"
    models = [run.spec.get("model", {}).get("fingerprint", run.model) for run in (a, b)]
    if models[0] != models[1] and first.evaluator not in TOKENIZER_FREE:
        return "different models may cut the text into different tokens: their windows are not the same items"
    return None


def named(metric: MetricRow) -> str:
    """A metric in messages: its name, task and protocol."""
    return f"{metric.name} {metric.task} {metric.protocol}"


def _command(run: RunRow, metric: MetricRow) -> str:
    """The command that measures the same of `run`, as far as a metric's row tells: of the data it only has the name."""
    mode, _, length = metric.protocol.partition("-")
    text, windows = f"eval.corpora=[{metric.task}]", f"eval.length={length} eval.n={metric.n}"
    match metric.evaluator, mode:
        case "zeroshot", shots:
            few = [f"eval.num_fewshot={shots}"] if shots.isdigit() and shots != "0" else []
            options = ["eval=zeroshot", f"eval.tasks=[{metric.task}]", *few]
        case "opencompass", _:
            options = ["eval=opencompass", f"eval.datasets=[{metric.task}]"]
        case "perplexity", _ if metric.task.partition("-")[0] in _FROM_A_PATH and "sample" not in metric.task:
            name = metric.task.partition("-")[0]
            definition = [f"eval.definition={metric.task}"] if name == "c4" else []
            options = [f"eval={name}", "eval.path=<file>", *definition, windows]
        case "perplexity", "decode":
            options = ["eval=decode", text, windows]
        case ("perplexity", _) | ("fidelity", "kl"):
            options = [f"eval={metric.evaluator}", text, windows]
        case "needle", _:
            options = ["eval=needle", text, f"eval.lengths=[{length}]"]
        case _:
            options = [f"eval={metric.evaluator}", text]
    return " ".join(["qbench eval", str(run.id), *options])
