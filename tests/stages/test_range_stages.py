"""Ranges as pipeline steps are those of the formats, bit for bit."""

from dataclasses import replace

import pytest
import torch

from qbench.calibration.statistics import Hessian
from qbench.errors import SpecError
from qbench.formats import RangeFit, quantize, uniform
from qbench.formats.named import COMPOSITE
from qbench.formats.scale import PowerOfTwo
from qbench.stages.gptq_core import gptq
from qbench.stages.pipeline import build_pipeline
from tests.stages.test_every_format import FORMATS
from tests.stages.test_stages import _view

STEPS = {
    "mse_clip": ({}, RangeFit(method="mse")),
    "mse_clip coarse": (
        {"norm": 2.0, "grid": 20, "max_shrink": 0.5},
        RangeFit(method="mse", norm=2.0, grid=20, max_shrink=0.5),
    ),
    "percentile_clip": ({}, RangeFit(method="percentile")),
    "percentile_clip tight": ({"percentile": 90.0}, RangeFit(method="percentile", percentile=90.0)),
}
every_step = pytest.mark.parametrize(
    ("step", "options", "how"), [(k.split()[0], *v) for k, v in STEPS.items()], ids=STEPS
)


def _stages(step, options, rounding="rtn"):
    return build_pipeline([{"stage": step, **options}, {"stage": rounding}])


@every_step
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_rounding_on_its_ranges_is_rounding_with_the_formats_own_method(step, options, how, fmt):
    pipeline = _stages(step, options)
    fixed = fmt.name is not None and isinstance(fmt.scale, PowerOfTwo)
    if fmt.range.method != "minmax" or fixed or (fmt.zero == "float" and step == "mse_clip"):
        with pytest.raises(SpecError, match=r"^(range\.method|format|zero_point)=") as refused:
            pipeline.check(frozenset({fmt}))
        assert "\n" not in str(refused.value)
        return
    pipeline.check(frozenset({fmt}))
    view = _view()
    view = replace(view, formats=dict.fromkeys(view.formats, replace(fmt, partial=True)))
    ranges = pipeline.stages[0].apply(view).ranges
    assert ranges.keys() == view.formats.keys()
    codes = pipeline.stages[1].apply(replace(view, ranges=ranges)).codes
    for group in view.groups:
        for ref in group.weights:
            expected = quantize(view.weight(ref).float(), replace(fmt, partial=True, range=how))
            assert torch.equal(codes[ref.name].codes, expected.codes)
            assert torch.equal(codes[ref.name].scale, expected.scale)
            assert torch.equal(codes[ref.name].dequantize(), expected.dequantize())


@every_step
def test_gptq_takes_them_over(step, options, how):
    view = _view()
    ranges = _stages(step, options, "gptq").stages[0].apply(view).ranges
    ref = view.groups[1].weights[0]
    fmt, hessian = view.format(ref), view.statistics[view.groups[1].index][Hessian].value()
    found = gptq(view.weight(ref), hessian, fmt, clip=ranges[ref.name]).weight
    expected = gptq(view.weight(ref), hessian, replace(fmt, range=how), scale_source="original").weight
    assert found.sha256() == expected.sha256()


INT4 = uniform(bits=4, group_size=8, symmetric=False)


@pytest.mark.parametrize(
    ("step", "options", "option"),
    [
        ("mse_clip", {"norm": 0.0}, "norm"),
        ("mse_clip", {"norm": float("nan")}, "norm"),
        ("mse_clip", {"grid": 1}, "grid"),
        ("mse_clip", {"max_shrink": 0.0}, "max_shrink"),
        ("mse_clip", {"max_shrink": 1.1}, "max_shrink"),
        ("mse_clip", {"grid": 10, "max_shrink": 0.1}, "max_shrink"),
        ("percentile_clip", {"percentile": 50.0}, "percentile"),
        ("percentile_clip", {"percentile": 100.5}, "percentile"),
    ],
)
def test_values_that_make_no_sense_are_refused(step, options, option):
    with pytest.raises(SpecError, match=rf"^algo\.{option}="):
        _stages(step, options).check(frozenset({INT4}))


def test_the_smallest_search_that_is_allowed_can_still_choose():
    view = _view()
    found = _stages("mse_clip", {"grid": 2, "max_shrink": 1.0, "norm": 0.2}).stages[0].apply(view).ranges
    whole = _stages("percentile_clip", {"percentile": 100.0}).stages[0].apply(view).ranges
    assert any(not torch.equal(found[name].upper, whole[name].upper) for name in found)


def test_formats_that_a_standard_fixes_are_named():
    with pytest.raises(SpecError, match=r"^format=mxfp4: one whose standard does not fix its scales"):
        _stages("percentile_clip", {}).check(frozenset({COMPOSITE["mxfp4"]}))
