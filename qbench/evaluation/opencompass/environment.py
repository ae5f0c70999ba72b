"""OpenCompass's own Python environment: made once, in the cache folder, beside qbench's.

OpenCompass asks for older numpy, datasets and httpx than qbench runs with, so it is installed where it can disturb
nobody: a virtual environment without pip in it, on top of qbench's packages, which it finds through a path file. So
both compute with the same torch and transformers, which makes their scores comparable and saves 2 GB; in return the
environment belongs to the qbench that made it and is made again when that one's Python, torch or transformers change.
Does not import torch.
"""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from qbench.assets import cache_dir, only_one_process, pip_command
from qbench.errors import AssetError
from qbench.spec import digest

VERSION = "0.5.4"

#: What `import opencompass` needs, apart from what qbench itself depends on; versions that were seen to work together.
REQUIREMENTS = (
    *("absl-py==2.5.1", "accelerate>=1.10", "evaluate==0.4.6", "nltk==3.10.4", "requests>=2.32", "scikit-learn==1.9.1"),
    *(
        "datasets==5.2.0",
        "protobuf==7.36.2",
        "rouge_score==0.1.2",
        "sacrebleu==2.6.0",
        "tabulate==0.10.0",
        "tqdm>=4.66",
    ),
    *("mmengine-lite==0.11.0rc3", "addict==2.4.0", "yapf==0.43.0", "importlib_metadata==10.2.0", "httpx==0.28.1"),
    *("jieba==0.42.1", "rouge_chinese==1.0.3", "rank_bm25==0.2.2", "tiktoken==0.14.0", "gradio_client==2.7.2"),
    *("tree_sitter==0.26.1", "tree_sitter_languages==1.10.2", "timeout_decorator==0.5.0", "openai==3.54.0"),
    *("jsonlines==4.0.0", "fuzzywuzzy==0.18.0", "python-Levenshtein==0.27.5", "h5py==3.16.0", "prettytable==3.18.0"),
    *("rapidfuzz==3.14.6", "opencv-python-headless==5.0.0.93"),
)
#: Packages of the main environment that must stay what they are: OpenCompass computes with them.
SHARED = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
#: Python versions for which all of the above exist.
PYTHONS = ((3, 11), (3, 12))

COMMAND = "qbench doctor --install opencompass"
INSIDE = Path(__file__).with_name("inside.py")

_LOG_LINES = 12


@dataclass(frozen=True)
class Environment:
    """An installed environment. `versions` are those it was checked with."""

    folder: Path
    versions: dict[str, str]

    @property
    def python(self) -> Path:
        return _python(self.folder)

    @property
    def configurations(self) -> Path:
        """OpenCompass's folder of dataset configurations."""
        return next((self.folder / "lib").glob("python*/site-packages")) / "opencompass" / "configs" / "datasets"


def environment_folder() -> Path:
    """Where the environment of this qbench is, or would be."""
    versions = [f"{name}=={metadata.version(name)}" for name in SHARED]
    identity = digest([VERSION, list(REQUIREMENTS), list(sys.version_info[:2]), sys.prefix, versions])
    return cache_dir() / "environments" / f"opencompass-{VERSION}-{identity[:12]}"


def find_environment() -> Environment | None:
    """The environment if it is installed completely."""
    folder = environment_folder()
    with suppress(OSError, ValueError):  # not there, or not to be read
        checked = json.loads((folder / "checked.json").read_text())
        if _python(folder).exists():
            return Environment(folder, checked)
    return None


def require_environment() -> Environment:
    """The environment; AssetError, which says the command, where it is not installed."""
    found = find_environment()
    if found is None:
        raise AssetError(f"eval=opencompass: OpenCompass {VERSION} is not installed here; run {COMMAND}")
    return found


def install(show: Callable[[str], None] = lambda line: None) -> Environment:
    """Make the environment unless it is there already; `show` gets a line whenever there is news.

    Raises AssetError with the last lines of the log, and where that is, when a step fails. Nothing half made is ever
    taken for installed, and a second process waits for the first.
    """
    if sys.version_info[:2] not in PYTHONS:
        wanted = " or ".join(f"{major}.{minor}" for major, minor in PYTHONS)
        raise AssetError(f"opencompass: needs Python {wanted}, this is {sys.version.split()[0]}")
    folder = environment_folder()
    with only_one_process(folder.name):
        if (found := find_environment()) is not None:
            return found
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_name(f"{folder.name}.log")
        log.unlink(missing_ok=True)
        show("creating the environment")
        venv.EnvBuilder(with_pip=False, symlinks=os.name == "posix").create(folder)
        packages = next((folder / "lib").glob("python*/site-packages"))
        (packages / "qbench_packages.pth").write_text("\n".join(_main_packages()) + "\n")
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(f"{name}=={metadata.version(name)}" for name in SHARED) + "\n")
        pip = [
            *pip_command(),
            "--python",
            str(_python(folder)),
            "install",
            "--no-input",
            "--disable-pip-version-check",
        ]
        # Without its declared requirements: they name older versions than it works with.
        _run([*pip, "--no-deps", f"opencompass=={VERSION}"], log, f"installing opencompass {VERSION}", show)
        _run([*pip, "-c", str(constraints), *REQUIREMENTS], log, "installing what it needs", show)
        request, answer = folder / "request.json", folder / "answer.json"
        request.write_text('{"modules": []}')
        check = [str(_python(folder)), "-P", str(INSIDE), "describe", str(request), str(answer)]
        _run(check, log, "checking that it can be imported", show)
        versions = json.loads(answer.read_text())["versions"]
        partial = folder / "checked.json.partial"
        partial.write_text(json.dumps(versions))
        os.replace(partial, folder / "checked.json")  # last: from here on it counts as installed
        return Environment(folder, versions)


def clean_environ(**changes: str) -> dict[str, str]:
    """This process's environment variables without those that would lead OpenCompass elsewhere."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "DATASET_SOURCE", "COMPASS_DATA_CACHE")
    return {name: value for name, value in os.environ.items() if name not in dropped} | changes


def tail(text: str, lines: int = _LOG_LINES) -> list[str]:
    """The last lines that say something; of a progress bar, which overwrites itself, its last state."""
    kept = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line for line in kept if line.strip()][-lines:]


def _run(command: Sequence[str], log: Path, step: str, show: Callable[[str], None]) -> None:
    """Run a step, its output at the end of `log`; AssetError if it fails."""
    show(step)
    start = log.stat().st_size if log.exists() else 0
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=clean_environ(), stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        seen = ""
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if (news := _last_line(log, start)) and news != seen:
                    seen = news
                    show(f"{step}: {seen[:100]}")
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        with log.open(errors="replace") as stream:
            stream.seek(start)
            last = tail(stream.read())
        failure = AssetError(f"opencompass: {step} failed ({last[-1] if last else 'no output'}); log: {log}")
        failure.add_note("\n".join(last))
        raise failure


def _last_line(log: Path, start: int) -> str:
    with log.open("rb") as stream:
        stream.seek(max(start, log.stat().st_size - 2000))
        last = tail(stream.read().decode(errors="replace"), 1)
    return last[0].strip() if last else ""


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _main_packages() -> Iterable[str]:
    """Folders with the packages that qbench itself runs with."""
    folders = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    return [folder for folder in folders if Path(folder).is_dir()]
