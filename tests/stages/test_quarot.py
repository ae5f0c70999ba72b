"""QuaRot's options: what each rotates, what is refused, and a run from the command line to the database."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from qbench.__main__ import main
from qbench.calibration.corpora import resolve_corpus, tokenize
from qbench.calibration.samplers import evaluation_windows
from qbench.engine.loop import Recipe
from qbench.engine.rotated import rotated
from qbench.engine.source import MemorySource
from qbench.errors import SpecError, StructureError
from qbench.evaluation.perplexity import window_nll
from qbench.formats import uniform
from qbench.formats.scheme import Override, Scheme
from qbench.models.load import load_tokenizer
from qbench.stages.base import BlockView, Kind
from qbench.stages.pipeline import build_pipeline
from qbench.stages.rotate_quarot import QuaRot
from qbench.stages.rotation import quantizes_cache
from qbench.store.database import Database
from qbench.structure.online import attached, attached_to_attention
from tests.architectures import tiny_model
from tests.engine.caches import cache_format
from tests.engine.helpers import tiny_asset

INT4 = uniform(bits=4, group_size=8, symmetric=False)
CACHE = cache_format("kivi", 4, 8)
NOTHING = {"residual": False, "values": False, "online_down": False, "online_o": "none", "rotate_keys": False}


def _block(model, seed=0, *, cache=CACHE, **options):
    recipe = Recipe(build_pipeline([{"stage": "quarot", **options}, {"stage": "rtn"}]), Scheme(cache=cache), seed)
    return rotated(MemorySource(model), recipe).block(0)


@pytest.mark.parametrize(
    "options",
    [
        {"rotate_mode": "random"},
        {"residual": False},
        {"values": False},
        {"online_down": False},
        {"online_o": "full"},
        {"online_o": "none"},
        {"rotate_keys": False},
    ],
    ids=str,
)
def test_every_option_changes_the_model(options):
    model, _ = tiny_model("llama")

    def described(block):
        online = {name: (t.order, t.inner) for name, t in attached(block).items()}
        return online, attached_to_attention(block) is not None, dict(block.named_parameters())

    online, keys, parameters = described(_block(model))
    assert online == {"self_attn.o_proj.weight": (4, 8), "mlp.down_proj.weight": (48, 1)}
    assert keys
    other_online, other_keys, others = described(_block(model, **options))
    same = all(torch.equal(value, others[name]) for name, value in parameters.items())
    assert not (same and online == other_online and keys == other_keys)


def test_the_seed_matters_to_the_residual_stream_alone():
    model, _ = tiny_model("llama")
    for residual in (True, False):
        one, other = (_block(model, seed, residual=residual).mlp.up_proj.weight for seed in (0, 1))
        assert torch.equal(one, other) is not residual
        assert QuaRot(residual=residual).uses_random is residual
    assert build_pipeline([{"stage": "quarot", "residual": False}, {"stage": "rtn"}]).uses_random is False


def test_run_time_transforms_are_known_beforehand():
    assert QuaRot().online
    assert QuaRot(online_down=False).online
    assert QuaRot(online_o="none").online
    assert not QuaRot(online_down=False, online_o="none").online
    assert QuaRot().kind == Kind.ROTATE
    assert build_pipeline([{"stage": "quarot"}, {"stage": "awq_scale"}, {"stage": "rtn"}])
    with pytest.raises(SpecError, match="stages in the order ROTATE < TRANSFORM"):
        build_pipeline([{"stage": "awq_scale"}, {"stage": "quarot"}, {"stage": "rtn"}])


def test_what_is_meaningless_is_refused():
    with pytest.raises(SpecError, match=r"algo.rotate_mode=random: it is about the residual stream"):
        QuaRot(residual=False, rotate_mode="random")
    with pytest.raises(SpecError, match=r"algo.residual=false: something to rotate"):
        QuaRot(**NOTHING)
    with pytest.raises(SpecError, match=r"algo.online_o=some: one of heads, full, none"):
        build_pipeline([{"stage": "quarot", "online_o": "some"}, {"stage": "rtn"}])
    without = QuaRot(rotate_keys=False)
    with pytest.raises(SpecError, match=r"algo.rotate_keys=false: a quantized cache"):
        without.check_scheme(Scheme(weight=INT4))
    without.check_scheme(Scheme(weight=INT4, cache=CACHE))
    keys = QuaRot(**NOTHING | {"rotate_keys": True})
    with pytest.raises(SpecError, match=r"algo.residual=false: something to rotate: .* keys only with kv_bits"):
        keys.check_scheme(Scheme(weight=INT4))
    keys.check_scheme(Scheme(weight=INT4, cache=CACHE))
    QuaRot().check_scheme(Scheme(weight=INT4))
    view = BlockView(block=torch.nn.Identity(), structure=None, groups=(), formats={}, where="block 3")
    with pytest.raises(StructureError, match="block 3: quarot rotates whole models"):
        QuaRot().apply(view)


def test_a_cache_is_quantized_in_some_block_or_in_none():
    override = Override(blocks=(1,), roles=("cache",), cache=CACHE)
    assert quantizes_cache(Scheme(cache=CACHE))
    assert quantizes_cache(Scheme(overrides=(override,)))
    assert not quantizes_cache(Scheme(weight=INT4, overrides=(replace(override, cache=None),)))


BASE = ["model=tiny", "eval.corpora=[pydoc-heldout]", "eval.n=2", "eval.length=64", "algo=quarot", "scheme=w4a4"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*overrides):
        return main([*BASE, "calib=pydoc", "store.url=sqlite:///rows.db", *overrides])

    return run


def _rows(query):
    with Database("sqlite:///rows.db") as database, database.read() as connection:
        return connection.exec_driver_sql(query).fetchall()


@pytest.mark.parametrize("source", ["memory", "stream"])
def test_a_run_leaves_a_row_with_what_was_proved(run, source, capsys):
    assert run(f"source={source}") == 0
    found = _rows(
        "select name, value from layer_metric where name in ('rotation_error', 'cross_heads') order by name, value"
    )
    assert [name for name, _ in found] == ["cross_heads"] * 4 + ["rotation_error"]
    assert 0 < found[-1][1] < 1e-6
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("source", ["memory", "stream"])
def test_an_export_is_refused_unless_nothing_is_left_to_run_time(run, source, tmp_path, capsys):
    assert run(f"source={source}", "export=hf", "export.path=model") == 2
    error = capsys.readouterr().err
    assert (
        error == "qbench: error: export=hf: none: quarot transforms inputs at run time, which a checkpoint cannot say\n"
    )
    plain = ("algo.online_down=false", "algo.online_o=none", "act_bits=16", "export=hf", "export.path=model")
    assert run(f"source={source}", *plain) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not model.config.tie_word_embeddings
    norm = model.model.layers[0].input_layernorm.weight
    assert torch.equal(norm, torch.ones_like(norm))
    ids = tokenize(resolve_corpus("pydoc-heldout"), load_tokenizer(tiny_asset()))
    nll = window_nll(model, evaluation_windows(ids, 64, 2)).mean()
    (ppl,) = _rows("select value from metric join run on run.id = metric.run_id where run.algo = 'quarot'")
    assert ppl[0] == pytest.approx(nll.exp().item(), rel=1e-5)
