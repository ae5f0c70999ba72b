"""Declared tables from planted rows: values, differences, ties, means, what is missing, and every form of text."""

import csv
import io
import math
import re

import numpy as np
import pytest
from rich.console import Console
from scipy import stats as scipy_stats

from analysis import stats
from analysis.tables import declared_text
from analysis.tables.checked import checked
from analysis.tables.declared import Cell, Declared, Wanted
from analysis.tables.filled import filled
from qbench.errors import EvaluationError
from qbench.store.records import Environment, Outcome
from tests.analysis.conftest import losses, measured, sha

C4, WIKI = sha("c4-sample window-512"), sha("wiki window-512")
COMMIT = Environment(
    git_commit="c0ffee", git_dirty=False, versions={}, platform="p", cpu="c", threads=1, gpu=None, driver=None
)
FULL = losses(3.0)


def declared(cells: list[list[Cell]], **changes) -> Declared:
    fields = {
        "name": "t0",
        "size": "tiny",
        "title": "Title",
        "caption": "Caption.",
        "row_axes": ("Algo",),
        "column_axes": ("Bits",),
        "rows": tuple((f"row {i}",) for i in range(len(cells))),
        "columns": tuple((f"W{j}",) for j in range(len(cells[0]))),
        "cells": tuple(map(tuple, cells)),
    }
    return Declared(**(fields | changes))


def cell(*keys: str, baseline: str = "", spec_keys: tuple[str, ...] = (C4,), metric: str = "ppl", **more) -> Cell:
    wanted = tuple(Wanted(key=key, baseline=baseline, spec_keys=spec_keys) for key in keys)
    return Cell(metric=(metric,), wanted=wanted, **more)


@pytest.fixture
def base(store) -> str:
    return store("none", None, measured(FULL), environment=COMMIT)


def shown(table) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(declared_text.Rendered(table))
    return console.file.getvalue()


def texts(table) -> list[str]:
    return [shown(table), declared_text.latex(table), declared_text.markdown(table)]


def test_values_are_the_runs_and_differences_paired_with_full_precision(database, store, base):
    nlls = losses(3.4)
    key = store("gptq", 3, measured(nlls), environment=COMMIT)
    table = filled(database, declared([[cell(key, baseline=base)]]))
    full, row = table.rows
    assert full.full_precision
    assert full.labels == ("full precision",)
    assert full.cells[0].value == pytest.approx(math.exp(FULL.mean()))
    assert full.cells[0].delta is None
    difference = stats.perplexity_difference(nlls, FULL)
    found = row.cells[0]
    assert (found.value, found.delta) == pytest.approx((math.exp(nlls.mean()), difference.value))
    assert found.delta_stderr == pytest.approx(difference.stderr, rel=1e-12)
    assert found.stderr == pytest.approx(stats.perplexity(nlls).stderr)
    assert (found.n, found.state) == (40, "done")
    for text in texts(table):
        assert f"{found.value:.2f}" in text


def test_the_best_of_each_column_and_its_ties_are_marked(database, store, base):
    best, noise = losses(3.4), np.random.default_rng(0).normal(0, 0.02, 40)
    keys = [
        store(f"a{i}", 3, measured(nlls), environment=COMMIT)
        for i, nlls in enumerate([best, best + noise - noise.mean() + 1e-4, best + 0.2 + noise])
    ]
    rows = [[cell(key, baseline=base)] for key in keys]
    table = filled(database, declared(rows))
    assert [row.cells[0].best for row in table.rows] == [False, True, True, False]
    assert declared_text.latex(table).count(r"\textbf{") == 2
    assert declared_text.markdown(table).count("| **") == 2
    assert len(re.findall(r"\d\*", shown(table))) == 2
    none = filled(database, declared(rows, best="none"))
    assert not any(row.cells[0].best for row in none.rows)
    groups = declared(rows, best="group", row_axes=("A", "B"), rows=(("x", "1"), ("y", "1"), ("y", "2")))
    assert [row.cells[0].best for row in filled(database, groups).rows] == [False, False, True, False]
    across = declared([[row[0] for row in rows]], best="row")
    assert [found.best for found in filled(database, across).rows[1].cells] == [True, True, False]


