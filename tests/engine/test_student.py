"""A block as a differentiable function of its parameters: the runtime's values, straight-through gradients."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from qbench.engine.activations import InputQuantizer
from qbench.engine.kv import CacheQuantizer
from qbench.engine.runtime import Runtime
from qbench.engine.student import make_student
from qbench.errors import NumericsError, StructureError
from qbench.formats import fit
from qbench.formats.scheme import InputFormat
from qbench.structure.online import HadamardTransform, MatrixTransform, attach
from tests.architectures import ARCHITECTURES
from tests.engine.caches import cache_format, calibrated
from tests.engine.runtime_cases import INT4, INT8, Case, dynamic, fake

CACHES = {
    "none": None,
    "token": ("token", 0),
    "streaming": ("token", 4),
    "kivi": ("kivi", 4),
    "static": ("static_head", 0),
}
WITHOUT_SDPA = ("gemma2", "bloom")


def _cache(name, case):
    if CACHES[name] is None:
        return None
    layout, residual = CACHES[name]
    generator = torch.Generator().manual_seed(0)
    heads = case.model.config.get_text_config().num_key_value_heads if layout.startswith("static") else 0
    pairs = [torch.randn(1, heads, 5, 8, generator=generator) for _ in range(2)] if heads else None
    return calibrated(cache_format(layout, residual=residual), *([pairs] if pairs else []))


def _student(case, inputs, cache=None):
    return make_student(case.block, case.structure, inputs, cache, lambda hidden: case.call)


def _leaves(block):
    return {name: value.detach().clone().requires_grad_() for name, value in block.named_parameters()}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("cache", ["none", "token", "streaming", "kivi"])
def test_it_computes_what_the_runtime_computes_and_every_parameter_gets_a_gradient(name, cache):
    case = Case(name, length=12)
    quantizer, inputs = _cache(cache, case), dynamic(case.refs, INT8)
    if name in WITHOUT_SDPA and quantizer is not None:
        with pytest.raises(StructureError, match="does not call scaled_dot_product_attention"):
            _student(case, inputs, quantizer)({}, case.hidden)
        return
    expected = case.run(Runtime(case.block, case.structure, inputs, quantizer))
    assert not torch.equal(expected, case.run())
    before = {path: (value, value.detach().clone()) for path, value in case.block.named_parameters()}
    student, leaves = _student(case, inputs, quantizer), _leaves(case.block)
    hidden = case.hidden.clone().requires_grad_()
    output = student(leaves, hidden)
    assert torch.equal(output, expected)
    output.square().sum().backward()
    assert all(torch.isfinite(leaf.grad).all() and leaf.grad.abs().max() > 0 for leaf in (hidden, *leaves.values()))
    for path, value in case.block.named_parameters():  # they may require gradients: they are constants here
        assert value is before[path][0]
        assert torch.equal(value, before[path][1])
        assert value.grad is None
    assert torch.equal(student({}, case.hidden), expected)
    assert not student({}, case.hidden).requires_grad


@pytest.mark.parametrize("cache", ["none", "token", "streaming", "kivi", "static"])
def test_given_parameters_count_and_the_others_stay(cache):
    case = Case("llama", length=12)
    quantizer, inputs = _cache(cache, case), dynamic(case.refs, INT4)
    generator = torch.Generator().manual_seed(1)
    paths = ("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight")
    values = {path: torch.randn(case.block.get_parameter(path).shape, generator=generator) for path in paths}
    other = copy.deepcopy(case.block)
    with torch.no_grad():
        for path, value in values.items():
            other.get_parameter(path).copy_(value)
        with Runtime(other, case.structure, inputs, quantizer):
            expected = case.call(other, case.hidden)
    assert torch.equal(_student(case, inputs, quantizer)(values, case.hidden), expected)


class _StraightThrough(TorchFunctionMode):
    """Rounds inputs of linear operations, keys and values by x + (Q(x) - x), whichever weights they meet."""

    def __init__(self, fmt, half=None):
        super().__init__()
        self.fmt, self.half = fmt, half

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear:
            x, *rest = args
            return func(x + (fake(x, self.fmt) - x).detach(), *rest, **kwargs)
        if func is torch.addmm:
            bias, x, weight = args
            return func(bias, x + (fake(x, self.fmt) - x).detach(), weight, **kwargs)
        if func is F.scaled_dot_product_attention and self.half is not None:
            query, *cached = args
            cached = [x + (fake(x, self.half) - x).detach() for x in cached]
            return func(query, *cached, **kwargs)
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "qwen3"])
@pytest.mark.parametrize("cached", [False, True])
def test_gradients_are_those_of_a_plain_straight_through_forward(name, cached):
    case = Case(name, length=12)
    cache = cache_format("token", zero="none") if cached else None
    student = _student(case, dynamic(case.refs, INT4), CacheQuantizer(cache) if cached else None)
    leaves, hidden = _leaves(case.block), case.hidden.clone().requires_grad_()
    target = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    (student(leaves, hidden) - target).square().mean().backward()
    other, entering = copy.deepcopy(case.block), case.hidden.clone().requires_grad_()
    other.zero_grad()
    other.requires_grad_()
    with _StraightThrough(INT4, cache.key if cached else None):
        output = case.call(other, entering)
    (output - target).square().mean().backward()
    assert torch.allclose(hidden.grad, entering.grad, rtol=1e-3, atol=1e-6)
    for path, parameter in other.named_parameters():
        assert torch.allclose(leaves[path].grad, parameter.grad, rtol=1e-3, atol=1e-6), path


def test_attention_over_a_residual_passes_gradients_as_if_nothing_were_rounded_once_rounding_is_fine():
    """8 bits of keys and values with a residual: gradients near those of plain attention, which no lost path gives."""
    case = Case("llama", length=12)
    leaves, plain = _leaves(case.block), _leaves(case.block)
    cache = CacheQuantizer(cache_format("kivi", bits=8, residual=4))
    _student(case, {}, cache)(leaves, case.hidden).square().mean().backward()
    _student(case, {})(plain, case.hidden).square().mean().backward()
    for path, leaf in leaves.items():
        assert (leaf.grad - plain[path].grad).norm() < 0.05 * plain[path].grad.norm(), path


def test_saturated_inputs_have_gradient_one_too():
    case = Case("llama")
    narrow = fit(torch.full((1, 32), 0.01), INT8)
    name = "self_attn.v_proj.weight"
    inputs = {name: InputQuantizer(format=InputFormat(format=INT8, static=True), params=narrow)}
    hidden, weight = case.hidden.clone().requires_grad_(), case.block.get_parameter(name).detach()
    student = make_student(
        case.block, case.structure, inputs, None, lambda _: lambda block, x: block.self_attn.v_proj(x)
    )
    student({}, hidden).sum().backward()
    assert torch.allclose(hidden.grad, weight.sum(0).expand_as(hidden), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["self_attn.o_proj.weight", "mlp.down_proj.weight"])
def test_online_transforms_act_before_rounding_and_have_their_own_gradient(name):
    """A Hadamard transform of a weight's input gives what a product with its matrix gives, backwards too."""
    found = []
    for dense in (False, True):
        case = Case("llama")
        fast = HadamardTransform(order=16)
        matrix = torch.block_diag(*[fast(torch.eye(16))] * (case.refs[name].in_features // 16))
        attach(case.block, name, MatrixTransform(matrix) if dense else fast)
        hidden = case.hidden.clone().requires_grad_()
        leaves = _leaves(case.block)
        _student(case, dynamic([name], INT8))(leaves, hidden).square().sum().backward()
        with torch.no_grad():
            assert torch.equal(
                _student(case, dynamic([name], INT8))({}, hidden), case.run(case.runtime(INT8, names=[name]))
            )
        found.append((hidden.grad, leaves[name].grad))
    (fast_hidden, fast_weight), (dense_hidden, dense_weight) = found
    assert torch.allclose(fast_hidden, dense_hidden, rtol=1e-2, atol=1e-2 * dense_hidden.abs().max())
    assert torch.allclose(fast_weight, dense_weight, rtol=1e-2, atol=1e-2 * dense_weight.abs().max())
    case = Case("llama")
    plain = case.hidden.clone().requires_grad_()
    _student(case, dynamic([name], INT8))(_leaves(case.block), plain).square().sum().backward()
    assert (plain.grad - fast_hidden).norm() > 0.1 * plain.grad.norm()


def test_nothing_is_recorded_where_the_caller_does_not_ask():
    case = Case("llama")
    with torch.no_grad():
        assert not _student(case, dynamic(case.refs, INT8))(_leaves(case.block), case.hidden).requires_grad


def test_a_step_leaves_no_tensors_behind():
    case = Case("llama")
    student, leaves = _student(case, dynamic(case.refs, INT8), _cache("kivi", case)), _leaves(case.block)

    def living():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    counts = []
    for _ in range(4):
        student(leaves, case.hidden).sum().backward()
        counts.append(living())
    assert len(set(counts[1:])) == 1


def test_unknown_parameters_and_bad_numbers_are_errors_and_leave_the_block_whole():
    case = Case("llama")
    student = _student(case, dynamic(case.refs, INT8))
    with pytest.raises(StructureError, match=r"mlp\.nothing: not a parameter of the block"):
        student({"mlp.nothing": torch.zeros(1)}, case.hidden)
    broken = {"input_layernorm.weight": torch.full((32,), torch.nan)}
    with pytest.raises(NumericsError, match="NaN"):
        student(broken, case.hidden)
    assert torch.equal(student({}, case.hidden), case.run(case.runtime(INT8)))
