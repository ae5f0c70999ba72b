import importlib
import subprocess
import sys

import pytest

from qbench.metrics import items_of, metric_info


@pytest.mark.parametrize(
    ("name", "arrow", "link"),
    [
        ("ppl", "↓", "exp_mean"),
        ("acc", "↑", "mean"),
        ("acc_norm", "↑", "mean"),
        ("exact_match", "↑", "mean"),
        ("kl_mean", "↓", "mean"),
        ("kl_p999", "↓", "mean"),
        ("rms_dp", "↓", "root_mean"),
        ("top1_agreement", "↑", "mean"),
        ("word_perplexity", "↓", "exp_mean"),
        ("bits_per_byte", "↓", "mean"),
        ("output_cosine,q_proj", "↑", "mean"),
        ("input_kurtosis,q_proj", "", "mean"),
        ("something_new", "", "mean"),
    ],
)
def test_direction_and_link(name, arrow, link):
    info = metric_info(name)
    assert (info.name, info.arrow, info.link) == (name, arrow, link)


def test_what_is_stored_with_a_value_wins():
    assert metric_info("acc", higher_is_better=False).arrow == "↓"
    new = metric_info("new", higher_is_better=True, unit="points")
    assert (new.arrow, new.unit, new.label, new.headline) == ("↑", "points", "new", True)


def test_units_that_say_nothing_are_left_out():
    assert [metric_info(n, unit=u).unit for n, u in (("ppl", "ppl"), ("acc", "share"), ("new", "new"))] == [""] * 3
    assert metric_info("rms_dp", unit="%").unit == "%"


def test_a_filter_of_lm_eval_is_part_of_the_label():
    info = metric_info("exact_match,flexible-extract")
    assert (info.name, info.label, info.arrow) == (
        "exact_match,flexible-extract", "exact match flexible-extract", "↑",
    )  # fmt: skip


def test_lm_evals_metrics_have_the_directions_of_its_registry():
    registry = importlib.import_module("lm_eval.api.registry")
    importlib.import_module("lm_eval.api.metrics")
    known = {
        name: higher
        for name, higher in registry.HIGHER_IS_BETTER_REGISTRY.items()
        if metric_info(name).higher_is_better is not None
    }
    assert {"acc", "acc_norm", "exact_match", "f1", "brier_score", "word_perplexity"} <= known.keys()
    assert {name: metric_info(name).higher_is_better for name in known} == known


def test_what_n_counts():
    assert [items_of(each) for each in ("perplexity", "rolling", "zeroshot")] == ["windows", "documents", "items"]


def test_the_registry_is_a_leaf():
    script = "import sys, qbench.metrics; print(*({'torch', 'numpy', 'sqlalchemy'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_a_family_is_the_label_without_the_variant():
    names = ("input_kurtosis,q_proj", "exact_match,flexible-extract", "new,one", "ppl")
    assert [metric_info(name).family for name in names] == ["K inputs", "exact match", "new", "PPL"]
    assert metric_info("input_kurtosis,q_proj").label == "K inputs q_proj"
