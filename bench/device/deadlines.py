"""How long everything may take, and how long a case is expected to.

A machine with a GPU is often lent for half an hour, its start and all copying included, and ends a
command after ten minutes. So a command takes :data:`SECONDS`, and three of them fit: the first
compiles, checks and measures the most telling, the others go on with ``--resume``.

Two limits end what hangs, and neither has to know of the other. Another process watches the worker,
and takes its silence for a kernel that hangs. A part in a process of its own (a checker, tests, a
warm-up) has a limit of its own; the worker gives signs of life while it waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from bench.device.cases import Case, Plan, Row, size_of, sort_of
from bench.timing import COMPILE_SECONDS

# of a command: a minute below ten, for Python's start and the copying of files
SECONDS = 540.0
# of these for the watching process: starting, ending, table and plot
SPARE = 10.0
# without a word of the worker until its kernel is taken to hang: half a minute more than the dense
# program's compiler is given, which says nothing meanwhile
STALL = COMPILE_SECONDS + 30.0
# between a worker's signs of life while it waits for another process
SIGN = 10.0
# of compiling ahead of the first case, and at most a third of the command: what is not compiled by
# then the cases compile
COMPILING = 120.0
# of the small checks under one of compute-sanitizer's tools: five of them (two tools, two
# implementations, and wgmma) fit into one command even if each takes all of its time
SANITIZING = 90.0
# of `bae_fast.warmup` with nothing compiled, and once more: where that takes longer, the figure is
# that it does
WARMING = 140.0
# of the tests that need a device. They come last with both warm-ups, and all three fit into one
# command even if each takes all of its time
TESTING = 240.0

# why a case has no result where the command has taken its time: a later one does it again
TIME_UP = "time was up"


class Limit(NamedTuple):
    """How long something may take.

    Attributes:
        seconds: what it is given.
        own: whether these are all that it may ever have; else they are what the command had left.
    """

    seconds: float
    own: bool = True

    @property
    def over(self) -> str:
        """Why there is no result after that time."""
        return f"took more than {self.seconds:.0f} s" if self.own else TIME_UP


def limit_of(seconds: float, left: float) -> Limit:
    """Of what may take ``seconds`` in a command that has others left, one of them for itself."""
    return Limit(min(seconds, left - 1), seconds <= left - 1)


def cut_short(row: Row) -> bool:
    """Whether time that was up ended a case."""
    return any(map(is_time_up, [*row["sides"].values(), row]))


def is_time_up(side: Mapping[str, Any]) -> bool:
    """Whether it ended a side."""
    return str(side.get("unavailable", "")).startswith(TIME_UP)


class Expected:
    """What cases take at least, by those of their sort that were run."""

    def __init__(self, plan: Plan, rows: list[Row]) -> None:
        self.guess = plan.guess
        # by sort: seconds a multiply-accumulate, and seconds of a case
        self.least: dict[str, tuple[float, float]] = {}
        for row in rows:
            self.learn(row)

    def learn(self, row: Row) -> None:
        """Note how long a case took."""
        sort, wall = sort_of(row["case"]), row["wall_seconds"]
        scale, least = self.least.get(sort, (float("inf"), float("inf")))
        self.least[sort] = min(scale, wall / size_of(row["case"])), min(least, wall)

    def seconds(self, case: Case) -> float:
        """Of a case; a guess where none of its sort was run."""
        scale, least = self.least.get(sort_of(case), (0.0, self.guess))
        return max(scale * size_of(case), least)
