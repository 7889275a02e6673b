"""The training loop and its parts, on small synthetic rows."""

import copy
import dataclasses
import json
import signal

import pytest
import torch
from sparse_rows import module, synthetic

import bae_fast as bf
from bae_fast.training import (
    PRESETS,
    CodeBank,
    Trainer,
    TrainingConfig,
    init_from_rows_,
    refit_decoder_,
    revive_,
)

SMALL = TrainingConfig(steps=60, batch_size=64, precision="float32", revive_every=20)


def fvu(bae, x):
    with torch.no_grad():
        error = x - bae.decode(bae.encode(x))
    return float(error.square().sum() / (x - x.mean(0)).square().sum())


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_training_explains_most_of_the_variance(preset):
    x = synthetic()
    bae = module(x, preset=preset)
    start = fvu(bae, x)
    config = dataclasses.replace(PRESETS[preset], steps=300, batch_size=64, precision="float32")
    lines = Trainer(bae, x, config).fit()
    assert fvu(bae, x) < 0.6 * start
    assert lines[-1]["step"] == 300
    assert not bae.training
    assert ("covariance" in lines[-1]) == (preset == "paper")


def test_the_entropy_term_costs_reconstruction_and_saves_bits():
    x = synthetic()
    found = {}
    for weight in (0.0, 3e-2):
        torch.manual_seed(0)
        bae = module(x)
        config = dataclasses.replace(SMALL, steps=300, entropy_weight=weight)
        Trainer(bae, x, config).fit()
        found[weight] = (fvu(bae, x), float(bae.encode(x).entropy()))
    assert found[3e-2][1] < 0.8 * found[0.0][1]
    assert found[3e-2][0] > found[0.0][0]


@pytest.mark.parametrize("stop", [1, 20, 37])
def test_a_resumed_run_equals_an_uninterrupted_one(stop, tmp_path):
    x = synthetic()
    torch.manual_seed(1)
    whole = module(x)
    Trainer(whole, x, SMALL).fit()

    torch.manual_seed(1)
    first = Trainer(module(x), x, SMALL)
    for _ in range(stop):
        first.train_step()
    torch.save(first.state_dict(), tmp_path / "checkpoint.pt")
    del first
    resumed = Trainer(module(x), x, SMALL)
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    resumed.fit()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_an_interrupt_leaves_a_module_that_can_be_saved(tmp_path):
    x = synthetic()
    trainer = Trainer(module(x), x, SMALL)

    def interrupt(line):
        if line["step"] >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.fit(log=tmp_path / "log.jsonl", on_log=interrupt)
    assert trainer.step == 20
    trainer.model.save_pretrained(tmp_path)
    loaded = bf.BinaryAutoencoder.from_pretrained(tmp_path)
    assert loaded.encode(x).equal(trainer.model.encode(x))
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [10, 20]


def test_a_log_that_fails_while_a_run_trains_does_not_end_it(tmp_path, capfd):
    x, log = synthetic(), tmp_path / "run" / "log.jsonl"
    trainer = Trainer(module(x), x, SMALL)

    def filling(line):
        if line["step"] == 10:
            log.rename(tmp_path / "before.jsonl")
            log.mkdir()  # to which no line can be added

    lines = trainer.fit(log=log, on_log=filling)
    assert [line["step"] for line in lines] == list(range(10, SMALL.steps + 1, 10))
    assert len((tmp_path / "before.jsonl").read_text().splitlines()) == 1
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("note: the log failed: ")
    again = Trainer(module(x), x, SMALL)
    with pytest.raises(IsADirectoryError, match=r"log\.jsonl"):  # at the start it is an error
        again.fit(log=log)
    assert again.step == 0


