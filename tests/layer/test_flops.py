"""Floating-point operations that torch's counter sees in the layer."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bae_fast as bf
import bae_fast.flops
from bae_fast.ops import registry

N, D, F = 40, 16, 64
_CPP = registry.BACKENDS["cpp"].unavailable
BACKENDS = [
    "torch",
    pytest.param("cpp", marks=pytest.mark.skipif(_CPP is not None, reason=str(_CPP))),
]


def counted(impl, frozen=(), x_needs_grad=False, **options):
    bae = bf.BinaryAutoencoder(D, F, impl=impl, **options)
    for name in frozen:
        bae.get_parameter(name).requires_grad_(False)
    x = torch.randn(N, D, requires_grad=x_needs_grad)
    weight = 0.1 if options.get("covariance") else 0.0
    with FlopCounterMode(display=False) as counter:
        bae.loss(bae(x), x, entropy_weight=0.1, covariance_weight=weight).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"covariance": True},
        {"n_bits": 2},
        {"surrogate": "sigmoid"},
        {"x_needs_grad": True},
        {"frozen": ("W_enc",)},
        {"frozen": ("W_dec", "b_dec")},
        {"frozen": ("W_enc", "b_enc")},
    ],
    ids=str,
)
def test_a_step_counts_what_the_dense_definition_does(impl, options):
    """Torch has formulas of its own for the products of the reference."""
    assert counted(impl, **options) == counted("reference", **options) > 0


@pytest.mark.parametrize("impl", BACKENDS)
def test_a_code_and_its_reconstruction_count_one_product_each(impl):
    bae = bf.BinaryAutoencoder(D, F, impl=impl)
    with FlopCounterMode(display=False) as counter:
        bae.decode(bae.encode(torch.randn(N, D)))
    assert counter.get_total_flops() == 2 * (2 * N * D * F)
