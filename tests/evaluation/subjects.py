"""Models under test as evaluators see them, without a session: full precision, and quantized by a recipe."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from qbench.calibration.corpora import tokenize
from qbench.engine.loop import Recipe
from qbench.engine.passes import run_pass
from qbench.engine.sinks import Weights
from qbench.engine.source import MemorySource
from qbench.evaluation.base import Subject
from qbench.formats import uniform
from qbench.formats.scheme import Scheme
from qbench.models.load import load_model, load_tokenizer
from qbench.stages.pipeline import build_pipeline
from qbench.structure.blocks import find_blocks
from tests.engine.helpers import tiny_asset


@dataclass(frozen=True)
class FakeContext:
    """What `evaluation.base.Context` asks for, of `model=tiny`."""

    cache_folder: Path
    name: str = "tiny"
    skeleton: object = None
    ids: dict = field(default_factory=dict)
    windows: torch.Tensor | None = None
    pipeline: str = "none"

    def tokenizer(self):
        return load_tokenizer(tiny_asset())

    def tokens(self, corpus):
        if corpus.fingerprint not in self.ids:
            self.ids[corpus.fingerprint] = tokenize(corpus, self.tokenizer())
        return self.ids[corpus.fingerprint]

    def calibration(self):
        return self.windows

    def quantizes_at_run_time(self):
        return None


def full_precision(folder, model=None, *, context=None):
    """The full-precision run: nothing to swap in."""
    model = model or load_model(tiny_asset(), dtype=torch.float32, device="cpu")
    context = context or FakeContext(folder, skeleton=model)
    return Subject(context, model, Weights(find_blocks(model)[0]), lambda: model, "full")


def quantized(folder, bits, *, group_size=32, cache=None, inputs=None, model=None, windows=None):
    """Rounded to nearest; `cache` and `inputs` are formats of the scheme."""
    subject = full_precision(folder, model)
    pipeline = build_pipeline([{"stage": "rtn"}])
    scheme = Scheme(weight=uniform(bits=bits, group_size=group_size, symmetric=False), cache=cache, input=inputs)
    result = run_pass(MemorySource(subject.model), Recipe(pipeline, scheme), windows)
    return Subject(subject.context, subject.model, result.weights, subject.full, subject.full_key)
