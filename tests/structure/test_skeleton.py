"""Single decisions of the search for what a weight feeds, which the final proof of a fold would hide."""

import pytest
import torch
from torch import nn

from qbench.structure.blocks import BlockCall
from qbench.structure.skeleton import Skeleton, _common_factor, distinct_factors, find_readers
from qbench.structure.trace import trace_block

CALL = BlockCall(args=(), kwargs={})
UP, DOWN = ("0.weight", None), ("2.weight", None)


class _Between(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def _skeleton(function):
    block = nn.Sequential(nn.Linear(8, 8), _Between(function), nn.Linear(8, 8))
    hidden = torch.ones(2, 4, 8)
    return Skeleton(block, CALL, hidden, trace_block(block, CALL, hidden))


def test_factors_are_distinct_and_not_near_1():
    for n in (1, 8, 50_000):
        factors = distinct_factors(n)
        assert len(factors) == n
        assert n == 1 or float(factors.diff().min()) > 5e-6
        assert float((factors - 1).abs().min()) >= 0.25


def test_the_factor_of_a_channel_is_the_position_it_came_from():
    skeleton = _skeleton(lambda x: x.flip(-1))
    readers = find_readers(skeleton, 8, rows={UP: distinct_factors(8)})
    assert readers.keys() == {DOWN}
    assert torch.equal(readers[DOWN], torch.arange(7, -1, -1))


@pytest.mark.parametrize("factor", [1.3, 1.2, 1.8, 3.0])
def test_a_factor_that_is_none_of_the_given_is_refused(factor):
    assert (
        find_readers(_skeleton(lambda x: x), 8, rows={UP: torch.full((8,), factor, dtype=torch.float64)})
        == {}
    )


def test_a_common_factor_holds_for_every_token():
    before = torch.tensor([[1.0, 0.0, 2.0, 1.0, 0.0], [3.0, 0.0, -2.0, -1.0, 0.0]], dtype=torch.float64)
    after = torch.tensor([[1.5, 0.0, 3.0, 1.6, 0.0], [4.5, 0.0, -3.0, -1.4, 1.0]], dtype=torch.float64)
    found = _common_factor(before, after)
    assert found[[0, 2]].tolist() == [1.5, 1.5]
    assert bool(found[1].isnan())
    assert found[[3, 4]].tolist() == [torch.inf, torch.inf]


def test_channels_as_small_as_a_closed_gate_leaves_them_still_tell_their_factor():
    before = torch.full((4, 1), 1e-200, dtype=torch.float64)
    assert _common_factor(before, 1.5 * before).tolist() == [1.5]


def test_the_last_weight_feeds_the_output_and_no_weight():
    assert find_readers(_skeleton(lambda x: x), 8, rows={DOWN: distinct_factors(8)}) == {}


def test_a_change_of_nothing_has_no_readers():
    assert find_readers(_skeleton(lambda x: x), 8, rows={UP: torch.ones(8, dtype=torch.float64)}) == {}
