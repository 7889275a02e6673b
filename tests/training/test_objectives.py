"""Objectives as objects, and what the trainer refuses, resumes and survives."""

import dataclasses
import errno
import json
import math
import signal
import warnings

import numpy as np
import pytest
import torch
from sparse_rows import module, synthetic

import bae_fast as bf
from bae_fast.baselines import TRAINING, make_baseline
from bae_fast.experiments.runs import fit
from bae_fast.training import (
    PRESETS,
    LoopConfig,
    Loss,
    Objective,
    SparseConfig,
    Trainer,
    TrainingConfig,
)

SMALL = TrainingConfig(steps=40, batch_size=64, precision="float32", revive_every=20)


# -- an objective of one's own -----------------------------------------------------------------


class Median(Objective):
    """An objective that the package does not know: absolute errors."""

    def __init__(self, model, config):
        self.model, self.config, self.n_columns = model, config, model.config.d_sae
        self.seen = []

    def start(self, sample, generator):
        self.seen.append(("start", len(sample(5))))

    def loss(self, x, target, step):
        out = self.model(x, covariance=False)
        self.seen.append(("loss", step.number))
        error = (out.recon - x).abs().mean()
        return Loss(error, {"mse": error, "entropy_bits": out.entropy}, out.code.counts())

    def after_update(self, x, optimizer, step, generator):
        self.seen.append(("after", step))

    def finish(self, rows):
        self.seen.append(("finish", len(rows)))


@dataclasses.dataclass(frozen=True)
class MedianConfig(LoopConfig):
    def objective(self, model):
        return Median(model, self)


def test_an_objective_of_ones_own_needs_no_change_of_the_trainer():
    x = synthetic(n=900)
    trainer = Trainer(module(x), x, MedianConfig(steps=2, batch_size=64, precision="float32"))
    lines = trainer.fit(log_every=1)
    assert [line["step"] for line in lines] == [1, 2]
    assert trainer.objective.seen == [
        ("start", 5), ("loss", 0), ("after", 1), ("loss", 1), ("after", 2), ("finish", 900),
    ]  # fmt: skip


def test_settings_name_a_run_as_files_of_results_always_did():
    """A key that appeared or went would make every kept result look as if it were another's."""
    assert json.loads(json.dumps(PRESETS["sparse"].settings())) == {
        "steps": 2000, "batch_size": 512, "lr": 0.004, "betas": [0.7, 0.9], "eps": 1e-12,
        "decoder_lr_scale": 2.0, "decay_from": 0.2, "entropy_weight": 0.00015,
        "covariance_weight": 0.0, "entropy_from": 0.0, "init": "rows", "density": 0.02,
        "decoder_norm": 1.44, "bank_batches": 32, "multilinear": True, "revive_every": 50,
        "revive_until": 0.9, "dead_below": 0.0003, "revive_quantile": 0.99,
        "revive_decoder_scale": 0.3, "refit": True, "precision": "auto", "seed": 0,
    }  # fmt: skip
    assert json.loads(json.dumps(TRAINING.settings())) == {
        "steps": 2000, "batch_size": 512, "lr": 0.001, "betas": [0.9, 0.999], "eps": 1e-08,
        "decoder_lr_scale": 1.0, "decay_from": 0.2, "entropy_weight": 0.0,
        "covariance_weight": 0.0, "entropy_from": 0.0, "init": "none", "density": 0.02,
        "decoder_norm": 1.44, "bank_batches": 0, "multilinear": False, "revive_every": 0,
        "revive_until": 0.9, "dead_below": 0.0003, "revive_quantile": 0.99,
        "revive_decoder_scale": 0.3, "refit": False, "precision": "auto", "seed": 0,
    }  # fmt: skip


def test_a_baseline_has_no_constants_of_the_binary_objective():
    with pytest.raises(TypeError, match="entropy_weight"):
        SparseConfig(entropy_weight=1.0)


# -- what is refused ---------------------------------------------------------------------------


class Cache:
    def __init__(self, rows):
        self.rows = rows


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (lambda x: x.numpy(), TypeError, r"rows must be a tensor .* got ndarray; torch.from_numpy"),
        (lambda x: Cache(x), TypeError, r"got Cache; its rows are rows\.rows"),
        (lambda x: x.tolist(), TypeError, "rows must be a tensor .* got list"),
        (lambda x: x.long(), TypeError, "rows must be floating point; got torch.int64"),
        (lambda x: x[0], ValueError, r"rows must have shape \[n, 16\]; got \[16\]"),
    ],
)
def test_rows_that_are_none_are_named(spoil, kind, message):
    x = synthetic(n=900)
    with pytest.raises(kind, match=message):
        Trainer(module(x), spoil(x), SMALL)


