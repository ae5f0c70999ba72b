"""A cache that never changes a number, stays within its limit, and survives what happens to files."""

import os

import pytest
import torch

from qbench.evaluation.logit_cache import TensorCache, cache_key


def _ages(folder):
    """Sets every entry's last use apart, oldest first by name."""
    for place, path in enumerate(sorted(folder.iterdir())):
        os.utime(path, (place, place))


def _tensor(seed, size=1000):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_what_was_kept_comes_back_bit_by_bit(dtype, tmp_path):
    value = _tensor(0).mul(100).to(dtype).view(10, 100).T  # also when it isn't contiguous
    cache = TensorCache(tmp_path / "new")
    assert cache.get("a", lambda: value) is value
    found = TensorCache(tmp_path / "new").get("a", lambda: pytest.fail("computed again"))
    assert found.dtype == dtype
    assert torch.equal(found, value)


def test_it_stays_within_its_limit_and_drops_what_was_used_least_recently(tmp_path):
    first = TensorCache(tmp_path, 13_000)
    for name in "abc":
        first.get(name, lambda: _tensor(0))
    _ages(tmp_path)
    TensorCache(tmp_path, 13_000).get("a", lambda: pytest.fail("computed again"))
    TensorCache(tmp_path, 13_000).get("d", lambda: _tensor(1))
    assert {path.stem for path in tmp_path.iterdir()} == {"a", "c", "d"}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 13_000


def test_a_working_set_larger_than_the_limit_keeps_what_fits(tmp_path):
    """Evicting the least recently used in a circle would never hit."""
    TensorCache(tmp_path, 9_000).get("old", lambda: _tensor(9))
    _ages(tmp_path)
    cache, computed = TensorCache(tmp_path, 9_000), []
    for _ in range(2):
        for name in "abcd":
            cache.get(name, lambda name=name: computed.append(name) or _tensor(0))
    assert "".join(computed) == "abcd" + "cd"
    assert {path.stem for path in tmp_path.iterdir()} == {"a", "b"}


def test_other_files_are_left_alone_and_parts_of_killed_processes_go(tmp_path):
    (tmp_path / "notes.txt").write_text("x" * 20_000)
    (tmp_path / "folder").mkdir()
    (tmp_path / "abc.part").write_bytes(bytes(7_000))
    os.utime(tmp_path / "abc.part", (0, 0))
    TensorCache(tmp_path, 9_000).get("a", lambda: _tensor(0))
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "folder", "a.safetensors"}


def test_nothing_is_kept_without_room(tmp_path):
    cache = TensorCache(tmp_path / "none", 0)
    assert torch.equal(cache.get("a", lambda: _tensor(1)), _tensor(1))
    assert not (tmp_path / "none").exists()


def test_a_damaged_file_counts_as_missing(tmp_path):
    cache = TensorCache(tmp_path)
    cache.get("a", lambda: _tensor(0))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    assert torch.equal(cache.get("a", lambda: _tensor(1)), _tensor(1))
    assert torch.equal(cache.get("a", lambda: pytest.fail("computed again")), _tensor(1))
    path.write_bytes(b"")
    assert torch.equal(cache.get("a", lambda: _tensor(2)), _tensor(2))


def test_a_folder_that_cannot_be_made_only_costs_time(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = TensorCache(tmp_path / "file" / "folder")
    for seed in (0, 1):
        assert torch.equal(cache.get("a", lambda seed=seed: _tensor(seed)), _tensor(seed))


def test_an_error_while_computing_is_nobodys_secret(tmp_path):
    cache = TensorCache(tmp_path)

    def fail():
        raise OSError("on purpose")

    with pytest.raises(OSError, match="on purpose"):
        cache.get("a", fail)
    assert not list(tmp_path.iterdir())


def test_the_key_tells_apart_whatever_gives_other_bits(monkeypatch):
    ids = torch.arange(12).view(3, 4)
    cpu = torch.device("cpu")
    keys = {
        cache_key("model", ids, cpu, "hidden"),
        cache_key("other", ids, cpu, "hidden"),
        cache_key("model", ids.view(4, 3), cpu, "hidden"),
        cache_key("model", ids + 1, cpu, "hidden"),
        cache_key("model", ids, cpu, "greedy"),
        cache_key("model", ids, cpu, "hidden", 5),
    }
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    keys.add(cache_key("model", ids, cpu, "hidden"))
    assert len(keys) == 7
    assert cache_key("model", ids.int(), cpu, "hidden") in keys
