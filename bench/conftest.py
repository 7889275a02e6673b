"""Cases of the comparisons: tiny and untimed, or with --benchmark-enable those of the suites."""

import functools

from bench import eager, operators, step, tables
from bench.inputs import SHAPES, TINY

build = {
    "operator": functools.lru_cache(maxsize=1)(operators.build),
    "step": functools.lru_cache(maxsize=1)(step.build),
}


def timed(config):
    return config.getoption("benchmark_enable")


def pytest_configure(config):
    if not timed(config):
        eager.COMPILER = "eager"  # torch.compile's front end alone: no C++ compiler, no minutes


def pytest_generate_tests(metafunc):
    if "operator_case" in metafunc.fixturenames:
        shapes = SHAPES if timed(metafunc.config) else TINY
        cases = [(c, s) for c in operators.cases(shapes) for s in operators.sides_of(c[0])]
        metafunc.parametrize("operator_case, side", cases, ids=_ids(cases))
    if "step_case" in metafunc.fixturenames:
        cases = step.CASES if timed(metafunc.config) else step.TINY_CASES
        cases = [(c, s) for c in cases for s in step.sides_of(c[-1])]
        metafunc.parametrize("step_case, side", cases, ids=_ids(cases))


def _ids(cases):
    return [f"{tables.name(case)}-{side}".replace(" ", "_") for case, side in cases]
