"""A WeightRef reads and writes `[out, in]`, whatever way the parameter is stored."""

import pytest
import torch
from torch import nn

from qbench.errors import StructureError
from qbench.structure.weights import WeightRef


def _block(shape, dtype):
    block = nn.Module()
    block.inner = nn.Module()
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    block.inner.weight = nn.Parameter(values.to(dtype))
    return block


CASES = {
    "plain": ((5, 3), {}, lambda p: p),
    "transposed": ((3, 5), {"transposed": True}, lambda p: p.T),
    "expert": ((4, 5, 3), {"index": 2}, lambda p: p[2]),
    "transposed expert": ((4, 3, 5), {"index": 2, "transposed": True}, lambda p: p[2].T),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_reads_a_view_and_writes_in_place(case, dtype):
    shape, how, select = CASES[case]
    block = _block(shape, dtype)
    parameter = block.inner.weight
    ref = WeightRef(name="w", parameter="inner.weight", out_features=5, in_features=3, **how)
    view = ref.read(block)
    assert torch.equal(view, select(parameter))
    assert view.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    assert not view.requires_grad

    address = parameter.data_ptr()
    untouched = parameter.detach().clone()
    value = -torch.arange(15, dtype=torch.float64).reshape(5, 3)
    ref.write(block, value)
    assert block.inner.weight is parameter
    assert parameter.data_ptr() == address
    assert torch.equal(view.double(), value)
    select(untouched).copy_(value)
    assert torch.equal(parameter, untouched)


def test_refuses_a_value_that_would_be_broadcast():
    block = _block((5, 3), torch.float32)
    ref = WeightRef(name="inner.weight", parameter="inner.weight", out_features=5, in_features=3)
    with pytest.raises(StructureError, match=r"inner\.weight: cannot hold .*\[3\]"):
        ref.write(block, torch.zeros(3))
