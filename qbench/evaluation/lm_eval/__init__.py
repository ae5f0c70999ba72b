"""Zero-shot and few-shot tasks through lm-eval, in process, on the quantized model.

Tasks, prompts, metrics and standard errors are lm-eval's own; `definitions` and `data` read them without importing
it, `harness` drives it, `scoring` and `generation` compute.
"""

from qbench.evaluation.lm_eval.evaluator import ZeroShot, build

__all__ = ["ZeroShot", "build"]
