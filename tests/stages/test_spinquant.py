"""SpinQuant: what is differentiated is what is run, learning lowers it, and what it starts from is QuaRot."""

import copy
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from qbench.engine.loop import Recipe
from qbench.engine.passes import run_pass
from qbench.engine.rotated import RotatedSource, rotated
from qbench.engine.source import MemorySource
from qbench.engine.spinquant import RotatedNetwork, rotated_parameters
from qbench.errors import NumericsError, SpecError, StructureError
from qbench.evaluation.perplexity import stream_nll
from qbench.formats import Block, Int, TensorFormat, uniform
from qbench.formats.scheme import CacheFormat, InputFormat, Scheme
from qbench.models.load import load_model
from qbench.stages.cayley import cayley_step
from qbench.stages.pipeline import build_pipeline
from qbench.stages.rotate_spinquant import SpinQuant, learn_rotations, random_hadamard
from qbench.structure.rotation import Rotation, random_orthogonal
from tests.architectures import tiny_model, tokens
from tests.engine.helpers import tiny_asset, tiny_windows

W4 = uniform(bits=4, group_size=-1, symmetric=True)
A4 = InputFormat(format=uniform(bits=4, group_size=-1, symmetric=False, scale="float32"))
HEADS = TensorFormat(element=Int(4, signed=False), block=Block(1, 8), zero="int")
KV4 = CacheFormat(key=HEADS, value=HEADS)
F64 = torch.float64


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _matrices(width, head_dim, blocks, seed=0):
    generator = _generator(seed)
    r2 = torch.stack([random_orthogonal(head_dim, generator) for _ in range(blocks)])
    return random_orthogonal(width, generator), r2


def _network(model, scheme, windows, *, quantize_weights=True, **options):
    """The network of a model, and how its source is rotated."""
    stage, source = SpinQuant(**options), MemorySource(model)
    width, cache = model.get_input_embeddings().weight.shape[1], scheme.cache is not None
    plain = RotatedSource(source, stage.before(0, width, cache=cache))
    return RotatedNetwork(plain, plain.sites, scheme, windows, quantize_weights), source


# ------------------------------------------------------------------ learning


def _alignment(r1, r2, sequences, seen=None):
    """Smallest, and 0, where r1 and all of r2 turn one set of points into the others; sequences choose points."""
    generator = _generator(3)
    points = torch.randn(4, 20, 6, generator=generator)
    goal, goals = random_orthogonal(6, generator).float(), [random_orthogonal(6, generator).float() for _ in range(2)]
    if seen is not None:
        seen += sequences
    errors = [(points[s] @ (r1 - goal)).square().mean() for s in sequences]
    errors += [(points[s] @ (r - g)).square().mean() for r, g in zip(r2, goals) for s in sequences]
    return torch.stack(errors).mean()


def _start(near=0.3):
    """Rotations in reach of the goals: their determinants cannot change on the way."""
    generator = _generator(3)
    torch.randn(4, 20, 6, generator=generator)
    goals = [random_orthogonal(6, generator) for _ in range(3)]
    turns = [near * torch.randn(6, 6, generator=generator, dtype=F64) for _ in goals]
    found = [goal @ torch.matrix_exp(turn - turn.T) for goal, turn in zip(goals, turns)]
    return found[0], torch.stack(found[1:])


def _learn(lr=1.5, momentum=0.0, steps=150, batch_size=2, seed=0, **kwargs):
    r1, r2 = _start()
    return learn_rotations(
        kwargs.pop("loss", _alignment),
        r1,
        r2,
        4,
        lr=lr,
        momentum=momentum,
        steps=steps,
        batch_size=batch_size,
        generator=_generator(seed),
        **kwargs,
    )


def _off(x):
    return (x @ x.mT - torch.eye(x.shape[-1], dtype=x.dtype)).abs().max().item()


def test_learning_lowers_the_loss_and_ends_with_orthogonal_rotations():
    learned = _learn()
    assert len(learned.losses) == 150
    assert learned.losses[-1] < 0.02 * learned.losses[0]
    assert learned.r1.dtype == learned.r2.dtype == F64
    assert _off(learned.r1) < 1e-12
    assert _off(learned.r2) < 1e-12


def test_every_trip_takes_every_sequence_once_and_steps_are_reported():
    seen, steps = [], []
    _learn(
        steps=6, batch_size=3, loss=lambda *args: _alignment(*args, seen=seen), report=lambda *args: steps.append(args)
    )
    assert len(seen) == 18
    assert all(sorted(seen[k : k + 4]) == [0, 1, 2, 3] for k in range(0, 16, 4))
    assert steps == [(k, 6) for k in range(1, 7)]
    seen.clear()
    _learn(steps=2, batch_size=9, loss=lambda *args: _alignment(*args, seen=seen))
    assert len(seen) == 8


