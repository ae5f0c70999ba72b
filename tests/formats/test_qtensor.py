"""A quantized tensor means scale · (code - zero), whatever order its columns were quantized in."""

import pytest
import torch

from qbench.formats import QTensor, quantize, uniform


def _weights(rows=5, columns=12, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [4, 5])
def test_groups_follow_the_quantization_order(symmetric, group_size):
    """Column order[k] belongs to group k // group_size: element by element, against the definition."""
    w = _weights()
    order = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(3))
    fmt = uniform(bits=4, group_size=group_size, symmetric=symmetric, partial=True)
    permuted = quantize(w[:, order], fmt)
    codes = torch.empty_like(permuted.codes)
    codes[:, order] = permuted.codes
    found = QTensor(codes, permuted.scale, permuted.zero, fmt, order).dequantize()
    for i in range(w.shape[0]):
        for k, column in enumerate(order.tolist()):
            zero = 0 if symmetric else permuted.zero[i, k // group_size]
            assert found[i, column] == permuted.scale[i, k // group_size] * (codes[i, column].float() - zero)
    assert not torch.equal(found, QTensor(codes, permuted.scale, permuted.zero, fmt).dequantize())


def test_an_order_costs_a_group_index_per_column_unless_rows_or_tensors_share_a_scale():
    w, order = _weights(), torch.arange(12)
    for group_size, extra in [(4, 32 * 12), (-1, 0), (0, 0)]:
        plain = quantize(w, uniform(bits=3, group_size=group_size, symmetric=False))
        ordered = QTensor(plain.codes, plain.scale, plain.zero, plain.format, order)
        assert ordered.storage_bits() == plain.storage_bits() + extra


def test_dequantizing_leaves_the_codes_alone():
    found = quantize(_weights(), uniform(bits=4, group_size=4, symmetric=False))
    codes, scale = found.codes.clone(), found.scale.clone()
    assert torch.equal(found.dequantize(), found.dequantize())
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.scale, scale)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_digest_changes_with_everything_that_changes_the_weights(symmetric):
    w = _weights()
    fmt = uniform(bits=4, group_size=4, symmetric=symmetric)
    base = quantize(w, fmt)
    assert quantize(w.clone(), fmt).sha256() == base.sha256()
    codes, scale = base.codes.clone(), base.scale.clone()
    codes[2, 7] ^= 1
    scale[1, 1] *= 1.5
    others = [
        QTensor(codes, base.scale, base.zero, fmt),
        QTensor(base.codes, scale, base.zero, fmt),
        QTensor(base.codes, base.scale, base.zero, fmt, torch.arange(12).flip(0)),
        quantize(w.reshape(10, 6), uniform(bits=4, group_size=3, symmetric=symmetric)),
        quantize(w.reshape(15, 4), fmt),
    ]
    if not symmetric:
        others.append(QTensor(base.codes, base.scale, base.zero + 1, fmt))
    digests = [base.sha256(), *(other.sha256() for other in others)]
    assert len(set(digests)) == len(digests)


def test_the_digest_tells_shapes_and_groups_apart():
    """Same bytes, other weights: columns 3 and 4 belong to another group, or the rows are cut elsewhere."""
    codes, scale = torch.arange(10, dtype=torch.int8).view(2, 5), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = []
    for group_size in (3, 4):
        fmt = uniform(bits=8, group_size=group_size, symmetric=True, partial=True)
        found.append(QTensor(codes, scale, None, fmt))
    whole = uniform(bits=8, group_size=0, symmetric=True)
    found += [QTensor(codes.view(shape), torch.ones(1, 1), None, whole) for shape in [(2, 5), (5, 2)]]
    values = [tensor.dequantize() for tensor in found]
    assert not torch.equal(values[0], values[1])
    assert len({tensor.sha256() for tensor in found}) == len(found)
