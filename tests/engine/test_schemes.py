"""A pass under a scheme: overrides, the head, inputs and cache, from memory or disk, stopped and resumed."""

import copy
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qbench.engine import resume as resume_module
from qbench.engine.fingerprints import identity_of
from qbench.engine.loop import Recipe
from qbench.engine.passes import run_pass
from qbench.engine.resume import ResumePoint
from qbench.engine.sinks import Ledger, Weights
from qbench.engine.source import MemorySource, StreamSource
from qbench.evaluation.decode import decode_nll
from qbench.evaluation.perplexity import stream_nll, window_nll
from qbench.formats import Block, Float, Int, TensorFormat, fake_quantize, quantize, uniform
from qbench.formats.named import COMPOSITE, activation_format
from qbench.formats.scale import SCALES
from qbench.formats.scheme import CacheFormat, InputFormat, Override, Scheme
from qbench.models.load import meta_model
from qbench.stages.pipeline import Pipeline, build_pipeline
from qbench.stages.round_rtn import Rtn
from qbench.structure.blocks import find_blocks
from tests.architectures import tiny_model, tokens

BLOCKS = 4
INT4 = uniform(bits=4, group_size=8, symmetric=False)
TOKEN = InputFormat(format=TensorFormat(element=Int(6, signed=True), block=Block(1, 0), scale=SCALES["float32"]))
STATIC = InputFormat(format=replace(TOKEN.format, block=Block(0, 0)), static=True)
KIVI = CacheFormat(
    key=TensorFormat(element=Int(2, signed=False), block=Block(2, 1), zero="float"),
    value=TensorFormat(element=Int(2, signed=False), block=Block(1, 4), zero="float"),
    residual=4,
    layout="kivi",
)
STATIC_KV = CacheFormat(
    key=TensorFormat(element=Int(4, signed=False), block=Block(0, 1), zero="int"),
    value=TensorFormat(element=Int(4, signed=False), block=Block(0, 0), zero="int"),
    static=True,
    layout="channel",
)
HEAD = Override(modules="lm_head", roles=("weight",), weight=uniform(bits=3, group_size=8, symmetric=False))
SCHEMES = {
    "inputs": Scheme(weight=INT4, input=TOKEN),
    "static inputs": Scheme(weight=INT4, input=STATIC),
    "cache": Scheme(cache=KIVI),
    "static cache": Scheme(weight=INT4, cache=STATIC_KV),
    "nvfp4": Scheme(weight=COMPOSITE["nvfp4"], input=InputFormat(format=activation_format("nvfp4"))),
    "everything": Scheme(
        weight=INT4,
        input=STATIC,
        cache=KIVI,
        overrides=(
            Override(modules="down_proj", roles=("weight", "input"), weight=COMPOSITE["mxfp8"], input=TOKEN),
            Override(blocks=(-1,), roles=("cache",), cache=STATIC_KV),
            Override(blocks=(0,), roles=("weight", "input")),
            HEAD,
        ),
    ),
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


def _recipe(scheme, *stages):
    return Recipe(build_pipeline([{"stage": name} for name in stages or ("rtn",)]), scheme)


def _model(**options):
    model, config = tiny_model("llama", num_hidden_layers=BLOCKS, **options)
    return model, tokens(config, batch=5, length=14, seed=1), tokens(config, batch=3, length=11, seed=2)


def _nll(model, weights, windows):
    with weights.inside(model) as changed:
        return window_nll(changed, windows)


@every_scheme
def test_evaluation_streams_and_the_model_with_its_weights_agree(scheme):
    """The same window behind the blocks of the pass and through the model as a whole."""
    model, calibration, windows = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    source = MemorySource(model)
    plain = window_nll(model, windows)
    result = run_pass(source, _recipe(scheme), calibration, evaluations=(windows,))
    whole = _nll(model, result.weights, windows)
    streamed = stream_nll(source, result.evaluations[0], windows, head=result.weights.head)
    assert torch.allclose(whole, streamed, rtol=1e-6)
    assert not torch.allclose(whole, plain, rtol=1e-4)
    assert torch.equal(window_nll(model, windows), plain)  # everything is undone
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@every_scheme
@pytest.mark.parametrize("tied", [False, True])
def test_memory_and_disk_give_the_same_codes_and_numbers(scheme, tied, tmp_path):
    model, calibration, windows = _model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    memory = run_pass(MemorySource(model), _recipe(scheme, "gptq") if scheme.weight else _recipe(scheme), calibration)
    disk_source = StreamSource(tmp_path, meta_model(model.config), torch.float32, torch.device("cpu"))
    disk = run_pass(
        disk_source,
        _recipe(scheme, "gptq") if scheme.weight else _recipe(scheme),
        calibration,
        evaluations=(windows,),
        keep_weights=False,
    )
    assert disk.ledger.digests == memory.ledger.digests
    assert disk.ledger.head_bits == memory.ledger.head_bits
    streamed = stream_nll(disk_source, disk.evaluations[0], windows, head=disk.weights.head)
    assert torch.allclose(streamed, _nll(model, memory.weights, windows), rtol=1e-6)


@pytest.mark.parametrize("name", ["cache", "static cache", "everything"])
def test_token_by_token_is_what_one_forward_gives(name):
    """Through the caches that the pass asks for, static scales included, with everything else in place."""
    model, calibration, windows = _model()
    weights = run_pass(MemorySource(model), _recipe(SCHEMES[name]), calibration).weights
    formats, params = weights.caches(BLOCKS)
    assert formats == [SCHEMES[name].of_cache(index, BLOCKS) for index in range(BLOCKS)]
    assert [found is not None for found in params] == [fmt is not None and fmt.static for fmt in formats]
    with weights.inside(model, cache=False) as changed:
        assert not torch.allclose(window_nll(changed, windows), decode_nll(changed, windows, formats, params))
        decoded = decode_nll(changed, windows, formats, params)
    assert torch.allclose(decoded, _nll(model, weights, windows), rtol=1e-3)


def test_what_runs_keeps_no_codes():
    """They would double what a model in memory takes."""
    model, calibration, _ = _model()
    result = run_pass(MemorySource(model), _recipe(SCHEMES["inputs"]), calibration)
    assert len(result.weights.running) == BLOCKS
    assert not any(finished.codes or finished.metrics for finished in result.weights.running.values())


class _Stopped(Exception):
    pass


@every_scheme
@pytest.mark.parametrize("after", [1, 3])
def test_a_resumed_pass_ends_as_if_it_had_not_been_stopped(scheme, after, tmp_path):
    model, calibration, windows = _model()
    expected = run_pass(MemorySource(model), _recipe(scheme), calibration, evaluations=(windows,))

    def stop(done, _):
        if done == after:
            raise _Stopped

    run = partial(run_pass, MemorySource(model), _recipe(scheme), calibration, evaluations=(windows,))
    with pytest.raises(_Stopped):
        run(resume=ResumePoint(tmp_path / "point", 0.0), progress=stop)
    found = run(resume=ResumePoint(tmp_path / "point", 0.0))
    assert found.ledger.digests == expected.ledger.digests
    assert torch.equal(_nll(model, found.weights, windows), _nll(model, expected.weights, windows))
    for one, other in zip(found.evaluations[0].chunks, expected.evaluations[0].chunks, strict=True):
        assert torch.equal(one, other)
    for index, finished in expected.weights.running.items():  # what error messages say
        again = found.weights.running[index].inputs
        assert {name: q.where for name, q in again.items()} == {name: q.where for name, q in finished.inputs.items()}


def test_points_are_an_interval_apart(monkeypatch, tmp_path):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(resume_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    point, written = ResumePoint(tmp_path, 10.0), []
    for done, clock.now in enumerate((5.0, 11.0, 12.0, 20.0, 21.0, 40.0), start=1):
        point.save(done, [], Ledger(), Weights(""))
        if (tmp_path / "point.pt").exists():
            written.append(torch.load(tmp_path / "point.pt")["done"])
    assert written == [2, 2, 2, 5, 6]


def test_an_identity_tells_apart_what_has_the_same_values():
    values = torch.arange(12)
    parts = [values, values.view(3, 4), values.view(4, 3), values.view(torch.int32), "a", ("a",)]
    assert len({identity_of(part) for part in parts}) == len(parts)
    assert identity_of(values.view(3, 4)) == identity_of(values.view(3, 4).clone())


def test_inputs_are_quantized_in_front_of_every_linear_layer_and_nowhere_else():
    """Against hooks on the modules of a copy that holds the decoded weights."""
    model, calibration, windows = _model()
    result = run_pass(MemorySource(model), _recipe(SCHEMES["inputs"], "gptq"), calibration)
    naive = copy.deepcopy(model)
    for name, value in result.weights.tensors.items():
        naive.get_parameter(name).data = value
    for module in find_blocks(naive)[1].modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args: (fake_quantize(args[0].flatten(0, -2), TOKEN.format).view(args[0].shape),)
            )
    assert torch.allclose(_nll(model, result.weights, windows), window_nll(naive, windows), rtol=1e-6)


def test_inputs_are_quantized_whatever_the_weights_are():
    """W16A6 is a wish of its own: only an override that takes the input's format away does so."""
    model, calibration, windows = _model()
    kept = Override(modules="down_proj", roles=("weight",))
    both = Override(modules="down_proj", roles=("weight", "input"))
    for override, quantized in ((kept, True), (both, False)):
        scheme = replace(SCHEMES["inputs"], overrides=(override,))
        result = run_pass(MemorySource(model), _recipe(scheme), calibration)
        names = {name for finished in result.weights.running.values() for name in finished.inputs}
        assert any("down_proj" in name for name in names) is quantized
        assert any("up_proj" in name for name in names)
    only = run_pass(MemorySource(model), _recipe(Scheme(input=TOKEN)), calibration)
    assert only.ledger.digests == []
    assert not torch.allclose(_nll(model, only.weights, windows), window_nll(model, windows), rtol=1e-4)


@dataclass(frozen=True, kw_only=True)
class _Drawing(Rtn):
    """Rounds to nearest and keeps the first number that each block's generator draws."""

    drawn: list

    def apply(self, view):
        self.drawn.append((view.where, torch.rand(1, generator=view.generator).item()))
        return super().apply(view)


def test_every_block_and_seed_draws_numbers_of_its_own_and_the_same_ones_again():
    model, _, _ = _model()
    first = {}
    for seed in (0, 1, 0):
        drawn = []
        run_pass(MemorySource(model), Recipe(Pipeline((_Drawing(drawn=drawn),)), Scheme(weight=INT4), seed), None)
        assert first.setdefault(seed, drawn) == drawn
    numbers = [number for drawn in first.values() for _, number in drawn]
    assert {where for where, _ in first[0]} == {f"block {index}" for index in range(BLOCKS)}
    assert len(set(numbers)) == len(numbers)


def test_gptq_sees_the_stream_behind_quantized_inputs():
    """The inputs of the second block are the first block's outputs with its inputs quantized."""
    model, calibration, _ = _model()
    plain = run_pass(MemorySource(model), _recipe(Scheme(weight=INT4), "gptq"), calibration)
    behind = run_pass(MemorySource(model), _recipe(SCHEMES["inputs"], "gptq"), calibration)
    first = [name for name in plain.weights.tensors if ".0.self_attn.q_proj." in name]
    assert torch.equal(plain.weights.tensors[first[0]], behind.weights.tensors[first[0]])
    later = first[0].replace(".0.self_attn.q_proj.", ".1.self_attn.q_proj.")
    assert not torch.equal(plain.weights.tensors[later], behind.weights.tensors[later])


def test_overrides_choose_weights_and_bits_are_counted_by_hand():
    model, calibration, _ = _model()
    int8 = uniform(bits=8, group_size=-1, symmetric=True)
    scheme = Scheme(
        weight=INT4,
        overrides=(
            Override(modules="down_proj", roles=("weight",), weight=int8),
            Override(blocks=(0, -1), roles=("weight", "input")),
        ),
    )
    result = run_pass(MemorySource(model), _recipe(scheme, "gptq"), calibration)
    bits = 0
    for index, block in enumerate(find_blocks(model)[1]):
        for name, parameter in block.named_parameters():
            if parameter.ndim != 2:
                continue
            own = result.weights.tensors[f"model.layers.{index}.{name}"]
            rows, columns = parameter.shape
            if index in (0, BLOCKS - 1):
                assert torch.equal(own, parameter)
                bits += 32 * parameter.numel()
            elif "down_proj" in name:
                bits += 8 * parameter.numel() + rows * 16
                assert (own - parameter).abs().max() < 0.02 * parameter.abs().max()
            else:
                bits += 4 * parameter.numel() + rows * columns // 8 * (16 + 4)
                assert not torch.equal(own, parameter)
    assert result.ledger.weight_bits == bits
    assert result.ledger.head_bits is None


@pytest.mark.parametrize("stages", [("rtn",), ("gptq",), ("awq_scale", "awq_clip", "rtn")])
@pytest.mark.parametrize("modules", ["experts.gate_up_proj", "q_proj", "self_attn.*"])
def test_experts_and_parts_of_groups_can_stay_in_full_precision(stages, modules):
    """A pattern names a parameter; all its experts follow, and folds go on with what is left of a group."""
    model, config = tiny_model("mixtral")
    calibration = tokens(config, batch=8, length=14, seed=1)
    skip = Override(modules=modules, roles=("weight", "input"))
    result = run_pass(MemorySource(model), _recipe(Scheme(weight=INT4, overrides=(skip,)), *stages), calibration)
    full = run_pass(MemorySource(model), _recipe(Scheme(weight=INT4), *stages), calibration)
    names = {digest.split()[1].partition("[")[0] for digest in result.ledger.digests}
    expected = {digest.split()[1].partition("[")[0] for digest in full.ledger.digests}
    skipped = {name for name in expected if skip.matches(name, 0, 2)}
    assert skipped
    assert names == expected - skipped
    assert result.ledger.weight_count == full.ledger.weight_count
    assert result.ledger.weight_bits > full.ledger.weight_bits


def test_awq_leaves_what_an_override_skips_and_the_function_alone():
    """Folds change norms and skipped weights together: with everything skipped, the model computes what it did."""
    model, calibration, windows = _model()
    skip = Override(modules="mlp.*", roles=("weight", "input"))
    part = run_pass(
        MemorySource(model), _recipe(Scheme(weight=INT4, overrides=(skip,)), "awq_scale", "rtn"), calibration
    )
    names = {name for name in part.ledger.digests if "mlp" in name}
    assert not names
    fine = uniform(bits=8, group_size=8, symmetric=False)
    nearly = Scheme(weight=fine, overrides=(skip,))
    close = run_pass(MemorySource(model), _recipe(nearly, "awq_scale", "rtn"), calibration)
    assert torch.allclose(_nll(model, close.weights, windows), window_nll(model, windows), rtol=2e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_head_leaves_the_embedding_alone(tied):
    model, calibration, windows = _model(tie_word_embeddings=tied)
    result = run_pass(MemorySource(model), _recipe(Scheme(weight=INT4, overrides=(HEAD,))), calibration)
    head = model.get_output_embeddings().weight
    rounded = quantize(head.detach(), HEAD.weight)
    assert torch.equal(result.weights.head, rounded.dequantize())
    assert result.ledger.head_bits == rounded.storage_bits()
    with result.weights.inside(model) as changed:
        assert torch.equal(changed.get_output_embeddings().weight, rounded.dequantize())
        assert torch.equal(
            changed.get_input_embeddings().weight, head if tied else changed.get_input_embeddings().weight
        )
        assert changed.config.tie_word_embeddings is False
    assert model.config.tie_word_embeddings == tied
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    without = run_pass(MemorySource(model), _recipe(Scheme(weight=INT4)), calibration)
    assert without.ledger.codes_sha256 != result.ledger.codes_sha256
    assert not torch.equal(_nll(model, without.weights, windows), _nll(model, result.weights, windows))


def test_a_quantized_head_has_the_model_s_dtype():
    model, config = tiny_model("llama", dtype=torch.bfloat16, tie_word_embeddings=False)
    calibration = tokens(config, batch=2, length=8)
    result = run_pass(MemorySource(model), _recipe(Scheme(weight=INT4, overrides=(HEAD,))), calibration)
    with result.weights.inside(model) as changed:
        assert changed.get_output_embeddings().weight.dtype == torch.bfloat16
        assert torch.isfinite(window_nll(changed, calibration)).all()


def test_static_ranges_are_those_of_transformed_blocks_behind_quantized_ones():
    """Queries read what AWQ's scales left of the norm's output, in a stream through the blocks before as they run."""
    model, calibration, _ = _model()
    with torch.no_grad():
        find_blocks(model)[1][0].input_layernorm.weight[3] *= 8  # something to scale
    first = set()
    for stages in (("rtn",), ("awq_scale", "rtn")):
        weights = run_pass(MemorySource(model), _recipe(SCHEMES["static inputs"], *stages), calibration).weights
        largest = {}
        with weights.inside(model) as changed, torch.no_grad():
            norms = {index: block.input_layernorm for index, block in enumerate(find_blocks(changed)[1])}
            hooks = [
                norm.register_forward_hook(
                    lambda *args, index=index, largest=largest: largest.update({index: args[-1].abs().max().item()})
                )
                for index, norm in norms.items()
            ]
            changed(calibration)
            for hook in hooks:
                hook.remove()
        for index, finished in weights.running.items():
            (scale,) = (q.params.scale.item() for name, q in finished.inputs.items() if "q_proj" in name)
            assert scale == pytest.approx(largest[index] / 31.5, rel=1e-5)
        first.add(weights.running[0].inputs["self_attn.q_proj.weight"].params.scale.item())
    assert len(first) == 2


def test_static_ranges_come_from_the_calibration_text_and_not_from_what_is_evaluated():
    model, calibration, windows = _model()
    scheme = SCHEMES["static inputs"]
    result = run_pass(MemorySource(model), _recipe(scheme), calibration)
    both = _nll(model, result.weights, windows)
    alone = torch.cat([_nll(model, result.weights, window[None]) for window in windows])
    assert torch.allclose(both, alone, rtol=1e-6)
    other = run_pass(MemorySource(model), _recipe(scheme), calibration[:1, :4])
    assert not torch.allclose(_nll(model, other.weights, windows), both, rtol=1e-4)


def test_sixteen_bits_of_everything_change_nothing_that_matters():
    model, calibration, windows = _model()
    fine = TensorFormat(element=Float(5, 10), block=Block(1, 0), scale=SCALES["float32"])
    cache = CacheFormat(key=fine, value=fine, residual=3)
    scheme = Scheme(weight=fine, input=InputFormat(format=fine), cache=cache)
    result = run_pass(MemorySource(model), _recipe(scheme), calibration)
    assert torch.allclose(_nll(model, result.weights, windows), window_nll(model, windows), rtol=1e-4)


def test_nothing_runs_where_there_is_nothing_to_quantize():
    model, _, windows = _model()
    result = run_pass(MemorySource(model), None, None)
    assert result.weights.tensors == {}
    assert torch.equal(_nll(model, Weights("model.layers"), windows), window_nll(model, windows))
