"""Several jobs from one supply in one process: beside each alone, going on, failures, the log."""

import dataclasses
import json
import signal
import sys
import types

import pytest
import torch
from sparse_rows import module, synthetic

import bae_fast as bf
from bae_fast.baselines import TRAINING, make_baseline
from bae_fast.training import Job, JobTrainer, MemorySupply, RunConfig, StoppedError, TrainingConfig
from bae_fast.training.checkpoints import checkpoints

SMALL = TrainingConfig(steps=30, batch_size=64, precision="float32", revive_every=10)


def jobs(x, names="abc", **changes):
    """Two settings of the layer and a baseline."""
    found = []
    for name in names:
        torch.manual_seed(ord(name))
        if name == "c":
            config = dataclasses.replace(TRAINING, steps=30, batch_size=64, precision="float32")
            model = make_baseline("topk", 16, 48, k=4).fit_normalization_(x)
        else:
            config = dataclasses.replace(SMALL, entropy_weight=1e-3 * (name == "b"), **changes)
            model = module(x)
        found.append(Job(name, model, config, hook="rows"))
    return found


def supply(x, heldout=None):
    return MemorySupply(x, heldout=heldout, seed=1, streams=4)


def log_of(folder, name):
    return [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]


def weights(folder, name):
    from safetensors.torch import load_file

    return load_file(folder / name / "sae_weights.safetensors")


def test_jobs_together_are_to_the_bit_what_each_is_alone(tmp_path):
    x = synthetic()
    JobTrainer(jobs(x), supply(x), RunConfig(out=tmp_path / "all", log_every=5)).fit()
    for name in "abc":
        out = tmp_path / name
        JobTrainer(jobs(x, name), supply(x), RunConfig(out=out, log_every=5)).fit()
        together, alone = weights(tmp_path / "all", name), weights(out, name)
        assert together.keys() == alone.keys()
        for key, value in alone.items():
            assert torch.equal(together[key], value), (name, key)
        lines = [log_of(tmp_path / "all", name), log_of(out, name)]
        assert [line["step"] for line in lines[0]] == [5, 10, 15, 20, 25, 30]
        for line in (*lines[0], *lines[1]):
            del line["seconds"], line["rows_per_second"]
        assert lines[0] == lines[1]


@pytest.mark.parametrize("covariance", [0.0, 1e-3])
def test_micro_batches_have_the_gradient_of_the_batch_and_encode_each_row_once(
    monkeypatch, covariance
):
    x = synthetic().double()
    config = dataclasses.replace(SMALL, covariance_weight=covariance, batch_size=64)
    rows = []
    encode = bf.functional.registry.BACKENDS["cpp"].ops["encode"]

    def counted(x, *arguments):
        rows.append(len(x))
        return encode(x, *arguments)

    monkeypatch.setitem(bf.functional.registry.BACKENDS["cpp"].ops, "encode", counted)
    gradients = []
    for parts in (1, 8):
        torch.manual_seed(0)
        trainer = JobTrainer(
            [Job("a", module(x, dtype=torch.float64, impl="cpp"), config, "rows")],
            supply(x),
            RunConfig(micro_batches=parts),
        )
        for _ in range(3):  # the bank has something to add
            trainer.train_step()
        rows.clear()
        learner = trainer.learners["a"]
        learner.backward(trainer.supply.next(64).x["rows"], None)
        assert sum(rows) == 64
        assert len(rows) == parts
        gradients.append({n: p.grad.clone() for n, p in learner.trained.named_parameters()})
    for name, grad in gradients[0].items():
        assert grad.any()
        assert (gradients[1][name] - grad).abs().max() <= 1e-12, name


def test_a_checkpoint_of_another_run_or_none_is_refused(tmp_path):
    x = synthetic()
    first = JobTrainer(jobs(x, "a"), supply(x), RunConfig(out=tmp_path))
    assert not first.resume()
    first.train_step()
    first.save()
    first.close()
    other = JobTrainer(jobs(x, "a", lr=1e-2), supply(x), RunConfig(out=tmp_path))
    with pytest.raises(
        ValueError, match=r"same jobs and constants; .* a\.lr 0\.004 \(here 0\.01\)"
    ):
        other.resume()
    shorter = JobTrainer(jobs(x, "a"), supply(x[:900]), RunConfig(out=tmp_path))
    with pytest.raises(ValueError, match="state must be of the same rows"):
        shorter.resume()
    with pytest.raises(FileNotFoundError, match="holds no whole checkpoint"):
        shorter.resume(tmp_path / "nothing")
    (tmp_path / "checkpoints" / "step-1" / ".metadata").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"step-1 is not a readable checkpoint"):
        JobTrainer(jobs(x, "a"), supply(x), RunConfig(out=tmp_path)).resume()


