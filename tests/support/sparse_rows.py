"""Rows that a sparse code can learn, and a module fitted to them, for tests of training."""

import torch

import bae_fast as bf


def synthetic(n=1500, d=16, r=24, seed=0):
    """Sparse sums of r directions, a mean, a little noise: float32 ``[n, d]``."""
    g = torch.Generator().manual_seed(seed)
    active = (torch.rand(n, r, generator=g) < 0.1).float()
    clean = active @ torch.randn(r, d, generator=g) + 3.0
    return clean + 0.05 * torch.randn(n, d, generator=g)


def module(x, f=48, **options):
    """A Binary Autoencoder of f features with the normalisation of x."""
    return bf.BinaryAutoencoder(x.shape[1], f, **options).fit_normalization_(x.float())
