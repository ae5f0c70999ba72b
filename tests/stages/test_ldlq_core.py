"""LDLQ: GPTQ backwards where nothing saturates, its feedback by definition, and greedy passes that only improve."""

import itertools

import pytest
import torch

from qbench.errors import NumericsError
from qbench.formats import QParams, Range, fit, quantize, uniform
from qbench.formats.ranges import extrema
from qbench.stages import ldlq_core
from qbench.stages.gptq_core import gptq
from qbench.stages.ldlq_core import ldlq, unit_lower
from tests.stages.references import correlated_inputs, output_error, second_moment
from tests.stages.test_every_format import FORMATS

COLUMNS = 40
both_zeros = pytest.mark.parametrize("symmetric", [False, True])


def _weight(rows=10, columns=COLUMNS, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _hessian(columns=COLUMNS, tokens=200, seed=0):
    return second_moment(correlated_inputs(tokens, columns, seed))


def _format(bits=3, group_size=-1, symmetric=False):
    return uniform(bits=bits, group_size=group_size, symmetric=symmetric, partial=True)


def _damped(hessian, damp=0.01):
    return hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian))


@both_zeros
@pytest.mark.parametrize("group_size", [0, -1])
@pytest.mark.parametrize("damp", [0.01, 1.0])
@pytest.mark.parametrize("columns", [COLUMNS, 150])
def test_on_an_unbounded_grid_it_is_gptq_with_the_columns_in_reverse(symmetric, group_size, damp, columns):
    weight, hessian, fmt = _weight(columns=columns), _hessian(columns, 600), _format(8, group_size, symmetric)
    full = extrema(weight, fmt)
    wide = Range(10 * full.lower, 10 * full.upper)  # so coarse that rounding matters, so wide that nothing saturates
    found = ldlq(weight, hessian, fmt, fit(weight, fmt, wide), damp=damp)
    codes = found.codes.int()
    assert codes.min() > fmt.element.minimum
    assert codes.max() < fmt.element.maximum
    expected = gptq(weight.flip(1), hessian.flip(0, 1), fmt, damp=damp, clip=wide).weight
    assert torch.equal(found.scale, expected.scale)
    assert (found.codes == expected.codes.flip(1)).float().mean() > 0.995  # a tie may go the other way, and on
    assert (found.codes == quantize(weight, fmt, fit(weight, fmt, wide)).codes).float().mean() < 0.98


@pytest.mark.parametrize("damp", [0.01, 0.5])
def test_every_column_is_rounded_after_what_the_ones_behind_it_cost(damp):
    """Equation by equation in float64: Q_k = nearest(W_k + Σ_{j>k} (W - Q)_j L_jk) with H = (L + I) D (L + I)ᵀ."""
    weight, hessian, fmt = _weight(), _hessian(), _format(3, -1)
    params = fit(weight, fmt)
    found = ldlq(weight, hessian, fmt, params, damp=damp).dequantize().double()
    damped = _damped(hessian.double(), damp)
    lower = torch.linalg.cholesky(damped)
    diagonal, lower = lower.diagonal().square(), lower / lower.diagonal()
    assert torch.allclose(lower @ diagonal.diag() @ lower.t(), damped)
    assert torch.equal(lower, lower.tril())
    wrong = 0
    for k in range(COLUMNS):
        target = weight[:, k].double() + (weight.double() - found)[:, k + 1 :] @ lower[k + 1 :, k]
        levels = (target / params.scale[:, 0]).round() + params.zero[:, 0]
        wrong += ((levels.clamp(0, 7) - params.zero[:, 0]) * params.scale[:, 0] - found[:, k]).abs().gt(1e-5).sum()
    assert wrong <= 2  # ties


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_uncorrelated_inputs_give_round_to_nearest_in_every_format(fmt):
    weight = 0.1 * _weight(24, 256)
    found = ldlq(weight, torch.eye(256), fmt, fit(weight, fmt), greedy_passes=1)
    expected = quantize(weight, fmt)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.dequantize(), expected.dequantize())
    assert found.storage_bits() == expected.storage_bits()


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("act_order", [False, True])
def test_it_loses_less_output_than_rounding_to_nearest_and_greedy_passes_never_more(fmt, act_order):
    weight, hessian = 0.1 * _weight(16, 128), _hessian(128, 500)
    errors = [output_error(weight, quantize(weight, fmt).dequantize(), _damped(hessian))]
    for passes in (0, 1, 3):
        found = ldlq(weight, hessian, fmt, fit(weight, fmt), act_order=act_order, greedy_passes=passes)
        errors.append(output_error(weight, found.dequantize(), _damped(hessian)))
    if fmt.range.method != "absmean":  # which cuts off most of the weights: no feedback can follow
        assert errors[1] < 0.8 * errors[0]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(errors[1:]))
    assert errors[2] < errors[1]


