"""A key/value cache that holds codes, for a model that decodes token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from qbench.engine.kv import CacheHalf, halves, match_heads
from qbench.errors import StructureError
from qbench.formats.qtensor import QTensor
from qbench.formats.scheme import CacheFormat
from qbench.formats.tensor import QParams, TensorFormat, code_bits
from qbench.structure.online import HadamardTransform

StaticParams = tuple[QParams, QParams]
"""Scales and zero points of a layer's keys and values."""


class QuantizedCache(Cache):
    """Keys and values of all layers in the formats of `layers`, None meaning full precision.

    `params` are those of static formats. `rotations`: by layer, what keys pass before they are quantized and backwards
    before attention reads them. Sliding-window layers keep all their tokens, and the model's mask hides the
    old ones: what attention reads is the same, the memory is not that of a deployment that drops them.
    """

    def __init__(
        self,
        layers: Sequence[CacheFormat | None],
        params: Sequence[StaticParams | None] | None = None,
        rotations: Sequence[HadamardTransform | None] | None = None,
    ) -> None:
        """SpecError and StructureError of `qbench.engine.kv.halves`."""
        own = params if params is not None else [None] * len(layers)
        if len(own) != len(layers):
            raise StructureError(f"cache: static scales of {len(own)} layers for {len(layers)}")
        turned = rotations if rotations is not None else [None] * len(layers)
        super().__init__(
            layers=[
                DynamicLayer() if fmt is None else QuantizedLayer(*halves(fmt, *(fixed or (None, None))), rotation)
                for fmt, fixed, rotation in zip(layers, own, turned, strict=True)
            ]
        )

    def memory_bits(self) -> int:
        """Bits held at rest: codes, scales, zero points, and residuals in the model's dtype, of all sequences; static
        parameters once."""
        return sum(
            layer.memory_bits() if isinstance(layer, QuantizedLayer) else _tensor_bits(layer.keys, layer.values)
            for layer in self.layers
        )


