"""Quantization at run time: every linear operation multiplies its quantized input, and nothing else changes."""

import contextlib
import inspect
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from qbench.engine.activations import InputQuantizer
from qbench.engine.kv import CacheQuantizer
from qbench.engine.runtime import Runtime, calibrate, install
from qbench.errors import StructureError
from qbench.formats import uniform
from qbench.formats.element import Float
from qbench.formats.named import COMPOSITE
from qbench.formats.scale import SCALES
from qbench.formats.scheme import InputFormat
from qbench.formats.tensor import TensorFormat
from qbench.structure.blocks import capture_calls, find_blocks, output_of
from qbench.structure.trace import BlockStructure, LinearGroup, LinearTap, trace_block
from qbench.structure.weights import WeightRef
from tests.architectures import ARCHITECTURES, tiny_model, tokens
from tests.engine.runtime_cases import INT4, INT8, KV4, TENSOR, Case, dynamic, fake

# The others compute attention by operations of their own.
SDPA = [name for name in ARCHITECTURES if name not in ("bloom", "gemma2")]

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


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
    case = Case(name)
    if not fmt.fits(48):
        fmt = replace(fmt, partial=True)
    found = case.run(case.runtime(fmt))
    with _by_hooks(case, lambda _, x: fake(x, fmt), monkeypatch):
        expected = case.run()
    assert torch.equal(found, expected)
    assert not torch.equal(found, case.run())


@every_architecture
def test_weights_without_a_quantizer_multiply_what_they_are_given(name, monkeypatch):
    case = Case(name)
    names = list(case.refs)[1::2]
    found = case.run(case.runtime(INT4, names=names))
    with _by_hooks(case, lambda _, x: fake(x, INT4), monkeypatch, names):
        assert torch.equal(found, case.run())
    assert torch.equal(case.run(case.runtime(INT4, names=())), case.run())


def test_every_weight_has_its_own_format(monkeypatch):
    """Query and value in one format, key in another: no result of one is taken for the other's."""
    for name in ("llama", "mixtral"):
        case = Case(name)
        of = {weight: uniform(2 + k % 5, -1, bool(k % 2)) for k, weight in enumerate(case.refs)}
        inputs = {weight: InputQuantizer(format=InputFormat(format=fmt)) for weight, fmt in of.items()}
        found = case.run(Runtime(case.block, case.structure, inputs))
        with _by_hooks(case, lambda weight, x, of=of: fake(x, of[weight]), monkeypatch):
            assert torch.equal(found, case.run())


