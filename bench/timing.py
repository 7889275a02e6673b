"""Comparisons: sides that are checked, then timed in turns in one process.

A :class:`Comparison` is a case and its sides. ``python -m bench`` runs it with :func:`compare`,
pytest-benchmark one side after the other; both check the very call that is timed first.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import signal
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import torch

from bench import ceilings, tables
from bench.exact import WrongResultError, is_half
from bench.inputs import simd

SECONDS = 4.0  # of one comparison, all sides
LEAST, MOST = 3, 25  # rounds
COMPILE_SECONDS = 120


class Side(NamedTuple):
    """One program: ``run(*prepare())`` is one call, of which only ``run`` is timed."""

    run: Callable[..., Any]
    prepare: Callable[[], tuple[Any, ...]] = tuple


class Comparison(NamedTuple):
    """What is timed on one input.

    Attributes:
        case: what names the row: operator, sizes, density, ...
        sides: by name; the first is the one that ratios are taken to.
        check: raises :class:`bench.exact.WrongResultError` for the name and the result of a side.
        work: what a call needs at least: "flops" (of the dense products), "bit_macs", "bytes",
            "optimizer_bytes".
    """

    case: dict[str, Any]
    sides: dict[str, Side]
    check: Callable[[str, Any], None]
    work: dict[str, float]

    def __str__(self) -> str:
        return " ".join(str(value) for value in self.case.values())


# -- memory ------------------------------------------------------------------------------------


def resident_bytes(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (highest so far) of this process, in bytes; Linux only.

    Not getrusage: its high-water mark survives exec, so a fresh process would inherit its
    parent's.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def settled_bytes() -> int:
    """Resident memory once what was freed has gone back to the system."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes("VmRSS")


def peak_bytes(run: Callable[[], Any]) -> int:
    """How far a call drives resident memory above where it stood; what it returns is dropped."""
    baseline = settled_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    run()
    return max(resident_bytes("VmHWM") - baseline, 0)


# -- time --------------------------------------------------------------------------------------


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the block after some seconds; main thread only."""

    def late(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def host_seconds(run: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """Seconds of one call by the host's clock."""
    begin = time.perf_counter()
    result = run(*arguments)
    seconds = time.perf_counter() - begin
    del result
    return seconds


