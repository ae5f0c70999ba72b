"""What scale searches minimize, against its definition: transformed layers in a whole model with rounded inputs."""

from dataclasses import replace

import pytest
import torch

from qbench.errors import NumericsError
from qbench.formats import RangeFit, fake_quantize, uniform
from qbench.formats.scheme import InputFormat, Override, Scheme
from qbench.stages.scope_loss import OutputError, best, quantizes_inputs, quick, rounded
from tests.stages.scopes import by_name, inputs_of, loss_by_definition, loud, rounded_inputs, view_of

W4 = uniform(bits=4, group_size=8, symmetric=False)

# architecture, weights that share an input, module whose output is compared (as in `loss_by_definition`), by site
QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
CASES = {
    "llama attention module": ("llama", QKV, "self_attn", "module"),
    "llama mlp module": ("llama", ["mlp.gate_proj", "mlp.up_proj"], "mlp", "module"),
    "llama down": ("llama", ["mlp.down_proj"], None, "module"),
    "llama attention": ("llama", QKV, "self_attn.o_proj<", "attention"),
    "llama gate and up": ("llama", ["mlp.gate_proj", "mlp.up_proj"], None, "attention"),
    "gemma2 attention": ("gemma2", QKV, "self_attn.o_proj<", "attention"),
    "opt attention": ("opt", QKV, "self_attn.out_proj<", "attention"),
    "opt attention module": ("opt", QKV, "self_attn", "module"),
    "opt fc1": ("opt", ["fc1"], None, "attention"),
    "falcon attention": ("falcon", ["self_attention.query_key_value"], "self_attention.dense<", "attention"),
}


def _problem(case, static, index=1):
    name, names, scope, site = CASES[case]
    model, calibration = loud(name)
    view = view_of(model, calibration, W4, inputs_of(5, static=static), index=index)
    group, _ = by_name(view, f"{names[0]}.weight")
    scale = 0.5 + torch.rand(group.in_features, generator=torch.Generator().manual_seed(1))
    return model, calibration, view, group, scale, (names, scope, site)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("with_inputs", [False, True])
def test_the_loss_is_that_of_a_model_with_these_layers(case, static, with_inputs):
    model, calibration, view, group, scale, (names, scope, site) = _problem(case, static)
    refs = [ref for ref in group.weights if ref.name.removesuffix(".weight") in names]
    found = OutputError(view, [replace(group, weights=tuple(refs))], site)(
        rounded(view, refs, scale, inputs=with_inputs)
    )
    expected = loss_by_definition(
        model,
        calibration,
        1,
        names,
        scope,
        scale=scale,
        weights=lambda w: fake_quantize(w, W4),
        inputs=(lambda x: rounded_inputs(x, 5, static=static)) if with_inputs else None,
    )
    assert found == pytest.approx(expected, rel=2e-3)
    assert found > 0


@pytest.mark.parametrize("case", ["opt attention", "opt fc1", "opt attention module"])
def test_a_shift_is_given_back_with_the_weight_as_it_was(case):
    model, calibration, view, group, scale, (names, scope, site) = _problem(case, True)
    shift = torch.randn(group.in_features, generator=torch.Generator().manual_seed(2))
    error = OutputError(view, [group], site)
    found = error(rounded(view, group.weights, scale, shift=shift))
    options = {"scale": scale, "shift": shift, "weights": lambda w: fake_quantize(w, W4)}
    expected = loss_by_definition(
        model, calibration, 1, names, scope, inputs=lambda x: rounded_inputs(x, 5, static=True), **options
    )
    assert found == pytest.approx(expected, rel=2e-3)
    unrounded = error(rounded(view, group.weights, scale, shift=shift, inputs=False))
    assert unrounded == pytest.approx(loss_by_definition(model, calibration, 1, names, scope, **options), rel=2e-3)


@pytest.mark.parametrize("site", ["module", "attention"])
def test_what_is_not_rounded_changes_nothing_whatever_the_scale(site):
    model, calibration = loud("opt")
    view = view_of(model, calibration, W4)
    for group in view.structure.groups:
        scale = 0.5 + torch.rand(group.in_features, generator=torch.Generator().manual_seed(1))
        error = OutputError(view, [group], site)
        for shift in (None, torch.ones(group.in_features)):
            found = rounded(view, group.weights, scale, shift=shift)
            exact = {ref.name: replace(found[ref.name], weight=view.weight(ref)) for ref in group.weights}
            assert error(exact) < 1e-8 * error(found)


