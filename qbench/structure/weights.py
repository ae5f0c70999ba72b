"""`[out, in]` views of the linear weights of a block, whatever way the block stores them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qbench.errors import StructureError


@dataclass(frozen=True, kw_only=True)
class WeightRef:
    """One linear weight of a block, seen as `[out_features, in_features]`.

    It holds paths, never tensors, so that the same value serves every block of the same shape, on any device.
    """

    name: str
    """Unique in the block: "self_attn.q_proj.weight", "mlp.experts.gate_up_proj[3]"."""
    parameter: str
    """Path in the block of the parameter that stores it."""
    index: int | None = None
    """Which slice of a 3-D expert parameter; None for a parameter that is one matrix."""
    transposed: bool = False
    """Whether the storage is `[in, out]`."""
    out_features: int
    in_features: int
    bias: str | None = None
    """Path of the 1-D bias `[out_features]` that is added to the output; None for experts and without one."""

    @property
    def owner(self) -> str:
        """Path of the module that holds the parameter."""
        return self.parameter.rpartition(".")[0]

    def of(self, parameter: Tensor) -> Tensor:
        """`[out, in]` view of a tensor that is stored as the block stores this weight's parameter."""
        matrix = parameter if self.index is None else parameter[self.index]
        return matrix.mT if self.transposed else matrix

    def read(self, block: nn.Module) -> Tensor:
        """Detached `[out, in]` view of the live parameter, in its dtype and on its device (no copy)."""
        return self.of(block.get_parameter(self.parameter).detach())

    def write(self, block: nn.Module, value: Tensor) -> None:
        """Copies `value` `[out, in]` (any dtype, any device) into the parameter's own storage.

        Raises StructureError when the shape differs, because `copy_` would broadcast.
        """
        target = self.read(block)
        if value.shape != target.shape:
            raise StructureError(
                f"{self.name}: cannot hold a value of shape {list(value.shape)}, it is {list(target.shape)}"
            )
        with torch.no_grad():
            target.copy_(value)
