"""Names lead to dataset files; what OpenCompass says about them is asked once."""

import pytest

from qbench.errors import EvaluationError, SpecError
from qbench.evaluation.opencompass.catalog import KNOWN, Catalog
from tests.evaluation.opencompass.fakes import DESCRIBED, LAMBADA, PIQA, RACE, Fake

ROOT = "opencompass.configs.datasets"


@pytest.fixture
def fake(tmp_path):
    return Fake(tmp_path)


@pytest.fixture
def catalog(fake):
    return Catalog(fake.environment)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("piqa", PIQA),
        ("piqa_ppl_0cfff2", f"{ROOT}.piqa.piqa_ppl_0cfff2"),
        ("squad20", f"{ROOT}.squad20.squad20_gen"),
        (LAMBADA, LAMBADA),
        (f"{ROOT}.one.twice", f"{ROOT}.one.twice"),
    ],
)
def test_a_name_a_file_or_a_module(catalog, name, module):
    assert catalog.module(name) == module


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pica", ["near:", "piqa"]),
        ("PIQA", ["near:", "piqa"]),
        ("hellaswak", ["hellaswag"]),
        ("zzzzzzzz", ["known:", *KNOWN]),
        ("twice", ["no dataset"]),  # of two folders
        (f"{ROOT}.piqa.nothing", ["no dataset"]),
        ("__init__", ["no dataset"]),
    ],
)
def test_an_unknown_name_has_near_matches(catalog, name, words):
    with pytest.raises(SpecError) as raised:
        catalog.module(name)
    assert f"eval.datasets={name}: " in str(raised.value)
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)


def test_datasets_are_described_once(fake, catalog):
    piqa, race = catalog.resolve(["piqa", "race"])
    assert (piqa.module, piqa.mode, piqa.data) == (PIQA, "ppl-1cf9f0", ("data/piqa",))
    assert [part.abbr for part in race.parts] == ["race-middle", "race-high"]
    assert Catalog(fake.environment).resolve(["race", "lambada"])[0] == race
    assert [call["request"]["modules"] for call in fake.calls] == [[PIQA, RACE], [LAMBADA]]


def test_different_prompts_or_modes_are_not_named_as_one(fake, catalog):
    first, second = DESCRIBED[RACE]
    fake.behave(describe={RACE: [first, {**second, "prompt": "ffffff"}]})
    assert catalog.resolve(["race"])[0].mode == "ppl"


def test_a_file_that_cannot_be_read_is_refused(fake, catalog):
    fake.behave(describe={PIQA: DESCRIBED[PIQA]})
    with pytest.raises(SpecError, match=r"race_ppl_a138cd: its file cannot be used: SyntaxError"):
        catalog.resolve(["race"])


def test_an_environment_that_broke_says_so(fake, catalog):
    (fake.folder / "bin" / "python").write_text("#!/bin/sh\necho ImportError: libfoo >&2\nexit 1\n")
    with pytest.raises(EvaluationError, match="does not work: ImportError: libfoo"):
        catalog.resolve(["piqa"])
