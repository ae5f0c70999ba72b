"""The one loop that stages learn with: minibatches of whole sequences at one block, by a named optimizer.

It knows no algorithm: a stage owns the tensors that are learned and says what their loss on some sequences is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qbench.errors import NumericsError
from qbench.stages.base import require

OptimizerName = Literal["adamw", "adam", "signsgd"]
Schedule = Literal["constant", "linear", "cosine"]
KeepBest = Literal["none", "step", "epoch"]

#: What is computed part by part, to bound temporaries, is so in this many parts, of no fewer elements than these: more
#: would be slow.
PARTS, PART_ELEMENTS = 16, 1 << 14

#: A mean loss over one epoch's worth of steps that exceeds the first epoch's by this factor has diverged.
DIVERGED = 10.0


@dataclass(frozen=True)
class Learned:
    """Leaf tensors [rows, ...] that are learned together, at the same rate; they are changed in place. kept: dtype in
    which the best of them are put aside, None for their own."""

    tensors: Sequence[Tensor]
    lr: float
    weight_decay: float = 0.0
    kept: torch.dtype | None = None


@dataclass(frozen=True)
class TrainReport:
    """How a training went. losses: mean of the minibatch losses of every epoch (of as many steps as an epoch has,
    where minibatches are drawn), each at the tensors of its moment. initial: loss of the untrained tensors; best: loss
    of those that were left behind; both over all sequences with keep_best "epoch", over one minibatch with "step", and
    None with "none" and where nothing was trained. steps: those taken; best_step: how many led to what was left behind.
    """

    losses: tuple[float, ...] = ()
    initial: float | None = None
    best: float | None = None
    steps: int = 0
    best_step: int = 0
    diverged: bool = False

    def metrics(self, name: str) -> tuple[tuple[str, str, float], ...]:
        """Layer metrics of the block, `name` in front of each."""
        found = {"steps": float(self.steps), "best_step": float(self.best_step), "diverged": float(self.diverged)}
        found |= {f"loss_{key}": value for key in ("initial", "best") if (value := getattr(self, key)) is not None}
        found |= {f"loss_epoch{k:03d}": value for k, value in enumerate(self.losses)}
        return tuple(("", f"{name}_{key}", value) for key, value in found.items())


def train(
    groups: Sequence[Learned],
    loss: Callable[[list[int]], Tensor],
    count: int,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 1,
    shuffle: bool = True,
    generator: torch.Generator | None = None,
    optimizer: OptimizerName = "adamw",
    schedule: Schedule = "constant",
    keep_best: KeepBest = "epoch",
    clip_grad: float | None = None,
    autocast: bool = False,
    project: Callable[[], None] | None = None,
    report: Callable[[int, int, float], None] | None = None,
    where: str = "",
) -> TrainReport:
    """Minimizes `loss(sequence numbers)`, a scalar tensor, over `count` sequences; leaves the result in the tensors.

    epochs: trips over all sequences in minibatches of `batch_size` (at most `count`; the last may be smaller), in order
    or, with `shuffle`, in an order drawn anew from `generator` (on the CPU). steps, instead: so many minibatches, each
    drawn by itself without replacement. 0 of either, or a rate of 0, leaves the tensors exactly as they are.

    optimizer: "adamw" and "adam" are torch's with their default moments; "signsgd" moves by lr times the gradient's
    sign (arXiv 2309.05516, eq. 7). schedule: the rate at step k of n is lr, lr (1 - k/n), or lr (1 + cos(π k/n)) / 2.
    clip_grad: largest norm of all gradients together. autocast: products in bfloat16 (torch.autocast). project: called
    after every step, to bring the tensors back into their domain. report(step, steps, loss): called after every step.

    keep_best: what is left behind. "none": the last tensors. "step": those with the smallest minibatch loss (AutoRound;
    the untrained ones are among them). "epoch": those before or after an epoch with the smallest loss over all
    sequences, so that it never exceeds the initial one; costs a forward of all sequences per epoch.

    Where the mean loss of an epoch's worth of steps exceeds DIVERGED times the first epoch's, training ends: with the
    best so far, or with "none" in NumericsError. NumericsError also for a loss or gradient that is not finite.

    Memory beyond the caller's: the optimizer's moments (none with "signsgd"), with keep_best a copy of the tensors, and
    one gradient at a time (with clip_grad all of them): a tensor moves as soon as its gradient is known, part by part.
    What one minibatch needs is freed before the next.
    """
    assert (epochs is None) != (steps is None), "either epochs or steps"
    assert generator is not None or (steps is None and not shuffle), "random minibatches need a generator"
    tensors = [tensor for group in groups for tensor in group.tensors]
    batch_size = min(batch_size, count)
    per_epoch = -(-count // max(batch_size, 1))
    total = epochs * per_epoch if steps is None else steps
    if not tensors or total == 0:
        return TrainReport()
    with torch.inference_mode(False):
        loop = _Loop(groups, loss, count, batch_size, optimizer, autocast, where, total, clip_grad)
        batches = (
            _epochs(count, batch_size, shuffle, generator) if steps is None else _draws(count, batch_size, generator)
        )
        best = _Best(groups, keep_best)
        if keep_best == "epoch":
            best.offer(loop.evaluate(0), 0)
        losses: list[float] = []
        diverged = False
        for step in range(total):
            loop.set_rates(_factor(schedule, step, total))
            value = loop.step(next(batches), step, best.offer if keep_best == "step" else None)
            if project is not None:
                with torch.no_grad():
                    project()
            losses.append(value)
            if report is not None:
                report(step + 1, total, value)
            ended = (step + 1) % per_epoch == 0 or step + 1 == total
            if keep_best == "epoch" and ended:
                best.offer(loop.evaluate(step + 1), step + 1)
            if diverged := _diverged(losses, per_epoch):
                break
        taken = len(losses)
        if diverged and keep_best == "none":
            raise NumericsError(
                f"{where}: training diverged at step {taken} of {total}: the loss rose more than {DIVERGED:g}-fold; "
                "a lower learning rate is needed"
            )
        best.restore()
    means = tuple(
        math.fsum(part) / len(part) for part in (losses[k : k + per_epoch] for k in range(0, taken, per_epoch))
    )
    return TrainReport(means, best.initial, best.value, taken, taken if best.step is None else best.step, diverged)


def gather(chunks: Sequence[Tensor], sequences: Sequence[int]) -> Tensor:
    """The given sequences, [len(sequences), length, features], of chunks [n, length, features] in a row."""
    rows = []
    for index in sequences:
        for chunk in chunks:
            if index < len(chunk):
                rows.append(chunk[index])
                break
            index -= len(chunk)
    return torch.stack(rows)


def parts(rows: int, elements: int) -> list[slice]:
    """Slices that cover `rows` rows of `elements` elements each: sixteenths, or fewer where those would be tiny."""
    size = max(1, -(-rows // PARTS), PART_ELEMENTS // max(elements, 1))
    return [slice(k, k + size) for k in range(0, rows, size)]


def check_training(*, lr: dict[str, float], batch_size: int, **counts: int) -> None:
    """SpecError for rates and counts (steps, epochs) that mean nothing; 0 is a rate, no epochs are epochs."""
    for option, value in lr.items():
        what = "weight decay" if option == "weight_decay" else "learning rate"
        require(math.isfinite(value) and value >= 0, f"algo.{option}", value, f"a finite {what} >= 0")
    for option, value in counts.items():
        require(value >= 0, f"algo.{option}", value, "a number >= 0 (0: nothing is learned)")
    require(batch_size >= 1, "algo.batch_size", batch_size, "a number of sequences >= 1")


class _Loop:
    """One training's optimizer and its arithmetic."""

    def __init__(
        self,
        groups: Sequence[Learned],
        loss: Callable[[list[int]], Tensor],
        count: int,
        batch_size: int,
        optimizer: OptimizerName,
        autocast: bool,
        where: str,
        total: int,
        clip_grad: float | None,
    ) -> None:
        self._tensors = [tensor for group in groups for tensor in group.tensors]
        self._rates = [group.lr for group in groups]
        kind = OPTIMIZERS[optimizer]
        self._movers = [[_Mover(t, kind, g.lr, g.weight_decay) for t in g.tensors] for g in groups]
        self._clip_grad = clip_grad
        self._loss, self._where, self._total = loss, where, total
        self._every = [list(range(k, min(k + batch_size, count))) for k in range(0, count, batch_size)]
        self._count = count
        self._autocast = autocast

    def set_rates(self, factor: float) -> None:
        for movers, rate in zip(self._movers, self._rates, strict=True):
            for mover in movers:
                mover.set_rate(rate * factor)

    def step(self, batch: list[int], step: int, offer: Callable[[float, int], None] | None) -> float:
        """The minibatch's loss, which `offer` is told while the tensors are those it belongs to; then they move."""
        with torch.enable_grad():
            value = self._compute(batch, step)
            found = value.item()
            self._require_finite(found, "loss", step)
            if offer is not None:
                offer(found, step)
            if self._clip_grad is not None:
                value.backward()
                norm = torch.nn.utils.clip_grad_norm_(self._tensors, self._clip_grad)
                self._require_finite(norm.item(), "gradient", step)
                for tensor, mover in self._moving():
                    self._move(tensor, mover, step)
                return found
            hooks = [
                tensor.register_post_accumulate_grad_hook(lambda t, mover=mover: self._move(t, mover, step))
                for tensor, mover in self._moving()
                if tensor.requires_grad
            ]
            try:
                value.backward()
            finally:
                for hook in hooks:
                    hook.remove()
        return found

    def _moving(self) -> Iterator[tuple[Tensor, _Mover]]:
        return zip(self._tensors, (mover for movers in self._movers for mover in movers), strict=True)

    @torch.no_grad()
    def _move(self, tensor: Tensor, mover: _Mover, step: int) -> None:
        if tensor.grad is not None:
            self._require_finite(torch.linalg.vector_norm(tensor.grad).item(), "gradient", step)
            mover.move(tensor.grad)
            tensor.grad = None

    def evaluate(self, step: int) -> float:
        """Mean loss per sequence over all of them."""
        with torch.no_grad():
            found = math.fsum(len(batch) * self._compute(batch, step).item() for batch in self._every) / self._count
        self._require_finite(found, "loss", step)
        return found

    def _compute(self, batch: list[int], step: int) -> Tensor:
        try:
            with torch.autocast(self._tensors[0].device.type, torch.bfloat16, enabled=self._autocast):
                return self._loss(batch)
        except NumericsError as error:  # a scale that overflows its dtype, activations that are not finite
            raise NumericsError(f"{self._where}, step {step} of {self._total}: {error}") from error

    def _require_finite(self, value: float, what: str, step: int) -> None:
        if not math.isfinite(value):
            raise NumericsError(
                f"{self._where}: the {what} is {value} at step {step} of {self._total}; a lower learning rate is needed"
            )


