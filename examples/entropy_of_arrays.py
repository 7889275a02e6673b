"""The entropy of a set of vectors of your own: python examples/entropy_of_arrays.py rows.npy"""

import argparse
import dataclasses

import numpy as np
import torch

from bae_fast.entropy import fit_bae, measure
from bae_fast.entropy.fit import STARTS


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", help="A .npy file of vectors, [n, d].")
    parser.add_argument(
        "--features", type=int, required=True, help="About twice the dimensions that they span."
    )
    parser.add_argument("--steps", type=int, help="Without it: the start's own.")
    options = parser.parse_args(arguments)

    rows = torch.from_numpy(np.load(options.rows)).float()
    cut = len(rows) - len(rows) // 4  # the estimate is of rows that were not trained on
    config = STARTS["components"]
    if options.steps is not None:
        config = dataclasses.replace(config, steps=options.steps)
    found = measure(fit_bae(rows[:cut], options.features, config), rows[cut:])
    print(f"FVU {found['fvu']:.4f}: near 0, or the code does not tell the vectors' bits")
    for name in ("marginal", "tree", "chain"):
        print(f"{name:8} {found[name]:.2f} bits")
    return found


if __name__ == "__main__":
    main()
