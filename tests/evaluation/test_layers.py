"""Kurtosis and cosines by layer: against two whole models side by side, behind transformations, and by type."""

import dataclasses
import math
from functools import partial

import pytest
import scipy.stats
import torch
from torch import nn

from qbench.engine.loop import Recipe
from qbench.engine.passes import run_pass
from qbench.engine.rotated import rotated
from qbench.engine.source import MemorySource
from qbench.errors import EvaluationError
from qbench.evaluation.layers import build, layer_types, layer_values, measurements
from qbench.formats import SCALES, Block, Int, TensorFormat, uniform
from qbench.formats.scheme import InputFormat, Scheme
from qbench.models.load import load_model
from qbench.spec import EvaluationSpec
from qbench.stages.pipeline import build_pipeline
from qbench.structure.blocks import find_blocks
from tests.architectures import tiny_model, tokens
from tests.engine.helpers import structure_of, tiny_asset, tiny_windows
from tests.evaluation.subjects import full_precision

SPEC = EvaluationSpec(evaluator="layers", version=1, task="text", fingerprint="0" * 64, length=32, n=6, mode="layers")
TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PLANTED = 5


@pytest.fixture(scope="module")
def windows():
    return tiny_windows(6, 32)


@pytest.fixture(scope="module")
def model():
    """model=tiny with one channel that sticks out behind every norm."""
    model = load_model(tiny_asset(), dtype=torch.float32, device="cpu")
    for block in find_blocks(model)[1]:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.data[PLANTED] *= 30
    return model


def _subject(model, folder, stages, windows, *, bits=8, input_bits=None):
    inputs = None
    if input_bits is not None:
        token = TensorFormat(element=Int(input_bits, signed=True), block=Block(1, 0), scale=SCALES["float32"])
        inputs = InputFormat(format=token)
    weight = uniform(bits=bits, group_size=-1, symmetric=True)
    recipe = Recipe(build_pipeline(stages), Scheme(weight=weight, input=inputs))
    source = rotated(MemorySource(model), recipe, windows)
    found = run_pass(source, recipe, windows, keep_unrounded=True)
    subject = full_precision(folder, model)
    return dataclasses.replace(subject, model=source.model, weights=found.weights, before=found.unrounded)


def _means(subject, windows, metric, batch=4):
    blocks = layer_values(subject, windows, batch)
    return {kind: sum(of[metric][kind] for of in blocks) / len(blocks) for kind in TYPES}


def _outputs(model, windows):
    """Inputs and outputs of every linear module by name, as the modules themselves see them."""
    seen, handles = {}, []

    def keep(module, args, output, name):
        seen[name] = (args[0].clone(), output.clone())

    for name, module in find_blocks(model)[1].named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(partial(keep, name=name)))
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("input_bits", [None, 4])
def test_the_three_are_those_of_two_whole_models(model, windows, tmp_path, input_bits):
    subject = _subject(model, tmp_path, [{"stage": "rtn"}], None, bits=3, input_bits=input_bits)
    full = _outputs(model, windows)
    with subject.quantized() as quantized:
        other = _outputs(quantized, windows)
    blocks = layer_values(subject, windows, 4)
    for name, (x, y) in full.items():
        index, kind = int(name.split(".")[0]), name.rpartition(".")[2]
        found = {metric: of[kind] for metric, of in blocks[index].items()}
        weight = find_blocks(model)[1].get_submodule(name).weight.detach()
        expected = scipy.stats.kurtosis(weight.double().numpy(), axis=None, fisher=False)
        assert found["weight_kurtosis"] == pytest.approx(expected, rel=1e-4)
        expected = scipy.stats.kurtosis(x.double().numpy(), axis=None, fisher=False)
        assert found["input_kurtosis"] == pytest.approx(expected, rel=1e-4)
        a, b = (each.double().flatten(1) for each in (y, other[name][1]))
        cosines = torch.nn.functional.cosine_similarity(a, b, dim=1)
        assert found["output_cosine"] == pytest.approx(cosines.mean().item(), abs=1e-6)
        assert found["output_cosine"] < 0.999


@pytest.mark.parametrize("batch", [1, 6])
def test_how_many_windows_are_read_at_once_changes_nothing(model, windows, tmp_path, batch):
    subject = _subject(model, tmp_path, [{"stage": "rtn"}], None, bits=3)
    for one, other in zip(layer_values(subject, windows, batch), layer_values(subject, windows, 4), strict=True):
        for metric, of in one.items():
            assert of == pytest.approx(other[metric], rel=1e-5)


