"""Several jobs from one supply in one process: beside each alone, going on, failures, the log."""

import copy
import dataclasses
import json
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import types
import warnings

import pytest
import torch
from sparse_rows import module, synthetic

import bae_fast as bf
from bae_fast.baselines import TRAINING, make_baseline
from bae_fast.ops import registry
from bae_fast.training import Job, JobTrainer, MemorySupply, RunConfig, StoppedError, TrainingConfig
from bae_fast.training.checkpoints import Checkpoints, checkpoints

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
    encode = registry.BACKENDS["cpp"].ops["encode"]

    def counted(x, *arguments):
        rows.append(len(x))
        return encode(x, *arguments)

    monkeypatch.setitem(registry.BACKENDS["cpp"].ops, "encode", counted)
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


def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path):
    x = synthetic()

    def new(name):
        run = RunConfig(out=tmp_path / name, checkpoint_every=7, log_every=1)
        return JobTrainer(jobs(x), supply(x), run)

    new("whole").fit()
    cut = new("cut")
    step = cut.train_step

    def dying():
        if cut.step == 17:
            raise MemoryError
        return step()

    cut.train_step = dying
    with pytest.raises(MemoryError):
        cut.fit()
    again = new("cut")
    assert again.resume()
    assert again.step == 14
    again.fit()
    for name in "abc":
        expected = weights(tmp_path / "whole", name)
        for key, value in weights(tmp_path / "cut", name).items():
            assert torch.equal(value, expected[key]), (name, key)
        assert [line["step"] for line in log_of(tmp_path / "cut", name)] == list(range(1, 31))
    # the last two stay
    assert [step for step, _ in checkpoints(tmp_path / "cut" / "checkpoints")] == [21, 28]


def test_a_run_that_begins_anew_goes_on_from_its_own_checkpoints(tmp_path):
    x = synthetic()

    def new(**options):
        run = RunConfig(out=tmp_path, checkpoint_every=7, **options)
        return JobTrainer(jobs(x, "a"), supply(x), run)

    def until(trainer, step):
        train_step = trainer.train_step

        def dying():
            if trainer.step == step:
                raise MemoryError
            return train_step()

        trainer.train_step = dying
        with pytest.raises(MemoryError):
            trainer.fit()

    def there():
        return [step for step, _ in checkpoints(tmp_path / "checkpoints")]

    new().fit()
    assert there() == [21, 28]
    until(new(), 5)  # without a checkpoint of its own the old ones stay
    assert there() == [21, 28]
    until(new(), 10)
    assert there() == [7]
    again = new()
    assert again.resume()
    assert again.step == 7
    again.fit()
    assert there() == [21, 28]
    branch = new(keep=3)  # from an earlier one than the last
    branch.resume(tmp_path / "checkpoints" / "step-21")
    until(branch, 25)
    assert there() == [21, 28]
    branch = new(keep=3)
    branch.resume(tmp_path / "checkpoints" / "step-21")
    branch.fit()
    assert there() == [21, 28]


def saved(folder, *steps):
    store = Checkpoints(folder, keep=2, mesh=None)
    for step in steps:
        store.save({"step": step, "x": torch.arange(float(step))}, step, whole)
        store.wait()
        assert store.error is None, store.error
    return store


def whole(path):
    return None, None


@pytest.mark.parametrize("damage", ["", "{}", "[]", "no JSON"])
def test_a_damaged_checkpoint_does_not_make_those_after_it_fail(tmp_path, damage):
    saved(tmp_path, 1, 2)
    (tmp_path / "step-1" / "run.json").write_text(damage)
    saved(tmp_path, 3)
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 3]
    saved(tmp_path, 4)
    (tmp_path / "step-4" / "run.json").write_text(damage)
    with pytest.raises(ValueError, match="step-4"):
        saved(tmp_path).load(tmp_path / "step-4", whole)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "run.json", "checksums.json"])
