"""Per-token quantization: exhaustive codes, laws, `qbench.formats`, and Triton against the reference."""

import math

import pytest
import torch

from qbench.errors import SpecError
from qbench.formats import fit, quantize, uniform
from qbench.kernels import quantize_token

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CODES = ["int8", "float8_e4m3fn"]


def _tokens(dtype=torch.float32, tokens=9, features=37, seed=0):
    x = torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed))
    x[:1, ::5] *= 50
    if tokens > 3:
        x[1], x[2], x[3] = 0, x[2].abs(), x[3] * (1e-6 if dtype == torch.float16 else 1e-30)
    return x.to(dtype)


def _finite_float8():
    """All finite numbers of float8_e4m3fn, ascending, -0 left out."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return values[values.isfinite()].unique()


def test_int8_equals_formats():
    x, fmt = _tokens(), uniform(8, -1, True, scale="float32")
    codes, scale = quantize_token(x)
    assert torch.equal(scale, fit(x, fmt).scale)
    assert torch.equal(codes, quantize(x, fmt).codes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_half_a_step(dtype):
    x = _tokens(dtype)
    codes, scale = quantize_token(x)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale[1] == 1
    # x / s reaches 127.5 and its neighbours: a tie that goes to 128, which saturates at 127.
    assert ((x.float() - codes.float() * scale).abs() <= scale * (0.5 + 2**-16)).all()
    codes, scale = quantize_token(x, code="float8_e4m3fn")
    levels = x.float() / scale
    nearest = (levels[..., None] - _finite_float8()).abs().amin(-1)
    assert torch.equal((levels - codes.float()).abs(), nearest)
    assert codes.float().abs().amax(1)[[0, 2, 3]].tolist() == [448, 448, 448]


def _float8_levels():
    """All finite float8 numbers, their midpoints and the float32 numbers next to those: one token of scale 1."""
    values = _finite_float8()
    middle = (values[1:] + values[:-1]) / 2
    neighbours = [torch.nextafter(middle, torch.full_like(middle, end)) for end in (-math.inf, math.inf)]
    return torch.cat([values, middle, *neighbours, torch.tensor([-0.0, 1e-30, -1e-45])])[None, :]


def test_float8_is_torchs_at_every_number_and_tie():
    x = _float8_levels()
    codes, scale = quantize_token(x, code="float8_e4m3fn")
    assert scale.item() == 1
    assert torch.equal(codes.view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("code", CODES)
def test_a_token_that_is_not_finite_has_scale_nan_and_codes_0(bad, code):
    x = _tokens()
    x[4, 7] = bad
    codes, scale = quantize_token(x, code=code)
    assert scale.isnan().flatten().tolist() == [row == 4 for row in range(9)]
    assert not codes[4].float().any()


def _subnormal():
    """Tokens whose scale is the smallest float32, or would be less: x / s is far beyond the largest code, or small."""
    return torch.tensor([[627.0, -627.0, 3.0], [178.0, -178.0, 3.0], [20.0, -20.0, 3.0]]) * 2.0**-149


def test_codes_saturate_where_the_scale_is_subnormal():
    codes, scale = quantize_token(_subnormal(), code="float8_e4m3fn")
    assert codes.float().tolist() == [[448, -448, 3], [0, 0, 0], [0, 0, 0]]
    assert scale.flatten().tolist() == [2.0**-149, 1, 1]
    codes, scale = quantize_token(_subnormal())
    assert codes[1:].tolist() == [[127, -128, 3], [0, 0, 0]]
    assert scale[1:].flatten().tolist() == [2.0**-149, 1]


@pytest.mark.parametrize("code", CODES)
def test_leading_axes_are_kept(code):
    x = _tokens().view(3, 3, 37)
    codes, scale = quantize_token(x, code=code)
    flat, flat_scale = quantize_token(x.view(9, 37), code=code)
    assert codes.shape == x.shape
    assert scale.shape == (3, 3, 1)
    assert torch.equal(codes.float().view(9, 37), flat.float())
    assert torch.equal(scale.view(9, 1), flat_scale)
    codes, scale = quantize_token(x[:0], code=code)
    assert (codes.shape, scale.shape) == ((0, 3, 37), (0, 3, 1))
    assert quantize_token(x[0, 0], code=code)[1].shape == (1,)


def test_what_cannot_be_quantized_is_refused():
    with pytest.raises(SpecError, match="code=int4: accepted: int8, float8_e4m3fn"):
        quantize_token(_tokens(), code="int4")
    with pytest.raises(SpecError, match="quantize_token dtype"):
        quantize_token(_tokens().double())


def _compare(x, code):
    codes, scale = quantize_token(x, code=code, backend="triton")
    expected, expected_scale = quantize_token(x, code=code, backend="reference")
    assert codes.dtype == expected.dtype
    assert torch.equal(scale.nan_to_num(-1), expected_scale.nan_to_num(-1))
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", CODES)
def test_triton_equals_the_reference_bit_for_bit(device, dtype, code):
    x = _tokens(dtype).to(device)
    x[6, 3], x[7, 2], x[8, 36] = math.nan, math.inf, -math.inf
    _compare(x, code)
    for shape in [(1, 1), (1, 129), (70, 3), (2, 9000)]:
        wide = _tokens(dtype, *shape).to(device)
        _compare(wide, code)
        wide[-1, 0] = math.nan
        _compare(wide, code)
    _compare(_subnormal().to(device), code)
    for view in [x.T, x[::2, 1::3], x.view(3, 3, 37)[:, 1]]:
        _compare(view, code)


def test_triton_float8_is_torchs_at_every_number_and_tie(device):
    _compare(_float8_levels().to(device), "float8_e4m3fn")


def test_triton_int8_rounds_every_tie_to_even(device):
    _compare((torch.arange(-255, 256, device=device) / 2)[None, :], "int8")
