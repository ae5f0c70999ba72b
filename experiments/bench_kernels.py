"""Speed of the kernels against the device's own limits and against plain torch.

    python experiments/bench_kernels.py [--device cuda] [--quick] [--only hadamard pack] [--dtype bfloat16]

The limits are measured on the spot: bandwidth by a copy, compute by a large matrix product. A row per operation,
backend and shape gives the time, what was achieved (GB/s where an operation is bound by memory, TFLOP/s where by
arithmetic), its share of the limit, and the ratio to the torch reference (for dequant_matmul: to a matrix product with
the weight in x's dtype), above 1 where faster. On a CPU only the references run.

Operands are taken in turn from copies that together exceed the caches, as in a model, whose next layer is never in
cache. On a GPU the calls are captured in a graph, so that Python's time to launch them does not count.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench import hadamard as orders
from qbench.kernels import Backend, default_backend, dequant_matmul, fake_quant, hadamard, pack, quantize_token, unpack

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
COLD_BYTES = 256e6
"""Operands taken in turn add up to this much on a GPU: several times the L2 cache of an H100 (50 MB)."""
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One operation at one shape. `make` gives a call on operands of its own; work is per call."""

    name: str
    shape: str
    make: Callable[[Backend], Call]
    moved_bytes: float
    operations: float = 0.0
    baseline: Callable[[], Call] | None = None
    baseline_bytes: float = 0.0


