"""A Binary Autoencoder beside TopK in SAELens' own trainer: train_in_saelens.py rows.npy

In place of the file it takes a folder of `bae-fast harvest`. Both methods have their defaults, are
trained with the same learning rates, and see the same rows in the same order. SAELens lives in an
environment of its own; `make test-saelens` makes one.
"""

import argparse
import json
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from bae_fast.files import write_json
from bae_fast.lm import ShardedCache
from bae_fast.saelens import BinaryTrainingSAE, BinaryTrainingSAEConfig


def read(path):
    """Rows [n, d] of a .npy file, or of a harvest of one hook, in the order of the text."""
    if not Path(path).is_dir():
        return torch.from_numpy(np.load(path)).float()
    cache = ShardedCache(path)
    (hook,) = cache.widths
    blocks = [cache.read_block(block)[hook] for block in range(cache.n_blocks)]
    cache.close()
    return torch.cat(blocks).float()


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
    parser.add_argument(
        "rows", help="A .npy file of hidden states, [n, d], or a folder of bae-fast harvest."
    )
    parser.add_argument("--features", type=int, help="By default there are 4 for each dimension.")
    parser.add_argument(
        "--k",
        type=int,
        nargs="*",
        default=[100],
        help="The features on in a row, for TopK, which is trained once with each.",
    )
    parser.add_argument("--deviation", type=float, help="Rows are scaled to this deviation.")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument(
        "--lr",
        type=float,
        nargs="*",
        default=[3e-4, 1e-3],
        help="The learning rates, one training of each method with each.",
    )
    parser.add_argument(
        "--entropy",
        type=lambda text: None if text == "default" else float(text),
        nargs="*",
        default=[None, 0.0],
        help="The weights of the entropy, one training with each: numbers, or default.",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="A JSON file for what was found.")
    options = parser.parse_args(arguments)

    rows = read(options.rows)
    if options.deviation is not None:
        rows *= options.deviation / rows.std()
    train_rows, heldout = rows[: -len(rows) // 10], rows[-len(rows) // 10 :]
    sizes = {"d_in": rows.shape[1], "d_sae": options.features or 4 * rows.shape[1]}
    binary = [BinaryTrainingSAEConfig(**sizes, entropy_coefficient=c) for c in options.entropy]
    topk = [TopKTrainingSAEConfig(**sizes, k=k) for k in options.k]
    planned = [(BinaryTrainingSAE, config, lr) for config in binary for lr in options.lr]
    planned += [(TopKTrainingSAE, config, lr) for config in topk for lr in options.lr]
    found = []
    for kind, config, lr in planned:
        torch.manual_seed(options.seed)
        ours = kind is BinaryTrainingSAE
        setting = {"method": "binary" if ours else "topk", "lr": lr}
        setting |= {"entropy": config.entropy_coefficient} if ours else {"k": config.k}
        figures = measure(train(kind(config), train_rows, options, lr), heldout)
        found.append(setting | figures)
        print(json.dumps(found[-1]), flush=True)
    if options.out is not None:
        setting = {name: getattr(options, name) for name in ("steps", "batch_size", "seed")}
        setting |= sizes | {"train_rows": len(train_rows), "heldout_rows": len(heldout)}
        setting |= {"sae_lens": version("sae-lens"), "date": date.today().isoformat()}
        write_json(options.out, setting | {"runs": found})
    return found


if __name__ == "__main__":
    main()
