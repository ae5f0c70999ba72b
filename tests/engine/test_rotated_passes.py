"""Passes over a rotated model: quantization at run time, disk, stops, later stages, caches and transforms of blocks."""

import copy
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch

from qbench.calibration.statistics import AbsMax
from qbench.engine.loop import Recipe
from qbench.engine.passes import StructureCache, run_pass
from qbench.engine.resume import ResumePoint
from qbench.engine.rotated import RotatedSource, rotated
from qbench.engine.source import MemorySource, StreamSource
from qbench.evaluation.decode import decode_nll
from qbench.evaluation.perplexity import stream_nll, window_nll
from qbench.formats import Block, Int, TensorFormat, uniform
from qbench.formats.scheme import CacheFormat, InputFormat, Scheme
from qbench.models.load import meta_model
from qbench.stages.base import Kind, Need, Outcome, Stage
from qbench.stages.pipeline import Pipeline, build_pipeline
from qbench.stages.round_rtn import Rtn
from qbench.structure.blocks import find_blocks
from qbench.structure.online import HadamardTransform, attached, attached_to_attention
from tests.architectures import tiny_model, tokens
from tests.engine.caches import BY_TOKENS, cache_format
from tests.engine.helpers import comparable
from tests.engine.rotations import EVERYTHING, rotation, whole_model

BLOCKS = 3
INT4 = uniform(bits=4, group_size=8, symmetric=False)
TOKEN = InputFormat(format=TensorFormat(element=Int(5, signed=True), block=Block(1, 0)))
STATIC = InputFormat(format=TensorFormat(element=Int(6, signed=True), block=Block(0, 0)), static=True)
SCHEMES = {
    "weights": Scheme(weight=INT4),
    "inputs": Scheme(weight=INT4, input=TOKEN),
    "static inputs": Scheme(weight=INT4, input=STATIC),
    "cache": Scheme(weight=INT4, cache=cache_format("kivi", 3, 4)),
    "static cache": Scheme(weight=INT4, input=TOKEN, cache=cache_format("static_channel", 4)),
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


def _recipe(scheme, *stages):
    return Recipe(build_pipeline([{"stage": name} for name in ("quarot", *(stages or ("rtn",)))]), scheme)


def _model(name="llama", **options):
    model, config = tiny_model(name, num_hidden_layers=BLOCKS, **options)
    return model, tokens(config, batch=4, length=14, seed=1), tokens(config, batch=3, length=11, seed=2)


def _nll(source, weights, windows):
    with weights.inside(source.model) as changed:
        return window_nll(changed, windows)


@every_scheme
@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_evaluation_streams_and_the_model_with_its_weights_agree(name, scheme):
    model, calibration, windows = _model(name)
    recipe = _recipe(scheme)
    source = rotated(MemorySource(model), recipe)
    plain = window_nll(model, windows)
    result = run_pass(source, recipe, calibration, evaluations=(windows,))
    whole = _nll(source, result.weights, windows)
    assert torch.allclose(whole, stream_nll(source, result.evaluations[0], windows), rtol=1e-5)
    assert not torch.allclose(whole, plain, rtol=1e-4)
    assert torch.equal(window_nll(model, windows), plain)


@every_scheme
def test_later_stages_see_a_model_that_is_rotated_and_nothing_else(scheme):
    """The same codes as a pass over a rotated model that was put together before."""
    model, calibration, _ = _model()
    recipe = _recipe(scheme, "gptq")
    keys = scheme.cache is not None
    before = RotatedSource(MemorySource(model), rotation(**{**EVERYTHING, "keys": keys}))
    later = Recipe(Pipeline(recipe.pipeline.stages[1:]), scheme)
    expected = run_pass(MemorySource(whole_model(before)), later, calibration)
    found = run_pass(rotated(MemorySource(model), recipe), recipe, calibration)
    assert found.ledger.digests == expected.ledger.digests
    other = run_pass(rotated(MemorySource(model), Recipe(recipe.pipeline, scheme, seed=1)), recipe, calibration)
    assert other.ledger.digests != expected.ledger.digests


@pytest.mark.parametrize(
    ("name", "stages"), [("weights", ("awq_scale", "rtn")), ("inputs", ("gptq",)), ("static cache", ("gptq",))]
)
def test_memory_and_disk_give_the_same_codes_and_numbers(name, stages, tmp_path):
    model, calibration, windows = _model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    recipe = _recipe(SCHEMES[name], *stages)
    source = rotated(MemorySource(model), recipe)
    memory = run_pass(source, recipe, calibration)
    disk_source = StreamSource(tmp_path, meta_model(model.config), torch.float32, torch.device("cpu"))
    disk_source = rotated(disk_source, recipe)
    disk = run_pass(disk_source, recipe, calibration, evaluations=(windows,), keep_weights=False)
    assert disk.ledger.digests == memory.ledger.digests
    streamed = stream_nll(disk_source, disk.evaluations[0], windows)
    assert torch.allclose(streamed, _nll(source, memory.weights, windows), rtol=1e-5)


class _Stopped(Exception):
    pass


def _stopped_and_resumed(source, recipe, calibration, windows, folder, after):
    def stop(done, _):
        if done == after:
            raise _Stopped

    run = partial(run_pass, evaluations=(windows,))
    with pytest.raises(_Stopped):
        run(source(), recipe, calibration, resume=ResumePoint(folder, 0.0), progress=stop)
    return run(source(), recipe, calibration, resume=ResumePoint(folder, 0.0))


@every_scheme
def test_a_resumed_pass_ends_as_if_it_had_not_been_stopped(scheme, tmp_path):
    model, calibration, windows = _model()
    recipe = _recipe(scheme, "gptq")

    def source():
        return rotated(MemorySource(model), recipe)

    expected = run_pass(source(), recipe, calibration, evaluations=(windows,))
    found = _stopped_and_resumed(source, recipe, calibration, windows, tmp_path / "point", 2)
    assert comparable(found.ledger) == comparable(expected.ledger)
    assert torch.equal(_nll(source(), found.weights, windows), _nll(source(), expected.weights, windows))
    assert torch.equal(found.evaluations[0].chunks[0], expected.evaluations[0].chunks[0])


@dataclass(frozen=True, kw_only=True)
class _Turning(Stage):
    """Folds a transform into every down weight and leaves its inverse to run time."""

    name: ClassVar[str] = "turning"
    kind: ClassVar[Kind] = Kind.TRANSFORM
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset] = frozenset({Need(AbsMax, "full")})

    def apply(self, view):
        group = next(group for group in view.groups if "down_proj" in group.weights[0].name)
        ref, signs = group.weights[0], torch.arange(48) % 3 % 2 * 2 - 1
        transform = HadamardTransform(48, signs=signs.roll(int(view.where.split()[-1])))
        return Outcome(parameters={ref.parameter: transform(view.weight(ref))}, online={group.index: transform})


