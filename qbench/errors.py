"""What can go wrong, by kind: every message is one line that says what, where, which value and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class QbenchError(Exception):
    """Base of all errors that qbench raises on purpose; `str(error)` is one readable line."""


class SpecError(QbenchError):
    """A wish that cannot be carried out: unknown name or key, value out of range, impossible combination.

    Raised before any weights load. `option` is the command-line key, `value` what was given, `accepted` what
    would have been.
    """

    def __init__(self, option: str, value: object, accepted: str) -> None:
        super().__init__(f"{option}={written(value)}: {accepted}")
        self.option, self.value, self.accepted = option, value, accepted


class AssetError(QbenchError):
    """A model, text or database file that is missing, damaged or out of reach."""


class StructureError(QbenchError):
    """A model whose blocks, linear weights or folds are not as the requested pipeline needs them."""


class NumericsError(QbenchError):
    """Numbers that must not go on: NaN or infinite weights, a singular Hessian, a transform that changed the model."""


class EvaluationError(QbenchError):
    """A measurement that could not be made or is not finite."""


@contextmanager
def numerics_at(where: str) -> Iterator[None]:
    """Every NumericsError inside says `where` it happened: what computes doesn't know for whom."""
    try:
        yield
    except NumericsError as error:
        raise NumericsError(f"{where}: {error}") from error


def written(value: object) -> str:
    """`value` as it is written on the command line and in YAML: true, false, null, [a,b], {a:b}."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{name}:{written(inner)}' for name, inner in value.items())}}}"
    return str(value)
