"""`model=tiny` is a language model: it predicts unseen text, and it suffers as one when it is rounded."""

import json
import math

import pytest
import torch

from qbench.assets import resolve_model
from qbench.calibration.corpora import pydoc_split
from qbench.models.load import load_model, load_tokenizer

ASSET = {"name": "tiny", "asset": "package:tiny"}


@pytest.fixture(scope="module")
def asset():
    return resolve_model(**ASSET)


@pytest.fixture
def model(asset):
    return load_model(asset, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def token_ids(asset):
    """Training and held-out tokens, int64 [n] each."""
    tokenizer = load_tokenizer(asset)
    return tuple(torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for text in pydoc_split())


def perplexity(model, ids, windows=16, length=512) -> float:
    batch = ids[: windows * length].view(windows, length)
    with torch.inference_mode():
        logits = model(batch).logits[:, :-1].flatten(0, 1)
    return math.exp(torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten()))


def round_to_grid(model, bits: int, group: int = 32) -> None:
    """Every linear weight of the blocks to the nearest of 2^bits points between its group's extremes."""
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.ndim == 2:
                w = parameter.view(-1, group)
                low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
                step = (high - low) / (2**bits - 1)
                parameter.copy_(((w - low) / step).round().mul(step).add(low).view_as(parameter))


def test_it_knows_language_that_it_was_not_trained_on(model, token_ids):
    train, held_out = token_ids
    counts = torch.bincount(train, minlength=model.config.vocab_size).double() + 1
    predicted = held_out[: 16 * 512].view(16, 512)[:, 1:]
    unigram = math.exp(-(counts / counts.sum()).log()[predicted].mean())
    assert perplexity(model, held_out) < unigram / 4


def test_it_uses_its_context(model, token_ids):
    _, held_out = token_ids
    windows = held_out[: 8 * 512].view(8, 512)
    with torch.inference_mode():
        logits = model(windows).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(0)
    assert nll[128:].mean() < nll[:16].mean() - 0.3


def test_fewer_bits_hurt_more(asset, token_ids):
    _, held_out = token_ids
    found = {}
    for bits in (16, 8, 4, 3, 2):
        model = load_model(asset, dtype=torch.float32, device="cpu")
        if bits < 16:
            round_to_grid(model, bits)
        found[bits] = perplexity(model, held_out)
    lost_nats = {bits: math.log(found[bits] / found[16]) for bits in found}
    assert abs(lost_nats[8]) < 0.002
    assert 0.002 < lost_nats[4] < lost_nats[3] < lost_nats[2]
    assert lost_nats[2] > 0.2


def test_its_files_are_small_and_of_the_promised_shape(asset, model):
    assert sum(file.stat().st_size for file in asset.path.iterdir()) <= 3 * 10**6
    config = json.loads((asset.path / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert config["num_attention_heads"] == 2 * config["num_key_value_heads"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_its_tokenizer_loses_nothing(asset):
    tokenizer = load_tokenizer(asset)
    text = "def f(x):\n\treturn  x\r\n\n# zwölf 日本 \N{PILE OF POO}\x00 <|endof|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("")["input_ids"] == []
