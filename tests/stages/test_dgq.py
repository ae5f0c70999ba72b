"""DGQ: two-level rounding by its definition, in a loop; what fits int8; the smoothing before it."""

from dataclasses import replace

import pytest
import torch

from qbench.calibration.statistics import AbsMax, Hessian
from qbench.engine.loop import Recipe
from qbench.engine.passes import run_pass
from qbench.engine.source import MemorySource
from qbench.errors import NumericsError, SpecError
from qbench.formats import SCALES, Block, Int, Range, RangeFit, TensorFormat, fit, quantize, uniform
from qbench.formats.packing import pack, unpack
from qbench.formats.ranges import extrema
from qbench.formats.scheme import Override, Scheme
from qbench.stages import round_dgq
from qbench.stages.pipeline import build_pipeline
from qbench.stages.round_dgq import Dgq, dgq
from qbench.stages.transform_dgq import PercentileSmooth, in_attention, percentile_scale
from tests.architectures import ARCHITECTURES
from tests.stages.references import correlated_inputs, second_moment
from tests.stages.scopes import by_name, inputs_of, loud, same_state, state_of, view_of

A8 = inputs_of(8, static=False)


def _format(bits=4, group=8):
    return TensorFormat(
        element=Int(bits, signed=False), block=Block(1, group), zero="int", scale=SCALES["int8"], partial=True
    )


def _problem(rows=6, columns=24, seed=3):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1
    weight[:, ::9] *= 3
    weight[:, :8] *= 0.2  # groups of unequal size, as integer scales dislike
    return weight, second_moment(correlated_inputs(50, columns))


def _error(values, weight, hessian):
    delta = (values - weight).double()
    return (delta @ hessian.double() * delta).sum(1)


# ------------------------------------------------------------------ the definition, in a loop


