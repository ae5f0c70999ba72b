"""Fake quantization: against a loop over elements, against `qbench.formats`, and Triton against the reference."""

import itertools
import math

import pytest
import torch

from qbench.errors import SpecError
from qbench.formats import fake_quantize, uniform
from qbench.kernels import fake_quant

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
GROUPS = [-1, 1, 5, 8, 16, 50]


def _values(dtype=torch.float32, rows=7, columns=37, seed=0):
    """Odd sizes; a zero row, one of a sign, tiny ones, outliers."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x[:1, ::5] *= 50
    if rows > 5:
        x[1], x[2], x[3] = 0, x[2].abs() + 1, -x[3].abs() - 1
        x[4] *= 3e-7  # scales of float16 become subnormal, or 0
        x[5] *= 1e-39  # so do scales of float32
    return x.to(dtype)


def _round_even(value):
    low = math.floor(value)
    return low + (value - low > 0.5 or (value - low == 0.5 and low % 2 == 1))


def _slow(x, bits, group_size, symmetric, scale_dtype):
    """Element by element; only the correctly rounded float32 division is torch's."""
    out = torch.empty_like(x)
    minimum = -(2 ** (bits - 1)) if symmetric else 0
    width = x.shape[1] if group_size == -1 else group_size
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], width):
            group = x[row, start : start + width].float()
            low, high = min(0.0, group.min().item()), max(0.0, group.max().item())
            spread = 2 * max(-low, high) if symmetric else torch.tensor(high) - torch.tensor(low)
            exact = torch.as_tensor(spread, dtype=torch.float32) / (2**bits - 1)
            scale = exact.to(scale_dtype).float()
            if scale == 0:
                info = torch.finfo(scale_dtype)
                scale = torch.tensor(info.smallest_normal * info.eps if exact > 0 else 1.0)
            zero = 0 if symmetric else min(max(_round_even((torch.tensor(-low) / scale).item()), 0), 2**bits - 1)
            for place, value in enumerate(group):
                code = min(max(_round_even((value / scale).item()) + zero, minimum), minimum + 2**bits - 1)
                out[row, start + place] = (scale * (code - zero)).to(x.dtype)
    return out


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_reference_equals_a_loop_over_elements(bits, symmetric):
    for group_size, scale_dtype, dtype in itertools.product([-1, 5], DTYPES, DTYPES):
        x = _values(dtype, columns=13)
        found = fake_quant(x, bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
        assert found.dtype == dtype
        assert torch.equal(found, _slow(x, bits, group_size, symmetric, scale_dtype)), (group_size, scale_dtype, dtype)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_reference_equals_formats(bits, symmetric):
    for group_size, scale_dtype in itertools.product(GROUPS, DTYPES):
        fmt = uniform(bits, group_size, symmetric, scale=NAMES[scale_dtype], partial=True)
        x = _values()
        found = fake_quant(x, bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
        assert torch.equal(found, fake_quantize(x, fmt)), (group_size, scale_dtype)


def test_a_given_scale_may_stand_for_all_rows_or_groups():
    x = _values()
    scale, zero = torch.tensor([[0.3]]), torch.tensor([[5.0]])
    found = fake_quant(x, bits=4, group_size=8, symmetric=False, scale=scale, zero=zero)
    assert torch.equal(found, 0.3 * ((x / 0.3).round() + 5).clamp(0, 15).sub(5))
    each = torch.rand(1, 5) + 0.1
    found = fake_quant(x, bits=4, group_size=8, scale=each)
    expected = each.repeat_interleave(8, 1)[:, :37]
    assert torch.equal(found, expected * (x / expected).round().clamp(-8, 7))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_that_is_not_finite_is_nan_and_its_neighbours_are_not(bad, symmetric):
    x = _values()
    x[0, 9] = bad
    found = fake_quant(x, bits=4, group_size=8, symmetric=symmetric)
    assert found[0, 8:16].isnan().all()
    assert found.isnan().sum() == 8
    overflow = fake_quant(torch.full((1, 8), 3e38), bits=2, symmetric=symmetric, scale_dtype=torch.float16)
    assert overflow.isnan().all()


def test_given_scales_saturate_infinities_and_keep_nan():
    x = torch.tensor([[math.inf, -math.inf, math.nan, 1.0]])
    found = fake_quant(x, bits=4, scale=torch.ones(1, 1))
    assert found[0, [0, 1, 3]].tolist() == [7, -8, 1]
    assert found[0, 2].isnan()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (1, 1)])
