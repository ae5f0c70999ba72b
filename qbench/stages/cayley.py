"""Gradient descent on orthogonal matrices: Cayley SGD with momentum (Li et al., arXiv 2002.01113, algorithm 1), as
SpinQuant uses it (arXiv 2405.16406, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

#: Fixed-point iterations of one step and the bound on its length's denominator, the authors'.
ITERATIONS = 5
EPSILON = 1e-8


class CayleySGD(torch.optim.Optimizer):
    """Moves parameters X [..., n, n], each X Xᵀ = I, along curves of orthogonal matrices.

    A step with gradient G (all in X's dtype, leading dimensions are independent matrices):
    V = momentum V - Gᵀ, M = V X, Ŵ = M - ½ Xᵀ (X M), W = Ŵ - Ŵᵀ (skew), a = min(lr, 1 / (‖W‖₁ + 1e-8)) with the
    largest column sum ‖W‖₁, Y₀ = Xᵀ + a V, then five times Y = Xᵀ + (a/2) W (Xᵀ + Y): the fixed point is the Cayley
    transform Y = (I - a/2 W)⁻¹ (I + a/2 W) Xᵀ. X = Yᵀ; V = W Xᵀ of the old X is the projected momentum.

    Five iterations leave ‖X Xᵀ - I‖ about 1e-4 per long step, so each step starts from rows of unit length, as the
    authors' does. Departures: what keeps the columns orthogonal is a QR decomposition before every `retract_every`-th
    step (theirs: at random, once in 101 steps on average); the momentum is kept (their code forgets it, so at their
    default of 0 nothing differs).
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.0, retract_every: int = 101
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "retract_every": retract_every})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step along the gradients of all parameters that have one."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                velocity = state.get("velocity", torch.zeros_like(parameter).mT)
                count = state["count"] = state.get("count", 0) + 1
                x = nearest_by_rows(parameter) if count % group["retract_every"] == 0 else unit_rows(parameter)
                velocity = group["momentum"] * velocity - parameter.grad.mT
                moved, state["velocity"] = cayley_step(x, velocity, group["lr"])
                parameter.copy_(moved)


def cayley_step(x: Tensor, velocity: Tensor, lr: float, iterations: int = ITERATIONS) -> tuple[Tensor, Tensor]:
    """The X that a step from x along `velocity` (-Gᵀ without momentum) leads to, and the projected velocity W xᵀ.

    x and velocity are [..., n, n] with x xᵀ = I; nothing is changed in place.
    """
    m = velocity @ x
    half = m - 0.5 * x.mT @ (x @ m)
    skew = half - half.mT
    longest = 1 / (skew.abs().sum(dim=-2).amax(dim=-1) + EPSILON)
    length = longest.clamp_max(lr)[..., None, None]
    start = x.mT
    y = start + length * velocity
    for _ in range(iterations):
        y = start + 0.5 * length * skew @ (start + y)
    return y.mT, skew @ start


def unit_rows(x: Tensor) -> Tensor:
    """x [..., n, n] with rows of length 1."""
    return x / x.norm(dim=-1, keepdim=True)


def nearest_by_rows(x: Tensor) -> Tensor:
    """The orthogonal matrix from the QR decomposition of xᵀ with a positive diagonal: x itself if it is orthogonal."""
    q, r = torch.linalg.qr(x.mT)
    signs = r.diagonal(dim1=-2, dim2=-1).sign()
    return (q * torch.where(signs == 0, torch.ones_like(signs), signs)[..., None, :]).mT


def orthonormal(x: Tensor) -> Tensor:
    """`nearest_by_rows` in float64, for folding: ‖X Xᵀ - I‖ < 1e-12."""
    return nearest_by_rows(x.double())


def cosine(lr: float, step: int, steps: int) -> float:
    """Learning rate of step 0 ≤ step < steps: from lr to 0 along half a cosine."""
    return 0.5 * lr * (1 + math.cos(math.pi * step / steps))
