"""`qbench doctor`: what is needed and broken makes it fail, what is optional and missing names its command."""

import json
import subprocess
import sys

import pytest

from qbench import cli, doctor
from qbench.errors import AssetError
from qbench.evaluation.opencompass.environment import COMMAND, Environment
from qbench.store.database import Database


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QBENCH_CACHE", str(tmp_path / "cache"))


def _run(capsys, *arguments):
    code = cli.main(["doctor", *arguments])
    return code, capsys.readouterr()


def _findings(capsys, *arguments):
    code, shown = _run(capsys, "--json", *arguments)
    return code, {each["about"]: each for each in json.loads(shown.out)}


def test_a_working_machine_passes(tmp_path, capsys):
    url = f"sqlite:///{tmp_path}/results.db"
    with Database(url):
        pass
    code, found = _findings(capsys, "--store", url)
    assert code == 0
    assert {each["state"] for each in found.values()} <= {"ok", "missing"}
    for about in ("python", "torch", "devices", "threads", "memory", "cache", "store"):
        assert found[about]["state"] == "ok"
    assert found["store"]["found"].startswith(url)


def test_optional_parts_that_are_missing_name_their_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "OPTIONAL", {"no_such_module": ("thing", "things", "pip install thing")})
    code, found = _findings(capsys, "--store", f"sqlite:///{tmp_path}/r.db")
    assert code == 0
    assert (found["thing"]["state"], found["thing"]["remedy"]) == ("missing", "pip install thing")
    assert (found["opencompass"]["state"], found["opencompass"]["remedy"]) == ("missing", COMMAND)
    _, shown = _run(capsys, "--store", f"sqlite:///{tmp_path}/r.db")
    assert "pip install thing" in shown.out
    assert COMMAND in shown.out


def test_a_database_that_is_not_there_yet_is_no_fault_and_is_not_made(tmp_path, capsys):
    code, found = _findings(capsys, "--store", f"sqlite:///{tmp_path}/new/r.db")
    assert code == 0
    assert "made by the first run" in found["store"]["found"]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("url", ["sqlite:///{folder}/text.db", "results.db", "sqlite", "sqlite:///{folder}"])
def test_a_store_that_cannot_be_used_fails(tmp_path, capsys, url):
    (tmp_path / "text.db").write_text("no database" * 100)
    code, found = _findings(capsys, "--store", url.format(folder=tmp_path))
    assert code == 1
    assert found["store"]["state"] == "failed"


def test_a_cache_that_cannot_be_written_fails(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QBENCH_CACHE", str(tmp_path / "file" / "cache"))
    code, found = _findings(capsys, "--store", f"sqlite:///{tmp_path}/r.db")
    assert code == 1
    assert "QBENCH_CACHE" in found["cache"]["found"]


def test_too_little_room_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_FREE_BYTES", 1 << 60)
    code, found = _findings(capsys, "--store", f"sqlite:///{tmp_path}/r.db")
    assert code == 1
    assert "make room" in found["cache"]["remedy"]


def test_installing_shows_its_steps_and_then_reports(tmp_path, capsys, monkeypatch):
    made = Environment(tmp_path, {"opencompass": "0.0.7"})

    def install(show):
        for line in ("creating", "installing it", "installing it: Collecting a", "installing it: Collecting b"):
            show(line)
        return made

    monkeypatch.setattr(doctor.opencompass, "install", install)
    monkeypatch.setattr(doctor.opencompass, "find_environment", lambda: made)
    asked = []
    monkeypatch.setattr(doctor.Catalog, "resolve", lambda self, names: asked.extend(names))
    code, shown = _run(capsys, "--install", "opencompass", "--store", f"sqlite:///{tmp_path}/r.db")
    assert code == 0
    assert shown.err.splitlines()[:2] == ["OpenCompass: creating ...", "OpenCompass: installing it ..."]
    assert shown.err.count("installing it") == 1
    assert f"OpenCompass 0.0.7 is installed in {tmp_path}" in shown.err
    assert "0.0.7, for eval=opencompass" in shown.out
    assert "piqa" in asked


def test_an_install_that_fails_shows_the_end_of_its_log(capsys, monkeypatch):
    def install(show):
        error = AssetError("opencompass: installing failed (no network); log: /some/where.log")
        error.add_note("Collecting a\nERROR: no network")
        raise error

    monkeypatch.setattr(doctor.opencompass, "install", install)
    code, shown = _run(capsys, "--install", "opencompass")
    assert code == 1
    assert shown.out == ""
    assert "Collecting a\nERROR: no network\n" in shown.err
    assert "log: /some/where.log" in shown.err


def test_other_parts_are_refused(capsys):
    code, shown = _run(capsys, "--install", "everything")
    assert code == 2
    assert len(shown.err.splitlines()) == 1


def test_other_commands_do_not_pay_for_it():
    script = "import sys, qbench.cli; print('qbench.doctor' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    script = "import sys, qbench.evaluation.opencompass.environment, qbench.evaluation.opencompass.catalog;"
    script += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
