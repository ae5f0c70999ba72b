"""Rotations against dense matrices, and a basis that leaves what it enters."""

import pytest
import torch

from qbench.errors import NumericsError
from qbench.formats import QTensor, quantize, uniform
from qbench.formats.basis import Basis, Rotation
from qbench.formats.packing import pack

SIZES = [1, 2, 7, 12, 48, 60]


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _dense(rotation):
    """V, float64 [n, n], built from its parts as they are defined: V = (left ⊗ right) Π."""
    permutation = torch.eye(len(rotation.order), dtype=torch.float64)[rotation.order]
    return torch.kron(rotation.left, rotation.right) @ permutation


@pytest.mark.parametrize("n", SIZES)
def test_a_rotation_is_an_orthogonal_kronecker_product_of_permuted_columns(n):
    rotation, x = Rotation.random(n, _generator()), torch.randn(3, 2, n, generator=_generator(1), dtype=torch.float64)
    v = _dense(rotation)
    assert len(rotation.left) * len(rotation.right) == n
    assert torch.allclose(v @ v.t(), torch.eye(n, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(rotation.rotate(x), x @ v.t(), atol=1e-12)
    assert torch.allclose(rotation.undo(x), x @ v, atol=1e-12)
    assert torch.allclose(rotation.undo(rotation.rotate(x)), x, atol=1e-12)


@pytest.mark.parametrize(("n", "factors"), [(1, (1, 1)), (7, (1, 7)), (12, (3, 4)), (576, (24, 24)), (1536, (32, 48))])
def test_factors_are_as_near_to_each_other_as_the_size_allows(n, factors):
    rotation = Rotation.random(n, _generator())
    assert (len(rotation.left), len(rotation.right)) == factors


def test_factors_are_uniformly_random():
    """Of Haar matrices every entry has mean 0, variance 1/n and either sign: a bare QR leaves R's diagonal positive
    and so Q's entries unevenly signed."""
    factors = torch.stack([Rotation.random(16, _generator(seed)).left for seed in range(2000)])
    assert factors.mean(0).abs().max() < 5 * (0.25 / 2000) ** 0.5
    assert (factors.square().mean(0) - 0.25).abs().max() < 0.03
    traces = factors.diagonal(dim1=1, dim2=2).sum(1)
    assert abs(traces.var().item() - 1) < 0.15


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 12), (7, 12), (48, 5)])
def test_a_basis_leaves_what_it_enters_and_turns_moments_along(shape, scaled):
    generator = _generator(3)
    weight, x = torch.randn(shape, generator=generator), torch.randn(50, shape[1], generator=generator)
    scale = (torch.rand(shape[1], generator=generator) + 0.5).half().float() if scaled else None
    basis = Basis.random(shape, 5, scale)
    u, v = _dense(basis.rows), _dense(basis.columns)
    d = torch.ones(shape[1]) if scale is None else scale
    inside = basis.enter(weight)
    assert torch.allclose(inside.double(), u @ (weight * d).double() @ v.t(), atol=1e-5)
    assert torch.allclose(basis.leave(inside), weight, atol=1e-5)
    turned = (x / d).double() @ v.t()
    moment = basis.moment((x.t() @ x) / 50)
    assert torch.allclose(moment.double(), turned.t() @ turned / 50, atol=1e-4)
    # The same layer, seen in the basis: W' x' = U W x, hence the same output error.
    assert torch.allclose(turned @ inside.double().t(), x.double() @ weight.double().t() @ u.t(), atol=1e-4)


def test_the_seed_says_it_all():
    one, same, other = (Basis.random((6, 10), seed) for seed in (4, 4, 2**62 + 1))
    weight = torch.randn(6, 10, generator=_generator())
    assert torch.equal(one.enter(weight), same.enter(weight))
    assert not torch.allclose(one.enter(weight), other.enter(weight), atol=0.1)
    assert not torch.allclose(_dense(one.rows)[:6, :6], _dense(Basis.random((6, 6), 4).columns), atol=0.1)
    assert one.storage_bits() == 64
    assert Basis.random((6, 10), 4, torch.ones(10)).storage_bits() == 64 + 160


@pytest.mark.parametrize("scale", [None, torch.linspace(0.5, 2, 12).half().float()])
def test_a_quantized_tensor_decodes_out_of_its_basis_and_counts_it(scale):
    weight = torch.randn(5, 12, generator=_generator())
    basis = Basis.random((5, 12), 9, scale)
    plain = quantize(basis.enter(weight), uniform(bits=8, group_size=4, symmetric=False))
    found = QTensor(plain.codes, plain.scale, plain.zero, plain.format, basis=basis)
    assert torch.equal(found.dequantize(), basis.leave(plain.dequantize()))
    assert (found.dequantize() - weight).abs().max() < 0.05
    assert found.storage_bits() == plain.storage_bits() + 64 + (0 if scale is None else 12 * 16)
    doubled = Basis.random((5, 12), 9, torch.full((12,), 2.0))
    others = [plain, QTensor(plain.codes, plain.scale, plain.zero, plain.format, basis=Basis.random((5, 12), 8, scale))]
    others.append(QTensor(plain.codes, plain.scale, plain.zero, plain.format, basis=doubled))
    assert len({found.sha256(), *(other.sha256() for other in others)}) == 4
    with pytest.raises(NumericsError, match=r"rotated basis.*cannot be packed"):
        pack(found)
