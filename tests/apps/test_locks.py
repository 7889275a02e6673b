"""A folder or a run that another process is at."""

from __future__ import annotations

import queue
import threading

import pytest

from bae_fast.cli import main
from bae_fast.experiments import runs
from bae_fast.files import locked


def test_a_lock_is_held_by_one_and_freed_at_its_end(tmp_path):
    for path in (tmp_path, tmp_path / "file"):
        with locked(path, wait=False) as held:
            assert held
            with locked(path, wait=False) as again:
                assert not again
        with locked(path, wait=True) as held:
            assert held


@pytest.mark.parametrize("command", ["match", "train"])
def test_a_folder_that_another_process_writes_to_is_refused(command, own, tmp_path, capsys):
    rows = ["--states", str(own / "rows.npy"), "--out", str(tmp_path)]
    models = [str(own / "bae")] * 2 if command == "match" else ["--steps", "2"]
    before = set(tmp_path.iterdir())
    with locked(tmp_path, wait=False):
        assert main([command, *models, *rows]) == 1
    error = capsys.readouterr().err.strip()
    said = "--out must be a folder that no other process writes to now; got"
    assert error == f"bae-fast {command}: {said} {tmp_path}"
    assert set(tmp_path.iterdir()) == before


def test_a_run_that_another_process_is_at_is_waited_for(tmp_path, monkeypatch):
    said, made, found = queue.Queue(), [], []
    monkeypatch.setattr(runs, "say", said.put)

    def second():
        found.append(runs.once(tmp_path, "name", {"a": 1}, lambda: made.append(2) or {}))

    other = threading.Thread(target=second)

    def first():
        made.append(1)
        other.start()
        assert "another process is at it" in said.get(timeout=60)
        return {"value": 3}

    kept = runs.once(tmp_path, "name", {"a": 1}, first)
    other.join(60)
    assert made == [1]
    assert found == [kept]
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_nothing_is_left_of_a_run_that_made_nothing(tmp_path):
    folder = tmp_path / "runs"

    def stop():
        assert [path.suffix for path in folder.iterdir() if path != kept] == [".lock"]
        raise KeyboardInterrupt

    kept = None
    with pytest.raises(KeyboardInterrupt):
        runs.once(folder, "name", {"a": 1}, stop)
    assert not folder.exists()
    runs.once(folder, "name", {"a": 1}, lambda: {"value": 3})
    (kept,) = folder.iterdir()
    with pytest.raises(KeyboardInterrupt):
        runs.once(folder, "name", {"a": 2}, stop)
    assert list(folder.iterdir()) == [kept]


def test_whoever_waited_for_a_run_that_was_stopped_makes_it_alone(tmp_path, monkeypatch):
    """It has waited for a file that is gone by then, and a third process would make another."""
    fcntl = pytest.importorskip("fcntl")
    folder, said, made = tmp_path / "runs", queue.Queue(), []
    flock, waiting = fcntl.flock, threading.Event()

    def flock_and_tell(handle, how):
        if not how & fcntl.LOCK_NB:
            waiting.set()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock_and_tell)
    monkeypatch.setattr(runs, "say", said.put)

    def at_it(number):
        made.append(number)
        return {"value": number}

    def second():
        third.start()
        assert "another process is at it" in said.get(timeout=60)
        return at_it(2)

    def stop():
        other.start()
        assert "another process is at it" in said.get(timeout=60)
        assert waiting.wait(60)  # it has opened the file
        raise KeyboardInterrupt

    def begin(run):
        return threading.Thread(target=lambda: runs.once(folder, "name", {"a": 1}, run))

    other, third = begin(second), begin(lambda: at_it(3))
    with pytest.raises(KeyboardInterrupt):
        runs.once(folder, "name", {"a": 1}, stop)
    other.join(60)
    third.join(60)
    assert made == [2]
    assert [path.suffix for path in folder.iterdir()] == [".json"]
