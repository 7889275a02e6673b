"""What all commands have in common: options, configuration files and results for a program."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import bae_fast as bf
from bae_fast.cli import COMMANDS, main
from bae_fast.cli.command import plain
from bae_fast.cli.fields import documentation, read_type
from bae_fast.cli.options import make_parser, read
from bae_fast.experiments import runs, saved, steer
from bae_fast.experiments.judges import JUDGES
from bae_fast.experiments.training import Training
from bae_fast.files import write_text
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


@pytest.mark.parametrize("folders", [["a"], ["a", "b", "c"]])
def test_a_number_of_folders_that_match_does_not_take_is_named(folders, capsys):
    assert main(["match", *folders]) == 1
    assert f"--folders must be two folders; got {len(folders)}" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--print_config", "--help"])
def test_a_reader_of_options_that_has_seen_enough_is_no_error(option, capsys, monkeypatch):
    class Gone:
        encoding = "utf-8"

        def write(self, _text):
            raise BrokenPipeError

        def flush(self):
            pass

        def isatty(self):
            return False

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Gone())
        assert main(["train", option]) == 0
    assert capsys.readouterr().err == ""


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
    ("option", "place", "kind"),
    [
        ("--answers", "file/inside", "file"),
        ("--answers", ".", "file"),
        ("--delphi", "file", "folder"),
    ],
)
def test_other_places_of_interpret_are_found_before_anything_runs(
    option, place, kind, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr("bae_fast.experiments.interpret.see", lambda *_: pytest.fail("it began"))
    options = ["--judge", "rule", "--out", str(tmp_path / "out"), option, str(tmp_path / place)]
    assert main(["interpret", *options]) == 1
    assert f"{option} must name a {kind} that can be written; " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("command", ["decompress codes.bae", "evaluate run"])
def test_a_folder_is_no_place_for_a_file(command, tmp_path, capsys):
    assert main([*command.split(), "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert f"--out must name a file that can be written; {tmp_path}: Is a directory" in said


@pytest.mark.parametrize("part", ["synthetic", "layers", "icl", "rows"])
def test_seeds_are_looked_at_before_anything_runs(part, tmp_path, capsys, monkeypatch):
    for name in ("_runs", "own_rows"):
        monkeypatch.setattr(
            f"bae_fast.experiments.entropy.{part}.{name}",
            lambda *_: pytest.fail("it has begun"),
            raising=False,
        )
    options = ["--states", "rows.npy"] if part == "rows" else []
    options += ["--seeds", "0", "-1", "--out", str(tmp_path / "out")]
    assert main(["entropy", part, *options]) == 1
    assert "--seeds must be at least 0; got [0, -1]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model_name", 3, "a text"),
        ("hook_name", ["a"], "a text"),
        ("context_size", "16", "a whole number"),
        ("context_size", True, "a whole number"),
        ("text_files", "a.txt", "a list of texts"),
        ("text_files", [3], "a list of texts"),
        ("transcoder_hooks", {"a": "b"}, "a list of texts"),
        ("prepend_bos", "no", "true or false"),
    ],
)
def test_metadata_of_a_stranger_that_say_where_by_another_type_are_named(
    name, value, words, tmp_path, capsys
):
    bae = bf.BinaryAutoencoder(16, 32, metadata={name: value})
    folder = str(bae.save_pretrained(tmp_path / "bae"))
    assert main(["match", folder, folder, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err.strip()
    assert f"{folder}: {name} in the metadata must be {words}; got {value!r}" in said
    assert not (tmp_path / "out").exists()


def test_an_empty_hook_and_a_window_of_nothing_are_not_the_trainings(tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "block_width", lambda _data: None)
    metadata = {"model_name": "m", "context_size": 16}
    folder = bf.BinaryAutoencoder(16, 32, metadata=metadata).save_pretrained(tmp_path)
    config = config_of("match")(folders=(folder, folder), hook="", context=0)
    _, data = saved.open_model(config, folder, with_text=False)
    assert (data.hook, data.context) == ("", 0)


def test_a_file_of_prompts_that_is_not_there_is_named_by_its_option(tmp_path):
    with pytest.raises(runs.ConfigError, match=r"^positive must name UTF-8 text; .*none\.txt"):
        steer.read_prompts("positive", tmp_path / "none.txt")


def test_a_run_that_fails_before_it_has_made_anything_leaves_nothing(tmp_path):
    def fail(made):
        with runs.results(config_of("match")(out=tmp_path)) as folder:
            if made is not None:
                write_text(folder / made, "x")
            raise ZeroDivisionError

    for made, left in ((None, []), ("checkpoint.pt", [".unfinished"])):
        with pytest.raises(ZeroDivisionError):
            fail(made)
        assert [path.name for path in tmp_path.iterdir()] == left


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
