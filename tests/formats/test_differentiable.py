"""Differentiable integer quantization: the values of `fake_quantize`, and gradients as written down for one element."""

import math

import pytest
import torch

from qbench.errors import NumericsError, SpecError
from qbench.formats import Block, Int, Range, TensorFormat, differentiable, fake_quantize
from qbench.formats.differentiable import (
    from_levels,
    levels_of,
    quantize_learned,
    require_supported,
    ste_fake_quantize,
    ste_params,
    ste_quantize,
    ste_round,
    straight_through,
    supports,
)
from qbench.formats.named import COMPOSITE
from qbench.formats.ranges import extrema
from qbench.formats.scale import SCALES
from tests.formats.cases import block_of, weights

KINDS = [("none", "midpoint"), ("none", "narrow"), ("none", "full"), ("int", "midpoint"), ("float", "midpoint")]
GROUPS = Block(1, 16)
BLOCKS = [Block(0, 0), Block(1, 0), Block(1, 16), Block(1, 20), Block(2, 8), Block(0, 1)]


def _format(bits, zero, reach, block=GROUPS, scale="float16"):
    element = Int(bits, signed=zero == "none", reach=reach)
    return TensorFormat(element=element, block=block, zero=zero, scale=SCALES[scale], partial=True)


def _weights(seed=0, rows=6, columns=48):
    w = weights(rows, columns, seed, "outliers")
    w[2] = 0  # a zero row
    w[3, :16] = w[3, :16].abs() + 1  # a group whose values have one sign
    w[4, 16:32] = -w[4, 16:32].abs() - 1
    w[5, 1], w[5, 2] = 4000.0, -4000.0  # equal ends: which one is the larger?
    return w


@pytest.mark.parametrize(("zero", "reach"), KINDS)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.label)
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_values_are_those_of_fake_quantize_bit_for_bit(bits, block, zero, reach):
    for scale in ("float16", "bfloat16", "float32"):
        fmt = _format(bits, zero, reach, block, scale)
        for seed, share in enumerate([(1.0, 1.0), (0.6, 0.9), (1.3, 0.01)]):
            w = _weights(seed)
            full = extrema(w, fmt)
            bounds = Range(share[0] * full.lower, share[1] * full.upper)
            ends = [end.clone().requires_grad_() for end in (bounds.lower, bounds.upper)]
            found = ste_quantize(w.clone().requires_grad_(), fmt, lower=ends[0], upper=ends[1])
            expected = fake_quantize(w, fmt, bounds)
            assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
            assert torch.equal(quantize_learned(w, fmt, Range(*ends)).dequantize(), expected)
            if share == (1.0, 1.0):
                assert torch.equal(ste_quantize(w, fmt), expected)


def _frozen(w, lower, upper, offset, fmt):
    """The quantized value of one weight in float64 as a smooth function of (w, lower, upper, offset): what rounding
    adds, and what saturates, stay as they are at this point. Written for one element, with Python's numbers."""
    element, steps, limit = fmt.element, fmt.element.steps, 65504.0

    def ideal_scale(lo, up):
        if fmt.zero == "none":
            reach = max(-lo, up)
            return (-reach if element.reach == "full" and up > -lo else reach) / element.extent
        if fmt.zero == "int":
            return (up - lo) / steps
        return max(up - lo, max(abs(lo), abs(up)) * 2 * steps / limit) / steps

    def half(x):
        return torch.tensor(x, dtype=torch.float32).to(fmt.scale.dtype_stored).double().item()

    rounds = half(ideal_scale(lower, upper)) - ideal_scale(lower, upper)
    s = ideal_scale(lower, upper) + rounds
    z = rounded = 0.0
    if fmt.zero == "int":
        rounded = round(-lower / s) - -lower / s
        z = -lower / s + rounded
    elif fmt.zero == "float":
        rounded = torch.tensor(-lower / s).half().double().item() - -lower / s
        z = -lower / s + rounded
    fixed_zero = min(max(z, 0), element.maximum) if fmt.zero == "int" and not 0 <= z <= element.maximum else None
    z = z if fixed_zero is None else fixed_zero
    before = w / s + offset + (z if fmt.zero == "float" else 0)
    residual = round(before) - before
    level = round(before) + (z if fmt.zero == "int" else 0)
    saturated = min(max(level, element.minimum), element.maximum)

    def value(w, lo, up, v):
        s = ideal_scale(lo, up) + rounds
        z = fixed_zero if fixed_zero is not None else (0 if fmt.zero == "none" else -lo / s + rounded)
        q = w / s + v + residual + z if saturated == level else saturated
        return (q - z) * s

    return value


