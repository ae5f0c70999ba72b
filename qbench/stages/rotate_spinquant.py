"""SpinQuant (arXiv 2405.16406): learn the rotations that QuaRot draws, by the quantized network's own loss.

R1 turns the residual stream, R2 of every block the values of a head: weights absorb both, whatever they are. From
random Hadamard matrices, Cayley SGD lowers the cross-entropy of the next calibration token, with everything quantized
that will be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qbench.errors import NumericsError, SpecError
from qbench.formats import TensorFormat
from qbench.formats.scheme import Scheme
from qbench.stages.base import require
from qbench.stages.cayley import CayleySGD, cosine, orthonormal
from qbench.stages.rotation import RotateStage, quantizes_cache
from qbench.stages.training import check_training
from qbench.structure.online import HadamardTransform
from qbench.structure.rotation import Rotation

#: Mean loss of some calibration sequences under R1 [n, n] and R2 [blocks, head, head] or None; differentiable.
Loss = Callable[[Tensor, Tensor | None, list[int]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Rotations r1 [n, n] and r2 [blocks, head, head] (None: there are none), float64, orthogonal to 1e-12. losses: of
    every step's minibatch, under the rotations before that step."""

    r1: Tensor
    r2: Tensor | None
    losses: tuple[float, ...]


def learn_rotations(
    loss: Loss,
    r1: Tensor,
    r2: Tensor | None,
    count: int,
    *,
    lr: float,
    momentum: float,
    steps: int,
    batch_size: int,
    generator: torch.Generator,
    report: Callable[[int, int], None] = lambda step, steps: None,
) -> Learned:
    """Rotations after `steps` of Cayley SGD from r1 [n, n] and r2 [blocks, head, head], float64 and orthogonal.

    Every step takes `batch_size` (at most `count`) of the `count` sequences, one trip after the other over all of them,
    each in an order drawn from `generator`. The learning rate falls from lr to 0 along half a cosine. On the way
    rotations are float32; at the end they are made orthogonal. With lr or steps 0 they are the given ones.

    report(step, steps) is called after every step. Raises NumericsError for a loss or gradient that is not finite.
    """
    learned = [torch.nn.Parameter(r.detach().float().clone()) for r in (r1, r2) if r is not None]
    optimizer = CayleySGD(learned, lr=lr, momentum=momentum)
    losses: list[float] = []
    order: list[int] = []
    for step in range(steps if lr > 0 else 0):
        while len(order) < min(batch_size, count):
            order += torch.randperm(count, generator=generator).tolist()
        batch, order = order[: min(batch_size, count)], order[min(batch_size, count) :]
        optimizer.zero_grad()
        with torch.enable_grad():
            value = loss(learned[0], learned[1] if r2 is not None else None, batch)
            value.backward()
        losses.append(value.item())
        if not math.isfinite(losses[-1]) or not all(r.grad is None or torch.isfinite(r.grad).all() for r in learned):
            raise NumericsError(f"spinquant: the loss ({losses[-1]:g}) or its gradient is not finite at step {step}")
        optimizer.param_groups[0]["lr"] = cosine(lr, step, steps)
        optimizer.step()
        report(step + 1, steps)
    if not losses:
        return Learned(r1=r1, r2=r2, losses=())
    found = [orthonormal(r.detach()) for r in learned]
    return Learned(r1=found[0], r2=found[1] if r2 is not None else None, losses=tuple(losses))


