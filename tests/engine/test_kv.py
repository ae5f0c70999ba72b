"""Attention of a whole window over a quantized cache against a loop over steps; laws of KIVI and of static scales."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from qbench.engine.kv import CacheQuantizer, CacheRanges, check_cache, halves, match_heads
from qbench.errors import NumericsError, SpecError, StructureError
from qbench.formats import fake_quantize
from qbench.formats.element import Float, Int
from qbench.formats.named import COMPOSITE
from qbench.formats.ranges import RangeFit
from qbench.formats.scale import SCALES
from qbench.formats.tensor import Block, decode, encode, fit
from tests.engine.caches import BY_TOKENS, LAYOUTS, cache_format, calibrated, seen_by_step

DYNAMIC = [name for name in LAYOUTS if not name.startswith("static")]
STATIC = [name for name in LAYOUTS if name.startswith("static")]


def _heads(*shape, seed=0, dtype=torch.float32):
    """Keys or values `[batch, heads, tokens, head_dim]` with an outlier channel and an offset per head."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    x[..., 1] *= 8
    return (x + torch.arange(shape[1])[:, None, None]).to(dtype)


def _qkv(tokens, *, heads=4, kv_heads=2, width=8, dtype=torch.float64):
    query = torch.randn(2, heads, tokens, width, generator=torch.Generator().manual_seed(9)).to(dtype)
    return query, *(_heads(2, kv_heads, tokens, width, seed=seed, dtype=dtype) for seed in (1, 2))


def _residuals(layout):
    return (8, 24, 80) if layout in BY_TOKENS else (0, 1, 8, 80)


