"""Resume points: what a pass needs to go on after the last finished block, on disk, replaced atomically."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from qbench.engine.sinks import Ledger
from qbench.engine.streams import Stream


class ResumePoint:
    """State of one pass under `folder`, which carries the run's key; written at most every `interval_s` seconds.

    A point holds the hidden states of every stream, the ledger, and the decoded weights of the blocks so far (those
    in separate files, written once). A short run never writes one.
    """

    def __init__(self, folder: Path, interval_s: float) -> None:
        self.folder, self.interval_s = folder, interval_s
        self._saved, self._blocks_saved = time.monotonic(), 0

    def save(self, done: int, streams: list[Stream], ledger: Ledger, weights: dict[str, Tensor]) -> None:
        """Called after block `done - 1`; does nothing before the interval has passed."""
        if time.monotonic() - self._saved < self.interval_s:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = list(weights.items())[self._blocks_saved :]
        if fresh:
            self._write(f"weights-{done:05d}.pt", dict(fresh))
        self._blocks_saved = len(weights)
        chunks = [stream.chunks for stream in streams]
        self._write("point.pt", {"done": done, "chunks": chunks, "ledger": asdict(ledger)})
        self._saved = time.monotonic()

    def load(self, streams: list[Stream], ledger: Ledger, weights: dict[str, Tensor]) -> int:
        """Number of finished blocks (0: none); fills streams, ledger and weights."""
        point = self.folder / "point.pt"
        if not point.is_file():
            return 0
        saved = torch.load(point, weights_only=True)
        for path in sorted(self.folder.glob("weights-*.pt")):
            if int(path.stem.split("-")[1]) <= saved["done"]:
                weights.update(torch.load(path, weights_only=True))
        for stream, chunks in zip(streams, saved["chunks"], strict=True):
            stream.chunks = chunks
        for name, value in saved["ledger"].items():
            setattr(ledger, name, [tuple(m) for m in value] if name == "metrics" else value)
        self._blocks_saved = len(weights)
        return saved["done"]

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, name: str, content: dict) -> None:
        partial = self.folder / f".{name}.{os.getpid()}"
        torch.save(content, partial)
        os.replace(partial, self.folder / name)
