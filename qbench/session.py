"""What the runs of one process share: models, tokenizers, token windows and structures, each made once."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qbench.assets import ModelAsset, cache_dir
from qbench.calibration.corpora import Corpus, tokenize
from qbench.calibration.order import Units, find_units, shuffle
from qbench.calibration.samplers import random, sequential
from qbench.compose import DTYPES, Point
from qbench.engine.passes import StructureCache
from qbench.engine.sinks import Weights
from qbench.engine.source import MemorySource, Source, StreamSource
from qbench.errors import SpecError
from qbench.evaluation.base import Subject
from qbench.measure import share_one_heap
from qbench.models.load import load_config, load_model, load_tokenizer, meta_model
from qbench.preflight import check_point, check_rotation
from qbench.spec import CalibrationSpec
from qbench.stages.rotation import RotateStage, quantizes_cache
from qbench.store.environment import detect
from qbench.store.records import Environment

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Session:
    """Caches by content. Only one model is held at a time: a sweep over models loads each when its turn comes."""

    tokens: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    units: dict[tuple[str, str], Units] = field(default_factory=dict)
    structures: dict[str, StructureCache] = field(default_factory=dict)
    skeletons: dict[str, PreTrainedModel] = field(default_factory=dict)
    tokenizers: dict[str, PreTrainedTokenizerBase] = field(default_factory=dict)
    rotatable: set[tuple[str, RotateStage, bool]] = field(default_factory=set)
    _environments: dict[torch.device, Environment] = field(default_factory=dict)
    _loaded: tuple[tuple, nn.Module] | None = None

    def __post_init__(self) -> None:
        share_one_heap()

    def model(self, point: Point) -> nn.Module:
        """The full-precision model in memory; callers leave it as it is."""
        identity = (point.model.fingerprint, point.spec.model.dtype, point.device)
        if self._loaded is None or self._loaded[0] != identity:
            self._loaded = None  # before the next one is loaded, not after
            dtype = DTYPES[point.spec.model.dtype]
            self._loaded = (identity, load_model(point.model, dtype=dtype, device=point.device))
        return self._loaded[1]

    def environment(self, point: Point) -> Environment:
        """Where the runs of this session happen; found out once per device."""
        if point.device not in self._environments:
            gpu = torch.cuda.get_device_name(point.device) if point.device.type == "cuda" else None
            self._environments[point.device] = detect(threads=torch.get_num_threads(), gpu=gpu)
        return self._environments[point.device]

    def source(self, point: Point) -> Source:
        if point.source == "memory":
            return MemorySource(self.model(point))
        dtype = DTYPES[point.spec.model.dtype]
        skeleton = meta_model(load_config(point.model), dtype=dtype)
        return StreamSource(point.model.path, skeleton, dtype, point.device)

    def skeleton(self, model: ModelAsset) -> PreTrainedModel:
        """The architecture without weights."""
        if model.fingerprint not in self.skeletons:
            self.skeletons[model.fingerprint] = meta_model(load_config(model))
        return self.skeletons[model.fingerprint]

    def tokenizer(self, model: ModelAsset) -> PreTrainedTokenizerBase:
        if model.fingerprint not in self.tokenizers:
            self.tokenizers[model.fingerprint] = load_tokenizer(model)
        return self.tokenizers[model.fingerprint]

    def structure_cache(self, model: ModelAsset) -> StructureCache:
        return self.structures.setdefault(model.fingerprint, StructureCache())

    def calibration(self, point: Point) -> Tensor | None:
        """Token windows int64 [n, length]; None where the pipeline looks at no data."""
        wanted: CalibrationSpec | None = point.spec.calibration
        if wanted is None:
            return None
        ids = self.ids(point.calibration, point.model)
        places = torch.arange(len(ids))
        if wanted.sampler == "sequential":
            places = sequential(places, wanted.n, wanted.length)
        else:
            places = random(places, wanted.n, wanted.length, wanted.seed)
        if wanted.shuffle is None:
            return ids[places]
        units = None if wanted.shuffle == "tokens" else self._units(point, wanted.shuffle).at(places)
        return shuffle(ids[places], wanted.shuffle, wanted.seed, units)

    def context(self, point: Point) -> PointContext:
        """What the point's evaluations may look at before weights are loaded."""
        return PointContext(self, point)

    def subject(self, point: Point, source: Source, weights: Weights, before: Weights | None = None) -> Subject:
        """The point's model as its evaluations see it."""
        fingerprint = f"{point.model.fingerprint}-{point.spec.model.dtype}"
        full = partial(self.model, point)
        return Subject(self.context(point), source.model, weights, full, fingerprint, before=before)

    def preflight(self, point: Point) -> None:
        """Everything that can be refused from the configuration and the texts, before any weights load.

        Raises SpecError for a group size that does not fit, windows longer than the model's context, texts with too
        few tokens, and an export of what needs more at run time than its weights.
        """
        if point.export is not None and point.pipeline.online:
            online = ", ".join(stage.name for stage in point.pipeline.stages if stage.online)
            reason = f"none: {online} transforms inputs at run time, which a checkpoint cannot say"
            raise SpecError("export", "hf", reason)
        check_point(point, self.skeleton(point.model))
        self._check_rotation(point)
        self.calibration(point)
        for evaluation in point.evaluations:
            evaluation.preflight(self.context(point))

    def ids(self, corpus: Corpus, model: ModelAsset) -> Tensor:
        """Token ids of a whole text, int64 [total]."""
        key = (corpus.fingerprint, model.fingerprint)
        if key not in self.tokens:
            self.tokens[key] = tokenize(corpus, self.tokenizer(model))
        return self.tokens[key]

    def _units(self, point: Point, wanted: str) -> Units:
        """Words and sentences of the calibration text, token by token."""
        tokenizer, corpus = self.tokenizer(point.model), point.calibration
        if not tokenizer.is_fast:
            reason = f"tokens: the tokenizer of {point.model.name} does not say where words and sentences are"
            raise SpecError("calib.shuffle", wanted, reason)
        key = (corpus.fingerprint, point.model.fingerprint)
        if key not in self.units:
            self.units[key] = find_units(tokenizer, corpus.text())
        return self.units[key]

    def _check_rotation(self, point: Point) -> None:
        """Try the rotation on one random block of the model's shape; once per model and rotation."""
        for stage in point.pipeline.stages:
            if isinstance(stage, RotateStage):
                cache = quantizes_cache(point.scheme)
                key = (point.model.fingerprint, stage, cache)
                if key not in self.rotatable:
                    rotation = stage.rotation(0, cache=cache)
                    check_rotation(stage.name, rotation, self.skeleton(point.model), point.model.name)
                    self.rotatable.add(key)


@dataclass(frozen=True)
class PointContext:
    """A point before its weights are loaded, as `evaluation.base.Context` describes it."""

    session: Session
    point: Point

    @property
    def name(self) -> str:
        return self.point.model.name

    @property
    def skeleton(self) -> PreTrainedModel:
        return self.session.skeleton(self.point.model)

    @property
    def cache_folder(self) -> Path:
        return cache_dir() / "evaluation"

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.session.tokenizer(self.point.model)

    def tokens(self, corpus: Corpus) -> Tensor:
        return self.session.ids(corpus, self.point.model)

    def calibration(self) -> Tensor | None:
        return self.session.calibration(self.point)

    @property
    def pipeline(self) -> str:
        return self.point.spec.algo

    def quantizes_at_run_time(self) -> str | None:
        point = self.point
        if point.pipeline.online:
            return "inputs, which are transformed"
        if point.scheme is None or not point.scheme.at_run_time:
            return None
        return "inputs" if point.scheme.input is not None else "cache"
