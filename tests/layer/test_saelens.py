"""The Binary Autoencoder among SAELens' architectures; skipped where SAELens is not installed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from hub_server import hub_server

from bae_fast import BinaryAutoencoder, SearchedAutoencoder

pytest.importorskip("sae_lens", reason="SAELens is not installed (extra 'saelens')")

from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer

import bae_fast.saelens
from bae_fast.baselines import make_baseline
from bae_fast.saelens import BinarySAE, BinaryTrainingSAE, BinaryTrainingSAEConfig
from bae_fast.training import Trainer, TrainingConfig
from bench.saebench import in_sae_lens

D, F = 12, 40


def module(seed: int = 0, **options) -> tuple[BinaryAutoencoder, torch.Tensor]:
    torch.manual_seed(seed)
    x = 3 + 2 * torch.randn(50, D)
    bae = BinaryAutoencoder(D, F, metadata={"model_name": "a", "hook_name": "b"}, **options)
    return bae.fit_normalization_(x).init_density_(x, 0.2).eval(), x


@pytest.mark.parametrize("n_bits", [1, 3])
def test_what_we_save_sae_lens_loads_with_the_same_bits_and_metadata(tmp_path, n_bits):
    bae, x = module(n_bits=n_bits)
    sae = SAE.load_from_disk(bae.save_pretrained(tmp_path))
    assert isinstance(sae, BinarySAE)
    code = bae.encode(x)
    assert torch.equal(sae.encode(x), code.values())
    torch.testing.assert_close(sae(x), bae.decode(code))
    assert sae.cfg.metadata.hook_name == "b"
    assert sae.cfg.apply_b_dec_to_input is False


def test_what_sae_lens_saves_we_load(tmp_path):
    bae, x = module()
    sae = SAE.load_from_disk(bae.save_pretrained(tmp_path / "ours"))
    sae.save_model(tmp_path / "theirs")
    again = BinaryAutoencoder.from_pretrained(tmp_path / "theirs")
    assert again.encode(x).equal(bae.encode(x))
    torch.testing.assert_close(again.decode(again.encode(x)), bae.decode(bae.encode(x)))


def test_a_folded_decoder_changes_no_bit_and_no_reconstruction(tmp_path):
    bae, x = module()
    folder = bae.save_pretrained(tmp_path / "ours")
    plain, folded = (SAE.load_from_disk(folder, fold_W_dec_norm=fold) for fold in (False, True))
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(F))
    assert torch.equal(folded.encode(x) > 0, plain.encode(x) > 0)
    torch.testing.assert_close(folded(x), plain(x))
    folded.save_model(tmp_path / "folded")
    torch.testing.assert_close(SAE.load_from_disk(tmp_path / "folded")(x), plain(x))


def test_topk_in_sae_lens_class_is_ours_on_raw_rows(tmp_path):
    """As the benchmark with SAEBench carries it there."""
    _, x = module()
    torch.manual_seed(1)
    sae = make_baseline("topk", D, F, k=5).fit_normalization_(x).eval()
    theirs = in_sae_lens(sae, tmp_path / "topk-5")
    torch.testing.assert_close(theirs(x), sae.reconstruct(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(theirs.encode(x) > 0, sae.encode(x) > 0)


@pytest.mark.parametrize("matrix", [False, True])
def test_the_units_of_a_metric_go_both_ways(tmp_path, matrix):
    _, x = module()
    torch.manual_seed(1)
    x = x * torch.logspace(-1, 1, D)
    metric = x.std(0)
    if matrix:
        turn = torch.linalg.qr(torch.randn(D, D))[0]
        metric = (turn * metric) @ turn.T
    bae = BinaryAutoencoder(D, F).fit_normalization_(x, metric=metric)
    bae.init_density_(x, 0.2).eval()
    sae = SAE.load_from_disk(bae.save_pretrained(tmp_path / "ours"))
    assert torch.equal(sae.x_metric, bae.x_metric)
    assert torch.equal(sae.encode(x), bae.encode(x).values())
    # a matrix sums over dimensions, of which the largest sets the error of all
    allowed = {"rtol": 1e-4, "atol": 1e-3} if matrix else {}
    torch.testing.assert_close(sae(x), bae.decode(bae.encode(x)), **allowed)
    sae.save_model(tmp_path / "theirs")
    again = BinaryAutoencoder.from_pretrained(tmp_path / "theirs")
    assert torch.equal(again.x_metric, bae.x_metric)
    assert again.encode(x).equal(bae.encode(x))
    shared = sae.autoencoder()
    assert torch.equal(shared.x_metric, bae.x_metric)
    assert shared.encode(x).equal(bae.encode(x))


def trainer(sae: BinaryTrainingSAE, x: torch.Tensor, steps: int = 60, **options) -> SAETrainer:
    torch.manual_seed(0)
    batches = iter(lambda: x[torch.randperm(len(x))[:32]], None)
    config = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False,
        total_training_samples=32 * steps, device="cpu", autocast=False,
        lr_scheduler_name="constant", lr_warm_up_steps=0, adam_beta1=0.9, adam_beta2=0.999,
        lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=32, dead_feature_window=10,
        feature_sampling_window=20, logger=LoggingConfig(log_to_wandb=False),
        **{"lr": 1e-2, "lr_end": 1e-3, **options},
    )  # fmt: skip
    return SAETrainer(config, sae, batches)


def test_sae_lens_trains_it_and_the_result_loads_on_both_sides(tmp_path):
    _, x = module()
    config = BinaryTrainingSAEConfig(d_in=D, d_sae=F, entropy_coefficient=1e-3)
    sae = BinaryTrainingSAE(config).fit_normalization_(x)
    before = (sae(x) - x).square().sum().item()
    trainer(sae, x).fit()
    assert (sae(x) - x).square().sum().item() < before / 2
    assert config.metadata.l0 > 0
    sae.save_model(tmp_path / "training")
    sae.save_inference_model(tmp_path / "inference")
    assert isinstance(TrainingSAE.load_from_disk(tmp_path / "training"), BinaryTrainingSAE)
    again = SAE.load_from_disk(tmp_path / "inference")
    ours = BinaryAutoencoder.from_pretrained(tmp_path / "inference")
    torch.testing.assert_close(again(x), sae(x))
    torch.testing.assert_close(ours.decode(ours.encode(x)), sae(x))


def test_the_loss_in_sae_lens_is_d_in_times_ours():
    bae, x = module()
    config = BinaryTrainingSAEConfig(
        d_in=D, d_sae=F, entropy_coefficient=0.5, covariance_coefficient=0.25
    )
    sae = BinaryTrainingSAE(config)
    sae.load_state_dict(bae.state_dict())
    step = trainer(sae, x)
    found = step._train_step(sae, x)
    bae.train()
    out = bae(x, covariance=True)
    ours = bae.mse(out, x) * D + 0.5 * out.entropy + 0.25 * out.covariance
    torch.testing.assert_close(found.loss, ours)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_lengthened_updates_are_those_of_a_larger_learning_rate(scale):
    _, x = module()
    rows = x.repeat(4, 1)

    def run(lr: float, lr_scale: float) -> BinaryTrainingSAE:
        torch.manual_seed(0)
        config = BinaryTrainingSAEConfig(d_in=D, d_sae=F, lr_scale=lr_scale, revive_every=4)
        sae = BinaryTrainingSAE(config)
        trainer(sae, rows, steps=10, lr=lr, lr_end=lr).fit()
        return sae

    one, other = run(4e-3 / scale, scale), run(4e-3, 1.0)
    for name, want in other.named_parameters():
        torch.testing.assert_close(dict(one.named_parameters())[name], want, rtol=1e-3, atol=1e-5)
    assert (run(1e-3, 1.0).W_dec - other.W_dec).abs().max() > 5e-3


def test_updates_alone_are_lengthened_and_those_of_the_module_alone():
    bae, x = module()
    sae = BinaryTrainingSAE(BinaryTrainingSAEConfig(d_in=D, d_sae=F))
    step = trainer(sae, x)
    step._train_step(sae, x)
    sae.load_state_dict(bae.state_dict())
    assert torch.equal(sae.W_dec, bae.W_dec)
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))
    before = sae.W_dec.clone()
    other = torch.nn.Parameter(torch.zeros(3))
    other.grad = torch.ones(3)
    torch.optim.SGD([other], lr=1.0).step()  # of another module, with the same hooks
    assert torch.equal(other, -torch.ones(3))
    assert torch.equal(sae.W_dec, before)
    sae.remember(step.optimizer)  # a step under way in another thread
    torch.optim.SGD([other], lr=1.0).step()
    sae.W_dec.data += 1
    sae.lengthen(step.optimizer)
    torch.testing.assert_close(sae.W_dec, before + 4)
    with pytest.raises(ValueError, match=r"lr_scale must lie in \[1, 1000\]"):
        BinaryTrainingSAEConfig(d_in=D, d_sae=F, lr_scale=0.5)


def test_by_default_the_entropy_weighs_two_thirds_of_what_it_does_in_our_trainer(tmp_path):
    """Without its term nothing makes the code sparse; the weight follows the width alone."""
    bae, x = module()
    sae = BinaryTrainingSAE(BinaryTrainingSAEConfig(d_in=D, d_sae=F))
    sae.load_state_dict(bae.state_dict())
    found = trainer(sae, x)._train_step(sae, x)
    bae.train()
    ours = bae.loss(bae(x), x, entropy_weight=TrainingConfig().entropy_weight * 2 / 3)
    torch.testing.assert_close(found.loss, D * ours)
    assert found.losses["entropy_loss"] > 0
    sae.save_model(tmp_path)
    again = TrainingSAE.load_from_disk(tmp_path)
    assert again.cfg.entropy_coefficient == D * 1e-4
    assert again.cfg.lr_scale == 4
    off = BinaryTrainingSAEConfig(d_in=D, d_sae=F, entropy_coefficient=0.0)
    assert off.entropy_coefficient == 0


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_the_first_batch_sets_scale_directions_and_density(tmp_path, scale):
    """Whatever the rows' scale, the start is the same; outlying rows have no part in it."""
    _, x = module()
    rows = scale * x.repeat(4, 1)
    torch.manual_seed(1)
    sae = BinaryTrainingSAE(BinaryTrainingSAEConfig(d_in=D, d_sae=F, density=0.1))
    step = trainer(sae, rows, lr=1e-4, lr_end=1e-4)  # the start is looked at after a step
    batch = torch.cat([rows, 500 * scale * torch.ones(1, D)])
    step._train_step(sae, batch)
    ours = BinaryAutoencoder(D, F).fit_normalization_(rows)
    torch.testing.assert_close(sae.x_mean, ours.x_mean)
    torch.testing.assert_close(sae.x_scale, ours.x_scale)
    torch.testing.assert_close(sae.encode(rows).mean(), torch.tensor(0.1), rtol=0.1, atol=0)
    before = sae.x_scale.clone()
    step._train_step(sae, 2 * rows)
    assert torch.equal(sae.x_scale, before)  # once
    sae.save_model(tmp_path)
    again = TrainingSAE.load_from_disk(tmp_path)
    trainer(again, rows)._train_step(again, 2 * rows)  # what was loaded goes on as it is
    assert torch.equal(again.x_scale, before)


