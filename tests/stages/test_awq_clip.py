"""The clipping search against a loop over candidates and tokens, and what it may not touch."""

from dataclasses import replace

import pytest
import torch

from qbench.engine.passes import run_pass
from qbench.engine.source import MemorySource
from qbench.errors import SpecError
from qbench.formats import fake_quantize, uniform
from qbench.formats.ranges import RangeFit, extrema
from qbench.stages.range_awq_clip import ROWS, AwqClip, awq_clip, diagonal_blocks
from tests.architectures import tiny_model, tokens
from tests.engine.helpers import recipe
from tests.stages.references import correlated_inputs, grid, nearest, second_moment

both_zeros = pytest.mark.parametrize("symmetric", [False, True])
both_ranges = pytest.mark.parametrize("clip_range", ["symmetric", "asymmetric"])
every_block = pytest.mark.parametrize("group_size", [0, -1, 8, 7])


def _format(bits, group_size, symmetric):
    return uniform(bits=bits, group_size=group_size, symmetric=symmetric, partial=True)


def _problem(rows=6, columns=24):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    weight[:, ::9] *= 3  # something to clip
    weight[1], weight[2], weight[3] = 0, weight[2].abs(), -weight[3].abs()
    return weight, correlated_inputs(50, columns)


def _candidates(values, clip_range, n_grid=20, max_shrink=0.5):
    """Ranges (low, high) of one group's values, widest first, by the definition of the authors' search."""
    high, low = max(values.max().item(), 0.0), min(values.min().item(), 0.0)
    for step in range(int(max_shrink * n_grid)):
        share = 1 - step / n_grid
        if clip_range == "symmetric":
            bound = share * max(high, -low)
            yield max(low, -bound), min(high, bound)
        else:
            yield share * low, share * high


def _errors(weight, x, bits, symmetric, low, high):
    """Mean over tokens of the squared change of each row's partial product, by a loop over tokens; [rows]."""
    ends = torch.tensor([[low, high]], dtype=torch.float64)
    scale, zero = grid(ends, bits, symmetric)
    change = nearest(weight.double(), scale, zero, bits) - weight
    total = torch.zeros(len(weight), dtype=torch.float64)
    for token in x.double():
        total += (change @ token).square()
    return total / len(x)


def _block_errors(weight, x, fmt, low, high):
    """The criterion of one block of weights [rows, columns]: of its row, or summed over the rows of a tensor."""
    return _errors(weight, x, fmt.bits, fmt.symmetric, low, high).sum().item()


def _blocks(weight, fmt):
    """(row, group, weights [rows, columns], first column, last column) of every block."""
    width = fmt.group_size if fmt.group_size > 0 else weight.shape[1]
    if fmt.group_size == 0:
        yield 0, 0, weight, 0, weight.shape[1]
        return
    for row in range(weight.shape[0]):
        for group, first in enumerate(range(0, weight.shape[1], width)):
            yield row, group, weight[row : row + 1, first : first + width], first, first + width


@both_zeros
@both_ranges
@every_block
def test_finds_the_range_that_a_loop_over_tokens_and_candidates_finds(symmetric, clip_range, group_size):
    weight, x = _problem()
    clipped = 0
    for bits in (2, 3, 4):
        fmt = _format(bits, group_size, symmetric)
        found = awq_clip(weight, second_moment(x), fmt, clip_range=clip_range)
        for row, group, values, first, last in _blocks(weight, fmt):
            part = x[:, first:last]
            errors = [_block_errors(values, part, fmt, *ends) for ends in _candidates(values, clip_range)]
            chosen = found.lower[row, group].item(), found.upper[row, group].item()
            own = _block_errors(values, part, fmt, *chosen)
            assert own <= min(errors) * (1 + 1e-3) + 1e-12  # up to a rounding of the scale to float16
            assert own <= errors[0] * (1 + 1e-6)
            ends = list(_candidates(values, clip_range))
            nearby = [abs(chosen[0] - low) + abs(chosen[1] - high) for low, high in ends]
            assert min(nearby) <= 1e-6
            clipped += min(errors) < 0.99 * errors[0]
            if min(errors) < 0.99 * errors[0]:
                assert nearby.index(min(nearby)) > 0
    assert clipped > 0


@both_ranges
@both_zeros
@every_block
def test_no_block_gets_worse_on_correlated_inputs(clip_range, symmetric, group_size):
    weight = torch.randn(40, 48, generator=torch.Generator().manual_seed(0))
    x, fmt = correlated_inputs(200, 48), _format(3, group_size, symmetric)
    found = awq_clip(weight, second_moment(x), fmt, clip_range=clip_range)
    full, better = fake_quantize(weight, fmt), fake_quantize(weight, fmt, found)
    gains = []
    for row, _, values, first, last in _blocks(weight, fmt):
        rows = slice(row, row + len(values))
        before, after = (
            (x[:, first:last] @ (q - weight)[rows, first:last].t()).square().mean(0).sum() for q in (full, better)
        )
        assert after <= before * (1 + 1e-4)
        gains.append((after < before * 0.999).item())
    assert any(gains)


