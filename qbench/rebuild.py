"""From a row of the database back to the point it came from, so that a finished run can be measured again."""

from __future__ import annotations

import inspect
import itertools
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from omegaconf import DictConfig, OmegaConf

from qbench.assets import ModelAsset, resolve_model
from qbench.calibration.corpora import Corpus, resolve_corpus
from qbench.compose import Point, device_of
from qbench.errors import SpecError
from qbench.evaluation.base import Evaluation
from qbench.formats.scheme import Scheme
from qbench.spec import CalibrationSpec, ModelSpec, RunSpec
from qbench.stages.pipeline import build_pipeline
from qbench.store.records import RunRow


@dataclass(frozen=True, kw_only=True)
class Means:
    """What a row does not say: where its files are, and how to carry the work out."""

    model: ModelAsset
    calib_path: str | None
    device: torch.device
    resume_s: float


def means(row: RunRow, config: DictConfig, named: Path) -> Means:
    """From a configuration for evaluations. The model is at `model.path` or, where that is not given, what the file of
    its name in the folder `named` says."""
    node = config.model
    if node.path is None:
        file = named / f"{row.model}.yaml"
        if not file.is_file():
            raise SpecError("model.path", None, f"where the model {row.model} of run {row.id} is")
        node = OmegaConf.load(file)
    return Means(
        model=resolve_model(name=node.name, path=node.path, asset=node.asset),
        calib_path=config.calib.path,
        device=device_of(config.device),
        resume_s=float(config.resume_s),
    )


def rebuilt(row: RunRow, evaluations: Sequence[Evaluation], means: Means) -> Point:
    """The point of a finished run with other evaluations. Raises SpecError or AssetError where that is impossible:
    another model or text under the name, or stages whose numbers have changed since."""
    stored = row.spec
    where = f"{row.id} ({row.algo})"
    if means.model.fingerprint != stored["model"]["fingerprint"]:
        accepted = f"the model of run {where}; {means.model.name} has other files; say where it is with model.path="
        raise SpecError("model", means.model.name, accepted)
    pipeline = build_pipeline([{"stage": stage["name"], **stage["options"]} for stage in stored["pipeline"]])
    for ours, theirs in zip(pipeline.specs(), stored["pipeline"], strict=True):
        if ours.version != theirs["version"]:
            accepted = f"a run of {ours.name} version {ours.version}, as this qbench has it (the run's: "
            raise SpecError("run", row.id, f"{accepted}{theirs['version']}); start it anew instead")
    calibration, corpus = _calibration(stored["calibration"], means.calib_path, where)
    candidates = (
        RunSpec(
            algo=stored["algo"],
            model=ModelSpec(**stored["model"]),
            pipeline=pipeline.specs(),
            scheme=scheme,
            calibration=calibration,
            seed=stored["seed"],
        )
        for scheme in readings(Scheme | None, _as_described(stored["scheme"]))
    )
    spec = next((found for found in candidates if found.key() == row.key), None)
    if spec is None:
        raise SpecError("run", row.id, "a run whose settings this qbench reads as they were; start it anew instead")
    return Point(
        spec=spec,
        evaluations=tuple(evaluations),
        model=replace(means.model, name=stored["model"]["name"]),
        calibration=corpus,
        pipeline=pipeline,
        scheme=spec.scheme,
        device=means.device,
        source="memory",
        export=None,
        resume_s=means.resume_s,
    )


def _calibration(
    stored: Mapping[str, Any] | None, path: str | None, where: str
) -> tuple[CalibrationSpec | None, Corpus | None]:
    if stored is None:
        return None, None
    spec = CalibrationSpec(**stored)
    if path is None:
        remedy = f"calib.path=: the text {spec.corpus} that run {where} was calibrated with"
        try:
            corpus = resolve_corpus(spec.corpus)
        except SpecError as error:
            raise SpecError("calib.path", None, remedy) from error
    else:
        corpus = resolve_corpus(spec.corpus, path)
    if corpus.fingerprint != spec.fingerprint:
        raise SpecError(
            "calib.path", path or spec.corpus, f"the text that run {where} was calibrated with; this is another"
        )
    return spec, corpus


def readings(kind: Any, value: Any) -> Iterator[Any]:
    """Instances of the (annotated) type `kind` that `dataclasses.asdict` and JSON would turn into `value`.

    Mostly one; where `kind` is an abstract class, one for each subclass that has just these fields (scale formats
    without fields look the same).
    """
    if get_origin(kind) in (Union, types.UnionType):
        inner = next(option for option in get_args(kind) if option is not type(None))
        yield from [None] if value is None else readings(inner, value)
    elif get_origin(kind) is tuple:
        yield from itertools.product(*(list(readings(get_args(kind)[0], item)) for item in value))
    elif inspect.isclass(kind) and isinstance(value, Mapping):
        for found in _concrete(kind):
            if {field.name for field in fields(found)} == value.keys():
                hints = get_type_hints(found)
                each = [list(readings(hints[name], item)) for name, item in value.items()]
                for items in itertools.product(*each):
                    yield found(**dict(zip(value, items, strict=True)))
    else:
        yield value


def _as_described(scheme: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A stored scheme without the labels that `RunSpec.describe` adds."""
    if scheme is None:
        return None
    overrides = [{name: part for name, part in each.items() if name != "label"} for each in scheme["overrides"]]
    return {**scheme, "overrides": overrides}


def _concrete(kind: type) -> list[type]:
    """`kind` and all its subclasses that are dataclasses and not abstract."""
    found = [kind] if is_dataclass(kind) and not inspect.isabstract(kind) else []
    return found + [each for child in kind.__subclasses__() for each in _concrete(child)]
