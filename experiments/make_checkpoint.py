"""Writes a random-weight llama as a sharded bfloat16 checkpoint, one block in memory at a time.

    python experiments/make_checkpoint.py <folder> [--hidden 3072] [--layers 28] [--intermediate 8192] [--vocab 32000]

Made to try `source=stream` on a model larger than memory: the default has 3.4 billion parameters. The tokenizer is
that of model=tiny, whose token ids every vocabulary of at least its size holds.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

import qbench.models

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def shards(config: LlamaConfig, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Tensors of the embedding, of each block, and of norm and head, as bfloat16."""
    hidden, inter = config.hidden_size, config.intermediate_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads

    def weight(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(columns**-0.5).bfloat16()

    yield {"model.embed_tokens.weight": weight(config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        yield {
            f"{prefix}self_attn.q_proj.weight": weight(hidden, hidden),
            f"{prefix}self_attn.k_proj.weight": weight(kv, hidden),
            f"{prefix}self_attn.v_proj.weight": weight(kv, hidden),
            f"{prefix}self_attn.o_proj.weight": weight(hidden, hidden),
            f"{prefix}mlp.gate_proj.weight": weight(inter, hidden),
            f"{prefix}mlp.up_proj.weight": weight(inter, hidden),
            f"{prefix}mlp.down_proj.weight": weight(hidden, inter),
            f"{prefix}input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            f"{prefix}post_attention_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        }
    yield {
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "lm_head.weight": weight(config.vocab_size, hidden),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = LlamaConfig(
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        intermediate_size=options.intermediate,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        vocab_size=options.vocab,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    options.folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(options.folder)
    for name in TOKENIZER_FILES:
        shutil.copy(Path(qbench.models.__file__).parent / "tiny" / name, options.folder / name)
    where: dict[str, str] = {}
    parameters = 0
    for number, tensors in enumerate(shards(config, torch.Generator().manual_seed(options.seed))):
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, options.folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        parameters += sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": 2 * parameters}, "weight_map": where}
    (options.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    print(f"{options.folder}: {parameters / 1e9:.2f} billion parameters in {number + 1} shards")


if __name__ == "__main__":
    main()
