"""Takeaways on planted rows: each verdict is found, tests are those of `analysis.stats`, pages are deterministic."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from analysis import stats
from analysis.findings.contrasts import contrasts
from analysis.findings.page import write_page
from analysis.findings.takeaways import Expectation, Takeaway
from analysis.findings.verdicts import findings, verdict
from analysis.findings.words import takeaways_table
from analysis.tables.checked import checked
from analysis.tables.declared import Cell, Declared, Wanted
from analysis.tables.filled import filled
from qbench.store.records import Environment
from tests.analysis.conftest import losses, measured, sha

C4 = sha("c4-sample window-512")
COMMIT = Environment(
    git_commit="c0ffee", git_dirty=False, versions={}, platform="p", cpu="c", threads=1, gpu=None, driver=None
)
FULL = losses(3.0)
ALGOS, BITS = ("A", "B", "C"), ("W2", "W4")


def own(seed: int, spread: float = 0.05) -> np.ndarray:
    """What a run has of its own on every item, zero on average."""
    noise = np.random.default_rng(seed).normal(0.0, spread, 40)
    return noise - noise.mean()


def table(cells: dict[tuple[str, str], Cell], name: str = "t0", **changes) -> Declared:
    blank = Cell(metric=("ppl",), wanted=(Wanted(key=sha("absent"), baseline=sha("none"), spec_keys=(C4,)),))
    fields = {
        "name": name,
        "size": "tiny",
        "title": "Title",
        "caption": "Caption.",
        "row_axes": ("Algo",),
        "column_axes": ("Bits",),
        "rows": tuple((algo,) for algo in ALGOS),
        "columns": tuple((bits,) for bits in BITS),
        "cells": tuple(tuple(cells.get((algo, bits), blank) for bits in BITS) for algo in ALGOS),
    }
    return Declared(**(fields | changes))


@pytest.fixture
def plant(store):
    """Stores runs with these items by (algo, bits), and their full precision; the declared table of them."""

    def planted(nlls: dict[tuple[str, str], np.ndarray], clusters: np.ndarray | None = None, **changes) -> Declared:
        base = store("none", None, measured(FULL, clusters=clusters), environment=COMMIT)
        cells = {}
        for (algo, bits), items in nlls.items():
            found = measured(items, clusters=clusters)
            key = store(algo, int(bits[1]), found, environment=COMMIT)
            cells[algo, bits] = Cell(
                metric=("ppl",), wanted=(Wanted(key=key, baseline=base, spec_keys=(found.spec_key,)),)
            )
        return table(cells, **changes)

    return planted


def expectation(first: dict, second: dict | None = None, kind: str = "better", **more) -> Expectation:
    def selector(of: dict) -> dict:
        return {axis: (value,) if isinstance(value, str) else tuple(value) for axis, value in of.items()}

    named = {name: selector(of) if isinstance(of, dict) else of for name, of in more.items()}
    return Expectation(table="t0", kind=kind, first=selector(first), second=selector(second or {}), **named)


def takeaway(*expects: Expectation, **more) -> Takeaway:
    return Takeaway(**({"id": "1", "title": "T", "statement": "S.", "source": "Q"} | more), expects=expects)


def judged(database, declared: Declared, *expects: Expectation):
    found = filled(database, declared)
    return findings(database, [takeaway(*expects)], {"t0": found})[0]


FIRST, SECOND = {"Algo": "A"}, {"Algo": "B"}


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ((0.1, 0.1), "confirmed"),
        ((-0.1, -0.1), "contradicted"),
        ((-0.1, 0.0), "contradicted"),
        ((0.1, -0.1), "mixed"),
        ((0.1, 0.0), "partly confirmed"),
        ((0.0, 0.0), "undecided"),
    ],
)
def test_planted_verdicts_are_found(database, plant, gaps, expected):
    nlls = {}
    for seed, (bits, gap) in enumerate(zip(BITS, gaps, strict=True)):
        base = losses(3.3 + 0.1 * seed)
        nlls |= {("A", bits): base, ("B", bits): base + gap + own(seed) + (0.001 if gap == 0 else 0.0)}
    found = judged(database, plant(nlls), expectation(FIRST, SECOND))
    assert (found.verdict, found.on_page) == (expected, expected)
    assert [each.contrast.where for each in found.compared] == ["Bits W2", "Bits W4"]
    for each, gap in zip(found.compared, gaps, strict=True):
        assert each.effect == pytest.approx(gap or 0.001)


def test_what_has_no_runs_is_not_tested_and_says_which(database, plant):
    declared = plant({("A", "W2"): losses(3.2), ("B", "W2"): losses(3.4)})
    found = judged(database, declared, expectation(FIRST, SECOND), expectation(FIRST, {"Algo": "D"}))
    assert [bool(each.reason) for each in found.compared] == [False, True]
    assert (found.compared[1].reason, found.compared[1].cell) == ("not run", "t0, A / W4")
    assert found.absent == ("t0 has no Algo “D” in this size",)
    assert found.verdict == "confirmed"
    assert judged(database, declared, expectation({"Algo": "C"}, SECOND)).verdict == "not tested"


def test_a_takeaway_about_a_table_that_is_not_there_is_not_tested(database, plant):
    gaps = {"A": 0.0, "B": 0.2}
    declared = plant({(algo, bits): losses(3.2) + gap + own(ord(algo)) for algo, gap in gaps.items() for bits in BITS})
    here = expectation(FIRST, SECOND)
    there = replace(here, table="t9")
    given = [takeaway(here), takeaway(here, there, id="2"), takeaway(there, id="3")]
    found = findings(database, given, {"t0": filled(database, declared)})
    assert [each.verdict for each in found] == ["confirmed", "confirmed", "not tested"]
    assert [each.absent for each in found] == [(), ("t9 has no run",), ("t9 has no run",)]
    table = takeaways_table(found, "demo")
    assert [[entry.text for entry in row] for row in table.rows] == [
        ["1", "T", "confirmed", "2 for", "< 0.0001", "confirmed"],
        ["2", "T", "confirmed", "2 for; in part not tested", "< 0.0001", "confirmed"],
        ["3", "T", "not tested", "none", "", ""],
    ]
    assert "over all 4" in table.caption


def test_p_values_are_those_of_the_paired_t_test_with_holms_correction(database, plant):
    nlls = {
        (algo, bits): losses(3.4) + own(i * 2 + j, 0.2) + 0.01 * i
        for i, algo in enumerate(ALGOS)
        for j, bits in enumerate(BITS)
    }
    found = judged(database, plant(nlls), expectation(FIRST, {"Algo": ["B", "C"]}))
    expected = [
        scipy_stats.ttest_rel(nlls["A", bits], nlls[other, bits]).pvalue for bits in BITS for other in ("B", "C")
    ]
    assert [each.p for each in found.compared] == pytest.approx(expected)
    assert [each.p_holm for each in found.compared] == pytest.approx(stats.holm(expected))
    for each, (bits, other) in zip(found.compared, [(b, o) for b in BITS for o in "BC"], strict=True):
        difference = nlls[other, bits] - nlls["A", bits]
        assert (each.effect, each.stderr) == pytest.approx((difference.mean(), scipy_stats.sem(difference)))
        assert each.values == (
            (pytest.approx(math.exp(nlls["A", bits].mean())), pytest.approx(math.exp(nlls[other, bits].mean()))),
        )


def test_windows_of_one_document_count_together(database, plant):
    clusters = np.repeat(np.arange(8), 5)
    gaps = np.random.default_rng(3).normal(0.0, 0.05, 8)
    shared = np.repeat(gaps - gaps.mean() + 0.03, 5)
    nlls = {("A", "W2"): losses(3.4), ("B", "W2"): losses(3.4) + shared}
    found = judged(database, plant(nlls, clusters), expectation(FIRST, SECOND, at={"Bits": "W2"}))
    assert found.compared[0].p == pytest.approx(stats.paired_t(nlls["A", "W2"], nlls["B", "W2"], clusters).p)
    assert found.compared[0].p > 3 * scipy_stats.ttest_rel(nlls["A", "W2"], nlls["B", "W2"]).pvalue


def test_the_page_is_corrected_over_all_takeaways(database, plant):
    nlls = {
        (algo, bits): losses(3.4) + own(i * 2 + j, 0.2) + 0.05 * i
        for i, algo in enumerate(ALGOS)
        for j, bits in enumerate(BITS)
    }
    given = [
        takeaway(expectation(FIRST, {"Algo": other}, at={"Bits": bits}), id=f"{other}{bits}")
        for other in "BC"
        for bits in BITS
    ]
    found = findings(database, given, {"t0": filled(database, plant(nlls))})
    raw = [each.compared[0].p for each in found]
    assert [each.compared[0].p_holm for each in found] == pytest.approx(raw)
    assert [each.compared[0].p_page for each in found] == pytest.approx(stats.holm(raw))


@pytest.mark.parametrize(("more", "expected"), [(("W2", "W4"), "confirmed"), (("W4", "W2"), "contradicted")])
def test_advantages_are_compared_as_a_difference_of_differences(database, plant, more, expected):
    items = {bits: losses(3.3 + 0.1 * i) for i, bits in enumerate(BITS)}
    nlls = {("A", bits): items[bits] for bits in BITS}
    nlls |= {("B", "W2"): items["W2"] + 0.3 + own(1), ("B", "W4"): items["W4"] + 0.1 + own(2)}
    expects = expectation(FIRST, SECOND, more_at={"Bits": more[0]}, less_at={"Bits": more[1]})
    found = judged(database, plant(nlls), expects)
    assert found.verdict == expected
    (one,) = found.compared
    assert abs(one.effect) == pytest.approx(0.2)
    assert one.stderr == pytest.approx(scipy_stats.sem(own(1) - own(2)))
    assert len(one.values) == 2


@pytest.mark.parametrize(
    ("kind", "loss", "expected"),
    [
        ("less", 0.05, "confirmed"),
        ("less", 0.35, "contradicted"),
        ("more", 0.35, "confirmed"),
        ("more", 0.05, "contradicted"),
    ],
)
def test_losses_are_tested_against_a_share_of_full_precision(database, plant, kind, loss, expected):
    nlls = {("A", "W2"): FULL + math.log1p(loss) + own(5), ("A", "W4"): FULL + math.log(1.2) + own(6)}
    declared = plant(nlls)
    found, near = (
        judged(database, declared, expectation(FIRST, kind=kind, share=0.2, at={"Bits": bits})) for bits in BITS
    )
    assert (found.verdict, near.verdict) == (expected, "undecided")
    assert abs(found.compared[0].effect) == pytest.approx(abs(math.log1p(loss) - math.log(1.2)))


def accuracy(right: np.ndarray):
    fields = {
        "name": "acc",
        "evaluator": "zeroshot",
        "task": "q",
        "spec_key": sha("q"),
        "value": float(right.mean()),
        "unit": "share",
    }
    return measured(right.astype(float), **fields, stderr=0.1)


def test_right_and_wrong_answers_take_mcnemars_test_and_more_is_better(database, store):
    generator = np.random.default_rng(0)
    right = {"none": generator.random(40) < 0.9, "A": generator.random(40) < 0.9, "B": generator.random(40) < 0.3}
    keys = {
        name: store(name, None if name == "none" else 2, accuracy(each), environment=COMMIT)
        for name, each in right.items()
    }
    cells = {
        (algo, "W2"): Cell(
            metric=("acc",), wanted=(Wanted(key=keys[algo], baseline=keys["none"], spec_keys=(sha("q"),)),)
        )
        for algo in "AB"
    }
    found = judged(database, table(cells), expectation(FIRST, SECOND, at={"Bits": "W2"}))
    assert found.verdict == "confirmed"
    assert found.compared[0].p == stats.mcnemar(right["A"].astype(float), right["B"].astype(float)).p
    expects = [expectation({"Algo": algo}, kind="less", share=0.3, at={"Bits": "W2"}) for algo in "AB"]
    lost = judged(database, table(cells), *expects).compared
    assert [each.says(0.0) for each in lost] == ["for", "against"]
    assert lost[1].effect == pytest.approx(right["B"].mean() - 0.7 * right["none"].mean())


def test_other_items_or_no_items_are_not_compared(database, store, plant):
    declared = plant({("A", "W2"): losses(3.2)})
    other = measured(losses(3.4, 30), protocol="window-128")
    key = store("B", 2, other, environment=COMMIT)
    odd = Cell(metric=("ppl",), wanted=(Wanted(key=key, baseline=sha("x"), spec_keys=(other.spec_key,)),))
    bare = store("C", 2, measured(losses(3.4), samples=None), environment=COMMIT)
    without = Cell(metric=("ppl",), wanted=(Wanted(key=bare, baseline=sha("x"), spec_keys=(C4,)),))
    cells = {("A", "W2"): declared.cells[0][0], ("B", "W2"): odd, ("C", "W2"): without}
    found = judged(database, table(cells), expectation(FIRST, {"Algo": ["B", "C"]}, at={"Bits": "W2"}))
    assert found.verdict == "not tested"
    assert [each.reason for each in found.compared] == [
        "the cells were not measured on the same items",
        "PPL: no stored items that give its value",
    ]


def test_labels_by_pattern_by_another_axis_and_what_makes_no_sense():
    def of(*expects: Expectation, **changes) -> list[tuple[str, str]]:
        declared = replace(table({}), **changes)
        return [(each.what, each.where) for one in expects for each in contrasts(one, declared)[0]]

    assert of(expectation(FIRST, {"Algo": "[!A]"})) == [
        (f"A better than {other}", f"Bits {bits}") for bits in BITS for other in "BC"
    ]
    square = {"columns": (("A",), ("B",)), "cells": tuple((Cell(metric=("ppl",)),) * 2 for _ in ALGOS)}
    matched = expectation({"Algo": "same as Bits"}, {"Algo": "other than Bits"})
    assert [each[0] for each in of(matched, **square)] == [
        *("A better than B", "A better than C"),
        *("B better than A", "B better than C"),
    ]
    senseless = tuple((Cell(metric=("ppl",), reason="no" if algo == "B" else None),) * 2 for algo in ALGOS)
    assert [each[0] for each in of(expectation(FIRST, {"Algo": ["B", "C"]}), cells=senseless)] == [
        "A better than C"
    ] * 2


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ((), "not tested"),
        (("for",), "confirmed"),
        (("for", "open"), "partly confirmed"),
        (("for", "against", "open"), "mixed"),
        (("open", "against"), "contradicted"),
        (("open",), "undecided"),
    ],
)
def test_verdicts_follow_from_what_comparisons_say(said, expected):
    assert verdict(said) == expected


def written(database, declared: Declared, given: list[Takeaway], folder: Path) -> str:
    found = checked(database, filled(database, declared), varied=["algo", "bits"])
    write_page(database, given, {"t0": found}, folder / "findings.md")
    return (folder / "findings.md").read_text(encoding="utf-8")


GIVEN = [
    takeaway(expectation(FIRST, SECOND), id="1a", title="A | wins", here="H."),
    Takeaway(id="2", title="N", statement="S.", source="Q", needs="a table."),
]


def test_the_page_says_what_was_run_and_is_the_same_every_time(database, plant, tmp_path):
    nlls = {
        (algo, bits): losses(3.4) + own(i * 2 + j) + 0.3 * i
        for i, algo in enumerate("AB")
        for j, bits in enumerate(BITS)
    }
    declared = plant(nlls)
    text = written(database, declared, GIVEN, tmp_path / "one")
    assert "| [1a. A \\| wins](#takeaway-1a) | **confirmed** | 2 for | < 0.0001 | confirmed |" in text
    assert "| [2. N](#takeaway-2) | **not tested** | none |" in text
    assert "Not tested: a table." in text
    assert "code c0ffee; c, 1 threads" in text
    assert "This is one model: tiny" in text
    assert "40 windows of c4-sample (window-512)" in text
    assert "![T0: Title](img/findings/t0-tiny.png)" in text
    assert text.count('<a id="takeaway-1a"></a>') == 1
    png = tmp_path / "one/img/findings/t0-tiny.png"
    assert png.stat().st_size < 100_000
    assert written(database, declared, GIVEN, tmp_path / "two") == text
    assert (tmp_path / "two/img/findings/t0-tiny.png").read_bytes() == png.read_bytes()
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|"), line


def test_an_empty_database_has_nothing_tested(database, tmp_path):
    text = written(database, table({}), GIVEN, tmp_path)
    assert "none of the declared tables' runs yet: nothing is tested" in text
    assert "| [1a. A \\| wins](#takeaway-1a) | **not tested** | 2 not tested |  |  |" in text
    assert "Not tested: not run (t0, A / W2; t0, A / W4)." in text
    assert not (tmp_path / "img").exists()


def test_a_database_of_one_row_is_drawn(database, store, tmp_path):
    key = store("A", 2, measured(losses(3.4)), environment=COMMIT)
    cells = {("A", "W2"): Cell(metric=("ppl",), wanted=(Wanted(key=key, baseline=sha("b"), spec_keys=(C4,)),))}
    text = written(database, table(cells), GIVEN, tmp_path)
    assert "**not tested**" in text
    assert "1 quantized run, measured on few items" in text
    assert "1 run (id 1), finished" in text
    assert (tmp_path / "img/findings/t0-tiny.png").is_file()


def test_two_runs_are_plural(database, plant, tmp_path):
    text = written(database, plant({(algo, "W2"): losses(3.4) + own(ord(algo)) for algo in "AB"}), GIVEN, tmp_path)
    assert "2 quantized runs, measured on few items" in text
    assert "3 runs (ids 1-3), finished" in text
    assert "over the whole page (1 comparison) instead" in text
