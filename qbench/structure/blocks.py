"""The decoder blocks of a model, and how the model calls them: enough to run a model block by block."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from qbench.errors import StructureError


@dataclass(frozen=True, kw_only=True)
class BlockCall:
    """Everything that the model passes to one block, except the hidden states.

    It is good for hidden states of the shape it was captured with: masks and position tables have that shape.
    """

    args: tuple[Any, ...]
    """Positional arguments after the hidden states (after none, where those are passed by keyword)."""
    kwargs: Mapping[str, Any]
    keyword: str | None = None
    """Name under which the hidden states are passed; None: as the first positional argument."""

    def arguments(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the block for hidden states `[batch, tokens, features]`."""
        if self.keyword is None:
            return (hidden, *self.args), dict(self.kwargs)
        return self.args, {**self.kwargs, self.keyword: hidden}

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states that leave `block`: `[batch, tokens, features]`."""
        args, kwargs = self.arguments(hidden)
        return output_of(block(*args, **kwargs))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "BlockCall":
        """The same call with its tensors on `device` and its floating-point tensors in `dtype`."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
            if isinstance(value, tuple):
                return tuple(move(item) for item in value)
            if isinstance(value, list):
                return [move(item) for item in value]
            if isinstance(value, dict):
                return {key: move(item) for key, item in value.items()}
            return value

        return BlockCall(args=move(self.args), kwargs=move(dict(self.kwargs)), keyword=self.keyword)


def output_of(result: Any) -> Tensor:
    """The hidden states in what a block returned: the tensor itself or the first of a tuple."""
    return result[0] if isinstance(result, tuple) else result


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and module list of the decoder blocks: as many as the config says, all called in a forward.

    No forward runs when the number decides. Raises StructureError when there is not exactly one such list.
    """
    n_blocks = model.config.get_text_config().num_hidden_layers
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == n_blocks and not inside:
            found[path] = module
    if len(found) > 1:
        found = {path: blocks for path, blocks in found.items() if _all_called(model, blocks)}
    if len(found) != 1:
        raise StructureError(
            f"{type(model).__name__}: {len(found)} module lists of {n_blocks} blocks "
            f"({', '.join(found) or 'none'}) are called in order by its forward, expected exactly one"
        )
    return next(iter(found.items()))


def capture_calls(model: nn.Module, input_ids: Tensor) -> tuple[Tensor, tuple[BlockCall, ...]]:
    """Hidden states `[batch, tokens, features]` entering the first block, and how each block is called.

    Runs the model's own forward on `input_ids` `[batch, tokens]` up to the last block without executing any
    block, so the blocks may be on the meta device. There is no key/value cache. From here on the model
    computes its experts one by one (`use_single_experts`), as the rest of this package needs it.
    """
    use_single_experts(model)
    _, blocks = find_blocks(model)
    return _capture(model, blocks, input_ids)


def finish(model: nn.Module, hidden: Tensor, input_ids: Tensor) -> Tensor:
    """Logits `[batch, tokens, vocabulary]` from the hidden states that leave the last block.

    `hidden` is `[batch, tokens, features]`, `input_ids` `[batch, tokens]` the tokens it came from. Everything
    after the blocks is the model's own: final norm, head, softcapping.
    """
    _, blocks = find_blocks(model)
    entered: list[Tensor] = []

    def enter(_: int, args: tuple[Any, ...], kwargs: dict[str, Any], keyword: str | None) -> Tensor:
        entered.append(_hidden_of(args, kwargs, keyword))
        return hidden

    with _bypass(blocks, enter):
        logits = model(input_ids=input_ids, use_cache=False).logits
    if len(entered) != len(blocks):
        raise StructureError(f"{type(model).__name__}: its forward called {len(entered)} of {len(blocks)} blocks")
    return logits


def use_single_experts(model: nn.Module) -> None:
    """Makes a mixture-of-experts model compute each expert by its own linear operations.

    Grouped kernels read a whole expert parameter at once, and what one expert was given could not be told.
    """
    implementation = getattr(model.config.get_text_config(), "_experts_implementation", None)
    if implementation not in (None, "eager"):
        model.set_experts_implementation("eager")


class _LastBlock(Exception):
    """Ends a forward when the last block has been reached: the head of a large vocabulary is expensive."""


class _Output(Tensor):
    """Hidden states that a model may use as a block's tensor or, by `[0]`, as the first of a block's tuple.

    What a block returns is not known before it ran, and a block on the meta device cannot run.
    """

    # Operations on it return plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __getitem__(self, key: Any) -> Tensor:
        plain = self.as_subclass(Tensor)
        return plain if isinstance(key, int) and key == 0 else plain[key]


_Enter = Callable[[int, tuple[Any, ...], dict[str, Any], str | None], Tensor]


@contextmanager
def _bypass(blocks: nn.ModuleList, enter: _Enter) -> Iterator[None]:
    """Replaces the forward of every block by `enter(index, args, kwargs, keyword of the hidden states)`.

    The instances' `forward` is replaced and not the instances: models read other attributes of their blocks.
    """
    with ExitStack() as undo:
        for index, block in enumerate(blocks):
            first = next(iter(inspect.signature(block.forward).parameters))

            def forward(*args: Any, _index: int = index, _first: str = first, **kwargs: Any) -> Tensor:
                hidden = enter(_index, args, kwargs, None if args else _first)
                return hidden.as_subclass(_Output)

            own = block.__dict__.get("forward")
            undo.callback(setattr, block, "forward", own) if own else undo.callback(delattr, block, "forward")
            block.forward = forward
        yield


def _hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], keyword: str | None) -> Tensor:
    return args[0] if keyword is None else kwargs[keyword]


def _capture(model: nn.Module, blocks: nn.ModuleList, input_ids: Tensor) -> tuple[Tensor, tuple[BlockCall, ...]]:
    calls: list[BlockCall] = []
    entering: list[Tensor] = []

    def refuse(reason: str) -> NoReturn:
        raise StructureError(f"{type(model).__name__}: {reason}, so it cannot be run block by block")

    def enter(index: int, args: tuple[Any, ...], kwargs: dict[str, Any], keyword: str | None) -> Tensor:
        hidden = _hidden_of(args, kwargs, keyword)
        if index != len(calls):
            refuse(f"block {index} is called when block {len(calls)} is due")
        if entering and (hidden.data_ptr() != entering[0].data_ptr() or hidden.shape != entering[0].shape):
            refuse(f"hidden states are changed between blocks {index - 1} and {index}")
        entering.append(hidden)
        rest = args[1:] if keyword is None else args
        others = {name: value for name, value in kwargs.items() if name != keyword}
        calls.append(BlockCall(args=rest, kwargs=others, keyword=keyword))
        if len(calls) == len(blocks):
            raise _LastBlock
        return hidden

    with _bypass(blocks, enter):
        try:
            model(input_ids=input_ids, use_cache=False)
        except _LastBlock:
            return entering[0], tuple(calls)
    return refuse(f"its forward calls {len(calls)} of {len(blocks)} blocks")


def _all_called(model: nn.Module, blocks: nn.ModuleList) -> bool:
    device = model.get_input_embeddings().weight.device
    try:
        with torch.no_grad():
            _capture(model, blocks, torch.zeros(1, 2, dtype=torch.long, device=device))
    except StructureError:
        return False
    return True
