import json
import subprocess
import sys
from dataclasses import fields, replace
from importlib import metadata

from qbench.store import environment

GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]


def git(folder, *arguments):
    return subprocess.run([*GIT, "-C", folder, *arguments], capture_output=True, text=True, check=True).stdout.strip()


def test_a_checkout_is_known_by_commit_and_dirtiness(tmp_path):
    assert environment.git_state(tmp_path) == (None, None)
    package = tmp_path / "qbench"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-qm", "of something else", "--allow-empty")
    assert environment.git_state(package) == (None, None), "inside a repository, but not of it"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert environment.git_state(package) == (commit, False)
    (tmp_path / "elsewhere.txt").write_text("conf counts as well")
    assert environment.git_state(package) == (commit, True)


def test_the_hash_changes_with_every_fact_and_only_then():
    here = environment.detect(threads=2, gpu="H")
    same = replace(here, versions=dict(reversed(here.versions.items())))
    assert environment.environment_hash(same) == environment.environment_hash(here)
    changed = {environment.environment_hash(replace(here, **{each.name: "other"})) for each in fields(here)}
    assert len(changed | {environment.environment_hash(here)}) == len(fields(here)) + 1


def test_versions_are_those_of_the_installed_packages_without_importing_them():
    script = (
        "import json, sys; from dataclasses import asdict; from qbench.store.environment import detect;"
        "print(json.dumps([asdict(detect()), 'torch' in sys.modules]))"
    )
    facts, imported_torch = json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True).stdout)
    assert not imported_torch
    assert facts["versions"]["torch"] == metadata.version("torch")
    assert facts["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["threads"] >= 1
    assert facts["cpu"]


def test_threads_follow_the_caller_then_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environment.detect().threads == 3
    assert environment.detect(threads=5).threads == 5