def _by_definition(weight, hessian, fmt, n_grid, n_grid_channel):
    """(error, int8 scale, integer scales, zeros) of the best channel scale of each row, by loops over everything."""
    top, width = 2**fmt.bits - 1, fmt.block.columns
    found = []
    for row in weight.double():
        scales, zeros = [], []
        for start in range(0, len(row), width):
            group = row[start : start + width]
            part = hessian[start : start + width, start : start + width].double()
            low, high = min(group.min().item(), 0), max(group.max().item(), 0)
            best = None
            for k in range(n_grid + 1):
                share = 1.02 - 0.22 * k / n_grid if k else 1.0
                s = share * (high - low) / top or 1.0
                z = min(max(round(-share * low / s), 0), top)
                delta = ((group / s).round() + z).clamp(0, top).sub(z) * s - group
                loss = (delta @ part @ delta).item()
                if best is None or loss < best[0]:
                    best = (loss, s, z)
            scales.append(best[1])
            zeros.append(best[2])
        choice = None
        for k in range(1, n_grid_channel + 1):
            share = 1.02 - 0.82 * k / n_grid_channel
            s8 = torch.tensor(share * row.abs().max().item() / 127).half().double().item() or 1.0
            whole = [min(max(round(s4 / s8), 1), 127) for s4 in scales]
            values = []
            for j, w in enumerate(row.tolist()):
                step, z = whole[j // width], zeros[j // width]
                limit = 127 // step
                q = round(w / (step * s8)) + z
                q = min(max(q, z - limit, 0), z + limit, top)
                values.append((q - z) * step * s8)
            delta = torch.tensor(values, dtype=torch.float64) - row
            loss = (delta @ hessian.double() @ delta).item()
            if choice is None or loss < choice[0]:
                choice = (loss, s8, whole, zeros)
        found.append(choice)
    return found


@pytest.mark.parametrize(("bits", "group"), [(4, 8), (3, 8), (4, 7), (2, 24)])
def test_every_row_gets_what_a_loop_over_all_scales_gives(bits, group):
    weight, hessian = _problem()
    fmt = _format(bits, group)
    found = dgq(weight, hessian, fmt, n_grid=5, n_grid_channel=20)
    errors, plain = (_error(q.dequantize(), weight, hessian) for q in (found, quantize(weight, fmt)))
    searched = 0
    for k, (loss, s8, whole, zeros) in enumerate(_by_definition(weight, hessian, fmt, 5, 20)):
        assert errors[k].item() == pytest.approx(min(loss, plain[k].item()), rel=1e-3)
        if loss < 0.999 * plain[k]:
            searched += 1
            assert found.outer[k].item() == pytest.approx(s8)
            assert found.scale_codes[k].tolist() == whole
            assert found.zero[k].tolist() == zeros
    assert searched >= 3


def test_what_is_stored_is_integers_within_int8():
    weight, hessian = _problem(rows=32, columns=64)
    for bits in (2, 3, 4):
        fmt = _format(bits)
        found = dgq(weight, hessian, fmt)
        levels = fmt.element.from_codes(found.codes)
        blocks = (fmt.blocks(levels) - found.zero[..., None]) * found.scale_codes.float()[..., None]
        assert blocks.abs().max() <= 127
        assert found.scale_codes.min() >= 1
        assert torch.equal(found.scale, SCALES["int8"].value(found.scale_codes, found.outer, found.scale.shape))
        assert torch.equal(found.outer, found.outer.half().float())
        assert torch.equal(found.dequantize(), fmt.unblocks(blocks * found.outer[..., None], weight.shape))
        assert torch.equal(found.zero, found.zero.round())
        assert 0 <= found.zero.min() <= found.zero.max() <= 2**bits - 1
        assert torch.equal(unpack(pack(found)).dequantize(), found.dequantize())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_row_is_worse_than_rounded_to_nearest_in_two_levels_and_most_are_better(seed, bits):
    weight, hessian = _problem(rows=16, columns=48, seed=seed)
    fmt = _format(bits)
    ours, plain = (_error(q.dequantize(), weight, hessian) for q in (dgq(weight, hessian, fmt), quantize(weight, fmt)))
    assert bool((ours <= plain * (1 + 1e-5)).all())
    assert ours.sum() < 0.97 * plain.sum()


def test_a_range_that_an_earlier_stage_chose_is_where_the_search_starts():
    weight, hessian = _problem()
    fmt = _format()
    full = extrema(weight, fmt)
    clip = Range(0.5 * full.lower, 0.5 * full.upper)
    clipped, free = (dgq(weight, hessian, fmt, clip=c) for c in (clip, None))
    reach = 0.5 * 1.02 * torch.maximum(full.upper, -full.lower).amax(1)
    assert bool((clipped.dequantize().abs().amax(1) <= reach * 1.2).all())
    assert not torch.equal(clipped.dequantize(), free.dequantize())
    plain = quantize(weight, fmt, fit(weight, fmt, clip)).dequantize()
    assert bool((_error(clipped.dequantize(), weight, hessian) <= _error(plain, weight, hessian) * (1 + 1e-5)).all())


def test_rows_are_searched_in_parts_with_the_same_result(monkeypatch):
    weight, hessian = _problem(rows=7)
    fmt = _format()
    clip = extrema(weight * 0.9, fmt)
    whole = [dgq(weight, hessian, fmt, clip=c) for c in (None, clip)]
    monkeypatch.setattr(round_dgq, "ROWS", 3)
    for one, c in zip(whole, (None, clip)):
        other = dgq(weight, hessian, fmt, clip=c)
        for name in ("codes", "scale", "zero", "scale_codes", "outer"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_rows_of_zeros_dead_columns_and_no_tokens_at_all():
    weight, hessian = _problem()
    weight[1], weight[2, :8] = 0, 0
    hessian[5], hessian[:, 5] = 0, 0
    fmt = _format()
    found = dgq(weight, hessian, fmt)
    assert not found.dequantize()[1].any()
    assert not found.dequantize()[2, :8].any()
    assert torch.isfinite(found.dequantize()).all()
    untouched = dgq(weight, torch.zeros(24, 24), fmt)
    assert torch.equal(untouched.codes, quantize(weight, fmt).codes)
    single = dgq(weight[:1], hessian, _format(group=24))
    assert single.scale.shape == (1, 1)


@pytest.mark.parametrize("option", [{"n_grid": 3}, {"n_grid_channel": 7}])
def test_both_grids_matter(option):
    weight, hessian = _problem(rows=16)
    assert not torch.equal(
        dgq(weight, hessian, _format()).dequantize(), dgq(weight, hessian, _format(), **option).dequantize()
    )


# ------------------------------------------------------------------ percentile smoothing


def test_channels_above_the_percentile_come_down_to_it():
    inputs = torch.rand(400, generator=torch.Generator().manual_seed(0)) + 0.5
    inputs[[7, 100]] = torch.tensor([30.0, 90.0])
    scale = percentile_scale(inputs, 99.5)
    baseline = torch.quantile(inputs.double(), 0.995).item()
    loud_ones = inputs > baseline
    assert loud_ones.sum() == 2
    assert torch.equal(scale[~loud_ones], torch.ones(398))
    assert torch.allclose((inputs / scale)[loud_ones], torch.full((2,), baseline))
    assert torch.equal(percentile_scale(inputs, 100.0), torch.ones(400))
    assert torch.equal(percentile_scale(torch.tensor([0.0] * 300 + [5.0]), 99.5), torch.ones(301))
    assert torch.equal(percentile_scale(torch.zeros(3), 50.0), torch.ones(3))


MLP = {"llama": "mlp.down_proj", "opt": "fc2", "phi3": "mlp.down_proj", "olmo2": "mlp.down_proj"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_what_an_mlp_feeds_itself_is_smoothed(name):
    model, calibration = loud(name)
    view = view_of(model, calibration, _format(), A8)
    outcome = PercentileSmooth(percentile=90.0).apply(view)
    outside = {f.group for f in view.structure.folds if f.kind == "linear" and not in_attention(view.structure, f)}
    assert outcome.input_scales.keys() == outside
    smoothed = {ref.name for index in outside for ref in view.structure.groups[index].weights}
    assert all("down_proj" in path or path == "fc2.weight" for path in smoothed)
    assert all(not {"o_proj", "out_proj", "dense", "c_proj"} & set(path.split(".")) for path in smoothed)
    if name in MLP:
        assert smoothed == {MLP[name] + ".weight"}
    if name == "mixtral":
        assert len(smoothed) == 8
    for index in outside:
        inputs = view.statistics[index][AbsMax].value()
        expected = (inputs / torch.quantile(inputs, 0.9)).clamp_min(1)
        expected = expected if view.statistics[index][AbsMax].tokens else torch.ones_like(inputs)
        assert torch.allclose(outcome.input_scales[index], expected)


def test_a_parallel_block_whose_norm_feeds_attention_and_mlp_is_smoothed_in_the_mlp():
    model, calibration = loud("stablelm", use_parallel_residual=True)
    view = view_of(model, calibration, _format(), A8)
    outcome = PercentileSmooth().apply(view)
    (index,) = outcome.input_scales
    assert [ref.name for ref in view.structure.groups[index].weights] == ["mlp.down_proj.weight"]


# ------------------------------------------------------------------ in the engine


def _nodes(**options):
    return [{"stage": "smoothquant"}, {"stage": "percentile_smooth"}, {"stage": "dgq", **options}]


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pipeline_runs_keeps_the_function_and_beats_plain_rounding(name, dtype):
    model, calibration = loud(name, dtype=dtype)
    expected = model(calibration).logits.float()
    scheme, distances = Scheme(weight=_format(), input=A8), []
    for nodes in (_nodes(), [{"stage": "rtn"}]):
        pipeline = build_pipeline(nodes)
        pipeline.check(scheme.weights, scheme)
        result = run_pass(MemorySource(model), Recipe(pipeline, scheme), calibration)
        errors = [value for *_, metric, value in result.ledger.metrics if metric.endswith("_function_error")]
        assert max(errors, default=0) < (1e-5 if dtype == torch.float32 else 5e-2)
        with result.weights.inside(model) as changed, torch.no_grad():
            distances.append((changed(calibration).logits.float() - expected).square().mean().item())
    assert distances[0] < 0.9 * distances[1]


def test_the_stage_is_its_core_on_every_weight():
    model, calibration = loud("llama")
    view = view_of(model, calibration, _format(), A8)
    outcome = Dgq(n_grid=3, n_grid_channel=9).apply(view)
    for group in view.structure.groups:
        for ref in group.weights:
            hessian = view.statistics[group.index][Hessian].value()
            expected = dgq(ref.read(view.block), hessian, _format(), n_grid=3, n_grid_channel=9)
            assert torch.equal(outcome.codes[ref.name].dequantize(), expected.dequantize())
    assert len(outcome.codes) == 7
    group, _ = by_name(view, "mlp.up_proj.weight")
    view.statistics[group.index][Hessian].total[0, 0] = torch.nan
    with pytest.raises(NumericsError, match=r"block 0, mlp\.gate_proj\.weight: input of the layer is not finite"):
        Dgq().apply(view)


@pytest.mark.parametrize("stage", [PercentileSmooth(percentile=80.0), Dgq(n_grid=2, n_grid_channel=3)])
def test_they_change_nothing_that_they_were_shown_and_repeat_themselves(stage):
    view = view_of(*loud("llama"), _format(), A8)
    before = state_of(view)
    one, other = (stage.apply(view) for _ in range(2))
    assert same_state(before, state_of(view))
    assert same_state(one.parameters, other.parameters)
    assert all(torch.equal(codes.codes, other.codes[name].codes) for name, codes in one.codes.items())
    assert one.parameters or one.codes


def test_an_input_that_is_not_finite_cannot_be_smoothed():
    view = view_of(*loud("llama"), _format(), A8)
    view.statistics[3][AbsMax].largest[3] = torch.inf
    with pytest.raises(NumericsError, match=r"block 0, mlp\.down_proj\.weight: input of the layer is not finite"):
        PercentileSmooth().apply(view)


TWO_LEVEL = _format()
REFUSED = {
    "n_grid": ({"n_grid": 0}, Scheme(weight=TWO_LEVEL, input=A8)),
    "n_grid_channel": ({"n_grid_channel": 0}, Scheme(weight=TWO_LEVEL, input=A8)),
    "scale_dtype": ({}, Scheme(weight=uniform(bits=4, group_size=8, symmetric=False), input=A8)),
    "symmetric": ({}, Scheme(weight=replace(TWO_LEVEL, element=Int(4, signed=True), zero="none"), input=A8)),
    "range.method": ({}, Scheme(weight=replace(TWO_LEVEL, range=RangeFit(method="mse")), input=A8)),
    "act_bits": ({}, Scheme(weight=TWO_LEVEL)),
    "act_bits of 6": ({}, Scheme(weight=TWO_LEVEL, input=inputs_of(6, static=False))),
    "act_bits of some": (
        {},
        Scheme(weight=TWO_LEVEL, input=A8, overrides=(Override(modules="down_proj", roles=("input",)),)),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_is_not_made_for_is_refused_in_one_line(case):
    options, scheme = REFUSED[case]
    with pytest.raises(SpecError) as refused:
        build_pipeline(_nodes(**options)).check(scheme.weights, scheme)
    assert str(refused.value).split("=")[0].removeprefix("algo.") == case.partition(" ")[0]
    assert "\n" not in str(refused.value)


def test_blocks_that_stay_in_full_precision_need_no_int8_inputs():
    skipped = Override(blocks=(0,), roles=("weight", "input"))
    scheme = Scheme(weight=TWO_LEVEL, input=A8, overrides=(skipped,))
    build_pipeline(_nodes()).check(scheme.weights, scheme)


@pytest.mark.parametrize("percentile", [-1.0, 100.5, float("nan")])
def test_a_percentile_is_one(percentile):
    with pytest.raises(SpecError, match=r"^algo\.percentile=.*from 0 to 100"):
        PercentileSmooth(percentile=percentile).check(frozenset())
