"""A whole training step with its optimizer, in turns in one process.

    zero_grad, forward, loss = mse + 1e-7 H + 1e-7 D, backward, Adam

The dense program uses torch.optim.Adam as it comes, as its user writes it; ours
Adam(fused=True), as :class:`bae_fast.training.Trainer` does. bf16: products under bfloat16
autocast with rows of hidden states in bfloat16, again as the Trainer does. The learning rate is
so small that the density stays while the step is repeated; nothing depends on it otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bae_fast import binary_autoencoder
from bae_fast.ops import registry
from bae_fast.packing import n_words, unpack_rows
from bench import eager, exact, tables
from bench.exact import Closeness
from bench.inputs import SHAPES, TINY, WIDTH, half_side, implementations, tensors
from bench.timing import SECONDS, Comparison, Side, run_cases

ENTROPY_WEIGHT = COVARIANCE_WEIGHT = 1e-7
LEARNING_RATE = 1e-9

# features whose gradients are checked; the loss counts all
CHECKED = 512

# relative error allowed to the compiled program, whose bits cannot be had: a single one that it
# rounds to the other side moves the gradients by several 1e-4
COMPILED = 1e-2


class Objective(NamedTuple):
    """What a step minimises, and at which density."""

    surrogate: str
    covariance: bool
    density: float

    @property
    def width(self) -> float | None:
        """The width of the surrogate, where it has one."""
        return WIDTH if self.surrogate == "rectangle" else None


OBJECTIVES = {
    "paper": Objective("identity", True, 0.5),
    "rectangle": Objective("rectangle", True, 0.03),
    "no covariance": Objective("rectangle", False, 0.03),
}

# beyond this many features the dense side is not run: F x F floats several times over
MOST_DENSE = 16384

CASES = [
    *(("paper", *shape) for shape in SHAPES),
    *(("rectangle", *shape) for shape in SHAPES),
    ("no covariance", 512, 576, 2304),
    ("no covariance", 512, 2048, 8192),
    ("paper", 512, 1024, 32768),
]
TINY_CASES = [(name, *shape) for name in OBJECTIVES for shape in TINY]


def sides_of(f: int) -> list[str]:
    """Names for F features."""
    if f > MOST_DENSE:
        return [implementations()[0], *half_side()]
    return [*eager.programs(), *implementations(), *half_side()]


def parameters_of(tensors: list[Tensor]) -> list[Tensor]:
    """Copies of W_enc, b_enc, W_dec, b_dec that ask for a gradient."""
    return [tensor.clone().requires_grad_() for tensor in tensors[1:]]


def dense_step(
    name: str, objective: Objective, x: Tensor, parameters: list[Tensor]
) -> Callable[[], Tensor]:
    """One step of the dense program; returns the loss."""
    loss_of = eager.program(
        name,
        functools.partial(
            eager.eager_loss,
            width=objective.width,
            entropy_weight=ENTROPY_WEIGHT,
            covariance_weight=COVARIANCE_WEIGHT if objective.covariance else None,
        ),
    )
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    return _step(optimizer, lambda: loss_of(x, *parameters))


def packed_step(
    name: str, objective: Objective, x: Tensor, parameters: list[Tensor]
) -> Callable[[], Tensor]:
    """One step of an implementation, "cpp" or "cpp bf16"; returns the loss."""
    rows = x.to(exact.dtype_of(name))

    def loss_of() -> Tensor:
        with eager.autocast(exact.dtype_of(name), x.device):
            out = binary_autoencoder(
                rows, *parameters,
                surrogate=objective.surrogate, surrogate_width=objective.width,
                covariance=objective.covariance, impl=name.split()[0],
            )  # fmt: skip
            loss = (rows - out.recon).square().mean(dtype=torch.float32)
        loss = loss + ENTROPY_WEIGHT * out.entropy
        return loss if out.covariance is None else loss + COVARIANCE_WEIGHT * out.covariance

    return _step(
        torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True, capturable=x.is_cuda), loss_of
    )


def _step(optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def step() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def step_of(
    name: str, objective: Objective, x: Tensor, parameters: list[Tensor]
) -> Callable[[], Tensor]:
    """One step of any side."""
    make = dense_step if name in eager.DENSE else packed_step
    return make(name, objective, x, parameters)


def own_bits(
    name: str, objective: Objective, x: Tensor, parameters: list[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Bits and window ``[N, F]`` as a side itself rounds them."""
    W_enc, b_enc = (p.detach() for p in parameters[:2])
    width = objective.width
    if name in eager.DENSE:
        with eager.autocast(exact.dtype_of(name), x.device):
            pre = x @ W_enc + b_enc
        return pre > 0, None if width is None else pre.abs() < width
    rows = x.to(exact.dtype_of(name))
    encode = registry.BACKENDS[name.split()[0]].ops["encode"]
    words, window, *_ = encode(rows, W_enc, b_enc, None, width)
    f = W_enc.shape[1]
    return unpack_rows(words, f), None if width is None else unpack_rows(window, f)


