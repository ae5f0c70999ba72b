"""What clipping begins with and how it moves; scales and shifts of folds under gradients."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from qbench.formats import Range
from qbench.formats.ranges import extrema
from qbench.formats.scheme import Scheme
from qbench.stages.learned_clipping import Clipping
from qbench.stages.learned_folds import LearnedFold, apply_folds, fold_in, letable_folds, touched
from tests.architectures import ARCHITECTURES
from tests.stages.learning import BOTH, W2, W4, learning_view


def _weight(seed=0):
    w = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed))
    w[1] = 0
    w[2] = w[2].abs()
    return w


def test_clipping_is_the_sigmoid_of_its_logit_and_infinity_is_min_max():
    full = extrema(_weight(), W2)
    clip = Clipping.start(full, None, 4.0)
    share = 1 / (1 + math.exp(-4.0))
    found = clip.range(full)
    assert torch.allclose(found.lower, share * full.lower)
    assert torch.allclose(found.upper, share * full.upper)
    with torch.no_grad():
        clip.upper.fill_(1.25)
        clip.lower.fill_(-0.5)
    found = clip.range(full)
    assert torch.allclose(found.upper, full.upper / (1 + math.exp(-1.25)), rtol=1e-6)
    assert torch.allclose(found.lower, full.lower / (1 + math.exp(0.5)), rtol=1e-6)
    with torch.no_grad():
        clip.upper.fill_(math.inf)
        clip.lower.fill_(math.inf)
    assert torch.equal(clip.range(full).upper, full.upper)
    assert torch.equal(clip.range(full).lower, full.lower)


def test_clipping_begins_at_an_earlier_range_with_a_gradient_everywhere():
    full = extrema(_weight(), W2)
    shares = torch.linspace(0.1, 1, full.lower.numel()).view_as(full.lower)
    clip = Clipping.start(full, Range(shares * full.lower, full.upper), 4.0)
    found = clip.range(full)
    assert torch.allclose(found.lower, shares * full.lower, rtol=1e-6)
    assert torch.allclose(found.upper, full.upper, rtol=1e-6)
    (found.lower.sum() + found.upper.sum()).backward()
    cut = (full.lower < 0) & (shares < 0.98)
    slope = shares * (1 - shares)  # of the sigmoid where its value is the share
    assert torch.allclose(clip.lower.grad[cut], (slope * full.lower)[cut], rtol=1e-4)
    uncut = 1 / (1 + math.exp(-4.0))  # where it begins without a search, too
    assert torch.allclose(clip.upper.grad, uncut * (1 - uncut) * full.upper, rtol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_scales_and_shifts_preserve_the_function_and_training_sees_what_is_folded_in(name):
    view = learning_view(name, Scheme(weight=W4), dtype=torch.float64)  # nothing is rounded at run time
    generator = torch.Generator().manual_seed(0)
    folds = []
    for fold in letable_folds(view, True):
        scale = (torch.rand(fold.n_free, generator=generator) + 0.5).requires_grad_()
        shift = torch.randn(fold.n_free, generator=generator) if fold.bias is not None else None
        folds.append(LearnedFold.start(fold, scale, shift))
    block = view.block
    changed, scales = apply_folds(block, folds)
    assert scales.keys() == {index for f in folds for index in (f.fold.group, *f.fold.extra_groups)}
    weights, vectors = fold_in(block, folds, {name: ref.read(block) for name, ref in touched(folds).items()})
    for ref in touched(folds).values():
        assert torch.equal(weights[ref.name].detach(), ref.of(changed[ref.parameter]))
    for path, vector in vectors.items():
        assert torch.equal(vector.detach(), changed[path])
    assert changed.keys() == vectors.keys() | {ref.parameter for ref in touched(folds).values()}
    other = copy.deepcopy(block)
    with torch.no_grad():
        for path, value in changed.items():
            other.get_parameter(path).copy_(value)
        hidden = view.data.inputs[0]
        assert folds or name == "olmo2"
        before, after = view.data.student({}, hidden), view.data.student(dict(other.named_parameters()), hidden)
    assert (before - after).abs().max() <= 2e-6 * before.abs().max()


def test_gradients_reach_every_scale_and_shift_through_chained_folds():
    view = learning_view("opt", BOTH)
    folds = [
        LearnedFold.start(fold, torch.ones(fold.n_free), torch.zeros(fold.n_free) if fold.bias else None)
        for fold in letable_folds(view, False)
    ]
    weights, vectors = fold_in(view.block, folds, {name: ref.read(view.block) for name, ref in touched(folds).items()})
    generator = torch.Generator().manual_seed(0)
    values = [*weights.values(), *vectors.values()]
    total = sum((value * torch.randn(value.shape, generator=generator)).sum() for value in values)
    total.backward()
    expected = [[tensor.grad.clone() for tensor in learned.tensors] for learned in folds]
    for learned, wanted in zip(folds, expected, strict=True):  # finite differences, in float64
        for which, gradient in enumerate(wanted):
            for k in (0, len(gradient) - 1):
                ends = []
                for step in (1e-3, -1e-3):
                    moved = [
                        LearnedFold(f.fold, f.scale.double(), None if f.shift is None else f.shift.double())
                        for f in folds
                    ]
                    tensor = (
                        (moved[folds.index(learned)].scale, moved[folds.index(learned)].shift)[which].detach().clone()
                    )
                    tensor[k] += step
                    place = folds.index(learned)
                    moved[place] = replace(moved[place], **{("scale", "shift")[which]: tensor})
                    ends.append(_total(view, moved))
                slope = (ends[0] - ends[1]) / 2e-3
                assert gradient[k].item() == pytest.approx(slope, rel=2e-3, abs=2e-3)


@torch.no_grad()
def _total(view, folds):
    block = copy.deepcopy(view.block).double()
    weights, vectors = fold_in(block, folds, {name: ref.read(block) for name, ref in touched(folds).items()})
    generator = torch.Generator().manual_seed(0)
    values = [*weights.values(), *vectors.values()]
    return sum((value * torch.randn(value.shape, generator=generator)).sum() for value in values).item()


def test_the_sites_are_the_authors():
    sites = {
        name: [(fold.kind, fold.consumers[0].name) for fold in letable_folds(learning_view(name, BOTH), False)]
        for name in ("llama", "opt", "phi")
    }
    assert sites["llama"] == [("norm", "self_attn.q_proj.weight"), ("norm", "mlp.gate_proj.weight")]  # grouped values
    assert sites["opt"] == [
        ("norm", "self_attn.q_proj.weight"),
        ("linear", "self_attn.out_proj.weight"),
        ("norm", "fc1.weight"),
    ]
    grouped = letable_folds(learning_view("llama", BOTH), True)
    assert [fold.consumers[0].name for fold in grouped if fold.kind == "linear"] == ["self_attn.o_proj.weight"]
