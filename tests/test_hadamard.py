"""Hadamard matrices: the defining identity for every order offered, structure, and orders that cannot be had."""

import pytest
import torch

from qbench.errors import SpecError
from qbench.hadamard import decompose, hadamard

NOT_REACHED = [92, 116, 156, 172, 184, 188, 232, 236]
"""Multiples of 4 up to 256 that Sylvester, Paley I and II (prime powers included) and products leave out."""
NEEDED = [1, 2, 44, 60, 76, 108, 140, 148, *(k * 2**a for k in (12, 20, 28, 36) for a in range(6)), 344, 688, 924]


def _offered(limit):
    for n in range(1, limit + 1):
        try:
            decompose(n)
        except SpecError:
            continue
        yield n


def test_rows_of_every_order_offered_are_orthogonal():
    for n in _offered(700):
        matrix = hadamard(n)
        assert matrix.dtype == torch.int8
        assert matrix.shape == (n, n)
        exact = matrix.double()
        assert torch.equal(exact.abs(), torch.ones(n, n, dtype=torch.double))
        assert torch.equal(exact @ exact.T, n * torch.eye(n, dtype=torch.double)), n


@pytest.mark.parametrize("n", [720, 728, 784, 844, 864, 900, 924, 1000, 1024])
def test_rows_of_larger_orders_are_orthogonal(n):
    """Paley II over 359 and 461 ..., products of 28 and 36 with themselves and others, Sylvester."""
    exact = hadamard(n).double()
    assert torch.equal(exact @ exact.T, n * torch.eye(n, dtype=torch.double))


def test_the_orders_offered_are_all_that_the_constructions_reach():
    offered = set(_offered(256))
    assert offered == {1, 2, *range(4, 257, 4)} - set(NOT_REACHED)
    assert set(NEEDED) <= set(_offered(max(NEEDED)))


@pytest.mark.parametrize("n", [8, 24, 96, 144, 160, 344 * 4, 576])
def test_a_matrix_is_its_base_times_sylvester(n):
    k, a = decompose(n)
    assert k * 2**a == n
    two = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    expected = hadamard(k)
    for _ in range(a):
        expected = torch.kron(expected, two)
    assert torch.equal(hadamard(n), expected)


@pytest.mark.parametrize(
    ("n", "parts"),
    [(1, (1, 0)), (2, (1, 1)), (4096, (1, 12)), (576, (36, 4)), (1536, (12, 7)), (11008, (344, 5)), (14336, (28, 9))],
)
def test_the_base_is_the_smallest_order_that_doubling_leads_from(n, parts):
    assert decompose(n) == parts


@pytest.mark.parametrize("q", [11, 19, 43])
def test_paley_one_is_its_definition_for_primes(q):
    """Euler's criterion: chi(d) = d^((q - 1) / 2) mod q."""
    chi = [{0: 0, 1: 1, q - 1: -1}[pow(d, (q - 1) // 2, q)] for d in range(q)]
    core = [[chi[(a - b) % q] + (a == b) for b in range(q)] for a in range(q)]
    matrix = hadamard(q + 1)
    assert matrix[1:, 1:].tolist() == core
    assert matrix[0].tolist() == [1] * (q + 1)
    assert matrix[1:, 0].tolist() == [-1] * q


@pytest.mark.parametrize("n", [12, 20, 44, 60, 108, 28, 36, 52, 100])
def test_paley_matrices_are_skew_or_symmetric(n):
    """Type I for 3 mod 4: H - I is skew. Type II for 1 mod 4: H is symmetric."""
    matrix, prime_power = hadamard(n), n - 1
    if prime_power in (11, 19, 27, 43, 59, 107):
        skew = matrix - torch.eye(n, dtype=torch.int8)
        assert torch.equal(skew, -skew.T)
    else:
        assert torch.equal(matrix, matrix.T)


@pytest.mark.parametrize(
    ("n", "message"),
    [
        (172, "hadamard order=172: not reached .*; nearest that work: 168 and 176"),
        (9, "hadamard order=9: no Hadamard matrix exists .*; nearest that work: 8 and 12"),
        (3, "nearest that work: 2 and 4"),
        (0, "hadamard order=0: .*; nearest that work: 1$"),
        (-4, "hadamard order=-4: .*; nearest that work: 1$"),
    ],
)
def test_other_orders_are_refused_with_orders_that_work(n, message):
    for function in (hadamard, decompose):
        with pytest.raises(SpecError, match=message):
            function(n)