def test_a_configuration_that_is_none_is_named():
    x = synthetic(n=900)
    with pytest.raises(TypeError, match=r"config must be a TrainingConfig .* got dict"):
        Trainer(module(x), x, {"steps": 3})


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 1.0), (0.9, "a"), 0.9])
def test_betas_out_of_range_are_refused(betas):
    with pytest.raises(ValueError, match=r"betas must be two numbers in \[0, 1\)"):
        TrainingConfig(betas=betas)


def test_a_constant_too_large_for_a_float_is_refused():
    with pytest.raises(ValueError, match="entropy_weight must be finite and not negative"):
        TrainingConfig(entropy_weight=10**400)


def test_a_frozen_module_is_refused():
    x = synthetic(n=900)
    bae = module(x).requires_grad_(False)
    with pytest.raises(ValueError, match=r"W_enc must require a gradient, or init and revive"):
        Trainer(bae, x, SMALL)
    off = dataclasses.replace(SMALL, init="none", revive_every=0, refit=False)
    with pytest.raises(ValueError, match=r"model must have a parameter .* got none of 4"):
        Trainer(bae, x, off)
    sae = make_baseline("topk", 16, 48, k=4).requires_grad_(False)
    with pytest.raises(ValueError, match="model must have a parameter that requires a gradient"):
        Trainer(sae, x, dataclasses.replace(TRAINING, steps=1, batch_size=64))


def test_a_parametrized_decoder_is_trained_where_nothing_would_set_it():
    """The start, the revival and the refit write into W_dec, and a computed one would forget it."""
    x = synthetic(n=900)
    bae = module(x)
    torch.nn.utils.parametrizations.weight_norm(bae, "W_dec", dim=0)
    with pytest.raises(ValueError, match=r"W_dec must be a parameter itself, or init and revive"):
        Trainer(bae, x, SMALL)
    before = bae.W_dec.detach().clone()
    Trainer(bae, x, dataclasses.replace(SMALL, init="none", revive_every=0, refit=False)).fit()
    assert not torch.equal(bae.W_dec, before)


def test_a_frozen_decoder_stays_where_nothing_else_would_change_it():
    x = synthetic(n=900)
    bae = module(x)
    bae.W_dec.requires_grad_(False)
    with pytest.raises(ValueError, match="got requires_grad=False for W_dec"):
        Trainer(bae, x, SMALL)
    before = bae.W_dec.clone()
    off = dataclasses.replace(SMALL, init="none", revive_every=0, refit=False, steps=5)
    encoder = bae.W_enc.detach().clone()
    Trainer(bae, x, off).fit()
    assert torch.equal(bae.W_dec, before)
    assert not torch.equal(bae.W_enc, encoder)


def test_a_module_made_in_inference_mode_is_refused():
    x = synthetic(n=900)
    with torch.inference_mode():
        bae = bf.BinaryAutoencoder(16, 48)
    with pytest.raises(ValueError, match=r"made outside of torch.inference_mode"):
        Trainer(bae, x, dataclasses.replace(SMALL, init="none"))


# -- gradients, dtypes -------------------------------------------------------------------------


def weights(make):
    torch.manual_seed(0)
    x = synthetic(n=900)
    trainer = make(x)
    trainer.fit()
    return trainer.model.state_dict()


def _bfloat16_around():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, _bfloat16_around])
def test_training_does_not_depend_on_the_callers_gradient_mode_or_autocast(context):
    expected = weights(lambda x: Trainer(module(x), x, SMALL))
    torch.manual_seed(0)
    x = synthetic(n=900)
    bae = module(x)
    with context():
        Trainer(bae, x, SMALL).fit()
    for name, value in expected.items():
        assert torch.equal(bae.state_dict()[name], value), name
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["bae", "topk"])
def test_a_half_precision_module_gets_the_rounded_weights_of_its_float32_run(dtype, method):
    def make(x, kind):
        if method == "bae":
            model, config = bf.BinaryAutoencoder(16, 48), SMALL
        else:
            model = make_baseline("topk", 16, 48, k=4)
            config = dataclasses.replace(TRAINING, steps=40, batch_size=64, precision="float32")
        model = model.fit_normalization_(x).to(dtype).to(kind)  # the same rounded start
        return Trainer(model, x.to(dtype), config)

    wide = weights(lambda x: make(x, torch.float32))
    half = weights(lambda x: make(x, dtype))
    for name, value in wide.items():
        assert half[name].dtype == dtype
        assert torch.equal(half[name], value.to(dtype)), name


