"""Static ranges follow from the calibration tokens alone: brute force, slow loops and exhaustive searches agree."""

from dataclasses import replace

import pytest
import torch

from qbench.calibration.clipping import BINS, Density
from qbench.calibration.ranges import RANGES, Histogram, MinMax, MovingMinMax
from qbench.errors import NumericsError
from qbench.formats import Range, fake_quantize
from qbench.formats.element import Float, Int
from qbench.formats.named import NF4
from qbench.formats.scale import SCALES
from qbench.formats.tensor import Block, TensorFormat

FEATURES, LENGTH = 12, 40
BLOCKS = {"tensor": Block(0, 0), "group": Block(0, 4), "partial": Block(0, 5), "column": Block(0, 1)}
every_block = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
every_kind = pytest.mark.parametrize("kind", RANGES)


def _format(block=BLOCKS["tensor"], zero="none", element=None):
    element = element or Int(4, signed=zero == "none")
    return TensorFormat(element=element, block=block, zero=zero, scale=SCALES["float32"], partial=True)


def _x(sequences=6, seed=0, length=LENGTH):
    """[sequences, length, features] with channels of different sizes, and growing."""
    x = torch.randn(sequences, length, FEATURES, generator=torch.Generator().manual_seed(seed))
    return x * torch.logspace(-1, 1, FEATURES) * torch.arange(1, sequences + 1)[:, None, None] + 0.3


def _found(kind, fmt, *batches):
    statistic = RANGES[kind](FEATURES, torch.device("cpu"), fmt)
    for batch in batches:
        statistic.update(batch)
    return statistic


def _parts(x, fmt):
    """x of every group, [sequences, length, width] each."""
    return x.split(fmt.width(FEATURES), dim=-1)


def _equal(a, b):
    return torch.equal(a.lower, b.lower) and torch.equal(a.upper, b.upper)


@every_block
@pytest.mark.parametrize("zero", ["none", "int", "float"])
def test_minmax_is_that_of_all_tokens(block, zero):
    fmt, x = _format(block, zero), _x()
    x[..., :5], x[..., 10:] = x[..., :5].abs() + 1, x[..., 10:].abs() + 1  # groups without negative values
    found = _found("minmax", fmt, x).range()
    lower = torch.tensor([[part.min() for part in _parts(x, fmt)]])
    upper = torch.tensor([[part.max() for part in _parts(x, fmt)]])
    assert lower.max() > 0 or block.columns == 0
    if zero != "float":
        lower, upper = lower.clamp_max(0), upper.clamp_min(0)
    assert _equal(found, Range(lower, upper))


@every_block
def test_moving_average_equals_a_slow_loop(block):
    fmt, x = _format(block, "int"), _x(20)
    lower, upper = [], []
    for part in _parts(x, fmt):
        low, high = part[0].min().item(), part[0].max().item()
        for sequence in part[1:]:
            low += 0.01 * (sequence.min().item() - low)
            high += 0.01 * (sequence.max().item() - high)
        lower.append(low)
        upper.append(high)
    found = _found("moving", fmt, x).range()
    assert torch.allclose(found.lower, torch.tensor([lower]), rtol=1e-5)
    assert torch.allclose(found.upper, torch.tensor([upper]), rtol=1e-5)
    whole = _found("minmax", fmt, x).range()
    assert (found.upper < 0.5 * whole.upper).all()


def test_moving_average_counts_rows_without_sequences_as_one():
    x = _x(2)
    fmt = _format()
    assert _equal(_found("moving", fmt, x[0], x[1]).range(), _found("moving", fmt, x).range())


@every_kind
@every_block
@pytest.mark.parametrize("zero", ["none", "int", "float"])
def test_chunks_change_nothing(kind, block, zero):
    """Bit for bit: growing inputs make the histogram widen its bins on the way."""
    fmt, x = _format(block, zero), _x(8)
    x[0] = 0
    x[1] *= 1e-4
    whole = _found(kind, fmt, x)
    for batches in (x.split(1), x.split([1, 0, 5, 2]), [x[:0], x]):
        parts = _found(kind, fmt, *batches)
        assert parts.tokens == whole.tokens == 8 * LENGTH
        assert _equal(parts.range(), whole.range())