@pytest.mark.parametrize(("zero", "reach"), KINDS)
@pytest.mark.parametrize("block", [Block(1, 16), Block(2, 8), Block(1, 0)], ids=lambda block: block.label)
@pytest.mark.parametrize(("bits", "shares"), [(2, (0.7, 0.6)), (3, (1.0, 0.8)), (4, (0.5, 1.0))])
def test_gradients_are_finite_differences_of_the_smooth_parts(bits, shares, block, zero, reach):
    fmt = _format(bits, zero, reach, block, "float16")
    generator = torch.Generator().manual_seed(bits)
    w = torch.randn(4, 24, generator=generator)
    w[1, :16] = w[1, :16].abs() + 1  # its integer zero point saturates at one end once the range is cut
    offset = torch.rand(4, 24, generator=generator) - 0.5
    full = extrema(w, fmt)
    leaves = [w, shares[0] * full.lower, shares[1] * full.upper, offset]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    weight = torch.randn(4, 24, generator=generator)
    (ste_quantize(leaves[0], fmt, lower=leaves[1], upper=leaves[2], offset=leaves[3]) * weight).sum().backward()
    down, across = block_of(block, w.shape)
    expected = [torch.zeros_like(leaf, dtype=torch.float64) for leaf in leaves]
    for i in range(4):
        for j in range(24):
            place = [(i, j), (down[i, j], across[i, j]), (down[i, j], across[i, j]), (i, j)]
            point = [leaf[at].item() for leaf, at in zip(leaves, place, strict=True)]
            value = _frozen(*point, fmt)
            for k, at in enumerate(place):
                step = 1e-6
                above, below = ([p + sign * step * (n == k) for n, p in enumerate(point)] for sign in (1, -1))
                expected[k][at] += weight[i, j].item() * (value(*above) - value(*below)) / (2 * step)
    for leaf, wanted in zip(leaves, expected, strict=True):
        assert torch.allclose(leaf.grad.double(), wanted, rtol=2e-4, atol=2e-4), (leaf.grad - wanted).abs().max()
    assert all(wanted.abs().max() > 0.01 for wanted in (expected[0], expected[2]))


@pytest.mark.parametrize(("zero", "reach"), KINDS)
def test_gradients_do_not_depend_on_how_many_rows_are_computed_at_once(zero, reach, monkeypatch):
    fmt, found = _format(3, zero, reach), []
    for chunk in (1, 100, 1 << 20):
        monkeypatch.setattr(differentiable, "CHUNK", chunk)
        w = _weights().requires_grad_()
        full = extrema(w.detach(), fmt)
        leaves = [w, *((0.7 * end).requires_grad_() for end in _ends(full)), torch.zeros_like(w, requires_grad=True)]
        (ste_quantize(w, fmt, lower=leaves[1], upper=leaves[2], offset=leaves[3]) * w.detach()).sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for other in found[:2]:
        assert all(torch.allclose(a, b) for a, b in zip(other, found[2], strict=True))


def test_rounding_and_storing_pass_gradients_as_they_are_and_values_exactly():
    x = torch.tensor([0.5, 1.5, -2.5, 1e30, -0.2], requires_grad=True)
    rounded = ste_round(x)
    assert torch.equal(rounded, torch.tensor([0.0, 2.0, -2.0, 1e30, -0.0]))
    odd = torch.tensor([math.inf, -0.0, 1e-45, 3.0, 2.0])
    exact = straight_through(odd, x)
    assert torch.equal(exact.detach().view(torch.int32), odd.view(torch.int32))
    gradient = torch.arange(5.0)
    (rounded @ gradient).backward(retain_graph=True)
    exact.backward(gradient)
    assert torch.equal(x.grad, 2 * gradient)


