"""Processes that end with all that they have started, and when their time is up."""

import signal
import subprocess
import sys

from bench.device import processes

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def test_what_a_process_has_started_ends_with_it():
    """A checker that is killed would leave its program on the device."""
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    with process:
        child = int(process.stdout.readline())
        assert set(processes.below(process.pid)) == {process.pid, child}
        processes.end(process)
        assert process.wait() == -signal.SIGKILL
        assert process.stdout.read() == ""  # the child had it open as well
    assert processes.below(process.pid) == [process.pid]


def test_a_command_whose_time_is_up_has_said_what_it_said():
    done = processes.run_process(["sh", "-c", "echo before; exec sleep 600"], 1.0)
    assert done == (None, "before\n")
    command = ["sh", "-c", "echo $WORD >&2; exit 3"]
    assert processes.run_process(command, 60.0, {"WORD": "a"}) == (3, "a\n")


def test_whoever_waits_for_a_process_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "SIGN", 0.01)
    signs, end = [], tmp_path / "end"

    def alive():
        signs.append(None)
        if len(signs) == 3:
            end.touch()

    waits = f'while ! test -e "{end}"; do sleep 0.01; done; exit 5'
    assert processes.run_process(["sh", "-c", waits], 60.0, alive=alive).status == 5
    assert len(signs) >= 3
