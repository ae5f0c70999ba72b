"""GPTAQ: GPTQ where nothing drifts, the paper's steps by brute force, and what it gains on inputs that did drift."""

import pytest
import torch

from qbench.calibration.statistics import CrossMoment, Hessian
from qbench.engine.loop import Recipe
from qbench.engine.passes import run_pass
from qbench.engine.source import MemorySource
from qbench.errors import NumericsError, SpecError, StructureError
from qbench.formats import Range, uniform
from qbench.formats.ranges import extrema
from qbench.formats.scheme import Override, Scheme
from qbench.stages.gptq_core import gptq, toward_full
from qbench.stages.pipeline import build_pipeline
from tests.architectures import tiny_model, tokens
from tests.stages.references import correlated_inputs, grid, nearest, second_moment

COLUMNS = 40


def _weight(rows=10, columns=COLUMNS, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _inputs(columns=COLUMNS, tokens_=400, seed=0, drift=0.3):
    """Full-precision inputs and quantized ones: part of the difference follows from the inputs, part is noise."""
    generator = torch.Generator().manual_seed(seed + 100)
    full = correlated_inputs(tokens_, columns, seed)
    mixed = full @ torch.randn(columns, columns, generator=generator) / columns**0.5
    return full, full + drift * mixed + 0.1 * drift * torch.randn(full.shape, generator=generator)


def _moments(full, x):
    statistics = Hessian(x.shape[1], x.device), CrossMoment(x.shape[1], x.device)
    statistics[0].update(x)
    statistics[1].update(x, full)
    return tuple(statistic.value() for statistic in statistics)


def _format(bits=3, group_size=-1, symmetric=False):
    return uniform(bits=bits, group_size=group_size, symmetric=symmetric, partial=True)


def _asymmetric_error(weight, decoded, full, x):
    return (x @ decoded.t() - full @ weight.t()).square().sum().item()


# ------------------------------------------------------------------ the core


@pytest.mark.parametrize("group_size", [0, -1, 8, 7])
@pytest.mark.parametrize("source", ["compensated", "stale", "original"])
@pytest.mark.parametrize("act_order", [False, True])
def test_without_a_drift_it_is_gptq_bit_for_bit(group_size, source, act_order):
    hessian, _ = _moments(*_inputs())
    options = {"scale_source": source, "act_order": act_order, "block_size": 16}
    found = gptq(_weight(), hessian, _format(3, group_size), drift=torch.zeros_like(hessian), **options)
    expected = gptq(_weight(), hessian, _format(3, group_size), **options)
    assert found.weight.sha256() == expected.weight.sha256()
    assert found.loss == expected.loss


def _by_brute_force(weight, hessian, drift, *, bits, group_size, damp, order):
    """Decoded weight [out, in], float64: after each column, what is left is the least-squares answer to the column's
    own rounding error and to its share of the drift, from the inverse of the Hessian of the columns that remain."""
    hessian, drift, work = hessian.double(), drift.double(), weight.double().clone()
    hessian = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    decoded, parameters = torch.empty_like(work), grid(work, bits, False)
    for k, column in enumerate(order.tolist()):
        if group_size > 0 and k % group_size == 0:
            parameters = grid(work[:, order[k : k + group_size]], bits, False)
        here, rest = work[:, column].clone(), order[k + 1 :]
        decoded[:, column] = nearest(here[:, None], *parameters, bits)[:, 0]
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        # The error of this column in the output is (q - w) x_j - w_j d_j; the others answer with -E[error xᵀ] H⁻¹.
        owed = (here - decoded[:, column])[:, None] * hessian[column, rest] + here[:, None] * drift[column, rest]
        work[:, rest] += owed @ inverse
    return decoded


@pytest.mark.parametrize("group_size", [-1, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_columns_take_over_what_rounding_and_drift_cost_the_ones_before(group_size, act_order, alpha):
    weight = _weight()
    hessian, drift = _moments(*_inputs())
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(COLUMNS)
    options = {"damp": 0.02, "act_order": act_order, "block_size": 16}
    found = gptq(weight, hessian, _format(3, group_size), drift=alpha * drift, **options).weight.dequantize()
    expected = _by_brute_force(weight, hessian, alpha * drift, bits=3, group_size=group_size, damp=0.02, order=order)
    same = torch.isclose(found.double(), expected, rtol=1e-3, atol=1e-4)  # scales are float16
    assert same.float().mean() > 0.98  # a tie decided otherwise spoils the rest of its row
    plain = gptq(weight, hessian, _format(3, group_size), **options).weight.dequantize()
    assert not torch.isclose(plain.double(), expected, rtol=1e-3, atol=1e-4).float().mean() > 0.9


@pytest.mark.parametrize("group_size", [-1, 32, 24])
def test_block_size_changes_nothing_but_the_summation_order(group_size):
    weight = _weight(32, 192)
    hessian, drift = _moments(*_inputs(192, 800))
    results = [
        gptq(weight, hessian, _format(3, group_size), drift=drift, block_size=size) for size in (192, 1, 7, 40, 128)
    ]
    for other in results[1:]:
        assert (other.weight.codes != results[0].weight.codes).float().mean() <= 0.01
        assert other.loss == pytest.approx(results[0].loss, rel=1e-2)


def test_the_output_comes_closer_to_the_full_precision_one():
    errors = []
    for seed in range(6):
        weight, (full, x) = _weight(24, seed=seed), _inputs(seed=seed)
        hessian, drift = _moments(full, x)
        fmt = _format(3, 8)
        decoded = [
            gptq(weight, hessian, fmt).weight.dequantize(),
            gptq(weight, hessian, fmt, drift=0.25 * drift).weight.dequantize(),
            gptq(weight, hessian, fmt, drift=drift).weight.dequantize(),
            gptq(toward_full(weight, hessian, drift, 0.01), hessian, fmt).weight.dequantize(),
        ]
        errors.append([_asymmetric_error(weight, each, full, x) for each in decoded])
    plain, quarter, whole, upfront = torch.tensor(errors).mean(0).tolist()
    assert upfront < whole < 0.9 * plain
    assert quarter < 0.97 * plain


def test_the_weight_is_moved_to_the_least_squares_answer():
    weight, (full, x) = _weight(), _inputs()
    hessian, drift = _moments(full, x)
    expected = torch.linalg.lstsq(x.double(), full.double() @ weight.double().t()).solution.t()
    found = toward_full(weight, hessian, drift, 0.0)
    assert _asymmetric_error(weight, found, full, x) < 0.5 * _asymmetric_error(weight, weight, full, x)
    assert torch.allclose(found.double(), expected, rtol=1e-2, atol=1e-2)


def test_a_column_that_only_the_full_precision_stream_excites_is_made_up_for_by_others():
    weight, (full, x) = _weight(), _inputs()
    x[:, 5] = 0
    hessian, drift = _moments(full, x)
    assert not drift[:, 5].any()
    assert drift[5].any()
    before = hessian.clone(), drift.clone()
    found = gptq(weight, hessian, _format(3, -1), drift=drift).weight.dequantize()
    without = drift.clone()
    without[5] = 0
    other = gptq(weight, hessian, _format(3, -1), drift=without).weight.dequantize()
    assert _asymmetric_error(weight, found, full, x) < _asymmetric_error(weight, other, full, x)
    assert torch.equal(found[:, :6], other[:, :6])
    assert torch.equal(hessian, before[0])
    assert torch.equal(drift, before[1])


# ------------------------------------------------------------------ the stage


def _pass(nodes, name="llama", dtype=torch.float32, group_size=8):
    model, config = tiny_model(name, dtype=dtype)
    pipeline, fmt = build_pipeline(nodes), _format(3, group_size)
    pipeline.check(frozenset({fmt}))
    return run_pass(MemorySource(model), Recipe(pipeline, Scheme(weight=fmt)), tokens(config, batch=6, length=16))


def _digests(result):
    return {digest.rpartition(" ")[0]: digest.rpartition(" ")[2] for digest in result.ledger.digests}


def test_it_departs_from_gptq_where_the_streams_part():
    plain, zero, asked = (
        _digests(_pass([node]))
        for node in ({"stage": "gptq"}, {"stage": "gptaq", "alpha": 0.0}, {"stage": "gptaq", "alpha": 1.0})
    )
    assert zero == plain
    changed = {name for name in plain if asked[name] != plain[name]}
    first = {f"0 self_attn.{part}_proj.weight" for part in "qkv"}  # both streams bring the embeddings
    assert changed == plain.keys() - first


@pytest.mark.parametrize(("name", "dtype"), [("opt", torch.float32), ("llama", torch.bfloat16)])
def test_it_runs_on_other_models_and_every_option_matters(name, dtype):
    nodes = [{"stage": "gptaq"}, {"stage": "gptaq", "alpha": 0.5}, {"stage": "gptaq", "residual": "upfront"}]
    nodes += [{"stage": "gptaq", "damp": 0.5}, {"stage": "gptaq", "act_order": True}]
    results = [_pass([node], name, dtype) for node in nodes]
    assert len({result.ledger.codes_sha256 for result in results}) == len(nodes)
    assert all(torch.isfinite(value).all() for value in results[0].weights.tensors.values())


def test_given_ranges_are_the_ranges():
    weight, (full, x) = _weight(), _inputs()
    hessian, drift = _moments(full, x)
    whole = extrema(weight, _format(3, 8))
    clip = Range(0.6 * whole.lower, 0.8 * whole.upper)
    found = gptq(weight, hessian, _format(3, 8), drift=drift, clip=clip).weight
    assert torch.equal(found.scale, gptq(weight, hessian, _format(3, 8), clip=clip).weight.scale)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_is_a_share(alpha):
    with pytest.raises(SpecError, match=r"^algo\.alpha=.*from 0 to 1"):
        build_pipeline([{"stage": "gptaq", "alpha": alpha}]).check(frozenset({_format()}))


def test_what_has_no_effect_is_refused_with_gptqs_own_checks():
    for node, refused in (
        ({"alpha": 0, "residual": "upfront"}, r"^algo\.residual=upfront"),
        ({"static_groups": True}, r"^algo\.static_groups=true"),
    ):
        with pytest.raises(SpecError, match=refused):
            build_pipeline([{"stage": "gptaq", **node}]).check(frozenset({_format()}))


def test_experts_are_refused_before_any_is_looked_at_and_may_stay_in_full_precision():
    with pytest.raises(StructureError, match=r"^block 0, mlp\.experts\.\S+\[0\]: gptaq compares both streams"):
        _pass([{"stage": "gptaq"}], "mixtral")
    model, config = tiny_model("mixtral")
    scheme = Scheme(weight=_format(3, 8), overrides=(Override(modules="experts", roles=("weight",)),))
    result = run_pass(
        MemorySource(model), Recipe(build_pipeline([{"stage": "gptaq"}]), scheme), tokens(config, batch=6, length=16)
    )
    assert len(result.ledger.digests) == 2 * 4


def test_a_drift_that_is_not_finite_is_an_error_that_names_its_place(monkeypatch):
    monkeypatch.setattr(CrossMoment, "value", lambda self: self.total / 0)
    model, config = tiny_model("llama")
    recipe = Recipe(build_pipeline([{"stage": "gptaq"}]), Scheme(weight=_format(3, 8)))
    with pytest.raises(NumericsError, match=r"block 0, self_attn\.q_proj\.weight: input of the layer is not finite"):
        run_pass(MemorySource(model), recipe, tokens(config, batch=2, length=8))


def test_the_reference_of_this_file_is_gptqs_without_a_drift():
    """So that the two brute forces, written apart, agree on what they share."""
    from tests.stages.references import optimal_brain_quantizer

    weight, hessian = _weight(), second_moment(_inputs()[1])
    order = torch.arange(COLUMNS)
    found = _by_brute_force(weight, hessian, 0 * hessian, bits=3, group_size=8, damp=0.02, order=order)
    expected = optimal_brain_quantizer(weight, hessian, bits=3, symmetric=False, group_size=8, damp=0.02)
    assert torch.isclose(found, expected).float().mean() > 0.98