def test_it_is_deterministic_by_seed_and_every_number_counts():
    plain = _learn(steps=5).r1
    assert torch.equal(plain, _learn(steps=5).r1)
    for other in ({"seed": 1}, {"lr": 0.3}, {"momentum": 0.9}, {"batch_size": 1}, {"steps": 6}):
        assert not torch.allclose(plain, _learn(**{"steps": 5, **other}).r1, atol=1e-5)


def test_the_rate_falls_along_half_a_cosine():
    """Under a gradient that hardly changes, steps are as long as their rates."""
    seen, slope = [], torch.randn(6, 6, generator=_generator())

    def loss(r1, r2, sequences):
        seen.append(r1.detach().clone())
        return (r1 * slope).sum() + 0 * r2.sum()

    _learn(lr=1e-3, steps=8, loss=loss)
    moves = [(after - before).norm().item() for before, after in itertools.pairwise(seen)]
    rates = [math.cos(math.pi * step / 8) + 1 for step in range(7)]
    assert [move / moves[0] for move in moves] == pytest.approx([rate / rates[0] for rate in rates], rel=0.05)


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"steps": 0}])
def test_without_a_rate_or_steps_the_start_is_the_result(options):
    learned, (r1, r2) = _learn(**options), _start()
    assert torch.equal(learned.r1, r1)
    assert torch.equal(learned.r2, r2)
    assert learned.losses == ()


def test_a_loss_or_gradient_that_is_not_finite_is_an_error_with_its_step():
    def loss(r1, r2, sequences):
        return r1.sum() * (math.nan if calls.append(1) or len(calls) == 3 else 1) + r2.sum()

    calls = []
    with pytest.raises(NumericsError, match=r"the loss \(nan\) or its gradient is not finite at step 2"):
        _learn(loss=loss)
    with pytest.raises(NumericsError, match="gradient is not finite at step 0"):
        _learn(loss=lambda r1, r2, sequences: (r1 - r1).abs().sqrt().sum() + r2.sum())


def test_random_hadamard_matrices_differ_in_signs_only():
    found = random_hadamard(12, _generator())
    assert _off(found) < 1e-12
    assert torch.allclose(found.abs(), torch.full((12, 12), 12**-0.5, dtype=F64))
    assert not torch.equal(found, random_hadamard(12, _generator(1)))


# ------------------------------------------------------------------ the network


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3", "opt", "gpt2", "starcoder2", "falcon", "mixtral"])
def test_differentiable_weights_are_the_rotated_models(name):
    """Against folding in float64, which knows nothing of the two steps that this takes: fuse norms, then rotate."""
    model, _ = tiny_model(name, dtype=F64)
    network, source = _network(model, Scheme(), torch.zeros(1, 2, dtype=torch.long))
    r1, r2 = _matrices(network.width, network.head_dim, source.count)
    rotation = SpinQuant().rotation(0, cache=False)
    matrices = {"residual": r1, "value_matrices": dict(enumerate(r2))}
    expected = RotatedSource(source, Rotation(**{**rotation.__dict__, **matrices}))
    plain = RotatedSource(source, SpinQuant().before(0, network.width, cache=False))
    for index in range(source.count):
        block = plain.block(index)
        before = {path: parameter.clone() for path, parameter in block.named_parameters()}
        found = before | rotated_parameters(block, plain.sites[index], r1, r2[index], {})
        for path, parameter in expected.block(index).named_parameters():
            assert torch.allclose(found[path], parameter, atol=1e-10), path
            assert torch.equal(before[path], block.get_parameter(path))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "opt", "phi3", "mixtral"])
@pytest.mark.parametrize("online", [True, False])
def test_in_full_precision_the_loss_is_the_models_whatever_the_rotation(name, online):
    model, config = tiny_model(name)
    windows = tokens(config, batch=3, length=10)
    network, source = _network(model, Scheme(), windows, online_down=online)
    r1, r2 = _matrices(network.width, network.head_dim, source.count)
    for chosen in ([0, 1, 2], [2]):
        logits = model(windows[chosen]).logits
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[chosen][:, 1:].flatten())
        assert network.loss(r1.float(), r2.float(), chosen).item() == pytest.approx(expected.item(), rel=1e-4)