@dataclass(frozen=True)
class Machine:
    """Where it runs, and how to time it. repeats: measurements, of which the median counts."""

    device: torch.device
    dtype: torch.dtype
    repeats: int

    def seconds(self, make: Callable[[], Call], moved_bytes: float) -> float:
        """Median seconds of one call, over calls on operands that are not in cache."""
        cold = self.device.type == "cuda"
        copies = max(1, min(64, round(COLD_BYTES / moved_bytes))) if cold else 1
        calls = [make() for _ in range(copies)]
        for call in calls[:2]:
            call()
        run = self._captured(calls) if cold else partial(_run, calls)
        times = sorted(self._once(run) for _ in range(self.repeats))
        return times[len(times) // 2] / len(calls)

    def _captured(self, calls: Sequence[Call]) -> Call:
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _run(calls)
        graph.replay()
        return graph.replay

    def _once(self, run: Call) -> float:
        if self.device.type != "cuda":
            started = time.perf_counter()
            run()
            return time.perf_counter() - started
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        run()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3


def _run(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def limits(machine: Machine, quick: bool) -> tuple[float, float]:
    """(bytes per second of a copy, operations per second of a square matrix product in the dtype)."""
    count, side = (2**22, 512) if quick else (2**27, 8192)
    copied = torch.empty(count, dtype=torch.float32, device=machine.device)
    target = torch.empty_like(copied)
    copy = machine.seconds(lambda: partial(target.copy_, copied), 8 * count)
    a = torch.randn(side, side, device=machine.device).to(machine.dtype)
    product = machine.seconds(lambda: partial(torch.matmul, a, a), 6 * side * side)
    return 8 * count / copy, 2 * side**3 / product


def elementwise(machine: Machine, rows: int, columns: int) -> Iterator[Case]:
    """Operations that read and write x once."""
    size = machine.dtype.itemsize

    def x() -> Tensor:
        return torch.randn(rows, columns, device=machine.device).to(machine.dtype)

    shape = f"{rows}x{columns}"
    for bits, group_size, symmetric in ((4, 128, False), (8, -1, True)):
        options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
        label = f"int{bits} " + (f"g{group_size}" if group_size > 0 else "row") + (" sym" if symmetric else " asym")
        yield Case(
            f"fake_quant {label}",
            shape,
            lambda backend, options=options: partial(fake_quant, x(), backend=backend, **options),
            2 * size * rows * columns,
        )
    for code in ("int8", "float8_e4m3fn"):
        yield Case(
            f"quantize_token {code}",
            shape,
            lambda backend, code=code: partial(quantize_token, x(), code=code, backend=backend),
            (size + 1) * rows * columns,
        )
    k, _ = orders.decompose(columns)
    base = orders.hadamard(k).to(machine.device) if k > 1 else None
    yield Case(
        f"hadamard k={k}",
        shape,
        lambda backend: partial(hadamard, x(), base, backend=backend),
        2 * size * rows * columns,
    )


def packing(machine: Machine, rows: int, columns: int) -> Iterator[Case]:
    for bits in (3, 4, 8):

        def codes(bits: int = bits) -> Tensor:
            return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, device=machine.device)

        moved = rows * columns * (1 + bits / 8)
        yield Case(
            f"pack {bits} bits",
            f"{rows}x{columns}",
            lambda backend, bits=bits, codes=codes: partial(pack, codes(), bits, backend=backend),
            moved,
        )
        yield Case(
            f"unpack {bits} bits",
            f"{rows}x{columns}",
            lambda backend, bits=bits, codes=codes: partial(
                unpack, pack(codes(), bits), bits, columns, torch.uint8, backend=backend
            ),
            moved,
        )


def products(machine: Machine, tokens: int, rows: int, columns: int) -> Iterator[Case]:
    """dequant_matmul against a product with the weight in x's dtype."""
    x = torch.randn(tokens, columns, device=machine.device).to(machine.dtype)

    def dense() -> Call:
        return partial(F.linear, x, torch.randn(rows, columns, device=machine.device).to(machine.dtype))

    for bits, group_size, asymmetric in ((4, 128, False), (4, 128, True), (8, -1, False)):
        groups = 1 if group_size == -1 else -(-columns // group_size)

        def make(
            backend: Backend,
            bits: int = bits,
            group_size: int = group_size,
            asymmetric: bool = asymmetric,
            groups: int = groups,
        ) -> Call:
            packed = torch.randint(0, 256, (rows, columns * bits // 8), dtype=torch.uint8, device=machine.device)
            scale = torch.rand(rows, groups, device=machine.device).to(torch.float16)
            zero = torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8, device=machine.device)
            options = {"bits": bits, "group_size": group_size, "backend": backend}
            return partial(dequant_matmul, x, packed, scale, zero if asymmetric else None, **options)

        yield Case(
            f"W{bits}A16 " + (f"g{group_size}" if group_size > 0 else "row") + (" asym" if asymmetric else " sym"),
            f"{tokens}x{columns} -> {rows}",
            make,
            rows * columns * bits / 8 + rows * groups * (3 if asymmetric else 2),
            2.0 * tokens * rows * columns,
            dense,
            rows * columns * machine.dtype.itemsize,
        )


def cases(machine: Machine, quick: bool) -> Iterator[Case]:
    for rows, columns in ((256, 576), (256, 1536)) if quick else ((4096, 4096), (2048, 11008), (2048, 14336)):
        yield from elementwise(machine, rows, columns)
    side = 512 if quick else 8192
    yield from packing(machine, side, side)
    widths = ((576, 1536),) if quick else ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192))
    for tokens in (1, 16) if quick else (1, 8, 64, 1024):
        for columns, rows in widths:
            yield from products(machine, tokens, rows, columns)


def report(case: Case, machine: Machine, bandwidth: float, compute: float) -> None:
    backends: list[Backend] = ["reference"]
    if default_backend(machine.device) == "triton":
        backends.append("triton")
    reference = None
    if case.baseline is not None:
        reference = machine.seconds(case.baseline, case.baseline_bytes)
    for backend in backends:
        seconds = machine.seconds(partial(case.make, backend), case.moved_bytes)
        reference = reference or seconds
        # The limit that leaves more time is the one that binds.
        if case.operations / compute > case.moved_bytes / bandwidth:
            achieved, share = f"{case.operations / seconds / 1e12:.3g} TFLOP/s", case.operations / seconds / compute
        else:
            achieved, share = f"{case.moved_bytes / seconds / 1e9:.4g} GB/s", case.moved_bytes / seconds / bandwidth
        print(
            f"{case.name:26} {case.shape:22} {backend:10} {seconds * 1e6:10.1f} us {achieved:>16} {share:7.1%} "
            f"{reference / seconds:7.2f}x",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of x; default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--quick", action="store_true", help="small shapes and few repeats")
    parser.add_argument("--only", nargs="*", default=[""], help="operations whose name contains one of these")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = DTYPES[options.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    machine = Machine(device, dtype, 5 if options.quick else 21)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    bandwidth, compute = limits(machine, options.quick)
    print(f"{where}, torch {torch.__version__}, {dtype}: copy {bandwidth / 1e9:.4g} GB/s, ", end="")
    print(f"matrix product {compute / 1e12:.3g} TFLOP/s, default backend {default_backend(device)}")
    print(f"{'operation':26} {'shape':22} {'backend':10} {'time':>13} {'achieved':>16} {'limit':>7} {'vs torch':>8}")
    with torch.inference_mode():
        for case in cases(machine, options.quick):
            if any(word in case.name for word in options.only):
                report(case, machine, bandwidth, compute)


if __name__ == "__main__":
    main()