def test_a_mean_of_two_texts_adds_independent_errors(database, store):
    other = losses(2.0)
    wiki = measured(other, task="wiki", spec_key=WIKI)
    full = store("none", None, measured(FULL), wiki, environment=COMMIT)
    a, b = losses(3.4), losses(2.3)
    key = store("gptq", 3, measured(a), measured(b, task="wiki", spec_key=WIKI), environment=COMMIT)
    wish = cell(key, baseline=full, spec_keys=(C4, WIKI))
    found = filled(database, declared([[wish]], aggregate="mean")).rows[1].cells[0]
    assert found.value == pytest.approx((math.exp(a.mean()) + math.exp(b.mean())) / 2)
    parts = [stats.perplexity_difference(a, FULL), stats.perplexity_difference(b, other)]
    assert found.delta == pytest.approx(sum(part.value for part in parts) / 2)
    assert found.delta_stderr == pytest.approx(math.hypot(*(part.stderr for part in parts)) / 2)
    with pytest.raises(EvaluationError, match="a cell has 2 values"):
        filled(database, declared([[wish]]))


def test_repeats_are_averaged_item_by_item(database, store, base):
    runs = [losses(3.4 + 0.01 * i) for i in range(3)]
    keys = [store("gptq", 3, measured(nlls), calib_seed=i, environment=COMMIT) for i, nlls in enumerate(runs)]
    found = filled(database, declared([[cell(*keys, baseline=base)]], aggregate="mean")).rows[1].cells[0]
    values = [math.exp(nlls.mean()) for nlls in runs]
    assert found.value == pytest.approx(np.mean(values))
    assert found.spread == pytest.approx(np.std(values, ddof=1))
    moved = np.mean([value * nlls for value, nlls in zip(values, runs, strict=True)], axis=0)
    paired = moved - math.exp(FULL.mean()) * FULL
    assert found.delta_stderr == pytest.approx(scipy_stats.sem(paired), rel=1e-9)
    assert found.n == 40
    assert len(found.run_ids) == 3


def test_ties_of_means_are_tested_on_what_the_cells_share(database, store):
    def stored(name: str, shift: float) -> str:
        noise = np.random.default_rng(ord(name)).normal(0, 0.05, (2, 40))
        noise += shift - noise.mean(axis=1, keepdims=True)
        pair = [losses(3.4) + noise[0], losses(2.3) + noise[1]]
        return store(name, 3, measured(pair[0]), measured(pair[1], task="wiki", spec_key=WIKI), environment=COMMIT)

    keys = [stored("a", 0.0), stored("b", 0.001), stored("c", 0.1)]
    rows = [[cell(key, baseline="x", spec_keys=(C4, WIKI))] for key in keys]
    found = filled(database, declared(rows, aggregate="mean"))
    assert [row.cells[0].best for row in found.rows] == [True, True, False]


def test_columns_of_the_run_have_units_and_no_full_precision_but_for_sizes(database, store, base):
    outcome = Outcome(bits_per_weight=3.25, quantize_s=12.5, peak_host_bytes=2_500_000_000, model_bytes=3_000_000)
    key = store("gptq", 3, measured(losses(3.4)), outcome=outcome, environment=COMMIT)
    names = ("quantize_s", "peak_host_bytes", "bits_per_weight", "model_bytes")
    table = filled(database, declared([[cell(key, baseline=base, metric=name) for name in names]]))
    assert [found.value for found in table.rows[1].cells] == [12.5, 2500.0, 3.25, 3.0]
    assert [found.value for found in table.rows[0].cells] == [None, None, 16.0, None]
    assert "quantize, s ↓" in shown(table)