def test_a_bit_of_a_checkpoint_that_has_changed_is_found_and_its_file_is_named(tmp_path, name):
    store = Checkpoints(tmp_path, keep=2, mesh=None)
    given = {"x": torch.arange(100.0), "of": {"y": torch.ones(3, 5, dtype=torch.int64)}, "z": 0.5}
    store.save(given, 1, whole)
    store.wait()
    path = store.path(1) / name
    data = path.read_bytes()
    # what is in a file of checksums is a digit of another's, mostly
    named = re.escape(name) if name != "checksums.json" else r"\S+ is damaged|checksums\.json"
    for at in range(0, len(data), -(-len(data) // 60)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=f"step-1 is not a readable checkpoint: .*{named}"):
            store.load(store.path(1), whole)
    path.write_bytes(data)
    found = store.load(store.path(1), whole)
    assert torch.equal(found["x"], given["x"])
    assert torch.equal(found["of"]["y"], given["of"]["y"])
    assert found["z"] == 0.5
    store.close()


def test_a_checkpoint_of_an_older_version_without_checksums_is_read(tmp_path):
    store = saved(tmp_path, 5)
    (store.path(5) / "checksums.json").unlink()
    assert torch.equal(store.load(store.path(5), whole)["x"], torch.arange(5.0))
    (store.path(5) / "checksums.json").write_text('{"run.json": 1}')
    with pytest.raises(ValueError, match=r"step-5 is not a readable .*checksums\.json must hold"):
        store.load(store.path(5), whole)
    store.close()


@pytest.mark.parametrize("killed_at", [1, 2, 3])
def test_a_process_killed_while_a_step_is_saved_again_leaves_one_of_it(
    tmp_path, monkeypatch, killed_at
):
    """At each rename and removal of the second save of a step."""
    folder, calls = tmp_path, []
    store = saved(folder, 7)

    def dying(act):
        def instead(path, *rest, **options):
            if "step-7" in str(path) and "run.json" not in str(path):
                calls.append(path)
                if len(calls) >= killed_at:  # nothing is done after it
                    raise KeyboardInterrupt
            return act(path, *rest, **options)

        return instead

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying(os.replace))
        patch.setattr(shutil, "rmtree", dying(shutil.rmtree))
        store.save({"step": 7, "x": torch.arange(7.0)}, 7, whole)
        with pytest.raises(KeyboardInterrupt):
            store.wait()
    found = saved(folder)
    assert [path.name for path in folder.iterdir()] == ["step-7"]
    assert torch.equal(found.load(found.latest(), whole)["x"], torch.arange(7.0))


def test_a_strangers_checkpoint_runs_nothing(tmp_path):
    class Stranger:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    store = saved(tmp_path / "checkpoints", 1)
    (store.path(1) / ".metadata").write_bytes(pickle.dumps(Stranger()))
    (store.path(1) / "checksums.json").unlink()
    with pytest.raises(ValueError, match=r"step-1 is not a readable checkpoint: .* asks for posix"):
        store.load(store.path(1), whole)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_another_run_or_none_is_refused(tmp_path):
    x = synthetic()
    first = JobTrainer(jobs(x, "a"), supply(x), RunConfig(out=tmp_path))
    assert not first.resume()
    first.train_step()
    first.save()
    first.close()
    other = JobTrainer(jobs(x, "a", lr=1e-2), supply(x), RunConfig(out=str(tmp_path)))
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


def test_a_checkpoint_from_before_a_constant_was_known_goes_on_with_a_warning(tmp_path):
    x = synthetic()
    first = JobTrainer(jobs(x, "ab"), supply(x), RunConfig(out=tmp_path))
    first.train_step()
    state = first.state_dict()
    first.close()
    del state["identity"]["a.module.surrogate"]
    again = JobTrainer(jobs(x, "ab"), supply(x), RunConfig(out=tmp_path))
    with pytest.warns(UserWarning, match=r"run's: a\.module\.surrogate 'rectangle'$"):
        again.load_state_dict(state)
    assert again.step == 1
    for names, said in (("a", r"jobs \['a', 'b'\] \(here \['a'\]\)"), ("ac", "jobs")):
        other = JobTrainer(jobs(x, names), supply(x), RunConfig(out=tmp_path))
        with pytest.raises(ValueError, match=f"same jobs and constants; .* {said}"):
            other.load_state_dict(state)
    del state["identity"]["a.module"]
    with pytest.raises(ValueError, match=r"a\.module None \(here 'BinaryAutoencoder'\)"):
        again.load_state_dict(state)


def test_a_full_disk_fails_the_save_by_name_keeps_the_older_ones_and_ends_the_third_time(
    tmp_path, capfd
):
    x = synthetic()
    run = RunConfig(out=tmp_path, checkpoint_every=2, log_every=30)
    trainer = JobTrainer(jobs(x, "a"), supply(x), run)
    step, before = trainer.train_step, resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def filling():
        if trainer.step == 5:
            trainer._store.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        return step()

    trainer.train_step = filling
    try:
        with pytest.raises(OSError, match="the checkpoint cannot be written") as caught:
            trainer.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "step-" in str(caught.value)
    assert trainer.step <= 13  # the save of step 12 waits for the third that failed
    assert [n for n, _ in checkpoints(tmp_path / "checkpoints")] == [2, 4]
    said = capfd.readouterr()
    assert said.out.count("note: ") == 1
    assert "step-6: the checkpoint cannot be written" in said.out
    assert not said.err
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


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


@pytest.mark.parametrize("method", ["bae", "batchtopk", "jumprelu"])
def test_a_step_that_is_left_out_changes_nothing(method):
    x = synthetic()
    torch.manual_seed(0)
    if method == "bae":
        model, config = module(x), dataclasses.replace(SMALL, bank_batches=4)
    else:
        config = dataclasses.replace(TRAINING, steps=30, batch_size=64, precision="float32")
        model = make_baseline(method, 16, 48, k=4).fit_normalization_(x)
    trainer = JobTrainer([Job("j", model, config, hook="rows")], supply(x), RunConfig())
    for _ in range(3):
        trainer.train_step()
    give = trainer.supply.next

    def spoiled(n):
        batch = give(n)
        batch.x["rows"][:8] = float("nan")
        return batch

    learner = trainer.learners["j"]
    before = copy.deepcopy(learner.live_state())
    trainer.supply.next = spoiled
    trainer.train_step()
    assert [step for step, _, _ in trainer.skipped] == [4]
    after = learner.live_state()
    for name, value in before["model"].items():
        assert torch.equal(after["model"][name], value), name
    assert str(after["objective"]) == str(before["objective"])


def test_rows_that_are_not_finite_are_not_called_rows_that_were_not_normalised():
    x = torch.randn(900, 16)
    for spoiled in (64, 3):  # the whole first batch, and a part
        trainer = JobTrainer(
            [Job("j", bf.BinaryAutoencoder(16, 48), SMALL, hook="rows")], supply(x), RunConfig()
        )
        batch = trainer.supply.next(64)
        batch.x["rows"][:spoiled] = float("inf")
        trainer.supply.next = lambda _n, batch=batch: batch
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="rows have a root mean square")
            trainer.train_step()
        assert len(trainer.skipped[0][2]) == spoiled


