"""HQQ against a loop over blocks in float64, its limits, and what its options do."""

from dataclasses import replace

import pytest
import torch

from qbench.engine.loop import Recipe
from qbench.engine.passes import run_pass
from qbench.engine.source import MemorySource
from qbench.errors import NumericsError, SpecError
from qbench.formats import SCALES, Block, Float, Int, Range, RangeFit, TensorFormat, fit, quantize, uniform
from qbench.formats.scheme import Scheme
from qbench.stages import round_hqq
from qbench.stages.base import BlockView
from qbench.stages.pipeline import build_pipeline
from qbench.stages.round_hqq import hqq, shrink
from qbench.structure.blocks import find_blocks
from qbench.structure.trace import BlockStructure, LinearGroup
from qbench.structure.weights import WeightRef
from tests.architectures import tiny_model
from tests.engine.helpers import decoded

INT3 = replace(uniform(bits=3, group_size=16, symmetric=False), zero="float")
FORMATS = {
    "int3 groups": INT3,
    "int2 groups": replace(INT3, element=Int(2, signed=False)),
    "int8 groups": replace(INT3, element=Int(8, signed=False)),
    "channels": replace(INT3, block=Block(1, 0)),
    "tensor": replace(INT3, block=Block(0, 0)),
    "short last group": replace(INT3, block=Block(1, 20), partial=True),
    "tiles": replace(INT3, block=Block(5, 20), partial=True),
    "power of two": replace(INT3, scale=SCALES["e8m0ceil"]),
    "percentile": replace(INT3, range=RangeFit(method="percentile", percentile=95.0)),
}
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


