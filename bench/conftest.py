"""Cases of the comparisons: tiny and untimed, or with --benchmark-enable those of the suites.

What imports torch is imported where it is used: the process that hands out tests to others reads
this file too.
"""


def timed(config):
    return config.getoption("benchmark_enable")


def pytest_collection_finish(session):
    if not timed(session.config):
        from bench import eager

        eager.COMPILER = "eager"  # torch.compile's front end alone: no C++ compiler, no minutes


def pytest_generate_tests(metafunc):
    if not {"operator_case", "step_case"} & set(metafunc.fixturenames):
        return
    from bench import operators, step
    from bench.inputs import SHAPES, TINY

    if "operator_case" in metafunc.fixturenames:
        shapes = SHAPES if timed(metafunc.config) else TINY
        cases = [(c, s) for c in operators.cases(shapes) for s in operators.sides_of(c[0])]
        metafunc.parametrize("operator_case, side", cases, ids=_ids(cases))
    if "step_case" in metafunc.fixturenames:
        cases = step.CASES if timed(metafunc.config) else step.TINY_CASES
        cases = [(c, s) for c in cases for s in step.sides_of(c[-1])]
        metafunc.parametrize("step_case, side", cases, ids=_ids(cases))


def _ids(cases):
    from bench import tables

    return [f"{tables.name(case)}-{side}".replace(" ", "_") for case, side in cases]