@pytest.mark.parametrize("kind", ["minmax", "histogram"])
def test_order_and_shape_change_nothing(kind):
    fmt, x = _format(Block(0, 4), "int"), _x()
    rows = x.flatten(0, 1)
    shuffled = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))]
    assert _equal(_found(kind, fmt, *shuffled.split(7)).range(), _found(kind, fmt, x).range())


@every_block
def test_histogram_counts_every_value_in_its_bin(block):
    fmt, x = _format(block), _x()
    x[0] *= 1e-3  # the bins double ten times, and more
    x[2, 3, :] = 0
    found = _found("histogram", fmt, *x.split(1))
    for group, part in enumerate(_parts(x, fmt)):
        top = 2.0 ** (torch.frexp(part.abs().max())[1].item())
        assert top / 2 <= part.abs().max() < top
        index = torch.floor(part.double() / (top / BINS)).long() + BINS
        assert torch.equal(found.counts[group].long(), torch.bincount(index.flatten(), minlength=2 * BINS))


def _heavy(seed=0):
    x = torch.randn(8, 500, FEATURES, generator=torch.Generator().manual_seed(seed))
    x[..., 3] *= 6
    x[0, 0, 0] = 25.0
    return x


def _skewed():
    x = _heavy()
    return torch.where(x < 0, 0.3 * x, x)


def _cost(x, fmt, bounds):
    """Mean squared error of quantizing all of x by the format itself."""
    rows = x.reshape(-1, x.shape[-1])
    return float((fake_quantize(rows, fmt, bounds).double() - rows).square().mean())


