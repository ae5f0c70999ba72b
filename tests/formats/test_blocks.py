"""Which elements share a scale: every block shape against the definition, element by element, edges included."""

import pytest
import torch

from qbench.formats import SCALES, Block, Float, Int, QParams, TensorFormat, fit, quantize
from qbench.formats.named import COMPOSITE, activation_format
from tests.formats.cases import block_of, name_of, same, weights

BLOCKS = {
    "tensor": Block(0, 0),
    "channel": Block(1, 0),
    "column": Block(0, 1),
    "group": Block(1, 5),
    "group of one": Block(1, 1),
    "tile": Block(4, 5),
    "wide tile": Block(3, 64),
    "tall tile": Block(64, 3),
    "rows": Block(3, 0),
    "head": Block(0, 8),
    "KIVI keys": Block(6, 1),
}
SHAPES = [(12, 20), (7, 13), (1, 9), (9, 1), (1, 1)]
every_block = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
every_shape = pytest.mark.parametrize("shape", SHAPES)


def _format(block, **options):
    return TensorFormat(
        **{"element": Int(4, signed=True), "block": block, "scale": SCALES["float32"], "partial": True, **options}
    )


def _slow(x, fmt):
    """Absolute maximum of every block, by walking over elements."""
    row, column = block_of(fmt.block, x.shape)
    found = {}
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            found.setdefault((row[i, j].item(), column[i, j].item()), []).append(x[i, j].item())
    return found


@every_block
@every_shape
@pytest.mark.parametrize("fill", [0.0, -7.0])
def test_blocks_hold_the_elements_of_the_definition_and_what_pads_them_comes_last_or_between(block, shape, fill):
    fmt, x = _format(block), weights(*shape)
    blocks = fmt.blocks(x, fill)
    expected = _slow(x, fmt)
    assert tuple(blocks.shape[:2]) == fmt.grid(shape)
    assert len(expected) == blocks.shape[0] * blocks.shape[1]
    sizes = fmt.block_sizes(shape)
    for (i, j), values in expected.items():
        padded = blocks[i, j].tolist()
        assert sizes[i, j] == len(values)
        assert sorted(padded) == sorted(values + [fill] * (len(padded) - len(values)))
        assert [v for v in padded if v != fill] == values
    assert torch.equal(fmt.unblocks(blocks, x.shape), x)
    assert same(fmt.unblocks(fmt.blocks(x).clone(), x.shape), x)


@every_block
@every_shape
@pytest.mark.parametrize("zero", ["none", "int", "float"])
def test_every_element_uses_its_own_blocks_scale(block, shape, zero):
    fmt = _format(block, element=Int(4, signed=zero == "none"), zero=zero)
    x = weights(*shape)
    row, column = block_of(block, shape)
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(fmt.grid(shape), generator=generator) + 0.1
    offset = None if zero == "none" else torch.randint(0, 15, scale.shape, generator=generator).float()
    own_scale, own_offset = scale[row, column], 0 if offset is None else offset[row, column]
    found = quantize(x, fmt, QParams(scale, offset))
    expected = (torch.round(x / own_scale) + own_offset).clamp(fmt.element.minimum, fmt.element.maximum)
    if zero == "float":
        expected = torch.round(x / own_scale + own_offset).clamp(0, 15)
    assert torch.equal(found.codes.float(), expected)
    assert torch.equal(found.dequantize(), own_scale * (expected - own_offset))


@every_block
@every_shape
@pytest.mark.parametrize("zero", ["none", "int", "float"])
def test_fitted_scales_cover_their_own_block(block, shape, zero):
    fmt = _format(block, element=Int(4, signed=zero == "none"), zero=zero)
    x = weights(*shape) + (3 if zero == "float" else 0)
    params = fit(x, fmt)
    for (i, j), values in _slow(x, fmt).items():
        low, high = min(values), max(values)
        if zero == "none":
            expected = max(-low, high) / 7.5
        elif zero == "int":
            expected = (max(high, 0) - min(low, 0)) / 15
        else:
            expected = max(high - low, 2 * max(abs(low), abs(high)) * 15 / 65504) / 15
        assert params.scale[i, j].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("fmt", [f for f in COMPOSITE.values() if f.block.columns and f.name != "nf4dq"], ids=name_of)
