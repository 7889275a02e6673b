"""The recipe's step beside that of a plain TopK autoencoder, whole and with the optimizer.

    TopK    pre = x W_enc + b_enc, k largest, relu, decode by embedding_bag, mse,
            Adam(fused=True): what its users write
    ours    encode, decode, mse + 1.5e-4 H over a bank of 32 past batches + exact differences of
            the error (multilinear), Adam(fused=True): the `sparse` preset, without revival

Densities as a trained code has them: 2 k ones a row, log-normal over the columns, and a window that
holds 3.4 times as many entries. Each program runs in float32 and under bfloat16 autocast (TopK only
where bfloat16 is native); the better of TopK's two is what ours is held against.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, mse_loss

from bae_fast import binary_autoencoder
from bae_fast.devices import has_bfloat16
from bae_fast.functional import squared_error
from bae_fast.ops import registry
from bae_fast.packing import n_words, unpack_rows
from bae_fast.training import PRESETS, CodeBank
from bench import eager, exact, tables
from bench.exact import WrongResultError
from bench.inputs import implementations
from bench.step import CHECKED, LEARNING_RATE, parameters_of
from bench.timing import SECONDS, Comparison, Side, run_cases

# (N, d, F, k)
CASES = [
    (512, 576, 2304, 16),
    (4096, 576, 2304, 32),
    (2048, 1024, 16384, 32),
    (2048, 2048, 32768, 32),
]
ONES = 2  # a row, times k
WINDOW = 3.4  # entries, times ones
SPREAD = 1.0  # standard deviation of the logarithm of a column's density
MOST_DENSE = 0.9
RECIPE = PRESETS["sparse"]

# relative errors allowed to a program that sums in float32, and to one that rounds to bfloat16
LIMITS = {False: 1e-5, True: 2e-2}


def trained(n: int, d: int, f: int, k: int) -> tuple[list[Tensor], float]:
    """x and the four parameters as :func:`bench.inputs.tensors`, with log-normal densities; and
    the width of the window."""
    torch.manual_seed(0)
    x = torch.randn(n, d)
    W_enc = torch.randn(d, f) / d**0.5
    density = torch.exp(SPREAD * torch.randn(f, dtype=torch.float64))
    density = (density * (ONES * k / f) / density.mean()).clamp(max=MOST_DENSE)
    mean = torch.special.ndtri(density)
    b_enc = W_enc.norm(dim=0) * mean.float()
    low, high = 0.0, 8.0
    for _ in range(50):
        width = (low + high) / 2
        inside = torch.special.ndtr(mean + width) - torch.special.ndtr(mean - width)
        low, high = (width, high) if inside.mean() < WINDOW * density.mean() else (low, width)
    return [x, W_enc, b_enc, torch.randn(f, d) / f**0.5, 0.1 * torch.randn(d)], high


def topk_parts(x: Tensor, parameters: list[Tensor], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, indices ``[N, k]``, values ``[N, k]``) of the TopK program."""
    W_enc, b_enc, W_dec, b_dec = parameters
    values, indices = (x @ W_enc + b_enc).topk(k, dim=-1)
    values = values.relu()
    recon = embedding_bag(indices, W_dec, per_sample_weights=values.to(W_dec.dtype), mode="sum")
    return mse_loss(recon + b_dec, x), indices, values


def topk_step(name: str, x: Tensor, parameters: list[Tensor], k: int) -> Callable[[], Tensor]:
    """One step of TopK; returns the loss."""
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad()
        with eager.autocast(exact.dtype_of(name), x.device):
            loss, *_ = topk_parts(x, parameters, k)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def recipe_step(
    name: str, x: Tensor, parameters: list[Tensor], width: float
) -> Callable[[], Tensor]:
    """One step of the recipe, as :class:`bae_fast.training.Trainer` makes it; returns the loss."""
    optimizer = torch.optim.Adam(
        parameters, lr=LEARNING_RATE, betas=RECIPE.betas, eps=RECIPE.eps, fused=True
    )
    bank = CodeBank(RECIPE.bank_batches)
    rows = x.to(exact.dtype_of(name))

    def step() -> Tensor:
        past = bank.statistics(words=False) if len(bank) else None
        with eager.autocast(exact.dtype_of(name), x.device):
            out = binary_autoencoder(
                rows, *parameters, surrogate="rectangle", surrogate_width=width, past=past,
                multilinear=True, impl=name.split()[0],
            )  # fmt: skip
            squares = squared_error(out.recon, rows, impl=name.split()[0])
        assert out.variance is not None
        terms = RECIPE.entropy_weight * out.entropy
        if past is not None:
            terms = terms * (1 + past.n_rows / len(x))
        loss = (squares + out.variance) / x.numel() + terms
        bank.append(out.code)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _close(what: str, got: Tensor, right: Tensor, limit: float) -> None:
    error = exact.relative_error(got.detach(), right)
    if error > limit:
        raise WrongResultError(f"{what} is off by {error:.1e} of its norm; allowed {limit:.1e}")