def build(name: str, n: int, d: int, f: int, names: list[str] | None = None) -> Comparison:
    """The comparison of one objective at one shape, of the named sides or of those of a CPU."""
    objective = OBJECTIVES[name]
    given = tensors(n, d, f, objective.density)
    x = given[0]
    # the same start for every side, parameters of its own
    names = sides_of(f) if names is None else names
    parameters = {side: parameters_of(given) for side in names}
    features = torch.randperm(f)[:CHECKED]
    limits = {"compile": COMPILED, "compile bf16": 2 * COMPILED}
    right_bits, close = exact.Bits(*given[:3]), Closeness(**limits)
    known: list[tuple[Tensor, Tensor | None, exact.Gradients]] = []

    def truth(bits: Tensor, window: Tensor | None) -> exact.Gradients:
        for b, w, gradients in known:
            if torch.equal(b, bits) and (window is None or w is None or torch.equal(w, window)):
                return gradients
        gradients = exact.training_gradients(
            x, given[1:], bits, window, features,
            entropy_weight=ENTROPY_WEIGHT,
            covariance_weight=COVARIANCE_WEIGHT if objective.covariance else None,
        )  # fmt: skip
        known.append((bits, window, gradients))
        return gradients

    def check(side: str, loss: Tensor) -> None:
        bits, window = own_bits(side, objective, x, given[1:])
        right_bits.check(bits, side)
        right = truth(bits, window)
        W_enc, b_enc, W_dec, b_dec = map(exact.gradient, parameters[side])
        close.check(side, "loss", loss, right.loss)
        close.check(side, "gradient of W_enc", W_enc[:, features], right.W_enc, right.W_enc_slack)
        close.check(side, "gradient of b_enc", b_enc[features], right.b_enc, right.b_enc_slack)
        close.check(side, "gradient of W_dec", W_dec[features], right.W_dec)
        close.check(side, "gradient of b_dec", b_dec, right.b_dec)

    work = {
        "flops": 10.0 * n * d * f,
        "bytes": 4.0 * n * n_words(f),
        "optimizer_bytes": 28.0 * sum(p.numel() for p in given[1:]),
    }
    if objective.covariance:
        work["bit_macs"] = n * f * (f - 1) / 2 + float(n * f * f)
    case = {"objective": name, "n": n, "d": d, "f": f} | objective._asdict()
    sides = {s: Side(step_of(s, objective, x, parameters[s])) for s in names}
    return Comparison(case, sides, check, work)


def run(only: str = "", seconds: float = SECONDS, left_out: Collection[str] = ()) -> dict[str, Any]:
    """Every case; ``only`` those whose name holds that text; without some sides."""
    return run_cases(CASES, build, only, seconds, left_out)


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    return tables.comparison(
        result["rows"],
        {"objective": lambda row: row["objective"], "N, d, F": tables.shape},
    ) + (
        "\n\nTimes, and how many times faster than eager float32 (than `cpp` where eager was not "
        "run); medians, all sides in turns in one process, checked against float64 first. paper: "
        "identity surrogate, half of the bits on, covariance; rectangle: 3 % of the bits on, "
        "covariance; no covariance: the same without. eager, autocast (bfloat16) and compile end "
        "in Adam as it comes, ours in Adam(fused=True). The last column is the floor over the time "
        "of `cpp`. The floor is what "
        "a step would take with the products at torch's GEMM rate, the counts at the instruction "
        "ceiling and Adam at the speed of a copy; over 100% the step is faster than that. "
        + tables.ceilings(result)
        + " "
        + tables.machine(result)
    )
