"""The covariance of sparse codes: lists beside bits, the dense program and a floor program.

    forward    the numerator: ``lists``, ``bits`` (the other form of the same operator), ``eager``
               and ``floor`` (bench/lists.cpp), all from the same packed bits but eager
    gradient   the encoder's backward with nothing but the covariance's gradient, of the window's
               entries; it is checked at some features
    step       a whole training step with its optimizer, with the covariance and without
    bank       the numerator of many past rows, counted anew, beside a pass over pairs that were
               kept: n_i changes with every batch, so updated counts need at least that pass
    memory     peak of a whole step with the covariance beyond parameters, gradients and the
               optimizer's state, beside the bytes kept for backward (docs/how/step.md)

A code has intensities log-normal over its columns, and the window holds 3.4 times as many entries
as there are ones. Forms that would take minutes are left out: ``MOST_BITS``, ``MOST_EAGER``.
"""

from __future__ import annotations

import ctypes
import functools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bae_fast import BAEOutput, binary_autoencoder
from bae_fast.backends.cpp import covariance as cpp_covariance
from bae_fast.ops import registry
from bae_fast.packing import WORD_BITS, column_counts, n_words, popcount, unpack_rows
from bench import ceilings, eager, exact, memory, rival, tables
from bench.exact import WrongResultError
from bench.step import LEARNING_RATE, parameters_of
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

STEPS = ((4096, 512, 65536),)  # N, d, F
COVARIANCE_WEIGHT = 1e-7
BANKS = ((32768, 65536), (131072, 65536))  # N, F
PAIR_BYTES = 12  # i, j and n_ij
MEMORY = ((4096, 64, 2**20),)  # N, d, F


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
def _program() -> Any:
    library = ceilings.compiled(SOURCE)
    if library is None:
        raise RuntimeError("the floor program needs a C++ compiler; none was found")
    given = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int)
    seconds, pairs = ctypes.POINTER(ctypes.c_double), ctypes.POINTER(ctypes.c_int64)
    library.floor_numerator.argtypes = (*given, seconds)
    library.kept_pairs_numerator.argtypes = (*given, seconds, pairs)
    for function in (library.floor_numerator, library.kept_pairs_numerator):
        function.restype = ctypes.c_int64
    return library


def _given(words: Tensor, f: int) -> tuple[int, ...]:
    return words.data_ptr(), len(words), words.stride(0), f, torch.get_num_threads()


def floor(words: Tensor, f: int) -> tuple[int, float]:
    """The numerator, and the seconds of the counting alone, without making the lists."""
    seconds = ctypes.c_double()
    found = _program().floor_numerator(*_given(words, f), ctypes.byref(seconds))
    return found, seconds.value


def kept_pairs(words: Tensor, f: int) -> tuple[int, float, int]:
    """The numerator from pairs that were counted before, the seconds of that, and the pairs."""
    seconds, pairs = ctypes.c_double(), ctypes.c_int64()
    found = _program().kept_pairs_numerator(
        *_given(words, f), ctypes.byref(seconds), ctypes.byref(pairs)
    )
    return found, seconds.value, pairs.value


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


@functools.lru_cache(maxsize=1)
def _parameters(f: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(LEFT_COLUMNS, f), torch.zeros(f), torch.zeros(f, LEFT_COLUMNS)


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
        """Numerator, and with ``keep`` what backward needs: planes, or lists."""
        total = torch.tensor(len(self.words))
        with list_cost(cost):
            return registry.BACKENDS["cpp"].ops["covariance"](
                self.words, self.counts, total, keep, keep
            )

    def gradient(self, left: Tensor, cost: float | None, signs: Tensor | None) -> Tensor:
        total = torch.tensor(len(self.words))
        with list_cost(cost):
            return registry.BACKENDS["cpp"].ops["encoder_backward"](
                left, *_parameters(self.f), self.words, self.window,
                None, None, None, None, torch.ones(()), signs, self.words, self.counts, total,
                "rectangle", 1.0, 1, [False, True, True],
            )[1]  # fmt: skip

    def both(self, left: Tensor, cost: float | None) -> tuple[Tensor, Tensor]:
        """Numerator and gradient, as one step asks for them."""
        numerator, signs = self.covariance(cost, keep=True)
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
        "lists": Side(lambda: code.covariance(None, keep=True)),
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


def training_step(given: list[Tensor], width: float, covariance: bool) -> Callable[[], BAEOutput]:
    """One step of the recipe's objective, with the covariance or without; returns its forward."""
    x, parameters = given[0], parameters_of(given)
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)

    def step() -> BAEOutput:
        optimizer.zero_grad()
        out = binary_autoencoder(
            x, *parameters, surrogate="rectangle", surrogate_width=width, multilinear=True,
            covariance=covariance, impl="cpp",
        )  # fmt: skip
        assert out.variance is not None
        loss = (x - out.recon).square().mean() + out.variance / x.numel()
        loss = loss + rival.RECIPE.entropy_weight * out.entropy
        if out.covariance is not None:
            loss = loss + COVARIANCE_WEIGHT * out.covariance
        loss.backward()
        optimizer.step()
        return out

    return step


