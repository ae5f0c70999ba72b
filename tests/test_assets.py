"""Assets: hashes, model directories and hub models, without a network."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from qbench import assets
from qbench.assets import check_model_dir, file_sha256, resolve_model
from qbench.errors import AssetError, SpecError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def message(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    assert assets.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("QBENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_dir() == tmp_path / "xdg" / "qbench"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache_dir() == Path.home() / ".cache" / "qbench"


def test_planning_imports_the_standard_library_alone():
    code = (
        "import sys; before = set(sys.modules)\n"
        "from qbench.assets import resolve_model; resolve_model(name='m', asset='wheel:smollm2-135m')\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - sys.stdlib_module_names - {'qbench'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Hashes


def old_file(path: Path, content: bytes) -> Path:
    """A file that was last changed an hour ago as far as its modification time tells."""
    path.write_bytes(content)
    os.utime(path, (time.time() - 3600,) * 2)
    return path


@pytest.fixture
def quiet_period_over(monkeypatch):
    """A change time cannot be set back, so the wait that it asks for is set to none."""
    monkeypatch.setattr(assets, "_HASH_CACHE_QUIET_S", -1.0)


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1])
@pytest.mark.usefixtures("quiet_period_over")
def test_a_hash_is_remembered_and_right(tmp_path, monkeypatch, size):
    content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    file = old_file(tmp_path / "file", content)
    expected = hashlib.sha256(content).hexdigest()
    assert file_sha256(file) == expected
    if size >= 1 << 20:
        monkeypatch.setattr(hashlib, "file_digest", None)  # not read again
    assert file_sha256(file) == expected


@pytest.mark.usefixtures("quiet_period_over")
def test_a_hash_is_forgotten_when_the_file_changes_even_with_size_and_time_kept(tmp_path):
    content = b"a" * (1 << 20)
    file = old_file(tmp_path / "file", content)
    first, status = file_sha256(file), file.stat()
    file.write_bytes(b"b" + content[1:])
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_mtime_ns == status.st_mtime_ns
    assert file_sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest() != first


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, cache):
    (tmp_path / "file").write_bytes(b"a" * (1 << 20))
    file_sha256(tmp_path / "file")
    assert not (cache / "sha256").exists()


@pytest.mark.usefixtures("quiet_period_over")
def test_a_hash_needs_no_cache_folder(tmp_path, monkeypatch):
    file = old_file(tmp_path / "file", b"a" * (1 << 20))
    monkeypatch.setenv("QBENCH_CACHE", str(file / "not-a-folder"))
    assert file_sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()


# Model directories


def model_dir(folder: Path, *, shards: int = 1) -> Path:
    """A directory with the files of a model; the numbers don't matter here."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    weights = {f"w{i}": np.full((3, 2), float(i), np.float32) for i in range(shards)}
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    names = {key: f"model-{i + 1:05}-of-{shards:05}.safetensors" for i, key in enumerate(weights)}
    for key, name in names.items():
        save_file({key: weights[key]}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_a_directory_is_a_model_named_after_itself(tmp_path, shards):
    folder = model_dir(tmp_path / "my-model", shards=shards)
    asset = resolve_model(name="smollm2-135m", path=str(folder) + "/", asset="wheel:smollm2-135m")
    assert (asset.name, asset.path, asset.served_by) == ("my-model", folder, "local path")
    expected = sorted(f for f in folder.iterdir() if f.suffix == ".safetensors")
    assert check_model_dir(folder, "here") == expected


def test_the_fingerprint_is_over_the_files_that_make_numbers(tmp_path):
    def fingerprint(folder: Path) -> str:
        return resolve_model(name="m", path=folder).fingerprint

    first = model_dir(tmp_path / "a")
    parts = sorted(["config.json", "model.safetensors", "tokenizer.json"])
    lines = [f"{n}\0{hashlib.sha256((first / n).read_bytes()).hexdigest()}\n" for n in parts]
    assert fingerprint(first) == hashlib.sha256("".join(lines).encode()).hexdigest()
    second = model_dir(tmp_path / "b" / "other-name")
    (second / "README.md").write_text("does not matter")
    assert fingerprint(second) == fingerprint(first)
    seen = {fingerprint(first), fingerprint(model_dir(tmp_path / "sharded", shards=2))}
    for name, content in [
        ("config.json", b'{"model_type": "mistral"}'),
        ("tokenizer.json", b"{ }"),
        ("merges.txt", b"a b"),
        ("tokenizer.model", b"sentencepiece"),
        ("model.safetensors", (first / "model.safetensors").read_bytes()[:-1] + b"\x01"),
    ]:
        folder = model_dir(tmp_path / f"changed-{name}")
        (folder / name).write_bytes(content)
        seen.add(fingerprint(folder))
    assert len(seen) == 7


def test_a_safetensors_file_of_any_other_length_is_refused(tmp_path):
    folder = model_dir(tmp_path / "m")
    whole = (folder / "model.safetensors").read_bytes()
    for content in [*(whole[:n] for n in range(len(whole))), whole + b"\0", b"\xff" * 64, b"\0" * 64]:
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(AssetError) as error:
            resolve_model(name="m", path=folder)
        assert message(error).startswith(f"model.path={folder}: model.safetensors is cut off or damaged")
    (folder / "model.safetensors").write_bytes(whole)
    resolve_model(name="m", path=folder)


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def write(name: str, content: str):
    return lambda folder: (folder / name).write_text(content)


SECOND = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize(
    ("shards", "damage", "problem"),
    [
        (1, remove("model.safetensors"), "no weights"),
        (3, remove("model.safetensors.index.json"), "no weights"),
        (3, remove(SECOND), SECOND),
        (3, write(SECOND, "cut"), SECOND),
        (3, write("model.safetensors.index.json", "{}"), "weight_map"),
        (3, write("model.safetensors.index.json", "{"), "not JSON"),
        (1, remove("config.json"), "no config.json"),
        (1, write("config.json", "{"), "config.json is not JSON"),
        (1, write("config.json", "[]"), "config.json holds a list"),
        (1, write("config.json", '{"quantization_config": {"bits": 4}}'), "quantized already"),
    ],
)
def test_an_unusable_directory_is_refused_in_one_line(tmp_path, shards, damage, problem):
    folder = model_dir(tmp_path / "m", shards=shards)
    damage(folder)
    with pytest.raises(AssetError) as error:
        resolve_model(name="m", path=folder)
    assert message(error).startswith(f"model.path={folder}: ")
    assert problem in message(error)


def test_pytorch_files_serve_where_there_is_no_safetensors(tmp_path):
    folder = model_dir(tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"zip")
    assert check_model_dir(folder, "here") == [folder / "model.safetensors"]
    (folder / "model.safetensors").unlink()
    assert check_model_dir(folder, "here") == [folder / "pytorch_model.bin"]


@pytest.mark.parametrize(
    "path", ["/no/such/dir", "./org/name", "../name", "~/name", "name", "a/b/c", "org/", ".hidden/x"]
)
def test_what_is_no_directory_and_no_hub_id_is_refused_without_asking_the_hub(path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(AssetError, match="no such directory") as error:
        resolve_model(name="m", path=path)
    assert message(error).startswith(f"model.path={path}: ")


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "m.safetensors").write_text("x")
    with pytest.raises(AssetError, match="is no directory"):
        resolve_model(name="m", path=tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "asset", [None, "", "wheel:", "wheel:other", "package:", "package:other", "package:.", "hub:x"]
)
def test_unknown_assets_are_refused(asset):
    with pytest.raises(SpecError, match=r"model\.asset=.*wheel:smollm2-135m, package:tiny"):
        resolve_model(name="m", asset=asset)


def test_the_wheels_model_is_known_without_being_there(cache):
    asset = resolve_model(name="smollm2-135m", asset="wheel:smollm2-135m")
    assert not cache.exists()
    assert asset.fingerprint == resolve_model(name="other", asset="wheel:smollm2-135m").fingerprint
    assert asset.gguf is not None
    assert asset.gguf.instead == "model.path"
    assert cache in asset.path.parents


def test_every_model_file_resolves(pytestconfig):
    files = sorted((pytestconfig.rootpath / "conf" / "model").glob("*.yaml"))
    assert {"smollm2-135m", "tiny"} <= {file.stem for file in files}
    for file in files:
        assert resolve_model(**yaml.safe_load(file.read_text())).name == file.stem


# The hub


def hub(monkeypatch, served: Path | Exception, cached: Path | None = None):
    """Replaces the hub; returns the list of the calls that would have used the network."""
    calls: list[dict] = []

    def snapshot_download(hub_id: str, *, local_files_only: bool, **options):
        if not local_files_only:
            calls.append({"hub_id": hub_id, **options})
        answer = (cached or FileNotFoundError("not cached")) if local_files_only else served
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_hub_model_comes_from_the_hubs_cache_when_it_is_whole_there(tmp_path, monkeypatch):
    folder = model_dir(tmp_path / "snapshots" / "0123abc")
    calls = hub(monkeypatch, ConnectionError("no network"), cached=folder)
    asset = resolve_model(name="m", path="org/name")
    assert (asset.name, asset.served_by) == ("org/name", "hub org/name@0123abc")
    assert asset.fingerprint == resolve_model(name="m", path=folder).fingerprint
    assert calls == []


def test_a_hub_model_is_downloaded_when_the_cached_one_lacks_a_shard(tmp_path, monkeypatch):
    partial, whole = model_dir(tmp_path / "partial", shards=3), model_dir(tmp_path / "whole", shards=3)
    (partial / SECOND).unlink()
    calls = hub(monkeypatch, whole, cached=partial)
    assert resolve_model(name="m", path="org/name").path == whole
    assert len(calls) == 1
    assert "model*.safetensors" in calls[0]["allow_patterns"]


@pytest.mark.parametrize("whole", [True, False])
def test_the_hubs_own_cache_is_read_without_a_network(tmp_path, monkeypatch, whole):
    def refuse(*_args, **_options):
        raise OSError("no network")

    repository = tmp_path / "hub" / "models--org--name"
    folder = model_dir(repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    if whole:
        assert resolve_model(name="m", path="org/name").path == folder
        return
    (folder / "model.safetensors").unlink()
    with pytest.raises(AssetError, match=r"^model\.path=org/name: ") as error:
        resolve_model(name="m", path="org/name")
    message(error)


def test_an_unreachable_hub_is_one_line_that_says_what_to_do(monkeypatch):
    hub(monkeypatch, ConnectionError("no route\nto host"))
    with pytest.raises(AssetError, match=r"no route\).*give its directory") as error:
        resolve_model(name="m", path="org/name")
    assert message(error).startswith("model.path=org/name: ")
