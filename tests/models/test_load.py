"""Loading: what comes back is the checkpoint and nothing else, and a model without weights is a model."""

import json
import socket
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from qbench.assets import ModelAsset, resolve_model
from qbench.errors import AssetError, NumericsError
from qbench.models.load import check_finite, load_config, load_model, load_tokenizer, meta_model
from tests.architectures import ARCHITECTURES, tiny_model, tokens


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def refuse(*_args, **_options):
        raise AssertionError("a local model asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("QBENCH_CACHE", str(tmp_path / "cache"))


def saved(folder, name="llama", **overrides) -> ModelAsset:
    model, _ = tiny_model(name, **overrides)
    model.save_pretrained(folder)
    return resolve_model(name=name, path=folder)


def error_line(call) -> str:
    with pytest.raises(AssetError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_a_loaded_model_computes_what_was_saved(tmp_path, name, capfd):
    model, config = tiny_model(name)
    model.save_pretrained(tmp_path / "m")
    asset = resolve_model(name="m", path=tmp_path / "m")
    capfd.readouterr()
    loaded = load_model(asset, dtype=torch.float32, device="cpu")
    assert capfd.readouterr() == ("", "")  # no bars, no warnings
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    ids = tokens(config)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert load_config(asset).hidden_size == loaded.config.hidden_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_rounded_to_the_dtype_once(tmp_path, dtype):
    asset = saved(tmp_path / "m")
    stored = load_file(asset.path / "model.safetensors")
    loaded = load_model(asset, dtype=dtype, device="cpu").state_dict()
    for key, value in stored.items():
        assert loaded[key].dtype == dtype
        assert torch.equal(loaded[key], value.to(dtype))


def test_soft_capped_attention_is_not_left_to_an_implementation_that_drops_the_cap(tmp_path):
    gemma = load_model(saved(tmp_path / "g", "gemma2"), dtype=torch.float32, device="cpu")
    llama = load_model(saved(tmp_path / "l", "llama"), dtype=torch.float32, device="cpu")
    assert gemma.config._attn_implementation == "eager"
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named(tmp_path, bad):
    asset = saved(tmp_path / "m")
    weights = load_file(asset.path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 2] = bad
    save_file(weights, asset.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        NumericsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: 1 of 1536 values"
    ) as error:
        load_model(asset, dtype=torch.float32, device="cpu")
    assert "\n" not in str(error.value)


def test_a_value_beyond_the_dtype_is_found_after_the_cast(tmp_path):
    asset = saved(tmp_path / "m")
    weights = load_file(asset.path / "model.safetensors")
    weights["model.norm.weight"][0] = 1e6
    save_file(weights, asset.path / "model.safetensors", {"format": "pt"})
    load_model(asset, dtype=torch.float32, device="cpu")
    with pytest.raises(NumericsError, match=r"model\.norm\.weight"):
        load_model(asset, dtype=torch.float16, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0), (3, 1, 2)])
def test_finite_tensors_of_any_kind_pass(dtype, shape):
    check_finite("w", torch.ones(shape, dtype=dtype))


def test_a_missing_weight_is_not_replaced_by_a_random_one(tmp_path):
    asset = saved(tmp_path / "m")
    weights = load_file(asset.path / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, asset.path / "model.safetensors", {"format": "pt"})
    line = error_line(lambda: load_model(asset, dtype=torch.float32, device="cpu"))
    assert "1 weights are not in the files, model.layers.0.self_attn.q_proj.weight" in line


def test_weights_of_another_shape_are_refused(tmp_path):
    asset = saved(tmp_path / "m")
    weights = load_file(asset.path / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()
    save_file(weights, asset.path / "model.safetensors", {"format": "pt"})
    assert "cannot be loaded" in error_line(lambda: load_model(asset, dtype=torch.float32, device="cpu"))


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x02garbage", b"PK\x03\x04garbage"])
def test_a_damaged_pytorch_file_is_one_line(tmp_path, content):
    asset = saved(tmp_path / "m")
    (asset.path / "model.safetensors").unlink()
    (asset.path / "pytorch_model.bin").write_bytes(content)
    assert "cannot be loaded" in error_line(lambda: load_model(asset, dtype=torch.float32, device="cpu"))


def test_a_file_damaged_after_it_was_resolved_is_one_line(tmp_path):
    asset = saved(tmp_path / "m")
    file = asset.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "cannot be loaded" in error_line(lambda: load_model(asset, dtype=torch.float32, device="cpu"))


@pytest.mark.parametrize("config", [{}, {"model_type": "no-such-model"}, {"model_type": "vit"}])
def test_a_configuration_of_no_language_model_is_one_line(tmp_path, config):
    asset = saved(tmp_path / "m")
    (asset.path / "config.json").write_text(json.dumps(config))
    line = error_line(lambda: load_model(asset, dtype=torch.float32, device="cpu"))
    assert line.startswith(f"model m in {asset.path}: ")


def test_a_missing_or_damaged_tokenizer_is_one_line(tmp_path):
    asset = saved(tmp_path / "m")
    assert "the tokenizer cannot be loaded" in error_line(lambda: load_tokenizer(asset))
    (asset.path / "tokenizer.json").write_text("{")
    (asset.path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert "the tokenizer cannot be loaded" in error_line(lambda: load_tokenizer(asset))


# Models without weights


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_meta_model_with_the_weights_put_in_is_the_model(name):
    real, config = tiny_model(name)
    before = config.to_dict()
    meta = meta_model(config)
    assert config.to_dict() == before
    shapes = {key: value.shape for key, value in real.named_parameters()}
    assert {key: value.shape for key, value in meta.named_parameters()} == shapes
    assert all(p.is_meta and not p.requires_grad for p in meta.parameters())
    buffers = dict(meta.named_buffers())
    assert set(buffers) == {key for key, _ in real.named_buffers()}
    for key, value in real.named_buffers():
        assert buffers[key].dtype == value.dtype
        assert torch.equal(buffers[key], value), key
    meta.load_state_dict(real.state_dict(), assign=True)
    ids = tokens(config, length=12)
    with torch.no_grad():
        assert torch.equal(meta(ids).logits, real(ids).logits)


def test_a_tied_weight_stays_one_parameter():
    _, config = tiny_model("llama", tie_word_embeddings=True)
    meta = meta_model(config)
    assert meta.lm_head.weight is meta.model.embed_tokens.weight


def test_rotary_frequencies_keep_float32_under_a_small_dtype():
    _, config = tiny_model("llama")
    meta = meta_model(config, dtype=torch.bfloat16)
    assert {p.dtype for p in meta.parameters()} == {torch.bfloat16}
    real = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert meta.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(meta.model.rotary_emb.inv_freq, real.model.rotary_emb.inv_freq)


def test_seventy_billion_parameters_cost_nothing():
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
    )
    start = time.process_time()
    meta = meta_model(config)
    assert time.process_time() - start < 5
    assert sum(p.numel() for p in meta.parameters()) == 70_553_706_496
