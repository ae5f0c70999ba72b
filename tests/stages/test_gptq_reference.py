"""GPTQ against OBQ in fixed order: an explicit inverse of the remaining Hessian at every step, in float64."""

import pytest
import torch

from qbench.formats import uniform
from qbench.stages.gptq_core import gptq
from tests.stages.references import correlated_inputs, optimal_brain_quantizer, second_moment

SIZES = [(6, 8), (1, 9), (16, 40)]


def _problem(rows, columns):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    return weight, second_moment(correlated_inputs(4 * columns, columns))


def _agrees(weight, hessian, fmt, reference_order=None, **options):
    found = gptq(weight, hessian, fmt, **options).weight.dequantize().double()
    kept = {name: options[name] for name in ("damp", "block_size", "scale_source") if name in options}
    expected = optimal_brain_quantizer(
        weight,
        hessian,
        bits=fmt.bits,
        symmetric=fmt.symmetric,
        group_size=fmt.group_size,
        order=reference_order,
        **{"damp": 0.01, **kept},
    )
    # A scale midway between two float16 values is rounded apart by the last bit of float32: that costs one row.
    agrees = torch.isclose(found, expected, rtol=1e-4, atol=1e-5).all(1)
    assert (~agrees).sum() <= len(weight) // 10


def _format(bits, symmetric, group_size):
    return uniform(bits=bits, group_size=group_size, symmetric=symmetric, partial=True)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [0, -1, 4, 7])
def test_quantizes_as_optimal_brain_quantization_in_fixed_order(size, symmetric, group_size):
    for bits in (2, 3, 4, 8):
        for damp in (0.01, 0.2):
            _agrees(*_problem(*size), _format(bits, symmetric, group_size), damp=damp)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("group_size", [0, -1, 4, 7])
@pytest.mark.parametrize("source", ["compensated", "original"])
def test_act_order_is_the_order_of_the_diagonal(size, group_size, source):
    weight, hessian = _problem(*size)
    order = hessian.diagonal().argsort(descending=True)
    assert not torch.equal(order, torch.arange(len(order)))
    _agrees(weight, hessian, _format(3, False, group_size), order, act_order=True, scale_source=source)


@pytest.mark.parametrize("source", ["compensated", "stale", "original"])
@pytest.mark.parametrize("block_size", [1, 3, 6, 8, 17, 128])
@pytest.mark.parametrize("group_size", [4, 8, 11])
def test_every_scale_source_fits_the_weights_it_names(source, block_size, group_size):
    weight, hessian = _problem(16, 40)
    for symmetric in (False, True):
        _agrees(weight, hessian, _format(3, symmetric, group_size), block_size=block_size, scale_source=source)
