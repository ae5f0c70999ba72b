"""The environment a number was made in: commit, versions, processor, threads, GPU. Never imports torch."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import qbench
from qbench.store.records import Environment

# What can move a perplexity or a time. Versions come from the installed metadata: importing the libraries
# takes seconds.
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "gguf",
    "numpy",
    "triton",
    "sqlalchemy",
    "hydra-core",
)


def detect(threads: int | None = None, gpu: str | None = None) -> Environment:
    """The present environment; takes some tens of milliseconds (git, nvidia-smi).

    `threads` is the number of intra-op threads in use; None stands for OMP_NUM_THREADS, or else for the
    processors this process may run on. `gpu` is the name of the device in use; None stands for the first one
    that nvidia-smi lists.
    """
    commit, dirty = git_state(Path(qbench.__file__).resolve().parent)
    listed_gpu, driver = _nvidia()
    return Environment(
        git_commit=commit,
        git_dirty=dirty,
        versions={"qbench": qbench.__version__, "python": platform.python_version(), **_versions()},
        platform=platform.platform(),
        cpu=_cpu_model(),
        threads=threads if threads is not None else _default_threads(),
        gpu=gpu if gpu is not None else listed_gpu,
        driver=driver,
    )


def environment_hash(environment: Environment) -> str:
    """The sha256 (hex) of all facts: equal environments share one row."""
    facts = json.dumps(asdict(environment), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(facts.encode()).hexdigest()


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the checkout that tracks `folder`; (None, None) if none does.

    An installed copy can lie in a virtual environment inside somebody's own repository; that repository's
    commit says nothing about qbench, so `folder` has to be tracked, not merely contained.
    """
    git = shutil.which("git")
    if git is None or _output([git, "-C", str(folder), "ls-files", "--error-unmatch", "__init__.py"]) is None:
        return None, None
    commit = _output([git, "-C", str(folder), "rev-parse", "HEAD"])
    changes = _output([git, "-C", str(folder), "status", "--porcelain", "--", ":/"])
    return (commit, bool(changes)) if commit and changes is not None else (None, None)


def _output(command: list[str]) -> str | None:
    """What `command` printed, stripped; None if it could not be run to success within 10 s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # optional on this machine; its absence is recorded as absence
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _default_threads() -> int:
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _nvidia() -> tuple[str | None, str | None]:
    """Name of the first GPU and driver version; (None, None) without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None, None
    text = _output([tool, "--query-gpu=name,driver_version", "--format=csv,noheader"])
    if not text:
        return None, None
    name, _, driver = text.splitlines()[0].partition(",")
    return name.strip(), driver.strip() or None
