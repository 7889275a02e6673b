"""What a layer says to somebody who meets it for the first time."""

import warnings

import pytest
import torch

import bae_fast as bf


def rows(n=200, d=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return 5 + 3 * torch.randn(n, d, generator=g)


def test_an_unnormalised_layer_says_once_that_its_density_is_not_the_presets():
    x = rows()
    bae = bf.BinaryAutoencoder(16, 64)
    with pytest.warns(UserWarning, match=r"of the bits are on at the start, where preset 'sparse'"):
        bae(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bae(x)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_layer_whose_start_is_as_meant_says_nothing(scale):
    x = scale * rows()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bf.BinaryAutoencoder(16, 64).fit_normalization_(x)(x)
        bf.BinaryAutoencoder(16, 64).init_density_(x, 0.05)(x)
        bf.BinaryAutoencoder(16, 64).eval()(x)


def test_rows_so_small_that_no_bit_is_on_are_said():
    with pytest.warns(UserWarning, match=r"0\.000 of the bits are on"):
        bf.BinaryAutoencoder(16, 64)(1e-3 * rows())


def test_the_loss_is_the_sum_of_its_weighted_terms():
    x = rows()
    bae = bf.BinaryAutoencoder(16, 64).fit_normalization_(x)
    out = bae(x, covariance=True)
    loss = bae.loss(out, x, entropy_weight=3e-4, covariance_weight=0.5)
    expected = bae.mse(out, x) + 3e-4 * out.entropy + 0.5 * out.covariance
    assert torch.equal(loss, expected)
    plain = bae(x)
    assert torch.equal(bae.loss(plain, x), bae.mse(plain, x))


def test_a_weight_for_a_covariance_that_was_not_computed_names_the_way_out():
    x = rows()
    bae = bf.BinaryAutoencoder(16, 64).fit_normalization_(x)
    with pytest.raises(ValueError, match=r"called with covariance=True; got 0\.5"):
        bae.loss(bae(x), x, covariance_weight=0.5)


@pytest.mark.parametrize("shape", [(16,), (1, 16), (1, 1, 16)])
def test_one_row_in_training_with_covariance_names_the_way_out(shape):
    bae = bf.BinaryAutoencoder(16, 64, preset="paper").fit_normalization_(rows())
    x = rows()[0].view(shape)
    with pytest.raises(ValueError, match=r"x must hold at least 2 rows .* got 1 \(covariance=Fal"):
        bae(x)
    assert bae(x, covariance=False).covariance is None
    assert bae.eval()(x).covariance is None


def test_a_numpy_array_is_named():
    x = rows()
    bae = bf.BinaryAutoencoder(16, 64)
    for call in (bae.fit_normalization_, lambda rows: bae.init_density_(rows, 0.05)):
        with pytest.raises(TypeError, match=r"x must be a tensor .* got ndarray; torch.from_numpy"):
            call(x.numpy())
