"""The process that runs the cases: what one leaves to the next, and what it has no time for."""

import time

import pytest
import torch
from device_results import DECODE, LAYER, case

from bae_fast.ops import registry
from bench import exact, operators
from bench.device import cases, layer, machine, repeats, report, wgmma, worker


def test_a_worker_goes_on_where_the_one_before_ended(worked, monkeypatch):
    done = {"case": DECODE, "sides": {"torch bf16": {"seconds": 1.0}}, "wall_seconds": 0.1}
    _, result = worked(DECODE, case("pairs", density=0.5), rows=[done])
    assert result["rows"][0] == done
    assert len(result["rows"]) == 2


def test_only_the_kinds_that_are_named_are_run(worked):
    _, result = worked(LAYER, DECODE, case("pairs", density=0.5), only=["operator", "pairs"])
    assert [row["case"]["kind"] for row in result["rows"]] == ["operator", "pairs"]
    assert not result["complete"]


def test_a_device_that_no_longer_answers_is_left_to_the_next_process(worked, monkeypatch):
    def broken(*args):
        raise RuntimeError("an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setitem(registry.BACKENDS["torch"].ops, "decode", broken)
        patch.setattr(machine.Machine, "answers", lambda machine: False)
        status, result = worked(DECODE)
    assert status == worker.DEAD
    assert result["rows"] == []
    name = cases.name_of(DECODE)
    assert "illegal memory access" in result["ended"][name]["torch bf16"]["refused"]
    status, again = worked(DECODE, ended=result["ended"])
    assert status == 0
    (row,) = again["rows"]
    assert row["sides"]["torch bf16"] == result["ended"][name]["torch bf16"]
    assert row["sides"]["autocast"]["seconds"] > 0


def test_a_fault_that_shows_while_a_result_is_checked_is_the_sides_own(worked, monkeypatch):
    """A kernel's illegal access is told by the next call that waits, and that is the check."""
    right = exact.Closeness.check

    def late(self, side, *args):
        if side == "torch bf16":
            raise RuntimeError("an illegal memory access was encountered")
        right(self, side, *args)

    with monkeypatch.context() as patch:
        patch.setattr(exact.Closeness, "check", late)
        patch.setattr(machine.Machine, "answers", lambda machine: False)
        status, result = worked(DECODE)
    assert status == worker.DEAD
    ended = result["ended"][cases.name_of(DECODE)]
    assert "illegal memory access" in ended["torch bf16"]["refused"]
    status, again = worked(DECODE, ended=result["ended"])
    assert status == 0
    assert again["rows"][0]["sides"]["torch bf16"] == ended["torch bf16"]
    assert again["rows"][0]["sides"]["autocast"]["seconds"] > 0
    assert len(report.refusals(again)) == 1


@pytest.mark.parametrize(
    ("wanted", "module", "check"),
    [
        ({"kind": "panels"}, wgmma, "check_kind"),
        ({"kind": "sign panels"}, wgmma, "check_kind"),
        ({"kind": "trainer", "impl": "torch"}, repeats, "check_trainer"),
        (case("repeat", impl="torch", density=0.5), repeats, "check_repeats"),
        (LAYER, layer, "check_whole_layer"),
    ],
    ids=["panels", "sign panels", "trainer", "repeat", "layer"],
)
def test_a_check_that_ends_its_process_is_not_made_again(
    wanted, module, check, worked, monkeypatch
):
    """Neither where it has killed the device for the process, nor where it hung: time is short."""
    made = []

    def broken(*args):
        made.append(args)
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(module, check, broken)
    monkeypatch.setattr(wgmma, "unavailable", lambda device: None)
    with monkeypatch.context() as patch:
        patch.setattr(machine.Machine, "answers", lambda machine: False)
        status, result = worked(wanted)
    assert (status, result["rows"], len(made)) == (worker.DEAD, [], 1)
    status, again = worked(wanted, ended=result["ended"])
    assert (status, len(made)) == (0, 1)
    (row,) = again["rows"]
    (side,) = row["sides"].values()
    assert "illegal memory access" in side["refused"]


def test_inputs_that_do_not_fit_leave_the_next_case_to_be_run(worked, monkeypatch):
    def greedy(*args):
        raise torch.OutOfMemoryError("tried to allocate 70 GiB")

    monkeypatch.setitem(operators.OPERATORS, "decode", greedy)
    _, result = worked(DECODE, case("pairs", density=0.5))
    assert result["rows"][0]["unavailable"] == "out of memory"
    assert result["rows"][1]["sides"]["torch"]["seconds"] > 0


def test_a_case_that_would_not_fit_is_left_out_and_said(worked):
    seen = {"case": DECODE, "sides": {}, "wall_seconds": 60.0}
    other = DECODE | {"density": 0.1}
    _, result = worked(other, case("pairs", density=0.5), rows=[seen], until=time.time() + 20)
    assert [row["case"]["kind"] for row in result["rows"]] == ["operator", "pairs"]
    (left_out,) = result["skipped"]
    assert left_out["case"] == other
    assert "expected" in left_out["reason"]
    assert not result["complete"]
    assert "left out for time: 1" in report.table(result)