def build_step(n: int, d: int, f: int) -> Comparison:
    """A step with the covariance beside the same without it, at the densities of a trained code."""
    given, width = rival.trained(n, d, f, ONES // rival.ONES)

    def check(side: str, out: BAEOutput) -> None:
        if not torch.isfinite(out.recon).all():
            raise WrongResultError("the reconstruction is not finite")
        if out.covariance is None:
            return
        value = floor(out.code.words, f)[0] / (n * (n - 1))
        result = float(out.covariance.detach())
        if abs(result / value - 1) > 1e-5:
            raise WrongResultError(f"the covariance is {result}; should be {value}")

    sides = {
        name: Side(training_step(given, width, covariance))
        for name, covariance in (("without", False), ("with", True))
    }
    case = {"part": "step", "n": n, "d": d, "f": f, "ones": ONES}
    return Comparison(case, sides, check, {"flops": 2.0 * n * d * f})


def bank_row(n: int, f: int, seconds: float) -> dict[str, Any]:
    """Counting anew, and what counts that follow the bank need at least."""
    words = sparse_words(n, f, ONES, 0)
    code = Code(words, words, column_counts(words, f), f)
    truth = floor(words, f)[0]

    def check(side: str, result: tuple[Tensor, Tensor]) -> None:
        if int(result[0]) != truth:
            raise WrongResultError(f"the numerator is {int(result[0])}; should be {truth}")

    case = {"part": "bank", "n": n, "f": f, "ones": ONES}
    sides = {"anew": Side(lambda: code.covariance(None))}
    row = compare(Comparison(case, sides, check, {"visited": code.visited}), seconds=seconds)
    kept = [kept_pairs(words, f) for _ in range(3)]
    if {found for found, *_ in kept} != {truth}:
        raise WrongResultError(f"kept pairs give {kept[0][0]}; should be {truth}")
    row["kept_seconds"] = statistics.median(seconds for _, seconds, _ in kept)
    return row | {"kept_pairs": kept[0][2]}


def kept_bytes(n: int, f: int, ones: float, active: int) -> float:
    """Bits, window, counts and lists of one step: ``active`` features are not constant."""
    return 2 * 4 * n * n_words(f) + 8 * f + 12 * n * ones + 8 * n + 4 * f + 12 * active


def memory_row(n: int, d: int, f: int) -> dict[str, Any]:
    """Peak bytes of a whole step, in a process of its own."""
    case = {"n": n, "d": d, "f": f}
    asked = {"impl": "cpp", "objective": "million", "threads": torch.get_num_threads()}
    peak = memory.in_fresh_process("packed", case | asked)["peak_bytes"]
    ones = memory.MILLION.density * f
    most = kept_bytes(n, f, ones, min(f, int(n * ones)))
    return {"part": "memory", "sides": {}, "peak_bytes": peak, "kept_bytes": most} | case


def run(
    only: str = "",
    seconds: float = SECONDS,
    features: tuple[int, ...] = FEATURES,
    n: int = ROWS,
    steps: tuple[tuple[int, int, int], ...] = STEPS,
    banks: tuple[tuple[int, int], ...] = BANKS,
    memories: tuple[tuple[int, int, int], ...] = MEMORY,
) -> dict[str, Any]:
    """What of "operators-F", "step-F", "bank-N" and "memory-F" holds ``only``."""
    rows = []
    for rows_of_step, d, f in steps:
        if only in f"step-{f}":
            rows.append(compare(build_step(rows_of_step, d, f), seconds=seconds))
            print(tables.line(rows[-1]), flush=True)
    for f in features:
        if only not in f"operators-{f}":
            continue
        for comparison in build(n, f, ONES):
            row = compare(comparison, seconds=seconds)
            if comparison.case["part"] == "forward":
                words = sparse_words(n, f, ONES, 0)
                row["counting_seconds"] = statistics.median(floor(words, f)[1] for _ in range(5))
            rows.append(row)
            shown = {k: v for k, v in row.items() if k != "counting_seconds"}
            print(tables.line(shown), flush=True)
    for rows_of_bank, f in banks:
        if only in f"bank-{rows_of_bank}":
            rows.append(bank_row(rows_of_bank, f, seconds))
            print(rows[-1], flush=True)
    for rows_of_step, d, f in memories:
        if only in f"memory-{f}":
            rows.append(memory_row(rows_of_step, d, f))
            print(rows[-1], flush=True)
    return {"rows": rows}


def _pairs(result: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of forward and of both, by size."""
    for row in result["rows"]:
        if row["part"] == "forward":
            for other in result["rows"]:
                if other["part"] == "forward and gradient" and other["f"] == row["f"]:
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
    text = tables.markdown(header, body)
    for row in result["rows"]:
        if row["part"] == "step":
            plain, whole = (row["sides"][side].get("seconds") for side in ("without", "with"))
            if plain and whole:
                text += (
                    f"\n\nA whole training step at N, d, F = {row['n']:,}, {row['d']:,}, "
                    f"{row['f']:,} takes {tables.milliseconds(plain)} without the covariance and "
                    f"{tables.milliseconds(whole)} with it ({whole / plain:.2f})."
                )
        elif row["part"] == "bank" and "seconds" in row["sides"]["anew"]:
            anew = tables.milliseconds(row["sides"]["anew"]["seconds"])
            text += (
                f"\n\nThe numerator of a bank of {row['n']:,} rows at F = {row['f']:,} takes "
                f"{anew} when it is counted anew. A pass over its "
                f"{row['kept_pairs'] / 1e6:,.1f} million pairs, had they been kept, "
                f"takes {tables.milliseconds(row['kept_seconds'])}, and they need "
                f"{tables.mebibytes(PAIR_BYTES * row['kept_pairs'])}."
            )
        elif row["part"] == "memory":
            text += (
                f"\n\nPeak memory of a whole step with the covariance at N, d, F = {row['n']:,}, "
                f"{row['d']:,}, {row['f']:,}, above parameters, gradients and the optimizer's "
                f"state, is {tables.mebibytes(row['peak_bytes'])}, of which "
                f"{tables.mebibytes(row['kept_bytes'])} are kept for backward by the formula."
            )
    return text


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
