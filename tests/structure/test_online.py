"""Transforms against the matrices they stand for; a weight reads its transformed input, whoever runs or copies it."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from qbench.errors import SpecError, StructureError
from qbench.hadamard import hadamard
from qbench.structure.blocks import capture_calls, find_blocks
from qbench.structure.online import (
    Chain,
    HadamardTransform,
    MatrixTransform,
    attach,
    attach_to_attention,
    attached,
    attached_instead,
    attached_to_attention,
    from_plain,
    plain,
)
from qbench.structure.trace import LinearTap, trace_block
from tests.architectures import tiny_model, tokens


def _matrix(order, inner, outer, signs):
    """The same as a dense matrix [n, n]."""
    signs = torch.ones(order) if signs is None else signs
    one = torch.diag(signs.double()) @ hadamard(order).double().T / order**0.5
    return torch.kron(torch.eye(outer, dtype=torch.float64), torch.kron(one, torch.eye(inner, dtype=torch.float64)))


def _signs(order):
    return torch.randint(0, 2, (order,), generator=torch.Generator().manual_seed(order)) * 2 - 1


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("outer", [1, 2])
@pytest.mark.parametrize("order", [1, 2, 8, 12, 20, 36, 48])
def test_hadamard_transform_is_the_product_with_its_matrix(order, outer, inner, signed):
    signs = _signs(order) if signed else None
    transform, matrix = HadamardTransform(order, inner, signs), _matrix(order, inner, outer, signs)
    x = _normal(2, 3, order * inner * outer)
    assert torch.allclose(transform(x), x @ matrix, atol=1e-12)
    assert torch.allclose(transform.inverse(x), x @ matrix.T, atol=1e-12)
    assert torch.allclose(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_inputs_are_transformed_in_float32(dtype):
    x = _normal(5, 48).to(dtype)
    expected = HadamardTransform(48)(x.float())
    found = HadamardTransform(48)(x)
    assert found.dtype == dtype
    assert torch.equal(found, expected.to(dtype))
    square = _normal(48, 48, seed=1)
    assert torch.equal(MatrixTransform(square)(x), (x.float() @ square.float()).to(dtype))


def test_large_values_do_not_overflow():
    x = torch.full((1, 64), 60000.0, dtype=torch.float16)
    x[:, ::2] *= -1
    found = HadamardTransform(64)(x)
    assert found.isfinite().sum() == 63  # the one that collects everything is 8 * 60000
    assert found[0, 0] == 0


def test_orders_without_a_matrix_are_refused():
    with pytest.raises(SpecError, match=r"hadamard order=9: no Hadamard matrix exists"):
        HadamardTransform(9)


@pytest.mark.parametrize("blocks", [None, 3])
def test_matrix_transform_permutes_and_multiplies_block_by_block(blocks):
    matrix = _normal(4, 4) if blocks is None else _normal(blocks, 4, 4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    x = _normal(2, 5, 12, seed=2)
    parts = [matrix] * 3 if blocks is None else list(matrix)
    selection = torch.eye(12, dtype=torch.float64)[:, order]
    assert torch.allclose(MatrixTransform(matrix)(x), x @ torch.block_diag(*parts), atol=1e-12)
    found = MatrixTransform(matrix, order)(x)
    assert torch.allclose(found, x @ selection @ torch.block_diag(*parts), atol=1e-12)


def test_transforms_survive_a_file():
    transforms = [
        HadamardTransform(12, 2, _signs(12)),
        HadamardTransform(24),
        MatrixTransform(_normal(2, 12, 12), torch.arange(24).flip(0)),
    ]
    transforms.append(Chain(tuple(transforms)))
    file, x = io.BytesIO(), _normal(3, 24)
    torch.save([plain(transform) for transform in transforms], file)
    file.seek(0)
    for transform, values in zip(transforms, torch.load(file, weights_only=True), strict=True):
        assert torch.equal(from_plain(values)(x), transform(x))
    with pytest.raises(StructureError, match=r"function: one of HadamardTransform"):
        plain(lambda x: x)


def _mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)).double().requires_grad_(False)


def test_a_weight_reads_what_the_transform_makes_of_its_input():
    block, x, transform = _mlp(), _normal(3, 12), HadamardTransform(8)
    before = block(x)
    undo = attach(block, "2.weight", transform)
    expected = block[2].weight @ transform(block[:2](x)).T + block[2].bias[:, None]
    assert torch.allclose(block(x), expected.T)
    assert not torch.allclose(block(x), before)
    assert attached(block) == {"2.weight": transform}
    undo()
    assert torch.equal(block(x), before)
    assert attached(block) == {}


def test_folding_the_transform_into_the_weight_gives_the_function_back():
    block, x, transform = _mlp(), _normal(3, 12), HadamardTransform(12, signs=_signs(12))
    before = block(x)
    block[0].weight.copy_(transform(block[0].weight))
    attach(block, "0", transform)  # by the module's path
    assert torch.allclose(block(x), before, atol=1e-12)


def test_a_second_transform_comes_after_the_first():
    block, x = _mlp(), _normal(3, 12)
    first, second = MatrixTransform(_normal(12, 12)), MatrixTransform(_normal(12, 12, seed=1))
    attach(block, "0.weight", first)
    undo = attach(block, "0.weight", second)
    expected = F.linear(second(first(x)), block[0].weight, block[0].bias)
    assert torch.allclose(block[:1](x), expected)
    undo()
    assert torch.allclose(block[:1](x), F.linear(first(x), block[0].weight, block[0].bias))


def test_copies_have_the_transform_and_weights_of_their_own():
    block, x = _mlp(), _normal(3, 12)
    attach(block, "0.weight", HadamardTransform(12))
    copied = copy.deepcopy(block)
    expected = block(x)
    block[0].weight.zero_()
    assert torch.equal(copied(x), expected)
    assert attached(copied).keys() == {"0.weight"}
    assert copied[0].__dict__["forward"].module is copied[0]
    # Replaced parameters, as in a functional call.
    values = {"0.weight": copied[0].weight * 2, "0.bias": copied[0].bias * 2}
    doubled = torch.func.functional_call(copied[:1], values, (x,))
    assert torch.allclose(doubled, 2 * copied[:1](x))


def test_a_failed_forward_leaves_nothing_behind():
    block = _mlp()
    attach(block, "2.weight", HadamardTransform(8))
    with pytest.raises(RuntimeError):
        block(_normal(3, 13))
    block[2].weight = nn.Parameter(torch.ones(4, 9, dtype=torch.float64))
    with pytest.raises(RuntimeError):
        block(_normal(3, 12))
    assert not _get_current_function_mode_stack()


@pytest.mark.parametrize("name", ["nothing", "1", "0.bias", "0.weight[1]", ""])
def test_what_is_no_weight_is_refused(name):
    with pytest.raises(StructureError, match=r"not a linear weight of Sequential"):
        attach(_mlp(), name, HadamardTransform(8))


def test_other_transforms_for_a_while():
    block, x = _mlp(), _normal(3, 12)
    own, other = HadamardTransform(12), HadamardTransform(8)
    attach(block, "0.weight", own)
    expected = block(x)
    with attached_instead(block, {"2.weight": other}):
        assert attached(block) == {"2.weight": other}
        plain_block = _mlp()
        attach(plain_block, "2.weight", other)
        assert torch.equal(block(x), plain_block(x))
    assert attached(block) == {"0.weight": own}
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize(
    ("name", "weight"),
    [("gpt2", "mlp.c_proj.weight"), ("falcon", "mlp.dense_4h_to_h.weight"), ("llama", "mlp.down_proj.weight")],
)
@torch.no_grad()
def test_folded_into_a_models_block_nothing_changes_and_taps_see_it(name, weight):
    model, config = tiny_model(name, dtype=torch.float64)
    hidden, calls = capture_calls(model, tokens(config))
    block = find_blocks(model)[1][0]
    structure = trace_block(block, calls[0], hidden)
    ref = next(ref for group in structure.groups for ref in group.weights if ref.name == weight)
    expected, seen = calls[0](block, hidden), {}
    with LinearTap(block, structure, lambda group, x: seen.update({group.index: x.clone()})):
        calls[0](block, hidden)
    before, seen = seen, {}
    transform = HadamardTransform(ref.in_features)
    ref.write(block, transform(ref.read(block)))
    attach(block, weight, transform)
    with LinearTap(block, structure, lambda group, x: seen.update({group.index: x.clone()})):
        assert torch.allclose(calls[0](block, hidden), expected, atol=1e-12)
    for group in structure.groups:
        x = before[group.index]
        assert torch.allclose(seen[group.index], transform(x) if ref in group.weights else x, atol=1e-12)
    again = trace_block(block, calls[0], hidden)
    assert [group.weights for group in again.groups] == [group.weights for group in structure.groups]


@torch.no_grad()
def test_each_expert_has_its_own():
    model, config = tiny_model("mixtral", dtype=torch.float64)
    hidden, calls = capture_calls(model, tokens(config, length=30))
    block = find_blocks(model)[1][0]
    expected = calls[0](block, hidden)
    down = block.mlp.experts.down_proj
    for index in range(8):
        transform = HadamardTransform(48, signs=_signs(48).roll(index))
        down[index] = transform(down[index])
        attach(block, f"mlp.experts.down_proj[{index}]", transform)
    assert len(attached(block)) == 8
    assert torch.allclose(calls[0](copy.deepcopy(block), hidden), expected, atol=1e-12)
    attach(block, "mlp.experts.down_proj[5]", HadamardTransform(48))
    assert not torch.allclose(calls[0](block, hidden), expected, atol=1e-3)


class _Attended(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.seen.append(args[:3])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "falcon"])
@torch.no_grad()
def test_queries_and_keys_are_rotated_and_values_are_not(name):
    model, config = tiny_model(name, dtype=torch.float64)
    hidden, calls = capture_calls(model, tokens(config))
    block = find_blocks(model)[1][0]
    with _Attended() as before:
        expected = calls[0](block, hidden)
    transform = HadamardTransform(8)
    undo = attach_to_attention(block, transform)
    assert attached_to_attention(copy.deepcopy(block)) is not None
    with _Attended() as after:
        assert torch.allclose(calls[0](copy.deepcopy(block), hidden), expected, atol=1e-12)
    query, key, value = before.seen[0]
    for found, wanted in zip(after.seen[0], (transform(query), transform(key), value), strict=True):
        assert torch.allclose(found, wanted, atol=1e-12)
    undo()
    assert attached_to_attention(block) is None
    # The model calls its blocks by their signature.
    attach_to_attention(block, transform)
    model(input_ids=tokens(config))
    capture_calls(model, tokens(config))
