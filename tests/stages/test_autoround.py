"""AutoRound: its parametrisation, a plain re-implementation of its loop, and what it owes the engine."""

import math
from dataclasses import replace

import pytest
import torch

from qbench.engine.loop import Recipe
from qbench.engine.passes import run_pass
from qbench.engine.source import MemorySource
from qbench.errors import NumericsError, SpecError
from qbench.formats import SCALES, Block, Float, Int, Range, TensorFormat, fit, quantize, uniform
from qbench.formats.ranges import RangeFit, extrema
from qbench.formats.scheme import InputFormat, Scheme
from qbench.stages.pipeline import build_pipeline
from qbench.stages.round_autoround import AutoRound, Rounding
from qbench.stages.round_rtn import Rtn
from tests.architectures import tiny_model, tokens
from tests.stages.learning_views import digests, learning_view, linear_view, state, unchanged

INT3 = uniform(bits=3, group_size=8, symmetric=False)
FORMATS = {
    "groups": INT3,
    "rows of int2": uniform(bits=2, group_size=-1, symmetric=False),
    "one scale": uniform(bits=4, group_size=0, symmetric=False),
    "midpoint": uniform(bits=3, group_size=8, symmetric=True),
    "narrow": TensorFormat(element=Int(3, signed=True, reach="narrow"), block=Block(1, 8)),
    "full": TensorFormat(element=Int(2, signed=True, reach="full"), block=Block(1, 8)),
    "float zero": replace(INT3, zero="float"),
    "short last group": uniform(bits=3, group_size=7, symmetric=False, partial=True),
    "tiles": replace(INT3, block=Block(3, 8), partial=True),
    "bfloat16 scales": uniform(bits=4, group_size=8, symmetric=False, scale="bfloat16"),
    "searched range": replace(INT3, range=RangeFit(method="mse", grid=10)),
}
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


def _weight(rows=10, columns=32, seed=0):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    if rows > 2:
        weight[1], weight[2], weight[:, 3] = 0, weight[2].abs() + 0.1, 0
    return weight


@torch.no_grad()
def _moved(rounding, seed=0):
    """The rounding with learned values anywhere in their intervals, both ends among them."""
    generator = torch.Generator().manual_seed(seed)
    rounding.offset.copy_(torch.rand(rounding.offset.shape, generator=generator) - 0.5)
    rounding.offset[:, ::5], rounding.offset[:, 1::5] = 0.5, -0.5
    for share in (rounding.lower, rounding.upper):
        share.copy_(0.6 + 0.4 * torch.rand(share.shape, generator=generator))
    return rounding


# ------------------------------------------------------------------ the parametrisation


@every_format
@pytest.mark.parametrize("rows", [1, 10])
@pytest.mark.parametrize("given", [False, True])
def test_the_start_is_rounding_to_nearest(fmt, rows, given):
    weight = _weight(rows)
    full = extrema(weight, fmt)
    bounds = Range(0.8 * full.lower, 0.7 * full.upper) if given else None
    start = Rounding.start(weight, fmt, bounds)
    expected = quantize(weight, fmt, fit(weight, fmt, bounds))
    assert start.quantize(weight, fmt).sha256() == expected.sha256()
    assert torch.equal(start.fake_quantize(weight, fmt), expected.dequantize())


@every_format
def test_what_is_trained_is_what_is_stored(fmt):
    weight = _weight()
    rounding = _moved(Rounding.start(weight, fmt))
    codes = rounding.quantize(weight, fmt)
    assert torch.equal(rounding.fake_quantize(weight, fmt), codes.dequantize())
    assert codes.sha256() != quantize(weight, fmt).sha256()


@every_format
def test_offsets_alone_move_a_code_by_one_at_most_and_no_zero_at_all(fmt):
    weight = _weight()
    rounding = _moved(Rounding.start(weight, fmt))
    with torch.no_grad():
        rounding.lower.fill_(1)
        rounding.upper.fill_(1)
    found, nearest = rounding.quantize(weight, fmt), quantize(weight, fmt)
    assert torch.equal(found.scale, nearest.scale)
    change = found.codes.int() - nearest.codes.int()
    assert change.unique().tolist() == [-1, 0, 1]
    if fmt.zero != "float":  # which may lie between codes
        assert not found.dequantize()[weight == 0].any()


@every_format
def test_confining_puts_everything_back_into_its_interval_and_resetting_to_the_start(fmt):
    weight = _weight()
    rounding = Rounding.start(weight, fmt)
    with torch.no_grad():
        rounding.offset.normal_(std=2, generator=torch.Generator().manual_seed(0))
        rounding.lower.sub_(1.5), rounding.upper.add_(0.5)
    wanted = rounding.offset.clamp(-0.5, 0.5)
    rounding.confine()
    assert torch.equal(rounding.offset, wanted)
    assert (rounding.lower.unique().tolist(), rounding.upper.unique().tolist()) == ([0], [1])
    rounding.reset()
    assert rounding.quantize(weight, fmt).sha256() == quantize(weight, fmt).sha256()