@pytest.mark.parametrize("shape", [(5, 200), (130, 70), (128, 129), (3, 10)])
def test_a_partial_tile_is_what_a_padded_one_is(fmt, shape):
    x = weights(*shape, kind="outliers")
    partial = TensorFormat(element=fmt.element, block=fmt.block, zero=fmt.zero, scale=fmt.scale, partial=True)
    down, across = partial.grid(shape)
    height, width = fmt.block.rows, fmt.block.columns
    padded = torch.zeros(down * height, across * width)
    padded[: shape[0], : shape[1]] = x
    whole, found = quantize(padded, partial), quantize(x, partial)
    assert torch.equal(found.scale, whole.scale)
    assert torch.equal(found.codes, whole.codes[: shape[0], : shape[1]])
    assert torch.equal(found.dequantize(), whole.dequantize()[: shape[0], : shape[1]])


@pytest.mark.parametrize(
    ("shape", "tiles"), [((576, 576), (5, 5)), ((128, 256), (1, 2)), ((1, 1), (1, 1)), ((129, 1), (2, 1))]
)
def test_block_fp8_has_a_tile_for_every_128_rows_and_columns(shape, tiles):
    fmt = COMPOSITE["fp8block"]
    assert fmt.grid(shape) == tiles
    assert fmt.storage_bits(*shape) == 8 * shape[0] * shape[1] + 32 * tiles[0] * tiles[1]
    assert fmt.fits(shape[1], shape[0])


@pytest.mark.parametrize("name", [n for n in COMPOSITE if n not in ("ternary", "int4in8", "nf4dq")])
def test_activations_of_a_composite_format_share_nothing_between_tokens_but_an_outer_scale(name):
    fmt = activation_format(name)
    x = weights(6, 256)
    whole = quantize(x, fmt)
    outer = whole.outer
    for i in range(len(x)):
        alone = quantize(x[i : i + 1], fmt, fit(x[i : i + 1], fmt, outer=outer))
        assert torch.equal(alone.dequantize(), whole.dequantize()[i : i + 1])


def test_tiles_fit_where_they_divide_both_sides():
    fmt = TensorFormat(element=Float(4, 3, "fn"), block=Block(4, 8))
    assert [fmt.fits(16, 8), fmt.fits(16, 6), fmt.fits(12, 8), fmt.fits(16)] == [True, False, False, True]
    assert TensorFormat(element=Float(4, 3, "fn"), block=Block(4, 8), partial=True).fits(3, 3)


@pytest.mark.parametrize(
    ("block", "label", "group_size"),
    [
        (Block(0, 0), "tensor", 0),
        (Block(1, 0), "channel", -1),
        (Block(0, 1), "column", 1),
        (Block(1, 64), "g64", 64),
        (Block(128, 128), "128x128", 128),
        (Block(0, 64), "allx64", 64),
        (Block(4, 0), "4xall", 0),
    ],
)
def test_blocks_have_names_and_a_group_size(block, label, group_size):
    assert block.label == label
    assert _format(block).group_size == group_size


def test_rows_share_nothing_only_where_blocks_and_scales_stay_in_them():
    for block, by_row in [(Block(1, 8), True), (Block(1, 0), True), (Block(0, 0), False), (Block(2, 8), False)]:
        assert _format(block).by_row is by_row
    for name, by_row in [("float16", True), ("e8m0", True), ("e4m3", False), ("int8", True), ("dq8", False)]:
        fmt = _format(Block(1, 16), scale=SCALES[name])
        assert fmt.by_row is by_row
        x = weights(8, 32)
        alone = torch.cat([quantize(row[None], fmt).dequantize() for row in x])
        assert torch.equal(alone, quantize(x, fmt).dequantize()) is by_row
