"""What a command says while it works, whatever becomes of its output."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import queue
import re
import subprocess
import sys
import threading
from pathlib import Path

import processes
import pytest

from bae_fast import progress

ROOT = Path(__file__).resolve().parents[2]


def test_printing_never_raises(monkeypatch, capsys):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    progress.say("«é»")
    progress.say("«é»")
    assert narrow.buffer.getvalue() == 2 * b"???\n"
    assert capsys.readouterr().err.count("characters that ascii lacks") == 1
    narrow.close()
    progress.say("into a closed stream")

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    progress.say("onto a full disk")
    monkeypatch.setattr(sys, "stdout", None)
    progress.say("to nobody")


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-", "2>&- | true"])
def test_info_ends_well_whatever_becomes_of_its_output(redirection):
    if redirection == ">/dev/full" and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    line = f"set -o pipefail; '{sys.executable}' -m bae_fast info {redirection}"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_lines_take_the_place_of_a_bar_without_a_terminal(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress_bar(1000, what="train", unit="step") as bar:
        for _ in range(1000):
            now[0] += 0.1
            bar.set_postfix(mse="0.5")
            bar.update(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 20 of 1,000 step, 2 s, about 98 s left, mse 0.5"
    assert len(lines) == 10
    with progress.progress_bar(1000, what="train", unit="step", show=False) as bar:
        now[0] += 100
        bar.update(1)
    assert capsys.readouterr().err == ""


def ticking(monkeypatch, seconds):
    """A clock that goes on by so much at every look."""
    now = [0.0]

    def look():
        now[0] += seconds
        return now[0]

    monkeypatch.setattr(progress.time, "monotonic", look)
    monkeypatch.setattr(progress, "_beat", lambda _step, _ended: None)  # it looks too


def test_a_loop_of_a_stage_says_how_far_it_has_come(monkeypatch, capsys):
    ticking(monkeypatch, 1.0)
    rows = [[0] * 30] * 10
    assert list(progress.tracked(rows, 300, "rows", by=len)) == rows
    assert capsys.readouterr().err == ""  # no stage is under way
    with progress.Stages().stage("match"):
        for _ in progress.tracked(rows, 300, "rows", by=len):
            # a loop within is silent
            assert len(list(progress.tracked(range(50), 50, "features"))) == 50
        assert list(progress.tracked(range(0, 25, 10), 25, "features", by=10)) == [0, 10, 20]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("match: 60 of 300 rows, 2 s, about 8 s left")
    assert any(line.startswith("match: 20 of 25 features, ") for line in lines)
    assert not any("of 50 features" in line for line in lines)
    with progress.Stages(progress=False).stage("quiet"):
        assert list(progress.tracked(rows, 300, "rows", by=len)) == rows
    assert capsys.readouterr().err == ""


def test_a_loop_that_is_left_ends_its_bar(monkeypatch, capsys):
    ticking(monkeypatch, 1.0)
    with progress.Stages().stage("read"):
        for i in progress.tracked(range(100), 100, "rows"):
            if i == 1:
                break
        with contextlib.suppress(KeyError):
            for _ in progress.tracked(range(100), 100, "windows"):
                raise KeyError
        list(progress.tracked(range(100), 100, "features"))
    assert "read: 2 of 100 features" in capsys.readouterr().err


def test_a_stage_without_a_loop_says_how_long_it_has_worked(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_FIRST_LINE", 0.0)
    monkeypatch.setattr(progress, "_BETWEEN_LINES", 0.001)
    said = queue.Queue()
    monkeypatch.setattr(progress, "say", lambda text, **_: said.put(text))
    with progress.Stages().stage("load"):
        assert said.get(timeout=60) == "== load"
        assert re.fullmatch(r"load: \d+ s so far", said.get(timeout=60))
        thread = next(t for t in threading.enumerate() if t.name == "progress")
        with progress.progress_bar(10, what="tokens", unit="tokens"):
            while not said.empty():
                said.get()
            thread.join(0.05)
            # the bar speaks; one line may have been on its way
            assert said.qsize() <= 1
    assert not thread.is_alive()
    with pytest.raises(KeyError), progress.Stages().stage("fail"):
        raise KeyError
    assert not any(t.name == "progress" for t in threading.enumerate())


def test_threads_of_commands_sleep_while_they_wait():
    """Unless the user says otherwise; what imports the package has its own policy."""
    bare = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    command = ("-m", "bae_fast", "info", "--json")
    alone = "import json, bae_fast; print(json.dumps(bae_fast.info()))"
    # the first from its very start: torch reads the variable when it is loaded
    found = [
        subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=bare,
            check=True,
        ),
        processes.run(*command, env=bare | {"OMP_WAIT_POLICY": "ACTIVE"}),
        processes.run("-c", alone, env=bare),
    ]  # fmt: skip
    policies = [json.loads(done.stdout)["cpu"]["wait_policy"] for done in found]
    assert policies == ["PASSIVE", "ACTIVE", "not set"]
