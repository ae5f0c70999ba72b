import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf

from analysis import serving, stats
from analysis.commands import duration, share, size
from analysis.recommend import Wishes, dominates, recommend
from analysis.serving import kernel, kernel_names
from analysis.tables.recommendation import recommendation_table
from analysis.tables.render import write
from qbench.cli import main
from qbench.errors import EvaluationError, SpecError
from qbench.scheme import build_scheme
from qbench.stages.pipeline import stage_types
from qbench.store import queries
from qbench.store.records import Outcome, RunColumns
from tests.analysis.conftest import HERE, losses, measured

FULL = losses(3.0)


def row(store, algo: str, shift: float, seconds: float, megabytes: float, label: str = "int4_g64_sym", seed: int = 0):
    """A run `shift` above full precision; equal seeds give equal own noise."""
    own = np.random.default_rng(seed).normal(0, 0.004, len(FULL))
    cost = Outcome(quantize_s=seconds, model_bytes=int(megabytes * 1e6), bits_per_weight=4.25)
    return store(algo, 4, measured(FULL + shift + own - own.mean()), outcome=cost, weight_format=label)


@pytest.fixture
def planted(store):
    """20 recipes of three sizes and times whose qualities partly tie, and full precision."""
    store("none", None, measured(FULL))
    rng = np.random.default_rng(4)
    for place in range(20):
        shift = float(rng.choice([0.01, 0.0105, 0.03, 0.1, 0.4]))
        label = str(rng.choice(["int4_g64_sym", "int4_g64_asym", "int3_g64_sym"]))
        row(
            store,
            f"a{place}",
            shift + place * 1e-6,
            float(rng.choice([5, 50, 900])),
            float(rng.choice([60, 80, 120])),
            label,
            place,
        )


def brute(database, wishes: Wishes) -> tuple[list[str], set[str]]:
    """(names in rank order, names that do not fit), by loops over the tables and nothing of the recommender."""
    rows = {r.algo: r for r in queries.runs(database, status="done")}
    metrics = {m.run_id: m for m in queries.metrics(database, [r.id for r in rows.values()])}
    items = {name: queries.samples(database, metrics[r.id].id) for name, r in rows.items()}
    fits = []
    for name in rows.keys() - {"none"}:
        r = rows[name]
        lost = items[name] - items["none"]
        reached = math.exp(-lost.mean())
        if wishes.certain:
            _, high = stats.interval(stats.mean(lost), 0.9)
            reached = math.exp(-high)
        fine = wishes.max_bytes is None or r.model_bytes <= wishes.max_bytes
        fine &= wishes.max_calib_s is None or r.quantize_s <= wishes.max_calib_s
        fine &= wishes.min_recovery is None or reached >= wishes.min_recovery
        if wishes.kernel == "vllm:w4a16":
            fine &= r.weight_format in ("int4_g64_sym", "int4_g64_asym")
        if wishes.kernel == "sglang:w4a16":
            fine &= r.weight_format == "int4_g64_sym"
        if fine:
            fits.append(name)
    fits.sort(key=lambda name: items[name].mean())
    tied, rest = fits[:1], []
    if fits:
        p = stats.holm([stats.paired_t(items[name], items[fits[0]]).p for name in fits[1:]])
        for name, each in zip(fits[1:], p, strict=True):
            (rest if each < 0.05 else tied).append(name)
    tied.sort(key=lambda name: (rows[name].model_bytes, rows[name].quantize_s, items[name].mean()))
    return tied + rest, rows.keys() - {"none"} - set(fits)


def test_the_recommender_is_brute_force(database, planted):
    seen = set()
    for bytes_, kernel_, recovery, seconds, certain in product(
        (None, 70e6, 100e6), (None, "vllm:w4a16", "sglang:w4a16"), (None, 0.99, 0.95), (None, 60.0), (False, True)
    ):
        if certain and recovery is None:
            continue
        wishes = Wishes(max_bytes=bytes_, kernel=kernel_, min_recovery=recovery, max_calib_s=seconds, certain=certain)
        found = recommend(database, wishes)
        ranked, misfits = brute(database, wishes)
        assert [each.candidate.runs[0].algo for each in found.ranked] == ranked, wishes
        assert {each.candidate.runs[0].algo for each in found.rejected} == misfits, wishes
        assert all(each.reasons for each in found.rejected)
        assert all(each.reason for each in found.ranked)
        seen.add(tuple(ranked))
    assert len(seen) > 10, "the wishes must matter"


def test_of_tied_recipes_the_cheaper_one_is_first_and_the_others_say_why_not(database, store):
    store("none", None, measured(FULL))
    row(store, "best", 0.010, 50, 80, seed=1)
    row(store, "small", 0.0101, 900, 60, seed=2)
    row(store, "worse", 0.2, 900, 90, seed=3)
    row(store, "quick", 0.1, 1, 60, seed=4)
    found = recommend(database, Wishes())
    assert [each.candidate.runs[0].algo for each in found.ranked] == ["small", "best", "quick", "worse"]
    reasons = {each.candidate.runs[0].algo: each.reason for each in found.ranked}
    assert reasons["best"] == "best value, but 20 MB larger"
    assert "cheapest of the tied" in reasons["small"]
    assert "to the best value, best 4-bit" in reasons["small"]
    assert "899 s faster to quantize than the first" in reasons["quick"]
    assert "dominated by small" in reasons["worse"]
    by_name = {each.candidate.runs[0].algo: each.candidate for each in found.ranked}
    assert dominates(by_name["small"], by_name["worse"])
    assert not dominates(by_name["small"], by_name["small"])


