"""The command line refuses what cannot be carried out: one line, exit code 2, before any weights load."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qbench.models
from qbench import session
from qbench.__main__ import main

BASE = ["model=tiny", "eval.corpora=[pydoc-heldout]", "calib=pydoc"]
TINY = Path(qbench.models.__file__).parent / "tiny"
ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def no_weights(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(session, "load_model", no_weights)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"no": 1}\n')
    (tmp_path / "text.db").write_text("not a database, only text\n" * 100)
    (tmp_path / "noweights").mkdir()
    shutil.copy(TINY / "config.json", tmp_path / "noweights")
    shutil.copytree(TINY, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return tmp_path


# What is given, and what the one line must contain: the option with its value, and something that is accepted.
REFUSED = [
    (["algo=foo"], ["algo=foo", "gptq"]),
    (["-m", "algo=gptq,foo"], ["algo=foo", "awq"]),
    (["model=foo"], ["model=foo", "smollm2-135m"]),
    (["calib=foo"], ["calib=foo", "c4-sample"]),
    (["eval.corpora=[foo]"], ["eval.corpora=foo", "wikipedia-sample"]),
    (["eval.corpora=[wikitext2]"], ["eval.corpora=wikitext2", "available"]),
    (["eval.corpora=foo"], ["eval.corpora=foo", "list"]),
    (["foo=1"], ["foo=1", "unknown key", "bits"]),
    (["calib.foo=1"], ["calib.foo=1", "unknown key", "calib.n"]),
    (["algo=gptq", "algo.clip=true"], ["algo.clip=true", "unknown key", "algo.damp"]),
    (["-m", "algo=awq,gptq", "algo.damp=0.1"], ["algo.damp=0.1", "unknown key", "algo.clip"]),
    (["+foo=1"], ["+foo=1"]),
    (["~bits"], ["~bits"]),
    (["bits=1"], ["bits=1", "2 to 8"]),
    (["bits=9"], ["bits=9", "2 to 8"]),
    (["bits=four"], ["bits=four", "2 to 8"]),
    (["bits=2.5"], ["bits=2.5", "2 to 8"]),
    (["bits=true"], ["bits=true", "2 to 8"]),
    (["-m", "bits=4,9"], ["bits=9", "2 to 8"]),
    (["group_size=100"], ["group_size=100", "128", "64", "partial_group"]),
    (["group_size=-2"], ["group_size=-2", "-1"]),
    (["symmetric=maybe"], ["symmetric=maybe", "true or false"]),
    (["scale_dtype=int7"], ["scale_dtype=int7", "float16"]),
    (["calib.n=0"], ["calib.n=0", "1 or more"]),
    (["calib.n=99999", "calib.sampler=sequential"], ["calib.n=99999", "at most"]),
    (["calib.length=99999"], ["calib.length=99999", "at most"]),
    (["calib.length=1024"], ["calib.length=1024", "at most 512"]),
    (["calib.sampler=first"], ["calib.sampler=first", "sequential"]),
    (["calib.seed=-1"], ["calib.seed=-1", "0 or more"]),
    (["calib=text"], ["calib.path=null", ".txt"]),
    (["calib.path=short.txt"], ["calib.path=short.txt", "calib=text"]),
    (["calib=text", "calib.path=missing.txt"], ["calib.path=missing.txt", "no such file"]),
    (["calib=text", "calib.path=empty.txt"], ["calib.path=empty.txt", "empty"]),
    (["calib=text", "calib.path=latin.txt"], ["calib.path=latin.txt", "UTF-8"]),
    (["calib=text", "calib.path=rows.jsonl"], ["calib.path=rows.jsonl", "line 2"]),
    (["calib=text", "calib.path=short.txt"], ["calib.length=512", "at most"]),
    (["eval.path=missing.jsonl"], ["eval.path=missing.jsonl", "no such file"]),
    (["eval.path=empty.txt"], ["eval.path=empty.txt", "empty"]),
    (["eval.length=1024"], ["eval.length=1024", "at most 512"]),
    (["eval.length=1"], ["eval.length=1", "2 or more"]),
    (["eval.n=9999"], ["eval.n=9999", "1 to"]),
    (["eval.batch=0"], ["eval.batch=0", "1 or more"]),
    (["model.path=noweights"], ["model.path=noweights", "model.safetensors"]),
    (["model.path=cut"], ["model.path=cut", "model.safetensors is cut off"]),
    (["model.path=/missing/folder"], ["model.path=/missing/folder", "no such directory"]),
    (["store.url=sqlite:////proc/none/results.db"], ["store.url=sqlite:////proc/none/results.db"]),
    (["store.url=sqlite:///text.db"], ["store.url=sqlite:///text.db", "not a database"]),
    (["store.url=results.db"], ["store.url=results.db", "sqlite:///"]),
    (["store.url=mysql://host/db"], ["store.url=mysql://host/db", "postgresql"]),
    (["device=tpu"], ["device=tpu", "cuda"]),
    (["dtype=int8"], ["dtype=int8", "bfloat16"]),
    (["source=disk"], ["source=disk", "stream"]),
    (["seed=x"], ["seed=x", "integer"]),
    (["dry_run=7"], ["dry_run=7", "true or false"]),
    (["algo=gptq,awq"], ["algo=gptq,awq", "-m"]),
    (["algo.damp=-1"], ["algo.damp=-1", "0 to 10"]),
    (["algo.damp=abc"], ["algo.damp=abc", "number"]),
    (["algo.scale_source=foo"], ["algo.scale_source=foo", "compensated"]),
    (["algo.act_order=3"], ["algo.act_order=3", "true or false"]),
    (["algo.block_size=0"], ["algo.block_size=0", ">= 1"]),
    (["algo.static_groups=true", "group_size=-1"], ["algo.static_groups=true", "group_size"]),
    (["algo=awq", "algo.max_shrink=1.5"], ["algo.max_shrink=1.5", "between 0 and 1"]),
    (["algo=awq", "algo.n_grid=0"], ["algo.n_grid=0", ">= 1"]),
    (["algo=[a"], ["algo=[a"]),
    (["algo=rtn", "algo.damp=1"], ["algo.damp=1", "unknown key", "algo=rtn has no options"]),
    (["-m", "algo=gptq,none", "algo.damp=1"], ["algo.damp=1", "unknown key", "algo=none has no options"]),
    (["algo=rtn", "scheme=kv4", "export=hf", "export.path=x"], ["export=hf", "quantized weights"]),
    (["algo=rtn", "format=none"], ["format=none", "algo=none"]),
    (["algo=awq_clip"], ["algo=awq_clip", "single stage", "awq_clip+gptq"]),
    (["algo=awq", "algo.scale=false", "algo.n_grid=7"], ["n_grid=7", "awq_scale is switched off"]),
    (["algo=omniquant", "algo.let=maybe"], ["algo.let=maybe", "auto, true, false"]),
    (["algo=omniquant", "algo.epochs=-1"], ["algo.epochs=-1"]),
    (["algo=omniquant", "algo.lwc_lr=-1"], ["algo.lwc_lr=-1"]),
    (["algo=autoround", "algo.iters=-1"], ["algo.iters=-1"]),
    (["algo=smoothquant", "algo.alpha=1.5"], ["algo.alpha=1.5", "0 to 1"]),
    (["algo=quarot+spinquant"], ["quarot+spinquant", "one stage at most that rotates"]),
    (["algo=awq+gptq", "algo.awq.foo=1"], ["algo.awq.foo=1", "unknown key", "algo.awq.search_tokens"]),
    (["algo=duquant", "algo.block_size=100"], ["algo.block_size=100", "sizes that fit every layer"]),
    (["algo=hqq", "symmetric=true"], ["zero_point=none", "float"]),
    (["algo=awq+foo"], ["algo=awq+foo", "foo is unknown", "gptq", "awq_clip"]),
    (["algo=gptq+awq"], ["gptq+awq_scale+awq_clip", "ROTATE < TRANSFORM", "algo=awq_scale+awq_clip+gptq"]),
    (["algo=awq+magr"], ["magr (PROTECT) before awq_clip", "algo=awq_scale+magr+awq_clip+gptq"]),
    (["algo=awq+gptq", "algo.damp=0.1"], ["algo.damp=0.1", "unknown key", "algo.gptq.damp"]),
    (["algo=awq+gptq", "algo.gptq.damp=-1"], ["algo.gptq.damp=-1", "0 to 10"]),
    (["algo=awq+gptq", "algo.gptq.damp=a"], ["algo.gptq.damp=a", "number"]),
    (["export=hf"], ["export.path=null", "folder"]),
    (["export.path=x"], ["export.path=x", "export=hf"]),
    (["-m", "export=hf", "export.path=x", "bits=3,4"], ["export.path=x", "folder per point"]),
    (["nonsense"], ["nonsense", "ls"]),
]


@pytest.mark.parametrize(("arguments", "expected"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_refused_in_one_line(arguments, expected, folder, capfd):
    # Our own settings come last only where the case does not set the same key.
    set_keys = {argument.partition("=")[0] for argument in arguments}
    base = [b for b in BASE if b.partition("=")[0] not in set_keys and arguments != ["nonsense"]]
    try:
        code = main([*arguments, *base])
    except SystemExit as exit_:  # argparse
        code = exit_.code
    error = capfd.readouterr().err.strip()
    assert code == 2
    assert len(error.splitlines()) == 1 or arguments == ["nonsense"], error
    assert all(part in error for part in expected), error


def test_a_cuda_device_is_refused_where_there_is_none(folder, capfd, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["device=cuda", *BASE]) == 2
    assert "device=cuda: no CUDA device is available here; accepted: auto, cpu" in capfd.readouterr().err


def test_help_explains_every_public_key(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    from qbench.command import _known_keys

    for key in _known_keys({}):
        top, _, leaf = key.rpartition(".")
        shown = key in text or (top in ("model", "export", "store", "algo") and leaf in text)
        assert shown, key


def test_a_sweep_needs_no_plugin_folder(tmp_path):
    """An editable installation, used from another folder: Hydra's search of `hydra_plugins` finds nothing."""
    code = (
        "import hydra_plugins.qbench_launcher, sys; hydra_plugins.__path__ = []; from qbench.__main__ import main; "
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["-m", "bits=3,4", "algo=rtn", "dry_run=true", *BASE]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "3 points" in done.stdout


def test_a_dry_run_shows_the_plan_and_runs_nothing(folder, capfd):
    assert main(["-m", "algo=gptq,rtn", "bits=3,4", "dry_run=true", *BASE]) == 0
    out = capfd.readouterr().out
    assert "5 points, 0 done" in out
    assert all(label in out for label in ("none", "gptq int3_g64_asym", "rtn int4_g64_asym"))
