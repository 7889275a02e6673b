"""What is compared in a case: the sides, their inputs, and how each is checked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bae_fast.ops import registry
from bae_fast.ops.nvidia import ENV_PAIRS, ENV_SIGNS
from bae_fast.packing import pack_rows
from bench import operators, step
from bench.device import wgmma
from bench.device.cases import DTYPES, FULL, PANELS, Case
from bench.exact import WrongResultError
from bench.timing import Comparison, Side

# columns of the int8 products that are made at once
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
    if "cuda" in impls and wgmma.unavailable(words.device.type) is None:
        sides[PANELS] = wgmma.by_wgmma(sides["cuda"], ENV_PAIRS)
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
    make = {"pairs": _pairs, "check": _check, "operator": _operator, "graph": _graph}
    with torch.device(device):
        return make.get(case["kind"], _step)(case, impls, device)


def _shape(case: Case) -> tuple[int, int, int]:
    return case["n"], case["d"], case["f"]


def _pairs(case: Case, impls: list[str], device: str) -> Comparison:
    return pairs(case["n"], case["f"], case["density"], impls)


def _check(case: Case, impls: list[str], device: str) -> Comparison:
    plain = case["operator"].startswith("covariance")
    names = [f"{i} {t}" for i in impls for t in DTYPES if t != "fp32" and not plain]
    sides = ["eager", "autocast", *impls, *names]
    return operators.build(case["operator"], *_shape(case), case["density"], sides)


def _operator(case: Case, impls: list[str], device: str) -> Comparison:
    operator = case["operator"]
    names = impls if operator.startswith("covariance") else [f"{impl} bf16" for impl in impls]
    sides = ["autocast", *names]
    found = operators.build(operator, *_shape(case), case["density"], sides)
    signs = operator == "covariance_backward" and "cuda" in found.sides
    if signs and wgmma.unavailable(device) is None:
        found.sides[PANELS] = wgmma.by_wgmma(found.sides["cuda"], ENV_SIGNS)
    return found


def _halves(case: Case, impls: list[str], device: str) -> list[str]:
    """Our sides of a step, all in bf16."""
    names = [f"{impl} bf16" for impl in impls]
    if _shape(case) == FULL.head or device == "cpu":  # larger ones take `torch` seconds
        names = list(dict.fromkeys([*names, "torch bf16"]))
    return names


def _graph(case: Case, impls: list[str], device: str) -> Comparison:
    """A step that waits for the device cannot be captured: without those that do."""
    names = _halves(case, impls, device)
    names = [name for name in names if registry.BACKENDS[name.split()[0]].capturable]
    found = step.build(case["objective"], *_shape(case), names)
    return found._replace(sides={name: captured(side.run) for name, side in found.sides.items()})


def _step(case: Case, impls: list[str], device: str) -> Comparison:
    dense = ["autocast", "compile bf16"] if case.get("compiled") else ["autocast"]
    return step.build(case["objective"], *_shape(case), [*dense, *_halves(case, impls, device)])
