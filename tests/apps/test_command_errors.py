"""Errors and signals of commands: one line, and the status that tells what it was."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import processes
import pytest

import bae_fast as bf
from bae_fast import progress
from bae_fast.cli import errors, main, net
from bae_fast.experiments import runs
from bae_fast.files import write_text
from bae_fast.lm import gguf, known

ROOT = Path(__file__).resolve().parents[2]


class NamelessError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("k must\nbe 1"), "k must be 1"),
        (runs.ConfigError("batch_size", "must be 1; got 0"), "--batch-size must be 1; got 0"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), "No space left on device: 'x'"),
        (IndexError("index 128 is out of range"), "IndexError: index 128 is out of range"),
        (KeyError("a"), "KeyError: 'a'"),
        (NamelessError("what"), "NamelessError: what"),
        (AssertionError(), "AssertionError:"),
        (MemoryError(), "out of memory"),
        (RecursionError("too deep"), "RecursionError: too deep"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "UnicodeDecodeError: 'utf-8'"),
    ],
)
def test_every_error_is_one_line(error, line, capsys, monkeypatch):
    monkeypatch.delenv(errors.DEBUG, raising=False)

    def fail():
        raise error

    assert net.caught("demo", fail) == 1
    printed = capsys.readouterr().err.strip()
    assert "\n" not in printed
    assert line in printed
    assert net.caught("demo", fail, debug=True) == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_environment_asks_for_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv(errors.DEBUG, "1")
    assert main(["decompress", "nowhere.bae"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv(errors.DEBUG, "0")
    assert main(["decompress", "nowhere.bae"]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert main(["--debug", "decompress", "nowhere.bae"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "code"), [(KeyboardInterrupt, 130), (net.TerminatedError, 143)])
def test_interruptions_have_the_status_of_their_signal(kind, code, capsys):
    def stop():
        raise kind

    assert net.caught("demo", stop) == code

    def stop_in_training():
        try:
            raise kind
        except KeyboardInterrupt as error:
            raise runs.InterruptedRunError("stopped at step 3") from error

    capsys.readouterr()
    assert net.caught("demo", stop_in_training) == code
    assert capsys.readouterr().err.strip() == "bae-fast demo: stopped at step 3"


def test_sigterm_is_raised_and_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(net.TerminatedError), net.signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_interruption_does_not_break_into_the_end_of_the_first(capsys, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    def interrupted(text, *, error):
        os.kill(os.getpid(), signal.SIGINT)
        progress.say(text, error=error)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(net, "say", interrupted)
    assert net.caught("demo", stop) == 130
    assert capsys.readouterr().err.startswith("bae-fast demo: interrupted; ")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# a signal comes while bae_fast imports its own modules
EARLY = """
import os, sys
number = int(sys.argv[1])
sys.argv = ["bae-fast", "harvest", "--out", "x"]

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "bae_fast.backends":
            os.kill(os.getpid(), number)

sys.meta_path.insert(0, Finder())
import bae_fast
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_that_is_still_starting_in_one_line(number):
    done = processes.run("-c", EARLY, str(int(number)))
    assert done.returncode == 128 + number
    line = "bae-fast harvest: interrupted; the last results are as they were"
    assert done.stderr.strip() == line


def test_a_panic_of_a_library_in_rust_is_one_line(capsys):
    class PanicException(BaseException):  # its name in pyo3
        pass

    def panics():
        raise PanicException("index out of bounds")

    assert net.caught("demo", panics) == 1
    said = capsys.readouterr().err
    assert said.startswith("bae-fast demo: PanicException: index out of bounds (")
    assert said.count("\n") == 1


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signals here")
def test_signals_of_terminals_and_batch_systems_end_a_command_as_ctrl_c_does(capsys):
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU):
        before = signal.getsignal(number)

        def stop(number=number):
            os.kill(os.getpid(), number)

        assert net.caught("train", stop) == 128 + number
        assert capsys.readouterr().err.startswith("bae-fast train: interrupted; ")
        assert signal.getsignal(number) is before
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert net.caught("train", lambda: os.kill(os.getpid(), signal.SIGHUP) or 0) == 0
    finally:
        signal.signal(signal.SIGHUP, ignored)


def test_a_cache_that_cannot_be_written_is_named_before_a_model_is_loaded(
    tmp_path, capsys, monkeypatch
):
    pytest.importorskip("transformers")

    def fail(*_arguments, **_options):
        raise AssertionError("looked for the language model")

    monkeypatch.setattr("bae_fast.lm.find_language_model", fail)
    file = write_text(tmp_path / "file", "")
    out = ["--out", str(tmp_path / "out")]
    assert main(["demo", "--cache", str(file / "cache"), *out]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("bae-fast demo: --cache must name a folder that can be written; ")
    # the user's own cache folder: the way out is named
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert main(["demo", *out]) == 1
    assert "--cache must name a folder" in capsys.readouterr().err
    (tmp_path / "model").mkdir()
    for command in (["interpret", *out], ["serve", str(tmp_path / "model"), "--port", "0"]):
        assert main(command) == 1
        assert "--cache must name a folder" in capsys.readouterr().err


def test_a_user_without_a_home_keeps_nothing_and_is_told_where_rows_need_a_place(
    tmp_path, capsys, monkeypatch
):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "--cache must name a folder that can be written; XDG_CACHE_HOME must name" in said
    file = write_text(tmp_path / "file", "text")
    assert known.content_digest(file) == hashlib.sha256(b"text").hexdigest()
    assert gguf.copy_of(file) is None
    with pytest.warns(RuntimeWarning, match="copy of file is not kept"):
        assert not gguf.can_keep_copy(file, 1)


def test_a_revision_of_files_that_are_here_is_refused(tmp_path, capsys):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{}")
    options = ["--model", str(tmp_path), "--revision", "main", "--out", str(tmp_path / "out")]
    assert main(["demo", "--cache", str(tmp_path / "cache"), *options]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("bae-fast demo: --revision is of a Hugging Face id; the files of ")


def test_an_interruption_of_what_a_library_runs_as_text_has_the_status_of_others(tmp_path):
    program = """
from bae_fast.cli.net import caught

def run():
    exec("raise KeyboardInterrupt")

raise SystemExit(caught("demo", run))
"""
    write_text(tmp_path / "program.py", program)
    done = run_module("program", tmp_path)
    assert done.returncode == 130
    assert done.stderr.strip() == "bae-fast demo: interrupted; the last results are as they were"


def test_a_signal_that_comes_when_all_is_done_changes_nothing(tmp_path):
    # what is registered first is called last, in the end of the interpreter
    signalled = "import atexit, os, signal\natexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
    write_text(tmp_path / "sitecustomize.py", signalled)
    done = run_module("bae_fast", tmp_path, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == bf.__version__


def run_module(name, folder, *arguments):
    """``python -m`` with a folder of modules before all others."""
    places = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", name, *arguments],
        capture_output=True, text=True, cwd=folder, env=os.environ | {"PYTHONPATH": places},
        check=False,
    )  # fmt: skip


def test_an_argument_that_is_no_utf_8_is_named(capsys):
    assert main(["match", "a", "\udcff"]) == 2
    assert "match: --folders element 2 must be UTF-8; PYTHONUTF8=1" in capsys.readouterr().err
