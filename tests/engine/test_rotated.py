"""A rotated model computes what the model computes, with hidden states that are rotated; or it is refused."""

import copy

import pytest
import torch

from qbench.engine.passes import run_pass
from qbench.engine.rotated import RotatedSource
from qbench.engine.source import MemorySource, StreamSource
from qbench.errors import StructureError
from qbench.evaluation.perplexity import window_nll
from qbench.models.load import load_config, load_model, meta_model
from qbench.structure.blocks import capture_calls, find_blocks, use_single_experts
from qbench.structure.online import HadamardTransform, attached, attached_to_attention
from qbench.structure.rotation import random_orthogonal
from tests.architectures import tiny_model, tokens
from tests.engine.rotations import EVERYTHING, rotation, whole_model

#: float64 all the way, and through norms that compute in float32.
EXACT = ("opt", "gpt2", "gpt_neox", "phi", "falcon", "stablelm", "starcoder2")
FLOAT32 = ("llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral")
NORM_BEHIND = ("gemma2", "gemma3_text", "olmo2")
PARTS = {
    "residual": {"residual": "hadamard"},
    "random": {"residual": "random"},
    "values": {"values": True},
    "down": {"online_down": True},
    "heads": {"online_o": "heads"},
    "full": {"online_o": "full"},
    "keys": {"keys": True},
    "everything": EVERYTHING,
}


@torch.no_grad()
def _logits(model, config, length=12):
    use_single_experts(model)
    return model(input_ids=tokens(config, length=length, seed=5)).logits


def _error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", EXACT + FLOAT32)
def test_logits_stay_the_same(name):
    for dtype, tolerance in ((torch.float64, 1e-12 if name in EXACT else 1e-6), (torch.float32, 1e-5)):
        model, config = tiny_model(name, dtype=dtype)
        expected = _logits(model, config)
        source = RotatedSource(MemorySource(model), rotation(**EVERYTHING))
        assert _error(_logits(whole_model(source), config), expected) <= tolerance
        assert torch.equal(_logits(model, config), expected)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["llama", "opt", "gpt_neox"])
def test_every_part_alone_leaves_the_logits_and_changes_weights(name, part):
    model, config = tiny_model(name, dtype=torch.float64)
    source = RotatedSource(MemorySource(model), rotation(**PARTS[part]))
    rotated = whole_model(source)
    assert _error(_logits(rotated, config), _logits(model, config)) <= (1e-12 if name in EXACT else 1e-6)
    changed = {
        path.rpartition(".")[0].rpartition(".")[2]
        for path, value in source.block(0).named_parameters()
        if value.ndim == 2 and not torch.allclose(value, find_blocks(model)[1][0].get_parameter(path))
    }
    output, down = {
        "llama": ("o_proj", "down_proj"),
        "opt": ("out_proj", "fc2"),
        "gpt_neox": ("dense", "dense_4h_to_h"),
    }[name]
    every = {
        path.rpartition(".")[0].rpartition(".")[2] for path, p in source.block(0).named_parameters() if p.ndim == 2
    }
    value = {"llama": "v_proj", "opt": "v_proj", "gpt_neox": "query_key_value"}[name]
    expected = {"values": {value, output}, "down": {down}, "heads": {output}, "full": {output}, "keys": set()}
    assert changed == expected.get(part, every)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "falcon"])
@torch.no_grad()
def test_hidden_states_are_the_rotated_ones(name):
    """T of the stream, and without their mean behind norms that subtract it: RMS values do not change."""
    model, config = tiny_model(name, dtype=torch.float64)
    ids = tokens(config)
    inner = MemorySource(model)
    source = RotatedSource(inner, rotation(**EVERYTHING))
    hidden, calls = capture_calls(model, ids)
    found, rotated_calls = capture_calls(whole_model(source), ids)
    stream = source._stream
    for index in range(source.count):
        centred = hidden - hidden.mean(dim=-1, keepdim=True) if name != "llama" else hidden
        assert torch.allclose(found, stream(centred), atol=1e-6)
        assert torch.allclose(found.square().mean(-1), centred.square().mean(-1), rtol=1e-6)
        hidden, found = calls[index](inner.block(index), hidden), rotated_calls[index](source.block(index), found)


