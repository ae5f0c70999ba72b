"""Where other people's formats are the same: compressed-tensors' quantizers and bytes, and GGUF's blocks."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as their_fake_quantize
from compressed_tensors.quantization.lifecycle.forward import quantize as their_quantize
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

from qbench.formats import SCALES, Block, Int, TensorFormat, quantize, uniform
from qbench.formats.named import COMPOSITE
from qbench.formats.packing import pack, pack_codes
from tests.formats.cases import weights

FLOAT32 = SCALES["float32"]


def _grouped(x, width):
    return x.unflatten(1, (-1, width))


def _theirs(x, args, **options):
    """(scale, fake-quantized x) by compressed-tensors, min-max."""
    parts = {"group": _grouped(x, args.group_size or x.shape[1]), "channel": x[:, None], "tensor": x.view(1, 1, -1)}
    blocks = parts[args.strategy.replace("tensor_group", "group")]
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, **options)
    return scale, their_fake_quantize(x, scale, zero, args, **options)


@pytest.mark.parametrize("kind", ["normal", "outliers"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("strategy", ["group", "channel"])
def test_integers_are_those_of_compressed_tensors(kind, symmetric, bits, strategy):
    """Symmetric: max|x| / ((2^b - 1) / 2), "midpoint". Asymmetric: the same scale, codes less 2^(b-1)."""
    x = weights(16, 128, kind=kind)
    width = 32 if strategy == "group" else None
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=width)
    scale, values = _theirs(x, args)
    found = quantize(x, uniform(bits, width or -1, symmetric, scale="float32"))
    assert torch.equal(found.scale, scale)
    assert torch.equal(found.dequantize(), values)


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_fp8_is_that_of_compressed_tensors(strategy):
    x = weights(16, 128, kind="outliers")
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=strategy)
    scale, values = _theirs(x, args)
    block = Block(0, 0) if strategy == "tensor" else Block(1, 0)
    found = quantize(x, TensorFormat(element=COMPOSITE["mxfp8"].element, block=block, scale=FLOAT32))
    assert torch.equal(found.scale.flatten(), scale.flatten())
    assert torch.equal(found.dequantize(), values)


@pytest.mark.parametrize("kind", ["normal", "outliers"])
def test_nvfp4_scales_codes_and_bytes_are_those_of_compressed_tensors(kind):
    """Except that it gives a block too small for E4M3 a scale of 1/8 instead of the smallest number: not in here."""
    x = weights(16, 128, kind=kind)
    args = QuantizationArgs(
        num_bits=4,
        type="float",
        symmetric=True,
        strategy="tensor_group",
        group_size=16,
        scale_dtype=torch.float8_e4m3fn,
    )
    overall = generate_gparam(x.amin(), x.amax())
    scale, values = _theirs(x, args, global_scale=overall)
    found = quantize(x, COMPOSITE["nvfp4"])
    packed = pack(found)
    assert torch.equal(found.outer.flatten(), overall)
    assert torch.equal(packed.scales.view(torch.float8_e4m3fn).float(), scale.float().flatten())
    assert torch.equal(found.dequantize(), values)
    zero = torch.zeros_like(scale)
    levels = their_quantize(x, scale, zero, args, global_scale=overall)
    assert torch.equal(packed.codes, pack_fp4_to_uint8(levels).flatten())
    assert packed.outer.view(torch.float32).item() == overall.item()


def test_mxfp4_scales_codes_and_bytes_are_those_of_compressed_tensors_where_both_floor():
    """It takes the power of two above where max|x| lies in the last eighth below it (mantissa 1.75 and more), where the
    standard's rule, which is ours, takes the one below: those blocks are left out, and differ by exactly that."""
    x = weights(64, 128, kind="outliers")
    args = QuantizationArgs(
        num_bits=4, type="float", symmetric=True, strategy="group", group_size=32, scale_dtype=torch.uint8
    )
    largest = _grouped(x, 32).abs().amax(-1)
    exponents, _ = calculate_qparams(-largest, largest, args)
    found = quantize(x, COMPOSITE["mxfp4"])
    up = torch.frexp(largest).mantissa >= 1.75 / 2
    assert 0 < up.sum() < up.numel() / 2
    assert torch.equal(exponents.float(), found.scale * torch.where(up, 2, 1))
    levels = x / found.scale.repeat_interleave(32, dim=1)
    theirs = pack_fp4_to_uint8(their_quantize(levels, torch.ones(64, 4), torch.zeros(64, 4), args))
    assert torch.equal(pack(found).codes, theirs.flatten())
    plain = args.model_copy(update={"scale_dtype": None})
    values = their_fake_quantize(x, found.scale, torch.zeros(64, 4), plain)
    assert torch.equal(found.dequantize(), values)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_integers_are_compressed_tensors_words(bits):
    """Its words hold unsigned codes (2^(b-1) added), ours two's complement: the top bit is the other way round."""
    found = quantize(weights(8, 64), uniform(bits, 32, symmetric=True))
    words = pack_to_int32(found.codes, bits).numpy().view(np.uint8).flatten()
    unsigned = (found.codes.to(torch.int32) + (1 << (bits - 1))).to(torch.uint8)
    assert np.array_equal(pack_codes(unsigned, Int(bits, signed=False)).numpy(), words)


