"""AdaDim: groups along the outputs are groups of the transposed weight, and the better of the two is kept."""

from dataclasses import replace

import pytest
import torch

from qbench.engine.loop import Recipe
from qbench.engine.passes import run_pass
from qbench.engine.source import MemorySource
from qbench.errors import SpecError
from qbench.formats import SCALES, Block, Range, RangeFit, fit, quantize, uniform
from qbench.formats.named import COMPOSITE, TERNARY
from qbench.formats.ranges import extrema
from qbench.formats.scheme import Override, Scheme
from qbench.formats.tensor import TensorFormat
from qbench.stages.gptq_core import gptq
from qbench.stages.pipeline import build_pipeline
from qbench.stages.round_adadim import AdaDim, adadim, along_outputs
from tests.architectures import tiny_model, tokens
from tests.stages.references import correlated_inputs, grid, nearest, output_error, second_moment

INT3 = uniform(bits=3, group_size=8, symmetric=False)
FORMATS = {
    "int3": INT3,
    "int3 channels": uniform(bits=3, group_size=-1, symmetric=True),
    "float zero": replace(INT3, zero="float"),
    "mse": replace(INT3, range=RangeFit(method="mse", grid=20)),
    "ternary": TensorFormat(element=TERNARY, block=Block(1, 8), range=RangeFit(method="absmean")),
    "e4m3 scales": replace(INT3, scale=SCALES["e4m3"]),
    "mxfp4": COMPOSITE["mxfp4"],
    "nf4dq": COMPOSITE["nf4dq"],
}
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
solvers = pytest.mark.parametrize("solver", ["rtn", "gptq"])


