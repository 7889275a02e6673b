"""Matrix products with fp32 (or wider) sums, and the sizes of chunks; shared by backends.

A half-precision product on a GPU can be returned in fp32. On a CPU it cannot: the product is
summed in fp32 and rounded once, so the encoder's bias, which must be added before any rounding,
is carried through the product itself (:class:`Preactivation`). A CPU that does not multiply the
dtype takes fp32 products of the widened operands (:func:`product_dtype`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bae_fast.devices import cpu_has_bfloat16
from bae_fast.ops.registry import environment_megabytes
from bae_fast.packing import WORD_BITS, bit_weights, n_words, unpack_rows

HALF = (torch.bfloat16, torch.float16)

# Scratch of one [N, chunk] fp32 tensor. On a CPU it should sit in the outer cache; on a GPU a
# launch costs more than the cache gains.
_SCRATCH_MB = {"cpu": 8, "cuda": 256}
ENV_SCRATCH = "BAE_FAST_SCRATCH_MB"
MIN_CHUNK = 256

# rows decoded at a time
ROW_BLOCK = 8192

# AMX and VNNI read bf16 in pairs and tiles of 32; an odd inner size falls off that path
_INNER_ALIGN = 32


def raw(body: Callable[..., Any]) -> Callable[..., Any]:
    """Run an operator's body without gradient and without autocast.

    A Python body would otherwise be differentiated through its inside (with silent zeros through
    the step), and autocast would round exact integer products to half precision.
    """

    @functools.wraps(body)
    def run(*args: Any) -> Any:
        with torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
            return body(*args)

    return run


def column_chunks(
    n_rows: int, n_columns: int, n_bits: int, device: torch.device
) -> Iterator[tuple[int, int]]:
    """Ranges of columns that start on a word and on a feature, [N, chunk] fp32 within budget."""
    megabytes = environment_megabytes(ENV_SCRATCH, _SCRATCH_MB.get(device.type, 64))
    unit = WORD_BITS * n_bits
    chunk = max(megabytes * 2**20 // (4 * max(n_rows, 1)), MIN_CHUNK)
    chunk = max(chunk // unit, 1) * unit
    for start in range(0, n_columns, chunk):
        yield start, min(start + chunk, n_columns)


def half_chunks(n_rows: int, n_columns: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges of columns of which a half-precision copy of a weight is within the budget."""
    return column_chunks(-(-n_rows // 2), n_columns, 1, device)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.promote_types(dtype, torch.float32)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that operands of a product of ``dtype`` have on a device.

    Where a CPU does not multiply bfloat16, torch's product is a loop over numbers, tens of times
    slower than fp32; in float16 no product of torch's is faster than fp32 on a CPU.
    """
    if device.type == "cpu" and (
        dtype == torch.float16 or (dtype == torch.bfloat16 and not cpu_has_bfloat16())
    ):
        return torch.float32
    return dtype


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for operands of one dtype, in the widest dtype the device returns cheaply."""
    if a.dtype in HALF and a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b for operands of one dtype, rounded once; written in place where sums are fp32."""
    if a.dtype == out.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.dtype in HALF and out.dtype == torch.float32 and out.device.type != "cpu":
        torch.mm(a, b, out_dtype=torch.float32, out=out)  # a copy would move twice 4 bytes more
    else:
        out.copy_(product(a, b))


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, with ``total`` in fp32 or wider."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += product(a, b)


def empty_gradients(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients that ``encoder_backward`` is asked for, without elements for others.

    That of x is zero and as wide as its sums; the others are contiguous and not set.
    """
    need_x, need_W, need_b = needs
    return (
        x.new_zeros(x.shape if need_x else 0, dtype=sum_dtype(x.dtype)),
        torch.empty_like(W_enc if need_W else W_enc[:0, 0], memory_format=torch.contiguous_format),
        torch.empty_like(b_enc if need_b else b_enc[:0]),
    )


def unpack_values(words: Tensor, start: int, stop: int, n_bits: int, dtype: torch.dtype) -> Tensor:
    """Values ``[N, (stop - start) / k]`` of the features in columns start .. stop."""
    bits = unpack_rows(words[:, start // WORD_BITS : n_words(stop)], stop - start, dtype)
    if n_bits == 1:
        return bits
    return bits.unflatten(1, (-1, n_bits)) @ bit_weights(n_bits, dtype, words.device)


def decode_by_chunks(
    words: Tensor, W_dec: Tensor, b_dec: Tensor, n_bits: int, dtype: torch.dtype
) -> Tensor:
    """value(B) W_dec + b_dec in ``dtype`` by dense products of unpacked blocks: ``[N, d_out]``."""
    operands = product_dtype(dtype, words.device)
    out = torch.empty(words.shape[0], W_dec.shape[1], dtype=dtype, device=words.device)
    for top in range(0, words.shape[0], ROW_BLOCK):
        rows = words[top : top + ROW_BLOCK]
        recon = b_dec.to(sum_dtype(dtype)).expand(len(rows), -1).clone()
        for start, stop in column_chunks(len(rows), W_dec.shape[0] * n_bits, n_bits, words.device):
            values = unpack_values(rows, start, stop, n_bits, operands)
            accumulate(recon, values, W_dec[start // n_bits : stop // n_bits].to(operands))
        out[top : top + ROW_BLOCK] = recon
    return out


def decoder_gradient_by_chunks(
    words: Tensor, grad_recon: Tensor, n_columns: int, n_bits: int, dtype: torch.dtype
) -> Tensor:
    """value(B)^T grad_recon in ``dtype`` by dense products of unpacked chunks: ``[F, d_out]``."""
    n, d_out = grad_recon.shape
    grad_recon = grad_recon.to(product_dtype(grad_recon.dtype, words.device))
    grad_W = torch.empty(n_columns // n_bits, d_out, dtype=dtype, device=words.device)
    for start, stop in column_chunks(n, n_columns, n_bits, words.device):
        values = unpack_values(words, start, stop, n_bits, grad_recon.dtype)
        grad_W[start // n_bits : stop // n_bits] = product(values.t(), grad_recon)
    return grad_W


class Preactivation:
    """x W + b over chunks of columns, the bias added in fp32 or wider before any rounding.

    On a CPU that multiplies bf16 the bias is split into three bf16 parts whose sum is the fp32
    bias, and the parts are three more rows of W against three columns of ones of x: the product's
    fp32 sum then contains the bias, and its single rounding keeps the sign of every pre-activation.
    """

    def __init__(self, x: Tensor) -> None:
        x = x.to(product_dtype(x.dtype, x.device))
        self.x = x
        self.d = x.shape[1]
        if x.dtype == torch.bfloat16 and x.device.type == "cpu":
            inner = -(-(self.d + 3) // _INNER_ALIGN) * _INNER_ALIGN
            self.x = x.new_zeros(x.shape[0], inner)
            self.x[:, : self.d] = x
            self.x[:, self.d : self.d + 3] = 1

    def without_bias(
        self, weight: Tensor, bias: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The product and the bias still to be added to it, None where it contains the bias.

        ``memory`` is contiguous, of x's dtype and large enough; the product may lie there.
        """
        if self.x.dtype in HALF:
            return self(weight, bias), None
        n, columns = len(self.x), weight.shape[1]
        out = memory[: n * columns].view(n, columns)
        torch.mm(self.x, weight.to(self.x.dtype), out=out)
        return out, bias.to(self.x.dtype).contiguous()

    def __call__(self, weight: Tensor, bias: Tensor) -> Tensor:
        """``[N, chunk]`` for weight ``[d, chunk]`` and bias ``[chunk]`` of any floating dtype."""
        x, d = self.x, self.d
        if x.dtype not in HALF:
            return torch.addmm(bias.to(x.dtype), x, weight.to(x.dtype))
        if x.device.type == "cuda":
            return product(x, weight.to(x.dtype)).add_(bias.float())
        extended = weight.new_zeros((x.shape[1], weight.shape[1]), dtype=x.dtype)
        extended[:d] = weight
        # a bias beyond bf16's largest number would round to infinity, and infinity minus itself is
        # NaN: the first is held at that number, the second has no rest
        largest = torch.finfo(x.dtype).max
        rest = torch.where(bias.isinf(), bias, bias.clamp(-largest, largest)).float()
        for row in range(d, d + 3):
            extended[row] = rest
            rest = torch.where(rest.isinf(), 0, rest - extended[row].float())
        return torch.mm(x, extended)