def test_empty_and_single(shape):
    assert fake_quant(torch.ones(shape), bits=4, group_size=4).shape == shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits=9: accepted: 2 to 8"),
        ({"bits": 1}, "bits=1"),
        ({"bits": 4, "group_size": 0}, "group_size=0"),
        ({"bits": 4, "group_size": -2}, "group_size=-2"),
        ({"bits": 4, "scale_dtype": torch.float64}, "scale_dtype"),
        ({"bits": 4, "zero": torch.zeros(3, 1)}, "zero=given"),
        ({"bits": 4, "symmetric": False, "zero": torch.zeros(3, 1)}, "zero=given"),
        ({"bits": 4, "symmetric": False, "scale": torch.ones(3, 1)}, "zero=none"),
        ({"bits": 4, "scale": torch.ones(3, 2)}, r"scale shape=\(3, 2\)"),
        ({"bits": 4, "backend": "cuda"}, "backend=cuda: accepted: reference, triton"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(SpecError, match=message):
        fake_quant(torch.ones(3, 8), **options)
    with pytest.raises(SpecError, match="dtype"):
        fake_quant(torch.ones(3, 8, dtype=torch.float64), bits=4)


def _compare(x, **options):
    found = fake_quant(x, backend="triton", **options)
    expected = fake_quant(x, backend="reference", **options)
    assert found.dtype == expected.dtype
    assert torch.equal(found.nan_to_num(-77), expected.nan_to_num(-77)), options


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", GROUPS)
def test_triton_equals_the_reference_bit_for_bit(device, dtype, symmetric, group_size):
    x = _values(dtype).to(device)
    if dtype == torch.bfloat16 and device.type == "cpu":
        x[5] = 1e-30  # the interpreter's own casts get subnormal bfloat16 numbers wrong
    for bits, scale_dtype in itertools.product([2, 4, 8], DTYPES):
        _compare(x, bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)


@pytest.mark.parametrize("symmetric", [True, False])
def test_triton_equals_the_reference_where_numbers_are_not_finite(device, symmetric):
    x = _values().to(device)
    x[0, 3], x[2, 30], x[3, 11] = math.nan, math.inf, -math.inf
    _compare(x, bits=4, group_size=8, symmetric=symmetric)
    zero = None if symmetric else torch.full((7, 5), 3.0, device=device)
    _compare(x, bits=4, group_size=8, symmetric=symmetric, scale=torch.rand(7, 5, device=device) + 0.1, zero=zero)
    _compare(x.abs() * 1e38, bits=2, group_size=8, symmetric=symmetric, scale_dtype=torch.float16)


def test_triton_rounds_every_tie_to_even(device):
    x = (torch.arange(-300, 300, device=device) / 2)[None, :]
    _compare(x, bits=8, scale=torch.ones(1, 1, device=device))
    _compare(x, bits=8, scale=torch.ones(1, 1, device=device), symmetric=False, zero=x.new_full((1, 1), 100))
    _compare(x * 1e30, bits=8, scale=torch.ones(1, 1, device=device))


@pytest.mark.parametrize("symmetric", [True, False])
def test_triton_at_other_shapes_and_strides(device, symmetric):
    options = {"bits": 4, "symmetric": symmetric}
    for shape in [(1, 1), (1, 300), (33, 4), (0, 5), (3, 9000)]:  # the last is wider than what registers keep
        x = _values(rows=shape[0], columns=shape[1]).to(device)
        _compare(x, **options)
        x[-1:, 0] = math.nan
        _compare(x, **options)
    x = _values(rows=40, columns=12).to(device)
    for view in [x.T, x[::3, ::2], x[:, 3:]]:
        for group_size in [-1, 4]:
            _compare(view, group_size=group_size, **options)
    scale = (torch.rand(1, 3, device=device) + 0.1).expand(40, 3)
    zero = None if symmetric else torch.arange(40, device=device)[:, None].remainder(16)
    _compare(x, group_size=4, scale=scale, zero=zero, **options)
