"""Time and memory of the phases of a run."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class Phases:
    """Wall-clock seconds by phase name, added up over repeated phases."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


#: glibc's parameter for the number of heaps (malloc.h).
_M_ARENA_MAX = -8


def share_one_heap() -> None:
    """Let all threads allocate from one heap; call it before threads start.

    The chunks of a pass run in threads of which only one works at a time. With a heap for each, as glibc gives them,
    every one keeps the largest temporaries it ever had: hundreds of megabytes that the others cannot use.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def release_free_memory() -> None:
    """Give freed heap memory back to the system.

    glibc keeps what each thread freed for that thread; after a pass, whose chunks ran in threads, that is hundreds of
    megabytes that the evaluation could not use. Other C libraries have no such call, and no such habit.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class PeakMemory:
    """Largest resident set of this process (and memory of the device) since construction.

    On Linux the kernel's high-water mark is reset, to what is in use: what an earlier run freed is given back first.
    Elsewhere the peak of the whole process is what there is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        gc.collect()
        release_free_memory()
        with suppress(OSError):  # not Linux, or not allowed: then the mark stays the process's own
            Path("/proc/self/clear_refs").write_text("5")

    def host_bytes(self) -> int:
        status = Path("/proc/self/status")
        if status.exists():
            for line in status.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def device_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