def test_experts_are_compared_behind_the_router_that_weighs_them():
    """The module around all experts, with every expert's own tokens rounded; one without tokens has no say."""
    model, calibration = loud("mixtral")
    view = view_of(model, calibration, W4, inputs_of(5, static=False))
    fold = next(f for f in view.structure.folds if f.extra_groups)
    groups = [view.structure.groups[index] for index in (fold.group, *fold.extra_groups)]
    refs = [ref for group in groups for ref in group.weights]
    scale = 0.5 + torch.rand(32, generator=torch.Generator().manual_seed(1))
    for site in ("module", "attention"):
        error = OutputError(view, groups, site)
        every = rounded(view, refs, scale)
        whole = error(every)
        assert whole > 0
        exact = {ref.name: replace(every[ref.name], weight=view.weight(ref), inputs=None) for ref in refs}
        assert error(exact) == pytest.approx(0, abs=1e-9 * whole)
        parts = [error({**exact, ref.name: every[ref.name]}) for ref in refs]
        assert sum(part > 0 for part in parts) > 1
        if site == "attention":  # layers stand for themselves: their errors add
            assert sum(parts) == pytest.approx(whole, rel=1e-4)


def test_weights_that_read_one_input_in_different_formats_each_get_their_own():
    """Layers that stand for themselves: the errors of each alone add."""
    view = view_of(*loud("llama"), W4)
    group, _ = by_name(view, "mlp.gate_proj.weight")
    formats = {ref.name: inputs_of(bits, static=False) for ref, bits in zip(group.weights, (3, 5), strict=True)}
    error, found = (
        OutputError(view, [group], "attention"),
        rounded(replace(view, inputs=formats), group.weights, torch.ones(32)),
    )
    exact = {ref.name: replace(found[ref.name], weight=view.weight(ref), inputs=None) for ref in group.weights}
    alone = [error({**exact, name: found[name]}) for name in found]
    assert error(found) == pytest.approx(sum(alone), rel=1e-5)
    assert alone[0] > 4 * alone[1]


def test_attention_whose_every_layer_is_rounded_is_compared_by_what_it_gives():
    """No other linear layer is left in it that could read softmax(Q Kᵀ) V."""
    view = view_of(*loud("llama"), W4, inputs_of(5, static=False))
    groups = [by_name(view, f"self_attn.{name}_proj.weight")[0] for name in "qo"]
    found = {k: v for g in groups for k, v in rounded(view, g.weights, torch.ones(g.in_features)).items()}
    by_site = [OutputError(view, groups, site)(found) for site in ("attention", "module")]
    assert by_site[0] == by_site[1] > 0


def test_the_sample_is_left_as_it_is():
    model, calibration = loud("llama")
    view = view_of(model, calibration, W4, inputs_of(5, static=True))
    before = {name: value.clone() for name, value in view.block.state_dict().items()}
    outputs = {(i, c.module): c.output.clone() for i, calls in view.scopes.items() for c in calls}
    for group in view.structure.groups:
        for site in ("module", "attention"):
            OutputError(view, [group], site)(rounded(view, group.weights, torch.full((group.in_features,), 0.7)))
    assert all(torch.equal(value, before[name]) for name, value in view.block.state_dict().items())
    assert all(torch.equal(c.output, outputs[i, c.module]) for i, calls in view.scopes.items() for c in calls)


def test_an_input_that_overflows_is_an_infinite_loss_and_never_the_best():
    view = view_of(*loud("llama"), W4, inputs_of(5, static=True))
    group, _ = by_name(view, "mlp.gate_proj.weight")
    error = OutputError(view, [group])
    spoiled = {ref.name: rounded(view, [ref], torch.ones(32))[ref.name] for ref in group.weights}
    spoiled = {name: replace(s, weight=torch.full_like(s.weight, torch.inf)) for name, s in spoiled.items()}
    assert error(spoiled) == float("inf")
    assert best([float("nan"), 2.0, float("inf"), 1.0, 1.0], "here") == 3
    with pytest.raises(NumericsError, match="here: no scale of the search gives a finite output"):
        best([float("inf"), float("nan")], "here")


def test_without_a_sample_there_is_nothing_to_compare():
    view = replace(view_of(*loud("llama"), W4), scopes={})
    with pytest.raises(NumericsError, match=r"block 0, self_attn\.q_proj\.weight: no token of the search sample"):
        OutputError(view, view.structure.groups[:1])


def test_a_search_inside_the_search_is_left_out():
    slow = replace(W4, range=RangeFit(method="mse"))
    assert quick(slow) == W4
    kept = replace(W4, range=RangeFit(method="percentile"))
    assert quick(kept) == kept


def test_inputs_count_wherever_they_are_quantized():
    inputs: InputFormat = inputs_of(8, static=False)
    assert not quantizes_inputs(Scheme(weight=W4))
    assert quantizes_inputs(Scheme(weight=W4, input=inputs))
    assert quantizes_inputs(Scheme(weight=W4, overrides=(Override(modules="mlp", roles=("input",), input=inputs),)))
    assert not quantizes_inputs(Scheme(weight=W4, overrides=(Override(modules="mlp", roles=("weight", "input")),)))
