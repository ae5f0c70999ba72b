"""Learned weights in a block's parameters, and what a loss over all sequences is."""

import math

import pytest
import torch

from qbench.errors import NumericsError
from qbench.formats import uniform
from qbench.stages.block_learning import (
    block_loss,
    count_sequences,
    gain,
    mean_loss,
    replaced_parameters,
    squared_error,
    weights_loss,
)
from tests.stages.learning_views import learning_view, linear_view

INT4 = uniform(bits=4, group_size=8, symmetric=False)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_find_their_places_with_their_gradients(name, dtype):
    """Against writing into a copy of the block, weight by weight; half of the weights stay."""
    view = learning_view(name, INT4, dtype=dtype)
    refs = [ref for group in view.groups for ref in group.weights][::2]
    values = {ref.name: torch.randn(ref.out_features, ref.in_features, requires_grad=True) for ref in refs}
    found = replaced_parameters(view.block, refs, values)
    assert found.keys() == {ref.parameter for ref in refs}
    expected = {path: view.block.get_parameter(path).detach().clone() for path in found}
    for ref in refs:
        ref.of(expected[ref.parameter]).copy_(values[ref.name].detach())
    for path, value in found.items():
        assert value.dtype == dtype
        assert torch.equal(value, expected[path]), path
    sum((value.float() * 3).sum() for value in found.values()).backward()
    assert all(torch.equal(value.grad, torch.full_like(value, 3)) for value in values.values())


def test_the_loss_is_between_the_quantized_and_the_full_precision_stream():
    view = linear_view(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), INT4)
    inputs, targets = torch.cat(view.data.inputs), torch.cat(view.data.targets)
    assert count_sequences(view.data) == 5
    refs, weight = view.groups[0].weights, torch.ones(4, 8)
    for sequences in ([0], [4, 2], [3, 0, 1]):
        output = view.block.norm(inputs[sequences]) @ weight.mT
        expected = (output - targets[sequences]).square().mean()
        for loss in (
            weights_loss(view, refs, {"weight": weight}.get, squared_error),
            block_loss(view.data, lambda: {"weight": weight}, squared_error),
        ):
            assert loss(sequences).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 9])
def test_the_mean_is_over_sequences_however_they_are_batched(batch_size):
    data = linear_view(torch.randn(4, 8), INT4).data
    seen = []

    def loss(sequences):
        seen.append(sequences)
        return torch.tensor(sequences, dtype=torch.float64).mean()

    assert mean_loss(loss, data, batch_size, "block 3") == pytest.approx(2.0)
    assert [k for sequences in seen for k in sequences] == [0, 1, 2, 3, 4]
    assert max(map(len, seen)) == min(batch_size, 5)
    with pytest.raises(NumericsError, match=r"^block 3: the loss of the quantized block's output is nan"):
        mean_loss(lambda _: torch.tensor(math.nan), data, batch_size, "block 3")


def test_where_there_is_nothing_to_gain_nothing_is():
    assert (gain(1.0, 2.0), gain(0.0, 0.0)) == (0.5, 1.0)
