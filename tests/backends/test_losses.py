"""The terms of the loss that are one pass each in C++, held against float64 and plain torch."""

from __future__ import annotations

import pytest
import torch

from bae_fast import functional
from bae_fast.backends.cpp import extension
from bae_fast.ops import registry, terms
from bae_fast.statistics import entropy_bits, entropy_gradient

CPP = registry.BACKENDS["cpp"]
pytestmark = pytest.mark.skipif(CPP.unavailable is not None, reason=str(CPP.unavailable))

# one column, one block of columns and one more, and enough for two threads
COLUMNS = [1, 31, 1024, 1025, 40_000]
ROWS = [1, 2, 513, 2**40]


def counts_of(k, n):
    """Counts from none to all of the rows, in any order; the ends among them."""
    counts = (torch.rand(k, dtype=torch.float64) * (n + 1)).floor().long().clamp(max=n)
    counts[:: 3 if k > 3 else 1] = n
    counts[1::5] = 0
    counts[2::7] = min(1, n)
    return counts, torch.tensor(n)


@pytest.fixture(params=[1, 2])
def threads(request):
    torch.set_num_threads(request.param)
    return request.param


@pytest.mark.parametrize("k", COLUMNS)
@pytest.mark.parametrize("n", ROWS)
def test_entropy_and_its_slopes_are_those_of_the_definition(k, n, threads):
    counts, n_rows = counts_of(k, n)
    right = entropy_bits(counts, n_rows)
    for dtype, limit in ((torch.float64, 1e-14), (torch.float32, 1e-7)):
        found, none = CPP.ops["terms"](counts, n_rows, None, dtype)
        assert (found.dtype, found.shape) == (dtype, ())
        assert none == 0
        assert abs(float(found) - float(right)) <= limit * float(right) + 1e-12
        grad = torch.tensor(0.37, dtype=dtype)
        slopes = CPP.ops["slopes"](counts, n_rows, grad, dtype)
        exact = entropy_gradient(counts, n_rows) * grad.double()
        assert slopes.dtype == dtype
        # a slope is a difference of terms up to 34 / N: that is the scale of its rounding
        assert (slopes.double() - exact).abs().max() <= limit * (35 / n)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("columns", [16, 40, 1536, 2048, 4096, 6144])
def test_parts_of_the_columns_add_up_to_the_entropy_of_all_to_the_bit(columns, parts):
    entropy = extension.op("entropy")
    for seed in range(5):
        torch.manual_seed(seed)
        counts, n_rows = counts_of(columns, 4097)
        sums = [float(entropy(part.contiguous(), int(n_rows))) for part in counts.chunk(parts)]
        while len(sums) > 1:
            sums = [left + right for left, right in zip(sums[::2], sums[1::2], strict=True)]
        assert sums[0] == float(entropy(counts, int(n_rows)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": torch.zeros(4)}, r"target must have recon's shape \[3, 4\]; got \[4\]"),
        ({"target": torch.zeros(2, 4)}, r"target must have recon's shape \[3, 4\]; got \[2, 4\]"),
        ({"unit": torch.ones(1)}, r"unit must have shape \[4\]; got \[1\]"),
        ({"mask": torch.ones(2).bool()}, r"mask must be bool \[3\]; got torch.bool \[2\]"),
        ({"mask": torch.ones(3)}, r"mask must be bool \[3\]; got torch.float32 \[3\]"),
    ],
)
def test_what_does_not_fit_the_reconstruction_is_refused(options, words):
    given = {"recon": torch.zeros(3, 4), "target": torch.zeros(3, 4), **options}
    with pytest.raises(ValueError, match=words):
        functional.squared_error(**given)
    assert float(functional.squared_error(torch.zeros(3, 0), torch.zeros(3, 0))) == 0