def test_a_half_precision_run_resumes_from_its_unrounded_weights(tmp_path):
    def new():
        torch.manual_seed(0)
        x = synthetic(n=900).half()
        return Trainer(module(x).half(), x, SMALL)

    whole, first, second = new(), new(), new()
    whole.fit()
    for _ in range(15):
        first.train_step()
    first.save(tmp_path / "run.pt")
    second.load(tmp_path / "run.pt")
    second.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


# -- going on ----------------------------------------------------------------------------------


def test_a_state_of_other_rows_or_constants_is_refused():
    x = synthetic(n=900)
    trainer = Trainer(module(x), x, SMALL)
    trainer.train_step()
    state = trainer.state_dict()

    def refusal(rows=x, f=48, **changes):
        other = Trainer(module(rows, f), rows, dataclasses.replace(SMALL, **changes))
        before = {name: value.clone() for name, value in other.model.state_dict().items()}
        with pytest.raises(ValueError, match="state must be of a run with the same") as caught:
            other.load_state_dict(state)
        assert other.step == 0
        for name, value in other.model.state_dict().items():
            assert torch.equal(value, before[name]), name
        return str(caught.value)

    assert "batch_size 64 (here 32)" in refusal(batch_size=32)
    assert "lr 0.004 (here 0.01), seed 0 (here 7)" in refusal(lr=1e-2, seed=7)
    assert "rows '[900, 16] float32" in refusal(rows=x[:700])
    changed = x.clone()
    changed[17, 3] += 1
    assert "rows" in refusal(rows=changed)
    assert "parameters" in refusal(f=40)
    other = Trainer(
        bf.BinaryAutoencoder(16, 48, surrogate="sigmoid").fit_normalization_(x), x, SMALL
    )
    with pytest.raises(ValueError, match=r"module.surrogate 'rectangle' \(here 'sigmoid'\)"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="it lacks belongs_to, generator"):
        trainer.load_state_dict({"model": {}, "step": 3})


def test_a_state_from_before_a_constant_was_known_goes_on_with_a_warning():
    x = synthetic(n=900)
    whole, first = (Trainer(module(x), x, SMALL) for _ in range(2))
    whole.fit()
    for _ in range(7):
        first.train_step()
    state = first.state_dict()
    for key in ("module.surrogate", "module.surrogate_width"):
        del state["belongs_to"][key]
    again = Trainer(module(x), x, SMALL)
    with pytest.warns(UserWarning, match="state is older than some constants") as said:
        again.load_state_dict(state)
    assert str(said[0].message).endswith(
        "taken to be the run's: module.surrogate 'rectangle', module.surrogate_width 0.4"
    )
    assert said[0].filename == __file__
    again.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name

    def refused(state, match, **changes):
        other = Trainer(module(x), x, dataclasses.replace(SMALL, **changes))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ValueError, match=match):
                other.load_state_dict(state)
        assert other.step == 0

    # what both know is compared as ever; a constant that is off stands in no state
    refused(state, r"with lr 0.004 \(here 0.01\)$", lr=1e-2)
    refused(state, r"with warmup_steps 0 \(here 5\)$", warmup_steps=5)
    warm = Trainer(module(x), x, dataclasses.replace(SMALL, warmup_steps=5)).state_dict()
    refused(warm, r"with warmup_steps 5 \(here 0\)$")
    # what only the state knows may have had a part in it; rows it has always known
    refused({**state, "belongs_to": {**state["belongs_to"], "newer": 1}}, r"newer 1 \(here None\)")
    without_rows = {k: v for k, v in state["belongs_to"].items() if k != "rows"}
    refused({**state, "belongs_to": without_rows}, r"with rows None")