@pytest.mark.parametrize("mode", ["hadamard", "random"])
@torch.no_grad()
def test_outliers_are_spread(mode):
    """A stream with a channel that sticks out has the kurtosis of a normal distribution afterwards."""
    model, config = tiny_model("llama", dtype=torch.float64, hidden_size=128, head_dim=32)
    model.model.embed_tokens.weight[:, 7] *= 100
    ids = tokens(config, batch=8)
    before, _ = capture_calls(model, ids)
    source = RotatedSource(MemorySource(model), rotation(residual=mode))
    after, _ = capture_calls(whole_model(source), ids)

    def kurtosis(x):
        return float(((x**4).mean(dim=-1) / x.square().mean(dim=-1) ** 2).mean())

    assert kurtosis(before) > 60
    assert kurtosis(after) < (4 if mode == "random" else 2)  # one outlier alone becomes +-1/sqrt(n): kurtosis 1


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("llama", {"hidden_size": 36, "head_dim": 12, "num_attention_heads": 12}),
        ("llama", {"hidden_size": 24, "head_dim": 4, "num_attention_heads": 6, "intermediate_size": 40}),
        ("opt", {"hidden_size": 36, "word_embed_proj_dim": 36, "num_attention_heads": 9, "ffn_dim": 44}),
        ("qwen2", {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1}),
    ],
)
def test_widths_that_are_no_power_of_two(name, overrides):
    model, config = tiny_model(name, dtype=torch.float64, **overrides)
    source = RotatedSource(MemorySource(model), rotation(**EVERYTHING))
    assert _error(_logits(whole_model(source), config), _logits(model, config)) <= 1e-6
    heads = {metric[3] for metric in source.metrics if metric[2] == "cross_heads"}
    # 9, 6 and 3 heads cannot be mixed by a Hadamard matrix.
    assert heads == {float(config.num_attention_heads == 12)}


@pytest.mark.parametrize(
    ("options", "overrides", "message"),
    [
        (
            {"residual": "hadamard"},
            {"hidden_size": 28 * 3 + 8, "head_dim": 8},
            "algo.rotate_mode=random takes any width",
        ),
        (
            {"online_down": True},
            {"intermediate_size": 46},
            "order=46: no Hadamard .* algo.online_down=false does without",
        ),
        ({"values": True}, {"head_dim": 10}, "block 0: hadamard order=10: .* algo.values=false does without"),
        (
            {"online_o": "full"},
            {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 10},
            "online_o=none does",
        ),
        ({"keys": True}, {"head_dim": 10}, "algo.rotate_keys=false does without"),
    ],
)
def test_orders_without_a_hadamard_matrix_are_refused(options, overrides, message):
    model, _ = tiny_model("llama", **overrides)
    with pytest.raises(StructureError, match=message) as raised:
        RotatedSource(MemorySource(model), rotation(**options))
    assert "\n" not in str(raised.value)


def test_random_rotations_take_any_width():
    model, config = tiny_model("llama", dtype=torch.float64, hidden_size=92, head_dim=8)
    source = RotatedSource(MemorySource(model), rotation(residual="random", online_down=True))
    assert _error(_logits(whole_model(source), config), _logits(model, config)) <= 1e-6


@pytest.mark.parametrize("name", NORM_BEHIND)
def test_norms_behind_writers_are_refused(name):
    model, _ = tiny_model(name)
    with pytest.raises(StructureError, match=r"block 0: the output of self_attn.o_proj.weight passes a norm before it"):
        RotatedSource(MemorySource(model), rotation(residual="hadamard"))


def test_a_norm_behind_the_embedding_is_refused():
    model, _ = tiny_model("bloom")
    with pytest.raises(
        StructureError, match=r"word_embeddings_layernorm stands between the embedding and the first block"
    ):
        RotatedSource(MemorySource(model), rotation(residual="hadamard"))