def test_one_thread_and_two_give_the_same_entropy():
    counts, n_rows = counts_of(100_000, 5000)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(CPP.ops["terms"](counts, n_rows, None, torch.float64)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_covariance_as_a_number_is_that_of_plain_torch(dtype):
    counts, n_rows = counts_of(50, 3000)
    numerator = torch.tensor(2**62 + 12345)
    ours = CPP.ops["terms"](counts, n_rows, numerator, dtype)
    right = terms.terms(counts, n_rows, numerator, dtype)
    assert torch.equal(ours[1], right[1])


def test_counts_that_cannot_be_give_nan_as_logarithms_do():
    n_rows = torch.tensor(10)
    for counts in (torch.tensor([3, 12]), torch.tensor([-2, 4])):
        assert entropy_bits(counts, n_rows).isnan()
        assert CPP.ops["terms"](counts, n_rows, None, torch.float32)[0].isnan()


def pair(n, d, ours, theirs, *, gap=0):
    """A reconstruction and a target whose rows are ``gap`` numbers apart."""
    recon = torch.randn(n, d + gap).to(ours)[:, :d]
    target = (recon.float() + 0.3 * torch.randn(n, d)).to(theirs)
    return recon, target


def in_float64(recon, target, unit, mask):
    recon = recon.double().requires_grad_()
    difference = (recon - target.double()) * (1 if unit is None else unit.double())
    squares = difference.square() if mask is None else difference[mask].square()
    (grad,) = torch.autograd.grad(squares.sum(), recon)
    return squares.sum().detach(), grad


HALVES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (40, 256), (700, 300)], ids=str)
@pytest.mark.parametrize("ours", HALVES, ids=str)
@pytest.mark.parametrize("theirs", HALVES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gap", [0, 3])
def test_the_squared_error_and_its_gradient_are_those_of_float64(
    shape, ours, theirs, masked, gap, threads, monkeypatch
):
    n, d = shape
    recon, target = pair(n, d, ours, theirs, gap=gap)
    unit = torch.rand(d) + 0.5
    mask = torch.rand(n) < 0.6 if masked else None
    if mask is not None:
        mask[0], mask[-1] = True, n == 1
        recon[~mask], target[~mask] = torch.nan, torch.inf
    called = []
    extras = registry.extras("cpp", "cpu")
    monkeypatch.setattr(functional.error.registry, "extras", lambda *_: called.append(1) or extras)
    given = recon.detach().requires_grad_()
    found = functional.squared_error(given, target, unit, mask=mask, impl="cpp")
    (grad,) = torch.autograd.grad(found * 0.25, given)
    assert len(called) == 3  # asked for, forward and backward
    right, right_grad = in_float64(recon, target, unit, mask)
    assert found.dtype == torch.float32
    assert abs(float(found.detach()) - float(right)) <= 1e-6 * float(right)
    assert grad.dtype == ours
    limit = 1e-6 if ours == torch.float32 else 2.0**-8
    rows = slice(None) if mask is None else mask
    assert torch.allclose(grad[rows].double(), 0.25 * right_grad[rows], rtol=limit, atol=1e-7)
    if mask is not None:
        assert (grad[~mask] == 0).all()


def test_what_the_passes_cannot_serve_is_plain_torch(monkeypatch):
    def fail(*_):
        raise AssertionError("served")

    monkeypatch.setattr(functional.error._SquaredError, "apply", fail)
    recon, target = pair(20, 9, torch.float32, torch.float32)
    unit = torch.rand(9) + 0.5
    right, right_grad = in_float64(recon, target, unit, None)
    for impl, dtype in (("torch", torch.float32), ("auto", torch.float64), ("auto", torch.float16)):
        given = recon.to(dtype).requires_grad_()
        found = functional.squared_error(given, target, unit.to(dtype), impl=impl)
        (grad,) = torch.autograd.grad(found, given)
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        assert float(found.detach()) == pytest.approx(float(right), rel=2e-3)
        assert torch.allclose(grad.double(), right_grad, rtol=2e-2, atol=2e-3)
    # a target that learns
    target.requires_grad_()
    (grad,) = torch.autograd.grad(functional.squared_error(recon, target, unit), target)
    assert torch.allclose(grad.double(), -right_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_of_the_squared_error_can_be_differentiated(masked):
    recon, target = pair(12, 7, torch.float32, torch.float32)
    unit, mask = torch.rand(7) + 0.5, torch.arange(12) % 3 > 0 if masked else None
    given, direction = recon.requires_grad_(), torch.randn(12, 7)
    found = functional.squared_error(given, target, unit, mask=mask)
    (grad,) = torch.autograd.grad(found, given, create_graph=True)
    (second,) = torch.autograd.grad((grad * direction).sum(), given)
    right = 2 * unit.square() * direction
    if mask is not None:
        right = right * mask[:, None]
    assert torch.allclose(second, right, rtol=1e-6)
    assert torch.allclose(
        torch.func.grad(lambda r: functional.squared_error(r, target, unit, mask=mask))(recon),
        grad,
        rtol=1e-6,
    )


def test_the_number_of_threads_changes_no_bit_of_the_squared_error():
    recon, target = pair(3000, 200, torch.bfloat16, torch.float32)
    unit, found = torch.ones(200), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(extension.op("squared_error")(recon, target, unit, None))
    assert torch.equal(*found)
