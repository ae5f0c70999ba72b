"""Dynamic quantization of activations: codes and one scale per token."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from qbench.errors import SpecError
from qbench.kernels.backend import Backend, check_float, choose
from qbench.kernels.quantize_token import reference

Code = Literal["int8", "float8_e4m3fn"]


def quantize_token(x: Tensor, *, code: Code = "int8", backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """Codes [..., features] (int8 or float8_e4m3fn) and float32 scale [..., 1] of x [..., features], one per token.

    s = 2 max|x| / 255 for int8 codes -128 ... 127, s = max|x| / 448 for float8 (its largest finite number). Codes are
    x / s, nearest, ties to even, saturating; computed in float32, so that x is about codes.float() * s. A token of
    zeros (or so small that s would be 0) gets s = 1. A token with a NaN or an infinity gets s = NaN and codes 0: a
    check that raised would stall a GPU.

    x is float32, float16 or bfloat16. Raises SpecError for another dtype or code.
    """
    check_float("quantize_token", x)
    if code not in get_args(Code):
        raise SpecError("code", code, f"accepted: {', '.join(get_args(Code))}")
    tokens = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    if x.numel() == 0:
        return torch.zeros(x.shape, dtype=getattr(torch, code), device=x.device), x.new_ones(
            (*x.shape[:-1], 1), dtype=torch.float32
        )
    if choose(backend, x) == "triton":
        from qbench.kernels.quantize_token import triton

        codes, scale = triton.quantize_token(tokens, code)
    else:
        codes, scale = reference.quantize_token(tokens, code)
    return codes.view(x.shape), scale.view(*x.shape[:-1], 1)
