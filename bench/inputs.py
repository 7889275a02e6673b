"""Random inputs of every comparison, and the implementations that can run here."""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.devices import has_bfloat16
from bae_fast.ops import registry

# (N, d, F): F/d of 4, 16, 4, 8 and 32
SHAPES = [
    (512, 576, 2304),
    (512, 512, 8192),
    (512, 2048, 8192),
    (2048, 512, 4096),
    (512, 256, 8192),
]
# nothing a multiple of a word or a vector
TINY = [(66, 24, 331)]

# shares of ones: the paper's start, a trained sparse code
DENSITIES = (0.5, 0.03)

# of the `rectangle` surrogate; pre-activations have unit deviation
WIDTH = 0.25


def tensors(n: int, d: int, f: int, density: float) -> list[Tensor]:
    """x ``[N, d]`` and the four parameters; b_enc gives every feature about that density, but
    the first, which is always on, and the second, which never is."""
    torch.manual_seed(0)
    x = torch.randn(n, d)
    W_enc = torch.randn(d, f) / d**0.5
    deviation = W_enc.norm(dim=0)
    b_enc = deviation * torch.special.ndtri(torch.tensor(density)) + 0.01 * torch.randn(f)
    b_enc[0], b_enc[1] = 100.0, -100.0
    return [x, W_enc, b_enc, torch.randn(f, d) / f**0.5, 0.1 * torch.randn(d)]


def implementations() -> list[str]:
    """The packed implementations that can run on a CPU here, the default first."""
    request = registry.Request("cpu", torch.float32)
    return [n for n in registry.AUTO_ORDER["cpu"] if not registry.reasons_against(n, request)]


def half_side() -> list[str]:
    """The default implementation with bfloat16 products, as `Trainer` runs it where native."""
    return [f"{implementations()[0]} bf16"] if has_bfloat16("cpu") else []


def simd() -> str | None:
    """Instruction set of the compiled kernels, or None where there are none."""
    backend = registry.BACKENDS[implementations()[0]]
    return None if backend.simd is None else backend.simd()