class QuantizedLayer(CacheLayerMixin):
    """Keys and values of one layer.

    One token at a time, attention reads what `qbench.engine.kv` says. A longer piece (a prompt) is treated as KIVI's
    authors do: its own keys and values are attended to in full precision by all its queries, then everything that is
    complete is quantized. Without a residual attention reads codes, however long the piece is.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, keys: CacheHalf, values: CacheHalf, rotation: HadamardTransform | None = None) -> None:
        super().__init__()
        self._stored = (StoredTokens(keys, rotation), StoredTokens(values))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Notes dtype and device; the first `update` brings the tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Appends keys and values `[batch, kv heads, tokens, head_dim]`; returns those of all tokens so far as this
        step's attention sees them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key, value = (half.append(x) for half, x in zip(self._stored, (key_states, value_states), strict=True))
        return key, value

    def get_seq_length(self) -> int:
        return self._stored[0].tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of tokens that attention will read, and the position of the first."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    def reset(self) -> None:
        """Forgets all tokens."""
        self._stored = tuple(StoredTokens(half.half, half.rotation) for half in self._stored)
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces the sequences by those of the indices `beam_idx` int64 [batch]."""
        for half in self._stored:
            half.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences of these indices."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times in a row."""
        for half in self._stored:
            half.select(torch.arange(half.batch).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """StructureError but for 0: codes of a group cannot be taken back to full precision."""
        if tokens_to_remove:
            raise StructureError(f"cache: {abs(tokens_to_remove)} tokens to remove from a quantized cache, 0 possible")

    def memory_bits(self) -> int:
        return sum(half.memory_bits() for half in self._stored)


@dataclass(frozen=True, kw_only=True)
class _Codes:
    """Codes `[batch, heads, tokens, head_dim]` and, for dynamic formats, scales and zero points `[batch, heads, block
    rows, groups]`."""

    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None

    def parts(self) -> tuple[Tensor | None, ...]:
        return self.codes, self.scale, self.zero


class StoredTokens:
    """The keys or values of one layer: the first tokens as codes (of rotated values), the newest in full precision."""

    def __init__(self, half: CacheHalf, rotation: HadamardTransform | None = None) -> None:
        self.half, self.rotation = half, rotation
        self._coded: _Codes | None = None
        self._residual: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self._coded_tokens + (0 if self._residual is None else self._residual.shape[2])

    @property
    def batch(self) -> int:
        return 0 if self._residual is None else self._residual.shape[0]

    @property
    def _coded_tokens(self) -> int:
        return 0 if self._coded is None else self._coded.codes.shape[2]

    def append(self, x: Tensor) -> Tensor:
        """Values of all tokens for the attention of this step, x's dtype; afterwards what is complete is quantized."""
        if self._residual is None:
            self._residual = x[:, :, :0]
            if self.half.params is not None:
                self.half = replace(self.half, params=match_heads(self.half.params, x.shape[1]))
        self._residual = torch.cat([self._residual, x], dim=2)
        if self.half.residual == 0:
            self._settle()
        attended = torch.cat([self._decoded(), self._residual], dim=2)
        self._settle()
        return attended

    def select(self, indices: Tensor) -> None:
        """Sequences of these indices, int64."""
        if self._residual is not None:
            self._residual = self._residual[indices.to(self._residual.device)]
        if self._coded is not None:
            own = indices.to(self._coded.codes.device)
            codes, scale, zero = (None if part is None else part[own] for part in self._coded.parts())
            self._coded = _Codes(codes=codes, scale=scale, zero=zero)

    def memory_bits(self) -> int:
        """Bits of codes, their parameters and the residual."""
        fmt, bits = self.half.format, _tensor_bits(self._residual)
        params = self.half.params
        if params is not None:
            bits += _parameter_bits(fmt, *params.scale.shape)
        if self._coded is None:
            return bits
        batch, heads, tokens, width = self._coded.codes.shape
        per_head = code_bits(fmt.element, tokens * width) if params is not None else fmt.storage_bits(tokens, width)
        return bits + batch * heads * per_head

    def _settle(self) -> None:
        """Quantizes what is complete."""
        count = self.half.settled(self.tokens) - self._coded_tokens
        if count <= 0:
            return
        new = self._encode(self._residual[:, :, :count])
        # A copy: a view would keep the tokens that were quantized.
        self._residual = self._residual[:, :, count:].clone()
        if self._coded is None:
            self._coded = new
            return
        pairs = zip(self._coded.parts(), new.parts(), strict=True)
        codes, scale, zero = (None if old is None else torch.cat([old, more], dim=2) for old, more in pairs)
        self._coded = _Codes(codes=codes, scale=scale, zero=zero)

    def _encode(self, x: Tensor) -> _Codes:
        found = self.half.quantize(x if self.rotation is None else self.rotation(x))
        codes = self.half.from_rows(found.codes, x.shape)
        if self.half.params is not None:
            return _Codes(codes=codes, scale=None, zero=None)
        batch, heads = x.shape[:2]
        scale, zero = (
            None if part is None else part.view(batch, heads, -1, part.shape[-1]) for part in (found.scale, found.zero)
        )
        return _Codes(codes=codes, scale=scale, zero=zero)

    def _decoded(self) -> Tensor:
        """Values of the codes, in the residual's dtype."""
        if self._coded is None:
            return self._residual[:, :, :0]
        codes, params = self._coded.codes, self.half.params
        if params is None:
            zero = None if self._coded.zero is None else self._coded.zero.flatten(0, 2)
            params = QParams(self._coded.scale.flatten(0, 2), zero)
        rows = QTensor(self.half.to_rows(codes), params.scale, params.zero, self.half.rows_format(codes.shape))
        values = self.half.from_rows(rows.dequantize(), codes.shape)
        return (values if self.rotation is None else self.rotation.inverse(values)).to(self._residual.dtype)


def _parameter_bits(fmt: TensorFormat, sets: int, groups: int) -> int:
    """Bits of `sets` x `groups` scales and zero points."""
    zero = {"none": 0, "int": fmt.element.bits, "float": 16}[fmt.zero]
    return fmt.scale.bits(sets, groups) + int(sets * groups * zero)


def _tensor_bits(*tensors: Tensor | None) -> int:
    return sum(8 * x.element_size() * x.numel() for x in tensors if x is not None)
