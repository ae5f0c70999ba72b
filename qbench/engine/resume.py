"""Resume points: what a pass needs to go on after the last finished block, on disk, replaced atomically."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch

from qbench.engine.activations import InputQuantizer
from qbench.engine.kv import CacheQuantizer
from qbench.engine.loop import FinishedBlock
from qbench.engine.sinks import Ledger, Weights
from qbench.engine.streams import Stream
from qbench.formats import QParams
from qbench.formats.scheme import Scheme
from qbench.structure.online import InputTransform, from_plain, plain
from qbench.structure.trace import BlockStructure


class ResumePoint:
    """State of one pass under `folder`, which carries the run's key; written at most every `interval_s` seconds.

    A point holds the hidden states of every stream, the ledger, and the decoded weights of the blocks so far (those
    in separate files, written once). A short run never writes one. `identity` (see `fingerprints.identity_of`) says
    which pass it belongs to: what a run evaluates and whether it keeps weights is not in its key, but decides what a
    point holds.
    """

    def __init__(self, folder: Path, interval_s: float) -> None:
        self.folder, self.interval_s = folder, interval_s
        self._saved, self._blocks_saved, self._identity = time.monotonic(), 0, ""
        self.running: dict[int, dict] = {}

    def save(self, done: int, streams: list[Stream], ledger: Ledger, weights: Weights) -> None:
        """Called after block `done - 1`; does nothing before the interval has passed."""
        if time.monotonic() - self._saved < self.interval_s:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = list(weights.tensors.items())[self._blocks_saved :]
        if fresh:
            self._write(f"weights-{done:05d}.pt", dict(fresh))
        self._blocks_saved = len(weights.tensors)
        state = {
            "identity": self._identity,
            "done": done,
            "chunks": [stream.chunks for stream in streams],
            "ledger": asdict(ledger),
            "online": {index: _plain_transforms(found) for index, found in weights.online.items()},
            "running": {index: _state(finished) for index, finished in weights.running.items()},
        }
        self._write("point.pt", state)
        self._saved = time.monotonic()

    def load(self, identity: str, streams: list[Stream], ledger: Ledger, weights: Weights, device: torch.device) -> int:
        """Number of finished blocks (0: none); fills streams, ledger and weights. Another pass's point is removed.

        `running` holds afterwards what `restore` needs of what is quantized at run time.
        """
        self._identity, self.running = identity, {}
        point = self.folder / "point.pt"
        if not point.is_file():
            return 0
        saved = torch.load(point, weights_only=True, map_location=device)
        if saved["identity"] != identity:
            self.discard()
            return 0
        for path in sorted(self.folder.glob("weights-*.pt")):
            if int(path.stem.split("-")[1]) <= saved["done"]:
                weights.tensors.update(torch.load(path, weights_only=True, map_location=device))
        for stream, chunks in zip(streams, saved["chunks"], strict=True):
            stream.chunks = [chunk.to(device) for chunk in chunks]
        for name, value in saved["ledger"].items():
            setattr(ledger, name, [tuple(m) for m in value] if name == "metrics" else value)
        self._blocks_saved = len(weights.tensors)
        for index, found in saved["online"].items():
            weights.online[index] = {name: from_plain(values) for name, values in found.items()}
        self.running = saved["running"]
        return saved["done"]

    def restore(
        self, block: torch.nn.Module, structure: BlockStructure, index: int, scheme: Scheme, count: int
    ) -> FinishedBlock:
        """What is quantized while block `index` of `count` runs, as it was when the point was written."""
        state = self.running.get(index, {"inputs": {}, "cache": None})
        inputs = {
            name: InputQuantizer(
                format=scheme.of_input(name, index, count),
                params=None if fields["params"] is None else QParams(**fields["params"]),
                outer=fields["outer"],
                where=fields["where"],
            )
            for name, fields in state["inputs"].items()
        }
        cache, halves = scheme.of_cache(index, count), state["cache"]
        if cache is not None:
            cache = CacheQuantizer(cache, *(None if half is None else QParams(**half) for half in halves))
        return FinishedBlock(index, block, structure, inputs=inputs, cache=cache)

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, name: str, content: dict) -> None:
        partial = self.folder / f".{name}.{os.getpid()}"
        torch.save(content, partial)
        os.replace(partial, self.folder / name)


def _state(finished: FinishedBlock) -> dict:
    """What is quantized while the block runs as plain values; formats are the recipe's."""
    inputs = {
        name: {"params": _plain(q.params), "outer": q.outer, "where": q.where} for name, q in finished.inputs.items()
    }
    cache = finished.cache
    return {
        "inputs": inputs,
        "cache": None if cache is None else [_plain(h.params) for h in (cache.keys, cache.values)],
    }


def _plain_transforms(transforms: dict[str, InputTransform]) -> dict[str, dict]:
    return {name: plain(transform) for name, transform in transforms.items()}


def _plain(params: QParams | None) -> dict | None:
    return None if params is None else {f.name: getattr(params, f.name) for f in fields(params)}
