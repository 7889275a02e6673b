"""The bit layouts against numpy.packbits and numpy.bitwise_count."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bae_fast import packing

SIZES = [1, 2, 7, 8, 31, 32, 33, 63, 64, 65, 127, 255, 256, 257]


def random_bits(n, k, density=0.4, seed=0):
    return np.random.default_rng(seed).random((n, k)) < density


def numpy_words(bits):
    """[N, K] bits to int32 [N, ceil(K/32)] with numpy alone."""
    packed = np.packbits(bits, axis=1, bitorder="little")
    padded = np.zeros((len(bits), -(-bits.shape[1] // 32) * 4), np.uint8)
    padded[:, : packed.shape[1]] = packed
    return padded.view("<i4")


@pytest.mark.parametrize("n", [1, 3, 32, 130])
@pytest.mark.parametrize("k", SIZES)
def test_rows_equal_numpy_packbits_and_unpack_inverts(n, k):
    bits = random_bits(n, k, seed=k)
    words = packing.pack_rows(torch.from_numpy(bits))
    np.testing.assert_array_equal(words.numpy(), numpy_words(bits))
    for dtype in (torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.float64):
        dense = packing.unpack_rows(words, k, dtype)
        assert dense.dtype == dtype
        np.testing.assert_array_equal(dense.double().numpy(), bits)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("k", [1, 31, 32, 33, 100])
def test_transposes_equal_numpy_and_invert(n, k):
    bits = random_bits(n, k, seed=n)
    rows = packing.pack_rows(torch.from_numpy(bits))
    columns = packing.rows_to_columns(rows, k)
    np.testing.assert_array_equal(columns.numpy().T, numpy_words(bits.T))
    assert torch.equal(packing.columns_to_rows(columns, n), rows)
    features = packing.columns_to_features(columns).numpy()
    assert features.shape[1] % 8 == 0
    np.testing.assert_array_equal(features[:, : columns.shape[0]], columns.numpy().T)
    assert not features[:, columns.shape[0] :].any()


def test_popcount_equals_numpy_over_every_byte_and_the_sign_bit():
    words = torch.randint(-(2**31), 2**31, (10_000,), dtype=torch.int64).to(torch.int32)
    words = torch.cat([words, torch.tensor([0, -1, 2**31 - 1, -(2**31)], dtype=torch.int32)])
    expected = np.bitwise_count(words.numpy().view(np.uint32))
    np.testing.assert_array_equal(packing.popcount(words).numpy(), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 300), st.floats(0, 1), st.integers(0, 2**16))
def test_column_counts_equal_the_sum_of_bits(n, k, density, seed):
    bits = random_bits(n, k, density, seed)
    counts = packing.column_counts(packing.pack_rows(torch.from_numpy(bits)), k)
    np.testing.assert_array_equal(counts.numpy(), bits.sum(0))


def test_strided_and_offset_views_pack_and_unpack_like_copies():
    bits = torch.rand(64, 300) < 0.5
    view = bits[3::2, 5:270]
    words = packing.pack_rows(view)
    assert torch.equal(words, packing.pack_rows(view.clone()))
    padded = torch.full((len(words), 12), -1, dtype=torch.int32)  # a padded row stride
    padded[:, : words.shape[1]] = words
    strided = padded[:, : words.shape[1]]
    assert torch.equal(packing.unpack_rows(strided, 265), view)
    assert torch.equal(packing.column_counts(strided, 265), view.sum(0))


def test_packing_reads_any_nonzero_as_one():
    values = torch.tensor([[0.0, -0.0, 1e-30, -3.0, float("nan"), float("inf")]])
    expected = [[False, False, True, True, True, True]]
    assert packing.unpack_rows(packing.pack_rows(values), 6).tolist() == expected


def test_tail_bits_are_zero_and_a_set_one_is_seen():
    words = packing.pack_rows(torch.ones(4, 37, dtype=torch.bool))
    assert packing.tail_is_zero(words, 37)
    words[2, 1] |= 1 << 9
    assert not packing.tail_is_zero(words, 37)
    words[2, 1] = 1 << 4
    words[0, 1] = -(2**31)
    assert not packing.tail_is_zero(words, 37)
