"""The cache step by step against the authors' rules; what it holds, counted by hand; as a model uses it."""

import pytest
import torch

from qbench.engine.kv import CacheRanges
from qbench.errors import NumericsError, SpecError, StructureError
from qbench.formats.element import Float
from qbench.formats.named import TERNARY
from qbench.models.kv_cache import QuantizedCache
from tests.architectures import tiny_model, tokens
from tests.engine.caches import LAYOUTS, cache_format, calibrated, seen_by_step


def _pair(tokens, *, batch=2, heads=3, width=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(batch, heads, tokens, width, generator=generator).to(dtype) for _ in range(2))


def _append(cache, pair, first, last, layer=0):
    return cache.update(*(x[:, :, first:last] for x in pair), layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layout", "residual"), [("kivi", 4), ("kivi", 12), ("tile", 8), ("token", 0), ("token", 5), ("group", 1)]
)
def test_every_step_reads_what_the_authors_code_reads(layout, residual, dtype):
    format, pair = cache_format(layout, 3, residual), _pair(37, dtype=dtype)
    cache = QuantizedCache([None, format])
    expected = [[seen_by_step(*(x[b, h] for x in pair), format) for h in range(3)] for b in range(2)]
    for t in range(37):
        found = _append(cache, pair, t, t + 1, layer=1)
        wanted = [[next(steps) for steps in row] for row in expected]
        for half in range(2):
            stacked = torch.stack([torch.stack([step[half] for step in row]) for row in wanted])
            assert found[half].dtype == dtype
            assert torch.equal(found[half], stacked)
        assert cache.get_seq_length(1) == t + 1


@pytest.mark.parametrize("residual", [0, 6])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name.startswith("static")])
def test_static_scales_serve_every_step(layout, residual):
    format, pair = cache_format(layout, 4, residual), _pair(20)
    ranges = CacheRanges(format)
    ranges.update(*pair)
    cache, quantizer = QuantizedCache([format], [ranges.params()]), calibrated(format, pair)
    for t in range(20):
        found = _append(cache, pair, t, t + 1)
        first = max(0, t - residual) if residual else t + 1
        for x, half, seen in zip(pair, (quantizer.keys, quantizer.values), found, strict=True):
            assert torch.equal(seen[:, :, :first], half.fake_quantize(x)[:, :, :first])
            assert torch.equal(seen[:, :, first:], x[:, :, first : t + 1])


@pytest.mark.parametrize(("layout", "residual"), [("kivi", 4), ("tile", 8), ("token", 5), ("static_head", 5)])
@pytest.mark.parametrize("prompt", [1, 3, 4, 8, 17])
def test_a_prompt_attends_to_itself_in_full_precision_and_is_then_quantized(layout, residual, prompt):
    format, pair = cache_format(layout, 3, residual), _pair(30)
    params = [None]
    if format.static:
        ranges = CacheRanges(format)
        ranges.update(*pair)
        params = [ranges.params()]
    whole, single = QuantizedCache([format], params), QuantizedCache([format], params)
    for seen, x in zip(_append(whole, pair, 0, prompt), pair, strict=True):
        assert torch.equal(seen, x[:, :, :prompt])
    for t in range(prompt):
        _append(single, pair, t, t + 1)
    assert whole.memory_bits() == single.memory_bits()
    for t in range(prompt, 30):
        for a, b in zip(_append(whole, pair, t, t + 1), _append(single, pair, t, t + 1), strict=True):
            assert torch.equal(a, b)


def test_without_a_residual_a_prompt_reads_its_codes():
    format, pair = cache_format("token", 3), _pair(9)
    quantizer = calibrated(format)
    seen = _append(QuantizedCache([format]), pair, 0, 9)
    assert torch.equal(seen[0], quantizer.keys.fake_quantize(pair[0]))
    assert torch.equal(seen[1], quantizer.values.fake_quantize(pair[1]))


def test_memory_of_kivi_is_the_count_by_hand():
    """21 tokens of 2 x 3 heads of 8 channels at 2 bits: keys 16 as codes in 4 groups of 4 tokens, 5 in full precision;
    values 13 as codes in 2 groups of 4 channels, 8 in full precision. Scale and zero take 16 bits each."""
    cache, pair = QuantizedCache([cache_format("kivi", 2, 8), None]), _pair(21, dtype=torch.bfloat16)
    for t in range(21):
        _append(cache, pair, t, t + 1)
    keys = 16 * 8 * 2 + 4 * 8 * 32 + 5 * 8 * 16
    values = 13 * 8 * 2 + 13 * 2 * 32 + 8 * 8 * 16
    assert cache.memory_bits() == 6 * (keys + values)
    _append(cache, pair, 0, 21, layer=1)
    assert cache.memory_bits() == 6 * (keys + values + 2 * 21 * 8 * 16)


