"""DuQuant: its rotations are orthogonal and lower the peak, its permutation balances blocks, the function stays."""

import copy
import math

import pytest
import torch

from qbench.calibration.statistics import AbsMax, LoudestTokens
from qbench.engine.loop import Recipe
from qbench.engine.passes import StructureCache, embed, run_pass
from qbench.engine.source import MemorySource
from qbench.errors import NumericsError, SpecError
from qbench.formats import uniform
from qbench.formats.scheme import InputFormat, Override, Scheme
from qbench.stages.base import BlockView, WeightShape
from qbench.stages.pipeline import build_pipeline
from qbench.stages.transform_duquant import (
    DuQuant,
    base_rotation,
    duquant_transform,
    greedy_rotation,
    loudest,
    zigzag,
)
from qbench.structure.blocks import capture_calls
from qbench.structure.online import attach
from tests.architectures import tiny_model, tokens

W4 = uniform(bits=4, group_size=-1, symmetric=False)
A4 = InputFormat(format=uniform(bits=4, group_size=-1, symmetric=False, scale="float32"))


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _sample(rows=20, n=48, seed=0, loud=(3, 17, 40)):
    x = torch.randn(rows, n, generator=_generator(seed))
    x[:, list(loud)] *= 30
    return x


def _dense(transform, n):
    return transform(torch.eye(n, dtype=torch.float64))


def _off(matrix):
    return (matrix @ matrix.T - torch.eye(len(matrix), dtype=matrix.dtype)).abs().max().item()


# ------------------------------------------------------------------ rotations


@pytest.mark.parametrize("size", [2, 3, 8, 96])
def test_the_base_is_orthogonal_random_and_spreads_its_first_channel_evenly(size):
    base = base_rotation(size, _generator())
    assert base.dtype == torch.float64
    assert _off(base) < 1e-12
    assert torch.allclose(base[0], torch.full((size,), size**-0.5, dtype=torch.float64))
    if size > 2:  # the only rotations of a line are its two directions
        assert not torch.allclose(base, base_rotation(size, _generator(1)))
    assert torch.equal(base, base_rotation(size, _generator()))


def test_the_rotation_is_a_product_of_swapped_bases_as_the_paper_writes_it():
    """R = Π E_c R0 E_c with E_c the exchange of channels 0 and c (eq. 3, 4), followed here with dense matrices."""
    sample, size, n = _sample(n=24, loud=(5, 20)), 8, 24
    base = base_rotation(size, _generator())
    x, product, peaks, products = sample.double(), torch.eye(size, dtype=torch.float64), [], []
    for _ in range(13):
        peaks.append((x.max() - x.min()).item())
        products.append(product)
        token, channel = divmod(int(x.abs().flatten().argmax()), n)
        assert x[token, channel].abs() == x.abs().max()
        swap = torch.eye(size, dtype=torch.float64)
        c = channel % size
        swap[[0, c]] = swap[[c, 0]]
        product = product @ swap @ base @ swap
        x = x @ torch.block_diag(*[swap @ base @ swap] * 3)
    rotation, found = greedy_rotation(sample, base, 12)
    assert torch.allclose(found, torch.tensor(peaks), rtol=1e-4)
    assert torch.allclose(rotation, products[peaks.index(min(peaks))], atol=1e-10)


@pytest.mark.parametrize("steps", [0, 1, 5, 64])
def test_the_kept_rotation_is_orthogonal_and_has_the_smallest_peak_of_all_prefixes(steps):
    sample = _sample()
    rotation, peaks = greedy_rotation(sample, base_rotation(16, _generator()), steps)
    assert peaks.shape == (steps + 1,)
    assert _off(rotation) < 1e-12
    turned = sample.double() @ torch.block_diag(*[rotation] * 3)
    assert (turned.max() - turned.min()).item() == pytest.approx(peaks.min().item(), rel=1e-4)
    assert peaks.min() < 0.6 * peaks[0] if steps else torch.equal(rotation, torch.eye(16, dtype=torch.float64))


def test_no_step_is_kept_where_none_helps():
    flat = torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1], [1, -1, 1, -1]])
    rotation, peaks = greedy_rotation(flat, base_rotation(4, _generator()), 20)
    assert peaks.min() == peaks[0] == 2
    assert torch.equal(rotation, torch.eye(4, dtype=torch.float64))


