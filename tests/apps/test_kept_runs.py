"""Runs that are kept are known by the digest of their settings, which must not change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bae_fast.entropy.synthetic import SyntheticSpec
from bae_fast.experiments import compare, runs
from bae_fast.experiments.entropy import icl, layers, synthetic

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"

# settings and digests as the first version wrote them
SPLIT = {
    "rule": "held out: the whole windows among the last n_heldout kept rows; left out: the window "
    "before them; training: everything before that window",
    "train": [0, 15810],
    "heldout": [16065, 20145],
    "n_train": 15810,
    "n_heldout": 4080,
    "n_left_out": 255,
}
FACTS = {
    "model_name": "smollm2-135m-instruct",
    "hook_name": "model.layers.11",
    "context_size": 256,
    "prepend_bos": False,
    "dataset_path": "pydoc_data.topics",
    "tokens": 20224,
    "split": SPLIT,
}


@pytest.mark.parametrize("text", ["{}", '{"settings": {"a": 2}}', "[]", "no"])
def test_a_damaged_run_is_named_and_not_taken(text, tmp_path):
    settings = {"a": 1}
    assert runs.once(tmp_path, "run", settings, lambda: {"b": 2})["b"] == 2
    assert runs.once(tmp_path, "run", settings, lambda: {"b": 3})["b"] == 2
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=str(path)):
        runs.once(tmp_path, "run", settings, lambda: {"b": 3})


@pytest.mark.parametrize(
    ("method", "k", "digest"), [("bae", None, "980c94f1a3c0"), ("topk", 32, "cd70be0b1add")]
)
def test_a_comparison_run_keeps_its_name(method, k, digest):
    config = compare.Config(steps=200)
    settings = compare.settings_of(config, FACTS, 576, compare.Wanted(method, k, {}, 0))
    assert runs.digest(settings) == digest


@pytest.mark.parametrize(
    ("kind", "seed", "digest"),
    [
        ("copies", 0, "381aea913f0a"),
        ("copies", 1, "eb5413a588ab"),
        ("fair", 0, "d0c9b560354f"),
        ("fair", 1, "d8a290d84d3c"),
    ],
)
def test_a_synthetic_run_keeps_its_name(kind, seed, digest):
    config = synthetic.Config(rows=8192, heldout=2048, steps=100)
    spec = SyntheticSpec(kind, 16, 64, p=0.1, group=4, flip=0.05, noise=0.01)
    assert runs.digest(synthetic.settings_of(config, spec, seed)) == digest


def kept(name):
    found = json.loads((RESULTS / name).read_text())["runs"]
    assert len(found) >= 3
    return found


def test_kept_comparisons_are_recognised():
    for run in kept("compare/compare.json"):
        settings = run["settings"]
        training = settings["training"]
        config = compare.Config(
            steps=training["steps"],
            batch_size=training["batch_size"],
            value_bits=settings["value_bits"],
            precision=training["precision"],
        )
        wanted = compare.Wanted(run["method"], run["k"], run.get("variant", {}), run["seed"])
        now = compare.settings_of(config, settings["data"], 576, wanted)
        assert runs.digest(now) == runs.digest(settings), run["method"]


def test_kept_layers_are_recognised():
    for run in kept("entropy/layers.json"):
        settings = run["settings"]
        training = settings["training"]
        config = layers.Config(
            context=settings["context"],
            positions=tuple(settings["positions"]),
            expansion=settings["expansion"],
            fits=tuple(settings["fits"]),
            steps=training["steps"],
            batch_size=training["batch_size"],
        )
        names = ("model", "text", "text_sha256", "windows", "hook")
        now = layers.settings_of(
            config, **{name: settings[name] for name in names}, seed=training["seed"]
        )
        assert runs.digest(now) == runs.digest(settings)


def test_kept_tasks_are_recognised():
    for run in kept("entropy/icl.json"):
        settings = run["settings"]
        training = settings["training"]
        config = icl.Config(
            hooks=tuple(settings["hooks"]),
            shots=tuple(settings["shots"]),
            prompts=settings["n_prompts"],
            expansion=settings["expansion"],
            draws=tuple(settings["draws"]),
            labels=tuple(settings["labels"]),
            fixed_samples=settings["fixed_samples"],
            steps=training["steps"],
            batch_size=training["batch_size"],
        )
        now = icl.settings_of(
            config, settings["model"], settings["task"], settings["examples"], training["seed"]
        )
        assert runs.digest(now) == runs.digest(settings)


def test_kept_synthetic_sets_are_recognised():
    for run in kept("entropy/synthetic.json"):
        settings = run["settings"]
        names = ("kind", "r", "d", "p", "group", "flip", "noise")
        spec = SyntheticSpec(**{name: settings[name] for name in names})
        config = synthetic.Config(
            expansion=settings["expansion"],
            rows=settings["n_train"],
            heldout=settings["n_heldout"],
            start=settings["start"],
            steps=settings["steps"],
        )
        now = synthetic.settings_of(config, spec, settings["seed"])
        assert runs.digest(now) == runs.digest(settings)
