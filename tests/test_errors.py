"""Errors in the words of the command line, and with the place where they happened."""

import pytest
from omegaconf import OmegaConf

from qbench.checks import choice
from qbench.errors import NumericsError, SpecError, StructureError, numerics_at, written


@pytest.mark.parametrize(
    "value", [True, False, None, 1, 0.5, "int", [], [1, None, "a"], [True, [False]], {"bits": 8, "skip": True}]
)
def test_values_are_written_as_yaml_reads_them(value):
    read = OmegaConf.to_container(OmegaConf.create(f"value: {written(value).replace(':', ': ')}"))["value"]
    assert read == value


def test_a_refusal_speaks_yaml():
    assert str(SpecError("algo.let", False, "auto")) == "algo.let=false: auto"
    assert str(SpecError("bits", None, "2 to 8")) == "bits=null: 2 to 8"
    with pytest.raises(SpecError, match=r"^x=2: must be one of auto, true, false, null$"):
        choice("x", 2, ("auto", True, False, None))


def test_numbers_that_must_not_go_on_say_where_they_were_met():
    with pytest.raises(NumericsError, match=r"^block 3, q: singular$") as raised, numerics_at("block 3, q"):
        raise NumericsError("singular")
    assert isinstance(raised.value.__cause__, NumericsError)
    with pytest.raises(StructureError, match=r"^other$"), numerics_at("block 3, q"):
        raise StructureError("other")