def test_an_offset_moves_codes_by_whole_steps_and_both_ways_agree():
    for zero, reach in KINDS:
        fmt = _format(4, zero, reach)
        w = _weights(rows=6)
        params = ste_params(*_ends(extrema(w, fmt)), fmt)
        plain, moved = levels_of(w, fmt, params), levels_of(w, fmt, params, torch.ones_like(w))
        assert torch.equal(moved, (plain + 1).clamp(fmt.element.minimum, fmt.element.maximum))
        generator = torch.Generator().manual_seed(0)
        offset = torch.rand(w.shape, generator=generator) - 0.5
        learned = quantize_learned(w, fmt, extrema(w, fmt), offset)
        assert torch.equal(learned.dequantize(), ste_fake_quantize(w, fmt, params, offset))
        assert (learned.format.element.from_codes(learned.codes) - plain).abs().max() == 1


def _ends(bounds):
    return bounds.lower, bounds.upper


def test_what_cannot_be_stored_is_refused():
    fmt = _format(3, "int", "midpoint")
    w = _weights()
    params = ste_params(*_ends(extrema(w, fmt)), fmt)
    levels = levels_of(w, fmt, params)
    assert torch.equal(from_levels(levels, params, fmt).dequantize(), fake_quantize(w, fmt))
    for wrong, message in [(8.0, "level 8 is no int3 code: 0 to 7"), (2.5, "level 2.5"), (math.nan, "level nan")]:
        bad = levels.clone()
        bad[0, 0] = wrong
        with pytest.raises(NumericsError, match=message):
            from_levels(bad, params, fmt)
    with pytest.raises(NumericsError, match="learned scales are not float16 numbers"):
        from_levels(levels, type(params)(params.scale * 1.0001, params.zero), fmt)
    with pytest.raises(NumericsError, match=r"zero point 0\.5 is no int3 code"):
        from_levels(levels, type(params)(params.scale, params.zero * 0 + 0.5), fmt)
    floats = _format(3, "float", "midpoint")
    params = ste_params(*_ends(extrema(w, floats)), floats)
    with pytest.raises(NumericsError, match="zero points are not float16 numbers"):
        from_levels(levels, type(params)(params.scale, params.zero + 1e-5), floats)


def test_codes_do_not_share_memory_with_what_is_learned_further():
    fmt = _format(3, "int", "midpoint")
    w = _weights()
    params = ste_params(*_ends(extrema(w, fmt)), fmt)
    kept = from_levels(levels_of(w, fmt, params), params, fmt)
    before = kept.dequantize()
    params.scale.mul_(2), params.zero.add_(1)
    assert torch.equal(kept.dequantize(), before)


def test_other_formats_are_refused_in_one_line():
    plain = {name for name, fmt in COMPOSITE.items() if supports(fmt)}
    assert all(isinstance(COMPOSITE[name].element, Int) for name in plain)
    for fmt in [
        *COMPOSITE.values(),
        *(_format(4, "none", "midpoint", scale=s) for s in ("e8m0", "e4m3", "int8", "dq8")),
    ]:
        if not supports(fmt):
            with pytest.raises(SpecError, match=r"^format=.*integers with float scales with learner"):
                require_supported(fmt, "learner")
            with pytest.raises(SpecError, match="learns by gradients"):
                ste_quantize(_weights(), fmt)
    for zero, reach in KINDS:
        require_supported(_format(4, zero, reach), "learner")


def test_a_scale_that_its_dtype_cannot_hold_is_an_error():
    fmt = _format(2, "int", "midpoint")
    with pytest.raises(NumericsError, match="scale_dtype=float32"):
        ste_quantize(torch.full((2, 16), 1e6), fmt)
