"""Settling groups inside one trip gives exactly what re-running the block after every group gives."""

import _thread
import copy
import math
import signal
import threading
import time

import pytest
import torch
import torch.nn.functional as F

from qbench.engine.streams import Stream, chunked
from qbench.structure.blocks import capture_calls, find_blocks
from tests.architectures import ARCHITECTURES, tiny_model, tokens
from tests.engine.helpers import InputsOf, structure_of

LENGTH = 5


def _block_and_stream(name, sequences=(2, 2, 1)):
    model, config = tiny_model(name)
    structure = structure_of(model, tokens(config))
    chunks, calls = [], {}
    with torch.no_grad():
        for seed, batch in enumerate(sequences):
            hidden, of_blocks = capture_calls(model, tokens(config, batch=batch, length=LENGTH, seed=seed))
            chunks.append(hidden)
            calls[batch, LENGTH] = of_blocks
    return find_blocks(model)[1][0], structure, Stream(chunks, calls)


def _rewrite(block, group, inputs):
    """New weights that depend on the old ones and on every input that was seen, in whatever order."""
    seen = math.fsum(float(x.abs().sum()) for x in inputs) / (1 + sum(map(len, inputs)))
    for ref in group.weights:
        ref.write(block, ref.read(block).mul(1 + 0.01 * seen).round(decimals=1))


@torch.no_grad()
def _naive(block, structure, stream):
    """The definition: for every group, run all chunks, look at the group's input, then rewrite its weights."""
    inputs = {}
    for group in structure.groups:
        with InputsOf(block, group.weights[0]) as taken:
            for chunk in stream.chunks:
                stream.call(0, chunk)(block, chunk)
        inputs[group.index] = taken.seen
        _rewrite(block, group, taken.seen)
    return inputs, [stream.call(0, chunk)(block, chunk) for chunk in stream.chunks]


def _sorted(inputs):
    return sorted(inputs, key=lambda x: x.flatten().tolist())


class _Settler:
    """Callbacks for `settle` that record and rewrite as `_naive` does."""

    def __init__(self, block, structure):
        self.block, self.order = block, []
        self.inputs = {group.index: [] for group in structure.groups}

    def on_input(self, group, x):
        self.inputs[group.index].append(x.detach().flatten(0, -2).clone())

    def on_complete(self, group):
        self.order.append(group.index)
        _rewrite(self.block, group, self.inputs[group.index])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_trip_equals_a_forward_per_group(name):
    block, structure, stream = _block_and_stream(name)
    expected_block = copy.deepcopy(block)
    expected_inputs, expected_outputs = _naive(expected_block, structure, stream.copy())
    settler = _Settler(block, structure)
    stream.settle(block, 0, structure, settler.on_input, settler.on_complete)
    assert sorted(settler.order) == [group.index for group in structure.groups]
    for index, expected in expected_inputs.items():
        # A chunk without tokens for the experts before it reaches an expert earlier than the others do.
        assert [x.tolist() for x in _sorted(settler.inputs[index])] == [x.tolist() for x in _sorted(expected)]
    for (path, found), wanted in zip(block.named_parameters(), expected_block.parameters(), strict=True):
        assert torch.equal(found, wanted), path
    for found, wanted in zip(stream.chunks, expected_outputs, strict=True):
        assert torch.equal(found, wanted)


