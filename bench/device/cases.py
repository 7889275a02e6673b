"""The cases of a run in their order, the most telling first, and the sizes of everything."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from bae_fast.ops import registry
from bench import operators, step, tables

IMPLS = ("triton", "cuda")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# impl="cuda" with its pairs or its products with the signs by wgmma
PANELS = "cuda wgmma"
# compute-sanitizer's tools
SANITIZERS = ("memcheck", "racecheck")
# of ones, 33 a row at F = 65,536: codes that lists serve
SPARSE = 5e-4

Case = dict[str, Any]
# of device.json: a case, what became of its sides, the seconds that it took
Row = dict[str, Any]


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


def _of(kind: str, shape: tuple[int, int, int], **more: Any) -> Case:
    return {"kind": kind, **more, **dict(zip("ndf", shape, strict=True))}


def _checks(plan: Plan, impls: list[str], device: str) -> list[Case]:
    """What is held against exact numbers, and not timed."""
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
    first = plan.densities[0]
    return found + [_of("repeat", plan.head, impl=impl, density=first) for impl in impls]


def _head(plan: Plan, impls: list[str]) -> list[Case]:
    """The ceilings, then steps, kernels and operators at the first size."""
    first = plan.densities[0]
    others = [name for name in step.OBJECTIVES if name != "paper"]
    return [
        {"kind": "ceilings"},
        _of("step", plan.head, objective="paper"),
        *(_of("profile", plan.head, impl=impl) for impl in impls),
        _of("pairs", plan.head, density=first),
        *(_of("step", plan.head, objective=name) for name in others),
        *(_of("operator", plan.head, operator=o, density=first) for o in operators.OPERATORS),
    ]


def _large(plan: Plan) -> list[Case]:
    """A step of many features, its pairs, and what it is worth to keep the planes of signs."""
    return [
        _of("step", plan.more[0], objective="paper"),
        _of("pairs", plan.large, density=plan.densities[0]),
        _of("pairs", plan.large, density=SPARSE),
        _of("step", plan.more[0], objective="paper", planes="made again"),
    ]


def _on_a_device(plan: Plan, impls: list[str]) -> list[Case]:
    """Steps replayed from CUDA graphs, and the small checks under each of the tools."""
    found = [
        _of("graph", plan.more[min(1, len(plan.more) - 1)], objective="paper"),
        _of("graph", plan.head, objective="paper"),
    ]
    found += [
        {"kind": "sanitize", "tool": tool, "impl": impl} for tool in SANITIZERS for impl in impls
    ]
    if "cuda" in impls:
        found += [{"kind": "sanitize", "tool": SANITIZERS[0], "impl": PANELS}]
    return found


def _more(plan: Plan) -> list[Case]:
    """The other sizes, densities and objectives."""
    first, *rest = plan.densities
    found = [_of("step", plan.more[0], objective="no covariance")]
    found += [_of("step", shape, objective="paper") for shape in plan.more[1:]]
    for density in rest:
        found += [_of("pairs", plan.head, density=density)]
        found += [
            _of("operator", plan.head, operator=o, density=density) for o in operators.OPERATORS
        ]
    found += [_of("operator", plan.large, operator=o, density=first) for o in operators.OPERATORS]
    return found + [_of("step", shape, objective="rectangle") for shape in plan.more]


def _last(plan: Plan, impls: list[str], device: str) -> list[Case]:
    """What takes long and tells least: kernels compiled from nothing, tests, the dense compiler."""
    found: list[Case] = [
        {"kind": "warmup", "impl": impl}
        for impl in impls
        if registry.BACKENDS[impl].warmup is not None
    ]
    if device == "cuda":
        found += [{"kind": "tests"}]
    return [*found, _of("step", plan.head, objective="paper", compiled=True)]


def cases(plan: Plan, impls: list[str], device: str) -> list[Case]:
    """Every case, in the order in which they are run."""
    return [
        *_checks(plan, impls, device),
        *_head(plan, impls),
        *_large(plan),
        *(_on_a_device(plan, impls) if device == "cuda" else []),
        *_more(plan),
        *_last(plan, impls, device),
    ]


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
