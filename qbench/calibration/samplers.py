"""Token windows cut from a corpus: pure functions, ids int64 [n_tokens] -> int64 [n_windows, length]."""

import hashlib

import torch
from torch import Tensor

from qbench.errors import SpecError


def sequential(ids: Tensor, n: int, length: int) -> Tensor:
    """The first `n` consecutive, non-overlapping windows of `length` tokens, int64 [n, length].

    SpecError when `ids` has fewer than `n * length` tokens.
    """
    _check_sizes(n, length)
    fitting = len(ids) // length
    if fitting < n:
        if fitting == 0:
            raise _too_long("calib.length", length, ids)
        raise SpecError(
            "calib.n",
            n,
            f"at most {fitting} windows of calib.length={length} fit in the corpus of {len(ids)} tokens",
        )
    return ids[: n * length].view(n, length).to(torch.int64)


def random(ids: Tensor, n: int, length: int, seed: int) -> Tensor:
    """`n` windows of `length` tokens at random offsets, int64 [n, length].

    Each offset is drawn independently and uniformly from 0 … n_tokens - length, both included, by a CPU
    generator seeded with `seed`; windows may therefore overlap or repeat. SpecError when no window fits.
    """
    _check_sizes(n, length)
    if len(ids) < length:
        raise _too_long("calib.length", length, ids)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - length + 1, (n,), generator=generator)
    return ids[starts[:, None] + torch.arange(length)].to(torch.int64)


def evaluation_windows(ids: Tensor, length: int, n: int | None = None) -> Tensor:
    """All (or the first `n`) non-overlapping windows of `length` tokens, int64 [n, length].

    The remainder of the corpus is dropped.
    SpecError when no window fits or fewer than `n` do.
    """
    if length < 2:
        raise SpecError("eval.length", length, "at least 2 tokens: the first of a window is never predicted")
    fitting = len(ids) // length
    if fitting == 0:
        raise _too_long("eval.length", length, ids)
    if n is not None and not 1 <= n <= fitting:
        raise SpecError(
            "eval.n",
            n,
            f"1 to {fitting} (null: all): the corpus of {len(ids)} tokens has no more of {length}",
        )
    count = fitting if n is None else n
    return ids[: count * length].view(count, length).to(torch.int64)


def window_hash(windows: Tensor) -> str:
    """Sha256 (hex) of the shape and the token ids of `windows` (int64 [n, length]) as little-endian int64."""
    digest = hashlib.sha256(str(tuple(windows.shape)).encode())
    digest.update(windows.to("cpu", torch.int64).contiguous().numpy().astype("<i8", copy=False).tobytes())
    return digest.hexdigest()


def _check_sizes(n: int, length: int) -> None:
    if n < 1:
        raise SpecError("calib.n", n, "at least 1 calibration window")
    if length < 2:
        raise SpecError("calib.length", length, "at least 2 tokens")


def _too_long(option: str, length: int, ids: Tensor) -> SpecError:
    return SpecError(option, length, f"at most {len(ids)}, the number of tokens in the corpus")