def test_experts_that_see_no_token_and_experts_of_some_chunks_are_settled_once():
    block, structure, stream = _block_and_stream("mixtral", sequences=(1, 1))
    stream.chunks = [chunk[:, :2] for chunk in stream.chunks]
    _, config = tiny_model("mixtral")
    with torch.no_grad():
        _, calls = capture_calls(tiny_model("mixtral")[0], tokens(config, batch=1, length=2))
    stream.calls[1, 2] = calls
    expected_block = copy.deepcopy(block)
    expected_inputs, _ = _naive(expected_block, structure, stream.copy())
    settler = _Settler(block, structure)
    stream.settle(block, 0, structure, settler.on_input, settler.on_complete)
    seen = {index: len(inputs) for index, inputs in settler.inputs.items()}
    assert {0, 1, 2} <= set(seen.values())  # by no chunk, by one, by both
    assert seen == {index: len(inputs) for index, inputs in expected_inputs.items()}
    assert sorted(settler.order) == sorted(set(settler.order)) == [group.index for group in structure.groups]
    for found, wanted in zip(block.parameters(), expected_block.parameters(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2"])
def test_settling_costs_one_trip_through_the_operations(name, monkeypatch):
    block, structure, stream = _block_and_stream(name)
    calls = []
    linear = F.linear

    def counted(*args, **named):
        calls.append(args[1].shape)
        return linear(*args, **named)

    monkeypatch.setattr(F, "linear", counted)
    plain = stream.copy()
    with torch.no_grad():
        plain.advance(block, 0)
    one_trip, calls[:] = sorted(calls), []
    stream.settle(block, 0, structure, lambda group, x: None, lambda group: None)
    assert sorted(calls) == one_trip
    for found, wanted in zip(stream.chunks, plain.chunks, strict=True):
        assert torch.equal(found, wanted)


class _Failure(Exception):
    pass


@pytest.mark.parametrize("error", [_Failure, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["first input", "later input", "later chunk", "completion", "last one", "block"])
def test_an_exception_surfaces_and_leaves_no_thread_behind(where, error):
    block, structure, stream = _block_and_stream("llama")
    before, events, failed = set(threading.enumerate()), [], []

    def fail(*_):
        failed.append(len(events))
        raise error("on purpose")

    def on_input(group, _):
        events.append("input")
        if (where, len(events)) in {("first input", 1), ("later chunk", 2), ("later input", 5)}:
            fail()

    def on_complete(group):
        events.append("completion")
        last = group.index == structure.groups[-1].index
        if (where == "completion" and group.index == 1) or (where == "last one" and last):
            fail()

    hook = block.mlp.register_forward_pre_hook(fail) if where == "block" else None
    with pytest.raises(error, match="on purpose"):
        stream.settle(block, 0, structure, on_input, on_complete)
    assert set(threading.enumerate()) == before
    assert failed == [len(events)]  # once, and nothing goes on behind it
    if hook is not None:
        hook.remove()
    again = _Settler(block, structure)
    stream.settle(block, 0, structure, again.on_input, again.on_complete)  # nothing is stuck
    assert again.order == [group.index for group in structure.groups]


@pytest.fixture
def interruptible():
    """A background job of a shell ignores the interrupt; then Python installs no handler of its own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("at", [1, 3, 8])
def test_an_interrupt_of_the_user_leaves_no_thread_behind(at):
    """It reaches the main thread, which waits for a forward in another one."""
    block, structure, stream = _block_and_stream("llama")
    before, events = set(threading.enumerate()), []

    def on_input(group, _):
        events.append(group.index)
        if len(events) == at:
            _thread.interrupt_main()
            time.sleep(0.05)  # it arrives while this forward runs

    with pytest.raises(KeyboardInterrupt):
        stream.settle(block, 0, structure, on_input, lambda group: None)
    assert set(threading.enumerate()) == before
    assert len(events) == at


def test_observing_shows_every_input_once_and_advances():
    block, structure, stream = _block_and_stream("llama")
    original, advanced = list(stream.chunks), stream.copy()
    with torch.no_grad():
        advanced.advance(block, 0)
        seen = []
        stream.observe(block, 0, structure, lambda group, x: seen.append((group.index, x.shape)))
    assert [index for index, _ in seen] == [group.index for group in structure.groups] * 3
    for found, wanted, start in zip(stream.chunks, advanced.chunks, original, strict=True):
        assert torch.equal(found, wanted)
        assert not torch.equal(found, start)


def test_sequences_are_found_across_chunks():
    _, _, stream = _block_and_stream("llama")
    everything = torch.cat(stream.chunks)
    for indices in ([0], [4], [3, 1, 2], list(range(5))):
        assert torch.equal(stream.sequences(indices), everything[indices])


@pytest.mark.parametrize(("n", "length", "limit"), [(5, 8, 16), (5, 8, 7), (1, 8, 1000), (6, 8, 24)])
def test_chunks_are_whole_sequences_within_the_limit(n, length, limit):
    windows = torch.arange(n * length).view(n, length)
    chunks = chunked(windows, limit)
    assert torch.equal(torch.cat(chunks), windows)
    assert all(len(chunk) * length <= max(limit, length) for chunk in chunks)
    assert len(chunks) == -(-n // max(1, limit // length))
