"""Collection of the tokens that go to each feature, from packed codes against dense features.

Ours takes all rows. The released program's way (dense features, log2(|b - p| + 1e-6), topk of each
row, an append a token in Python) and the plain torch way take the first rows only, and their
seconds are multiplied up: both are linear in the rows. Every side is checked on those rows first.
Bits are independent; features' densities are log-normal as a trained code's, some nearly always
on. Rows beyond the first block repeat it: 16 million random numbers a thousand rows take longer
than what is measured.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from torch import Tensor

from bae_fast import packing
from bae_fast.codes import BinaryCode
from bae_fast.interpret import SalientTokens, collect_code
from bench import tables
from bench.exact import WrongResultError
from bench.inputs import implementations
from bench.timing import LEAST, peak_bytes

ROWS = 2**20
BLOCK = 2**15  # rows that differ
SLICE = 2048  # rows of the sides that are multiplied up
RELEASED_BATCH = 512
K = 10
EPSILON = 1e-6

# F, mean share of ones, share of features nearly always on
CASES = [
    (16384, 0.02, 0.0),
    (16384, 0.03, 0.005),
    (16384, 0.5, 0.0),
]


def densities(f: int, mean: float, always: float) -> Tensor:
    """``[F]``; normal around a half for codes that are half on."""
    g = torch.Generator().manual_seed(0)
    if mean >= 0.4:
        p = mean + 0.05 * torch.randn(f, generator=g)
    else:
        p = (1.2 * torch.randn(f, generator=g)).exp()
        p *= mean / p.mean()
    p[: round(always * f)] = 0.97
    return p.clamp(0, 1)


def random_code(n: int, f: int, p: Tensor) -> BinaryCode:
    """``[n, f]``: blocks of ``BLOCK`` rows, all alike."""
    g = torch.Generator().manual_seed(1)
    words = torch.empty(n, packing.n_words(f), dtype=torch.int32)
    step = 1024
    for start in range(0, min(n, BLOCK), step):
        part = words[start : start + step]
        part.copy_(packing.pack_rows(torch.rand(len(part), f, generator=g) < p))
    for start in range(BLOCK, n, BLOCK):
        part = words[start : start + BLOCK]
        part.copy_(words[: len(part)])
    return BinaryCode(words, f)


def released(code: BinaryCode, density: Tensor) -> tuple[list[list[int]], list[list[float]]]:
    """Rows and magnitudes of each feature, as the released program collects them."""
    rows: list[list[int]] = [[] for _ in range(code.n_columns)]
    magnitudes: list[list[float]] = [[] for _ in range(code.n_columns)]
    p = density.float()
    for start in range(0, len(code), RELEASED_BATCH):
        latents = code[start : start + RELEASED_BATCH].to_dense(torch.float32)
        top = ((latents - p).abs() + EPSILON).log2().topk(K, dim=1)
        for row, (values, features) in enumerate(zip(top.values, top.indices, strict=True)):
            for value, feature in zip(values.tolist(), features.tolist(), strict=True):
                rows[feature].append(start + row)
                magnitudes[feature].append(value)
    return rows, magnitudes


def check(tokens: SalientTokens, code: BinaryCode, density: Tensor) -> None:
    """Each row's magnitudes are the k largest in float64, and belong to its features.

    Which of equal features a row goes to is nobody's right answer: values are compared.
    """
    n, k = len(code), min(K, code.n_columns)
    feature = torch.repeat_interleave(torch.arange(tokens.n_features), tokens.counts())
    if len(tokens.rows) != n * k or not torch.equal(
        tokens.rows.bincount(minlength=n), torch.full((n,), k)
    ):
        raise WrongResultError(f"{len(tokens.rows)} entries for {n} rows of {k}")
    order = tokens.rows.long().argsort(stable=True)
    features, values = feature[order].view(n, k), tokens.salience[order].view(n, k)
    if bool((features.diff(dim=1) <= 0).any()):
        raise WrongResultError("a row went to a feature twice")
    for start in range(0, n, RELEASED_BATCH):
        part = slice(start, start + RELEASED_BATCH)
        exact = ((code[part].to_dense(torch.float64) - density).abs() + EPSILON).log2()
        own = (exact.gather(1, features[part]) - values[part]).abs()
        best = exact.topk(k, dim=1).values - values[part].double().sort(1, descending=True).values
        if float(own.max()) > 1e-5 or float(best.abs().max()) > 1e-5:
            raise WrongResultError(f"magnitudes are off by {float(best.abs().max()):.2g}")


def as_tokens(found: tuple[list[list[int]], list[list[float]]], n: int) -> SalientTokens:
    """The released program's lists in our form, to be checked alike."""
    counts = torch.tensor([0] + [len(rows) for rows in found[0]])
    flat = [row for rows in found[0] for row in rows]
    values = [value for magnitudes in found[1] for value in magnitudes]
    return SalientTokens(counts.cumsum(0), torch.tensor(flat), torch.tensor(values), K, n)