def test_memory_of_static_scales_counts_once():
    """10 tokens of 2 x 3 heads of 8 channels at 4 bits. Scales take 16, zero points 4 bits: 8 per head, one per head or
    one for all heads, of keys and of values."""
    pair = _pair(10)
    for layout, scales in (("static_channel", 3 * 8), ("static_head", 3), ("static_tensor", 1)):
        format = cache_format(layout, 4, zero="int")
        ranges = CacheRanges(format)
        ranges.update(*pair)
        cache = QuantizedCache([format], [ranges.params()])
        _append(cache, pair, 0, 10)
        assert cache.memory_bits() == 2 * (6 * 10 * 8 * 4 + scales * (16 + 4))


def test_memory_of_symmetric_and_ternary_codes():
    """Per token one scale of 16 bits; five ternary codes share a byte."""
    pair = _pair(10)
    for options, codes in (({"bits": 4}, 10 * 8 * 4), ({"element": TERNARY}, 10 * 8 // 5 * 8)):
        cache = QuantizedCache([cache_format("token", zero="none", **options)])
        _append(cache, pair, 0, 10)
        assert cache.memory_bits() == 2 * 6 * (codes + 10 * 16)
    static = cache_format("static_head", element=TERNARY, zero="none")
    ranges = CacheRanges(static)
    ranges.update(*pair)
    cache = QuantizedCache([static], [ranges.params()])
    _append(cache, pair, 0, 10)
    assert cache.memory_bits() == 2 * (6 * (10 * 8 // 5 * 8) + 3 * 16)


def test_nothing_is_held_before_the_first_token_and_after_a_reset():
    cache, pair = QuantizedCache([cache_format("kivi", 2, 8), None]), _pair(21)
    assert cache.memory_bits() == 0
    assert cache.get_seq_length() == 0
    first = [_append(cache, pair, t, t + 1) for t in range(21)]
    cache.reset()
    assert cache.memory_bits() == 0
    assert cache.get_seq_length() == 0
    again = [_append(cache, pair, t, t + 1) for t in range(21)]
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("layout", ["kivi", "static_channel"])
def test_sequences_are_chosen_with_codes_scales_and_residual(layout):
    format, pair = cache_format(layout, 3, 8), _pair(40)
    ranges = CacheRanges(format)
    ranges.update(*pair)
    params = [ranges.params() if format.static else None]
    picks = {
        "reorder_cache": (torch.tensor([1, 1, 0]), [1, 1, 0]),
        "batch_select_indices": (torch.tensor([1]), [1]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1]),
    }
    for method, (argument, rows) in picks.items():
        chosen, plain = QuantizedCache([format], params), QuantizedCache([format], params)
        _append(chosen, pair, 0, 21)
        getattr(chosen, method)(argument)
        mixed = [x[rows] for x in pair]
        _append(plain, mixed, 0, 21)
        for t in range(21, 40):
            for a, b in zip(_append(chosen, mixed, t, t + 1), _append(plain, mixed, t, t + 1), strict=True):
                assert torch.equal(a, b)


def test_what_cannot_be_is_refused():
    pair = _pair(10)
    static = cache_format("static_head")
    with pytest.raises(SpecError, match=r"^kv.residual=0: "):
        QuantizedCache([cache_format("kivi")])
    with pytest.raises(StructureError, match="takes scales from calibration text"):
        QuantizedCache([static])
    with pytest.raises(StructureError, match="of 2 layers for 1"):
        QuantizedCache([None], [None, None])
    ranges = CacheRanges(static)
    ranges.update(*pair)
    with pytest.raises(StructureError, match="2 heads, but static scales of 3"):
        _append(QuantizedCache([static], [ranges.params()]), [x[:, :2] for x in pair], 0, 1)
    cache = QuantizedCache([cache_format("token")])
    _append(cache, pair, 0, 10)
    cache.crop(0)
    with pytest.raises(StructureError, match="1 tokens to remove"):
        cache.crop(-1)
    pair[1][0, 0, 0, 0] = torch.inf
    with pytest.raises(NumericsError, match="values of 3 heads"):
        _append(cache, pair, 0, 1)


def test_a_model_generates_with_it():
    """16-bit floats change no greedy choice, 2 bits do; tokens are counted as the model does."""
    model, config = tiny_model("llama")
    prompt = tokens(config, length=12)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    plain = model.generate(prompt, **options)
    found = {}
    for name, format in (
        ("exact", cache_format("token", residual=4, element=Float(5, 10), zero="none")),
        ("kivi", cache_format("kivi", 2, 8)),
        ("rough", cache_format("token", 2)),
    ):
        cache = QuantizedCache([format] * config.num_hidden_layers)
        found[name] = model.generate(prompt, past_key_values=cache, **options)
        assert cache.get_seq_length() == 12 + 24 - 1
    assert torch.equal(found["exact"], plain)
    assert not torch.equal(found["rough"], plain)
    assert found["kivi"].shape == plain.shape