def _weight(rows=64, columns=128, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _hessian(columns=128, seed=0):
    return second_moment(correlated_inputs(600, columns, seed))


@every_format
def test_groups_along_the_outputs_are_groups_of_the_transposed_weight(fmt):
    weight = _weight() * torch.logspace(-1, 1, 128)
    across = along_outputs(fmt)
    found, expected = quantize(weight, across), quantize(weight.t().contiguous(), fmt)
    assert torch.equal(found.dequantize(), expected.dequantize().t())
    assert torch.equal(found.codes, expected.codes.t())
    if fmt is not FORMATS["nf4dq"]:  # whose scales' own last block is another one
        assert found.storage_bits() == expected.storage_bits()
    assert across.name is None
    assert across.grid((64, 128)) == expected.scale.shape[::-1]


@solvers
@every_format
def test_the_better_of_the_two_is_kept(fmt, solver):
    if fmt.scale.whole and solver == "gptq":
        with pytest.raises(SpecError, match=r"^algo\.solver=gptq: rtn with nf4dq"):
            AdaDim(solver=solver).check(frozenset({fmt}))
        return
    AdaDim(solver=solver).check(frozenset({fmt}))
    chosen = set()
    loudness = torch.logspace(-0.6, 0.6, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    for by_output in (False, True):
        weight, hessian = _weight(), _hessian()
        weight *= loudness[:, None] if by_output else torch.cat([loudness, loudness])
        found = adadim(weight, hessian, fmt, solver=solver)
        errors = [
            output_error(weight, _rounded(weight, hessian, f, solver), hessian) for f in (fmt, along_outputs(fmt))
        ]
        assert [found.per_output, found.per_input] == pytest.approx(errors, rel=1e-3)
        assert output_error(weight, found.weight.dequantize(), hessian) == pytest.approx(min(errors), rel=1e-3)
        chosen.add(found.weight.format.block)
        assert found.weight.storage_bits() == found.weight.format.storage_bits(64, 128)
    assert len(chosen) == 2


def _rounded(weight, hessian, fmt, solver):
    tensor = quantize(weight, fmt) if solver == "rtn" else gptq(weight, hessian, fmt).weight
    return tensor.dequantize()


def test_a_loud_input_is_kept_apart():
    """Along the outputs a column shares its scales with none: how loud it is changes no other column."""
    weight, hessian = _weight(), _hessian()
    louder = weight.clone()
    louder[:, 3::8] *= 8
    across = along_outputs(INT3)
    others = [k for k in range(128) if k % 8 != 3]
    assert torch.equal(quantize(weight, across).codes[:, others], quantize(louder, across).codes[:, others])
    assert not torch.equal(quantize(weight, INT3).codes[:, others], quantize(louder, INT3).codes[:, others])
    quieter = torch.ones(128)  # inputs as quiet as the weights are loud, as smoothing leaves them
    quieter[3::8] /= 8
    found = adadim(louder, hessian * quieter * quieter[:, None], INT3)
    assert found.weight.format == across
    assert found.per_input < 0.5 * found.per_output


def test_gptq_along_the_outputs_by_brute_force():
    """Every column has scales of its own, fitted to it with all compensation so far; float64, no blocks."""
    weight, hessian = _weight(16, 24), _hessian(24)
    found = gptq(weight, hessian, along_outputs(INT3), damp=0.02).weight.dequantize()
    damped = hessian.double() + 0.02 * hessian.double().diagonal().mean() * torch.eye(24, dtype=torch.float64)
    work, decoded = weight.double().clone(), torch.empty(16, 24, dtype=torch.float64)
    for k in range(24):
        inverse = torch.linalg.inv(damped[k:, k:])
        for rows in (slice(0, 8), slice(8, 16)):
            values = work[rows, k : k + 1]
            decoded[rows, k] = nearest(values.t(), *grid(values.t(), 3, False), 3)[0]
        work[:, k:] -= ((work[:, k] - decoded[:, k]) / inverse[0, 0])[:, None] * inverse[0]
    assert torch.isclose(found.double(), decoded, atol=1e-4, rtol=1e-3).float().mean() > 0.97


def test_uncorrelated_inputs_make_both_solvers_the_same_and_correlated_ones_do_not():
    weight = _weight() * torch.logspace(-1, 1, 128)
    one, other = (adadim(weight, torch.eye(128), INT3, solver=solver) for solver in ("rtn", "gptq"))
    assert one.weight.sha256() == other.weight.sha256()
    plain, solved = (adadim(weight, _hessian(), INT3, solver=solver) for solver in ("rtn", "gptq"))
    assert solved.per_input < 0.8 * plain.per_input
    assert solved.per_output < 0.8 * plain.per_output
    damped = adadim(weight, _hessian(), INT3, solver="gptq", damp=1.0)
    assert damped.weight.sha256() != solved.weight.sha256()


@solvers
def test_no_tokens_a_zero_weight_and_one_row_keep_the_groups_along_the_inputs_or_decide_alike(solver):
    weight = _weight()
    for found in (
        adadim(weight, torch.zeros(128, 128), INT3, solver=solver),
        adadim(0 * weight, _hessian(), INT3, solver=solver),
    ):
        assert found.weight.format == INT3
        assert found.per_output == found.per_input == 0
    partial = replace(INT3, partial=True)
    one = adadim(weight[:1], _hessian(), partial, solver=solver)  # a scale for every weight: no error but rounding
    assert one.weight.format == along_outputs(partial)
    assert torch.allclose(one.weight.dequantize(), weight[:1], rtol=1e-2, atol=1e-2)


@solvers
def test_ranges_of_an_earlier_stage_belong_to_the_groups_along_the_inputs(solver):
    weight, hessian = _weight(), _hessian()
    full = extrema(weight, INT3)
    clip = Range(0.7 * full.lower, 0.7 * full.upper)
    plain, found = (adadim(weight, hessian, INT3, solver=solver, clip=c) for c in (None, clip))
    assert found.per_input == plain.per_input
    assert found.per_output != plain.per_output
    if found.weight.format == INT3:
        assert torch.equal(found.weight.scale, fit(weight, INT3, clip).scale)


@torch.no_grad()
def _pass(node, fmt=INT3, dtype=torch.float32, overrides=()):
    model, config = tiny_model("llama", dtype=dtype)
    for path, parameter in model.named_parameters():
        if path.endswith("down_proj.weight"):
            parameter[:, ::8] *= 8
        if path.endswith("up_proj.weight"):  # inputs as quiet as the weights are loud
            parameter[::8] /= 8
    pipeline = build_pipeline([{"stage": "adadim", **node}])
    pipeline.check(frozenset({fmt}))
    kept = []
    recipe = Recipe(pipeline, Scheme(weight=fmt, overrides=overrides))
    result = run_pass(MemorySource(model), recipe, tokens(config, batch=6, length=16), receive=kept.append)
    return result, kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@solvers
def test_the_engine_counts_the_bits_of_what_was_chosen_and_says_what_was(dtype, solver):
    result, blocks = _pass({"solver": solver}, dtype=dtype)
    codes = {(b.index, name): tensor for b in blocks for name, tensor in b.codes.items()}
    chosen = {(b, m): value for b, m, name, value in result.ledger.metrics if name == "adadim_per_input"}
    assert {key: float(tensor.format.block.columns == 1) for key, tensor in codes.items()} == chosen
    assert {value for (_, name), value in chosen.items() if "down_proj" in name} == {1}
    assert 0 in chosen.values()
    assert result.ledger.weight_bits == sum(tensor.storage_bits() for tensor in codes.values())
    ratio = {(b, m): value for b, m, name, value in result.ledger.metrics if name == "adadim_error_per_input"}
    assert all((value < 1) == (chosen[key] == 1) for key, value in ratio.items())


def test_options_change_the_result_or_are_refused():
    digests = [_pass(node)[0].ledger.codes_sha256 for node in ({}, {"solver": "gptq"}, {"solver": "gptq", "damp": 0.3})]
    assert len(set(digests)) == 3
    with pytest.raises(SpecError, match=r"^algo\.damp=0\.3: 0\.01 with solver=rtn"):
        _pass({"damp": 0.3})
    with pytest.raises(SpecError, match=r"^algo\.solver=awq"):
        _pass({"solver": "awq"})


@pytest.mark.parametrize(
    ("fmt", "message"),
    [
        (uniform(bits=4, group_size=0, symmetric=False), r"^group_size=tensor: groups"),
        (TensorFormat(element=INT3.element, block=Block(4, 8)), r"^group_size=4x8: groups"),
        (COMPOSITE["int4in8"], r"^scale_dtype=int8: another"),
    ],
)
def test_formats_without_two_directions_are_refused_in_one_line(fmt, message):
    with pytest.raises(SpecError, match=message) as refused:
        build_pipeline([{"stage": "adadim"}]).check(frozenset({fmt}))
    assert "\n" not in str(refused.value)


def test_groups_that_do_not_divide_the_outputs_are_refused_unless_a_rest_is_allowed():
    fmt = uniform(bits=3, group_size=32, symmetric=False)
    attention = {"overrides": (Override(modules="mlp", roles=("weight",)),)}  # 32 inputs each, 32 or 16 outputs
    with pytest.raises(
        SpecError, match=r"^group_size=32: with algo=adadim a divisor of the 16 outputs of block 0, .*k_proj"
    ):
        _pass({}, fmt, **attention)
    _pass({}, replace(fmt, partial=True), **attention)
