"""OpenCompass on the quantized model: a subprocess in an environment of its own, which `qbench doctor` installs.

`environment` makes that environment, `inside` is all that runs in it; `catalog` turns names into OpenCompass's dataset
files, `data` finds or converts what they read, `driver` runs them, `summary` reads what they leave behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qbench.evaluation.base import Evaluation


def build(options: Mapping[str, Any], source: str) -> tuple[Evaluation, ...]:
    """One evaluation per dataset of `eval.datasets`."""
    from qbench.evaluation.opencompass.evaluator import build_evaluations  # torch, which installing does not need

    return build_evaluations(options, source)
