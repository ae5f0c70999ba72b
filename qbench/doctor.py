"""`qbench doctor`: what this machine has, what is missing and the command that installs it. Imports torch late."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from qbench.assets import cache_dir, scratch_dir
from qbench.errors import AssetError, QbenchError
from qbench.evaluation.opencompass import environment as opencompass
from qbench.evaluation.opencompass.catalog import KNOWN, Catalog
from qbench.store.database import Database
from qbench.store.environment import detect

State = Literal["ok", "missing", "failed"]

#: Below this a sweep is likely to stop halfway.
LEAST_FREE_BYTES = 2 << 30
#: Optional packages: what they serve and how they come.
OPTIONAL = {
    "lm_eval": ("lm-eval", "eval=zeroshot", "pip install lm-eval"),
    "triton": ("triton", "kernels on a GPU", "pip install triton"),
    "psycopg": ("psycopg", "results in PostgreSQL", "pip install 'qbench[postgres]'"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report. "missing" is an optional part that is not there; "failed" is something that qbench needs
    and cannot use. `remedy` is what to do or to run."""

    about: str
    state: State
    found: str
    remedy: str | None = None


def main(store: str, *, as_json: bool = False, part: str | None = None) -> int:
    """Print the report, having installed `part` first if one is named. 0: all that is needed is there, else 1."""
    if part is not None and not _install(Console(stderr=True)):
        return 1
    found = list(findings(store))
    if as_json:
        print(json.dumps([asdict(each) for each in found], indent=2, ensure_ascii=False))
    else:
        _print(found)
    return 1 if any(each.state == "failed" for each in found) else 0


def findings(store: str) -> Iterator[Finding]:
    """Software, machine, storage, optional parts."""
    yield from _software()
    yield from _machine()
    yield _cache()
    yield _store(store)
    yield from _optional()


def _software() -> Iterator[Finding]:
    environment = detect()
    python = sys.version_info[:2] >= (3, 11)
    yield Finding("python", "ok" if python else "failed", sys.version.split()[0], None if python else "Python 3.11")
    commit = environment.git_commit
    changed = " with changes" if environment.git_dirty else ""
    yield Finding("qbench", "ok", environment.versions["qbench"] + (f" ({commit[:10]}{changed})" if commit else ""))
    for name in ("torch", "transformers", "numpy", "sqlalchemy", "hydra-core"):
        version = environment.versions.get(name)
        remedy = None if version else "pip install qbench"
        yield Finding(name, "ok" if version else "failed", version or "not installed", remedy)


def _machine() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("devices", "failed", f"torch cannot be imported: {str(error).splitlines()[0]}", "reinstall torch")
        return
    devices = [
        f"cuda:{i} {torch.cuda.get_device_name(i)}, {_size(torch.cuda.get_device_properties(i).total_memory)}"
        for i in range(torch.cuda.device_count())
    ]
    yield Finding("devices", "ok", "; ".join(["cpu", *devices]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("threads", "ok", f"{torch.get_num_threads()} of {cores} processors")
    yield Finding("memory", "ok", _memory())


def _memory() -> str:
    page = os.sysconf("SC_PAGE_SIZE")
    text = _size(os.sysconf("SC_PHYS_PAGES") * page)
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        text += f", {_size(os.sysconf('SC_AVPHYS_PAGES') * page)} unused"
    return text


def _cache() -> Finding:
    """Whether the cache folder can be written, and how much room there is."""
    try:
        with scratch_dir() as scratch:
            free = shutil.disk_usage(scratch).free
    except AssetError as error:
        return Finding("cache", "failed", str(error))
    text = f"{cache_dir()}, {_size(free)} free"
    if free < LEAST_FREE_BYTES:
        return Finding("cache", "failed", text, f"make room: {_size(LEAST_FREE_BYTES)} at least, or set QBENCH_CACHE")
    return Finding("cache", "ok", text)


def _store(url: str) -> Finding:
    """Whether the results database can be opened; one that is not there yet is no fault."""
    path = _sqlite_path(url)
    if path is not None and not path.exists():
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not os.access(folder, os.W_OK):
            return Finding("store", "failed", f"{url}: {folder} cannot be written", "another store.url")
        return Finding("store", "ok", f"{url}, made by the first run")
    try:
        with Database(url, create=False) as database:
            database.find([])
    except QbenchError as error:
        return Finding("store", "failed", str(error), "another store.url")
    return Finding("store", "ok", url if path is None else f"{url}, {_size(path.stat().st_size)}")


def _sqlite_path(url: str) -> Path | None:
    """The file of an SQLite address; None for other databases, and for what is no address."""
    if not url.startswith("sqlite"):
        return None
    try:
        database = make_url(url).database
    except ArgumentError:  # opening it says what is wrong
        return None
    return Path(database).expanduser() if database else None


def _optional() -> Iterator[Finding]:
    for module, (package, serves, command) in OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            yield Finding(package, "missing", f"for {serves}", command)
        else:
            yield Finding(package, "ok", f"{metadata.version(package)}, for {serves}")
    found = opencompass.find_environment()
    if found is None:
        about = f"for eval=opencompass, in an environment of its own ({opencompass.VERSION}, up to 0.9 GB)"
        yield Finding("opencompass", "missing", about, opencompass.COMMAND)
    else:
        yield Finding("opencompass", "ok", f"{found.versions['opencompass']}, for eval=opencompass, in {found.folder}")


def _install(console: Console) -> bool:
    """Make OpenCompass's environment and ask it about the datasets that are known by name; False, and why, if that
    fails."""
    try:
        with _news(console) as show:
            installed = opencompass.install(show)
            show("reading OpenCompass's dataset files")
            Catalog(installed).resolve(list(KNOWN))
    except QbenchError as error:
        for note in getattr(error, "__notes__", ()):
            console.print(Text(note, style="dim"))
        console.print(Text(f"qbench: {error}", style="red"))
        return False
    versions: Mapping[str, str] = installed.versions
    console.print(f"OpenCompass {versions['opencompass']} is installed in {installed.folder}", soft_wrap=True)
    return True


@contextmanager
def _news(console: Console) -> Iterator[Callable[[str], None]]:
    """Shows what is going on: one line that changes on a terminal, a line per step elsewhere."""
    if console.is_terminal:
        with console.status("OpenCompass") as status:
            yield lambda line: status.update(Text(f"OpenCompass: {line}", no_wrap=True, overflow="ellipsis"))
        return
    steps: list[str] = []

    def show(line: str) -> None:
        if (step := line.partition(":")[0]) not in steps:
            steps.append(step)
            console.print(f"OpenCompass: {step} ...", soft_wrap=True)

    yield show


def _print(found: list[Finding]) -> None:
    marks = {"ok": ("ok", "green"), "missing": ("--", "yellow"), "failed": ("!!", "red")}
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for each in found:
        mark, style = marks[each.state]
        text = each.found if each.remedy is None else f"{each.found}\n→ {each.remedy}"
        table.add_row(Text(mark, style=style), Text(each.about), Text(text, overflow="fold"))
    console = Console()
    (console if console.is_terminal else Console(width=500)).print(table)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
