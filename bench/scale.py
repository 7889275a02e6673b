"""Training on several processes: bytes a rank sends, and what is to be expected of large runs.

    python -m bench.scale

prints the table of docs/guide/scale.md. It is arithmetic and nothing in it was measured: products
at 60 % of an H100's 989 TFLOP/s in bfloat16, memory at 2.85 TB/s, 360 GB/s among the 8 GPUs of a
machine and 45 GB/s a GPU between machines. What a rank sends is tested against the tensors that
torch.distributed is given (tests/training/test_mesh.py).
"""

from __future__ import annotations

from typing import NamedTuple

from bae_fast.starting import SIGNALS

# doubles in the control word: a flag a signal and one of failed saves, and four numbers a job
FLAGS, NUMBERS = len(SIGNALS) + 1, 4

_PRODUCTS = 0.6 * 989e12  # operations a second
_MEMORY = 2.85e12  # bytes a second
_INSIDE, _BETWEEN = 360e9, 45e9  # bytes a second
_GPUS = 8  # of a machine
_OPERATIONS = 10  # a row, feature and dimension
# bytes of parameters, gradients and Adam's two moments that a step reads and writes, a parameter
_UPDATE = 28
_CAPACITY = 80e9

# (F, N, GPUs, R_d, R_f)
CASES = [
    (65536, 4096, 1, 1, 1),
    (65536, 4096, 8, 1, 8),
    (65536, 4096, 8, 8, 1),
    (65536, 32768, 1, 1, 1),
    (65536, 32768, 8, 1, 8),
    (65536, 32768, 8, 4, 2),
    (2**20, 4096, 8, 1, 8),
    (2**20, 32768, 8, 1, 8),
    (2**20, 32768, 64, 1, 64),
    (2**20, 32768, 64, 8, 8),
]
WIDTH = 4096


class Traffic(NamedTuple):
    """Bytes that a rank sends in a step."""

    data: float
    feature: float
    world: float

    @property
    def total(self) -> float:
        return self.data + self.feature + self.world


def ring(n_bytes: float, ranks: int, times: int = 1) -> float:
    """Bytes that a rank sends: ``times`` is 2 for an all-reduce of so many bytes, 1 for a gather
    of so many in all."""
    return times * n_bytes * (ranks - 1) / ranks


def sent_bytes(
    batch: int,
    d_in: int,
    d_sae: int,
    data: int,
    feature: int,
    *,
    covariance: bool = False,
    jobs: int = 1,
    itemsize: int = 4,
    shard_optimizer: bool = False,
) -> Traffic:
    """Bytes that a rank sends in one step without a line of the log, a revival or a checkpoint.

    Args:
        batch: rows of the whole batch, N.
        d_in, d_sae: d and F, one bit a feature.
        data, feature: R_d and R_f.
        covariance: whether the covariance has a weight: then bits travel.
        jobs: modules that are trained on the batch.
        itemsize: bytes of a parameter.
        shard_optimizer: whether moments are divided: then updated matrices travel.
    """
    n, f = batch // data, d_sae // feature
    parameters = 2 * f * d_in + f + d_in
    over_data = ring(8 * f, data, 2) + ring(itemsize * parameters, data, 2)
    if shard_optimizer:
        over_data += ring(itemsize * 2 * f * d_in, data)
    over_feature = ring(itemsize * n * d_in, feature, 2)
    if covariance:
        over_feature += ring(n * d_sae / 8, feature)
        over_data += ring(batch * d_sae / 8, data)
    control = ring(8 * (FLAGS + NUMBERS * jobs), data * feature, 2)
    return Traffic(jobs * over_data, jobs * over_feature, control)


def predicted_ms(batch: int, d_sae: int, data: int, feature: int) -> float | None:
    """Milliseconds of a step without covariance; None where a GPU's memory does not hold it."""
    n, f = batch / data, d_sae / feature
    parameters = 2 * f * WIDTH
    if 16 * parameters > _CAPACITY:  # fp32: parameters, gradients, two moments
        return None
    sent = sent_bytes(batch, WIDTH, d_sae, data, feature)
    inside_feature = feature <= _GPUS
    inside_data = data * feature <= _GPUS
    seconds = _OPERATIONS * n * WIDTH * f / _PRODUCTS + _UPDATE * parameters / _MEMORY
    seconds += sent.feature / (_INSIDE if inside_feature else _BETWEEN)
    seconds += sent.data / (_INSIDE if inside_data else _BETWEEN)
    return seconds * 1e3


def table() -> str:
    """The predictions as Markdown."""
    lines = [
        "| F | N | GPUs | data x feature | ms a step | MB a GPU sends: feature, data |",
        "|---|---|---|---|---|---|",
    ]
    for d_sae, batch, gpus, data, feature in CASES:
        took = predicted_ms(batch, d_sae, data, feature)
        sent = sent_bytes(batch, WIDTH, d_sae, data, feature)
        said = "does not fit" if took is None else f"{took:.3g}"
        lines.append(
            f"| {d_sae:,} | {batch:,} | {gpus} | {data} x {feature} | {said} | "
            f"{sent.feature / 1e6:,.0f}, {sent.data / 1e6:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
