from dataclasses import replace

import pytest

from analysis.claims import Cell, check, violations
from qbench.errors import EvaluationError, SpecError
from qbench.store import queries
from tests.analysis.conftest import HERE, losses, measured, sha

CLEAN = replace(HERE, git_commit="a" * 40, git_dirty=False, versions={"torch": "2.1"})


@pytest.fixture
def cells(database, store):
    """A table's cells from (algo, bits, measurement, columns) each."""

    def made(*rows, column="ppl"):
        keys = [store(algo, bits, value, **({"environment": CLEAN} | more)) for algo, bits, value, more in rows]
        found = database.find(keys)
        values = {each.run_id: each for each in queries.metrics(database, [row.id for row in found.values()])}
        return [
            Cell(where=f"{r[0]} {r[1]}", run=found[key], metric=values[found[key].id], column=column)
            for r, key in zip(rows, keys, strict=True)
        ]

    return made


def ppl(mean: float, **changes):
    return measured(losses(mean), **changes)


def test_cells_that_belong_together_need_no_footnote(database, cells):
    found = check(database, cells(("rtn", 4, ppl(3.2), {}), ("gptq", 4, ppl(3.1), {})), varied=["algo"])
    assert found.footnotes == ()
    assert check(database, []).footnotes == ()


ONE_KEY = {"spec_key": sha("same")}
PLANTED = {
    "protocol": ({"protocol": "window-512", **ONE_KEY}, {"protocol": "window-2048", **ONE_KEY}, {}),
    "items": ({"spec_key": sha("a")}, {"spec_key": sha("b")}, {}),
    "code": ({}, {}, {"environment": replace(CLEAN, git_commit="b" * 40)}),
    "dirty": ({}, {}, {"environment": replace(CLEAN, git_dirty=True)}),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_each_planted_mixture_is_refused_by_name_and_footnoted_when_allowed(database, cells, kind):
    usual, other, columns = PLANTED[kind]
    table = cells(
        ("rtn", 4, ppl(3.2, **usual), {}), ("awq", 4, ppl(3.1, **usual), {}), ("gptq", 3, ppl(3.1, **other), columns)
    )
    assert [each.kind for each in violations(database, table)] == [kind]
    with pytest.raises(EvaluationError, match=rf"gptq 3.*allow={kind}$"):
        check(database, table, varied=["algo", "bits"])
    others = [each for each in PLANTED if each != kind]
    with pytest.raises(EvaluationError, match=f"allow={kind}$"):
        check(database, table, allow=others)
    for allow in ([kind], ["all"]):
        (note,) = check(database, table, varied=["algo", "bits"], allow=allow).footnotes
        assert note.cells == (2,), "most cells are the rule, the other is the exception"


def test_fewer_items_under_one_key_are_other_items(database, cells):
    few = measured(losses(3.1, n=20))
    with pytest.raises(EvaluationError, match=r"n = 20.*allow=items"):
        check(database, cells(("rtn", 4, ppl(3.2), {}), ("gptq", 4, few, {})))


def test_columns_of_their_own_may_have_protocols_of_their_own(database, cells):
    one = cells(("rtn", 4, ppl(3.2), {}), column="wiki")
    two = cells(("rtn", 3, ppl(3.2, protocol="window-2048"), {}), column="c4")
    assert violations(database, [*one, *two]) == ()


def test_other_metrics_or_texts_in_one_column_are_refused(database, cells):
    table = cells(("rtn", 4, ppl(3.2), {}), ("gptq", 4, ppl(3.1, task="wiki"), {}))
    with pytest.raises(EvaluationError, match="ppl on wiki"):
        check(database, table)


def test_a_stage_whose_numbers_changed_is_another_code_version(database, cells):
    specs = [{"pipeline": [{"name": "gptq", "version": v, "options": {}}]} for v in (1, 2)]
    table = cells(*(("gptq", bits, ppl(3.0), {"spec": spec}) for bits, spec in zip((3, 4), specs, strict=True)))
    with pytest.raises(EvaluationError, match=r"versions of stage gptq.*allow=code"):
        check(database, table)


def test_outside_a_checkout_the_installed_version_names_the_code(database, cells):
    installed = [
        {"environment": replace(CLEAN, git_commit=None, git_dirty=None, versions={"qbench": v})} for v in ("1", "2")
    ]
    table = cells(*(("rtn", 4 - i, ppl(3.0), installed[i]) for i in range(2)))
    with pytest.raises(EvaluationError, match="qbench 2"):
        check(database, table)
    assert violations(database, table[:1]) == ()


def test_all_mixtures_are_named_at_once(database, cells):
    other = replace(CLEAN, git_commit="b" * 40, git_dirty=True)
    with pytest.raises(EvaluationError, match=r"and 1 more.*allow=code,dirty"):
        check(database, cells(("rtn", 4, ppl(3.0), {}), ("gptq", 4, ppl(3.0), {"environment": other})))


@pytest.mark.parametrize(
    ("usual", "other", "text"),
    [
        ({"calib_length": 512}, {"calib_length": 2048}, "calibration length 2048, elsewhere 512"),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}, "dtype bfloat16, elsewhere float32"),
        ({}, {"environment": replace(CLEAN, versions={"torch": "2.2"})}, "torch 2.2, elsewhere 2.1"),
        ({}, {"environment": replace(CLEAN, gpu="H100")}, None),
        ({}, {"environment": replace(CLEAN, platform="BSD")}, "platform BSD, elsewhere p"),
        ({}, {"environment": replace(CLEAN, versions={"torch": "2.1", "numpy": "3"})}, None),
        ({"source": "memory"}, {"source": "stream"}, "source stream, elsewhere memory"),
        ({"spec": {"seed": 0}}, {"spec": {"seed": 1}}, "seed 1, elsewhere 0"),
        (
            {"spec": {"calibration": {"sampler": "random"}}},
            {"spec": {"calibration": {"sampler": "sequential"}}},
            "calibration sampler sequential, elsewhere random",
        ),
        ({"kv_format": None}, {"kv_format": "int4_kivi"}, "cache int4_kivi, elsewhere in full precision"),
    ],
)
def test_deviations_are_footnoted_where_most_cells_agree(database, cells, usual, other, text):
    table = cells(("rtn", 4, ppl(3.0), usual), ("awq", 4, ppl(3.0), usual), ("gptq", 4, ppl(3.0), other))
    found = check(database, table, varied=["algo"])
    if text is None:  # no GPU and one GPU: nothing to compare with
        assert found.footnotes == ()
        return
    assert [each.text for each in found.footnotes] == [text]
    assert [found.marks(i) for i in range(3)] == [(), (), (1,)]
    name = next(iter(other))
    if name == "spec":
        name = text.partition(" ")[0].replace("calibration", "calib_sampler")
    assert name == "environment" or check(database, table, varied=["algo", name]).footnotes == ()


