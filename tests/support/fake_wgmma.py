"""Stand-ins on a CPU for what impl="cuda" makes by wgmma, right or wrong as they are asked."""

import os

import torch

from bae_fast.packing import pack_rows, unpack_rows
from bench import exact


def covariance(wrong=None, asked=None):
    """A stand-in for the operator of impl="cuda"; ``wrong`` changes what wgmma makes."""

    def covariance(words, counts, n_rows, keep_signs):
        form = os.environ.get("BAE_FAST_CUDA_PAIRS")
        if asked is not None:
            asked.append(form)
        dense = unpack_rows(words, len(counts), torch.float32)
        v = exact.pair_values(dense, slice(None))
        numerator = v.abs().sum().long()
        signs = torch.stack([pack_rows(v > 0), pack_rows(v < 0)])
        signs = signs if keep_signs else signs.new_empty(0)
        if form == "wgmma" and wrong is not None:
            numerator, signs = wrong(numerator, signs.clone())
        return numerator, signs

    return covariance


def one_sign(numerator, signs):
    if signs.numel():
        signs.view(-1)[-1] ^= 1
    return numerator, signs


def sign_product(wrong=0.0, asked=None):
    """A stand-in for the launcher of impl="cuda"; ``wrong`` is added to what wgmma makes."""

    def sign_product(words, signs, digits, n_rows, scale):
        form = os.environ.get("BAE_FAST_CUDA_SIGNS")
        if asked is not None:
            asked.append(form)
        k = 32 * words.shape[1]
        above, below = unpack_rows(signs, k, torch.int64)
        s, dense = (above - below).t(), unpack_rows(words, k, torch.int64)
        weights = 2 ** torch.arange(len(digits))
        exact = n_rows * (dense @ s) - weights @ unpack_rows(digits, k, torch.int64) @ s
        product = exact.float() * scale
        if form == "wgmma":
            product[-1, -1] += wrong
        return product

    return sign_product


def digits(counts, n_rows, grad, n_bound):
    places = torch.arange(n_bound.bit_length())[:, None]
    return pack_rows(counts >> places & 1), (grad * 2 / (n_rows * (n_rows - 1))).float()
