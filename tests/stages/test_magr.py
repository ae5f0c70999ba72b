"""MagR: its proximal step against a sort, its objective, its limits, and its place in a pipeline."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from qbench.calibration.statistics import Hessian
from qbench.engine.loop import Recipe
from qbench.engine.passes import run_pass
from qbench.engine.source import MemorySource
from qbench.errors import NumericsError, SpecError
from qbench.formats import Block, Float, RangeFit, TensorFormat, fake_quantize, uniform
from qbench.formats.named import COMPOSITE
from qbench.formats.scheme import Override, Scheme
from qbench.stages.base import BlockView, Kind
from qbench.stages.pipeline import build_pipeline
from qbench.stages.protect_magr import PER_CHANNEL, PER_GROUP, Magr, magr, prox_max
from qbench.structure.blocks import find_blocks
from tests.architectures import tiny_model, tokens
from tests.engine.helpers import structure_of
from tests.stages.references import correlated_inputs, output_error, second_moment

GROUPS = uniform(bits=3, group_size=8, symmetric=False)
ROWS = uniform(bits=3, group_size=-1, symmetric=False)
MSE = replace(ROWS, range=RangeFit(method="mse"))
FORMATS = {
    "groups": GROUPS,
    "rows": ROWS,
    "tensor": uniform(bits=3, group_size=0, symmetric=True),
    "short last group": uniform(bits=3, group_size=20, symmetric=False, partial=True),
    "tiles": TensorFormat(element=Float(2, 1), block=Block(5, 12), partial=True),
}
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


# ------------------------------------------------------------------ the proximal step


def _by_sorting(v, alpha):
    """v less its projection onto the l1 ball of radius alpha (METHODS 2.12), one vector, float64."""
    scaled = v.abs() / alpha
    if scaled.sum() <= 1:
        return torch.zeros_like(v)
    ordered, _ = scaled.sort(descending=True)
    sums = ordered.cumsum(0)
    rho = max(k for k in range(1, len(v) + 1) if ordered[k - 1] > (sums[k - 1] - 1) / k)
    theta = (sums[rho - 1] - 1) / rho
    return v - alpha * v.sign() * (scaled - theta).clamp_min(0)


@pytest.mark.parametrize("alpha", [1e-4, 0.01, 0.3, 3.0, 50.0])
@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_the_proximal_step_is_what_sorting_gives(alpha, n):
    values = torch.randn(40, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    values[0] = 0.0
    values[1] = values[1, 0]  # ties everywhere
    values[2, n // 2] = -100.0
    found = prox_max(values, alpha)
    expected = torch.stack([_by_sorting(v, alpha) for v in values])
    assert torch.allclose(found, expected, atol=1e-12)
    assert torch.allclose(prox_max(values.float().view(5, 8, n), alpha).view(40, n).double(), expected, atol=2e-5)


def test_the_proximal_step_is_a_minimum():
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(6, dtype=torch.float64, generator=generator)

    def objective(u):
        return (u - v).square().sum(-1) / 2 + 0.4 * u.abs().amax(-1)

    best = prox_max(v, 0.4)
    others = (
        best + torch.randn(5000, 6, dtype=torch.float64, generator=generator) * torch.logspace(-4, 0, 5000)[:, None]
    )
    assert objective(others).min() >= objective(best)


def test_the_proximal_step_leaves_its_argument_alone_and_vanishing_penalties_change_nothing():
    values = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    before = values.clone()
    assert torch.equal(prox_max(values, 0.0), values)
    assert torch.equal(prox_max(values, 1e-12), values)  # below the precision of the maximum
    prox_max(values, 0.5)
    assert torch.equal(values, before)


# ------------------------------------------------------------------ the core


def _case(rows=10, columns=48, tokens=200, rank=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = 0.1 * torch.randn(rows, columns, generator=generator)
    weight[:, 5] *= 6
    x = correlated_inputs(tokens, columns, seed)
    if rank is not None:
        left, values, right = torch.linalg.svd(x, full_matrices=False)
        x = left[:, :rank] * values[:rank] @ right[:rank]
    return weight, second_moment(x)


def _slices(fmt, shape):
    height, width = fmt.block.rows or shape[0], fmt.block.columns or shape[1]
    return [
        (slice(i, i + height), slice(j, j + width))
        for i in range(0, shape[0], height)
        for j in range(0, shape[1], width)
    ]


def _objective(found, weight, hessian, fmt, alpha):
    delta, h = (found - weight).double(), hessian.double()
    quadratic = (delta @ h * delta).sum() / torch.linalg.eigvalsh(h)[-1] / 2
    return (quadratic + alpha * sum(found[where].abs().max().double() for where in _slices(fmt, weight.shape))).item()


@every_format
@pytest.mark.parametrize("alpha", [1e-4, 1e-2])
def test_iterates_are_those_of_a_literal_loop_with_sorting(fmt, alpha):
    weight, hessian = _case()
    w, metric = weight.double(), hessian.double() / torch.linalg.eigvalsh(hessian.double())[-1]
    u = w
    for _ in range(30):
        v = u - (u - w) @ metric
        u = torch.empty_like(w)
        for where in _slices(fmt, w.shape):
            u[where] = _by_sorting(v[where].flatten(), alpha).view(v[where].shape)
    assert (u - w).abs().max() > alpha / 10
    assert torch.allclose(magr(weight, hessian, fmt, alpha=alpha, iterations=30).double(), u, atol=1e-5)


@every_format
def test_the_objective_never_rises_and_maxima_end_no_larger(fmt):
    weight, hessian = _case()
    alpha = 3e-3
    found = [magr(weight, hessian, fmt, alpha=alpha, iterations=n) for n in (0, 1, 2, 3, 5, 10, 50, 200)]
    objectives = [_objective(u, weight, hessian, fmt, alpha) for u in found]
    assert all(later <= earlier + 1e-7 for earlier, later in pairwise(objectives))
    assert objectives[-1] < objectives[0]
    if not fmt.block.columns:  # else blocks of a row are traded against each other
        for where in _slices(fmt, weight.shape):
            assert found[-1][where].abs().max() <= weight[where].abs().max() * (1 + 1e-5)
    assert fmt.blocks(found[-1]).abs().amax(-1).sum() < 0.97 * fmt.blocks(weight).abs().amax(-1).sum()


def test_it_converges_to_the_minimum():
    """The problem is convex: where no step in any of many directions helps, it is solved."""
    weight, hessian = _case(rows=2, columns=12)
    best = magr(weight.double(), hessian.double(), ROWS, alpha=0.01, iterations=10_000)
    bottom = _objective(best, weight, hessian, ROWS, 0.01)
    generator = torch.Generator().manual_seed(0)
    for size in torch.logspace(-5, -1, 400):
        other = best + size * torch.randn(best.shape, dtype=torch.float64, generator=generator)
        assert _objective(other, weight, hessian, ROWS, 0.01) >= bottom


@every_format
def test_without_a_penalty_iterations_or_inputs_the_weight_stays(fmt):
    weight, hessian = _case()
    assert torch.equal(magr(weight, hessian, fmt, alpha=0.0), weight)
    assert torch.equal(magr(weight, hessian, fmt, alpha=1e-2, iterations=0), weight)
    assert torch.equal(magr(weight, torch.zeros_like(hessian), fmt, alpha=1e-2), weight)


def test_the_overall_size_of_the_inputs_does_not_matter():
    weight, hessian = _case()
    one, other = (magr(weight, factor * hessian, ROWS, alpha=1e-2) for factor in (1.0, 1e4))
    assert torch.allclose(one, other, atol=1e-5)


def test_inputs_of_low_rank_leave_room_to_reduce_magnitudes_at_no_cost():
    weight, hessian = _case(rank=8)
    found = magr(weight, hessian, ROWS, alpha=1e-3, iterations=2000)
    assert found.abs().amax(1).sum() < 0.5 * weight.abs().amax(1).sum()
    assert output_error(weight, found, hessian) < 0.01 * output_error(torch.zeros_like(weight), weight, hessian)


def test_columns_without_input_are_clipped_for_free():
    weight, hessian = _case()
    hessian[5], hessian[:, 5] = 0, 0
    found = magr(weight, hessian, ROWS, alpha=1e-3, iterations=2000)
    others = torch.cat([found[:, :5], found[:, 6:]], 1).abs().amax(1)
    assert (found[:, 5].abs() <= others * (1 + 1e-5) + 1e-6).all()
    assert torch.isfinite(found).all()


def test_rounding_of_the_reduced_weight_loses_less_output():
    """At two bits per row, where the maxima decide; with correlated inputs, which is what the method exploits."""
    fmt = uniform(bits=2, group_size=-1, symmetric=False)
    plain, after = 0.0, 0.0
    for seed in range(4):
        weight, hessian = _case(rows=40, rank=16, seed=seed)
        plain += output_error(weight, fake_quantize(weight, fmt), hessian)
        after += output_error(weight, fake_quantize(magr(weight, hessian, fmt, alpha=1e-3), fmt), hessian)
    assert after < 0.9 * plain


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_zeros_and_single_rows_are_fine(rows):
    weight, hessian = _case(rows=rows)
    weight[0] = 0
    found = magr(weight, hessian, GROUPS, alpha=1e-2)
    assert not found[0].any()
    assert torch.isfinite(found).all()


# ------------------------------------------------------------------ the stage


@torch.no_grad()
def _view(name="llama", fmt=GROUPS, dtype=torch.float32):
    model, config = tiny_model(name, dtype=dtype)
    structure = structure_of(model, tokens(config, batch=4, length=16))
    statistics = {}
    for group in structure.groups:
        statistic = Hessian(group.in_features, torch.device("cpu"))
        statistic.update(correlated_inputs(100, group.in_features, group.index))
        statistics[group.index] = {Hessian: statistic}
    return BlockView(
        block=find_blocks(model)[1][0],
        structure=structure,
        groups=structure.groups,
        formats={ref.name: fmt for group in structure.groups for ref in group.weights},
        statistics=statistics,
        where="block 0",
    )


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "mixtral"])
@pytest.mark.parametrize(("fmt", "alpha"), [(GROUPS, 0.02), (ROWS, 0.05)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_is_reduced_by_itself_and_nothing_else_changes(name, fmt, alpha, dtype):
    view = _view(name, fmt, dtype)
    outcome = Magr(alpha=0.05, alpha_group=0.02, iterations=5).apply(view)
    refs = {ref: group for group in view.groups for ref in group.weights}
    assert outcome.parameters.keys() == {ref.parameter for ref in refs}
    metrics = {(module, metric): value for module, metric, value in outcome.metrics}
    for ref, group in refs.items():
        weight, hessian = view.weight(ref).float(), view.statistics[group.index][Hessian].value()
        expected = magr(weight, hessian, fmt, alpha=alpha, iterations=5)
        assert torch.equal(ref.of(outcome.parameters[ref.parameter]), expected.to(dtype)), ref.name
        ratio = fmt.blocks(expected).abs().amax(-1).sum() / fmt.blocks(weight).abs().amax(-1).sum()
        change = output_error(weight, expected, hessian) / output_error(torch.zeros_like(weight), weight, hessian)
        assert metrics[ref.name, "magr_range"] == pytest.approx(ratio.item(), rel=1e-4)
        assert metrics[ref.name, "magr_output_change"] == pytest.approx(change, rel=1e-2)


@pytest.mark.parametrize("rounds", ["rtn", "gptq"])
def test_what_rounds_gets_the_reduced_weights(rounds):
    model, config = tiny_model("llama")
    calibration = tokens(config, batch=6, length=16, seed=1)
    digests = []
    for nodes in (
        [{"stage": rounds}],
        [{"stage": "magr", "alpha_group": 0.0}, {"stage": rounds}],
        [{"stage": "magr", "alpha_group": 0.02}, {"stage": rounds}],
        [{"stage": "magr", "alpha_group": 0.02, "iterations": 3}, {"stage": rounds}],
    ):
        pipeline = build_pipeline(nodes)
        pipeline.check(frozenset({GROUPS}))
        result = run_pass(MemorySource(model), Recipe(pipeline, Scheme(weight=GROUPS)), calibration)
        digests.append(result.ledger.digests)
    assert digests[0] == digests[1]
    assert len({repr(d) for d in digests}) == 3


def test_weights_that_are_not_quantized_keep_their_values():
    model, config = tiny_model("llama")
    scheme = Scheme(weight=GROUPS, overrides=(Override(modules="o_proj", roles=("weight",)),))
    nodes = [{"stage": "magr", "alpha_group": 0.02}, {"stage": "rtn"}]
    result = run_pass(MemorySource(model), Recipe(build_pipeline(nodes), scheme), tokens(config, batch=4, length=16))
    for path, parameter in model.named_parameters():
        if "o_proj" in path and path in result.weights.tensors:
            assert torch.equal(result.weights.tensors[path], parameter)


def test_its_place_is_behind_transforms_and_before_whatever_fits_ranges():
    assert Magr.kind == Kind.PROTECT
    build_pipeline([{"stage": name} for name in ("awq_scale", "magr", "awq_clip", "gptq")])
    for names in (("awq_clip", "magr", "gptq"), ("magr", "awq_scale", "rtn"), ("gptq", "magr")):
        with pytest.raises(SpecError, match="TRANSFORM < PROTECT"):
            build_pipeline([{"stage": name} for name in names])


def test_inputs_that_are_not_finite_are_an_error_that_names_the_place():
    view = _view()
    view.statistics[2][Hessian].total[0, 0] = math.nan
    with pytest.raises(NumericsError, match=r"block 0, mlp\.gate_proj\.weight: input of the layer is not finite"):
        Magr().apply(view)


REFUSED = [
    ({"iterations": -1}, {GROUPS}, "algo.iterations=-1"),
    ({"alpha": -1e-3}, {ROWS}, "algo.alpha=-0.001"),
    ({"alpha": math.nan}, {ROWS}, "algo.alpha=nan"),
    ({"alpha_group": 11.0}, {GROUPS}, "algo.alpha_group=11.0"),
    ({"alpha": 0.01}, {GROUPS}, "algo.alpha=0.01: with scales per channel or tensor; groups have algo.alpha_group"),
    ({"alpha_group": 0.01}, {ROWS}, "algo.alpha_group=0.01: with groups"),
    ({"beta": 0}, {ROWS}, "algo.beta=0.0: null (authors: 0.8 at 2 bits"),
    ({"beta": -0.5}, {ROWS}, "algo.beta=-0.5"),
    ({"beta": 1.01}, {ROWS}, "algo.beta=1.01"),
    ({"beta": math.nan}, {ROWS}, "algo.beta=nan"),
    ({"beta": 0.9}, {ROWS, MSE}, "algo.beta=0.9: null or 1 with range.method=mse"),
    ({"beta": 0.9}, {replace(ROWS, zero="float")}, "algo.beta=0.9: null or 1 with zero_point=float"),
    ({"beta": 0.9}, {COMPOSITE["mxfp4"]}, "algo.beta=0.9: null or 1 with mxfp4, whose standard"),
]


@pytest.mark.parametrize(("options", "formats", "expected"), REFUSED)
def test_options_out_of_range_or_without_effect_are_refused(options, formats, expected):
    with pytest.raises(SpecError) as refused:
        build_pipeline([{"stage": "magr", **options}, {"stage": "rtn"}]).check(frozenset(formats))
    assert str(refused.value).startswith(expected)
    assert "\n" not in str(refused.value)


def test_options_are_accepted_where_they_have_an_effect():
    for options, formats in (
        ({}, {GROUPS}),
        ({}, {ROWS}),
        ({"alpha": 0.0}, {ROWS}),
        ({"alpha": 0.01, "alpha_group": 0.01}, {ROWS, GROUPS}),
        ({"alpha": PER_CHANNEL, "alpha_group": PER_GROUP}, {GROUPS}),
        ({"beta": 0.9}, {ROWS, GROUPS}),
        *(({"beta": beta}, {ROWS, MSE, replace(ROWS, zero="float"), COMPOSITE["mxfp4"]}) for beta in (None, 1)),
    ):
        build_pipeline([{"stage": "magr", **options}, {"stage": "rtn"}]).check(frozenset(formats))
