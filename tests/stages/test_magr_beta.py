"""MagR's beta: which ranges what rounds behind it gets, and who may choose others."""

from dataclasses import replace

import pytest
import torch

from qbench.engine.loop import Recipe
from qbench.engine.passes import run_pass
from qbench.engine.source import MemorySource
from qbench.errors import SpecError
from qbench.formats import SCALES, Block, Float, RangeFit, TensorFormat, uniform
from qbench.formats.named import COMPOSITE, TABLES
from qbench.formats.scheme import Override, Scheme
from qbench.stages.pipeline import build_pipeline
from qbench.stages.protect_magr import Magr, authors_beta
from tests.architectures import tiny_model, tokens
from tests.stages.test_magr import _view

ROWS = uniform(bits=3, group_size=-1, symmetric=False)
SHARED_GRID = TensorFormat(element=uniform(2, 0, False).element, block=Block(0, 0), zero="float")  # of QuIP's authors
QUICK = {
    "omniquant": {"epochs": 1},
    "awq_clip": {"n_grid": 4},
    "autoround": {"iters": 3},
    "tesseraq": {"iterations": 2},
}


def _codes(names, weight=ROWS, overrides=(), **options):
    """Digests of all codes behind the pipeline of these stages; `options` are those of the first, magr."""
    model, config = tiny_model("llama")
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path:
                parameter[3::7] *= 4
    nodes = [{"stage": name, **QUICK.get(name, {})} for name in names]
    nodes[0] |= {"alpha": 0.01, "iterations": 20, **options}
    pipeline = build_pipeline(nodes)
    scheme = Scheme(weight=weight, overrides=overrides)
    pipeline.check(scheme.weights, scheme)
    return run_pass(MemorySource(model), Recipe(pipeline, scheme), tokens(config, batch=6, length=16)).ledger.digests


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("bits", "group_size", "expected"),
    [(2, -1, 0.8), (3, -1, 0.9), (4, -1, 1), (5, -1, 1), (8, -1, 1), (2, 0, 0.8), (3, 0, 0.9), (4, 0, 1)]
    + [(bits, 128, 0.95) for bits in (2, 3, 4)]
    + [(bits, group, 1) for bits in (2, 3, 4) for group in (16, 64, 256)],
)
def test_the_authors_factor_by_bits_and_block(bits, group_size, symmetric, expected):
    fmt = uniform(bits, group_size, symmetric)
    assert authors_beta(fmt) == Magr().kept(fmt) == expected
    assert Magr(beta=0.5).kept(fmt) == 0.5
    for method in ("mse", "percentile", "share", "absmean"):
        assert authors_beta(replace(fmt, range=RangeFit(method=method))) == 1
    for other in (SCALES["e8m0"], SCALES["int8"], SCALES["e4m3"]):
        assert authors_beta(replace(fmt, scale=other)) == 1


def test_the_authors_have_no_factor_for_other_elements_blocks_and_zero_points():
    for fmt in (
        TensorFormat(element=Float(2, 1)),
        TensorFormat(element=TABLES["nf2"]),
        TensorFormat(element=TABLES["nf3"], block=Block(1, 128)),
        replace(uniform(2, -1, False), zero="float"),
        replace(uniform(2, 128, False), block=Block(128, 128)),
        *COMPOSITE.values(),
    ):
        assert authors_beta(fmt) == 1, fmt.label


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("beta", "share"), [(None, 0.9), (0.7, 0.7)])
def test_ranges_are_that_share_of_the_extremes_of_what_is_stored(name, dtype, beta, share):
    view = _view(name, ROWS, dtype)
    outcome = Magr(alpha=0.05, iterations=5, beta=beta).apply(view)
    refs = [ref for group in view.groups for ref in group.weights]
    assert outcome.ranges.keys() == {ref.name for ref in refs}
    for ref in refs:
        stored = ref.of(outcome.parameters[ref.parameter]).float()
        found = outcome.ranges[ref.name]
        assert torch.equal(found.lower, share * stored.amin(1, keepdim=True).clamp_max(0)), ref.name
        assert torch.equal(found.upper, share * stored.amax(1, keepdim=True).clamp_min(0)), ref.name