ELEMENTS = {
    **{
        f"int{b}_{reach}": Int(b, signed=True, reach=reach)
        for b in (2, 4, 8)
        for reach in ("midpoint", "narrow", "full")
    },
    "e4m3": Float(4, 3, "fn"),
    "e2m1": Float(2, 1),
    "e3m0": Float(3, 0),
    "nf4": NF4,
}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ELEMENTS)
def test_threshold_is_as_good_as_the_best_of_an_exhaustive_search(name, sign):
    fmt, x = _format(element=ELEMENTS[name]), sign * _skewed()
    found = _found("histogram", fmt, x).range()
    whole = _found("minmax", fmt, x).range()
    most = max(-whole.lower.item(), whole.upper.item())
    tried = [
        Range(whole.lower.clamp_min(-share * most), whole.upper.clamp_max(share * most))
        for share in torch.linspace(0.01, 1, 150).tolist()
    ]
    best = min(_cost(x, fmt, bounds) for bounds in tried)
    assert _cost(x, fmt, found) <= 1.003 * best
    assert (whole.lower <= found.lower).all()
    assert (found.upper <= whole.upper).all()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("zero", ["int", "float"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_both_ends_are_as_good_as_the_best_of_an_exhaustive_search(bits, zero, sparse):
    fmt, x = _format(zero=zero, element=Int(bits, signed=False)), _skewed()
    if sparse:  # an integer zero point represents 0 itself
        x = x.where(x.abs() > 1, 0)
    found = _found("histogram", fmt, x).range()
    whole = _found("minmax", fmt, x).range()
    tried = [
        Range(low * whole.lower, high * whole.upper)
        for low in torch.linspace(0.02, 1, 24)
        for high in torch.linspace(0.02, 1, 24)
    ]
    best = min(_cost(x, fmt, bounds) for bounds in tried)
    # Where 0 falls between levels matters then, and the best pair may lie between those of the coarsest grid.
    assert _cost(x, fmt, found) <= (1.01 if sparse and zero == "float" else 1.003) * best
    if bits < 8:
        assert _cost(x, fmt, found) < 0.9 * _cost(x, fmt, whole)


@pytest.mark.parametrize("zero", ["none", "int"])
def test_every_group_is_searched_on_its_own(zero):
    fmt, x = _format(Block(0, 4), zero), _heavy()
    found = _found("histogram", fmt, x).range()
    for group, part in enumerate(_parts(x, fmt)):
        alone = Histogram(4, torch.device("cpu"), replace(fmt, block=Block(0, 0)))
        alone.update(part)
        assert found.lower[0, group] == alone.range().lower
        assert found.upper[0, group] == alone.range().upper


@pytest.mark.parametrize("name", ELEMENTS)
def test_cost_is_that_of_the_elements_own_rounding(name):
    """Against values spread over the bins as the histogram assumes."""
    element, generator = ELEMENTS[name], torch.Generator().manual_seed(0)
    counts = torch.zeros(2, 2 * BINS, dtype=torch.float64)
    counts[0, BINS - 1500 : BINS + 700] = torch.rand(2200, generator=generator, dtype=torch.float64)
    counts[1, [0, 3, BINS, BINS + 40, 2 * BINS - 1]] = torch.tensor([1.0, 2.0, 9.0, 4.0, 1.0], dtype=torch.float64)
    thresholds = torch.tensor([150.0, 700.0, 2048.0], dtype=torch.float64)
    levels = thresholds[:, None] * element.codebook.double() / element.extent
    found = Density(counts).cost(levels.expand(2, -1, -1))
    fine = 64
    x = (torch.arange(-BINS * fine, BINS * fine, dtype=torch.float64) + 0.5) / fine
    for column, threshold in enumerate(thresholds):
        scale = threshold / element.extent
        rounded = element.nearest((x / scale).float()).double() * scale
        expected = counts @ (rounded - x).square().view(-1, fine).mean(dim=1)
        # The sum at the middles of parts of a bin leaves out what lies within a part.
        assert torch.allclose(found[:, column], expected, rtol=1e-4, atol=float(counts.sum()) / fine**2)


@pytest.mark.parametrize("zero", ["none", "int", "float"])
@pytest.mark.parametrize("value", [0.7, -0.7, 0.5])
def test_inputs_of_one_value_come_out_as_it(zero, value):
    element = Int(4, signed=zero == "none", reach="narrow")  # the only one that can hold the largest value
    fmt, x = _format(zero=zero, element=element), torch.full((2, 3, FEATURES), value)
    found = _found("histogram", fmt, x).range()
    assert found.lower <= found.upper
    width = 1 / BINS
    assert zero == "float" or _cost(x, fmt, found) <= width**2
    assert zero != "float" or max(abs(found.lower - value), abs(found.upper - value)) <= width


@every_kind
def test_inputs_of_zeros(kind):
    fmt = _format(Block(0, 4))
    found = _found(kind, fmt, torch.zeros(2, 3, FEATURES)).range()
    assert _equal(found, Range(torch.zeros(1, 3), torch.zeros(1, 3)))


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_count_by_their_value(kind, dtype):
    fmt, x = _format(Block(0, 4), "int"), _x().to(dtype)
    found = _found(kind, fmt, x).range()
    assert found.lower.dtype == torch.float32
    assert _equal(found, _found(kind, fmt, x.float()).range())


@every_kind
def test_nothing_seen_and_not_finite_are_refused(kind):
    with pytest.raises(NumericsError, match="0 were seen"):
        _found(kind, _format()).range()
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = _x()
        x[2, 3, 4] = bad
        with pytest.raises(NumericsError, match="NaN or infinity"):
            _found(kind, _format(), x).range()


def test_every_kind_is_different():
    x = _heavy()
    found = [_found(kind, _format(), x).range().upper.item() for kind in RANGES]
    assert len(set(found)) == 3
    assert {type(_found(kind, _format())) for kind in RANGES} == {MinMax, MovingMinMax, Histogram}