def _weight(rows=12, columns=64, seed=0, size=1.0):
    """Heavy tails, and blocks that are not centred: what a zero point can do something about."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) + torch.rand(rows, 1, generator=generator)
    return size * weight * torch.rand(rows, columns, generator=generator).pow(-0.3)


def _error(weight, quantized):
    return (quantized.dequantize() - weight).abs().double().mean().item()


def _slices(fmt, shape):
    height, width = fmt.block.rows or shape[0], fmt.block.columns or shape[1]
    for i in range(0, shape[0], height):
        for j in range(0, shape[1], width):
            yield (i // height, j // width), (slice(i, i + height), slice(j, j + width))


def _by_hand(weight, fmt, *, iterations=20, beta=10.0, kappa=1.01, p=0.7):
    """Zero points [rows, groups] from the authors' iteration, block by block, float64; the scale is the format's."""
    params = fit(weight, fmt)
    weight, scale, zero = weight.double(), params.scale.double(), params.zero.double()
    errors, zeros = [], []
    for _ in range(iterations + 1):
        total, following = 0.0, zero.clone()
        for at, where in _slices(fmt, weight.shape):
            w, s, z = weight[where], scale[at], zero[at]
            q = (w / s + z).round().clamp(0, 2**fmt.bits - 1)
            residual = w - s * (q - z)
            sparse = residual.sign() * (residual.abs() - residual.abs() ** (p - 1) / beta).clamp_min(0)
            following[at] = (q - (w - sparse) / s).mean()
            total += residual.abs().sum().item()
        if errors and total >= errors[-1]:
            break
        errors.append(total)
        zeros.append(zero)
        zero, beta = following.half().double(), beta * kappa
    return zeros[-1], errors


@every_format
@pytest.mark.parametrize("size", [0.05, 1.0, 20.0])
def test_zero_points_are_those_of_the_iteration_block_by_block(fmt, size):
    weight = _weight(size=size)
    found = hqq(weight, fmt)
    expected, errors = _by_hand(weight, fmt)
    assert len(errors) > 2 or size > 1
    assert torch.isclose(found.weight.zero.double(), expected, rtol=2e-3, atol=2e-3).double().mean() > 0.97
    assert _error(weight, found.weight) * weight.numel() == pytest.approx(errors[-1], rel=2e-3)
    assert found.gain == pytest.approx(errors[-1] / errors[0], rel=2e-3)
    assert torch.equal(found.weight.scale, fit(weight, fmt).scale)
    assert torch.equal(found.weight.zero, found.weight.zero.half().float())


@every_format
def test_no_iterations_are_round_to_nearest(fmt):
    weight = _weight()
    found = hqq(weight, fmt, iterations=0)
    assert found.weight.sha256() == quantize(weight, fmt).sha256()
    assert (found.gain, found.kept) == (1.0, 0.0)


@every_format
@pytest.mark.parametrize("seed", range(3))
def test_the_error_is_less_than_that_of_round_to_nearest_and_falls_with_the_iterations(fmt, seed):
    weight = _weight(seed=seed)
    errors = [_error(weight, hqq(weight, fmt, iterations=n).weight) for n in (0, 1, 2, 5, 20)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] or len(fmt.blocks(weight)) == 1  # one zero point may be right from the start


def test_the_mean_residual_of_a_block_ends_near_zero_where_nothing_is_shrunk():
    weight = _weight(size=0.05)
    found, nearest = hqq(weight, INT3, iterations=200).weight, quantize(weight, INT3)
    assert hqq(weight, INT3).kept == 0
    means = [INT3.blocks(q.dequantize() - weight).mean(-1).abs().mean() for q in (found, nearest)]
    assert means[0] < 0.1 * means[1]


def test_shrinking_is_the_proximal_point_at_p_1_and_the_written_formula_below():
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)
    grid = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
    objective = grid.abs()[:, None] + 5.0 / 2 * (grid[:, None] - x) ** 2
    assert torch.allclose(shrink(x, 5.0, 1.0), grid[objective.argmin(0)], atol=2e-4)
    for value in (-1.5, -0.2, 0.15, 0.8):
        magnitude = abs(value) - abs(value) ** (0.7 - 1) / 10
        expected = max(magnitude, 0.0) * (1 if value > 0 else -1)
        assert shrink(torch.tensor([value, 3.0]), 10.0, 0.7)[0].item() == pytest.approx(expected, rel=1e-5)
    assert shrink(torch.zeros(3), 10.0, 0.7).tolist() == [0, 0, 0]


@pytest.mark.parametrize("p", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("beta", [0.5, 10.0, 300.0])
def test_shrinking_leaves_something_exactly_beyond_its_threshold(p, beta):
    threshold = beta ** (-1 / (2 - p))
    x = threshold * torch.tensor([0.5, 0.999, 1.001, 2.0])
    assert (shrink(x, beta, p) != 0).tolist() == [False, False, True, True]
    assert not shrink(x[:2], beta, p).any()


def test_every_option_changes_the_result_where_residuals_exceed_the_threshold():
    weight = _weight(rows=40, size=3.0)
    default = hqq(weight, INT3)
    assert default.kept > 0.1
    for options in (
        {"iterations": 1},
        {"beta": 2.0},
        {"kappa": 1.5},
        {"p": 0.4},
        {"round_zero": True},
        {"clip": _shrunk(weight, 0.8)},
    ):
        assert hqq(weight, INT3, **options).weight.sha256() != default.weight.sha256(), options


def _shrunk(weight, share):
    blocks = INT3.blocks(weight)
    return Range(share * blocks.amin(-1), share * blocks.amax(-1))


def test_a_given_range_fixes_the_scale():
    weight = _weight()
    clip = _shrunk(weight, 0.8)
    found = hqq(weight, INT3, clip=clip)
    assert torch.equal(found.weight.scale, fit(weight, INT3, clip).scale)
    assert _error(weight, found.weight) <= _error(weight, quantize(weight, INT3, fit(weight, INT3, clip)))
    assert found.gain <= 1


def test_values_far_outside_a_given_range_leave_the_zero_point_finite():
    clip = Range(torch.full((2, 1), -1e-3), torch.full((2, 1), 1e-3))
    found = hqq(torch.full((2, 16), 1000.0), INT3, clip=clip).weight
    assert torch.isfinite(found.zero).all()
    assert torch.isfinite(found.dequantize()).all()


def test_the_stage_uses_the_range_of_an_earlier_one():
    model, _ = tiny_model("llama")
    block = find_blocks(model)[1][0]
    ref = WeightRef(
        name="mlp.up_proj.weight", parameter="mlp.up_proj.weight", out_features=48, in_features=32, transposed=False
    )
    group = LinearGroup(index=0, weights=(ref,), in_features=32, scopes=(), query_key_rows={})
    clip = _shrunk(ref.read(block), 0.7)
    view = BlockView(
        block=block,
        structure=BlockStructure(groups=(group,)),
        groups=(group,),
        formats={ref.name: INT3},
        ranges={ref.name: clip},
    )
    stage = build_pipeline([{"stage": "hqq", "beta": 3.0}]).stages[0]
    found = stage.apply(view).codes[ref.name]
    assert found.sha256() == hqq(ref.read(block), INT3, beta=3.0, clip=clip).weight.sha256()


@pytest.mark.parametrize(("choice", "rounds"), [("auto", True), (True, True), (False, False)])
def test_at_4_bits_the_zero_point_is_rounded_first_unless_told_otherwise(choice, rounds):
    model, _ = tiny_model("llama")
    block = find_blocks(model)[1][0]
    ref = WeightRef(name="mlp.up_proj.weight", parameter="mlp.up_proj.weight", out_features=48, in_features=32)
    group = LinearGroup(index=0, weights=(ref,), in_features=32, scopes=(), query_key_rows={})
    for fmt in (replace(INT3, element=Int(4, signed=False)), INT3):
        view = BlockView(
            block=block, structure=BlockStructure(groups=(group,)), groups=(group,), formats={ref.name: fmt}
        )
        stage = build_pipeline([{"stage": "hqq", "round_zero": choice}]).stages[0]
        expected = hqq(ref.read(block), fmt, round_zero=rounds and (fmt.bits == 4 or choice is True)).weight
        assert stage.apply(view).codes[ref.name].sha256() == expected.sha256()


def test_rounded_zero_points_are_where_it_starts():
    weight = _weight()
    params = fit(weight, INT3)
    start = quantize(weight, INT3, replace(params, zero=params.zero.round()))
    found = hqq(weight, INT3, iterations=0, round_zero=True)
    assert found.weight.sha256() == start.sha256()
    assert found.gain == pytest.approx(_error(weight, start) / _error(weight, quantize(weight, INT3)), rel=1e-5)
    assert found.gain > 1


@every_format
def test_rows_are_swept_in_parts_without_a_trace(fmt, monkeypatch):
    weight = _weight(rows=13)
    whole = hqq(weight, fmt)
    monkeypatch.setattr(round_hqq, "ROWS", 4)
    parts = hqq(weight, fmt)
    assert parts.weight.sha256() == whole.weight.sha256()
    assert parts.gain == pytest.approx(whole.gain, rel=1e-9)
    assert parts.kept == pytest.approx(whole.kept)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(3, 32),
        torch.full((3, 32), 0.7),
        torch.full((2, 32), 1000.0) + torch.arange(32) * 1e-3,
        torch.randn(1, 16, generator=torch.Generator().manual_seed(0)),
        torch.cat([torch.zeros(1, 32), torch.randn(1, 32, generator=torch.Generator().manual_seed(0))]),
        1e-7 * torch.randn(2, 32, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["zeros", "constant", "far from zero", "one group", "a row of zeros", "tiny"],
)
def test_extreme_blocks_stay_finite_and_no_worse_than_round_to_nearest(weight):
    found = hqq(weight, INT3)
    assert torch.isfinite(found.weight.dequantize()).all()
    assert _error(weight, found.weight) <= _error(weight, quantize(weight, INT3))
    assert bool((found.weight.dequantize()[(weight == 0).all(1)] == 0).all())


def test_weights_that_are_not_finite_are_refused():
    weight = _weight()
    weight[0, 0] = float("nan")
    with pytest.raises(NumericsError):
        hqq(weight, INT3)


def test_the_weight_is_left_alone_and_the_result_repeats():
    weight = _weight()
    before = weight.clone()
    assert hqq(weight, INT3).weight.sha256() == hqq(weight, INT3).weight.sha256()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_stage_quantizes_every_weight_by_itself_without_data(name, dtype):
    model, _ = tiny_model(name, dtype=dtype)
    pipeline = build_pipeline([{"stage": "hqq", "iterations": 7, "p": 0.5}])
    assert not pipeline.needs_data
    fmt = replace(INT3, block=Block(1, 8))
    result = run_pass(MemorySource(model), Recipe(pipeline, Scheme(weight=fmt)), None)
    values = decoded(model, result.weights)
    checked = 0
    prefix, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        for path, parameter in block.named_parameters():
            changed = values[f"{prefix}.{index}.{path}"]
            if parameter.ndim != 2 or torch.equal(changed, parameter):
                continue  # a norm, a router; experts are slices
            stored = parameter.t() if name == "gpt2" else parameter
            expected = hqq(stored.float(), fmt, iterations=7, p=0.5).weight.dequantize()
            assert torch.equal(changed.t() if name == "gpt2" else changed, expected.to(dtype)), path
            checked += 1
    assert checked >= 2 * 4
    metrics = {name: value for *_, name, value in result.ledger.metrics}
    assert {"hqq_error_vs_rtn", "hqq_kept"} <= metrics.keys()


REFUSED = [
    ({"iterations": -1}, "algo.iterations=-1"),
    ({"beta": 0.0}, "algo.beta=0.0"),
    ({"beta": float("inf")}, "algo.beta=inf"),
    ({"kappa": 0.9}, "algo.kappa=0.9"),
    ({"p": 0.0}, "algo.p=0.0"),
    ({"p": 1.1}, "algo.p=1.1"),
    ({"p": float("nan")}, "algo.p=nan"),
]


@pytest.mark.parametrize(("options", "expected"), REFUSED)
def test_options_out_of_range_are_refused(options, expected):
    with pytest.raises(SpecError) as refused:
        build_pipeline([{"stage": "hqq", **options}]).check(frozenset({INT3}))
    assert str(refused.value).startswith(expected)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("fmt", "refusal"),
    [
        (uniform(bits=4, group_size=16, symmetric=False), "^zero_point=int: float, with symmetric=false"),
        (uniform(bits=4, group_size=16, symmetric=True), "^zero_point=none: float, with symmetric=false"),
        (TensorFormat(element=Float(2, 1), block=Block(1, 16)), "^format=e2m1: int, of 2 to 8 bits"),
    ],
)
def test_formats_without_a_float_zero_point_are_refused(fmt, refusal):
    pipeline = build_pipeline([{"stage": "hqq"}])
    pipeline.check(frozenset({INT3}))
    with pytest.raises(SpecError, match=refusal):
        pipeline.check(frozenset({INT3, fmt}))
