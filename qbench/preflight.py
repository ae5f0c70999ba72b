"""What can be refused from a model's configuration alone: group sizes, patterns and contexts that don't fit it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from qbench.compose import Point
from qbench.engine.kv import check_cache
from qbench.engine.rotated import RotatedSource
from qbench.engine.source import MemorySource
from qbench.errors import SpecError, StructureError
from qbench.formats.scheme import Scheme
from qbench.models.load import miniature
from qbench.stages.base import WeightShape
from qbench.stages.pipeline import Pipeline
from qbench.structure.blocks import find_blocks
from qbench.structure.rotation import Rotation

#: Parameters of a block on which a rotation is tried before weights load: about 1 GB in float32.
LARGEST_TRIAL = 250_000_000

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    """One linear weight by its full name; `block` is None outside the decoder blocks, `path` its name in the block.
    experts: whether it stands for all experts' slices of one parameter."""

    name: str
    path: str
    block: int | None
    out_features: int
    in_features: int
    experts: bool


def check_point(point: Point, skeleton: PreTrainedModel) -> None:
    """Raises SpecError for what the model's shape does not allow."""
    check_context(point, skeleton)
    if point.scheme is None:
        return
    shapes, blocks = linear_shapes(skeleton)
    check_overrides(point.scheme, shapes, blocks)
    check_groups(point.scheme, shapes, blocks)
    check_stages(point.pipeline, point.scheme, shapes, blocks)
    check_attention(point, skeleton, blocks)


def check_context(point: Point, skeleton: PreTrainedModel) -> None:
    limit = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:  # positions are not bounded (ALiBi)
        return
    lengths = [(e.length_option, e.spec.length) for e in point.evaluations if e.spec.length is not None]
    if point.spec.calibration is not None:
        lengths.append(("calib.length", point.spec.calibration.length))
    for option, length in lengths:
        if length > limit:
            raise SpecError(option, length, f"at most {limit}, the context of {point.model.name}")


def check_overrides(scheme: Scheme, shapes: list[LinearShape], blocks: int) -> None:
    """Every override must match something; a block number must exist."""
    for override in scheme.overrides:
        for number in override.blocks or ():
            if not -blocks <= number < blocks:
                raise SpecError("overrides.blocks", number, f"a block of this model, {-blocks} to {blocks - 1}")
        if not any(override.matches(shape.path, shape.block, blocks) for shape in shapes):
            names = dict.fromkeys(_owner(shape.path) for shape in shapes)
            raise SpecError(
                "overrides.modules", override.modules, f"matches nothing; this model has {', '.join(names)}"
            )
    with_all = _formats(scheme, shapes, blocks)
    for place, override in enumerate(scheme.overrides):
        others = scheme.overrides[:place] + scheme.overrides[place + 1 :]
        if _formats(replace(scheme, overrides=others), shapes, blocks) == with_all:
            where = f"modules: {override.modules or 'all'}, blocks: {list(override.blocks or ()) or 'all'}"
            raise SpecError("overrides", f"[{place}] ({where})", "an entry that changes a format: this one does not")


def _formats(scheme: Scheme, shapes: list[LinearShape], blocks: int) -> list[object]:
    """Everything that the scheme decides about this model."""
    weights = [scheme.of_weight(shape.path, shape.block, blocks) for shape in shapes]
    inputs = [scheme.of_input(shape.path, shape.block, blocks) for shape in shapes if shape.block is not None]
    return [weights, inputs, [scheme.of_cache(block, blocks) for block in range(blocks)]]


def check_groups(scheme: Scheme, shapes: list[LinearShape], blocks: int) -> None:
    """Groups must divide in_features of the weights and of their inputs, unless a rest is allowed."""
    for shape in shapes:
        weight = scheme.of_weight(shape.path, shape.block, blocks)
        if weight is not None and not weight.fits(shape.in_features, shape.out_features):
            remedy = "-1 (channel), 0 (tensor); or partial_group=true for a shorter last group"
            option, size = ("format", weight.name) if weight.name else ("group_size", weight.group_size)
            if weight.name:
                accepted = (
                    f"blocks of {weight.block.columns} do not divide in_features {shape.in_features} of {shape.name}"
                )
            else:
                accepted = (
                    f"does not divide in_features {shape.in_features} of {shape.name}; sizes that fit every layer: "
                    f"{_fitting(shapes)}, {remedy}"
                )
            raise SpecError(option, size, accepted)
        inputs = scheme.of_input(shape.path, shape.block, blocks) if shape.block is not None else None
        if inputs is not None and not inputs.format.fits(shape.in_features):
            option, size = (
                ("act.format", inputs.format.name)
                if inputs.format.name
                else (
                    "act.group_size",
                    inputs.format.block.columns,
                )
            )
            raise SpecError(
                option,
                size,
                f"groups of {inputs.format.block.columns} do not divide in_features {shape.in_features} of "
                f"{shape.name}; sizes that fit every layer: {_fitting(shapes)}",
            )


