"""Streams: hidden states of a token set on their way through the blocks, kept as chunks of whole sequences."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from qbench.structure.blocks import BlockCall
from qbench.structure.trace import BlockStructure, LinearGroup, LinearTap

#: Tokens per chunk: bounds the temporaries of one forward.
CHUNK_TOKENS = 4096

#: A block in which nothing is quantized while it runs.
PLAIN = nullcontext()


def chunked(windows: Tensor, tokens: int = CHUNK_TOKENS) -> tuple[Tensor, ...]:
    """Token windows [n, length] in chunks of whole sequences of at most about `tokens` tokens."""
    return windows.split(max(1, tokens // windows.shape[1]))


class Stream:
    """Hidden states [sequences, length, hidden] per chunk, and how each block is called on such a chunk.

    calls[shape][i] is block i's call for chunks of that (sequences, length); masks and position embeddings depend on
    the shape alone, since windows are never padded.
    """

    def __init__(self, chunks: Sequence[Tensor], calls: dict[tuple[int, int], tuple[BlockCall, ...]]) -> None:
        self.chunks = list(chunks)
        self.calls = calls

    def call(self, index: int, chunk: Tensor) -> BlockCall:
        return self.calls[tuple(chunk.shape[:2])][index]

    def copy(self) -> Stream:
        """Another stream that starts from the same hidden states (tensors are never changed in place)."""
        return Stream(self.chunks, self.calls)

    def sequences(self, indices: Sequence[int]) -> Tensor:
        """The given sequences, [len(indices), length, hidden]."""
        starts = torch.tensor([0, *(c.shape[0] for c in self.chunks)]).cumsum(0).tolist()
        rows = []
        for index in indices:
            chunk = next(k for k in range(len(self.chunks)) if index < starts[k + 1])
            rows.append(self.chunks[chunk][index - starts[chunk]])
        return torch.stack(rows)

    def advance(self, block: nn.Module, index: int, runtime: AbstractContextManager = PLAIN) -> None:
        """Push every chunk through `block`, each inside `runtime` (what is quantized while the block runs)."""
        for k, chunk in enumerate(self.chunks):
            with runtime:
                self.chunks[k] = self.call(index, chunk)(block, chunk)

    def observe(
        self, block: nn.Module, index: int, structure: BlockStructure, on_input: Callable[[LinearGroup, Tensor], None]
    ) -> None:
        """Advance, showing every group's input on the way."""
        for k, chunk in enumerate(self.chunks):
            with LinearTap(block, structure, on_input):
                self.chunks[k] = self.call(index, chunk)(block, chunk)

    def settle(
        self,
        block: nn.Module,
        index: int,
        structure: BlockStructure,
        on_input: Callable[[LinearGroup, Tensor], None],
        on_complete: Callable[[LinearGroup], None],
        runtime: AbstractContextManager = PLAIN,
    ) -> None:
        """Advance through `block` in one trip, stopping at every group until all chunks have shown its input.

        `on_complete(group)` may then rewrite the group's weights in place; the forwards go on with the new ones, so
        later groups see quantized earlier ones and nothing is computed twice. Groups that no chunk reaches (experts
        without tokens) are completed at the end.

        Each chunk's forward runs in its own thread because a forward cannot be left and re-entered otherwise; only
        one thread runs at any time, in a fixed order, so the result does not depend on scheduling.
        """
        _Trip(self, block, index, structure, on_input, on_complete, runtime).run()


class _Trip:
    """Passes a baton between the forwards of all chunks and the one who settles groups."""

    def __init__(
        self,
        stream: Stream,
        block: nn.Module,
        index: int,
        structure: BlockStructure,
        on_input: Callable[[LinearGroup, Tensor], None],
        on_complete: Callable[[LinearGroup], None],
        runtime: AbstractContextManager,
    ) -> None:
        self.runtime = runtime
        self.stream, self.block, self.index, self.structure = stream, block, index, structure
        self.on_input, self.on_complete = on_input, on_complete
        count = len(stream.chunks)
        self.turn = [threading.Semaphore(0) for _ in range(count)]
        self.back = threading.Semaphore(0)
        self.waiting: list[LinearGroup | None] = [None] * count
        self.failure: BaseException | None = None

    def run(self) -> None:
        threads = [threading.Thread(target=self._forward, args=(k,), daemon=True) for k in range(len(self.turn))]
        for thread in threads:
            thread.start()
        try:
            settled = self._take_turns()
        except BaseException as error:  # also an interrupt of the user while a forward runs
            self.failure = error
            for turn in self.turn:  # the paused forwards run into the failure and end
                turn.release()
            raise
        finally:
            for thread in threads:
                thread.join()
        for group in self.structure.groups:
            if group.index not in settled:
                self.on_complete(group)

    def _take_turns(self) -> set[int]:
        """Run every forward to its end, one at a time; the indices of the groups that were settled on the way."""
        settled: set[int] = set()
        ready = list(range(len(self.turn)))
        while ready:
            for k in ready:
                self.turn[k].release()
                self.back.acquire()
                if self.failure is not None:
                    raise self.failure
            group = min((g for g in self.waiting if g is not None), key=lambda g: g.index, default=None)
            if group is None:
                break
            self.on_complete(group)
            settled.add(group.index)
            ready = [k for k, g in enumerate(self.waiting) if g is not None and g.index == group.index]
        return settled

    def _forward(self, k: int) -> None:
        self.turn[k].acquire()
        try:
            self._compute(k)
        except BaseException as error:  # handed to the one who takes turns, which raises it
            self.failure = self.failure or error
        self.waiting[k] = None
        self.back.release()

    def _compute(self, k: int) -> None:
        if self.failure is not None:
            return
        chunk = self.stream.chunks[k]
        tap = LinearTap(self.block, self.structure, lambda group, x: self._arrive(k, group, x))
        with torch.no_grad(), self.runtime, tap:  # the tap sees inputs before they are quantized
            self.stream.chunks[k] = self.stream.call(self.index, chunk)(self.block, chunk)

    def _arrive(self, k: int, group: LinearGroup, x: Tensor) -> None:
        self.on_input(group, x)
        self.waiting[k] = group
        self.back.release()
        self.turn[k].acquire()
        self.waiting[k] = None
        if self.failure is not None:
            raise _Abandoned


class _Abandoned(BaseException):
    """Ends a paused forward after another one failed."""
