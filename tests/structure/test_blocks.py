"""Running a model block by block computes what the model computes."""

import pytest
import torch

from qbench.structure.blocks import capture_calls, find_blocks, finish
from tests.architectures import ARCHITECTURES, tiny_model, tokens


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_blocks_one_by_one_equal_the_model(name):
    model, config = tiny_model(name)
    input_ids = tokens(config, length=12)
    hidden, calls = capture_calls(model, input_ids)
    path, blocks = find_blocks(model)
    assert model.get_submodule(path) is blocks
    assert len(calls) == len(blocks) == config.num_hidden_layers
    for block, call in zip(blocks, calls, strict=True):
        hidden = call(block, hidden)
    assert torch.equal(finish(model, hidden, input_ids), model(input_ids).logits)
