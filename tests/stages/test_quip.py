"""QuIP: what its basis and range promise, what it gains over plain rounding, and how the engine carries it."""

import math

import pytest
import torch

from qbench.engine.loop import Recipe
from qbench.engine.passes import run_pass
from qbench.engine.source import MemorySource
from qbench.errors import SpecError
from qbench.formats import Block, Range, fit, quantize, uniform
from qbench.formats.named import COMPOSITE
from qbench.formats.ranges import RangeFit, extrema
from qbench.formats.scheme import Scheme
from qbench.formats.tensor import TensorFormat
from qbench.stages.ldlq_core import ldlq
from qbench.stages.pipeline import build_pipeline
from qbench.stages.round_quip import coherence, diagonal_scale, quip, spread_range, weight_seed
from tests.architectures import tiny_model, tokens
from tests.stages.references import correlated_inputs, output_error, second_moment


def _authors(bits):
    """One scale and one half-integer zero point for the whole tensor."""
    asymmetric = uniform(bits=bits, group_size=0, symmetric=False)
    return TensorFormat(element=asymmetric.element, block=Block(0, 0), zero="float", scale=asymmetric.scale)


def _layer(rows=48, columns=60, seed=0, loud=False):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1
    x = correlated_inputs(600, columns, seed)
    if loud:
        weight[3, 7], weight[:, 20] = 3.0, weight[:, 20] * 8
        x[:, 11] *= 10
    return weight, second_moment(x)


# ------------------------------------------------------------------ rescaling, range, incoherence


def test_the_diagonal_makes_the_product_of_energies_smallest():
    weight, hessian = _layer(loud=True)
    scale = diagonal_scale(weight, hessian)
    assert torch.equal(scale, scale.half().float())
    assert abs(scale.log().mean().item()) < 1e-3

    def product(d):
        return ((hessian.diagonal() / d.square()).sum() * (weight * d).square().sum()).item()

    assert product(scale) < 0.9 * product(torch.ones(60))
    for seed in range(20):
        nudge = 1 + 0.2 * torch.rand(60, generator=torch.Generator().manual_seed(seed))
        assert product(scale * nudge) > product(scale)
    ratio = scale.pow(4) * weight.square().sum(0) / hessian.diagonal()
    assert torch.allclose(ratio, ratio.mean().expand(60), rtol=1e-2)
    for factor in (1e-8, 1e8):  # neither the units of the weight nor those of the input matter
        assert torch.allclose(diagonal_scale(weight * factor, hessian), scale, rtol=1e-3)
        assert torch.allclose(diagonal_scale(weight, hessian * factor), scale, rtol=1e-3)


