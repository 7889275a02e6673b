"""The covariance's gradient at some of the columns, beside the layer that holds them all."""

import pytest
import torch

from bae_fast.codes import BinaryCode
from bae_fast.columns import covariance_of_columns
from bae_fast.functional import binary_autoencoder, encode_rows

N, D, K, PARTS = 60, 8, 192, 3


def tensors(density):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(N, D, generator=g, dtype=torch.float64)
    W_enc = torch.randn(D, K, generator=g, dtype=torch.float64)
    b_enc = -(x @ W_enc).quantile(1 - density, dim=0)
    return x, W_enc, b_enc


@pytest.mark.parametrize("density", [0.02, 0.4], ids=["by lists", "by bits"])
@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("surrogate", ["rectangle", "identity", "sigmoid"])
def test_parts_of_the_columns_have_the_gradient_of_the_whole(impl, surrogate, density):
    x, W_enc, b_enc = tensors(density)
    whole = W_enc.clone().requires_grad_(), b_enc.clone().requires_grad_()
    W_dec, b_dec = torch.zeros(K, D, dtype=x.dtype), torch.zeros(D, dtype=x.dtype)
    out = binary_autoencoder(
        x, *whole, W_dec, b_dec, covariance=True, surrogate=surrogate, impl=impl
    )
    out.covariance.backward()
    assert whole[0].grad.any()
    stats = out.code.statistics(covariance=True, impl=impl)
    each = K // PARTS
    for part in range(PARTS):
        own = slice(part * each, (part + 1) * each)
        W, b = (t[..., own].clone().requires_grad_() for t in (W_enc, b_enc))
        encoded = encode_rows(x, W, b, surrogate=surrogate, impl=impl)
        found = covariance_of_columns(
            x, W, b, encoded, out.code.words, stats, own.start, surrogate=surrogate, impl=impl
        )
        found.backward()
        assert found == out.covariance
        for grad, wanted in ((W.grad, whole[0].grad), (b.grad, whole[1].grad)):
            assert torch.allclose(grad, wanted[..., own], rtol=1e-12, atol=1e-13)


def test_what_cannot_be_divided_is_refused():
    x, W_enc, b_enc = tensors(0.1)
    encoded = encode_rows(x, W_enc, b_enc)
    stats = BinaryCode(encoded.words, K).statistics(covariance=True)

    def call(x=x, W=W_enc, first=0, stats=stats, **options):
        return covariance_of_columns(x, W, b_enc, encoded, encoded.words, stats, first, **options)

    with pytest.raises(ValueError, match=r"^surrogate must be linear .*; got 'official'$"):
        call(surrogate="official")
    with pytest.raises(ValueError, match="multiples of 32; got 16 and 192"):
        call(first=16)
    with pytest.raises(ValueError, match="multiples of 32; got 0 and 40"):
        call(W=W_enc[:, :40])
    with pytest.raises(ValueError, match="stats has no covariance"):
        call(stats=BinaryCode(encoded.words, K).statistics())
    with pytest.raises(ValueError, match="x must be constant"):
        call(x=x.clone().requires_grad_())


@pytest.mark.parametrize("impl", ["reference", "torch", "cpp"])
@pytest.mark.parametrize("surrogate", ["rectangle", "sigmoid"])
def test_rows_that_are_encoded_before_give_the_same_bits_of_everything(impl, surrogate):
    x, W_enc, b_enc = tensors(0.1)
    g = torch.Generator().manual_seed(2)
    W_dec, b_dec = torch.randn(K, D, generator=g, dtype=x.dtype), torch.zeros(D, dtype=x.dtype)
    mask = torch.arange(N) % 7 > 0
    found = []
    for before in (False, True):
        given = [t.clone().requires_grad_() for t in (W_enc, b_enc, W_dec, b_dec)]
        options = {"surrogate": surrogate, "mask": mask, "impl": impl}
        encoded = encode_rows(x, *given[:2], **options) if before else None
        out = binary_autoencoder(x, *given, covariance=True, encoded=encoded, **options)
        (out.recon.square().sum() + out.entropy + out.covariance).backward()
        found.append([out.recon, out.entropy, out.covariance, out.code.words,
                      out.code.counts(), *(t.grad for t in given)])  # fmt: skip
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_what_was_encoded_for_other_rows_or_another_surrogate_is_refused():
    x, W_enc, b_enc = tensors(0.1)
    W_dec, b_dec = torch.zeros(K, D, dtype=x.dtype), torch.zeros(D, dtype=x.dtype)
    encoded = encode_rows(x, W_enc, b_enc)
    with pytest.raises(ValueError, match=r"^encoded.words must have shape \[59, 6\]"):
        binary_autoencoder(x[1:], W_enc, b_enc, W_dec, b_dec, encoded=encoded)
    with pytest.raises(ValueError, match="surrogate 'identity'; got one with a window"):
        binary_autoencoder(x, W_enc, b_enc, W_dec, b_dec, encoded=encoded, surrogate="identity")