# ------------------------------------------------------------------ permutation


def test_channels_are_dealt_to_blocks_back_and_forth_by_falling_peak():
    peaks = torch.tensor([1.0, 9, 5, 7, 3, 8, 2, 6])
    # falling: 1 5 3 | 7 2 4 | ... with two blocks of four: 1→A 5→B, 3→B 7→A, 2→A 4→B, 6→B 0→A
    assert zigzag(peaks, 4).tolist() == [1, 7, 2, 0, 5, 3, 4, 6]


@pytest.mark.parametrize(("n", "size"), [(48, 16), (48, 48), (48, 2), (9, 3)])
def test_the_permutation_is_one_and_balances_the_means_of_blocks(n, size):
    peaks = torch.randn(n, generator=_generator()).exp()
    order = zigzag(peaks, size)
    assert sorted(order.tolist()) == list(range(n))
    means = peaks[order].reshape(-1, size).mean(1)
    assert means.max() - means.min() <= (peaks.max() - peaks.min()) / size + 1e-6
    if n > size > 2:
        assert means.var() < peaks.reshape(-1, size).mean(1).var()


# ------------------------------------------------------------------ the whole transform


@pytest.mark.parametrize("permutations", [0, 1, 3])
def test_the_transform_is_orthogonal_and_its_peak_is_the_one_reported(permutations):
    sample = _sample()
    transform, peak = duquant_transform(sample, 8, 32, permutations, _generator())
    dense = _dense(transform, 48)
    assert _off(dense) < 1e-12
    turned = sample.double() @ dense
    assert torch.allclose(transform(sample).double(), turned, atol=1e-3)
    assert peak == pytest.approx(((turned.max() - turned.min()) / (sample.max() - sample.min())).item(), rel=1e-3)
    assert peak < 0.7


def test_permuting_lets_a_block_share_its_outliers_with_the_others():
    sample = _sample(loud=(0, 1, 2, 3))  # all in one block
    _, alone = duquant_transform(sample, 8, 64, 0, _generator())
    _, shared = duquant_transform(sample, 8, 64, 1, _generator())
    assert shared < 0.75 * alone


def test_zeros_stay_zeros_and_one_token_will_do():
    transform, peak = duquant_transform(torch.zeros(4, 16), 8, 10, 1, _generator())
    assert peak == 1
    assert _off(_dense(transform, 16)) < 1e-12
    transform, peak = duquant_transform(_sample(rows=1, n=16, loud=(2,)), 8, 10, 1, _generator())
    assert peak < 1


# ------------------------------------------------------------------ the statistic


def test_the_statistic_holds_the_loudest_token_of_every_channel_however_tokens_are_split():
    x = _sample(rows=60, n=12, loud=(4,))
    whole = LoudestTokens(12, torch.device("cpu"))
    whole.update(x.view(3, 20, 12))
    split = LoudestTokens(12, torch.device("cpu"))
    for part in x.split([1, 0, 30, 29]):
        split.update(part)
    split.finish()
    assert whole.tokens == split.tokens == 60
    assert torch.equal(whole.value(), split.value())
    assert torch.equal(whole.value(), x[x.abs().argmax(0)])
    largest = AbsMax(12, torch.device("cpu"))
    largest.update(x)
    assert torch.equal(whole.value().diagonal().abs(), largest.value())


def test_the_statistic_of_scaled_inputs_is_the_scaled_statistic_and_the_old_one_stays():
    x, scale = _sample(rows=40, n=6, loud=(1,)), torch.rand(6, generator=_generator(2)) + 0.5
    statistic, other = (LoudestTokens(6, torch.device("cpu")) for _ in range(2))
    statistic.update(x)
    other.update(x / scale)
    before = statistic.value().clone()
    assert torch.equal(statistic.rescaled(scale).value(), other.value())
    assert statistic.rescaled(scale).tokens == 40
    assert torch.equal(statistic.value(), before)


def test_a_nan_is_not_lost_among_later_tokens():
    statistic = LoudestTokens(3, torch.device("cpu"))
    bad = torch.ones(2, 3)
    bad[1, 2] = math.nan
    for x in (torch.ones(1, 3), bad, 9 * torch.ones(4, 3)):
        statistic.update(x)
    assert statistic.value().diagonal().isnan().tolist() == [False, False, True]


