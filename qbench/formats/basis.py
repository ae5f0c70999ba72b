"""Another basis for a weight's codes: random orthogonal rotations on both sides, as QuIP (arXiv 2307.13304) does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

#: Bits of the seed from which both rotations are made again.
SEED_BITS = 64


@dataclass(frozen=True)
class Rotation:
    """Orthogonal [n, n]: the columns in `order` (int64 [n]), then the Kronecker product of `left` [p, p] and `right`
    [q, q], float64 orthogonal matrices with p q = n. n (p + q) multiplications instead of n²."""

    left: Tensor
    right: Tensor
    order: Tensor

    @classmethod
    def random(cls, n: int, generator: torch.Generator) -> Self:
        """Uniformly random factors, as near to each other in size as n allows (a prime n: one dense matrix), and a
        random permutation (QuIP, section 4.1). On the CPU."""
        p = next(d for d in range(int(n**0.5), 0, -1) if n % d == 0)
        left, right = (_orthogonal(size, generator) for size in (p, n // p))
        return cls(left, right, torch.randperm(n, generator=generator))

    def rotate(self, x: Tensor) -> Tensor:
        """x Vᵀ for x float [..., n], in the dtype and on the device of x; V the rotation."""
        grid = x[..., self.order.to(x.device)].reshape(*x.shape[:-1], len(self.left), len(self.right))
        return (self.left.to(x) @ grid @ self.right.to(x).t()).reshape(x.shape)

    def undo(self, x: Tensor) -> Tensor:
        """x V, the inverse of `rotate`."""
        grid = x.reshape(*x.shape[:-1], len(self.left), len(self.right))
        found = torch.empty_like(x)
        found[..., self.order.to(x.device)] = (self.left.to(x).t() @ grid @ self.right.to(x)).reshape(x.shape)
        return found


@dataclass(frozen=True)
class Basis:
    """W' = U W D Vᵀ for a weight W [out, in]: `rows` is U [out, out], `columns` V [in, in], both made from `seed`;
    `scale` the diagonal of D, float32 [in] of numbers that float16 holds, or None for D = I."""

    seed: int
    rows: Rotation
    columns: Rotation
    scale: Tensor | None = None

    @classmethod
    def random(cls, shape: tuple[int, int], seed: int, scale: Tensor | None = None) -> Self:
        """The basis that `seed` (below 2^63) stands for."""
        generator = torch.Generator().manual_seed(seed)
        return cls(seed, Rotation.random(shape[0], generator), Rotation.random(shape[1], generator), scale)

    def enter(self, weight: Tensor) -> Tensor:
        """W' from W, float32 [out, in], computed in float64."""
        scaled = weight.double() if self.scale is None else weight.double() * self.scale.double()
        return self.rows.rotate(self.columns.rotate(scaled).t()).t().float().contiguous()

    def leave(self, weight: Tensor) -> Tensor:
        """W = Uᵀ W' V D⁻¹ from W', float32 [out, in], computed in float64: what decoding does."""
        scaled = self.columns.undo(self.rows.undo(weight.double().t()).t())
        return (scaled if self.scale is None else scaled / self.scale.double()).float().contiguous()

    def moment(self, hessian: Tensor) -> Tensor:
        """E[x' x'ᵀ] = V D⁻¹ H D⁻¹ Vᵀ of the inputs x' = V D⁻¹ x, for which W' x' = U W x; float32 [in, in]."""
        scaled = hessian if self.scale is None else hessian / (self.scale[:, None] * self.scale[None, :])
        return self.columns.rotate(self.columns.rotate(scaled).t())

    def storage_bits(self) -> int:
        """Bits to keep beside codes and scales: the seed and D in float16."""
        return SEED_BITS + (0 if self.scale is None else 16 * len(self.scale))


def _orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """Uniformly random (Haar) orthogonal matrix, float64 [n, n]: Q of a Gaussian matrix, signs from R's diagonal."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)
