"""What rounding did to a layer, as numbers: against their definitions."""

import math

import pytest
import scipy.stats
import torch
from torch import nn

from qbench.calibration.statistics import Hessian
from qbench.engine.layer_metrics import EXACT_DB, clip_ratio, layer_metrics
from qbench.formats import Range, fit, quantize, uniform
from qbench.stages.base import Outcome
from qbench.structure.trace import LinearGroup
from qbench.structure.weights import WeightRef

W3 = uniform(bits=3, group_size=8, symmetric=False, scale="float32")


def _linear(weight):
    block = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    block[0].weight.data.copy_(weight)
    ref = WeightRef(name="0.weight", parameter="0.weight", out_features=weight.shape[0], in_features=weight.shape[1])
    return block, LinearGroup(index=0, weights=(ref,), in_features=weight.shape[1], scopes=(), query_key_rows={})


def _metrics(weight, codes, statistics=None, seconds=2.0):
    block, group = _linear(weight)
    found = layer_metrics(block, (group,), Outcome(codes={"0.weight": codes}), statistics or {}, seconds)
    assert {module for module, _, _ in found} == {"0.weight"}
    return {name: value for _, name, value in found}


def test_errors_are_what_they_are_called():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(5, 16, generator=generator), torch.randn(40, 16, generator=generator)
    hessian = Hessian(16, torch.device("cpu"))
    hessian.update(x)
    codes = quantize(weight, W3)
    found = _metrics(weight, codes, {0: {Hessian: hessian}})
    delta = codes.dequantize() - weight
    assert found["weight_error"] == pytest.approx((delta.norm() ** 2 / weight.norm() ** 2).item(), rel=1e-5)
    assert found["sqnr_db"] == pytest.approx(20 * math.log10(weight.norm() / delta.norm()), rel=1e-5)
    assert found["output_error"] == pytest.approx(
        ((x @ delta.T).norm() ** 2 / (x @ weight.T).norm() ** 2).item(), rel=1e-4
    )
    kurtosis = scipy.stats.kurtosis(weight.double().numpy(), axis=None, fisher=False)
    assert found["weight_kurtosis"] == pytest.approx(kurtosis, rel=1e-5)
    before, after = x @ weight.T, x @ codes.dequantize().T
    cosine = torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), dim=0).item()
    assert found["output_cosine"] == pytest.approx(cosine, abs=1e-5)
    assert found["output_cosine"] < 0.999
    assert found["solve_s"] == 2.0
    assert not {"output_error", "output_cosine"} & _metrics(weight, codes).keys()


def test_a_weight_that_its_format_holds_has_the_largest_sqnr():
    weight = torch.arange(16.0).view(2, 8) % 8
    found = _metrics(weight, quantize(weight, W3))
    assert found["weight_error"] == 0
    assert found["sqnr_db"] == EXACT_DB
    zero = torch.zeros(2, 8)
    assert _metrics(zero, quantize(zero, W3))["sqnr_db"] == EXACT_DB
    assert "weight_kurtosis" not in _metrics(zero, quantize(zero, W3))
    hessian = Hessian(8, torch.device("cpu"))
    hessian.update(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)))
    for exact in (weight, zero):
        found = _metrics(exact, quantize(exact, W3), {0: {Hessian: hessian}})
        assert (found["output_error"], found["output_cosine"]) == (0, pytest.approx(1, abs=1e-6))


def test_clip_ratio_is_the_share_of_the_range_that_codes_cover():
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    assert clip_ratio(weight, quantize(weight, W3)) == pytest.approx(1, abs=1e-6)
    lower, upper = W3.blocks(weight).amin(-1).clamp_max(0), W3.blocks(weight).amax(-1).clamp_min(0)
    half = quantize(weight, W3, fit(weight, W3, Range(0.5 * lower, 0.5 * upper)))
    assert clip_ratio(weight, half) == pytest.approx(0.5, rel=1e-5)
    mixed = torch.where(torch.arange(6)[:, None] < 3, 0.5, 1.0)
    assert clip_ratio(
        weight, quantize(weight, W3, fit(weight, W3, Range(mixed * lower, mixed * upper)))
    ) == pytest.approx(0.75, rel=1e-5)
    assert clip_ratio(torch.zeros(2, 8), quantize(torch.zeros(2, 8), W3)) == 1


def test_seconds_are_shared_out_by_size():
    generator = torch.Generator().manual_seed(0)
    block = nn.ModuleDict({"a": nn.Linear(8, 6, bias=False), "b": nn.Linear(8, 2, bias=False)})
    refs = tuple(
        WeightRef(name=f"{n}.weight", parameter=f"{n}.weight", out_features=m.out_features, in_features=8)
        for n, m in block.items()
    )
    group = LinearGroup(index=0, weights=refs, in_features=8, scopes=(), query_key_rows={})
    codes = {ref.name: quantize(torch.randn(ref.out_features, 8, generator=generator), W3) for ref in refs}
    found = layer_metrics(block, (group,), Outcome(codes=codes), {}, 4.0)
    assert [value for _, name, value in found if name == "solve_s"] == [3.0, 1.0]
