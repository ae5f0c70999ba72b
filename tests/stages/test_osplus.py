"""Outlier Suppression+: its formulas, the function it keeps with and without shifts, and what its search finds."""

import copy
import math
from itertools import pairwise

import pytest
import torch

from qbench.calibration.extremes import Extremes
from qbench.engine.loop import Recipe
from qbench.engine.passes import run_pass
from qbench.engine.source import MemorySource
from qbench.errors import NumericsError, SpecError, StructureError
from qbench.formats import fake_quantize, uniform
from qbench.formats.scheme import Override, Scheme
from qbench.stages.pipeline import build_pipeline
from qbench.stages.transform_osplus import OsPlus, channel_shift, outlier_scale, thresholds
from qbench.structure.blocks import find_blocks, use_single_experts
from tests.architectures import ARCHITECTURES, tiny_model, tokens
from tests.engine.helpers import InputsOf
from tests.stages.scopes import (
    by_name,
    inputs_of,
    loss_by_definition,
    loud,
    rounded_inputs,
    same_state,
    state_of,
    view_of,
)

W6 = uniform(bits=6, group_size=-1, symmetric=True)
A6 = inputs_of(6, static=True)
SHIFTED = {"opt", "gpt2", "gpt_neox", "bloom", "phi", "starcoder2"}


# ------------------------------------------------------------------ the formulas


def _ends(n=9, seed=0):
    x = torch.randn(40, n, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-1, 1.5, n)
    x = x + torch.linspace(-20, 20, n)
    return x, torch.stack([x.amin(0), x.amax(0)])


def test_a_shift_puts_every_channel_in_the_middle_of_its_range():
    x, ends = _ends()
    centered = x - channel_shift(ends)
    assert torch.allclose(centered.amax(0), -centered.amin(0), atol=1e-5)
    assert torch.allclose(centered.amax(0), (x.amax(0) - x.amin(0)) / 2, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.5, 3.0, 1e6])
def test_a_threshold_bounds_the_inputs_and_amplifies_none(threshold):
    x, ends = _ends()
    scale = outlier_scale(ends, threshold)
    assert bool((scale >= 1).all())
    assert (x / scale).abs().max() <= threshold * (1 + 1e-6)
    within = x.abs().amax(0) <= threshold
    assert torch.equal(scale[within], torch.ones_like(scale[within]))
    assert torch.allclose(scale[~within], x.abs().amax(0)[~within] / threshold)


@pytest.mark.parametrize(("largest", "steps"), [(1.5, 100), (50.0, 100), (70.3, 140)])
def test_thresholds_are_the_authors_grid(largest, steps):
    found = thresholds(largest)
    assert len(found) == steps + 1
    assert (found[0], found[-1]) == (largest, pytest.approx(1.0))
    gaps = [a - b for a, b in pairwise(found)]
    assert max(gaps) - min(gaps) < 1e-9
    assert max(gaps) <= 0.5 * (1 + 1e-9)
    assert len(thresholds(largest, n_grid=7)) == max(7, int(largest / 0.5)) + 1
    assert thresholds(largest, smallest=0.25)[-1] == pytest.approx(0.25)


def test_inputs_below_the_smallest_threshold_leave_nothing_to_search():
    assert thresholds(0.9) == [0.9]
    assert thresholds(0.0) == [0.0]


# ------------------------------------------------------------------ on blocks


@torch.no_grad()
def _transformed(model, calibration, weight=W6, inputs=A6, **options):
    """A copy of the model with the transformed parameters of every block, and the views and outcomes."""
    use_single_experts(model)
    changed, seen = copy.deepcopy(model), []
    for index, block in enumerate(find_blocks(changed)[1]):
        view = view_of(model, calibration, weight, inputs, index=index)
        outcome = OsPlus(**options).apply(view)
        for path, value in outcome.parameters.items():
            block.get_parameter(path).copy_(value)
        seen.append((view, outcome))
    return changed, seen


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("all_folds", [False, True])
@torch.no_grad()
def test_the_function_is_preserved_wherever_folds_exist_and_refused_elsewhere(name, all_folds):
    model, config = tiny_model(name, dtype=torch.float64)  # what is left are norms that compute in float32
    calibration = tokens(config, batch=4, length=16)
    options = {"all_folds": all_folds, "n_grid": 4, "smallest_threshold": 0.3}
    if name == "olmo2" and not all_folds:  # its norms come after the weights
        with pytest.raises(StructureError, match=r"block 0: osplus has no norm .*all_folds=true uses 2 folds"):
            _transformed(model, calibration, **options)
        return
    changed, seen = _transformed(model, calibration, **options)
    expected, found = (m(calibration[:2]).logits for m in (model, changed))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    shifted = {value for _, outcome in seen for _, metric, value in outcome.metrics if metric == "osplus_shifted"}
    assert shifted == ({0.0, 1.0} if all_folds and name in SHIFTED else {float(name in SHIFTED)})