class _Mover:
    """One tensor's optimizers, one for each part: their temporaries are a part's and not the tensor's."""

    def __init__(
        self, tensor: Tensor, kind: Callable[..., torch.optim.Optimizer], lr: float, weight_decay: float
    ) -> None:
        self._rows = parts(len(tensor), tensor[:1].numel())
        self._parts = [tensor.detach()[rows] for rows in self._rows]
        self._optimizers = [kind([part], lr=lr, weight_decay=weight_decay) for part in self._parts]

    def set_rate(self, rate: float) -> None:
        for optimizer in self._optimizers:
            optimizer.param_groups[0]["lr"] = rate

    def move(self, gradient: Tensor) -> None:
        for rows, part, optimizer in zip(self._rows, self._parts, self._optimizers, strict=True):
            part.grad = gradient[rows]
            optimizer.step()
            part.grad = None


class _Best:
    """A copy of the tensors with the smallest loss offered so far."""

    def __init__(self, groups: Sequence[Learned], keep: KeepBest) -> None:
        dtypes = [(tensor, group.kept or tensor.dtype) for group in groups for tensor in group.tensors]
        self._tensors = [tensor for tensor, _ in dtypes]
        self._kept = None
        if keep != "none":
            self._kept = [torch.empty_like(t, dtype=dtype, requires_grad=False) for t, dtype in dtypes]
        self.initial: float | None = None
        self.value: float | None = None
        self.step: int | None = None

    @torch.no_grad()
    def offer(self, value: float, step: int) -> None:
        """Ties keep the earlier."""
        if self.value is None:
            self.initial = value
        elif value >= self.value:
            return
        self.value, self.step = value, step
        for kept, tensor in zip(self._kept, self._tensors, strict=True):
            kept.copy_(tensor)

    @torch.no_grad()
    def restore(self) -> None:
        if self._kept is not None:
            for kept, tensor in zip(self._kept, self._tensors, strict=True):
                tensor.copy_(kept)


