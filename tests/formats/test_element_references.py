"""Floats against other people's: torch's float8 and half types, and ml_dtypes, bit for bit."""

import ml_dtypes
import numpy as np
import pytest
import torch

from qbench.formats.named import float_element
from tests.formats.cases import awkward_floats

TORCH = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "e4m3fnuz": torch.float8_e4m3fnuz,
    "e5m2fnuz": torch.float8_e5m2fnuz,
    "e5m10ieee": torch.float16,
}
ML_DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e3m4ieee": ml_dtypes.float8_e3m4,
    "e4m3ieee": ml_dtypes.float8_e4m3,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e5m10ieee": np.float16,
}
LIMITS = {"e4m3": 448, "e5m2": 57344, "e4m3fnuz": 240, "e5m2fnuz": 57344, "e4m3ieee": 240, "e3m4ieee": 15.5}


@pytest.mark.parametrize(("name", "limit"), LIMITS.items())
def test_the_largest_numbers_are_the_published_ones(name, limit):
    assert float_element(name).maximum == limit


@pytest.mark.parametrize(
    ("name", "magnitudes"),
    [
        ("e2m1", [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        ("e2m3", [k / 8 for k in range(16)] + [k / 4 for k in range(8, 16)] + [k / 2 for k in range(8, 16)]),
        ("e3m2", [k / 16 for k in range(8)] + [k * 2.0**e for e in range(-3, 3) for k in range(4, 8)]),
        ("e3m0", [0, 0.25, 0.5, 1, 2, 4, 8, 16]),
    ],
)
def test_small_floats_have_the_published_magnitudes(name, magnitudes):
    element = float_element(name)
    assert element.from_codes(torch.arange(len(magnitudes), dtype=torch.uint8)).tolist() == magnitudes
    assert element.codebook.tolist() == sorted({*magnitudes, *(-m for m in magnitudes)})


@pytest.mark.parametrize("name", TORCH)
def test_equal_to_torchs_type_within_its_range(name):
    """Beyond the range torch's casts give NaN or infinity, or saturate, as the type goes: clamped first."""
    element, dtype = float_element(name), TORCH[name]
    integers = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    assert torch.finfo(dtype).max == element.maximum
    x = awkward_floats(seed=1, patterns=1 << 17)
    theirs = x.clamp(-element.maximum, element.maximum).to(dtype).view(integers)
    assert torch.equal(element.encode(x), theirs)
    codes = torch.arange(1 << element.bits).to(integers)
    theirs = codes.view(dtype).float()
    assert torch.equal(
        element.from_codes(codes).nan_to_num(nan=7e9, posinf=8e9), theirs.nan_to_num(nan=7e9, posinf=8e9)
    )
    assert torch.equal(element.encode(torch.tensor([torch.nan])).view(dtype).isnan(), torch.tensor([True]))


@pytest.mark.parametrize("name", ML_DTYPES)
def test_equal_to_ml_dtypes_within_the_range(name):
    element, dtype = float_element(name), ML_DTYPES[name]
    integers = np.uint8 if element.bits <= 8 else np.int16
    x = awkward_floats(seed=2, patterns=1 << 17)
    clamped = x.clamp(-element.maximum, element.maximum).numpy()
    assert np.float32(ml_dtypes.finfo(dtype).max) == element.maximum
    theirs = clamped.astype(dtype).view(integers)
    assert np.array_equal(element.encode(x).numpy(), theirs)
    codes = np.arange(1 << element.bits).astype(integers)
    assert np.array_equal(
        element.from_codes(torch.from_numpy(codes)).numpy(), codes.view(dtype).astype(np.float32), equal_nan=True
    )


def test_names_that_are_no_float_are_none():
    for name in ("e8m7", "e0m3", "e4m11", "e1m0", "e7m9", "m3", "e4", "e4m3nan", "int4", ""):
        assert float_element(name) is None, name
    for name in ("e1m1", "e4m3", "e5m2", "e4m3ieee", "e4m3finite", "e5m2finite", "e3m2", "e4m7", "e4m3fnuz"):
        assert float_element(name).name == name


def test_e4m3_and_e5m2_mean_their_standard_variants():
    assert float_element("e4m3") == float_element("e4m3fn")
    assert float_element("e5m2") == float_element("e5m2ieee")
    assert float_element("e4m3finite").maximum == 480
    assert float_element("e3m4") == float_element("e3m4finite")
