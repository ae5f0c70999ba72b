"""`algo=a+b+c`: which stages a composed name means, in which order, and under which names its options are set."""

from itertools import permutations

import pytest
from omegaconf import OmegaConf

from qbench.command import conf_dir
from qbench.composition import composed, is_composition
from qbench.errors import SpecError
from qbench.stages.pipeline import build_pipeline


def _node(name, **options):
    node = OmegaConf.create({"algo": composed(name, conf_dir() / "algo")})
    for key, value in options.items():
        OmegaConf.update(node, f"algo.{key.replace('__', '.')}", value)
    return OmegaConf.to_container(node, resolve=True)["algo"]


def _stages(name, **options):
    return build_pipeline(_node(name, **options)["pipeline"]).stages


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("awq+gptq", ["awq_scale", "awq_clip", "gptq"]),
        ("smoothquant+awq_clip+gptq", ["smoothquant", "awq_clip", "gptq"]),
        ("smooth+awq_clip+gptq", ["smoothquant", "awq_clip", "gptq"]),
        ("smoothquant+awq_clip", ["smoothquant", "awq_clip", "rtn"]),
        ("awq_scale+magr", ["awq_scale", "magr", "gptq"]),
        ("awq_scale+magr+rtn", ["awq_scale", "magr", "rtn"]),
        ("awq+rtn", ["awq_scale", "awq_clip", "rtn"]),
        ("awq_scale+smoothquant", ["awq_scale", "smoothquant", "rtn"]),
        ("smoothquant+magr+awq_clip", ["smoothquant", "magr", "awq_clip", "gptq"]),
        ("quarot+gptq", ["quarot", "gptq"]),
        ("quarot+awq_clip+gptq", ["quarot", "awq_clip", "gptq"]),
        ("awq+omniquant", ["awq_scale", "awq_clip", "omniquant", "rtn"]),
        ("omniquant+gptq", ["omniquant", "gptq"]),
        ("omniquant+tesseraq", ["awq_scale", "omniquant", "tesseraq"]),
        ("quarot+tesseraq", ["quarot", "awq_scale", "awq_clip", "tesseraq"]),
        ("duquant+gptq", ["smoothquant", "duquant", "gptq"]),
        ("awq_scale+duquant", ["awq_scale", "duquant", "rtn"]),
        ("autoround+normtweaking", ["autoround", "normtweaking"]),
        ("awq+normtweaking", ["awq_scale", "awq_clip", "gptq", "normtweaking"]),
        ("mse_clip+gptq", ["mse_clip", "gptq"]),
        ("smoothquant+dgq", ["smoothquant", "percentile_smooth", "dgq"]),
    ],
)
def test_parts_follow_each_other_and_what_only_accompanies_one_gives_way(name, stages):
    assert [stage.name for stage in _stages(name)] == stages


def test_an_alias_is_its_algorithm():
    assert is_composition("algo", "smooth")
    assert not is_composition("algo", "smoothquant")
    assert (
        _node("smooth")
        == OmegaConf.to_container(
            OmegaConf.create({"algo": OmegaConf.load(conf_dir() / "algo" / "smoothquant.yaml")}), resolve=True
        )["algo"]
    )


def test_equal_pipelines_are_equal_however_they_are_written():
    assert _stages("awq+gptq") == _stages("awq_scale+awq_clip+gptq") == _stages("awq+gptq", awq__duo=False)
    assert _stages("awq+gptq") != _stages("awq+gptq", awq__duo=True)


def test_options_are_set_by_part():
    smooth, clip, gptq = _stages(
        "smoothquant+awq_clip+gptq", smoothquant__alpha=0.8, awq_clip__n_grid=7, gptq__damp=0.1
    )
    assert (smooth.alpha, clip.n_grid, gptq.damp) == (0.8, 7, 0.1)
    magr, gptq = _stages("magr+gptq", magr__alpha=0.5, gptq__damp=0.2)
    assert (magr.alpha, gptq.damp) == (0.5, 0.2)
    assert [stage.name for stage in _stages("awq+gptq", awq__clip=False)] == ["awq_scale", "gptq"]


def test_options_of_what_gave_way_are_gone():
    node = composed("magr+gptq", conf_dir() / "algo")
    assert list(node["magr"]) == ["alpha", "alpha_group", "iterations", "beta"]
    assert "damp" in node["gptq"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gptq+awq", "ROTATE < TRANSFORM"),
        ("awq+magr", r"write the single stages: algo=awq_scale\+magr\+awq_clip\+gptq$"),
        ("awq+duquant", r"write the single stages: algo=awq_scale\+duquant\+awq_clip\+rtn$"),
        ("gptq+awq+rtn", "RECONSTRUCT$"),
        ("gptq+rtn", "exactly one stage that rounds"),
        ("awq_scale+awq", "every stage once"),
        ("awq_clip+mse_clip", "no awq_clip: mse_clip chooses ranges by itself"),
        ("omniquant+awq_clip", "no omniquant: awq_clip chooses ranges by itself"),
        ("awq_clip+quip", "no awq_clip: quip chooses ranges by itself"),
        ("quarot+spinquant", "one stage at most that rotates the model"),
        ("duquant+awq_scale", "awq_scale before duquant"),
        ("duquant+omniquant", "omniquant before duquant"),
        ("awq+awq", "every part once; awq comes twice"),
        ("smooth+smoothquant", "every part once; smoothquant comes twice"),
        ("awq+nosuch", "nosuch is unknown; .*awq, .*stages awq_clip"),
        ("awq+", "an empty part is unknown"),
        ("none+gptq", "none stands alone"),
    ],
)
def test_what_makes_no_pipeline_is_refused_with_the_reason(name, why):
    with pytest.raises(SpecError, match=why):
        _stages(name)


def test_what_an_error_suggests_instead_is_the_same_stages_in_legal_order():
    names = sorted(path.stem for path in (conf_dir() / "algo").glob("*.yaml"))
    suggested = 0
    for first, second in permutations(names, 2):
        try:
            _stages(f"{first}+{second}")
        except SpecError as error:
            given, found, remedy = str(error).partition("write the single stages: algo=")
            if found:
                suggested += 1
                stages = [stage.name for stage in _stages(remedy)]
                assert stages == remedy.split("+")
                assert sorted(stages) == sorted(given.partition(":")[0].removeprefix("algo.pipeline=").split("+"))
    assert suggested > 50
