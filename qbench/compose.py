"""From a composed configuration to a frozen `Point`: every value checked, every file found, nothing loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qbench.assets import ModelAsset, resolve_model
from qbench.calibration.corpora import Corpus, resolve_corpus
from qbench.calibration.order import SHUFFLES
from qbench.checks import choice, flag, integer
from qbench.engine.loop import Recipe
from qbench.errors import SpecError
from qbench.evaluation import evaluator
from qbench.evaluation.base import CalibrationEvaluation, Evaluation
from qbench.formats.scheme import Scheme
from qbench.scheme import build_scheme
from qbench.spec import CalibrationSpec, ModelSpec, RunSpec
from qbench.stages.pipeline import Pipeline, build_pipeline
from qbench.stages.rotation import RotateStage

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAMPLERS = ("random", "sequential")
SOURCES = ("memory", "stream")
EXPORTS = ("none", "hf")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run that is wanted: its meaning (`spec`, `evaluations`) and how to carry it out (the rest)."""

    spec: RunSpec
    evaluations: tuple[Evaluation, ...]
    model: ModelAsset
    calibration: Corpus | None
    pipeline: Pipeline
    scheme: Scheme | None
    device: torch.device
    source: str
    export: Path | None
    resume_s: float

    @property
    def recipe(self) -> Recipe | None:
        return Recipe(self.pipeline, self.scheme, self.spec.seed or 0) if self.scheme is not None else None

    @property
    def label(self) -> str:
        """Short text such as `gptq int4_g64_asym`."""
        return self.spec.algo if self.scheme is None else f"{self.spec.algo} {self.scheme.label}"


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What all points of an invocation share."""

    store_url: str
    results: Path
    dry_run: bool


def sweep_options(config: DictConfig) -> SweepOptions:
    store, results = config.store.url, config.results
    if not isinstance(store, str) or "://" not in store:
        raise SpecError("store.url", store, "a database URL such as sqlite:///results/results.db")
    return SweepOptions(
        store_url=store, results=Path(_text("results", results)), dry_run=flag("dry_run", config.dry_run)
    )


def freeze(config: DictConfig) -> Point:
    """The point that `config` describes. Raises SpecError or AssetError; reads files, loads no weights."""
    try:
        own = OmegaConf.masked_copy(config, [name for name in config if name != "hydra"])
        values: Mapping[str, Any] = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise SpecError("configuration", error.full_key or "?", str(error).splitlines()[0]) from error
    pipeline = build_pipeline(values["algo"]["pipeline"])
    seed = integer("seed", values["seed"], 0)
    scheme = build_scheme(values, pipeline.zero_point)  # checked even where nothing is quantized
    if not pipeline.stages and scheme.at_run_time:
        raise SpecError("algo", values["algo"]["name"], "rtn or another algorithm: inputs or cache are to be quantized")
    if pipeline.stages and not scheme.weights and not scheme.at_run_time and not scheme.overrides:
        raise SpecError("format", "none", "something to quantize (format, act_bits, kv_bits), or algo=none")
    pipeline.check(scheme.weights, scheme)
    device = device_of(values["device"])
    source = choice("source", values["source"], SOURCES)
    learned = [stage.name for stage in pipeline.stages if isinstance(stage, RotateStage) and stage.learned]
    if learned and source != "memory":
        raise SpecError("source", source, f"memory with {learned[0]}, which learns on the whole model")
    evaluations = evaluations_of(values["eval"], source)
    needs_data = pipeline.needs_data or (bool(pipeline.stages) and scheme.needs_data)
    calibration_spec, calibration = _calibration(values["calib"], needs_data)
    dtype = choice("dtype", values["dtype"], DTYPES)
    export = _export(values["export"])
    if export is not None and pipeline.stages and not scheme.weights and not scheme.overrides:
        raise SpecError("export", "hf", "quantized weights: what is quantized at run time is not in a checkpoint")
    resume_s = values["resume_s"]
    if isinstance(resume_s, bool) or not isinstance(resume_s, (int, float)) or resume_s < 0:
        raise SpecError("resume_s", resume_s, "seconds >= 0")
    node = values["model"]
    model = resolve_model(name=node["name"], path=node["path"], asset=node["asset"])
    spec = RunSpec(
        algo=_text("algo.name", values["algo"]["name"]),
        model=ModelSpec(name=model.name, fingerprint=model.fingerprint, dtype=dtype),
        pipeline=pipeline.specs(),
        scheme=scheme if pipeline.stages else None,
        calibration=calibration_spec,
        seed=seed if pipeline.uses_random else None,
    )
    return Point(
        spec=spec,
        evaluations=evaluations,
        model=model,
        calibration=calibration,
        pipeline=pipeline,
        scheme=spec.scheme,
        device=device,
        source=source,
        export=export,
        resume_s=float(resume_s),
    )


def baseline(point: Point) -> Point:
    """The full-precision point that `point` is compared with: same model and evaluations (but those of a calibration,
    which it does without), nothing quantized."""
    spec = RunSpec(algo="none", model=point.spec.model)
    return Point(
        **{f: getattr(point, f) for f in ("model", "device", "source", "resume_s")},
        spec=spec,
        evaluations=tuple(each for each in point.evaluations if not isinstance(each, CalibrationEvaluation)),
        calibration=None,
        pipeline=Pipeline(()),
        scheme=None,
        export=None,
    )


def _calibration(node: Mapping[str, Any], needs_data: bool) -> tuple[CalibrationSpec | None, Corpus | None]:
    """Checked even where nothing looks at the text; then it is not part of the run."""
    n, length = integer("calib.n", node["n"], 1), integer("calib.length", node["length"], 2)
    sampler, seed = choice("calib.sampler", node["sampler"], SAMPLERS), integer("calib.seed", node["seed"], 0)
    shuffle = choice("calib.shuffle", node["shuffle"], SHUFFLES)
    if node["name"] == "text" and node["path"] is None:
        raise SpecError("calib.path", None, 'with calib=text: a .txt file, or a .jsonl file with a "text" in each row')
    if node["name"] != "text" and node["path"] is not None:
        raise SpecError("calib.path", node["path"], f"needs calib=text (now calib={node['name']})")
    corpus = resolve_corpus(node["name"], node["path"], option="calib.path" if node["path"] else "calib")
    if not needs_data:
        return None, None
    spec = CalibrationSpec(
        corpus=corpus.name,
        fingerprint=corpus.fingerprint,
        sampler=sampler,
        n=n,
        length=length,
        seed=seed if sampler == "random" or shuffle != "none" else None,
        shuffle=None if shuffle == "none" else shuffle,
    )
    return spec, corpus


def evaluations_of(node: Mapping[str, Any], source: str) -> tuple[Evaluation, ...]:
    """What `eval=` asks for; a composed node (`eval=perplexity+zeroshot`) holds the parts by name."""
    parts = [node[name] for name in node["name"].split("+")] if "+" in node["name"] else [node]
    found: list[Evaluation] = []
    for part in parts:
        batch = None if part["batch"] is None else integer("eval.batch", part["batch"], 1)
        for evaluation in evaluator(part.get("evaluator", part["name"])).build(part, source):
            if source != "memory" and not evaluation.streams:
                remedy = f"memory: {part['name']} cannot measure a model that is read block by block"
                raise SpecError("source", source, remedy)
            found.append(replace(evaluation, batch=batch))
    keys = [evaluation.spec.key() for evaluation in found]
    for place, evaluation in enumerate(found):
        if keys[place] in keys[:place]:
            twin = found[keys.index(keys[place])].spec.task
            raise SpecError("eval", node["name"], f"every measurement once; {evaluation.spec.task} is {twin} again")
    return tuple(found)


def _export(node: Mapping[str, Any]) -> Path | None:
    kind, path = choice("export", node["name"], EXPORTS), node["path"]
    if kind == "none":
        if path is not None:
            raise SpecError("export.path", path, "needs export=hf")
        return None
    if path is None:
        raise SpecError("export.path", None, "with export=hf: the folder to write")
    folder = Path(_text("export.path", path)).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (folder / "config.json").is_file():
        raise SpecError("export.path", path, "a new or empty folder, or an earlier export to replace")
    return folder


def device_of(value: object) -> torch.device:
    name = choice("device", value, ("auto", "cpu", "cuda")) if not _is_indexed(value) else str(value)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise SpecError("device", value, "no CUDA device is available here; accepted: auto, cpu")
    device = torch.device(name)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise SpecError("device", value, f"this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def _is_indexed(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"cuda:\d+", value) is not None


def _text(option: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise SpecError(option, value, "must be a text")
    return value
