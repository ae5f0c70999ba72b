"""The scale search against an explicit loop: candidates put into the whole model, outputs of the module compared."""

import copy

import pytest
import torch

from qbench.engine.passes import run_pass
from qbench.engine.source import MemorySource
from qbench.errors import SpecError
from qbench.formats import fake_quantize, uniform
from qbench.formats.scheme import Scheme
from qbench.stages.pipeline import build_pipeline
from qbench.stages.transform_awq import SMALLEST, AwqScale, awq_scale, hessian_error, weight_salience
from qbench.structure.blocks import capture_calls, find_blocks
from tests.architectures import tiny_model, tokens
from tests.engine.helpers import InputsOf, comparable, decoded, recipe, structure_of
from tests.stages import scopes
from tests.stages.references import correlated_inputs, output_error, round_to_nearest, second_moment

BITS, GROUP, N_GRID = 3, 8, 20


def test_scale_is_a_power_of_the_salience_normalized():
    a = torch.tensor([0.5, 2.0, 8.0, 1.0])
    for ratio in (0.0, 0.3, 0.95):
        s = awq_scale(a, ratio)
        power = a.double() ** ratio
        expected = power / (power.max() * power.min()).sqrt()
        assert torch.allclose(s.double(), expected, rtol=1e-5)
        assert (s.max() * s.min()).item() == pytest.approx(1, rel=1e-5)
    assert torch.equal(awq_scale(a, 0.0), torch.ones(4))


def test_channels_without_input_get_a_finite_scale():
    a = torch.tensor([0.0, 1.0, 1e-9, 100.0])
    for ratio in (0.0, 0.5, 0.95):
        s = awq_scale(a, ratio)
        assert torch.isfinite(s).all()
        assert bool((s > 0).all())
    assert awq_scale(a, 0.5)[0] == awq_scale(a.clamp_min(SMALLEST), 0.5)[0]
    assert torch.equal(awq_scale(torch.zeros(3), 0.5), torch.ones(3))


def test_duo_scaling_divides_by_the_weights_own_salience():
    a, w = torch.tensor([0.5, 2.0, 8.0, 1.0]), torch.tensor([0.1, 0.4, 0.2, 0.9])
    expected = a.double() ** 0.3 / w.double() ** 0.7
    expected /= (expected.max() * expected.min()).sqrt()
    assert torch.allclose(awq_scale(a, 0.3, w).double(), expected, rtol=1e-5)
    assert torch.equal(awq_scale(a, 0.0, w), torch.ones(4))


@pytest.mark.parametrize("group_size", [0, -1, 4, 5])
def test_weight_salience_is_the_mean_share_of_the_groups_maximum(group_size):
    weights = [torch.randn(rows, 12, generator=torch.Generator().manual_seed(rows)) for rows in (3, 5)]
    fmt = uniform(bits=4, group_size=group_size, symmetric=False, partial=True)
    total = torch.zeros(12, dtype=torch.float64)
    for weight in weights:
        for row in weight:
            for j in range(12):
                start = j // group_size * group_size if group_size > 0 else 0
                group = row[start : start + group_size] if group_size > 0 else row if group_size < 0 else weight
                total[j] += (row[j].abs() / group.abs().max()).double()
    assert torch.allclose(weight_salience(weights, [fmt, fmt]).double(), total / 8, rtol=1e-5)


def test_the_error_of_a_layer_is_that_of_its_tokens():
    x, weight = correlated_inputs(64, 16), torch.randn(6, 16)
    delta = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    expected = (x @ delta.t()).square().sum(1).mean().item()
    assert hessian_error(delta, second_moment(x)).item() == pytest.approx(expected, rel=1e-4)
    assert output_error(weight, weight + delta, second_moment(x)) == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------ the search, as a loop over whole-model forwards
# (weights that share the scale, module whose output is compared; None: the linear layer itself), in block order


def _mixtral():
    gate_up = [f"mlp.experts.gate_up_proj[{e}]" for e in range(8)]
    down = [([f"mlp.experts.down_proj[{e}]"], None) for e in range(8)]
    return [(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "self_attn"), (gate_up, "mlp"), *down]


QKV = (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "self_attn")
SITES = {
    "llama": [QKV, (["mlp.gate_proj", "mlp.up_proj"], "mlp"), (["mlp.down_proj"], None)],
    "opt": [QKV, (["self_attn.out_proj"], None), (["fc1"], None), (["fc2"], None)],
    "gpt2": [(["attn.c_attn"], "attn"), (["attn.c_proj"], None), (["mlp.c_fc"], "mlp")],
    "mixtral": _mixtral(),
}


def _model(name):
    """A model some of whose channels carry large values, as those of language models do, and calibration tokens."""
    model, config = tiny_model(name)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path or "ln_" in path:
                parameter[3::7] *= 8
    return model, tokens(config, batch=6, length=16, seed=2)


