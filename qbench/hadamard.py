"""Hadamard matrices: entries +-1 with H Hᵀ = n I, built on request instead of stored.

Three classical constructions reach almost every width that a model has:

- Sylvester (1867): order 2^a by doubling, H_2n = [[H, H], [H, -H]].
- Paley (J. Math. Phys. 12, 1933): with q a prime power and chi the quadratic character of GF(q),
  I: order q + 1 for q = 3 mod 4, II: order 2 (q + 1) for q = 1 mod 4.
- Kronecker products of Hadamard matrices.

What is not reached (92, 116, 156, 172, 184, 188, ...) needs tables found by computer search (Williamson,
Baumert-Hall); twice or four times such an order usually is reached: 344 = 7^3 + 1, 368 = 367 + 1.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from qbench.errors import SpecError


def hadamard(n: int) -> Tensor:
    """int8 [n, n] of +-1 with H Hᵀ = n I: kron(base, Sylvester 2^a) where n = base order * 2^a by `decompose`.

    Symmetric only where the base is: in general the inverse of H / sqrt(n) is its transpose.
    Raises SpecError for an order that no construction reaches.
    """
    base, doublings = decompose(n)
    return torch.kron(_base(base), _sylvester(doublings))


def decompose(n: int) -> tuple[int, int]:
    """(k, a) with n = k * 2^a and k the smallest order from which doubling reaches n: 1, or 4 * odd, 8 * odd, ...

    A small k makes the fast transform fast: n (k + a) additions. hadamard(k) is its base matrix.
    Raises SpecError for an order that no construction reaches.
    """
    found = _decompose(n)
    if found is None:
        below = next(m for m in range(n - 1, 0, -1) if _decompose(m)) if n > 1 else None
        above = next(m for m in itertools.count(max(n, 0) + 1) if _decompose(m))
        reason = (
            "no Hadamard matrix exists (1, 2 and multiples of 4 only)"
            if n < 1 or n % 4
            else "not reached by Sylvester, Paley I and II and Kronecker products"
        )
        near = f"{below} and {above}" if below else f"{above}"
        raise SpecError("hadamard order", n, f"{reason}; nearest that work: {near}")
    return found


def _decompose(n: int) -> tuple[int, int] | None:
    if n < 1:
        return None
    twos = (n & -n).bit_length() - 1
    odd = n >> twos
    if odd == 1:
        return 1, twos
    return next(((odd << s, twos - s) for s in range(2, twos + 1) if _has_base(odd << s)), None)


def _has_base(n: int) -> bool:
    return n == 1 or _paley_field(n) is not None or _factors(n) is not None


def _base(n: int) -> Tensor:
    """int8 [n, n] for an order that `_has_base`."""
    if n & (n - 1) == 0:
        return _sylvester(n.bit_length() - 1)
    field = _paley_field(n)
    if field is not None:
        prime, degree = field
        return _paley_one(prime, degree) if prime**degree + 1 == n else _paley_two(prime, degree)
    left, right = _factors(n) or (0, 0)
    return torch.kron(hadamard(left), hadamard(right))


def _factors(n: int) -> tuple[int, int] | None:
    """The first two orders, neither a power of two, whose product is n: doubling alone is `_decompose`'s."""
    for left in range(12, int(n**0.5) + 1, 4):
        right = n // left
        if left * right == n and left & (left - 1) and right & (right - 1) and _decompose(left) and _decompose(right):
            return left, right
    return None


def _paley_field(n: int) -> tuple[int, int] | None:
    """(p, e) of the field whose quadratic character gives order n, or None."""
    if n % 4:
        return None
    return _prime_power(n - 1) or (_prime_power(n // 2 - 1) if (n // 2 - 1) % 4 == 1 else None)


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with q = p^e and p prime, or None."""
    if q < 2:
        return None
    prime = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    degree = 0
    while q % prime == 0:
        q, degree = q // prime, degree + 1
    return (prime, degree) if q == 1 else None


def _sylvester(doublings: int) -> Tensor:
    """int8 [2^a, 2^a]: entry (i, j) is (-1)^(number of ones in i and j)."""
    two = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    matrix = torch.ones(1, 1, dtype=torch.int8)
    for _ in range(doublings):
        matrix = torch.kron(two, matrix)
    return matrix


def _paley_one(prime: int, degree: int) -> Tensor:
    """I + [[0, 1], [-1, Q]]: the second part is skew for q = 3 mod 4, where chi(-1) = -1."""
    core = _jacobsthal(prime, degree)
    q = core.shape[0]
    skew = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, core
    return skew + torch.eye(q + 1, dtype=torch.int8)


def _paley_two(prime: int, degree: int) -> Tensor:
    """C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]] with C = [[0, 1], [1, Q]], symmetric for q = 1 mod 4."""
    core = _jacobsthal(prime, degree)
    q = core.shape[0]
    conference = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, core
    off = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(conference, off) + torch.kron(torch.eye(q + 1, dtype=torch.int8), diagonal)


def _jacobsthal(prime: int, degree: int) -> Tensor:
    """Q int8 [q, q] with Q[a, b] = chi(a - b), the elements of GF(p^e) counted by their base-p digits."""
    q = prime**degree
    character = torch.zeros(q, dtype=torch.int8)
    for exponent, element in enumerate(_powers_of_a_generator(prime, degree)):
        character[element] = -1 if exponent % 2 else 1  # squares are the even powers
    places = torch.tensor([prime**i for i in range(degree)])
    digits = torch.arange(q)[:, None] // places % prime
    difference = sum((digits[:, None, i] - digits[None, :, i]).remainder(prime) * prime**i for i in range(degree))
    return character[difference]


def _powers_of_a_generator(prime: int, degree: int) -> list[int]:
    """x^0 ... x^(q-2) of an element x that generates GF(q)*, as integers of base-p digits (lowest first).

    For degree 1, x runs over 2, 3, ...; else x is the residue of X modulo X^e = c_0 + ... + c_(e-1) X^(e-1), for
    coefficients tried in order: x has order q - 1 exactly where that polynomial is primitive (and so irreducible).
    """
    q = prime**degree
    for candidate in itertools.product(range(prime), repeat=degree):
        powers = _powers(candidate, prime, q)
        if len(powers) == q - 1:
            return [sum(digit * prime**i for i, digit in enumerate(power)) for power in powers]
    raise AssertionError(f"GF({q}) has a generator")


def _powers(reduction: tuple[int, ...], prime: int, q: int) -> list[tuple[int, ...]]:
    """1, x, x^2, ... until 1 returns; shorter than q - 1 (or cut there) where x does not generate."""
    one = (1, *(0 for _ in reduction[1:]))
    powers, power = [one], one
    while len(powers) < q:
        carry = power[-1]
        # Multiply by X, replace X^e. For degree 1 this is multiplication by reduction[0].
        power = tuple((low + carry * c) % prime for low, c in zip((0, *power[:-1]), reduction))
        if power == one:
            return powers
        powers.append(power)
    return []
