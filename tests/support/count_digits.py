"""Binary digits of counts, and numbers from the products with them, in plain torch.

What :mod:`bae_fast.kernels.counts` makes on a device, for tests that start no kernel of Triton.
"""

import torch

from bae_fast.packing import pack_rows


def count_digits(counts, n_bound=None):
    digits = 63 if n_bound is None else max(n_bound.bit_length(), 1)
    return pack_rows((counts >> torch.arange(digits)[:, None]) & 1)


def from_digits(raw):
    return (raw.to(torch.int64) << torch.arange(len(raw))[:, None]).sum(0)