class _Search:
    """One block of an untouched model, the weights of one site, and what their module computes in a whole forward."""

    def __init__(self, model, calibration, index, names, scope):
        self.model, self.calibration = model, calibration
        self.block, self.scope = find_blocks(model)[1][index], scope
        groups = structure_of(model, calibration, index).groups
        refs = {ref.name.removesuffix(".weight"): ref for group in groups for ref in group.weights}
        self.refs = [refs[name] for name in names]
        self.weights = [ref.read(self.block).clone() for ref in self.refs]
        inputs = []
        for ref in self.refs:
            with InputsOf(self.block, ref) as taken:
                model(calibration)
            inputs += taken.seen
        self.x = torch.cat([*inputs, torch.zeros(0, self.weights[0].shape[1])])
        self.expected = self.output()

    def output(self):
        if self.scope is None:
            return self.x @ self.refs[0].read(self.block).t()
        captured = []
        module = self.block.get_submodule(self.scope)
        handle = module.register_forward_hook(lambda *call: captured.append(call[2]))
        self.model(self.calibration)
        handle.remove()
        return captured[0][0] if isinstance(captured[0], tuple) else captured[0]

    def losses(self, *, duo=False, heads=None):
        """Mean squared change of the output for every ratio of the grid, and the scales.

        duo: divide by the weights' share of their group's maximum, to the rest of the power. heads: shape (key/value
        heads, query heads for each, head dimension) over whose second dimension scales are averaged.
        """
        salience = self.x.abs().mean(0) if len(self.x) else torch.zeros(self.x.shape[1])
        rows = torch.cat(self.weights).abs().unflatten(1, (-1, GROUP))
        share = (rows / rows.amax(2, keepdim=True)).flatten(1).double().mean(0)
        losses, scales = [], []
        for step in range(N_GRID):
            s = salience.clamp_min(1e-4).double() ** (step / N_GRID)
            s = s / share ** (1 - step / N_GRID) if duo and step else s
            s = s / (s.max() * s.min()).sqrt()
            if heads and self.refs[0].name == "self_attn.o_proj.weight":
                s = s.view(heads).mean(1, keepdim=True).expand(heads).flatten()
            for ref, weight in zip(self.refs, self.weights, strict=True):
                ref.write(self.block, round_to_nearest(weight * s.float(), BITS, False, GROUP) / s)
            losses.append((self.output() - self.expected).square().mean().item() if len(self.x) else 0.0)
            scales.append(s)
        for ref, weight in zip(self.refs, self.weights, strict=True):
            ref.write(self.block, weight)
        return losses, scales


GROUPED = [*SITES["llama"][:1], (["self_attn.o_proj"], None), *SITES["llama"][1:]]
CASES = {
    **{name: (name, sites, {}, {}) for name, sites in SITES.items()},
    "llama duo": ("llama", SITES["llama"], {"duo": True}, {"duo": True}),
    "llama grouped heads": ("llama", GROUPED, {"grouped_heads": True}, {"heads": (2, 2, 8)}),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_chooses_the_ratio_that_a_loop_over_whole_forwards_chooses(case):
    name, sites, options, definition = CASES[case]
    model, calibration = _model(name)
    wanted = recipe("awq_scale", bits=BITS, group_size=GROUP, awq_scale={"search_tokens": 10**6, **options})
    result = run_pass(MemorySource(model), wanted, calibration)
    found = {(b, m.removesuffix(".weight"), n): value for b, m, n, value in result.ledger.metrics}
    capture_calls(model, calibration[:1])  # experts one by one
    ratios = set()
    for index in range(len(find_blocks(model)[1])):
        for names, scope in sites:
            losses, _ = _Search(model, calibration, index, names, scope).losses(**definition)
            ratio, gain = (found[index, names[0], metric] for metric in ("awq_ratio", "awq_loss_vs_rtn"))
            chosen = losses[round(ratio * N_GRID)]
            assert chosen <= min(losses) * (1 + 1e-3), (index, names)
            assert gain == pytest.approx(chosen / losses[0] if losses[0] else 1.0, rel=1e-3)
            assert gain <= 1
            ratios.add(ratio)
    assert len(ratios) > 2
    searched = [key for key in found if key[2] == "awq_ratio"]
    assert len(searched) == len(sites) * len(find_blocks(model)[1])


@torch.no_grad()
def test_folds_the_chosen_scales_into_a_llama_and_rounds_what_they_leave():
    """The whole transformation written out: W diag(s) rounded, 1/s in the norms and in the rows of up_proj."""
    model, calibration = _model("llama")
    wanted = recipe("awq_scale", bits=BITS, group_size=GROUP, awq_scale={"search_tokens": 10**6})
    found = decoded(model, run_pass(MemorySource(model), wanted, calibration).weights)
    expected = copy.deepcopy(dict(model.named_parameters()))
    for index in range(2):
        own = {path: expected[f"model.layers.{index}.{path}.weight"] for path in _paths()}
        scales = []
        for names, scope in SITES["llama"]:
            losses, of_ratio = _Search(model, calibration, index, names, scope).losses()
            scales.append(of_ratio[min(range(N_GRID), key=losses.__getitem__)])
        for s, norm, names in zip(scales, ("input_layernorm", "post_attention_layernorm", None), SITES["llama"]):
            if norm is not None:
                own[norm].div_(s)
            for path in names[0]:
                own[path].mul_(s)
        own["mlp.up_proj"].div_(scales[2][:, None])
        for path in _paths():
            if "norm" not in path:
                own[path].copy_(round_to_nearest(own[path], BITS, False, GROUP))
    for path, value in expected.items():
        assert torch.isclose(found[path], value, rtol=1e-4, atol=1e-6).float().mean() > 0.99, path


def _paths():
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    return [*attention, *(f"mlp.{name}_proj" for name in ("gate", "up", "down")), *_norms()]


def _norms():
    return ["input_layernorm", "post_attention_layernorm"]


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("group_size", [0, -1, 8])
def test_a_grid_of_ratio_zero_alone_is_round_to_nearest(name, group_size):
    model, calibration = _model(name)
    options = {"awq_scale": {"n_grid": 1, "search_tokens": 32}}
    awq, rtn = (
        run_pass(MemorySource(model), recipe(algorithm, group_size=group_size, **chosen), calibration)
        for algorithm, chosen in (("awq_scale", options), ("rtn", {}))
    )
    assert awq.ledger.digests == rtn.ledger.digests
    assert all(torch.equal(value, rtn.weights.tensors[path]) for path, value in awq.weights.tensors.items())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [0, -1, 8])