@dataclass(frozen=True, kw_only=True)
class SpinQuant(RotateStage):
    """Learned R1 and R2; with online_down and rotate_keys (the authors' "had") also the fixed Hadamard transforms of
    what the down weights read and of queries and keys, which both need time at run time. `rotation` is the start.

    quantize_weights: whether the loss sees rounded weights: so the authors where they round to nearest, and not where
    GPTQ follows. Ranges are then min-max in the loss, whatever the format's way of fitting them.
    """

    name: ClassVar[str] = "spinquant"
    version: ClassVar[int] = 1
    learned: ClassVar[bool] = True
    uses_random: ClassVar[bool] = True

    rotate_mode: Literal["hadamard", "random"] = "hadamard"
    values: bool = True
    online_down: bool = True
    rotate_keys: bool = True
    quantize_weights: bool = True
    lr: float = 1.5
    momentum: float = 0.0
    steps: int = 100
    batch_size: int = 1

    @property
    def needs_data(self) -> bool:
        return True

    @property
    def online(self) -> bool:
        return self.online_down

    def check(self, formats: frozenset[TensorFormat]) -> None:
        check_training(lr={"lr": self.lr}, batch_size=self.batch_size, steps=self.steps)
        require(0 <= self.momentum < 1, "algo.momentum", self.momentum, "a share from 0 to below 1 (authors: 0)")

    def check_scheme(self, scheme: Scheme) -> None:
        roles = (scheme, *scheme.overrides)
        cache = quantizes_cache(scheme)
        weights = self.quantize_weights and bool(scheme.weights)
        if not (weights or cache or any(role.input is not None for role in roles)):
            raise SpecError(
                "algo.quantize_weights",
                self.quantize_weights,
                "quantized inputs or cache, or algo.quantize_weights=true: rotations are learned from what they change",
            )
        if any(role.cache is not None and role.cache.static for role in roles):
            raise SpecError("kv.mode", "static", "dynamic with spinquant: static ranges depend on what is learned")
        if not self.rotate_keys and not cache:
            raise SpecError("algo.rotate_keys", False, "a quantized cache (kv_bits): keys are rotated for it only")

    def rotation(self, seed: int, *, cache: bool) -> Rotation:
        return Rotation(
            residual=self.rotate_mode,
            values=self.values,
            online_down=self.online_down,
            online_o="none",
            keys=self.rotate_keys and cache,
            seed=seed,
        )

    def before(self, seed: int, width: int, *, cache: bool) -> Rotation:
        """What is not learned, with a residual stream that can be rotated but is not yet."""
        identity = torch.eye(width, dtype=torch.float64)
        return replace(self.rotation(seed, cache=cache), residual=identity, values=False)

    def learn(
        self,
        loss: Loss,
        count: int,
        *,
        seed: int,
        width: int,
        blocks: int,
        head_dim: int | None,
        cache: bool,
        device: torch.device,
        report: Callable[[int, int], None] = lambda step, steps: None,
    ) -> tuple[Rotation, tuple[float, ...]]:
        """The learned rotation and the loss of every step, from `count` sequences. head_dim: channels of a head of
        values, None where blocks have none to rotate."""
        start = self.rotation(seed, cache=cache)
        r1 = start.of_stream(width, device)(torch.eye(width, dtype=torch.float64, device=device))
        generator = torch.Generator().manual_seed(seed + 1)  # not the numbers that R1's signs are made of
        r2 = None
        if self.values and head_dim is not None:
            r2 = torch.stack([random_hadamard(head_dim, generator) for _ in range(blocks)]).to(device)
        learned = learn_rotations(
            loss,
            r1,
            r2,
            count,
            lr=self.lr,
            momentum=self.momentum,
            steps=self.steps,
            batch_size=self.batch_size,
            generator=generator,
            report=report,
        )
        matrices = {} if learned.r2 is None else dict(enumerate(learned.r2.cpu()))
        found = replace(start, residual=learned.r1.cpu(), values=bool(matrices), value_matrices=matrices)
        return found, learned.losses


def random_hadamard(n: int, generator: torch.Generator) -> Tensor:
    """diag(±1) Hᵀ / sqrt(n), float64 [n, n]. Raises SpecError for an order without a Hadamard matrix."""
    signs = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    return HadamardTransform(n, signs=signs)(torch.eye(n, dtype=torch.float64))