@pytest.mark.parametrize("before", [True, False])
def test_projections_of_the_embedding_are_refused(before):
    model, _ = tiny_model("opt", word_embed_proj_dim=16, do_layer_norm_before=before)
    with pytest.raises(StructureError, match=r"project_in stands between the embedding and the first block"):
        RotatedSource(MemorySource(model), rotation(residual="hadamard"))


def test_norms_behind_the_sum_are_refused():
    model, _ = tiny_model("opt", do_layer_norm_before=False)
    with pytest.raises(StructureError, match=r"block 0: the output of .* passes a norm"):
        RotatedSource(MemorySource(model), rotation(residual="hadamard"))


@pytest.mark.parametrize("name", [*NORM_BEHIND, "bloom"])
def test_what_is_no_matter_of_the_stream_can_be_rotated_there_too(name):
    model, config = tiny_model(name, dtype=torch.float64)
    source = RotatedSource(MemorySource(model), rotation(values=True, online_down=True, online_o="heads"))
    assert _error(_logits(whole_model(source), config), _logits(model, config)) <= 1e-6


class _Layered(torch.nn.Module):
    """A factor for every channel behind a linear layer, which no norm is."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.factor = linear, torch.nn.Parameter(0.5 + torch.rand(linear.out_features).to(linear.weight))

    def forward(self, x):
        return self.linear(x) * self.factor


def test_what_no_rule_foresees_fails_the_proof():
    model, _ = tiny_model("llama")
    for block in model.model.layers:
        block.mlp.down_proj = _Layered(block.mlp.down_proj)
    with pytest.raises(StructureError, match=r"block 0: rotated, it computes another function"):
        RotatedSource(MemorySource(model), rotation(residual="hadamard"))


def test_the_model_is_left_alone_and_shares_no_memory_with_what_changes():
    model, _ = tiny_model("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert model.config.tie_word_embeddings
    source = RotatedSource(MemorySource(model), rotation(**EVERYTHING))
    pointers = {p.data_ptr() for p in model.parameters()}
    for parameter in whole_model(source).parameters():
        assert parameter.data_ptr() not in pointers
        parameter.data.zero_()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.config.tie_word_embeddings
    assert not source.model.config.tie_word_embeddings
    assert source.model.get_input_embeddings().weight is not source.model.get_output_embeddings().weight
    assert all(not attached(block) and attached_to_attention(block) is None for block in model.model.layers)


def test_blocks_hold_no_second_copy_and_give_no_plausible_result():
    model, config = tiny_model("llama")
    source = RotatedSource(MemorySource(model), rotation(**EVERYTHING))
    blocks = find_blocks(source.model)[1]
    assert all(p.untyped_storage().nbytes() == p.element_size() for p in blocks.parameters())
    assert _logits(source.model, config).isnan().all()


def test_the_seed_decides_and_nothing_else():
    model, _ = tiny_model("llama")

    def block(seed, residual="hadamard"):
        source = RotatedSource(MemorySource(model), rotation(residual=residual, seed=seed))
        return source.block(1).mlp.down_proj.weight

    for mode in ("hadamard", "random"):
        assert torch.equal(block(3, mode), block(3, mode))
        assert not torch.allclose(block(3, mode), block(4, mode))


def test_given_matrices_are_used():
    model, config = tiny_model("qwen2", dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    r1, r2 = random_orthogonal(32, generator), {1: random_orthogonal(8, generator)}
    source = RotatedSource(MemorySource(model), rotation(residual=r1, values=True, value_matrices=r2))
    assert _error(_logits(whole_model(source), config), _logits(model, config)) <= 1e-6
    gain = model.model.layers[1].input_layernorm.weight
    value = (model.model.layers[1].self_attn.v_proj.weight * gain) @ r1
    turned = torch.block_diag(*[r2[1].T] * 2) @ value
    assert torch.allclose(source.block(1).self_attn.v_proj.weight, turned, atol=1e-12)
    hadamard = HadamardTransform(8)
    value = (model.model.layers[0].self_attn.v_proj.weight * model.model.layers[0].input_layernorm.weight) @ r1
    assert torch.allclose(source.block(0).self_attn.v_proj.weight, hadamard(value.T.contiguous()).T, atol=1e-12)
    with pytest.raises(StructureError, match=r"rotation of \[31, 31\] for a residual stream of 32"):
        RotatedSource(MemorySource(model), rotation(residual=torch.eye(31)))


def test_the_identity_only_fuses_norms():
    model, config = tiny_model("stablelm", dtype=torch.float64)
    source = RotatedSource(MemorySource(model), rotation(residual=torch.eye(32)))
    block = source.block(0)
    assert torch.equal(block.input_layernorm.weight, torch.ones(32, dtype=torch.float64))
    assert _error(_logits(whole_model(source), config), _logits(model, config)) <= 1e-12
    assert [sites.width for sites in source.sites] == [32, 32]


def test_random_orthogonal_matrices_are_orthogonal_and_unbiased():
    generator = torch.Generator().manual_seed(0)
    found = torch.stack([random_orthogonal(4, generator) for _ in range(2000)])
    assert torch.allclose(found @ found.mT, torch.eye(4, dtype=torch.float64), atol=1e-12)
    assert found.mean(dim=0).abs().max() < 0.05  # QR alone has diagonals of one sign
    assert (found.square().mean(dim=0) - 0.25).abs().max() < 0.02


def _tiny_sources(dtype=torch.float32):
    from tests.engine.helpers import tiny_asset

    asset, cpu = tiny_asset(), torch.device("cpu")
    memory = MemorySource(load_model(asset, dtype=dtype, device=cpu))
    return memory, StreamSource(asset.path, meta_model(load_config(asset), dtype=dtype), dtype, cpu)


@pytest.mark.parametrize("options", [EVERYTHING, {"values": True}], ids=["everything", "values"])
def test_a_checkpoint_is_rotated_block_by_block(options):
    memory, stream = _tiny_sources()
    one, other = (RotatedSource(source, rotation(**options)) for source in (memory, stream))
    for index in range(one.count):
        for (path, a), (_, b) in zip(
            one.block(index).named_parameters(), other.block(index).named_parameters(), strict=True
        ):
            assert torch.equal(a, b), path
    held = {name: p.clone() for name, p in one.model.named_parameters() if not name.startswith(one.prefix)}
    assert all(p.is_meta for p in other.model.parameters())
    for _ in range(2):
        with other.shell() as model:
            assert model is other.model
            for name, value in held.items():
                assert torch.equal(model.get_parameter(name), value), name
            tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
            assert tied == (options != EVERYTHING)
        assert all(p.is_meta for p in other.model.parameters())


def test_full_precision_passes_give_the_models_own_perplexity():
    from qbench.evaluation.perplexity import stream_nll
    from tests.engine.helpers import tiny_windows

    memory, stream = _tiny_sources()
    windows = tiny_windows(4, 48)
    expected = window_nll(memory.model, windows)
    source = RotatedSource(stream, rotation(**EVERYTHING))
    result = run_pass(source, None, None, evaluations=(windows,))
    assert torch.allclose(stream_nll(source, result.evaluations[0], windows), expected, rtol=1e-5)


def test_bfloat16_models_stay_bfloat16_and_nearly_the_same():
    memory, _ = _tiny_sources(torch.bfloat16)
    from tests.engine.helpers import tiny_windows

    windows = tiny_windows(4, 48)
    rotated = whole_model(RotatedSource(memory, rotation(**EVERYTHING)))
    assert {p.dtype for p in rotated.parameters()} == {torch.bfloat16}
    assert torch.allclose(window_nll(rotated, windows), window_nll(memory.model, windows), rtol=2e-2)


@pytest.mark.parametrize(
    ("name", "options", "loadable"),
    [
        ("llama", {"residual": "hadamard", "values": True}, True),
        ("llama", {"online_down": True}, False),
        ("opt", {"residual": "hadamard"}, False),
        ("opt", {"values": True}, True),
    ],
)
def test_what_the_models_own_class_can_load(name, options, loadable):
    model, _ = tiny_model(name)
    source = RotatedSource(MemorySource(model), rotation(**options))
    assert source.loadable == loadable
    assert copy.copy(source).loadable == loadable