def test_the_diagonal_of_nothing_is_one_and_of_extremes_stays_in_float16():
    weight, hessian = _layer()
    assert torch.equal(diagonal_scale(0 * weight, hessian), torch.ones(60))
    weight[:, 5] = 0
    weight[:, 6] *= 1e6
    hessian[7, 7] = 1e-20
    scale = diagonal_scale(weight, hessian)
    assert torch.isfinite(scale).all()
    assert bool((scale > 1e-4).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_authors_grid_is_symmetric_about_zero_without_a_level_there(bits):
    weight, hessian = _layer()
    found = quip(weight, hessian, _authors(bits), 1)
    rms = found.basis.enter(weight).square().mean().sqrt()
    levels = (torch.arange(2**bits) - found.zero) * found.scale
    expected = 2.4 * rms * torch.linspace(-1, 1, 2**bits)
    assert torch.allclose(levels[0], expected, rtol=2e-3)
    assert found.scale.shape == (1, 1)


@pytest.mark.parametrize("group_size", [0, -1, 16, 25])
def test_a_range_is_a_multiple_of_its_blocks_own_root_mean_square(group_size):
    weight, _ = _layer()
    fmt = uniform(bits=4, group_size=group_size, symmetric=False, partial=True)
    found = spread_range(weight, fmt, 1.5)
    parts = [weight.reshape(1, -1)] if group_size == 0 else weight.split(group_size if group_size > 0 else 60, 1)
    expected = torch.stack([1.5 * part.square().mean(1).sqrt() for part in parts], 1)
    assert torch.allclose(found.upper, expected)
    assert torch.equal(found.lower, -found.upper)


def test_rotations_make_a_weight_incoherent():
    weight, hessian = _layer(loud=True)
    found = quip(weight, hessian, _authors(4), 2).basis.enter(weight)
    assert coherence(weight) > 10
    assert coherence(found) < 1.5 * math.sqrt(2 * math.log(weight.numel()))
    assert coherence(torch.zeros(2, 3)) == 1


# ------------------------------------------------------------------ the whole method


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("shape", [(48, 60), (1, 60), (7, 13), (5, 1)])
def test_with_many_bits_it_gives_the_weight_back(rescale, shape):
    weight, hessian = _layer(*shape)
    fmt = uniform(bits=8, group_size=-1, symmetric=False, scale="float32")
    found = quip(weight, hessian, fmt, 3, rescale=rescale, rho=6.0)  # wide enough for nothing to saturate
    assert (found.dequantize() - weight).norm() < 0.05 * weight.norm()
    assert (found.basis.scale is None) is (not rescale)


def test_it_loses_less_than_rounding_and_than_ldlq_where_weights_stand_out():
    errors = []
    for seed in range(4):
        weight, hessian = _layer(seed=seed, loud=True)
        fmt = uniform(bits=2, group_size=-1, symmetric=False)
        tensors = [
            quantize(weight, fmt),
            ldlq(weight, hessian, fmt, fit(weight, fmt)),
            quip(weight, hessian, fmt, seed),
        ]
        tensors.append(quip(weight, hessian, fmt, seed, greedy_passes=5))
        errors.append([output_error(weight, tensor.dequantize(), hessian) for tensor in tensors])
    nearest, plain, found, greedy = torch.tensor(errors).mean(0).tolist()
    assert plain < nearest
    assert found < 0.5 * plain
    assert greedy < found


def test_a_dead_input_does_not_pay_for_the_others():
    weight, hessian = _layer()
    hessian[9], hessian[:, 9] = 0, 0
    error = (quip(weight, hessian, _authors(3), 4).dequantize() - weight).square().sum(0)
    assert error[9] < 3 * error.mean()


def test_zero_weights_and_a_layer_without_tokens():
    weight, hessian = _layer()
    assert not quip(0 * weight, hessian, _authors(2), 0).dequantize().any()
    weight[4] = 0
    assert torch.isfinite(quip(weight, 0 * hessian, _authors(4), 0).dequantize()).all()


# ------------------------------------------------------------------ the stage


def _pass(node, *, seed=0, fmt=None, name="llama", dtype=torch.float32):
    model, config = tiny_model(name, dtype=dtype)
    pipeline, fmt = build_pipeline([{"stage": "quip", **node}]), fmt or uniform(bits=3, group_size=8, symmetric=False)
    pipeline.check(frozenset({fmt}))
    kept = []
    calibration = tokens(config, batch=6, length=16)
    recipe = Recipe(pipeline, Scheme(weight=fmt), seed)
    result = run_pass(MemorySource(model), recipe, calibration, receive=kept.append)
    return result, kept


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", torch.float32), ("mixtral", torch.float32), ("opt", torch.bfloat16)]
)
def test_the_engine_installs_the_weight_in_its_own_basis(name, dtype):
    result, blocks = _pass({}, name=name, dtype=dtype)
    seeds, bits = set(), 0
    for finished in blocks:
        for ref in (ref for group in finished.structure.groups for ref in group.weights):
            codes = finished.codes[ref.name]
            seeds.add(codes.basis.seed)
            assert torch.equal(ref.read(finished.block), codes.dequantize().to(dtype))
            bits += codes.format.storage_bits(*codes.codes.shape) + 64 + 16 * codes.codes.shape[1]
    assert len(seeds) == sum(len(finished.codes) for finished in blocks)
    assert result.ledger.weight_bits == bits
    rotated = [value for *_, metric, value in result.ledger.metrics if metric == "coherence_rotated"]
    assert len(rotated) == len(seeds)
    assert max(rotated) < 8