@pytest.mark.parametrize("turned", [False, True])
def test_transforms_that_stages_attach_go_with_the_weights(turned, tmp_path):
    """Into the model, out of it again, through a stop; on top of a rotation's own."""
    model, calibration, windows = _model()
    recipe = Recipe(Pipeline((_Turning(), Rtn())), Scheme(weight=INT4, input=TOKEN))

    def source():
        inner = MemorySource(model)
        return RotatedSource(inner, rotation(online_down=True)) if turned else inner

    own = source()
    expected = run_pass(own, recipe, calibration, evaluations=(windows,))
    assert expected.weights.online.keys() == set(range(BLOCKS))
    blocks = find_blocks(own.model)[1]
    before = [attached(block) for block in blocks]
    with expected.weights.inside(own.model) as changed:
        assert [attached(block) for block in blocks] == list(expected.weights.online.values())
        whole = window_nll(changed, windows)
    assert [attached(block) for block in blocks] == before
    assert torch.allclose(whole, stream_nll(own, expected.evaluations[0], windows), rtol=1e-5)
    assert not torch.allclose(whole, window_nll(model, windows), rtol=1e-4)
    found = _stopped_and_resumed(source, recipe, calibration, windows, tmp_path / "point", 2)
    assert torch.equal(_nll(source(), found.weights, windows), whole)


