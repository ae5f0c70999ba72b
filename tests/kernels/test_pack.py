"""Packing: the bits of every row against Python's integers, round trips of every code, Triton against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbench.errors import SpecError
from qbench.kernels import pack, unpack

BITS = range(2, 9)
COLUMNS = [1, 2, 3, 5, 7, 8, 9, 13, 16, 31, 64]


def _codes(rows, columns, bits, dtype, seed=0):
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
    return (codes - (2 ** (bits - 1) if dtype == torch.int8 else 0)).to(dtype)


def _row_as_integer(row, bits):
    return sum((int(code) & (2**bits - 1)) << (place * bits) for place, code in enumerate(row))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_a_row_is_one_little_endian_integer(bits, dtype):
    for columns in COLUMNS:
        codes = _codes(4, columns, bits, dtype)
        packed = pack(codes, bits)
        size = -(-columns * bits // 8)
        assert packed.shape == (4, size)
        rows = [_row_as_integer(row, bits).to_bytes(size, "little") for row in codes]
        assert [bytes(row.tolist()) for row in packed] == rows
        assert torch.equal(unpack(packed, bits, columns, dtype), codes)


def test_the_low_nibble_comes_first():
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x03]]
    assert pack(torch.tensor([[-1, -8]], dtype=torch.int8), 4).tolist() == [[0x8F]]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_every_code_round_trips_at_every_place(bits, dtype):
    low = -(2 ** (bits - 1)) if dtype == torch.int8 else 0
    codes = torch.stack([torch.arange(low, low + 2**bits).roll(shift) for shift in range(8)]).to(dtype)
    assert torch.equal(unpack(pack(codes, bits), bits, 2**bits, dtype), codes)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_codes_are_their_bytes(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128).view(dtype)
    packed = pack(codes, 8)
    assert torch.equal(packed, codes.view(torch.uint8))
    assert packed.data_ptr() != codes.data_ptr()
    assert torch.equal(unpack(packed, 8, 128, dtype).view(torch.uint8), packed)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(0, 5), st.integers(0, 40), st.sampled_from([torch.uint8, torch.int8]))
def test_round_trip_at_any_shape(bits, rows, columns, dtype):
    codes = _codes(rows, columns, bits, dtype)
    assert torch.equal(unpack(pack(codes, bits), bits, columns, dtype), codes)
    wide = _codes(columns, rows, bits, dtype).T  # neither axis contiguous
    assert torch.equal(unpack(pack(wide, bits), bits, columns, dtype), wide)


def test_what_does_not_fit_is_refused():
    codes = _codes(2, 6, 4, torch.uint8)
    with pytest.raises(SpecError, match="bits=9: accepted: 2 to 8"):
        pack(codes, 9)
    with pytest.raises(SpecError, match="codes dtype"):
        pack(codes.long(), 4)
    with pytest.raises(SpecError, match=r"bits=4: .*accepted: 8"):
        pack(codes.view(torch.float8_e4m3fn), 4)
    with pytest.raises(SpecError, match="pack shape"):
        pack(codes[0], 4)
    with pytest.raises(SpecError, match=r"7 columns of 4 bits are uint8 \[rows, 4\]"):
        unpack(pack(codes, 4), 4, 7, torch.uint8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_triton_equals_the_reference(device, bits, dtype, monkeypatch):
    from qbench.kernels.pack import triton

    monkeypatch.setattr(triton, "_BLOCK", 32)  # so that a row of few columns takes several programs
    for rows, columns in [(1, 1), (3, 7), (1, 8), (2, 139)]:
        codes = _codes(rows, columns, bits, dtype).to(device)
        packed = pack(codes, bits, backend="triton")
        assert torch.equal(packed, pack(codes, bits, backend="reference"))
        assert torch.equal(unpack(packed, bits, columns, dtype, backend="triton"), codes)
    codes = _codes(6, 5, bits, dtype).to(device)
    for view in [codes.T, codes[::2, ::3]]:
        packed = pack(view, bits, backend="triton")
        assert torch.equal(packed, pack(view, bits, backend="reference"))
        strided = torch.stack([packed, packed], dim=2).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]
        assert torch.equal(unpack(strided, bits, view.shape[1], dtype, backend="triton"), view)
    assert pack(codes[:0], bits, backend="triton").shape[0] == 0


def test_triton_keeps_only_the_low_bits_and_takes_float8(device):
    codes = torch.arange(256, dtype=torch.uint8, device=device)[None, :]
    for bits in BITS:
        expected = pack(codes & (2**bits - 1), bits, backend="reference")
        assert torch.equal(pack(codes, bits, backend="reference"), expected)
        assert torch.equal(pack(codes, bits, backend="triton"), expected)
    float8 = codes.view(torch.float8_e5m2)
    back = unpack(pack(float8, 8, backend="triton"), 8, 256, torch.float8_e5m2, backend="triton")
    assert torch.equal(back.view(torch.uint8), codes)
