"""A model in memory and its checkpoint on disk cannot be told apart by what follows."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qbench.engine.passes import run_pass
from qbench.engine.source import Checkpoint, MemorySource, StreamSource
from qbench.errors import AssetError, StructureError
from qbench.evaluation.perplexity import stream_nll, window_nll
from qbench.models.load import load_config, load_model, meta_model
from qbench.structure.blocks import find_blocks
from tests.architectures import ARCHITECTURES, tiny_model, tokens
from tests.engine.helpers import comparable, recipe, tiny_asset, tiny_windows

CPU = torch.device("cpu")

# transformers writes tensors of these under other names than the model's.
RENAMED = ("mixtral", "gpt_neox")


def _tiny(dtype=torch.float32):
    asset = tiny_asset()
    memory = MemorySource(load_model(asset, dtype=dtype, device=CPU))
    return memory, StreamSource(asset.path, meta_model(load_config(asset), dtype=dtype), dtype, CPU)


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "awq"])
def test_both_sources_give_the_same_codes_and_perplexities(algorithm):
    memory, stream = _tiny()
    calibration, windows = tiny_windows(8, 64), tiny_windows(6, 96, skip=4000)
    wanted = recipe(algorithm, bits=3, group_size=32)
    one = run_pass(memory, wanted, calibration)
    other = run_pass(stream, wanted, calibration, evaluations=(windows,), keep_weights=False)
    assert comparable(one.ledger) == comparable(other.ledger)
    assert other.weights.tensors == {}
    with one.weights.inside(memory.model):
        expected = window_nll(memory.model, windows)
    found = stream_nll(stream, other.evaluations[0], windows)
    assert torch.allclose(found, expected, rtol=1e-6)
    assert found.mean() > window_nll(memory.model, windows).mean() + 0.01


def test_full_precision_streams_to_the_same_perplexity():
    memory, stream = _tiny()
    windows = tiny_windows(5, 70)
    result = run_pass(stream, None, None, evaluations=(windows,))
    found = stream_nll(stream, result.evaluations[0], windows)
    assert torch.allclose(found, window_nll(memory.model, windows), rtol=1e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_and_shell_hold_the_checkpoints_values(name, tmp_path):
    model, config = tiny_model(name)
    ids = tokens(config)
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path)
    if name in RENAMED:
        with pytest.raises(StructureError, match="use source=memory"):
            StreamSource(tmp_path, meta_model(config), torch.float32, CPU)
        return
    source = StreamSource(tmp_path, meta_model(config), torch.float32, CPU)
    assert source.count == MemorySource(model).count
    for index in range(source.count):
        wanted = MemorySource(model).block(index)
        for (path, value), other in zip(source.block(index).named_parameters(), wanted.parameters(), strict=True):
            assert torch.equal(value, other), path
    result = run_pass(source, None, None, evaluations=(ids,))
    nll = stream_nll(source, result.evaluations[0], ids)
    logp = expected[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    assert torch.allclose(nll, -logp.double().mean(1), rtol=1e-5)


def test_at_most_the_shell_or_one_block_is_in_memory():
    _, source = _tiny()

    def held():
        return sorted(name for name, p in source.model.named_parameters() if not p.is_meta)

    assert held() == []
    with source.shell() as model:
        assert held() == ["model.embed_tokens.weight", "model.norm.weight"]
        assert model.lm_head.weight is model.model.embed_tokens.weight  # tied: read once
    assert held() == []
    block = source.block(2)
    assert not any(p.is_meta for p in block.parameters())
    assert held() == []
    with pytest.raises(RuntimeError, match="inside"), source.shell():
        raise RuntimeError("inside")
    assert held() == []


def test_blocks_of_a_model_in_memory_are_copies():
    memory, _ = _tiny()
    block = memory.block(0)
    for parameter in block.parameters():
        assert not parameter.requires_grad
        parameter.zero_()
    assert all(bool(p.any()) for p in find_blocks(memory.model)[1][0].parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_read_in_the_wanted_dtype(dtype):
    memory, stream = _tiny(dtype)
    for found, wanted in zip(stream.block(1).parameters(), memory.block(1).parameters(), strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, wanted)


def _sharded(folder):
    """The tiny checkpoint in two shards with an index."""
    tensors = load_file(tiny_asset().path / "model.safetensors")
    shutil.copy(tiny_asset().path / "config.json", folder)
    where = {}
    for part, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        file = f"model-{part}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        where |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return tensors


def test_a_sharded_checkpoint_is_read_by_its_index(tmp_path):
    tensors = _sharded(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names == tensors.keys()
    assert all(torch.equal(checkpoint.read(name), value) for name, value in tensors.items())


def test_damage_is_one_line_that_names_the_file_and_the_tensor(tmp_path):
    _sharded(tmp_path)
    shard = tmp_path / "model-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    source = StreamSource(tmp_path, meta_model(load_config(tiny_asset())), torch.float32, CPU)
    with pytest.raises(AssetError, match=r"model-1\.safetensors: cannot read model\.layers") as refused:
        [source.block(index) for index in range(4)]
    assert "\n" not in str(refused.value)


def test_a_checkpoint_that_lacks_a_tensor_or_is_none_is_refused(tmp_path):
    config = load_config(tiny_asset())
    with pytest.raises(AssetError, match="no safetensors weights"):
        StreamSource(tmp_path, meta_model(config), torch.float32, CPU)
    tensors = load_file(tiny_asset().path / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(StructureError, match=r"model\.layers\.2\.mlp\.up_proj\.weight \(1 missing\)"):
        StreamSource(tmp_path, meta_model(config), torch.float32, CPU)
