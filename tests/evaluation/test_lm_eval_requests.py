"""What `eval=zeroshot` stands for, its keys, and what it refuses before a model is loaded."""

import pytest

from qbench.errors import AssetError, SpecError
from qbench.evaluation.lm_eval import data, definitions
from tests.evaluation.subjects import FakeContext, full_precision
from tests.evaluation.zeroshot_items import DEFAULTS, build, write, write_items

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    folder = tmp_path_factory.mktemp("items")
    write_items(folder)
    return folder


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return full_precision(tmp_path_factory.mktemp("cache"))


def test_real_groups_and_tags_are_found():
    known = definitions.installed()
    (mmlu,) = known.resolve("mmlu")
    assert len(mmlu.leaves) == 57
    assert len(mmlu.children) == 4
    assert [leaf.name for leaf in known.resolve("ai2_arc")] == ["arc_challenge", "arc_easy"]
    leaves = {each.name: each for each in known.resolve("openllm")}
    assert leaves["hellaswag"].config["num_fewshot"] == 10  # as the group sets it
    assert leaves["mmlu"].leaves[0].config["num_fewshot"] == 5


def test_the_index_is_that_of_lm_eval(tmp_path):
    """On one of its folders, where reading all takes it long."""
    from lm_eval.tasks import TaskManager

    known = definitions.installed()
    manager = TaskManager(include_defaults=False, include_path=str(known.folder / "mmlu" / "default"))
    index = definitions.scan(known.folder / "mmlu" / "default")
    assert index.keys() == set(manager.all_tasks)
    for name, (kind, path, members) in index.items():
        entry = manager.task_index[name]
        assert kind == {"TASK": "task", "PY_TASK": "task", "GROUP": "group", "TAG": "tag"}[entry.kind.name]
        assert (
            set(members) == entry.tags if kind == "tag" else known.folder / "mmlu" / "default" / path == entry.yaml_path
        )


def test_limit_and_key(items):
    def key(tasks=("piqa",), **options):
        return build(items, list(tasks), **options)[0].spec.key()

    base = key()
    assert base == key(batch=7)
    different = {key(limit=5), key(limit=6), key(("arc_easy",)), key(("arc_easy",), num_fewshot=2)}
    assert len(different) == 4
    assert base not in different


def test_other_items_are_another_key(items, tmp_path):
    for folder, rows in (("a", 3), ("b", 4)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, "piqa", "validation", [{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}] * rows)
    one, two = (build(tmp_path / folder, ["piqa"])[0].spec for folder in "ab")
    assert one.key() != two.key()
    assert one.fingerprint != two.fingerprint


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tasks": ["winogrand"]}, "near: winogrande"),
        ({"tasks": ["piqa", "zzqqxx"]}, "no task of lm-eval"),
        ({"tasks": []}, "a list"),
        ({"tasks": "piqa"}, "a list"),
        ({"limit": 0}, "1 or more"),
        ({"limit": -3}, "1 or more"),
        ({"limit": 0.5}, "1 or more"),
        ({"num_fewshot": -1}, "0 or more"),
        ({"tasks": ["ai2_arc", "arc_easy"]}, "every task once"),
        ({"tasks": ["humaneval"]}, "generated code"),
    ],
)
def test_refuses_before_anything_is_loaded(options, says, items):
    with pytest.raises(SpecError, match=says) as caught:
        build(items, **{"tasks": ["piqa"], **options})
    assert "\n" not in str(caught.value)


def test_missing_items_name_the_file_and_the_other_way(items, tmp_path):
    with pytest.raises(AssetError, match=r"openbookqa/test\.jsonl is missing; .*eval\.data_dir=null .*hub"):
        build(items, ["openbookqa"])
    with pytest.raises(AssetError, match=r"piqa/train\.jsonl is missing, which the 2 examples come from"):
        build(items, ["piqa"], num_fewshot=2)
    with pytest.raises(AssetError, match="no such folder"):
        build(tmp_path / "nowhere", ["piqa"])
    with pytest.raises(SpecError, match="no split to take examples from"):
        build(items, ["lambada_openai"], num_fewshot=2)


def test_an_unreachable_hub_names_the_folder_to_give(tmp_path, monkeypatch):
    leaf = definitions.installed().resolve("piqa")[0]
    monkeypatch.setenv("QBENCH_CACHE", str(tmp_path))

    def unreachable(self, *args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    with pytest.raises(AssetError, match=r"Name or service not known.*<folder>/piqa/<split>\.jsonl"):
        data.hub(leaf, 0)


def test_the_hub_s_revision_is_fixed_once(tmp_path, monkeypatch):
    leaf = definitions.installed().resolve("piqa")[0]
    monkeypatch.setenv("QBENCH_CACHE", str(tmp_path))
    asked = []

    class Info:
        sha = "c0ffee"

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, **k: asked.append(name) or Info)
    first, second = data.hub(leaf, 0), data.hub(leaf, 0)
    assert first == second
    assert asked == ["baber/piqa"]
    assert first.fields["dataset_kwargs"] == {"revision": "c0ffee"}


def test_damaged_items_are_refused_before_the_model_loads(items, tmp_path):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text('{"goal": "g", "sol1": "a"')
    (evaluation,) = build(tmp_path, ["piqa"])
    with pytest.raises(AssetError, match="task piqa from") as caught:
        evaluation.preflight(FakeContext(tmp_path))
    assert "\n" not in str(caught.value)


def test_generation_needs_a_model_that_generates(items, tmp_path, subject):
    class Mute:
        config = subject.model.config

        def can_generate(self):
            return False

    (evaluation,) = build(items, ["gsm8k"])
    with pytest.raises(SpecError, match="generates no text"):
        evaluation.preflight(FakeContext(tmp_path, skeleton=Mute()))


def test_planning_imports_neither_lm_eval_nor_datasets(items):
    import subprocess
    import sys

    program = (
        "import sys\nfrom qbench.evaluation.lm_eval import build\n"
        f"build({ {**DEFAULTS, 'data_dir': str(items)}!r}, 'memory')\n"
        "assert not {'lm_eval', 'datasets'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
