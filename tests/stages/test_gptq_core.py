"""GPTQ's identity limits and invariances."""

import pytest
import torch

from qbench.errors import NumericsError
from qbench.formats import Range, fit, quantize, uniform
from qbench.formats.ranges import extrema
from qbench.stages.gptq_core import gptq, inverse_cholesky
from tests.stages.references import correlated_inputs, output_error, round_to_nearest, second_moment

BITS = [2, 3, 4, 8]
GROUPS = [0, -1, 8, 7]
both_zeros = pytest.mark.parametrize("symmetric", [False, True])
every_block = pytest.mark.parametrize("group_size", GROUPS)


def _weight(rows=10, columns=40, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _format(bits=3, group_size=-1, symmetric=False):
    return uniform(bits=bits, group_size=group_size, symmetric=symmetric, partial=True)


def _hessian(columns=40, tokens=200, seed=0):
    return second_moment(correlated_inputs(tokens, columns, seed))


def _same(found, expected):
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.dequantize(), expected.dequantize())


@both_zeros
@every_block
@pytest.mark.parametrize("source", ["compensated", "stale", "original"])
@pytest.mark.parametrize("diagonal", ["identity", "unequal"])
def test_uncorrelated_inputs_give_round_to_nearest(symmetric, group_size, source, diagonal):
    weight = _weight()
    values = torch.ones(40) if diagonal == "identity" else torch.logspace(1, -3, 40)[torch.randperm(40)]
    for bits in BITS:
        fmt = _format(bits, group_size, symmetric)
        found = gptq(weight, values.diag(), fmt, scale_source=source, block_size=16).weight
        _same(found, quantize(weight, fmt))
        assert found.order is None


@both_zeros
@every_block
@pytest.mark.parametrize("static", [False, True])
def test_uncorrelated_inputs_in_act_order_give_round_to_nearest_of_that_order(symmetric, group_size, static):
    weight, values = _weight(), torch.logspace(1, -3, 40)[torch.randperm(40)]
    fmt = _format(3, group_size, symmetric)
    found = gptq(weight, values.diag(), fmt, act_order=True, static_groups=static and group_size > 0).weight
    if static or group_size <= 0:
        _same(found, quantize(weight, fmt))
        assert found.order is None
    else:
        order = values.argsort(descending=True)
        assert torch.equal(found.order, order)
        assert torch.equal(found.dequantize()[:, order], quantize(weight[:, order], fmt).dequantize())


@pytest.mark.parametrize("columns", [1, 8, 65])
@pytest.mark.parametrize("damp", [0.01, 1.0])
def test_factor_of_the_inverse(columns, damp):
    hessian = _hessian(columns, tokens=4 * columns)
    upper = inverse_cholesky(hessian, damp).double()
    damped = hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(columns)
    assert torch.equal(upper, upper.triu())
    assert bool((upper.diagonal() > 0).all())
    assert torch.allclose(upper.t() @ upper @ damped, torch.eye(columns, dtype=torch.float64), atol=1e-4)


@pytest.mark.parametrize("source", ["compensated", "original"])
@pytest.mark.parametrize("group_size", [-1, 32, 24])
@both_zeros
def test_block_size_changes_nothing_but_the_summation_order(source, group_size, symmetric):
    weight, hessian = _weight(32, 192), _hessian(192, tokens=600)
    fmt = _format(3, group_size, symmetric)
    results = [
        gptq(weight, hessian, fmt, block_size=size, scale_source=source) for size in (192, 1, 7, 31, 32, 40, 128, 1000)
    ]
    for other in results[1:]:
        # A last-bit difference may turn a tie, and the rest of that row with it.
        assert (other.weight.codes != results[0].weight.codes).float().mean() <= 0.01
        assert other.loss == pytest.approx(results[0].loss, rel=1e-2)


def test_stale_scales_depend_on_the_block_size():
    weight, hessian, fmt = _weight(32, 192), _hessian(192, tokens=600), _format(3, 32)
    one, other = (gptq(weight, hessian, fmt, block_size=size, scale_source="stale").weight for size in (32, 128))
    assert (one.codes != other.codes).float().mean() > 0.2
    aligned = gptq(weight, hessian, fmt, block_size=32).weight  # block = group: nothing is stale
    assert torch.equal(one.codes, aligned.codes)


@both_zeros
@every_block
@pytest.mark.parametrize("bits", range(2, 9))
def test_output_error_falls_and_weight_error_rises_against_round_to_nearest(bits, symmetric, group_size):
    weight, hessian = _weight(24, 64), _hessian(64, tokens=256)
    fmt = _format(bits, group_size, symmetric)
    found = gptq(weight, hessian, fmt).weight.dequantize()
    rtn = round_to_nearest(weight, bits, symmetric, group_size)
    assert output_error(weight, found, hessian) < 0.6 * output_error(weight, rtn, hessian)
    assert (found - weight).square().sum() > 1.5 * (rtn - weight).square().sum()


@both_zeros
@every_block
@pytest.mark.parametrize("act_order", [False, True])
def test_loss_is_half_the_output_error_under_the_damped_hessian(symmetric, group_size, act_order):
    """W - Q = E U with UᵀU the inverse, hence tr((W - Q) H (W - Q)ᵀ) = ‖E‖²."""
    weight, hessian = _weight(), _hessian()
    result = gptq(weight, hessian, _format(3, group_size, symmetric), act_order=act_order, damp=0.05, block_size=9)
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(40)
    assert 2 * result.loss == pytest.approx(output_error(weight, result.weight.dequantize(), damped), rel=1e-4)