def test_a_checkpoint_that_is_none_is_refused(tmp_path):
    x = synthetic(n=900)
    trainer = Trainer(module(x), x, SMALL)
    with pytest.raises(FileNotFoundError, match=r"none\.pt does not exist"):
        trainer.load(tmp_path / "none.pt")
    trainer.save(tmp_path / "run.pt")
    whole = (tmp_path / "run.pt").read_bytes()
    for content in (b"", b"no checkpoint", whole[: len(whole) // 2]):
        (tmp_path / "cut.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"cut\.pt is not a readable checkpoint") as caught:
            trainer.load(tmp_path / "cut.pt")
        assert "\n" not in str(caught.value)


def test_a_bit_that_has_changed_in_a_checkpoint_is_found(tmp_path):
    x = synthetic(n=900)
    path, trainer = tmp_path / "run.pt", Trainer(module(x), x, SMALL)
    trainer.save(path)
    trainer.load(path)
    weights = trainer.learner.model.W_enc.detach().numpy().tobytes()
    data = bytearray(path.read_bytes())
    data[data.index(weights)] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"run\.pt is not a readable checkpoint: the checksum of"):
        trainer.load(path)


class Stopped(SystemExit):
    """What a handler of SIGTERM raises."""


@pytest.fixture
def terminating():
    def handler(number, frame):
        raise Stopped(number)

    before = signal.signal(signal.SIGTERM, handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("terminating")
def test_sigterm_ends_a_step_writes_a_checkpoint_and_the_run_goes_on_from_it(tmp_path):
    def new():
        torch.manual_seed(1)
        x = synthetic(n=900)
        return Trainer(module(x), x, SMALL)

    whole = new()
    whole.fit(log=tmp_path / "whole.jsonl", log_every=3)
    cut = new()
    step = cut.optimizer.step

    def terminated_step():
        if cut.step == 25:
            signal.raise_signal(signal.SIGTERM)
        return step()

    cut.optimizer.step = terminated_step
    with pytest.raises(Stopped):
        cut.fit(log=tmp_path / "log.jsonl", log_every=3, checkpoint=tmp_path / "run.pt")
    assert cut.step == 26
    with (tmp_path / "log.jsonl").open("a") as file:  # a line of a step that will be done again
        file.write(json.dumps({"step": 27}) + "\n" + '{"step": 3')
    resumed = new()
    resumed.load(tmp_path / "run.pt")
    assert resumed.step == 26
    resumed.fit(log=str(tmp_path / "log.jsonl"), log_every=3)  # a text is a path too
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name

    def logged(name):
        lines = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]

    assert logged("log.jsonl") == logged("whole.jsonl")


def test_checkpoints_are_written_every_so_many_steps(tmp_path):
    x = synthetic(n=900)
    trainer = Trainer(module(x), x, SMALL)
    seen = []
    save = trainer.save

    def watched(path):
        seen.append(trainer.step)
        return save(path)

    trainer.save = watched
    trainer.fit(checkpoint=tmp_path / "run.pt", checkpoint_every=15)
    assert seen == [15, 30]
    again = Trainer(module(x), x, SMALL)
    again.load(tmp_path / "run.pt")
    assert again.step == 30


@pytest.mark.parametrize("how", ["loaded", "trained", "resumed", "resumed in half"])
def test_what_has_learned_is_not_started_anew(how, tmp_path):
    x = synthetic(n=900)
    bae = module(x, dtype=torch.bfloat16 if how == "resumed in half" else torch.float32)
    run = Trainer(bae, x, SMALL)
    run.train_step()
    state = run.state_dict()
    if how == "loaded":
        bae.save_pretrained(tmp_path)
        bae = bf.BinaryAutoencoder.from_pretrained(tmp_path)
    elif how.startswith("resumed"):  # without a step of its own
        bae = module(x, dtype=bae.W_enc.dtype)
        Trainer(bae, x, SMALL).load_state_dict(state)
    before = {name: value.clone() for name, value in bae.state_dict().items()}
    again = Trainer(bae, x, SMALL)
    with pytest.raises(ValueError, match=r"model must not have learned before.*init='none'"):
        again.train_step()
    for name, value in bae.state_dict().items():
        assert torch.equal(value, before[name]), name
    again.load_state_dict(state)  # of the same run: nothing is lost
    again.train_step()
    going_on = dataclasses.replace(SMALL, init="none", lr=1e-9)
    Trainer(bae, x, going_on).train_step()
    assert (bae.W_enc - before["W_enc"]).norm() < 0.5 * before["W_enc"].norm()
    bae.reset_parameters()
    Trainer(bae, x, dataclasses.replace(SMALL, seed=5)).train_step()  # other rows to start from
    assert (bae.W_enc - before["W_enc"]).norm() > 0.5 * before["W_enc"].norm()


@pytest.mark.parametrize("method", ["bae", "topk"])
@pytest.mark.parametrize(("scale", "shift"), [(20.0, 30.0), (0.02, 0.0), (1.0, 3.0)])
def test_rows_that_were_not_normalised_are_said(method, scale, shift):
    x = torch.randn(900, 6) * scale + shift
    made = {
        "bae": lambda: (bf.BinaryAutoencoder(6, 24), SMALL),
        "topk": lambda: (make_baseline("topk", 6, 24, k=4), SparseConfig(steps=9, batch_size=64)),
    }
    model, config = made[method]()
    with pytest.warns(UserWarning, match=r"call fit_normalization_\(rows\) before training"):
        Trainer(model, x, config).train_step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, config = made[method]()
        Trainer(model.fit_normalization_(x), x, config).train_step()
        model, config = made[method]()
        Trainer(model, (x - x.mean(0)) / x.std(), config).train_step()


def test_a_run_that_diverges_keeps_the_last_good_checkpoint(tmp_path):
    x = synthetic(n=900)
    trainer = Trainer(module(x), x, SMALL)
    step = trainer.train_step

    def diverging():
        found = step()
        if trainer.step == 9:  # between two lines of the log, whose loss is of the step before
            with torch.no_grad():
                trainer.learner.trained.W_dec[0, 0] = math.nan
        return found

    trainer.train_step = diverging
    with pytest.raises(RuntimeError, match="parameters hold NaN or Inf after step 10"):
        trainer.fit(checkpoint=tmp_path / "run.pt", checkpoint_every=5, log_every=100)
    again = Trainer(module(x), x, SMALL)
    again.load(tmp_path / "run.pt")
    assert again.step == 5


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.EIO, "Input/output error"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_a_checkpoint_that_cannot_be_read_just_now_stays(error, tmp_path, monkeypatch):
    x = synthetic(n=900)
    trainer = Trainer(module(x), x, SMALL)
    trainer.train_step()
    path = trainer.save(tmp_path / "checkpoint.pt")

    def failing(*_arguments, **_options):
        raise error

    monkeypatch.setattr(torch, "load", failing)
    with pytest.raises(type(error)) as caught:
        fit(Trainer(module(x), x, SMALL), tmp_path, progress=False)
    assert caught.value is error
    assert path.is_file()
    monkeypatch.undo()
    fit(Trainer(module(x), x, SMALL), tmp_path, progress=False)
    assert not path.is_file()  # done


def test_a_numpy_array_can_be_trained_on_as_the_message_says():
    x = synthetic(n=900).numpy()
    assert isinstance(x, np.ndarray)
    rows = torch.from_numpy(x)
    assert Trainer(module(rows), rows, dataclasses.replace(SMALL, steps=2)).fit()


# -- wide dictionaries -------------------------------------------------------------------------


@pytest.mark.parametrize("d_sae", [64, 256])
def test_up_to_sixteen_features_a_dimension_no_constant_changes(d_sae):
    preset = PRESETS["sparse"]
    found = preset.for_sizes(16, d_sae)
    assert found == dataclasses.replace(preset, wide_from=0.0)
    assert found.settings() == preset.settings()


def test_shares_of_a_wide_dictionary_fall_as_one_over_its_features():
    preset = PRESETS["sparse"]
    wide = preset.for_sizes(576, 262144)
    scale = 16 * 576 / 262144
    assert wide.density * 262144 == pytest.approx(0.02 * 16 * 576)
    assert wide.dead_below == pytest.approx(scale * 3e-4)
    assert 1 - wide.revive_quantile == pytest.approx(scale * 0.01)
    changed = {k for k, v in wide.settings().items() if v != preset.settings()[k]}
    assert changed == {"density", "dead_below", "revive_quantile"}
    assert wide.for_sizes(576, 262144) == wide
    kept = dataclasses.replace(preset, wide_from=0.0).for_sizes(576, 262144)
    assert kept.settings() == preset.settings()
    assert dataclasses.replace(preset, wide_from=4).for_sizes(16, 128).density == 0.01
    with pytest.raises(ValueError, match="wide_from must be finite and not negative"):
        TrainingConfig(wide_from=-1.0)


def test_a_wide_dictionary_starts_with_the_ones_of_sixteen_features_a_dimension():
    x = synthetic()
    ones = []
    for f in (256, 1024):
        torch.manual_seed(0)
        config = dataclasses.replace(SMALL, refit=False)
        trainer = Trainer(module(x, f), x, config)
        # 0.02 and a quarter of it, of 1,500 rows: 30 and 8 (7.5, rounded) for every feature
        ones.append(trainer.model.encode(x).counts().unique().tolist())
        assert trainer.config.density * f == pytest.approx(0.32 * 16)
    assert ones == [[30], [8]]
