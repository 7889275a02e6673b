"""The whole layer against the definition in float64: bits, values and gradients."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import bae_fast as bf
from bae_fast.codes import ENV_SIGN_PLANES
from bae_fast.ops import registry
from bae_fast.ops.products import ENV_SCRATCH
from bae_fast.packing import pack_rows
from bae_fast.surrogates import SURROGATES
from bench import exact
from bench.device.cases import IMPLS, Plan
from bench.exact import WrongResultError

# what a call returns, and the gradients that it leaves
VALUES = ("recon", "entropy", "covariance", "x", "W_enc", "b_enc", "W_dec", "b_dec")
# peaks of the surrogates where pre-activations are integers
WIDTHS = {"identity": None, "official": None, "sigmoid": 3.0, "rectangle": 2.5}


def _problem(
    n: int, d: int, f: int, n_bits: int, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """x and parameters in small integers, so that bits are exact in every dtype; a direction."""
    torch.manual_seed(0)
    k = f * n_bits
    x, W_enc = torch.randint(-2, 3, (n, d)), torch.randint(-2, 3, (d, k))
    b_enc = torch.randint(-4, 5, (k,))
    b_enc[:: max(k // 5, 1)], b_enc[1 :: max(k // 5, 2)] = -2000, 2000  # constant columns
    W_enc[:, 2], b_enc[2] = W_enc[:, 3], b_enc[3]  # ties
    given = [x, W_enc, b_enc, torch.randn(f, d) * f**-0.5, torch.randn(d)]
    return [t.to(dtype) for t in given], torch.randn(n, d).to(dtype)


def _values(
    impl: str, tensors: list[Tensor], direction: Tensor, **options: Any
) -> tuple[dict[str, Tensor], bf.BinaryCode]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = bf.binary_autoencoder(*leaves, impl=impl, covariance=True, **options)
    assert out.covariance is not None
    loss = (out.recon * direction).sum() * 0.25 + out.entropy * 3 + out.covariance * 2
    (loss if out.variance is None else loss + out.variance * 0.7).backward()
    values = (out.recon, out.entropy, out.covariance, *map(exact.gradient, leaves))
    return {key: v.detach() for key, v in zip(VALUES, values, strict=True)}, out.code


def check_layer(impl: str, dtype: torch.dtype, n: int, d: int, f: int, **options: Any) -> None:
    """Bits equal to float64's, errors at most twice those of the dense program in ``dtype``.

    Raises:
        WrongResultError: they are not.
    """
    tensors, direction = _problem(n, d, f, options.get("n_bits", 1), dtype)
    wide = [t.double() for t in tensors]
    right, code = _values("reference", wide, direction.double(), **options)
    rival, _ = _values("reference", tensors, direction, **options)
    got, packed = _values(impl, tensors, direction, **options)
    what = ", ".join(f"{key} {v}" for key, v in options.items() if not isinstance(v, Tensor))
    if not packed.equal(code) or not torch.equal(packed.counts(), code.counts()):
        raise WrongResultError(f"bits or counts are not float64's at {n}, {d}, {f} ({what})")
    for key in VALUES:
        scale = right[key].abs().max()
        if key == "b_enc":  # sums of what W_enc's gradient sums: may cancel
            scale = torch.maximum(scale, right["W_enc"].abs().max())
        allowed = 2 * (rival[key].double() - right[key]).abs().max()
        allowed += 4 * torch.finfo(got[key].dtype).eps * scale
        error = (got[key].double() - right[key]).abs().max()
        if not bool(error <= allowed):  # NaN is not
            raise WrongResultError(
                f"{key} is off by {float(error):.1e} at {n}, {d}, {f} ({what}); "
                f"allowed {float(allowed):.1e}"
            )


@contextmanager
def variables(**given: str) -> Iterator[None]:
    """Environment variables for a while."""
    before = {key: os.environ.get(key) for key in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


@contextmanager
def lists_serve(impl: str) -> Iterator[None]:
    """Codes of any size and density are counted by lists of their ones, as far as there is room."""
    if impl not in IMPLS:
        yield
        return
    from bae_fast.kernels import pair_lists
    from bae_fast.ops import nvidia

    given = {
        (nvidia, "DENSE_A_STEP"): 1,
        (nvidia, "LEAST_PRODUCTS"): 1,
        (pair_lists, "WINDOW_SHARE"): 1,
        (pair_lists, "MOST_ONES"): 2**10,
    }
    before = {(module, name): getattr(module, name) for module, name in given}
    try:
        for (module, name), value in given.items():
            setattr(module, name, value)
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


def check_whole_layer(
    impl: str, dtype: torch.dtype, plan: Plan, check: Callable[..., None] = check_layer
) -> int:
    """Surrogates, row masks, several bits a feature, chunks, recomputed signs; how many."""
    done = 0
    for n, d, f in plan.checked:
        mask = torch.arange(n) % 3 != 1
        for surrogate in SURROGATES:
            check(
                impl, dtype, n, d, f,
                surrogate=surrogate, surrogate_width=WIDTHS[surrogate],
                mask=mask if surrogate in ("sigmoid", "rectangle") else None,
            )  # fmt: skip
            done += 1
        more = {"surrogate": "identity", "n_bits": 2, "multilinear": True, "mask": mask}
        check(impl, dtype, n, d, f, **more)
        with variables(**{ENV_SIGN_PLANES: "0", ENV_SCRATCH: "0"}):
            check(impl, dtype, n, d, f, surrogate="rectangle", surrogate_width=2.5)
        with lists_serve(impl):
            for surrogate in ("rectangle", "identity"):
                width = WIDTHS[surrogate]
                check(impl, dtype, n, d, f, surrogate=surrogate, surrogate_width=width)
        done += 4
    return done


def check_many_rows(impl: str, n: int = 50_000, f: int = 70) -> None:
    """N^2 beyond int32: the covariance's numerator and signs."""
    torch.manual_seed(0)
    dense = torch.rand(n, f) < torch.rand(f)
    dense[:, 5] = dense[:, 6]
    right = exact.pair_values(dense.float(), slice(None))
    ops, words = registry.BACKENDS[impl].ops, pack_rows(dense)
    numerator, signs = ops["covariance"](words, dense.sum(0), torch.tensor(n), True)
    planes = [pack_rows(right > 0), pack_rows(right < 0)]
    if int(numerator) != int(right.abs().sum()) or not torch.equal(signs, torch.stack(planes)):
        raise WrongResultError(f"covariance of {n} rows: the numerator or the signs")
