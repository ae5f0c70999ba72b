"""Packing: every format to bytes and back, bit for bit, at odd shapes; as many bytes as are counted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbench.errors import NumericsError
from qbench.formats import SCALES, Block, Float, Int, QParams, QTensor, TensorFormat, quantize, uniform
from qbench.formats.named import COMPOSITE, TABLES, TERNARY
from qbench.formats.packing import pack, pack_codes, unpack, unpack_codes
from tests.formats.cases import ELEMENTS, all_codes, name_of, same, weights

PARTS = ("codes", "scale", "zero", "order", "scale_codes", "outer")
WIDE = [Float(4, 7), Float(5, 10, "ieee"), Float(3, 5, "fn"), Float(7, 7), Float(2, 8, "fnuz")]
INTEGER = [(Int(bits, signed=zero == "none"), zero) for bits in range(2, 9) for zero in ("none", "int", "float")]
FLOAT = [(element, "none") for element in (Float(2, 1), Float(3, 2), Float(4, 3, "fn"), TERNARY, *WIDE)]
BLOCKS = [Block(0, 0), Block(1, 0), Block(1, 5), Block(3, 4), Block(0, 1)]
SHAPES = [(1, 1), (7, 13), (3, 64), (13, 1)]


def _check(tensor):
    packed = pack(tensor)
    found = unpack(packed)
    for part in PARTS:
        assert same(getattr(found, part), getattr(tensor, part)), part
    assert found.format == tensor.format
    assert same(found.dequantize(), tensor.dequantize())
    assert all(part.dtype == torch.uint8 and part.dim() == 1 for part in packed.parts.values())
    assert packed.bytes == sum(len(part) for part in packed.parts.values())
    # Codes and packed zero points may leave their last byte unfilled; ternary codes are counted by the byte.
    excess = 8 * packed.bytes - tensor.storage_bits()
    assert 0 <= excess < 8 * (1 + (tensor.format.zero == "int"))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("element", "zero"), INTEGER + FLOAT, ids=str)
def test_every_element_scale_and_block_round_trips_at_odd_shapes(element, zero, scale):
    for block in BLOCKS:
        for shape in SHAPES:
            fmt = TensorFormat(element=element, block=block, zero=zero, scale=SCALES[scale], partial=True)
            _check(quantize(weights(*shape) + (zero == "float"), fmt))


@pytest.mark.parametrize("fmt", COMPOSITE.values(), ids=name_of)
@pytest.mark.parametrize("shape", [(1, 1), (5, 77), (130, 129), (16, 256)])
def test_every_named_format_round_trips(fmt, shape):
    _check(quantize(weights(*shape, kind="outliers"), replace(fmt, partial=True)))


@pytest.mark.parametrize("fmt", [*COMPOSITE.values(), uniform(3, 64, False), uniform(4, -1, True)], ids=name_of)
def test_the_count_is_right_to_a_thousandth_for_a_layers_size(fmt):
    tensor = quantize(weights(192, 576), replace(fmt, partial=True))
    assert 8 * pack(tensor).bytes == pytest.approx(tensor.storage_bits(), rel=1e-3)


@pytest.mark.parametrize("element", [*ELEMENTS, *WIDE], ids=name_of)
def test_every_code_survives_at_every_position_of_a_byte(element):
    """NaN codes, minus zero and infinities included."""
    codes = torch.arange(1 << element.bits).to(element.storage) if element in WIDE else all_codes(element)
    for lead in range(9):
        shifted = torch.cat([codes[:1].expand(lead), codes, codes.flip(0)])
        packed = pack_codes(shifted, element)
        assert len(packed) == -(-len(shifted) // 5 if element == TERNARY else -len(shifted) * int(element.bits) // 8)
        assert same(unpack_codes(packed, element, len(shifted)), shifted)


@pytest.mark.parametrize(
    "element", [*(Int(b, signed) for b in range(2, 9) for signed in (True, False)), *WIDE], ids=name_of
)
def test_codes_are_one_little_endian_string_of_bits(element):
    """Against Python's integers, which have no end."""
    count = 37
    codes = torch.randint(1 << element.bits, (count,), generator=torch.Generator().manual_seed(0)).to(element.storage)
    if isinstance(element, Int) and element.signed:
        codes = (torch.arange(count) % (1 << element.bits) + element.minimum).to(torch.int8)
    number = sum((code % (1 << element.bits)) << (k * element.bits) for k, code in enumerate(codes.tolist()))
    assert bytes(pack_codes(codes, element).tolist()) == number.to_bytes(-(-count * element.bits // 8), "little")


def test_ternary_codes_are_digits_base_3():
    codes = torch.tensor([2, 0, 1, 1, 2, 1], dtype=torch.uint8)
    assert pack_codes(codes, TERNARY).tolist() == [2 + 0 * 3 + 1 * 9 + 1 * 27 + 2 * 81, 1]


def test_parts_lie_as_their_formats_store_them():
    x = weights(4, 64)
    half = pack(quantize(x, uniform(4, 32, False)))
    assert (
        half.scales.numpy().view(np.float16).astype(np.float32).tolist()
        == quantize(x, uniform(4, 32, False)).scale.flatten().tolist()
    )
    assert len(half.zeros) == 4  # eight zero points of 4 bits
    assert {*half.parts} == {"codes", "scales", "zeros"}
    small = quantize(x, COMPOSITE["nvfp4"])
    packed = pack(small)
    assert packed.scales.tolist() == small.scale_codes.flatten().tolist()
    assert packed.outer.numpy().view("<f4").tolist() == small.outer.flatten().tolist()
    two = quantize(weights(4, 256), COMPOSITE["int4in8"])
    assert pack(two).outer.numpy().view("<f2").astype(np.float32).tolist() == two.outer.flatten().tolist()


@pytest.mark.parametrize("symmetric", [False, True])
def test_an_order_of_columns_is_kept_where_it_matters(symmetric):
    x, order = weights(5, 13), torch.randperm(13, generator=torch.Generator().manual_seed(0))
    plain = quantize(x, uniform(4, 5, symmetric, partial=True))
    grouped = QTensor(plain.codes, plain.scale, plain.zero, plain.format, order)
    _check(grouped)
    assert pack(grouped).order.numpy().view("<i4").tolist() == order.tolist()
    for group_size in (0, -1):
        plain = quantize(x, uniform(4, group_size, symmetric))
        ordered = QTensor(plain.codes, plain.scale, plain.zero, plain.format, order)
        found = unpack(pack(ordered))
        assert found.order is None
        assert same(found.dequantize(), ordered.dequantize())
        assert pack(ordered).bytes == pack(plain).bytes


def test_a_tensor_and_its_bytes_share_no_memory():
    for fmt in (
        uniform(8, 8, True),
        uniform(8, 8, False),
        uniform(4, 8, False),
        COMPOSITE["mxfp8"],
        COMPOSITE["nvfp4"],
    ):
        tensor = quantize(weights(4, 64), fmt)
        packed = pack(tensor)
        before = unpack(packed)
        kept = {name: part.clone() for name, part in packed.parts.items()}
        for part in PARTS:
            if getattr(before, part) is not None:
                getattr(before, part).fill_(1)
        assert all(same(part, kept[name]) for name, part in packed.parts.items())
        digest = tensor.sha256()
        for part in packed.parts.values():
            part.fill_(7)
        assert tensor.sha256() == digest


def test_parts_may_lie_anywhere_in_a_file():
    tensor = quantize(weights(4, 64), COMPOSITE["nvfp4"])
    packed = pack(tensor)
    moved = {name: torch.cat([torch.zeros(3, dtype=torch.uint8), part])[3:] for name, part in packed.parts.items()}
    assert same(unpack(replace(packed, **moved)).dequantize(), tensor.dequantize())


def test_codes_in_another_layout_are_packed_row_by_row():
    x = weights(13, 7)
    plain = quantize(x, uniform(3, -1, True))
    turned = QTensor(plain.codes.t().contiguous().t(), plain.scale, plain.zero, plain.format)
    assert same(pack(turned).codes, pack(plain).codes)


def test_what_the_format_cannot_store_is_refused():
    fmt = uniform(4, 4, symmetric=False)
    codes = torch.zeros(1, 4, dtype=torch.uint8)
    with pytest.raises(NumericsError, match=r"scale not representable in torch\.float16"):
        pack(QTensor(codes, torch.tensor([[0.1]]), torch.tensor([[3.0]]), fmt))
    with pytest.raises(NumericsError, match=r"zero point not representable in torch\.uint8"):
        pack(QTensor(codes, torch.tensor([[0.5]]), torch.tensor([[3.5]]), fmt))
    small = COMPOSITE["mxfp4"]
    params = QParams(torch.ones(1, 1), None)
    with pytest.raises(NumericsError, match="scales without codes, which e8m0 scales are stored as"):
        pack(quantize(weights(1, 32), small, params))


@settings(max_examples=150, deadline=None)
@given(
    element=st.sampled_from([e for e, zero in INTEGER + FLOAT if zero == "none"] + [*TABLES.values()]),
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    block=st.builds(Block, st.integers(0, 5), st.integers(0, 12)),
    scale=st.sampled_from([*SCALES]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_block_round_trips(element, rows, columns, block, scale, seed):
    fmt = TensorFormat(element=element, block=block, scale=SCALES[scale], partial=True)
    _check(quantize(weights(rows, columns, seed), fmt))
