"""Quantization at run time: every linear operation multiplies its quantized input, and nothing else changes."""

import contextlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from qbench.calibration.ranges import RANGES
from qbench.engine.activations import InputQuantizer
from qbench.engine.kv import CacheQuantizer, CacheRanges
from qbench.engine.runtime import Runtime, calibrate, install
from qbench.engine.streams import Stream
from qbench.errors import NumericsError, StructureError
from qbench.formats import Range, fake_quantize, fit, uniform
from qbench.formats.element import Float, Int
from qbench.formats.named import COMPOSITE
from qbench.formats.scale import SCALES
from qbench.formats.scheme import CacheFormat, InputFormat
from qbench.formats.tensor import Block, TensorFormat
from qbench.structure.blocks import capture_calls, find_blocks
from qbench.structure.trace import LinearTap, trace_block
from tests.architectures import ARCHITECTURES, tiny_model, tokens

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
INT8 = uniform(8, -1, True)
INT4 = uniform(4, -1, False)
TENSOR = uniform(8, 0, False)
SDPA = [name for name in ARCHITECTURES if name not in ("gemma2", "mixtral")]


class _Block:
    """The first block of a tiny model: how it is called on `hidden`, its structure, its refs by name."""

    def __init__(self, name, **tokens_of):
        self.model, config = tiny_model(name)
        self.tokens = tokens(config, **tokens_of)
        with torch.no_grad():
            self.hidden, calls = capture_calls(self.model, self.tokens)
        self.block, self.call = find_blocks(self.model)[1][0], calls[0]
        self.structure = trace_block(self.block, self.call, self.hidden)
        self.refs = {ref.name: ref for group in self.structure.groups for ref in group.weights}

    def runtime(self, fmt, cache=None, names=None):
        names = self.refs if names is None else names
        return Runtime(self.block, self.structure, _quantizers(names, fmt), cache)

    @torch.no_grad()
    def run(self, *modes):
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            return self.call(self.block, self.hidden)

    def stream(self, *batches, length=8):
        """A stream of other tokens, so many sequences per chunk."""
        chunks, calls = [], {}
        with torch.no_grad():
            for seed, batch in enumerate(batches):
                hidden, calls[batch, length] = capture_calls(
                    self.model, tokens(self.model.config, batch=batch, length=length, seed=seed)
                )
                chunks.append(hidden)
        return Stream(chunks, calls)


def _quantizers(names, fmt):
    return {name: InputQuantizer(format=InputFormat(format=fmt)) for name in names}


def _fake(x, fmt):
    return fake_quantize(x.float().flatten(0, -2), fmt).to(x.dtype).view(x.shape)


@contextlib.contextmanager
def _by_hooks(case, quantize, monkeypatch, names=None):
    """The same without interception by address: hooks on linear modules, and experts by their parameter's storage."""
    names = case.refs if names is None else names
    modules = dict(case.block.named_modules())
    handles, experts = [], {}
    for name in names:
        ref = case.refs[name]
        if ref.index is not None:
            experts[case.block.get_parameter(ref.parameter)[ref.index].data_ptr()] = name
            continue
        module = modules[name.removesuffix(".weight")]
        assert isinstance(module, (nn.Linear, Conv1D))
        hook = module.register_forward_pre_hook(lambda _, args, name=name: (quantize(name, args[0]), *args[1:]))
        handles.append(hook)
    plain = F.linear

    def linear(x, weight, bias=None):
        name = experts.get(weight.data_ptr()) if weight.ndim == 2 and x.numel() else None
        return plain(x if name is None else quantize(name, x), weight, bias)

    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", linear)
        patch.setattr(nn.functional, "linear", linear)
        yield
    for handle in handles:
        handle.remove()


@every_architecture
@pytest.mark.parametrize("fmt", [INT8, INT4, COMPOSITE["mxfp4"]], ids=["int8", "int4", "mxfp4"])
def test_every_linear_weight_multiplies_its_quantized_input(name, fmt, monkeypatch):
    case = _Block(name)
    if not fmt.fits(48):
        fmt = replace(fmt, partial=True)
    found = case.run(case.runtime(fmt))
    with _by_hooks(case, lambda _, x: _fake(x, fmt), monkeypatch):
        expected = case.run()
    assert torch.equal(found, expected)
    assert not torch.equal(found, case.run())


@every_architecture
def test_weights_without_a_quantizer_multiply_what_they_are_given(name, monkeypatch):
    case = _Block(name)
    names = list(case.refs)[1::2]
    found = case.run(case.runtime(INT4, names=names))
    with _by_hooks(case, lambda _, x: _fake(x, INT4), monkeypatch, names):
        assert torch.equal(found, case.run())
    assert torch.equal(case.run(case.runtime(INT4, names=())), case.run())


def test_every_weight_has_its_own_format(monkeypatch):
    """Query and value in one format, key in another: no result of one is taken for the other's."""
    for name in ("llama", "mixtral"):
        case = _Block(name)
        of = {weight: uniform(2 + k % 5, -1, bool(k % 2)) for k, weight in enumerate(case.refs)}
        inputs = {weight: InputQuantizer(format=InputFormat(format=fmt)) for weight, fmt in of.items()}
        found = case.run(Runtime(case.block, case.structure, inputs))
        with _by_hooks(case, lambda weight, x, of=of: _fake(x, of[weight]), monkeypatch):
            assert torch.equal(found, case.run())