def test_every_wish_that_fails_is_named_and_near_misses_come_first(database, store):
    store("none", None, measured(FULL))
    row(store, "far", 0.4, 900, 120, "int3_g64_sym")
    row(store, "near", 0.001, 5, 120)
    found = recommend(database, Wishes(max_bytes=1e8, kernel="vllm:w4a16", min_recovery=0.99, max_calib_s=600))
    assert found.ranked == ()
    assert [each.candidate.runs[0].algo for each in found.rejected] == ["near", "far"]
    assert found.rejected[0].reasons == ("120 MB > 100 MB",)
    assert [word in " ".join(found.rejected[1].reasons) for word in ("int3", "MB", "900 s", "recovery")] == [True] * 4
    table = recommendation_table(found)
    assert "0 of 2 recipes fit" in table.caption
    assert "Nearest: near" in table.caption


def test_costs_that_are_not_known_fail_their_limits(database, store):
    store("rtn", 4, measured(FULL + 0.1), outcome=Outcome())
    assert len(recommend(database, Wishes()).ranked) == 1
    found = recommend(database, Wishes(max_bytes=1e9, max_calib_s=1e9))
    assert found.rejected[0].reasons == ("size not known", "time to quantize not known")
    with pytest.raises(SpecError, match="min-recovery"):
        recommend(database, Wishes(min_recovery=0.5))


def test_empty_and_one_row_databases_are_answered(database, store, tmp_path):
    assert recommend(database, Wishes()) is None
    assert "nothing to recommend" in recommendation_table(None).caption
    write(recommendation_table(None), tmp_path, "empty")
    store("rtn", 4, measured(FULL))
    table = recommendation_table(recommend(database, Wishes()))
    assert [entry.text for entry in table.rows[0]][:2] == ["1", "rtn"]
    write(table, tmp_path, "one")


def test_what_cannot_be_ranked_together_has_to_be_named(database, store):
    store("rtn", 4, measured(FULL), measured(FULL, task="wiki"))
    with pytest.raises(SpecError, match=r"task=null: say which: .*c4-sample.*wiki"):
        recommend(database, Wishes())
    assert recommend(database, Wishes(), task="wiki").field.task == "wiki"
    store("rtn", 4, measured(FULL), model="big")
    with pytest.raises(SpecError, match="model=null: say which"):
        recommend(database, Wishes(), task="c4-sample")
    assert recommend(database, Wishes(), model="big").field.model == "big"


def test_mixtures_are_refused_unless_allowed(database, store):
    store("rtn", 4, measured(FULL))
    store("gptq", 4, measured(FULL), environment=replace(HERE, git_dirty=True))
    with pytest.raises(EvaluationError, match="allow=dirty"):
        recommend(database, Wishes())
    table = recommendation_table(recommend(database, Wishes(), allow=["dirty"]))
    assert {row[1].text: row[1].notes for row in table.rows} == {"rtn": (), "gptq": (1,)}


@pytest.mark.parametrize(
    "wishes", [{"max_bytes": 0}, {"max_calib_s": -1}, {"min_recovery": math.inf}, {"certain": True}, {"kernel": "x:y"}]
)
def test_wishes_out_of_range_are_refused(database, wishes):
    with pytest.raises(SpecError):
        recommend(database, Wishes(**wishes))


KERNELS = [
    ("vllm:w4a16", {"weight_format": "int4_g128_asym"}, True),
    ("vllm:w4a16", {"weight_format": "int4_g128_sym_narrow_mse"}, True),
    ("vllm:w4a16", {"weight_format": "int4_channel_sym"}, True),
    ("vllm:w4a16", {"weight_format": "int4_g16_sym"}, False),
    ("vllm:w4a16", {"weight_format": "int4_g128_asym-float"}, False),
    ("vllm:w4a16", {"weight_format": "int4_g64_asym_int8"}, False),
    ("vllm:w4a16", {"weight_format": "int4_g64_sym_full"}, False),
    ("vllm:w4a16", {"weight_format": "int4_g64_sym+mixed"}, False),
    ("vllm:w4a16", {"weight_format": "int4_g64_sym", "act_format": "int8_token"}, False),
    ("vllm:w4a16", {"weight_format": "int4_g64_sym", "kv_format": "int4_kivi_g32_r128"}, False),
    ("vllm:w4a16", {"weight_format": None}, False),
    ("vllm:w8a8", {"weight_format": "int8_channel_sym", "act_format": "int8_token"}, True),
    ("vllm:w8a8", {"weight_format": "int8_channel_sym"}, False),
    ("vllm:fp8", {"weight_format": "e4m3_channel", "act_format": "e4m3_token"}, True),
    ("vllm:fp8", {"weight_format": "e4m3_channel_e8m0", "act_format": "e4m3_token"}, False),
    ("vllm:nvfp4", {"weight_format": "nvfp4"}, True),
    ("sglang:w4a16", {"weight_format": "int4_g128_asym"}, False),
    ("autoawq:gemm", {"weight_format": "int4_g128_asym"}, True),
    ("autoawq:gemm", {"weight_format": "int4_g128_sym"}, False),
]


