"""What the runs of one process share: models, tokenizers, token windows and structures, each made once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qbench.assets import ModelAsset
from qbench.calibration.corpora import Corpus, tokenize
from qbench.calibration.samplers import evaluation_windows, random, sequential
from qbench.compose import DTYPES, Point
from qbench.engine.passes import StructureCache
from qbench.engine.source import MemorySource, Source, StreamSource
from qbench.errors import SpecError
from qbench.measure import share_one_heap
from qbench.models.load import load_config, load_model, load_tokenizer, meta_model
from qbench.spec import CalibrationSpec, EvaluationSpec
from qbench.store.environment import detect
from qbench.store.records import Environment

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Session:
    """Caches by content. Only one model is held at a time: a sweep over models loads each when its turn comes."""

    tokens: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    structures: dict[str, StructureCache] = field(default_factory=dict)
    skeletons: dict[str, PreTrainedModel] = field(default_factory=dict)
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

    def structure_cache(self, model: ModelAsset) -> StructureCache:
        return self.structures.setdefault(model.fingerprint, StructureCache())

    def calibration(self, point: Point) -> Tensor | None:
        """Token windows int64 [n, length]; None where the pipeline looks at no data."""
        wanted: CalibrationSpec | None = point.spec.calibration
        if wanted is None:
            return None
        ids = self._ids(point.calibration, point.model)
        if wanted.sampler == "sequential":
            return sequential(ids, wanted.n, wanted.length)
        return random(ids, wanted.n, wanted.length, wanted.seed)

    def windows(self, wanted: EvaluationSpec, corpus: Corpus, model: ModelAsset) -> Tensor:
        return evaluation_windows(self._ids(corpus, model), wanted.length, wanted.n)

    def preflight(self, point: Point) -> None:
        """Everything that can be refused from the configuration and the texts, before any weights load.

        Raises SpecError for a group size that does not fit, windows longer than the model's context, and texts with
        too few tokens.
        """
        skeleton = self.skeleton(point.model)
        check_context(point, skeleton)
        if point.format is not None:
            check_groups(point, skeleton)
        self.calibration(point)
        for wanted, corpus in zip(point.evaluations, point.corpora, strict=True):
            self.windows(wanted, corpus, point.model)

    def _ids(self, corpus: Corpus, model: ModelAsset) -> Tensor:
        key = (corpus.fingerprint, model.fingerprint)
        if key not in self.tokens:
            self.tokens[key] = tokenize(corpus, load_tokenizer(model))
        return self.tokens[key]


def check_context(point: Point, skeleton: PreTrainedModel) -> None:
    limit = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:  # positions are not bounded (ALiBi)
        return
    lengths = [("eval.length", wanted.length) for wanted in point.evaluations]
    if point.spec.calibration is not None:
        lengths.append(("calib.length", point.spec.calibration.length))
    for option, length in lengths:
        if length > limit:
            raise SpecError(option, length, f"at most {limit}, the context of {point.model.name}")


def check_groups(point: Point, skeleton: PreTrainedModel) -> None:
    """Every linear weight's in_features must be a multiple of the group size (or partial_group allow a rest)."""
    widths = linear_widths(skeleton)
    unfit = [(name, width) for name, width in widths.items() if not point.format.fits(width)]
    if unfit:
        name, width = unfit[0]
        smallest = min(widths.values())
        fitting = [str(g) for g in range(8, smallest + 1) if all(width % g == 0 for width in widths.values())]
        raise SpecError(
            "group_size",
            point.format.group_size,
            f"does not divide in_features {width} of {name}; sizes that fit every layer: {', '.join(fitting)}, "
            "-1 (channel), 0 (tensor); or partial_group=true for a shorter last group",
        )


def linear_widths(skeleton: PreTrainedModel) -> dict[str, int]:
    """in_features of the linear weights in the blocks, by parameter name, without running the model."""
    from transformers.pytorch_utils import Conv1D

    from qbench.structure.blocks import find_blocks

    widths = {}
    prefix, blocks = find_blocks(skeleton)
    for path, module in blocks.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, torch.nn.Embedding) or parameter.ndim not in (2, 3):
                continue
            axis = 0 if isinstance(module, Conv1D) else -1
            widths[f"{prefix}.{path}.{name}"] = parameter.shape[axis]
    return widths
