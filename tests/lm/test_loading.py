"""Language models from folders and the Hub: damaged files, revisions, and whose hidden states."""

from __future__ import annotations

import os

import processes
import pytest
import torch
from language_models import TEXT, model_of, own_rows

from bae_fast.cli.errors import describe
from bae_fast.lm import load_language_model, windows
from bae_fast.lm.origin import check_origin

transformers = pytest.importorskip("transformers")


def test_a_folder_of_another_kind_of_model_is_refused_in_one_line(tokenizer, tmp_path):
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=32, d_ff=64, num_layers=1, num_heads=2
    )
    transformers.AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a causal language model") as caught:
        load_language_model(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.safetensors", lambda data: data[:-40]),
        ("model.safetensors", lambda data: (10**19 % 2**64).to_bytes(8, "little") + data[8:]),
        ("model.safetensors", lambda data: data.replace(b'"F32"', b'"F99"', 1)),
        ("config.json", lambda data: data.replace(b'"vocab_size": ', b'"vocab_size": {}, "x": ')),
        ("config.json", lambda data: data.replace(b'"rope_theta": ', b'"rope_theta": "a", "x": ')),
        ("config.json", lambda _data: b"[1]"),
        ("tokenizer.json", lambda data: data.replace(b'"id": 1', b'"id": 1.5', 1)),
        ("tokenizer_config.json", lambda _data: b'{"eos_token": 3}'),
        ("generation_config.json", lambda _data: b"7"),
    ],
)
def test_a_damaged_file_of_a_model_is_one_line(name, change, tokenizer, tmp_path):
    model_of("llama", tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / name
    data = path.read_bytes()
    assert change(data) != data
    path.write_bytes(change(data))
    with pytest.raises(ValueError, match="could not be loaded") as caught:
        load_language_model(str(tmp_path), dtype="float32")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_a_model_that_does_not_fit_into_memory_is_not_called_a_wrong_name(
    error, tokenizer, tmp_path, monkeypatch
):
    model_of("llama", tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def failing(*_arguments, **_options):
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", failing)
    with pytest.raises(type(error)) as caught:
        load_language_model(str(tmp_path), dtype="float32")
    assert caught.value is error
    assert describe(caught.value).startswith("out of memory")


HUB = """
import sys
from bae_fast.lm import load_language_model, load_tokenizer
for revision in (None, "old", sys.argv[1], "gone"):
    try:
        lm = load_language_model("tiny/llama", dtype="float32", revision=revision)
        assert len(load_tokenizer("tiny/llama", revision=revision)) == len(lm.tokenizer)
        print(lm.revision, float(lm.model.lm_head.weight[0, 0]))
    except ValueError as error:
        print("refused:", error)
"""


def test_weights_that_a_folder_lacks_are_not_drawn_at_random(tokenizer, tmp_path):
    from safetensors.torch import load_file, save_file

    model = model_of("llama", tokenizer)
    model.save_pretrained(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "body")
    for folder in ("whole", "body"):
        tokenizer.save_pretrained(tmp_path / folder)
    with pytest.warns(UserWarning, match=r"holds no head .* random weights \(lm_head\.weight\)"):
        lm = load_language_model(str(tmp_path / "body"), dtype="float32")
    tokens = windows(tokenizer, TEXT, 16, n_tokens=64)
    torch.testing.assert_close(own_rows(lm.model, tokens), own_rows(model, tokens))
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1, which would be random: model\.layers\.1\.mlp"):
        load_language_model(str(tmp_path / "whole"), dtype="float32")


def test_a_revision_of_the_hub_is_the_one_that_is_loaded(tokenizer, tmp_path):
    # the hub's folder on disk, two commits of one model
    repository = tmp_path / "hub" / "models--tiny--llama"
    commits = {"main": "a" * 40, "old": "b" * 40}
    (repository / "refs").mkdir(parents=True)
    for number, (name, commit) in enumerate(commits.items()):
        (repository / "refs" / name).write_text(commit)
        model = model_of("llama", tokenizer)
        model.lm_head.weight[0, 0] = number + 1
        model.save_pretrained(repository / "snapshots" / commit)
        tokenizer.save_pretrained(repository / "snapshots" / commit)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = processes.run("-c", HUB, commits["old"], env=environment)
    assert done.returncode == 0, done.stderr
    *found, gone = done.stdout.splitlines()
    assert found == [f"{'a' * 40} 1.0", f"{'b' * 40} 2.0", f"{'b' * 40} 2.0"]
    assert gone.startswith("refused: name must be a folder with")
    assert "'tiny/llama' could not be loaded" in gone


def test_hidden_states_of_another_place_are_refused():
    trained = {"model_name": "tiny/llama", "hook_name": "model.layers.1"}
    facts = {**trained, "model_revision": "a" * 40}
    for metadata in (trained, {}, {**trained, "hook_name": "blocks.1.hook_resid_post"}):
        check_origin(metadata, facts)
    check_origin({**trained, "model_name": "elsewhere/llama"}, facts)  # a folder that was moved
    with pytest.raises(ValueError, match=r"--model must be 'tiny/llama'.*got 'tiny/gemma'"):
        check_origin(trained, {**facts, "model_name": "tiny/gemma"})
    with pytest.raises(ValueError, match=r"--hook must be 'model.layers.1'.*'model.layers.2'"):
        check_origin(trained, {**facts, "hook_name": "model.layers.2"})
    pair = {"transcoder_hooks": ["model.norm", "model.layers.1"]}
    check_origin(pair, {**facts, "hook_name": "model.norm"})
    with pytest.raises(ValueError, match=r"--hook must be 'model.norm'"):
        check_origin(pair, facts)
    with pytest.warns(UserWarning, match=f"revision {'b' * 40} of 'tiny/llama'"):
        check_origin({**trained, "model_revision": "b" * 40}, facts)
    check_origin({**trained, "model_revision": "files-0123"}, facts)
