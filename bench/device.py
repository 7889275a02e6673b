"""A GPU: every operator and kernel checked against float64, then timed, in one command.

    python -m bench device [--out DIR] [--seconds 540] [--impl triton cuda] [--resume DIR]
                           [--only KIND ...] [--report-only]

It runs from a plain checkout: the kernels are found in its folders where nothing is installed.
What one command has no time for another one does: ``--resume`` goes on with its ``device.json``,
on the same device with the same versions, and ``--only`` names the kinds of cases that are run.

Kernels are compiled first, by a few processes at once: one process would take minutes.

Checks come first: each operator and the whole layer of each implementation in fp32, bf16 and fp16,
on odd shapes, several densities, constant and equal columns, ties; decode again and again on one
input, its bits compared; pairs and products with the signs by wgmma, which wait for this, at the
edges of their sizes; a training run with its steps in a CUDA graph, which has to be the run
without, bit for bit. Then a step, and its kernels by a profiler. Then, the most telling first,
whole steps and operators against the dense program in bf16; the covariance against int8 products;
steps replayed from a CUDA graph; the small checks once more under ``compute-sanitizer``; the tests
that need a device; last the compiled dense program. Every timed call is checked on its own inputs
before, and one that is wrong has no figure; a side of which an operator was refused in the checks
is timed all the same, and marked. Times are the device's, by events, the L2 cache overwritten
before every call and the host ahead. What the host takes to start a call is kept beside them: a
shorter step takes as long as the host, unless it is replayed from a graph. Peaks are above what is
there between steps: x, parameters, gradients, optimizer.

The whole ends within ``--seconds``: a case is not begun where its kind has shown that it would not
fit, and one process watches another that works. A kernel that ends that process or hangs costs the
side at hand and no other, and whatever that process had started ends with it. ``device.json`` in
``--out`` is whole after every case.

Exit status: 1 where anything was wrong, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib.util
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import bae_fast as bf
from bae_fast.codes import ENV_SIGN_PLANES
from bae_fast.files import read_json, write_json, write_text
from bae_fast.ops import registry
from bae_fast.ops.nvidia import ENV_PAIRS, ENV_SIGNS
from bae_fast.ops.products import ENV_SCRATCH
from bae_fast.packing import pack_rows
from bae_fast.surrogates import SURROGATES
from bae_fast.training import Graphs, Trainer, TrainingConfig
from bench import eager, exact, operators, step, tables, timing
from bench.exact import WrongResultError
from bench.timing import Comparison, Side

# of the keys of device.json
SCHEMA = 1

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
IMPLS = ("triton", "cuda")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

SECONDS = 540.0
# of the whole for the watching process: starting, ending, table and plot
SPARE = 10.0
# without a word of the worker until its kernel is taken to hang; compiling may take as long
STALL = 150.0
# why a case has no result where the whole has taken its time
TIME_UP = "time was up"
# exit status of a worker whose device no longer answers
DEAD = 75
# of compiling ahead of the first case
COMPILING = 120.0
# of the small checks under one of compute-sanitizer's tools
SANITIZING = 90.0
# processes of the tests that need a device, which compile more than they compute
TESTING = 8

# of ones, 33 a row at F = 65,536: codes that lists serve
SPARSE = 5e-4
# a decode that is repeated on one input
REPEATS = 50
# impl="cuda" with its pairs or its products with the signs by wgmma. (N, F) at which pairs are
# checked: one feature, edges of panels and of tiles of 1024 rows, blocks with many tiles, the most
# rows; and how often each is made
PANELS = "cuda wgmma"
PANEL_SHAPES = [
    (2, 1), (33, 129), (1024, 128), (1025, 300), (4096, 4096), (4097, 2500), (6000, 5000),
    (8192, 4096),
]  # fmt: skip
PANEL_REPEATS = 5
# (N, columns of S, F) at which products with the signs are checked: few of everything, edges of
# results of 256 x 128 and of tiles of 1024 bits, stages used again, blocks with many results
SIGN_SHAPES = [
    (2, 1, 1), (256, 128, 1024), (257, 129, 1025), (300, 500, 3300), (4096, 3000, 4128),
    (1025, 9000, 9000),
]  # fmt: skip
# cycles of a kernel that keeps the device busy while the host starts what is timed: half a
# millisecond, or half as long again as the host took for the same call before where that is more,
# up to a tenth of a second; and cycles a second of a fast clock
SLEEP, SLEEP_SHARE, MOST_SLEEP, CYCLES = 1_000_000, 1.5, 200_000_000, 2e9
# steps of a training run that is made with and without a CUDA graph
TRAINED = 16
# kernels of a step that the table shows
SHOWN = 12
# compute-sanitizer's tools, and its exit status where it found something
SANITIZERS = ("memcheck", "racecheck")
FOUND = 9
# products of the rate of 1-bit instructions: blocks a multiprocessor, threads, turns, a turn's
# independent ones, and the bit-MACs of one
RATE_BLOCKS, RATE_THREADS, RATE_TURNS, RATE_PRODUCTS = 4, 256, 4096, 8
BIT_MACS = 16 * 8 * 256


class Plan(NamedTuple):
    """Sizes of everything.

    Attributes:
        checked: (N, d, F) of the checks.
        head: (N, d, F) of what is measured first and most.
        more: the other (N, d, F) of steps, in order of importance.
        large: (N, d, F) of the largest operators.
        densities: shares of ones of operators.
        seconds: of timing a side.
        guess: seconds of a case of a kind that was not seen yet.
    """

    checked: list[tuple[int, int, int]]
    head: tuple[int, int, int]
    more: list[tuple[int, int, int]]
    large: tuple[int, int, int]
    densities: tuple[float, ...]
    seconds: float
    guess: float
    gemm_side: int
    copy_bytes: int


FULL = Plan(
    checked=[(66, 24, 331), (256, 96, 1024)],
    head=(4096, 2048, 16384),
    more=[
        (4096, 2048, 65536),
        (512, 2048, 16384),
        (4096, 4096, 65536),
        (1024, 2048, 16384),
        (8192, 2048, 16384),
        (4096, 4096, 16384),
        (512, 2048, 65536),
        (1024, 2048, 65536),
        (8192, 2048, 65536),
        (8192, 4096, 65536),
    ],
    large=(4096, 2048, 65536),
    densities=(0.5, 0.1, 0.01),
    seconds=1.0,
    guess=25.0,
    gemm_side=8192,
    copy_bytes=2**32,
)
TINY = Plan(
    checked=[(66, 24, 331)],
    head=(64, 24, 256),
    more=[(32, 24, 256)],
    large=(64, 24, 320),
    densities=(0.5,),
    seconds=0.0,
    guess=1.0,
    gemm_side=64,
    copy_bytes=2**16,
)

Case = dict[str, Any]


def cases(plan: Plan, impls: list[str], device: str) -> list[Case]:
    """Every case, in the order in which they are run."""

    def of(kind: str, shape: tuple[int, int, int], **more: Any) -> Case:
        return {"kind": kind, **more, **dict(zip("ndf", shape, strict=True))}

    found: list[Case] = [
        {"kind": "layer", "impl": impl, "dtype": dtype} for impl in impls for dtype in DTYPES
    ]
    found += [
        {"kind": "check", "operator": o, "n": n, "d": d, "f": f, "density": density}
        for n, d, f in plan.checked
        for o in operators.OPERATORS
        for density in operators.DENSITIES
    ]
    if "cuda" in impls:
        found += [{"kind": "panels"}, {"kind": "sign panels"}]
    if device == "cuda":
        graphs = [impl for impl in impls if registry.BACKENDS[impl].capturable]
        found += [{"kind": "trainer", "impl": impl} for impl in graphs]

    first, *rest = plan.densities
    found += [of("repeat", plan.head, impl=impl, density=first) for impl in impls]
    found += [{"kind": "ceilings"}, of("step", plan.head, objective="paper")]
    found += [of("profile", plan.head, impl=impl) for impl in impls]
    found += [of("pairs", plan.head, density=first)]
    found += [of("step", plan.head, objective=name) for name in step.OBJECTIVES if name != "paper"]
    found += [of("operator", plan.head, operator=o, density=first) for o in operators.OPERATORS]
    found += [of("step", plan.more[0], objective="paper"), of("pairs", plan.large, density=first)]
    found += [of("pairs", plan.large, density=SPARSE)]
    found += [of("step", plan.more[0], objective="paper", planes="made again")]
    if device == "cuda":
        found += [of("graph", plan.more[min(1, len(plan.more) - 1)], objective="paper")]
        found += [of("graph", plan.head, objective="paper")]
        found += [
            {"kind": "sanitize", "tool": tool, "impl": impl}
            for tool in SANITIZERS
            for impl in impls
        ]
        if "cuda" in impls:
            found += [{"kind": "sanitize", "tool": SANITIZERS[0], "impl": PANELS}]
    found += [of("step", plan.more[0], objective="no covariance")]
    found += [of("step", shape, objective="paper") for shape in plan.more[1:]]
    for density in rest:
        found += [of("pairs", plan.head, density=density)]
        found += [
            of("operator", plan.head, operator=o, density=density) for o in operators.OPERATORS
        ]
    found += [of("operator", plan.large, operator=o, density=first) for o in operators.OPERATORS]
    found += [of("step", shape, objective="rectangle") for shape in plan.more]
    found += [
        {"kind": "warmup", "impl": impl}
        for impl in impls
        if registry.BACKENDS[impl].warmup is not None
    ]
    if device == "cuda":
        found += [{"kind": "tests"}]
    return [*found, of("step", plan.head, objective="paper", compiled=True)]


# of cases, in the order of the first of each
KINDS = tuple(dict.fromkeys(case["kind"] for case in cases(FULL, list(IMPLS), "cuda")))


def name_of(case: Case) -> str:
    """A case as one word."""
    return tables.name(tuple(case.values()))


def sort_of(case: Case) -> str:
    """Cases of one sort take time alike; compiling the dense program is a sort of its own."""
    return case["kind"] + ", compiled" * bool(case.get("compiled"))


def size_of(case: Case) -> float:
    """What a case's time grows with: multiply-accumulates."""
    n, d, f = (case.get(key, 64) for key in "ndf")
    squares = case.get("objective") != "no covariance" and case["kind"] != "operator"
    squares |= str(case.get("operator")).startswith("covariance")
    return float(n) * f * (5 * d + (f if squares else 0))


