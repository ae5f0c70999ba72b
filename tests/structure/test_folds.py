"""Every fold that is offered leaves the block's function alone, and the ones known to exist are offered."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qbench.errors import NumericsError
from qbench.structure.blocks import BlockCall, capture_calls, find_blocks
from qbench.structure.folds import _preserves_output, find_folds
from qbench.structure.trace import trace_block
from tests.architectures import ARCHITECTURES, HIDDEN, tiny_model, tokens

CALL = BlockCall(args=(), kwargs={})
HEAD = HIDDEN // 4


def _traced(name, dtype=torch.float32, **overrides):
    model, config = tiny_model(name, dtype=dtype, **overrides)
    with torch.no_grad():
        hidden, calls = capture_calls(model, tokens(config))
    block = find_blocks(model)[1][0]
    return block, calls[0], hidden, trace_block(block, calls[0], hidden)


def _folded(name, dtype=torch.float32, **overrides):
    block, call, hidden, structure = _traced(name, dtype, **overrides)
    return block, call, hidden, structure, find_folds(block, call, hidden, structure)


def _scale(fold, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + 1.5 * torch.rand(fold.n_free, generator=generator, dtype=torch.float64)


@torch.no_grad()
def _error(block, call, hidden, changed):
    """Greatest change of the float64 output, relative to the greatest output, when parameters change."""
    copied = copy.deepcopy(block).double()
    call, hidden = call.to(dtype=torch.float64), hidden.double()
    before = call(copied, hidden)
    for path, value in changed.items():
        copied.get_parameter(path).copy_(value)
    return float((call(copied, hidden) - before).abs().max() / before.abs().max())


def _parameters(block):
    return {path: value.detach().double() for path, value in block.named_parameters()}


# (kind, group, tied channels) for 4 query heads; attention and MLP of a parallel block read one norm.
_GATED = [("norm", 0, False), ("linear", 1, True), ("norm", 2, False), ("linear", 3, False)]
_PLAIN = [("norm", 0, False), ("linear", 1, False), ("norm", 2, False)]
EXPECTED = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "stablelm"), _GATED
    ),
    **dict.fromkeys(("gpt2", "gpt_neox", "bloom"), _PLAIN),
    "phi": _PLAIN[:2],
    "opt": [*_PLAIN, ("linear", 3, False)],
    "falcon": [("norm", 0, False), ("linear", 1, True)],
    "olmo2": [("linear", 1, True), ("linear", 3, False)],
    "starcoder2": _GATED[:3],
    "mixtral": [*_GATED[:3], *(("linear", 3 + 2 * expert, False) for expert in range(8))],
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exactly_the_known_folds_are_found(name):
    *_, folds = _folded(name)
    assert [(fold.kind, fold.group, fold.grouped) for fold in folds] == EXPECTED[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folds_leave_the_function_of_an_independent_copy_alone(name):
    block, call, hidden, _, folds = _folded(name)
    parameters = _parameters(block)
    both = dict(parameters)
    for fold in folds:
        changed = fold.apply(parameters, _scale(fold, fold.group))
        assert _error(block, call, hidden, changed) <= 1e-6
        both |= fold.apply(both, _scale(fold, fold.group))
        produced = {part.parameter for part in fold.producer}
        consumed = {ref.parameter for ref in fold.consumers}
        assert changed.keys() == produced | consumed
        if fold.consumers[0].index is None:  # an expert may have no tokens
            assert _error(block, call, hidden, {path: changed[path] for path in produced}) > 1e-3
            assert _error(block, call, hidden, {path: changed[path] for path in consumed}) > 1e-3
    assert _error(block, call, hidden, both) <= 1e-6
    groups = [index for fold in folds for index in (fold.group, *fold.extra_groups)]
    assert len(groups) == len(set(groups))


@pytest.mark.parametrize("name", ["opt", "gpt_neox", "phi", "stablelm"])
def test_the_error_is_rounding_where_nothing_computes_in_float32(name):
    block, call, hidden, _, folds = _folded(name)
    for fold in folds:
        assert _error(block, call, hidden, fold.apply(_parameters(block), _scale(fold))) <= 1e-13


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "gpt2", "bloom", "falcon", "mixtral"])
def test_bfloat16_blocks_have_the_same_folds(name):
    *_, structure, folds = _folded(name)
    *_, narrow_structure, narrow = _folded(name, torch.bfloat16)
    assert narrow_structure == structure
    assert narrow == folds
    for fold, other in zip(folds, narrow, strict=True):
        assert torch.equal(fold.channels, other.channels)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folding_and_folding_the_inverse_is_the_identity(name):
    block, *_, folds = _folded(name)
    parameters = _parameters(block)
    for fold in folds:
        scale = _scale(fold)
        there = parameters | fold.apply(parameters, scale)
        back = there | fold.apply(there, 1 / scale)
        for path, value in back.items():
            torch.testing.assert_close(value, parameters[path], rtol=1e-14, atol=1e-14)


def test_grouped_query_heads_share_the_scales_of_their_value_head():
    *_, folds = _folded("llama")
    fold = next(fold for fold in folds if fold.group == 1)
    channel = torch.arange(HIDDEN)
    assert torch.equal(fold.channels, channel // HEAD // 2 * HEAD + channel % HEAD)
    (part,) = fold.producer
    assert torch.equal(part.rows, torch.arange(2 * HEAD))


VALUE_ROWS = {
    "gpt2": lambda d: 2 * HIDDEN + d,
    "phi3": lambda d: 6 * HEAD + d,
    "gpt_neox": lambda d: d // HEAD * 3 * HEAD + 2 * HEAD + d % HEAD,
    "bloom": lambda d: d // HEAD * 3 * HEAD + 2 * HEAD + d % HEAD,
    "falcon": lambda d: 5 * HEAD + d,
}


@pytest.mark.parametrize("name", VALUE_ROWS)
def test_value_rows_of_fused_projections(name):
    *_, folds = _folded(name)
    fold = next(fold for fold in folds if fold.group == 1)
    expected = torch.tensor([VALUE_ROWS[name](d) for d in range(fold.n_free)])
    assert torch.equal(fold.producer[0].rows, expected)
    assert {part.parameter.rpartition(".")[2] for part in fold.producer} <= {"weight", "bias"}


@pytest.mark.parametrize(("name", "half"), [("phi3", slice(48, 96)), ("mixtral", slice(48, 96))])
def test_only_the_up_half_of_a_fused_gate_folds_down(name, half):
    *_, folds = _folded(name)
    rows = next(fold for fold in folds if fold.group == 3).producer[0].rows
    assert torch.equal(rows, torch.arange(96)[half])


def test_norms_that_store_w_minus_1_are_told_from_those_that_store_w():
    for name, offset in (("llama", 0.0), ("gemma2", 1.0)):
        *_, folds = _folded(name)
        assert {part.offset for fold in folds if fold.kind == "norm" for part in fold.producer} == {offset}


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("opt", {"activation_function": "gelu"}, _PLAIN),
        ("opt", {"do_layer_norm_before": False}, [("linear", 1, False), ("linear", 3, False)]),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}, _GATED[:3]),
        ("falcon", {"multi_query": False, "alibi": True, "parallel_attn": False, "bias": True}, _PLAIN),
        (
            "stablelm",
            {"use_parallel_residual": True, "qk_layernorm": True},
            [("norm", 0, False), ("linear", 1, True), ("linear", 2, False)],
        ),
        ("llama", {"attn_implementation": "eager"}, _GATED),
    ],
)
def test_variants(name, overrides, expected):
    block, call, hidden, _, folds = _folded(name, **overrides)
    assert [(fold.kind, fold.group, fold.grouped) for fold in folds] == expected
    for fold in folds:
        assert _error(block, call, hidden, fold.apply(_parameters(block), _scale(fold))) <= 1e-6


def test_the_norm_of_a_mixture_folds_over_router_and_all_experts_only():
    block, call, hidden, structure, folds = _folded("mixtral")
    fold = next(fold for fold in folds if fold.group == 2)
    assert fold.extra_groups == tuple(range(4, 18, 2))
    names = [ref.name for ref in fold.consumers]
    assert names == [*(f"mlp.experts.gate_up_proj[{expert}]" for expert in range(8)), *structure.excluded]
    without_router = replace(fold, consumers=fold.consumers[:-1])
    assert _error(block, call, hidden, without_router.apply(_parameters(block), _scale(fold))) > 1e-4


def test_the_block_and_its_parameters_are_left_alone():
    block, call, hidden, structure = _traced("mixtral")
    before = copy.deepcopy(block.state_dict())
    parameters = dict(block.named_parameters())
    for fold in find_folds(block, call, hidden, structure):
        fold.apply(parameters, _scale(fold))
    after = block.state_dict()
    assert after.keys() == before.keys()
    assert all(
        torch.equal(after[path], before[path]) and after[path].dtype == before[path].dtype for path in after
    )
    assert all(value is parameters[path] for path, value in block.named_parameters())


def test_the_final_proof_refuses_a_fold_that_is_slightly_wrong():
    block, call, hidden, structure, folds = _folded("mixtral")
    assert _preserves_output(block, call, hidden, structure, list(folds))
    for fold in folds[:4]:
        assert _preserves_output(block, call, hidden, structure, [fold])
        swapped = fold.channels.clone()
        swapped[:2] = swapped[:2].flip(0)
        fewer = replace(fold, consumers=fold.consumers[1:])
        for wrong in (replace(fold, channels=swapped), replace(fold, producer=()), fewer):
            assert not _preserves_output(block, call, hidden, structure, [*folds[5:], wrong])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_keep_the_dtype_of_the_parameters(dtype):
    block, *_, folds = _folded("gemma2")
    parameters = {path: value.to(dtype) for path, value in _parameters(block).items()}
    for fold in folds:
        changed = fold.apply(parameters, _scale(fold).float())
        assert {value.dtype for value in changed.values()} == {dtype}


@pytest.mark.parametrize(
    "bad",
    [
        torch.ones(3),
        torch.zeros(HIDDEN),
        -torch.ones(HIDDEN),
        torch.full((HIDDEN,), torch.nan),
        torch.full((HIDDEN,), torch.inf),
    ],
)
def test_scales_that_are_no_scales_are_refused(bad):
    block, *_, folds = _folded("llama")
    with pytest.raises(NumericsError, match=f"fold of group 0: scales must be {HIDDEN} finite numbers > 0"):
        folds[0].apply(_parameters(block), bad)


class _Mlp(nn.Module):
    """up -> `between` -> down with a residual, and `leak(up's output)` added to the output."""

    def __init__(self, between, leak=None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.vector = nn.Parameter(torch.ones(8))
        self.between, self.leak = between, leak
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, hidden):
        up = self.up(hidden)
        output = hidden + self.down(self.between(up))
        return output if self.leak is None else output + self.leak(up)


def _toy_folds(between, leak=None, shape=(2, 8, 8)):
    block = _Mlp(between, leak)
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return find_folds(block, CALL, hidden, trace_block(block, CALL, hidden))


LINEAR = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky relu": lambda x: F.leaky_relu(x, 0.1),
    "absolute value": torch.abs,
    "permutation": lambda x: x.flip(-1),
    "mixing tokens": lambda x: x.cumsum(dim=-2),
    "in float32": lambda x: F.relu(x.float()).to(x.dtype),
    "twice the same channel": lambda x: torch.cat((x[..., :4], x[..., :4]), dim=-1),
}
NOT_LINEAR = {
    "gelu": F.gelu,
    "silu": F.silu,
    "square": torch.square,
    "clamp beyond what the weights reach": lambda x: x.clamp(-30, 30),
    "added constant": lambda x: x + 0.01,
    "mixing channels": lambda x: x.cumsum(dim=-1),
    "normalization": lambda x: F.rms_norm(x, (8,)),
    "softmax": lambda x: x.softmax(dim=-1),
    "a permutation that depends on the size": lambda x: x.flip(-1) if x.abs().max() > 100 else x,
    "partly constant": lambda x: torch.cat((x[..., :4], torch.ones_like(x[..., :4])), dim=-1),
}


@pytest.mark.parametrize("path", LINEAR)
def test_homogeneous_paths_are_offered(path):
    assert [(fold.kind, fold.group) for fold in _toy_folds(LINEAR[path])] == [("linear", 1)]


@pytest.mark.parametrize("path", NOT_LINEAR)
def test_other_paths_are_refused(path):
    assert _toy_folds(NOT_LINEAR[path]) == ()


def test_a_producer_that_also_reaches_the_output_is_refused():
    assert _toy_folds(F.relu, leak=lambda up: 1e-3 * up) == ()


def test_a_leak_too_small_for_the_tolerance_is_refused_all_the_same():
    assert _toy_folds(F.relu, leak=lambda up: 1e-7 * up) == ()


def test_one_token_is_enough_where_noise_of_one_sign_leaves_channels_dead():
    assert [(fold.kind, fold.group) for fold in _toy_folds(F.relu, shape=(1, 1, 8))] == [("linear", 1)]


class _Two(nn.Module):
    """Two weights side by side on both ends."""

    def __init__(self, between):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.c, self.d = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.between = between
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, hidden):
        left, right = self.between(self.a(hidden), self.b(hidden))
        return hidden + self.c(left) * self.d(right)


def _two_folds(between):
    block = _Two(between)
    hidden = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1))
    return find_folds(block, CALL, hidden, trace_block(block, CALL, hidden))


def test_of_two_producers_the_last_one_is_chosen():
    def product(a, b):
        return (x := a * b), x

    (fold,) = _two_folds(product)
    assert [part.parameter for part in fold.producer] == ["b.weight"]
    assert [ref.name for ref in fold.consumers] == ["c.weight", "d.weight"]


def test_readers_that_disagree_about_the_channels_are_refused():
    assert [fold.extra_groups for fold in _two_folds(lambda a, b: (b + 0, b + 0))] == [(2,)]
    assert _two_folds(lambda a, b: (b + 0, b.flip(-1))) == ()


def test_channels_of_a_permutation_and_of_a_repetition():
    (fold,) = _toy_folds(LINEAR["permutation"])
    assert torch.equal(fold.channels, torch.arange(7, -1, -1))
    assert not fold.grouped
    (fold,) = _toy_folds(LINEAR["twice the same channel"])
    assert torch.equal(fold.channels, torch.arange(8) % 4)
    assert fold.n_free == 4
    assert fold.grouped


def test_zeros_in_trained_weights_do_not_hide_where_they_lead():
    model, config = tiny_model("opt")
    block = find_blocks(model)[1][0]
    with torch.no_grad():
        hidden, calls = capture_calls(model, tokens(config))
        block.final_layer_norm.weight[3:9] = 0
        block.final_layer_norm.bias[3:9] = 0
        block.fc1.weight[:5] = 0
        block.fc1.bias[:8] = -1e6  # dead units
    structure = trace_block(block, calls[0], hidden)
    folds = find_folds(block, calls[0], hidden, structure)
    assert [(fold.kind, fold.group, fold.grouped) for fold in folds] == EXPECTED["opt"]
    assert folds[3].n_free == 48
