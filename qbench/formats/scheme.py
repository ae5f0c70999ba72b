"""Schemes: the formats of every role a tensor can have, and where they differ."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from qbench.formats.element import Int
from qbench.formats.tensor import TensorFormat

Calibration = Literal["minmax", "moving", "histogram"]


#: How the head is called in patterns, whatever the model calls it.
HEAD = "lm_head"


@dataclass(frozen=True, kw_only=True)
class InputFormat:
    """Inputs x `[tokens, features]` of the linear layers in the blocks.

    static: scales are fixed before the first evaluation, from calibration text, by `calibration`; otherwise every
    forward fits its own. A format whose scales share a number (NVFP4) gets that one from calibration text either way.
    """

    format: TensorFormat
    static: bool = False
    calibration: Calibration = "minmax"

    @property
    def needs_data(self) -> bool:
        return self.static or self.format.scale.needs_outer

    @property
    def label(self) -> str:
        if self.format.name is not None:
            return self.format.name
        block = {"channel": "token", "column": "channel"}.get(self.format.block.label, self.format.block.label)
        words = [self.format.element.name, block, *(["asym"] if self.format.zero != "none" else [])]
        words += [f"clip{self.format.range.share:g}"] if self.format.range.method == "share" else []
        words += ["static"] if self.static else []
        return "_".join([*words, *([self.calibration] if self.calibration != "minmax" else [])])


@dataclass(frozen=True, kw_only=True)
class CacheFormat:
    """Keys (as attention reads them, after the rotary embedding) and values of one head, `[tokens, head_dim]` each.

    The newest `residual` tokens stay in full precision. Dynamic formats must not let a token's codes depend on later
    ones: their blocks either lie within a token or span `key.block.rows` tokens that are quantized together once they
    are complete (KIVI, arXiv 2402.02750: keys per channel in groups of tokens; the residual of the keys then grows from
    0 to `residual` tokens and is quantized as a whole, while a value leaves it as soon as it is `residual` tokens old).
    static: scales from calibration text, one set per layer; blocks may span all tokens (0 rows) and, with
    `across_heads`, all heads of the layer.
    """

    key: TensorFormat
    value: TensorFormat
    residual: int = 0
    static: bool = False
    across_heads: bool = False
    calibration: Calibration = "minmax"
    layout: str = field(default="token", compare=False)

    @property
    def needs_data(self) -> bool:
        return self.static

    @property
    def bits(self) -> float:
        """Bits of one code of the keys, which is also the values'."""
        return self.key.bits

    @property
    def label(self) -> str:
        size = self.value.block.columns if not self.static else 0
        words = [self.key.element.name, self.layout, *([f"g{size}"] if size else [])]
        words += ["sym"] if self.key.zero == "none" and isinstance(self.key.element, Int) else []
        return "_".join([*words, *(["static"] if self.static else []), f"r{self.residual}"])


@dataclass(frozen=True, kw_only=True)
class Override:
    """Other formats for some modules: `modules` is a pattern of dotted components ("down_proj", "mlp.*", "lm_head"),
    None for all; `blocks` are block numbers (negative: from the end), None for all. A role that is not in `roles` keeps
    the scheme's format; one that is takes this one's, None meaning full precision."""

    modules: str | None = None
    blocks: tuple[int, ...] | None = None
    roles: tuple[str, ...] = ()
    weight: TensorFormat | None = None
    input: InputFormat | None = None
    cache: CacheFormat | None = None

    @property
    def label(self) -> str:
        """Such as `down_proj:int8_g64_asym` or `blocks 0,-1:skip`."""
        where = [self.modules] if self.modules is not None else []
        where += [f"blocks {','.join(map(str, self.blocks))}"] if self.blocks is not None else []
        formats = {"weight": self.weight, "input": self.input, "cache": self.cache}
        prefixes = {"weight": "", "input": "act-", "cache": "kv-"}
        what = [prefixes[r] + (formats[r].label if formats[r] is not None else "float") for r in self.roles]
        if self.roles == ("weight", "input") and self.weight is self.input is None:
            what = ["skip"]
        return f"{' '.join(where)}:{'+'.join(what)}"

    def matches(self, path: str, block: int | None, blocks: int) -> bool:
        """Whether it is about the module or weight at `path` ("mlp.down_proj.weight") of block number `block` (None:
        outside the blocks) of `blocks`."""
        if self.blocks is not None and (block is None or block not in {b + blocks * (b < 0) for b in self.blocks}):
            return False
        if self.modules is None:
            return block is not None
        wanted, parts = self.modules.split("."), path.partition("[")[0].split(".")  # an expert goes by its parameter
        if block is None and wanted[0] != HEAD:  # outside the blocks nothing is meant by accident
            return False
        windows = (parts[k : k + len(wanted)] for k in range(len(parts) - len(wanted) + 1))
        return any(all(map(fnmatchcase, window, wanted)) for window in windows)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Formats by role; None: full precision. Of several overrides that match, the last decides."""

    weight: TensorFormat | None = None
    input: InputFormat | None = None
    cache: CacheFormat | None = None
    overrides: tuple[Override, ...] = ()

    @property
    def label(self) -> str:
        """Short name such as `int4_g64_asym`, `int8_channel_sym+act-int8_token_sym` or `float+kv-int4_kivi_r128`."""
        words = [self.weight.label if self.weight is not None else "float"]
        words += [f"act-{self.input.label}"] if self.input is not None else []
        words += [f"kv-{self.cache.label}"] if self.cache is not None else []
        return "+".join(words) + ("+mixed" if self.overrides else "")

    @property
    def needs_data(self) -> bool:
        """Whether calibration text changes the result: ranges or shared scales of run-time quantization."""
        roles = [self, *self.overrides]
        return any(f is not None and f.needs_data for role in roles for f in (role.input, role.cache))

    @property
    def at_run_time(self) -> bool:
        """Whether anything but weights is quantized."""
        return any(role.input is not None or role.cache is not None for role in (self, *self.overrides))

    @property
    def weights(self) -> frozenset[TensorFormat]:
        """Every weight format that occurs inside the blocks."""
        inside = (o for o in self.overrides if not (o.modules or "").startswith(HEAD))
        found = {self.weight, *(o.weight for o in inside if "weight" in o.roles)}
        return frozenset(f for f in found if f is not None)

    def of_weight(self, path: str, block: int | None, blocks: int) -> TensorFormat | None:
        """Format of the weight at `path` in block number `block`; outside the blocks (`lm_head`) only overrides
        count."""
        return self._of("weight", path, block, blocks)

    def of_input(self, path: str, block: int, blocks: int) -> InputFormat | None:
        """Format of the input of the weight at `path`."""
        return self._of("input", path, block, blocks)

    def of_cache(self, block: int, blocks: int) -> CacheFormat | None:
        found = self.cache
        for override in self.overrides:
            if "cache" in override.roles and override.modules is None and override.matches("", block, blocks):
                found = override.cache
        return found

    def _of(self, role: str, path: str, block: int | None, blocks: int) -> object:
        found = getattr(self, role) if block is not None else None
        for override in self.overrides:
            if role in override.roles and override.matches(path, block, blocks):
                found = getattr(override, role)
        return found
