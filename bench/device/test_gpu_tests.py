"""What is kept of the tests that need a device."""

import pytest

from bench.device import gpu_tests, processes
from bench.device.deadlines import TIME_UP, Limit

PYTEST = """
tests/backends/test_triton_gpu.py::test_a[triton] PASSED                   [  1%]
tests/backends/test_triton_gpu.py::test_b[triton-x y] FAILED               [  2%]
[gw3] [ 63%] FAILED tests/backends/test_triton_gpu.py::test_c[cuda]
[gw1] [ 64%] PASSED tests/backends/test_triton_gpu.py::test_d
"""


@pytest.mark.parametrize(
    ("status", "text", "found"),
    [
        (0, "==== 9 passed in 3.0s ====", {"checked": "9 passed in 3.0s"}),
        # where no test finds the device nothing is shown
        (0, "==== 9 skipped in 3.0s ====", {"unavailable": "9 skipped in 3.0s"}),
        (None, "", {"unavailable": "took more than 5 s; 0 tests had passed"}),
        (
            None,
            PYTEST,
            {
                "refused": "took more than 5 s; 2 tests had passed",
                "failed": [
                    "tests/backends/test_triton_gpu.py::test_b[triton-x y]",
                    "tests/backends/test_triton_gpu.py::test_c[cuda]",
                ],
            },
        ),
        (2, "no module named x", {"refused": "no module named x"}),
    ],
)
def test_of_tests_that_time_cuts_short_those_that_failed_are_named(
    status, text, found, monkeypatch
):
    ended = processes.Ended(status, text)
    monkeypatch.setattr(processes, "run_process", lambda *args, **more: ended)
    assert gpu_tests.run_tests(Limit(5.0)) == found


def test_tests_that_the_command_has_no_time_for_are_run_again(monkeypatch):
    ended = processes.Ended(None, PYTEST.replace("FAILED", "PASSED"))
    monkeypatch.setattr(processes, "run_process", lambda *args, **more: ended)
    found = gpu_tests.run_tests(Limit(5.0, own=False))
    assert found == {"unavailable": f"{TIME_UP}; 4 tests had passed"}
