"""Who holds a running row, and whether they are still there.

An owner is the text `host:pid:start:uuid`. On the host that wrote it, a claim lives exactly as long as its
process; the start time tells a process from a later one that was given the same pid. From any other host only
the heartbeat can be judged. A process id means nothing outside its PID namespace, so `host` carries the
namespace: containers that share a host name count as different hosts, which at worst delays a takeover,
whereas believing a foreign pid dead would take work from a live process.
"""

import os
import platform
import re
import shutil
import socket
import subprocess
import time
import uuid
from pathlib import Path

from qbench.store.records import RunRow

HEARTBEAT_INTERVAL_S = 15.0
STALE_AFTER_S = 120.0

_PROC = Path("/proc")
_UNKNOWN = "unknown"


def new_owner() -> str:
    """The owner text of a new claim by this process; every call returns another uuid."""
    pid = os.getpid()
    return f"{_host()}:{pid}:{_process_start(pid) or _UNKNOWN}:{uuid.uuid4().hex}"


def is_alive(owner: str, heartbeat: float, now: float | None = None) -> bool:
    """Whether the claim of `owner`, last heard of at `heartbeat` (UTC epoch seconds), is still being worked
    on.

    This process's own claims are judged by their heartbeat as well: a notebook whose run was interrupted
    without being recorded lives on, its claim does not.
    """
    fresh = (time.time() if now is None else now) - heartbeat <= STALE_AFTER_S
    parsed = re.fullmatch(r"(?P<host>.*):(?P<pid>\d+):(?P<start>[^:]+):[^:]+", owner)
    if parsed is None or parsed["host"] != _host():
        return fresh
    found = _process_start(int(parsed["pid"]))
    if found is not None and _UNKNOWN in (found, parsed["start"]):
        return fresh
    return found == parsed["start"] and (fresh or int(parsed["pid"]) != os.getpid())


def state(row: RunRow) -> str:
    """The status of a run, with "interrupted" for a running one whose owner is gone."""
    return "interrupted" if row.status == "running" and not is_alive(row.owner, row.heartbeat) else row.status


def _host() -> str:
    try:
        namespace = os.readlink(_PROC / "self/ns/pid").removeprefix("pid:")
    except OSError:  # not Linux: no PID namespaces
        namespace = ""
    return socket.gethostname() + namespace


def _process_start(pid: int) -> str | None:
    """A text that no other process of this host shares with `pid`; None if no such process runs.

    `_UNKNOWN` if it runs, or may run, but cannot be looked at. Ticks since boot are exact but start again at
    every boot, hence the boot id.
    """
    if platform.system() == "Linux":
        try:
            status = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
            boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii")
        except (FileNotFoundError, ProcessLookupError):
            return _UNKNOWN if _accepts_signals(pid) else None  # /proc may hide other users' processes
        # The command name is in parentheses and may itself hold spaces and parentheses.
        after_name = status[status.rindex(")") + 2 :].split()
        state, start_ticks = after_name[0], after_name[19]
        return None if state in "ZX" else f"{boot[:8]}-{start_ticks}"  # a zombie does no more work
    if (ps := shutil.which("ps")) is None:
        return _UNKNOWN
    found = subprocess.run([ps, "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return "-".join(found.stdout.split()).replace(":", ".") or None


def _accepts_signals(pid: int) -> bool:
    """Whether a process with this id exists, by sending it the null signal."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
