"""Counts of pairs of columns, and what stands on them, by kernels and by torch's operators.

    pairs       rows in which two columns are on, for all pairs
    entropy     the estimates of `estimate_entropy`: a tree of pairs, and up to four columns at once
    neighbours  what features are on together with

Densities are log-normal as a trained code's. Every side gives the same integers, and the same
estimates to the last bit.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bae_fast import BinaryCode
from bae_fast.entropy import estimate_entropy
from bae_fast.interpret.facts import neighbours
from bae_fast.ops import registry
from bae_fast.packing import pack_rows
from bae_fast.pairs import pair_counts
from bench import tables
from bench.collect import densities
from bench.exact import WrongResultError
from bench.timing import SECONDS, Comparison, Side, run_cases

# what, N, F, ones in a row
CASES = [
    ("pairs", 8192, 2304, 32),
    ("pairs", 65536, 2304, 32),
    ("pairs", 8192, 2304, 1152),
    ("pairs", 8192, 8192, 64),
    ("entropy", 16384, 2304, 32),
    ("neighbours", 16384, 2304, 32),
]


def correlated(n: int, f: int, on: int) -> BinaryCode:
    """``[n, f]``: columns of log-normal densities, of which neighbours are on together."""
    g = torch.Generator().manual_seed(0)
    density = densities(f, on / f, 0.0)
    words = []
    for start in range(0, n, 1024):
        drawn = torch.rand(min(1024, n - start), f, generator=g)
        # a column takes each draw of the one before it with a chance of 0.3
        kept = torch.rand(drawn.shape, generator=g) < 0.3
        words.append(pack_rows(torch.where(kept, drawn.roll(1, 1), drawn) < density))
    return BinaryCode(torch.cat(words), f)


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """`impl="auto"` is torch's operators."""
    before = os.environ.get(registry.ENV_IMPL)
    os.environ[registry.ENV_IMPL] = "torch"
    try:
        yield
    finally:
        if before is None:
            del os.environ[registry.ENV_IMPL]
        else:
            os.environ[registry.ENV_IMPL] = before


def build(what: str, n: int, f: int, on: int) -> Comparison:
    """One of the three, on one code."""
    code, columns = correlated(n, f, on), torch.arange(f)

    def near() -> tuple[Tensor, Tensor]:
        found = neighbours(code)
        return found.indices, found.scores

    calls: dict[str, Callable[[], Any]] = {
        "pairs": lambda: (pair_counts(code, columns),),
        "entropy": lambda: estimate_entropy(code),
        "neighbours": near,
    }
    call = calls[what]

    def in_torch() -> Any:
        with without_kernels():
            return call()

    right = (_integers(code),) if what == "pairs" else in_torch()

    def check(name: str, found: Any) -> None:
        same = found == right if what == "entropy" else all(map(torch.equal, found, right))
        if not same:
            raise WrongResultError(f"{what} of {name} differ")

    case = {"what": what, "n": n, "f": f, "on": on}
    return Comparison(case, {"torch": Side(in_torch), "kernel": Side(call)}, check, {})


def _integers(code: BinaryCode) -> Tensor:
    """B^T B by blocks, whose sums are integers that float32 holds."""
    total = torch.zeros(code.n_columns, code.n_columns, dtype=torch.float64)
    for words in code.words.split(4096):
        bits = BinaryCode(words, code.n_columns).values(torch.float32)
        total += bits.T @ bits
    return total.float()


def run(only: str = "", seconds: float = SECONDS) -> dict[str, Any]:
    """Every case; ``only`` those whose name holds that text."""
    return run_cases(CASES, build, only, seconds, floors=False)


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    body = []
    for row in result["rows"]:
        sides = row["sides"]
        times = [
            tables.milliseconds(sides[name]["seconds"]) if "seconds" in sides[name] else "refused"
            for name in ("torch", "kernel")
        ]
        ratio = sides["kernel"].get("ratio")
        sizes = f"{row['n']:,}, {row['f']:,}, {row['on']:,}"
        body.append([row["what"], sizes, *times, "" if ratio is None else f"{ratio:.0f}"])
    header = ["what", "N, F, ones in a row", "torch", "kernel", "torch : kernel"]
    return tables.markdown(header, body) + f"\n\n{tables.machine(result)} Medians."
