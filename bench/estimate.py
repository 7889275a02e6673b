"""The time of a training step on an H200 by arithmetic: what is computed and moved, over rates.

Nothing here has run on a device and no rate was measured there: every one is an assumption, named
in :class:`Rates` and printed with the table. Codes are dense, so the covariance is by products, and
sign planes are kept; one side has sparse codes, counted by lists. Products run one after another,
and what is moved adds to what is computed. A step takes the longer of what the host starts and what
the device does; in a graph the latter. The forms of the products with the signs, B S, that were
weighed stand beside one another.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple
from unittest import mock

from bae_fast.ops.nvidia import ENV_PAIRS, ENV_SIGNS, lists_may_serve
from bench import launches, tables


class Rates(NamedTuple):
    """What is assumed of an H200, a second.

    Attributes:
        half: multiply-adds of bfloat16 products, 0.7 of the 989 TFLOP/s that the maker states.
        int8: of int8 products by Triton with operands unpacked in registers, 0.4 of 1,979 Top/s.
        bits: of 1-bit products by mma.sync, whose rate no one states: ``ops.nvidia`` assumes it.
        wgmma: of 1-bit products by wgmma: an instruction has as many bytes as one of int8 and is
            taken to last as long, so eight times the maker's 1,979 Top/s, and half of that.
        int8_wgmma: of int8 products by wgmma with both operands in shared memory, half as well.
        counters: additions to counters in the L2 cache, as ``ops.nvidia`` assumes them.
        bytes: of memory, 0.8 of 4.8 TB/s.
        host: starts of a kernel or operator from Python.
        device: the same by the device, which the host or a graph has told before.
    """

    half: float = 0.7 * 989e12 / 2
    int8: float = 0.4 * 1979e12 / 2
    bits: float = 2e15
    wgmma: float = 0.5 * 8 * 1979e12 / 2
    int8_wgmma: float = 0.5 * 1979e12 / 2
    counters: float = 2e10
    bytes: float = 0.8 * 4.8e12
    host: float = 1 / 6e-6
    device: float = 1 / 1e-6


SHAPES = [(512, 1024, 4096), *launches.SHAPES, (4096, 4096, 65536)]
# with pairs and products with the signs by wgmma
PANELS = "cuda, wgmma"
# sparse codes with so many ones a row, and windows of as many entries
LISTS, ONES = "triton, lists", 64
PARTS = ("products", "pairs", "B S", "moved", "optimizer")


def parts(impl: str, n: int, d: int, f: int, rates: Rates) -> dict[str, float]:
    """Seconds of a step's parts."""
    one_bit = impl != "triton"
    bits = rates.wgmma if impl == PANELS else rates.bits
    pairs, signs = n * f * f / 2, float(n * f * f)
    numbers = 2.0 * d * f  # of the two weights
    of_signs = 2 * signs / bits if one_bit else signs / rates.int8
    # planes written and read, for wgmma written and read once more, as tiles
    planes = (1 + (impl == PANELS)) * 2 * f * f / 4
    moved = (
        6 * numbers  # half-precision copies, each once: 4 bytes read, 2 written
        + 2 * 2 * 2 * n * f  # bits unpacked for decode and its gradient, written and read
        + 2 * 4 * n * f  # the covariance's part of the gradient in fp32
        + 2 * 2 * n * f  # the gradient at pre in half precision
        + planes * (impl != LISTS)
    )
    counted = 2 * n * ONES**2 / rates.counters  # pairs of all rows, and back to zero
    by_lists = {"pairs": counted, "B S": counted + n * ONES**2 / rates.counters}
    return {
        "products": 5 * n * d * f / rates.half,
        "pairs": pairs / (bits if one_bit else rates.int8),
        "B S": of_signs,  # two planes by 1-bit products; int8 holds -1, 0 and 1
        "moved": moved / rates.bytes,
        "optimizer": 28 * numbers / rates.bytes,
        **(by_lists if impl == LISTS else {}),
    }


# forms of B S: 1-bit products of both planes, or int8 ones of bits and signs as bytes; the last one
# adds the gradient at the bits to the same sums and rounds both to half precision
FORMS = ("1-bit, mma.sync", "int8, wgmma", "1-bit, wgmma", "1-bit, wgmma, with G W_decᵀ")
FORM_SHAPES = SHAPES[2:]


