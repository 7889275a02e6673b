"""Every operator by itself against the dense program's part, in turns in one process.

| operator | the dense program | ours |
|---|---|---|
| encode | bits as numbers | packed bits and counts |
| decode, decoder_backward | products with bits as numbers | with packed bits |
| covariance | torch.cov and sums of absolute values | the integer numerator and signs |
| covariance_backward | autograd through it | B S from the signs |
| encoder_backward | two products, mask and sum between them | the same from packed bits |

encoder_backward has the identity surrogate at density 0.5 and rectangle at 0.03. There is no
operator for B S alone: covariance_backward is the encoder's backward with nothing but the
covariance's gradient and eight columns of x, through which its N x F result is checked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from bae_fast.codes import keep_signs
from bae_fast.ops import registry
from bae_fast.packing import column_counts, n_words, pack_rows, tail_is_zero, unpack_rows
from bench import eager, exact, tables
from bench.exact import Closeness, WrongResultError, dtype_of
from bench.inputs import DENSITIES, SHAPES, WIDTH, half_side, implementations, tensors
from bench.timing import SECONDS, Comparison, Side, run_cases

LEFT_COLUMNS = 8

Names = list[str] | None

# the shape of the README's table
SHOWN = (512, 2048, 8192)


def _op(side: str, name: str) -> Callable[..., Any]:
    return registry.BACKENDS[side.split()[0]].ops[name]


def sides_of(operator: str) -> list[str]:
    """Names; bits and their counts have no precision, so no bfloat16 side of ours."""
    half = [] if operator.startswith("covariance") else half_side()
    return [*eager.programs(), *implementations(), *half]


def _sides(
    operator: str,
    dense: Callable[..., Any],
    dense_inputs: tuple[Any, ...],
    packed: Callable[[str], Side],
    names: Names,
) -> dict[str, Side]:
    """Programs of ``dense`` on its inputs, then each of our sides."""
    return {
        name: Side(functools.partial(eager.program(name, dense), *dense_inputs))
        if name in eager.DENSE
        else packed(name)
        for name in (sides_of(operator) if names is None else names)
    }


def random_bits(n: int, f: int, density: float) -> Tensor:
    """Bits with two constant columns and a pair of equal ones."""
    torch.manual_seed(0)
    bits = torch.rand(n, f) < density
    bits[:, 0], bits[:, 1], bits[:, 2] = True, False, bits[:, 3]
    return bits


def _case(operator: str, n: int, d: int, f: int, density: float, **more: Any) -> dict[str, Any]:
    return {"operator": operator, "n": n, "d": d, "f": f, "density": density} | more


def encode(n: int, d: int, f: int, density: float, names: Names = None) -> Comparison:
    x, W_enc, b_enc, *_ = tensors(n, d, f, density)
    right = exact.Bits(x, W_enc, b_enc)

    def packed(side: str) -> Side:
        dtype = dtype_of(side)
        # fp16: weights in x's dtype; bf16: wider, as under autocast
        W = W_enc.to(dtype) if dtype == torch.float16 else W_enc
        return Side(functools.partial(_op(side, "encode"), x.to(dtype), W, b_enc, None, None))

    def check(side: str, result: Any) -> None:
        if side in eager.DENSE:
            bits = result > 0
            if not torch.equal(result, bits.to(result.dtype)):
                raise WrongResultError("bits must be 0 or 1")
        else:
            words, _, counts, n_rows = result
            bits = unpack_rows(words, f)
            if not torch.equal(counts, bits.sum(0)) or int(n_rows) != n:
                raise WrongResultError("counts are not those of the bits")
            if not tail_is_zero(words, f):
                raise WrongResultError("bits past the last feature must be zero")
        right.check(bits, side)

    work = {"flops": 2.0 * n * d * f, "bytes": 4.0 * (n * d + d * f + f) + 4.0 * n * n_words(f)}
    sides = _sides("encode", eager.encode, (x, W_enc, b_enc), packed, names)
    return Comparison(_case("encode", n, d, f, density), sides, check, work)


def decode(n: int, d: int, f: int, density: float, names: Names = None) -> Comparison:
    W_dec, b_dec = tensors(n, d, f, density)[3:]
    bits = random_bits(n, f, density)
    words, dense = pack_rows(bits), bits.float()
    close = Closeness()

    @functools.cache
    def truth() -> Tensor:
        return bits.double() @ W_dec.double() + b_dec.double()

    def packed(side: str) -> Side:
        return Side(functools.partial(_op(side, "decode"), words, W_dec, b_dec, 1, dtype_of(side)))

    def check(side: str, result: Tensor) -> None:
        close.check(side, "recon", result, truth())

    work = {"flops": 2.0 * n * d * f, "bytes": 4.0 * (n * d + d * f + d) + 4.0 * n * n_words(f)}
    sides = _sides("decode", eager.decode, (dense, W_dec, b_dec), packed, names)
    return Comparison(_case("decode", n, d, f, density), sides, check, work)


def decoder_backward(n: int, d: int, f: int, density: float, names: Names = None) -> Comparison:
    bits = random_bits(n, f, density)
    grad = torch.randn(n, d)
    words, dense = pack_rows(bits), bits.float()
    close = Closeness()

    @functools.cache
    def truth() -> tuple[Tensor, Tensor]:
        return bits.t().double() @ grad.double(), grad.double().sum(0)

    def packed(side: str) -> Side:
        op = _op(side, "decoder_backward")
        return Side(functools.partial(op, words, grad.to(dtype_of(side)), f, 1, torch.float32))

    def check(side: str, result: tuple[Tensor, Tensor]) -> None:
        close.check(side, "gradient of W_dec", result[0], truth()[0])
        close.check(side, "gradient of b_dec", result[1], truth()[1])

    work = {"flops": 2.0 * n * d * f, "bytes": 4.0 * (n * d + d * f + d) + 4.0 * n * n_words(f)}
    sides = _sides("decoder_backward", eager.decoder_backward, (dense, grad), packed, names)
    return Comparison(_case("decoder_backward", n, d, f, density), sides, check, work)


def _covariance_inputs(words: Tensor, f: int) -> tuple[Tensor, Tensor, Tensor, bool]:
    return words, column_counts(words, f), torch.tensor(len(words)), keep_signs(f, words.device)


def covariance(n: int, d: int, f: int, density: float, names: Names = None) -> Comparison:
    """Does not depend on d."""
    dense = random_bits(n, f, density).float()
    inputs = _covariance_inputs(pack_rows(dense), f)
    truth = functools.cache(functools.partial(exact.covariance_numerator, dense))

    def check(side: str, result: Any) -> None:
        if side not in eager.DENSE:
            if int(result[0]) != truth():
                raise WrongResultError(f"the numerator is {int(result[0])}; should be {truth()}")
            return
        value = torch.tensor(truth() / (n * (n - 1)), dtype=torch.float64)
        Closeness().check(side, "covariance", result, value)

    sides = _sides(
        "covariance",
        eager.absolute_covariance,
        (dense,),
        lambda side: Side(functools.partial(_op(side, "covariance"), *inputs)),
        names,
    )
    work = {
        "bit_macs": n * f * (f - 1) / 2,
        "bytes": 4.0 * n * n_words(f) + (8.0 * f * n_words(f) if inputs[3] else 0.0),
    }
    return Comparison(_case("covariance", n, d, f, density), sides, check, work)


def covariance_backward(n: int, d: int, f: int, density: float, names: Names = None) -> Comparison:
    """Does not depend on d."""
    bits = random_bits(n, f, density)
    left = torch.randn(n, LEFT_COLUMNS)
    dense = bits.float().requires_grad_()
    words, counts, total, keep = _covariance_inputs(pack_rows(bits), f)
    unused = torch.zeros(LEFT_COLUMNS, f), torch.zeros(f), torch.zeros(f, LEFT_COLUMNS)
    one = torch.ones(())
    # bf16 turns the signs of pairs next to a tie: F of them meet in every entry
    close = Closeness(autocast=5e-2)

    @functools.cache
    def truth() -> tuple[Tensor, Tensor]:
        return exact.covariance_gradient(bits.float(), left.double())

    def packed(side: str) -> Side:
        @functools.cache
        def signs() -> Tensor | None:
            found = _op(side, "covariance")(words, counts, total, keep)[1]
            return found if keep else None

        def prepare() -> tuple[Any, ...]:
            return (signs(),)

        def run(signs: Tensor | None) -> Tensor:
            return _op(side, "encoder_backward")(
                left, *unused, words, words[:0, 0], None, None, None, None, one,
                signs, words, counts, total, "identity", 1.0, 1, [False, True, True],
            )[1]  # fmt: skip

        return Side(run, prepare)

    def program(name: str) -> Side:
        forward = eager.program(name, eager.absolute_covariance)

        def run(value: Tensor) -> Tensor:
            return torch.autograd.grad(value, dense)[0]

        return Side(run, lambda: (forward(dense),))

    def check(side: str, result: Tensor) -> None:
        if side in eager.DENSE:
            result = left.double().t() @ result.double()
        close.check(side, "gradient of the bits", result, *truth())

    sides = {
        name: program(name) if name in eager.DENSE else packed(name)
        for name in (sides_of("covariance_backward") if names is None else names)
    }
    work = {
        "bit_macs": float(n * f * f),
        "bytes": 4.0 * n * n_words(f) + (8.0 * f * n_words(f) if keep else 0.0),
    }
    return Comparison(_case("covariance_backward", n, d, f, density), sides, check, work)


def encoder_backward(n: int, d: int, f: int, density: float, names: Names = None) -> Comparison:
    x, W_enc, b_enc, W_dec, _ = tensors(n, d, f, density)
    surrogate = "identity" if density == DENSITIES[0] else "rectangle"
    width = None if surrogate == "identity" else WIDTH
    grad, columns = torch.randn(n, d), 0.1 * torch.randn(f)
    pre = x @ W_enc + b_enc
    words = pack_rows(pre > 0)
    window = words[:0, 0] if width is None else pack_rows(pre.abs() < width)
    counts, total = column_counts(words, f), torch.tensor(n)
    close = Closeness()

    @functools.cache
    def truth() -> tuple[Tensor, Tensor]:
        g = grad.double() @ W_dec.double().t() + columns.double()
        if width is not None:
            g *= pre.abs() < width
        return x.double().t() @ g, g.sum(0)

    def packed(side: str) -> Side:
        dtype = dtype_of(side)
        return Side(
            functools.partial(
                _op(side, "encoder_backward"),
                x.to(dtype), W_enc, b_enc, W_dec, words, window, None, grad.to(dtype), columns,
                None, None, None, None, counts, total,
                surrogate, WIDTH, 1, [False, True, True],
            )
        )  # fmt: skip

    def check(side: str, result: tuple[Tensor, ...]) -> None:
        close.check(side, "gradient of W_enc", result[-2], truth()[0])
        close.check(side, "gradient of b_enc", result[-1], truth()[1])

    dense_inputs = (x, pre, W_dec, grad, columns, width)
    sides = _sides("encoder_backward", eager.encoder_backward, dense_inputs, packed, names)
    work = {
        "flops": 4.0 * n * d * f,
        "bytes": 4.0 * (2 * n * d + 2 * d * f + 2 * f) + 8.0 * n * n_words(f),
    }
    case = _case("encoder_backward", n, d, f, density, surrogate=surrogate)
    return Comparison(case, sides, check, work)


OPERATORS: dict[str, Callable[..., Comparison]] = {
    "encode": encode,
    "decode": decode,
    "decoder_backward": decoder_backward,
    "covariance": covariance,
    "covariance_backward": covariance_backward,
    "encoder_backward": encoder_backward,
}


def cases(shapes: list[tuple[int, int, int]]) -> list[tuple[str, int, int, int, float]]:
    """Arguments of :func:`build`; the covariance, which has no d, once for equal N and F."""
    found = []
    for operator in OPERATORS:
        seen = set()
        for n, d, f in shapes:
            if operator.startswith("covariance") and (n, f) in seen:
                continue
            seen.add((n, f))
            found += [(operator, n, d, f, density) for density in DENSITIES]
    return found


def build(operator: str, n: int, d: int, f: int, density: float, names: Names = None) -> Comparison:
    """The comparison of one operator on one input, of the named sides or of those of a CPU."""
    return OPERATORS[operator](n, d, f, density, names)


def run(only: str = "", seconds: float = SECONDS, left_out: Collection[str] = ()) -> dict[str, Any]:
    """Every operator at every shape and density; ``only`` those whose case holds that text."""
    return run_cases(cases(SHAPES), build, only, seconds, left_out)


def table(result: dict[str, Any]) -> str:
    """Markdown: one shape; the others are in the JSON."""
    n, d, f = SHOWN
    rows = [
        row
        for row in result["rows"]
        if (row["n"], row["f"]) == (n, f)
        and (row["d"] == d or row["operator"].startswith("covariance"))
    ]
    return tables.comparison(
        rows,
        {"operator": lambda row: row["operator"].replace("_", " "), "density": tables.density},
    ) + (
        f"\n\nAs above, N = {n}, d = {d}, F = {f}; the other shapes, rates and peak memory are in "
        f"`operators.json`. encoder backward: identity at density {DENSITIES[0]}, "
        f"rectangle at {DENSITIES[1]}. " + tables.ceilings(result)
    )
