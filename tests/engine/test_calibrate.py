"""Static ranges and shared scales are those of the calibration text, whoever reads the input and however chunked."""

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from qbench.calibration.ranges import RANGES
from qbench.engine.kv import CacheQuantizer, CacheRanges
from qbench.engine.runtime import Runtime, calibrate
from qbench.engine.streams import Stream
from qbench.errors import NumericsError
from qbench.formats import Range, fit
from qbench.formats.named import COMPOSITE
from qbench.formats.scheme import InputFormat
from qbench.structure.online import MatrixTransform, attach
from qbench.structure.trace import LinearTap
from tests.architectures import ARCHITECTURES
from tests.engine.runtime_cases import INT8, KV4, KV_STATIC, TENSOR, Case

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def _static(fmt, calibration="minmax"):
    return InputFormat(format=fmt, static=True, calibration=calibration)


def _inputs(case, stream):
    """Inputs [tokens, in] by weight name, of every chunk."""
    seen = {name: [] for name in case.refs}
    for chunk in stream.chunks:

        def keep(group, x):
            for ref in group.weights:
                seen[ref.name].append(x.reshape(-1, x.shape[-1]).clone())

        with torch.no_grad(), LinearTap(case.block, case.structure, keep):
            stream.call(0, chunk)(case.block, chunk)
    return {name: torch.cat(parts) for name, parts in seen.items() if parts}


@every_architecture
def test_static_ranges_are_those_of_all_tokens(name):
    case = Case(name)
    stream = case.stream(2, 3, 1)
    chunks = [chunk.clone() for chunk in stream.chunks]
    formats = {weight: _static(TENSOR if k % 2 else INT8) for k, weight in enumerate(case.refs)}
    inputs, cache = calibrate(case.block, 0, case.structure, stream, formats, None)
    assert cache is None
    assert inputs.keys() == case.refs.keys()
    assert all(map(torch.equal, stream.chunks, chunks)), "the stream has moved"
    for weight, x in _inputs(case, stream).items():
        clip = Range(x.min().clamp_max(0).view(1, 1), x.max().clamp_min(0).view(1, 1))
        expected = fit(x, formats[weight].format, clip)
        assert torch.equal(inputs[weight].params.scale, expected.scale)
        assert (inputs[weight].params.zero is None) == (expected.zero is None)
        assert expected.zero is None or torch.equal(inputs[weight].params.zero, expected.zero)
    case.run(Runtime(case.block, case.structure, inputs))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("calibration", RANGES)
def test_calibration_does_not_depend_on_chunks(name, calibration):
    """gpt2 flattens its tokens, so sequences have to be told apart."""
    case = Case(name)
    stream = case.stream(6)
    batches = (2, 1, 3)
    parts = Stream(list(stream.chunks[0].split(batches)), case.stream(*batches).calls)
    formats = dict.fromkeys(case.refs, _static(TENSOR, calibration))
    whole, split = (calibrate(case.block, 0, case.structure, some, formats, None)[0] for some in (stream, parts))
    for weight in case.refs:
        # Matmuls of other shapes may round differently in the last bit.
        assert torch.allclose(whole[weight].params.scale, split[weight].params.scale, rtol=1e-3)
        assert torch.equal(whole[weight].params.zero, split[weight].params.zero)


def test_what_needs_no_text_runs_nothing():
    case = Case("llama")
    formats = {weight: InputFormat(format=INT8) for weight in case.refs}
    inputs, cache = calibrate(case.block, 0, case.structure, None, formats, KV4)
    assert all(q.params is None and q.outer is None for q in inputs.values())
    assert torch.equal(case.run(Runtime(case.block, case.structure, inputs)), case.run(case.runtime(INT8)))
    assert isinstance(cache, CacheQuantizer)
    assert calibrate(case.block, 0, case.structure, None, {}, None) == ({}, None)


def test_nvfp4_inputs_share_the_tensor_scale_of_the_calibration_text():
    case = Case("llama")
    stream = case.stream(2, 3)
    formats = {weight: InputFormat(format=COMPOSITE["nvfp4"]) for weight in case.refs}
    inputs, _ = calibrate(case.block, 0, case.structure, stream, formats, None)
    for weight, x in _inputs(case, stream).items():
        assert inputs[weight].params is None
        assert inputs[weight].outer.item() == pytest.approx(448 * 6 / x.abs().max().item(), rel=1e-6)
    assert inputs["self_attn.q_proj.weight"] is inputs["self_attn.v_proj.weight"]
    assert inputs["self_attn.q_proj.weight"].where == "block 0, input of self_attn.q_proj.weight"
    case.run(Runtime(case.block, case.structure, inputs))


