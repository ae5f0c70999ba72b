"""One forward per window with emulated caches equals one forward per token through a cache that holds codes."""

import pytest
import torch

from qbench.engine.kv import CacheQuantizer, CacheRanges
from qbench.errors import EvaluationError, StructureError
from qbench.evaluation.decode import decode_nll
from qbench.evaluation.perplexity import window_nll
from qbench.formats.element import Float
from qbench.models.kv_cache import QuantizedCache
from qbench.models.load import load_model
from qbench.structure.blocks import use_single_experts
from tests.architectures import ARCHITECTURES, tiny_model, tokens
from tests.engine.caches import BY_TOKENS, LAYOUTS, Attention, cache_format, collecting
from tests.engine.helpers import tiny_asset, tiny_windows

BLOCKS = 4
"""Of `model=tiny`."""
CASES = [(layout, r) for layout in LAYOUTS for r in ((16, 32) if layout in BY_TOKENS else (0, 16))]


@pytest.fixture(scope="module")
def model():
    return load_model(tiny_asset(), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def exact():
    """The same in float64, where no rounding of a key or value hangs on the order of a sum."""
    return load_model(tiny_asset(), dtype=torch.float64, device="cpu")


@pytest.fixture(scope="module")
def windows():
    return tiny_windows(2, 44)


@torch.no_grad()
def _ranges(model, layers, windows):
    """Static parameters of every layer from one forward over the windows; None for dynamic layers."""
    found = [CacheRanges(fmt) if fmt is not None and fmt.static else None for fmt in layers]
    if not any(found):
        return None
    with Attention([collecting(ranges) if ranges else None for ranges in found]):
        model(input_ids=windows, use_cache=False)
    return [ranges.params() if ranges else None for ranges in found]


def _prefill(model, layers, windows, params):
    """NLL of every window in one forward, and how many attention calls that took."""
    params = params or [None] * len(layers)
    handlers = [
        CacheQuantizer(fmt, *(fixed or (None, None))).attention if fmt else None
        for fmt, fixed in zip(layers, params, strict=True)
    ]
    with Attention(handlers) as attention:
        return window_nll(model, windows, batch=len(windows)), attention.calls


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(("layout", "residual"), CASES)
def test_prefill_equals_decode(layout, residual, bits, exact, windows):
    layers = [cache_format(layout, bits, residual)] * BLOCKS
    params = _ranges(exact, layers, tiny_windows(2, 64, skip=500))
    prefill, calls = _prefill(exact, layers, windows, params)
    assert calls == BLOCKS
    decode = decode_nll(exact, windows, layers, params)
    assert decode.dtype == torch.float64
    assert torch.allclose(prefill, decode, rtol=1e-9)
    assert not torch.allclose(decode, window_nll(exact, windows), rtol=1e-7)


@pytest.mark.parametrize(("layout", "residual"), [("kivi", 16), ("token", 0), ("token", 16), ("static_head", 0)])
def test_prefill_equals_decode_in_float32(layout, residual, model, windows):
    layers = [cache_format(layout, 2, residual)] * BLOCKS
    params = _ranges(model, layers, tiny_windows(2, 64, skip=500))
    prefill, _ = _prefill(model, layers, windows, params)
    assert torch.allclose(prefill, decode_nll(model, windows, layers, params), rtol=1e-4)


#: Attention that is no call of torch's function, so that nothing can be put in its place.
EAGER = {"bloom", "gemma2"}


@pytest.mark.parametrize("layout", ["kivi", "token", "static_channel"])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in EAGER])
def test_prefill_equals_decode_on_every_architecture(name, layout):
    """Grouped and single key heads, biases, norms of keys, sliding windows, position embeddings of every kind."""
    model, config = tiny_model(name, dtype=torch.float64)
    ids = tokens(config, length=30)
    use_single_experts(model)
    # Sliding windows hide all but the newest tokens, which may not all be in full precision.
    layers = [cache_format(layout, 3, 8 if layout == "kivi" else 2)] * config.num_hidden_layers
    params = _ranges(model, layers, tokens(config, length=20, seed=1))
    prefill, calls = _prefill(model, layers, ids, params)
    assert calls == config.num_hidden_layers
    decode = decode_nll(model, ids, layers, params)
    assert torch.allclose(prefill, decode, rtol=1e-6)
    assert not torch.allclose(decode, window_nll(model, ids), rtol=1e-5)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_full_precision_through_the_cache_is_the_plain_number(name):
    model, config = tiny_model(name)
    ids = tokens(config, length=24)
    expected = window_nll(model, ids)
    blocks = config.num_hidden_layers
    assert torch.allclose(decode_nll(model, ids, [None] * blocks), expected, rtol=1e-5)
    # No more tokens than the residual holds.
    assert torch.allclose(decode_nll(model, ids, [cache_format("kivi", 2, 24)] * blocks), expected, rtol=1e-5)


