import pytest

from qbench.errors import AssetError, SpecError
from qbench.store import queries
from qbench.store.records import Outcome, RunColumns
from tests.store.workers import measurement


@pytest.fixture
def filled(database):
    """Runs 1 to 4: rtn done, none done, gptq failed and then running; keys aaa…, aab…, bbb…"""
    points = [("aaa", "rtn", 4, True), ("aab", "none", None, None), ("bbb", "gptq", 3, False)]
    for prefix, algo, bits, symmetric in points:
        columns = RunColumns(model="tiny", algo=algo, spec={}, bits=bits, symmetric=symmetric)
        claim = database.begin(columns, prefix * 20 + "0000")
        if algo == "gptq":
            database.fail(claim, "NumericsError", "singular", "trace")
            database.begin(columns, prefix * 20 + "0000")
        else:
            database.finish(claim, Outcome(), [measurement(), measurement(2.5, name="nll", samples=None)])
    return database


def test_runs_are_filtered_by_every_given_value(filled):
    assert [row.id for row in queries.runs(filled)] == [1, 2, 4]
    assert [row.id for row in queries.runs(filled, superseded=True)] == [1, 2, 3, 4]
    assert [row.id for row in queries.runs(filled, status="done", algo="rtn", model="tiny")] == [1]
    assert queries.runs(filled, status="done", algo="gptq") == []


def test_a_run_is_found_by_id_or_by_the_beginning_of_its_key(filled):
    assert queries.run_named(filled, "3").status == "failed"
    assert queries.run_named(filled, "bb").id == 4
    assert queries.run_named(filled, "aab").id == 2


@pytest.mark.parametrize("reference", ["aa", "zzz", "99", "", "%", "_aa", "9" * 40, "²"])
def test_an_unknown_or_ambiguous_name_is_refused(filled, reference):
    with pytest.raises(SpecError):
        queries.run_named(filled, reference)


def test_metrics_without_samples_say_so(filled):
    assert [(each.run_id, each.name) for each in queries.metrics(filled, [2, 1])] == [
        (1, "ppl"), (1, "nll"), (2, "ppl"), (2, "nll"),
    ]  # fmt: skip
    with pytest.raises(AssetError, match="metric 2"):
        queries.samples(filled, 2)


def test_samples_without_clusters_say_so(filled):
    found = queries.clustered_samples_of(filled, [1, 2, 3])
    assert sorted(found) == [1, 3], "metric 2 has no samples"
    assert found[1].clusters is None
    assert found[1].values.tolist() == queries.samples(filled, 1).tolist()


def test_the_frame_keeps_whole_numbers_whole_and_truth_true(filled):
    frame = queries.frame(filled, metric="ppl")
    assert list(frame["algo"]) == ["rtn", "none"]
    assert frame["bits"].dtype == "Int64"
    assert frame["bits"].isna().tolist() == [False, True]
    assert frame["symmetric"].iloc[0] is True or frame["symmetric"].iloc[0] == True  # noqa: E712
    assert queries.frame(filled, algo="none", metric="nll")["value"].tolist() == [2.5]
    with pytest.raises(SpecError, match="weight_format"):
        queries.frame(filled, format="int4")
