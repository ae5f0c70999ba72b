"""What one forward of a block reveals: which linear weights read the same input, and what for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qbench.errors import StructureError
from qbench.structure.blocks import BlockCall
from qbench.structure.operations import LinearOperations, LinearUse
from qbench.structure.recorder import Recorder
from qbench.structure.weights import WeightRef

if TYPE_CHECKING:
    from qbench.structure.folds import Fold


@dataclass(frozen=True, kw_only=True)
class LinearGroup:
    """Linear weights of a block that read the same input tensor."""

    index: int
    """Position in the block, by first use in the forward."""
    weights: tuple[WeightRef, ...]
    """In order of use; an expert's weights form groups of their own, which read the tokens routed to it."""
    in_features: int
    scopes: tuple[str, ...]
    """Paths of the outermost submodules that are called with the input and contain weights of the group.

    For weights that no such submodule contains: of the submodule that owns them. Together they contain every
    weight.
    """
    query_key_rows: Mapping[str, Tensor] = field(compare=False)
    """Weight name -> bool `[out_features]` on the CPU: rows whose output reaches an attention score."""


@dataclass(frozen=True, kw_only=True)
class BlockStructure:
    """The linear weights of a block by what they read; the same for every block of the same shape."""

    groups: tuple[LinearGroup, ...]
    routers: tuple[WeightRef, ...] = ()
    """Linear weights that choose experts and stay in full precision."""
    unread: tuple[str, ...] = ()
    """Paths of 2-D parameters that no linear operation reads (tables, state matrices): not quantized."""
    folds: tuple["Fold", ...] = ()

    @property
    def excluded(self) -> tuple[str, ...]:
        """Names of the linear weights that stay in full precision."""
        return tuple(router.name for router in self.routers)


def trace_block(block: nn.Module, call: BlockCall, hidden: Tensor) -> BlockStructure:
    """The structure of `block`, from one forward on `hidden` `[batch, tokens, features]`; a dozen tokens do.

    Experts that no token of the trace was routed to are added by symmetry: the slices of one parameter are
    used alike. Raises StructureError for a weight that reads two different inputs and for expert parameters
    that are not read expert by expert.
    """
    recorder = Recorder(block)
    recorder.run(block, call, hidden)
    inputs: dict[tuple[str, int | None], tuple[int, ...]] = {}
    for read in recorder.reads:
        if inputs.setdefault((read.use.parameter, read.use.index), read.input) != read.input:
            raise StructureError(f"{read.use.parameter}: is read with two different inputs in one forward of its block")
    experts = {parameter: block.get_parameter(parameter).shape[0] for parameter, index in inputs if index is not None}
    by_input: dict[tuple[int, ...], dict[str, WeightRef]] = {}
    routers: dict[str, WeightRef] = {}
    for read in recorder.reads:
        ref = _weight_ref(block, read.use)
        # Only quantized weights open a group: a router may read what a shared expert reads much later.
        (routers if _is_router(ref, experts) else by_input.setdefault(read.input, {}))[ref.name] = ref
    query_key_rows = recorder.query_key_rows()
    groups: list[LinearGroup] = []
    for index, (key, refs) in enumerate(by_input.items()):
        weights = tuple(refs.values())
        groups.append(
            LinearGroup(
                index=index,
                weights=weights,
                in_features=weights[0].in_features,
                scopes=_scopes(weights, recorder.called_with(key)),
                query_key_rows={ref.name: query_key_rows[ref.parameter, ref.index] for ref in weights},
            )
        )
    groups = _complete_experts(groups, experts)
    read_parameters = {parameter for parameter, _ in inputs}
    return BlockStructure(groups=tuple(groups), routers=tuple(routers.values()), unread=_unread(block, read_parameters))


class LinearTap(TorchFunctionMode):
    """Context manager for one forward of a block: calls `on_input(group, x)` before each group is used.

    `x` is the group's input, `[..., in_features]`, and `on_input` may rewrite the group's weights in place:
    the forward goes on with what it wrote. Groups come in the order of the forward; experts that no token is
    routed to are skipped. A tap serves one forward; `reset` makes it ready for the next. The block's
    parameters must not be replaced or moved after construction.
    """

    def __init__(
        self, block: nn.Module, structure: BlockStructure, on_input: Callable[[LinearGroup, Tensor], None]
    ) -> None:
        super().__init__()
        self._operations = LinearOperations(block)
        self._groups = {(ref.parameter, ref.index): group for group in structure.groups for ref in group.weights}
        self._on_input = on_input
        self._fired: set[int] = set()

    @property
    def fired(self) -> frozenset[int]:
        """Indices of the groups that were used since construction or `reset`."""
        return frozenset(self._fired)

    def reset(self) -> None:
        """Forgets which groups were used."""
        self._fired.clear()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for use in self._operations.uses(func, args, kwargs):
            group = self._groups.get((use.parameter, use.index))
            if group is not None and group.index not in self._fired and use.x.numel():
                self._fired.add(group.index)
                self._on_input(group, use.x)
        return func(*args, **kwargs)