def test_without_a_start_nothing_is_set():
    _, x = module()
    sae = BinaryTrainingSAE(BinaryTrainingSAEConfig(d_in=D, d_sae=F, start="none"))
    trainer(sae, x)._train_step(sae, x)
    assert not sae.x_mean.any()
    with pytest.raises(ValueError, match="start must be one of rows, density, none"):
        BinaryTrainingSAEConfig(d_in=D, d_sae=F, start="zero")
    with pytest.raises(ValueError, match="density must lie between 0 and 1; got 1"):
        BinaryTrainingSAEConfig(d_in=D, d_sae=F, density=1)


def test_no_trainer_of_ours_starts_anew_what_sae_lens_trained_or_loaded(tmp_path):
    bae, x = module()
    sae = BinaryTrainingSAE(BinaryTrainingSAEConfig(d_in=D, d_sae=F, start="none"))
    assert not sae.autoencoder().learned
    trainer(sae, x)._train_step(sae, x)
    loaded = SAE.load_from_disk(bae.save_pretrained(tmp_path))
    config = TrainingConfig(steps=1, batch_size=len(x))
    for each in (sae.autoencoder(), loaded.autoencoder()):
        assert each.learned
        before = each.W_dec.detach().clone()
        with pytest.raises(ValueError, match="must not have learned"):
            Trainer(each, x, config).fit()
        assert torch.equal(each.W_dec, before)


