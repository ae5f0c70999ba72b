import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbench.errors import EvaluationError
from qbench.store.records import LayerMetric, pack, pack_clusters, unpack, unpack_clusters
from tests.store.workers import measurement

NOT_FINITE = [float("nan"), float("inf"), -float("inf"), 1.5e308]


@pytest.mark.parametrize("value", NOT_FINITE)
def test_numbers_that_are_not_finite_are_refused(value):
    with pytest.raises(EvaluationError, match="ppl on c4-sample"):
        measurement(value)
    with pytest.raises(EvaluationError, match="stderr of"):
        measurement(stderr=value)
    with pytest.raises(EvaluationError, match="block 3 q_proj"):
        LayerMetric(block=3, module="q_proj", name="error", value=value)


@pytest.mark.parametrize("value", NOT_FINITE[:3])
def test_samples_that_are_not_finite_are_refused(value):
    with pytest.raises(EvaluationError, match="sample 2 is"):
        measurement(samples=np.array([1.0, 2.0, value, 3.0]))


@pytest.mark.parametrize(
    "changes", [{"stderr": -0.1}, {"n": 0}, {"n": 3}, {"samples": np.ones((4, 1))}, {"samples": np.ones(5)}]
)
def test_counts_and_shapes_have_to_fit(changes):
    with pytest.raises(EvaluationError):
        measurement(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"clusters": np.zeros(3, dtype=np.int64)},
        {"clusters": np.zeros((4, 1), dtype=np.int64)},
        {"clusters": np.zeros(4)},
        {"clusters": np.zeros(4, dtype=np.int64), "samples": None},
    ],
)
def test_clusters_are_integers_one_per_sample(changes):
    with pytest.raises(EvaluationError, match="clusters"):
        measurement(**changes)
    assert measurement(clusters=np.arange(4, dtype=np.int32)).clusters is not None


def test_a_value_without_stderr_or_samples_is_fine():
    assert measurement(stderr=None, samples=None).stderr is None


@given(st.lists(st.floats(width=64, allow_nan=False), max_size=50))
def test_packed_samples_come_back_to_the_last_bit(values):
    array = np.array(values, dtype=np.float64)
    assert unpack(pack(array), len(values)).tobytes() == array.tobytes()
    with pytest.raises(EvaluationError):
        unpack(pack(array), len(values) + 1)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=50))
def test_packed_clusters_come_back(values):
    array = np.array(values, dtype=np.int64)
    found = unpack_clusters(pack_clusters(array), len(values))
    assert (found.tolist(), found.dtype) == (values, np.int64)
    with pytest.raises(EvaluationError, match="clusters"):
        unpack_clusters(pack_clusters(array), len(values) + 1)


def test_packing_does_not_depend_on_layout_or_byte_order():
    array = np.arange(6, dtype=np.float64)
    assert pack(array.astype(">f8")) == pack(array) == pack(np.repeat(array, 2)[::2])


def test_records_come_without_sqlalchemy():
    script = "import sys; import qbench.store.records; print('sqlalchemy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"