def _weight_ref(block: nn.Module, use: LinearUse) -> WeightRef:
    out_features, in_features = block.get_parameter(use.parameter).shape[-2:]
    if use.transposed:
        out_features, in_features = in_features, out_features
    name = use.parameter if use.index is None else f"{use.parameter}[{use.index}]"
    return WeightRef(
        name=name,
        parameter=use.parameter,
        index=use.index,
        transposed=use.transposed,
        out_features=out_features,
        in_features=in_features,
        bias=use.bias or _sibling_bias(block, use, out_features),
    )


def _sibling_bias(block: nn.Module, use: LinearUse, out_features: int) -> str | None:
    """The bias that a module adds in an operation of its own: by its name and size."""
    owner = _owner(use.parameter)
    bias = f"{owner}.bias" if owner else "bias"
    vectors = dict(block.get_submodule(owner).named_parameters(prefix=owner, recurse=False))
    fits = use.index is None and bias in vectors and vectors[bias].shape == (out_features,)
    return bias if fits else None


def _is_router(ref: WeightRef, experts: Mapping[str, int]) -> bool:
    """Whether a weight has one output per expert of expert weights that lie beside it or deeper."""
    return ref.index is None and any(
        ref.out_features == n_experts and f"{ref.parameter}.".startswith(_prefix(_owner(_owner(parameter))))
        for parameter, n_experts in experts.items()
    )


def _owner(path: str) -> str:
    """Path of the module that holds what lies at `path`: "a.b" -> "a", "a" -> ""."""
    return path.rpartition(".")[0]


def _prefix(path: str) -> str:
    return f"{path}." if path else ""


def _scopes(weights: tuple[WeightRef, ...], called: list[str]) -> tuple[str, ...]:
    scopes: list[str] = []
    for ref in weights:
        containing = [path for path in called if ref.parameter.startswith(f"{path}.")]
        scopes.append(min(containing, key=len, default=_owner(ref.parameter)))
    return tuple(dict.fromkeys(scopes))


def _complete_experts(groups: list[LinearGroup], experts: Mapping[str, int]) -> list[LinearGroup]:
    """The groups with every expert's, in ascending order of experts where the first expert's groups stand."""

    def expert_of(group: LinearGroup) -> int | None:
        return group.weights[0].index

    first = next((position for position, group in enumerate(groups) if expert_of(group) is not None), None)
    if first is None:
        return groups
    pattern = [group for group in groups if expert_of(group) == expert_of(groups[first])]
    traced = {(ref.parameter, ref.index): group for group in groups for ref in group.weights}
    completed = [
        _of_expert(group, index, traced)
        for index in range(experts[pattern[0].weights[0].parameter])
        for group in pattern
    ]
    others = [group for group in groups if expert_of(group) is None]
    ordered = others[:first] + completed + others[first:]
    return [replace(group, index=position) for position, group in enumerate(ordered)]


def _of_expert(group: LinearGroup, index: int, traced: Mapping[tuple[str, int | None], LinearGroup]) -> LinearGroup:
    """The group of expert `index` that corresponds to `group`; it must agree with its own trace."""
    weights = tuple(replace(ref, index=index, name=f"{ref.parameter}[{index}]") for ref in group.weights)
    rows = {new.name: group.query_key_rows[old.name] for old, new in zip(group.weights, weights, strict=True)}
    seen = {traced[ref.parameter, index].weights for ref in weights if (ref.parameter, index) in traced}
    if seen - {weights}:
        raise StructureError(f"{weights[0].name}: this expert's weights are not grouped as the others' are")
    return replace(group, weights=weights, query_key_rows=rows)


def _unread(block: nn.Module, read: set[str]) -> tuple[str, ...]:
    unread: list[str] = []
    for name, parameter in block.named_parameters():
        if name in read or not parameter.is_floating_point():
            continue
        if parameter.ndim == 3 and min(parameter.shape) > 1:
            raise StructureError(
                f"{name}: no linear operation reads slices of this {list(parameter.shape)} parameter; "
                'experts must be computed one by one (experts_implementation="eager")'
            )
        if parameter.ndim == 2:
            unread.append(name)
    return tuple(unread)
