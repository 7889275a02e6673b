"""Every comparison under pytest-benchmark: each side is checked, then timed.

Untimed on tiny inputs by default; ``pytest bench --benchmark-enable`` times the suites' own cases,
a group a case (``-k`` picks). A side that is wrong fails and gets no figure. Sides are timed one
after the other here: the README's figures come from ``python -m bench``, where they take turns.
"""

import functools

from bench import operators, step
from bench.timing import LEAST, verify

build = {
    "operator": functools.lru_cache(maxsize=1)(operators.build),
    "step": functools.lru_cache(maxsize=1)(step.build),
}


def timed(benchmark, comparison, name):
    verify(comparison, name)
    side = comparison.sides[name]
    benchmark.group = str(comparison)
    benchmark.extra_info |= comparison.case | {"side": name, "work": comparison.work}
    benchmark.pedantic(side.run, setup=lambda: (side.prepare(), {}), rounds=LEAST, warmup_rounds=1)


def test_operator(benchmark, operator_case, side):
    timed(benchmark, build["operator"](*operator_case), side)


def test_step(benchmark, step_case, side):
    timed(benchmark, build["step"](*step_case), side)
