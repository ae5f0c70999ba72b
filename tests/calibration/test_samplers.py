"""Windows: laws on offsets, exhaustive small cases, and errors that name the option and what would fit."""

import hashlib
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qbench.calibration.samplers import evaluation_windows, random, sequential, window_hash
from qbench.errors import SpecError


@pytest.mark.parametrize("n_tokens", range(1, 14))
@pytest.mark.parametrize("length", range(2, 7))
def test_non_overlapping_windows_are_the_tokens_in_order_with_the_remainder_dropped(n_tokens, length):
    ids = torch.arange(100, 100 + n_tokens)
    expected = [list(range(100 + i, 100 + i + length)) for i in range(0, n_tokens - length + 1, length)]
    if not expected:
        with pytest.raises(SpecError, match=rf"eval.length={length}: at most {n_tokens}"):
            evaluation_windows(ids, length)
        return
    assert evaluation_windows(ids, length).tolist() == expected
    for n in range(1, len(expected) + 1):
        assert evaluation_windows(ids, length, n).tolist() == expected[:n]
        assert sequential(ids, n, length).tolist() == expected[:n]
    with pytest.raises(SpecError, match=rf"eval.n={len(expected) + 1}: 1 to {len(expected)} "):
        evaluation_windows(ids, length, len(expected) + 1)
    with pytest.raises(SpecError, match=rf"calib.n={len(expected) + 1}: at most {len(expected)} windows"):
        sequential(ids, len(expected) + 1, length)


@given(
    n_tokens=st.integers(2, 60), length=st.integers(2, 20), n=st.integers(1, 9), seed=st.integers(0, 2**32)
)
def test_random_windows_are_runs_of_the_corpus_and_depend_on_the_seed_alone(n_tokens, length, n, seed):
    ids = torch.arange(n_tokens)
    if length > n_tokens:
        with pytest.raises(SpecError, match=rf"calib.length={length}: at most {n_tokens}"):
            random(ids, n, length, seed)
        return
    windows = random(ids, n, length, seed)
    assert windows.shape == (n, length)
    assert windows.dtype == torch.int64
    assert (windows.diff(dim=1) == 1).all()
    torch.manual_seed(n)  # the global generator must not matter, nor be touched
    state = torch.random.get_rng_state()
    assert torch.equal(random(ids, n, length, seed), windows)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_random_offsets_are_uniform_with_both_ends_included():
    ids, length, n = torch.arange(12), 5, 8000  # offsets 0 … 7
    counts = torch.bincount(random(ids, n, length, seed=3)[:, 0], minlength=8).double()
    assert len(counts) == 8
    chi_squared = ((counts - n / 8) ** 2 / (n / 8)).sum()
    assert chi_squared < 24.3  # 99.9 % quantile for 7 degrees of freedom
    assert not torch.equal(random(ids, n, length, seed=3), random(ids, n, length, seed=4))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_windows_are_int64_whatever_the_ids(dtype):
    ids = torch.arange(10, dtype=dtype)
    for windows in (sequential(ids, 2, 4), random(ids, 2, 4, 0), evaluation_windows(ids, 4)):
        assert windows.dtype == torch.int64


@pytest.mark.parametrize(
    ("n", "length", "option"), [(0, 4, "calib.n=0"), (-1, 4, "calib.n=-1"), (2, 1, "calib.length=1")]
)
def test_sizes_that_mean_nothing_are_refused(n, length, option):
    for sample in (lambda ids: sequential(ids, n, length), lambda ids: random(ids, n, length, 0)):
        with pytest.raises(SpecError, match=option):
            sample(torch.arange(100))


@pytest.mark.parametrize(
    ("length", "n", "option"), [(1, None, "eval.length=1"), (4, 0, "eval.n=0"), (4, -2, "eval.n=-2")]
)
def test_evaluation_sizes_that_mean_nothing_are_refused(length, n, option):
    with pytest.raises(SpecError, match=option):
        evaluation_windows(torch.arange(100), length, n)


def test_window_hash_is_over_the_shape_and_little_endian_ids():
    windows = torch.tensor([[1, 2, 300], [-4, 5, 2**40]])
    packed = struct.pack("<6q", 1, 2, 300, -4, 5, 2**40)
    assert window_hash(windows) == hashlib.sha256(b"(2, 3)" + packed).hexdigest()
    others = [windows.view(3, 2), windows.flip(0), windows[:1], windows + 1]
    assert len({window_hash(w) for w in [windows, *others]}) == 5
    assert window_hash(windows.t().contiguous().t()) == window_hash(windows)  # memory layout is not meaning