@every_architecture
def test_eleven_bits_of_significand_are_next_to_exact(name):
    case = Case(name)
    fmt = TensorFormat(element=Float(5, 10, "ieee"), scale=SCALES["float32"])
    # Every input is off by at most 2^-11 of itself; a few matrices in a row amplify that mildly.
    assert torch.allclose(case.run(case.runtime(fmt)), case.run(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_stay_in_their_dtype(dtype, monkeypatch):
    case = Case("llama")
    case.block.to(dtype)
    case.call, case.hidden = case.call.to(dtype=dtype), case.hidden.to(dtype)
    found = case.run(case.runtime(INT8))
    with _by_hooks(case, lambda _, x: fake(x, INT8), monkeypatch):
        assert torch.equal(found, case.run())
    assert found.dtype == dtype


def _install(stack, model, ids, fmt):
    """Every block of the model quantizes its inputs."""
    with torch.no_grad():
        hidden, calls = capture_calls(model, ids)
    for block, call in zip(find_blocks(model)[1], calls, strict=True):
        structure = trace_block(block, call, hidden)
        names = [ref.name for group in structure.groups for ref in group.weights]
        stack.enter_context(install(block, Runtime(block, structure, dynamic(names, fmt))))


@every_architecture
def test_later_tokens_change_nothing_before_them(name):
    """Bit for bit; in one tensor of the same shape, so that matmuls round alike."""
    model, config = tiny_model(name)
    ids = tokens(config, batch=1, length=12)
    other = torch.cat([ids[:, :7], tokens(config, batch=1, length=5, seed=1)], dim=1)
    assert not torch.equal(ids, other)
    with torch.no_grad(), contextlib.ExitStack() as stack:
        _install(stack, model, ids, replace(uniform(4, 8, False), partial=True))
        found, changed = (model(some, use_cache=False).logits for some in (ids, other))
    if name == "mixtral":  # other tokens are routed elsewhere: experts multiply matrices of another shape
        assert torch.allclose(found[:, :7], changed[:, :7], rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(found[:, :7], changed[:, :7])
    assert not torch.allclose(found[:, 7:], changed[:, 7:], rtol=1e-2)


def test_a_tap_inside_sees_inputs_before_they_are_quantized():
    case = Case("llama")
    seen, plain = {}, {}
    tap = LinearTap(case.block, case.structure, lambda group, x: seen.setdefault(group.index, x.clone()))
    case.run(case.runtime(INT4), tap)
    case.run(LinearTap(case.block, case.structure, lambda group, x: plain.setdefault(group.index, x.clone())))
    assert torch.equal(seen[0], plain[0])  # behind that group everything differs
    assert all(not torch.equal(fake(x, INT4), x) for x in seen.values())


class _Batched(nn.Module):
    """All experts in one product."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 8, 5))

    def forward(self, x):
        return torch.bmm(x, self.experts)


@torch.no_grad()
def test_experts_in_one_product_have_their_own_formats():
    torch.manual_seed(0)
    block, x = _Batched(), torch.randn(3, 4, 8)
    refs = [
        WeightRef(name=f"experts[{k}]", parameter="experts", index=k, transposed=True, out_features=5, in_features=8)
        for k in range(3)
    ]
    structure = BlockStructure(
        groups=tuple(
            LinearGroup(index=k, weights=(ref,), in_features=8, scopes=(), query_key_rows={})
            for k, ref in enumerate(refs)
        )
    )
    formats = {"experts[0]": INT4, "experts[2]": TENSOR}
    inputs = {name: InputQuantizer(format=InputFormat(format=fmt)) for name, fmt in formats.items()}
    with Runtime(block, structure, inputs):
        found = block(x)
    quantized = torch.stack([fake(x[0], INT4), x[1], fake(x[2], TENSOR)])
    assert torch.equal(found, torch.bmm(quantized, block.experts))


@pytest.mark.parametrize("by_name", [("input", "mat1", "mat2"), ("mat1", "mat2"), ()], ids=len)
@torch.no_grad()
def test_operands_by_keyword(by_name):
    torch.manual_seed(0)
    weight, bias, x = nn.Parameter(torch.randn(8, 5)), torch.randn(5), torch.randn(3, 8)
    block = nn.ParameterDict({"w": weight})
    ref = WeightRef(name="w", parameter="w", transposed=True, out_features=5, in_features=8)
    group = LinearGroup(index=0, weights=(ref,), in_features=8, scopes=(), query_key_rows={})
    values = {"input": bias, "mat1": x, "mat2": weight}
    args = [value for name, value in values.items() if name not in by_name]
    with Runtime(block, BlockStructure(groups=(group,)), dynamic(["w"], INT4)):
        found = torch.addmm(*args, **{name: values[name] for name in by_name})
    assert torch.equal(found, torch.addmm(bias, fake(x, INT4), weight))


class _Attention(nn.Module):
    """Keys and values as positional or keyword arguments."""

    def forward(self, q, k, v, by_name):
        if by_name:
            return F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("by_name", [True, False])
@torch.no_grad()
def test_attention_goes_to_the_cache(by_name):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    block = _Attention()
    with Runtime(block, BlockStructure(groups=()), {}, CacheQuantizer(KV4)):
        found = block(q, k, v, by_name)
    assert torch.equal(found, CacheQuantizer(KV4).attention(q, k, v, is_causal=True))
    assert not torch.equal(found, block(q, k, v, by_name))


def _cached(quantizer):
    """A mode that hands attention to the cache, without anything of the package's own."""

    class Route(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                return quantizer.attention(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    return Route()


@pytest.mark.parametrize("name", SDPA)
def test_inputs_and_cache_together(name, monkeypatch):
    case = Case(name)
    found = case.run(case.runtime(INT8, CacheQuantizer(KV4)))
    with _by_hooks(case, lambda _, x: fake(x, INT8), monkeypatch):
        assert torch.equal(found, case.run(_cached(CacheQuantizer(KV4))))
    assert not torch.equal(found, case.run(case.runtime(INT8)))


def test_forwards_that_take_turns_share_a_runtime():
    """Chunks that are settled together pause in the middle of their forwards, one thread each."""
    case = Case("llama")
    stream, runtime = case.stream(2, 1, 3), case.runtime(INT4, CacheQuantizer(KV4))
    expected = stream.copy()
    expected.advance(case.block, 0, runtime)
    stream.settle(case.block, 0, case.structure, lambda group, x: None, lambda group: None, runtime)
    assert all(map(torch.equal, stream.chunks, expected.chunks))


@pytest.mark.parametrize("name", ["bloom", "gemma2"])
def test_a_cache_that_is_never_asked_is_an_error(name):
    case = Case(name)
    with pytest.raises(StructureError, match=r"scaled_dot_product_attention.*kv_bits=16"):
        case.run(case.runtime(INT8, CacheQuantizer(KV4)))


def test_weights_that_moved_are_an_error():
    case = Case("llama")
    runtime = case.runtime(INT8)
    parameter = case.block.get_parameter("mlp.up_proj.weight")
    parameter.data = parameter.data.clone()
    with pytest.raises(StructureError, match=r"mlp\.up_proj\.weight.*another address"):
        case.run(runtime)


def test_an_error_inside_is_not_hidden():
    case = Case("llama")
    with pytest.raises(ZeroDivisionError), case.runtime(INT8):
        raise ZeroDivisionError


@pytest.mark.parametrize("unknown", ["mlp.gate.weight", "nothing.weight"])
def test_only_quantized_weights_have_quantized_inputs(unknown):
    case = Case("mixtral")
    router = [ref.name for ref in case.structure.routers]
    assert router == ["mlp.gate.weight"]
    with pytest.raises(StructureError, match=unknown.replace(".", r"\.")):
        Runtime(case.block, case.structure, dynamic([unknown], INT8))
    with pytest.raises(StructureError, match=unknown.replace(".", r"\.")):
        calibrate(case.block, 0, case.structure, None, {unknown: InputFormat(format=INT8)}, None)


@every_architecture
def test_installed_blocks_quantize_whoever_calls_them(name):
    model, config = tiny_model(name)
    ids = tokens(config)
    blocks = find_blocks(model)[1]
    with torch.no_grad():
        capture_calls(model, ids)  # experts one by one from here on
        plain = model(ids, use_cache=False).logits
        hidden, calls = capture_calls(model, ids)
        expected = hidden
        for block, call in zip(blocks, calls, strict=True):
            structure = trace_block(block, call, hidden)
            names = [ref.name for group in structure.groups for ref in group.weights]
            with Runtime(block, structure, dynamic(names, INT8)):
                expected = call(block, expected)
        reached = []
        with contextlib.ExitStack() as stack:
            _install(stack, model, ids, INT8)
            handle = blocks[-1].register_forward_hook(lambda _, args, result: reached.append(output_of(result)))
            for context in (torch.no_grad(), torch.inference_mode()):
                with context:
                    assert not torch.equal(model(ids, use_cache=False).logits, plain)
            assert len(reached) == 2
            assert all(torch.equal(result, expected) for result in reached)
            handle.remove()
            assert torch.equal(capture_calls(model, ids)[0], hidden)
        assert all("forward" not in vars(block) for block in blocks)
        assert torch.equal(model(ids, use_cache=False).logits, plain)


def test_installing_gives_back_a_forward_of_the_blocks_own():
    case = Case("llama")
    own = case.block.forward
    case.block.forward = own
    signature = inspect.signature(own)
    with install(case.block, case.runtime(INT8)):
        assert case.block.forward is not own
        assert inspect.signature(case.block.forward) == signature  # whoever calls it by keyword may look
    assert vars(case.block)["forward"] is own
