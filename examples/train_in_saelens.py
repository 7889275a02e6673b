"""A Binary Autoencoder beside TopK in SAELens' own trainer: train_in_saelens.py rows.npy

Both have SAELens' defaults but for the learning rate of the Binary Autoencoder, and see the same
rows in the same order. SAELens lives in an environment of its own; `make test-saelens` makes one.
"""

import argparse
import json

import numpy as np
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from bae_fast.saelens import BinaryTrainingSAE, BinaryTrainingSAEConfig


def batches(rows, size, seed):
    """Rows in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        yield from (rows[part] for part in order.split(size) if len(part) == size)


def train(sae, rows, options, lr):
    """Train a module in SAELens' loop."""
    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=options.batch_size * options.steps,
        train_batch_size_samples=options.batch_size,
        device="cpu",
        autocast=False,
        lr=lr,
        lr_end=lr / 10,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        lr_decay_steps=options.steps // 5,
        n_restart_cycles=1,
        adam_beta1=0.9,
        adam_beta2=0.999,
        dead_feature_window=1000,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
    )
    SAETrainer(config, sae, batches(rows, options.batch_size, options.seed)).fit()
    return sae.eval()


@torch.no_grad()
def measure(sae, rows):
    """FVU, features on in a row, and the share of features that are never on."""
    error, on, counts = 0.0, 0, 0
    for block in rows.split(2048):
        features = sae.encode(block)
        error += (sae.decode(features) - block).double().square().sum().item()
        on += (features > 0).sum().item()
        counts = counts + (features > 0).sum(0)
    total = (rows - rows.mean(0)).double().square().sum().item()
    return {
        "fvu": error / total,
        "l0": on / len(rows),
        "dead": (counts == 0).double().mean().item(),
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", help="a .npy file of hidden states, [n, d]")
    parser.add_argument("--features", type=int, help="default: four times the width")
    parser.add_argument("--k", type=int, default=100, help="features on in a row, for TopK")
    parser.add_argument("--deviation", type=float, help="scale the rows to this deviation")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument(
        "--lr", type=float, default=1e-3, help="The Binary Autoencoder's learning rate."
    )
    parser.add_argument("--topk-lr", type=float, default=3e-4, help="The learning rate of TopK.")
    parser.add_argument("--entropy", type=float, default=0.0, help="The weight of the entropy.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    rows = torch.from_numpy(np.load(options.rows)).float()
    if options.deviation is not None:
        rows *= options.deviation / rows.std()
    train_rows, heldout = rows[: -len(rows) // 10], rows[-len(rows) // 10 :]
    sizes = {"d_in": rows.shape[1], "d_sae": options.features or 4 * rows.shape[1]}
    found = {}
    binary = BinaryTrainingSAEConfig(**sizes, entropy_coefficient=options.entropy)
    for name, make, lr in (
        ("binary", lambda: BinaryTrainingSAE(binary), options.lr),
        (
            "topk",
            lambda: TopKTrainingSAE(TopKTrainingSAEConfig(**sizes, k=options.k)),
            options.topk_lr,
        ),
    ):
        torch.manual_seed(options.seed)
        found[name] = measure(train(make(), train_rows, options, lr), heldout)
        print(json.dumps({"method": name, **found[name]}), flush=True)
    return found


if __name__ == "__main__":
    main()