def test_a_run_repeats_itself_and_every_option_changes_it():
    first, again, other = (_pass({}, seed=seed)[0].ledger.codes_sha256 for seed in (0, 0, 1))
    assert first == again
    options = [{"incoherence": False}, {"rescale": False}, {"rho": 3.0}, {"damp": 0.1}, {"act_order": True}]
    options += [{"greedy_passes": 2}, {"greedy_passes": 2, "act_order": True}, {"greedy_passes": 3}]
    digests = [_pass(node)[0].ledger.codes_sha256 for node in options]
    assert len({first, other, *digests}) == len(digests) + 2


def test_only_a_basis_is_random():
    plain = [_pass({"incoherence": False}, seed=seed)[0].ledger.codes_sha256 for seed in (0, 1)]
    assert plain[0] == plain[1]
    for incoherence in (False, True):
        assert build_pipeline([{"stage": "quip", "incoherence": incoherence}]).uses_random is incoherence


def test_seeds_differ_by_block_and_weight_and_leave_the_generator_alone():
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    before = generators[0].get_state()
    seeds = {weight_seed(generator, name) for generator in generators for name in ("a", "b")}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert torch.equal(generators[0].get_state(), before)
    torch.randn(3, generator=generators[0])
    assert weight_seed(generators[0], "a") in seeds


def test_plain_ldlq_rounds_on_the_range_of_an_earlier_stage():
    from tests.stages.test_stages import _view

    view = _view(clipped=("o_proj", "mlp"))
    (stage,) = build_pipeline([{"stage": "quip", "incoherence": False, "act_order": True}]).stages
    codes = stage.apply(view).codes
    for group in view.groups:
        hessian = next(s for kind, s in view.statistics[group.index].items() if kind.__name__ == "Hessian").value()
        for ref in group.weights:
            weight, fmt = view.weight(ref), view.format(ref)
            params = fit(weight, fmt, view.ranges.get(ref.name))
            assert codes[ref.name].sha256() == ldlq(weight, hessian, fmt, params, act_order=True).sha256()
            assert codes[ref.name].basis is None
    (stage,) = build_pipeline([{"stage": "quip"}]).stages
    with pytest.raises(SpecError, match=r"^algo\.pipeline=quip: no clipping before it"):
        stage.apply(view)


INT4 = uniform(bits=4, group_size=8, symmetric=False)
REFUSED = [
    ({"damp": -0.1}, INT4, r"^algo\.damp="),
    ({"rho": 0.0}, INT4, r"^algo\.rho="),
    ({"rho": float("nan")}, INT4, r"^algo\.rho="),
    ({"greedy_passes": -1}, INT4, r"^algo\.greedy_passes="),
    ({"incoherence": False, "rho": 3.0}, INT4, r"^algo\.rho=3.0: 2.4 with incoherence=false"),
    ({"incoherence": False, "rescale": False}, INT4, r"^algo\.rescale="),
    ({}, COMPOSITE["mxfp4"], r"^format=mxfp4: .*powers of two"),
    ({}, TensorFormat(element=INT4.element, zero="int", range=RangeFit(method="mse")), r"^range\.method=mse: minmax"),
]


@pytest.mark.parametrize(("node", "fmt", "message"), REFUSED)
def test_what_is_undefined_is_refused_in_one_line(node, fmt, message):
    with pytest.raises(SpecError, match=message) as refused:
        build_pipeline([{"stage": "quip", **node}]).check(frozenset({fmt}))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("fmt", [COMPOSITE["nvfp4"], COMPOSITE["nf4dq"], uniform(bits=2, group_size=0, symmetric=True)])
def test_other_formats_have_the_range_of_their_own_blocks(fmt):
    weight, hessian = _layer(32, 64, loud=True)
    build_pipeline([{"stage": "quip"}]).check(frozenset({fmt}))
    found = quip(weight, hessian, fmt, 0)
    inside = found.basis.enter(weight)
    assert torch.equal(found.scale, fit(inside, fmt, spread_range(inside, fmt, 2.4)).scale)
    whole: Range = extrema(inside, fmt)
    assert whole.upper.shape == found.scale.shape
