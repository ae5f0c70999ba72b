"""TesseraQ: soft rounding and its hardening, a plain re-implementation of its loop, and what it owes the engine."""

import math
from dataclasses import replace

import pytest
import torch

from qbench.engine.loop import Recipe
from qbench.engine.passes import run_pass
from qbench.engine.source import MemorySource
from qbench.errors import NumericsError, SpecError
from qbench.formats import SCALES, Block, Range, TensorFormat, fit, quantize, uniform
from qbench.formats.element import Codebook
from qbench.formats.ranges import extrema
from qbench.formats.scheme import InputFormat, Scheme
from qbench.stages.pipeline import build_pipeline
from qbench.stages.round_rtn import Rtn
from qbench.stages.round_tesseraq import TesseraQ, token_error
from qbench.stages.tesseraq_core import Packed, SoftRounding, inverse_rectified_sigmoid, rectified_sigmoid
from tests.architectures import tiny_model, tokens
from tests.stages.learning_views import digests, learning_view, linear_view, state, unchanged
from tests.stages.test_autoround import FORMATS, INT3

every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


def _weight(rows=10, columns=32, seed=0):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    if rows > 2:
        weight[1], weight[2], weight[:, 3] = 0, weight[2].abs() + 0.1, 0
    return weight


def _half(weight, fmt):
    """A range that cuts much of the weight off."""
    full = extrema(weight, fmt)
    return Range(0.5 * full.lower, 0.6 * full.upper)


