"""Metrics against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from bae_fast.analysis import (
    FVUAccumulator,
    covariance_eigenvalues,
    density_histogram,
    fvu,
    gaussian_rate_distortion_bits,
    gaussian_rate_distortion_fvu,
)


def _rows(n=300, d=7, seed=0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + offset


def test_fvu_of_the_rows_is_zero_and_of_their_mean_is_one():
    x = _rows()
    assert fvu(x, x) == 0
    assert fvu(x, x.mean(0).expand_as(x)) == pytest.approx(1, abs=1e-14)


def test_fvu_of_rows_shrunk_towards_their_mean_is_the_square_of_the_shrinkage():
    x = _rows(offset=3.0)
    mean = x.mean(0)
    assert fvu(x, mean + 0.7 * (x - mean)) == pytest.approx(0.09, rel=1e-12)


def test_fvu_by_hand():
    x = torch.tensor([[0.0, 0.0], [2.0, 4.0]])  # mean (1, 2): variance sum 1+4+1+4 = 10
    recon = torch.tensor([[1.0, 0.0], [2.0, 3.0]])  # error 1 + 1
    assert fvu(x, recon) == pytest.approx(0.2, rel=1e-15)


@pytest.mark.parametrize("sizes", [[300], [1] * 300, [7, 193, 100]])
def test_fvu_does_not_depend_on_the_chunks_even_far_from_zero(sizes):
    x = _rows(offset=1e6)
    recon = x + 0.1 * _rows(seed=1)
    accumulator = FVUAccumulator()
    for a, b in zip(x.split(sizes), recon.split(sizes), strict=True):
        accumulator.update(a, b)
    plain = float((x - recon).square().sum() / (x - x.mean(0)).square().sum())
    assert accumulator.compute() == pytest.approx(plain, rel=1e-9)


def test_fvu_of_half_precision_rows_is_that_of_their_exact_values():
    x = _rows(20_000, 3).bfloat16()
    recon = (x.double() * 0.9).bfloat16()
    assert fvu(x, recon) == pytest.approx(fvu(x.double(), recon.double()), rel=1e-12)


def test_fvu_refuses_what_has_no_answer():
    with pytest.raises(
        ValueError, match=r"x and recon must have one shape .*; got \[3, 2\] and \[3, 3\]"
    ):
        fvu(torch.zeros(3, 2), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="x must have rows that differ"):
        fvu(torch.ones(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="x must have at least two rows; got none"):
        FVUAccumulator().compute()


def test_isotropic_gaussian_needs_half_d_log2_of_the_inverse_fvu():
    bits = gaussian_rate_distortion_bits(torch.full((8,), 3.0), [0.5, 0.25, 1 / 16])
    assert bits.tolist() == pytest.approx([4.0, 8.0, 16.0], rel=1e-14)


def test_two_eigenvalues_by_hand():
    # 4 and 1. At FVU 0.3 the distortion is 1.5, the level 0.75 lies under both: half the log of
    # (4 / 0.75)(1 / 0.75). At FVU 0.6 it is 3: the small one is given up (1), the level is 2, and
    # half the log of 4 / 2 is 1/2. Between them, at FVU 0.4, the level is 1: exactly 1 bit.
    bits = gaussian_rate_distortion_bits(torch.tensor([1.0, 4.0]), [0.3, 0.6, 0.4])
    by_hand = [0.5 * math.log2(4 / 0.75) + 0.5 * math.log2(1 / 0.75), 0.5, 1.0]
    assert bits.tolist() == pytest.approx(by_hand, rel=1e-14)
    fvus = gaussian_rate_distortion_fvu(torch.tensor([1.0, 4.0]), by_hand)
    assert fvus.tolist() == pytest.approx([0.3, 0.6, 0.4], rel=1e-14)


def test_nothing_is_needed_where_nothing_is_explained():
    assert gaussian_rate_distortion_bits(torch.tensor([1.0, 4.0]), [1.0, 2.0]).tolist() == [0, 0]
    assert float(gaussian_rate_distortion_fvu(torch.tensor([1.0, 4.0]), 0.0)) == pytest.approx(1)


def test_bits_and_fvu_are_inverse_on_a_long_tailed_spectrum_with_zeros():
    spectrum = torch.cat([torch.arange(1, 200, dtype=torch.float64).pow(-1.3), torch.zeros(5)])
    levels = torch.linspace(0.01, 0.99, 57, dtype=torch.float64)
    bits = gaussian_rate_distortion_bits(spectrum, levels)
    assert bool((bits[1:] < bits[:-1]).all())
    torch.testing.assert_close(
        gaussian_rate_distortion_fvu(spectrum, bits), levels, rtol=1e-12, atol=0
    )


def test_water_level_meets_its_definition():
    # An independent route: bisect the level, from the definition alone.
    spectrum = torch.rand(50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    low, high = 0.0, 1.0
    for _ in range(200):
        level = (low + high) / 2
        enough = float(spectrum.clamp_max(level).sum()) >= 0.17 * float(spectrum.sum())
        low, high = (low, level) if enough else (level, high)
    bits = 0.5 * (spectrum / high).log2().clamp_min(0).sum()
    found = gaussian_rate_distortion_bits(spectrum.diag(), 0.17)
    assert float(found) == pytest.approx(float(bits), rel=1e-12)


def test_covariance_eigenvalues_against_torch_cov():
    x = _rows(20_000, 5, offset=100.0) @ torch.diag(torch.tensor([1.0, 2, 3, 4, 5]).double())
    torch.testing.assert_close(
        covariance_eigenvalues(x), torch.linalg.eigvalsh(x.T.cov()), rtol=1e-10, atol=0
    )


@pytest.mark.parametrize(
    ("covariance", "value", "message"),
    [
        (torch.ones(2), 0.0, "fvu must be positive; got 0.0"),
        (torch.tensor([-1.0, 2.0]), 0.5, "no eigenvalue below 0; got -1"),
        (torch.zeros(3), 0.5, "must be finite and have variance; got eigenvalues up to 0"),
        (torch.ones(2, 3), 0.5, r"covariance must have shape .*; got \[2, 3\]"),
    ],
)
def test_bound_refuses_bad_input(covariance, value, message):
    with pytest.raises(ValueError, match=message):
        gaussian_rate_distortion_bits(covariance, value)


def test_density_histogram_counts_every_live_feature_once_at_its_place():
    values = [0.0, 0.0, 1e-7, 0.01, 0.0101, 0.1, 0.1001, 0.9, 0.95, 1.0]
    density = torch.tensor(values, dtype=torch.float64)
    h = density_histogram(density, lowest=1e-3, bins_per_decade=1)
    assert h.edges == pytest.approx((1e-3, 1e-2, 1e-1, 1.0))
    assert h.counts == (1, 2, 5)  # the first holds what lies below it; an edge counts above
    assert (h.dead, h.dense, h.always_on) == pytest.approx((0.2, 0.4, 0.2))
    assert sum(h.counts) + round(h.dead * h.n_features) == len(density)


def test_density_histogram_as_text_fits_and_shows_the_numbers():
    density = torch.cat([torch.zeros(1234), torch.rand(5000) * 0.05])
    lines = density_histogram(density).lines(60)
    assert max(map(len, lines)) <= 60
    assert lines[0].split()[:3] == ["never", "on", "1,234"]
    assert len(density_histogram(torch.zeros(4)).lines()) == 1


def test_density_histogram_refuses_what_is_no_density():
    with pytest.raises(ValueError, match=r"density must hold .* between 0 and 1; got 0\.5 to 1\.5"):
        density_histogram(torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match=r"lowest must lie between 0 and 1, .*; got 0 and "):
        density_histogram(torch.tensor([0.5]), lowest=0)
    with pytest.raises(ValueError, match="no values"):
        density_histogram(torch.tensor([]))
