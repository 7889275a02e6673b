"""Inputs, steps and bounds of tests of impl="triton" in its interpreter."""

import numpy as np
import torch

import bae_fast as bf
from bae_fast import packing
from bae_fast.ops import registry
from bae_fast.packing import pack_rows

OPS = registry.BACKENDS["triton"].ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

NAMES = ["recon", "entropy", "covariance", "x", "W_enc", "b_enc", "W_dec", "b_dec"]

WIDTHS = {"identity": None, "official": None, "sigmoid": 3.0, "rectangle": 2.5}


def problem(n, d, f, k, d_out, dtype=torch.float32, seed=0):
    """Encoder inputs in small integers, decoder and direction in any numbers of ``dtype``."""
    g = torch.Generator().manual_seed(seed)

    def integers(bound, *shape):
        return torch.randint(-bound, bound + 1, shape, generator=g).to(dtype)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    W_enc, b_enc = integers(2, d, k * f), integers(4, k * f)
    b_enc[:: max(f * k // 5, 1)] = -100  # constant columns: never on, always on
    b_enc[1 :: max(f * k // 5, 2)] = 100
    if f * k > 4:  # twins: ties V = 0 with constant columns, extremes with each other
        W_enc[:, 2], b_enc[2] = W_enc[:, 3], b_enc[3]
    return integers(2, n, d), [W_enc, b_enc, normal(f, d_out), normal(d_out)], normal(n, d_out)


def run(impl, x, parameters, direction, terms=("recon", "entropy", "covariance"), **options):
    leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
    out = bf.binary_autoencoder(*leaves, impl=impl, covariance="covariance" in terms, **options)
    loss = 0
    if "recon" in terms:
        loss = loss + (out.recon * direction).sum() * 0.25
    if "entropy" in terms:
        loss = loss + out.entropy * 3
    if "covariance" in terms:
        loss = loss + out.covariance * 2
    if out.variance is not None:
        loss = loss + out.variance * 0.7
    loss.backward()
    values = [out.recon, out.entropy, out.covariance, *(leaf.grad for leaf in leaves)]
    return {
        name: None if v is None else v.detach() for name, v in zip(NAMES, values, strict=True)
    }, out.code


def assert_as_good_as_eager(x, parameters, direction, terms, impl="triton", **options):
    """Bits equal float64's; errors at most twice those of the dense program in the same dtype."""
    wide = [p.double() for p in parameters]
    exact, code = run("reference", x.double(), wide, direction.double(), terms, **options)
    eager, _ = run("reference", x, parameters, direction, terms, **options)
    got, packed = run(impl, x, parameters, direction, terms, **options)
    assert packed.equal(code)
    assert torch.equal(packed.counts(), code.counts())
    for name in NAMES:
        assert (got[name] is None) == (exact[name] is None), name
        if exact[name] is None:
            continue
        assert got[name].dtype == eager[name].dtype, name
        scale = exact[name].abs().max()
        if name == "b_enc":  # sums of what W_enc's gradient sums: may cancel
            scale = torch.maximum(scale, exact["W_enc"].abs().max())
        allowed = 2 * (eager[name].double() - exact[name]).abs().max()
        allowed += 4 * torch.finfo(got[name].dtype).eps * scale
        assert (got[name].double() - exact[name]).abs().max() <= allowed, name


def assert_as_torch_under_autocast(x, parameters, direction):
    """bf16 products of fp32 tensors: dtypes equal those of impl="torch", values nearly so."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = run("triton", x, parameters, direction, surrogate="identity")
        expected, _ = run("torch", x, parameters, direction, surrogate="identity")
    for name in NAMES:
        assert got[name].dtype == expected[name].dtype, name
        error = (got[name].double() - expected[name].double()).abs().max()
        assert error <= 2e-2 * expected[name].double().abs().max(), name


def codes(n, k, seed=0):
    """Bits with constant columns, twins and rare columns, in words whose rows are padded."""
    g = torch.Generator().manual_seed(seed)
    dense = torch.rand(n, k, generator=g) < torch.rand(k, generator=g)
    dense[:, :: max(k // 5, 1)] = False
    dense[:, 1 :: max(k // 5, 2)] = True
    if k > 4:
        dense[:, 2] = dense[:, 3]
    padded = torch.full((n, packing.n_words(k) + 3), -1, dtype=torch.int32)
    words = padded[:, 1 : 1 + packing.n_words(k)]
    words.copy_(pack_rows(dense))
    return dense, words


def exact_covariance(dense):
    b = dense.numpy().astype(np.int64)
    counts = b.sum(0)
    v = len(b) * (b.T @ b) - np.outer(counts, counts)
    np.fill_diagonal(v, 0)
    return counts, v
