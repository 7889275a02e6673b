"""How long everything may take."""

from device_results import DECODE, SMALL, STEP

from bench import timing
from bench.device import cases, deadlines
from bench.device.deadlines import (
    COMPILING,
    SANITIZING,
    SECONDS,
    SPARE,
    STALL,
    TESTING,
    TIME_UP,
    WARMING,
    Limit,
)  # fmt: skip


def test_a_larger_case_is_expected_to_take_longer():
    assert cases.size_of(STEP | {"f": 512}) > 2 * cases.size_of(STEP)
    assert cases.size_of(STEP) > cases.size_of(STEP | {"objective": "no covariance"})


def test_parts_of_a_kind_fit_into_one_command_each():
    """What takes all of its time must not leave to no command the time to do what comes after."""
    every = cases.cases(cases.FULL, list(cases.IMPLS), "cuda")
    kinds = [case["kind"] for case in every]
    command = SECONDS - SPARE
    assert kinds.count("sanitize") * SANITIZING <= command
    assert kinds.count("warmup") * WARMING + kinds.count("tests") * TESTING <= command
    assert command / 3 > COMPILING
    # the dense program's compiler says nothing for so long
    assert timing.COMPILE_SECONDS < STALL


def test_a_limit_says_whether_a_later_command_can_do_better():
    assert deadlines.limit_of(90.0, 400.0) == Limit(90.0, own=True)
    assert deadlines.limit_of(90.0, 60.0) == Limit(59.0, own=False)
    assert Limit(90.0).over == "took more than 90 s"
    assert Limit(59.0, own=False).over == TIME_UP


def test_of_a_case_that_time_cut_short_a_side_or_the_whole_says_so():
    row = {"case": STEP, "sides": {"torch": {"seconds": 1.0}, "autocast": {"refused": "off"}}}
    assert not deadlines.cut_short(row)
    assert deadlines.cut_short(row | {"unavailable": TIME_UP})
    late = {"unavailable": f"{TIME_UP}; 3 tests had passed"}
    assert deadlines.cut_short(row | {"sides": row["sides"] | {"pytest": late}})


def test_cases_are_expected_to_take_what_the_fastest_of_their_sort_took():
    expected = deadlines.Expected(SMALL, [])
    assert expected.seconds(STEP) == SMALL.guess
    for seconds in (8.0, 4.0):
        expected.learn({"case": STEP, "wall_seconds": seconds})
    assert expected.seconds(STEP) == 4.0
    larger = STEP | {"n": 4 * STEP["n"]}
    assert expected.seconds(larger) == 4.0 * cases.size_of(larger) / cases.size_of(STEP)
    assert expected.seconds(STEP | {"n": 1}) == 4.0  # no case takes less than the least
    assert expected.seconds(STEP | {"compiled": True}) == SMALL.guess
    assert expected.seconds(DECODE) == SMALL.guess
