"""Watches one forward of a block: its linear reads, the calls of its submodules, its attention scores."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qbench.structure.blocks import BlockCall
from qbench.structure.operations import LinearOperations, LinearUse


@dataclass(frozen=True)
class Read:
    """One weight read by one operation."""

    use: LinearUse
    input: tuple[int, ...]
    """`tensor_key` of the input when it was read."""
    output: Tensor


def tensor_key(x: Tensor) -> tuple[int, ...]:
    """Equal for two reshapings of the same values, as long as both are alive."""
    return x.data_ptr(), x.numel(), x.shape[-1], x.stride(-1), x._version


_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


class Recorder(TorchFunctionMode):
    """Records the linear reads of a block, its submodules' arguments and the inputs of its attention."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.reads: list[Read] = []
        self._operations = LinearOperations(block)
        self._scores: list[Tensor] = []
        self._calls: list[tuple[str, tuple[tuple[int, ...], ...]]] = []
        # Addresses identify tensors only while none is freed and its memory reused; reads keep their inputs.
        self._alive: list[Tensor] = []

    def run(self, block: nn.Module, call: BlockCall, hidden: Tensor) -> None:
        """One forward of the block with gradients, whatever the caller's gradient mode is."""
        hooks = [
            module.register_forward_pre_hook(self._hook(path), with_kwargs=True)
            for path, module in block.named_modules()
            if path
        ]
        try:
            with torch.inference_mode(False), torch.enable_grad():
                # Everything depends on a leaf, and the block may still change its own input in place.
                leaf = hidden.detach().clone().requires_grad_()
                with self:
                    call(block, leaf.clone())
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._scores += (*args, *(kwargs[name] for name in ("query", "key") if name in kwargs))[:2]
        elif func in _SOFTMAX:
            logits = args[0] if args else kwargs["input"]
            if logits.ndim == 4:
                self._scores.append(logits)
        uses = [use for use in self._operations.uses(func, args, kwargs) if use.x.numel()]
        keys = [tensor_key(use.x) for use in uses]
        result = func(*args, **kwargs)
        for position, (use, key) in enumerate(zip(uses, keys, strict=True)):
            output = result[position] if use.batched else result
            self.reads.append(Read(use, key, output))
        return result

    def called_with(self, key: tuple[int, ...]) -> list[str]:
        """Paths of the submodules that were called with the tensor of that key, in order."""
        return list(dict.fromkeys(path for path, keys in self._calls if key in keys))

    def query_key_rows(self) -> dict[tuple[str, int | None], Tensor]:
        """(parameter, expert) -> bool `[out_features]`: rows on which some attention score depends."""
        outputs = [read.output for read in self.reads]
        scores = [score for score in self._scores if score.requires_grad]
        gradients: tuple[Tensor | None, ...] = (None,) * len(outputs)
        if scores and outputs:
            generator = torch.Generator().manual_seed(0)
            directions = [torch.randn(score.shape, generator=generator).to(score) for score in scores]
            gradients = torch.autograd.grad(scores, outputs, directions, allow_unused=True)
        found: dict[tuple[str, int | None], Tensor] = {}
        for read, gradient in zip(self.reads, gradients, strict=True):
            rows = torch.zeros(read.output.shape[-1], dtype=torch.bool)
            if gradient is not None:
                rows = (gradient != 0).flatten(0, -2).any(dim=0).cpu()
            key = (read.use.parameter, read.use.index)
            found[key] = rows | found[key] if key in found else rows
        return found

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
            self._alive += tensors
            self._calls.append((path, tuple(tensor_key(tensor) for tensor in tensors)))

        return record