def test_a_row_that_training_leaves_out_does_not_end_the_refit(tmp_path):
    x = synthetic()
    model = module(x)
    x[-1] = float("nan")
    trainer = JobTrainer([Job("j", model, SMALL, hook="rows")], supply(x), RunConfig(out=tmp_path))
    trainer.fit()
    assert all(value.isfinite().all() for value in weights(tmp_path, "j").values())


def test_no_checkpoint_and_no_result_is_of_parameters_that_are_not_finite(tmp_path):
    x = synthetic()
    for steps in (1, 30):
        out = tmp_path / str(steps)
        config = dataclasses.replace(SMALL, steps=steps, lr=3e38, decay_from=1.0)
        run = RunConfig(out=out, checkpoint_every=1, keep=2)
        trainer = JobTrainer([Job("j", module(x), config, hook="rows")], supply(x), run)
        with pytest.raises(RuntimeError, match="parameters hold NaN or Inf after step 1"):
            trainer.fit()
        assert not checkpoints(out / "checkpoints")
        assert not (out / "j" / "sae_weights.safetensors").exists()


def test_a_checkpoint_of_another_metric_or_target_is_refused(tmp_path):
    x = synthetic()
    pair = {"rows": x, "one": x.flip(1), "other": x.roll(1, 1)}

    def run(metric=None, target=None):
        torch.manual_seed(0)
        transcoder = {"d_out": 16} if target else {}
        bae = bf.BinaryAutoencoder(16, 48, **transcoder)
        bae.fit_normalization_(x, *([pair[target]] if target else []), metric=metric)
        config = dataclasses.replace(SMALL, init="density") if target else SMALL
        job = Job("j", bae, config, hook="rows", target_hook=target)
        out = tmp_path / ("rows" if target is None else "target")
        rows = x if target is None else pair
        return JobTrainer([job], supply(rows), RunConfig(out=out, checkpoint_every=5))

    first = run(metric=torch.linspace(0.5, 2, 16))
    for _ in range(5):
        first.train_step()
    first.save()
    first.close()
    for other in (None, torch.linspace(2, 0.5, 16)):
        with pytest.raises(ValueError, match="the same metric of job j"):
            run(metric=other).resume()
    assert run(metric=torch.linspace(0.5, 2, 16)).resume()
    second = run(target="one")
    for _ in range(5):
        second.train_step()
    second.save()
    second.close()
    with pytest.raises(ValueError, match="target_hook"):
        run(target="other").resume()
    assert run(target="one").resume()


