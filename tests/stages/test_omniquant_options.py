"""OmniQuant: every option counts or is refused, before a model loads where that is possible."""

import math
from dataclasses import replace

import pytest
import torch

from qbench.calibration.extremes import Extremes
from qbench.errors import NumericsError, SpecError, StructureError
from qbench.formats import uniform
from qbench.formats.scheme import CacheFormat, Scheme
from qbench.stages.pipeline import build_pipeline
from qbench.stages.range_omniquant import OmniQuant
from tests.stages.learning import A4, BOTH, W2, W4, WEIGHT_ONLY, learning_view


def test_numbers_that_are_not_finite_are_errors_that_name_block_and_step():
    view = learning_view()
    broken = tuple(torch.full_like(chunk, torch.nan) for chunk in view.data.targets)
    with pytest.raises(NumericsError, match=r"^block 0, omniquant: the loss is nan at step 0 of 80; a lower"):
        OmniQuant().apply(replace(view, data=replace(view.data, targets=broken)))
    with pytest.raises(NumericsError, match=r"^block 0, omniquant, step \d+ of 80: scale is not finite in float16"):
        OmniQuant(let=True, let_lr=1e6).apply(view)
    view.statistics[0][Extremes].ends[0, 3] = -math.inf
    with pytest.raises(NumericsError, match=r"block 0, self_attn\.q_proj\.weight: input of the layer is not finite"):
        OmniQuant(let=True).apply(view)


def test_a_block_without_folds_is_refused_only_where_let_was_asked_for():
    view = learning_view("llama", BOTH)
    bare = replace(view, structure=replace(view.structure, folds=()))
    assert not OmniQuant(epochs=0).apply(bare).parameters
    for options in ({"let": True}, {"lwc": False}):
        with pytest.raises(StructureError, match=r"^block 0: omniquant has no fold for algo\.let=true"):
            OmniQuant(epochs=0, **options).apply(bare)


CHANGED = {
    "lwc": False,
    "let": False,
    "epochs": 3,
    "batch_size": 2,
    "lwc_lr": 0.05,
    "let_lr": 0.05,
    "weight_decay": 0.1,
    "lwc_init": 2.0,
    "let_init": "identity",
    "alpha": 0.7,
    "shift": False,
    "grouped_heads": True,
    "aug_loss": True,
    "keep_best": False,
    "autocast": True,
}


def test_every_option_changes_the_result():
    assert CHANGED.keys() == OmniQuant.options().keys()
    base = {"epochs": 2, "lwc_lr": 0.5, "let_lr": 0.3, "keep_best": False}

    def learned(name, **options):
        outcome = OmniQuant(**base | options).apply(learning_view(name, BOTH, batch=2, length=6))
        return [outcome.ranges[n].upper for n in sorted(outcome.ranges)] + list(outcome.parameters.values())

    plain = {name: learned(name) for name in ("opt", "llama")}
    for option, value in (CHANGED | {"keep_best": True}).items():
        name = "opt" if option == "shift" else "llama"
        changed = learned(name, **{option: value})
        pairs = zip(plain[name], changed, strict=False)
        assert len(changed) != len(plain[name]) or not all(torch.equal(a, b) for a, b in pairs), option


REFUSED = [
    ({"epochs": -1}, WEIGHT_ONLY, "epochs"),
    ({"lwc_lr": -1.0}, WEIGHT_ONLY, "lwc_lr"),
    ({"let_lr": math.inf}, BOTH, "let_lr"),
    ({"weight_decay": -1.0}, WEIGHT_ONLY, "weight_decay"),
    ({"batch_size": 0}, WEIGHT_ONLY, "batch_size"),
    ({"alpha": 1.5}, BOTH, "alpha"),
    ({"lwc_init": math.inf}, WEIGHT_ONLY, "lwc_init"),
    ({"lwc": False, "let": False}, BOTH, "lwc"),
    ({"lwc": False}, WEIGHT_ONLY, "lwc"),
    ({"lwc": False, "lwc_lr": 0.1}, BOTH, "lwc_lr"),
    ({"lwc": False, "lwc_init": 2.0}, BOTH, "lwc_init"),
    ({"let_init": "identity", "alpha": 0.7}, BOTH, "alpha"),
    *[
        ({option: CHANGED[option]} | extra, scheme, option)
        for option in ("let_lr", "let_init", "alpha", "shift", "grouped_heads")
        for extra, scheme in (({}, WEIGHT_ONLY), ({"let": False}, BOTH))
    ],
    ({}, Scheme(weight=uniform(4, -1, False, scale="e8m0")), "format"),
    ({}, Scheme(weight=replace(W2, zero="float")), "zero_point"),
    ({}, Scheme(weight=W4, input=replace(A4, static=True)), "act.mode"),
    ({"let": True}, Scheme(weight=W4, cache=CacheFormat(key=W4, value=W4, static=True)), "kv.mode"),
]


@pytest.mark.parametrize(("options", "scheme", "option"), REFUSED, ids=str)
def test_what_means_nothing_is_refused_before_a_model_loads(options, scheme, option):
    pipeline = build_pipeline([{"stage": "omniquant", **options}, {"stage": "rtn"}])
    with pytest.raises(SpecError) as caught:
        pipeline.check(scheme.weights, scheme)
    assert str(caught.value).startswith(("algo." if option in CHANGED else "") + f"{option}=")
    assert "\n" not in str(caught.value)


def test_what_means_something_is_accepted():
    for options, scheme in [
        ({"let": False}, Scheme(weight=W4, input=replace(A4, static=True))),
        ({"let": True, "alpha": 0.7, "grouped_heads": True}, WEIGHT_ONLY),
        ({"lwc": False}, BOTH),
        ({"lwc_lr": 0.0, "epochs": 0}, WEIGHT_ONLY),
    ]:
        build_pipeline([{"stage": "omniquant", **options}, {"stage": "rtn"}]).check(scheme.weights, scheme)


def test_folds_are_asked_for_only_where_scales_may_be_learned():
    assert build_pipeline([{"stage": "omniquant"}, {"stage": "rtn"}]).transforms
    assert not build_pipeline([{"stage": "omniquant", "let": False}, {"stage": "rtn"}]).transforms