@pytest.mark.parametrize(("name", "columns", "served"), KERNELS)
def test_kernels_take_their_formats_alone(database, name, columns, served):
    claim = database.begin(RunColumns(model="tiny", algo="x", spec={}, **columns), "a" * 64, HERE)
    database.finish(claim, Outcome(), [])
    (run,) = queries.runs(database)
    assert (kernel(name).refusal(run) is None) == served


@pytest.mark.parametrize(
    ("stage", "options", "served"),
    [
        ("quarot", {"online_down": True, "online_o": "heads"}, False),
        ("quarot", {"online_down": False, "online_o": "none"}, True),
        ("duquant", {}, False),
        ("gptq", {}, True),
    ],
)
def test_what_is_left_for_run_time_is_not_served(database, stage, options, served):
    spec = {"pipeline": [{"name": stage, "version": 1, "options": options}]}
    columns = RunColumns(model="tiny", algo="x", spec=spec, weight_format="int4_g64_sym")
    database.finish(database.begin(columns, "a" * 64, HERE), Outcome(), [])
    assert (kernel("vllm:w4a16").refusal(queries.runs(database)[0]) is None) == served


@pytest.mark.parametrize(
    ("scheme", "kernels"),
    [
        ("w4a16_g128", {"vllm:w4a16", "autoawq:gemm"}),
        ("w3a16_g64", set()),
        ("w8a8", {"vllm:w8a8"}),
        ("w8a8_static", {"vllm:w8a8"}),
        ("w4a4", set()),
        ("fp8", {"vllm:fp8", "tensorrt-llm:fp8"}),
        ("nvfp4", {"vllm:nvfp4"}),
        ("kv4", set()),
    ],
)
def test_kernels_know_formats_by_the_names_that_schemes_give_them(database, scheme, kernels):
    conf = Path(__file__).parents[2] / "conf"
    values = OmegaConf.merge(OmegaConf.load(conf / "config.yaml"), OmegaConf.load(conf / "scheme" / f"{scheme}.yaml"))
    built = build_scheme(OmegaConf.to_container(values))
    labels = [None if each is None else each.label for each in (built.weight, built.input, built.cache)]
    names = dict(zip(("weight_format", "act_format", "kv_format"), labels, strict=True))
    database.finish(database.begin(RunColumns(model="tiny", algo="x", spec={}, **names), "a" * 64, HERE), Outcome(), [])
    (run,) = queries.runs(database)
    assert {name for name in kernel_names() if kernel(name).refusal(run) is None} == kernels


def test_stages_that_work_at_run_time_are_stages():
    data = yaml.safe_load((Path(serving.__file__).parent / "data" / "runtimes.yaml").read_text())
    assert set(data["at_run_time"]) <= set(stage_types())


def test_sizes_times_and_shares_are_read_with_their_units():
    assert [size(text) for text in ("100MB", "1 MiB", "4.2gb", "7")] == [100e6, 2**20, 4.2e9, 7]
    assert [duration(text) for text in ("10min", "90s", "1.5h", "7")] == [600, 90, 5400, 7]
    assert [share(text) for text in ("0.99", "99%")] == [0.99, pytest.approx(0.99)]
    for read, text in ((size, "100 apples"), (duration, "-3s"), (share, "most")):
        with pytest.raises(SpecError, match="such as"):
            read(text)


def test_the_commands_answer_on_a_terminal_and_in_json(database, planted, tmp_path, capsys):
    store = ["--store", f"sqlite:///{tmp_path}/results.db"]
    wishes = ["--max-size", "100MB", "--kernel", "vllm:w4a16", "--min-recovery", "0.99", "--max-calib", "10min"]
    assert main(["recommend", *store, *wishes, "--out", str(tmp_path / "out")]) == 0
    assert "recipes fit" in capsys.readouterr().out
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".csv", ".html", ".md", ".tex"]
    assert main(["recommend", *store, *wishes, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = Wishes(max_bytes=100e6, kernel="vllm:w4a16", min_recovery=0.99, max_calib_s=600)
    assert [each["algo"] for each in found["recipes"]] == brute(database, wanted)[0]
    assert main(["recommend", *store, "--max-size", "1MB"]) == 1, "nothing fits"
    assert main(["best", *store, "--budget", "1min", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))["rows"]
    assert {each["standing"] for each in rows} >= {"best", "tied"}
    assert main(["best", *store]) == 0
    assert main(["best", *store, "--alpha", "2"]) == 2
    assert main(["recommend", *store, "--max-size", "big"]) == 2
