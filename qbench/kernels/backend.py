"""Which implementation of an operation runs: said by the caller or by one rule, never chosen behind his back."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, get_args

import torch
from torch import Tensor

from qbench.errors import SpecError

Backend = Literal["reference", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
FLOATS = {torch.float32, torch.float16, torch.bfloat16}


def default_backend(device: torch.device) -> Backend:
    """ "triton" on a CUDA (or ROCm) device where Triton is installed, else "reference": depends on nothing else."""
    return "triton" if device.type == "cuda" and importlib.util.find_spec("triton") is not None else "reference"


def choose(backend: Backend | None, x: Tensor) -> Backend:
    """The backend asked for, or the default of x's device.

    Raises SpecError for an unknown name, and for "triton" where it cannot run: no silent fallback.
    """
    if backend is None:
        return default_backend(x.device)
    if backend not in BACKENDS:
        raise SpecError("backend", backend, f"accepted: {', '.join(BACKENDS)}")
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            raise SpecError("backend", backend, "Triton is not installed; accepted here: reference")
        if not x.is_cuda and not interpreted():
            raise SpecError(
                "backend",
                backend,
                f"needs a CUDA tensor (given: {x.device}) or TRITON_INTERPRET=1; accepted here: reference",
            )
    return backend


def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, one operation at a time: for tests, thousands of times slower."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_float(operation: str, x: Tensor, dimensions: int | None = None) -> None:
    """Raise SpecError unless x is float32, float16 or bfloat16 and has `dimensions` axes (None: at least one)."""
    if x.dtype not in FLOATS:
        raise SpecError(f"{operation} dtype", x.dtype, "accepted: float32, float16, bfloat16")
    if x.dim() == 0 or (dimensions is not None and x.dim() != dimensions):
        wanted = "at least one axis" if dimensions is None else f"{dimensions} axes"
        raise SpecError(f"{operation} shape", tuple(x.shape), f"x needs {wanted}")