def check_stages(pipeline: Pipeline, scheme: Scheme, shapes: list[LinearShape], blocks: int) -> None:
    """Every stage must be able to serve every quantized weight of the blocks."""
    inside = [shape for shape in shapes if shape.block is not None]
    quantized = [
        WeightShape(
            name=shape.name,
            format=fmt,
            out_features=shape.out_features,
            in_features=shape.in_features,
            experts=shape.experts,
        )
        for shape in inside
        if (fmt := scheme.of_weight(shape.path, shape.block, blocks)) is not None
    ]
    pipeline.check_shapes(quantized)


def check_rotation(name: str, rotation: Rotation, skeleton: PreTrainedModel, model: str) -> None:
    """Raises SpecError for a model that stage `name` cannot rotate so, found out on a random block of its shape.

    Blocks of more than LARGEST_TRIAL parameters are not tried: then the run finds out, before it quantizes anything.
    """
    _, blocks = find_blocks(skeleton)
    if sum(parameter.numel() for parameter in blocks[0].parameters()) > LARGEST_TRIAL:
        return
    try:
        RotatedSource(MemorySource(miniature(skeleton.config)), rotation)
    except StructureError as error:
        raise SpecError("algo", name, f"a model that can be rotated; {model}: {error}") from error


def check_attention(point: Point, skeleton: PreTrainedModel, blocks: int) -> None:
    """A quantized cache needs torch's attention function, where keys and values can be replaced."""
    formats = {point.scheme.of_cache(block, blocks) for block in range(blocks)} - {None}
    if not formats:
        return
    lengths = [e.spec.length for e in point.evaluations]
    longest = None if None in lengths else max(lengths)  # None: as the tasks' items come
    residual = min(fmt.residual for fmt in formats)
    if longest is not None and residual >= longest:
        raise SpecError("kv.residual", residual, f"fewer tokens than eval.length={longest}: else nothing is quantized")
    config = skeleton.config.get_text_config()
    if config._attn_implementation != "sdpa":
        raise SpecError(
            "kv_bits",
            point.spec.scheme.cache.label if point.spec.scheme.cache else "overrides",
            f"a model with torch's scaled-dot-product attention; {point.model.name} has another one",
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for fmt in formats:
        check_cache(fmt, head_dim)


def linear_shapes(skeleton: PreTrainedModel) -> tuple[list[LinearShape], int]:
    """The linear weights of the blocks and the head, without running the model, and the number of blocks."""
    from transformers.pytorch_utils import Conv1D

    shapes = []
    prefix, blocks = find_blocks(skeleton)
    for number, block in enumerate(blocks):
        experts = [(name, p.shape[0]) for name, p in block.named_parameters() if p.ndim == 3]
        for path, module in block.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, nn.Embedding) or parameter.ndim not in (2, 3):
                    continue
                size = tuple(parameter.shape[-2:])
                rows, columns = size[::-1] if isinstance(module, Conv1D) else size
                inner = f"{path}.{name}" if path else name
                if parameter.ndim == 2 and any(
                    rows == count and inner.startswith(f"{_owner(_owner(expert))}.") for expert, count in experts
                ):
                    continue  # a router, which stays in full precision
                shapes.append(
                    LinearShape(
                        name=f"{prefix}.{number}.{inner}",
                        path=inner,
                        block=number,
                        out_features=rows,
                        in_features=columns,
                        experts=parameter.ndim == 3,
                    )
                )
    head = skeleton.get_output_embeddings()
    if head is not None:
        rows, columns = head.weight.shape
        shapes.append(
            LinearShape(
                name="lm_head.weight",
                path="lm_head.weight",
                block=None,
                out_features=rows,
                in_features=columns,
                experts=False,
            )
        )
    return shapes, len(blocks)


def _fitting(shapes: list[LinearShape]) -> str:
    widths = {shape.in_features for shape in shapes if shape.block is not None}
    return ", ".join(str(g) for g in range(8, min(widths) + 1) if all(width % g == 0 for width in widths))


def _owner(path: str) -> str:
    return path.rpartition(".")[0] or path