def test_no_feature_dies_in_sae_lens_loop_with_the_defaults():
    """Rows of deviation 0.3 along 12 hidden directions: without the start all features are off."""
    torch.manual_seed(0)
    bits = (torch.rand(2048, 24) < 0.2).float()
    rows = 0.3 * bits @ torch.randn(24, D)
    sae = BinaryTrainingSAE(BinaryTrainingSAEConfig(d_in=D, d_sae=F))
    trainer(sae, rows, steps=150).fit()
    assert (sae.encode(rows).sum(0) == 0).float().mean() < 0.1
    error = (sae(rows) - rows).square().sum() / (rows - rows.mean(0)).square().sum()
    assert error < 0.3


def test_a_scaled_set_is_unscaled_after_training():
    _, x = module()
    config = BinaryTrainingSAEConfig(d_in=D, d_sae=F)
    sae = BinaryTrainingSAE(config).fit_normalization_(4 * x)
    code, recon = sae.encode(4 * x), sae(4 * x)
    sae.fold_activation_norm_scaling_factor(4.0)
    assert torch.equal(sae.encode(x), code)
    torch.testing.assert_close(sae(x) * 4, recon)


# a process of its own: huggingface_hub reads its endpoint when it is imported
FROM_THE_HUB = """
import sys
from pathlib import Path
from bae_fast import BinaryAutoencoder, hub
import bae_fast.saelens
from sae_lens import SAE
from sae_lens.loading import pretrained_saes_directory as directory

source, folder = map(Path, sys.argv[1:])
bae = BinaryAutoencoder.from_pretrained(source)
bae.push_to_hub("user/dictionary", subfolder="layers.1")
SAE.from_pretrained("user/dictionary", "layers.1").save_model(folder / "direct")
entry = {"id": "one", "path": "layers.1", "l0": 3.0}
hub.write_registry(folder / "pretrained_saes.yaml", "ours", "user/dictionary", "lm", [entry])
directory.files = lambda _: folder  # SAELens reads the file that lies in its own package
directory.get_pretrained_saes_directory.cache_clear()
SAE.from_pretrained("ours", "one").save_model(folder / "registry")
"""


