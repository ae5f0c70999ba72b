"""Measurements of a model: one file per evaluator."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from qbench.evaluation.base import Evaluation


class Evaluator(Protocol):
    """A module of this package that `eval=` can name."""

    build: Callable[[Mapping[str, Any], str], tuple[Evaluation, ...]]


def evaluator(name: str) -> Evaluator:
    """The module that measures what `conf/eval/<...>.yaml` describes; imported when it is asked for."""
    return importlib.import_module(f"qbench.evaluation.{name}")
