"""Running a model block by block computes what the model computes."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qbench.errors import StructureError
from qbench.structure.blocks import BlockCall, capture_calls, find_blocks, finish
from tests.architectures import ARCHITECTURES, tiny_model, tokens

# Models whose blocks return a tensor and models whose blocks return a tuple.
SINGLE = {"llama": "num_hidden_layers", "bloom": "n_layer", "falcon": "num_hidden_layers"}


def _run_blocks(model, input_ids):
    hidden, calls = capture_calls(model, input_ids)
    _, blocks = find_blocks(model)
    for block, call in zip(blocks, calls, strict=True):
        hidden = call(block, hidden)
    return finish(model, hidden, input_ids)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_blocks_one_by_one_equal_the_model(name):
    model, config = tiny_model(name)
    input_ids = tokens(config, length=12)
    expected = model(input_ids).logits
    path, blocks = find_blocks(model)
    assert model.get_submodule(path) is blocks
    assert len(blocks) == config.num_hidden_layers
    torch.testing.assert_close(_run_blocks(model, input_ids), expected, rtol=1e-6, atol=1e-6)
    assert all("forward" not in vars(block) for block in blocks)


@pytest.mark.parametrize("name", SINGLE)
@torch.no_grad()
def test_a_single_block_equals_the_model(name):
    model, config = tiny_model(name, **{SINGLE[name]: 1})
    input_ids = tokens(config, batch=1)
    assert torch.equal(_run_blocks(model, input_ids), model(input_ids).logits)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "gpt2", "mixtral"])
@torch.no_grad()
def test_blocks_may_be_on_the_meta_device(name):
    model, config = tiny_model(name)
    input_ids = tokens(config)
    hidden, calls = capture_calls(model, input_ids)
    logits = finish(model, hidden, input_ids)
    find_blocks(model)[1].to("meta")
    bare, bare_calls = capture_calls(model, input_ids)
    assert torch.equal(bare, hidden)
    assert torch.equal(finish(model, hidden, input_ids), logits)
    assert [call.kwargs.keys() for call in bare_calls] == [call.kwargs.keys() for call in calls]


@torch.no_grad()
def test_calls_differ_where_layers_differ():
    model, config = tiny_model("gemma3_text")
    _, calls = capture_calls(model, tokens(config, length=12))
    local, everywhere, again = (call.kwargs["attention_mask"] for call in calls[:3])
    assert torch.equal(local, again)
    assert everywhere is None, "causal attention needs no mask"
    local, everywhere, again = (call.kwargs["position_embeddings"][0] for call in calls[:3])
    assert torch.equal(local, again)
    assert not torch.equal(local, everywhere)


@torch.no_grad()
def test_the_hidden_states_may_be_the_head_s_only_input():
    """`finish` ignores the embedding: other hidden states give other logits, the same ones the same."""
    model, config = tiny_model("llama")
    input_ids = tokens(config)
    hidden, _ = capture_calls(model, input_ids)
    expected = model.lm_head(model.model.norm(hidden + 1))
    assert torch.equal(finish(model, hidden + 1, input_ids), expected)


def test_a_call_moves_its_floating_tensors_only():
    call = BlockCall(
        args=(torch.ones(1),),
        kwargs={"rope": (torch.ones(2), None), "ids": torch.ones(1, dtype=torch.long), "n": 3},
    )
    moved = call.to(dtype=torch.float64)
    assert moved.args[0].dtype == moved.kwargs["rope"][0].dtype == torch.float64
    assert moved.kwargs["ids"].dtype == torch.long
    assert moved.kwargs["rope"][1] is None
    assert moved.kwargs["n"] == 3
    assert call.args[0].dtype == torch.float32


class _Toy(nn.Module):
    """A model of blocks with every way of going wrong."""

    def __init__(self, *, between=lambda x: x, n_called=2, decoys=()):
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=2, get_text_config=lambda: self.config)
        self.embed = nn.Embedding(5, 4)
        for path in decoys:
            self.add_module(path, nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.between, self.n_called = between, n_called

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache):
        hidden = self.embed(input_ids)
        for layer in self.layers[: self.n_called]:
            hidden = self.between(layer(input=hidden))
        return SimpleNamespace(logits=hidden)


def test_hidden_states_passed_by_keyword():
    model = _Toy()
    input_ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(_run_blocks(model, input_ids), model(input_ids, False).logits)


def test_of_several_lists_the_one_that_is_called_is_found():
    assert find_blocks(_Toy(decoys=("aaa", "zzz")))[0] == "layers"


def test_models_that_cannot_run_block_by_block_are_refused():
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(StructureError, match="hidden states are changed between blocks 0 and 1"):
        capture_calls(_Toy(between=lambda x: x + 1), ids)
    model = _Toy(n_called=1)
    with pytest.raises(StructureError, match="calls 1 of 2 blocks"):
        capture_calls(model, ids)
    assert all("forward" not in vars(block) for block in model.layers)
    model.config.num_hidden_layers = 3
    with pytest.raises(StructureError, match=r"0 module lists of 3 blocks \(none\)"):
        find_blocks(model)
