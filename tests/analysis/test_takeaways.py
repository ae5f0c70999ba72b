"""Files of takeaways: what is refused, by the file alone and beside declared tables."""

import pytest
import yaml

from analysis.findings.takeaways import Expectation, Takeaway, check, takeaways
from qbench.errors import AssetError, SpecError

ONE = {"id": "1", "title": "T", "statement": "S.", "source": "Q"}
BITS = ("W2", "W4")
AXES = {"t0": {"tiny": {"Algo": "ABC", "Bits": BITS}, "demo": {"Algo": "ABCD", "Bits": BITS}}}


@pytest.mark.parametrize(
    ("expects", "message"),
    [
        ({"table": "t9", "better": {"Algo": "A"}, "than": {"Algo": "B"}}, "t9"),
        ({"table": "t0", "better": {"Algo": "E"}, "than": {"Algo": "B"}}, "E"),
        ({"table": "t0", "better": {"Method": "A"}, "than": {"Method": "B"}}, "both sides"),
        ({"table": "t0", "better": {"Algo": "A"}, "than": {"Bits": "W2"}}, "both sides"),
        ({"table": "t0", "better": {"Algo": "A"}, "than": {"Algo": "B"}, "at": {"Algo": "C"}}, "both sides"),
        ({"table": "t0", "better": {"Algo": "A"}, "than": {"Algo": "B"}, "more_at": {"Bits": "W2"}}, "both sides"),
        ({"table": "t0", "better": {"Algo": "same as Text"}, "than": {"Algo": "B"}}, "same as Text"),
        ({"table": "t0", "better": {"Algo": "A"}}, "better with than"),
        ({"table": "t0", "cell": {"Algo": "A"}, "loses_less_than": 20}, "a share between 0 and 1"),
        ({"table": "t0", "cell": {"Algo": "A"}}, "cell with loses_less_than"),
        ({"better": {"Algo": "A"}, "than": {"Algo": "B"}}, "a table"),
        ({"table": "t0", "best": {"Algo": "A"}}, "unknown"),
        ({"table": "t0", "better": {"Algo": []}, "than": {"Algo": "B"}}, "a mapping of axes to labels"),
        ({"table": "t0", "better": "A", "than": {"Algo": "B"}}, "a mapping of axes to labels"),
        (7, "a mapping with table"),
    ],
)
def test_wrong_declarations_are_refused_in_one_line(tmp_path, expects, message):
    path = tmp_path / "takeaways.yaml"
    path.write_text(yaml.safe_dump({"takeaways": [ONE | {"expects": [expects]}]}))
    with pytest.raises(SpecError, match=message) as caught:
        check(takeaways(path), AXES)
    assert "\n" not in str(caught.value)


def test_a_label_of_one_size_alone_is_no_error():
    expects = Expectation(table="t0", kind="better", first={"Algo": ("D",)}, second={"Algo": ("B",)})
    check([Takeaway(**ONE, expects=(expects,))], AXES)


def test_a_takeaway_expects_something_or_says_what_it_needs(tmp_path):
    path = tmp_path / "takeaways.yaml"
    path.write_text(yaml.safe_dump({"takeaways": [ONE]}))
    with pytest.raises(SpecError, match="either expects, or needs"):
        takeaways(path)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (5, "takeaways=5: a mapping with takeaways"),
        ({}, "takeaways=null: a list of takeaways"),
        ({"takeaways": 5}, "takeaways=5: a list of takeaways"),
        ({"takeaways": None}, "takeaways=null: a list of takeaways"),
        ({"takeaways": [5]}, "takeaways=5: a mapping with id"),
        ({"takeaways": [ONE | {"title": None}]}, "takeaway 1.title=null: a text"),
        ({"takeaways": [ONE | {"source": ["Q"]}]}, "takeaway 1.source=[Q]: a text"),
        ({"takeaways": [ONE | {"expects": 7}]}, "takeaway 1.expects=7: a list of expectations"),
        ({"takeaways": [ONE | {"expects": None}]}, "takeaway 1.expects=null: a list of expectations"),
    ],
)
def test_files_of_another_shape_are_refused_in_one_line(tmp_path, node, message):
    path = tmp_path / "takeaways.yaml"
    path.write_text(yaml.safe_dump(node))
    with pytest.raises(SpecError) as caught:
        takeaways(path)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"takeaways: caf\xe9", "not UTF-8 (byte 14: "),
        (b"takeaways: [", "expected the node content"),
        (b"takeaways: 2024-13-45", "month must be in 1..12"),
    ],
)
def test_what_is_no_yaml_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "takeaways.yaml"
    path.write_bytes(content)
    with pytest.raises((AssetError, SpecError)) as caught:
        takeaways(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