# -- the layer ---------------------------------------------------------------------------------


NAMES = ("recon", "entropy", "covariance", "x", "W_enc", "b_enc", "W_dec", "b_dec")
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
    return {key: v.detach() for key, v in zip(NAMES, values, strict=True)}, out.code


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
    for key in NAMES:
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


def check_panels(
    covariance: Callable[..., tuple[Tensor, Tensor]],
    shapes: list[tuple[int, int]] = PANEL_SHAPES,
) -> int:
    """Numerators and planes of pairs by wgmma, each several times; how many.

    They are integers and bits: equal to float64's, and to those by mma.sync.

    Args:
        covariance: the operator of impl="cuda".

    Raises:
        WrongResultError: they are not.
    """
    for n, f in shapes:
        torch.manual_seed(n + f)
        dense = torch.rand(n, f) < torch.rand(f)
        dense[:, :: max(f // 5, 1)] = False  # constant columns, and one that is the opposite
        dense[:, f - 1] = ~dense[:, f // 2]
        words, counts = pack_rows(dense), dense.sum(0)
        right = exact.pair_values(dense.float(), slice(None))
        numerator = int(right.abs().sum())  # below 2^53: exact
        planes = torch.stack([pack_rows(right > 0), pack_rows(right < 0)])
        for form, times in (("mma", 1), ("wgmma", PANEL_REPEATS)):
            for repeat in range(times):
                with variables(**{ENV_PAIRS: form}):
                    got, signs = covariance(words, counts, torch.tensor(n), True)
                    alone, _ = covariance(words, counts, torch.tensor(n), False)
                where = f"pairs by {form} of {n} rows and {f} features, call {repeat + 1}"
                if int(got) != numerator or int(alone) != numerator:
                    raise WrongResultError(
                        f"{where}: {int(got)} with signs and {int(alone)} without; "
                        f"should be {numerator}"
                    )
                if not torch.equal(signs, planes):
                    wrong = int((signs != planes).sum())
                    raise WrongResultError(f"{where}: {wrong} words of signs of {signs.numel()}")
    return len(shapes) * PANEL_REPEATS


def check_sign_panels(
    sign_product: Callable[..., Tensor],
    digits_of: Callable[..., tuple[Tensor, Tensor]],
    shapes: list[tuple[int, int, int]] = SIGN_SHAPES,
) -> int:
    """Products with the signs by wgmma, each several times; how many.

    They are integers that are rounded once: equal to those of float64 to the last bit, and to those
    by mma.sync.

    Args:
        sign_product: of the kernels of impl="cuda".
        digits_of: :func:`bae_fast.kernels.counts.sign_operands`.

    Raises:
        WrongResultError: they are not.
    """
    for n, columns, f in shapes:
        torch.manual_seed(n + columns + f)
        dense, s = torch.rand(n, f) < torch.rand(f), torch.randint(-1, 2, (columns, f))
        words, planes = pack_rows(dense), torch.stack([pack_rows(s > 0), pack_rows(s < 0)])
        counts, n_rows = dense.sum(0), torch.tensor(n)
        digits, scale = digits_of(counts, n_rows, torch.tensor(float(n * n)), n)
        sums = n * (dense.double() @ s.double().t()) - counts.double() @ s.double().t()
        right = sums.float() * scale  # below 2^53: exact until here
        for form, times in (("mma", 1), ("wgmma", PANEL_REPEATS)):
            for repeat in range(times):
                with variables(**{ENV_SIGNS: form}):
                    got = sign_product(words, planes, digits, n_rows, scale)
                if not torch.equal(got, right):
                    raise WrongResultError(
                        f"B S by {form} of {n} rows, {columns} columns and {f} features, call "
                        f"{repeat + 1}: {int((got != right).sum())} numbers of {right.numel()}"
                    )
    return len(shapes) * PANEL_REPEATS


def panels_unavailable(device: str) -> str | None:
    """Why impl="cuda" makes nothing by wgmma here, or None."""
    reasons = registry.reasons_against("cuda", request_of(device))
    if not reasons and torch.cuda.get_device_capability() != (9, 0):
        reasons = ["compute capability 9.0 alone has the instruction"]
    return "; ".join(reasons) if reasons else None


# -- comparisons -------------------------------------------------------------------------------


def by_wgmma(side: Side, variable: str) -> Side:
    """The same side with what the variable names made by wgmma."""

    def run(*arguments: Any) -> Any:
        with variables(**{variable: "wgmma"}):
            return side.run(*arguments)

    return side._replace(run=run)


PAIRS_BLOCK = 8192


def pairs(n: int, f: int, density: float, impls: list[str]) -> Comparison:
    """The covariance forward, without signs, against int8 products; the bits are given unpacked.

    ``int8 counts`` only makes n_ij and drops it.
    """
    ours = operators.covariance(n, 0, f, density, impls)
    bits = operators.random_bits(n, f, density)
    columns = bits.t().contiguous().to(torch.int8)
    counts = bits.sum(0)
    words = pack_rows(bits)
    total = torch.tensor(n)
    starts = range(0, f, PAIRS_BLOCK)

    def blocks() -> Iterator[tuple[int, Tensor]]:
        for start in starts:
            yield start, torch._int_mm(columns[start : start + PAIRS_BLOCK], columns.t())

    def only_counts() -> Tensor:
        for _, joint in blocks():
            last = joint
        return last

    def numerator() -> tuple[Tensor]:
        total = torch.zeros((), dtype=torch.int64, device=columns.device)
        ones = counts.to(torch.int32)
        for start, joint in blocks():
            v = joint.mul_(n).sub_(torch.outer(ones[start : start + PAIRS_BLOCK], ones))
            v.diagonal(start).zero_()
            total += v.abs_().sum()
        return (total,)

    def packed(impl: str) -> Side:
        op = registry.BACKENDS[impl].ops["covariance"]
        return Side(functools.partial(op, words, counts, total, False))

    def check(side: str, result: Any) -> None:
        if side != "int8 counts":
            ours.check(side, result)
            return
        last = bits[:, starts[-1] :].float()
        if not torch.equal(result.double(), (last.t() @ bits.float()).double()):
            raise WrongResultError("the counts of pairs are not exact")

    sides = {"int8": Side(numerator), "int8 counts": Side(only_counts)}
    sides |= {impl: packed(impl) for impl in impls}
    if "cuda" in impls and panels_unavailable(words.device.type) is None:
        sides[PANELS] = by_wgmma(sides["cuda"], ENV_PAIRS)
    case = {"n": n, "f": f, "density": density}
    return Comparison(case, sides, check, ours.work | {"bytes": 4.0 * words.numel()})


def captured(run: Callable[[], Tensor]) -> Side:
    """A step replayed from a CUDA graph, captured by the first call."""

    @functools.cache
    def graph() -> tuple[Any, Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles; libraries' workspaces; optimizer's state
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = run()
        return graph, loss

    def replay() -> Tensor:
        made, loss = graph()
        made.replay()
        return loss

    return Side(replay)


def build(case: Case, impls: list[str], device: str) -> Comparison:
    """The comparison of a case that is timed or checked; tensors on ``device``."""
    kind, shape = case["kind"], (case["n"], case["d"], case["f"])
    with torch.device(device):
        if kind == "pairs":
            return pairs(case["n"], case["f"], case["density"], impls)
        if kind == "check":
            plain = case["operator"].startswith("covariance")
            names = [f"{i} {t}" for i in impls for t in DTYPES if t != "fp32" and not plain]
            return operators.build(
                case["operator"], *shape, case["density"], ["eager", "autocast", *impls, *names]
            )
        halves = [f"{impl} bf16" for impl in impls]
        if kind == "operator":
            names = impls if case["operator"].startswith("covariance") else halves
            found = operators.build(case["operator"], *shape, case["density"], ["autocast", *names])
            signs = case["operator"] == "covariance_backward" and "cuda" in found.sides
            if signs and panels_unavailable(device) is None:
                found.sides[PANELS] = by_wgmma(found.sides["cuda"], ENV_SIGNS)
            return found
        dense = ["autocast", "compile bf16"] if case.get("compiled") else ["autocast"]
        if shape == tuple(FULL.head) or device == "cpu":  # larger ones take it seconds
            halves = list(dict.fromkeys([*halves, "torch bf16"]))
        if kind == "graph":  # what waits for the device in between cannot be captured
            halves = [n for n in halves if registry.BACKENDS[n.split()[0]].capturable]
            found = step.build(case["objective"], *shape, halves)
            sides = {name: captured(side.run) for name, side in found.sides.items()}
            return found._replace(sides=sides)
        return step.build(case["objective"], *shape, [*dense, *halves])


# -- measuring ---------------------------------------------------------------------------------


class Machine:
    """Where things run, and how they are timed."""

    def __init__(self, device: str, plan: Plan) -> None:
        self.device, self.plan = device, plan
        size = 2**16
        if device == "cuda":
            properties = torch.cuda.get_device_properties(0)
            size = max(4 * getattr(properties, "L2_cache_size", 0), 2**28)
        self.cache = torch.zeros(size, dtype=torch.uint8, device=device)
        # seconds that the host took to start a call, by the address of what is called
        self.starting: dict[int, list[float]] = {}

    def clock(self, run: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
        """Device seconds of a call, its inputs not in the L2 cache."""
        self.cache.zero_()
        if self.device != "cuda":
            return timing.host_seconds(run, arguments)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        starting = self.starting.setdefault(id(run), [])
        ahead = SLEEP_SHARE * CYCLES * min(starting, default=0.0)
        torch.cuda._sleep(min(max(int(ahead), SLEEP), MOST_SLEEP))
        begin.record()  # reached after the sleep: the host is ahead by then
        host = time.perf_counter()
        result = run(*arguments)
        starting.append(time.perf_counter() - host)
        end.record()
        end.synchronize()
        del result
        return begin.elapsed_time(end) / 1e3

    def best(self, run: Callable[[], Any]) -> float:
        """Least of a few timed calls after one that is not."""
        times = timing.interleaved({"": Side(run)}, self.plan.seconds, self.clock)[""]
        return min(times)

    def peak(self, side: Side) -> int | None:
        """Bytes that a call takes above what was there; None where there is no such count."""
        if self.device != "cuda":
            return None
        arguments = side.prepare()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side.run(*arguments)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def release(self) -> None:
        """Give freed memory back."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def forget(self) -> None:
        """Free what the program before this one left: memory and compiled code."""
        self.starting.clear()
        self.release()
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # every shape compiled for itself

    def answers(self) -> bool:
        """Whether the device still computes: an illegal access ends that for the process."""
        if self.device != "cuda":
            return True
        try:
            return float(torch.ones(1, device="cuda").sum()) == 1
        except RuntimeError:
            return False


def measure_ceilings(machine: Machine) -> dict[str, Any]:
    """Rates measured in this run."""
    plan, device = machine.plan, machine.device
    with torch.device(device):
        source = torch.rand(plan.copy_bytes // 4)
        target = torch.empty_like(source)
        seconds = machine.best(functools.partial(target.copy_, source))
        found: dict[str, Any] = {"copy": 2 * plan.copy_bytes / seconds}
        del source, target
        side = plan.gemm_side
        for dtype in (torch.float32, torch.bfloat16):
            a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
            seconds = machine.best(functools.partial(torch.mm, a, b))
            found[f"gemm_{str(dtype).removeprefix('torch.')}"] = 2 * side**3 / seconds
        a = (torch.rand(side, side) < 0.5).to(torch.int8)
        seconds = machine.best(lambda: torch._int_mm(a, a.t()))
    found["bit_macs"] = {"int8": side**3 / seconds}
    if device == "cuda" and not registry.reasons_against("cuda", request_of(device)):
        found["bit_macs"]["b1"] = bit_rate(machine)
    return found


def request_of(device: str) -> registry.Request:
    """A call in bf16."""
    return registry.Request(device, torch.bfloat16)


def bit_rate(machine: Machine) -> float:
    """Bit-MACs a second of the 1-bit instruction, from registers alone."""
    from bae_fast.kernels_cuda import driver

    kernel = driver.Kernel(str(ROOT / "bench" / "rate.cu"), "bit_rate", 0, RATE_THREADS, "pi")
    properties = torch.cuda.get_device_properties(0)
    blocks = RATE_BLOCKS * properties.multi_processor_count
    out = torch.zeros(blocks * RATE_THREADS, dtype=torch.int32, device="cuda")
    seconds = machine.best(functools.partial(driver.start, kernel, blocks, out, RATE_TURNS))
    products = blocks * RATE_THREADS // 32 * RATE_TURNS * RATE_PRODUCTS
    return float(products * BIT_MACS / seconds)


# -- processes ---------------------------------------------------------------------------------


def below(pid: int) -> list[int]:
    """A process and all that it and they have started: Linux's tree."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            # behind the name, which may hold anything: state, parent
            parents.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(
                int(path.parent.name)
            )
    found = [pid]
    for each in found:
        found += parents.get(each, [])
    return found


def end(process: subprocess.Popen[Any]) -> None:
    """Kill a process with all that it has started: a checker's program would go on."""
    if process.poll() is not None:
        return  # its number may be another's by now
    for pid in below(process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Ended(NamedTuple):
    """What a process said, and its status; None where its time was up."""

    status: int | None
    text: str

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


def run_process(command: list[str], seconds: float, **environment: str) -> Ended:
    """Run a command for so long at most; what it started ends with it."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            command, env=os.environ | environment, cwd=ROOT, stdout=said, stderr=said
        )
        status: int | None = None
        try:
            status = process.wait(max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            pass
        finally:
            end(process)
            process.wait()
        said.seek(0)
        return Ended(status, said.read())


def tool(name: str) -> str | None:
    """A program of CUDA's toolkit: on the PATH, or where the toolkit usually lies."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    homes += sorted(map(str, Path("/usr/local").glob("cuda-*")), reverse=True)
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which(name, path=os.pathsep.join(places))


# -- one step seen from inside, and checkers from outside --------------------------------------


def check_repeats(impl: str, n: int, d: int, f: int, density: float) -> int:
    """Decode of one input in bf16, again and again: every bit of the result is the same.

    Raises:
        WrongResultError: it is not; or the first result is off.
    """
    comparison = operators.build("decode", n, d, f, density, ["autocast", f"{impl} bf16"])
    side = comparison.sides[f"{impl} bf16"]

    def bits() -> Tensor:
        result = side.run(*side.prepare())
        comparison.check(f"{impl} bf16", result)
        return result.view(torch.int16).clone()

    right = bits()
    for repeat in range(1, REPEATS):
        other = side.run(*side.prepare()).view(torch.int16)
        if not torch.equal(other, right):
            raise WrongResultError(
                f"decode gave other bits in call {repeat + 1} than in the first: "
                f"{int((other != right).sum())} of {right.numel()} numbers"
            )
    return REPEATS


def check_trainer(impl: str, device: str, graphs: Graphs | None = None) -> int:
    """A training run with its steps in a CUDA graph is the run without, to the last bit.

    Learning rates are exact in float32, so nothing may differ.

    Args:
        graphs: how steps are captured; None: by CUDA graphs.

    Raises:
        WrongResultError: a line of the log or a parameter differs.
        RuntimeError: the steps were not captured.
    """
    config = TrainingConfig(
        steps=TRAINED, batch_size=96, lr=2.0**-9, decay_from=1.0, refit=False, revive_every=7,
        entropy_from=0.5, bank_batches=3, precision="auto" if device == "cuda" else "float32",
    )  # fmt: skip
    rows = torch.randn(960, 48)
    found = []
    for graph in (False, True):
        torch.manual_seed(0)
        bae = bf.BinaryAutoencoder(48, 256, impl=impl, device=device).fit_normalization_(rows)
        trainer = Trainer(bae, rows, dataclasses.replace(config, cuda_graph=graph), graphs=graphs)
        lines = trainer.fit(log_every=1)
        if graph and trainer.learner.uncaptured is not None:
            raise RuntimeError(f"steps were not captured: {trainer.learner.uncaptured}")
        found.append(([{**line, "seconds": 0} for line in lines], bae.state_dict()))
    for number, (plain, replayed) in enumerate(zip(found[0][0], found[1][0], strict=True), 1):
        if plain != replayed:
            raise WrongResultError(f"step {number} is {replayed} in a graph and {plain} without")
    for name, value in found[0][1].items():
        if not torch.equal(value, found[1][1][name]):
            error = (value - found[1][1][name]).abs().max()
            raise WrongResultError(f"{name} of the run in a graph differs by up to {error:.3g}")
    return TRAINED


def profile(impl: str, shape: tuple[int, int, int], device: str) -> list[list[Any]]:
    """Kernels of one step of the paper's objective: name, count and microseconds of all."""
    from torch.profiler import ProfilerActivity

    with torch.device(device):
        run = step.build("paper", *shape, [f"{impl} bf16"]).sides[f"{impl} bf16"].run
    activities = [ProfilerActivity.CPU]
    run()  # compiles
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    found = []
    for event in profiler.key_averages():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if device == "cuda" and on_device:
            found.append([event.key, event.count, event.self_device_time_total])
        elif device != "cuda":
            found.append([event.key, event.count, event.self_cpu_time_total])
    return sorted(found, key=lambda row: -row[2])


def check_small(impl: str, device: str) -> int:
    """A few small whole layers: what runs under a checker that slows everything down."""
    if impl == PANELS:  # enough rows that a left panel is several tiles
        with torch.device(device), variables(**{ENV_PAIRS: "wgmma", ENV_SIGNS: "wgmma"}):
            check_layer("cuda", torch.bfloat16, 2100, 24, 331, surrogate="identity")
        return 1
    with torch.device(device):
        for dtype in (torch.bfloat16, torch.float32):
            check_layer(impl, dtype, 66, 24, 331, surrogate="rectangle", surrogate_width=2.5)
            with variables(**{ENV_SIGN_PLANES: "0", ENV_SCRATCH: "0"}):
                check_layer(impl, dtype, 66, 24, 331, surrogate="identity")
            with lists_serve(impl):
                check_layer(impl, dtype, 66, 24, 331, surrogate="rectangle", surrogate_width=2.5)
    return 6


def sanitize(tool_name: str, impl: str, seconds: float) -> dict[str, Any]:
    """:func:`check_small` in a process under compute-sanitizer."""
    checker = tool("compute-sanitizer")
    if checker is None:
        return {"unavailable": "compute-sanitizer is not found"}
    command = [checker, "--tool", tool_name, "--error-exitcode", str(FOUND)]
    if tool_name == "memcheck":
        # libraries ask the driver what may fail; our own calls check what they are answered
        command += ["--report-api-errors", "no"]
    command += [sys.executable, "-m", "bench", "device", "--small", "--impl", impl]
    # every tensor is an allocation of its own: its ends are known
    done = run_process(command, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if done.status is None:
        return {"unavailable": f"took more than {seconds:.0f} s"}
    if done.status == 0:
        return {"checked": tool_name}
    wrong = [x for x in done.lines if x.startswith("refused: ")]
    # any other end is the tool's own: there are machines on which it finds no device
    key = "refused" if done.status == FOUND or wrong else "unavailable"
    return {key: (wrong[0] if wrong else finding(done.lines))[:300]}


def finding(lines: list[str]) -> str:
    """What a checker says first, with the two lines behind it: there it names the kernel."""
    found = [i for i, x in enumerate(lines) if "ERROR" in x or "hazard" in x or "Invalid" in x]
    first = found[0] if found else 0
    text = [x.strip("= ") for x in lines[first : first + (3 if found else 1)]]
    return "; ".join(x for x in text if x) or "no reason"


# a line of pytest, alone or with xdist
FAILED = re.compile(r"(FAILED|ERROR) \S+::|::.* (FAILED|ERROR)\b")


def run_tests(seconds: float) -> dict[str, Any]:
    """The tests that need a device, whole; of those that time leaves out, how many were run."""
    (file,) = (ROOT / "tests").glob("**/test_triton_gpu.py")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "bench.checkout", "-o", "addopts="]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(TESTING, os.cpu_count() or 1))]
    done = run_process([*command, str(file)], seconds)
    ends = [re.search(r"(\S+::\w+(?:\[.*?\])?)", x) for x in done.lines if FAILED.search(x)]
    failed = list(dict.fromkeys(found.group(1) for found in ends if found))
    last = (done.lines or ["no reason"])[-1].strip("= ")
    if done.status is None:
        passed = len(re.findall(r"\bPASSED\b", done.text))
        last = f"took more than {seconds:.0f} s; {passed} tests had passed"
    if failed:
        return {"refused": last, "failed": failed[:50]}
    if done.status is None or (done.status == 0 and " passed" not in last):
        return {"unavailable": last}  # those that find no device are skipped
    return {"checked": last} if done.status == 0 else {"refused": last}


def level_of(found: dict[str, Any]) -> str:
    """The unit that a roofline's counts are taken to run on: the faster one."""
    return max(found["bit_macs"], key=found["bit_macs"].__getitem__)


def kind_of_failure(name: str, error: BaseException) -> str:
    """ "refused" where a side was wrong or failed, "unavailable" where it could not run."""
    cause = error.__cause__
    if isinstance(cause, torch.OutOfMemoryError):
        return "unavailable"
    return "unavailable" if name.startswith("compile") and cause is not None else "refused"


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    cause = error.__cause__
    if isinstance(cause, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    return " ".join(lines[: 2 if cause is not None else 1])[:300] or type(error).__name__


def compare(
    comparison: Comparison,
    machine: Machine,
    ceiling: dict[str, Any] | None,
    row: Case,
    note: Callable[[str], None],
    seconds_left: Callable[[], float],
    timed: bool,
) -> bool:
    """Fill ``row["sides"]``: every side checked, then timed, one after the other.

    ``note`` is told which side is at work. False: the device no longer answers.
    """
    sides, row["work"] = row["sides"], comparison.work
    for name in comparison.sides:
        if name in sides:
            continue
        note(name)
        begin = time.perf_counter()
        try:
            limit = max(int(min(timing.COMPILE_SECONDS, seconds_left() - 1)), 1)
            timing.verify(comparison, name, machine.device, limit)
        except WrongResultError as error:
            sides[name] = {kind_of_failure(name, error): first_line(error)}
            print(f"{name_of(row['case'])}: {name}: {sides[name]}", flush=True)
            if not machine.answers():
                return False
            machine.release()
        else:
            sides[name] = {"first_seconds": time.perf_counter() - begin}
    for name, side in comparison.sides.items() if timed else ():
        if "first_seconds" not in sides[name] or "seconds" in sides[name]:
            continue
        note(name)
        try:
            # a graph owns its memory
            peak = None if row["case"]["kind"] == "graph" else machine.peak(side)
            machine.starting.clear()  # the address of one that is gone may be another's
            times = timing.interleaved({name: side}, machine.plan.seconds, machine.clock)[name]
        except torch.OutOfMemoryError:
            sides[name] = {"unavailable": "out of memory"}
            machine.release()
            continue
        except Exception as error:
            sides[name] = {"refused": f"{type(error).__name__}: {first_line(error)}"}
            if not machine.answers():
                return False
            continue
        found = {"seconds": statistics.median(times), "least": min(times), "most": max(times)}
        sides[name] |= found | {"rounds": len(times)}
        host = machine.starting.get(id(side.run))
        if host:
            sides[name]["host_seconds"] = min(host)
        if peak is not None:
            sides[name]["peak_bytes"] = peak
        if ceiling is not None:
            level = level_of(ceiling)
            sides[name] |= timing.shares(comparison.work, found["seconds"], name, ceiling, level)
        machine.release()
    rival = next(iter(comparison.sides))
    first = sides[rival] if rival.split()[0] not in registry.IMPLS else {}
    for side in sides.values():
        if "seconds" in first and "seconds" in side:
            side["ratio"] = first["seconds"] / side["seconds"]
    return True


WARMUP = """
import sys, time, torch, bench, bae_fast as bf
begin = time.perf_counter()
bf.warmup(sys.argv[1], device=sys.argv[2])
if sys.argv[2] == "cuda":
    torch.cuda.synchronize()
print("seconds", time.perf_counter() - begin)
"""


def measure_warmup(impl: str, device: str, seconds: float) -> dict[str, Any]:
    """``bae_fast.warmup`` in a new process: with nothing compiled before, and once more."""
    found: dict[str, Any] = {}
    until = time.time() + seconds
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        kept = {"TRITON_CACHE_DIR": folder, "XDG_CACHE_HOME": folder, "PYTHONPATH": path}
        for key in ("cold_seconds", "warm_seconds"):
            left = until - time.time()
            done = run_process([sys.executable, "-c", WARMUP, impl, device], left, **kept)
            if done.status is None:
                return found | {"unavailable": f"{key} took more than {left:.0f} s"}
            if done.status:
                return found | {"refused": (done.lines or ["no reason"])[-1]}
            found[key] = float(next(x.split()[1] for x in done.lines if x.startswith("seconds ")))
    return found


# -- the worker --------------------------------------------------------------------------------


def settled(sides: dict[str, Any]) -> dict[str, Any]:
    """Sides of an interrupted case that need no further call."""
    ends = ("refused", "unavailable", "seconds", "checked")
    return {name: side for name, side in sides.items() if any(end in side for end in ends)}


# kinds of several sides, each of which a worker may end with
COMPARED = ("check", "step", "graph", "pairs", "operator")

# the operator that other checks are of
OF_OPERATORS = {
    "panels": "covariance", "sign panels": "covariance_backward", "repeat": "decode"
}  # fmt: skip


def spoiled(rows: list[dict[str, Any]], case: Case) -> set[str]:
    """Sides that the checks refused, as far as a timed case depends on them: they are marked."""
    found = set()
    whole = case["kind"] in ("step", "graph")
    needed = "covariance" if case["kind"] == "pairs" else case.get("operator")
    for row in rows:
        operator = row["case"].get("operator")
        if row["case"]["kind"] not in ("layer", "check", *OF_OPERATORS):
            continue
        operator = OF_OPERATORS.get(row["case"]["kind"], operator)
        if not (whole or operator == needed):
            continue
        wrong = {name for name, side in row["sides"].items() if "refused" in side}
        if whole and str(operator).startswith("covariance"):  # bits have no precision
            wrong |= {f"{name} bf16" for name in wrong}
        found |= wrong
    return found


def check_panels_of(kind: str) -> int:
    """The checks of pairs or of products with the signs by wgmma; how many."""
    if kind == "panels":
        return check_panels(registry.BACKENDS["cuda"].ops["covariance"])
    from bae_fast.kernels.counts import sign_operands
    from bae_fast.kernels_cuda.covariance import sign_product

    return check_sign_panels(sign_product, sign_operands)


def refuse(row: Case, side: str, error: Exception) -> None:
    """Note what a check of a side raised: memory that is not there is no fault."""
    if isinstance(error, torch.OutOfMemoryError):
        row["sides"][side] = {"unavailable": "out of memory"}
        return
    text = first_line(error)
    if not isinstance(error, WrongResultError):
        text = f"{type(error).__name__}: {text}"
    row["sides"][side] = {"refused": text}
    print(f"{name_of(row['case'])}: refused: {text}", flush=True)


def run_case(
    case: Case,
    impls: list[str],
    machine: Machine,
    result: dict[str, Any],
    row: dict[str, Any],
    note: Callable[[str], None],
    seconds_left: Callable[[], float],
) -> bool:
    """Fill one row. False: the device no longer answers."""
    kind = case["kind"]
    if row["sides"] and kind not in COMPARED:
        return True  # with its one side an earlier worker ended: another would end so as well
    if kind == "ceilings":
        result["ceilings"] = measure_ceilings(machine)
    elif kind == "warmup":
        note(case["impl"])
        left = min(seconds_left() - 1, STALL - 10)
        row["sides"][case["impl"]] = measure_warmup(case["impl"], machine.device, left)
    elif kind == "sanitize":
        note(case["tool"])
        reason = panels_unavailable(machine.device) if case["impl"] == PANELS else None
        if reason is not None:
            row["sides"][PANELS] = {"unavailable": reason}
            return True
        left = min(seconds_left() - 1, SANITIZING)
        row["sides"][case["impl"]] = sanitize(case["tool"], case["impl"], left)
    elif kind == "tests":
        note("pytest")
        row["sides"]["pytest"] = run_tests(min(seconds_left() - 1, STALL - 10))
    elif kind in ("panels", "sign panels"):
        note(PANELS)
        reason = panels_unavailable(machine.device)
        if reason is not None:
            row["sides"][PANELS] = {"unavailable": reason}
            return True
        try:
            with torch.device(machine.device):
                same = check_panels_of(kind)
            row["sides"][PANELS] = {"checked": same}
        except Exception as error:
            refuse(row, PANELS, error)
            return machine.answers()
    elif kind == "trainer":
        name = f"{case['impl']}, graph"
        note(name)
        try:
            row["sides"][name] = {"checked": check_trainer(case["impl"], machine.device)}
        except Exception as error:
            refuse(row, name, error)
            return machine.answers()
    elif kind == "profile":
        note(case["impl"])
        shape = (case["n"], case["d"], case["f"])
        row["kernels"] = profile(case["impl"], shape, machine.device)
        row["sides"][case["impl"]] = {"checked": len(row["kernels"])}
    elif kind == "repeat":
        name = f"{case['impl']} bf16"
        note(name)
        shape = (case["n"], case["d"], case["f"])
        try:
            with torch.device(machine.device):
                same = check_repeats(case["impl"], *shape, case["density"])
            row["sides"][name] = {"checked": same}
        except Exception as error:
            refuse(row, name, error)
            return machine.answers()
    elif kind == "layer":
        impl, dtype = case["impl"], case["dtype"]
        name = impl if dtype == "fp32" else f"{impl} {dtype}"
        note(name)

        def checked(*arguments: Any, **options: Any) -> None:
            note(name)  # each compiles for seconds
            check_layer(*arguments, **options)

        try:
            with torch.device(machine.device):
                same = check_whole_layer(impl, DTYPES[dtype], machine.plan, checked)
                row["sides"][name] = {"checked": same}
                if dtype == "fp32":
                    check_many_rows(impl)
        except Exception as error:
            refuse(row, name, error)
            return machine.answers()
    else:
        timed = kind != "check"
        comparison = build(case, impls, machine.device)
        again = {ENV_SIGN_PLANES: "0"} if case.get("planes") == "made again" else {}
        row["marked"] = sorted(spoiled(result["rows"], case) & set(comparison.sides)) * timed
        ceiling = result.get("ceilings")
        with variables(**again):
            return compare(comparison, machine, ceiling, row, note, seconds_left, timed)
    return True


def work(
    path: Path,
    impls: list[str],
    device: str,
    plan: Plan,
    until: float,
    only: Collection[str] = (),
) -> int:
    """Run every case that ``path`` does not hold yet, until a time; see the module.

    ``only``: kinds of cases; without any all are run.
    """
    result = read_json(path)
    machine = Machine(device, plan)
    gc.freeze()  # what is imported: else every collection goes through all of it
    rate: dict[str, tuple[float, float]] = {}
    for row in result["rows"]:
        _learn(rate, row)
    done = {name_of(row["case"]) for row in result["rows"]}
    for case in cases(plan, impls, device):
        if name_of(case) in done or (only and case["kind"] not in only):
            continue
        left = until - time.time()
        scale, least = rate.get(sort_of(case), (0.0, plan.guess))
        expected = max(scale * size_of(case), least)
        if expected > left or left < 1:
            result["skipped"].append(
                {"case": case, "reason": f"{left:.0f} s left, {expected:.0f} expected"}
            )
            continue
        # what an earlier worker left of this case when it ended
        sides = dict(result["ended"].get(name_of(case), {}))
        row = {"case": case, "sides": sides}

        def note(name: str, row: dict[str, Any] = row) -> None:
            result["running"] = {**row, "side": name}
            write_json(path, result)

        begin = time.time()
        alive = True
        try:
            note("")
            alive = run_case(case, impls, machine, result, row, note, lambda: until - time.time())
        except Exception as error:  # building a case failed: most likely its memory
            row["unavailable"] = (
                "out of memory"
                if isinstance(error, torch.OutOfMemoryError)
                else f"{type(error).__name__}: {first_line(error)}"
            )
            alive = machine.answers()
            print(f"{name_of(case)}: {row['unavailable']}", flush=True)
        row["wall_seconds"] = time.time() - begin
        result["running"] = None
        if not alive and settled(row["sides"]):  # the next worker does the other sides
            result["ended"][name_of(case)] = settled(row["sides"])
            write_json(path, result)
            return DEAD
        result["rows"].append(row)
        write_json(path, result)
        print(line(row), flush=True)
        if not alive:
            return DEAD
        _learn(rate, row)
        machine.forget()
    result["complete"] = not (result["skipped"] or only)
    result["clocks_after"] = clocks()
    write_json(path, result)
    return 0


def _learn(rate: dict[str, tuple[float, float]], row: dict[str, Any]) -> None:
    """Least seconds a multiply-accumulate and least seconds of the cases of a sort so far."""
    sort, wall = sort_of(row["case"]), row["wall_seconds"]
    scale, least = rate.get(sort, (float("inf"), float("inf")))
    rate[sort] = min(scale, wall / size_of(row["case"])), min(least, wall)


# -- compiling ahead ---------------------------------------------------------------------------

# what compiles the kernels of most cases, each in a process of its own
PARTS = (*DTYPES, *step.OBJECTIVES)


def compile_part(part: str, impls: list[str], device: str, plan: Plan) -> None:
    """Run what starts most kernels of a dtype's checks, or of an objective's step, once.

    What is wrong is not said here: the cases themselves find it.
    """

    def unchecked(*arguments: Any, **options: Any) -> None:
        with suppress(Exception):
            check_layer(*arguments, **options)

    for impl in [name for name in IMPLS if name in impls] or impls:
        with suppress(Exception), torch.device(device):
            if part in DTYPES:
                check_whole_layer(impl, DTYPES[part], plan, unchecked)
            else:
                names = [f"{impl} bf16"]
                step.build(part, *plan.head, names).sides[names[0]].run()


def compile_ahead(command: list[str], seconds: float) -> float:
    """Compile kernels by a process a part, for so long at most; how long it took.

    Kernels stay in triton's folder on disk and in the package's own. A part that fails or hangs
    leaves its kernels to the cases.
    """
    begin = time.time()
    processes = [
        subprocess.Popen(
            [*command, "--compile", part], cwd=ROOT, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for part in PARTS
    ]  # fmt: skip
    try:
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(begin + seconds - time.time(), 0.0))
    finally:
        for process in processes:
            end(process)
            process.wait()
    return time.time() - begin


# -- the watching process ----------------------------------------------------------------------


def resumed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What an earlier command measured on the same device, to go on with.

    Cases that time cut short or left out are run again, and so are their sides.

    Raises:
        ValueError: another device, other versions or another schema.
    """

    def of(result: dict[str, Any]) -> dict[str, Any]:
        own = result["environment"]["device"]
        return {
            "schema": result.get("schema"),
            "torch": result["environment"].get("torch"),
            **{key: own.get(key) for key in ("name", "triton", "driver_version")},
        }

    old, new = of(before), of(now)
    if old != new:
        raise ValueError(f"device.json must be of {new}; got {old}")
    if before["impls"] != now["impls"]:
        raise ValueError(f"device.json must be of {now['impls']}; got {before['impls']}")
    rows = [row for row in before["rows"] if not cut_short(row)]
    ended = {
        case: {name: side for name, side in sides.items() if side.get("unavailable") != TIME_UP}
        for case, sides in before["ended"].items()
    }
    again = {"rows": rows, "ended": ended, "skipped": [], "running": None, "complete": False}
    return {**before, **again}


def cut_short(row: dict[str, Any]) -> bool:
    """Whether time that was up ended a case."""
    sides = [*row["sides"].values(), {"unavailable": row.get("unavailable", "")}]
    return any(side.get("unavailable") == TIME_UP for side in sides)


def clocks() -> dict[str, str]:
    """Driver, clocks, temperature and power, where the driver's tool says so."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu")
    found = shutil.which("nvidia-smi")
    if found is None:
        return {}
    done = run_process([found, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"], 20.0)
    values = done.lines[:1]
    return (
        dict(zip(fields, (v.strip() for v in values[0].split(",")), strict=False))
        if (done.status == 0 and values)
        else {}
    )


def chip(device: str) -> dict[str, Any]:
    """The device and what its programs were built with."""
    found: dict[str, Any] = {"name": platform.processor() or platform.machine()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found = {
            "name": properties.name,
            "capability": list(torch.cuda.get_device_capability()),
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "l2": getattr(properties, "L2_cache_size", 0),
            "cuda": torch.version.cuda,
        }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    return found | clocks()


def watch(command: list[str], path: Path, seconds: float) -> None:
    """Run the worker until it is done or time is up, again where it ends before."""
    until = time.time() + seconds
    fruitless = 0
    while time.time() < until - 2:
        before = len(read_json(path)["rows"])
        process = subprocess.Popen([*command, "--until", str(until - 1)], cwd=ROOT)
        begin, reason = time.time(), ""
        try:
            while process.poll() is None and not reason:
                time.sleep(0.2)
                silent = time.time() - max(begin, path.stat().st_mtime)
                if time.time() > until:
                    reason = TIME_UP
                elif silent > STALL:
                    reason = f"no answer within {STALL:.0f} s"
        finally:
            end(process)
            status = process.wait()
        reason = reason or f"its process ended with status {status}"
        result = read_json(path)
        if status == 0:
            return
        running = result.get("running")
        if running and running["side"]:
            sides = {**settled(running["sides"]), running["side"]: {"refused": reason}}
            if reason == TIME_UP:
                sides[running["side"]] = {"unavailable": reason}
            result["ended"][name_of(running["case"])] = sides
            if reason == TIME_UP:
                result["rows"].append(
                    {"case": running["case"], "sides": sides, "wall_seconds": 0.0}
                )
            print(f"{name_of(running['case'])}: {running['side']}: {reason}", flush=True)
        elif running:
            row = {"case": running["case"], "sides": {}, "wall_seconds": 0.0}
            result["rows"].append(row | {"unavailable": reason})
        useful = running or status == DEAD or len(result["rows"]) > before
        fruitless = 0 if useful else fruitless + 1
        result["running"] = None
        write_json(path, result)
        if fruitless > 1:
            result["error"] = reason
            write_json(path, result)
            return


def refusals(result: dict[str, Any]) -> list[str]:
    """What was wrong, one line each."""
    found = [
        f"{name_of(row['case'])}: {name}: {side['refused']}"
        for row in result["rows"]
        for name, side in row["sides"].items()
        if "refused" in side
    ]
    return found + ([result["error"]] if "error" in result else [])


# -- results as text and plot ------------------------------------------------------------------


MARK = " †"


def line(row: dict[str, Any]) -> str:
    """A row on one line, for the terminal."""
    sides = (f"{n} {_cell(side)}" for n, side in row["sides"].items())
    return f"{name_of(row['case'])}: " + ", ".join(sides) + row.get("unavailable", "")


def _cell(side: dict[str, Any] | None) -> str:
    if side is None:
        return ""
    if "seconds" in side:
        return tables.cell(side)
    if "refused" in side:
        return "refused"
    return side.get("unavailable", "right")


def _rows(result: dict[str, Any], *kinds: str) -> list[dict[str, Any]]:
    return [
        row | row["case"] for row in result["rows"] if row["case"]["kind"] in kinds and row["sides"]
    ]


def _comparison(
    rows: list[dict[str, Any]], first: Mapping[str, Callable[[dict[str, Any]], str]], share: bool
) -> str:
    """Rows by sides; of the first of ours also the peak and the share of the floor."""
    names = list(dict.fromkeys(name for row in rows for name in row["sides"]))
    names.sort(key=lambda name: name not in eager.DENSE)
    mine = [name for name in names if name.split()[0] in registry.IMPLS]
    more = ["peak", "of the floor"] if share else []
    body = []
    for row in rows:
        ours = [row["sides"][name] for name in mine if "seconds" in row["sides"].get(name, {})]
        ours.sort(key=lambda side: side["seconds"])
        best = ours[0] if ours else {}
        extra = [
            tables.mebibytes(best["peak_bytes"]) if "peak_bytes" in best else "",
            f"{best['floor_share']:.0%}" if "floor_share" in best else "",
        ]
        marked = row.get("marked", [])
        cells = [_cell(row["sides"].get(n)) + MARK * (n in marked) for n in names]
        body.append([*(make(row) for make in first.values()), *cells, *(extra if share else [])])
    return tables.markdown([*first, *(f"`{n}`" if n in mine else n for n in names), *more], body)


def _objective(row: dict[str, Any]) -> str:
    return row["objective"] + (f", planes {row['planes']}" if "planes" in row else "")


def table(result: dict[str, Any]) -> str:
    """Markdown: steps, operators at the first density, the covariance against int8 products."""
    parts = []
    steps, graphs = _rows(result, "step"), _rows(result, "graph")
    objective = {"objective": _objective, "N, d, F": tables.shape}
    captured = {"objective": lambda row: row["objective"] + ", graph", "N, d, F": tables.shape}
    if steps:
        parts.append("A training step in bf16:\n\n" + _comparison(steps, objective, True))
    if graphs:
        parts.append(
            "The same replayed from a CUDA graph:\n\n" + _comparison(graphs, captured, True)
        )
    for kind, title in (("operator", "Operators"), ("pairs", "The covariance forward, no signs")):
        rows = _rows(result, kind)
        if rows:
            rows = [row for row in rows if kind == "pairs" or row["density"] == rows[0]["density"]]
            first = {
                "operator": lambda row: row.get("operator", "covariance").replace("_", " "),
                "N, d, F" if kind == "operator" else "N, F": (
                    tables.shape if kind == "operator" else lambda row: f"{row['n']}, {row['f']}"
                ),
                "density": tables.density,
            }
            parts.append(f"{title}:\n\n" + _comparison(rows, first, True))
    for row in result["rows"]:
        if row.get("kernels"):
            total = sum(time for _, _, time in row["kernels"])
            body = [
                [f"`{name[:70]}`", str(count), f"{time:,.0f}", f"{time / total:.0%}"]
                for name, count, time in row["kernels"][:SHOWN]
            ]
            launches = sum(count for _, count, _ in row["kernels"])
            parts.append(
                f"A step of `{row['case']['impl']}` from inside ({launches} launches, "
                f"{total / 1e3:.2f} ms):\n\n"
                + tables.markdown(["kernel", "launches", "microseconds", "share"], body)
            )
    return "\n\n".join([*parts, _notes(result)])


def _notes(result: dict[str, Any]) -> str:
    e, c = result["environment"], result.get("ceilings")
    own = e["device"]
    texts = [
        "Medians of device times with a cold L2 cache, in brackets how many times faster than the "
        "first column; every call checked first. peak and share of the floor "
        "(products at the measured bf16 rate, counts at the faster of the rates below, memory and "
        "Adam at the speed of a copy) are those of the fastest of ours."
    ]
    if c:
        counted = f"int8 products {c['bit_macs']['int8'] / 1e12:,.0f} T multiply-adds/s"
        if "b1" in c["bit_macs"]:
            counted += f", 1-bit ones {c['bit_macs']['b1'] / 1e12:,.0f}"
        texts.append(
            f"Measured there: bf16 product {c['gemm_bfloat16'] / 1e12:,.0f} TFLOP/s, copy "
            f"{c['copy'] / 1e12:.2f} TB/s, {counted}."
        )
    for row in _rows(result, "warmup"):
        for name, side in row["sides"].items():
            if "warm_seconds" in side:
                texts.append(
                    f'`bf.warmup("{name}")` takes {side["cold_seconds"]:.0f} s, '
                    f"{side['warm_seconds']:.0f} s with its kernels on disk."
                )
    if any(row.get("marked") for row in result["rows"]):
        texts.append(f"{MARK.strip()}: an operator of this side was refused in the checks.")
    wrong = refusals(result)
    if wrong:
        texts.append(f"Refused: {len(wrong)}; see `bench/results/device.json`.")
    if result["skipped"]:
        texts.append(f"Cases left out for time: {len(result['skipped'])}.")
    for name, reason in result["impls"].items():
        if reason != "available":
            texts.append(f"`{name}`: {reason}.")
    versions = f"torch {e['torch']}"
    if own.get("triton"):
        versions += f", triton {own['triton']}"
    if "driver_version" in own:
        versions += f", driver {own['driver_version']}"
    texts.append(f"{own['name']}, {versions}.")
    return " ".join(texts)


def plot(result: dict[str, Any]) -> bytes | None:
    """Milliseconds of the paper's step against N, a panel a (d, F); None without a step."""
    from bae_fast.report.series import Panel, Series, plot_panels

    found: dict[tuple[int, int], dict[str, list[tuple[int, tuple[float, float, float]]]]] = {}
    for row in _rows(result, "step", "graph"):
        if row["objective"] != "paper":
            continue
        for name, side in row["sides"].items():
            if "seconds" in side:
                label = name + (", graph" if row["kind"] == "graph" else "")
                times = (side["seconds"] * 1e3, side["least"] * 1e3, side["most"] * 1e3)
                panel = found.setdefault((row["d"], row["f"]), {})
                panel.setdefault(label, []).append((row["n"], times))
                if name.split()[0] in registry.IMPLS and "floor_seconds" in side:
                    floor = (side["floor_seconds"] * 1e3,) * 3
                    points = panel.setdefault("floor", [])
                    if row["n"] not in [n for n, _ in points]:
                        points.append((row["n"], floor))
    panels = [
        Panel(
            f"d = {d}, F = {f}", "rows N", "ms a step",
            [
                Series(name, [n for n, _ in found], [y for _, y in found], name == "floor")
                for name, found in ((name, sorted(points)) for name, points in series.items())
            ],
            logarithmic=True,
        )
        for (d, f), series in sorted(found.items())
    ]  # fmt: skip
    return plot_panels(panels) if panels else None


def report(folder: Path, readme: Path) -> None:
    """Plot and table from the JSON; the README's only for the committed results."""
    result = read_json(folder / "device.json")
    try:
        image = plot(result)
    except Exception as error:  # no matplotlib, or rows that it cannot draw: the table counts
        print(f"no plot: {type(error).__name__}: {error}")
    else:
        if image is not None:
            (folder / "device.png").write_bytes(image)
    print(table(result))
    if folder.resolve() == RESULTS.resolve() and readme.is_file():
        text = readme.read_text(encoding="utf-8")
        if "<!-- bench:device -->" in text:
            write_text(readme, tables.splice(text, "device", table(result)))


# -- the command -------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m bench device", description=(__doc__ or "").splitlines()[0]
    )
    found.add_argument(
        "--out", type=Path, default=RESULTS, help="The folder of device.json and device.png."
    )
    found.add_argument(
        "--seconds", type=float, default=SECONDS, help="The seconds that the whole may take (540)."
    )
    found.add_argument("--impl", nargs="+", default=list(IMPLS), help="The backends (triton cuda).")
    found.add_argument(
        "--resume", type=Path, help="A folder whose device.json is gone on with; --out may be it."
    )
    found.add_argument(
        "--only", nargs="+", default=[], metavar="KIND",
        help=f"The kinds of cases that are run ({' '.join(map(repr, KINDS))}).",
    )  # fmt: skip
    found.add_argument("--report-only", action="store_true", help="Only draw device.json.")
    hidden: dict[str, dict[str, Any]] = {
        "--device": {"default": "cuda", "choices": ["cuda", "cpu"]},  # for tests of this program
        "--tiny": {"action": "store_true"},
        "--worker": {"action": "store_true"},
        "--small": {"action": "store_true"},  # under a checker
        "--compile": {"default": ""},
        "--until": {"type": float, "default": 0.0},
    }
    for name, more in hidden.items():
        found.add_argument(name, help=argparse.SUPPRESS, **more)
    return found


def main(
    arguments: list[str],
    environment: Callable[[], dict[str, Any]] = dict,
    readme: Path = ROOT / "README.md",
    command: tuple[str, ...] = (sys.executable, "-m", "bench", "device"),
) -> int:
    """See the module. ``command`` starts the worker."""
    options = parser().parse_args(arguments)
    path = options.out / "device.json"
    if options.report_only:
        report(options.out, readme)
        return 0
    if options.device == "cuda" and not (torch.cuda.is_available() and torch.version.cuda):
        print("python -m bench device needs an NVIDIA GPU; torch sees none", file=sys.stderr)
        return 2
    plan = TINY if options.tiny else FULL
    unknown = [kind for kind in options.only if kind not in KINDS]
    if unknown:
        print(f"--only must be of {', '.join(KINDS)}; got {unknown[0]!r}", file=sys.stderr)
        return 2
    if options.small:
        for impl in options.impl:
            try:
                check_small(impl, options.device)
            except WrongResultError as error:
                print(f"refused: {impl}: {error}", file=sys.stderr)
                return 1
        return 0
    if options.compile:
        compile_part(options.compile, options.impl, options.device, plan)
        return 0
    if options.worker:
        return work(path, options.impl, options.device, plan, options.until, options.only)

    begin = time.time()
    request = request_of(options.device)
    reasons = {n: "; ".join(registry.reasons_against(n, request)) for n in options.impl}
    impls = [name for name, reason in reasons.items() if not reason]
    result = {
        "schema": SCHEMA,
        "environment": environment() | {"device": chip(options.device)},
        "impls": {name: reason or "available" for name, reason in reasons.items()},
        "seconds": options.seconds, "complete": False, "running": None,
        "rows": [], "skipped": [], "ended": {},
    }  # fmt: skip
    if options.resume is not None:
        try:
            result = resumed(read_json(options.resume / "device.json"), result)
        except (OSError, ValueError) as error:
            print(f"--resume: {error}", file=sys.stderr)
            return 2
    write_json(path, result)
    for name, reason in reasons.items():
        if reason:
            print(f"{name}: {reason}", flush=True)
    more = ["--device", options.device, *(["--tiny"] if options.tiny else []), "--impl", *impls]
    if not impls:
        return 1
    if set(impls) & set(IMPLS) and not result["rows"]:
        left = options.seconds - SPARE - (time.time() - begin)
        result["compiled_seconds"] = compile_ahead([*command, *more], min(COMPILING, left / 3))
        write_json(path, result)
    more += ["--worker", "--out", str(options.out.resolve())]
    more += ["--only", *options.only] if options.only else []
    watch([*command, *more], path, options.seconds - SPARE - (time.time() - begin))
    result = read_json(path)
    result["spent"] = result.get("spent", 0.0) + time.time() - begin
    write_json(path, result)
    try:
        report(options.out, readme)
    except Exception:  # what was measured is in the file
        traceback.print_exc()
    wrong = refusals(result)
    for text in wrong:
        print(f"refused: {text}", file=sys.stderr)
    return 1 if wrong else 0
