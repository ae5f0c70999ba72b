"""QuaRot (arXiv 2404.00456): rotate the model so that no channel of what is quantized sticks out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from qbench.errors import SpecError
from qbench.formats.scheme import Scheme
from qbench.stages.rotation import RotateStage, quantizes_cache
from qbench.structure.rotation import OnlineOutput, Rotation


@dataclass(frozen=True, kw_only=True)
class QuaRot(RotateStage):
    """Stages 1a-1d of the paper, section 4: the residual stream by a Hadamard matrix with random signs (or a random
    orthogonal one), values per head, what the output and down weights read, keys behind the rotary embedding.

    Departures: keys are rotated back after they are quantized, which equals rotating the queries, and only where the
    cache is quantized. Where no Hadamard matrix mixes as many heads, the authors' code takes another; here that part is
    left out (metric cross_heads 0), or online_o=full mixes all channels instead.
    """

    name: ClassVar[str] = "quarot"
    version: ClassVar[int] = 1

    rotate_mode: Literal["hadamard", "random"] = "hadamard"
    residual: bool = True
    values: bool = True
    online_down: bool = True
    online_o: OnlineOutput = "heads"
    rotate_keys: bool = True

    def __post_init__(self) -> None:
        if not self.residual and self.rotate_mode != "hadamard":
            raise SpecError("algo.rotate_mode", self.rotate_mode, "it is about the residual stream: algo.residual=true")
        if not (self.residual or self.values or self.online_down or self.rotate_keys) and self.online_o == "none":
            raise SpecError(
                "algo.residual", False, "something to rotate: residual, values, online_down, online_o or keys"
            )

    @property
    def uses_random(self) -> bool:
        """Only the residual stream's rotation draws numbers."""
        return self.residual

    def check_scheme(self, scheme: Scheme) -> None:
        if quantizes_cache(scheme):
            return
        if not self.rotate_keys:
            raise SpecError("algo.rotate_keys", False, "a quantized cache (kv_bits): keys are rotated for it only")
        if not (self.residual or self.values or self.online):
            accepted = "something to rotate: residual, values, online_down or online_o; keys only with kv_bits"
            raise SpecError("algo.residual", False, accepted)

    @property
    def online(self) -> bool:
        return self.online_down or self.online_o != "none"

    def rotation(self, seed: int, *, cache: bool) -> Rotation:
        return Rotation(
            residual=self.rotate_mode if self.residual else None,
            values=self.values,
            online_down=self.online_down,
            online_o=self.online_o,
            keys=self.rotate_keys and cache,
            seed=seed,
        )
