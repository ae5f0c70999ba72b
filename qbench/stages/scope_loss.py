"""How far the output around some weights moves when they and their inputs are rounded: what scale searches minimize.

A search tries a scale s (and a shift z) on a group's input: the layer then multiplies Q((x - z)/s) by Q(W diag(s)).
Here that is written in the units of the untouched layer, so that the captured calls of the modules around it can be
run as they are: the input becomes s Q((x - z)/s), the weight Q(W diag(s)) diag(1/s), and W z joins the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qbench.errors import NumericsError
from qbench.formats import RangeFit, TensorFormat, fake_quantize
from qbench.formats.scheme import InputFormat, Scheme
from qbench.stages.base import BlockView, ScopeCall
from qbench.structure.folds import Fold
from qbench.structure.operations import LinearOperations, LinearUse
from qbench.structure.trace import LinearGroup, LinearTap
from qbench.structure.weights import WeightRef

Site = Literal["module", "attention"]


@dataclass(frozen=True, kw_only=True)
class Substitute:
    """What is computed in a linear weight's place: inputs(x) @ weight.T + bias + offset, x `[..., in]`.

    weight: float `[out, in]`. inputs: None for x as it is. offset: float `[out]`, or None.
    """

    weight: Tensor
    inputs: Callable[[Tensor], Tensor] | None = None
    offset: Tensor | None = None


def rounded(
    view: BlockView, refs: Sequence[WeightRef], scale: Tensor, *, shift: Tensor | None = None, inputs: bool = True
) -> dict[str, Substitute]:
    """The weights `refs`, which read one input, rounded to their formats behind a scale and shift `[in]` of that input.

    By name. With `inputs`, the input is rounded as the scheme does it: a dynamic format as it will be, a static one by
    the extremes of the sample. A range of the weight's that would be searched is the min-max one here.
    """
    changes: dict[InputFormat | None, Callable[[Tensor], Tensor] | None] = {}
    found: dict[str, Substitute] = {}
    for ref in refs:
        weight = view.weight(ref).float()
        fmt = view.inputs.get(ref.name) if inputs else None
        if fmt not in changes:  # one function for all that share it: its result is remembered
            changes[fmt] = _input_change(fmt, scale, shift)
        found[ref.name] = Substitute(
            weight=fake_quantize(weight * scale, quick(view.format(ref))).div_(scale),
            inputs=changes[fmt],
            offset=None if shift is None else weight @ shift,
        )
    return found


def _input_change(fmt: InputFormat | None, scale: Tensor, shift: Tensor | None) -> Callable[[Tensor], Tensor] | None:
    if fmt is None and shift is None:
        return None

    def change(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        if shift is not None:
            rows = rows - shift
        if fmt is not None and len(rows):
            rows = fake_quantize(rows / scale, fmt.format) * scale
        return rows.to(x.dtype).reshape(x.shape)

    return change


class OutputError:
    """Mean over the sample's tokens of the squared change of an output, summed over features, by substitutes.

    What is compared, for the weights of `groups` that share an input:
    - "module": the output of the modules around them; the layers' own where such a module is just the layer;
    - "attention": where a module makes queries and keys, what its last other linear layer reads (softmax(Q Kᵀ) V);
      elsewhere the layers' own outputs.

    Needs `view.scopes`; NumericsError where those hold no call, so that there is nothing to compare.
    """

    def __init__(self, view: BlockView, groups: Sequence[LinearGroup], site: Site = "module") -> None:
        self._block, self._operations = view.block, LinearOperations(view.block)
        self._refs = {ref.name: ref for group in groups for ref in group.weights}
        calls = scope_calls(view, groups)
        if not calls:
            raise NumericsError(f"{view.where}, {next(iter(self._refs))}: no token of the search sample reached it")
        if site == "attention":
            whole = [call for call in calls if _makes_scores(call.module, groups)]
        else:
            whole = [] if is_linear(groups, calls) else list(calls)
        self._calls = [(call, self._output(call, {}, site)) for call in whole]
        by_layer = [call for call in calls if call not in whole]
        self._tokens = max((call.output.numel() // call.output.shape[-1] for call in by_layer), default=1)
        self._layers = [
            (ref, x, F.linear(x, view.weight(ref).to(x.dtype)))
            for group, x in _inputs(view, groups, by_layer)
            for ref in group.weights
            if any(_contains(call.module, ref) for call in by_layer)
        ]
        self._site: Site = site

    @torch.no_grad()
    def __call__(self, substitutes: Mapping[str, Substitute]) -> float:
        """inf where the output is not finite."""
        keyed = {(self._refs[name].parameter, self._refs[name].index): s for name, s in substitutes.items()}
        total = 0.0
        for call, expected in self._calls:
            change = (self._output(call, keyed, self._site) - expected).float()
            total += change.square().sum(dim=-1).mean().item()
        memo = _Memo()
        for ref, x, expected in self._layers:
            change = (_linear(x, substitutes[ref.name], None, memo) - expected).float()
            total += change.square().sum().item() / self._tokens
        return total if math.isfinite(total) else math.inf

    def _output(self, call: ScopeCall, substitutes: Mapping[tuple[str, int | None], Substitute], site: Site) -> Tensor:
        if not substitutes and site == "module":
            return call.output
        running = _Substitution(self._block, self._operations, substitutes, self._refs.values())
        with torch.no_grad(), running:
            output = self._block.get_submodule(call.module)(*call.args, **call.kwargs)
        if site == "attention" and running.reached is not None:
            return running.reached
        return output[0] if isinstance(output, tuple) else output


class _Memo:
    """The last changed input: query, key and value read one."""

    def __init__(self) -> None:
        self._last: tuple[object, Tensor, Tensor] | None = None

    def __call__(self, change: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not change or self._last[1] is not x:
            self._last = (change, x, change(x))
        return self._last[2]


class _Substitution(TorchFunctionMode):
    """Computes substitutes in the place of weights. reached: what the last linear layer but `own` was given."""

    def __init__(
        self,
        block: nn.Module,
        operations: LinearOperations,
        substitutes: Mapping[tuple[str, int | None], Substitute],
        own: Sequence[WeightRef],
    ) -> None:
        super().__init__()
        self.reached: Tensor | None = None
        self._block, self._operations, self._substitutes = block, operations, substitutes
        self._own = {(ref.parameter, ref.index) for ref in own}
        self._memo = _Memo()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        uses = self._operations.uses(func, args, kwargs)
        keys = [(use.parameter, use.index) for use in uses]
        if uses and not self._own & set(keys):
            self.reached = uses[0].x
        if not any(key in self._substitutes for key in keys):
            return func(*args, **kwargs)
        outputs = [self._compute(use, self._substitutes.get(key)) for use, key in zip(uses, keys, strict=True)]
        return torch.stack(outputs) if uses[0].batched else outputs[0]

    def _compute(self, use: LinearUse, substitute: Substitute | None) -> Tensor:
        bias = None if use.bias is None else self._block.get_parameter(use.bias)
        if substitute is None:  # an expert that stays, in one operation with others
            matrix = self._block.get_parameter(use.parameter)[use.index]
            return F.linear(use.x, matrix.mT if use.transposed else matrix, bias)
        return _linear(use.x, substitute, bias, self._memo)


def _linear(x: Tensor, substitute: Substitute, bias: Tensor | None, memo: _Memo) -> Tensor:
    inputs = x if substitute.inputs is None else memo(substitute.inputs, x)
    output = F.linear(inputs, substitute.weight.to(x.dtype), bias)
    return output if substitute.offset is None else output + substitute.offset.to(x.dtype)


def best(losses: Sequence[float], where: str) -> int:
    """Index of the smallest loss, the first of equals; NumericsError where none is finite."""
    chosen = min(range(len(losses)), key=lambda k: losses[k] if math.isfinite(losses[k]) else math.inf)
    if not math.isfinite(losses[chosen]):
        raise NumericsError(f"{where}: no scale of the search gives a finite output")
    return chosen


def quick(fmt: TensorFormat) -> TensorFormat:
    """The format with min-max ranges in place of an MSE search, which would multiply the cost of every candidate."""
    return replace(fmt, range=RangeFit()) if fmt.range.method == "mse" else fmt


def fold_groups(view: BlockView, fold: Fold) -> list[LinearGroup]:
    """The groups whose input the fold rescales, without those of which nothing is quantized."""
    every = (view.structure.groups[index] for index in (fold.group, *fold.extra_groups))
    return [group for group in every if group.weights]


def quantizes_inputs(scheme: Scheme) -> bool:
    """Whether the input of any linear weight is quantized."""
    return scheme.input is not None or any(o.input is not None for o in scheme.overrides if "input" in o.roles)


def scope_calls(view: BlockView, groups: Sequence[LinearGroup]) -> tuple[ScopeCall, ...]:
    """The calls of the modules around all groups, without those inside another one."""
    found = {call.module: call for group in groups for call in view.scopes.get(group.index, ())}
    return tuple(call for path, call in found.items() if not any(path.startswith(f"{other}.") for other in found))


def is_linear(groups: Sequence[LinearGroup], calls: Sequence[ScopeCall]) -> bool:
    """Whether the module around the weights is just the linear layer: then its output error needs no forward.

    Several groups are the experts behind one norm: around them is the module that weighs their outputs.
    """
    owners = {ref.parameter.rpartition(".")[0] for group in groups for ref in group.weights}
    one_weight = len(groups) == 1 and len(owners) == 1
    return not calls or (one_weight and {call.module for call in calls} <= owners)


def _contains(module: str, ref: WeightRef) -> bool:
    return ref.parameter.startswith(f"{module}.")


def _makes_scores(module: str, groups: Sequence[LinearGroup]) -> bool:
    """Whether rows of a weight inside the module reach an attention score."""
    rows = [item for group in groups for item in group.query_key_rows.items()]
    return any(name.startswith(f"{module}.") and bool(of_weight.any()) for name, of_weight in rows)


def _inputs(
    view: BlockView, groups: Sequence[LinearGroup], calls: Sequence[ScopeCall]
) -> list[tuple[LinearGroup, Tensor]]:
    """What the groups read when the calls are run, `[tokens, in]`; experts without a token of the sample are absent."""
    wanted, seen = {group.index: group for group in groups}, {}

    def keep(group: LinearGroup, x: Tensor) -> None:
        if group.index in wanted:
            seen.setdefault(group.index, x.detach().flatten(0, -2))  # several modules may read one input

    for call in calls:
        with torch.no_grad(), LinearTap(view.block, view.structure, keep):
            view.block.get_submodule(call.module)(*call.args, **call.kwargs)
    return [(wanted[index], x) for index, x in seen.items()]
