"""What all commands have in common: options, configuration files, errors, signals and streams."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib
import io
import json
import os
import queue
import re
import signal
import stat
import subprocess
import sys
import threading
import typing
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from safetensors.torch import save_file

import bae_fast as bf
from bae_fast import files, progress
from bae_fast.cli import COMMANDS, errors, main, net
from bae_fast.cli.command import plain
from bae_fast.cli.options import documentation, make_parser, read, read_type
from bae_fast.experiments import compress, runs
from bae_fast.experiments.judges import JUDGES
from bae_fast.experiments.training import Training
from bae_fast.files import (
    check_writable,
    locked,
    publishing,
    replacing,
    write_json,
    write_safetensors,
    write_text,
    write_torch,
)
from bae_fast.lm import gguf, known
from bae_fast.training import TrainingConfig

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = [
    "demo", "harvest", "compare", "interpret", "match", "steer", "compress", "decompress",
    "train", "evaluate", "push", "entropy.synthetic", "entropy.layers", "entropy.icl",
    "entropy.rows", "serve", "harvest", "neuronpedia",
]  # fmt: skip

# what is given by its place, and an example of it
POSITIONAL = {
    "match": {"folders": (Path("a"), Path("b"))},
    "decompress": {"file": Path("codes.bae")},
    "evaluate": {"folder": Path("run")},
    "push": {"folder": Path("run"), "repo": "user/name"},
    "serve": {"folder": Path("model")},
}


def config_of(name):
    return importlib.import_module(f"bae_fast.experiments.{name}").Config


def parser_of(name):
    return make_parser(name, config_of(name), POSITIONAL.get(name, ()))


# -- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_field_is_an_option_with_a_sentence_of_help(name):
    _, helps = documentation(config_of(name))
    shown = parser_of(name).format_help()
    for field in dataclasses.fields(config_of(name)):
        text = helps[field.name]
        assert text[0].isupper(), (field.name, text)
        assert text.endswith("."), (field.name, text)
        option = field.name.replace("_", "-")
        assert f"--{option}" in shown or field.name in POSITIONAL.get(name, ())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_defaults_read_from_a_command_line_are_the_configuration(name):
    places = POSITIONAL.get(name, {})
    given = [str(v) for p in places.values() for v in (p if isinstance(p, tuple) else (p,))]
    config = config_of(name)
    assert read(parser_of(name), config, given) == config(**places)


@pytest.mark.parametrize("name", ["demo", "compare", "interpret", "steer", "entropy.layers"])
def test_a_resolved_configuration_can_be_read_again(name, tmp_path):
    config = config_of(name)
    changed = config(out=tmp_path / "out", progress=False)
    if name == "demo":
        changed = dataclasses.replace(
            changed, lr=1e-7, betas=(0.5, 0.25), refit=False, text=("a.txt", "b c.txt")
        )
    if name == "compare":
        changed = dataclasses.replace(changed, k=(3, 4), transcoder_hooks=("a", "b"))
    path = write_text(tmp_path / "resolved.yaml", runs.resolved(changed))
    assert read(parser_of(name), config, ["--config", str(path)]) == changed
    # what stands on the command line wins
    again = read(parser_of(name), config, ["--config", str(path), "--progress"])
    assert again == dataclasses.replace(changed, progress=True)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_takes_text_takes_the_field_of_json_lines(name):
    names = {field.name for field in dataclasses.fields(config_of(name))}
    assert "text" not in names or "field" in names


def test_the_configuration_is_printed(capsys):
    assert main(["demo", "--steps", "7", "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert "steps: 7\n" in printed
    assert "hook: model.layers.11\n" in printed


def test_every_constant_of_training_is_an_option():
    # but for how a step is started, which waits until a device has shown it
    constants = {field.name for field in dataclasses.fields(TrainingConfig)} - {"cuda_graph"}
    assert constants <= {field.name for field in dataclasses.fields(Training)}


def test_the_help_names_every_method_and_judge():
    _, helps = documentation(config_of("compare"))
    assert all(f" {name}" in helps["methods"] for name in config_of("compare")().methods)
    assert all(name in helps["judge"] for name in JUDGES)


def test_types_of_options():
    assert read_type(int) == (int, None, False)
    assert read_type(int | None) == (int, None, True)
    assert read_type(tuple[int, ...]) == (int, "*", False)
    assert read_type(tuple[float, float] | None) == (float, 2, True)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--lr", "nan", "--lr must be a number or null; got nan (see --help)"),
        ("--steps", "1.5", "--steps must be a whole number; got 1.5 (see --help)"),
        ("--resume", "no", "--resume must be one of auto, never; got no (see --help)"),
        ("--d-sae", "many", "--d-sae must be a whole number or null; got many (see --help)"),
        ("--preset", "none", "--preset must be one of sparse, paper; got none (see --help)"),
        ("--init", "x", "--init must be one of rows, density, none or null; got x (see --help)"),
    ],
)
def test_a_value_of_another_type_is_told_in_words(option, value, said, capsys):
    assert main(["train", option, value]) == 2
    assert capsys.readouterr().err.strip() == f"bae-fast train: {said}"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_empty_path_is_none_and_not_the_folder_that_the_command_runs_in(name, capsys):
    places, command = POSITIONAL.get(name, {}), name.split(".")
    hints = typing.get_type_hints(config_of(name))
    paths = [field for field, hint in hints.items() if read_type(hint).kind is Path]
    assert paths
    for field in paths:
        given = {k: [str(one) for one in (v if isinstance(v, tuple) else (v,))]
                 for k, v in places.items()}  # fmt: skip
        if field in places:
            given[field][-1] = ""
        arguments = [one for some in given.values() for one in some]
        if field not in places:
            arguments += [f"--{field.replace('_', '-')}", ""]
        assert main([*command, *arguments]) == 2, field
        said = capsys.readouterr().err.strip()
        option = rf"--{field.replace('_', '-')}( element \d)?"
        line = rf"bae-fast {command[0]}: {option} must be a path; got '' \(see --help\)"
        assert re.fullmatch(line, said), said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("out: ''", "--out must be a path; got ''"),
        ("load: ''", "--load must be a path; got ''"),
        ("out: [a, b]", "--out must be a path; got ['a', 'b']"),
        ("load: 3", "--load must be a path; got 3"),
        ('out: "a\\0b"', "--out must be a path; got 'a\\x00b'"),
        ("out: null", "--out must have a value; got null"),
        ("steps: null", "--steps must have a value; got null"),
        ("hook: 3", "--hook must be a text or null; got 3"),
        ("k: [a]", "--k element 1 must be a whole number; got a"),
        ("k: 3", "--config must give an option of several values a list of them"),
        ("k: {3: 4}", "--config must give an option of several values a list of them"),
        ("progress: 3", "--config must set a switch to true or false; got 3"),
        ("ouch: 3", "--config must hold options of this command; got 'ouch'"),
        ("", "--config must name a YAML file of options; got ''"),
        ("- a\n- b", "--config must name a YAML file of options; got '- a - b'"),
        ("out: a: b", "--config must name a YAML file; mapping values are not allowed"),
        ("config: none.yaml", "none.yaml' does not exist"),
    ],
)
def test_what_a_file_of_options_may_not_hold_is_named(text, said, tmp_path, capsys):
    path = write_text(tmp_path / "options.yaml", text)
    command = "compare" if text.startswith("k:") else "train"
    assert main([command, "--config", str(path)]) in (1, 2)
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"bae-fast {command}: "), line
    assert said in line
    assert "\n" not in line


def test_help_names_no_class(capsys):
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "<class" not in shown
    assert "GivenPath" not in shown
    assert "(type: path, default:" in " ".join(shown.split())


@pytest.mark.parametrize("command", ["demo", "compare", "entropy synthetic"])
@pytest.mark.parametrize("change", [["--seeds", "x", "--seed", "x"], ["--nothing", "1"], ["--out"]])
def test_what_cannot_be_read_is_one_line(command, change, capsys):
    assert main([*command.split(), *change]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"bae-fast {command.split()[0]}: ")
    assert change[-2 if len(change) > 1 else -1] in error or "--seed" in error
    assert "\n" not in error


@pytest.mark.parametrize(
    "command",
    [
        "demo", "harvest", "compare", "train", "interpret", "steer", "compress", "match m m",
        "neuronpedia", "entropy synthetic", "entropy layers", "entropy icl", "entropy rows",
    ],
)  # fmt: skip
def test_a_place_that_cannot_be_written_is_found_before_anything_runs(
    command, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").write_text("kept")
    for name in ("numpy.load", "bae_fast.lm.find_language_model", "bae_fast.lm.load_tokenizer"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("it has begun"))
    for out in ("file", "file/inside"):
        arguments = [*command.split(), "--out", str(tmp_path / out)]
        if command in ("train", "compress", "entropy rows"):
            arguments += ["--states", str(tmp_path / "rows.npy")]
        assert main(arguments) == 1
        error = capsys.readouterr().err.strip()
        assert f"--out must name a folder that can be written; {tmp_path / out}: " in error
        assert "\n" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["demo", "--config", "latin.yaml"], 1, "--config must name a YAML file in UTF-8"),
        (["demo", "--config", "text.yaml"], 1, "--config must give an option of several values a"),
        (["demo", "--config", "long.yaml"], 2, "..."),
        (["entropy", "nothing"], 2, "PART must be one of synthetic, layers, icl, rows; got noth"),
        (["evaluate", "m", "--out", "."], 1, "evaluate: "),
        (["info", "--all"], 2, "bae-fast info: unrecognized arguments: --all (see --help)"),
    ],
)
def test_odd_arguments_are_one_line(arguments, status, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"steps: 3 # caf\xe9")
    (tmp_path / "text.yaml").write_text("text: t.txt\n")
    (tmp_path / "long.yaml").write_text(f"steps: [{5000 * '1,'}]\n")
    assert main(arguments) == status
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert len(error) < 2100


def test_the_commands_are_listed(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)
    assert main([]) == 2
    assert main(["nothing"]) == 2
    assert "COMMAND must be one of demo, harvest" in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == bf.__version__


def test_info_needs_no_parser_package(monkeypatch, capsys):
    for name in ("jsonargparse", "docstring_parser"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["info"]) == 0
    assert main(["demo"]) == 1
    assert "pip install 'bae-fast[cli]'" in capsys.readouterr().err


# -- the result for a program ------------------------------------------------------------------


def test_json_is_all_that_standard_output_gets(own, tmp_path, capsys):
    bae = str(own / "bae")
    options = ["--states", str(own / "rows.npy"), "--out", str(tmp_path)]
    assert main(["match", bae, bae, *options, "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["files"] == [str(tmp_path / "match.json"), str(tmp_path / "match.md")]
    assert found["values"] == json.loads((tmp_path / "match.json").read_text())
    assert "== match" in printed.err
    assert main(["match", bae, bae, *options]) == 0
    assert "== match" in capsys.readouterr().out


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no disk that is full")
def test_a_result_for_a_program_that_cannot_be_printed_is_an_error(own, tmp_path):
    bae, out = str(own / "bae"), str(tmp_path / "out")
    line = (
        f"'{sys.executable}' -m bae_fast match '{bae}' '{bae}' --states '{own / 'rows.npy'}' "
        f"--out '{out}' --json"
    )
    for redirection, status in ((">/dev/full", 1), (">&-", 1), ("| true; exit $PIPESTATUS", 0)):
        done = subprocess.run(
            ["bash", "-c", f"{line} {redirection}"],
            capture_output=True, text=True, cwd=ROOT, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert ("the result cannot be printed" in last) == bool(status), done.stderr
        assert "Traceback" not in done.stderr


def test_json_has_null_for_what_is_not_finite():
    values = {"a": float("nan"), "b": [1.5, float("inf"), (True, "c")]}
    assert plain(values) == {"a": None, "b": [1.5, None, [True, "c"]]}


def test_every_command_that_works_for_long_has_progress():
    lacking = {
        name for name in EXPERIMENTS
        if "progress" not in {field.name for field in dataclasses.fields(config_of(name))}
    }  # fmt: skip
    assert lacking == {"push"}


def test_every_command_has_json():
    """An option of the parser that all share; info has no configuration."""
    for name in EXPERIMENTS:
        assert "--json" in parser_of(name).format_help()
    assert "json" not in config_of("demo")().__dict__


# -- errors ------------------------------------------------------------------------------------


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


# -- several processes -------------------------------------------------------------------------


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


# -- streams -----------------------------------------------------------------------------------


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


# -- files -------------------------------------------------------------------------------------


def test_results_take_the_old_ones_place_together(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    write_text(tmp_path / "kept.txt", "kept")
    (tmp_path / "model").mkdir()
    write_text(tmp_path / "model" / "old", "old")

    def fail():
        with publishing(tmp_path) as folder:
            write_text(folder / "a.txt", "half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "a.txt").read_text() == "old"
    with publishing(tmp_path) as folder:
        write_text(folder / "a.txt", "new")
        write_text(folder / "model" / "new", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert (tmp_path / "kept.txt").read_text() == "kept"
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "kept.txt", "model"]


def test_a_move_that_was_cut_short_is_finished_by_the_next_run(tmp_path, monkeypatch):
    replace, calls = os.replace, []

    def killed(source, target):
        calls.append(target)
        if len(calls) == 4:  # a.txt, b.txt, the folder, then the first of the two
            raise SystemExit
        replace(source, target)

    write_text(tmp_path / "a.txt", "old")
    write_text(tmp_path / "b.txt", "old")

    def publish():
        with publishing(tmp_path) as folder:
            for name in "ab":
                write_text(folder / f"{name}.txt", "new")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(SystemExit):
            publish()
    assert (tmp_path / "b.txt").read_text() == "old"
    with publishing(tmp_path):
        assert {(tmp_path / f"{name}.txt").read_text() for name in "ab"} == {"new"}


@pytest.mark.parametrize("write", [
    lambda path: write_torch(path, {"x": torch.ones(3)}),
    lambda path: write_safetensors(path, {"x": torch.ones(3)}, {}),
])  # fmt: skip
def test_checkpoints_and_weights_are_on_the_disk_before_they_replace_others(
    tmp_path, monkeypatch, write
):
    path, on_disk = tmp_path / "file", []
    fsync, replace = os.fsync, os.replace

    def synced(handle):
        on_disk.append((os.fstat(handle).st_ino, os.fstat(handle).st_size))
        fsync(handle)

    def replaced(source, target):
        state = os.stat(source)
        assert (state.st_ino, state.st_size) in on_disk
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    assert write(path).stat().st_size > 0


def test_a_panic_of_a_library_in_rust_is_one_line(capsys):
    class PanicException(BaseException):  # its name in pyo3
        pass

    def panics():
        raise PanicException("index out of bounds")

    assert net.caught("demo", panics) == 1
    said = capsys.readouterr().err
    assert said.startswith("bae-fast demo: PanicException: index out of bounds (")
    assert said.count("\n") == 1


def test_results_take_the_place_of_what_is_of_another_kind(tmp_path):
    (tmp_path / "far").mkdir()
    write_text(tmp_path / "far" / "kept", "kept")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model").symlink_to(tmp_path / "far")  # a folder of results
    (tmp_path / "out" / "table.md").mkdir()
    write_text(tmp_path / "out" / "names", "a file")
    (tmp_path / "out" / "plot.png").symlink_to(tmp_path / "nowhere")
    with publishing(tmp_path / "out") as folder:
        for name in ("model/cfg.json", "table.md", "names/a", "plot.png"):
            write_text(folder / name, "new")
    for name in ("model/cfg.json", "table.md", "names/a", "plot.png"):
        assert (tmp_path / "out" / name).read_text() == "new"
    assert (tmp_path / "far" / "kept").read_text() == "kept"
    assert not (tmp_path / "out" / ".finished").exists()


def test_errors_of_the_system_name_the_file(tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"a\.json"), replacing(tmp_path / "a.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    file = write_text(tmp_path / "file", "")
    with pytest.raises(OSError, match="file"):
        write_json(file / "below.json", {})
    with pytest.raises(OSError, match="file"):
        check_writable(file / "below")


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path):
    for name in ("there", "not yet"):
        link, real = tmp_path / f"link to {name}", tmp_path / "far" / name
        link.symlink_to(real)
        write_text(link, name)
        assert link.is_symlink()
        assert real.read_text() == name
        write_text(link, "again")
        assert real.read_text() == "again"
    assert sorted(path.name for path in (tmp_path / "far").iterdir()) == ["not yet", "there"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_devices_pipes_folders_and_protected_files_are_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    write_text(tmp_path / "protected", "kept").chmod(0o444)
    before = {path.name: path.lstat().st_mode for path in tmp_path.iterdir()}
    for name, why in (
        ("pipe", "must be a file"), ("folder", "directory"), ("protected", "write-protected"),
    ):  # fmt: skip
        with pytest.raises(OSError, match=f"{why}.*{name}"):
            write_text(tmp_path / name, "new")
    assert {path.name: path.lstat().st_mode for path in tmp_path.iterdir()} == before
    assert (tmp_path / "protected").read_text() == "kept"


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    file = write_text(tmp_path / "private", "old")
    file.chmod(0o640)
    assert stat.S_IMODE(write_text(file, "new").stat().st_mode) == 0o640


@pytest.mark.parametrize("name", ["x" * 255, "\u00fc" * 127, "\U0001f600" * 63])
def test_a_name_may_be_as_long_as_the_system_has_it(tmp_path, name):
    assert write_text(tmp_path / name, "a").read_text() == "a"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="the system names no machine")
def test_what_a_killed_writer_left_is_removed_and_a_living_ones_file_stays(tmp_path):
    program = (
        "import sys, bae_fast.files as files\n"
        "with files.replacing(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    print(temporary, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path / name)], **pipes)
        for name in ("killed", "living")
    ]
    try:
        killed, living = (Path(writer.stdout.readline().strip()) for writer in writers)
        writers[0].kill()
        writers[0].wait()
        # of a process with the same number elsewhere, and of nobody known
        elsewhere = killed.with_name(killed.name.replace(files._machine(), "0" * 8))
        older = tmp_path / ".killed.0123abcd.tmp"
        for path in (elsewhere, older):
            path.write_text("kept")
        write_text(tmp_path / "new", "a")
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {"new", living.name, elsewhere.name, older.name}
    finally:
        for writer in writers:
            writer.stdin.close()
            writer.wait()
            writer.stdout.close()
    assert writers[1].returncode == 0
    assert (tmp_path / "living").read_text() == "half"


def test_a_full_disk_is_an_oserror_that_names_the_file(tmp_path):
    program = (
        "import resource, signal, sys, bae_fast as bf\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "try: bf.BinaryAutoencoder(64, 512).save_pretrained(sys.argv[1])\n"
        "except OSError as error: print(error)\n"
    )
    done = processes.run("-c", program, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sae_weights.safetensors" in done.stdout
    assert list(tmp_path.glob("*.tmp")) == []


def test_a_checkpoint_on_a_full_disk_is_named_and_says_no_place_in_an_archive(tmp_path):
    program = (
        "import resource, signal, sys, torch\n"
        "from bae_fast.files import append_text, write_torch\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "for write in (lambda: write_torch(sys.argv[1] + '/state.pt', torch.zeros(10_000)),\n"
        "              lambda: append_text(sys.argv[1] + '/log.jsonl', 30_000 * 'a')):\n"
        "    try: write()\n"
        "    except OSError as error: print(error)\n"
    )
    done = processes.run("-c", program, tmp_path)
    assert done.returncode == 0, done.stderr
    checkpoint, log = done.stdout.splitlines()
    assert "the disk is full" in checkpoint
    assert "state.pt" in checkpoint
    assert "inline_container" not in checkpoint
    assert "log.jsonl" in log
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


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


# -- the user's own rows -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Rows of 8 fair bits in 16 dimensions as files, and two models of them."""
    folder = tmp_path_factory.mktemp("own")
    g = torch.Generator().manual_seed(0)
    bits = torch.rand(2000, 8, generator=g) < 0.5
    rows = bits.float() @ torch.randn(8, 16, generator=g)
    np.save(folder / "rows.npy", rows.double().numpy())
    save_file({"rows": rows, "other": torch.ones(1)}, folder / "rows.safetensors")
    torch.manual_seed(0)
    bae = bf.BinaryAutoencoder(16, 32).fit_normalization_(rows)
    bae.init_density_(rows, 0.3).save_pretrained(folder / "bae")
    return folder


