"""Runs OpenCompass on a checkpoint and a dataset file as a subprocess, and follows its log. Does not import torch."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qbench.errors import EvaluationError
from qbench.evaluation.opencompass.catalog import Dataset
from qbench.evaluation.opencompass.environment import INSIDE, Environment, clean_environ, tail
from qbench.evaluation.opencompass.summary import Score, read_scores

#: What the checkpoint is called in OpenCompass's tables and folders.
MODEL = "model"
#: Items per forward where no batch size is given.
BATCH = 8
#: Tokens generated where the dataset does not say how many; OpenCompass's own default.
MAX_OUT_LEN = 256
#: Logs of failed tasks that are kept, the newest.
KEPT_LOGS = 50
#: Lines of the log that come with the error.
TAIL_LINES = 40

_PART = re.compile(r"Start inferencing ")
_LABEL = re.compile(r"Calculating (?:PPL|Loglikelihood) for prompts labeled")
# A bar without a title: those of loading weights and mapping rows have one.
_BAR = re.compile(r"(?:^|[\r\n])\s*\d+%\|[^|\r\n]*\|\s*(\d+)/(\d+) \[")


class TaskFailed(EvaluationError):
    """A dataset that OpenCompass could not score. `log` is the whole log, `log_tail` its last lines, also a note of the
    exception, so that a printed trace has them."""

    def __init__(self, message: str, log: Path, log_tail: str) -> None:
        super().__init__(f"{message}; log: {log}")
        self.log, self.log_tail = log, log_tail
        self.add_note(f"last lines of {log}:\n{log_tail}")


@dataclass(frozen=True)
class Task:
    """One invocation: what is scored on what. `data` is the folder that holds OpenCompass's `data`."""

    environment: Environment
    dataset: Dataset
    checkpoint: Path
    dtype: str
    device: str
    data: Path
    limit: int | None
    batch: int | None
    max_seq_len: int | None
    threads: int

    def request(self) -> dict[str, Any]:
        """What `inside.run` is asked."""
        modes = {part.mode for part in self.dataset.parts}
        return {
            "module": self.dataset.module,
            "limit": self.limit,
            "model": {
                "abbr": MODEL,
                "path": str(self.checkpoint),
                "tokenizer_path": str(self.checkpoint),
                "model_kwargs": {
                    "device_map": self.device,
                    "torch_dtype": f"torch.{self.dtype}",
                    "trust_remote_code": False,
                },
                # OpenCompass pads on the left throughout, and then scores the first token of every shorter text in a
                # batch from a pad: perplexities would depend on the batch. Text to be continued does end at the right.
                "tokenizer_kwargs": {
                    "padding_side": "left" if modes == {"gen"} else "right",
                    "trust_remote_code": False,
                },
                "max_seq_len": self.max_seq_len,
                "max_out_len": MAX_OUT_LEN,
                "batch_size": 1 if "gen" in modes and len(modes) > 1 else self.batch or BATCH,
                "run_cfg": {"num_gpus": 0},  # the device is named above; OpenCompass need not look for a free one
            },
        }

    def environ(self, scratch: Path) -> dict[str, str]:
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        return clean_environ(
            COMPASS_DATA_CACHE=str(self.data),
            HF_DATASETS_CACHE=str(scratch / "datasets"),  # prepared rows of an earlier file must not come back
            HF_MODULES_CACHE=str(scratch / "modules"),
            HF_EVALUATE_CACHE=str(scratch / "evaluate"),
            OMP_NUM_THREADS=str(self.threads),
            TOKENIZERS_PARALLELISM="false",
            **(offline if self.dataset.data else {}),
        )


@dataclass
class Follower:
    """Reads a growing log and says how far OpenCompass is: batches done of all, over labels and parts.

    The number of batches is known from the first bar on; parts that have not started count like the present one.
    """

    dataset: Dataset
    report: Callable[[int, int], None]
    part: int = -1
    label: int = 0
    batches: tuple[int, int] = (0, 0)
    _rest: str = field(default="", repr=False)

    def feed(self, text: str) -> None:
        """More of the log."""
        text = self._rest + text
        cut = max(text.rfind("\n"), text.rfind("\r")) + 1
        lines, self._rest = text[:cut], text[cut:]
        for line in re.split(r"(?<=[\r\n])", lines):
            if _PART.search(line):
                self.part, self.label, self.batches = self.part + 1, 0, (0, 0)
            elif _LABEL.search(line):
                self.label, self.batches = self.label + 1, (0, self.batches[1])
            elif self.part >= 0 and (bar := _BAR.search(line)):
                self.batches = int(bar[1]), int(bar[2])
                self._say()

    def _say(self) -> None:
        parts = self.dataset.parts
        labels = parts[min(self.part, len(parts) - 1)].labels or 1
        done, each = self.batches
        self.report(each * (labels * self.part + max(self.label, 1) - 1) + done, each * labels * len(parts))


def score(task: Task, scratch: Path, logs: Path, report: Callable[[int, int], None]) -> list[Score]:
    """Run `task` in the folder `scratch` and read its scores; TaskFailed, its log kept in `logs`, if it has none."""
    request, log = scratch / "request.json", scratch / "opencompass.log"
    request.write_text(json.dumps(task.request()))
    command = [str(task.environment.python), "-P", str(INSIDE), "run", str(request)]
    code = _follow(command, scratch, task.environ(scratch), log, Follower(task.dataset, report))
    try:
        if code != 0:
            raise EvaluationError(_reason(log, code))
        return read_scores(scratch / "out", [part.abbr for part in task.dataset.parts], MODEL)
    except EvaluationError as error:
        kept = _keep(log, logs, task.dataset.name)
        last = "\n".join(tail(kept.read_text(errors="replace"), TAIL_LINES))
        raise TaskFailed(f"opencompass {task.dataset.name}: {error}", kept, last) from None


def _follow(command: list[str], folder: Path, environ: Mapping[str, str], log: Path, follower: Follower) -> int:
    """The exit code of `command`, whose output goes into `log`; it and its children are gone when this returns."""
    with log.open("wb") as output, log.open(encoding="utf-8", errors="replace", newline="") as reading:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)
                follower.feed(reading.read())
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        follower.feed(reading.read())
    return process.returncode


def _reason(log: Path, code: int) -> str:
    """The line of the log that says what went wrong: of a trace the exception."""
    lines = tail(log.read_text(errors="replace"), TAIL_LINES)
    errors = [line for line in lines if re.match(r"[A-Za-z_.]+(Error|Exception|Interrupt|Exit)\b", line)]
    return (errors or lines or [f"exit code {code}"])[-1].strip()[:300]


def _keep(log: Path, logs: Path, name: str) -> Path:
    logs.mkdir(parents=True, exist_ok=True)
    kept = logs / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    kept.write_bytes(log.read_bytes())
    for old in sorted(logs.glob("*.log"), key=lambda each: each.stat().st_mtime)[:-KEPT_LOGS]:
        old.unlink(missing_ok=True)
    return kept