def test_the_sample_is_of_distinct_tokens_of_the_loudest_channels():
    rows = torch.tensor([[5.0, 0, 0, 1], [0, 2.0, 1, 0], [0, -3.0, 9, 0], [5.0, 0, 0, 1]])
    assert loudest(rows, 1).tolist() == [[0, -3, 9, 0]]
    assert sorted(loudest(rows, 2).tolist()) == [[0, -3, 9, 0], [5, 0, 0, 1]]
    assert len(loudest(rows, 4)) == 3  # two are the same token


# ------------------------------------------------------------------ the stage


@torch.no_grad()
def _view(name="llama", dtype=torch.float32, batch=4, seed=0, **overrides):
    model, config = tiny_model(name, seed=seed, dtype=dtype, **overrides)
    for path, parameter in model.named_parameters():
        if "norm" in path or "ln_" in path:
            parameter[3::7] *= 8
    calibration = tokens(config, batch=batch, length=16, seed=seed)
    source = MemorySource(model)
    hidden, calls = capture_calls(model, calibration[:1])
    block = source.block(0)
    structure = StructureCache().structure(block, calls[0], hidden, folds=True)
    statistics = {g.index: {LoudestTokens: LoudestTokens(g.in_features, torch.device("cpu"))} for g in structure.groups}
    stream = embed(source, model, calibration)
    stream.observe(block, 0, structure, lambda group, x: statistics[group.index][LoudestTokens].update(x))
    view = BlockView(
        block=block,
        structure=structure,
        groups=structure.groups,
        formats={ref.name: W4 for group in structure.groups for ref in group.weights},
        statistics=statistics,
        generator=_generator(),
        where="block 0",
    )
    return view, calls[0], hidden


@torch.no_grad()
def _installed(view, outcome):
    block = copy.deepcopy(view.block)
    for path, value in outcome.parameters.items():
        block.get_parameter(path).copy_(value)
    for group in view.groups:
        if group.index in outcome.online:
            for ref in group.weights:
                attach(block, ref.name, outcome.online[group.index])
    return block


ARCHITECTURES = ["llama", "qwen2", "phi3", "phi", "opt", "gpt2", "bloom", "falcon", "gemma2", "olmo2", "mixtral"]


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_the_block_computes_its_function_and_the_error_falls_with_precision(name, dtype, tolerance):
    view, call, hidden = _view(name, dtype)
    before = {path: value.clone() for path, value in view.block.named_parameters()}
    outcome = DuQuant(block_size=8, max_rotation_step=16).apply(view)
    reached = {group.index for group in view.groups if view.statistics[group.index][LoudestTokens].tokens}
    assert outcome.online.keys() == reached
    assert all(torch.equal(before[path], value) for path, value in view.block.named_parameters())
    assert {value.dtype for value in outcome.parameters.values()} == {dtype}
    expected, found = call(view.block, hidden), call(_installed(view, outcome), hidden)
    assert (found - expected).norm() <= tolerance * expected.norm()
    peaks = [value for _, name, value in outcome.metrics if name == "duquant_peak"]
    assert len(peaks) == len(reached)
    assert max(peaks) <= 1


@torch.no_grad()
def test_it_lowers_what_a_quantizer_of_tokens_sees():
    view, _, _ = _view()
    outcome = DuQuant(block_size=16).apply(view)
    rows = view.statistics[0][LoudestTokens].value()
    turned = outcome.online[0](rows)
    span = [x.amax(1) - x.amin(1) for x in (turned, rows)]
    assert span[0].mean() < 0.7 * span[1].mean()


@torch.no_grad()
def test_it_is_deterministic_by_seed_and_every_option_counts():
    def first(seed=0, **options):
        view, _, _ = _view()
        outcome = DuQuant(**{"block_size": 16, "max_rotation_step": 16, **options}).apply(
            BlockView(**{**view.__dict__, "generator": _generator(seed)})
        )
        return torch.cat([value.flatten() for value in outcome.parameters.values()])

    plain = first()
    assert torch.equal(plain, first())
    others = [{"seed": 1}, {"block_size": 8}, {"max_rotation_step": 2}, {"permutation_times": 2}, {"sample_tokens": 2}]
    assert all(not torch.allclose(plain, first(**options), atol=1e-3) for options in others)