def test_every_weight_gets_the_factor_of_its_own_format():
    view = _view("llama", ROWS)
    formats = {name: replace(ROWS, range=RangeFit(method="mse")) if "q_proj" in name else ROWS for name in view.formats}
    formats |= {name: uniform(4, -1, False) for name in formats if "down" in name}
    ranges = Magr(iterations=2).apply(replace(view, formats=formats)).ranges
    assert ranges.keys() == {name for name in formats if "q_proj" not in name and "down" not in name}
    assert not Magr(iterations=2, beta=1.0).apply(view).ranges


@pytest.mark.parametrize("rounds", ["rtn", "gptq", "autoround"])
@pytest.mark.parametrize(("bits", "beta", "share"), [(2, None, 0.8), (3, None, 0.9), (4, None, 1.0), (4, 0.85, 0.85)])
def test_what_rounds_gets_the_same_as_with_a_shared_shrink_of_the_format(rounds, bits, beta, share):
    fmt = uniform(bits, -1, False)
    shrunken = replace(fmt, range=RangeFit(method="share", share=share))
    assert _codes(("magr", rounds), fmt, beta=beta) == _codes(("magr", rounds), shrunken, beta=1.0)
    assert (_codes(("magr", rounds), fmt, beta=beta) != _codes(("magr", rounds), fmt, beta=1.0)) == (share < 1)


@pytest.mark.parametrize("method", ["mse", "percentile", "share"])
def test_a_range_method_of_the_scheme_wins_over_the_default(method):
    fmt = replace(ROWS, range=RangeFit(method=method, percentile=95, share=0.6))
    assert _codes(("magr", "gptq"), fmt) == _codes(("magr", "gptq"), fmt, beta=1.0)
    with pytest.raises(SpecError, match=rf"^algo\.beta=0\.9: null or 1 with range\.method={method}[^\n]*$"):
        _codes(("magr", "gptq"), fmt, beta=0.9)
    part = Override(modules="o_proj", roles=("weight",), weight=fmt)
    assert _codes(("magr", "gptq"), overrides=(part,)) != _codes(("magr", "gptq"), overrides=(part,), beta=1.0)
    with pytest.raises(SpecError, match=r"^algo\.beta=0\.9: "):
        _codes(("magr", "gptq"), overrides=(part,), beta=0.9)


@pytest.mark.parametrize("names", [("awq_clip", "gptq"), ("mse_clip", "rtn"), ("percentile_clip", "rtn"), ("quip",)])
def test_a_stage_that_chooses_ranges_by_itself_replaces_those_of_the_default(names):
    """Also for weights that it leaves alone, as awq_clip does queries and keys; another beta is refused."""
    assert _codes(("magr", *names)) == _codes(("magr", *names), beta=1.0)
    with pytest.raises(SpecError, match=rf"^algo\.beta=0\.9: null or 1 before {names[0]}, which[^\n]*$"):
        _codes(("magr", *names), beta=0.9)


def test_the_refusal_goes_by_the_part_of_a_composed_pipeline():
    nodes = [{"stage": "magr", "part": "magr", "beta": 0.9}, {"stage": "quip", "part": "quip"}]
    with pytest.raises(SpecError, match=r"^algo\.magr\.beta=0\.9: "):
        build_pipeline(nodes).check(frozenset({SHARED_GRID}))


@pytest.mark.parametrize("later", ["omniquant", "autoround", "tesseraq"])
def test_a_stage_that_starts_from_ranges_starts_from_these(later):
    names = ("magr", later, "rtn") if later == "omniquant" else ("magr", later)
    default, explicit, whole = (_codes(names, beta=beta) for beta in (None, 0.9, 1.0))
    assert default == explicit != whole
    if later == "omniquant":
        assert default != _codes(("magr", "rtn"))
