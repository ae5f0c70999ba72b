"""What a linear layer multiplies is exactly what the format's own definition makes of its input."""

from dataclasses import replace

import pytest
import torch

from qbench.engine.activations import InputQuantizer
from qbench.errors import NumericsError
from qbench.formats import Range, fake_quantize, fit, uniform
from qbench.formats.element import Float, Int
from qbench.formats.named import COMPOSITE, activation_format
from qbench.formats.ranges import RangeFit
from qbench.formats.scale import SCALES
from qbench.formats.scheme import InputFormat
from qbench.formats.tensor import Block, TensorFormat

FLOAT32 = SCALES["float32"]
E4M3 = Float(4, 3, "fn")

DYNAMIC = {
    "token": uniform(8, -1, True),
    "token_asym": uniform(4, -1, False),
    "token_float_zero": TensorFormat(element=Int(4, signed=False), zero="float"),
    "token_full": TensorFormat(element=Int(4, signed=True, reach="full"), scale=FLOAT32),
    "token_mse": replace(uniform(4, -1, True), range=RangeFit(method="mse")),
    "token_percentile": replace(uniform(8, -1, True), range=RangeFit(method="percentile", percentile=95.0)),
    "tensor": uniform(8, 0, True),
    "group": uniform(4, 16, False),
    "group_partial": uniform(4, 20, True, partial=True),
    "group_float_zero_partial": TensorFormat(
        element=Int(4, signed=False), zero="float", block=Block(1, 20), partial=True
    ),
    "tile": TensorFormat(element=E4M3, block=Block(4, 16), scale=FLOAT32, partial=True),
    "fp8": TensorFormat(element=E4M3, scale=FLOAT32),
    **{name: activation_format(name) for name in ("mxfp8", "mxfp4", "mxint8", "nvfp4", "fp8block", "nf4", "int4in8")},
}

STATIC = {
    "tensor": uniform(8, 0, True),
    "tensor_asym": uniform(8, 0, False),
    "tensor_fp8": TensorFormat(element=E4M3, block=Block(0, 0), scale=FLOAT32),
    "column": TensorFormat(element=Int(8, signed=True), block=Block(0, 1), scale=FLOAT32),
    "column_asym": TensorFormat(element=Int(6, signed=False), block=Block(0, 1), zero="int", scale=FLOAT32),
    "group": TensorFormat(element=Int(4, signed=True), block=Block(0, 16), scale=FLOAT32),
    "group_partial": TensorFormat(element=Int(4, signed=False), block=Block(0, 48), zero="int", partial=True),
}


def _x(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (x * torch.logspace(-1, 1, shape[-1])).to(dtype)


def _dynamic(fmt, **settings):
    return InputQuantizer(format=InputFormat(format=fmt), **settings)


def _static(fmt, x, share=0.7, **settings):
    """With the range of `share` of x's extremes per group of features, and what `formats` says of x under it."""
    rows = x.float().flatten(0, -2)
    width, groups = fmt.width(rows.shape[1]), fmt.groups(rows.shape[1])
    parts = [rows[:, k * width : (k + 1) * width] for k in range(groups)]
    clip = Range(
        share * torch.stack([part.min().clamp_max(0) for part in parts])[None],
        share * torch.stack([part.max().clamp_min(0) for part in parts])[None],
    )
    params = fit(rows, fmt, clip)
    quantizer = InputQuantizer(format=InputFormat(format=fmt, static=True), params=params, **settings)
    return quantizer, fake_quantize(rows, fmt, clip).view(x.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_inputs_are_those_of_the_format(name, dtype):
    fmt, x = DYNAMIC[name], _x(2, 7, 128, dtype=dtype)
    x[1, 3] = 0  # a token of zeros
    found = _dynamic(fmt)(x)
    expected = fake_quantize(x.float().flatten(0, 1), fmt).view(x.shape)
    assert found.dtype == dtype
    assert torch.equal(found, expected.to(dtype))
    assert not torch.equal(found, x)
    assert not found[1, 3].any()


@pytest.mark.parametrize("name", STATIC)
def test_static_inputs_are_those_of_the_format(name):
    x = _x(3, 5, 128)
    quantizer, expected = _static(STATIC[name], x)
    assert torch.equal(quantizer(x), expected)
    # The same scales for other tokens, however many.
    assert torch.equal(quantizer(x[1:2, 2:4]), expected[1:2, 2:4])


def test_shared_scale_from_calibration_text_replaces_the_inputs_own():
    x, outer = _x(9, 64), torch.full((1, 1), 3.0)
    fmt = COMPOSITE["nvfp4"]
    assert torch.equal(_dynamic(fmt, outer=outer)(x), fake_quantize(x, fmt, outer=outer))
    assert not torch.equal(_dynamic(fmt, outer=outer)(x), _dynamic(fmt)(x))


@pytest.mark.parametrize("name", ["token", "token_asym", "group", "fp8", "mxfp4", "nf4"])
def test_tokens_do_not_see_each_other(name):
    quantizer, x = _dynamic(DYNAMIC[name]), _x(1, 9, 128)
    more = torch.cat([x, 100 * _x(1, 4, 128, seed=1)], dim=1)
    assert torch.equal(quantizer(more)[:, :9], quantizer(x))


def test_input_stays_as_it_was():
    x = _x(4, 128)
    before = x.clone()
    for fmt in DYNAMIC.values():
        _dynamic(fmt)(x)
    for fmt in STATIC.values():
        _static(fmt, x)[0](x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(0, 128), (2, 0, 128), (1, 1, 1, 128), (128,)])
def test_any_number_of_dimensions(shape):
    x = _x(*shape)
    assert _dynamic(DYNAMIC["token"])(x).shape == x.shape


def test_views_that_cannot_be_flattened():
    x = _x(3, 128, 5).transpose(1, 2)
    assert torch.equal(_dynamic(DYNAMIC["group"])(x), _dynamic(DYNAMIC["group"])(x.contiguous()))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", DYNAMIC)
def test_values_that_are_not_finite_are_refused_by_name(name, bad):
    x = _x(6, 128)
    x[4, 17] = bad
    with pytest.raises(NumericsError, match=r"^block 3, o_proj: the activations contain NaN or infinity$"):
        _dynamic(DYNAMIC[name], where="block 3, o_proj")(x)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", STATIC)
def test_static_scales_do_not_saturate_infinity(name, bad):
    x = _x(6, 128)
    quantizer, _ = _static(STATIC[name], x, where="block 3, o_proj")
    x[4, 17] = bad
    with pytest.raises(NumericsError, match=r"^block 3, o_proj: the activations contain NaN or infinity$"):
        quantizer(x)


def test_a_scale_that_overflows_is_said_so():
    with pytest.raises(NumericsError, match=r"^linear input: scale is not finite in float16.*scale_dtype=float32"):
        _dynamic(uniform(2, -1, True))(torch.full((1, 8), 1e6))


def test_half_the_significand_of_float32_changes_next_to_nothing():
    fmt = TensorFormat(element=Float(5, 10, "ieee"), scale=FLOAT32)
    x = _x(8, 128)
    assert torch.allclose(_dynamic(fmt)(x), x, rtol=2.0**-11, atol=1e-6)
