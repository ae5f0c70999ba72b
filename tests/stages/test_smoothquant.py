"""SmoothQuant: its formula, what it balances, the function it preserves, and the statistic that it needs."""

import copy
import math

import pytest
import torch

from qbench.calibration.statistics import AbsMax
from qbench.engine.loop import Recipe
from qbench.engine.passes import StructureCache, embed, run_pass
from qbench.engine.source import MemorySource
from qbench.errors import NumericsError, SpecError, StructureError
from qbench.formats import fake_quantize, uniform
from qbench.formats.scheme import Override, Scheme
from qbench.stages.base import BlockView
from qbench.stages.pipeline import build_pipeline
from qbench.stages.transform_smoothquant import SMALLEST, SmoothQuant, smooth_scale
from qbench.structure.blocks import capture_calls, find_blocks, use_single_experts
from tests.architectures import ARCHITECTURES, tiny_model, tokens
from tests.engine.helpers import InputsOf, decoded
from tests.stages import scopes

W8 = uniform(bits=8, group_size=-1, symmetric=True)
A8 = uniform(bits=8, group_size=-1, symmetric=True, scale="float32")


# ------------------------------------------------------------------ the formula


def _maxima(n=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, generator=generator) * 4 - 2).exp(), (torch.rand(n, generator=generator) * 4 - 4).exp()


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.85, 1.0])
def test_the_scale_is_a_quotient_of_powers(alpha):
    a, w = _maxima()
    expected = [x**alpha / y ** (1 - alpha) for x, y in zip(a.tolist(), w.tolist())]
    assert torch.allclose(smooth_scale(a, w, alpha), torch.tensor(expected), rtol=1e-5)


def test_the_limits_of_alpha_give_one_side_all_of_the_difficulty_and_a_half_shares_it():
    a, w = _maxima()
    assert torch.allclose(w * smooth_scale(a, w, 0.0), torch.ones(9))
    assert torch.allclose(a / smooth_scale(a, w, 1.0), torch.ones(9))
    half = smooth_scale(a, w, 0.5)
    assert torch.allclose(a / half, w * half)


def test_dead_channels_and_columns_keep_the_scale_in_bounds():
    a, w = torch.tensor([0.0, 0.0, 4.0, 1e-30]), torch.tensor([0.5, 0.0, 0.0, 1e4])
    for alpha in (0.0, 0.5, 1.0):
        s = smooth_scale(a, w, alpha)
        assert s[:2].tolist() == [1, 1]
        assert s[2].item() == pytest.approx(4.0**alpha / 1e-5 ** (1 - alpha), rel=1e-4)
        assert s[3].item() == pytest.approx(max(SMALLEST, 1e-30**alpha / 1e4 ** (1 - alpha)), rel=1e-4)
        assert torch.isfinite(s).all()


# ------------------------------------------------------------------ on blocks


@torch.no_grad()
def _loud(name, seed=0, dtype=torch.float32):
    """A model some of whose channels carry large values, and calibration tokens."""
    model, config = tiny_model(name, seed=seed, dtype=dtype)
    for path, parameter in model.named_parameters():
        if "norm" in path or "ln_" in path:
            parameter[3::7] *= 8
    return model, tokens(config, batch=4, length=16, seed=seed)


@torch.no_grad()
def _view(model, calibration, index=0):
    source = MemorySource(model)
    hidden, calls = capture_calls(model, calibration[:2])
    block = source.block(index)
    structure = StructureCache().structure(block, calls[index], hidden, folds=True)
    stream = embed(source, model, calibration, {2})
    for earlier in range(index):
        stream.advance(source.block(earlier), earlier)
    statistics = {g.index: {AbsMax: AbsMax(g.in_features, torch.device("cpu"))} for g in structure.groups}
    stream.observe(block, index, structure, lambda group, x: statistics[group.index][AbsMax].update(x))
    refs = [ref for group in structure.groups for ref in group.weights]
    return BlockView(
        block=block,
        structure=structure,
        groups=structure.groups,
        formats={ref.name: W8 for ref in refs},
        statistics=statistics,
        where=f"block {index}",
    )


@torch.no_grad()
def _transformed(model, calibration, **options):
    """A copy of the model with the transformed parameters of every block, and the views and outcomes."""
    use_single_experts(model)
    changed, seen = copy.deepcopy(model), []
    for index, block in enumerate(find_blocks(changed)[1]):
        view = _view(model, calibration, index)
        outcome = SmoothQuant(**options).apply(view)
        for path, value in outcome.parameters.items():
            block.get_parameter(path).copy_(value)
        seen.append((view, outcome))
    return changed, seen


@torch.no_grad()
def _inputs(model, calibration, block, ref):
    with InputsOf(block, ref) as taken:
        model(calibration)
    return torch.cat([*taken.seen, torch.zeros(0, ref.in_features)])


