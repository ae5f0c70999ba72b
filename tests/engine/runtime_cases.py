"""Blocks of tiny models, formats and streams for what is quantized while a block runs."""

import contextlib

import torch

from qbench.engine.activations import InputQuantizer
from qbench.engine.runtime import Runtime
from qbench.engine.streams import Stream
from qbench.formats import fake_quantize, uniform
from qbench.formats.scheme import CacheFormat, InputFormat
from qbench.structure.blocks import capture_calls, find_blocks
from qbench.structure.trace import trace_block
from tests.architectures import tiny_model, tokens

INT8 = uniform(8, -1, True)
INT4 = uniform(4, -1, False)
TENSOR = uniform(8, 0, False)
KV4 = CacheFormat(key=uniform(4, -1, False), value=uniform(4, -1, False))
KV_STATIC = CacheFormat(key=uniform(8, 0, True), value=uniform(8, 0, True), static=True)


class Case:
    """The first block of a tiny model: how it is called on `hidden`, its structure, its refs by name."""

    def __init__(self, name, **tokens_of):
        self.model, config = tiny_model(name)
        self.tokens = tokens(config, **tokens_of)
        with torch.no_grad():
            self.hidden, calls = capture_calls(self.model, self.tokens)
        self.block, self.call = find_blocks(self.model)[1][0], calls[0]
        self.structure = trace_block(self.block, self.call, self.hidden)
        self.refs = {ref.name: ref for group in self.structure.groups for ref in group.weights}

    def runtime(self, fmt, cache=None, names=None):
        names = self.refs if names is None else names
        return Runtime(self.block, self.structure, dynamic(names, fmt), cache)

    @torch.no_grad()
    def run(self, *modes):
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            return self.call(self.block, self.hidden)

    def stream(self, *batches, length=8):
        """A stream of other tokens, so many sequences per chunk."""
        chunks, calls = [], {}
        with torch.no_grad():
            for seed, batch in enumerate(batches):
                hidden, calls[batch, length] = capture_calls(
                    self.model, tokens(self.model.config, batch=batch, length=length, seed=seed)
                )
                chunks.append(hidden)
        return Stream(chunks, calls)


def dynamic(names, fmt):
    return {name: InputQuantizer(format=InputFormat(format=fmt)) for name in names}


def fake(x, fmt):
    return fake_quantize(x.float().flatten(0, -2), fmt).to(x.dtype).view(x.shape)
