"""Norm tweaking (arXiv 2309.02784): norms of a quantized block move its output's distribution back to where it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from qbench.errors import StructureError
from qbench.formats import TensorFormat
from qbench.stages.base import BlockView, Kind, Need, Outcome, Stage, require
from qbench.stages.block_learning import block_loss, count_sequences, squared_error
from qbench.stages.training import Learned, check_training, train
from qbench.structure.blocks import output_of

DistanceName = Literal["channel", "mse"]


def channel_distance(output: Tensor, target: Tensor) -> Tensor:
    """(1/C) Σ_c |mean of channel c - that of the target's| + |variance - that of the target's| (paper, eq. 3);
    [sequences, length, C] each, statistics over all tokens, variances those of a population."""
    output, target = output.flatten(0, -2), target.flatten(0, -2)
    means = (output.mean(dim=0) - target.mean(dim=0)).abs()
    variances = (output.var(dim=0, correction=0) - target.var(dim=0, correction=0)).abs()
    return (means + variances).mean()


DISTANCES: dict[DistanceName, Callable[[Tensor, Tensor], Tensor]] = {
    "channel": channel_distance,
    "mse": squared_error,
}


def layer_rate(lr: float, scale: float, index: int, count: int) -> float:
    """lr (1 + scale · index / count): errors add up, so later blocks move faster (paper, eq. 4)."""
    return lr * (1 + scale * index / count)


@torch.no_grad()
def find_norms(block: nn.Module, run: Callable[[], object]) -> tuple[str, ...]:
    """Paths of the 1-D parameters (weights, biases) of every norm that is called while `run()` runs the block.

    A norm is known by what it does: its module has 1-D parameters alone, and what it returns does not change when its
    input is multiplied by a number. That is put to the test on random inputs of the shape and dtype that it got.
    """
    called: dict[str, tuple[tuple, Mapping[str, object]]] = {}

    def remember(path: str, args: tuple, kwargs: Mapping[str, object]) -> None:
        called.setdefault(path, (args, kwargs))

    with ExitStack() as hooks:
        for path, module in block.named_modules():
            own = list(module.parameters(recurse=False))
            if own and all(value.ndim == 1 and value.is_floating_point() for value in own):
                handle = module.register_forward_pre_hook(
                    lambda _, args, kwargs, path=path: remember(path, args, kwargs), with_kwargs=True
                )
                hooks.callback(handle.remove)
        run()
    norms = [path for path, (args, kwargs) in called.items() if _normalizes(block.get_submodule(path), args, kwargs)]
    return tuple(name for name, _ in block.named_parameters() if name.rpartition(".")[0] in norms)


def _normalizes(module: nn.Module, args: tuple, kwargs: Mapping[str, object]) -> bool:
    """Whether the module's output on random inputs stays within rounding when they are tripled, and is no constant."""
    if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
        return False
    x = args[0]
    # Far above the small number that keeps norms from dividing by 0.
    noise = 16 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    one, tripled, other = (
        output_of(module(value.to(x), *args[1:], **kwargs)).float() for value in (noise, 3 * noise, noise.flip(-1))
    )
    tolerance = 8 * torch.finfo(x.dtype).eps * one.abs().max()
    return bool((tripled - one).abs().max() <= tolerance < (other - one).abs().max())


@dataclass(frozen=True, kw_only=True)
class NormTweaking(Stage):
    """Trains the norms of the block, whose weights are quantized by now, and nothing else.

    Departure from the authors: whatever training does, the norms with the smallest loss over all sequences are kept,
    those before training among them.
    """

    name: ClassVar[str] = "normtweaking"
    kind: ClassVar[Kind] = Kind.RECONSTRUCT
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Need]] = frozenset()
    trains: ClassVar[bool] = True

    lr: float = 1e-5
    lr_scale: float = 1e-3
    epochs: int = 1
    distance: DistanceName = "channel"
    batch_size: int = 1

    def check(self, formats: frozenset[TensorFormat]) -> None:
        check_training(lr={"lr": self.lr}, batch_size=self.batch_size, epochs=self.epochs)
        require(0 <= self.lr_scale <= 1e6, "algo.lr_scale", self.lr_scale, "a number from 0 to 1e6 (LLMC: 0.001)")
        require(self.distance in DISTANCES, "algo.distance", self.distance, f"one of {', '.join(DISTANCES)}")

    def apply(self, view: BlockView) -> Outcome:
        data = view.data
        paths = find_norms(view.block, lambda: data.teacher(data.inputs[0]))
        if not paths:
            raise StructureError(f"{view.where}: normtweaking finds no norm with weights in this block")
        own = {path: view.block.get_parameter(path).detach() for path in paths}
        learned = {path: value.float().clone().requires_grad_() for path, value in own.items()}

        def tweaked() -> dict[str, Tensor]:
            return {path: value.to(own[path].dtype) for path, value in learned.items()}

        report = train(
            [Learned(list(learned.values()), layer_rate(self.lr, self.lr_scale, view.index, view.count))],
            block_loss(data, tweaked, DISTANCES[self.distance]),
            count_sequences(data),
            epochs=self.epochs,
            batch_size=self.batch_size,
            shuffle=False,
            optimizer="adam",
            report=data.report,
            where=f"{view.where}, {self.name}",
        )
        parameters = {path: value.detach() for path, value in tweaked().items()}
        return Outcome(parameters=parameters, metrics=report.metrics(self.name))
