"""The ledger and the decoded weights, and the bytes of what is not quantized."""

import pytest
import torch

from qbench.engine.passes import run_pass
from qbench.engine.sinks import Ledger, parameter_bytes
from qbench.engine.source import MemorySource
from qbench.structure.blocks import find_blocks
from tests.architectures import tiny_model, tokens
from tests.engine.helpers import recipe


def _result(algorithm="rtn", **options):
    model, config = tiny_model("llama")
    return model, run_pass(MemorySource(model), recipe(algorithm, **options), tokens(config, batch=4, length=12))


def test_weights_are_inside_the_model_only_while_wanted():
    model, result = _result()
    before = {path: value.clone() for path, value in model.state_dict().items()}
    storage = {path: value.data_ptr() for path, value in model.named_parameters()}
    changed = "model.layers.0.mlp.up_proj.weight"
    with result.weights.inside(model) as same:
        assert same is model
        for path, value in result.weights.tensors.items():
            assert torch.equal(model.get_parameter(path), value)
        assert not torch.equal(model.get_parameter(changed), before[changed])
    with pytest.raises(RuntimeError, match="on purpose"), result.weights.inside(model):
        raise RuntimeError("on purpose")
    for path, value in model.state_dict().items():
        assert torch.equal(value, before[path])
    assert {path: value.data_ptr() for path, value in model.named_parameters()} == storage


def test_the_digest_of_a_run_changes_with_any_code_and_with_nothing_else():
    digests = {
        name: _result(**options)[1].ledger.codes_sha256
        for name, options in {
            "once": {},
            "again": {},
            "bits": {"bits": 4},
            "symmetric": {"symmetric": True},
            "group": {"group_size": 16},
            "scale": {"scale": "bfloat16"},
            "gptq": {"algorithm": "gptq"},
        }.items()
    }
    assert digests.pop("again") == digests["once"]
    assert len(set(digests.values())) == len(digests)
    assert Ledger().codes_sha256 == Ledger().codes_sha256


def test_bits_of_a_run_are_counted_by_hand():
    """Two llama blocks: q and o 32 x 32, k and v 16 x 32, three of 48 x 32; 3 bits, groups of 8, float16 scales."""
    _, result = _result()
    per_block = 32 * 32 + 16 * 32 + 16 * 32 + 32 * 32 + 3 * 48 * 32
    assert result.ledger.weight_count == 2 * per_block
    assert result.ledger.weight_bits == 2 * per_block * 3 + 2 * per_block // 8 * (16 + 3)


def test_an_order_of_columns_is_part_of_the_bits():
    _, plain = _result("gptq", gptq={"act_order": False})
    _, ordered = _result("gptq", gptq={"act_order": True})
    _, static = _result("gptq", gptq={"act_order": True, "static_groups": True})
    columns = 2 * (6 * 32 + 48)  # in_features of q, k, v, o, gate, up; down
    assert ordered.ledger.weight_bits == plain.ledger.weight_bits + 32 * columns
    assert static.ledger.weight_bits == plain.ledger.weight_bits


def test_bytes_outside_the_blocks_count_tied_parameters_once():
    tied, _ = tiny_model("llama")
    untied, _ = tiny_model("llama", tie_word_embeddings=False)
    prefix, blocks = find_blocks(tied)
    inside = sum(p.numel() for p in blocks.parameters())
    for model, head in ((tied, 0), (untied, 97 * 32)):
        for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
            sizes = parameter_bytes(model, prefix, dtype)
            assert sizes == {
                "embedding": 97 * 32 * width,
                "head": head * width,
                "blocks": inside * width,
                "other": 32 * width,
            }
            assert sum(sizes.values()) == width * sum(p.numel() for p in model.parameters())
