"""The integer element formats, exhaustively."""

import pytest
import torch

from qbench.formats import Int


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [False, True])
def test_codebook_is_every_integer_of_the_format_once_in_order(bits, signed):
    element = Int(bits, signed)
    expected = [k - (2 ** (bits - 1) if signed else 0) for k in range(2**bits)]
    assert element.codebook.tolist() == expected
    assert (element.minimum, element.maximum) == (expected[0], expected[-1])
    assert element.steps == len(expected) - 1


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [False, True])
def test_every_code_survives_its_storage(bits, signed):
    element = Int(bits, signed)
    stored = element.codebook.to(element.storage)
    assert stored.dtype.itemsize == 1
    assert torch.equal(stored.float(), element.codebook)
