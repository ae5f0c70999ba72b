"""What an evaluator is: something that measures a model under a named protocol. One file per evaluator.

A file `qbench/evaluation/<name>.py` with a function `build` is the evaluator `eval=<name>`; `conf/eval/<name>.yaml`
holds its options.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
from torch import Tensor, nn

from qbench.engine.sinks import Weights
from qbench.spec import EvaluationSpec
from qbench.store.records import Measurement
from qbench.structure.blocks import find_blocks
from qbench.structure.online import attached_to_attention

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

    from qbench.calibration.corpora import Corpus

#: Called with how many items are done, and of how many.
Report = Callable[[int, int], None]


class Context(Protocol):
    """What an evaluation may look at before weights are loaded."""

    @property
    def name(self) -> str:
        """The model's name, for messages."""
        ...

    @property
    def skeleton(self) -> PreTrainedModel:
        """The architecture, parameters on the meta device."""
        ...

    @property
    def cache_folder(self) -> Path:
        """Where an evaluator may keep files that save work, such as full-precision outputs."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    def tokens(self, corpus: Corpus) -> Tensor:
        """Token ids of a whole text, int64 [total]."""
        ...

    def calibration(self) -> Tensor | None:
        """Token windows that the run is calibrated with, int64 [n, length]; None where it looks at no text."""
        ...

    @property
    def pipeline(self) -> str:
        """The name of the run's algorithm, for messages."""
        ...

    def quantizes_at_run_time(self) -> str | None:
        """What the run quantizes while the model runs, in words ("inputs", "cache"); None: nothing."""
        ...


@dataclass(frozen=True)
class Subject:
    """The model that is measured, full precision beside it.

    `model` is changed while one of the contexts is open and as it was afterwards. `full` gives the checkpoint's own
    model, which may be the same object: not to be used inside the contexts. `batch` is `eval.batch`. `before` are the
    weights before rounding, for evaluations that ask for them.
    """

    context: Context
    model: nn.Module
    weights: Weights
    full: Callable[[], nn.Module]
    full_key: str
    batch: int | None = None
    before: Weights | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.context.tokenizer()

    @property
    def cache_folder(self) -> Path:
        return self.context.cache_folder

    @property
    def full_precision_key(self) -> str:
        """Names the full-precision model's content and dtype, for caches."""
        return self.full_key

    def tokens(self, corpus: Corpus) -> Tensor:
        return self.context.tokens(corpus)

    def full_precision(self) -> nn.Module:
        return self.full()

    def quantized(self) -> AbstractContextManager[nn.Module]:
        """The model with quantized weights, inputs and, in one forward over whole sequences, key/value cache."""
        return self.weights.inside(self.model)

    def unrounded(self) -> AbstractContextManager[nn.Module]:
        """The full-precision model after the run's transformations: nothing rounded, nothing quantized."""
        return (self.before or self.weights).inside(self.model)

    @contextmanager
    def decoding(self) -> Iterator[tuple[nn.Module, Callable[[], Cache]]]:
        """The model for work token by token, and a function that gives an empty cache, which quantizes what it holds
        if the scheme says so."""
        from transformers import DynamicCache  # here: plans are made without importing transformers

        from qbench.models.kv_cache import QuantizedCache

        count = self.model.config.get_text_config().num_hidden_layers
        formats, params = self.weights.caches(count)
        with self.weights.inside(self.model, cache=False) as model:
            if not any(formats):
                yield model, lambda: DynamicCache(config=model.config)
                return
            rotations = [attached_to_attention(block) for block in find_blocks(model)[1]]
            yield model, lambda: QuantizedCache(formats, params, rotations)


@dataclass(frozen=True, kw_only=True)
class Evaluation(ABC):
    """One wanted measurement: its identity and how to take it. Frozen, and cheap to make: nothing is loaded."""

    #: Whether a model that is read block by block (source=stream) can be measured: then it is a `WindowEvaluation`, or
    #: one that reads no model.
    streams: ClassVar[bool] = False

    #: Whether it also looks at the weights before rounding, which are kept for it: a second model in memory.
    keeps_unrounded: ClassVar[bool] = False

    #: Names of the metrics that it gives, without what stands behind a comma; None: they follow from its tasks.
    metrics: ClassVar[tuple[str, ...] | None] = None

    #: The option that `spec.length` comes from, for messages.
    length_option: ClassVar[str] = "eval.length"

    spec: EvaluationSpec
    #: Items per forward; None: the evaluator chooses. Not part of the identity.
    batch: int | None = field(default=None, compare=False)

    @abstractmethod
    def preflight(self, context: Context) -> None:
        """Refuse, before weights are loaded, what cannot be measured: SpecError or AssetError in one line."""

    @abstractmethod
    def measure(self, subject: Subject, report: Report) -> list[Measurement]:
        """The numbers, with standard errors and samples. Raises EvaluationError for what is no number."""


class WindowEvaluation(Evaluation):
    """An evaluation by the losses of token windows, which a streamed model can be measured by as well."""

    streams = True

    @abstractmethod
    def windows(self, context: Context) -> Tensor:
        """Token windows int64 [n, length]."""

    @abstractmethod
    def clusters(self, context: Context, n: int) -> np.ndarray | None:
        """For the first `n` windows the document in which each begins, int64 [n]; None where nothing is known."""

    @abstractmethod
    def measurements(self, nll: Tensor, context: Context) -> list[Measurement]:
        """The numbers from the windows' mean losses in nats, float64 [n]."""


class CalibrationEvaluation(Evaluation):
    """An evaluation of what a run was calibrated with. It reads no model: a finished run is measured without being
    rebuilt. A run without calibration is refused in `preflight`; full precision is not measured along."""

    streams = True

    @abstractmethod
    def of_texts(self, context: Context) -> list[Measurement]:
        """The numbers. Raises EvaluationError for what is no number."""

    def measure(self, subject: Subject, report: Report) -> list[Measurement]:
        return self.of_texts(subject.context)
