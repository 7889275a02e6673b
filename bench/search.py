"""The search for codes beside the encoder that it starts from, by the kernel and in plain torch.

Rows are sums of planted features and noise. Features' densities are log-normal as a trained code's,
and the encoder's columns are the decoder's rows with a threshold that gives every feature about its
share, so the first guess is as a trained encoder's: mostly right, with features on that others
explain. The kernel must find the very bits that plain torch finds, and these must cost less.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bae_fast import BinaryAutoencoder, BinaryCode, SearchedAutoencoder
from bae_fast import search as searching
from bae_fast.packing import unpack_rows
from bench import tables
from bench.collect import densities
from bench.exact import WrongResultError
from bench.timing import SECONDS, Comparison, Side, run_cases

# N, d, F, features on in a row
CASES = [
    (8192, 576, 2304, 32),
    (4096, 1024, 8192, 48),
    (2048, 2048, 16384, 64),
]
NOISE = 0.5
PRICE = 3e-4


def planted(n: int, d: int, f: int, on: int) -> tuple[BinaryAutoencoder, Tensor]:
    """A module whose decoder made the rows ``[n, d]``, and these."""
    torch.manual_seed(0)
    bae = BinaryAutoencoder(d, f).eval()
    directions = torch.randn(f, d) / d**0.5
    density = densities(f, on / f, 0.0)
    rows = []
    for start in range(0, n, 1024):
        bits = torch.rand(min(1024, n - start), f) < density
        rows.append(bits.float() @ directions + NOISE * torch.randn(len(bits), d) / d**0.5)
    x = torch.cat(rows)
    bae.fit_normalization_(x)
    with torch.no_grad():
        bae.W_dec.copy_(directions / bae.x_scale)
        bae.b_dec.copy_(-bae.x_mean / bae.x_scale)
        bae.W_enc.copy_(directions.T)
        pre = bae.normalize(x) @ bae.W_enc
        for j, share in enumerate((density * n).round().long().clamp(1, n - 1).tolist()):
            bae.b_enc[j] = -pre[:, j].kthvalue(n - share + 1).values
    return bae, x


def build(n: int, d: int, f: int, on: int) -> Comparison:
    """Encoding, and encoding with a search after it by the kernel and by plain torch."""
    bae, x = planted(n, d, f, on)
    model = SearchedAutoencoder.of(bae, x, bit_price=PRICE)
    first = bae.encode(x)
    plain = _in_torch(model, x)
    before, after = (_costs(model, x, code) for code in (first, plain))
    flips = _differing(first, plain) / n

    def check(name: str, code: BinaryCode) -> None:
        if name == "encoder" and not code.equal(first):
            raise WrongResultError("the encoder gave other bits")
        if name != "encoder" and not code.equal(plain):
            raise WrongResultError(f"{_differing(code, plain)} bits differ from plain torch's")
        if name != "encoder" and not bool((after <= before + 1e-6).all()):
            raise WrongResultError("rows cost more than before")

    sides = {
        "encoder": Side(lambda: bae.encode(x)),
        "kernel": Side(lambda: model.encode(x)),
        "torch": Side(lambda: _in_torch(model, x)),
    }
    case = {
        "operator": "search", "n": n, "d": d, "f": f, "on": on, "changed": flips,
        "cost_before": float(before.mean()), "cost_after": float(after.mean()),
    }  # fmt: skip
    return Comparison(case, sides, check, {})


def _in_torch(model: SearchedAutoencoder, x: Tensor) -> BinaryCode:
    """Searched codes without the kernel."""
    found = searching.extras_of
    searching.extras_of = lambda *to: dataclasses.replace(found(*to), search=None)
    try:
        return model.encode(x)
    finally:
        searching.extras_of = found


@torch.no_grad()
def _costs(model: SearchedAutoencoder, x: Tensor, code: BinaryCode) -> Tensor:
    """What the search lowers, of each row, but for a constant: float64 ``[n]``."""
    error = (model.normalize(x) - model.normalize(model.decode(code))).double().square().mean(1)
    prices = model.bits_of_ones(torch.float64)
    bits = torch.cat(
        [
            unpack_rows(part, code.n_columns, torch.float64) @ prices
            for part in code.words.split(512)
        ]
    )
    return error + model.bit_price * bits


def _differing(a: BinaryCode, b: BinaryCode) -> int:
    changed = a.words ^ b.words
    return int(BinaryCode(changed, a.n_columns).counts().sum())


def run(only: str = "", seconds: float = SECONDS) -> dict[str, Any]:
    """Every case."""
    return run_cases(CASES, build, only, seconds, floors=False)


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    body = []
    for row in result["rows"]:
        sides = row["sides"]
        rate = row["n"] / sides["kernel"]["seconds"] if "seconds" in sides["kernel"] else 0
        body.append(
            [
                tables.shape(row),
                f"{row['changed']:.1f}",
                f"{row['cost_after'] / row['cost_before'] - 1:+.0%}",
                *(
                    tables.milliseconds(sides[name]["seconds"])
                    if "seconds" in sides[name]
                    else "refused"
                    for name in ("encoder", "kernel", "torch")
                ),
                f"{rate:,.0f}",
            ]
        )
    header = [
        "N, d, F",
        "bits changed in a row",
        "error and price",
        "encoder alone",
        "with the search",
        "with it in plain torch",
        "rows a second",
    ]
    return tables.markdown(header, body) + f"\n\n{tables.machine(result)} Medians."
