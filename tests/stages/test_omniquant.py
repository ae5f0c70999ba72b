"""OmniQuant: what it begins with, one step by hand, and what is learned."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qbench.calibration.extremes import Extremes
from qbench.calibration.statistics import AbsMax
from qbench.engine.loop import Recipe
from qbench.engine.passes import run_pass
from qbench.engine.source import MemorySource
from qbench.engine.student import make_student
from qbench.formats import RangeFit, fake_quantize, uniform
from qbench.formats.ranges import extrema
from qbench.formats.scheme import Scheme
from qbench.models.load import load_model
from qbench.stages.base import BlockData, BlockView
from qbench.stages.learned_folds import LearnedFold, letable_folds
from qbench.stages.pipeline import build_pipeline
from qbench.stages.range_omniquant import OmniQuant
from qbench.stages.transform_smoothquant import SmoothQuant
from qbench.structure.blocks import BlockCall
from qbench.structure.folds import find_folds
from qbench.structure.trace import trace_block
from tests.architectures import tiny_model, tokens
from tests.engine.helpers import tiny_asset, tiny_windows
from tests.stages.learning import A4, BOTH, W2, W4, WEIGHT_ONLY, learning_view, loss_of, metric_of, refs_of


@pytest.mark.parametrize(("scheme", "options"), [(WEIGHT_ONLY, {}), (BOTH, {}), (BOTH, {"aug_loss": True})])
@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_the_loss_that_is_kept_is_that_of_the_block_which_rounding_makes(name, scheme, options):
    view = learning_view(name, scheme)
    outcome = OmniQuant(epochs=2, lwc_lr=0.05, **options).apply(view)
    initial, best = metric_of(outcome, "loss_initial"), metric_of(outcome, "loss_best")
    start = OmniQuant(epochs=0, **options).apply(view)
    assert loss_of(view, start, bool(options)) == pytest.approx(initial, rel=1e-4)
    assert loss_of(view, outcome, bool(options)) == pytest.approx(best, rel=1e-4)
    assert best <= initial
    assert best < initial or name == "mixtral"
    means = [value for _, metric, value in outcome.metrics if metric.startswith("omniquant_loss_epoch")]
    assert len(means) == 2


@pytest.mark.parametrize("options", [{"epochs": 0}, {"lwc_lr": 0.0, "let_lr": 0.0, "epochs": 2}])
def test_no_rate_and_no_epochs_give_smoothquant_and_nearly_min_max(options):
    view = learning_view("llama", BOTH)
    outcome = OmniQuant(**options).apply(view)
    smooth = SmoothQuant(alpha=0.5)
    largest = {index: {AbsMax: AbsMax(0, torch.device("cpu"))} for index in view.statistics}
    for index, found in largest.items():
        ends = view.statistics[index][Extremes].value()
        found[AbsMax].largest = torch.maximum(-ends[0], ends[1])
    expected = smooth.apply(replace(view, statistics=largest))
    assert expected.parameters.keys() == outcome.parameters.keys()
    for path, value in expected.parameters.items():
        assert torch.allclose(outcome.parameters[path], value, rtol=1e-5, atol=1e-7)
    for index, scale in expected.input_scales.items():
        assert torch.allclose(outcome.input_scales[index], scale, rtol=1e-5)
    share = torch.tensor(4.0).sigmoid()
    for name, ref in refs_of(view).items():
        full = extrema(ref.of(outcome.parameters.get(ref.parameter, view.weight(ref))), W4)
        assert torch.allclose(outcome.ranges[name].upper, share * full.upper, rtol=1e-5)
        assert torch.allclose(outcome.ranges[name].lower, share * full.lower, rtol=1e-5)


class _Toy(nn.Module):
    """RMS norm, linear, SiLU, linear, residual: in plain torch, with the gains and weights as parameters."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.gain = nn.Parameter(torch.rand(8, generator=generator) + 0.5)
        self.first = nn.Parameter(torch.randn(12, 8, generator=generator) / 3)
        self.second = nn.Parameter(torch.randn(8, 12, generator=generator) / 3)

    def forward(self, x):
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain
        return x + F.linear(F.silu(F.linear(normed, self.first)), self.second)