def test_the_grid_is_what_the_options_say():
    weight, x = _problem()
    fmt, hessian = _format(2, 8, False), second_moment(x)
    full = extrema(weight, fmt)
    for n_grid, max_shrink in ((50, 0.9), (20, 0.5), (10, 0.2)):
        found = awq_clip(weight, hessian, fmt, n_grid=n_grid, max_shrink=max_shrink, clip_range="asymmetric")
        shares = (found.upper / full.upper.clamp_min(1e-9))[full.upper > 0]
        assert bool((shares > 1 - max_shrink).all())
        assert torch.allclose(shares * n_grid, (shares * n_grid).round(), atol=1e-3)
        assert shares.min() < 1


def test_without_inputs_nothing_is_clipped():
    weight, _ = _problem()
    for group_size in (0, -1, 8):
        fmt = _format(3, group_size, False)
        found, full = awq_clip(weight, torch.zeros(24, 24), fmt), extrema(weight, fmt)
        assert torch.equal(found.lower, full.lower)
        assert torch.equal(found.upper, full.upper)


def test_many_rows_are_searched_in_parts_with_the_same_result():
    weight = torch.randn(ROWS + 3, 8, generator=torch.Generator().manual_seed(0))
    hessian, fmt = second_moment(correlated_inputs(40, 8)), _format(3, 4, False)
    found = awq_clip(weight, hessian, fmt)
    tail = awq_clip(weight[-7:], hessian, fmt)
    assert found.lower.shape == (ROWS + 3, 2)
    assert torch.equal(found.lower[-7:], tail.lower)
    assert torch.equal(found.upper[-7:], tail.upper)


@pytest.mark.parametrize("width", [1, 5, 8, 24])
def test_diagonal_blocks(width):
    hessian = second_moment(correlated_inputs(30, 24))
    blocks = diagonal_blocks(hessian, width)
    for group in range(-(-24 // width)):
        part = hessian[group * width : (group + 1) * width, group * width : (group + 1) * width]
        assert torch.equal(blocks[group, : len(part), : len(part)], part)
        assert not blocks[group, len(part) :].any()
        assert not blocks[group, :, len(part) :].any()


def _codes(model, wanted, calibration):
    codes = {}
    run_pass(
        MemorySource(model),
        wanted,
        calibration,
        receive=lambda finished: codes.update({(finished.index, k): v for k, v in finished.codes.items()}),
    )
    return codes


def _rows(name):
    """(weight, rows that make queries and keys) by the layout of each architecture's projection."""
    rows = torch.arange(32)
    return {
        "llama": [("self_attn.q_proj.weight", rows), ("self_attn.k_proj.weight", rows[:16])],
        "phi3": [("self_attn.qkv_proj.weight", torch.arange(32 + 16))],
        "gpt2": [("attn.c_attn.weight", torch.arange(64))],
        # per head: query, key, value
        "gpt_neox": [("attention.query_key_value.weight", torch.arange(96)[torch.arange(96) % 24 < 16])],
    }[name]


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("group_size", [0, -1, 8])
def test_rows_that_make_queries_and_keys_are_left_alone(name, group_size):
    model, config = tiny_model(name)
    calibration = tokens(config, batch=8, length=16)
    clipped = _codes(model, recipe("awq_clip", group_size=group_size), calibration)
    plain = _codes(model, recipe("rtn", group_size=group_size), None)
    kept = dict(_rows(name))
    changed = 0
    for key, found in clipped.items():
        rows = kept.get(key[1], torch.tensor([], dtype=torch.long))
        others = torch.tensor([k for k in range(found.codes.shape[0]) if k not in rows.tolist()], dtype=torch.long)
        assert torch.equal(found.codes[rows], plain[key].codes[rows])
        assert group_size == 0 or torch.equal(found.scale[rows], plain[key].scale[rows])
        differs = not torch.equal(found.codes[others], plain[key].codes[others])
        changed += differs
        if group_size == 0 and len(rows):  # one scale for all rows: none may change
            assert not differs
    assert changed > len(clipped) / 4


def test_its_metric_is_not_confused_with_the_one_of_every_run():
    model, config = tiny_model("llama")
    result = run_pass(MemorySource(model), recipe("awq"), tokens(config, batch=4, length=16))
    keys = [(block, module, name) for block, module, name, _ in result.ledger.metrics]
    assert len(keys) == len(set(keys))
    assert {"awq_clipped", "clip_ratio"} <= {name for *_, name in keys}


def test_formats_whose_ranges_are_not_its_own_are_refused_for_algo_awq_and_for_compositions_alike():
    """awq_clip+hqq has no option that switches clipping off: what is accepted says what clips, and when that helps."""
    fmt = uniform(bits=4, group_size=8, symmetric=False)
    for wrong, message in [
        (replace(fmt, zero="float"), r"^zero_point=float: int with awq_clip \(algo=awq: or clip=false\)"),
        (replace(fmt, range=RangeFit(method="mse")), r"^range\.method=mse: minmax with awq_clip, .*algo=awq: or"),
    ]:
        with pytest.raises(SpecError, match=message):
            AwqClip().check(frozenset({wrong}))
    AwqClip().check(frozenset({fmt}))
