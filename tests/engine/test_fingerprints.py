"""Fingerprints: the same decisions have the same numbers, and whatever is decided otherwise has another."""

import hashlib
from types import SimpleNamespace

import pytest
import torch

from analysis.layers import FINGERPRINT
from qbench.engine.fingerprints import SUFFIX, fingerprints, identity_of, rotation_fingerprint
from qbench.engine.passes import run_pass
from qbench.engine.source import MemorySource
from qbench.formats import Range, quantize, uniform
from qbench.stages.base import Outcome
from qbench.structure.online import Chain, HadamardTransform, MatrixTransform
from qbench.structure.rotation import Rotation
from tests.architectures import tiny_model, tokens
from tests.engine.helpers import recipe

W3 = uniform(bits=3, group_size=8, symmetric=False, scale="float32")
STAGE = SimpleNamespace(name="stage")
GROUPS = {0: SimpleNamespace(weights=(SimpleNamespace(name="a"), SimpleNamespace(name="b")))}


def numbers(groups=GROUPS, **outcome):
    return {module: value for module, _, value in fingerprints(STAGE, Outcome(**outcome), groups)}


def weight(seed=0):
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))


def nudged(x):
    """One value of `x` moved by the smallest step there is."""
    moved = x.clone()
    moved.view(-1)[-1] = torch.nextafter(moved.view(-1)[-1], torch.tensor(torch.inf))
    return moved


def outcomes():
    """(what is decided about weight a, the same with the least of changes)"""
    x = weight()
    signs = torch.ones(16, dtype=torch.int64)
    flipped = signs.clone()
    flipped[3] = -1
    codes, other = quantize(x, W3), quantize(x, W3)
    other.codes[0, 0] ^= 1
    low, high = -torch.ones(4, 2), torch.ones(4, 2)
    turn = MatrixTransform(torch.eye(16, dtype=torch.float64))
    return {
        "parameter": ({"parameters": {"a": x}}, {"parameters": {"a": nudged(x)}}),
        "scalar": ({"parameters": {"a": torch.tensor(0.5)}}, {"parameters": {"a": torch.tensor(0.25)}}),
        "dtype": ({"parameters": {"a": x * 0}}, {"parameters": {"a": (x * 0).half()}}),
        "shape": ({"parameters": {"a": x}}, {"parameters": {"a": x.view(16, 4)}}),
        "range": ({"ranges": {"a": Range(low, high)}}, {"ranges": {"a": Range(low, nudged(high))}}),
        "codes": ({"codes": {"a": codes}}, {"codes": {"a": other}}),
        "signs": (
            {"online": {0: HadamardTransform(16, signs=signs)}},
            {"online": {0: HadamardTransform(16, signs=flipped)}},
        ),
        "chain": (
            {"online": {0: Chain((turn, HadamardTransform(16, signs=signs)))}},
            {"online": {0: Chain((turn, HadamardTransform(16, signs=flipped)))}},
        ),
        "kind": ({"ranges": {"a": Range(low, high)}}, {"parameters": {"a": low}, "ranges": {"a": Range(low, high)}}),
    }  # fmt: skip


@pytest.mark.parametrize("what", outcomes())
def test_any_change_gives_another_number_and_none_the_same(what):
    (first, changed), (again, _) = outcomes()[what], outcomes()[what]
    assert numbers(**first) == numbers(**again)
    assert numbers(**first).keys() == numbers(**changed).keys() == {"a"}
    assert numbers(**first)["a"] != numbers(**changed)["a"]


def test_only_the_changed_module_has_another_number():
    same = {"b": weight(1), "c": weight(2)}
    first, second = (numbers(parameters={"a": each} | same) for each in (weight(), nudged(weight())))
    assert [name for name in first if first[name] != second[name]] == ["a"]


def test_numbers_are_whole_and_kept_by_a_double():
    for first, _ in outcomes().values():
        for module, name, value in fingerprints(STAGE, Outcome(**first), GROUPS):
            assert (module, name) == ("a", "stage_fingerprint")
            assert value == int(value)
            assert 0 <= value < 2**48


def test_bfloat16_has_an_identity_and_the_old_dtypes_keep_theirs():
    x = weight().bfloat16()
    assert identity_of(x) != identity_of(x.view(torch.int16))
    x = torch.arange(3)
    assert identity_of(x) == hashlib.sha256(b"torch.int64 [3]\n" + x.numpy().tobytes()).hexdigest()


def test_rotations_differ_by_seed_and_kind():
    stage = SimpleNamespace(name="quarot")
    settings = ({"residual": "hadamard"}, {"residual": "hadamard", "seed": 1}, {"residual": "random"})
    given = [Rotation(**each) for each in (*settings, {"residual": weight()})]
    found = [rotation_fingerprint(stage, each) for each in given]
    assert [row[:3] for row in found] == [(0, "", "quarot_fingerprint")] * 4
    assert len({row[3] for row in found}) == 4
    assert rotation_fingerprint(stage, Rotation(residual=weight())) == found[3]


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "awq_scale"])
def test_every_weight_of_every_block_has_one_and_two_passes_agree(algorithm):
    model, config = tiny_model("llama")
    windows = tokens(config, batch=2, length=16)
    found = []
    for _ in range(2):
        metrics = run_pass(MemorySource(model), recipe(algorithm), windows).ledger.metrics
        found.append([row for row in metrics if row[2].endswith(SUFFIX)])
    assert found[0] == found[1]
    weights = {(block, module) for block, module, name, _ in metrics if name == "weight_error"}
    assert weights <= {(block, module) for block, module, _, _ in found[0]}
    assert len({row[:3] for row in found[0]}) == len(found[0])


def test_analysis_knows_what_they_are_called():
    assert FINGERPRINT == SUFFIX