def test_held_out_rows_stop_a_job_and_keep_the_best_checkpoint(tmp_path):
    x = synthetic(n=1200)
    run = RunConfig(out=tmp_path, evaluate_every=3, patience=2, checkpoint_every=3, keep=1)
    trainer = JobTrainer(jobs(x[:1000], "ab"), supply(x[:1000], x[1000:]), run)
    looks = {"a": [0.9, 0.5, 0.6, 0.4, 0.4, 0.7], "b": [0.9, 0.8, 0.85, 0.8]}
    for name, learner in trainer.learners.items():
        learner.heldout = lambda blocks, name=name: {"heldout_score": looks[name].pop(0)}
    trainer.fit()
    # b stops after its fourth look, a two after its best, the run with the last of them
    assert looks == {"a": [], "b": []}
    assert trainer.step == 18
    assert [trainer.learners[name].step for name in "ab"] == [18, 12]
    # the mean of both was best at the fourth look; beside it the last one stays
    assert [step for step, _ in checkpoints(tmp_path / "checkpoints")] == [12, 18]


def test_held_out_numbers_are_those_of_the_evaluation():
    from bae_fast.analysis import evaluate

    x = synthetic(n=1200)
    trainer = JobTrainer(jobs(x[:1000]), supply(x[:1000], x[1000:]), RunConfig())
    for _ in range(5):
        trainer.train_step()
    trainer._evaluate()
    trainer._train(False)
    for name, part in ((p.name, p) for p in trainer._parts):
        found = evaluate(part.learner.model, x[1000:])
        assert part.line["heldout_fvu"] == pytest.approx(found.fvu, rel=1e-5), name
        if name != "c":
            assert part.line["heldout_entropy_bits"] == pytest.approx(found.bits, rel=1e-9)


def test_held_out_numbers_of_a_module_that_searches_are_of_its_searched_codes():
    from bae_fast.analysis import evaluate

    x = synthetic(n=1200)
    (job,) = jobs(x[:1000], "a")
    JobTrainer([job], supply(x[:1000]), RunConfig()).fit()
    searched = bf.SearchedAutoencoder.of(job.module, x[:1000], bit_price=1e-3)
    assert isinstance(job.config, TrainingConfig)
    further = Job("searched", searched, job.config.going_on(), "rows")
    trainer = JobTrainer([further], supply(x[:1000], x[1000:]), RunConfig())
    for _ in range(3):
        trainer.train_step()
    found = evaluate(searched.eval(), x[1000:])
    line = trainer.learners["searched"].heldout([(x[1000:], None)])
    assert line["heldout_fvu"] == pytest.approx(found.fvu, rel=1e-5)
    assert line["heldout_entropy_bits"] == pytest.approx(found.bits, rel=1e-9)
    assert not searched.encode(x).equal(bf.BinaryAutoencoder.encode(searched, x))


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_stops_after_the_step_with_a_checkpoint(name, tmp_path):
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip(f"no {name} here")
    x = synthetic()
    trainer = JobTrainer(jobs(x, "a"), supply(x), RunConfig(out=tmp_path))
    backward = trainer.learners["a"].backward

    def interrupted(rows, target):
        if trainer.step == 4:
            signal.raise_signal(number)
        return backward(rows, target)

    handler = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    before = signal.signal(number, handler)
    try:
        trainer.learners["a"].backward = interrupted
        with pytest.raises(StoppedError, match=rf"stopped by {name} after step 5; .*step-5"):
            trainer.fit()
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert [step for step, _ in checkpoints(tmp_path / "checkpoints")] == [5]