SITES = {
    "llama": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]],
    "gemma2": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]],
    "opt": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["fc1"]],
}


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@torch.no_grad()
def test_the_transformed_model_has_the_balance_that_alpha_asks_for(name, alpha):
    """Measured on a plain forward of the transformed model: max|x/s| = a^(1-α) w^(1-α), max|W s| = a^α w^α."""
    model, calibration = _loud(name)
    changed, seen = _transformed(model, calibration, alpha=alpha)
    for index, (view, outcome) in enumerate(seen):
        before, after = find_blocks(model)[1][index], find_blocks(changed)[1][index]
        refs = {ref.name.removesuffix(".weight"): ref for g in view.structure.groups for ref in g.weights}
        for names in SITES[name]:
            site = [refs[path] for path in names]
            a = _inputs(model, calibration, before, site[0]).abs().amax(0)
            w = torch.cat([ref.read(before) for ref in site]).abs().amax(0)
            inputs = _inputs(changed, calibration, after, site[0]).abs().amax(0)
            weights = torch.cat([ref.read(after) for ref in site]).abs().amax(0)
            assert torch.allclose(inputs, (a * w) ** (1 - alpha), rtol=1e-3)
            assert torch.allclose(weights, (a * w) ** alpha, rtol=1e-3)
            group = next(g for g in view.structure.groups if site[0] in g.weights)
            assert torch.allclose(outcome.input_scales[group.index], a**alpha / w ** (1 - alpha), rtol=1e-3)
        behind_norms = {path + ".weight" for names in SITES[name] for path in names}
        scaled = {path for path in outcome.parameters if outcome.parameters[path].ndim > 1}
        assert scaled == behind_norms  # the authors leave o and down alone


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("all_folds", [False, True])
@torch.no_grad()
def test_the_function_is_preserved_wherever_folds_exist_and_refused_elsewhere(name, all_folds):
    model, config = tiny_model(name, dtype=torch.float64)  # what is left are norms that compute in float32
    calibration = tokens(config, batch=4, length=16)
    if name == "olmo2" and not all_folds:  # its norms come after the weights
        with pytest.raises(StructureError, match=r"block 0: smoothquant has no norm .*all_folds=true uses 2 folds"):
            _transformed(model, calibration)
        return
    changed, seen = _transformed(model, calibration, all_folds=all_folds, alpha=0.7)
    assert all(outcome.input_scales for _, outcome in seen)
    expected, found = (m(calibration[:2]).logits for m in (model, changed))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    every = {fold.group for fold in seen[0][0].structure.folds if all_folds or fold.kind == "norm"}
    assert every <= seen[0][1].input_scales.keys()


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", torch.float32), ("mixtral", torch.float32), ("llama", torch.bfloat16)]
)
@pytest.mark.parametrize("all_folds", [False, True])
def test_the_engine_guards_it_and_rounds_what_it_leaves(name, dtype, all_folds):
    model, calibration = _loud(name, dtype=dtype)
    nodes = [{"stage": "smoothquant", "all_folds": all_folds}, {"stage": "rtn"}]
    result = run_pass(MemorySource(model), Recipe(build_pipeline(nodes), Scheme(weight=W8)), calibration)
    errors = [value for *_, metric, value in result.ledger.metrics if metric == "smoothquant_function_error"]
    assert len(errors) == 2
    assert max(errors) < (1e-5 if dtype == torch.float32 else 5e-2)
    if dtype == torch.float32:
        changed, _ = _transformed(model, calibration, all_folds=all_folds)
        values = decoded(model, result.weights)
        for path, parameter in changed.named_parameters():
            if path.endswith("q_proj.weight"):
                assert torch.allclose(values[path], fake_quantize(parameter.detach(), W8), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_router_counts_among_the_weights_and_experts_share_one_scale():
    model, calibration = _loud("mixtral")
    block = find_blocks(model)[1][0]
    router = next(p for path, p in block.named_parameters() if path.endswith("gate.weight"))
    router[:, 5] = 50.0
    view = _view(model, calibration)
    outcome = SmoothQuant(alpha=0.25).apply(view)
    fold = next(f for f in view.structure.folds if f.extra_groups)
    weights = [ref.read(block).abs().amax(0) for ref in fold.consumers]
    assert len(weights) == 8 + 1
    inputs = torch.stack([view.statistics[g][AbsMax].value() for g in (fold.group, *fold.extra_groups)]).amax(0)
    expected = inputs**0.25 / torch.stack(weights).amax(0) ** 0.75
    for group in (fold.group, *fold.extra_groups):
        assert torch.allclose(outcome.input_scales[group], expected, rtol=1e-4)
    assert torch.stack(weights).amax(0)[5] == 50


@torch.no_grad()
def test_query_heads_of_one_value_head_share_the_scale_of_their_maxima():
    model, calibration = _loud("llama")
    view = _view(model, calibration)
    outcome = SmoothQuant(all_folds=True, alpha=0.6).apply(view)
    a = view.statistics[1][AbsMax].value().view(2, 2, 8).amax(1)  # key/value heads, query heads of each, features
    w = view.block.self_attn.o_proj.weight.abs().amax(0).view(2, 2, 8).amax(1)
    found = outcome.input_scales[1].view(2, 2, 8)
    assert torch.allclose(found, (a**0.6 / w**0.4)[:, None].expand(2, 2, 8), rtol=1e-5)


def test_an_expert_without_tokens_keeps_its_scale():
    model, calibration = _loud("mixtral")
    view = _view(model, calibration)
    fold = next(f for f in view.structure.folds if f.kind == "linear" and f.group > 2)
    view.statistics[fold.group][AbsMax] = AbsMax(48, torch.device("cpu"))
    outcome = SmoothQuant(all_folds=True).apply(view)
    assert torch.equal(outcome.input_scales[fold.group], torch.ones(48))


def test_folds_behind_which_nothing_is_quantized_are_left_alone():
    model, calibration = _loud("llama")
    kept = Override(modules="mlp", roles=("weight",))
    nodes = [{"stage": "smoothquant"}, {"stage": "rtn"}]
    recipe = Recipe(build_pipeline(nodes), Scheme(weight=W8, overrides=(kept,)))
    result = run_pass(MemorySource(model), recipe, calibration)
    spread = [module for _, module, metric, _ in result.ledger.metrics if metric == "smooth_spread"]
    assert spread == ["self_attn.q_proj.weight"] * 2
    changed = [path for path in result.weights.tensors if "mlp" in path or "post_attention" in path]
    values = dict(model.named_parameters())
    assert all(torch.equal(result.weights.tensors[path], values[path]) for path in changed)


def test_an_input_that_is_not_finite_is_an_error_that_names_its_place():
    view = _view(*_loud("llama"))
    view.statistics[2][AbsMax].largest[3] = math.inf
    with pytest.raises(NumericsError, match=r"block 0, mlp\.gate_proj\.weight: input of the layer is not finite"):
        SmoothQuant().apply(view)


@torch.no_grad()
def test_eight_bit_layers_behind_loud_norms_lose_less():
    """W8A8, one scale per weight row and one for all inputs, as the authors' static setting: output error per layer."""
    model, calibration = _loud("llama")
    changed, seen = _transformed(model, calibration)
    per_tensor = uniform(bits=8, group_size=0, symmetric=True, scale="float32")
    for index, (view, _) in enumerate(seen):
        for path in ("self_attn.q_proj.weight", "mlp.up_proj.weight"):
            ref = next(r for g in view.structure.groups for r in g.weights if r.name == path)
            errors = []
            for which in (model, changed):
                block = find_blocks(which)[1][index]
                x, weight = _inputs(which, calibration, block, ref), ref.read(block)
                exact = x @ weight.t()
                rounded = fake_quantize(x, per_tensor) @ fake_quantize(weight, W8).t()
                errors.append((rounded - exact).square().mean().item())
            assert errors[1] < 0.7 * errors[0], path


@pytest.mark.parametrize("alpha", [-0.1, 1.01, math.nan])
def test_alpha_is_a_share(alpha):
    with pytest.raises(SpecError, match=r"^algo\.alpha=.*a share from 0 to 1"):
        build_pipeline([{"stage": "smoothquant", "alpha": alpha}, {"stage": "rtn"}]).check(frozenset({W8}))


# ------------------------------------------------------------------ the search


QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
SEARCHED = [(QKV, "self_attn"), (["mlp.gate_proj", "mlp.up_proj"], "mlp"), (["mlp.down_proj"], None)]


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_the_search_chooses_the_alpha_that_a_loop_over_whole_forwards_chooses(static):
    model, calibration = scopes.loud("llama")
    w5 = uniform(bits=5, group_size=-1, symmetric=True)
    for index in range(2):
        view = scopes.view_of(model, calibration, w5, scopes.inputs_of(5, static=static), index=index)
        outcome = SmoothQuant(search=True, n_grid=10, all_folds=True).apply(view)
        for names, scope in SEARCHED:
            found = {m: value for where, m, value in outcome.metrics if where == f"{names[0]}.weight"}
            group, _ = scopes.by_name(view, f"{names[0]}.weight")
            a = _inputs(model, calibration, find_blocks(model)[1][index], group.weights[0]).abs().amax(0)
            w = torch.cat([ref.read(view.block) for ref in group.weights]).abs().amax(0)
            candidates = [torch.ones_like(a), *(a ** (k / 10) / w ** (1 - k / 10) for k in range(11))]
            losses = [
                scopes.loss_by_definition(
                    model,
                    calibration,
                    index,
                    names,
                    scope,
                    scale=scale,
                    weights=lambda weight: fake_quantize(weight, w5),
                    inputs=lambda x: scopes.rounded_inputs(x, 5, static=static),
                )
                for scale in candidates
            ]
            chosen = round(found["smooth_alpha"] * 10) + 1 if "smooth_alpha" in found else 0
            assert losses[chosen] <= min(losses) * (1 + 2e-2)
            assert found["smooth_loss_vs_none"] == pytest.approx(losses[chosen] / losses[0], rel=5e-2)
            assert found["smooth_loss_vs_none"] < 0.9
            assert torch.allclose(outcome.input_scales[group.index], candidates[chosen], rtol=1e-4)


@torch.no_grad()
def test_the_search_leaves_alone_what_no_alpha_makes_better_and_is_otherwise_as_good_as_every_alpha():
    model, calibration = scopes.loud("opt")
    fine, coarse = scopes.inputs_of(8, static=False), uniform(bits=3, group_size=-1, symmetric=True)
    chosen = SmoothQuant(search=True, n_grid=1).apply(scopes.view_of(model, calibration, coarse, fine))
    kept = {where for where, m, value in chosen.metrics if m == "smooth_loss_vs_none" and value == 1}
    assert kept
    assert not kept & {where for where, m, _ in chosen.metrics if m == "smooth_alpha"}
    spreads = {where: value for where, m, value in chosen.metrics if m == "smooth_spread"}
    assert all(spreads[where] == 1 for where in kept)
    few, many = (
        SmoothQuant(search=True, n_grid=n).apply(scopes.view_of(model, calibration, coarse, fine)) for n in (2, 8)
    )
    losses = [{w: v for w, m, v in o.metrics if m == "smooth_loss_vs_none"} for o in (few, many)]
    assert all(losses[1][where] <= losses[0][where] * (1 + 1e-6) for where in losses[0])


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"search": True, "alpha": 0.6}, "alpha"),
        ({"n_grid": 5}, "n_grid"),
        ({"search_tokens": 64}, "search_tokens"),
        ({"search": True, "n_grid": 0}, "n_grid"),
        ({"search": True, "search_tokens": 0}, "search_tokens"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(options, option):
    with pytest.raises(SpecError, match=rf"^algo\.{option}=") as refused:
        build_pipeline([{"stage": "smoothquant", **options}, {"stage": "rtn"}]).check(frozenset({W8}))
    assert "\n" not in str(refused.value)


def test_only_the_search_looks_at_a_sample():
    assert SmoothQuant().scope_tokens == 0
    assert SmoothQuant(search=True, search_tokens=77).scope_tokens == 77


# ------------------------------------------------------------------ the statistic


def _seen(*batches):
    statistic = AbsMax(batches[0].shape[-1], torch.device("cpu"))
    for batch in batches:
        statistic.update(batch)
    return statistic


def test_the_maximum_is_of_no_order_and_no_batching():
    x = torch.randn(60, 7, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 7)
    ways = [x.split(60), x.split(1), x.flip(0).split([1, 0, 20, 39]), [x[:40].view(2, 20, 7), x[40:].view(4, 5, 7)]]
    for batches in ways:
        found = _seen(*batches)
        assert torch.equal(found.value(), x.abs().amax(0))
        assert found.tokens == 60
    assert found.value().dtype == _seen(x.bfloat16()).value().dtype == torch.float32
    assert torch.equal(_seen(x.bfloat16()).value(), x.bfloat16().abs().amax(0).float())


def test_the_maximum_follows_a_rescaled_input_and_goes_on():
    x = torch.randn(60, 7, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(7, generator=torch.Generator().manual_seed(2)) + 0.5
    statistic = _seen(x)
    statistic.finish()
    found = statistic.rescaled(scale)
    assert torch.allclose(found.value(), (x / scale).abs().amax(0))
    found.update(10 * x)
    assert (found.tokens, statistic.tokens) == (120, 60)
    assert torch.equal(found.value(), torch.maximum(x.abs().amax(0) / scale, 10 * x.abs().amax(0)))
    assert torch.equal(statistic.value(), x.abs().amax(0))


def test_no_tokens_have_the_maximum_zero_and_a_nan_is_not_lost():
    empty = _seen(torch.zeros(0, 3))
    assert (empty.tokens, empty.value().tolist()) == (0, [0, 0, 0])
    x = torch.zeros(2, 3)
    x[1, 2] = math.nan
    assert _seen(x, torch.ones(1, 3)).value().isnan().tolist() == [False, False, True]
