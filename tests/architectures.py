"""Tiny random-weight models of the architectures that structure discovery has to understand."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCABULARY = 97
HIDDEN = 32
BLOCKS = 2

_LLAMA_LIKE: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_GPT2_LIKE: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_layer": BLOCKS,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Local attention has to differ from global attention on a dozen tokens.
_LOCAL: Mapping[str, Any] = {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "head_dim": 8,
}

_CONFIGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_LLAMA_LIKE, "sliding_window": 4}),
    "qwen2": ("qwen2", _LLAMA_LIKE),
    "qwen3": ("qwen3", {**_LLAMA_LIKE, "head_dim": 8}),
    "gemma2": ("gemma2", {**_LLAMA_LIKE, **_LOCAL, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("gemma3_text", {**_LLAMA_LIKE, **_LOCAL, "query_pre_attn_scalar": 8}),
    "phi": ("phi", {**_LLAMA_LIKE, "num_key_value_heads": 4}),
    "phi3": ("phi3", _LLAMA_LIKE),
    "opt": (
        "opt",
        {**_LLAMA_LIKE, "ffn_dim": 48, "word_embed_proj_dim": HIDDEN, "activation_function": "relu"},
    ),
    "gpt2": ("gpt2", _GPT2_LIKE),
    "gpt_neox": ("gpt_neox", _LLAMA_LIKE),
    "bloom": ("bloom", {**_GPT2_LIKE, "hidden_size": HIDDEN}),
    "falcon": (
        "falcon",
        {
            **_LLAMA_LIKE,
            "ffn_hidden_size": 64,
            "new_decoder_architecture": False,
            "multi_query": True,
            "parallel_attn": True,
            "bias": False,
            "alibi": False,
        },
    ),
    "stablelm": ("stablelm", _LLAMA_LIKE),
    "olmo2": ("olmo2", _LLAMA_LIKE),
    "starcoder2": ("starcoder2", {**_LLAMA_LIKE, "use_bias": True}),
    "mixtral": ("mixtral", {**_LLAMA_LIKE, "num_local_experts": 8, "num_experts_per_tok": 2}),
}

ARCHITECTURES: tuple[str, ...] = tuple(_CONFIGS)


def tiny_model(
    name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> tuple[PreTrainedModel, PretrainedConfig]:
    """A model in eval mode with seeded random weights, norm weights and biases included, and its config.

    `overrides` replace entries of the config. Nothing is left at 0 or 1, where a wrong fold could not be told
    from a right one.
    """
    model_type, settings = _CONFIGS[name]
    config = AutoConfig.for_model(model_type, **{**settings, **overrides})
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    randomize(model, torch.Generator().manual_seed(seed))
    return model, config


def randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Draws every parameter anew: matrices that change a block's input noticeably, vectors near 0.7."""
    with torch.no_grad():
        for parameter in model.parameters():
            value = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.ndim == 1:
                parameter.copy_(0.7 + 0.2 * value)
            else:
                parameter.copy_(value / parameter.shape[-1] ** 0.5)


def tokens(config: PretrainedConfig, *, batch: int = 2, length: int = 8, seed: int = 0) -> torch.Tensor:
    """Random token ids, int64 `[batch, length]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.get_text_config().vocab_size, (batch, length), generator=generator)