def test_a_signal_that_another_library_waits_for_is_left_to_it():
    if not hasattr(signal, "SIGUSR1"):
        pytest.skip("no SIGUSR1 here")
    x, seen = synthetic(), []
    trainer = JobTrainer(jobs(x, "a"), supply(x), RunConfig())
    step = trainer.train_step

    def warned():
        if trainer.step == 4:
            signal.raise_signal(signal.SIGUSR1)
        return step()

    trainer.train_step = warned
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        trainer.fit()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]
    assert trainer.step == trainer.steps


def test_clipping_and_warm_up():
    x = synthetic()
    (job,) = jobs(x, "a", clip_norm=1e-3, warmup_steps=10, decay_from=1.0)
    learner = JobTrainer([job], supply(x)).learners["a"]
    assert [learner.learning_rate(i) for i in (0, 4, 9)] == pytest.approx([4e-4, 2e-3, 4e-3])
    loss = learner.backward(x[:64], None)
    squares = float(learner.summary(loss).squares)
    every = torch.cat([p.grad.flatten() for p in learner.trained.parameters()]).double()
    assert squares == pytest.approx(float(every.square().sum()), rel=1e-12)
    assert squares > 1e-6
    learner.clip(squares)
    clipped = torch.cat([p.grad.flatten() for p in learner.trained.parameters()]).double()
    assert float(clipped.norm()) == pytest.approx(1e-3, rel=1e-5)
    assert torch.allclose(clipped / clipped.norm(), every / every.norm(), rtol=1e-4, atol=1e-9)


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


def test_a_log_or_a_tracker_that_fails_while_a_run_trains_does_not_end_it(
    tmp_path, monkeypatch, capfd
):
    def failing(*_given, **_named):
        raise ConnectionError("no answer\nfrom the server")

    fake = types.ModuleType("wandb")
    fake.init = lambda **given: None
    fake.log = fake.finish = failing
    monkeypatch.setitem(sys.modules, "wandb", fake)
    x = synthetic()
    run = RunConfig(out=tmp_path, log_every=5, checkpoint_every=15, trackers=("wandb",))
    trainer = JobTrainer(jobs(x, "ab"), supply(x), run)
    step, logs = trainer.train_step, [tmp_path / name / "log.jsonl" for name in "ab"]

    def filling():
        if trainer.step == 12:
            for log in logs:
                log.rename(log.with_suffix(".before"))
                log.mkdir()  # to which no line can be added
        return step()

    trainer.train_step = filling
    lines = trainer.fit()
    trainer.close()
    assert lines["a"]["step"] == lines["b"]["step"] == 30
    assert all((tmp_path / name / "sae_weights.safetensors").is_file() for name in "ab")
    assert len(logs[0].with_suffix(".before").read_text().splitlines()) == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[0] == "note: tracker wandb failed: no answer; the run goes on"
    assert said[1].startswith("note: the log failed: ")
    assert "log.jsonl" in said[1]
    # at the start of a run both are errors
    again = JobTrainer(jobs(x, "ab"), supply(x), run)
    assert again.resume(tmp_path / "checkpoints" / "step-15")
    with pytest.raises(IsADirectoryError, match=r"log\.jsonl"):
        again.fit()
    again.close()
    fake.init = failing
    with pytest.raises(ConnectionError):
        JobTrainer(jobs(x, "a"), supply(x), dataclasses.replace(run, out=tmp_path / "other")).fit()


def test_rows_for_the_end_are_drawn_only_where_they_are_used():
    x = synthetic()
    for refit in (False, True):
        trainer = JobTrainer(jobs(x, "a", refit=refit), supply(x), RunConfig(refit_rows=777))
        asked, sample = [], trainer.supply.sample

        def noted(n, seed, asked=asked, sample=sample):
            asked.append(n)
            return sample(n, seed)

        trainer.supply.sample = noted
        trainer.fit()
        assert asked == [777] * refit


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
    for name in ("a/b", "..", "", "checkpoints", "a\0"):
        with pytest.raises(ValueError, match="the name of a job must be that of a folder beside"):
            JobTrainer([dataclasses.replace(a, name=name)], supply(x))
    for change, words in (
        ({"patience": 1}, "evaluate_every must be at least 1"),
        ({"checkpoint_every": 1}, "out must be a folder"),
        ({"trackers": ("mlflow",)}, "trackers must be of tensorboard, wandb, trackio; got mlflow"),
        ({"log_every": 0}, "log_every must be at least 1; got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            RunConfig(**change)
