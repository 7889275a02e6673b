"""The covariance of sparse codes: lists beside bits, the dense program and a floor program.

    forward    the numerator: ``lists``, ``bits`` (the other form of the same operator), ``eager``
               and ``floor`` (bench/lists.cpp), all from the same packed bits but eager
    gradient   the encoder's backward with nothing but the covariance's gradient, of the window's
               entries; it is checked at some features

A code has intensities log-normal over its columns, and the window holds 3.4 times as many entries
as there are ones. Forms that would take minutes are left out: ``MOST_BITS``, ``MOST_EAGER``.
"""

from __future__ import annotations

import ctypes
import functools
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bae_fast.backends.cpp import covariance as cpp_covariance
from bae_fast.ops import registry
from bae_fast.packing import WORD_BITS, column_counts, n_words, popcount, unpack_rows
from bench import ceilings, eager, exact, tables
from bench.exact import WrongResultError
from bench.timing import SECONDS, Comparison, Side, compare

SOURCE = Path(__file__).with_name("lists.cpp")
ROWS, ONES = 4096, 32
FEATURES = (2048, 8192, 65536, 2**20)
MOST_BITS, MOST_EAGER = 8192, 2048  # larger ones take minutes
SPREAD = 1.0  # standard deviation of the logarithm of a column's intensity
WINDOW = 3.4  # entries, times ones
CHECKED = 16  # features whose gradient is checked
LEFT_COLUMNS = 8
NEVER, ALWAYS = float("inf"), 1e-9

CROSSOVER_ROWS, CROSSOVER_FEATURES = (512, 4096), (2304, 8192, 32768)