@torch.no_grad()
def _moved(rounding, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rounding.up.add_(torch.randn(rounding.up.shape, generator=generator))
    rounding.factor.add_(0.3 * torch.randn(rounding.factor.shape, generator=generator))
    return rounding


# ------------------------------------------------------------------ the parametrisation


def test_the_rectified_sigmoid_is_inverted_and_ends_at_finite_values():
    share = torch.linspace(0, 1, 1001)
    assert torch.allclose(rectified_sigmoid(inverse_rectified_sigmoid(share)), share, atol=1e-6)
    x = torch.tensor([-math.inf, -9.0, -2.5, 0.0, 2.5, 9.0, math.inf])
    assert rectified_sigmoid(x).tolist() == [0, 0, 0, 0.5, 1, 1, 1]
    steps = rectified_sigmoid(torch.linspace(-2.39, 2.39, 500)).diff()
    assert (steps > 0).all()


@every_format
def test_at_the_start_nothing_is_rounded(fmt):
    """Decoded is the weight itself, but for what lies beyond the first and the last code."""
    weight = _weight()
    params = fit(weight, fmt)
    first, last = (
        fmt.unblocks(((end - (0 if params.zero is None else params.zero)) * params.scale)[..., None]
                     .expand_as(fmt.blocks(weight)), weight.shape)
        for end in (fmt.element.minimum, fmt.element.maximum)
    )  # fmt: skip
    inside = torch.maximum(torch.minimum(weight, torch.maximum(first, last)), torch.minimum(first, last))
    step = params.scale.abs().max().item()
    assert torch.allclose(SoftRounding.start(weight, fmt).fake_quantize(weight, fmt), inside, atol=2e-6 * step + 1e-6)


@every_format
@pytest.mark.parametrize("rows", [1, 10])
def test_deciding_at_once_is_rounding_to_nearest(fmt, rows):
    weight = _weight(rows)
    bounds = _half(weight, fmt)
    start = SoftRounding.start(weight, fmt, bounds).harden(0.0)
    assert not len(start.up)
    codes, nearest = start.quantize(weight, fmt), quantize(weight, fmt, fit(weight, fmt, bounds))
    assert torch.equal(codes.scale, nearest.scale)
    ties = fmt.unblocks((fmt.blocks(weight) / nearest.scale[..., None]).frac().abs() == 0.5, weight.shape)
    assert torch.equal(codes.codes[~ties], nearest.codes[~ties])
    assert torch.equal(start.fake_quantize(weight, fmt), codes.dequantize())


@every_format
def test_what_is_trained_is_what_is_stored_and_codes_lie_beside_the_weight(fmt):
    weight = _weight()
    rounding = _moved(SoftRounding.start(weight, fmt)).harden(0.0)
    codes = rounding.quantize(weight, fmt)
    assert torch.equal(rounding.fake_quantize(weight, fmt), codes.dequantize())
    assert torch.equal(codes.scale, codes.scale.to(fmt.scale.dtype_stored).float())
    params = fit(weight, fmt)
    assert (codes.scale != params.scale).float().mean() > 0.8
    exact = fmt.blocks(weight) / params.scale[..., None] + (0 if params.zero is None else params.zero[..., None])
    exact = fmt.unblocks(exact.clamp(fmt.element.minimum, fmt.element.maximum), weight.shape)
    distance = (fmt.element.from_codes(codes.codes) - exact).abs()
    assert (distance < 1 + 1e-4).all()
    assert (distance > 0.5 + 1e-4).any()


@every_format
def test_exactly_so_many_are_decided_nearest_first_and_for_good(fmt):
    weight = _weight()
    rounding = _moved(SoftRounding.start(weight, fmt))
    for share in (0.8, 0.5, 0.31, 0.0):
        before, earlier = rounding.variables(), len(rounding.up)
        rounding = rounding.harden(share)
        after = rounding.variables()
        assert rounding.up.requires_grad
        assert len(rounding.up) == int(share * weight.numel()) < earlier
        padding = after.numel() - weight.numel()
        assert int(torch.isinf(after).sum()) == weight.numel() - len(rounding.up) + padding
        decided = torch.isinf(before)
        assert torch.equal(after[decided], before[decided])
        soft = ~torch.isinf(after)
        assert torch.equal(after[soft], before[soft])
        assert torch.equal(rounding.up.detach(), after[soft])
        newly = ~soft & ~decided
        score = (rectified_sigmoid(before) - 0.5).abs()
        assert not soft.any() or score[newly].min() >= score[soft].max()
        assert torch.equal(after[newly] > 0, before[newly] > 0)
    assert rounding.harden(0.9) is rounding


@every_format
def test_rows_of_blocks_know_their_own(fmt):
    """Part by part as in one, whatever the rows are."""
    rounding = _moved(SoftRounding.start(_weight(), fmt)).harden(0.4)
    whole = rounding.variables()
    for size in (1, 3, len(whole)):
        rows = [slice(k, k + size) for k in range(0, len(whole), size)]
        assert torch.equal(torch.cat([rounding.variables(part) for part in rows]), whole)
        assert torch.equal(torch.cat([rounding.up[rounding.soft(part)] for part in rows]), rounding.up)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (3, 2, 8)])
