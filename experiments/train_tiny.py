"""Train `model=tiny`: a real, if small, language model that tests can quantize in seconds.

    python experiments/train_tiny.py [--steps N] [--out DIR] [--seed S]

A llama-architecture model of about 0.9 million parameters (grouped-query attention, tied embeddings,
context 512) with its own byte-level BPE of 1,024 tokens, trained on the documentation that every CPython
carries: the topics of `pydoc_data` and the docstrings of the standard library. The topics from
`PYDOC_HELD_OUT_FROM` on are held out, and so is every training paragraph that they repeat, so that the
held-out perplexity printed here is not a memory of the training text. One thread, one seed, deterministic
kernels: the same Python, torch and CPU write the same bytes, whose sha256 are printed at the end.
"""

import argparse
import ast
import hashlib
import math
import sys
import sysconfig
import time
import warnings
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qbench.calibration.corpora import pydoc_split

VOCABULARY = 1024
CONTEXT_TOKENS = 512
END = "<|endoftext|>"
# Not documentation, or not there on every installation.
LEFT_OUT = {"test", "idlelib", "lib2to3", "turtledemo", "pydoc_data"}


def docstrings() -> list[str]:
    """The standard library's docstrings of more than 100 characters, in file order, repeats left out."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, None] = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or LEFT_OUT & {
            *parts,
            *(p.removesuffix("s") for p in parts),
        }:
            continue
        with warnings.catch_warnings(action="ignore"):  # old sources hold invalid escapes
            tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) > 100:
                    found.setdefault(text)
    return list(found)


def training_text(topics: str, held_out: str) -> str:
    """The topics' training text, then the docstrings without any paragraph that `held_out` has too."""
    known = {" ".join(paragraph.split()) for paragraph in held_out.split("\n\n")}
    texts = [topics]
    for docstring in docstrings():
        paragraphs = [p for p in docstring.split("\n\n") if " ".join(p.split()) not in known]
        texts.append("\n\n".join(paragraphs))
    return "\n\n".join(text for text in texts if text)


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE fitted to `text`: every string round trips, no special token is added by default."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, model_max_length=CONTEXT_TOKENS
    )


def new_model(seed: int) -> LlamaForCausalLM:
    """The untrained architecture with weights drawn from `seed`, float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def held_out_nll(model: LlamaForCausalLM, ids: Tensor) -> float:
    """Mean NLL in nats per predicted token over non-overlapping context windows of `ids` (int64 [n])."""
    windows = ids[: len(ids) // CONTEXT_TOKENS * CONTEXT_TOKENS].view(-1, CONTEXT_TOKENS)
    model.eval()
    with torch.inference_mode():
        logits = torch.cat([model(w[None]).logits.float() for w in windows])
    model.train()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).item()


def unigram_nll(train: Tensor, ids: Tensor) -> float:
    """Mean NLL in nats of `ids` under the add-one smoothed token counts of `train`: without any context."""
    counts = torch.bincount(train, minlength=VOCABULARY).double() + 1
    return -(counts / counts.sum()).log()[ids].mean().item()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 % of the steps, then a cosine to 2 % of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def train(
    model: LlamaForCausalLM, ids: Tensor, held_out: Tensor, steps: int, batch: int, peak: float, seed: int
) -> None:
    """Minimize the next-token NLL of `model`, in place, on random windows of `ids`, printing both losses."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))
    started, running = time.perf_counter(), 0.0
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        starts = torch.randint(len(ids) - CONTEXT_TOKENS + 1, (batch,), generator=generator)
        windows = ids[starts[:, None] + torch.arange(CONTEXT_TOKENS)]
        logits = model(windows, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running += loss.item()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            mean, running = running / (step % 100 + 1), 0.0
            nll, seconds = held_out_nll(model, held_out), time.perf_counter() - started
            report = f"train {mean:.3f}, held out {nll:.3f} nats/token, {seconds:.0f} s"
            print(f"step {step + 1:5d}: {report}", flush=True)


def main() -> None:
    """Train, compare with a unigram model, write float16 weights and the tokenizer, print their hashes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default_out = Path(__file__).parents[1] / "qbench" / "models" / "tiny"
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--batch", type=int, default=4, help="windows of 512 tokens per step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=default_out)
    options = parser.parse_args()

    torch.set_num_threads(1)  # one summation order, whatever the machine
    torch.use_deterministic_algorithms(True)
    topics, held_out_text = pydoc_split()
    text = training_text(topics, held_out_text)
    tokenizer = train_tokenizer(text)
    ids, held_out = (torch.tensor(tokenizer(t, verbose=False)["input_ids"]) for t in (text, held_out_text))
    model = new_model(options.seed)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {len(ids)} training tokens, {len(held_out)} held out", flush=True)
    train(model, ids, held_out, options.steps, options.batch, options.lr, options.seed)

    model.half().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    stored = LlamaForCausalLM.from_pretrained(options.out, dtype=torch.float32)
    ppl, unigram = math.exp(held_out_nll(stored, held_out)), math.exp(unigram_nll(ids, held_out))
    print(f"held-out perplexity per token {ppl:.2f} as stored, unigram {unigram:.1f}")
    for file in sorted(options.out.iterdir()):
        file.chmod(0o644)  # safetensors writes for its owner alone, a package is for all
        print(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.stat().st_size:8d}  {file.name}")


if __name__ == "__main__":
    main()
