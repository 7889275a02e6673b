"""The device's clock."""

import pytest
import torch
from device_results import SMALL

from bench.device import machine


def test_the_host_is_ahead_of_what_is_timed(monkeypatch):
    """A step of many starts is its time on the device, not that of the host, which is kept too."""
    now, slept = [0.0], []

    class Event:
        def __init__(self, **given):
            pass

        record = synchronize = lambda self: None
        elapsed_time = lambda self, end: 7.0  # noqa: E731

    def run():
        now[0] += 3e-3 if len(slept) == 1 else 2e-3

    here = machine.Machine("cpu", SMALL)
    here.device = "cuda"
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])
    assert [here.clock(run, ()) for _ in range(4)] == [7e-3] * 4
    assert slept == pytest.approx([machine.SLEEP, 9e6, 6e6, 6e6])
    assert min(here.starting[id(run)]) == pytest.approx(2e-3)
    for _ in range(2):  # whatever waits itself is waited for no longer
        here.clock(lambda: now.__setitem__(0, now[0] + 60), ())
    assert max(slept) <= machine.MOST_SLEEP