def test_scales_are_not_folded_through_what_is_transformed():
    """The scale that could go from down to up before a Hadamard transform stands between them."""
    model, calibration, _ = _model()
    structures = StructureCache()  # of one session, which runs both
    for stages, groups in ((("awq_scale", "rtn"), [0, 1, 2, 3]), (("quarot", "awq_scale", "rtn"), [0, 2])):
        recipe, found = Recipe(build_pipeline([{"stage": name} for name in stages]), SCHEMES["weights"]), []
        source = rotated(MemorySource(model), recipe)
        run_pass(source, recipe, calibration, structures=structures, receive=found.append)
        assert [[fold.group for fold in block.structure.folds] for block in found] == [groups] * BLOCKS


@pytest.mark.parametrize("layout", ["kivi", "token", "static_head", "static_channel"])
@pytest.mark.parametrize("name", ["llama", "opt", "qwen3", "falcon"])
def test_prefill_equals_decode_with_rotated_keys(name, layout):
    model, calibration, windows = _model(name, dtype=torch.float64)
    windows = windows.repeat(1, 2)
    format = cache_format(layout, 3, 4 if layout in BY_TOKENS else 0)
    recipe = _recipe(Scheme(weight=INT4, cache=format))
    source = rotated(MemorySource(model), recipe)
    weights = run_pass(source, recipe, calibration).weights
    prefill = _nll(source, weights, windows)
    with weights.inside(source.model, cache=False) as changed:
        decode = decode_nll(changed, windows, *weights.caches(BLOCKS))
        assert not torch.allclose(decode, window_nll(changed, windows), rtol=1e-6)
    assert torch.allclose(prefill, decode, rtol=1e-5)


def test_keys_are_rotated_where_the_cache_is_quantized_and_it_helps():
    """An outlier channel, with its partner in the rotary embedding, takes the scale and adds nothing to scores."""
    model, calibration, windows = _model(num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.k_proj.weight[[3, 19]] *= 20
            block.self_attn.q_proj.weight[[3, 19, 35, 51]] /= 20
    errors = {}
    for keys in (False, True):
        nodes = [{"stage": "quarot", "online_o": "none", "rotate_keys": keys}, {"stage": "rtn"}]
        cache = CacheFormat(key=TensorFormat(element=Int(3, signed=False), block=Block(1, 0), zero="float"), **_EXACT)
        recipe = Recipe(build_pipeline(nodes), Scheme(cache=cache))
        source = rotated(MemorySource(model), recipe)
        assert (attached_to_attention(source.block(0)) is not None) is keys
        weights = run_pass(source, recipe, calibration).weights
        errors[keys] = (_nll(source, weights, windows) - window_nll(model, windows)).square().mean()
    assert errors[True] < 0.5 * errors[False]
    without = rotated(MemorySource(model), _recipe(SCHEMES["inputs"]))
    assert attached_to_attention(without.block(0)) is None


_EXACT = {"value": TensorFormat(element=Int(8, signed=False), block=Block(1, 0), zero="float"), "layout": "token"}


def test_four_bit_inputs_with_outliers_get_better():
    """What QuaRot is for: a few channels of the stream are 30 times as large as the others."""
    model, calibration, windows = _model(hidden_size=64, intermediate_size=96)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, [5, 40]] *= 30
        for block in model.model.layers:
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight[[5, 40]] *= 2
    scheme = Scheme(input=InputFormat(format=TensorFormat(element=Int(4, signed=True), block=Block(1, 0))))
    expected, errors = window_nll(model, windows), {}
    for stages in (("rtn",), ("quarot", "rtn")):
        recipe = Recipe(build_pipeline([{"stage": name} for name in stages]), scheme)
        source = rotated(MemorySource(model), recipe)
        result = run_pass(source, recipe, calibration)
        errors[stages[0]] = (_nll(source, result.weights, windows) - expected).square().mean()
    assert errors["quarot"] < 0.5 * errors["rtn"]


def test_a_copied_source_model_is_a_model_of_its_own():
    model, calibration, windows = _model()
    recipe = _recipe(SCHEMES["inputs"])
    source = rotated(MemorySource(model), recipe)
    result = run_pass(source, recipe, calibration)
    with result.weights.inside(source.model):
        expected = window_nll(source.model, windows)
    other = copy.deepcopy(source.model)
    with result.weights.inside(other):
        assert torch.equal(window_nll(other, windows), expected)
