"""What lies before and after the blocks of a model: tables that are added up, a final norm, the head."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qbench.errors import StructureError
from qbench.structure.blocks import capture_calls, find_blocks, finish
from qbench.structure.norms import Norm, recognize_norm
from qbench.structure.online import InputTransform

#: Rows of a table or of the head that a proof looks at, and rows that are rotated at once.
PROOF_ROWS, CHUNK_ROWS = 64, 4096

# Norms that compute in float32 err by 1e-7.
_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Paths in the model. tables: embeddings of tokens and positions, whose sum enters the first block."""

    tables: tuple[str, ...]
    norm: Norm | None
    head: str


def find_ends(model: nn.Module, input_ids: Tensor) -> Ends:
    """The ends of `model`, whose blocks may be on the meta device, from one forward on `input_ids` `[batch, tokens]`.

    StructureError where something else stands before or behind the blocks.
    """
    before, behind = _called_outside(model, input_ids)
    head = model.get_output_embeddings()
    for path in before:
        if not isinstance(model.get_submodule(path), nn.Embedding):
            raise StructureError(
                f"{path} stands between the embedding and the first block, so the residual stream cannot be rotated"
            )
    norms = [path for path in behind if model.get_submodule(path) is not head]
    if head is None or len(norms) > 1 or len(norms) == len(behind):
        raise StructureError(
            f"{type(model).__name__}: {', '.join(behind) or 'nothing'} behind the last block, where a norm and the "
            "head can be rotated"
        )
    path = next(path for path in behind if path not in norms)
    norm = recognize_norm(model, norms[0]) if norms else None
    return Ends(tables=tuple(before), norm=norm, head=path)


def rotate_ends(model: nn.Module, ends: Ends, stream: InputTransform, *, centre: bool) -> None:
    """Rotate what `ends` names in place; the head gets a weight of its own. All parameters that change are replaced by
    new ones in their dtype, computed in float64; `model` must be the caller's, its old parameters are left alone."""
    head = model.get_submodule(ends.head)
    old_head = head.weight

    def of_stream(rows: Tensor) -> Tensor:
        return stream(rows - rows.mean(dim=-1, keepdim=True) if centre else rows)

    for path in ends.tables:
        table = model.get_submodule(path)
        table.weight = _by_rows(table.weight, of_stream)
    gain = ends.norm.gain_of(model) if ends.norm is not None else None
    shift = ends.norm.shift_of(model) if ends.norm is not None else None
    if shift is not None:
        if not isinstance(head, nn.Linear):
            raise StructureError(
                f"{ends.head}: the final norm adds a shift, and {type(head).__name__} takes no bias for it"
            )
        moved = _by_rows(old_head, lambda rows: (rows @ shift)[:, None]).data[:, 0]
        bias = moved if head.bias is None else (head.bias.detach().double() + moved.double()).to(moved.dtype)
        head.bias = nn.Parameter(bias, requires_grad=False)
    head.weight = _by_rows(old_head, lambda rows: stream(rows if gain is None else rows * gain))
    if ends.norm is not None:
        module = model.get_submodule(ends.norm.path)
        for name in (ends.norm.gain, ends.norm.shift):
            if name is not None:  # what the caller shares with another model is not overwritten
                setattr(module, name, nn.Parameter(module.get_parameter(name).detach().clone(), requires_grad=False))
        ends.norm.make_plain(model)
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False


def prove_ends(
    model: nn.Module, ends: Ends, stream: InputTransform, input_ids: Tensor, *, width: int, centre: bool
) -> float:
    """Largest relative difference, in float64, that rotating the ends makes to what enters the blocks (rotated) and to
    the logits of rotated hidden states. StructureError where it is no rounding.

    It looks at the first rows of tables and head only. `input_ids` must be smaller than PROOF_ROWS.
    """
    small = _miniature(model)
    rotated = copy.deepcopy(small)
    rotate_ends(rotated, ends, stream, centre=centre)

    def of_stream(hidden: Tensor) -> Tensor:
        return stream(hidden - hidden.mean(dim=-1, keepdim=True) if centre else hidden)

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*input_ids.shape, width, generator=generator, dtype=torch.float64).to(input_ids.device)
    with torch.no_grad():
        entering = [of_stream(capture_calls(small, input_ids)[0]), capture_calls(rotated, input_ids)[0]]
        logits = [finish(small, hidden, input_ids), finish(rotated, of_stream(hidden), input_ids)]
    worst = 0.0
    for where, (expected, found) in (("embeddings", entering), ("logits", logits)):
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        worst = max(worst, error)
        if not error <= _TOLERANCE:
            raise StructureError(
                f"{type(model).__name__}: rotated {where} differ by {error:.2g}, so it cannot be rotated"
            )
    return worst


def _called_outside(model: nn.Module, input_ids: Tensor) -> tuple[list[str], list[str]]:
    """Paths of the modules with parameters of their own that a forward calls before and behind the blocks."""
    prefix, _ = find_blocks(model)
    called: list[str] = []
    with ExitStack() as hooks:
        for path, module in model.named_modules():
            own = next(module.parameters(recurse=False), None)
            if own is not None and not path.startswith(f"{prefix}."):
                hook = module.register_forward_pre_hook(lambda *_, path=path: called.append(path))
                hooks.callback(hook.remove)
        with torch.no_grad():
            hidden, _ = capture_calls(model, input_ids)
            before = list(called)
            called.clear()
            finish(model, hidden, input_ids)
    return list(dict.fromkeys(before)), list(dict.fromkeys(called[len(before) :]))


def _miniature(model: nn.Module) -> nn.Module:
    """A float64 copy without blocks (they are on the meta device) and with the first rows of tables and head only."""
    prefix, _ = find_blocks(model)
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings()
    short = {id(module.weight) for module in (*tables, head)} | {id(getattr(head, "bias", None))}

    def own(name: str, parameter: Tensor) -> Tensor:
        if name.startswith(f"{prefix}."):
            return torch.empty_like(parameter, device="meta")
        value = parameter[:PROOF_ROWS] if id(parameter) in short else parameter
        return value.detach().double().clone()

    small = copy_with(model, own)
    for module in small.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # it may lie behind the first rows, and matters to gradients only
    return small


def copy_with(model: nn.Module, parameter: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """A copy of the modules with other parameters, `parameter(name, old)`; buffers are shared, ties are kept."""
    memo: dict[int, object] = {}
    for name, old in model.named_parameters():
        memo[id(old)] = nn.Parameter(parameter(name, old), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    return copy.deepcopy(model, memo)


def _by_rows(weight: Tensor, change: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """Rows `[rows, in]` in float64, some at a time, in the weight's own dtype again."""
    parts = [change(rows.detach().double()).to(weight.dtype) for rows in weight.split(CHUNK_ROWS)]
    return nn.Parameter(torch.cat(parts), requires_grad=False)