@pytest.mark.parametrize("name", ["opt", "llama"])
@torch.no_grad()
def test_the_transformed_model_has_centered_and_bounded_inputs(name):
    """Measured on a plain forward: max = -min with a shift, |x| at most the chosen threshold; the weights as they were
    times the scales."""
    model, calibration = loud(name)
    changed, seen = _transformed(model, calibration, n_grid=20)
    scaled = 0
    for index, (view, outcome) in enumerate(seen):
        before, after = find_blocks(model)[1][index], find_blocks(changed)[1][index]
        for fold in (f for f in view.structure.folds if f.kind == "norm"):
            found = {m: value for where, m, value in outcome.metrics if where == fold.consumers[0].name}
            with InputsOf(after, fold.consumers[0]) as taken:
                changed(calibration)
            x, scale = torch.cat(taken.seen), outcome.input_scales[fold.group]
            assert x.abs().max() <= found["osplus_threshold"] * (1 + 1e-4)
            if found["osplus_shifted"]:
                assert torch.allclose(x.amax(0), -x.amin(0), atol=1e-4)
            for ref in fold.consumers:
                assert torch.allclose(ref.read(after), ref.read(before) * scale, rtol=1e-5)
            assert bool((scale >= 1).all())
            assert (scale > 1).float().mean().item() == pytest.approx(found["osplus_scaled"])
            scaled += int((scale > 1).sum())
    assert scaled


QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
SITES = {
    "llama": [(QKV, "self_attn.o_proj<"), (["mlp.gate_proj", "mlp.up_proj"], None)],
    "opt": [(QKV, "self_attn.out_proj<"), (["fc1"], None)],
}


@pytest.mark.parametrize("name", SITES)
@torch.no_grad()
def test_chooses_the_threshold_that_a_loop_over_whole_forwards_chooses(name):
    model, calibration = loud(name)
    for index in range(2):
        view = view_of(model, calibration, W6, A6, index=index)
        outcome = OsPlus(n_grid=25).apply(view)
        for names, scope in SITES[name]:
            _, fold = by_name(view, f"{names[0]}.weight")
            found = {m: value for where, m, value in outcome.metrics if where == f"{names[0]}.weight"}
            with InputsOf(find_blocks(model)[1][index], fold.consumers[0]) as taken:
                model(calibration)
            x = torch.cat(taken.seen)
            shift = (x.amax(0) + x.amin(0)) / 2 if name == "opt" else None
            centered = x if shift is None else x - shift
            top = centered.abs().max().item()
            steps = max(25, int(top / 0.5))
            grid = [top - (top - 1.0) * k / steps for k in range(steps + 1)]
            losses = [
                loss_by_definition(
                    model,
                    calibration,
                    index,
                    names,
                    scope,
                    scale=(centered.abs().amax(0) / t).clamp_min(1.0),
                    shift=shift,
                    weights=lambda w: fake_quantize(w, W6),
                    inputs=lambda rows: rounded_inputs(rows, 6, static=True),
                )
                for t in grid
            ]
            chosen = min(range(len(grid)), key=lambda k: abs(grid[k] - found["osplus_threshold"]))
            assert grid[chosen] == pytest.approx(found["osplus_threshold"], rel=1e-4)
            assert losses[chosen] <= min(losses) * (1 + 2e-2)  # single values may round the other way
            assert found["osplus_loss_vs_none"] == pytest.approx(losses[chosen] / losses[0], rel=5e-2)
            assert found["osplus_loss_vs_none"] < 0.8


def test_never_worse_on_its_sample_than_no_scale_and_without_a_shift_if_told():
    model, calibration = loud("opt")
    for shift in (True, False):
        _, seen = _transformed(model, calibration, n_grid=5, shift=shift)
        metrics = [metric for _, outcome in seen for metric in outcome.metrics]
        assert all(value <= 1 for _, name, value in metrics if name == "osplus_loss_vs_none")
        assert {value for _, name, value in metrics if name == "osplus_shifted"} == {float(shift)}
    names = {path for _, outcome in seen for path in outcome.parameters}
    assert "self_attn.q_proj.bias" not in names  # nothing to give back


