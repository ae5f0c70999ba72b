"""Stages that act on a whole model: they say what is to be rotated, the engine does it before anything else."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from qbench.errors import StructureError
from qbench.formats.scheme import Scheme
from qbench.stages.base import BlockView, Kind, Need, Outcome, Stage
from qbench.structure.rotation import Rotation


@dataclass(frozen=True, kw_only=True)
class RotateStage(Stage):
    """Base of stages whose result is a `Rotation` of the full-precision model that all later stages see. learned:
    whether `rotation` is only where learning on calibration text starts (engine/spinquant.py)."""

    kind: ClassVar[Kind] = Kind.ROTATE
    needs: ClassVar[frozenset[Need]] = frozenset()
    learned: ClassVar[bool] = False

    @abstractmethod
    def rotation(self, seed: int, *, cache: bool) -> Rotation:
        """What is rotated, random parts by `seed`; cache: whether keys are going to be quantized."""

    def apply(self, view: BlockView) -> Outcome:
        """Raises StructureError: a block alone cannot be rotated."""
        raise StructureError(f"{view.where}: {self.name} rotates whole models, not a block")


def quantizes_cache(scheme: Scheme) -> bool:
    """Whether keys and values of some block are quantized."""
    return any(role.cache is not None for role in (scheme, *scheme.overrides))
