"""Train one autoencoder on several processes, each with its own features, and go on after a stop.

    torchrun --standalone --nproc-per-node 2 examples/train_on_processes.py rows.npy --out runs/a

The same call after Ctrl-C or a kill goes on from the last checkpoint. Without torchrun it runs on
one process, and gives the same batches.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import bae_fast as bf
from bae_fast.distributed import Mesh
from bae_fast.training import Job, JobTrainer, MemorySupply, RunConfig, TrainingConfig


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, and give the last line of every job's log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("runs/processes"))
    options = parser.parse_args(argv)

    mesh = None
    if "RANK" in os.environ:  # torchrun sets it
        dist.init_process_group("gloo")
        mesh = Mesh(data=1, feature=dist.get_world_size())
    rows = torch.from_numpy(np.load(options.rows))
    cut = len(rows) - len(rows) // 10
    torch.manual_seed(0)  # every process makes the same whole module and keeps its part
    bae = bf.BinaryAutoencoder(rows.shape[1], options.features).fit_normalization_(rows[:cut])

    # two weights of the entropy from the same batches
    jobs = []
    for name, weight in (("few bits", 1e-3), ("many bits", 1e-4)):
        config = TrainingConfig(steps=options.steps, batch_size=128, entropy_weight=weight)
        copied = bf.BinaryAutoencoder(rows.shape[1], options.features)
        copied.load_state_dict(bae.state_dict())
        jobs.append(Job(name, copied, config, hook="rows"))
    supply = MemorySupply(rows[:cut], heldout=rows[cut:], streams=8)
    run = RunConfig(out=options.out, checkpoint_every=50, evaluate_every=50)
    trainer = JobTrainer(jobs, supply, run, mesh=mesh)
    trainer.resume()
    lines = trainer.fit()
    trainer.close()
    if trainer.is_first:
        for name, line in lines.items():
            print(f"{name}: FVU {line['heldout_fvu']:.3f}, {line['entropy_bits']:.1f} bits")
    if mesh is not None:
        dist.destroy_process_group()
    return lines


if __name__ == "__main__":
    main()
