"""Quantized keys and values: what every query of a streaming decode would attend to, in one forward of a whole window.

At step t (from 0) a deployment appends the new key and value to a full-precision residual, attends, and only then
quantizes what is complete (KIVI, arXiv 2402.02750, algorithm 1 and its authors' code). The query at t therefore sees

- keys whose blocks span tokens: the first floor(t / R) R of them as codes, where R is the residual: it is quantized as
  a whole when it holds R tokens;
- values, and keys whose blocks lie within a token or are fixed: the first t - R of them as codes, as one token leaves
  the residual per step; with R = 0 there is no residual and attention reads the codes of the own token, too.

So at most R tokens are attended to in full precision besides the new one, and windows of T <= R tokens do not change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.errors import NumericsError, SpecError, StructureError
from qbench.formats.qtensor import QTensor
from qbench.formats.ranges import Range
from qbench.formats.scheme import CacheFormat
from qbench.formats.tensor import (
    Block,
    QParams,
    TensorFormat,
    decode,
    encode,
    fake_quantize,
    fit,
    quantize,
)

MIN_QUERIES, MAX_QUERIES = 64, 256
"""Queries whose scores are computed together: fewer waste time, more waste memory."""


@dataclass(frozen=True, kw_only=True)
class CacheHalf:
    """The keys or the values of one layer: tensors `[batch, heads, tokens, head_dim]`.

    `name` is "keys" or "values". `params`: scales and zero points of a static format, [heads, groups], or [1, groups]
    where all heads share them; None for a dynamic format.
    """

    name: str
    format: TensorFormat
    residual: int
    params: QParams | None = None
    across_heads: bool = False

    def settled(self, tokens: int) -> int:
        """How many of the first `tokens` tokens are codes when the step that appended the last of them is over."""
        if self.format.block.rows > 1:
            return tokens // self.residual * self.residual
        return max(0, tokens - self.residual)

    def attended(self, query: int) -> int:
        """How many tokens the query at position `query` attends to as codes; the rest are full precision."""
        return self.settled(query) if self.residual else self.settled(query + 1)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """x as codes would give it back, same shape and dtype; computed in float32.

        The number of tokens must be a multiple of the block's. NumericsError for values that are not finite,
        StructureError where the heads are not those of `params`.
        """
        if x.shape[2] == 0:
            return x
        rows, fmt = self._checked_rows(x), self.rows_format(x.shape)
        if self.params is None:
            values = fake_quantize(rows, fmt)
        else:
            values = fmt.unblocks(decode(encode(fmt.blocks(rows), fmt, self.params), self.params), rows.shape)
        return self.from_rows(values, x.shape).to(x.dtype)

    def quantize(self, x: Tensor) -> QTensor:
        """Codes of all heads, as rows in the order of `from_rows`; raises what `fake_quantize` does."""
        return quantize(self._checked_rows(x), self.rows_format(x.shape), self.params)

    def rows_format(self, shape: tuple[int, ...]) -> TensorFormat:
        """The format of the rows of a tensor of that shape: no block reaches into another head's rows unless all heads
        share one."""
        if self.params is None:
            return self.format  # blocks of tokens divide the tokens of a head
        tokens = 0 if self.across_heads else shape[0] * shape[2]
        return replace(self.format, block=Block(tokens, self.format.block.columns))

    def from_rows(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        """`[batch, heads, tokens, head_dim]` from `[batch * heads * tokens, head_dim]`; static formats have the heads
        outermost, so that the rows of a head lie together."""
        if self.params is None:
            return rows.view(shape)
        batch, heads, tokens, width = shape
        return rows.view(heads, batch, tokens, width).transpose(0, 1)

    def to_rows(self, x: Tensor) -> Tensor:
        """Inverse of `from_rows`."""
        return (x if self.params is None else x.transpose(0, 1)).reshape(-1, x.shape[-1])

    def _checked_rows(self, x: Tensor) -> Tensor:
        if not torch.isfinite(x).all():
            raise NumericsError(f"cache: {self.name} of {x.shape[1]} heads are NaN or infinite, finite ones needed")
        if self.params is not None:
            sets = self.params.scale.shape[0]
            if sets != (1 if self.across_heads else x.shape[1]):
                raise StructureError(f"cache: static scales of {sets} heads for {self.name} of {x.shape[1]}")
        return self.to_rows(x.float())


def halves(
    format: CacheFormat, key: QParams | None = None, value: QParams | None = None
) -> tuple[CacheHalf, CacheHalf]:
    """Keys and values of a layer in `format`; static formats need parameters of both, others take none.

    SpecError for a layout that is undefined whatever the model, StructureError for parameters that are missing.
    """
    _check_layout(format)
    for params in (key, value):
        if format.static != (params is not None):
            wanted = "scales from calibration text" if format.static else "no static scales"
            raise StructureError(f"cache: {format.label} takes {wanted} for keys and values")
    shared = {"residual": format.residual, "across_heads": format.across_heads}
    return (
        CacheHalf(name="keys", format=format.key, params=key, **shared),
        CacheHalf(name="values", format=format.value, params=value, **shared),
    )


class CacheQuantizer:
    """One layer's attention over a quantized cache, for all tokens of a window at once."""

    def __init__(self, format: CacheFormat, key: QParams | None = None, value: QParams | None = None) -> None:
        self.format = format
        self.keys, self.values = halves(format, key, value)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """What torch's `scaled_dot_product_attention` returns for these arguments, over the cache of a streaming
        decode of the window: query `[batch, heads, tokens, head_dim]`, key and value with as many heads or a divisor.

        StructureError unless keys cover the queries' tokens, there is no dropout and, where a residual makes positions
        matter, no query attends to later tokens.
        """
        tokens = key.shape[-2]
        if key.ndim != 4 or query.shape[-2] != tokens or value.shape[-2] != tokens:
            raise StructureError(
                f"cache: queries {list(query.shape)} for keys {list(key.shape)}: [batch, heads, tokens, head_dim] "
                "of the same tokens needed"
            )
        if dropout_p:
            raise StructureError(f"cache: attention dropout of {dropout_p:g}, evaluation mode needed")
        if self.format.residual and tokens > self.format.residual:
            _require_causal(attn_mask, is_causal, tokens)
            return self._streaming(query, key, value, attn_mask, scale)
        if not self.format.residual:
            key, value = self.keys.fake_quantize(key), self.values.fake_quantize(value)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )

    def _streaming(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """Causal attention in which the number of tokens read as codes depends on the query."""
        batch, heads, tokens, width = key.shape
        dtype = torch.promote_types(query.dtype, torch.float32)
        queries = query.to(dtype).mul(1 / math.sqrt(width) if scale is None else scale)
        queries = queries.unflatten(1, (heads, -1))  # queries that share a key head
        if mask is not None:
            mask = mask.expand(batch, query.shape[1], tokens, tokens).unflatten(1, (heads, -1))
        keys, values = (_Mixture(half, x, dtype) for half, x in ((self.keys, key), (self.values, value)))
        step = min(max(self.format.residual, MIN_QUERIES), MAX_QUERIES)
        outputs = []
        for first in range(0, tokens, step):
            last = min(first + step, tokens) - 1
            rows = queries[..., first : last + 1, :]
            scores = keys.scores(rows.flatten(2, 3), first, last).view(*rows.shape[:-1], last + 1)
            if mask is not None:
                part = mask[..., first : last + 1, : last + 1]
                scores = scores.masked_fill_(~part, -math.inf) if part.dtype == torch.bool else scores.add_(part)
            scores.masked_fill_(_future(first, last, key.device), -math.inf)
            outputs.append(values.average(scores.softmax(dim=-1), first, last))
        return torch.cat(outputs, dim=3).flatten(1, 2).to(query.dtype)


class _Mixture:
    """Keys or values of a window, in full precision and as codes; which one counts depends on query and token."""

    def __init__(self, half: CacheHalf, x: Tensor, dtype: torch.dtype) -> None:
        self._half = half
        self._exact = x.to(dtype)
        self._coded = half.fake_quantize(x[:, :, : half.attended(x.shape[2] - 1)]).to(dtype)

    def scores(self, queries: Tensor, first: int, last: int) -> Tensor:
        """[batch, heads, n, last + 1] of `queries` `[batch, heads, n, head_dim]`: any number of copies of positions
        first … last, one after the other."""
        scores = queries @ self._before(first, last).mT
        low, high = self._half.attended(first), self._half.attended(last)
        if high > low:
            coded = (queries @ self._coded[:, :, low:high].mT).unflatten(2, (-1, last + 1 - first))
            strip = scores.unflatten(2, (-1, last + 1 - first))[..., low:high]
            strip.copy_(torch.where(self._chosen(first, last), coded, strip))
        return scores

    def average(self, weights: Tensor, first: int, last: int) -> Tensor:
        """[batch, heads, copies, n, head_dim] from `weights` `[batch, heads, copies, n, last + 1]`."""
        shape = (*weights.shape[:-1], self._exact.shape[-1])
        flat = weights.flatten(2, 3)
        found = flat @ self._before(first, last)
        low, high = self._half.attended(first), self._half.attended(last)
        if high > low:
            strip = (weights[..., low:high] * self._chosen(first, last)).flatten(2, 3)
            found += strip @ (self._coded[:, :, low:high] - self._exact[:, :, low:high])
        return found.view(shape)

    def _before(self, first: int, last: int) -> Tensor:
        """Tokens 0 … last as the query at `first` sees them: later queries differ in a strip only."""
        low = self._half.attended(first)
        return torch.cat([self._coded[:, :, :low], self._exact[:, :, low : last + 1]], dim=2)

    def _chosen(self, first: int, last: int) -> Tensor:
        """bool [queries, strip]: whether a query reads a token of the strip as a code."""
        device = self._exact.device
        seen = torch.tensor([self._half.attended(query) for query in range(first, last + 1)], device=device)
        return torch.arange(int(seen[0]), int(seen[-1]), device=device) < seen[:, None]


class CacheRanges:
    """Smallest and largest key and value of every head and channel, over all calibration tokens: ranges of a static
    format."""

    def __init__(self, format: CacheFormat) -> None:
        """SpecError for a static format that is undefined or has another `calibration` than "minmax"."""
        _check_layout(format)
        if format.calibration != "minmax":
            raise SpecError("kv.calibration", format.calibration, "a static cache takes minmax")
        self._format = format
        self._bounds: tuple[Range, Range] | None = None

    def update(self, key: Tensor, value: Tensor) -> None:
        """Counts key and value `[batch, heads, tokens, head_dim]`; StructureError where the heads change."""
        new = tuple(Range(x.amin(dim=(0, 2)).float(), x.amax(dim=(0, 2)).float()) for x in (key, value))
        if self._bounds is not None:
            for old, found in zip(self._bounds, new, strict=True):
                if old.lower.shape != found.lower.shape:
                    raise StructureError(
                        f"cache: {list(found.lower.shape)} heads and channels after {list(old.lower.shape)} "
                        "in the same layer"
                    )
            new = tuple(
                Range(torch.minimum(a.lower, b.lower), torch.maximum(a.upper, b.upper))
                for a, b in zip(self._bounds, new, strict=True)
            )
        self._bounds = new

    def params(self) -> tuple[QParams, QParams]:
        """Scales and zero points of keys and values, [heads, groups] or [1, groups] each.

        NumericsError where no token was counted or a range is not finite.
        """
        if self._bounds is None:
            raise NumericsError("cache: static scales need calibration tokens, 0 were seen in a layer")
        key, value = (
            _fixed(bounds, fmt, self._format.across_heads)
            for bounds, fmt in zip(self._bounds, (self._format.key, self._format.value), strict=True)
        )
        return key, value


def match_heads(params: QParams, heads: int) -> QParams:
    """Parameters of `heads` heads: the same, or one of each where calibration saw every head n times in a row (models
    may repeat keys and values for grouped queries). StructureError for any other number."""
    sets = params.scale.shape[0]
    if sets in (1, heads):
        return params
    copies = sets // heads
    if sets == copies * heads:
        parts = [part for part in (params.scale, params.zero) if part is not None]
        if all(torch.equal(part, part[::copies].repeat_interleave(copies, dim=0)) for part in parts):
            return QParams(params.scale[::copies], None if params.zero is None else params.zero[::copies])
    raise StructureError(f"cache: {heads} heads, but static scales of {sets} that are not those repeated")


def check_cache(format: CacheFormat, head_dim: int) -> None:
    """SpecError for a format that is undefined for heads of `head_dim` channels."""
    _check_layout(format)
    for half in (format.key, format.value):
        if not half.fits(head_dim):
            sizes = ", ".join(str(n) for n in range(min(8, head_dim), head_dim + 1) if head_dim % n == 0)
            raise SpecError("kv.group_size", half.block.columns, f"must divide head_dim={head_dim}: one of {sizes}")


def _check_layout(format: CacheFormat) -> None:
    """What `check_cache` refuses whatever the model is."""
    rows, residual = format.key.block.rows, format.residual
    if residual < 0:
        raise SpecError("kv.residual", residual, "a number of tokens from 0 on")
    for half in (format.key, format.value):
        if half.scale.needs_outer or half.scale.whole:
            accepted = (
                "a format whose scales share nothing with those of later tokens: float16, bfloat16, float32, e8m0"
            )
            raise SpecError("kv.format", half.label, accepted)
    if format.static:
        if (rows, format.value.block.rows) != (0, 0):
            raise SpecError("kv.layout", format.layout, "static scales cannot be per token or group of tokens")
        for half in (format.key, format.value):
            if half.range.method != "minmax":
                accepted = (
                    f"dynamic for ranges by {half.range.method}: static ones are the extremes of calibration text"
                )
                raise SpecError("kv.mode", "static", accepted)
        return
    if format.across_heads:
        raise SpecError("kv.layout", format.layout, "only static scales can be shared by all heads")
    if rows == 0 or format.value.block.rows != 1:
        raise SpecError(
            "kv.layout", format.layout, "dynamic scales need keys by token or group of tokens and values by token"
        )
    if rows > 1 and (residual == 0 or residual % rows):
        raise SpecError(
            "kv.residual", residual, f"keys are quantized {rows} tokens at a time: a positive multiple of {rows}"
        )


def _fixed(bounds: Range, fmt: TensorFormat, across_heads: bool) -> QParams:
    """Parameters from the extremes [heads, head_dim] of every channel."""
    lower, upper = bounds.lower, bounds.upper
    if across_heads:
        lower, upper = lower.amin(dim=0, keepdim=True), upper.amax(dim=0, keepdim=True)
    groups = replace(fmt, block=Block(1, fmt.block.columns))
    lower, upper = groups.blocks(lower).amin(dim=-1), groups.blocks(upper).amax(dim=-1)
    if fmt.zero != "float":
        lower, upper = lower.clamp_max(0), upper.clamp_min(0)
    return fit(lower, groups, Range(lower, upper))


def _require_causal(mask: Tensor | None, is_causal: bool, tokens: int) -> None:
    if mask is None:
        causal = is_causal
    else:
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        causal = not bool((allowed & _future(0, tokens - 1, mask.device)).any())
    if not causal:
        raise StructureError("cache: attention to later tokens, which a decode does not have yet; causal one needed")


def _future(first: int, last: int, device: torch.device) -> Tensor:
    """bool [queries, last + 1]: tokens after each of the queries first … last."""
    positions = torch.arange(last + 1, device=device)
    return positions > positions[first:, None]
