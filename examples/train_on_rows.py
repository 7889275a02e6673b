"""Train a Binary Autoencoder on rows of your own: python examples/train_on_rows.py rows.npy"""

import argparse
import dataclasses

import numpy as np
import torch

import bae_fast as bf
from bae_fast.analysis import evaluate
from bae_fast.training import PRESETS, Trainer


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", help="A .npy file of hidden states, [n, d].")
    parser.add_argument("--expansion", type=int, default=4, help="Features over the width, F / d.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", default="my_bae", help="The folder of the trained model.")
    options = parser.parse_args(arguments)

    rows = torch.from_numpy(np.load(options.rows)).float()
    cut = len(rows) - len(rows) // 10  # the last tenth is held out
    d_in = rows.shape[1]
    bae = bf.BinaryAutoencoder(d_in, options.expansion * d_in)
    bae.fit_normalization_(rows[:cut])
    config = dataclasses.replace(PRESETS["sparse"], steps=options.steps)
    Trainer(bae, rows[:cut], config).fit(progress=True)
    bae.save_pretrained(options.out)

    found = evaluate(bae, rows[cut:])
    print(f"FVU {found.fvu:.3f}, {found.bits:.1f} bits a row, {found.l0:.1f} features on in a row,")
    print(f"{found.dead_share:.1%} of the features dead")
    return found


if __name__ == "__main__":
    main()
