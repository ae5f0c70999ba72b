import itertools

from analysis.tables.labels import point_labels, shared_settings
from qbench.store import queries


def labels(database, store, *points):
    """Store the points (algo, bits, columns, spec) and label them."""
    for algo, bits, columns, spec in points:
        store(algo, bits, spec=spec, **columns)
    rows = queries.runs(database)
    return point_labels(rows), shared_settings(rows)


def test_what_varies_is_in_the_label_what_is_shared_in_the_caption(database, store):
    found, shared = labels(
        database,
        store,
        ("none", None, {}, {}),
        ("rtn", 4, {"group_size": 64}, {}),
        ("gptq", 4, {"group_size": -1, "calib": "c4-sample", "calib_n": 16}, {}),
        ("gptq", 4, {"group_size": 0, "calib": "code-sample", "calib_n": 16}, {}),
    )
    assert found == [
        "full precision",
        "rtn 4-bit g64",
        "gptq 4-bit per-channel calib c4-sample",
        "gptq 4-bit per-tensor calib code-sample",
    ]
    assert shared == ["model tiny", "asym", "n 16", "float32"]


def test_models_and_dtypes_tell_baselines_apart(database, store):
    models = itertools.product(("tiny", "big"), ("float32", "bfloat16"))
    points = [("none", None, {"model": model, "dtype": dtype}, {}) for model, dtype in models]
    found, shared = labels(database, store, *points)
    assert found == [f"{model}: full precision {dtype}" for model, dtype in
                     itertools.product(("tiny", "big"), ("float32", "bfloat16"))]  # fmt: skip
    assert shared == []


def test_options_are_named_where_columns_do_not_tell_points_apart(database, store):
    def spec(damp, order):
        options = [["damp", damp], ["act_order", order], ["block_size", 128]]
        return {"seed": 0, "pipeline": [{"name": "round_gptq", "version": 1, "options": options}]}

    found, _ = labels(
        database,
        store,
        ("gptq", 4, {}, spec(0.01, False)),
        ("gptq", 4, {}, spec(0.1, False)),
        ("gptq", 4, {}, spec(0.1, True)),
        ("gptq", 3, {}, spec(0.01, False)),
    )
    assert found == [
        "gptq 4-bit damp=0.01 act_order=False",
        "gptq 4-bit damp=0.1 act_order=False",
        "gptq 4-bit damp=0.1 act_order=True",
        "gptq 3-bit",
    ]


def test_a_stage_that_some_lack_is_named_once_with_what_varies_in_it(database, store):
    def spec(*clip):
        stages = [{"name": "awq_scale", "version": 1, "options": [["n_grid", 20]]}]
        for clip_range in clip:
            options = [["n_grid", 20], ["clip_range", clip_range]]
            stages.append({"name": "awq_clip", "version": 2, "options": options})
        return {"seed": 0, "pipeline": stages}

    found, _ = labels(
        database,
        store,
        ("awq", 4, {}, spec()),
        ("awq", 4, {}, spec("symmetric")),
        ("awq", 4, {}, spec("asymmetric")),
        ("awq", 3, {}, spec()),
        ("awq", 3, {}, spec("symmetric")),
    )
    assert found == [
        "awq 4-bit",
        "awq 4-bit +awq_clip clip_range=symmetric",
        "awq 4-bit +awq_clip clip_range=asymmetric",
        "awq 3-bit",
        "awq 3-bit +awq_clip",
    ]


def test_labels_are_distinct_whatever_the_points(database, store):
    choices = itertools.product(("rtn", "gptq"), (3, 4), (64, -1), (True, False), ({"x": 1}, {"x": 2}, {"y": [1]}))
    points = [
        (algo, bits, {"group_size": group, "symmetric": symmetric}, spec)
        for algo, bits, group, symmetric, spec in choices
    ]
    found, _ = labels(database, store, *points)
    assert len(set(found)) == len(found) == 48
