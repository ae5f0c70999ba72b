"""The definition of the product with a packed weight, on any device; see the package for what it means."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from qbench.kernels.pack import reference as pack


def dequant_matmul(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> Tensor:
    """x [tokens, in]; the weight is decoded whole, in float32."""
    weight = dequantize(packed, scale, zero, bits, group_size, x.shape[1])
    return (x.float() @ weight.T).to(x.dtype)


def dequantize(packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, columns: int) -> Tensor:
    """float32 [out, in]."""
    rows = packed.shape[0]
    width = columns if group_size == -1 else group_size
    groups = -(-columns // width)
    values = pack.unpack(packed, bits, columns, signed=zero is None).float()
    missing = groups * width - columns
    blocks = (F.pad(values, (0, missing)) if missing else values).view(rows, groups, width)
    if zero is not None:
        blocks = blocks - zero.float()[..., None]
    blocks = blocks * scale.float()[..., None]
    return blocks.view(rows, groups * width)[:, :columns]
