"""DuQuant (arXiv 2406.01721): rotate and permute every linear layer's input so that no channel stands out.

x is replaced by x T and the weight W by W T, with T = R1 P R2 orthogonal, so that x Wᵀ stays what it is: R is block
diagonal (one rotation for all blocks, section 3.2), P deals the channels out to the blocks (zigzag, eq. 6).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qbench.calibration.statistics import LoudestTokens
from qbench.formats import TensorFormat
from qbench.stages.base import BlockView, Kind, Need, Outcome, Stage, WeightShape, require
from qbench.structure.online import Chain, MatrixTransform


def base_rotation(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, float64 [size, size], whose first row is 1 / sqrt(size) everywhere.

    A row vector that is large in its first channel only is thus spread evenly. Departure: in the paper's order of
    factors, R̃ diag(1, Q), the random rotation Q would follow the even one and undo the spreading; here Q comes first.
    """
    even = torch.full((size,), size**-0.5, dtype=torch.float64)
    normal = even.clone()
    normal[0] -= 1  # the reflection that exchanges the first axis and the even direction
    spread = torch.eye(size, dtype=torch.float64)
    spread -= 2 * torch.outer(normal, normal) / normal.square().sum()
    random = torch.eye(size, dtype=torch.float64)
    drawn = torch.randn(size - 1, size - 1, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    random[1:, 1:] = q * r.diagonal().sign()  # without the signs some rotations would be likelier than others
    return random @ spread


def greedy_rotation(sample: Tensor, base: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Rotation of every block of channels, float64 [B, B], and the peak max - min of the sample after 0 … `steps`
    steps, float32 [steps + 1]; sample [tokens, in] with in a multiple of B, base [B, B] from `base_rotation`.

    A step takes the largest magnitude of the sample, in channel c of its block, and rotates all blocks by the base with
    rows and columns 0 and c exchanged (eq. 3, 4). The product of the steps up to the smallest peak is kept: none, if no
    step helps. Departure from the authors' code: it takes the token's number for the channel.
    """
    size = len(base)
    blocks = sample.float().reshape(-1, size)
    product = best = torch.eye(size, dtype=torch.float64)
    peaks = [blocks.max() - blocks.min()]
    for _ in range(steps):
        channel = int(blocks.abs().argmax()) % size
        order = torch.arange(size)
        order[0], order[channel] = channel, 0
        rotation = base[order][:, order]
        blocks, product = blocks @ rotation.to(blocks), product @ rotation
        peak = blocks.max() - blocks.min()
        if peak < torch.stack(peaks).min():
            best = product
        peaks.append(peak)
    return best, torch.stack(peaks)


def zigzag(peaks: Tensor, size: int) -> Tensor:
    """Order of channels, int64 [in]: new channel k is old channel order[k]; peaks [in] >= 0, in a multiple of `size`.

    Channels by falling peak are dealt to blocks 1 … K, then K … 1, and so on, so that every block gets its share of
    large ones (section 3.2, eq. 6).
    """
    rounds = peaks.argsort(descending=True, stable=True).reshape(size, -1).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.t().flatten()


def duquant_transform(
    sample: Tensor, size: int, steps: int, permutations: int, generator: torch.Generator
) -> tuple[Chain, float]:
    """R, then `permutations` times P and R, each found on what the ones before make of sample [tokens, in], float32;
    and the sample's peak afterwards relative to before (1 for a sample of zeros).

    `size` divides in. Every factor is made anew and of its own random base.
    """
    first = sample.max() - sample.min()
    factors = []
    order: Tensor | None = None
    for _ in range(permutations + 1):
        if factors:
            order = zigzag(sample.abs().amax(dim=0), size)
        rotation, _ = greedy_rotation(
            sample if order is None else sample[:, order], base_rotation(size, generator), steps
        )
        factors.append(MatrixTransform(rotation, permutation=order))
        sample = factors[-1](sample)
    peak = sample.max() - sample.min()
    return Chain(tuple(factors)), (peak / first).item() if first > 0 else 1.0


@dataclass(frozen=True, kw_only=True)
class DuQuant(Stage):
    """A transform for every group of weights that read one input, found on `sample_tokens` real inputs: those in which
    the loudest channels are at their loudest (the authors: the mean over all sequences of each position).

    Smoothing comes before it as a stage of its own. An input that no calibration token reached stays as it is.
    """

    name: ClassVar[str] = "duquant"
    kind: ClassVar[Kind] = Kind.TRANSFORM
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Need]] = frozenset({Need(LoudestTokens, "full")})
    uses_random: ClassVar[bool] = True

    block_size: int = 128
    max_rotation_step: int = 256
    permutation_times: int = 1
    sample_tokens: int = 128

    @property
    def online(self) -> bool:
        return True

    def check(self, formats: frozenset[TensorFormat]) -> None:
        require(self.block_size >= 2, "algo.block_size", self.block_size, "channels that rotate together, 2 or more")
        steps, times = self.max_rotation_step, self.permutation_times
        require(steps >= 0, "algo.max_rotation_step", steps, "a number of steps >= 0 (authors: 256)")
        require(times >= 0, "algo.permutation_times", times, "a number of permutations >= 0 (authors: 1)")
        require(self.sample_tokens >= 1, "algo.sample_tokens", self.sample_tokens, "a number of tokens >= 1")

    def check_shapes(self, shapes: Sequence[WeightShape]) -> None:
        require_fit(self.block_size, [(shape.name, shape.in_features) for shape in shapes])

    def apply(self, view: BlockView) -> Outcome:
        parameters: dict[str, Tensor] = {}
        online, metrics = {}, []
        for group in view.groups:
            require_fit(self.block_size, [(f"{view.where}, {group.weights[0].name}", group.in_features)])
            statistic = view.statistic(group, LoudestTokens)
            if not statistic.tokens:
                continue
            sample = loudest(statistic.value(), self.sample_tokens)
            transform, peak = duquant_transform(
                sample, self.block_size, self.max_rotation_step, self.permutation_times, view.generator
            )
            for ref in group.weights:
                if ref.parameter not in parameters:
                    parameters[ref.parameter] = view.block.get_parameter(ref.parameter).detach().clone()
                weight = ref.of(parameters[ref.parameter])
                weight.copy_(transform(weight.double()))
            online[group.index] = transform
            metrics.append((group.weights[0].name, "duquant_peak", peak))
        return Outcome(parameters=parameters, online=online, metrics=tuple(metrics))


def require_fit(block_size: int, layers: Sequence[tuple[str, int]]) -> None:
    """Raises SpecError unless blocks of so many channels tile the inputs of all layers (name, in_features)."""
    common = math.gcd(*(width for _, width in layers))
    fitting = ", ".join(str(d) for d in range(2, common + 1) if common % d == 0)
    for name, width in layers:
        require(
            width % block_size == 0,
            "algo.block_size",
            block_size,
            f"a divisor of the {width} inputs of {name}; sizes that fit every layer: {fitting or 'none'}",
        )


def loudest(tokens: Tensor, count: int) -> Tensor:
    """Distinct rows of `LoudestTokens` tokens [in, in], those of the `count` loudest channels, [at most count, in]."""
    channels = tokens.diagonal().abs().argsort(descending=True, stable=True)[:count]
    return tokens[channels].unique(dim=0)
