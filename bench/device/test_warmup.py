"""The warm-up in a process of its own."""

import pytest

from bench.device import warmup
from bench.device.deadlines import TIME_UP, Limit


def test_a_warmup_is_timed_with_nothing_compiled_and_once_more(tmp_path, monkeypatch):
    """The second process finds what the first has left in the folder of compiled kernels."""
    program = """
import os, pathlib, sys
assert sys.argv[1:] == ["torch", "cpu"]
kept = pathlib.Path(os.environ["TRITON_CACHE_DIR"]) / "kernel"
print("seconds", 3.0 if kept.exists() else 20.0)
kept.touch()
"""
    monkeypatch.setattr(warmup, "PROGRAM", program)
    found = warmup.measure_warmup("torch", "cpu", Limit(100.0))
    assert found == {"cold_seconds": 20.0, "warm_seconds": 3.0}


@pytest.mark.parametrize(
    ("limit", "reason"), [(Limit(1.0), "took more than 1 s"), (Limit(1.0, own=False), TIME_UP)]
)
def test_a_warmup_that_takes_too_long_says_which(limit, reason, monkeypatch):
    monkeypatch.setattr(warmup, "PROGRAM", "import time; time.sleep(600)")
    found = warmup.measure_warmup("torch", "cpu", limit)
    assert found == {"unavailable": f"{reason} (cold_seconds)"}


def test_a_warmup_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(warmup, "PROGRAM", "raise SystemExit('no such luck')")
    assert warmup.measure_warmup("torch", "cpu", Limit(100.0)) == {"refused": "no such luck"}
