"""Digests of states: which pass a resume point belongs to, and what every stage decided in every block."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor

from qbench.stages.base import Outcome, Stage
from qbench.structure.online import plain
from qbench.structure.rotation import Rotation
from qbench.structure.trace import LinearGroup

#: What a fingerprint's layer metric is called, behind the stage's name.
SUFFIX = "_fingerprint"
_DIGITS = 12  # 48 bits: a double, which is what a layer metric is, holds whole numbers of up to 53


def identity_of(*parts: object) -> str:
    """sha256 (hex) of tensors by shape and value and of everything else by its text."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            state.update(f"{part.dtype} {list(part.shape)}\n".encode())
            flat = part.detach().cpu().contiguous().view(-1)
            state.update(flat.view(torch.uint8).numpy().tobytes())  # as bytes: numpy does not know bfloat16
        else:
            state.update(f"{part}\n".encode())
    return state.hexdigest()


def fingerprints(stage: Stage, outcome: Outcome, groups: Mapping[int, LinearGroup]) -> list[tuple[str, str, float]]:
    """(parameter or weight, "<stage>_fingerprint", number) for all that the stage decided, to the bit.

    Equal numbers are equal parameters, ranges, codes and transforms of inputs, but for a chance of 2⁻⁴⁸; so the first
    number in which two runs differ is where they part. Numbers are whole and below 2⁴⁸. groups: by index, for
    transforms, which count for the group's first weight.
    """
    parts: dict[str, list[object]] = {}
    for path, value in outcome.parameters.items():
        parts.setdefault(path, []).extend(("parameter", value))
    for name, found in outcome.ranges.items():
        parts.setdefault(name, []).extend(("range", found.lower, found.upper))
    for index, transform in outcome.online.items():
        parts.setdefault(groups[index].weights[0].name, []).extend(("online", plain(transform)))
    for name, codes in outcome.codes.items():
        parts.setdefault(name, []).extend(("codes", codes.sha256()))
    return [(name, stage.name + SUFFIX, _number(of)) for name, of in parts.items()]


def rotation_fingerprint(stage: Stage, rotation: Rotation) -> tuple[int, str, str, float]:
    """The same of a rotation of the whole model, as a layer metric of its first block."""
    return (0, "", stage.name + SUFFIX, _number(rotation))


def _number(value: object) -> float:
    return float(int(identity_of(*_leaves(value))[:_DIGITS], 16))


def _leaves(value: object) -> Iterator[object]:
    """Tensors and plain values, with the names and types that give them meaning."""
    if is_dataclass(value):
        yield type(value).__name__
        value = {each.name: getattr(value, each.name) for each in fields(value)}
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield name
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
