"""Statistics are sums and maxima over tokens: of no order, of no batching, and they follow a rescaled input exactly."""

import pytest
import torch

from qbench.calibration.statistics import AbsMax, AbsMean, Hessian

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