def _rounded(w, lower, upper, group, steps):
    """Asymmetric integers per group of columns with straight-through rounding, no saturation gradient, float64."""
    columns = []
    for k in range(w.shape[1] // group):
        part, lo, up = w[:, k * group : (k + 1) * group], lower[:, k : k + 1], upper[:, k : k + 1]
        s = (up - lo) / steps
        s = s + (s.half().double() - s).detach()
        z = -lo / s
        z = (z + (z.round() - z).detach()).clamp(0, steps)
        q = part / s
        q = (q + (q.round() - q).detach() + z).clamp(0, steps)
        columns.append((q - z) * s)
    return torch.cat(columns, dim=1)


def test_one_step_is_that_of_plain_torch():
    """LWC and LET of a toy block: gradients by plain autograd in float64, AdamW's first step by its formula."""
    block, fmt = _Toy(), uniform(3, 4, False)
    generator = torch.Generator().manual_seed(4)
    hidden, target = (torch.randn(1, 5, 8, generator=generator) for _ in range(2))
    call = BlockCall(args=(), kwargs={})
    with torch.no_grad():
        structure = trace_block(block, call, hidden)
        structure = replace(structure, folds=find_folds(block, call, hidden, structure))
    assert [fold.kind for fold in structure.folds] == ["norm"]
    seen = {group.index: {Extremes: Extremes(group.in_features, torch.device("cpu"))} for group in structure.groups}
    with torch.no_grad():
        normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6) * block.gain
    seen[0][Extremes].update(normed)
    student = make_student(block, structure, {}, None, lambda _: call)
    data = BlockData(inputs=(hidden,), full_inputs=(hidden,), targets=(target,), student=student, teacher=lambda x: x)
    view = BlockView(
        block=block,
        structure=structure,
        groups=structure.groups,
        formats={"first": fmt, "second": fmt},
        statistics=seen,
        data=data,
    )
    lwc_lr, let_lr = 0.3, 0.02  # so that the step shows
    stage = OmniQuant(let=True, epochs=1, lwc_lr=lwc_lr, let_lr=let_lr, keep_best=False, weight_decay=0.1)
    outcome = stage.apply(view)

    gain, first, second = (value.detach().double() for value in (block.gain, block.first, block.second))
    scale = (normed.abs().amax((0, 1)).double() ** 0.5 / first.abs().amax(0) ** 0.5).requires_grad_()
    logits = [
        torch.full((rows, groups), 4.0, dtype=torch.float64, requires_grad=True)
        for rows, groups in [(12, 2), (12, 2), (8, 3), (8, 3)]
    ]

    def quantized(w, low, up):
        blocks = w.view(w.shape[0], -1, 4)
        lower, upper = blocks.amin(-1).clamp_max(0), blocks.amax(-1).clamp_min(0)
        return _rounded(w, low.sigmoid() * lower, up.sigmoid() * upper, 4, 7)

    x = hidden.double()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (gain / scale)
    w1, w2 = quantized(first * scale, *logits[:2]), quantized(second, *logits[2:])
    output = x + F.silu(normed @ w1.t()) @ w2.t()
    (output - target.double()).square().mean().backward()

    def stepped(p, lr):
        gradient = p.grad
        return (p - lr * 0.1 * p - lr * gradient / (gradient.abs() + 1e-8)).detach()

    free = stepped(scale, let_lr).float()
    assert torch.allclose(outcome.input_scales[0], free, rtol=1e-4)
    assert torch.allclose(outcome.parameters["first"], block.first.detach() * free, rtol=1e-4)
    assert torch.allclose(outcome.parameters["gain"], block.gain.detach() / free, rtol=1e-4)
    for name, weight, (low, up) in [("first", first * free, logits[:2]), ("second", second, logits[2:])]:
        blocks = weight.view(weight.shape[0], -1, 4)
        lower, upper = blocks.amin(-1).clamp_max(0), blocks.amax(-1).clamp_min(0)
        for found, wanted, logit in [
            (outcome.ranges[name].lower, lower, low),
            (outcome.ranges[name].upper, upper, up),
        ]:
            expected = (stepped(logit, lwc_lr).sigmoid() * wanted).float()
            known = logit.grad.abs() > 1e-7  # beside the optimizer's 1e-8 the sign is all that counts
            assert torch.allclose(found[known], expected[known], rtol=1e-4)
            assert known.float().mean() > 0.5


