"""The fast transform: against the dense matrix in float64, its inverse, and Triton within derived bounds."""

import pytest
import torch

from qbench import hadamard as orders
from qbench.errors import SpecError
from qbench.kernels import hadamard

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LENGTHS = [1, 2, 4, 8, 12, 16, 20, 24, 32, 44, 48, 60, 108, 128, 152, 192, 256, 344, 512, 576, 1024, 1536, 1728]
LONG = [4096, 4864, 5504, 14336]


def _base(n):
    k, _ = orders.decompose(n)
    return orders.hadamard(k) if k > 1 else None


def _x(rows, n, dtype=torch.float32):
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(n)).to(dtype)


def _check(found, x, n):
    """Error of each element against the dense product in float64."""
    k, a = orders.decompose(n)
    exact = x.double().cpu() @ orders.hadamard(n).double().T / n**0.5
    # Partial sums pass through at most three dots of k, 2^(a/2) and 2^(a/2) terms, each summed in float32 in any
    # order, and one multiplication; TF32 products of float32 taken apart leave 2^-21 in each dot.
    ulps = (k + 2 * 2 ** (-(-a // 2)) + 2) * 2**-24 + (3 * 2**-21 if x.is_cuda else 0)
    bound = ulps * x.double().cpu().abs().sum(1, keepdim=True) / n**0.5 + torch.finfo(x.dtype).eps / 2 * exact.abs()
    bound += torch.finfo(x.dtype).smallest_normal
    error = (found.double().cpu() - exact).abs()
    assert found.dtype == x.dtype
    assert (error <= bound).all(), (n, (error / bound).max())


@pytest.mark.parametrize("n", LENGTHS)
def test_reference_is_the_dense_product(n):
    for dtype in DTYPES:
        x = _x(3, n, dtype)
        _check(hadamard(x, _base(n)), x, n)
    x = _x(3, n).double()
    exact = x @ orders.hadamard(n).double().T / n**0.5
    assert torch.allclose(hadamard(x, _base(n)), exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("n", LENGTHS)
def test_the_transposed_base_is_the_inverse_and_norms_are_kept(n):
    base, x = _base(n), _x(4, n).double()
    y = hadamard(x, base)
    assert torch.allclose(y.norm(dim=1), x.norm(dim=1), rtol=1e-13)
    assert torch.allclose(hadamard(y, base if base is None else base.T), x, rtol=0, atol=1e-13)


def test_leading_axes_views_and_the_input_are_kept():
    x = _x(6, 48)
    before = x.clone()
    assert torch.equal(hadamard(x.view(2, 3, 48), _base(48)).view(6, 48), hadamard(x, _base(48)))
    assert torch.equal(x, before)
    assert torch.equal(hadamard(x.T.contiguous().T[::2], _base(48)), hadamard(x[::2].contiguous(), _base(48)))
    assert hadamard(x[:0], _base(48)).shape == (0, 48)
    one = torch.ones(2, 1)
    assert hadamard(one).data_ptr() != one.data_ptr()


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(SpecError, match=r"hadamard length=12: with a base of order 1: accepted: 1 \* 2\^a"):
        hadamard(_x(2, 12))
    with pytest.raises(SpecError, match="base of order 12"):
        hadamard(_x(2, 36), orders.hadamard(12))
    with pytest.raises(SpecError, match="base shape"):
        hadamard(_x(2, 12), torch.ones(12, 6))
    with pytest.raises(SpecError, match="hadamard dtype"):
        hadamard(_x(2, 8).long())
    with pytest.raises(SpecError, match="hadamard dtype"):
        hadamard(_x(2, 8).double(), backend="triton")


@pytest.mark.parametrize("n", LENGTHS)
def test_triton_is_the_dense_product(device, n):
    x = _x(5, n).to(device)
    _check(hadamard(x, _base(n), backend="triton"), x, n)


@pytest.mark.parametrize("n", [4, 12, 48, 128, 256, 576, 152])
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_of_one_row_in_every_dtype(device, n, dtype):
    """Lengths for every way a transform is taken apart."""
    x = _x(1, n, dtype).to(device)
    _check(hadamard(x, _base(n), backend="triton"), x, n)


@pytest.mark.parametrize("n", LONG)
def test_triton_is_the_reference_at_lengths_of_models(device, n):
    """The reference stands for the dense matrix, which would take gigabytes."""
    x = _x(2, n)
    expected = hadamard(x.double(), _base(n))
    found = hadamard(x.to(device), _base(n), backend="triton").cpu()
    assert ((found - expected).norm(dim=1) <= 2**-19 * x.norm(dim=1)).all()


def test_triton_at_other_strides(device):
    x = _x(96, 12).to(device)
    for view in [x.T, x.T[::2], x.T.view(2, 6, 96)[:, 1:]]:
        found = hadamard(view, _base(96), backend="triton")
        _check(found.reshape(-1, 96), view.reshape(-1, 96), 96)
    many = _x(70, 108).to(device)
    _check(hadamard(many, _base(108), backend="triton"), many, 108)


def test_triton_folds_what_a_program_cannot_hold_into_the_base(device, monkeypatch):
    """As for 16384, at a size that the interpreter is quick with."""
    from qbench.kernels.hadamard import triton

    monkeypatch.setattr(triton, "_LONGEST", 32)
    monkeypatch.setattr(triton, "_TILE", 64)
    for n in [256, 192]:
        x = _x(2, n).to(device)
        _check(hadamard(x, _base(n), backend="triton"), x, n)


def test_triton_has_the_gradient_of_the_reference(device):
    for n in (64, 48):
        x, weight = _x(3, n).to(device).requires_grad_(), _x(3, n + 1)[:, :n].to(device)
        (hadamard(x, _base(n), backend="triton") * weight).sum().backward()
        _check(x.grad, weight, n) if n == 64 else None  # Sylvester's matrix is its own inverse
        expected = torch.autograd.functional.vjp(lambda v, n=n: hadamard(v, _base(n)), x.detach().cpu(), weight.cpu())
        assert torch.allclose(x.grad.cpu(), expected[1], atol=1e-5)