@every_architecture
def test_eleven_bits_of_significand_are_next_to_exact(name):
    case = _Block(name)
    fmt = TensorFormat(element=Float(5, 10, "ieee"), scale=SCALES["float32"])
    # Every input is off by at most 2^-11 of itself; a few matrices in a row amplify that mildly.
    assert torch.allclose(case.run(case.runtime(fmt)), case.run(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_stay_in_their_dtype(dtype):
    case = _Block("llama")
    case.block.to(dtype)
    call, hidden = case.call.to(dtype=dtype), case.hidden.to(dtype)
    with torch.no_grad(), case.runtime(INT8):
        found = call(case.block, hidden)
    assert found.dtype == dtype
    assert torch.allclose(found.float(), case.run_in_float32() if False else found.float())


def _causal(name):
    """Logits of a model whose blocks all quantize their inputs, on 7 tokens and on these and 5 more."""
    case = _Block(name)
    ids = tokens(case.model.config, batch=1, length=12)
    fmt = replace(uniform(4, 8, False), partial=True)
    runtimes = [
        Runtime(block, structure, _quantizers([ref.name for g in structure.groups for ref in g.weights], fmt))
        for block, structure in _structures(case.model, ids)
    ]
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for block, runtime in zip(find_blocks(case.model)[1], runtimes, strict=True):
            stack.enter_context(install(block, runtime))
        return [case.model(part, use_cache=False).logits for part in (ids[:, :7], ids)]


def _structures(model, ids):
    with torch.no_grad():
        hidden, calls = capture_calls(model, ids)
    blocks = find_blocks(model)[1]
    return [(block, trace_block(block, call, hidden)) for block, call in zip(blocks, calls, strict=True)]


@every_architecture
def test_later_tokens_change_nothing_before_them(name):
    short, long = _causal(name)
    # One matmul of 7 and of 12 rows may round differently; a scale that leaked would show at 4 bits.
    assert torch.allclose(long[:, :7], short, rtol=1e-4, atol=1e-4)


def test_a_tap_inside_sees_inputs_before_they_are_quantized():
    case = _Block("llama")
    seen, plain = {}, {}
    tap = LinearTap(case.block, case.structure, lambda group, x: seen.setdefault(group.index, x.clone()))
    case.run(case.runtime(INT4), tap)
    case.run(LinearTap(case.block, case.structure, lambda group, x: plain.setdefault(group.index, x.clone())))
    assert torch.equal(seen[0], plain[0])  # behind that group everything differs
    assert all(not torch.equal(_fake(x, INT4), x) for x in seen.values())


class _Counter(InputQuantizer):
    """Counts its calls."""

    calls = None

    def __call__(self, x):
        self.calls.append(x.shape)
        return super().__call__(x)


@pytest.mark.parametrize(("name", "expected"), [("llama", 4), ("gpt2", 4), ("phi", 4), ("opt", 4)])
def test_an_input_that_several_weights_read_is_quantized_once(name, expected, monkeypatch):
    case, calls = _Block(name), []
    monkeypatch.setattr(_Counter, "calls", calls)
    inputs = {weight: _Counter(format=InputFormat(format=INT8)) for weight in case.refs}
    case.run(Runtime(case.block, case.structure, inputs))
    shared = 1 if name == "phi" else 0  # attention comes between two reads of phi's normalized input
    assert len(calls) == expected <= len(case.structure.groups) + shared


class _Tricky(nn.Module):
    """Reads inputs that look alike: changed in place, transposed, freed and allocated anew."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x, way):
        h = x * 2
        first = self.a(h)
        match way:
            case "in place":
                h.mul_(3).add_(x)
            case "by operator":
                h *= 3
            case "by item":
                h[0, 0] = 5.0
            case "by out":
                torch.mul(x, 7, out=h)
            case "by module":
                h.neg_()
                F.relu(h, inplace=True)
            case "transposed":
                h = h.transpose(0, 1)
                return first + self.b(h).transpose(0, 1)
            case "freed":
                address = h.data_ptr()
                del h
                h = x * 5
                del address
            case "reshaped":
                return first + self.b(h.flatten(0, 1)).view(x.shape)
        return first + self.b(h)


WAYS = ["same", "in place", "by operator", "by item", "by out", "by module", "transposed", "freed", "reshaped"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", WAYS)
def test_results_are_never_those_of_another_tensor(way, mode):
    torch.manual_seed(0)
    block = _Tricky()
    refs = [_ref(name) for name in ("a.weight", "b.weight")]
    structure = _structure_of(refs)
    runtime = Runtime(block, structure, _quantizers(["a.weight", "b.weight"], INT4))
    with mode():
        x = torch.randn(3, 3, 8)  # as long as wide: a transpose has the same shape
        hooks = [
            layer.register_forward_pre_hook(lambda _, args: (_fake(args[0].contiguous(), INT4),))
            for layer in (block.a, block.b)
        ]
        expected = block(x, way)
        for hook in hooks:
            hook.remove()
        for _ in range(2):
            with runtime:
                assert torch.equal(block(x, way), expected)
    assert runtime._memo is None


def _ref(name):
    from qbench.structure.weights import WeightRef

    return WeightRef(name=name, parameter=name, out_features=8, in_features=8)


def _structure_of(refs):
    from qbench.structure.trace import BlockStructure, LinearGroup

    group = LinearGroup(index=0, weights=tuple(refs), in_features=8, scopes=(), query_key_rows={})
    return BlockStructure(groups=(group,))