def test_clipped_block_scales_keep_the_tensor_scale_of_all_values():
    case = Case("llama")
    formats = dict.fromkeys(case.refs, InputFormat(format=COMPOSITE["nvfp4"], static=True, calibration="histogram"))
    stream = case.stream(4)
    inputs, _ = calibrate(case.block, 0, case.structure, stream, formats, None)
    for weight, x in _inputs(case, stream).items():
        params = inputs[weight].params
        assert params.scale.shape == (1, x.shape[1] // 16)
        assert params.outer.item() == pytest.approx(448 * 6 / x.abs().max().item(), rel=1e-6)
    case.run(Runtime(case.block, case.structure, inputs))


def test_static_cache_is_calibrated_on_the_same_trip():
    case = Case("llama")
    stream = case.stream(2, 1)
    ranges = CacheRanges(KV_STATIC)

    class See(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                ranges.update(*args[1:3])
            return func(*args, **(kwargs or {}))

    for chunk in stream.chunks:
        with torch.no_grad(), See():
            stream.call(0, chunk)(case.block, chunk)
    formats = {weight: InputFormat(format=INT8) for weight in case.refs}
    inputs, cache = calibrate(case.block, 0, case.structure, stream, formats, KV_STATIC)
    expected = CacheQuantizer(KV_STATIC, *ranges.params())
    found = case.run(Runtime(case.block, case.structure, inputs, cache))
    assert torch.equal(found, case.run(case.runtime(INT8, expected)))


def test_experts_without_tokens_take_what_the_others_need():
    case = Case("mixtral")
    stream = case.stream(1, length=2)  # two tokens, two experts each: four of eight at most
    seen = _inputs(case, stream)
    unseen = case.refs.keys() - seen.keys()
    assert unseen
    for fmt in (_static(TENSOR), InputFormat(format=COMPOSITE["nvfp4"])):
        inputs, _ = calibrate(case.block, 0, case.structure, stream, dict.fromkeys(case.refs, fmt), None)
        for name in unseen:
            parameter = case.refs[name].parameter
            x = torch.cat([seen[other] for other in seen if case.refs[other].parameter == parameter])
            if fmt.static:
                clip = Range(x.min().clamp_max(0).view(1, 1), x.max().clamp_min(0).view(1, 1))
                assert torch.equal(inputs[name].params.scale, fit(x, TENSOR, clip).scale)
            else:
                assert inputs[name].outer.item() == pytest.approx(448 * 6 / x.abs().max().item(), rel=1e-6)
        for name in seen.keys() - {"self_attn.o_proj.weight"}:
            parameter, index = case.refs[name].parameter, case.refs[name].index
            if index is not None and fmt.static:
                clip = Range(seen[name].min().clamp_max(0).view(1, 1), seen[name].max().clamp_min(0).view(1, 1))
                assert torch.equal(inputs[name].params.scale, fit(seen[name], TENSOR, clip).scale)
    with pytest.raises(NumericsError, match=r"block 4, input of .*\[\d\]: static scales need calibration tokens"):
        calibrate(case.block, 4, case.structure, Stream([], {}), {next(iter(unseen)): _static(TENSOR)}, None)


def test_experts_without_tokens_ask_only_those_in_their_format():
    case = Case("mixtral")
    stream = case.stream(1, length=2)
    seen = _inputs(case, stream)
    downs = [name for name in case.refs if case.refs[name].index is not None and "down" in name]
    unseen = next(name for name in downs if name not in seen)
    alike, *others = (name for name in downs if name in seen)
    formats = {unseen: _static(TENSOR), alike: _static(TENSOR), **dict.fromkeys(others, _static(INT8, "histogram"))}
    formats |= {name: InputFormat(format=INT8) for name in case.refs.keys() - formats.keys()}
    inputs, _ = calibrate(case.block, 0, case.structure, stream, formats, None)
    assert torch.equal(inputs[unseen].params.scale, inputs[alike].params.scale)


@pytest.mark.parametrize("calibration", RANGES)
def test_calibration_text_that_overflows_is_said_where(calibration):
    case = Case("llama")
    stream = case.stream(1)
    stream.chunks[0] = stream.chunks[0].clone()
    stream.chunks[0][0, 3] = torch.inf
    formats = dict.fromkeys(case.refs, _static(TENSOR, calibration))
    with pytest.raises(NumericsError, match=r"^block 0, input of self_attn.q_proj.weight: .*NaN or infinity$"):
        calibrate(case.block, 0, case.structure, stream, formats, None)


@pytest.mark.parametrize("plain", ["q_proj", "k_proj"])
def test_weights_that_read_one_input_through_different_transforms_have_ranges_of_their_own(plain):
    case = Case("llama")
    stream = case.stream(2, 1)
    before = _inputs(case, stream)["self_attn.q_proj.weight"]
    names = [f"self_attn.{part}_proj.weight" for part in "qkv"]
    turned = [name for name in names if plain not in name]
    transform = MatrixTransform(torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0])
    for name in turned:
        attach(case.block, name, transform)
    found, _ = calibrate(case.block, 0, case.structure, stream, dict.fromkeys(names, _static(TENSOR)), None)
    for name in names:
        seen = transform(before) if name in turned else before
        expected = fit(seen, TENSOR, Range(seen.min().view(1, 1).clamp_max(0), seen.max().view(1, 1).clamp_min(0)))
        torch.testing.assert_close(found[name].params.scale, expected.scale, rtol=1e-5, atol=0)
    assert found[turned[0]] is found[turned[1]]
