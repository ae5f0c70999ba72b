"""Norm tweaking: its loss, which parameters it finds, what one step does, and what it owes the engine."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from qbench.engine.loop import Recipe
from qbench.engine.passes import run_pass
from qbench.engine.source import MemorySource
from qbench.errors import NumericsError, SpecError, StructureError
from qbench.formats import fake_quantize, uniform
from qbench.formats.scheme import Scheme
from qbench.stages.base import Kind
from qbench.stages.pipeline import build_pipeline
from qbench.stages.reconstruct_normtweaking import NormTweaking, channel_distance, find_norms, layer_rate
from qbench.structure.blocks import capture_calls, find_blocks
from tests.architectures import ARCHITECTURES, tiny_model, tokens
from tests.engine.helpers import decoded
from tests.stages.learning_views import learning_view, linear_view, state, unchanged

INT3 = uniform(bits=3, group_size=8, symmetric=False)


def _metrics(outcome):
    return {metric: value for _, metric, value in outcome.metrics}


@torch.no_grad()
def _rounded(name, **options):
    """A view of a block whose weights are quantized, as this stage sees it."""
    view = learning_view(name, INT3, **{"batch_sizes": (1, 4, 6), "noise": 0.05, **options})
    for group in view.groups:
        for ref in group.weights:
            ref.write(view.block, fake_quantize(ref.read(view.block).float(), INT3))
    return view


# ------------------------------------------------------------------ the loss


def test_the_distance_is_that_of_means_and_variances_of_channels():
    generator = torch.Generator().manual_seed(0)
    output, target = (torch.randn(3, 5, 4, generator=generator) * scale for scale in (1, 2))
    expected = 0.0
    for channel in range(4):
        values = [[x[s, t, channel].item() for s in range(3) for t in range(5)] for x in (output, target)]
        means = [math.fsum(v) / 15 for v in values]
        variances = [math.fsum((x - m) ** 2 for x in v) / 15 for v, m in zip(values, means, strict=True)]
        expected += abs(means[0] - means[1]) + abs(variances[0] - variances[1])
    assert channel_distance(output, target).item() == pytest.approx(expected / 4, rel=1e-5)
    shuffled = output.flatten(0, 1)[torch.randperm(15, generator=generator)].view_as(output)
    assert channel_distance(shuffled, target).item() == pytest.approx(expected / 4, rel=1e-5)
    assert channel_distance(shuffled, output).item() < 1e-6
    assert channel_distance(torch.ones(1, 1, 4), torch.zeros(1, 1, 4)).item() == 1  # a single token varies by nothing


def test_later_blocks_move_faster():
    assert [layer_rate(0.1, 3.0, index, 4) for index in range(4)] == pytest.approx([0.1, 0.175, 0.25, 0.325])
    assert layer_rate(0.1, 0.0, 3, 4) == 0.1


# ------------------------------------------------------------------ what is trained


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_found_by_what_they_do(name, dtype):
    model, config = tiny_model(name, dtype=dtype)
    with torch.no_grad():
        hidden, calls = capture_calls(model, tokens(config))
    for block, call in zip(find_blocks(model)[1], calls, strict=True):
        by_name = [path for path, _ in block.named_parameters() if "norm" in path or "ln_" in path]
        assert list(find_norms(block, lambda b=block, c=call: c(b, hidden))) == by_name


class Gain(nn.Module):
    def __init__(self, n, constant=False):
        super().__init__()
        self.weight = nn.Parameter(torch.full((n,), 1.5), requires_grad=False)
        self.constant = constant

    def forward(self, x):
        return self.weight.expand_as(x) if self.constant else x * self.weight


class NormalizingLinear(Gain):
    def __init__(self, n):
        super().__init__(n)
        self.matrix = nn.Parameter(torch.eye(n), requires_grad=False)

    def forward(self, x):
        return nn.functional.normalize(x, dim=-1) @ self.matrix * self.weight


def test_other_vectors_are_no_norms():
    others = (Gain(8, constant=True), NormalizingLinear(8), nn.Linear(8, 8))
    block = nn.Sequential(Gain(8), nn.LayerNorm(8), *others, nn.RMSNorm(8))
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    assert find_norms(block, lambda: block(x)) == ("1.weight", "1.bias", "5.weight")
    assert find_norms(block, lambda: None) == ()  # what is not called
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_a_block_without_norms_is_refused():
    view = linear_view(torch.randn(4, 8), INT3)
    view.block.norm = nn.Identity()
    with pytest.raises(StructureError, match=r"^block 3: normtweaking finds no norm"):
        NormTweaking().apply(view)


# ------------------------------------------------------------------ one step, and many


@pytest.mark.parametrize("distance", ["channel", "mse"])
def test_one_step_is_adams(distance):
    view = _rounded("opt")
    view = replace(view, index=2, count=8)
    stage = NormTweaking(lr=0.01, lr_scale=4.0, batch_size=6, distance=distance)
    found = stage.apply(view).parameters
    own = {path: view.block.get_parameter(path) for path in found}
    learned = {path: value.detach().clone().requires_grad_() for path, value in own.items()}
    output = view.data.student(learned, torch.cat(view.data.inputs))
    target = torch.cat(view.data.targets)
    loss = channel_distance(output, target) if distance == "channel" else nn.functional.mse_loss(output, target)
    adam = torch.optim.Adam(learned.values(), lr=0.01 * (1 + 4 * 2 / 8))
    loss.backward()
    adam.step()
    moved = torch.cat([(found[path] - own[path]).abs() for path in found])
    assert moved.median().item() == pytest.approx(0.02, rel=1e-3)  # Adam's first step is the rate itself
    for path, value in learned.items():
        # The order of sums decides the sign of a gradient that is all but 0.
        assert torch.isclose(found[path], value, atol=1e-5).float().mean() > 0.9, path


@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2", "mixtral"])
@pytest.mark.parametrize("distance", ["channel", "mse"])
def test_it_gains_repeats_itself_and_spoils_nothing(name, distance):
    view = _rounded(name)
    before = state(view)
    stage = NormTweaking(lr=2e-3, epochs=3, distance=distance)
    first, second = stage.apply(view), stage.apply(view)
    assert unchanged(view, before)
    assert first.metrics == second.metrics
    assert all(torch.equal(second.parameters[path], value) for path, value in first.parameters.items())
    assert set(first.parameters) == {path for path in before if "norm" in path or "ln_" in path}
    assert all(not torch.equal(before[path], value) for path, value in first.parameters.items())
    metrics = _metrics(first)
    assert metrics["normtweaking_loss_best"] < 0.97 * metrics["normtweaking_loss_initial"]
    assert (first.codes, first.ranges, first.input_scales) == ({}, {}, {})


@pytest.mark.parametrize("options", [{"epochs": 0}, {"lr": 0.0}])
def test_nothing_learned_leaves_the_norms_alone(options):
    view = _rounded("llama")
    for path, value in NormTweaking(**options).apply(view).parameters.items():
        assert torch.equal(value, view.block.get_parameter(path))


def test_what_training_spoils_is_dropped():
    view = _rounded("llama")
    outcome = NormTweaking(lr=1.0).apply(view)
    assert all(torch.equal(value, view.block.get_parameter(path)) for path, value in outcome.parameters.items())
    assert _metrics(outcome)["normtweaking_best_step"] == 0


def test_every_option_changes_the_result():
    def found(**options):
        view = replace(_rounded("llama"), index=1, count=2)
        parameters = NormTweaking(**{"lr": 1e-3, **options}).apply(view).parameters
        return torch.cat([parameters[path] for path in sorted(parameters)])

    default = found()
    for options in ({"lr": 2e-3}, {"lr_scale": 0.5}, {"epochs": 2}, {"distance": "mse"}, {"batch_size": 4}):
        assert not torch.equal(found(**options), default), options


def test_bfloat16_norms_are_learned_in_float32():
    view = _rounded("llama", dtype=torch.bfloat16)
    outcome = NormTweaking(lr=5e-3, epochs=2).apply(view)
    assert all(value.dtype == torch.bfloat16 for value in outcome.parameters.values())
    metrics = _metrics(outcome)
    assert metrics["normtweaking_loss_best"] < metrics["normtweaking_loss_initial"]
    small = NormTweaking(lr=2e-4, epochs=20, batch_size=6).apply(view)  # steps below bfloat16's add up
    assert any(not torch.equal(value, view.block.get_parameter(path)) for path, value in small.parameters.items())


# ------------------------------------------------------------------ in a pass


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_only_norms_differ_from_the_rounded_model_and_its_output_comes_closer(rounding):
    """Of the first block: later ones are rounded behind it, and GPTQ then rounds them otherwise."""
    model, config = tiny_model("llama")
    calibration = tokens(config, batch=6, length=12)
    nodes = [{"stage": rounding}, {"stage": "normtweaking", "lr": 2e-3, "epochs": 3}]
    results = []
    for count in (1, 2):
        pipeline = build_pipeline(nodes[:count])
        results.append(run_pass(MemorySource(model), Recipe(pipeline, Scheme(weight=INT3)), calibration))
    plain, tweaked = (decoded(model, result.weights) for result in results)
    original = dict(model.named_parameters())
    first = [path for path in original if ".layers.0." in path] if rounding == "gptq" else list(original)
    changed = {path for path in first if not torch.equal(plain[path], tweaked[path])}
    assert changed == {path for path in first if ".layers." in path and "norm" in path}
    losses = {}
    for block, _, metric, value in results[1].ledger.metrics:
        losses[metric, block] = value
    for block in range(2):
        assert losses["normtweaking_loss_best", block] < losses["normtweaking_loss_initial", block]
    hidden = []
    for values in (original, plain, tweaked):
        with torch.no_grad():
            states = torch.func.functional_call(
                model, values, kwargs={"input_ids": calibration, "output_hidden_states": True}
            )
        hidden.append(states.hidden_states[1])
    distances = [channel_distance(x, hidden[0]).item() for x in hidden[1:]]
    assert distances[1] < 0.97 * distances[0]


def test_it_comes_after_rounding():
    assert NormTweaking.kind == Kind.RECONSTRUCT
    with pytest.raises(SpecError, match="ROUND < RECONSTRUCT"):
        build_pipeline([{"stage": "normtweaking"}, {"stage": "rtn"}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, r"algo\.lr=-0\.001"),
        ({"lr": math.nan}, r"algo\.lr=nan"),
        ({"lr_scale": -1.0}, r"algo\.lr_scale=-1"),
        ({"lr_scale": math.inf}, r"algo\.lr_scale=inf"),
        ({"epochs": -1}, r"algo\.epochs=-1"),
        ({"batch_size": 0}, r"algo\.batch_size=0"),
        ({"distance": "kl"}, r"algo\.distance=kl: one of channel, mse"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(SpecError, match=f"^{message}"):
        NormTweaking(**options).check(frozenset({INT3}))


def test_an_output_that_is_not_finite_is_an_error_that_names_the_block():
    view = _rounded("llama")
    view.data.targets[0][0, 0, 0] = math.nan
    with pytest.raises(NumericsError, match=r"^block 0, normtweaking: the loss is nan at step 0"):
        NormTweaking().apply(view)
