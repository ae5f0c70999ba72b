"""Tensors that several runs need, kept on disk within a size limit: full-precision outputs of a model on a text.

Logits of 10,000 tokens over 50,000 words are 2 GB; the hidden states behind the last block, from which the model's own
norm and head give the same logits bit by bit, are a hundredth of that. So hidden states are what is kept, and nothing
of the vocabulary is cut off. A cache is not a result: deleting it costs time and nothing else.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qbench.spec import digest

#: What all entries of a folder may take together where nothing else is said.
LIMIT_BYTES = 2 << 30

_ENTRY = "value"


@dataclass
class TensorCache:
    """Tensors by a text key, a file each, in `folder`; together at most `limit_bytes`.

    The least recently used entries make room, but never those used since this object was made: a working set larger
    than the limit keeps the part that fits and computes the rest, where evicting in a circle would never hit. A file
    that cannot be read counts as missing, a folder that cannot be written as full. Several processes may share it.
    """

    folder: Path
    limit_bytes: int = LIMIT_BYTES
    _used: set[Path] = field(default_factory=set)

    def get(self, key: str, compute: Callable[[], Tensor]) -> Tensor:
        """The tensor kept under `key`, on the CPU; otherwise what `compute` gives, kept from now on."""
        path = self.folder / f"{key}.safetensors"
        self._used.add(path)
        with suppress(OSError, SafetensorError, KeyError):
            # A copy, because bits of a matrix product may depend on how its operand is aligned, and the file's is not.
            found = load_file(path)[_ENTRY].clone()
            os.utime(path)
            return found
        value = compute()
        with suppress(OSError):
            self._keep(path, value)
        return value

    def _keep(self, path: Path, value: Tensor) -> None:
        need = value.numel() * value.element_size()
        if need > self.limit_bytes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._make_room(need):
            return
        handle, scratch = tempfile.mkstemp(dir=self.folder, suffix=".part")
        os.close(handle)
        try:
            save_file({_ENTRY: value.detach().to("cpu").contiguous()}, scratch)
            os.replace(scratch, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(scratch)

    def _make_room(self, need: int) -> bool:
        """Whether `need` bytes fit, after old entries were dropped for them."""
        entries = []
        for path in (*self.folder.glob("*.safetensors"), *self.folder.glob("*.part")):  # a killed process leaves parts
            with suppress(FileNotFoundError):  # another process made room
                status = path.stat()
                entries.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total + need <= self.limit_bytes:
                break
            if path in self._used:
                continue
            with suppress(FileNotFoundError):
                path.unlink()
            total -= size
        return total + need <= self.limit_bytes


def full_precision_cache(folder: Path, limit_bytes: int) -> TensorCache:
    """What evaluators keep of full-precision models, in a folder of its own under their common one."""
    return TensorCache(folder / "full-precision", limit_bytes)


def cache_key(model_key: str, tokens: Tensor, device: torch.device, *parts: object) -> str:
    """Names what `model_key` computes from `tokens` (int64, any shape) here: the same bits come only from the same
    shapes, library, number of threads and processor."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    ids = tokens.to("cpu", torch.int64).contiguous().numpy().astype("<i8", copy=False)
    threads = torch.get_num_threads()
    return digest(
        [model_key, list(tokens.shape), ids.tobytes().hex(), torch.__version__, device.type, where, threads, *parts]
    )