def test_each_model_has_its_own_full_precision(database, store, base):
    big = store("none", None, measured(losses(2.0)), model="big", environment=COMMIT)
    keys = [store("gptq", 3, measured(losses(3.4)), environment=COMMIT)]
    keys.append(store("gptq", 3, measured(losses(2.4)), model="big", environment=COMMIT))
    rows = [[cell(keys[0], baseline=base)], [cell(keys[1], baseline=big)]]
    table = filled(database, declared(rows, row_axes=("Model", "Algo"), rows=(("tiny", "G"), ("big", "G"))))
    assert [row.labels for row in table.rows] == [
        ("tiny", "full precision"),
        ("tiny", "G"),
        ("big", "full precision"),
        ("big", "G"),
    ]
    assert table.rows[3].cells[0].delta == pytest.approx(math.exp(2.4) - math.exp(2.0))


def test_states_and_their_reasons(database, store, base):
    failed = store("gptq", 2, error=("NumericsError", "singular\nmore"), environment=COMMIT)
    done = store("rtn", 3, measured(losses(3.4)), environment=COMMIT)
    cells = [cell(done, baseline=base), cell(failed, baseline=base), cell(sha("none such"), baseline=base)]
    cells += [cell(reason="makes no sense"), cell(done, baseline=base, spec_keys=(WIKI,))]
    table = filled(database, declared([cells]))
    assert [found.state for found in table.rows[-1].cells] == ["done", "failed", "missing", "undefined", "missing"]
    assert table.counts == {"done": 1, "missing": 2, "stale": 0, "failed": 1, "running": 0, "undefined": 1}
    for text in texts(table):
        assert "NumericsError: singular" in text
        assert "more" not in text
        assert "makes no sense" in text
        assert "not run" in text


def test_a_metric_that_was_not_measured_is_an_error_that_names_what_was(database, store, base):
    key = store("rtn", 3, measured(losses(3.4)), environment=COMMIT)
    with pytest.raises(EvaluationError, match="acc: not among what was measured, ppl"):
        filled(database, declared([[cell(key, baseline=base, metric="acc")]]))


def test_an_empty_database_says_what_is_missing_in_every_form(database):
    table = filled(database, declared([[cell(sha("a"), baseline=sha("b"))]]))
    for text in texts(table):
        assert "Nothing has been measured yet: qbench fill runs it" in text.replace("\n", " ").replace("  ", " ")
    assert list(declared_text.frame(table)["state"]) == ["missing"]
    assert checked(database, table).rows == table.rows


def test_latex_is_balanced_and_escapes_what_it_must(database, store, base):
    key = store("gptq", 3, measured(losses(3.4)), environment=COMMIT)
    other = store("rtn", 3, measured(losses(3.5)), environment=COMMIT)
    wish = [cell(key, baseline=base), cell(reason=r"50 % & a_b \ {x} ~ ^ #"), *[cell(other, baseline=base)] * 3]
    columns = (("A & B", "1"), ("A & B", "2"), ("C_d", "3"), ("E", "4"), ("E", "5"))
    table = filled(database, declared([wish], title="α < β", column_axes=("X", "Y"), columns=columns))
    text = declared_text.latex(table)
    assert r"\multicolumn{2}{c}{A \& B} & C\_d & \multicolumn{2}{c}{E} \\" in text
    assert "\n" + r"\cmidrule(lr){2-3}\cmidrule(lr){5-6}" + "\n" in text
    assert r"50 \% \& a\_b \textbackslash{} \{x\} \textasciitilde{} \textasciicircum{} \#" in text
    plain = re.sub(r"\\[\\&%$#_{}]", "", text)
    assert plain.count("{") == plain.count("}")
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    for line in body:
        spanned = sum(int(n) - 1 for n in re.findall(r"\\multicolumn{(\d+)}", line))
        assert len(re.findall(r"(?<!\\)&", line)) + spanned == 5, line
    for name in ("table", "tabular"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}") == 1