def form_of_signs(form: str, n: int, d: int, f: int, rates: Rates) -> dict[str, float]:
    """Seconds of a form's products, and of what it moves from the planes to a matrix of sums.

    The product G W_decᵀ, which every form makes, is left out.
    """
    signs, planes = float(n * f * f), f * f / 4  # bytes of both planes
    sums = 2 * 4 * n * f  # fp32, written, and read by the gradient's kernel
    tiles = 2 * (planes + n * f / 8)  # written and read
    products, moved = {
        FORMS[0]: (2 * signs / rates.bits, sums),
        FORMS[1]: (signs / rates.int8_wgmma, sums + 2 * (f * f + n * f)),  # bytes, there and back
        FORMS[2]: (2 * signs / rates.wgmma, sums + tiles),
        FORMS[3]: (2 * signs / rates.wgmma, tiles + 2 * 2 * d * (n + f)),  # G, W_dec in tiles too
    }[form]
    return {"products": products, "moved": (planes + moved) / rates.bytes}


def run(only: str = "", seconds: float = 0.0) -> dict[str, Any]:
    """Every shape by both implementations; nothing is timed."""
    rates, rows = Rates(), []
    impls = (*launches.KERNELS, PANELS, LISTS)
    for (n, d, f), impl in ((shape, impl) for shape in SHAPES for impl in impls):
        if only not in f"{impl}-{n}-{d}-{f}" or (impl == LISTS and not lists_may_serve(n, f)):
            continue
        objective = "rectangle" if impl == LISTS else "paper"
        form = {ENV_PAIRS: "wgmma", ENV_SIGNS: "wgmma"} if impl == PANELS else {}
        with mock.patch.dict(os.environ, form):
            counts = launches.count(impl.split(",")[0], n, d, f, objective)
        starts = sum(sum(counter.values()) for counter in counts.values())
        found = parts(impl, n, d, f, rates)
        device = sum(found.values()) + starts / rates.device
        rows.append(
            {"impl": impl, "n": n, "d": d, "f": f, "parts": found}
            | {"started": max(device, starts / rates.host)}
            | {"graph": device}
        )
    forms = [
        {"form": form, "n": n, "d": d, "f": f, "parts": form_of_signs(form, n, d, f, rates)}
        for n, d, f in FORM_SHAPES
        for form in FORMS
        if only in f"B S-{n}-{d}-{f}"
    ]
    return {"rates": rates._asdict(), "rows": rows, "forms": forms}


def table(result: dict[str, Any]) -> str:
    """Markdown, milliseconds: steps, the rates that they follow from, and the forms of B S."""
    header = ["N, d, F", "impl", *PARTS, "step", "in a graph"]
    lines = [
        [
            ", ".join(f"{row[key]:,}" for key in "ndf"),
            row["impl"],
            *(f"{row['parts'][part] * 1e3:.2f}" for part in PARTS),
            *(f"{row[key] * 1e3:.1f}" for key in ("started", "graph")),
        ]
        for row in result["rows"]
    ]
    rates = result["rates"]
    note = (
        "Milliseconds by arithmetic, not run on a device. Assumed of an H200, a second: "
        f"{rates['half']:.2g} multiply-adds in bfloat16, {rates['int8']:.2g} in int8 "
        f"({rates['int8_wgmma']:.2g} by wgmma), "
        f"{rates['bits']:.2g} of bits ({rates['wgmma']:.2g} by wgmma), {rates['bytes']:.2g} bytes, "
        f"{rates['counters']:.2g} additions to counters (lists, of {ONES} ones a row); "
        f"a start takes the host {1e6 / rates['host']:.0f} µs and the device "
        f"{1e6 / rates['device']:.0f} µs."
    )
    forms = [
        [
            ", ".join(f"{row[key]:,}" for key in "ndf"),
            row["form"],
            *(f"{row['parts'][part] * 1e3:.2f}" for part in ("products", "moved")),
            f"{sum(row['parts'].values()) * 1e3:.2f}",
        ]
        for row in result["forms"]
    ]
    weighed = tables.markdown(["N, d, F", "form of B S", "products", "moved", "sum"], forms)
    return "\n\n".join([tables.markdown(header, lines), weighed, note])
