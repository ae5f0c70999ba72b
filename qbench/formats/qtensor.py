"""A quantized tensor: codes and the parameters that give them meaning."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qbench.formats.basis import Basis
from qbench.formats.tensor import PER_TENSOR, QParams, TensorFormat, decode


@dataclass(frozen=True)
class QTensor:
    """Codes `[out, in]` in the element format's storage, float32 `scale` and `zero` [rows, groups]; `scale_codes` and
    `outer` say how the scale is stored where it is not stored as itself.

    Column j belongs to group j // group_size unless `order` (int64 [in]) is given: then column order[k] is the k-th
    column in quantization order and belongs to group k // group_size (GPTQ's act_order without static groups).
    Invariant: dequantize() is exactly scale * (level - zero), computed in float32, with the level of the code; with a
    `basis` that is the weight in that basis, and dequantize() brings it back into its own.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    format: TensorFormat
    order: Tensor | None = None
    scale_codes: Tensor | None = None
    outer: Tensor | None = None
    basis: Basis | None = None

    def dequantize(self) -> Tensor:
        """float32 `[out, in]`."""
        values = self._values()
        return values if self.basis is None else self.basis.leave(values)

    def _values(self) -> Tensor:
        levels = self.format.element.from_codes(self.codes)
        if self.order is not None:
            levels = levels[:, self.order]
        params = QParams(self.scale, self.zero)
        values = self.format.unblocks(decode(self.format.blocks(levels), params), levels.shape)
        if self.order is None:
            return values
        restored = torch.empty_like(values)
        restored[:, self.order] = values
        return restored

    def storage_bits(self) -> int:
        """Bits to keep: codes, scales, zero points; with `order` a 32-bit group index per column, with a `basis` what
        it is made from."""
        out_features, in_features = self.codes.shape
        index = 0 if self.order is None or self.format.group_size <= PER_TENSOR else 32 * in_features
        basis = 0 if self.basis is None else self.basis.storage_bits()
        return self.format.storage_bits(out_features, in_features) + index + basis

    def sha256(self) -> str:
        """Digest of codes, scales, zero points and what gives them meaning: equal digests are equal weights."""
        return self._sha256  # made once: the tensors are values, nobody writes into them

    @cached_property
    def _sha256(self) -> str:
        state = hashlib.sha256(f"{list(self.codes.shape)} in {self.format.element} {self.format.block}\n".encode())
        for part in (self.codes, self.scale, self.zero, self.order):
            if part is not None:
                state.update(part.detach().cpu().contiguous().numpy().tobytes())
        if self.basis is not None:
            state.update(f"basis {self.basis.seed}\n".encode())
            if self.basis.scale is not None:
                state.update(self.basis.scale.detach().cpu().contiguous().numpy().tobytes())
        return state.hexdigest()