@pytest.mark.parametrize(("name", "more"), [("rows.npy", []), ("rows.safetensors", ["--no-bound"])])
def test_the_entropy_of_ones_own_rows(own, tmp_path, name, more, capsys):
    options = ["--states", str(own / name), "--seeds", "0", "--out", str(tmp_path)]
    assert main(["entropy", "rows", *options, *more]) == 0
    estimate = json.loads((tmp_path / "rows.json").read_text())["runs"][0]["estimate"]
    assert estimate["fvu"] < 0.01
    assert estimate["chain"] == pytest.approx(8, abs=0.2)
    assert "| 16 | " in capsys.readouterr().out


def test_ones_own_rows_are_matched_without_a_language_model(own, tmp_path, monkeypatch):
    monkeypatch.setattr("bae_fast.lm.find_language_model", None)
    folders = [str(own / "bae")] * 2
    options = ["--states", str(own / "rows.npy"), "--out", str(tmp_path), "--device", "cpu"]
    assert main(["match", *folders, *options]) == 0
    found = json.loads((tmp_path / "match.json").read_text())
    assert found["summary"]["a"]["same"] > 20
    assert found["n_rows"] == 2000


@pytest.mark.usefixtures("undrawn")
def test_ones_own_rows_are_compressed_without_a_language_model(own, tmp_path, capsys):
    pytest.importorskip("constriction")
    pytest.importorskip("matplotlib")
    options = ["--states", str(own / "rows.npy"), "--out", str(tmp_path), "--device", "cpu"]
    assert main(["compress", *options, "--load", str(own / "bae")]) == 0
    from bae_fast.compression import decompress

    bae = bf.BinaryAutoencoder.from_pretrained(own / "bae")
    rows = torch.from_numpy(np.load(own / "rows.npy")).float()
    assert decompress(tmp_path / "codes.bae").equal(bae.encode(rows))
    assert main(["decompress", str(tmp_path)]) == 0  # the folder, as other commands take it
    assert bf.BinaryCode.load(tmp_path / "codes.safetensors").equal(bae.encode(rows))
    for name, value in (("--model", "gpt2"), ("--text", "book.txt")):  # read by nobody
        given = ["--load", str(own / "bae"), name, value, "--overwrite"]
        assert main(["compress", *options, *given]) == 1
        assert f"{name} must be left out where --states gives" in capsys.readouterr().err
    other = ["--steps", "5", "--batch-size", "64"]
    assert main(["compress", *options, *other]) == 1
    assert decompress(tmp_path / "codes.bae").equal(bae.encode(rows))
    assert main(["compress", *options, *other, "--overwrite"]) == 0
    assert bf.BinaryAutoencoder.from_pretrained(tmp_path / "model").config.d_in == 16


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--load", "nothing", "folder nothing does not exist"),
        ("--block-rows", "0", "--block-rows must be at least 1; got 0"),
    ],
)
def test_what_cannot_be_compressed_is_said_before_anything_is_read(
    option, value, said, capsys, monkeypatch
):
    pytest.importorskip("constriction")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(compress, "rows_of", lambda *_: pytest.fail("it has begun"))
    assert main(["compress", option, value]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_codes_that_are_searched_for_are_compressed_and_read_with_their_model(
    own, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("constriction")
    pytest.importorskip("matplotlib")
    from bae_fast.compression import decompress

    rows = torch.from_numpy(np.load(own / "rows.npy")).float()
    found = {}
    for fit_rows in (1000, 1):  # too few rows for the decoder, and enough
        monkeypatch.setattr(compress, "FIT_ROWS", fit_rows)
        options = ["--states", str(own / "rows.npy"), "--out", str(tmp_path), "--overwrite"]
        options += ["--device", "cpu", "--load", str(own / "bae"), "--bit-price", "1e-3"]
        assert main(["compress", *options]) == 0
        assert "searched for, at 0.001 a bit" in capsys.readouterr().out
        model = bf.BinaryAutoencoder.from_pretrained(tmp_path / "model")
        assert type(model) is bf.SearchedAutoencoder
        assert decompress(tmp_path / "codes.bae").equal(model.encode(rows))
        found[fit_rows] = json.loads((tmp_path / "compress.json").read_text())["fvu"]
        assert main(["decompress", str(tmp_path), "--load", str(tmp_path / "model")]) == 0
    again = ["--states", str(own / "rows.npy"), "--load", str(tmp_path / "model")]
    assert main(["compress", *again, "--device", "cpu", "--out", str(tmp_path / "again")]) == 0
    assert "searched for, at 0.001 a bit" in capsys.readouterr().out  # as the model does
    assert decompress(tmp_path / "again" / "codes.bae").equal(model.encode(rows))
    assert found[1] < found[1000]
    for price in ("-1", ".nan", ".inf"):
        assert main(["compress", *options, "--bit-price", price]) == 1
        said = f"--bit-price must be finite and at least 0; got {price.strip('.')}"
        assert said in capsys.readouterr().err


def _damaged_shape(path, shape):
    np.save(path, np.zeros((5, 3)))
    data = path.read_bytes()
    at = data.index(b"(5, 3)")
    path.write_bytes(data[:at] + shape + data[at + len(shape) :])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: np.save(p / "x.npy", np.zeros(5)), "must be floating point of shape [n, d]"),
        (lambda p: np.save(p / "x.npy", np.zeros((50, 3), int)), "[50, 3] of int64"),
        (lambda p: np.save(p / "x.npy", np.full((50, 3), np.nan)), "NaN or Inf in 50 rows"),
        (lambda p: np.save(p / "x.npy", np.full((50, 3), 1e300)), "in 50 rows, as float32"),
        (lambda p: np.save(p / "x.npy", np.zeros((5, 3))), "must hold at least 20 rows"),
        (lambda p: np.save(p / "x.npy", np.zeros((0, 3))), "must hold at least one row"),
        (lambda p: np.save(p / "x.npy", np.array([{}]), allow_pickle=True), "not a readable .npy"),
        (lambda p: (p / "x.npy").write_bytes(b"no"), "not a readable .npy"),
        (lambda p: _damaged_shape(p / "x.npy", b"(5, 99999999999999999), "), "not a readable"),
        (lambda p: _damaged_shape(p / "x.npy", b"(((((((((((((((((((((5,"), "not a readable"),
        (lambda p: None, "does not exist"),
    ],
)
def test_rows_that_cannot_be_read_are_one_line(make, message, tmp_path, capsys):
    make(tmp_path)
    states = str(tmp_path / "x.npy")
    assert main(["entropy", "rows", "--states", states, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "states" in error
    assert "\n" not in error


def test_rows_of_eight_bits_are_refused_by_name(tmp_path):
    from safetensors.torch import save_file

    from bae_fast.experiments.data import read_rows

    save_file({"rows": torch.ones(50, 3).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with pytest.raises(runs.ConfigError, match=r"has \[50, 3\] of float8_e4m3fn"):
        read_rows(tmp_path / "x.safetensors")


@pytest.mark.usefixtures("undrawn")
def test_an_experiment_is_three_lines_of_python(tmp_path):
    pytest.importorskip("matplotlib")
    from bae_fast.experiments.entropy import synthetic

    result = synthetic.run(
        synthetic.Config(
            kinds=("fair",), r=(4,), d=(8,), seeds=(0,), steps=5, rows=1024, heldout=256,
            out=tmp_path,
        )
    )  # fmt: skip
    assert result.values["runs"][0]["joint_bits"] == 4
    assert "| fair |" in result.text
    assert all(path.is_file() for path in result.files)
    assert (tmp_path / "resolved.yaml").read_text().startswith('kinds: ["fair"]\n')


@pytest.mark.parametrize(
    "command",
    ["demo", "compare", "compress", "steer", "entropy synthetic", "entropy layers", "entropy icl"],
)
def test_a_command_that_draws_misses_matplotlib_before_anything_slow(
    command, tmp_path, monkeypatch, capsys
):
    if command == "demo":
        pytest.importorskip("transformers")
    if command == "compress":
        pytest.importorskip("constriction")

    def slow(*_arguments, **_options):
        raise AssertionError("it began")

    for name in ("data.harvest_rows", "data.rows_of", "compare.harvest_rows", "compress.rows_of",
                 "steer.steer", "runs.once"):  # fmt: skip
        monkeypatch.setattr(f"bae_fast.experiments.{name}", slow, raising=False)
    monkeypatch.setattr("bae_fast.lm.load_language_model", slow)
    monkeypatch.setattr("bae_fast.lm.load_tokenizer", slow)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*command.split(), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err.strip()
    assert re.search(r"matplotlib: pip install 'bae-fast\[(lm,)?report\]'", said), said
    assert not (tmp_path / "out").exists()
