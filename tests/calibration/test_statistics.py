"""Statistics are sums and maxima over tokens: of no order, of no batching, and they follow a rescaled input exactly."""

import pytest
import torch

from qbench.calibration.statistics import AbsMax, AbsMean, CrossMoment, Hessian

KINDS = {
    Hessian: lambda x: (x.double().t() @ x.double()) / len(x),
    AbsMean: lambda x: x.double().abs().mean(0),
    AbsMax: lambda x: x.double().abs().amax(0),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def _inputs(tokens=60, features=7, seed=0):
    x = torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed))
    return x * torch.logspace(-2, 2, features)


def _statistic(kind, *batches):
    statistic = kind(batches[0].shape[-1], torch.device("cpu"))
    for batch in batches:
        statistic.update(batch)
    return statistic


def _close(found, expected):
    """Relative to each channel's own size: channels differ by four orders of magnitude."""
    size = expected.abs() if expected.ndim == 1 else expected.diagonal().sqrt()[:, None] * expected.diagonal().sqrt()
    return bool(((found.double() - expected).abs() <= 1e-5 * size).all())


@every_kind
def test_value_is_the_definition_over_all_tokens(kind):
    x = _inputs()
    found = _statistic(kind, x)
    assert found.tokens == 60
    assert found.value().dtype == torch.float32
    assert _close(found.value(), KINDS[kind](x))


@every_kind
def test_neither_order_nor_batching_matters(kind):
    x = _inputs()
    shuffled = x[torch.randperm(60, generator=torch.Generator().manual_seed(1))]
    ways = [
        shuffled.split(60),
        x.split(1),
        shuffled.split([1, 0, 20, 39]),
        [x[:40].view(2, 20, 7), x[40:].view(4, 5, 7)],
        [x[:59], x[59]],
    ]
    for batches in ways:
        found = _statistic(kind, *batches)
        assert found.tokens == 60
        assert _close(found.value(), KINDS[kind](x))


@every_kind
def test_rescaled_is_the_statistic_of_the_rescaled_input(kind):
    x = _inputs()
    scale = torch.rand(7, generator=torch.Generator().manual_seed(2)) + 0.5
    statistic = _statistic(kind, x)
    before = statistic.value()
    found = statistic.rescaled(scale)
    assert type(found) is kind
    assert found.tokens == 60
    assert _close(found.value(), KINDS[kind](x / scale))
    found.update(x / scale)  # it goes on, on its own
    assert found.tokens == 120
    assert _close(found.value(), KINDS[kind](x / scale))
    assert torch.equal(statistic.value(), before)


@every_kind
def test_finishing_changes_no_value(kind):
    x, scale = _inputs(), torch.rand(7, generator=torch.Generator().manual_seed(2)) + 0.5
    statistic = _statistic(kind, x)
    expected, rescaled = statistic.value().clone(), statistic.rescaled(scale).value()
    for _ in range(2):  # once is as good as twice
        statistic.finish()
        assert torch.equal(statistic.value(), expected)
        assert torch.allclose(statistic.rescaled(scale).value(), rescaled, rtol=1e-5)
    assert statistic.tokens == 60


def test_a_finished_mean_takes_no_more_tokens():
    statistic = _statistic(Hessian, _inputs())
    statistic.finish()
    with pytest.raises(AssertionError, match="the mean has been taken"):
        statistic.update(_inputs())


@every_kind
def test_half_precision_inputs_are_summed_in_float32(kind):
    x = _inputs(4096, 3).abs().bfloat16()
    assert _close(_statistic(kind, x).value(), KINDS[kind](x))


@every_kind
def test_no_tokens_have_the_statistic_zero(kind):
    assert not _statistic(kind, _inputs()[:0]).value().any()


@every_kind
def test_inputs_are_left_alone(kind):
    x = _inputs()
    before = x.clone()
    _statistic(kind, x)
    assert torch.equal(x, before)


# ------------------------------------------------------------------ of two streams


def _pair():
    x = _inputs()
    return x + 0.3 * _inputs(seed=5)[:, torch.arange(7).flip(0)], x


def _cross(*batches):
    statistic = CrossMoment(7, torch.device("cpu"))
    for full, x in batches:
        statistic.update(x, full)
    return statistic


def _cross_by_definition(full, x):
    return ((full.double() - x.double()).t() @ x.double()) / len(x)


def _near(found, full, x):
    """Relative to each channel's own size, on both streams."""
    size = (full - x).double().square().mean(0).sqrt()[:, None] * x.double().square().mean(0).sqrt()
    return bool(((found.double() - _cross_by_definition(full, x)).abs() <= 1e-5 * size).all())


def test_the_cross_moment_is_of_what_the_streams_differ_by_and_the_quantized_one():
    full, x = _pair()
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    ways = [
        [(full, x)],
        list(zip(full[shuffled].split([1, 0, 20, 39]), x[shuffled].split([1, 0, 20, 39]))),
        [(full[:40].view(2, 20, 7), x[:40].view(2, 20, 7)), (full[40:].view(4, 5, 7), x[40:].view(20, 7))],
    ]
    for batches in ways:
        found = _cross(*batches)
        assert found.tokens == 60
        assert found.value().dtype == torch.float32
        assert _near(found.value(), full, x)
        found.finish()
        assert _near(found.value(), full, x)
    assert CrossMoment.paired
    assert not _cross((x, x)).value().any()
    assert not _cross((x[:0], x[:0])).value().any()
    assert not torch.allclose(found.value(), found.value().t())


def test_the_cross_moment_follows_a_rescaled_input():
    full, x = _pair()
    scale = torch.rand(7, generator=torch.Generator().manual_seed(2)) + 0.5
    assert _near(_cross((full, x)).rescaled(scale).value(), full.double() / scale, x.double() / scale)


@pytest.mark.parametrize("finished", [False, True])
def test_moments_follow_a_transformed_input(finished):
    full, x = _pair()
    matrix = torch.randn(7, 7, generator=torch.Generator().manual_seed(3))
    for statistic, expected in (
        (_statistic(Hessian, x), KINDS[Hessian](x @ matrix)),
        (_cross((full, x)), _cross_by_definition(full @ matrix, x @ matrix)),
    ):
        if finished:
            statistic.finish()
        found = statistic.transformed(lambda rows: rows @ matrix)
        assert type(found) is type(statistic)
        assert found.tokens == 60
        assert torch.allclose(found.value().double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max())
        if not finished:
            found.update(*(x @ matrix,) if type(found) is Hessian else (x @ matrix, full @ matrix))
            assert found.tokens == 120
            assert torch.allclose(found.value().double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max())


def test_half_precision_differences_are_taken_in_float32():
    full, x = (part.bfloat16() for part in _pair())
    assert _near(_cross((full, x)).value(), full, x)
