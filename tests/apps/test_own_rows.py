"""Commands on the user's own rows, without a language model."""

from __future__ import annotations

import json
import re
import signal
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import bae_fast as bf
from bae_fast.cli import main
from bae_fast.experiments import compress, runs


@pytest.mark.parametrize(("name", "more"), [("rows.npy", []), ("rows.safetensors", ["--no-bound"])])
def test_the_entropy_of_ones_own_rows(own, tmp_path, name, more, capsys):
    options = ["--states", str(own / name), "--seeds", "0", "--out", str(tmp_path)]
    assert main(["entropy", "rows", *options, *more]) == 0
    estimate = json.loads((tmp_path / "rows.json").read_text())["runs"][0]["estimate"]
    assert estimate["fvu"] < 0.01
    assert estimate["chain"] == pytest.approx(8, abs=0.2)
    assert "| 16 | " in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_of_an_estimate_that_a_signal_stops(own, tmp_path, monkeypatch, number):
    out = tmp_path / "out"

    def stopped(*_arguments, **_options):
        assert len(list((out / "runs").iterdir())) == 1  # its lock
        signal.raise_signal(number)  # at once, in this thread

    monkeypatch.setattr("bae_fast.experiments.entropy.rows.fit_bae", stopped)
    options = ["--states", str(own / "rows.npy"), "--seeds", "0", "--out", str(out)]
    # a shell has its background jobs ignore interruptions
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["entropy", "rows", *options]) == 128 + number
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(out.iterdir()) == []


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
    fewer = ["--states", str(own / "rows.npy"), "--load", str(own / "bae"), "--device", "cpu"]
    fewer += ["--bit-price", "1e-3", "--dense-bits", "40", "--out", str(tmp_path / "fewer")]
    assert main(["compress", *fewer]) == 0
    free, dear = (
        bf.BinaryAutoencoder.from_pretrained(tmp_path / n / "model") for n in ("", "fewer")
    )
    assert (free.dense_bits, dear.dense_bits) == (0, 40)
    assert dear.encode(rows).density().max() < free.encode(rows).density().max()
    capsys.readouterr()
    alone = ["--dense-bits", "40", "--out", str(tmp_path / "alone")]
    assert main(["compress", *again, *alone]) == 1
    assert "--dense-bits must be left out where nothing is searched" in capsys.readouterr().err
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
