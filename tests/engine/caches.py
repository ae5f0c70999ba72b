"""Cache formats, the authors' cache as a loop over steps, and a model's attention over quantized keys and values."""

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qbench.engine.kv import CacheQuantizer, CacheRanges
from qbench.formats.element import Int
from qbench.formats.scheme import CacheFormat
from qbench.formats.tensor import Block, TensorFormat

#: Blocks of keys and of values.
LAYOUTS = {
    "kivi": (Block(4, 1), Block(1, 4)),
    "tile": (Block(8, 4), Block(1, 0)),
    "token": (Block(1, 0), Block(1, 0)),
    "group": (Block(1, 4), Block(1, 2)),
    "static_head": (Block(0, 0), Block(0, 0)),
    "static_tensor": (Block(0, 0), Block(0, 0)),
    "static_channel": (Block(0, 1), Block(0, 1)),
    "static_group": (Block(0, 4), Block(0, 0)),
}
BY_TOKENS = ("kivi", "tile")


def cache_format(layout, bits=4, residual=0, *, element=None, zero="float", **options):
    """A layout by name; integers with a float zero point unless told otherwise."""
    key, value = (
        TensorFormat(element=element or Int(bits, signed=zero == "none"), block=block, zero=zero)
        for block in LAYOUTS[layout]
    )
    static = layout.startswith("static")
    fields = {"static": static, "across_heads": layout == "static_tensor", "layout": layout, **options}
    return CacheFormat(key=key, value=value, residual=residual, **fields)


def calibrated(format, *pairs):
    """A quantizer for the format, its static ranges from pairs of keys and values."""
    if not format.static:
        return CacheQuantizer(format)
    ranges = CacheRanges(format)
    for key, value in pairs:
        ranges.update(key, value)
    return CacheQuantizer(format, *ranges.params())


def asymmetric(block, bits):
    """Values of one block (any shape) after rounding to `bits` bits between its extremes: scale and zero in float16."""
    low, high = block.float().min(), block.float().max()
    scale = ((high - low) / (2**bits - 1)).half().float()
    scale = scale if scale else torch.ones(())  # equal values
    zero = (-low / scale).half().float()
    codes = (block.float() / scale + zero).round().clamp(0, 2**bits - 1)
    return ((codes - zero) * scale).to(block.dtype)


def by_blocks(x, height, width, bits):
    """`asymmetric` block by block of x [tokens, head_dim]; 0: all of them."""
    result = torch.empty_like(x)
    height, width = height or len(x), width or x.shape[1]
    for top in range(0, len(x), height):
        for left in range(0, x.shape[1], width):
            tile = (slice(top, top + height), slice(left, left + width))
            result[tile] = asymmetric(x[tile], bits)
    return result


def seen_by_step(key, value, format):
    """What the query of every step attends to: (keys, values) [t + 1, head_dim] of one head, for t = 0, 1, ….

    Written from the description of KIVI's code: append to the residual, attend, then quantize; dynamic formats.
    """
    bits, residual = int(format.bits), format.residual
    blocks = format.key.block, format.value.block
    coded = [key[:0], value[:0]]
    exact = [key[:0], value[:0]]
    for t in range(len(key)):
        exact = [torch.cat([old, new[t : t + 1]]) for old, new in zip(exact, (key, value), strict=True)]
        if residual == 0:
            coded = [
                torch.cat([c, by_blocks(e, 1, b.columns, bits)]) for c, e, b in zip(coded, exact, blocks, strict=True)
            ]
            exact = [key[:0], value[:0]]
        yield tuple(torch.cat(parts) for parts in zip(coded, exact, strict=True))
        if residual == 0:
            continue
        for half, block in enumerate(blocks):
            length = len(exact[half])
            if block.rows > 1:
                leaving = residual if length == residual else 0
            else:
                leaving = 1 if length > residual else 0
            if leaving:
                new = by_blocks(exact[half][:leaving], block.rows, block.columns, bits)
                coded[half] = torch.cat([coded[half], new])
                exact[half] = exact[half][leaving:]


class Attention(TorchFunctionMode):
    """Sends a model's attention calls, in order, to the handlers (None: untouched), over and over again."""

    def __init__(self, handlers):
        super().__init__()
        self.handlers, self.calls = handlers, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            handler = self.handlers[self.calls % len(self.handlers)]
            self.calls += 1
            if handler is not None:
                return handler(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def collecting(ranges):
    """An attention handler that counts keys and values in `ranges`."""

    def attention(query, key, value, **options):
        ranges.update(key, value)
        return F.scaled_dot_product_attention(query, key, value, **options)

    return attention
