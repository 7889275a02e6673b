"""The commands train and evaluate: jobs from a file, going on, errors, and torchrun."""

import bz2
import dataclasses
import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from sparse_rows import synthetic
from tiny_lm import save_tiny_model

import bae_fast as bf
from bae_fast.cli import main
from bae_fast.experiments import evaluate, interpret, runs, train
from bae_fast.experiments.data import harvest_rows, heldout_rows, read_windows
from bae_fast.experiments.supplies import rows_for
from bae_fast.lm import TextFiles, TextWindows, load_tokenizer
from bae_fast.progress import Stages
from bae_fast.training import JobTrainer

SMALL = ["--steps", "20", "--batch-size", "64", "--precision", "float32", "--log-every", "5"]


@pytest.fixture
def states(tmp_path):
    np.save(tmp_path / "rows.npy", synthetic(d=16).numpy())
    return str(tmp_path / "rows.npy")


@pytest.fixture
def listed(tmp_path):
    path = tmp_path / "jobs.yaml"
    path.write_text("- {name: a}\n- {name: b, entropy_weight: 1.0e-3, seed: 4, expansion: 2}\n")
    return str(path)


def weights(folder):
    return bf.BinaryAutoencoder.from_pretrained(folder).state_dict()


def test_jobs_of_a_file_are_trained_and_evaluated(states, listed, tmp_path, capsys):
    out = tmp_path / "run"
    given = ["--states", states, "--jobs", listed, "--out", str(out), "--evaluate-every", "10"]
    assert main(["train", *given, *SMALL]) == 0
    assert "b: mse" in capsys.readouterr().out
    assert weights(out / "a")["W_enc"].shape == (16, 64)
    assert weights(out / "b")["W_enc"].shape == (16, 32)
    lines = [json.loads(line) for line in (out / "b" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 10, 15, 20, 20]
    assert main(["evaluate", str(out)]) == 0
    found = json.loads((out / "evaluation.json").read_text())
    rows = torch.from_numpy(np.load(states))[-150:]  # a tenth is held out
    assert found["a"]["n_rows"] == 150
    assert found["b"]["fvu"] == pytest.approx(
        bf.analysis.evaluate(bf.BinaryAutoencoder.from_pretrained(out / "b"), rows).fvu
    )
    assert "| b |" in capsys.readouterr().out


def test_a_run_that_was_stopped_goes_on_and_one_that_is_done_is_not_trained_again(
    states, tmp_path, monkeypatch, capsys
):
    base = ["train", "--states", states, *SMALL, "--checkpoint-every", "3", "--d-sae", "40"]
    assert main([*base, "--out", str(tmp_path / "whole")]) == 0
    assert weights(tmp_path / "whole" / "bae")["W_enc"].shape == (16, 40)
    step, done, dies = JobTrainer.train_step, [], [11]

    def dying(self):
        if self.step in dies:
            raise MemoryError("no more")
        done.append(self.step)
        return step(self)

    monkeypatch.setattr(JobTrainer, "train_step", dying)
    cut = [*base, "--out", str(tmp_path / "cut")]
    assert main(cut) == 1
    monkeypatch.setattr(
        JobTrainer, "train_step", lambda self: (done.append(self.step), step(self))[1]
    )
    done.clear()
    assert main(cut) == 0
    assert done == list(range(9, 20))
    assert "goes on from step 9" in capsys.readouterr().out
    one, two = weights(tmp_path / "whole" / "bae"), weights(tmp_path / "cut" / "bae")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_that_has_ended_is_replaced_by_other_settings_only_when_asked_for(
    states, tmp_path, capsys
):
    base = ["train", "--states", states, *SMALL, "--out", str(tmp_path / "run")]
    assert main([*base, "--checkpoint-every", "0"]) == 0
    first = weights(tmp_path / "run" / "bae")
    other = [*base, "--checkpoint-every", "0", "--seed", "1"]
    for more in ([], ["--resume", "never"]):
        assert main([*other, *more]) == 1
        line = capsys.readouterr().err.strip()
        assert "--out must be a folder without results of other settings, unless" in line
        assert line.endswith("has seed 0, here 1")
    assert all(torch.equal(one, first[k]) for k, one in weights(tmp_path / "run" / "bae").items())
    assert main([*other, "--overwrite"]) == 0
    assert not torch.equal(weights(tmp_path / "run" / "bae")["W_enc"], first["W_enc"])
    assert main(other) == 0


def test_a_changed_file_of_jobs_replaces_no_job_that_has_ended(states, tmp_path, capsys):
    path = tmp_path / "jobs.yaml"
    given = ["train", "--states", states, "--jobs", str(path), *SMALL]
    given += ["--out", str(tmp_path / "run")]
    path.write_text("- {name: a}\n- {name: b, seed: 4}\n")
    assert main(given) == 0
    first = weights(tmp_path / "run" / "b")
    path.write_text("- {name: a}\n- {name: b, seed: 5}\n")
    assert main(given) == 1
    said = capsys.readouterr().err.strip()
    assert said.endswith(f"is given; {tmp_path / 'run' / 'b'} has seed 4, here 5")
    assert all(torch.equal(one, first[k]) for k, one in weights(tmp_path / "run" / "b").items())
    assert main([*given, "--overwrite"]) == 0
    assert not torch.equal(weights(tmp_path / "run" / "b")["W_enc"], first["W_enc"])


def test_a_saved_model_is_trained_on(states, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    base = ["train", "--states", states, *SMALL, "--no-refit"]
    assert main([*base, "--out", str(first)]) == 0
    more = ["--load", str(first / "bae"), "--lr", "1e-9", "--revive-every", "0"]
    assert main([*base, *more, "--out", str(second)]) == 0
    one, two = weights(first / "bae"), weights(second / "bae")
    for name in one:  # it starts where the first ended, and hardly moves
        assert torch.allclose(one[name], two[name], atol=1e-6), name


def test_a_run_that_was_stopped_goes_on_with_the_model_that_it_started_from(
    states, tmp_path, monkeypatch, capsys
):
    base = ["train", "--states", states, *SMALL, "--checkpoint-every", "3"]
    first, second = tmp_path / "first", tmp_path / "second"
    for seed, out in enumerate((first, second)):
        assert main([*base, "--seed", str(seed), "--out", str(out)]) == 0
    step, out = JobTrainer.train_step, tmp_path / "out"

    def dying(self):
        if self.step == 11:
            raise MemoryError("no more")
        return step(self)

    more = [*base, "--out", str(out), "--load"]
    with monkeypatch.context() as patch:
        patch.setattr(JobTrainer, "train_step", dying)
        assert main([*more, str(first / "bae")]) == 1
    capsys.readouterr()
    for _ in range(2):  # what is refused changes nothing
        assert main([*more, str(second / "bae")]) == 1
        said = capsys.readouterr().err.strip()
        assert f"--load must be {first / 'bae'}, as the run in {out} was started so" in said
        assert said.endswith(f"got {second / 'bae'}")
    assert main(more[:-1]) == 1
    assert capsys.readouterr().err.strip().endswith("got none")
    monkeypatch.chdir(tmp_path)
    assert main([*more, "first/bae"]) == 0
    assert "goes on from step 9" in capsys.readouterr().out
    other = [*base, "--out", str(tmp_path / "other"), "--load", str(second / "bae")]
    assert main(other) == 0
    again = [*more, str(second / "bae"), "--resume", "never", "--overwrite"]
    assert main(again) == 0
    one, two = weights(tmp_path / "other" / "bae"), weights(out / "bae")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_model_to_load_that_is_missing_is_said_before_rows_are_opened(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(train, "rows_for", lambda *_, **__: pytest.fail("it has begun"))
    given = ["--load", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]
    assert main(["train", *given]) == 1
    assert f"folder {tmp_path / 'nothing'} does not exist" in capsys.readouterr().err


def test_a_loaded_model_takes_the_implementation_and_no_option_that_it_has_decided(
    states, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "first"
    base = ["train", "--states", states, *SMALL, "--no-refit"]
    assert main([*base, "--out", str(out)]) == 0
    used = []
    monkeypatch.setattr(
        JobTrainer,
        "fit",
        lambda self, progress: used.append(self.learners["bae"].model.impl) or {},
    )
    more = ["--load", str(out / "bae"), "--impl", "torch", "--out", str(tmp_path / "second")]
    assert main([*base, *more]) == 0
    assert used == ["torch"]
    for option, value in (("d-sae", "64"), ("metric", "std"), ("init", "rows")):
        capsys.readouterr()
        assert main([*base, *more, f"--{option}", value]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"bae-fast train: --{option} must be left out with load; got ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{name: a}", "must hold a list of mappings"),
        ("[]", "must hold a list of mappings"),
        ("- {lr: 1.0}", "every job must have a name of its own; got None"),
        ("- {name: a}\n- {name: a}", "every job must have a name of its own; got 'a'"),
        ("- {name: a, colour: red}", "a has colour, which is no option of a job"),
        ("- {name: a, preset: [sparse]}", "a must give one value for preset"),
        ("- {name: [", "cannot be read"),
    ],
)
def test_a_bad_list_of_jobs_is_named(states, tmp_path, capsys, text, words):
    (tmp_path / "jobs.yaml").write_text(text)
    assert main(["train", "--states", states, "--jobs", str(tmp_path / "jobs.yaml")]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("bae-fast train: --jobs ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ("{name: a, betas: 3}", "betas must be two numbers in [0, 1); got 3"),
        ("{name: a, batch_size: 9}", "batch_size must be a multiple of the 8 streams of rows"),
    ],
)
def test_a_job_that_cannot_run_leaves_no_folder(states, tmp_path, capsys, job, words):
    (tmp_path / "jobs.yaml").write_text(f"[{job}]")
    out = tmp_path / "out"
    jobs = ["--jobs", str(tmp_path / "jobs.yaml"), "--out", str(out)]
    assert main(["train", "--states", states, *jobs]) == 1
    assert words in capsys.readouterr().err
    assert not out.exists() or not list(out.iterdir())


def test_a_number_of_a_job_may_be_written_without_a_point(states, tmp_path):
    (tmp_path / "jobs.yaml").write_text("- {name: a, lr: 1e-3}\n- {name: b, lr: 0.001}")
    out = tmp_path / "out"
    arguments = ["--jobs", str(tmp_path / "jobs.yaml"), "--out", str(out)]
    assert main(["train", "--states", states, *SMALL, *arguments]) == 0
    one, two = weights(out / "a"), weights(out / "b")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_a_run_lacks_is_named(states, tmp_path, capsys):
    for given, words in (
        ([], "--states or cache or live must be given, one alone; got none"),
        (["--states", states, "--live"], "one alone; got states and live"),
        (
            ["--states", states, "--hook", "h"],
            "--hook must be left out for a file",
        ),
        (["--states", states, "--data", "2"], "--data times feature must be the number of proc"),
        (["--states", states, "--streams", "0"], "--streams must be at least 1"),
        (["--states", states, "--patience", "2"], "evaluate_every must be at least 1"),
        (
            ["--states", states, "--text", "a", "b"],
            "--text must be left out where --states gives the rows; got a b",
        ),
        (
            ["--cache", str(tmp_path), "--dataset", "d"],
            "--dataset must be left out where --cache gives the rows; got d",
        ),
        (["--states", states, "--seed", str(2**63)], "seed must be below 2^63; got 92233720"),
        (["--states", states, "--peak-flops", "-1"], "--peak-flops must be at least 0; got -1"),
    ):
        assert main(["train", *given, "--out", str(tmp_path / "x"), *SMALL]) == 1
        assert words in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="holds no run"):
        evaluate.run(evaluate.Config(tmp_path))
    (tmp_path / runs.RESOLVED).write_text("states: {")
    with pytest.raises(ValueError, match="is not the configuration of a run"):
        evaluate.run(evaluate.Config(tmp_path))
    for text, got in (
        ("", "an empty file"),
        ("seed: 0\nk: 3\n", "2 others"),
        ('states: "rows.npy"\nlive: true\n', "states and live"),
    ):
        (tmp_path / runs.RESOLVED).write_text(text)
        assert main(["evaluate", str(tmp_path)]) == 1
        assert capsys.readouterr().err.strip() == (
            f"bae-fast evaluate: {tmp_path / runs.RESOLVED} must hold the options of a run of "
            f"bae-fast train, a line each, one of states, cache, live among them; got {got}"
        )
    (tmp_path / runs.RESOLVED).write_text(runs.resolved(train.Config(states=states)))
    with pytest.raises(FileNotFoundError, match="holds no trained model"):
        evaluate.run(evaluate.Config(tmp_path))


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The options of a tiny language model and its text."""
    folder = tmp_path_factory.mktemp("reader")
    words = [f"w{i}" for i in range(60)]
    save_tiny_model(folder / "lm", words)
    order = torch.randint(60, (9000,), generator=torch.Generator().manual_seed(0))
    (folder / "text.txt").write_text(" ".join(words[i] for i in order))
    return [
        "--model", str(folder / "lm"), "--text", str(folder / "text.txt"), "--context", "16",
        "--device", "cpu",
    ]  # fmt: skip


def test_a_cache_in_shards_and_a_running_model_are_learned_from(reader, tmp_path, capsys):
    hooks = ["model.layers.0", "model.layers.1"]
    cache = tmp_path / "cache"
    assert main(["harvest", "--hooks", *hooks, "--out", str(cache), *reader]) == 0
    (tmp_path / "jobs.yaml").write_text(
        f"- {{name: a, hook: {hooks[0]}}}\n- {{name: b, hook: {hooks[1]}}}\n"
    )
    small = [*SMALL, "--streams", "2", "--buffer-rows", "1024"]
    jobs = ["--jobs", str(tmp_path / "jobs.yaml")]
    for name, given in (("shards", ["--cache", str(cache)]), ("live", ["--live", *reader])):
        out = tmp_path / name
        assert main(["train", *given, *jobs, *small, "--out", str(out)]) == 0
        assert main(["evaluate", str(out)]) == 0
        found = json.loads((out / "evaluation.json").read_text())
        for job, hook in zip("ab", hooks, strict=True):
            assert found[job]["n_rows"] > 2000
            assert 0 < found[job]["fvu"] < 1
            metadata = bf.BinaryAutoencoder.from_pretrained(out / job).config.metadata
            assert metadata["hook_name"] == hook
            assert metadata["model_name"] == reader[1]
            assert metadata["context_size"] == 16
    capsys.readouterr()
    for hook in ([], ["--hook", "model.layers.7"]):
        given = ["--cache", str(cache), *hook, "--out", str(tmp_path / "x")]
        assert main(["train", *given, *small]) == 1
        got = repr(hook[1]) if hook else "none"
        assert f"--hook must be one of {', '.join(hooks)}; got {got}" in capsys.readouterr().err


@pytest.fixture(scope="module")
def several_files(tmp_path_factory):
    """A tiny language model, and a text of several compressed and plain files."""
    folder = tmp_path_factory.mktemp("files")
    words = [f"w{i}" for i in range(60)]
    save_tiny_model(folder / "lm", words)
    (folder / "text").mkdir()
    order = torch.randint(60, (4, 2200), generator=torch.Generator().manual_seed(1))
    texts = [" ".join(words[i] for i in part) for part in order]
    (folder / "text" / "a.txt").write_text(texts[0])
    (folder / "text" / "b.txt.gz").write_bytes(gzip.compress(texts[1].encode()))
    lines = "\n".join(json.dumps({"body": text}) for text in (texts[2], texts[3]))
    (folder / "text" / "c.jsonl.bz2").write_bytes(bz2.compress(lines.encode()))
    return folder


@pytest.mark.parametrize("kind", ["cache", "live"])
def test_the_text_of_a_training_is_found_again_and_read_as_it_was(
    several_files, kind, tmp_path, monkeypatch, capsys
):
    folder = several_files
    monkeypatch.chdir(folder)
    shape = ["--context", "16", "--device", "cpu", "--no-progress"]
    reads = ["--model", "lm", "--text", "text", "--field", "body", *shape]
    given = ["--live", "--hook", "model.layers.1", *reads]
    if kind == "cache":
        hooks = ["--hooks", "model.layers.1"]
        assert main(["harvest", *hooks, "--out", str(tmp_path / "cache"), *reads]) == 0
        given = ["--cache", str(tmp_path / "cache"), "--device", "cpu", "--no-progress"]
    small = [*SMALL, "--streams", "2", "--buffer-rows", "1024", "--out", str(tmp_path / "run")]
    assert main(["train", *given, *small]) == 0
    model, data = interpret.open_model(interpret.Config(device="cpu"), tmp_path / "run" / "bae")
    tokens, facts = read_windows(data, load_tokenizer("lm"))
    text = TextWindows(load_tokenizer("lm"), TextFiles("text", field="body"), 16)
    assert torch.equal(tokens, text.read(10_000))
    assert facts["text_sha256"] == model.config.metadata["text_sha256"]

    look = [
        "interpret", "--load", str(tmp_path / "run" / "bae"), "--judge", "rule", "--no-lens",
        "--cache", str(tmp_path / "states"), "--out", str(tmp_path / "names"), *shape[2:],
    ]  # fmt: skip
    assert main(look) == 0
    # what is looked at is what the training held out
    cache, _, _ = harvest_rows(data, Stages(False), 1)
    held = heldout_rows(data, cache)
    order = {"seed": 0, "streams": 2}
    config = dataclasses.replace(train.Config(), progress=False, device="cpu")
    if kind == "cache":
        config = dataclasses.replace(config, cache=tmp_path / "cache")
    else:
        config = dataclasses.replace(
            config, live=True, model="lm", text=("text",), field="body", context=16,
            hook="model.layers.1",
        )  # fmt: skip
    with rows_for(config, ["model.layers.1"], order=order) as source:
        want = torch.cat([block.x["model.layers.1"] for block in source.supply.heldout()])
    assert torch.equal(cache.rows[held.start : held.stop], want)

    before = (folder / "text" / "a.txt").read_text()
    (folder / "text" / "a.txt").write_text(before.replace("w1 ", "w2 "))
    capsys.readouterr()
    try:
        assert main(look) == 1
        assert "--text must be given: the model was trained on text, whose" in (
            capsys.readouterr().err
        )
        assert main([*look, "--text", "text", "--field", "body"]) == 0
    finally:
        (folder / "text" / "a.txt").write_text(before)


@pytest.mark.long
def test_torchrun_divides_the_features(states, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    given = ["--states", states, *SMALL, "--feature", "2", "--out", str(tmp_path / "two")]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", "-m", "bae_fast", "train", *given],
        env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("bae: mse") == 1
    assert main(["train", "--states", states, *SMALL, "--out", str(tmp_path / "one")]) == 0
    one, two = weights(tmp_path / "one" / "bae"), weights(tmp_path / "two" / "bae")
    for name in one:
        assert one[name].shape == two[name].shape
