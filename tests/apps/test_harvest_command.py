"""``bae-fast harvest`` on a tiny random language model."""

import json
import subprocess
import sys
import types

import pytest
from tiny_lm import save_tiny_model

from bae_fast.cli import main
from bae_fast.lm import ShardedCache

pytest.importorskip("transformers")

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harvest")
    save_tiny_model(folder / "lm", WORDS)
    (folder / "text").mkdir()
    for i in range(6):
        words = [WORDS[(i * 7 + j * j) % 60] for j in range(100)]
        (folder / "text" / f"{i}.txt").write_text(" ".join(words))
    return folder


def arguments(place, out, *more):
    hooks = ["--hooks", "model.layers.0", "blocks.1.hook_resid_post"]
    shape = ["--context", "12", "--shard-windows", "10", "--batch-size", "4"]
    own = ["--model", str(place / "lm"), "--out", str(out), "--device", "cpu", "--no-progress"]
    return ["harvest", *hooks, *shape, *own, *more]


def test_the_command_writes_a_cache_and_a_second_call_opens_it(place, tmp_path, capsys):
    call = arguments(place, tmp_path, "--text", str(place / "text"))
    assert main(call) == 0
    cache = ShardedCache(tmp_path)
    assert cache.widths == {"model.layers.0": 16, "model.layers.1": 16}
    assert (cache.n_windows, len(cache.shards)) == (50, 5)
    cache.verify()
    printed = capsys.readouterr().out
    assert f"{cache.n_rows:,} rows of model.layers.0 (16), model.layers.1 (16)" in printed
    before = (tmp_path / "manifest.json").stat().st_mtime_ns
    assert main(call) == 0
    assert (tmp_path / "manifest.json").stat().st_mtime_ns == before
    assert main([*call, "--tokens", "240"]) == 1
    said = f"--out {tmp_path} holds a harvest of other settings, take another folder: its text is"
    assert said in capsys.readouterr().err


def test_a_configuration_file_sets_the_options(place, tmp_path):
    settings = {
        "model": str(place / "lm"), "out": str(tmp_path / "out"), "hooks": ["model.layers.0"],
        "context": 12, "tokens": 240, "device": "cpu", "progress": False,
    }  # fmt: skip
    (tmp_path / "h.yaml").write_text(json.dumps(settings))
    assert main(["harvest", "--config", str(tmp_path / "h.yaml")]) == 0
    assert ShardedCache(tmp_path / "out").n_windows == 20


def test_a_dataset_is_streamed(place, tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, subset, *, split, streaming):
        asked.append((name, subset, split, streaming))
        return [{"body": " ".join(WORDS)} for _ in range(10)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    call = arguments(place, tmp_path, "--dataset", "org/corpus", "--subset", "en")
    assert main([*call, "--field", "body"]) == 0
    assert asked == [("org/corpus", "en", "train", True)]
    cache = ShardedCache(tmp_path)
    assert cache.n_windows == 50
    assert cache.manifest["text"]["dataset"] == "org/corpus en train"


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--text", "nowhere"), "--text must name text files or folders of them; nowhere is missi"),
        (("--tokens", "0"), "--tokens must be at least 1; got 0"),
        (("--context", "1"), "--context must be at least 2; got 1"),
        (("--text", "a", "--dataset", "b"), "--dataset must not be given together with --text"),
        (
            ("--dataset", "b"),
            "dataset needs the package datasets: pip install 'bae-fast[datasets]'",
        ),
        (("--hooks", "model.layers.9"), "must name a module of this model; got 'model.layers.9'"),
    ],
)
def test_errors_are_one_line(place, tmp_path, monkeypatch, capsys, more, text):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(arguments(place, tmp_path, *more)) == 1
    assert text in capsys.readouterr().err


@pytest.mark.matrix
def test_processes_of_torchrun_share_the_work(place, tmp_path):
    call = arguments(place, tmp_path / "many", "--text", str(place / "text"))
    assert main(arguments(place, tmp_path / "one", "--text", str(place / "text"))) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, "--standalone", "-m", "bae_fast", *call], check=True, timeout=240)
    for name in ("model.layers.0", "model.layers.1", "index"):
        for path in (tmp_path / "one" / name).iterdir():
            assert (tmp_path / "many" / name / path.name).read_bytes() == path.read_bytes()