def test_four_small_numbers_fit_a_byte(shape):
    values = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = Packed.of(values)
    assert packed.packed.numel() == shape[0] * -(-shape[1] * shape[2] // 4)
    assert torch.equal(packed.values(), values)
    assert torch.equal(packed.values(slice(1, 3)), values[1:3])


def test_ties_do_not_decide_more_than_was_asked_for():
    rounding = SoftRounding.start(torch.full((3, 8), 0.3), INT3)
    for share, soft in ((0.75, 18), (0.5, 12), (0.1, 2)):
        rounding = rounding.harden(share)
        assert len(rounding.up) == soft


@every_format
def test_gradients_are_those_of_the_formula(fmt):
    """Against autograd through the paper's expression, decided and saturated codes among them."""
    weight = _weight()
    rounding = _moved(SoftRounding.start(weight, fmt, _half(weight, fmt)))
    with torch.no_grad():
        rounding.up[::6], rounding.up[1::6] = 4.0, -4.0  # beyond the ends, where nothing moves
    rounding = rounding.harden(0.9)
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    (rounding.fake_quantize(weight, fmt) * upstream).sum().backward()
    up, factor = (x.detach().clone().requires_grad_() for x in (rounding.variables(), rounding.factor))
    s, z = rounding.params.scale[..., None], rounding.params.zero
    z = torch.zeros_like(s) if z is None else z[..., None]
    steps = fmt.blocks(weight) / s
    floor = torch.floor(steps + z) if fmt.zero == "float" else torch.floor(steps) + z
    code = (floor + rectified_sigmoid(up)).clamp(fmt.element.minimum, fmt.element.maximum)
    decoded = fmt.unblocks((code - z) * s * 2 * rectified_sigmoid(factor)[..., None], weight.shape)
    (decoded * upstream).sum().backward()
    # The scale is rounded to its dtype, which the expression leaves out.
    assert torch.allclose(rounding.up.grad, up.grad[~torch.isinf(up)], rtol=1e-2, atol=1e-5)
    assert torch.allclose(rounding.factor.grad, factor.grad, rtol=1e-2, atol=2e-2 * factor.grad.abs().max())
    assert 0 < (rounding.up.grad != 0).float().mean() < 1


def test_a_scale_never_vanishes():
    rounding = SoftRounding.start(_weight(), INT3)
    with torch.no_grad():
        rounding.factor.fill_(-100)
    assert (rounding.decoding_scale(INT3) > 0).all()
    assert (rounding.decoding_scale(INT3) < 0.01 * rounding.params.scale)[rounding.params.scale != 1].all()


def test_the_loss_is_summed_over_features_and_averaged_over_tokens():
    output, target = torch.zeros(2, 3, 5), torch.ones(2, 3, 5)
    target[0, 0] = 3
    assert token_error(output, target).item() == pytest.approx((5 * 5 + 9 * 5) / 6)


# ------------------------------------------------------------------ the loop, written once more


def _reference(view, shares, iterations, lr, scale_lr, batch, seed):
    """Algorithm 1 for one asymmetric weight in groups: torch's Adam on tensors in which ±inf is a decision."""
    weight, fmt = view.block.weight.detach(), view.formats["weight"]
    hidden, target = torch.cat(view.data.inputs), torch.cat(view.data.targets)
    grouped = weight.view(weight.shape[0], -1, fmt.group_size)
    low, high = (grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0))
    scale = ((high - low) / (2**fmt.bits - 1)).to(torch.float16).float()[..., None]
    zero = (-low[..., None] / scale).round()
    fraction = grouped / scale - torch.floor(grouped / scale)
    up, factor = -torch.log(1.2 / (fraction + 0.1) - 1), torch.zeros_like(scale)

    def soft(x):
        return (torch.sigmoid(x) * 1.2 - 0.1).clamp(0, 1)

    def values(up, factor):
        s = scale * 2 * soft(factor)
        s = s + (s.to(torch.float16).float() - s).detach()
        code = (torch.floor(grouped / scale) + soft(up) + zero).clamp(0, 2**fmt.bits - 1)
        return ((code - zero) * s).view_as(weight)

    generator = torch.Generator().manual_seed(seed)
    for share in shares:
        order = (soft(up) - 0.5).abs().flatten().sort(descending=True, stable=True).indices
        chosen = order[: up.numel() - int(share * up.numel())]
        flat = up.detach().flatten().clone()
        flat[chosen] = torch.where(flat[chosen] > 0, math.inf, -math.inf)
        up, factor = flat.view_as(up).requires_grad_(), factor.detach().requires_grad_()
        rates = [{"params": [up], "lr": lr}, {"params": [factor], "lr": scale_lr, "weight_decay": 1e-4}]
        adam = torch.optim.Adam(rates)
        for _ in range(iterations):
            chosen = torch.randperm(len(hidden), generator=generator)[:batch]
            output = view.block.norm(hidden[chosen]) @ values(up, factor).mT
            loss = (output - target[chosen]).square().sum(-1).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
    with torch.no_grad():
        return values(torch.where(up > 0, math.inf, -math.inf), factor)


