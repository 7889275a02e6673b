"""``bae-fast compare`` on a tiny language model."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from tiny_lm import save_tiny_model

import bae_fast as bf
from bae_fast.analysis import fvu
from bae_fast.baselines.model import SparseAutoencoder
from bae_fast.cli import compare, main
from bae_fast.cli.demo import Stages
from bae_fast.lm import ActivationCache, load_language_model

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

WORDS = [f"word{i}" for i in range(60)]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    model = save_tiny_model(folder / "model", WORDS)
    order = torch.randint(len(WORDS), (9000,), generator=torch.Generator().manual_seed(0))
    (folder / "text.txt").write_text(" ".join(WORDS[i] for i in order))
    return [
        "compare", "--model", str(model), "--hook", "model.layers.0",
        "--text", str(folder / "text.txt"), "--context", "16", "--expansion", "2",
        "--steps", "25", "--batch-size", "64", "--k", "3", "--device", "cpu", "--no-progress",
        "--cache", str(folder / "cache"), "--out", str(folder / "out"),
    ]  # fmt: skip


def folder_of(arguments, name):
    return Path(arguments[arguments.index(name) + 1])


def test_every_method_gets_a_line_a_point_and_a_model(arguments, capsys):
    assert main(arguments) == 0
    out = folder_of(arguments, "--out")
    result = json.loads((out / "compare.json").read_text())
    assert [run["method"] for run in result["runs"]] == [*compare.BINARY, *compare.METHODS]
    text = (out / "compare.md").read_text()
    for name in ("BAE (sparse)", "TopK k=3", "JumpReLU k=3", "transcoder k=3*", "random k=3"):
        assert f"| {name} |" in text
    assert text in capsys.readouterr().out
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    cache = ActivationCache.open(next(folder_of(arguments, "--cache").glob("*layers.0-*")))
    heldout = cache.rows[cache.split(4096).heldout.start :].float()
    for run in result["runs"]:
        found = run["heldout"]
        assert found["bits"] == pytest.approx(
            found["support_bits"] + found["value_bits"] * found["l0"]
        )
        assert run["settings"]["training"]["steps"] == 25
        load = (
            bf.BinaryAutoencoder if run["method"] in compare.BINARY else SparseAutoencoder
        ).from_pretrained
        model = load(out / run["model"])
        if run["method"] != "transcoder":
            with torch.no_grad():
                recon = model.decode(model.encode(heldout))
            assert found["fvu"] == pytest.approx(fvu(heldout, recon), rel=1e-5)


def test_a_second_call_trains_nothing_and_says_the_same(arguments, monkeypatch):
    out = folder_of(arguments, "--out")
    if not (out / "compare.json").is_file():
        assert main(arguments) == 0
    before = json.loads((out / "compare.json").read_text())

    def fail(*_arguments, **_options):
        raise AssertionError("trained again")

    monkeypatch.setattr(compare.Trainer, "fit", fail)
    assert main(arguments) == 0
    assert json.loads((out / "compare.json").read_text()) == before
    (out / "compare.md").unlink()
    assert main(["compare", "--out", str(out), "--report-only"]) == 0
    assert (out / "compare.md").is_file()


def test_rows_of_the_transcoder_are_of_the_same_tokens(arguments):
    cache_folder = folder_of(arguments, "--cache")
    lm = load_language_model(str(folder_of(arguments, "--model")))
    base = ActivationCache.open(next(cache_folder.glob("*layers.0-[0-9a-f]*")))
    parsed = argparse_of(arguments)
    split = base.split(4096)
    pair = compare.transcoder_rows(parsed, Stages(), base, split.train.stop, split.heldout.start)
    mlp = lm.model.get_submodule("model.layers.0.mlp")
    with torch.no_grad():
        for side in ("train", "heldout"):
            x, y = pair[f"x_{side}"], pair[f"y_{side}"]
            assert len(x) == len(y) > 1000
            again = mlp(x[:50])
            assert torch.allclose(again.float(), y[:50].float(), atol=2e-2, rtol=2e-2)


def argparse_of(arguments):
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    compare.add_parser(commands)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--k", "0"], "k must be an int >= 1; got 0"),
        (["--expansion", "0"], "--expansion must be at least 1; got 0"),
        (["--methods", "topk", "--k", "33"], "k must be at most d_sae=32; got 33"),
        (["--methods", "transcoder", "--transcoder-hooks", "no", "way"], "hook='no' is not a"),
    ],
)
def test_what_a_user_can_mend_is_one_line(arguments, change, message, capsys, tmp_path):
    assert main([*arguments, "--methods", "topk", *change, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("bae-fast compare: ")
    assert message in error
    assert "\n" not in error
