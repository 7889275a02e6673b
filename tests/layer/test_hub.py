"""The Hugging Face Hub, by a stand-in that huggingface_hub talks to over HTTP."""

from __future__ import annotations

import errno
import json
import os
import shutil
from types import SimpleNamespace

import processes
import pytest
import torch
from hub_server import hub_server

from bae_fast import BinaryAutoencoder, SearchedAutoencoder, hub
from bae_fast.autoencoder import load_autoencoder
from bae_fast.baselines import make_baseline
from bae_fast.cli import main
from bae_fast.files import write_json
from bae_fast.pretrained import find_pretrained

pytest.importorskip("huggingface_hub")

# a process of its own: huggingface_hub reads its endpoint when it is imported
PROGRAM = """
import sys
import torch
from bae_fast.autoencoder import load_autoencoder
import bae_fast.baselines

source, repo, subfolder, revision, out = sys.argv[1:]
model = load_autoencoder(source)
print(model.push_to_hub(repo, subfolder=subfolder or None, figures={"fvu": 0.125, "l0": 3.0}))
again = type(model).from_pretrained(repo, subfolder=subfolder or None, revision=revision or None)
again.save_pretrained(out)
try:
    load_autoencoder("nobody/nothing")
except FileNotFoundError as error:
    print(error)
"""


@pytest.fixture
def server():
    with hub_server() as running:
        yield running