def test_what_was_measured_by_other_code_later_is_another_code_version(database, cells):
    table = cells(*(("rtn", bits, ppl(3.0 + bits / 10), {}) for bits in (2, 3, 4)))
    later = replace(CLEAN, git_commit="b" * 40, git_dirty=True)
    database.append(table[2].run.id, [ppl(3.0, task="wiki")], environment=later)
    here = [Cell(where="x", run=table[0].run, metric=table[0].metric)]
    (measured_later,) = [m for m in queries.metrics(database, [table[2].run.id]) if m.task == "wiki"]
    there = Cell(where="y", run=table[2].run, metric=measured_later, column="wiki")
    assert {each.kind for each in violations(database, [*here, there])} == {"code", "dirty"}
    with pytest.raises(EvaluationError, match=f"{'a' * 12} measured by {'b' * 12}: y.*allow=code,dirty"):
        check(database, [*here, *here, there])
    assert violations(database, table) == ()


def test_options_of_a_stage_that_differ_are_footnoted(database, cells):
    specs = [{"pipeline": [{"name": "gptq", "version": 1, "options": {"damp": d}}]} for d in (0.01, 0.01, 0.1)]
    table = cells(*(("gptq", 4 - i, ppl(3.0), {"spec": spec}) for i, spec in enumerate(specs)))
    found = check(database, table, varied=["algo", "bits"])
    assert [each.text for each in found.footnotes] == ["gptq.damp 0.1, elsewhere 0.01"]


def test_full_precision_deviates_in_nothing_that_it_does_not_have(database, cells):
    table = cells(("none", None, ppl(2.9), {}), ("rtn", 4, ppl(3.0), {"calib": "c4", "act_format": "int8_token"}))
    assert check(database, table).footnotes == ()


def test_an_unknown_mixture_is_refused(database):
    with pytest.raises(SpecError, match="allow=everything"):
        check(database, [], allow=["everything"])