# ------------------------------------------------------------------ the loop, written once more


def _reference(view, iters, lr, minmax_lr, batch, seed):
    """Algorithm 1 of the paper for one asymmetric weight in groups, with nothing but torch's autograd."""
    weight, fmt = view.block.weight.detach(), view.formats["weight"]
    hidden, target = torch.cat(view.data.inputs), torch.cat(view.data.targets)
    grouped = weight.view(weight.shape[0], -1, fmt.group_size)
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)

    def ste(x, value):
        return x + (value - x).detach()

    def values(v, a, b):
        scale = (high * b - low * a) / (2**fmt.bits - 1)
        scale = ste(scale, scale.to(torch.float16).float())[..., None]
        zero = -(low * a)[..., None] / scale
        zero = ste(zero, zero.round())
        steps = grouped / scale + v.view_as(grouped)
        code = (ste(steps, steps.round()) + zero).clamp(0, 2**fmt.bits - 1)
        return ((code - zero) * scale).view_as(weight)

    learned = [torch.zeros_like(weight), torch.ones_like(low), torch.ones_like(low)]
    learned = [x.requires_grad_() for x in learned]
    generator = torch.Generator().manual_seed(seed)
    best, kept = math.inf, None
    for step in range(iters):
        chosen = torch.randperm(len(hidden), generator=generator)[:batch]
        output = view.block.norm(hidden[chosen]) @ values(*learned).mT
        loss = (output - target[chosen]).square().mean()
        if loss.item() < best:
            best, kept = loss.item(), [x.detach().clone() for x in learned]
        gradients = torch.autograd.grad(loss, learned)
        with torch.no_grad():
            for x, g, rate, (least, most) in zip(
                learned, gradients, (lr, minmax_lr, minmax_lr), ((-0.5, 0.5), (0, 1), (0, 1)), strict=True
            ):
                x.sub_(rate * (1 - step / iters) * g.sign()).clamp_(least, most)
    return values(*kept)


def _random(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("iters", "rates"), [(60, (None, None)), (80, (None, None)), (30, (0.03, 0.01))])
def test_it_is_the_authors_loop(iters, rates):
    view = linear_view(_random(6, 16), INT3)
    stage = AutoRound(iters=iters, batch_size=2, lr=rates[0], minmax_lr=rates[1])
    lr, minmax_lr = stage.rates
    assert rates[0] is not None or lr == minmax_lr == 1 / iters
    expected = _reference(view, iters, lr, minmax_lr, 2, seed=0)
    outcome = stage.apply(view)
    assert outcome.metrics[0][2] < 1
    found = outcome.codes["weight"].dequantize()
    # The order of sums decides the sign of a gradient that is all but 0.
    assert torch.isclose(found, expected, atol=1e-4).float().mean() > 0.97
    assert (found != quantize(view.block.weight, INT3).dequantize()).float().mean() > 0.2


def test_learned_rounding_that_is_no_better_over_all_sequences_is_dropped():
    """The smallest of 30 minibatch losses here belongs to easy sequences: the reference keeps what is worse on all."""
    view = linear_view(_random(6, 16), INT3)
    outcome = AutoRound(iters=30, batch_size=2).apply(view)
    metrics = {name: value for _, name, value in outcome.metrics}
    assert metrics["autoround_best_step"] > 0
    assert metrics["autoround_loss_vs_rtn"] == 1
    assert digests(outcome) == digests(Rtn().apply(view))

    def loss(weight):
        pairs = zip(view.data.inputs, view.data.targets, strict=True)
        return sum((view.block.norm(x) @ weight.mT - y).square().sum().item() for x, y in pairs)

    assert loss(_reference(view, 30, 1 / 30, 1 / 30, 2, seed=0)) > loss(outcome.codes["weight"].dequantize())
    elements = sum(y.numel() for y in view.data.targets)
    assert metrics["autoround_loss"] == pytest.approx(loss(outcome.codes["weight"].dequantize()) / elements, rel=1e-4)


# ------------------------------------------------------------------ on blocks


@pytest.mark.parametrize(
    ("name", "symmetric"), [("llama", False), ("llama", True), ("gpt2", True), ("mixtral", False), ("phi3", False)]
)
def test_it_gains_on_rounding_to_nearest_repeats_itself_and_spoils_nothing(name, symmetric):
    fmt = uniform(bits=2, group_size=8, symmetric=symmetric)
    stage = AutoRound(iters=12, batch_size=4)
    outcomes = []
    for seed in (0, 0, 1):
        view = learning_view(name, fmt, seed=seed)
        view = replace(view, generator=torch.Generator().manual_seed(seed))
        before = state(view)
        outcomes.append(stage.apply(view))
        assert unchanged(view, before)
    assert digests(outcomes[0]) == digests(outcomes[1]) != digests(outcomes[2])
    assert outcomes[0].metrics == outcomes[1].metrics
    assert outcomes[0].codes.keys() == view.formats.keys()
    metrics = {metric: value for _, metric, value in outcomes[0].metrics}
    assert metrics["autoround_loss_vs_rtn"] < 0.8