def test_three_steps_that_are_not_finite_end_the_run_and_fewer_do_not(tmp_path):
    x = synthetic()
    trainer = JobTrainer(jobs(x, "a", init="none"), supply(x), RunConfig(out=tmp_path, log_every=1))
    give, bad = trainer.supply.next, {3, 4, 8, 9, 10}

    def spoiled(n):
        batch = give(n)
        if trainer.step + 1 in bad:
            batch.x["rows"][5] = float("inf")
        return batch

    trainer.supply.next = spoiled
    with pytest.raises(RuntimeError, match=r"job a must be finite; got 3 steps in a row, up to 10"):
        trainer.fit()
    assert [step for step, _, _ in trainer.skipped] == sorted(bad)
    lines = log_of(tmp_path, "a")
    assert {line["step"] for line in lines if "skipped_rows" in line} == bad
    assert all(p.isfinite().all() for p in trainer.learners["a"].model.parameters())


def test_a_signal_stops_after_the_step_with_a_checkpoint(tmp_path):
    x = synthetic()
    trainer = JobTrainer(jobs(x, "a"), supply(x), RunConfig(out=tmp_path))
    backward = trainer.learners["a"].backward

    def interrupted(rows, target):
        if trainer.step == 4:
            signal.raise_signal(signal.SIGINT)
        return backward(rows, target)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        trainer.learners["a"].backward = interrupted
        with pytest.raises(StoppedError, match=r"stopped by SIGINT after step 5; .*step-5"):
            trainer.fit()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert [step for step, _ in checkpoints(tmp_path / "checkpoints")] == [5]


def test_the_log_has_rates_and_the_trackers_get_the_numbers(tmp_path, monkeypatch):
    seen = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **given: seen.append(("init", given["name"]))
    fake.log = lambda numbers, step: seen.append((step, numbers))
    fake.finish = lambda: seen.append(("finish",))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    x = synthetic()
    run = RunConfig(out=tmp_path / "r", log_every=15, trackers=("wandb",), peak_flops=1e12)
    JobTrainer(jobs(x, "ab"), supply(x), run).fit()
    assert seen[0] == ("init", "r")
    assert seen[-1] == ("finish",)
    assert [one[0] for one in seen[1:-1]] == [15, 15, 30, 30]
    line = log_of(tmp_path / "r", "b")[-1]
    assert seen[-2][1]["b/mse"] == line["mse"]
    assert line["mfu"] == pytest.approx(10 * 16 * 48 * line["rows_per_second"] / 1e12)
    monkeypatch.setitem(sys.modules, "trackio", None)
    missing = dataclasses.replace(run, trackers=("trackio",))
    with pytest.raises(ImportError, match="this tracker needs trackio: pip install trackio"):
        JobTrainer(jobs(x, "a"), supply(x), missing).fit()


def test_jobs_that_do_not_fit_are_refused():
    x = synthetic()
    a, b = jobs(x, "ab")
    with pytest.raises(ValueError, match="jobs must hold at least one job"):
        JobTrainer([], supply(x))
    with pytest.raises(ValueError, match="names of their own; got a, a"):
        JobTrainer([a, a], supply(x))
    longer = dataclasses.replace(b, config=dataclasses.replace(b.config, steps=9))
    with pytest.raises(ValueError, match="steps must be the same for all jobs; got 30 for a and 9"):
        JobTrainer([a, longer], supply(x))
    with pytest.raises(ValueError, match="needs a hook 'layer' of width 16; the supply has"):
        JobTrainer([dataclasses.replace(a, hook="layer")], supply(x))
    with pytest.raises(ValueError, match="the name of a job must be that of a folder; got 'a/b'"):
        JobTrainer([dataclasses.replace(a, name="a/b")], supply(x))
    for change, words in (
        ({"patience": 1}, "evaluate_every must be at least 1"),
        ({"checkpoint_every": 1}, "out must be a folder"),
        ({"trackers": ("mlflow",)}, "trackers must be of tensorboard, wandb, trackio; got mlflow"),
        ({"log_every": 0}, "log_every must be at least 1; got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            RunConfig(**change)