def sparse_words(n: int, f: int, ones: float, seed: int) -> Tensor:
    """Row-packed bits, about ``ones`` a row; columns of one F have the same intensities."""
    g = torch.Generator().manual_seed(f)
    intensity = torch.exp(SPREAD * torch.randn(f, generator=g))
    g.manual_seed(seed)
    total = int(n * ones)
    columns = torch.multinomial(intensity, total, replacement=True, generator=g)
    rows = torch.randint(n, (total,), generator=g)
    places = torch.unique(rows * f + columns)
    rows, columns = places // f, places % f
    words = torch.zeros(n * n_words(f), dtype=torch.int32)
    bit = torch.bitwise_left_shift(torch.ones((), dtype=torch.int32), (columns % WORD_BITS).int())
    words.index_add_(0, rows * n_words(f) + columns // WORD_BITS, bit)
    return words.view(n, -1)


@functools.cache
def _floor() -> Any:
    library = ceilings.compiled(SOURCE)
    if library is None:
        raise RuntimeError("the floor program needs a C++ compiler; none was found")
    library.floor_numerator.restype = ctypes.c_int64
    library.floor_numerator.argtypes = (
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int,
        ctypes.POINTER(ctypes.c_double),
    )  # fmt: skip
    return library.floor_numerator


def floor(words: Tensor, f: int) -> tuple[int, float]:
    """The numerator, and the seconds of the counting alone, without making the lists."""
    seconds = ctypes.c_double()
    found = _floor()(
        words.data_ptr(), len(words), words.stride(0), f, torch.get_num_threads(),
        ctypes.byref(seconds),
    )  # fmt: skip
    return found, seconds.value


@contextmanager
def list_cost(cost: float | None) -> Iterator[None]:
    """Lists always (``ALWAYS``), never (``NEVER``), or by the package's own choice (None)."""
    table = cpp_covariance.LIST_COST
    before = dict(table)
    try:
        if cost is not None:
            table.update(dict.fromkeys(table, cost))
        yield
    finally:
        table.update(before)


class Code(NamedTuple):
    """Bits, window and what the operators take besides."""

    words: Tensor
    window: Tensor
    counts: Tensor
    f: int

    @classmethod
    def make(cls, n: int, f: int, ones: float) -> Code:
        words = sparse_words(n, f, ones, 0)
        return cls(words, sparse_words(n, f, WINDOW * ones, 1), column_counts(words, f), f)

    @property
    def visited(self) -> int:
        """sum_r l_r^2."""
        return sum(int(popcount(p).sum(-1).square().sum()) for p in self.words.split(256))

    def covariance(self, cost: float | None, keep: bool = False) -> tuple[Tensor, Tensor]:
        total = torch.tensor(len(self.words))
        with list_cost(cost):
            return registry.BACKENDS["cpp"].ops["covariance"](self.words, self.counts, total, keep)

    def gradient(self, left: Tensor, cost: float | None, signs: Tensor | None) -> Tensor:
        f, total = self.f, torch.tensor(len(self.words))
        zeros = torch.zeros(LEFT_COLUMNS, f), torch.zeros(f), torch.zeros(f, LEFT_COLUMNS)
        with list_cost(cost):
            return registry.BACKENDS["cpp"].ops["encoder_backward"](
                left, *zeros, self.words, self.window, None, None, None, None, torch.ones(()),
                signs, self.words, self.counts, total, "rectangle", 1.0, 1, [False, True, True],
            )[1]  # fmt: skip

    def both(self, left: Tensor, cost: float | None) -> tuple[Tensor, Tensor]:
        """Numerator and gradient, as one step asks for them."""
        numerator, signs = self.covariance(cost, keep=cost == NEVER)
        return numerator, self.gradient(left, cost, signs if signs.numel() else None)

    def exact_gradient(self, left: Tensor, features: Tensor) -> Tensor:
        """left^T of the gradient at the window's entries of some features: ``[m, len]``."""
        n = len(self.words)

        def columns(words: Tensor, of: Tensor) -> Tensor:
            return words[:, of // WORD_BITS] >> (of % WORD_BITS).int() & 1

        b = columns(self.words, features).float()
        products = torch.zeros(n, len(features), dtype=torch.float64)
        ones_signs = torch.zeros(len(features), dtype=torch.float64)
        step = 512 * WORD_BITS
        for start in range(0, self.f, step):
            end = min(self.f, start + step)
            part = unpack_rows(self.words[:, start // WORD_BITS : n_words(end)], end - start)
            part = part.float()
            ones = self.counts[start:end].double()
            v = n * (part.t() @ b).double() - torch.outer(ones, self.counts[features].double())
            signs = v.sign()
            own = ((features >= start) & (features < end)).nonzero().flatten()
            signs[features[own] - start, own] = 0
            products += (part @ signs.float()).double()
            ones_signs += ones @ signs
        inside = columns(self.window, features).double()
        return left.double().t() @ ((products - ones_signs / n) * inside) * (2 / (n - 1))


def build(n: int, f: int, ones: float) -> tuple[Comparison, Comparison]:
    """Forward, and forward with gradient, at one size."""
    code = Code.make(n, f, ones)
    truth = functools.cache(lambda: floor(code.words, f)[0])
    if f <= MOST_EAGER:
        dense = unpack_rows(code.words, f).float()
        right = exact.covariance_numerator(dense)
        if truth() != right:
            raise WrongResultError(f"the floor program gives {truth()}; should be {right}")

    def check_numerator(side: str, result: Any) -> None:
        if side == "eager":
            value = truth() / (n * (n - 1))
            if abs(float(result) / value - 1) > 1e-3:
                raise WrongResultError(f"the covariance is {float(result)}; should be {value}")
        elif int(result[0]) != truth():
            raise WrongResultError(f"the numerator is {int(result[0])}; should be {truth()}")

    left = torch.randn(n, LEFT_COLUMNS, generator=torch.Generator().manual_seed(2))
    used = (code.counts > 0).nonzero().flatten()
    features = used[:: max(len(used) // CHECKED, 1)][:CHECKED]
    expected = functools.cache(lambda: code.exact_gradient(left, features))

    def check_both(side: str, result: tuple[Tensor, Tensor]) -> None:
        check_numerator(side, result)
        error = exact.relative_error(result[1][:, features], expected())
        if error > 1e-5:
            raise WrongResultError(f"the gradient is off by {error:.1e} of its norm")

    case = {"n": n, "f": f, "ones": ones}
    forward = {
        "floor": Side(lambda: floor(code.words, f)),
        "lists": Side(lambda: code.covariance(None)),
    }
    both = {"lists": Side(lambda: code.both(left, None))}
    if f <= MOST_BITS:
        forward["bits"] = Side(lambda: code.covariance(NEVER, keep=True))
        both["bits"] = Side(lambda: code.both(left, NEVER))
    if f <= MOST_EAGER:
        forward["eager"] = Side(lambda: eager.absolute_covariance(dense))
    work: dict[str, float] = {"visited": code.visited}
    return (
        Comparison({"part": "forward"} | case, forward, check_numerator, work),
        Comparison({"part": "forward and gradient"} | case, both, check_both, work),
    )


def run(
    only: str = "", seconds: float = SECONDS, features: tuple[int, ...] = FEATURES, n: int = ROWS
) -> dict[str, Any]:
    """Every size whose F is in ``only``."""
    rows = []
    for f in features:
        if only not in str(f):
            continue
        for comparison in build(n, f, ONES):
            row = compare(comparison, seconds=seconds)
            if comparison.case["part"] == "forward":
                words = sparse_words(n, f, ONES, 0)
                row["counting_seconds"] = statistics.median(floor(words, f)[1] for _ in range(5))
            rows.append(row)
            print(tables.line({k: v for k, v in row.items() if k != "counting_seconds"}))
    return {"rows": rows}


def _pairs(result: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of forward and of both, by size."""
    for row in result["rows"]:
        if row["part"] == "forward":
            for other in result["rows"]:
                if other["part"] != "forward" and other["f"] == row["f"]:
                    yield row, other


def table(result: dict[str, Any]) -> str:
    """Markdown: a line a size."""

    def time(row: dict[str, Any], side: str) -> str:
        found = row["sides"].get(side, {})
        return tables.milliseconds(found["seconds"]) if "seconds" in found else ""

    body = []
    for forward, both in _pairs(result):
        lists = forward["sides"]["lists"].get("seconds")
        least = forward["sides"]["floor"].get("seconds")
        whole = both["sides"]["lists"].get("seconds")
        body.append(
            [
                f"{forward['f']:,}",
                *(time(forward, side) for side in ("eager", "bits", "lists", "floor")),
                tables.milliseconds(forward["counting_seconds"]),
                f"{lists / least:.2f}" if lists and least else "",
                *(time(both, side) for side in ("bits", "lists")),
                f"{whole / lists:.2f}" if lists and whole else "",
            ]
        )
    header = [
        "F", "eager", "bits", "lists", "floor", "its counting", "lists : floor",
        "bits, with gradient", "lists, with gradient", "with gradient : forward",
    ]  # fmt: skip
    return tables.markdown(header, body)


def plot(result: dict[str, Any]) -> bytes:
    """Milliseconds of the forward pass against F."""
    from bae_fast.report.series import Panel, Series, plot_panels

    found: dict[str, list[tuple[int, tuple[float, float, float]]]] = {}
    for row in result["rows"]:
        if row["part"] != "forward":
            continue
        for name, side in row["sides"].items():
            if "seconds" in side:
                found.setdefault(name, []).append((row["f"], (side["seconds"] * 1e3,) * 3))
    series = [
        Series(
            name, [p[0] for p in sorted(points)], [p[1] for p in sorted(points)], name == "floor"
        )
        for name, points in found.items()
    ]
    return plot_panels([Panel(f"N = {ROWS:,}, L0 = {ONES}", "F", "ms", series, logarithmic=True)])