def test_full_precision_agrees_with_itself(model, windows, tmp_path):
    subject = full_precision(tmp_path, model)
    assert _means(subject, windows, "output_cosine") == pytest.approx(dict.fromkeys(TYPES, 1.0), abs=1e-9)


def test_a_rotation_flattens_a_channel_that_sticks_out(model, windows, tmp_path):
    plain = _subject(model, tmp_path, [{"stage": "rtn"}], windows, bits=4, input_bits=4)
    turned = _subject(model, tmp_path, [{"stage": "quarot"}, {"stage": "rtn"}], windows, bits=4, input_bits=4)
    before, after = (_means(each, windows, "input_kurtosis") for each in (plain, turned))
    for kind in ("q_proj", "gate_proj"):
        assert before[kind] > 30
        assert after[kind] < 6
    before, after = (_means(each, windows, "output_cosine") for each in (plain, turned))
    assert all(after[kind] > before[kind] for kind in TYPES)


@pytest.mark.parametrize(
    "stages",
    [
        [{"stage": "quarot"}, {"stage": "rtn"}],
        [{"stage": "awq_scale"}, {"stage": "rtn"}],
        [{"stage": "smoothquant", "all_folds": True}, {"stage": "rtn"}],
        [{"stage": "osplus"}, {"stage": "rtn"}],
        [{"stage": "quarot"}, {"stage": "awq_scale"}, {"stage": "gptq"}],
    ],
    ids=lambda stages: "+".join(each["stage"] for each in stages),
)
def test_outputs_that_a_transformation_moves_are_compared_in_its_basis(model, windows, tmp_path, stages):
    found = _means(_subject(model, tmp_path, stages, windows, bits=8), windows, "output_cosine")
    assert min(found.values()) > 0.997


def test_weights_are_those_before_rounding(model, windows, tmp_path):
    coarse, fine = (_subject(model, tmp_path, [{"stage": "rtn"}], None, bits=bits) for bits in (2, 8))
    expected = _means(full_precision(tmp_path, model), windows, "weight_kurtosis")
    for subject in (coarse, fine):
        assert _means(subject, windows, "weight_kurtosis") == expected
    scaled = _subject(model, tmp_path, [{"stage": "smoothquant"}, {"stage": "rtn"}], windows, bits=2)
    found = _means(scaled, windows, "weight_kurtosis")
    assert found["q_proj"] != expected["q_proj"]
    assert found["o_proj"] == expected["o_proj"]


def test_a_measurement_is_the_mean_over_blocks_with_the_blocks_as_samples(model, windows, tmp_path):
    blocks = layer_values(full_precision(tmp_path, model), windows, 4)
    found = {each.name: each for each in measurements(blocks, SPEC)}
    assert len(found) == 3 * len(TYPES)
    one = found["input_kurtosis,down_proj"]
    values = [of["input_kurtosis"]["down_proj"] for of in blocks]
    assert one.value == pytest.approx(sum(values) / len(values))
    assert one.samples.tolist() == values
    assert (one.n, one.stderr) == (4, pytest.approx(scipy.stats.sem(values)))
    assert (one.protocol, one.spec_key) == ("layers-32", SPEC.key())


def test_what_is_no_number_is_an_error_that_names_the_layer():
    blocks = [{"input_kurtosis": {"q_proj": 3.0}}, {"input_kurtosis": {"q_proj": math.nan}}]
    with pytest.raises(EvaluationError, match=r"text \(layers-32\): input_kurtosis of q_proj in block 1 is nan"):
        measurements(blocks, SPEC)


def test_experts_of_a_block_count_together_and_have_no_cosine(tmp_path):
    model, config = tiny_model("mixtral")
    found = layer_values(full_precision(tmp_path, model), tokens(config, batch=4, length=16), 2)[0]
    experts = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj", "gate_up_proj", "down_proj"}
    kinds = experts & found["weight_kurtosis"].keys()
    assert len(kinds) == 2
    assert kinds <= found["input_kurtosis"].keys()
    assert not experts & found["output_cosine"].keys()
    assert "q_proj" in found["output_cosine"]


def test_a_type_is_a_modules_name_or_its_path_where_the_name_is_shared():
    model, config = tiny_model("gpt2")
    assert set(layer_types(structure_of(model, tokens(config))).values()) == {
        *("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")
    }


def test_what_the_options_say():
    options = {"corpora": ["pydoc-heldout"], "path": None, "length": 48, "n": 4, "batch": None}
    (found,) = build(options, "memory")
    assert (found.spec.protocol, found.spec.task, found.spec.n) == ("layers-48", "pydoc-heldout", 4)
    assert not found.streams