def build(n: int, d: int, f: int, k: int) -> Comparison:
    """The comparison at one shape; TopK in float32 comes first."""
    given, width = trained(n, d, f, k)
    x = given[0]
    ours = [implementations()[0], f"{implementations()[0]} bf16"]
    # where bfloat16 is not native, torch's products of it are tens of times slower
    names = ["topk", *(["topk bf16"] if has_bfloat16("cpu") else []), *ours]
    parameters = {name: parameters_of(given) for name in names}
    features = torch.randperm(f)[:CHECKED]

    def check_topk(name: str, loss: Tensor) -> None:
        """Loss and gradient of W_dec against float64 of the features that it chose itself."""
        with torch.no_grad(), eager.autocast(exact.dtype_of(name), x.device):
            _, indices, values = topk_parts(x, given[1:], k)
        W_dec, b_dec = (t.double() for t in given[3:])
        weights = values.double()
        recon = embedding_bag(indices, W_dec, per_sample_weights=weights, mode="sum") + b_dec
        error = x.double() - recon
        limit = LIMITS[exact.is_half(name)]
        _close("loss", loss, error.square().mean(), limit)
        _close("gradient of W_dec", exact.gradient(parameters[name][2])[features], torch.stack([
            -2 / x.numel() * (weights * (indices == j)).sum(1) @ error for j in features
        ]), limit)  # fmt: skip

    def check(name: str, loss: Tensor) -> None:
        half = exact.is_half(name)
        if name.startswith("topk"):
            check_topk(name, loss)
            return
        rows = x.to(exact.dtype_of(name))
        encode = registry.BACKENDS[name.split()[0]].ops["encode"]
        words, window, *_ = encode(rows, *given[1:3], None, width)
        bits, inside = unpack_rows(words, f), unpack_rows(window, f)
        right = exact.training_gradients(
            rows.float(), given[1:], bits, inside, features,
            entropy_weight=RECIPE.entropy_weight, covariance_weight=None, variance_weight=1.0,
        )  # fmt: skip
        W_enc, b_enc, W_dec, b_dec = map(exact.gradient, parameters[name])
        _close("loss", loss, right.loss, LIMITS[half])
        _close("gradient of W_enc", W_enc[:, features], right.W_enc, LIMITS[half])
        _close("gradient of b_enc", b_enc[features], right.b_enc, LIMITS[half])
        _close("gradient of W_dec", W_dec[features], right.W_dec, LIMITS[half])
        _close("gradient of b_dec", b_dec, right.b_dec, LIMITS[half])

    steps = {
        name: topk_step(name, x, parameters[name], k)
        if name.startswith("topk")
        else recipe_step(name, x, parameters[name], width)
        for name in names
    }
    # what neither can do without: encode's product, and the optimizer
    work = {
        "flops": 2.0 * n * d * f,
        "bytes": 4.0 * n * n_words(f),
        "optimizer_bytes": 28.0 * sum(p.numel() for p in given[1:]),
    }
    case = {"n": n, "d": d, "f": f, "k": k, "density": ONES * k / f, "width": round(width, 3)}
    return Comparison(case, {name: Side(step) for name, step in steps.items()}, check, work)


def run(only: str = "", seconds: float = SECONDS) -> dict[str, Any]:
    """Every case; ``only`` those whose name holds that text."""
    return run_cases(CASES, build, only, seconds)


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    body = []
    for row in result["rows"]:
        sides = row["sides"]
        best = {
            kind: min(s.get("seconds", math.inf) for n, s in sides.items() if ("topk" in n) == kind)
            for kind in (True, False)
        }
        body.append(
            [
                f"{tables.shape(row)}, {row['k']}",
                *(
                    tables.milliseconds(side["seconds"]) if "seconds" in side else "refused"
                    for side in sides.values()
                ),
                f"{best[True] / best[False]:.1f}",
            ]
        )
    names = next(iter(result["rows"]))["sides"]
    header = ["N, d, F, k", *(f"`{name}`" for name in names), "best against best"]
    return tables.markdown(header, body) + (
        "\n\nA whole training step with its optimizer: a plain TopK autoencoder (dense encode, "
        "topk, embedding_bag, fused Adam) and the `sparse` recipe with 2 k ones a row, in float32 "
        "and under bfloat16 autocast (TopK where it is native); medians, in turns in one "
        "process. Last column: the faster TopK's time over the faster of ours. "
        + tables.ceilings(result)
        + " "
        + tables.machine(result)
    )