@pytest.mark.parametrize("scale_lr", [None, 0.003])
def test_it_is_the_authors_loop(scale_lr):
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(4))
    view = linear_view(weight, uniform(bits=2, group_size=8, symmetric=False))
    stage = TesseraQ(iterations=25, thresholds="0.7 0.4 0.1", lr=0.02, scale_lr=scale_lr, batch_size=2)
    expected = _reference(view, (0.7, 0.4, 0.1), 25, 0.02, scale_lr or 0.02, 2, seed=0)
    outcome = stage.apply(view)
    metrics = {metric: value for _, metric, value in outcome.metrics}
    assert metrics["tesseraq_loss_vs_rtn"] < 0.9
    found = outcome.codes["weight"].dequantize()
    assert torch.isclose(found, expected, rtol=2e-3, atol=1e-5).float().mean() > 0.95
    nearest = quantize(view.block.weight, view.formats["weight"])
    changed = (outcome.codes["weight"].codes != nearest.codes).float().mean().item()
    assert metrics["tesseraq_changed"] == pytest.approx(changed)
    assert changed > 0.05


# ------------------------------------------------------------------ on blocks

QUICK = {"iterations": 6, "thresholds": "0.6 0.2", "lr": 0.02}


@pytest.mark.parametrize(
    ("name", "symmetric"), [("llama", False), ("llama", True), ("gpt2", True), ("mixtral", False), ("phi3", False)]
)
def test_it_gains_on_rounding_to_nearest_repeats_itself_and_spoils_nothing(name, symmetric):
    fmt = uniform(bits=2, group_size=8, symmetric=symmetric)
    stage = TesseraQ(iterations=8, thresholds="0.6 0.3 0.1 0.03", lr=0.02)
    outcomes = []
    for seed in (0, 0, 1):
        view = replace(learning_view(name, fmt), generator=torch.Generator().manual_seed(seed))
        before = state(view)
        outcomes.append(stage.apply(view))
        assert unchanged(view, before)
    assert digests(outcomes[0]) == digests(outcomes[1]) != digests(outcomes[2])
    assert outcomes[0].metrics == outcomes[1].metrics
    assert outcomes[0].codes.keys() == view.formats.keys()
    assert {metric: value for _, metric, value in outcomes[0].metrics}["tesseraq_loss_vs_rtn"] < 0.8


@pytest.mark.parametrize("options", [{"iterations": 0}, {"lr": 0.0}])
def test_nothing_learned_is_rounding_to_nearest_on_the_earlier_range(options):
    view = learning_view("llama", INT3)
    view = replace(view, ranges={"self_attn.o_proj.weight": _half(view.block.self_attn.o_proj.weight, INT3)})
    assert digests(TesseraQ(**{**QUICK, **options}).apply(view)) == digests(Rtn().apply(view))


def test_a_result_that_is_worse_than_rounding_to_nearest_is_dropped():
    view = learning_view("llama", uniform(bits=8, group_size=8, symmetric=False))
    outcome = TesseraQ(iterations=1, thresholds="0.9", lr=0.0, scale_lr=0.05).apply(view)
    assert digests(outcome) == digests(Rtn().apply(view))
    metrics = {metric: value for _, metric, value in outcome.metrics}
    assert (metrics["tesseraq_loss_vs_rtn"], metrics["tesseraq_changed"]) == (1, 0)


def test_scales_move_only_when_they_are_learned():
    view = learning_view("llama", INT3)
    nearest = Rtn().apply(view).codes
    for optimize in (True, False):
        found = TesseraQ(**QUICK, optimize_scale=optimize).apply(view).codes
        same = [torch.equal(found[name].scale, codes.scale) for name, codes in nearest.items()]
        assert not any(same) if optimize else all(same)
        assert all(torch.equal(found[name].zero, codes.zero) for name, codes in nearest.items())


def test_every_option_changes_the_result():
    def found(**options):
        view = learning_view("llama", INT3, batch_sizes=(4, 2))
        return digests(TesseraQ(**{**QUICK, **options}).apply(view))

    default = found()
    for options in (
        {"iterations": 7},
        {"thresholds": "0.6 0.3"},
        {"thresholds": "0.6"},
        {"lr": 0.01},
        {"scale_lr": 0.01},
        {"optimize_scale": False},
        {"batch_size": 2},
        {"autocast": True},
    ):
        assert found(**options) != default, options