@pytest.mark.parametrize("options", [{"iters": 0}, {"iters": 3, "lr": 0.0}])
def test_nothing_learned_is_rounding_to_nearest_on_the_earlier_range(options):
    view = learning_view("llama", INT3)
    full = extrema(view.block.self_attn.o_proj.weight, INT3)
    view = replace(view, ranges={"self_attn.o_proj.weight": Range(0.5 * full.lower, 0.9 * full.upper)})
    assert digests(AutoRound(**options).apply(view)) == digests(Rtn().apply(view))


def test_ranges_shrink_only_with_minmax_tuning():
    view = learning_view("llama", INT3)
    nearest = Rtn().apply(view).codes
    tuned, fixed = (
        AutoRound(iters=10, batch_size=4, enable_minmax_tuning=tune).apply(view).codes for tune in (True, False)
    )
    for name, codes in nearest.items():
        assert (tuned[name].scale <= codes.scale).all()
        assert (tuned[name].scale < codes.scale).any()
        assert torch.equal(fixed[name].scale, codes.scale)


def test_every_option_changes_the_result():
    def found(**options):
        view = learning_view("llama", INT3, batch_sizes=(4, 2))
        outcome = AutoRound(**{"iters": 12, "lr": 0.02, "batch_size": 4, **options}).apply(view)
        assert outcome.metrics[0][2] < 1
        return digests(outcome)

    default = found()
    for options in (
        {"iters": 13},
        {"lr": 0.03},
        {"minmax_lr": 0.01},
        {"enable_minmax_tuning": False},
        {"batch_size": 2},
        {"autocast": True},
    ):
        assert found(**options) != default, options


def test_the_quantization_of_inputs_is_part_of_the_loss():
    a3 = InputFormat(format=uniform(bits=3, group_size=-1, symmetric=True, scale="float32"))
    losses = []
    for inputs in (None, a3):
        view = learning_view("llama", INT3, inputs=inputs)
        losses.append({m: v for _, m, v in AutoRound(iters=8, batch_size=4).apply(view).metrics}["autoround_loss"])
    assert losses[1] > 1.5 * losses[0]


def test_bfloat16_blocks_are_learned_in_float32():
    view = learning_view("llama", INT3, dtype=torch.bfloat16)
    before = state(view)
    outcome = AutoRound(iters=10, batch_size=4).apply(view)
    assert unchanged(view, before)
    assert digests(outcome) != digests(Rtn().apply(view))
    assert {m: v for _, m, v in outcome.metrics}["autoround_loss_vs_rtn"] < 0.9


def test_the_engine_runs_it_on_both_streams_and_behind_clipping():
    model, config = tiny_model("llama")
    nodes = [{"stage": "awq_clip"}, {"stage": "autoround", "iters": 40, "batch_size": 4}]
    pipeline = build_pipeline(nodes)
    pipeline.check(frozenset({INT3}))
    result = run_pass(MemorySource(model), Recipe(pipeline, Scheme(weight=INT3)), tokens(config, batch=6, length=12))
    gains = [value for *_, metric, value in result.ledger.metrics if metric == "autoround_loss_vs_rtn"]
    assert len(gains) == 2
    assert all(gain < 0.9 for gain in gains)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iters": -1}, r"algo\.iters=-1"),
        ({"lr": -1e-3}, r"algo\.lr=-0\.001"),
        ({"lr": math.nan}, r"algo\.lr=nan"),
        ({"minmax_lr": math.inf}, r"algo\.minmax_lr=inf"),
        ({"batch_size": 0}, r"algo\.batch_size=0"),
        ({"enable_minmax_tuning": False, "minmax_lr": 0.1}, r"algo\.minmax_lr=0\.1: null with enable_minmax_tuning"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(SpecError, match=f"^{message}"):
        AutoRound(**options).check(frozenset({INT3}))


@pytest.mark.parametrize(
    "fmt", [TensorFormat(element=Float(2, 1), block=Block(1, 8)), replace(INT3, scale=SCALES["e4m3"])]
)
def test_formats_without_gradients_are_refused(fmt):
    with pytest.raises(SpecError, match=r"integers with float scales with autoround"):
        AutoRound().check(frozenset({INT3, fmt}))


def test_an_output_that_is_not_finite_is_an_error_that_names_the_block():
    view = learning_view("llama", INT3)
    view.data.targets[0][0, 0, 0] = math.nan
    with pytest.raises(NumericsError, match=r"^block 0: the loss of the quantized block's output is nan"):
        AutoRound(iters=2, batch_size=4).apply(view)
