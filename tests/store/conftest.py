import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qbench.store.database import Database

ROOT = Path(__file__).parents[2]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/results/results.db"


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    with Database(url) as opened:
        yield opened


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts worker processes, and kills those that are left at the end of the test."""
    started: list[subprocess.Popen] = []

    def start_worker(*arguments: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "tests.store.workers", *map(str, arguments)]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start_worker
    for process in started:
        process.kill()
        process.communicate()
