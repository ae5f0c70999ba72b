"""Every algorithm with every weight format: identity limits, block-size invariance, gains, or a refusal and why."""

from dataclasses import replace

import pytest
import torch

from qbench.errors import SpecError
from qbench.formats import SCALES, Block, Float, Int, RangeFit, TensorFormat, quantize, uniform
from qbench.formats.named import COMPOSITE, TERNARY
from qbench.stages.gptq_core import gptq
from qbench.stages.pipeline import build_pipeline
from qbench.stages.range_awq_clip import awq_clip

ROWS, COLUMNS = 24, 256
INT3 = uniform(bits=3, group_size=32, symmetric=False)
FORMATS = {
    **COMPOSITE,
    "int3": INT3,
    "int3 per tensor": uniform(bits=3, group_size=0, symmetric=True),
    "int3 narrow": TensorFormat(element=Int(3, signed=True, reach="narrow"), block=Block(1, 32)),
    "int3 full": TensorFormat(element=Int(3, signed=True, reach="full"), block=Block(1, 32)),
    "int3 float zero": replace(INT3, zero="float"),
    "int3 power of two": replace(INT3, scale=SCALES["e8m0ceil"]),
    "int3 e4m3": replace(INT3, scale=SCALES["e4m3"]),
    "int3 mse": replace(INT3, range=RangeFit(method="mse", grid=20)),
    "int3 percentile": replace(INT3, range=RangeFit(method="percentile", percentile=95)),
    "int3 tiles": replace(INT3, block=Block(7, 32), partial=True),
    "e2m1 tiles": TensorFormat(element=Float(2, 1), block=Block(16, 24), partial=True),
    "e3m2 rows": TensorFormat(element=Float(3, 2), block=Block(1, 0)),
    "ternary groups": TensorFormat(element=TERNARY, block=Block(1, 32), range=RangeFit(method="absmean")),
}
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


def _weight(seed=0):
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.1


def _hessian(seed=1):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLUMNS, 40, generator=generator)
    x = torch.randn(2000, 40, generator=generator) @ mixing.t() + torch.randn(2000, COLUMNS, generator=generator)
    return (x.t() @ x / len(x)).float()


def _options(fmt):
    return {"scale_source": "original"} if fmt.scale.whole else {}


@every_format
def test_gptq_with_uncorrelated_inputs_is_rounding_to_nearest(fmt):
    weight = _weight()
    found = gptq(weight, torch.eye(COLUMNS), fmt, damp=0.0, **_options(fmt)).weight
    expected = quantize(weight, fmt)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.dequantize(), expected.dequantize())
    assert found.storage_bits() == expected.storage_bits()
    for name in ("scale", "zero", "scale_codes", "outer"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        assert one is None or torch.equal(one, other), name


@every_format
def test_gptq_does_not_depend_on_its_block_size(fmt):
    weight, hessian = _weight(), _hessian()
    results = [gptq(weight, hessian, fmt, block_size=size, **_options(fmt)) for size in (7, 32, 256)]
    for other in results[1:]:
        same = torch.isclose(other.weight.dequantize(), results[0].weight.dequantize(), rtol=1e-4, atol=1e-6)
        assert same.float().mean() > 0.97  # a tie decided by the order of a sum spoils the rest of its row
        assert other.loss == pytest.approx(results[0].loss, rel=0.02)


@every_format
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_loses_less_output_than_rounding_to_nearest(fmt, act_order):
    weight, hessian = _weight(), _hessian()

    def error(values):
        delta = values - weight
        return (delta @ hessian * delta).sum().item()

    found = gptq(weight, hessian, fmt, act_order=act_order, **_options(fmt)).weight
    assert error(found.dequantize()) < 0.8 * error(quantize(weight, fmt).dequantize())


@every_format
def test_clipping_never_loses_output_and_decides_block_by_block(fmt):
    stage = build_pipeline([{"stage": "awq_clip"}, {"stage": "rtn"}]).stages[0]
    if fmt.zero == "float" or fmt.scale.whole or fmt.range.method != "minmax":
        with pytest.raises(SpecError, match=r"awq_clip|stored independently"):
            stage.check(frozenset({fmt}))
        return
    stage.check(frozenset({fmt}))
    weight, hessian = _weight(), _hessian()
    weight[:, ::50] *= 8  # worth clipping
    found = awq_clip(weight, hessian, fmt)
    assert found.upper.shape == fmt.grid((ROWS, COLUMNS))

    def error(params_of):
        from qbench.formats import fit

        delta = quantize(weight, fmt, fit(weight, fmt, params_of)).dequantize() - weight
        blocks, width = fmt.blocks(delta), fmt.width(COLUMNS)
        total = 0.0
        for row in range(ROWS):  # Δ H Δ of each group apart: the definition, row by row
            for start in range(0, COLUMNS, width):
                part = delta[row, start : start + width]
                total += (part @ hessian[start : start + width, start : start + width] @ part).item()
        assert blocks.shape[:2] == found.upper.shape
        return total

    assert error(found) <= error(None) * (1 + 1e-5)


def test_double_quantized_scales_need_an_original_weight():
    stage = build_pipeline([{"stage": "gptq"}]).stages[0]
    with pytest.raises(SpecError, match=r"algo.scale_source=compensated: original.*nf4dq.*together"):
        stage.check(frozenset({COMPOSITE["nf4dq"]}))
    for options in ({"scale_source": "original"}, {"static_groups": True}):
        build_pipeline([{"stage": "gptq", **options}]).stages[0].check(frozenset({COMPOSITE["nf4dq"]}))


def test_what_scales_share_is_the_original_weights():
    """NVFP4's tensor scale must not follow the compensation, or earlier groups would have used another one."""
    weight = _weight()
    found = gptq(weight, _hessian(), COMPOSITE["nvfp4"]).weight
    assert torch.equal(found.outer, quantize(weight, COMPOSITE["nvfp4"]).outer)
    assert not torch.equal(found.scale_codes, quantize(weight, COMPOSITE["nvfp4"]).scale_codes)
