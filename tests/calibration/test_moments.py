"""Kurtosis against scipy in float64, in pieces of any size, and where it does not exist."""

import pytest
import scipy.stats
import torch

from qbench.calibration.moments import Moments, kurtosis


def _values(kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 48, generator=generator)
    return {
        "normal": x,
        "far from zero": 1000 + x,
        "outlier channel": x * torch.where(torch.arange(48) == 7, 60.0, 1.0),
        "skew": x.exp(),
        "tiny": 1e-3 * x,
        "two values": (x > 0).float(),
        "bfloat16": x.bfloat16(),
    }[kind]


KINDS = ("normal", "far from zero", "outlier channel", "skew", "tiny", "two values", "bfloat16")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [(64,), (1, 63), (20, 3, 41), (1,) * 64])
def test_pieces_have_the_kurtosis_of_the_whole(kind, pieces):
    x = _values(kind)
    moments = Moments()
    for piece in x.split(pieces):
        moments.update(piece)
        moments.update(piece[:0])
    expected = scipy.stats.kurtosis(x.double().numpy(), axis=None, fisher=False)
    assert moments.count == x.numel()
    assert moments.kurtosis() == pytest.approx(expected, rel=2e-5)
    assert kurtosis(x) == pytest.approx(expected, rel=1e-3 if kind == "far from zero" else 2e-5)


def test_it_is_of_no_scale_and_does_not_change_what_it_sees():
    x = _values("skew")
    before = x.clone()
    for factor in (1e-12, 1e-6, 1e6):
        assert kurtosis(factor * x) == pytest.approx(kurtosis(x), rel=1e-4)
    Moments().update(x)
    assert torch.equal(x, before)


def test_equal_values_have_none_and_what_is_no_number_shows():
    moments = Moments()
    assert moments.kurtosis() is None
    moments.update(torch.full((3, 4), 0.5))
    assert moments.kurtosis() is None
    assert kurtosis(torch.zeros(2, 2)) is None
    moments.update(torch.tensor([float("nan")]))
    assert moments.kurtosis() != moments.kurtosis()
    assert kurtosis(torch.tensor([1.0, float("inf")])) != 3
