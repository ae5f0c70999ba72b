"""Values of options: of the right type and in range, or a `SpecError` that says what is accepted."""

from __future__ import annotations

from typing import Any

from qbench.errors import SpecError, written


def integer(option: str, value: object, low: int, high: int | None = None, also: str = "") -> int:
    """`value` if it is an integer from low to high; SpecError otherwise."""
    upper = f" to {high}" if high is not None else " or more"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise SpecError(option, value, f"must be an integer, {low}{upper}{also}")
    return value


def flag(option: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise SpecError(option, value, "must be true or false")
    return value


def choice(option: str, value: object, accepted: Any) -> Any:
    if not isinstance(value, (str, bool)) or value not in accepted:
        raise SpecError(option, value, f"must be one of {', '.join(map(written, accepted))}")
    return value