def test_in_full_precision_there_is_nothing_to_learn():
    """The loss does not depend on the rotations, so its gradient has no part along which they could move."""
    model, config = tiny_model("llama", dtype=F64)
    network, source = _network(model, Scheme(), tokens(config, batch=2, length=10))
    r1, r2 = (r.requires_grad_() for r in _matrices(network.width, network.head_dim, source.count))
    network.loss(r1, r2, [0, 1]).backward()
    for r in (r1, r2):
        _, velocity = cayley_step(r.detach(), -r.grad.mT, 1.0)
        assert velocity.abs().max() < 1e-6 * r.grad.abs().max()
        assert r.grad.abs().max() > 1e-3


SCHEMES = {
    "weights": Scheme(weight=W4),
    "inputs": Scheme(weight=uniform(bits=8, group_size=8, symmetric=False), input=A4),
    "cache": Scheme(weight=W4, cache=KV4),
    "all": Scheme(weight=W4, input=A4, cache=KV4),
}


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_the_loss_is_what_the_quantized_model_has(scheme):
    """The same rotation carried out by folding, rounded and run by the engine, gives the same perplexity."""
    model, config = tiny_model("llama")
    windows = tokens(config, batch=3, length=10)
    network, source = _network(model, scheme, windows)
    r1, r2 = _matrices(network.width, network.head_dim, source.count)
    start = SpinQuant().rotation(0, cache=scheme.cache is not None)
    final = RotatedSource(source, Rotation(**{**start.__dict__, "residual": r1, "value_matrices": dict(enumerate(r2))}))
    recipe = Recipe(build_pipeline([{"stage": "rtn"}]), scheme)
    result = run_pass(final, recipe, None, evaluations=(windows,))
    nll = stream_nll(final, result.evaluations[0], windows, lambda done, total: None, None)
    changes = []
    for window in range(3):
        found = network.loss(r1.float(), r2.float(), [window]).item()
        assert found == pytest.approx(nll[window].mean().item(), rel=1e-4)
        logits = model(windows[[window]]).logits
        changes.append(abs(found - F.cross_entropy(logits[0, :-1], windows[window, 1:]).item()))
    assert max(changes) > 1e-2  # it is not the unquantized model's


