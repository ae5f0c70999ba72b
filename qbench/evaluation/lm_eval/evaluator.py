"""`eval=zeroshot`: tasks and groups of lm-eval as evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbench.checks import integer
from qbench.errors import AssetError, SpecError
from qbench.evaluation.base import Context, Evaluation, Report, Subject
from qbench.evaluation.lm_eval import data, harness
from qbench.evaluation.lm_eval.definitions import Group, Leaf, installed
from qbench.evaluation.lm_eval.harness import Score, Wanted
from qbench.spec import EvaluationSpec, digest
from qbench.store.records import Measurement

#: Raise when the same items give another number.
VERSION = 1

_UNITS = {"perplexity": "ppl", "word_perplexity": "ppl", "byte_perplexity": "ppl", "bits_per_byte": "bits/byte"}


@dataclass(frozen=True, kw_only=True)
class ZeroShot(Evaluation):
    """One task, or a group with a common score: then its tasks and subgroups are measured and stored along with it."""

    tasks: tuple[Wanted, ...]
    groups: tuple[Group, ...]
    #: The specs of all tasks and groups, by name; `spec` is that of the one that was asked for.
    specs: Mapping[str, EvaluationSpec]

    def preflight(self, context: Context) -> None:
        for each in self.tasks:
            _check_generation(each.leaf, context)
        # Reading items takes seconds; what was read once under this key will be read again.
        proof = context.cache_folder / "lm_eval" / "read" / self.spec.key()
        if proof.is_file():
            return
        with harness.loaded(self.tasks):
            pass
        try:
            proof.parent.mkdir(parents=True, exist_ok=True)
            proof.touch()
        except OSError:  # a cache folder that cannot be written: slower, yet the same
            pass

    def measure(self, subject: Subject, report: Report) -> list[Measurement]:
        scores = harness.evaluate(self.tasks, self.groups, self.spec.n, subject, self.batch, report)
        return [_measurement(score, self.specs[name]) for name, found in scores.items() for score in found]


def build(options: Mapping[str, Any], source: str) -> tuple[Evaluation, ...]:
    """The evaluations that `conf/eval/zeroshot.yaml` describes: one per task, and per group with a common score.

    Raises SpecError and AssetError in one line for unknown tasks, items that are neither in eval.data_dir nor on the
    hub, and tasks that cannot be measured.
    """
    names = options["tasks"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise SpecError("eval.tasks", names, "a list of lm-eval's tasks such as [piqa,arc_easy]")
    limit = None if options["limit"] is None else integer("eval.limit", options["limit"], 1)
    shots = None if options["num_fewshot"] is None else integer("eval.num_fewshot", options["num_fewshot"], 0)
    folder = None
    if options["data_dir"] is not None:
        folder = Path(str(options["data_dir"])).expanduser().absolute()
        if not folder.is_dir():
            raise AssetError(f"eval.data_dir={options['data_dir']}: no such folder")
    definitions = installed()
    wanted = [found for name in dict.fromkeys(names) for found in definitions.resolve(name)]
    _check_twice(wanted)
    return tuple(_evaluation(each, limit, shots, folder, definitions.version) for each in wanted)


def _check_twice(wanted: Sequence[Leaf | Group]) -> None:
    """A task counts once: its rows would be stored twice."""
    seen: dict[str, str] = {}
    for each in wanted:
        for leaf in _leaves(each):
            if leaf.name in seen:
                raise SpecError("eval.tasks", leaf.name, f"every task once; it is in {seen[leaf.name]} and {each.name}")
            seen[leaf.name] = each.name


def _leaves(wanted: Leaf | Group) -> tuple[Leaf, ...]:
    return (wanted,) if isinstance(wanted, Leaf) else wanted.leaves


def _groups(wanted: Leaf | Group) -> Iterator[Group]:
    if isinstance(wanted, Group):
        yield wanted
        for child in wanted.children:
            yield from _groups(child)


def _evaluation(
    asked: Leaf | Group, limit: int | None, shots: int | None, folder: Path | None, version: str
) -> ZeroShot:
    tasks = []
    for leaf in _leaves(asked):
        _check_measurable(leaf)
        own = _shots(leaf, shots)
        tasks.append(Wanted(leaf, data.local(leaf, folder, own) if folder else data.hub(leaf, own), own))
    specs = {each.leaf.name: _spec(each, limit, version) for each in tasks}
    groups = tuple(_groups(asked))
    for group in groups:
        specs[group.name] = _group_spec(group, [specs[leaf.name] for leaf in group.leaves], limit, version)
    return ZeroShot(spec=specs[asked.name], tasks=tuple(tasks), groups=groups, specs=specs)


def _check_measurable(leaf: Leaf) -> None:
    """SpecError for what needs more than text in and text out, greedily."""
    config = leaf.config
    if config.get("doc_to_image") is not None or config.get("doc_to_audio") is not None:
        raise SpecError("eval.tasks", leaf.name, "tasks of text; this one shows images or plays sounds")
    if config.get("unsafe_code"):
        raise SpecError("eval.tasks", leaf.name, "tasks that run no generated code; this one does")
    arguments = config.get("generation_kwargs") or {}
    samples = arguments.get("do_sample", float(arguments.get("temperature") or 0) > 0)
    if leaf.generates and "class" not in config and samples:
        raise SpecError("eval.tasks", leaf.name, "tasks that decode greedily; this one samples")


def _shots(leaf: Leaf, wanted: int | None) -> int:
    """lm-eval's rule: the task's own number of examples if none is asked for; a task that says 0 stays at 0."""
    own = leaf.config.get("num_fewshot")
    if wanted is None:
        return own or 0
    if own == 0 and wanted:
        raise SpecError("eval.num_fewshot", wanted, f"0 or null: lm-eval shows no examples in {leaf.name}")
    return wanted


def _check_generation(leaf: Leaf, context: Context) -> None:
    """SpecError where the model generates no text, or its context is too short for what the task asks for."""
    if not leaf.generates or "class" in leaf.config:
        return
    if not context.skeleton.can_generate():
        raise SpecError("eval.tasks", leaf.name, f"tasks without generation: {context.name} generates no text")
    most = (leaf.config.get("generation_kwargs") or {}).get("max_gen_toks")
    longest = getattr(context.skeleton.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and longest is not None and most >= longest:
        remedy = f"tasks of fewer than {longest} tokens, the context of {context.name}; this one generates {most}"
        raise SpecError("eval.tasks", leaf.name, remedy)


def _spec(wanted: Wanted, limit: int | None, version: str) -> EvaluationSpec:
    options = {"definition": wanted.leaf.fingerprint, "lm_eval": version, "task_version": wanted.leaf.version}
    if wanted.shots:
        options["fewshot_seed"] = harness.FEWSHOT_SEED
    return EvaluationSpec(
        evaluator="zeroshot",
        version=VERSION,
        task=wanted.leaf.name,
        fingerprint=wanted.source.fingerprint,
        length=None,
        n=limit,
        mode=f"{wanted.shots}-shot",
        options=tuple(sorted(options.items())),
    )


def _group_spec(group: Group, parts: Sequence[EvaluationSpec], limit: int | None, version: str) -> EvaluationSpec:
    modes = {part.mode for part in parts}
    return EvaluationSpec(
        evaluator="zeroshot",
        version=VERSION,
        task=group.name,
        fingerprint=digest([part.key() for part in parts]),
        length=None,
        n=limit,
        mode=modes.pop() if len(modes) == 1 else "mixed-shot",
        options=(("aggregate", digest(list(map(dict, group.aggregates)))), ("lm_eval", version)),
    )


def _measurement(score: Score, spec: EvaluationSpec) -> Measurement:
    return Measurement(
        evaluator=spec.evaluator,
        protocol=spec.protocol,
        task=spec.task,
        name=score.name,
        value=score.value,
        stderr=score.stderr,
        n=score.n,
        unit=_UNITS.get(score.parts[0], "fraction" if score.samples is not None else "score"),
        spec_key=spec.key(),
        samples=score.samples,
        higher_is_better=score.higher_is_better,
        whole=spec.n is None,
    )