def measured(run: Any, rows: int, total: int, rounds: int) -> dict[str, Any]:
    """Least seconds of some calls, multiplied up to all rows, and the peak of one."""
    seconds = []
    found: dict[str, Any] = {"peak_bytes": peak_bytes(run), "rows": rows}
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    found["seconds"] = min(seconds) * total / rows
    return found


def compare(f: int, mean: float, always: float, n: int = ROWS) -> dict[str, Any]:
    """One case: every side checked on the slice, then timed."""
    code = random_code(n, f, densities(f, mean, always))
    density = code[: min(BLOCK, n)].density()  # that of all rows: they repeat
    part = code[: min(SLICE, n)]
    names = implementations()
    sides: dict[str, dict[str, Any]] = {}
    runs: dict[str, Any] = {"released": functools.partial(released, part, density)}
    for name in names:  # the default counts its densities itself
        given = {"code": code} if name == names[0] else {"code": part, "density": density}
        runs[name] = functools.partial(collect_code, k=K, impl=name, **given)
    for name, run in runs.items():
        try:
            if name == "released":
                check(as_tokens(run(), len(part)), part, density)
            else:
                check(collect_code(part, k=K, density=density, impl=name), part, density)
        except WrongResultError as error:
            sides[name] = {"refused": str(error)}
            continue
        rows = n if name == names[0] else len(part)
        sides[name] = measured(run, rows, n, LEAST)
    if "seconds" in sides["released"]:
        for name, side in sides.items():
            if name != "released" and "seconds" in side:
                side["ratio"] = sides["released"]["seconds"] / side["seconds"]
    return {"n": n, "f": f, "density": mean, "always": always, "sides": sides}


def run(only: str = "", seconds: float = 0.0) -> dict[str, Any]:
    """Every case; a call takes seconds, so the number of calls is fixed."""
    rows = []
    for case in CASES:
        if only in tables.name(case):
            rows.append(compare(*case))
            print(tables.line(rows[-1]), flush=True)
    return {"rows": rows}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    body = []
    for row in result["rows"]:
        always = f", {row['always']:.1%} of them at 97 %" if row["always"] else ""
        line = [f"{row['n']:,}, {row['f']:,}", f"{row['density']:.0%}{always}"]
        for name in ("released", "cpp", "torch"):
            side = row["sides"].get(name)
            if side is None or "seconds" not in side:
                line.append("" if side is None else "refused")
                continue
            ratio = f" ({side['ratio']:,.0f}x)" if "ratio" in side else ""
            star = "*" if side["rows"] < row["n"] else ""
            line.append(f"{side['seconds']:,.3g} s{star}{ratio}")
        own = next(row["sides"][name] for name in ("cpp", "torch") if name in row["sides"])
        line.append(tables.mebibytes(own["peak_bytes"]) if "peak_bytes" in own else "")
        body.append(line)
    header = [
        "tokens, F",
        "mean density",
        "released way",
        "`cpp`",
        "`torch`",
        "peak above the code",
    ]
    return tables.markdown(header, body) + (
        f"\n\n{tables.machine(result)} Least of {LEAST} calls. Every token to its {K} most "
        f"salient features. * {SLICE:,} rows, multiplied up."
    )