def test_the_gradient_reaches_every_block_and_nothing_else():
    model, config = tiny_model("llama")
    network, source = _network(model, SCHEMES["all"], tokens(config, batch=2, length=10))
    r1, r2 = (r.float().requires_grad_() for r in _matrices(network.width, network.head_dim, source.count))
    network.loss(r1, r2, [0, 1]).backward()
    assert r1.grad.abs().max() > 0
    assert (r2.grad.abs().amax(dim=(1, 2)) > 0).all()
    assert all(parameter.grad is None for block in network._blocks for parameter in block.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


@torch.no_grad()
def test_bfloat16_blocks_keep_their_type():
    model, config = tiny_model("opt", dtype=torch.bfloat16)
    network, source = _network(model, SCHEMES["all"], tokens(config, batch=2, length=10))
    r1, r2 = _matrices(network.width, network.head_dim, source.count)
    found = rotated_parameters(network._blocks[0], network._sites[0], r1.float(), r2[0].float(), {})
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert torch.isfinite(network.loss(r1.float(), r2.float(), [0, 1]))


# ------------------------------------------------------------------ the stage


def _recipe(scheme, *, seed=0, rounding="rtn", **options):
    pipeline = build_pipeline([{"stage": "spinquant", **options}, {"stage": rounding}])
    pipeline.check(scheme.weights, scheme)
    return Recipe(pipeline, scheme, seed)


def _rotation_of(source):
    return source._rotation


def _on_tiny(scheme, windows, **options):
    model = load_model(tiny_asset(), dtype=torch.float32, device=torch.device("cpu"))
    return rotated(MemorySource(model), _recipe(scheme, **options), windows)


def test_a_trained_model_loses_less_under_learned_rotations_than_under_those_they_start_from():
    windows = tiny_windows(12, 32)
    scheme = Scheme(weight=W4, input=InputFormat(format=uniform(bits=3, group_size=-1, symmetric=False)))
    source = _on_tiny(scheme, windows, steps=15, batch_size=12)
    losses = [value for *_, name, value in source.metrics if name.startswith("spinquant_loss")]
    assert len(losses) == 15
    assert min(losses[-3:]) < losses[0] - 0.02
    assert any(name == "spinquant_s" for *_, name, _ in source.metrics)
    learned = _rotation_of(source)
    assert _off(learned.residual) < 1e-12
    assert learned.value_matrices.keys() == set(range(source.count))
    errors = [value for *_, name, value in source.metrics if name == "rotation_error"]
    assert max(errors) < 1e-6


def test_without_steps_it_is_quarot_with_other_signs():
    model, config = tiny_model("llama")
    windows, scheme = tokens(config, batch=2, length=8), SCHEMES["all"]
    before = copy.deepcopy(dict(model.named_parameters()))
    source = rotated(MemorySource(model), _recipe(scheme, steps=0, values=False), windows)
    quarot = build_pipeline([{"stage": "quarot", "online_o": "none", "values": False}, {"stage": "rtn"}])
    expected = rotated(MemorySource(model), Recipe(quarot, scheme, 0))
    for index in range(source.count):
        for path, parameter in expected.block(index).named_parameters():
            assert torch.equal(source.block(index).get_parameter(path), parameter)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    signed = _rotation_of(rotated(MemorySource(model), _recipe(scheme, steps=0), windows)).value_matrices
    assert torch.allclose(signed[0].abs(), torch.full((8, 8), 8**-0.5, dtype=F64))
    assert not torch.equal(signed[0], signed[1])


def test_every_option_changes_the_rotation_and_the_seed_does():
    model, config = tiny_model("llama")
    windows, scheme = tokens(config, batch=3, length=8), SCHEMES["all"]

    def first(seed=0, **options):
        recipe = _recipe(scheme, seed=seed, **{"steps": 2, **options})
        source = rotated(MemorySource(model), recipe, windows)
        block = source.block(0)
        values = [parameter.flatten() for _, parameter in sorted(block.named_parameters())]
        return torch.cat([*values, torch.tensor([float(_rotation_of(source).keys)])])

    plain = first()
    assert torch.equal(plain, first())
    changes = [
        {"seed": 1},
        {"rotate_mode": "random"},
        {"values": False},
        {"online_down": False},
        {"rotate_keys": False},
    ]
    changes += [{"quantize_weights": False}, {"lr": 0.5}, {"momentum": 0.5}, {"steps": 3}, {"batch_size": 2}]
    for options in changes:
        assert not torch.allclose(plain, first(**options), atol=1e-6), options


def test_whether_it_needs_transforms_at_run_time_is_known_beforehand():
    model, config = tiny_model("llama")
    windows = tokens(config, batch=2, length=8)
    for online in (True, False):
        recipe = _recipe(SCHEMES["weights"], steps=1, online_down=online)
        assert recipe.pipeline.online == online
        assert rotated(MemorySource(model), recipe, windows).loadable != online
    assert SpinQuant().needs_data


def test_gptq_follows_with_weights_as_they_are_in_the_loss():
    model, config = tiny_model("llama")
    windows = tokens(config, batch=4, length=8)
    recipe = _recipe(Scheme(weight=W4, input=A4), rounding="gptq", steps=2, quantize_weights=False)
    source = rotated(MemorySource(model), recipe, windows)
    result = run_pass(source, recipe, windows)
    assert result.ledger.weight_count > 0


# ------------------------------------------------------------------ refusals


def test_what_cannot_be_learned_is_refused_beforehand():
    static = CacheFormat(key=HEADS, value=HEADS, static=True)
    for scheme, options, match in [
        (Scheme(weight=W4), {"quantize_weights": False}, "quantized inputs or cache, or algo.quantize_weights=true"),
        (Scheme(weight=W4, cache=static), {}, "kv.mode"),
        (Scheme(weight=W4), {"rotate_keys": False}, "a quantized cache"),
        (Scheme(weight=W4), {"lr": -1.0}, "algo.lr"),
        (Scheme(weight=W4), {"lr": math.inf}, "algo.lr"),
        (Scheme(weight=W4), {"momentum": 1.0}, "algo.momentum"),
        (Scheme(weight=W4), {"steps": -1}, "algo.steps"),
        (Scheme(weight=W4), {"batch_size": 0}, "algo.batch_size"),
    ]:
        with pytest.raises(SpecError, match=match):
            _recipe(scheme, **options)


def test_models_that_cannot_be_rotated_or_are_not_in_memory_are_refused():
    model, config = tiny_model("bloom")
    with pytest.raises(StructureError):
        rotated(MemorySource(model), _recipe(SCHEMES["weights"]), tokens(config))
    source = MemorySource(tiny_model("llama")[0])
    source.resident = False
    with pytest.raises(SpecError, match=r"source=stream: memory with spinquant, which learns on the whole model"):
        rotated(source, _recipe(SCHEMES["weights"]), tokens(config))
