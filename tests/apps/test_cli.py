"""The commands, on a tiny language model saved as a Hugging Face folder."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import processes
import pytest
import torch
from tiny_lm import save_tiny_model

import bae_fast as bf
from bae_fast.cli import main

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[2]
WORDS = [f"word{i}" for i in range(60)]


# a run that a signal can interrupt
LONGER = ("--steps", "200", "--entropy-weight", "3e-4")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What all runs read: a model with one token a word, a text, hidden states once harvested."""
    folder = tmp_path_factory.mktemp("given")
    model = save_tiny_model(folder / "tiny-llama", WORDS)
    text = folder / "text.txt"
    order = torch.randint(len(WORDS), (9000,), generator=torch.Generator().manual_seed(0))
    text.write_text(" ".join(WORDS[i] for i in order))
    return {"--model": model, "--text": text, "--cache": folder / "cache"}


def demo(given, out):
    paths = [str(part) for pair in (given | {"--out": out}).items() for part in pair]
    return [
        "demo", *paths, "--hook", "model.layers.0", "--context", "16", "--expansion", "2",
        "--steps", "30", "--batch-size", "64", "--no-progress", "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture
def arguments(given, tmp_path):
    return demo(given, tmp_path / "out")


def test_the_demo_leaves_a_model_metrics_plots_and_a_page(
    arguments, tmp_path, capsys, monkeypatch, request
):
    arguments += ["--cache", str(tmp_path / "cache")]
    assert main(arguments) == 0
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {
        "cfg.json", "sae_weights.safetensors", "metrics.json", "log.jsonl", "report.html",
        "training_curves.png", "density_histogram.png", "fvu_bits.png", "resolved.yaml",
    }  # fmt: skip
    found = json.loads((out / "metrics.json").read_text())
    heldout = found["heldout"]
    assert 0 < heldout["fvu"] < 1.5
    assert heldout["bits"] > 0
    assert found["data"]["harvest_tokens_per_second"] > 0
    assert set(found["seconds"]) >= {"harvest hidden states", "train", "evaluate and describe"}
    printed = capsys.readouterr().out
    for expected in ("FVU", "pooled bits", "Gaussian bound", "dead features", "«"):
        assert expected in printed
    assert printed.count("\nfeature ") == 10
    bae = bf.BinaryAutoencoder.from_pretrained(out)
    assert bae.config.metadata["hook_name"] == "model.layers.0"
    assert float(bae.x_scale) != 1

    # again: the hidden states are cached, so the model is not loaded, and the figures are the same
    def fail(*_args, **_options):
        raise AssertionError("loaded the language model")

    monkeypatch.setattr("bae_fast.lm.load_language_model", fail)
    request.getfixturevalue("undrawn")
    assert main(arguments) == 0
    assert json.loads((out / "metrics.json").read_text())["heldout"] == heldout


# Runs the command behind two numbers: a step of its training, and the signal that it gets there.
STOPPED = """
import os, sys
from bae_fast.cli import main
from bae_fast.training import Trainer

at, number = int(sys.argv[1]), int(sys.argv[2])
train_step = Trainer.train_step

def step(self):
    if self.step == at:
        os.kill(os.getpid(), number)
    return train_step(self)

Trainer.train_step = step
sys.exit(main(sys.argv[3:]))
"""


def stopped(arguments, step, number):
    """The status of a command that a signal meets in a step, and the lines of its errors."""
    done = processes.run("-c", STOPPED, str(step), str(int(number)), *arguments)
    return done.returncode, done.stderr.strip().splitlines()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("undrawn")
def test_a_signal_leaves_the_last_results_and_the_same_command_goes_on(
    given, arguments, number, tmp_path, capsys
):
    out = tmp_path / "out"
    assert main(arguments) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".jsonl"}
    longer = [*arguments, *LONGER, "--overwrite"]
    status, (line,) = stopped(longer, 57, number)
    assert status == 128 + number
    assert line.startswith("bae-fast demo: stopped at step ")
    assert "the same command goes on" in line
    assert {name: (out / name).read_bytes() for name in before} == before

    capsys.readouterr()
    assert main(longer) == 0
    step = int(re.search(r"stopped at step ([\d,]+)", line)[1].replace(",", ""))
    assert f"goes on from step {step:,}" in capsys.readouterr().out
    steps = [json.loads(x)["step"] for x in (out / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(10, 201, 10))
    assert not (out / ".unfinished").exists()
    # as if nothing had happened
    assert main([*demo(given, tmp_path / "other"), *LONGER]) == 0
    found, expected = (
        json.loads((folder / "metrics.json").read_text())["heldout"]
        for folder in (out, tmp_path / "other")
    )
    assert found == expected


@pytest.mark.usefixtures("undrawn")
def test_results_of_other_settings_are_replaced_only_when_that_is_asked_for(
    arguments, tmp_path, capsys
):
    out = tmp_path / "out"
    assert main(arguments) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    other = [*arguments, "--seed", "3", "--lr", "1e-3"]
    assert main(other) == 1
    line = capsys.readouterr().err.strip()
    assert line == (
        "bae-fast demo: --out must be a folder without results of other settings, unless "
        f"--overwrite is given; {out} has lr null, here 0.001; seed 0, here 3"
    )
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert main([*other, "--overwrite"]) == 0
    assert (out / "cfg.json").read_bytes() != before["cfg.json"]
    # the same settings run again, whatever says how they are shown
    assert main([*other, "--progress"]) == 0
    # a saved configuration is no leave to replace others
    assert main(["demo", "--config", str(out / "resolved.yaml"), "--seed", "4"]) == 1


@pytest.mark.usefixtures("undrawn")
def test_a_checkpoint_of_other_settings_is_not_used(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    status, (line,) = stopped([*arguments, *LONGER], 17, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM
    assert line.startswith("bae-fast demo: stopped at step ")
    checkpoint = (out / ".unfinished" / "checkpoint.pt").read_bytes()
    assert main(arguments) == 1
    assert "without a run that was stopped, of other settings" in capsys.readouterr().err
    assert (out / ".unfinished" / "checkpoint.pt").read_bytes() == checkpoint
    assert main([*arguments, "--overwrite"]) == 0
    assert "is not used: state must be of a run with the same module" in capsys.readouterr().out
    steps = [json.loads(x)["step"] for x in (out / "log.jsonl").read_text().splitlines()]
    assert steps == [10, 20, 30]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--hook", "model.layer.0"], "model.layers.0"),  # the near match is named
        (["--tokens", "3000"], "--tokens or --text must give at least"),
        (["--expansion", "0"], "--expansion must be at least 1; got 0"),
        (["--d-sae", "0"], "--d-sae must be at least 1; got 0"),
        (["--device", "cuda:7"], "--device cuda:7: torch sees no CUDA device"),
        (["--steps", "0"], "steps must be at least 1; got 0"),
        (
            ["--text", "nowhere.txt"],
            "--text must name text that can be read; nowhere",
        ),
        (["--model", ""], "name must be a Hugging Face id, a folder, or"),
        (["--impl", "cuda"], "--impl cuda cannot run here"),
        (["--bos"], "this tokenizer has no bos_token_id"),
    ],
)
def test_what_a_user_can_mend_is_one_line(arguments, capsys, change, message):
    if change[0] == "--text":
        at = arguments.index("--text")
        arguments[at : at + 2] = change
    else:
        arguments += change
    assert main(arguments) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("bae-fast demo: ")
    assert message in error
    assert "\n" not in error


def test_info_names_every_backend(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for name in ("reference", "torch", "cpp", "triton", "cuda", bf.__version__):
        assert name in printed
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == bf.info()
