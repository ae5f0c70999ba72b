"""Cayley SGD: it stays on the orthogonal matrices, goes downhill, and follows the Cayley transform."""

import pytest
import torch

from qbench.stages.cayley import CayleySGD, cayley_step, cosine, nearest_by_rows, orthonormal, unit_rows

F64 = torch.float64


def _orthogonal(n, seed=0, batch=()):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(*batch, n, n, generator=generator, dtype=F64))[0]


def _normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _off(x):
    return (x @ x.mT - torch.eye(x.shape[-1], dtype=x.dtype)).abs().max().item()


@pytest.mark.parametrize("n", [1, 2, 7, 16])
@pytest.mark.parametrize("lr", [1e-2, 0.3, 1.5])
def test_a_step_with_many_iterations_is_the_cayley_transform(n, lr):
    x, gradient = _orthogonal(n), _normal(n, n)
    v = -gradient.T
    skew = 0.5 * (v @ x - x.T @ v.T)  # for square X, Ŵ = ½ M
    length = min(lr, 1 / (skew.abs().sum(0).max().item() + 1e-8))
    eye = torch.eye(n, dtype=F64)
    expected = torch.linalg.solve(eye - 0.5 * length * skew, (eye + 0.5 * length * skew) @ x.T).T
    found, projected = cayley_step(x, v, lr, iterations=60)
    assert torch.allclose(found, expected, atol=1e-10)
    assert torch.allclose(projected, skew @ x.T, atol=1e-12)
    assert _off(found) < 1e-10


def test_five_iterations_are_the_cayley_transform_up_to_the_sixth_power_of_the_length():
    """Each iteration gains a factor of about a ‖W‖ / 2, so the error falls with lr^6 (the start is right to lr^1)."""
    x, v = _orthogonal(8), _normal(8, 8)
    errors = []
    for lr in (2e-2, 1e-2):
        errors.append((cayley_step(x, v, lr)[0] - cayley_step(x, v, lr, iterations=60)[0]).abs().max().item())
    assert errors[1] < errors[0] / 40
    assert errors[0] < 1e-6


def test_a_step_goes_downhill_and_stands_still_where_nothing_can_be_gained():
    for seed in range(10):
        x, gradient = _orthogonal(9, seed), _normal(9, 9, seed=seed + 50)
        moved, _ = cayley_step(x, -gradient.T, 1e-4)
        assert (gradient * (moved - x)).sum() < 0
    symmetric = _normal(9, 9) + _normal(9, 9).T
    x = _orthogonal(9)
    assert torch.allclose(cayley_step(x, -(x @ symmetric).T, 1.5)[0], x, atol=1e-9)


def test_a_large_gradient_makes_no_larger_step_than_the_inverse_of_the_column_sum():
    """The bound makes the step independent of the gradient's size, and the fixed point contracts (a ‖W‖ / 2 ≤ ½)."""
    x, v = _orthogonal(12), _normal(12, 12)
    for factor in (1e2, 1e6):
        moved = cayley_step(x, factor * v, 1.5)[0]
        assert torch.allclose(moved, cayley_step(x, 1e3 * v, 1.5)[0], atol=1e-4)
        assert _off(moved) < 0.05


def test_matrices_of_a_batch_are_independent():
    x, v = _orthogonal(5, batch=(3,)), _normal(3, 5, 5)
    v[1] *= 100
    together = cayley_step(x, v, 0.7)[0]
    for k in range(3):
        assert torch.allclose(together[k], cayley_step(x[k], v[k], 0.7)[0], atol=1e-12)


def _minimize(steps=300, momentum=0.0, dtype=torch.float32, retract_every=101):
    """Procrustes: X that turns A into A Q; the answer is Q, reached within the rotations that X starts in."""
    target, a = _orthogonal(10, 3).to(dtype), _normal(30, 10).to(dtype)
    start = target @ torch.matrix_exp(0.6 * (_normal(10, 10) - _normal(10, 10).T) / 3).to(dtype)
    x = torch.nn.Parameter(start.clone())
    optimizer = CayleySGD([x], lr=0.5, momentum=momentum, retract_every=retract_every)
    losses, farthest = [], 0.0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = cosine(0.5, step, steps)
        optimizer.zero_grad()
        loss = (a @ x - a @ target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        farthest = max(farthest, _off(x.detach()))
    return x.detach(), target, losses, farthest


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_it_finds_the_rotation_that_aligns_two_point_sets_and_stays_orthogonal_on_the_way(momentum):
    x, target, losses, farthest = _minimize(momentum=momentum)
    assert losses[-1] < 1e-4 * losses[0]
    assert torch.allclose(x, target, atol=0.02)
    assert farthest < 1e-3
    assert _off(orthonormal(x)) < 1e-12


def test_momentum_and_retraction_change_the_path():
    plain, fast, retracted = (_minimize(40, **k)[0] for k in ({}, {"momentum": 0.5}, {"retract_every": 2}))
    assert not torch.allclose(plain, fast, atol=1e-4)
    assert not torch.equal(plain, retracted)


def test_momentum_adds_the_projected_velocity_of_the_step_before():
    x0, g0, g1 = _orthogonal(6), _normal(6, 6, seed=5), _normal(6, 6, seed=6)
    x = torch.nn.Parameter(x0.clone())
    optimizer = CayleySGD([x], lr=0.1, momentum=0.9)
    for gradient in (g0, g1):
        x.grad = gradient
        optimizer.step()
    x1, projected = cayley_step(unit_rows(x0), -g0.T, 0.1)
    x2, _ = cayley_step(unit_rows(x1), 0.9 * projected - g1.T, 0.1)
    assert torch.allclose(x.detach(), x2, atol=1e-12)


def test_what_is_orthogonal_stays_as_it_is_and_what_is_not_becomes_so():
    x = _orthogonal(8)
    assert torch.allclose(nearest_by_rows(x), x, atol=1e-12)
    assert torch.allclose(unit_rows(x), x, atol=1e-12)
    disturbed = x + 1e-3 * _normal(8, 8)
    assert _off(disturbed) > 1e-3
    assert _off(nearest_by_rows(disturbed)) < 1e-12
    assert (nearest_by_rows(disturbed) - x).abs().max() < 2e-2
    assert orthonormal(disturbed.float()).dtype == F64
    assert torch.allclose(unit_rows(disturbed).norm(dim=1), torch.ones(8, dtype=F64))


def test_every_so_many_steps_columns_are_made_orthogonal_and_every_step_makes_rows_one_long():
    disturbed = _orthogonal(6) + 1e-2 * _normal(6, 6)
    for every, orthogonal in ((3, [False, False, True]), (1, [True, True, True])):
        x = torch.nn.Parameter(disturbed.clone())
        optimizer = CayleySGD([x], lr=1.0, retract_every=every)
        x.grad = torch.zeros_like(x)
        for expected in orthogonal:
            optimizer.step()
            assert (_off(x.detach()) < 1e-12) == expected
            assert torch.allclose(x.detach().norm(dim=1), torch.ones(6, dtype=F64))


def test_parameters_without_a_gradient_stay_and_the_cosine_ends_at_nothing():
    x = torch.nn.Parameter(_orthogonal(4))
    before = x.detach().clone()
    CayleySGD([x], lr=1.0).step()
    assert torch.equal(x.detach(), before)
    assert cosine(1.5, 0, 100) == 1.5
    assert cosine(1.5, 50, 100) == pytest.approx(0.75)
    assert 0 < cosine(1.5, 99, 100) < 1e-3