def test_layers_have_formats_of_their_own(exact, windows):
    layers = [None, cache_format("kivi", 2, 16), cache_format("static_head", 4), cache_format("token", 2, 5)]
    params = _ranges(exact, layers, tiny_windows(2, 64, skip=500))
    prefill, _ = _prefill(exact, layers, windows, params)
    assert torch.allclose(prefill, decode_nll(exact, windows, layers, params), rtol=1e-9)
    shuffled = [layers[3], *layers[:3]]
    other, _ = _prefill(exact, shuffled, windows, [params[3], *params[:3]])
    assert not torch.allclose(prefill, other, rtol=1e-6)


def test_windows_longer_than_a_piece_of_queries(exact):
    """Scores are computed for 64 queries at a time at least."""
    windows = tiny_windows(1, 170)
    for format in (cache_format("kivi", 2, 48), cache_format("token", 2, 20)):
        prefill, _ = _prefill(exact, [format] * BLOCKS, windows, None)
        assert torch.allclose(prefill, decode_nll(exact, windows, [format] * BLOCKS), rtol=1e-9)


def test_batches_do_not_matter_and_progress_is_told(model):
    windows = tiny_windows(5, 40)
    layers = [cache_format("kivi", 4, 16)] * BLOCKS
    steps = []
    found = decode_nll(model, windows, layers, batch=2, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(2, 5), (4, 5), (5, 5)]
    assert found.shape == (5,)
    assert torch.allclose(found, decode_nll(model, windows, layers, batch=5), rtol=1e-4)


def test_a_longer_residual_and_more_bits_come_closer_to_full_precision(exact):
    windows = tiny_windows(4, 100)
    full = window_nll(exact, windows)

    def change(layout, **options):
        layers = [cache_format(layout, **options)] * BLOCKS
        return (_prefill(exact, layers, windows, None)[0] - full).abs().mean().item()

    by_bits = [change("token", bits=bits) for bits in (2, 3, 4)]
    assert by_bits[0] > 3 * by_bits[1] > 3 * by_bits[2] > 0
    by_residual = [change("token", bits=2, residual=residual) for residual in (0, 16, 64)]
    assert by_residual[0] > 1.5 * by_residual[1] > 1.5 * by_residual[2] > 0
    assert change("token", element=Float(5, 10), zero="none") < by_bits[2] / 10


def test_what_cannot_be_measured_is_refused(model, monkeypatch):
    with pytest.raises(EvaluationError, match="of 1 tokens"):
        decode_nll(model, torch.zeros(2, 1, dtype=torch.long), [None] * BLOCKS)
    with pytest.raises(StructureError, match="of 3 layers for a model of 4"):
        decode_nll(model, tiny_windows(1, 4), [None] * 3)
    # A layer that does not use the cache: its format would apply to nothing.
    update = QuantizedCache.update
    monkeypatch.setattr(
        QuantizedCache,
        "update",
        lambda self, key, value, layer, *rest, **named: (
            (key, value) if layer == 2 else update(self, key, value, layer, *rest, **named)
        ),
    )
    with pytest.raises(StructureError, match="layer 2 holds 0 tokens after 1"):
        decode_nll(model, tiny_windows(1, 4), [None] * BLOCKS)
