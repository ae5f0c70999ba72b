"""The trace of a block finds every linear weight, what reads the same input, and the moment it is read."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qbench.errors import StructureError
from qbench.structure.blocks import BlockCall, capture_calls, find_blocks
from qbench.structure.trace import LinearTap, trace_block
from tests.architectures import ARCHITECTURES, HIDDEN, randomize, tiny_model, tokens

HEAD = HIDDEN // 4


def _first_block(model, config, **kwargs):
    with torch.no_grad():
        hidden, calls = capture_calls(model, tokens(config, **kwargs))
    return find_blocks(model)[1][0], calls[0], hidden


def _traced(name, **overrides):
    model, config = tiny_model(name, **overrides)
    block, call, hidden = _first_block(model, config)
    return block, call, hidden, trace_block(block, call, hidden)


def _weights(structure):
    return [ref for group in structure.groups for ref in group.weights]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_matrix_is_in_one_group_or_excluded(name):
    block, _, _, structure = _traced(name)
    matrices = set()
    for path, parameter in block.named_parameters():
        if parameter.ndim == 2:
            matrices.add(path)
        elif parameter.ndim == 3:
            matrices |= {f"{path}[{index}]" for index in range(parameter.shape[0])}
    found = [ref.name for ref in (*_weights(structure), *structure.routers)]
    assert sorted(found) == sorted(matrices)
    assert structure.unread == ()
    assert structure.excluded == (("mlp.gate.weight",) if name == "mixtral" else ())
    biases = {path for path, _ in block.named_parameters() if path.endswith(".bias")}
    expected = {ref.parameter.replace(".weight", ".bias") for ref in _weights(structure)} & biases
    assert {ref.bias for ref in _weights(structure) if ref.bias} == expected
    for ref in _weights(structure):
        assert ref.read(block).shape == (ref.out_features, ref.in_features)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_tap_fires_once_per_group_in_order_with_the_input_of_the_layers(name):
    block, call, hidden, structure = _traced(name)
    inputs = {}
    hooks = [
        block.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: inputs.update({f"{path}.weight": args[0]})
        )
        for path in {ref.parameter.rpartition(".")[0] for ref in _weights(structure) if ref.index is None}
    ]
    seen = []
    tap = LinearTap(block, structure, lambda group, x: seen.append((group, x.clone())))
    for repetition in range(2):
        seen.clear()
        with tap:
            output = call(block, hidden)
        if repetition == 0:
            tap.reset()
    for hook in hooks:
        hook.remove()
    assert torch.equal(output, call(block, hidden))
    order = [group.index for group, _ in seen]
    assert order == sorted(set(order))
    assert tap.fired == set(order)
    assert all(
        group.weights[0].index is not None for group in structure.groups if group.index not in tap.fired
    )
    for group, x in seen:
        assert x.shape[-1] == group.in_features
        for ref in group.weights:
            if ref.index is None:
                assert torch.equal(x.flatten(0, -2), inputs[ref.parameter].flatten(0, -2))


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_weights_written_by_the_tap_are_the_ones_the_forward_uses(name):
    """Rewriting each group when its input arrives equals a forward of a block that was rewritten before."""
    block, call, hidden, structure = _traced(name)
    rewritten = copy.deepcopy(block)
    for ref in _weights(structure):
        ref.write(rewritten, ref.read(rewritten).neg() + 0.01)
    expected = call(rewritten, hidden)
    before = call(block, hidden)

    def rewrite(group, x):
        for ref in group.weights:
            ref.write(block, ref.read(block).neg() + 0.01)

    with LinearTap(block, structure, rewrite):
        output = call(block, hidden)
    assert torch.equal(output, expected)
    assert not torch.allclose(output, before, atol=1e-2)


@torch.no_grad()
def test_an_expert_reads_the_tokens_routed_to_it():
    block, call, hidden, structure = _traced("mixtral")
    arriving = []
    hook = block.mlp.register_forward_pre_hook(lambda _, args: arriving.append(args[0].flatten(0, -2)))
    inputs = {}
    with LinearTap(block, structure, lambda group, x: inputs.update({group.weights[0].name: x})):
        call(block, hidden)
    hook.remove()
    chosen = block.mlp.gate(arriving[0])[2]
    for expert in range(8):
        routed = arriving[0][(chosen == expert).any(dim=-1)]
        if len(routed):
            x = inputs[f"mlp.experts.gate_up_proj[{expert}]"]
            assert sorted(x.tolist()) == sorted(routed.tolist())


def test_experts_without_tokens_are_found_by_symmetry():
    model, config = tiny_model("mixtral")
    some = trace_block(*_first_block(model, config, batch=1, length=1))
    everything = trace_block(*_first_block(model, config, batch=4, length=16))
    assert some == everything
    assert len(some.groups) == 2 + 2 * 8


SCOPES = {
    "llama": [("self_attn",), ("self_attn.o_proj",), ("mlp",), ("mlp.down_proj",)],
    "falcon": [("self_attention", "mlp"), ("self_attention.dense",), ("mlp.dense_4h_to_h",)],
    "opt": [("self_attn",), ("self_attn.out_proj",), ("fc1",), ("fc2",)],
    "gpt2": [("attn",), ("attn.c_proj",), ("mlp",), ("mlp.c_proj",)],
    "phi": [("self_attn", "mlp"), ("self_attn.dense",), ("mlp.fc2",)],
    "mixtral": [("self_attn",), ("self_attn.o_proj",), ("mlp.experts",), ("mlp.experts",)],
}


@pytest.mark.parametrize("name", SCOPES)
def test_scopes(name):
    structure = _traced(name)[3]
    assert [group.scopes for group in structure.groups[: len(SCOPES[name])]] == SCOPES[name]


# Rows of fused projections whose output is a query or a key, by the layouts that their authors chose.
FUSED = {
    "gpt2": lambda row: row < 2 * HIDDEN,
    "phi3": lambda row: row < 4 * HEAD + 2 * HEAD,
    "gpt_neox": lambda row: row // HEAD % 3 < 2,
    "bloom": lambda row: row // HEAD % 3 < 2,
    "falcon": lambda row: row < (4 + 1) * HEAD,
}


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_query_and_key_rows(name, attention):
    structure = _traced(name, **({"attn_implementation": attention} if attention else {}))[3]
    fused = FUSED.get(name, lambda row: False)
    for group in structure.groups:
        for ref in group.weights:
            fed = any(part in ref.name for part in ("q_proj", "k_proj"))
            if any(part in ref.name for part in ("c_attn", "qkv_proj", "query_key_value")):
                expected = torch.tensor([fused(row) for row in range(ref.out_features)])
            else:
                expected = torch.full((ref.out_features,), fed)
            assert torch.equal(group.query_key_rows[ref.name], expected), ref.name


def test_a_shared_expert_is_ordered_by_its_own_use_and_not_by_the_router_s():
    settings = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 2,
        "vocab_size": 97,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
    config = AutoConfig.for_model("deepseek_v3", **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    randomize(model, torch.Generator().manual_seed(0))
    block, call, hidden = _first_block(model, config)
    structure = trace_block(block, call, hidden)
    order = []
    with torch.no_grad(), LinearTap(block, structure, lambda group, x: order.append(group.index)):
        call(block, hidden)
    assert order == sorted(order)
    assert structure.excluded == ("mlp.gate.weight",)
    assert "mlp.shared_experts.up_proj.weight" in [ref.name for ref in _weights(structure)]
    # Latent queries and keys reach the scores through a second projection; so does the latent of the values.
    rows = {
        name: int(found.sum()) for group in structure.groups for name, found in group.query_key_rows.items()
    }
    assert rows["self_attn.q_a_proj.weight"] == 16
    assert rows["self_attn.kv_b_proj.weight"] == 4 * 8


def test_grouped_expert_kernels_are_refused():
    model, config = tiny_model("mixtral")
    block, call, hidden = _first_block(model, config)
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(StructureError, match="gate_up_proj: no linear operation reads slices"):
        trace_block(block, call, hidden)


class _Toy(nn.Module):
    """A block whose forward is given; its weights: one matrix, three batched experts `[experts, in, out]`."""

    def __init__(self, compute):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(4, 4, generator=generator))
        self.experts = nn.Parameter(torch.randn(3, 4, 6, generator=generator))
        self.compute = compute

    def forward(self, hidden):
        return self.compute(self, hidden)


CALL = BlockCall(args=(), kwargs={})


@pytest.mark.parametrize("product", [torch.bmm, torch.matmul, torch.Tensor.bmm, lambda x, w: x @ w])
def test_a_batched_product_reads_one_weight_per_expert(product):
    block = _Toy(lambda self, x: product(x, self.experts))
    hidden = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    structure = trace_block(block, CALL, hidden)
    assert structure.unread == ("matrix",)
    inputs = {}
    with torch.no_grad(), LinearTap(block, structure, lambda group, x: inputs.update({group.index: x})):
        output = CALL(block, hidden)
    for index, group in enumerate(structure.groups):
        (ref,) = group.weights
        assert ref.name == f"experts[{index}]"
        torch.testing.assert_close(inputs[index] @ ref.read(block).T, output[index])


FORMS = {
    "F.linear": (lambda x, w: nn.functional.linear(x, w), False),
    "linear, keywords": (lambda x, w: nn.functional.linear(weight=w, input=x), False),
    "x @ w": (lambda x, w: x @ w, True),
    "x @ w.T": (lambda x, w: x @ w.T, False),
    "x.matmul(w.t())": (lambda x, w: x.matmul(w.t()), False),
    "torch.matmul(x, w.mT)": (lambda x, w: torch.matmul(x, w.mT), False),
    "torch.mm": (lambda x, w: torch.mm(x.flatten(0, 1), w).view(x.shape), True),
    "Tensor.mm": (lambda x, w: x.flatten(0, 1).mm(w).view(x.shape), True),
    "torch.addmm": (lambda x, w: torch.addmm(w[0], x.flatten(0, 1), w).view(x.shape), True),
    "F.linear(x, w.T)": (lambda x, w: nn.functional.linear(x, w.T), True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_linear_operation(form):
    operation, transposed = FORMS[form]
    block = _Toy(lambda self, x: operation(x, self.matrix))
    del block.experts
    hidden = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    (group,) = trace_block(block, CALL, hidden).groups
    assert [(ref.name, ref.transposed) for ref in group.weights] == [("matrix", transposed)]


def test_a_weight_with_two_inputs_is_refused():
    block = _Toy(lambda self, x: x @ self.matrix + (x + 1) @ self.matrix)
    del block.experts
    with pytest.raises(StructureError, match="matrix: is read with two different inputs"):
        trace_block(block, CALL, torch.ones(1, 2, 4))


def test_inputs_that_only_look_alike_are_told_apart():
    """A freed input's memory may be reused, and an input may be changed in place between two reads."""

    def compute(self, x):
        first = x.clone()
        y = first @ self.matrix
        first.add_(1)
        return y + first @ self.other

    block = _Toy(compute)
    del block.experts
    block.other = nn.Parameter(torch.ones(4, 4))
    structure = trace_block(block, CALL, torch.ones(1, 2, 4))
    assert [[ref.name for ref in group.weights] for group in structure.groups] == [["matrix"], ["other"]]

    block.many = nn.ParameterList(torch.ones(4, 4) for _ in range(20))
    block.requires_grad_(False)  # else autograd keeps the inputs
    block.compute = lambda self, x: sum((x + i) @ weight for i, weight in enumerate(self.many))
    assert len(trace_block(block, CALL, torch.ones(1, 2, 4)).groups) == 20


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_trace_does_not_depend_on_the_caller_s_gradient_mode_and_changes_nothing(mode):
    model, config = tiny_model("llama")
    block, call, hidden = _first_block(model, config)
    before = copy.deepcopy(block.state_dict())
    with mode():
        structure = trace_block(block, call, hidden)
    assert structure == trace_block(block, call, hidden)
    assert bool(structure.groups[0].query_key_rows["self_attn.q_proj.weight"].all())
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert all(parameter.grad is None for parameter in block.parameters())
    assert not any(module._forward_pre_hooks for module in block.modules())
