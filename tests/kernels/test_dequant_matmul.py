"""Product with packed weights: against a loop, `qbench.formats`, and Triton against float64 within derived bounds."""

import itertools

import pytest
import torch

from qbench.errors import SpecError
from qbench.formats import quantize, uniform
from qbench.kernels import dequant_matmul, pack

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(5, 37, 8), (70, 64, 32), (33, 200, -1), (9, 130, 96), (9, 101, 7), (3, 256, 128), (1, 1, 1), (2, 600, 50)]
"""(out, in, group size): odd sizes, groups that end within a byte, a short last group, rows beyond one step."""


def _weight(rows, columns, group_size, bits, asymmetric, seed=0):
    """Codes, scale and zero as they are meant to be used, and float64 W made element by element."""
    generator = torch.Generator().manual_seed(seed)
    width = columns if group_size == -1 else group_size
    groups = -(-columns // width)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    codes = codes.to(torch.uint8) if asymmetric else (codes - 2 ** (bits - 1)).to(torch.int8)
    scale = torch.rand(rows, groups, generator=generator) + 0.01
    zero = torch.randint(0, 2**bits, (rows, groups), generator=generator) if asymmetric else None
    weight = torch.empty(rows, columns, dtype=torch.float64)
    for row, column in itertools.product(range(rows), range(columns)):
        code = int(codes[row, column]) - (int(zero[row, column // width]) if asymmetric else 0)
        weight[row, column] = float(scale[row, column // width]) * code
    return codes, scale, zero, weight


def _check(found, x, weight):
    """float32 sums in any order err by at most their length times half an ulp times the sum of magnitudes; scaling and
    the product round once more each, the store once in x's dtype."""
    exact = x.double().cpu() @ weight.T
    magnitude = x.double().cpu().abs() @ weight.T.abs()
    bound = (x.shape[-1] + 4) * 2**-24 * magnitude + torch.finfo(x.dtype).eps / 2 * exact.abs()
    if x.dtype == torch.float32 and x.is_cuda:
        bound += 2**-19 * magnitude  # three TF32 products instead of one of float32
    error = (found.double().cpu() - exact).abs()
    assert found.dtype == x.dtype
    assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_reference_is_the_product_with_the_decoded_weight(bits, asymmetric, rows, columns, group_size):
    codes, scale, zero, weight = _weight(rows, columns, group_size, bits, asymmetric)
    packed = pack(codes, bits)
    for dtype in DTYPES:
        x = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
        found = dequant_matmul(x, packed, scale, zero, bits=bits, group_size=group_size)
        assert found.shape == (2, 3, rows)
        _check(found, x, weight)
    # The identity shows the weight itself: scale and difference are multiplied once, in float32.
    found = dequant_matmul(torch.eye(columns), packed, scale, zero, bits=bits, group_size=group_size)
    assert torch.equal(found.T, weight.float())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_reference_decodes_what_formats_encode(bits, symmetric):
    w = torch.randn(11, 40, generator=torch.Generator().manual_seed(0))
    quantized = quantize(w, uniform(bits, 16, symmetric, partial=True))
    packed = pack(quantized.codes, bits)
    found = dequant_matmul(torch.eye(40), packed, quantized.scale, quantized.zero, bits=bits, group_size=16)
    assert torch.equal(found.T, quantized.dequantize())


def test_empty():
    codes, scale, zero, _ = _weight(5, 8, 4, 4, True)
    assert dequant_matmul(torch.ones(0, 8), pack(codes, 4), scale, zero, bits=4, group_size=4).shape == (0, 5)
    assert dequant_matmul(torch.ones(2, 8), pack(codes[:0], 4), scale[:0], bits=4, group_size=4).shape == (2, 0)


def test_what_does_not_fit_is_refused():
    codes, scale, zero, _ = _weight(5, 8, 4, 4, True)
    packed, x = pack(codes, 4), torch.ones(2, 8)
    for arguments, options, message in [
        ((x, packed, scale, zero), {"bits": 3, "group_size": 4}, "bits=3: accepted: 4, 8"),
        ((x, packed, scale, zero), {"bits": 4, "group_size": 0}, "group_size=0"),
        ((x, packed, scale, zero), {"bits": 8, "group_size": 4}, r"packed=torch.uint8 \[5, 4\]: .*\[out, 8\]"),
        ((x, packed, scale, zero), {"bits": 4, "group_size": 8}, r"scale shape=\(5, 2\): accepted: \[5, 1\]"),
        ((x, packed, scale, zero[:1]), {"bits": 4, "group_size": 4}, "zero shape"),
        ((x, packed, scale.double(), zero), {"bits": 4, "group_size": 4}, "scale dtype"),
        ((x.double(), packed, scale, zero), {"bits": 4, "group_size": 4}, "dequant_matmul dtype"),
    ]:
        with pytest.raises(SpecError, match=message):
            dequant_matmul(*arguments, **options)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_triton_is_the_product_with_the_decoded_weight(device, bits, asymmetric, rows, columns, group_size):
    codes, scale, zero, weight = _weight(rows, columns, group_size, bits, asymmetric)
    packed = pack(codes, bits).to(device)
    for tokens in [1, 3]:
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(device)
        parameters = [None if p is None else p.to(device) for p in (scale, zero)]
        found = dequant_matmul(x, packed, *parameters, bits=bits, group_size=group_size, backend="triton")
        _check(found, x, weight)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 17, 70])
def test_triton_in_every_dtype(device, bits, dtype, tokens):
    """70 tokens take more than one tile of the kernel for many; groups of 7 take its slower path."""
    for asymmetric, group_size in [(True, 32), (False, 7)]:
        codes, scale, zero, weight = _weight(9, 66, group_size, bits, asymmetric)
        parameters = [None if p is None else p.to(device) for p in (scale, zero)]
        x = torch.randn(tokens, 66, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        packed = pack(codes, bits).to(device)
        found = dequant_matmul(x, packed, *parameters, bits=bits, group_size=group_size, backend="triton")
        _check(found, x, weight)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_triton_at_other_strides_and_parameter_dtypes(device, tokens, bits):
    codes, scale, zero, _ = _weight(12, 96, 32, bits, True)
    scale = scale.to(torch.bfloat16)
    weight = scale.double().repeat_interleave(32, 1) * (codes.double() - zero.double().repeat_interleave(32, 1))
    packed = pack(codes, bits).T.contiguous().T.to(device)
    x = torch.randn(96, 2 * tokens, generator=torch.Generator().manual_seed(1)).to(device).T[::2]
    for dtype in [torch.uint8, torch.float32, torch.int64]:
        parameters = scale.T.contiguous().T.to(device), zero.to(device, dtype)
        found = dequant_matmul(x, packed, *parameters, bits=bits, group_size=32, backend="triton")
        _check(found, x, weight)


def test_triton_adds_the_parts_of_a_long_row(device):
    """Few rows and many columns: several programs share a row and their sums are added."""
    codes, scale, zero, weight = _weight(4, 4096, 128, 4, True)
    x = torch.randn(5, 4096, generator=torch.Generator().manual_seed(1)).to(device)
    parameters = scale.to(device), zero.to(device)
    found = dequant_matmul(x, pack(codes, 4).to(device), *parameters, bits=4, group_size=128, backend="triton")
    _check(found, x, weight)