@torch.no_grad()
def test_without_rotation_and_permutation_nothing_changes():
    view, _, _ = _view()
    outcome = DuQuant(block_size=16, max_rotation_step=0, permutation_times=0).apply(view)
    for path, value in outcome.parameters.items():
        assert torch.equal(value, view.block.get_parameter(path))
    assert torch.equal(outcome.online[0](torch.ones(2, 32)), torch.ones(2, 32))


@torch.no_grad()
def test_dead_channels_and_groups_without_tokens():
    view, call, hidden = _view()
    view.statistics[0][LoudestTokens].rows.zero_()
    view.statistics[1][LoudestTokens].tokens = 0
    outcome = DuQuant(block_size=16).apply(view)
    assert outcome.online.keys() == {0, 2, 3}
    expected, found = call(view.block, hidden), call(_installed(view, outcome), hidden)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
def test_what_cannot_be_served_is_refused():
    view, _, _ = _view()
    refusal = r"algo.block_size=128: a divisor of the 32 inputs of .*q_proj.weight; sizes that fit every layer: "
    with pytest.raises(SpecError, match=refusal):
        DuQuant().apply(view)
    widths = {"q_proj.weight": 32, "down_proj.weight": 48}
    shapes = [WeightShape(name=name, format=W4, out_features=8, in_features=width) for name, width in widths.items()]
    with pytest.raises(SpecError, match=f"{refusal}2, 4, 8, 16$"):
        DuQuant().check_shapes(shapes)
    DuQuant(block_size=16).check_shapes(shapes)
    view.statistics[0][LoudestTokens].rows[2, 2] = math.inf
    with pytest.raises(NumericsError, match=r"q_proj.weight: input of the layer is not finite"):
        DuQuant(block_size=16).apply(view)
    for options in ({"block_size": 1}, {"max_rotation_step": -1}, {"permutation_times": -1}, {"sample_tokens": 0}):
        with pytest.raises(SpecError, match=next(iter(options))):
            DuQuant(**options).check(frozenset({W4}))


# ------------------------------------------------------------------ the engine


@torch.no_grad()
def _run(scheme, *stages, seed=0):
    model, config = tiny_model("llama")
    for path, parameter in model.named_parameters():
        if "norm" in path:
            parameter[3::7] *= 8
    pipeline = build_pipeline([{"stage": stage} if isinstance(stage, str) else stage for stage in stages])
    pipeline.check(scheme.weights, scheme)
    calibration = tokens(config, batch=4, length=16)
    result = run_pass(MemorySource(model), Recipe(pipeline, scheme, seed), calibration)
    evaluation = tokens(config, batch=6, length=16, seed=5)
    expected = model(evaluation).logits
    with result.weights.inside(model) as quantized:
        found = quantized(evaluation).logits
    assert torch.equal(model(evaluation).logits, expected)  # nothing is left attached
    return (found - expected).square().mean().item(), result


STAGE = {"stage": "duquant", "block_size": 16, "max_rotation_step": 64}


def test_in_a_run_it_keeps_the_function_and_beats_plain_rounding_at_four_bits():
    scheme = Scheme(weight=W4, input=A4)
    plain, _ = _run(scheme, "rtn")
    smooth, _ = _run(scheme, "smoothquant", "rtn")
    found, result = _run(scheme, "smoothquant", STAGE, "rtn")
    assert found < 0.8 * min(plain, smooth)
    errors = [value for *_, name, value in result.ledger.metrics if name == "duquant_function_error"]
    assert len(errors) == 2
    assert max(errors) < 1e-4
    behind_gptq, _ = _run(scheme, "smoothquant", STAGE, "gptq")
    assert behind_gptq < plain


def test_weights_that_stay_in_full_precision_read_the_input_as_it_is():
    eight = uniform(bits=8, group_size=-1, symmetric=False)
    kept = Override(modules="k_proj", roles=("weight", "input"))
    error, _ = _run(Scheme(weight=eight, overrides=(kept,)), STAGE, "rtn")
    assert error < 1e-2