def test_markdown_has_as_many_cells_in_every_line(database, store, base):
    key = store("gptq", 3, measured(losses(3.4)), environment=COMMIT)
    table = filled(database, declared([[cell(key, baseline=base), cell(reason="a | b")]], rows=(("x|y",),)))
    lines = [line for line in declared_text.markdown(table).splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {4}


def test_csv_has_every_cell_with_its_runs(database, store, base):
    key = store("gptq", 3, measured(losses(3.4)), environment=COMMIT)
    table = filled(database, declared([[cell(key, baseline=base), cell(sha("x"), baseline=base)]]))
    rows = list(csv.DictReader(io.StringIO(declared_text.frame(table).to_csv(index=False))))
    assert [(row["Algo"], row["Bits"], row["state"]) for row in rows] == [
        ("full precision", "W0", "done"),
        ("full precision", "W1", "done"),
        ("row 0", "W0", "done"),
        ("row 0", "W1", "missing"),
    ]
    assert float(rows[2]["value"]) == pytest.approx(math.exp(3.4))
    assert rows[2]["protocol"] == "c4-sample: window-512"


def test_mixtures_are_refused_and_deviations_footnoted(database, store, base):
    later = Environment(**(vars(COMMIT) | {"git_commit": "d00d"}))
    threads = Environment(**(vars(COMMIT) | {"threads": 2}))
    keys = [store(f"a{i}", 3, measured(losses(3.4 + i)), environment=COMMIT) for i in range(2)]
    for environment, text in ((later, "several code versions"), (threads, "threads 2, elsewhere 1")):
        odd = store("odd", 3, measured(losses(3.9)), environment=environment, spec={"at": text})
        table = filled(database, declared([[cell(key, baseline=base)] for key in (*keys, odd)]))
        if environment is later:
            with pytest.raises(EvaluationError, match=text):
                checked(database, table, varied=["algo"])
        found = checked(database, table, varied=["algo"], allow=["code"])
        assert [len(row.cells[0].notes) for row in found.rows] == [0, 0, 0, 1]
        assert text in found.rows[-1].cells[0].notes[0]
        assert text in shown(found)


def test_what_holds_for_all_cells_is_said_once(database, store):
    dirty = Environment(**(vars(COMMIT) | {"git_dirty": True}))
    full = store("none", None, measured(FULL), environment=dirty)
    key = store("gptq", 3, measured(losses(3.4)), environment=dirty)
    table = checked(database, filled(database, declared([[cell(key, baseline=full)]])), allow=["dirty"])
    assert len(table.notes) == 1
    assert all(text.count("uncommitted changes") == 1 for text in texts(table))
    assert "[a]" not in shown(table)


def test_variants_of_one_metric_share_a_heading(database, store):
    def variants(shift: float) -> list:
        shared = {"spec_key": C4, "evaluator": "layers", "unit": "cosine"}
        names = [f"output_cosine,{kind}" for kind in ("q_proj", "k_proj")]
        return [measured(losses(shift), name=name, value=shift, stderr=None, **shared) for name in names]

    full = store("none", None, *variants(1.0), environment=COMMIT)
    key = store("gptq", 3, *variants(0.9), environment=COMMIT)
    wish = [[cell(key, baseline=full, metric=f"output_cosine,{kind}")] for kind in ("q_proj", "k_proj")]
    table = filled(database, declared(wish))
    assert declared_text.headers(table) == [("W0", "cosine ↑")]
    assert not any(row.full_precision for row in table.rows)
    assert declared_text.headers(filled(database, declared(wish[:1]))) == [("W0", "cosine q_proj ↑")]
    absent = [[cell(sha("x"), baseline=full, metric=f"output_cosine,{kind}")] for kind in ("q_proj", "k_proj")]
    assert declared_text.headers(filled(database, declared(absent))) == [("W0", "cosine ↑")]
