"""What every stage owes the engine: pure, repeatable, weight by weight what its core computes."""

from itertools import product

import pytest
import torch

from qbench.calibration.statistics import AbsMax, AbsMean, Hessian
from qbench.engine.passes import StructureCache, embed
from qbench.engine.probe import Probe
from qbench.engine.source import MemorySource
from qbench.errors import NumericsError
from qbench.formats import Range, fit, quantize, uniform
from qbench.formats.ranges import extrema
from qbench.stages.base import BlockView
from qbench.stages.gptq_core import gptq
from qbench.stages.round_gptq import Gptq
from qbench.stages.round_rtn import Rtn
from qbench.stages.transform_awq import AwqScale, awq_scale
from qbench.structure.blocks import capture_calls
from tests.architectures import tiny_model, tokens


@torch.no_grad()
def _view(name="llama", *, group_size=8, symmetric=False, clipped=()):
    """A block's view with everything that any stage may ask for; `clipped` names the weights with given ranges."""
    model, config = tiny_model(name)
    source, calibration = MemorySource(model), tokens(config, batch=6, length=16, seed=1)
    hidden, calls = capture_calls(model, calibration[:2])
    block = source.block(0)
    structure = StructureCache().structure(block, calls[0], hidden, folds=True)
    stream = embed(source, model, calibration, {2})
    probe = Probe.observe(block, 0, stream, [0, 1])
    statistics = {
        group.index: {kind: kind(group.in_features, torch.device("cpu")) for kind in (Hessian, AbsMean, AbsMax)}
        for group in structure.groups
    }

    def observe(group, x):
        for statistic in statistics[group.index].values():
            statistic.update(x)

    stream.observe(block, 0, structure, observe)
    fmt = uniform(bits=3, group_size=group_size, symmetric=symmetric)
    refs = [ref for group in structure.groups for ref in group.weights]
    ranges = {}
    for ref in refs:
        if any(part in ref.name for part in clipped):
            full = extrema(ref.read(block), fmt)
            ranges[ref.name] = Range(0.7 * full.lower, 0.8 * full.upper)
    return BlockView(
        block=block,
        structure=structure,
        groups=structure.groups,
        formats={ref.name: fmt for ref in refs},
        ranges=ranges,
        statistics=statistics,
        scopes=probe.scopes(block, structure),
        where="block 0",
    )


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral"])
@pytest.mark.parametrize(("symmetric", "group_size"), list(product([False, True], [0, -1, 8])))
@pytest.mark.parametrize("clipped", [(), ("v_proj", "o_proj"), ("proj", "experts")])
def test_gptq_of_a_group_is_gptq_of_its_weights_one_by_one(name, symmetric, group_size, clipped):
    view = _view(name, group_size=group_size, symmetric=symmetric, clipped=clipped)
    options = {"damp": 0.05, "act_order": True, "block_size": 12, "scale_source": "original"}
    codes = Gptq(**options).apply(view).codes
    for group in view.groups:
        hessian = view.statistics[group.index][Hessian].value()
        for ref in group.weights:
            clip = view.ranges.get(ref.name)
            expected = gptq(view.weight(ref), hessian, view.format(ref), clip=clip, **options).weight
            found = codes[ref.name]
            assert torch.equal(found.scale, expected.scale), ref.name
            same = (found.codes == expected.codes).float().mean()
            assert same > 0.97, ref.name  # stacking may change the last bit of a product
            assert (found.order is None) == (expected.order is None)


def test_gptq_options_reach_the_core():
    view = _view()
    default = {name: codes.sha256() for name, codes in Gptq().apply(view).codes.items()}
    for options in ({"damp": 1.0}, {"act_order": True}, {"static_groups": True}, {"scale_source": "original"}):
        changed = {name: codes.sha256() for name, codes in Gptq(**options).apply(view).codes.items()}
        assert sum(changed[name] != default[name] for name in default) > len(default) / 2, options
    stale = [
        {name: codes.sha256() for name, codes in Gptq(scale_source="stale", block_size=size).apply(view).codes.items()}
        for size in (8, 32)
    ]
    assert stale[0] != stale[1]


def test_gptq_names_the_weight_whose_input_is_not_finite():
    view = _view()
    view.statistics[2][Hessian].total[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"block 0, mlp\.gate_proj\.weight: input of the layer is not finite"):
        Gptq().apply(view)


def test_query_heads_of_one_value_head_share_the_mean_of_their_scales():
    view = _view()
    unequal = torch.logspace(-1, 1, 32)[torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    view.statistics[1].update({kind: s.rescaled(unequal) for kind, s in view.statistics[1].items()})
    outcome = AwqScale(grouped_heads=True, n_grid=4).apply(view)
    ratio = {module: value for module, name, value in outcome.metrics if name == "awq_ratio"}["self_attn.o_proj.weight"]
    found = outcome.input_scales[1].view(2, 2, 8)  # key/value heads, query heads of each, features
    own = awq_scale(view.statistics[1][AbsMean].value(), ratio).view(2, 2, 8)
    assert ratio > 0
    assert torch.allclose(found, own.mean(1, keepdim=True).expand_as(found))
    assert torch.allclose(outcome.input_scales[1], outcome.parameters["self_attn.o_proj.weight"][0] / _weight(view)[0])


def _weight(view):
    return view.block.self_attn.o_proj.weight


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [0, -1, 8])
def test_rounding_uses_the_range_of_an_earlier_stage_or_the_extremes(symmetric, group_size):
    view = _view(group_size=group_size, symmetric=symmetric, clipped=("v_proj", "mlp"))
    codes = Rtn().apply(view).codes
    for group in view.groups:
        for ref in group.weights:
            weight, fmt = view.weight(ref), view.format(ref)
            expected = quantize(weight, fmt, fit(weight, fmt, view.ranges.get(ref.name)))
            assert codes[ref.name].sha256() == expected.sha256()
    assert codes.keys() == view.formats.keys()