def test_the_quantization_of_inputs_is_part_of_the_loss():
    a3 = InputFormat(format=uniform(bits=3, group_size=-1, symmetric=True, scale="float32"))
    losses = []
    for inputs in (None, a3):
        outcome = TesseraQ(**QUICK).apply(learning_view("llama", INT3, inputs=inputs))
        losses.append({metric: value for _, metric, value in outcome.metrics}["tesseraq_loss"])
    assert losses[1] > 1.5 * losses[0]


def test_bfloat16_blocks_are_learned_in_float32():
    view = learning_view("llama", INT3, dtype=torch.bfloat16)
    before = state(view)
    outcome = TesseraQ(**QUICK).apply(view)
    assert unchanged(view, before)
    assert {metric: value for _, metric, value in outcome.metrics}["tesseraq_loss_vs_rtn"] < 0.9


def test_the_engine_runs_it_behind_awq_and_shows_one_progress():
    model, config = tiny_model("llama")
    nodes = [{"stage": "awq_scale", "n_grid": 4}, {"stage": "awq_clip"}, {"stage": "tesseraq", **QUICK}]
    pipeline = build_pipeline(nodes)
    pipeline.check(frozenset({INT3}))
    result = run_pass(MemorySource(model), Recipe(pipeline, Scheme(weight=INT3)), tokens(config, batch=6, length=12))
    gains = [value for *_, metric, value in result.ledger.metrics if metric == "tesseraq_loss_vs_rtn"]
    assert len(gains) == 2
    assert all(gain < 0.9 for gain in gains)
    seen = []
    view = learning_view("llama", INT3)
    view = replace(view, data=replace(view.data, report=lambda *values: seen.append(values)))
    TesseraQ(**QUICK).apply(view)
    assert [(step, steps) for step, steps, _ in seen] == [(k + 1, 12) for k in range(12)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": -1}, r"algo\.iterations=-1"),
        ({"lr": -1e-3}, r"algo\.lr=-0\.001"),
        ({"scale_lr": math.nan}, r"algo\.scale_lr=nan"),
        ({"batch_size": 0}, r"algo\.batch_size=0"),
        ({"optimize_scale": False, "scale_lr": 0.1}, r"algo\.scale_lr=0\.1: null with optimize_scale=false"),
        *(
            ({"thresholds": text}, r"algo\.thresholds=.*falling shares")
            for text in ("", "half", "0.5 0.5", "0.2 0.5", "1 0.5", "0.5 -0.1", "nan", "0.5,0.2")
        ),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(SpecError, match=f"^{message}"):
        TesseraQ(**options).check(frozenset({INT3}))


@pytest.mark.parametrize("text", ["0", "0.5 0", "0.999", "0.75 0.5 0.375"])
def test_thresholds_that_mean_something_are_accepted(text):
    TesseraQ(thresholds=text).check(frozenset({INT3}))
    assert TesseraQ(thresholds=text).soft_shares == tuple(map(float, text.split()))


@pytest.mark.parametrize(
    "fmt",
    [
        TensorFormat(element=Codebook("ternary", (-1.0, 0.0, 1.0), 1.6), block=Block(1, 8)),
        replace(INT3, scale=SCALES["int8"]),
    ],
)
def test_formats_without_gradients_are_refused(fmt):
    with pytest.raises(SpecError, match=r"integers with float scales with tesseraq"):
        TesseraQ().check(frozenset({INT3, fmt}))


def test_an_output_that_is_not_finite_is_an_error_that_names_the_block():
    view = learning_view("llama", INT3)
    view.data.targets[0][0, 0, 0] = math.inf
    with pytest.raises(NumericsError, match=r"^block 0: the loss of the quantized block's output is inf"):
        TesseraQ(**QUICK).apply(view)