@pytest.mark.parametrize("duo", [False, True])
def test_the_chosen_loss_is_at_most_that_of_round_to_nearest(symmetric, group_size, duo):
    model, calibration = _model("llama")
    wanted = recipe("awq", group_size=group_size, symmetric=symmetric, awq_scale={"duo": duo, "grouped_heads": True})
    metrics = run_pass(MemorySource(model), wanted, calibration).ledger.metrics
    gains = [value for _, _, metric, value in metrics if metric == "awq_loss_vs_rtn"]
    assert len(gains) == 2 * 4
    assert max(gains) <= 1
    assert min(gains) < 0.95


def test_the_order_of_the_sequences_does_not_matter():
    model, calibration = _model("llama")
    wanted = recipe("awq", awq_scale={"search_tokens": 10**6})
    one, other = (run_pass(MemorySource(model), wanted, windows) for windows in (calibration, calibration.flip(0)))
    ratios = [[m for m in comparable(run.ledger)[3] if m[2] == "awq_ratio"] for run in (one, other)]
    assert ratios[0] == ratios[1]
    for path, value in one.weights.tensors.items():
        assert torch.isclose(value, other.weights.tensors[path], rtol=1e-3, atol=1e-6).float().mean() > 0.99


# ------------------------------------------------------------------ with quantized inputs


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_with_weight_act_the_loss_is_that_of_quantized_inputs_too(static):
    model, calibration = _model("llama")
    fmt = uniform(bits=4, group_size=GROUP, symmetric=False)
    inputs = scopes.inputs_of(4, static=static)
    plain, both = (
        AwqScale(weight_act=weight_act).apply(scopes.view_of(model, calibration, fmt, inputs, index=1))
        for weight_act in (False, True)
    )
    without = AwqScale().apply(scopes.view_of(model, calibration, fmt, index=1))
    assert plain.metrics == without.metrics  # inputs don't count unless asked for
    assert all(torch.equal(value, without.parameters[path]) for path, value in plain.parameters.items())
    for names, scope in SITES["llama"]:
        found = {m: value for where, m, value in both.metrics if where == f"{names[0]}.weight"}
        site = _Search(model, calibration, 1, names, scope)
        losses = [
            scopes.loss_by_definition(
                model,
                calibration,
                1,
                names,
                scope,
                scale=awq_scale(site.x.abs().mean(0), step / N_GRID),
                weights=lambda weight: fake_quantize(weight, fmt),
                inputs=lambda x: scopes.rounded_inputs(x, 4, static=static),
            )
            for step in range(N_GRID)
        ]
        chosen = losses[round(found["awq_ratio"] * N_GRID)]
        assert chosen <= min(losses) * (1 + 1e-2)
        assert found["awq_loss_vs_rtn"] == pytest.approx(chosen / losses[0], rel=2e-2)
    assert [m for m in both.metrics if m[1] == "awq_ratio"] != [m for m in plain.metrics if m[1] == "awq_ratio"]


def test_weight_act_without_quantized_inputs_is_refused():
    fmt, inputs = uniform(bits=4, group_size=GROUP, symmetric=False), scopes.inputs_of(8, static=False)
    pipeline = build_pipeline([{"stage": "awq_scale", "weight_act": True}, {"stage": "rtn"}])
    pipeline.check(frozenset({fmt}), Scheme(weight=fmt, input=inputs))
    with pytest.raises(SpecError, match=r"^algo\.weight_act=true.*quantized inputs") as refused:
        pipeline.check(frozenset({fmt}), Scheme(weight=fmt))
    assert "\n" not in str(refused.value)
