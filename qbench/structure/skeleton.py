"""The skeleton of a block: what its linear weights feed directly, and whether by a mere factor."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qbench.structure.blocks import BlockCall
from qbench.structure.float64 import LinearReplacement, call_with, float64_values
from qbench.structure.operations import LinearOperations, LinearUse
from qbench.structure.trace import BlockStructure

WeightKey = tuple[str, int | None]
"""Parameter path and expert slice of a linear weight."""

_MIN_DRAWS, _MAX_DRAWS = 2, 48
# A path that is linear only up to some magnitude, as through a clamp, is not linear.
_LARGE = 100.0
# Seeds per draw, one for every weight: a generator on the CPU looks at the lowest 32 bits of its seed only.
_DRAWS = 100_003


@dataclass(frozen=True, kw_only=True)
class Response:
    """What a block computed around its linear weights."""

    inputs: Mapping[WeightKey, Tensor]
    """Input of each weight that was used, float64 `[tokens, in_features]`."""
    output: Tensor
    """Hidden states that left the block, float64 `[batch, tokens, features]`."""


class Skeleton:
    """A block whose linear weights are sources of noise: no weight's input reaches its output.

    What then still follows from a change of one source or one vector follows directly, not through other
    weights: comparing two runs shows all that a source feeds. Noise depends on the seed, the weight and the
    shape only, and a draw and the next one differ in the sign and size of all noise but the routers', whose
    noise sends tokens to random experts. Vectors (norm weights, biases) are random too: zeros in a trained
    one would hide where it leads.
    """

    def __init__(self, block: nn.Module, call: BlockCall, hidden: Tensor, structure: BlockStructure) -> None:
        self._block, self._call = block, call.to(dtype=torch.float64)
        self._shape, self._device = hidden.shape, hidden.device
        self._routers = {(ref.parameter, ref.index) for ref in structure.routers}
        weights = [ref for group in structure.groups for ref in group.weights] + list(structure.routers)
        self._refs = {(ref.parameter, ref.index): ref for ref in weights}
        # Seeds of each draw's noise; 0 is the hidden states'.
        self._ordinals = {key: ordinal for ordinal, key in enumerate(self._refs, start=1)}
        self._operations = LinearOperations(block)
        self._fixed = float64_values(block, {ref.parameter for ref in weights})
        generator = torch.Generator().manual_seed(0)
        self.vectors: dict[str, Tensor] = {
            name: (0.5 + torch.rand(value.shape, generator=generator, dtype=torch.float64)).to(value.device)
            for name, value in block.named_parameters()
            if value.ndim == 1 and value.is_floating_point()
        }
        """Parameters with one dimension, by path: the values of an unchanged run, float64."""
        self.draws = self._cover()
        """Unchanged responses to draws 0, 1, ... that together use every weight; empty if some never is."""

    def run(
        self,
        draw: int,
        *,
        rows: Mapping[WeightKey, Tensor] | None = None,
        vectors: Mapping[str, Tensor] | None = None,
    ) -> Response:
        """The response to one draw of noise.

        `rows` multiplies the output features of some weights (`[out_features]` each), `vectors` replaces some
        of `self.vectors`.
        """
        seed, large = divmod(draw, 2)
        inputs: dict[WeightKey, Tensor] = {}

        def compute(use: LinearUse) -> Tensor:
            key = (use.parameter, use.index)
            if use.x.numel():
                inputs[key] = use.x.detach().flatten(0, -2)
            generator = torch.Generator().manual_seed(seed * _DRAWS + self._ordinals[key])
            shape = (*use.x.shape[:-1], self._refs[key].out_features)
            noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(self._device)
            if large and key not in self._routers:
                noise *= -_LARGE
            return noise * rows[key].to(noise) if rows and key in rows else noise

        generator = torch.Generator().manual_seed(seed * _DRAWS)
        hidden = torch.randn(self._shape, generator=generator, dtype=torch.float64).to(self._device)
        values = {**self._fixed, **self.vectors, **(vectors or {})}
        with LinearReplacement(self._operations, compute):
            output = call_with(self._block, self._call, hidden, values)
        return Response(inputs=inputs, output=output)

    def _cover(self) -> list[Response]:
        responses: list[Response] = []
        unused = set(self._refs)
        while (unused or len(responses) < _MIN_DRAWS) and len(responses) < _MAX_DRAWS:
            responses.append(self.run(len(responses)))
            unused -= set(responses[-1].inputs)
        return [] if unused else responses


def distinct_factors(n: int) -> Tensor:
    """float64 `[n]` distinct factors, none near 1: a channel's factor tells which row it comes from."""
    return 1.25 + 0.5 * torch.arange(n, dtype=torch.float64) / n


# Least difference of two factors that is not rounding: blocks may compute in float32 along the way.
_FACTOR_TOLERANCE = 1e-6


def find_readers(
    skeleton: Skeleton,
    n: int,
    *,
    rows: Mapping[WeightKey, Tensor] | None = None,
    vectors: Mapping[str, Tensor] | None = None,
) -> dict[WeightKey, Tensor]:
    """Readers of a producer multiplied by `distinct_factors(n)`: weight -> int64 `[in_features]`, which one.

    Empty unless the change multiplies every channel of each of its readers by one factor, whatever sign and
    size the noise has, and reaches nothing else.
    """
    factors: dict[WeightKey, Tensor] = {}
    for draw, before in enumerate(skeleton.draws):
        after = skeleton.run(draw, rows=rows, vectors=vectors)
        if (after.output - before.output).abs().max() > 1e-9 * before.output.abs().max():
            return {}
        for key, x in before.inputs.items():
            factor = _common_factor(x, after.inputs[key])
            known = factors.setdefault(key, factor)
            if bool(torch.isinf(factor).any()) or bool(((factor - known).abs() > _FACTOR_TOLERANCE).any()):
                return {}
            factors[key] = torch.where(known.isnan(), factor, known)
    readers: dict[WeightKey, Tensor] = {}
    for key, factor in factors.items():
        if not bool(((factor - 1).abs() > _FACTOR_TOLERANCE).any()):
            continue
        position = ((factor - 1.25) * 2 * n).round()
        if not bool(((position >= 0) & (position < n)).all()):
            return {}
        readers[key] = position.long().cpu()
        if bool(((factor.cpu() - distinct_factors(n)[readers[key]]).abs() > _FACTOR_TOLERANCE).any()):
            return {}
    return readers


def _common_factor(before: Tensor, after: Tensor) -> Tensor:
    """Per channel of `[tokens, channels]`, f with after = f * before; NaN if both are 0, inf if none."""
    if torch.equal(before, after):
        return torch.where((before == 0).all(dim=0), torch.nan, 1.0)
    size = before.abs().amax(dim=0)
    dead = (size == 0) & (after == 0).all(dim=0)
    # Gated channels may be as small as exp(-100); their squares must not vanish.
    before, after = before / size, after / size
    factor = (after * before).sum(dim=0) / before.square().sum(dim=0)
    proportional = (after - factor * before).abs().amax(dim=0) <= _FACTOR_TOLERANCE
    return torch.where(dead, torch.nan, torch.where(proportional, factor, torch.inf))