def printed(server, tmp_path, *arguments):
    """What Python printed, in a process that knows the stand-in alone."""
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_TOKEN": "hf_none",
    }
    done = processes.run(*arguments, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def pushed(server, tmp_path, model, repo, subfolder="", revision=""):
    """What the program printed, and the model that came back."""
    source, out = model.save_pretrained(tmp_path / "source"), tmp_path / "out"
    said = printed(server, tmp_path, "-c", PROGRAM, source, repo, subfolder, revision, out)
    return said.splitlines(), load_autoencoder(out)


# serves a repository's model up to where the language model would read text
SERVE = """
import sys
from pathlib import Path
from bae_fast.experiments import saved, serve

saved.block_width = lambda data: None  # the repository has no language model to ask

def harvest(data, *rest, **options):
    print(data.model, data.hook)
    sys.exit()

serve.harvest_rows = harvest
serve.publish(serve.Config(folder=Path(sys.argv[1])), None)
"""


# the same of the features for Neuronpedia
EXPORT = SERVE.replace("import saved, serve", "import neuronpedia as serve, saved").replace(
    "serve.publish(serve.Config(folder=Path(sys.argv[1])), None)",
    """
serve.run(serve.Config(
    load=Path(sys.argv[1]), release="r", source_set="s", creator="c", creator_id="i"
))
""",
)


@pytest.mark.parametrize("program", [SERVE, EXPORT], ids=["serve", "neuronpedia"])
def test_the_features_of_a_repository_s_model_can_be_shown(server, tmp_path, program):
    metadata = {"model_name": "user/language-model", "hook_name": "model.layers.3"}
    pushed(server, tmp_path, BinaryAutoencoder(6, 40, metadata=metadata), "user/dictionary")
    said = printed(server, tmp_path, "-c", program, "user/dictionary")
    assert said.splitlines()[-1] == "user/language-model model.layers.3"


@pytest.mark.parametrize(("kind", "subfolder"), [("bae", ""), ("topk", "model.layers.11")])
def test_a_model_goes_to_the_hub_and_comes_back(server, tmp_path, kind, subfolder):
    torch.manual_seed(0)
    metadata = {"model_name": "user/language-model", "hook_name": "model.layers.11"}
    if kind == "bae":
        model = BinaryAutoencoder(6, 40, metadata=metadata)
    else:
        model = make_baseline("topk", 6, 40, k=3)
    said, again = pushed(server, tmp_path, model, "user/dictionary", subfolder)
    assert said[0].startswith(f"{server.url}/user/dictionary/commit/")
    assert said[1].startswith("nobody/nothing must be a folder, or a repository")
    assert type(again) is type(model)
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    prefix = f"{subfolder}/" if subfolder else ""
    files = server.files["user/dictionary"]
    weights = {prefix + name for name in ("cfg.json", "sae_weights.safetensors")}
    assert set(files) - {".gitattributes"} == {"README.md", *weights}
    card = files["README.md"].decode()
    assert "license" not in card  # the program named none
    assert "| FVU | 0.1250 |" in card
    assert "value: 0.125" in card
    assert ("base_model: user/language-model" in card) == (kind == "bae")
    assert f"load_autoencoder('user/dictionary'{', subfolder=' if subfolder else ')'}" in card


def test_the_card_is_one_that_the_hub_reads(tmp_path):
    from huggingface_hub import ModelCard

    values = BinaryAutoencoder(6, 40, metadata={"note": "a | b"}).config_values()
    path = hub.write_card(tmp_path / "README.md", "user/name", values, figures={"fvu": 0.5})
    card = ModelCard.load(path)
    assert card.data.library_name == "bae-fast"
    assert [result.metric_value for result in card.data.eval_results] == [0.5]
    assert "| note | a \\| b |" in card.text
    assert card.data.license is None  # nobody named one
    hub.write_card(path, "user/name", values, license="mit")
    assert ModelCard.load(path).data.license == "mit"
    values = SearchedAutoencoder(6, 40, bit_price=0.01, dense_bits=9).config_values()
    card = ModelCard.load(hub.write_card(path, "user/name", values))
    assert "`searched_binary_autoencoder`: d_in = 6, " in card.text
    assert "bit_price = 0.01, dense_bits = 9.0." in card.text
    assert "searched_binary_autoencoder" in card.data.tags


def test_a_registry_names_what_it_lists(tmp_path):
    import yaml

    entry = {"id": "one", "path": "layers.1", "l0": 3.0}
    path = hub.write_registry(tmp_path / "saes.yaml", "ours", "user/name", "lm", [entry])
    assert yaml.safe_load(path.read_text()) == {
        "ours": {"model": "lm", "repo_id": "user/name", "saes": [entry]}
    }
    with pytest.raises(ValueError, match="saes must have an id and a path"):
        hub.write_registry(path, "ours", "user/name", "lm", [{"id": "one"}])


@pytest.mark.parametrize("name", ["name", "/a/b", "a/b/c", "../b", "user/", "user/ name"])
def test_what_is_no_repository_is_a_folder(name):
    assert not hub.is_repo_id(name)


def test_a_folder_on_disk_comes_before_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = BinaryAutoencoder(6, 40)
    model.save_pretrained("user/name")
    assert torch.equal(BinaryAutoencoder.from_pretrained("user/name").W_enc, model.W_enc)
    with pytest.raises(ValueError, match="revision must be None for a folder"):
        find_pretrained("user/name", revision="main")


def test_a_name_that_is_no_repository_is_refused_before_anything_is_sent(tmp_path):
    with pytest.raises(ValueError, match="repo_id must be user/name; got 'name'"):
        BinaryAutoencoder(6, 40).push_to_hub("name")


# -- the command -------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path):
    """Two models as a run leaves them, and what evaluate says of one."""
    folder = tmp_path / "run"
    facts = {"model_name": "user/language-model", "hook_name": "model.layers.1"}
    BinaryAutoencoder(6, 40, metadata=facts).save_pretrained(folder / "a")
    other = BinaryAutoencoder(6, 20, metadata=facts | {"hook_name": "model.layers.2"})
    other.save_pretrained(folder / "b")
    write_json(folder / "evaluation.json", {"a": {"fvu": 0.125, "l0": 3.0, "n_rows": 9}})
    return folder


def test_a_run_goes_to_the_hub_in_one_commit(server, tmp_path, run_folder):
    pytest.importorskip("jsonargparse")
    command = ["-m", "bae_fast", "push", run_folder, "user/run", "--subfolder", "v1", "--json"]
    said = json.loads(printed(server, tmp_path, *command))["values"]
    assert said["commit"].startswith(f"{server.url}/user/run/commit/")
    assert said["models"] == {"v1/a": {"fvu": 0.125, "l0": 3.0, "n_rows": 9}, "v1/b": None}
    files = server.files["user/run"]
    for name in ("a", "b"):
        for part in ("cfg.json", "sae_weights.safetensors"):
            assert files[f"v1/{name}/{part}"] == (run_folder / name / part).read_bytes()
    assert len(set(files) - {".gitattributes"}) == 5
    card = files["README.md"].decode()
    head = "| subfolder | hook | architecture | d_in | d_sae | FVU | features on in a row |"
    assert head in card
    assert "| v1/a | model.layers.1 | binary_autoencoder | 6 | 40 | 0.1250 | 3.0 | 9 |" in card
    assert "| v1/b | model.layers.2 | binary_autoencoder | 6 | 20 |  |  |  |" in card
    assert "base_model: user/language-model" in card
    assert "hook_name" not in card  # in which the two differ
    assert "license" not in card


def test_what_would_be_sent_can_be_looked_at(tmp_path, run_folder, capsys):
    pytest.importorskip("jsonargparse")
    options = ["--out", str(tmp_path / "out"), "--license", "apache-2.0"]
    assert main(["push", str(run_folder / "a"), "user/one", *options]) == 0
    assert "written for user/one, not sent" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["README.md", "cfg.json", "sae_weights.safetensors"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| FVU | 0.1250 |" in card
    assert "license: apache-2.0" in card
    # figures of one's own; a run that was killed leaves nothing to the next
    write_json(tmp_path / "out" / ".unfinished" / "old" / "cfg.json", {})
    write_json(tmp_path / "own.json", {"fvu": 0.5})
    options += ["--figures", str(tmp_path / "own.json")]
    assert main(["push", str(run_folder / "a"), "user/one", *options]) == 0
    assert "| FVU | 0.5000 |" in (tmp_path / "out" / "README.md").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


# metadata of a run on this machine, and what others may read of them
LOCAL = {
    "model_name": "/home/me/models/llama-3",
    "hook_name": "model.layers.1",
    "dataset_path": "/home/me/my text notes/a.txt",
    "text_files": ["/home/me/my text", "notes/a.txt"],
    "note": "~/secret/run 5",
    "layers": [1, 2],
    "text_sha256": "0" * 64,
}
PUBLIC = LOCAL | {
    "model_name": "llama-3",
    "dataset_path": "my text a.txt",
    "text_files": ["my text", "a.txt"],
    "note": "run 5",
}


@pytest.mark.parametrize(
    ("given", "public"),
    [
        (LOCAL, PUBLIC),
        ({"model_name": "here/model"}, {"model_name": "model"}),  # a folder that is there
        ({"model_name": "user/model"}, {"model_name": "user/model"}),
        ({"dataset_path": "a/b/c"}, {"dataset_path": "c"}),
        ({"note": "a/b/c"}, {"note": "a/b/c"}),  # words, as far as anybody knows
        ({"rows": "../x/rows.npy"}, {"rows": "rows.npy"}),
        ({"rows": "C:\\Users\\me\\rows.npy"}, {"rows": "rows.npy"}),
        ({"dataset_path": "hf://datasets/a/b"}, {"dataset_path": "hf://datasets/a/b"}),
        ({"dataset_path": "/"}, {"dataset_path": "a folder"}),
        ({"more": {"of": ["/home/me/x", 3]}}, {"more": {"of": ["x", 3]}}),
        ({"dataset_path": "pydoc_data.topics", "text_files": None},) * 2,
    ],
)
def test_of_a_path_on_this_machine_others_read_the_last_part(tmp_path, monkeypatch, given, public):
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.public_metadata(given) == public


@pytest.mark.parametrize("by", ["command", "method"])
def test_a_path_on_this_machine_is_in_no_file_that_is_published(tmp_path, monkeypatch, by):
    model = BinaryAutoencoder(6, 40, metadata=LOCAL)
    saved, out = model.save_pretrained(tmp_path / "saved"), tmp_path / "out"
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    if by == "command":
        pytest.importorskip("jsonargparse")
        assert main(["push", str(saved), "user/one", "--out", str(out)]) == 0
        assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
        assert json.loads((out / "cfg.json").read_text())["save_id"] in before["cfg.json"].decode()
    else:
        monkeypatch.setattr(hub, "upload", lambda made, *_, **__: shutil.copytree(made, out))
        model.push_to_hub("user/one")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", *sorted(before)]
    for path in out.iterdir():
        for word in (b"/home", b"secret", b"notes"):
            assert word not in path.read_bytes(), (path, word)
    assert "| model_name | llama-3 |" in (out / "README.md").read_text()
    again = load_autoencoder(out)
    assert again.config.metadata == PUBLIC
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    # of the weights alone, too
    (out / "cfg.json").unlink()
    assert load_autoencoder(out).config.metadata == PUBLIC


def test_a_pushed_folder_is_a_folder_and_not_the_model_s_own(tmp_path, run_folder, capsys):
    pytest.importorskip("jsonargparse")
    before = (run_folder / "a" / "cfg.json").read_bytes()
    (tmp_path / "file").write_text("kept")
    for arguments, words in (
        (["a", "--out", "file"], "--out must name a folder that can be written; "),
        (["a", "--out", "run/a"], "--out must not be where the autoencoder lies itself"),
        (["a", "--out", "run", "--subfolder", "a"], "--out must not be where the autoencoder"),
        ([".", "--out", "run"], "--out must not be where the autoencoder lies itself"),
    ):
        folder, *options = arguments
        options[1] = str(tmp_path / options[1])
        assert main(["push", str(run_folder / folder), "user/one", *options]) == 1
        assert words in capsys.readouterr().err
    assert (run_folder / "a" / "cfg.json").read_bytes() == before
    assert not (run_folder / "README.md").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["name"], "REPO must be user/name; got 'name'"),
        (["a/b", "--subfolder", "../c"], "--subfolder must be a path within the repository"),
        (["a/b", "--figures", "none.json"], "none.json"),
    ],
)
def test_what_cannot_be_pushed_is_one_line(run_folder, capsys, change, words):
    pytest.importorskip("jsonargparse")
    assert main(["push", str(run_folder), *change]) == 1
    said = capsys.readouterr().err
    assert said.startswith("bae-fast push: ")
    assert words in said
    assert said.count("\n") == 1


def test_a_folder_without_a_model_is_named(tmp_path, capsys):
    pytest.importorskip("jsonargparse")
    assert main(["push", str(tmp_path), "a/b"]) == 1
    assert f"{tmp_path} holds no saved autoencoder" in capsys.readouterr().err


def test_a_full_disk_is_not_called_a_repository_that_is_not_there(monkeypatch):
    def failing(*_arguments, **_options):
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/blobs/1")

    monkeypatch.setattr(hub, "_library", lambda: SimpleNamespace(snapshot_download=failing))
    with pytest.raises(OSError, match="No space left on device") as caught:
        hub.download("user/one", ["cfg.json"])
    assert caught.value.errno == errno.ENOSPC