def test_sae_lens_loads_from_the_hub_by_repository_and_by_registry(tmp_path):
    bae, x = module()
    source = bae.save_pretrained(tmp_path / "source")
    with hub_server() as server:
        environment = os.environ | {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "hf_none",
        }
        command = [sys.executable, "-c", FROM_THE_HUB, str(source), str(tmp_path)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=200, check=False
        )
    assert done.returncode == 0, done.stderr[-3000:]
    for way in ("direct", "registry"):
        again = BinaryAutoencoder.from_pretrained(tmp_path / way)
        assert again.encode(x).equal(bae.encode(x)), way


def test_importing_again_registers_once():
    from torch.optim import optimizer

    before = len(optimizer._global_optimizer_pre_hooks), len(optimizer._global_optimizer_post_hooks)
    importlib.reload(bae_fast.saelens)
    assert before == (
        len(optimizer._global_optimizer_pre_hooks),
        len(optimizer._global_optimizer_post_hooks),
    )


def test_a_module_that_searches_is_refused_in_words(tmp_path):
    x = torch.randn(100, 6)
    SearchedAutoencoder.of(BinaryAutoencoder(6, 20), x).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"BinaryAutoencoder\.from_pretrained loads it"):
        SAE.load_from_disk(tmp_path)


def test_a_configuration_that_is_none_of_ours_is_refused(tmp_path):
    with pytest.raises(ValueError, match="normalize_activations must be 'none'"):
        BinaryTrainingSAEConfig(d_in=D, d_sae=F, normalize_activations="layer_norm")
    bae = BinaryAutoencoder(D, F, d_out=5)
    with pytest.raises(ValueError, match="transcoder must be False"):
        SAE.load_from_disk(bae.save_pretrained(tmp_path))
    values = json.loads((tmp_path / "cfg.json").read_text())
    assert values["sae_lens_version"] == "6.0.0"