def test_shifts_are_learned_where_there_are_biases_and_inputs_are_quantized():
    view = learning_view("opt", BOTH)
    moved = OmniQuant(epochs=0).apply(view).parameters
    kept = OmniQuant(epochs=0, shift=False).apply(view).parameters
    assert not torch.equal(moved["self_attn_layer_norm.bias"], kept["self_attn_layer_norm.bias"])
    ends = view.statistics[0][Extremes].value()
    scale = OmniQuant(epochs=0).apply(view).input_scales[0]
    before = view.block.get_parameter("self_attn_layer_norm.bias")
    assert torch.allclose(moved["self_attn_layer_norm.bias"], (before - ends.mean(0)) / scale, rtol=1e-4, atol=1e-6)
    alone = learning_view("opt", Scheme(weight=W4))
    names = [OmniQuant(epochs=0, let=True, shift=s).apply(alone).parameters for s in (True, False)]
    assert all(torch.equal(names[0][path], names[1][path]) for path in names[1])


def test_query_heads_of_one_value_head_share_the_scale_of_their_extremes():
    view = learning_view("llama", BOTH)
    view.statistics[1][Extremes].ends[:] = torch.tensor([[-9.0], [0.5]]) * torch.linspace(0.1, 1, 32)  # low ends count
    outcome = OmniQuant(epochs=0, grouped_heads=True, alpha=0.6).apply(view)
    a = (9 * torch.linspace(0.1, 1, 32)).view(2, 2, 8).amax(1)  # key/value heads, query heads of each, features
    w = view.block.self_attn.o_proj.weight.detach().abs().amax(0).view(2, 2, 8).amax(1)
    found = outcome.input_scales[1].view(2, 2, 8)
    assert torch.allclose(found, (a**0.6 / w**0.4)[:, None].expand(2, 2, 8), rtol=1e-4)


def test_scales_begin_at_one_behind_a_search_that_gave_ranges():
    view = learning_view("opt", BOTH)
    name, ref = next(iter(refs_of(view).items()))
    behind = replace(view, ranges={name: extrema(view.weight(ref), W4)})
    for shown, init, begins in [
        (view, "auto", False),
        (view, "identity", True),
        (behind, "auto", True),
        (behind, "smooth", False),
    ]:
        outcome = OmniQuant(epochs=0, let_init=init).apply(shown)
        assert all(torch.equal(s, torch.ones_like(s)) for s in outcome.input_scales.values()) == begins
        parameters = dict(view.block.named_parameters())
        assert all(torch.equal(value, parameters[path]) for path, value in outcome.parameters.items()) == begins


def test_scales_stay_positive():
    fold = letable_folds(learning_view(), False)[0]
    learned = LearnedFold.start(fold, torch.full((fold.n_free,), -3.0), None)
    assert torch.equal(learned.scale.detach(), torch.full((fold.n_free,), 1e-2))
    view = learning_view("llama", BOTH)
    outcome = OmniQuant(let_lr=5.0, epochs=1, keep_best=False).apply(view)
    assert min(scale.min().item() for scale in outcome.input_scales.values()) == pytest.approx(1e-2)


@pytest.fixture(scope="module")
def trained():
    """The model that the package carries, and calibration windows."""
    return load_model(tiny_asset(), dtype=torch.float32, device="cpu"), tiny_windows(4, 64)


def _run(model, windows, nodes, scheme):
    pipeline = build_pipeline([*nodes, {"stage": "rtn"}])
    pipeline.check(scheme.weights, scheme)
    return run_pass(MemorySource(model), Recipe(pipeline, scheme), windows)


def _values(result, metric):
    return [value for _, _, name, value in result.ledger.metrics if name == metric]


