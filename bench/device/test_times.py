"""Sides that are checked before they are timed, and what becomes of those that cannot be."""

import time

import pytest
import torch
from device_results import DECODE, LAYER, STEP, case

from bae_fast.ops import registry
from bench import eager
from bench.device import cases, deadlines, report, times
from bench.exact import WrongResultError


def test_a_wrong_side_is_refused_and_never_timed(worked, monkeypatch):
    right = registry.BACKENDS["torch"].ops["decode"]
    monkeypatch.setitem(registry.BACKENDS["torch"].ops, "decode", lambda *a: 1.05 * right(*a))
    status, result = worked(DECODE)
    assert status == 0
    (row,) = result["rows"]
    assert row["sides"]["torch bf16"].keys() == {"refused"}
    assert row["sides"]["autocast"]["seconds"] > 0
    assert report.refusals(result) == [
        f"{cases.name_of(DECODE)}: torch bf16: {row['sides']['torch bf16']['refused']}"
    ]
    assert "recon is off by" in report.refusals(result)[0]
    assert "| refused |" in report.table(result)


def test_a_side_that_raises_is_reported_with_its_first_line(worked, monkeypatch):
    def broken(*args):
        raise RuntimeError("no such luck\nand a long story")

    monkeypatch.setitem(registry.BACKENDS["torch"].ops, "decode", broken)
    _, result = worked(DECODE, case("pairs", density=0.5), LAYER)
    decode, pairs, layer = result["rows"]
    assert decode["sides"]["torch bf16"]["refused"].startswith("RuntimeError: no such luck")
    assert pairs["sides"]["torch"]["seconds"] > 0
    assert layer["sides"]["torch bf16"] == {"refused": "RuntimeError: no such luck"}


def test_memory_that_is_not_there_is_said_and_refuses_nothing(worked, monkeypatch):
    def greedy(bits):
        raise torch.OutOfMemoryError("tried to allocate 70 GiB")

    monkeypatch.setattr(eager, "absolute_covariance", greedy)
    _, result = worked(STEP)
    (row,) = result["rows"]
    assert row["sides"]["autocast"] == {"unavailable": "out of memory"}
    assert row["sides"]["torch bf16"]["seconds"] > 0
    assert report.refusals(result) == []
    assert "out of memory" in report.table(result)


@pytest.mark.parametrize(
    ("left", "reason"),
    [
        (100.0, deadlines.TIME_UP),  # less than a compiler may take: a later command tries again
        (1000.0, "TimeoutError: too long"),
    ],
)
def test_a_compiler_that_the_command_has_no_time_for_is_tried_again(
    left, reason, worked, monkeypatch
):
    def late(comparison, name, device, limit):
        raise WrongResultError("TimeoutError: too long") from TimeoutError("too long")

    monkeypatch.setattr(times.timing, "verify", late)
    _, result = worked(STEP | {"compiled": True}, until=time.time() + left)
    (row,) = result["rows"]
    assert row["sides"]["compile bf16"] == {"unavailable": reason}
    assert deadlines.cut_short(row) == (reason == deadlines.TIME_UP)
