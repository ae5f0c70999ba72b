"""Error of the formats on a normal distribution, against figures of other code, and the order in which they stand."""

import itertools
from dataclasses import replace

import pytest
import torch

from qbench.formats import SCALES, Block, Float, Int, RangeFit, TensorFormat, fake_quantize, uniform
from qbench.formats.named import COMPOSITE, float_element
from tests.formats.cases import weights

FLOAT32 = SCALES["float32"]
MSE = RangeFit(method="mse")

# Mean squared error on a standard normal (METHODS 12.6): measured by other code on 2^20 samples (2^17 with a search),
# printed to two or three digits, good to 3 %. Keys: group size, bits.
INTEGERS = {
    "asymmetric": {
        (64, 2): 0.209, (64, 3): 0.0381, (64, 4): 0.00830,
        (128, 2): 0.252, (128, 3): 0.0464, (128, 4): 0.0101, (128, 8): 3.49e-5,
    },
    "asymmetric, searched": {
        (64, 2): 0.128, (64, 3): 0.0312, (64, 4): 0.00763, (128, 2): 0.137, (128, 3): 0.0352, (128, 4): 0.00907,
    },
    "narrow": {
        (64, 2): 0.514, (64, 3): 0.0630, (64, 4): 0.0116,
        (128, 2): 0.586, (128, 3): 0.0747, (128, 4): 0.0137, (128, 8): 4.16e-5, (16, 4): 0.00728, (32, 4): 0.00947,
    },
    "midpoint": {
        (64, 2): 0.261, (64, 3): 0.0484, (64, 4): 0.0105,
        (128, 2): 0.301, (128, 3): 0.0561, (128, 4): 0.0122, (128, 8): 4.22e-5,
    },
    "full": {
        (64, 2): 0.155, (64, 3): 0.0367, (64, 4): 0.00900,
        (128, 2): 0.179, (128, 3): 0.0430, (128, 4): 0.0106, (128, 8): 4.10e-5,
    },
}  # fmt: skip
FLOATS = {
    "e4m3": (8.6e-4, 5.7e-4, 7.0e-4),
    "e5m2": (2.9e-3, 2.3e-3, 2.8e-3),
    "e3m2": (2.9e-3, 2.3e-3, 2.8e-3),
    "e2m3": (8.0e-4, 5.9e-4, 9.4e-4),
    "e2m1": (0.0132, 0.0102, 0.0181),
}  # blocks of 32 with a power of two, blocks of 32 with float32, whole tensor
NAMED = {"nvfp4": 0.00906, "nf4": 0.00846, "mxint8": 6.8e-5, "ternary": 0.2635, "mxfp4": 0.0132}


def _normal(count):
    return torch.randn(count // 1024, 1024, generator=torch.Generator().manual_seed(0))


def _error(fmt, count=1 << 20):
    x = _normal(count)
    return (fake_quantize(x, fmt) - x).square().mean().item()


def _integers(kind, group_size, bits):
    if kind.startswith("asymmetric"):
        fmt = uniform(bits, group_size, symmetric=False, scale="float32")
        return replace(fmt, range=MSE) if kind.endswith("searched") else fmt
    return TensorFormat(element=Int(bits, signed=True, reach=kind), block=Block(1, group_size), scale=FLOAT32)


@pytest.mark.parametrize(
    ("kind", "group_size", "bits", "expected"),
    [(kind, *key, value) for kind, row in INTEGERS.items() for key, value in row.items()],
)
def test_integers_have_the_published_error(kind, group_size, bits, expected):
    count = 1 << (17 if kind.endswith("searched") else 20)
    assert _error(_integers(kind, group_size, bits), count) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("name", "block", "scale", "expected"),
    [
        (name, block, scale, value)
        for name, row in FLOATS.items()
        for (block, scale), value in zip(
            [(Block(1, 32), "e8m0"), (Block(1, 32), "float32"), (Block(0, 0), "float32")], row, strict=True
        )
    ]
    + [("e2m1", Block(1, 32), "e8m0ceil", 0.0134)],
)
def test_floats_have_the_published_error(name, block, scale, expected):
    fmt = TensorFormat(element=float_element(name), block=block, scale=SCALES[scale])
    # A tensor's one scale follows its largest value, which varies by some 5 % from sample to sample.
    assert _error(fmt) == pytest.approx(expected, rel=0.06 if block == Block(0, 0) else 0.03)


@pytest.mark.parametrize(("name", "expected"), NAMED.items())
def test_named_formats_have_the_published_error(name, expected):
    assert _error(COMPOSITE[name]) == pytest.approx(expected, rel=0.03)


def test_small_blocks_with_a_fine_scale_beat_large_ones_with_a_power_of_two():
    errors = {name: _error(COMPOSITE[name], 1 << 16) for name in ("nvfp4", "mxfp4", "mxfp6", "mxfp6e2m3", "mxfp8")}
    assert errors["nvfp4"] < errors["mxfp4"] / 1.3
    assert errors["mxfp6"] < errors["nvfp4"]
    assert errors["mxfp8"] < errors["mxfp6"]


@pytest.mark.parametrize("kind", ["normal", "outliers"])
@pytest.mark.parametrize("reach", ["asymmetric", "midpoint", "narrow", "full"])
def test_every_bit_lowers_the_error(kind, reach):
    x = weights(64, 256, kind=kind)
    errors = [
        (fake_quantize(x, _integers(reach, 64, bits)) - x).square().mean().item() for bits in range(2, 9)
    ]  # fmt: skip
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 100 * errors[-1]


@pytest.mark.parametrize("mantissas", [(0, 1, 2, 3, 4)])
def test_every_mantissa_bit_lowers_the_error(mantissas):
    x = weights(64, 256)
    formats = [TensorFormat(element=Float(3, m), block=Block(1, 32), scale=FLOAT32) for m in mantissas]
    errors = [(fake_quantize(x, fmt) - x).square().mean().item() for fmt in formats]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("kind", ["normal", "outliers"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_smaller_groups_cost_bits_and_lower_the_error(kind, symmetric, bits):
    x = weights(64, 512, kind=kind)
    groups = (32, 64, 128, 512, -1, 0)
    formats = [uniform(bits, group, symmetric) for group in groups]
    errors = [(fake_quantize(x, fmt) - x).square().mean().item() for fmt in formats]
    if kind == "normal":
        assert errors == sorted(errors)
    else:  # one value decides over a block: its neighbours may have better luck in the wider one
        assert all(a <= 1.02 * b for a, b in itertools.pairwise(errors))
    stored = [fmt.storage_bits(*x.shape) for fmt in formats]
    assert stored == sorted(stored, reverse=True)
    assert len(set(stored)) == len(groups) - 1  # a group of 512 is a row here
