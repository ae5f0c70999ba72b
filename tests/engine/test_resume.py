"""A pass that was stopped and goes on gives what it would have given, and only the same pass goes on."""

import pytest
import torch

from qbench.engine.passes import run_pass
from qbench.engine.resume import ResumePoint
from qbench.engine.source import MemorySource
from tests.architectures import tiny_model, tokens
from tests.engine.helpers import comparable, recipe

BLOCKS = 4


class _Stopped(Exception):
    pass


def _model(name="llama"):
    model, config = tiny_model(name, num_hidden_layers=BLOCKS)
    return model, tokens(config, batch=5, length=12, seed=1), tokens(config, batch=3, length=10, seed=2)


def _run(model, calibration, windows, algorithm="gptq", resume=None, **options):
    evaluations = () if windows is None else (windows,)
    return run_pass(
        MemorySource(model), recipe(algorithm), calibration, evaluations=evaluations, resume=resume, **options
    )


def _stop_after(blocks):
    """Progress that stops the pass once `blocks` blocks are done (and saved)."""

    def progress(done, total):
        if done == blocks:
            raise _Stopped

    return progress


def _stop_inside(block):
    """A receiver that stops the pass in block `block`, before it is saved."""

    def receive(finished):
        if finished.index == block:
            raise _Stopped

    return receive


def _same(found, expected):
    assert comparable(found.ledger) == comparable(expected.ledger)
    assert found.weights.tensors.keys() == expected.weights.tensors.keys()
    for path, value in expected.weights.tensors.items():
        assert torch.equal(found.weights.tensors[path], value), path
    for one, other in zip(found.evaluations, expected.evaluations, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.chunks, other.chunks, strict=True))


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "awq", "awq_gptq"])
@pytest.mark.parametrize("after", range(1, BLOCKS + 1))
def test_stopping_behind_any_block_changes_nothing(algorithm, after, tmp_path):
    model, *data = _model()
    expected = _run(model, *data, algorithm)
    folder, done = tmp_path / "key", []
    with pytest.raises(_Stopped):
        _run(model, *data, algorithm, ResumePoint(folder, 0), progress=_stop_after(after))
    point = ResumePoint(folder, 0)
    found = _run(model, *data, algorithm, point, progress=lambda n, _: done.append(n))
    _same(found, expected)
    assert done == list(range(after + 1, BLOCKS + 1))  # nothing is done twice
    assert not folder.exists()


def test_stopping_inside_a_block_again_and_again_changes_nothing(tmp_path):
    model, *data = _model()
    expected, folder = _run(model, *data), tmp_path / "key"
    for block in (0, 1, 1, 3, 3):
        with pytest.raises(_Stopped):
            _run(model, *data, resume=ResumePoint(folder, 0), receive=_stop_inside(block))
    _same(_run(model, *data, resume=ResumePoint(folder, 0)), expected)


def test_a_point_that_was_half_written_is_no_point(tmp_path):
    model, *data = _model()
    expected, folder = _run(model, *data), tmp_path / "key"
    with pytest.raises(_Stopped):
        _run(model, *data, resume=ResumePoint(folder, 0), progress=_stop_after(2))
    (folder / ".point.pt.1234").write_bytes(b"half")
    newer = folder / "weights-00003.pt"  # written before its point, which never came
    torch.save({"model.layers.2.mlp.up_proj.weight": torch.zeros(1)}, newer)
    with pytest.raises(_Stopped):
        _run(model, *data, resume=ResumePoint(folder, 0), progress=_stop_after(3))
    _same(_run(model, *data, resume=ResumePoint(folder, 0)), expected)


def test_weights_are_written_once(tmp_path):
    model, *data = _model()
    for after in (2, 3):
        with pytest.raises(_Stopped):
            _run(model, *data, resume=ResumePoint(tmp_path / "key", 0), progress=_stop_after(after))
    written = [name for file in (tmp_path / "key").glob("weights-*.pt") for name in torch.load(file)]
    assert len(written) == len(set(written)) == 3 * 9


def test_a_short_run_writes_nothing(tmp_path):
    model, *data = _model()
    with pytest.raises(_Stopped):
        _run(model, *data, resume=ResumePoint(tmp_path / "key", 3600), progress=_stop_after(3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["other text", "more windows", "no evaluation", "weights kept", "calibration"])
def test_a_point_of_another_pass_is_not_used(change, tmp_path):
    """Evaluations and whether weights are kept are not in a run's key, so its folder may hold another pass's point."""
    model, calibration, windows = _model()
    first = {"keep_weights": change != "weights kept"}
    with pytest.raises(_Stopped):
        _run(model, calibration, windows, resume=ResumePoint(tmp_path / "key", 0), progress=_stop_after(2), **first)
    others = {
        "other text": (calibration, windows.flip(1)),
        "more windows": (calibration, torch.cat([windows, windows])),
        "no evaluation": (calibration, None),
        "weights kept": (calibration, windows),
        "calibration": (calibration.flip(1), windows),
    }
    data, left = others[change], []
    found = _run(
        model,
        *data,
        resume=ResumePoint(tmp_path / "key", 0),
        receive=lambda finished: left.append(finished.index == 0 and (tmp_path / "key").exists()),
    )
    assert left == [False] * BLOCKS  # from the first block on, with nothing of the other pass in the folder
    _same(found, _run(model, *data))


def test_a_pass_that_keeps_weights_before_rounding_starts_at_the_first_block(tmp_path):
    model, *data = _model()
    folder, done = tmp_path / "key", []
    with pytest.raises(_Stopped):
        _run(model, *data, "gptq", ResumePoint(folder, 0), progress=_stop_after(2))
    point = ResumePoint(folder, 0)
    found = _run(model, *data, "gptq", point, progress=lambda n, _: done.append(n), keep_unrounded=True)
    assert done == [1, 2, 3, 4]
    assert len({path.split(".")[2] for path in found.unrounded.tensors}) == BLOCKS
    assert not folder.exists()