def _reference(query, key, value, format, *, scale=None, bias=None):
    """Attention of every query over what its step sees, one at a time; bias `[heads or 1, tokens, tokens]`."""
    batch, heads, tokens, width = query.shape
    result = torch.empty(batch, heads, tokens, value.shape[-1], dtype=query.dtype)
    copies = heads // key.shape[1]
    for b in range(batch):
        for h in range(heads):
            steps = seen_by_step(key[b, h // copies], value[b, h // copies], format)
            for t, (keys, values) in enumerate(steps):
                scores = keys @ query[b, h, t] * (scale or width**-0.5)
                if bias is not None:
                    scores = scores + bias[h % len(bias), t, : t + 1]
                result[b, h, t] = scores.softmax(0) @ values
    return result


def _window(tokens, width):
    """bool [tokens, tokens]: a query sees itself and the `width` - 1 tokens before."""
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    return (distance >= 0) & (distance < width)


@pytest.mark.parametrize(
    ("layout", "residual"),
    [
        (layout, residual)
        for layout in DYNAMIC
        for residual in (0, 3, 8, 80)
        if layout not in BY_TOKENS or residual != 3
    ],
)
def test_attention_is_that_of_a_loop_over_steps(layout, residual):
    residual = residual or (16 if layout in BY_TOKENS else 0)
    format = cache_format(layout, 3, residual)
    query, key, value = _qkv(101)
    found = CacheQuantizer(format).attention(query, key, value, is_causal=True, enable_gqa=True)
    assert torch.allclose(found, _reference(query, key, value, format), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", ["kivi", "token"])
@pytest.mark.parametrize("kind", ["bool", "float", "lowest", "one_head", "scale", "repeated"])
def test_masks_scales_and_grouped_heads(kind, layout):
    format = cache_format(layout, 2, 8)
    query, key, value = _qkv(75, kv_heads=1 if kind == "one_head" else 2)
    expected, given = {}, {"attn_mask": None, "is_causal": True}
    if kind in ("bool", "one_head"):
        mask = _window(75, 11)
        given = {"attn_mask": mask[None, None], "is_causal": False}
        expected = {"bias": torch.zeros(1, 75, 75).masked_fill(~mask, -math.inf)}
    elif kind in ("float", "lowest"):
        # The bias of ALiBi, another one for each head.
        slopes = torch.arange(4)[:, None, None] * 0.1
        bias = -slopes * (torch.arange(75)[:, None] - torch.arange(75)).to(query.dtype)
        hidden = -math.inf if kind == "float" else torch.finfo(query.dtype).min
        given = {"attn_mask": bias.masked_fill(~_window(75, 75), hidden)[None], "is_causal": False}
        expected = {"bias": bias}
    elif kind == "scale":
        given["scale"] = expected["scale"] = 0.05
    elif kind == "repeated":
        key, value = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
    found = CacheQuantizer(format).attention(
        query, key, value, enable_gqa=kind not in ("repeated", "one_head"), **given
    )
    assert torch.allclose(found, _reference(query, key, value, format, **expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", STATIC)
@pytest.mark.parametrize("residual", [0, 7])
def test_static_scales_are_those_of_all_tokens_and_stay(layout, residual):
    format = cache_format(layout, 3, residual)
    query, key, value = _qkv(70, heads=2)
    calibration = [(_heads(2, 2, n, 8, seed=n), _heads(3, 2, n, 8, seed=n + 1)) for n in (5, 40)]
    quantizer = calibrated(format, *calibration)
    coded = []
    for half, (x, fmt) in enumerate(((key, format.key), (value, format.value))):
        coded.append(torch.empty_like(x))
        for head in range(2):
            of_head = slice(None) if format.across_heads else slice(head, head + 1)
            tokens = torch.cat([pair[half][:, of_head].reshape(-1, 8) for pair in calibration])
            params = fit(tokens, fmt)
            rows = x[:, head].reshape(-1, 8).float()
            values = fmt.unblocks(decode(encode(fmt.blocks(rows), fmt, params), params), rows.shape)
            coded[half][:, head] = values.view(2, 70, 8)
    expected = torch.empty_like(query)
    for t in range(70):
        first = max(0, t - residual) if residual else t + 1
        keys, values = (
            torch.cat([c[:, :, :first], x[:, :, first : t + 1]], dim=2)
            for c, x in zip(coded, (key, value), strict=True)
        )
        expected[:, :, t : t + 1] = F.scaled_dot_product_attention(query[:, :, t : t + 1], keys, values)
    found = quantizer.attention(query, key, value, is_causal=True)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", STATIC)
@pytest.mark.parametrize("zero", ["none", "int", "float"])
def test_static_parameters_equal_a_fit_over_all_calibration_tokens(layout, zero):
    format = cache_format(layout, 4, zero=zero)
    ranges = CacheRanges(format)
    parts = [(_heads(2, 3, n, 8, seed=n) + 2, _heads(2, 3, n, 8, seed=50 + n)) for n in (1, 9, 4)]
    for key, value in parts:
        ranges.update(key, value)
    for half, (params, fmt) in enumerate(zip(ranges.params(), (format.key, format.value), strict=True)):
        heads = [torch.cat([pair[half][:, h].reshape(-1, 8) for pair in parts]) for h in range(3)]
        wanted = [fit(x, fmt) for x in ([torch.cat(heads)] if format.across_heads else heads)]
        assert torch.equal(params.scale, torch.cat([one.scale for one in wanted]))
        if zero != "none":
            assert torch.equal(params.zero, torch.cat([one.zero for one in wanted]))


@pytest.mark.parametrize("zero", ["none", "int", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", DYNAMIC)
def test_heads_are_quantized_as_if_alone(layout, dtype, zero):
    format = cache_format(layout, 3, 8, zero=zero)
    x = _heads(2, 3, 8, 16, dtype=dtype).mT.contiguous().mT  # strided
    for half in halves(format):
        found = half.fake_quantize(x)
        assert found.dtype == dtype
        for b in range(2):
            for h in range(3):
                assert torch.equal(found[b, h], fake_quantize(x[b, h].float(), half.format).to(dtype))


@pytest.mark.parametrize("residual", [4, 8, 64, 100])
@pytest.mark.parametrize("layout", ["kivi", "token", "static_channel"])
def test_windows_no_longer_than_the_residual_are_full_precision(layout, residual):
    query, key, value = _qkv(residual + 1, dtype=torch.float32)
    quantizer = calibrated(cache_format(layout, 2, residual), (key, value))
    for tokens in (1, residual - 1, residual):
        part = [x[:, :, :tokens] for x in (query, key, value)]
        exact = F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True)
        assert torch.equal(quantizer.attention(*part, is_causal=True, enable_gqa=True), exact)
    exact = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    found = quantizer.attention(query, key, value, is_causal=True, enable_gqa=True)
    assert torch.allclose(found[:, :, :residual], exact[:, :, :residual], atol=1e-5)
    # One more: keys by tokens are quantized as a whole, where the others still hold all the earlier ones.
    assert torch.allclose(found[:, :, residual], exact[:, :, residual], atol=1e-5) == (layout != "kivi")


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_tokens_that_follow_change_nothing(layout):
    for residual in _residuals(layout):
        query, key, value = _qkv(97)
        quantizer = calibrated(cache_format(layout, 2, residual), (key, value))
        whole = quantizer.attention(query, key, value, is_causal=True, enable_gqa=True)
        for tokens in (1, 30, 64, 90):
            part = [x[:, :, :tokens] for x in (query, key, value)]
            found = quantizer.attention(*part, is_causal=True, enable_gqa=True)
            assert torch.allclose(found, whole[:, :, :tokens], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("residual", [1, 4, 12, 32])
def test_how_many_tokens_are_codes(residual):
    """Counted by the authors' steps: append, attend, quantize the residual when it is full, or the token too many."""
    keys, values = halves(replace(cache_format("kivi", residual=residual), key=cache_format("token").key))
    grouped = halves(cache_format("kivi", residual=residual))[0] if residual % 4 == 0 else None
    assert values.settled(0) == 0
    plain = halves(cache_format("token"))[0]
    assert [plain.attended(t) for t in range(3)] == [1, 2, 3]  # the own token is read from the cache, too
    sliding = together = held = 0
    for t in range(100):
        assert keys.attended(t) == values.attended(t) == sliding
        sliding += t + 1 - sliding > residual
        assert values.settled(t + 1) == sliding
        if grouped is not None:
            assert grouped.attended(t) == together
            held += 1
            if held == residual:
                together, held = together + residual, 0
            assert grouped.settled(t + 1) == together
            assert together % residual == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_of_a_channel_is_at_most_half_a_step(bits):
    x = _heads(1, 2, 32, 8)
    keys, _ = halves(cache_format("kivi", bits, 32))
    error = (keys.fake_quantize(x) - x).abs().unflatten(2, (-1, 4)).amax(dim=3)
    groups = x.unflatten(2, (-1, 4))
    spread = groups.amax(dim=3) - groups.amin(dim=3)
    step = spread / (2**bits - 1)
    # Scale and zero are float16: each is off by at most 2^-11 of itself.
    largest = groups.abs().amax(dim=3)
    assert (error <= step / 2 + 2**-11 * (spread + 2 * largest) + 1e-6).all()
    assert (error > step / 4).any()


@pytest.mark.parametrize("residual", [0, 16])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_nearly_exact_formats_are_nearly_the_identity(layout, residual):
    if layout in BY_TOKENS and residual == 0:
        residual = 8
    query, key, value = _qkv(50, dtype=torch.float32)
    exact = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, scale=0.01)
    tolerance = {Float(5, 10): 2**-10 * value.abs().max(), Int(8, signed=False): 2**-6 * value.abs().max()}
    for element, limit in tolerance.items():
        zero = "none" if isinstance(element, Float) else "float"
        quantizer = calibrated(cache_format(layout, residual=residual, element=element, zero=zero), (key, value))
        found = quantizer.attention(query, key, value, is_causal=True, enable_gqa=True, scale=0.01)
        assert 0 < (found - exact).abs().max() < limit


def test_results_have_the_dtype_of_the_queries():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for residual in (0, 8):
            query, key, value = _qkv(40, dtype=dtype)
            format = cache_format("token", 4, residual)
            found = CacheQuantizer(format).attention(query, key, value, is_causal=True, enable_gqa=True)
            assert (found.dtype, found.shape) == (dtype, query.shape)
            exact = _reference(*(x.double() for x in (query, key, value)), format)
            assert torch.allclose(found.double(), exact, atol=0.5 if dtype == torch.bfloat16 else 0.05)


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"residual": 0}, "kv.residual"),
        ({"residual": 6}, "kv.residual"),
        ({"residual": -4}, "kv.residual"),
        ({"key": Block(0, 1)}, "kv.layout"),
        ({"key": Block(0, 0)}, "kv.layout"),
        ({"value": Block(4, 1)}, "kv.layout"),
        ({"value": Block(0, 0)}, "kv.layout"),
        ({"across_heads": True}, "kv.layout"),
        ({"static": True}, "kv.layout"),
        ({"value": Block(1, 5)}, "kv.group_size"),
        ({"key": Block(1, 32)}, "kv.group_size"),
        ({"static": True, "key": Block(0, 3), "value": Block(0, 0)}, "kv.group_size"),
        ({"static": True, "key": Block(0, 0), "value": Block(1, 0)}, "kv.layout"),
    ],
)
def test_what_is_undefined_is_refused(change, option):
    format = cache_format("kivi", residual=8)
    check_cache(format, 16)
    for half in ("key", "value"):
        if half in change:
            change = {**change, half: replace(getattr(format, half), block=change[half])}
    with pytest.raises(SpecError) as error:
        check_cache(replace(format, **change), 16)
    assert error.value.option == option
    assert "\n" not in str(error.value)


def test_the_sizes_of_groups_that_fit_are_named():
    format = cache_format("group")
    wrong = replace(format, value=replace(format.value, block=Block(1, 24)))
    with pytest.raises(SpecError, match=r"kv.group_size=24: must divide head_dim=64: one of 8, 16, 32, 64$"):
        check_cache(wrong, 64)


def test_scales_that_share_a_number_are_refused():
    format = cache_format("token")
    for name in ("e4m3", "int8", "dq8"):
        for half in ("key", "value"):
            wrong = replace(format, **{half: replace(format.key, scale=SCALES[name])})
            with pytest.raises(SpecError, match=rf"^kv.format=\S*{name}: a format whose scales"):
                check_cache(wrong, 16)
    check_cache(replace(format, key=COMPOSITE["mxfp4"], value=COMPOSITE["mxfp8"]), 64)


def test_static_ranges_are_minmax():
    format = cache_format("static_head")
    for calibration in ("moving", "histogram"):
        with pytest.raises(SpecError, match=f"^kv.calibration={calibration}: "):
            CacheRanges(replace(format, calibration=calibration))
    searched = replace(format.key, range=RangeFit(method="mse"))
    for half in ("key", "value"):
        with pytest.raises(SpecError, match=r"^kv.mode=static: dynamic for ranges by mse"):
            check_cache(replace(format, **{half: searched}), 16)


def test_static_scales_belong_to_the_heads_of_calibration():
    format = cache_format("static_head")
    query, key, value = _qkv(10)
    with pytest.raises(NumericsError, match="0 were seen"):
        CacheRanges(format).params()
    ranges = CacheRanges(format)
    ranges.update(key, value)
    with pytest.raises(StructureError, match="in the same layer"):
        ranges.update(key[:, :1], value[:, :1])
    quantizer = CacheQuantizer(format, *ranges.params())
    repeated = [x.repeat_interleave(2, dim=1) for x in (key, value)]
    with pytest.raises(StructureError, match="static scales of 2 heads for keys of 4"):
        quantizer.attention(query, *repeated, is_causal=True)
    with pytest.raises(StructureError, match="takes scales from calibration text"):
        CacheQuantizer(format)
    with pytest.raises(StructureError, match="takes no static scales"):
        CacheQuantizer(cache_format("token"), *ranges.params())


def test_repeated_heads_are_reduced_to_the_models_own():
    _, key, value = _qkv(10)
    own, repeated = CacheRanges(cache_format("static_channel")), CacheRanges(cache_format("static_channel"))
    own.update(key, value)
    repeated.update(*(x.repeat_interleave(3, dim=1) for x in (key, value)))
    for one, other in zip(own.params(), repeated.params(), strict=True):
        found = match_heads(other, 2)
        assert torch.equal(found.scale, one.scale)
        assert torch.equal(found.zero, one.zero)
        assert match_heads(one, 2) is one
        for heads in (3, 4, 12):
            with pytest.raises(StructureError):
                match_heads(other, heads)


def test_attention_that_a_decode_does_not_have_is_refused():
    quantizer = CacheQuantizer(cache_format("kivi", residual=8))
    query, key, value = _qkv(20)
    future = _window(20, 20)
    future[4, 9] = True
    for options in (
        {},
        {"attn_mask": future},
        {"attn_mask": torch.zeros(1, 1, 20, 20).masked_fill(~future, -math.inf)},
        {"attn_mask": torch.ones(1, 20, dtype=torch.bool)},
    ):
        with pytest.raises(StructureError, match="later tokens"):
            quantizer.attention(query, key, value, enable_gqa=True, **options)
    with pytest.raises(StructureError, match="of the same tokens"):
        quantizer.attention(query[:, :, 1:], key, value, is_causal=True, enable_gqa=True)
    with pytest.raises(StructureError, match=r"dropout of 0\.1"):
        quantizer.attention(query, key, value, is_causal=True, dropout_p=0.1, enable_gqa=True)
    key[0, 0, 3, 3] = math.nan
    with pytest.raises(NumericsError, match="keys of 2 heads"):
        quantizer.attention(query, key, value, is_causal=True, enable_gqa=True)
