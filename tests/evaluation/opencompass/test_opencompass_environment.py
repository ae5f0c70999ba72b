"""The environment is made once, by pip from outside, is checked before it counts, and belongs to one qbench."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from qbench.errors import AssetError
from qbench.evaluation.opencompass import environment
from qbench.evaluation.opencompass.environment import (
    SHARED,
    VERSION,
    environment_folder,
    find_environment,
    install,
    require_environment,
    tail,
)

PIP = """
import json, pathlib, sys
python = pathlib.Path(sys.argv[sys.argv.index("--python") + 1])
packages = next((python.parents[1] / "lib").glob("python*/site-packages"))
with open({calls!r}, "a") as stream:
    print(json.dumps(sys.argv[1:]), file=stream)
print("Collecting something", flush=True)
if "--no-deps" in sys.argv and {broken!r} == "pip":
    print("ERROR: No matching distribution found")
    sys.exit(1)
if "--no-deps" in sys.argv:
    for name in ("opencompass/cli/main", "opencompass/datasets", "torch", "transformers"):
        path = packages / (name + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("__version__ = '7'")
    if {broken!r} != "import":
        (packages / "opencompass" / "__init__.py").write_text("__version__ = '0.0.7'")
    else:
        (packages / "opencompass" / "__init__.py").write_text("import nothing_of_this_name")
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A pip that writes down what it is asked and installs a few empty packages."""
    calls = tmp_path / "calls"
    calls.touch()

    def use(broken=""):
        script = tmp_path / "pip.py"
        script.write_text(PIP.format(calls=str(calls), broken=broken))
        monkeypatch.setattr(environment, "pip_command", lambda: [sys.executable, str(script)])
        return calls

    return use


def test_where_it_is_not_installed_the_command_is_named():
    assert find_environment() is None
    with pytest.raises(AssetError, match=r"eval=opencompass: .* run qbench doctor --install opencompass$"):
        require_environment()


def test_it_is_installed_once_with_pinned_versions_on_top_of_this_one(pip):
    calls = pip()
    news: list[str] = []
    made = install(news.append)
    assert made == find_environment() == require_environment() == install()
    assert made.versions["opencompass"] == "0.0.7"
    first, second = calls.read_text().splitlines()
    assert f'"opencompass=={VERSION}"' in first
    assert '"--no-deps"' in first
    for name in ("mmengine-lite==", "jieba==", "tree_sitter=="):
        assert name in second
    assert f'"-c", "{made.folder / "constraints.txt"}"' in second
    constraints = (made.folder / "constraints.txt").read_text().split()
    assert constraints == [f"{name}=={metadata.version(name)}" for name in SHARED]
    assert [line for line in news if "Collecting" not in line] == [
        "creating the environment",
        f"installing opencompass {VERSION}",
        "installing what it needs",
        "checking that it can be imported",
    ]
    found = subprocess.run(
        [str(made.python), "-c", "import hydra, torch; print(hydra.__file__, torch.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    import hydra

    assert found == [hydra.__file__, "7"]  # this environment's packages serve it, its own come first


def test_a_step_that_fails_shows_pips_last_lines_and_the_log(pip):
    pip("pip")
    with pytest.raises(AssetError, match="No matching distribution") as raised:
        install()
    log = Path(str(raised.value).rpartition("log: ")[2])
    assert "ERROR: No matching distribution found" in log.read_text()
    assert "Collecting something" in raised.value.__notes__[0]
    assert "\n" not in str(raised.value)
    assert find_environment() is None


def test_what_cannot_be_imported_does_not_count_and_is_made_anew(pip):
    pip("import")
    with pytest.raises(AssetError, match=r"checking that it can be imported failed .*nothing_of_this_name"):
        install()
    assert find_environment() is None
    left = environment_folder() / "left"
    left.touch()
    pip()
    assert install().folder == environment_folder()
    assert not left.exists()


def test_it_belongs_to_the_versions_that_it_computes_with(monkeypatch):
    here = environment_folder()
    real = metadata.version
    for name in SHARED:
        with monkeypatch.context() as patch:
            patch.setattr(metadata, "version", lambda asked, name=name: "0" if asked == name else real(asked))
            assert environment_folder() != here
    with monkeypatch.context() as patch:
        patch.setattr(sys, "prefix", "/elsewhere")
        assert environment_folder() != here
    assert environment_folder() == here


def test_a_python_without_wheels_is_refused_at_once(monkeypatch, pip):
    calls = pip()
    monkeypatch.setattr(environment, "PYTHONS", ((2, 7),))
    with pytest.raises(AssetError, match=r"needs Python 2\.7, this is"):
        install()
    assert calls.read_text() == ""


def test_of_a_progress_bar_the_last_state_is_left():
    text = "first\r\nbar 10%\rbar 50%\rbar 100%\n\n   \nlast"
    assert tail(text) == ["first", "bar 100%", "last"]
    assert tail(text, 1) == ["last"]