def test_inputs_in_full_precision_are_left_alone():
    """Scales only widen the weights' ranges then: none at all is the best."""
    model, calibration = loud("llama")
    _, seen = _transformed(model, calibration, inputs=None, n_grid=10)
    for view, outcome in seen:
        for fold in (f for f in view.structure.folds if f.kind == "norm"):
            assert bool((outcome.input_scales[fold.group] >= 1).all())
    chosen = [value for _, o in seen for _, name, value in o.metrics if name == "osplus_loss_vs_none"]
    assert max(chosen) <= 1


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("opt", torch.float32), ("gpt2", torch.float32), ("mixtral", torch.float32), ("opt", torch.bfloat16)],
)
def test_the_engine_guards_it_and_it_gains_what_it_is_for(name, dtype):
    model, calibration = loud(name, dtype=dtype)
    expected = model(calibration).logits.float()
    distances = []
    for nodes in ([{"stage": "osplus", "n_grid": 20}, {"stage": "rtn"}], [{"stage": "rtn"}]):
        source = MemorySource(model)
        result = run_pass(source, Recipe(build_pipeline(nodes), Scheme(weight=W6, input=A6)), calibration)
        errors = [value for *_, metric, value in result.ledger.metrics if metric == "osplus_function_error"]
        assert max(errors, default=0) < (1e-5 if dtype == torch.float32 else 5e-2)
        with result.weights.inside(model) as changed, torch.no_grad():
            distances.append((changed(calibration).logits.float() - expected).square().mean().item())
    assert distances[0] < (0.8 if dtype == torch.float32 else 1.0) * distances[1]


def test_folds_behind_which_nothing_is_quantized_are_left_alone():
    model, calibration = loud("llama")
    kept = Override(modules="mlp", roles=("weight",))
    nodes = [{"stage": "osplus", "n_grid": 3}, {"stage": "rtn"}]
    recipe = Recipe(build_pipeline(nodes), Scheme(weight=W6, input=A6, overrides=(kept,)))
    result = run_pass(MemorySource(model), recipe, calibration)
    searched = [module for _, module, metric, _ in result.ledger.metrics if metric == "osplus_threshold"]
    assert searched == ["self_attn.q_proj.weight"] * 2


def test_it_changes_nothing_that_it_was_shown_and_repeats_itself():
    view = view_of(*loud("opt"), W6, A6)
    before = state_of(view)
    one, other = (OsPlus(n_grid=4, all_folds=True).apply(view) for _ in range(2))
    assert same_state(before, state_of(view))
    assert same_state(one.parameters, other.parameters)
    assert one.metrics == other.metrics


def test_dead_channels_and_an_input_that_is_not_finite():
    model, calibration = loud("llama")
    with torch.no_grad():
        find_blocks(model)[1][0].input_layernorm.weight[4] = 0
    view = view_of(model, calibration, W6, A6)
    outcome = OsPlus(n_grid=4).apply(view)
    assert outcome.input_scales[0][4] == 1
    assert all(torch.isfinite(value).all() for value in outcome.parameters.values())
    view.statistics[2][Extremes].ends[1, 3] = math.inf
    with pytest.raises(NumericsError, match=r"block 0, mlp\.gate_proj\.weight: input of the layer is not finite"):
        OsPlus(n_grid=4).apply(view)


@pytest.mark.parametrize(
    "options", [{"n_grid": 0}, {"smallest_threshold": 0.0}, {"smallest_threshold": math.nan}, {"search_tokens": 0}]
)
def test_values_that_make_no_sense_are_refused(options):
    with pytest.raises(SpecError, match=rf"^algo\.{next(iter(options))}="):
        build_pipeline([{"stage": "osplus", **options}, {"stage": "rtn"}]).check(frozenset({W6}))


# ------------------------------------------------------------------ the statistic


def _seen(*batches):
    statistic = Extremes(batches[0].shape[-1], torch.device("cpu"))
    for batch in batches:
        statistic.update(batch)
    return statistic


def test_extremes_are_of_no_order_and_no_batching_and_follow_a_scale():
    x = torch.randn(60, 7, generator=torch.Generator().manual_seed(0)) + torch.linspace(-9, 9, 7)
    expected = torch.stack([x.amin(0), x.amax(0)])
    for batches in ([x], x.split(1), x.flip(0).split([1, 0, 20, 39]), [x[:40].view(2, 20, 7), x[40:].view(4, 5, 7)]):
        found = _seen(*batches)
        assert torch.equal(found.value(), expected)
        assert found.tokens == 60
    scale = torch.rand(7, generator=torch.Generator().manual_seed(2)) + 0.5
    scaled = found.rescaled(scale)
    scaled.update(x[:5] / scale)
    assert torch.allclose(scaled.value(), expected / scale)
    assert (scaled.tokens, found.tokens) == (65, 60)
    assert torch.equal(found.value(), expected)
    assert _seen(x.bfloat16()).value().dtype == torch.float32


def test_no_tokens_have_the_extremes_zero_and_a_nan_is_not_lost():
    empty = _seen(torch.zeros(0, 3))
    assert (empty.tokens, empty.value().tolist()) == (0, [[0, 0, 0], [0, 0, 0]])
    x = torch.ones(2, 3)
    x[1, 2] = math.nan
    assert _seen(x, x.abs() * 2).value().isnan().any(0).tolist() == [False, False, True]
    assert _seen(torch.ones(2, 3)).value().tolist() == [[1, 1, 1], [1, 1, 1]]  # 0 was never seen
