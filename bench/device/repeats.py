"""What is made again must be the same to the last bit: a decode, and a run in a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import bae_fast as bf
from bae_fast.training import Graphs, Trainer, TrainingConfig
from bench import operators
from bench.exact import WrongResultError

# of a decode on one input
REPEATS = 50
# steps of a training run that is made with and without a CUDA graph
TRAINED = 16


def check_repeats(impl: str, n: int, d: int, f: int, density: float) -> int:
    """Decode of one input in bf16, again and again: every bit of the result is the same.

    Raises:
        WrongResultError: it is not; or the first result is off.
    """
    comparison = operators.build("decode", n, d, f, density, ["autocast", f"{impl} bf16"])
    side = comparison.sides[f"{impl} bf16"]

    def bits() -> Tensor:
        result = side.run(*side.prepare())
        comparison.check(f"{impl} bf16", result)
        return result.view(torch.int16).clone()

    right = bits()
    for repeat in range(1, REPEATS):
        other = side.run(*side.prepare()).view(torch.int16)
        if not torch.equal(other, right):
            raise WrongResultError(
                f"decode gave other bits in call {repeat + 1} than in the first: "
                f"{int((other != right).sum())} of {right.numel()} numbers"
            )
    return REPEATS


def check_trainer(impl: str, device: str, graphs: Graphs | None = None) -> int:
    """A training run with its steps in a CUDA graph is the run without, to the last bit.

    Learning rates are exact in float32, so nothing may differ.

    Args:
        graphs: how steps are captured; None: by CUDA graphs.

    Raises:
        WrongResultError: a line of the log or a parameter differs.
        RuntimeError: the steps were not captured.
    """
    rows = torch.randn(960, 48)
    plain, plain_state = _trained(rows, impl, device, False, graphs)
    replayed, replayed_state = _trained(rows, impl, device, True, graphs)
    for number, (line, other) in enumerate(zip(plain, replayed, strict=True), 1):
        if line != other:
            raise WrongResultError(f"step {number} is {other} in a graph and {line} without")
    for name, right in plain_state.items():
        got = replayed_state[name]
        if not torch.equal(right, got):
            error = (right - got).abs().max()
            raise WrongResultError(f"{name} of the run in a graph differs by up to {error:.3g}")
    return TRAINED


def _trained(
    rows: Tensor, impl: str, device: str, in_graph: bool, graphs: Graphs | None
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Lines of the log without their times, and parameters."""
    config = TrainingConfig(
        steps=TRAINED, batch_size=96, lr=2.0**-9, decay_from=1.0, refit=False, revive_every=7,
        entropy_from=0.5, bank_batches=3, precision="auto" if device == "cuda" else "float32",
        cuda_graph=in_graph,
    )  # fmt: skip
    torch.manual_seed(0)
    bae = bf.BinaryAutoencoder(48, 256, impl=impl, device=device).fit_normalization_(rows)
    trainer = Trainer(bae, rows, config, graphs=graphs)
    lines = trainer.fit(log_every=1)
    if in_graph and trainer.learner.uncaptured is not None:
        raise RuntimeError(f"steps were not captured: {trainer.learner.uncaptured}")
    return [{**line, "seconds": 0} for line in lines], bae.state_dict()
