"""Shifts that move from a norm's bias into the biases of the layers behind it: offered where they exist, and exact."""

import copy
from dataclasses import replace

import pytest
import torch

from qbench.errors import NumericsError
from qbench.structure.float64 import run_exactly
from tests.architectures import ARCHITECTURES
from tests.structure.test_folds import _error, _folded, _parameters, _scale, _traced

BIASES = {
    "opt": ("self_attn_layer_norm.bias", "final_layer_norm.bias"),
    "gpt2": ("ln_1.bias", "ln_2.bias"),
    **dict.fromkeys(("gpt_neox", "bloom", "starcoder2"), ("input_layernorm.bias", "post_attention_layernorm.bias")),
    "phi": ("input_layernorm.bias",),
}


def _shift(fold, seed=0):
    return torch.randn(fold.n_free, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shifts_exist_where_the_norm_and_all_it_feeds_have_biases(name):
    block, call, hidden, _, folds = _folded(name)
    found = [fold for fold in folds if fold.bias is not None]
    assert tuple(fold.bias for fold in found) == BIASES.get(name, ())
    parameters = _parameters(block)
    for fold in folds:
        if fold.bias is None:
            with pytest.raises(NumericsError, match="no bias that a shift could be moved to"):
                fold.apply_shift(parameters, _shift(fold))
            continue
        changed = fold.apply_shift(parameters, _shift(fold))
        assert changed.keys() == {fold.bias, *(ref.bias for ref in fold.consumers)}
        assert _error(block, call, hidden, changed) <= 1e-13
        assert _error(block, call, hidden, {fold.bias: changed[fold.bias]}) > 1e-3
        assert _error(block, call, hidden, {k: v for k, v in changed.items() if k != fold.bias}) > 1e-3
        assert all(torch.equal(value, block.get_parameter(path)) for path, value in parameters.items())


@pytest.mark.parametrize("name", ["opt", "gpt2", "gpt_neox"])
def test_a_shift_and_then_a_scale_leave_the_function_alone(name):
    block, call, hidden, _, folds = _folded(name)
    parameters = _parameters(block)
    for fold in folds:
        if fold.bias is not None:
            parameters |= fold.apply_shift(parameters, _shift(fold, fold.group))
        parameters |= fold.apply(parameters, _scale(fold, fold.group))
    assert _error(block, call, hidden, parameters) <= 1e-13


def test_a_shift_subtracts_from_the_channels_and_its_inverse_restores():
    block, _, _, _, folds = _folded("opt")
    fold, parameters = folds[0], _parameters(block)
    shift = _shift(fold)
    there = parameters | fold.apply_shift(parameters, shift)
    assert torch.allclose(parameters[fold.bias] - there[fold.bias], shift)
    for ref in fold.consumers:
        assert torch.allclose(there[ref.bias] - parameters[ref.bias], ref.of(parameters[ref.parameter]) @ shift)
    for path, value in (there | fold.apply_shift(there, -shift)).items():
        torch.testing.assert_close(value, parameters[path], rtol=1e-13, atol=1e-13)
    crossed = replace(fold, channels=torch.arange(32).flip(0))  # free shift k is channel 31 - k's
    for ref in fold.consumers:
        taken = crossed.apply_shift(parameters, shift)[ref.bias] - parameters[ref.bias]
        assert torch.allclose(taken, ref.of(parameters[ref.parameter]) @ shift.flip(0))
    for wrong in (shift[:-1], shift * torch.nan):
        with pytest.raises(NumericsError, match="shifts must be 32 finite numbers"):
            fold.apply_shift(parameters, wrong)


@pytest.mark.parametrize("name", ["opt", "gpt2", "phi"])
def test_the_proof_in_float64_sees_the_biases_that_operations_add(name):
    block, call, hidden, structure = _traced(name)
    ref = next(
        ref for group in structure.groups for ref in group.weights if "v_proj" in ref.name or "c_attn" in ref.name
    )
    outputs = [
        run_exactly(
            block,
            call,
            hidden,
            structure,
            matrix=lambda _, weight: weight,
            vector=lambda path, value, factor=factor: value * factor if path == ref.bias else value,
        )
        for factor in (1.0, 2.0)
    ]
    exact = call.to(dtype=torch.float64)(copy.deepcopy(block).double(), hidden.double())
    assert torch.allclose(outputs[0], exact, rtol=1e-12, atol=1e-12)
    assert (outputs[1] - outputs[0]).abs().max() > 1e-3
