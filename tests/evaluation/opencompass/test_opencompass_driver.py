"""A subprocess that scores, fails, leaves gaps or never ends; and a log that says how far it is."""

import os
import signal
import time
from dataclasses import replace
from threading import Thread

import pytest

from qbench.evaluation.opencompass.driver import Follower, Task, TaskFailed, score
from tests.evaluation.opencompass.fakes import LAMBADA, RACE, Fake, dataset, outputs

BAR = (
    "\r  0%|          | 0/{n} [00:00<?, ?it/s]\r 50%|█████     | {half}/{n} [00:01<00:01]"
    "\r100%|██████████| {n}/{n} [00:02]\n"
)
OTHER_BARS = "\rMap:  22%|██▏       | 411/1838 [00:00<00:00]\rLoading weights: 100%|███| 38/38 [00:00<00:00]\n"


@pytest.fixture
def fake(tmp_path):
    return Fake(tmp_path / "environment")


@pytest.fixture
def task(fake, tmp_path):
    (tmp_path / "scratch").mkdir()
    return Task(
        environment=fake.environment,
        dataset=dataset(),
        checkpoint=tmp_path / "checkpoint",
        dtype="bfloat16",
        device="cpu",
        data=tmp_path / "data-cache",
        limit=4,
        batch=None,
        max_seq_len=2048,
        threads=3,
    )


def _score(task, tmp_path, report=lambda done, total: None):
    return score(task, tmp_path / "scratch", tmp_path / "logs", report)


def _log(labels=2, parts=1, n=4, line="Calculating PPL for prompts labeled '0'"):
    one = f"{OTHER_BARS}x - INFO - Start inferencing [model/piqa]\n" + OTHER_BARS
    one += (f"[INFO] {line}\n" + BAR.format(n=n, half=n // 2)) * labels
    return one * parts


def test_the_request_names_what_is_scored(fake, task, tmp_path):
    fake.behave(files=outputs({"piqa": [True, False]}))
    (found,) = _score(task, tmp_path)
    assert found.value == 0.5
    (call,) = fake.calls
    assert call["request"]["module"] == task.dataset.module
    assert call["request"]["limit"] == 4
    model = call["request"]["model"]
    assert (model["path"], model["max_seq_len"], model["batch_size"]) == (str(task.checkpoint), 2048, 8)
    assert model["model_kwargs"]["torch_dtype"] == "torch.bfloat16"
    assert call["cwd"] == str(tmp_path / "scratch")
    assert not (tmp_path / "logs").exists()


def test_perplexities_are_padded_on_the_right_and_generations_on_the_left(task):
    def padding(task):
        return task.request()["model"]["tokenizer_kwargs"]["padding_side"]

    assert padding(task) == "right"
    generated = replace(task, dataset=dataset("lambada", LAMBADA), batch=5)
    assert padding(generated) == "left"
    assert generated.request()["model"]["batch_size"] == 5
    both = replace(task.dataset, parts=(*task.dataset.parts, *generated.dataset.parts))
    assert replace(task, dataset=both, batch=5).request()["model"]["batch_size"] == 1  # neither padding serves both


def test_it_sees_its_data_and_nothing_of_this_process(fake, task, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("DATASET_SOURCE", "ModelScope")
    fake.behave(files=outputs({"piqa": [True]}))
    _score(task, tmp_path)
    environ = fake.calls[0]["environ"]
    assert environ["COMPASS_DATA_CACHE"] == str(task.data)
    assert environ["OMP_NUM_THREADS"] == "3"
    assert environ["HF_HUB_OFFLINE"] == "1"
    assert not {"PYTHONPATH", "DATASET_SOURCE"} & environ.keys()
    hub = replace(task.dataset, parts=(replace(task.dataset.parts[0], data=()),))
    assert "HF_HUB_OFFLINE" not in replace(task, dataset=hub).environ(tmp_path)


def test_a_failed_task_says_why_and_keeps_its_log(fake, task, tmp_path):
    lines = [f"line {i}" for i in range(100)]
    trace = "Traceback (most recent call last):\n  File x\nFileNotFoundError: no 'dev.jsonl'\n"
    fake.behave(log="\n".join(lines) + "\n" + trace, code=1)
    with pytest.raises(TaskFailed) as raised:
        _score(task, tmp_path)
    error = raised.value
    assert str(error) == f"opencompass piqa: FileNotFoundError: no 'dev.jsonl'; log: {error.log}"
    assert error.log.parent == tmp_path / "logs"
    assert error.log.read_text().startswith("line 0\n")
    assert error.log_tail.splitlines()[-3:] == trace.splitlines()
    assert len(error.log_tail.splitlines()) == 40
    assert error.log_tail in error.__notes__[0]


def test_an_end_without_a_score_is_a_failure_too(fake, task, tmp_path):
    fake.behave(
        log="all is well\n", files={"summary/summary_1.csv": "dataset,version,metric,mode,model\npiqa,1,-,-,-\n"}
    )
    with pytest.raises(TaskFailed, match="opencompass piqa: piqa has no results; log:") as raised:
        _score(task, tmp_path)
    assert raised.value.log_tail == "all is well"


def test_logs_are_bounded(fake, task, tmp_path, monkeypatch):
    monkeypatch.setattr("qbench.evaluation.opencompass.driver.KEPT_LOGS", 2)
    (tmp_path / "logs").mkdir()
    for place in range(3):
        old = tmp_path / "logs" / f"{place}.log"
        old.touch()
        os.utime(old, (place, place))
    fake.behave(code=3)
    with pytest.raises(TaskFailed, match="exit code 3") as raised:
        _score(task, tmp_path)
    assert set((tmp_path / "logs").iterdir()) == {raised.value.log, tmp_path / "logs" / "2.log"}


def test_an_interrupt_ends_the_subprocess(fake, task, tmp_path):
    started = tmp_path / "started"
    fake.behave(sleep=60, started=str(started))

    def interrupt():
        while not (started.exists() and started.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            _score(task, tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_progress_counts_batches_of_all_labels_and_parts(step):
    log = BAR.format(n=2, half=1) + _log(labels=4, parts=2)  # what comes before the first part is something else
    reports = []
    follower = Follower(dataset("race", RACE), lambda done, total: reports.append((done, total)))
    for start in range(0, len(log), step):
        follower.feed(log[start : start + step])
    assert {total for _, total in reports} == {4 * 4 * 2}
    done = [each for each, _ in reports]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == 32
    assert set(done) == set(range(0, 33, 2))


def test_progress_of_likelihoods_and_of_generation():
    for name, module, labels, line in [
        ("piqa", None, 2, "Calculating Loglikelihood for prompts labeled '1'"),
        ("lambada", LAMBADA, 1, "Starting inference process..."),
    ]:
        reports = []
        chosen = dataset() if module is None else dataset(name, module)
        Follower(chosen, lambda done, total, reports=reports: reports.append((done, total))).feed(
            _log(labels=labels, line=line)
        )
        assert reports[-1] == (4 * labels, 4 * labels)