def interleaved(
    sides: dict[str, Side],
    seconds: float,
    clock: Callable[[Callable[..., Any], tuple[Any, ...]], float] = host_seconds,
) -> dict[str, list[float]]:
    """Seconds of every call, the sides taking turns, in every other round backwards."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    start = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for turn in range(MOST):
            if turn >= LEAST and time.perf_counter() - start > seconds:
                break
            for name in order if turn % 2 else reversed(order):
                times[name].append(clock(sides[name].run, sides[name].prepare()))
    finally:
        gc.enable()
    return times


def verify(
    comparison: Comparison, name: str, device: str = "cpu", limit: int = COMPILE_SECONDS
) -> None:
    """Call one side once and check what it gave, with new tensors made on ``device``.

    A device tells of a kernel's fault when it is next waited for, which is most often while its
    result is checked: whatever is raised there is the side's own too.

    Raises:
        WrongResultError: the result is wrong, or there is none.
    """
    side, context = comparison.sides[name], contextlib.ExitStack()
    if name.startswith("compile"):
        # too many shapes in one process must not end in a silent fall back to eager
        context.enter_context(torch._dynamo.config.patch(fail_on_recompile_limit_hit=True))
        context.enter_context(limited(limit))
    try:
        with context:
            result = side.run(*side.prepare())
        with torch.device(device):
            comparison.check(name, result)
    except WrongResultError:
        raise
    except Exception as error:
        raise WrongResultError(f"{type(error).__name__}: {error}") from error


def failure(name: str, error: BaseException) -> dict[str, str]:
    """What became of a side that raised: "refused", or "unavailable" where it could not run.

    That is so where memory was not there, and where a compiler failed: its failures are its own,
    but a result that is wrong is refused.
    """
    compiler = name.startswith("compile") and error.__cause__ is not None
    memory = isinstance(error.__cause__, torch.OutOfMemoryError)
    return {"unavailable" if compiler or memory else "refused": first_line(error)}


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    if isinstance(error.__cause__, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    # a compiler's first line only names it
    return " ".join(lines[: 2 if error.__cause__ is not None else 1])[:300] or type(error).__name__


def add_ratios(sides: dict[str, dict[str, Any]], first: str) -> None:
    """To every side that was timed, how many times faster it is than the first."""
    seconds = sides[first].get("seconds")
    for side in sides.values():
        if seconds is not None and "seconds" in side:
            side["ratio"] = seconds / side["seconds"]


def compare(
    comparison: Comparison, ceilings: dict[str, Any] | None = None, seconds: float = SECONDS
) -> dict[str, Any]:
    """A row of results: every side checked, then timed in turns.

    A side that is wrong gets ``refused`` with the reason and no figure; a program that could not
    be compiled gets ``unavailable``.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in comparison.sides:
        found[name] = {}
        try:
            verify(comparison, name)
        except WrongResultError as error:
            found[name] = failure(name, error)
            ((key, reason),) = found[name].items()
            print(f"{comparison}: {name}: {key}: {reason}", flush=True)
    sides = {name: side for name, side in comparison.sides.items() if not found[name]}
    for name, side in sides.items():
        arguments = side.prepare()
        if sys.platform == "linux":
            found[name]["peak_bytes"] = peak_bytes(functools.partial(side.run, *arguments))
        else:
            side.run(*arguments)
        del arguments
    for name, times in interleaved(sides, seconds).items():
        found[name] |= {"seconds": statistics.median(times), "rounds": len(times)}
        if ceilings is not None:
            found[name] |= shares(comparison.work, found[name]["seconds"], name, ceilings)
    add_ratios(found, next(iter(comparison.sides)))
    return comparison.case | {"work": comparison.work, "sides": found}


# -- roofline ----------------------------------------------------------------------------------


def shares(
    work: dict[str, float],
    seconds: float,
    side: str,
    ceilings: dict[str, Any],
    level: str | None = None,
) -> dict[str, Any]:
    """Rates of a side, their shares of the ceilings, and the least seconds these allow.

    What has no ceiling here (no compiler, a level the probe lacks) is left out. The parts of a
    call follow one another, so the floor adds the time of products, counts and the optimizer;
    moving the other bytes can overlap with them: the larger of the two counts.
    """
    rates = {
        "flops": ceilings.get("gemm_bfloat16" if is_half(side) else "gemm_float32"),
        "bit_macs": ceilings["bit_macs"].get(level or simd()),
        "bytes": ceilings.get("copy"),
        "optimizer_bytes": ceilings.get("copy"),
    }
    floors = {name: amount / rate for name, amount in work.items() if (rate := rates[name])}
    found: dict[str, Any] = {}
    for name, floor in floors.items():
        found |= {f"{name}_per_second": work[name] / seconds, f"{name}_share": floor / seconds}
    if floors.keys() == work.keys():  # else one was not measured
        memory = floors.pop("bytes")
        found["floor_seconds"] = max(sum(floors.values()), memory)
        found["floor_share"] = found["floor_seconds"] / seconds
    return found


def run_cases(
    cases: Iterable[tuple[Any, ...]],
    build: Callable[..., Comparison],
    only: str,
    seconds: float,
    left_out: Collection[str] = (),
    *,
    floors: bool = True,
) -> dict[str, Any]:
    """The rows of a suite: the comparison that ``build`` makes of every case whose name holds
    ``only``, without the sides ``left_out``; with ``floors`` beside the ceilings of this machine,
    where comparisons say what work they need at least."""
    ceiling = ceilings.measure() if floors else None
    rows = []
    for case in cases:
        if only in tables.name(case):
            comparison = build(*case)
            sides = {n: side for n, side in comparison.sides.items() if n not in left_out}
            rows.append(compare(comparison._replace(sides=sides), ceiling, seconds))
            print(tables.line(rows[-1]), flush=True)
    return {"rows": rows} if ceiling is None else {"ceilings": ceiling, "rows": rows}
