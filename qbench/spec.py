"""What a run *means*, as frozen values, and the key that names it.

A `RunSpec` holds everything that can change a number and nothing else. Two runs with equal keys are the same
experiment. This module is plain Python: the database and the analysis read it without importing torch.

Not in the key, because the result does not depend on them (each is recorded in the row instead):
  device, threads       the same computation elsewhere; rows of different environments are told apart by `environment`
  source                reading blocks from memory or from disk gives identical codes (a test holds this)
  batch sizes, chunks   statistics are sums over tokens, evaluation is per window
  evaluators            measuring more later appends metrics to the same run
  seeds                 when nothing in the pipeline draws from them (canonical form drops them)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass

#: Version of the canonical form itself: changes when the same meaning would be written differently.
KEY_SCHEME = 2

Scalar = None | bool | int | float | str


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A checkpoint by content. `fingerprint` is a sha256 over weights, configuration and tokenizer."""

    name: str
    fingerprint: str
    dtype: str


@dataclass(frozen=True, kw_only=True)
class CalibrationSpec:
    """`n` sequences of `length` tokens of one text; `seed` is None where nothing is drawn. `shuffle` says what stands
    in another order inside every sequence; None, as in all specs older than it, is left out of keys and rows."""

    corpus: str
    fingerprint: str
    sampler: str
    n: int
    length: int
    seed: int | None
    shuffle: str | None = None

    @property
    def label(self) -> str:
        """What tables call the text: its name, and what is shuffled."""
        return self.corpus if self.shuffle is None else f"{self.corpus}, {self.shuffle} shuffled"


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One step of a pipeline: its registered name, the version of its numbers and every option, defaults included."""

    name: str
    version: int
    options: tuple[tuple[str, Scalar], ...]


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One point of the grid. `algo` is the pipeline's published name: a label, not part of the key. `scheme` holds the
    formats of all roles (`qbench.formats.scheme.Scheme`), frozen values too: this module, which does not know torch,
    only reads their fields."""

    algo: str
    model: ModelSpec
    pipeline: tuple[StageSpec, ...] = ()
    scheme: object | None = None
    calibration: CalibrationSpec | None = None
    seed: int | None = None

    def canonical(self) -> dict:
        """The meaning as nested plain values with a type tag on every record; labels of assets are left out."""
        tagged = _tagged(self)
        del tagged["algo"], tagged["model"]["name"]
        if self.calibration is not None:
            del tagged["calibration"]["corpus"]
            if self.calibration.shuffle is None:
                del tagged["calibration"]["shuffle"]
        return {"key_scheme": KEY_SCHEME, **tagged}

    def key(self) -> str:
        """sha256 (hex) of the canonical form."""
        return digest(self.canonical())

    def family(self) -> str:
        """sha256 (hex) of the canonical form without seeds: names runs that differ by chance alone."""
        canonical = self.canonical()
        canonical["seed"] = None
        if self.calibration is not None:
            canonical["calibration"]["seed"] = None
        return digest(canonical)

    def describe(self) -> dict:
        """Everything, labels included, as plain values for the `run.spec` column."""
        values = asdict(self)
        if self.calibration is not None and self.calibration.shuffle is None:
            del values["calibration"]["shuffle"]
        for stage in values["pipeline"]:
            stage["options"] = dict(stage["options"])
        if self.scheme is not None:
            for override, fields_ in zip(self.scheme.overrides, values["scheme"]["overrides"], strict=True):
                fields_["label"] = override.label
        return values


@dataclass(frozen=True, kw_only=True)
class EvaluationSpec:
    """One measurement that is wanted of a model: one evaluator, one text or task, one protocol.

    `fingerprint` is the sha256 of what is read (a text, a task's items). `mode` is how: "prefill" (a window in one
    forward), "decode" (token by token through the cache), "rolling", "0-shot" and so on. `length` is the tokens of a
    window, or of the largest context (None: the model's); `n` the number of items (None: all). `options` are whatever
    else changes the number, sorted by name. `task` is the name of the text or task and, like every label, not in the
    key.
    """

    evaluator: str
    version: int
    task: str
    fingerprint: str
    length: int | None
    n: int | None
    mode: str = "prefill"
    options: tuple[tuple[str, Scalar], ...] = ()

    @property
    def protocol(self) -> str:
        """The rules of the measurement, by which rows are told apart: `window-512`, `decode-512`, `0-shot`."""
        mode = "window" if self.mode == "prefill" else self.mode
        return mode if self.length is None else f"{mode}-{self.length}"

    def key(self) -> str:
        tagged = _tagged(self)
        del tagged["task"]
        if not self.options:  # windows have none: their keys are older than options
            del tagged["options"]
        return digest({"key_scheme": KEY_SCHEME, **tagged})


def digest(value: object) -> str:
    """sha256 (hex) of a canonical JSON text: sorted keys, no spaces, NaN refused."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def difference(left: Mapping, right: Mapping, path: str = "") -> Iterator[tuple[str, object, object]]:
    """Paths at which two `describe()` results differ, with both values."""
    for name in sorted(left.keys() | right.keys()):
        here, there = left.get(name), right.get(name)
        where = f"{path}.{name}" if path else name
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            yield from difference(here, there, where)
        elif here != there:
            yield where, here, there


def _tagged(value: object) -> object:
    """Dataclasses become dicts with their type's name, so that equal fields of different types never collide;
    floats are tagged too (1 and 1.0 are the same option value only if the option's type says so; 0.0 and -0.0 are)."""
    if is_dataclass(value):  # fields that don't count in a comparison are labels
        counted = (f.name for f in fields(value) if f.compare)
        return {"type": type(value).__name__} | {name: _tagged(getattr(value, name)) for name in counted}
    if isinstance(value, (tuple, list)):
        return [_tagged(item) for item in value]
    if isinstance(value, float):
        return {"float": (value + 0.0).hex()}
    return value
