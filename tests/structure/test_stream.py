"""Readers, writers and value paths of every architecture are the known ones."""

import pytest
import torch

from qbench.errors import StructureError
from qbench.structure.blocks import capture_calls, find_blocks
from qbench.structure.online import HadamardTransform, attach
from qbench.structure.stream import find_stream_sites, require_addition
from tests.architectures import ARCHITECTURES, HIDDEN, tiny_model, tokens

_LLAMA = (
    {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"},
    {"self_attn.o_proj", "mlp.down_proj"},
)
KNOWN = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "stablelm", "olmo2"), _LLAMA),
    "phi": ({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"}, {"self_attn.dense", "mlp.fc2"}),
    "phi3": ({"self_attn.qkv_proj", "mlp.gate_up_proj"}, {"self_attn.o_proj", "mlp.down_proj"}),
    "opt": ({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "fc1"}, {"self_attn.out_proj", "fc2"}),
    "gpt2": ({"attn.c_attn", "mlp.c_fc"}, {"attn.c_proj", "mlp.c_proj"}),
    "gpt_neox": ({"attention.query_key_value", "mlp.dense_h_to_4h"}, {"attention.dense", "mlp.dense_4h_to_h"}),
    "bloom": (
        {"self_attention.query_key_value", "mlp.dense_h_to_4h"},
        {"self_attention.dense", "mlp.dense_4h_to_h"},
    ),
    "falcon": (
        {"self_attention.query_key_value", "mlp.dense_h_to_4h"},
        {"self_attention.dense", "mlp.dense_4h_to_h"},
    ),
    "starcoder2": (
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.c_fc"},
        {"self_attn.o_proj", "mlp.c_proj"},
    ),
    "mixtral": (
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.experts.gate_up_proj", "mlp.gate"},
        {"self_attn.o_proj", "mlp.experts.down_proj"},
    ),
}
NORM_BEHIND = {"gemma2", "gemma3_text", "olmo2"}


@torch.no_grad()
def _sites(name, **overrides):
    model, config = tiny_model(name, **overrides)
    _, calls = capture_calls(model, tokens(config))
    block = find_blocks(model)[1][0]
    hidden = torch.randn(2, 8, config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(0))
    return block, calls[0], hidden, find_stream_sites(block, calls[0], hidden)


def _modules(refs):
    return {ref.parameter.removesuffix(".weight") for ref in refs}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_readers_and_writers_are_the_known_ones(name):
    *_, sites = _sites(name)
    readers, writers = KNOWN[name]
    assert _modules(sites.readers) == readers
    assert _modules(sites.writers) == writers
    assert sites.width == HIDDEN
    if name == "mixtral":
        assert sum(ref.index is not None for ref in sites.readers) == 8
        assert sum(ref.index is not None for ref in sites.writers) == 8
    # Every reader stands behind a norm of the stream, but for the architecture that has none there.
    assert sites.norms.keys() == ({ref.name for ref in sites.readers} if name != "olmo2" else set())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_values_reach_the_output_head_by_head(name):
    *_, sites = _sites(name)
    path = sites.values
    assert path.output == next(ref for ref in sites.writers if "mlp" not in ref.name and "fc" not in ref.name)
    assert (path.head_dim, path.heads) == (8, 4)
    kv_heads = {"opt": 4, "gpt2": 4, "gpt_neox": 4, "bloom": 4, "phi": 4, "falcon": 1}.get(name, 2)
    assert len(path.rows) == 8 * kv_heads
    assert _modules(sites.downs) == _modules(sites.writers) - {path.output.parameter.removesuffix(".weight")}
    # Fused query, key and value: the value's rows come last, or last of every head.
    if name == "gpt_neox":
        assert torch.equal(path.rows, torch.cat([torch.arange(16, 24) + 24 * head for head in range(4)]))
    elif path.value.out_features > len(path.rows):
        assert torch.equal(path.rows, torch.arange(path.value.out_features)[-len(path.rows) :]) or name == "bloom"


def test_head_sizes_are_those_of_attention_and_not_of_the_width():
    *_, sites = _sites("qwen3", head_dim=12, hidden_size=36)
    assert (sites.values.head_dim, sites.values.heads, sites.key_dim) == (12, 4, 12)


def test_a_gated_product_is_no_path_of_values():
    """Its channels can be scaled as a head's can, but not mixed: it is not taken where values have no path."""
    block, call, hidden, sites = _sites("llama")
    assert sites.values.output.name == "self_attn.o_proj.weight"
    attach(block, "self_attn.o_proj.weight", HadamardTransform(32))
    assert find_stream_sites(block, call, hidden).values is None


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_norms_behind_a_writer_are_refused(name):
    block, call, hidden, sites = _sites(name)
    if name in NORM_BEHIND:
        with pytest.raises(StructureError, match=r"^the output of self_attn.o_proj.weight passes a norm before"):
            require_addition(block, call, hidden, sites)
    else:
        require_addition(block, call, hidden, sites)
