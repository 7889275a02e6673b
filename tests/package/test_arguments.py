"""Checks that many modules share."""

import itertools

import pytest
import torch

from bae_fast.arguments import all_finite

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (33, 17), (1000, 129)])
def test_a_single_number_that_is_not_finite_is_seen_wherever_it_stands(dtype, shape):
    g = torch.Generator().manual_seed(0)
    plain = torch.randn(shape, generator=g).to(dtype)
    places = torch.randint(plain.numel(), (20,), generator=g).tolist()
    for bad, at in itertools.product((float("nan"), float("inf"), -float("inf")), places):
        rows = plain.clone()
        rows.view(-1)[at] = bad
        for view in (rows, rows.T, torch.cat([rows, plain], 1)[:, : shape[1]]):
            assert not all_finite(view)
    assert all_finite(plain)


def test_the_largest_numbers_are_finite_and_so_is_nothing():
    for dtype in DTYPES:
        most = torch.finfo(dtype).max
        assert all_finite(torch.tensor([[most, -most], [most, -most]], dtype=dtype))
    assert all_finite(torch.empty(0, 5))


def test_numbers_of_eight_bits_are_seen_too():
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        most = torch.finfo(dtype).max
        assert all_finite(torch.tensor([most, -most]).to(dtype))
        for bad in (float("nan"), float("inf"), -float("inf")):
            numbers = torch.tensor([0, bad, 1]).to(dtype)
            assert all_finite(numbers) == bool(numbers.float().isfinite().all())
        assert not all_finite(torch.tensor([0, float("nan"), 1]).to(dtype))
    assert not all_finite(torch.tensor([float("inf"), 0]).to(torch.float8_e5m2))