@pytest.fixture
def interrupts():
    """Interrupts raise, as in a terminal: a shell's background jobs ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_a_signal_behind_a_step_does_not_cost_its_line(tmp_path, monkeypatch):
    x = synthetic()
    trainer, log = Trainer(module(x), x, SMALL), tmp_path / "log.jsonl"
    result_of = trainer.learner.result

    def result(*arguments):  # called when the step is done
        if trainer.step == 20:
            signal.raise_signal(signal.SIGINT)
        return result_of(*arguments)

    monkeypatch.setattr(trainer.learner, "result", result)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(log=log, checkpoint=tmp_path / "checkpoint")
    assert trainer.step == 20
    goes_on = Trainer(module(x), x, SMALL)
    goes_on.load(tmp_path / "checkpoint")
    goes_on.fit(log=log)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(10, SMALL.steps + 1, 10))


@pytest.mark.usefixtures("interrupts")
def test_ctrl_c_waits_for_the_end_of_the_step():
    """The state after an interrupt is that of a whole step: going on is exact."""
    x = synthetic()
    torch.manual_seed(1)
    whole = Trainer(module(x), x, SMALL)
    whole.fit()

    torch.manual_seed(1)
    cut = Trainer(module(x), x, SMALL)
    step = cut.optimizer.step

    def interrupted_step():
        if cut.step == 25:
            signal.raise_signal(signal.SIGINT)
        return step()

    cut.optimizer.step = interrupted_step
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    assert cut.step == 26
    cut.optimizer.step = step
    cut.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, cut.model.state_dict()[name]), name


def test_a_snapshot_does_not_follow_the_trainer():
    x = synthetic()
    trainer = Trainer(module(x), x, SMALL)
    trainer.train_step()
    snapshot = trainer.state_dict()
    weight = snapshot["model"]["W_enc"].clone()
    first = trainer.train_step()["mse"]
    assert torch.equal(snapshot["model"]["W_enc"], weight)
    trainer.load_state_dict(snapshot)
    assert torch.equal(trainer.train_step()["mse"], first)


def test_every_counter_is_resumed():
    x = synthetic()
    trainer = Trainer(module(x), x, SMALL)
    for _ in range(7):
        trainer.train_step()
    other = Trainer(module(x), x, SMALL)
    other.load_state_dict(trainer.state_dict())
    one, two = trainer.state_dict(), other.state_dict()
    for name in ("last_fired", "order", "generator"):
        assert torch.equal(one[name], two[name]), name
    assert torch.equal(one["objective"]["fired"], two["objective"]["fired"])
    assert (two["step"], two["objective"]["seen"], len(two["objective"]["bank"])) == (7, 448, 7)


def test_rows_that_are_not_finite_end_the_training_with_a_reason():
    x = synthetic()
    bae = module(x)
    bad = x.clone()
    bad[::50, 3] = float("nan")
    with pytest.raises(ValueError, match="rows must be finite; got NaN or Inf in row"):
        Trainer(bae, bad, SMALL)
    trainer = Trainer(bae, bad, dataclasses.replace(SMALL, init="none"))
    with pytest.raises(ValueError, match=r"rows must be finite; got NaN or Inf in row \d+"):
        trainer.fit()
    assert all(p.isfinite().all() for p in bae.parameters())


def test_a_refit_that_cannot_be_made_is_refused_before_the_training():
    x = synthetic()
    with pytest.raises(ValueError, match="refit must be False for d_sae > 16384"):
        Trainer(module(x, f=16385), x, SMALL)


def test_starting_from_rows_gives_unit_pre_activations_and_the_density():
    x = synthetic()
    bae = module(x)
    init_from_rows_(bae, x, 0.05, decoder_norm=0.5)
    with torch.no_grad():
        pre = bae.preactivation(x)
    torch.testing.assert_close(pre.std(0), torch.ones(48), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(bae.W_dec.norm(dim=1), torch.full((48,), 0.5))
    assert torch.equal(bae.encode(x).counts(), torch.full((48,), 75))
    cosine = torch.nn.functional.cosine_similarity(bae.W_enc.T, bae.W_dec)
    torch.testing.assert_close(cosine, torch.ones(48))


@pytest.mark.parametrize("n_rows", [48, 20])
def test_no_two_features_start_the_same(n_rows):
    """Twins get the same gradients at every step and would never part."""
    x = synthetic(n=n_rows)
    bae = module(x)
    init_from_rows_(bae, x, 0.1, decoder_norm=0.5)
    directions = torch.nn.functional.normalize(bae.W_dec.detach(), dim=1)
    cosine = directions @ directions.T - 2 * torch.eye(48)
    assert cosine.max() < 0.999


def test_revival_points_dead_features_at_the_worst_rows_and_clears_their_state():
    x = synthetic()
    bae = module(x)
    optimizer = torch.optim.Adam(bae.parameters())
    out = bae(x)
    (bae.mse(out, x) + 1e-3 * out.entropy).backward()
    optimizer.step()
    before = {name: value.clone() for name, value in bae.state_dict().items()}
    dead = torch.zeros(48, dtype=torch.bool)
    dead[[3, 40]] = True
    error = torch.zeros(len(x), 16)
    error[7], error[9] = torch.arange(16.0), 2 * torch.arange(16.0)  # no other can be drawn
    n = revive_(bae, dead, bae.normalize(x), error, optimizer, quantile=0.99, decoder_scale=0.3)
    assert n == 2
    direction = error[7] / error[7].norm()
    for feature in (3, 40):
        torch.testing.assert_close(bae.W_dec[feature] / bae.W_dec[feature].norm(), direction)
        torch.testing.assert_close(bae.W_enc[:, feature] / bae.W_enc[:, feature].norm(), direction)
        assert bae.encode(x).density()[feature] == pytest.approx(0.01, abs=0.002)
        assert not optimizer.state[bae.W_enc]["exp_avg"][:, feature].any()
        assert not optimizer.state[bae.W_dec]["exp_avg_sq"][feature].any()
    live = ~dead
    assert torch.equal(bae.W_enc[:, live], before["W_enc"][:, live])
    assert torch.equal(bae.W_dec[live], before["W_dec"][live])
    assert optimizer.state[bae.W_enc]["exp_avg"][:, live].any()


@pytest.mark.parametrize("n_rows", [2, 32])
def test_a_feature_that_few_rows_revive_is_on_in_one_of_them(n_rows):
    x = synthetic()[:n_rows]
    bae = module(x)
    dead = torch.arange(48) < 20
    rows = bae.normalize(x)
    revive_(bae, dead, rows, rows, None, quantile=0.99, decoder_scale=0.3)
    pre = bae.preactivation(x)[:, :20]
    assert torch.equal((pre > 0).sum(0), torch.ones(20, dtype=torch.int64))
    assert pre.abs().min() > 1e-4  # rounding decides on no row


@pytest.mark.parametrize("density", [0.2, 0.03])  # counted as a product, and by their ones
def test_the_refit_is_the_least_squares_decoder_and_changes_no_bit(density):
    x = synthetic(n=9000)  # more than one block
    bae = module(x).double()
    x = x.double()
    init_from_rows_(bae, x, density, decoder_norm=0.5)
    code = bae.encode(x)
    before = fvu(bae, x)
    refit_decoder_(bae, x, ridge=0.0)
    assert bae.encode(x).equal(code)
    design = torch.cat([code.to_dense(torch.float64), torch.ones(len(x), 1)], dim=1)
    expected = torch.linalg.lstsq(design, bae.normalize(x)).solution
    torch.testing.assert_close(bae.W_dec.detach(), expected[:-1], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(bae.b_dec.detach(), expected[-1], rtol=1e-6, atol=1e-8)
    assert fvu(bae, x) < before


def test_a_refit_to_rows_that_are_not_finite_changes_nothing():
    x = synthetic()
    bae = module(x)
    before = copy.deepcopy(bae.state_dict())
    x[7, 3] = torch.nan
    with pytest.raises(ValueError, match="x must be finite; it holds NaN or Inf"):
        refit_decoder_(bae, x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bae.state_dict().items())


def test_the_bank_pools_the_last_batches():
    bank = CodeBank(3)
    codes = [bf.BinaryCode.from_dense(torch.rand(20, 40) < 0.3) for _ in range(5)]
    with pytest.raises(ValueError, match="bank is empty"):
        bank.statistics()
    for code in codes:
        bank.append(code)
    expected = bf.BinaryCode.cat(codes[2:])
    for pooled in (bank.statistics(), bank.statistics(words=True)):
        assert int(pooled.n_rows) == 60
        assert torch.equal(pooled.counts, expected.counts())
    assert torch.equal(bank.statistics(words=True).words, expected.words)


def test_the_learning_rate_is_constant_and_then_a_cosine_to_zero():
    x = synthetic()
    config = dataclasses.replace(SMALL, steps=100, decay_from=0.2, lr=1.0)
    rate = Trainer(module(x), x, config).learning_rate
    assert [rate(0), rate(19)] == [1.0, 1.0]
    assert rate(60) == pytest.approx(0.5)
    assert rate(99) < 1e-3
    for start in (1, 1.0):
        constant = Trainer(module(x), x, dataclasses.replace(config, decay_from=start))
        assert [constant.learning_rate(step) for step in (0, 99, 100, 101)] == [1.0] * 4


def test_batches_cover_every_row_once_before_any_twice():
    x = torch.arange(256.0)[:, None].expand(256, 16) + torch.randn(256, 16)
    trainer = Trainer(module(x), x, SMALL)
    seen = torch.cat([trainer._next_batch()[0] for _ in range(4)])
    assert torch.equal(seen[:, 0].sort().values, x[:, 0].sort().values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"entropy_weight": -1.0}, "entropy_weight must be finite and not negative"),
        ({"entropy_weight": float("nan")}, "entropy_weight must be finite and not negative"),
        ({"steps": 2.5}, "steps must be an int; got 2.5"),
        ({"decay_from": 2.0}, r"decay_from must lie in \[0, 1\]"),
        ({"revive_quantile": 7}, r"revive_quantile must lie in \[0, 1\]"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"init": "zeros"}, "init must be rows, density or none"),
        ({"precision": "fp8"}, "precision must be auto, bfloat16 or float32"),
    ],
)
def test_a_bad_configuration_names_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**change)


def test_rows_of_another_width_or_too_few_are_refused():
    x = synthetic()
    with pytest.raises(ValueError, match=r"rows must have shape \[n, 16\]"):
        Trainer(module(x), x[:, :5], SMALL)
    with pytest.raises(ValueError, match="at least one batch of 64; got 10"):
        Trainer(module(x), x[:10], SMALL)
