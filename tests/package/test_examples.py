"""The programs of examples/ run, at tiny sizes and without a network."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_lm import save_tiny_model

import bae_fast as bf
from bae_fast.files import read_json
from bae_fast.lm import harvest_shards, load_language_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WORDS = [f"w{i}" for i in range(40)]


def example(name):
    """The main function of an example."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def bits():
    """Six fair bits in 16 dimensions: the entropy is 6."""
    draw = np.random.default_rng(0)
    return draw.integers(0, 2, (2400, 6)), draw.normal(size=(6, 16))


@pytest.fixture
def rows(bits, tmp_path):
    np.save(tmp_path / "rows.npy", (bits[0] @ bits[1]).astype("float32"))
    return str(tmp_path / "rows.npy")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("transformers")
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny-llama"), WORDS))


def test_every_example_has_a_test():
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'example("{path.stem}")' in text for path in EXAMPLES.glob("*.py"))


def test_train_on_rows(rows, tmp_path, capsys):
    out = tmp_path / "bae"
    found = example("train_on_rows")([rows, "--steps", "60", "--out", str(out)])
    assert found.n_rows == 240
    assert found.fvu < 0.5  # six bits in 64 features; the mean alone has 1
    assert bf.BinaryAutoencoder.from_pretrained(out).config.d_sae == 64
    assert f"FVU {found.fvu:.3f}" in capsys.readouterr().out


@pytest.mark.long
def test_train_on_processes(rows, tmp_path):
    options = [rows, "--steps", "50", "--out"]
    alone = example("train_on_processes")([*options, str(tmp_path / "alone")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program = [str(EXAMPLES / "train_on_processes.py"), *options, str(tmp_path / "two")]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", *program],
        env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for name, line in alone.items():
        assert line["heldout_fvu"] < 1
        one, two = (
            bf.BinaryAutoencoder.from_pretrained(tmp_path / run / name) for run in ("alone", "two")
        )
        assert two.config == one.config
        assert f"{name}: FVU" in done.stdout


def test_entropy_of_arrays(rows, capsys):
    found = example("entropy_of_arrays")([rows, "--features", "12", "--steps", "300"])
    assert found["fvu"] < 1e-3
    assert found["chain"] == pytest.approx(6, abs=0.2)
    assert f"{found['chain']:.2f} bits" in capsys.readouterr().out


@pytest.mark.parametrize("kept", ["npy", "shards"])
def test_training_in_sae_lens(kept, rows, model, tmp_path):
    pytest.importorskip("sae_lens", reason="SAELens is not installed (extra 'saelens')")
    if kept == "shards":
        lm = load_language_model(model)
        tokens = torch.randint(len(WORDS), (40, 32))
        rows = str(harvest_shards(lm, tokens, ["model.layers.0"], tmp_path / "cache").folder)
    options = ["--steps", "30", "--batch-size", "64", "--k", "4", "--deviation", "0.3"]
    binary, without, topk = example("train_in_saelens")(
        [rows, *options, "--lr", "1e-3", "--out", str(tmp_path / "out.json")]
    )
    assert binary["dead"] < 0.1
    assert binary["fvu"] < 1
    assert topk["l0"] <= 4
    assert binary["entropy"] > without["entropy"] == 0
    assert read_json(tmp_path / "out.json")["runs"] == [binary, without, topk]


def test_from_a_model_to_features_and_back_into_the_model(model, tmp_path, capsys):
    draw = np.random.default_rng(0)
    text, out = tmp_path / "text.txt", tmp_path / "bae"
    text.write_text(" ".join(draw.choice(WORDS, 4000)), encoding="utf-8")
    hook = "model.layers.0"
    found, features = example("model_to_features")(
        [
            *("--model", model, "--hook", hook, "--text", str(text), "--tokens", "2000"),
            *("--context", "32", "--heldout", "400", "--steps", "20"),
            *("--cache", str(tmp_path / "cache"), "--out", str(out)),
        ]
    )
    assert 0 < found.n_rows <= 400
    assert 1 <= len(features) <= 5
    bae = bf.BinaryAutoencoder.from_pretrained(out)
    assert bae.config.metadata["hook_name"] == hook

    said = example("splice_and_steer")(
        [
            *(str(out), "--model", model, "--hook", hook, "--feature", "3", "--strength", "50"),
            *("--prompt", "w1 w2 w3", "--tokens", "6"),
        ]
    )
    assert said["spliced, error added back"] == said["the model"]
    assert set(said) > {"the model", "feature 3 at 50"}
    assert "the model: w1 w2 w3" in capsys.readouterr().out