class SignSgd(torch.optim.Optimizer):
    """p ← p - lr sign(g + weight_decay p)."""

    def __init__(self, params: Any, lr: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    gradient = p.grad.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else p.grad
                    p.add_(gradient.sign(), alpha=-group["lr"])


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "signsgd": SignSgd,
}


def _factor(schedule: Schedule, step: int, total: int) -> float:
    if schedule == "constant":
        return 1.0
    return 1 - step / total if schedule == "linear" else (1 + math.cos(math.pi * step / total)) / 2


def _epochs(count: int, batch_size: int, shuffle: bool, generator: torch.Generator | None) -> Iterator[list[int]]:
    while True:
        order = torch.randperm(count, generator=generator).tolist() if shuffle else list(range(count))
        yield from (order[k : k + batch_size] for k in range(0, count, batch_size))


def _draws(count: int, batch_size: int, generator: torch.Generator | None) -> Iterator[list[int]]:
    while True:
        yield torch.randperm(count, generator=generator)[:batch_size].tolist()


def _diverged(losses: list[float], per_epoch: int) -> bool:
    """Means and not single steps: sequences differ."""
    if len(losses) < 2 * per_epoch:
        return False
    first, last = sum(losses[:per_epoch]), sum(losses[-per_epoch:])
    return first > 0 and last > DIVERGED * first