@pytest.mark.parametrize("bits", [2, 3])
def test_the_loss_falls_on_every_block_of_a_trained_model(trained, bits):
    scheme = Scheme(weight=uniform(bits, 64, False))
    result = _run(*trained, [{"stage": "omniquant", "epochs": 3, "lwc_lr": 0.1}], scheme)
    initial, best = _values(result, "omniquant_loss_initial"), _values(result, "omniquant_loss_best")
    assert len(best) == 4
    assert all(b < 0.98 * i for b, i in zip(best, initial, strict=True))


def test_it_goes_on_from_searched_ranges(trained):
    scheme = Scheme(weight=uniform(2, 64, False))
    clip = {"stage": "awq_clip", "clip_range": "asymmetric"}
    searched = _run(*trained, [clip], scheme)
    began = _run(*trained, [clip, {"stage": "omniquant", "epochs": 0}], scheme)
    assert began.ledger.digests == searched.ledger.digests
    learned = _run(*trained, [clip, {"stage": "omniquant", "epochs": 2, "lwc_lr": 0.03}], scheme)
    best = _values(learned, "omniquant_loss_best")
    alone = _values(_run(*trained, [{"stage": "omniquant", "epochs": 0}], scheme), "stream_error")
    assert _values(learned, "stream_error")[-1] < alone[-1]
    assert all(b < i for b, i in zip(best, _values(learned, "omniquant_loss_initial"), strict=True))


def test_a_format_that_searches_its_own_ranges_is_where_it_begins():
    fmt = replace(W2, range=RangeFit(method="mse"))
    view = learning_view(scheme=Scheme(weight=fmt))
    found = OmniQuant(epochs=0).apply(view)
    for name, ref in refs_of(view).items():
        weight = view.weight(ref)
        assert torch.allclose(
            fake_quantize(weight, W2, found.ranges[name]), fake_quantize(weight, fmt), rtol=1e-3, atol=1e-5
        )


def test_it_is_deterministic_and_changes_nothing_it_is_shown():
    outcomes = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        view = learning_view("opt", BOTH)
        before = {path: value.detach().clone() for path, value in view.block.named_parameters()}
        outcomes.append(OmniQuant(epochs=2).apply(view))
        assert all(torch.equal(value, before[path]) for path, value in view.block.named_parameters())
        assert all(value.grad is None for value in view.block.parameters())
    for path, value in outcomes[0].parameters.items():
        assert torch.equal(value, outcomes[1].parameters[path])
    for name, bounds in outcomes[0].ranges.items():
        assert torch.equal(bounds.lower, outcomes[1].ranges[name].lower)
        assert not bounds.lower.requires_grad
    assert outcomes[0].metrics == outcomes[1].metrics


def test_engine_guards_and_rounds_it_in_every_dtype():
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        model, config = tiny_model("llama", dtype=dtype)
        windows = tokens(config, batch=5, length=12)
        result = _run(model, windows, [{"stage": "omniquant", "epochs": 2, "batch_size": 2}], BOTH)
        assert max(_values(result, "omniquant_function_error")) < tolerance
        assert all(v == v for v in _values(result, "omniquant_loss_best"))


def test_odd_blocks_are_learned_too():
    """Zero rows, dead channels, experts without tokens, one row per group, one group per row."""
    model, _ = tiny_model("mixtral")
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("q_proj.weight"):
                parameter[3] = 0
            if path.endswith("input_layernorm.weight"):
                parameter[5] = 0
    for fmt in (uniform(2, -1, False), uniform(3, 0, True), W2):
        view = learning_view(scheme=Scheme(weight=fmt, input=A4), model=model, batch=1, length=3)
        counts = [found[Extremes].tokens for found in view.statistics.values()]
        assert 0 in counts
        outcome = OmniQuant(epochs=2).apply(view)
        assert all(torch.isfinite(value).all() for value in outcome.parameters.values())
        assert loss_of(view, outcome) == pytest.approx(metric_of(outcome, "loss_best"), rel=1e-4)
        assert metric_of(outcome, "loss_best") <= metric_of(outcome, "loss_initial")
