"""Round to nearest: every weight to the closest value of its grid, data-free (METHODS: the baseline of all)."""

from dataclasses import dataclass
from typing import ClassVar

from qbench.formats import fit, quantize
from qbench.stages.base import BlockView, Kind, Need, Outcome, Stage


@dataclass(frozen=True, kw_only=True)
class Rtn(Stage):
    """Nearest codes on the range that an earlier stage chose, or on min-max."""

    name: ClassVar[str] = "rtn"
    kind: ClassVar[Kind] = Kind.ROUND
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Need]] = frozenset()

    def apply(self, view: BlockView) -> Outcome:
        codes = {}
        for group in view.groups:
            for ref in group.weights:
                weight, fmt = view.weight(ref).float(), view.format(ref)
                codes[ref.name] = quantize(weight, fmt, fit(weight, fmt, view.ranges.get(ref.name)))
        return Outcome(codes=codes)