def _gguf(x, kind):
    """(packed blocks [blocks, bytes], values) of x in GGUF's format `kind`."""
    packed = gguf.quants.quantize(x.numpy(), kind)
    _, size = gguf.GGML_QUANT_SIZES[kind]
    return packed.reshape(-1, size), torch.from_numpy(gguf.quants.dequantize(packed, kind))


def _exact(x, steps):
    """x with blocks of 32 stretched so that max|x| / steps, of either sign, is a power of two: needs no rounding."""
    blocks = _grouped(x, 32)
    place = blocks.abs().argmax(-1, keepdim=True)
    largest = blocks.gather(-1, place)
    wanted = largest.sign() * steps * 2.0 ** torch.frexp(largest).exponent
    return (blocks * (wanted / largest)).scatter(-1, place, wanted).flatten(1)


FULL = TensorFormat(element=Int(4, signed=True, reach="full"), block=Block(1, 32))
NARROW = TensorFormat(element=Int(8, signed=True, reach="narrow"), block=Block(1, 32))


@pytest.mark.parametrize(
    ("kind", "fmt", "steps"), [("Q8_0", NARROW, 127), ("Q4_0", FULL, 8), ("Q5_0", None, 16)], ids=str
)
def test_symmetric_gguf_blocks_are_ours_where_their_scale_needs_no_rounding(kind, fmt, steps):
    """GGUF encodes with the scale before it is rounded to float16 and rounds ties up or away from 0; we encode with the
    stored scale, ties to even. So scales always agree, and codes where the scale is exact and there is no tie."""
    fmt = fmt or replace(FULL, element=Int(5, signed=True, reach="full"))
    kind = gguf.GGMLQuantizationType[kind]
    x = weights(16, 128)
    theirs, _ = _gguf(x, kind)
    assert torch.equal(
        quantize(x, fmt).scale.flatten(), torch.from_numpy(theirs[:, :2].copy().view(np.float16)[:, 0]).float()
    )
    exact = _exact(x, steps)
    found = quantize(exact, fmt)
    packed, values = _gguf(exact, kind)
    assert torch.equal(found.dequantize(), values)
    if steps == 127:
        assert np.array_equal(found.codes.reshape(-1, 32).numpy(), packed[:, 2:].view(np.int8))
    if steps == 8:  # the first half of a block in low nibbles, the second in high ones, plus 8
        codes = found.codes.reshape(-1, 2, 16).numpy().astype(np.uint8) + 8 & 15
        assert np.array_equal(codes[:, 0] | codes[:, 1] << 4, packed[:, 2:])


@pytest.mark.parametrize(("kind", "bits"), [("Q4_1", 4), ("Q5_1", 5)])
def test_asymmetric_gguf_blocks_are_ours_where_scale_and_minimum_are_exact(kind, bits):
    """GGUF stores the minimum in float16, ours is a zero point in float16 (minimum / scale): the same where both are
    exact, otherwise minima differ by a rounding. Ties as for the others."""
    steps = 2**bits - 1
    generator = torch.Generator().manual_seed(0)
    offset = torch.randint(-40, 40, (16, 4, 1), generator=generator).float()
    codes = torch.rand(16, 4, 32, generator=generator) * steps
    codes[..., 3], codes[..., 30] = 0, steps
    scale = 2.0 ** torch.randint(-9, 3, (16, 4, 1), generator=generator).float()
    x = ((codes + offset) * scale).flatten(1)
    fmt = TensorFormat(element=Int(bits, signed=False), block=Block(1, 32), zero="float")
    found = quantize(x, fmt)
    packed, values = _gguf(x, gguf.GGMLQuantizationType[kind])
    assert torch.equal(found.scale.flatten(), torch.from_numpy(packed[:, :2].copy().view(np.float16)[:, 0]).float())
    assert torch.equal(found.dequantize(), values)


def test_mxfp4_gguf_blocks_are_ours():
    """Bytes of scales and values; a tie goes to the smaller magnitude there, to the even code here. GGUF has no minus
    zero."""
    x = weights(64, 128, kind="outliers")
    found = quantize(x, COMPOSITE["mxfp4"])
    packed, values = _gguf(x, gguf.GGMLQuantizationType.MXFP4)
    assert np.array_equal(packed[:, 0], found.scale_codes.flatten().numpy())
    assert torch.equal(found.dequantize(), values)
    codes = found.codes.reshape(-1, 2, 16).numpy()
    codes = np.where(codes == 8, 0, codes)
    assert np.array_equal(codes[:, 0] | codes[:, 1] << 4, packed[:, 1:])


def test_ternary_gguf_blocks_have_the_largest_magnitude_as_scale():
    """TQ1_0 and TQ2_0 (blocks of 256) coincide with min-max ternary codes; BitNet's own scale, mean|w|, does not."""
    x = weights(8, 256)
    fmt = TensorFormat(element=COMPOSITE["ternary"].element, block=Block(1, 256))
    exact = x / x.abs().amax(1, keepdim=True) * 4
    exact[:, 0] = 4
    _, values = _gguf(exact, gguf.GGMLQuantizationType.TQ2_0)
    assert torch.equal(quantize(exact, fmt).dequantize(), values)