def test_after_enough_greedy_passes_no_single_code_can_be_improved():
    weight, hessian, fmt = _weight(3, 12), _hessian(12), _format(2, -1)
    params = fit(weight, fmt)
    found = ldlq(weight, hessian, fmt, params, greedy_passes=50)
    best = output_error(weight, found.dequantize(), _damped(hessian))
    for row, column, code in itertools.product(range(3), range(12), range(4)):
        decoded = found.dequantize()
        decoded[row, column] = params.scale[row, 0] * (code - params.zero[row, 0])
        assert output_error(weight, decoded, _damped(hessian)) >= best * (1 - 1e-5)


@both_zeros
@pytest.mark.parametrize("group_size", [0, -1, 8, 7])
@pytest.mark.parametrize("passes", [0, 2])
def test_act_order_is_ldlq_on_sorted_columns_with_the_scales_they_had(symmetric, group_size, passes):
    weight, hessian = _weight(), _hessian()
    fmt = _format(3, group_size, symmetric)
    params = fit(weight, fmt)
    found = ldlq(weight, hessian, fmt, params, act_order=True, greedy_passes=passes)
    assert torch.equal(found.scale, quantize(weight, fmt).scale)
    assert found.order is None
    order = hessian.diagonal().argsort()
    # One column per group says which scale a column has, wherever it stands.
    single = _format(3, 1, symmetric)
    columns = torch.arange(COLUMNS) // fmt.width(COLUMNS)
    rows = [None if part is None else part.expand(10, -1) for part in (params.scale, params.zero)]
    by_column = QParams(*(None if part is None else part[:, columns][:, order] for part in rows))
    expected = ldlq(weight[:, order], hessian[order][:, order], single, by_column, greedy_passes=passes)
    assert torch.equal(found.codes[:, order], expected.codes)


@pytest.mark.parametrize("passes", [0, 3])
def test_the_blocks_of_the_lazy_update_change_nothing_but_the_summation_order(passes, monkeypatch):
    weight, hessian, fmt = _weight(32, 192), _hessian(192, 600), _format(3, 32)
    results = []
    for size in (1, 7, 128, 192):
        monkeypatch.setattr(ldlq_core, "BLOCK", size)
        results.append(ldlq(weight, hessian, fmt, fit(weight, fmt), greedy_passes=passes).codes)
    assert all((other != results[0]).float().mean() <= 0.01 for other in results[1:])


def test_dead_columns_are_rounded_and_the_others_do_not_notice_them():
    weight, hessian, fmt = _weight(), _hessian(), _format(3, -1)
    dead = torch.tensor([0, 13, 39])
    alive = torch.tensor([k for k in range(COLUMNS) if k not in dead.tolist()])
    hessian[dead], hessian[:, dead] = 0, 0
    params = fit(weight, fmt)
    found = ldlq(weight, hessian, fmt, params, greedy_passes=2)
    assert torch.equal(found.codes[:, dead], quantize(weight, fmt).codes[:, dead])
    without = ldlq(weight[:, alive], hessian[alive][:, alive], fmt, params, greedy_passes=2)
    assert torch.equal(found.codes[:, alive], without.codes)
    assert torch.equal(ldlq(weight, 0 * hessian, fmt, params).codes, quantize(weight, fmt).codes)


def test_the_factor_is_unit_lower_and_a_singular_matrix_an_error():
    hessian = _hessian()
    lower = unit_lower(hessian)
    assert torch.equal(lower.diagonal(), torch.ones(COLUMNS))
    assert torch.equal(lower, lower.tril())
    twins = torch.ones(2, 2)
    twins[1, 1] += 2.0**-23  # a pivot that is the last bit of the sum it comes from
    with pytest.raises(NumericsError, match=r"singular Hessian \(2 x 2\)"):
        unit_lower(twins)
    singular = second_moment(correlated_inputs(20, COLUMNS))
    weight, fmt = _weight(), _format()
    with pytest.raises(NumericsError, match=r"singular Hessian \(40 x 40\)"):
        ldlq(weight, singular, fmt, fit(weight, fmt), damp=0.0)


def test_inputs_are_left_alone():
    weight, hessian, fmt = _weight(), _hessian(), _format(4, 8)
    hessian[:, 3], hessian[3] = 0, 0
    params = fit(weight, fmt)
    before = weight.clone(), hessian.clone(), params.scale.clone(), params.zero.clone()
    ldlq(weight, hessian, fmt, params, act_order=True, greedy_passes=1)
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, hessian, params.scale, params.zero), strict=True))
