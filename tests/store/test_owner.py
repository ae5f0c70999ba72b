import os
import socket
import subprocess
import sys

import pytest

from qbench.store import owner

LONG_AGO = 0.0


def test_owners_differ_and_have_the_documented_form():
    first, second = owner.new_owner(), owner.new_owner()
    assert first != second
    host, pid, start, unique = first.rsplit(":", 3)
    assert host.startswith(socket.gethostname())
    assert int(pid) == os.getpid()
    assert start
    assert len(unique) == 32


def test_on_this_host_a_claim_lives_as_long_as_its_process():
    script = "from qbench.store.owner import new_owner; print(new_owner(), flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    text = process.stdout.readline().strip()
    assert owner.is_alive(text, heartbeat=LONG_AGO)
    host, pid, _, unique = text.rsplit(":", 3)
    assert not owner.is_alive(f"{host}:{pid}:another-start:{unique}", heartbeat=1e12), "a later process with this pid"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
    assert not owner.is_alive(text, heartbeat=1e12)
    process.communicate()
    assert not owner.is_alive(text, heartbeat=1e12)


@pytest.mark.parametrize("stranger", ["otherhost:1:start:uuid", f"x{owner.new_owner()}", "written by hand", ""])
def test_elsewhere_only_the_heartbeat_counts(stranger):
    assert owner.is_alive(stranger, heartbeat=1000.0, now=1000.0 + owner.STALE_AFTER_S)
    assert not owner.is_alive(stranger, heartbeat=1000.0, now=1001.0 + owner.STALE_AFTER_S)


def test_an_own_claim_without_heartbeat_was_abandoned():
    assert owner.is_alive(owner.new_owner(), heartbeat=1000.0, now=1000.0)
    assert not owner.is_alive(owner.new_owner(), heartbeat=1000.0, now=1001.0 + owner.STALE_AFTER_S)


def test_a_process_that_cannot_be_looked_at_is_judged_by_its_heartbeat(monkeypatch):
    text = owner.new_owner()
    monkeypatch.setattr(owner, "_process_start", lambda pid: "unknown")
    assert owner.is_alive(text, heartbeat=1000.0, now=1000.0)
    assert not owner.is_alive(text, heartbeat=1000.0, now=2000.0)
