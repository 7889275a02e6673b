"""What is done for a case of each kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bae_fast.codes import ENV_SIGN_PLANES
from bench import timing
from bench.device import ceilings, comparisons, layer, repeats, wgmma
from bench.device.cases import DTYPES, PANELS, Case, name_of
from bench.device.deadlines import SANITIZING, TESTING, WARMING, limit_of
from bench.device.gpu_tests import run_tests
from bench.device.job import Job
from bench.device.profiles import profile
from bench.device.sanitizer import sanitize
from bench.device.times import compare
from bench.device.warmup import measure_warmup
from bench.exact import WrongResultError

# kinds of several sides, each of which a worker may end with
COMPARED = ("check", "step", "graph", "pairs", "operator")

# the operator that other checks are of
OF_OPERATORS = {
    "panels": "covariance", "sign panels": "covariance_backward", "repeat": "decode"
}  # fmt: skip


def run_case(job: Job) -> bool:
    """Fill the row of a job. False: the device no longer answers."""
    if job.sides and job.case["kind"] not in COMPARED:
        return True  # with its one side an earlier worker ended: another would end so as well
    return PARTS[job.case["kind"]](job)


# -- checks of one side ------------------------------------------------------------------------


def _checked(job: Job, side: str, check: Callable[[], int]) -> bool:
    """What a check says of a side: how many it made, or what was wrong."""
    job.note(side)
    try:
        job.sides[side] = {"checked": check()}
    except Exception as error:
        job.sides[side] = refusal(error)
        if "refused" in job.sides[side]:
            print(f"{name_of(job.case)}: refused: {job.sides[side]['refused']}", flush=True)
        return job.machine.answers()
    return True


def refusal(error: Exception) -> dict[str, str]:
    """What a check of a side raised: memory that is not there is no fault."""
    if isinstance(error, torch.OutOfMemoryError):
        return {"unavailable": "out of memory"}
    text = timing.first_line(error)
    known = isinstance(error, WrongResultError)
    return {"refused": text if known else f"{type(error).__name__}: {text}"}


def _layer(job: Job) -> bool:
    impl, dtype = job.case["impl"], job.case["dtype"]
    name = impl if dtype == "fp32" else f"{impl} {dtype}"

    def check_layer(*arguments: Any, **options: Any) -> None:
        job.note(name)  # each compiles for seconds
        layer.check_layer(*arguments, **options)

    def check() -> int:
        with torch.device(job.machine.device):
            done = layer.check_whole_layer(impl, DTYPES[dtype], job.machine.plan, check_layer)
            if dtype == "fp32":
                layer.check_many_rows(impl)
        return done

    return _checked(job, name, check)


def _panels(job: Job) -> bool:
    reason = wgmma.unavailable(job.machine.device)
    if reason is not None:
        job.sides[PANELS] = {"unavailable": reason}
        return True

    def check() -> int:
        with torch.device(job.machine.device):
            return wgmma.check_kind(job.case["kind"])

    return _checked(job, PANELS, check)


def _trainer(job: Job) -> bool:
    impl = job.case["impl"]
    return _checked(job, f"{impl}, graph", lambda: repeats.check_trainer(impl, job.machine.device))


def _repeat(job: Job) -> bool:
    case = job.case
    impl, density = case["impl"], case["density"]

    def check() -> int:
        with torch.device(job.machine.device):
            return repeats.check_repeats(impl, case["n"], case["d"], case["f"], density)

    return _checked(job, f"{impl} bf16", check)


# -- parts in processes of their own -----------------------------------------------------------


def _sanitize(job: Job) -> bool:
    tool, impl = job.case["tool"], job.case["impl"]
    job.note(tool)
    reason = wgmma.unavailable(job.machine.device) if impl == PANELS else None
    if reason is not None:
        job.sides[PANELS] = {"unavailable": reason}
        return True
    limit = limit_of(SANITIZING, job.seconds_left())
    job.sides[impl] = sanitize(tool, impl, limit, lambda: job.note(tool))
    return True


def _warmup(job: Job) -> bool:
    impl = job.case["impl"]
    job.note(impl)
    limit = limit_of(WARMING, job.seconds_left())
    job.sides[impl] = measure_warmup(impl, job.machine.device, limit, lambda: job.note(impl))
    return True


def _tests(job: Job) -> bool:
    job.note("pytest")
    limit = limit_of(TESTING, job.seconds_left())
    job.sides["pytest"] = run_tests(limit, lambda: job.note("pytest"))
    return True


# -- what is measured --------------------------------------------------------------------------


def _ceilings(job: Job) -> bool:
    job.result["ceilings"] = ceilings.measure(job.machine)
    return True


def _profile(job: Job) -> bool:
    case = job.case
    job.note(case["impl"])
    shape = (case["n"], case["d"], case["f"])
    job.row["kernels"] = profile(case["impl"], shape, job.machine.device)
    job.sides[case["impl"]] = {"checked": len(job.row["kernels"])}
    return True


def _compared(job: Job) -> bool:
    timed = job.case["kind"] != "check"
    comparison = comparisons.build(job.case, job.impls, job.machine.device)
    again = {ENV_SIGN_PLANES: "0"} if job.case.get("planes") == "made again" else {}
    marked = spoiled(job.result["rows"], job.case) & set(comparison.sides)
    job.row["marked"] = sorted(marked) * timed
    with layer.variables(**again):
        return compare(comparison, job, timed)


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


PARTS: dict[str, Callable[[Job], bool]] = {
    "layer": _layer,
    "panels": _panels,
    "sign panels": _panels,
    "trainer": _trainer,
    "repeat": _repeat,
    "ceilings": _ceilings,
    "profile": _profile,
    "sanitize": _sanitize,
    "warmup": _warmup,
    "tests": _tests,
    **dict.fromkeys(COMPARED, _compared),
}