@both_zeros
@pytest.mark.parametrize("act_order", [False, True])
def test_static_groups_use_the_scales_of_round_to_nearest(symmetric, act_order):
    weight, hessian, fmt = _weight(), _hessian(), _format(3, 8, symmetric)
    found = gptq(weight, hessian, fmt, act_order=act_order, static_groups=True).weight
    rtn = quantize(weight, fmt)
    assert torch.equal(found.scale, rtn.scale)
    assert symmetric or torch.equal(found.zero, rtn.zero)
    assert found.order is None
    assert not torch.equal(found.codes, rtn.codes)


@pytest.mark.parametrize("group_size", [0, -1])
@both_zeros
def test_permuting_the_input_channels_permutes_the_result_in_act_order(group_size, symmetric):
    weight, hessian, fmt = _weight(), _hessian(), _format(3, group_size, symmetric)
    permutation = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    options = {"act_order": True, "scale_source": "original"}
    found = gptq(weight[:, permutation], hessian[permutation][:, permutation], fmt, **options).weight
    assert torch.equal(found.codes, gptq(weight, hessian, fmt, **options).weight.codes[:, permutation])


@every_block
def test_permuting_the_rows_permutes_the_result(group_size):
    weight, hessian, fmt = _weight(), _hessian(), _format(3, group_size)
    permutation = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    found = gptq(weight[permutation], hessian, fmt).weight
    assert torch.equal(found.codes, gptq(weight, hessian, fmt).weight.codes[permutation])


@both_zeros
@every_block
@pytest.mark.parametrize("act_order", [False, True])
def test_given_ranges_are_the_ranges(symmetric, group_size, act_order):
    weight, hessian, fmt = _weight(), _hessian(), _format(3, group_size, symmetric)
    full = extrema(weight, fmt)
    clip = Range(0.6 * full.lower, 0.8 * full.upper)
    found = gptq(weight, hessian, fmt, clip=clip, act_order=act_order).weight
    expected = fit(weight, fmt, clip)
    assert torch.equal(found.scale, expected.scale)
    assert symmetric or torch.equal(found.zero, expected.zero)
    assert found.order is None
    _same(gptq(weight, torch.eye(40), fmt, clip=clip, act_order=act_order).weight, quantize(weight, fmt, expected))


def _with_dead(hessian, dead):
    hessian = hessian.clone()
    hessian[dead], hessian[:, dead] = 0, 0
    return hessian


@both_zeros
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("magnitude", [1.0, 2.0**-14, 2.0**14])
def test_dead_columns_are_rounded_and_the_others_do_not_notice_them(symmetric, act_order, magnitude):
    weight, dead = _weight(), torch.tensor([0, 13, 14, 39])
    alive = torch.tensor([k for k in range(40) if k not in dead.tolist()])
    hessian, fmt = magnitude * _with_dead(_hessian(), dead), _format(3, -1, symmetric)
    clip = extrema(weight, fmt)
    found = gptq(weight, hessian, fmt, clip=clip, act_order=act_order).weight
    without = gptq(weight[:, alive], hessian[alive][:, alive], fmt, clip=clip, act_order=act_order).weight
    assert torch.equal(found.codes[:, dead], quantize(weight, fmt).codes[:, dead])
    assert torch.equal(found.codes[:, alive], without.codes)


@pytest.mark.parametrize("dead", [[], [3, 17]])
@every_block
def test_the_overall_factor_of_the_hessian_cancels(dead, group_size):
    weight, hessian, fmt = _weight(), _with_dead(_hessian(), dead), _format(3, group_size)
    expected = gptq(weight, hessian, fmt)
    for factor in (2.0**-16, 2.0**10):  # powers of two are exact
        found = gptq(weight, factor * hessian, fmt)
        assert torch.equal(found.weight.codes, expected.weight.codes)
        assert found.loss == pytest.approx(factor * expected.loss, rel=1e-3)


def test_a_layer_that_saw_no_token_is_rounded_to_nearest():
    weight, fmt = _weight(), _format(4, 8)
    _same(gptq(weight, torch.zeros(40, 40), fmt).weight, quantize(weight, fmt))


def test_a_singular_hessian_is_an_error_without_damping_and_none_with():
    weight, fmt = _weight(), _format()
    singular = second_moment(correlated_inputs(20, 40))
    with pytest.raises(NumericsError, match=r"singular Hessian \(40 x 40\) at damp=0") as refused:
        gptq(weight, singular, fmt, damp=0.0)
    assert "\n" not in str(refused.value)
    assert torch.isfinite(gptq(weight, singular, fmt, damp=0.01).weight.dequantize()).all()
    gptq(weight, _hessian(), fmt, damp=0.0)


@every_block
@pytest.mark.parametrize("dead", [[], [2]])
@pytest.mark.parametrize("act_order", [False, True])
def test_inputs_are_left_alone_and_half_precision_is_computed_in_float32(group_size, dead, act_order):
    weight, hessian, fmt = _weight().bfloat16(), _with_dead(_hessian(), dead), _format(4, group_size)
    before = weight.clone(), hessian.clone()
    found = gptq(weight, hessian, fmt, act_order=act_order).weight
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
    assert torch.equal(found.codes, gptq(weight.float(), hessian, fmt, act_order=act_order).weight.codes)
