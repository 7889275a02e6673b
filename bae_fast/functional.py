"""The layer as functions: one autograd Function over the packed operators.

Kept between forward and backward: x and the parameters themselves, the packed bits, the packed
window of the ``rectangle`` surrogate, the counts, and the sign planes of the covariance (or
nothing, where they are recomputed).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bae_fast import reference
from bae_fast.codes import BinaryCode, check_covariance_size, keep_signs
from bae_fast.ops import registry
from bae_fast.packing import pack_rows
from bae_fast.statistics import CodeStatistics, entropy_bits, entropy_gradient
from bae_fast.surrogates import resolve_surrogate


class BAEOutput(NamedTuple):
    """What one forward pass gives.

    Attributes:
        recon: ``[..., d_out]`` in the compute dtype (autocast's where that is active).
        entropy: ``[]``, H in bits, summed over columns; float32 (float64 for float64 input).
        covariance: ``[]``, D, of the same dtype as entropy; None where it was not asked for.
        code: the bits, packed; no gradient.
    """

    recon: Tensor
    entropy: Tensor
    covariance: Tensor | None
    code: BinaryCode


def _ops(name: str) -> dict[str, Callable[..., Any]]:
    return registry.BACKENDS[name].ops


class _PackedAutoencoder(torch.autograd.Function):
    """(x, parameters) -> (recon, entropy, covariance) and, without gradient, the packed state."""

    generate_vmap_rule = False

    @staticmethod
    def forward(
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        row_mask: Tensor | None,
        stats_n_rows: Tensor | None,
        stats_counts: Tensor | None,
        stats_words: Tensor | None,
        stats_numerator: Tensor | None,
        stats_signs: Tensor | None,
        impl: str,
        surrogate: str,
        width: float,
        n_bits: int,
        want_covariance: bool,
        store_signs: bool,
    ) -> tuple[Tensor, ...]:
        ops = _ops(impl)
        window_width = width if surrogate == "rectangle" else None
        words, window, counts, n_rows = ops["encode"](x, W_enc, b_enc, row_mask, window_width)
        recon = ops["decode"](words, W_dec, b_dec, n_bits, x.dtype)

        wide = torch.promote_types(x.dtype, torch.float32)
        counted, total = counts, n_rows
        if stats_counts is not None and stats_n_rows is not None:
            counted, total = stats_counts, stats_n_rows
        entropy = entropy_bits(counted, total).to(wide)
        signs = words.new_empty(0)
        covariance = entropy.new_zeros(())
        if want_covariance:
            numerator = stats_numerator
            if stats_counts is None:
                numerator, signs = ops["covariance"](words, counts, n_rows, store_signs)
            pairs = total.double() * (total.double() - 1)
            covariance = (numerator / pairs).to(wide)
        return recon, entropy, covariance, words, window, counts, n_rows, signs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, W_enc, b_enc, W_dec, b_dec, row_mask = inputs[:6]
        stats_n_rows, stats_counts, stats_words, _, stats_signs = inputs[6:11]
        ctx.impl, ctx.surrogate, ctx.width, ctx.n_bits = inputs[11:15]
        want_covariance, store_signs = inputs[15:17]
        _, _, _, words, window, counts, n_rows, signs = output
        ctx.mark_non_differentiable(words, window, counts, n_rows, signs)
        ctx.set_materialize_grads(False)
        if stats_counts is not None:
            n_rows, counts = stats_n_rows, stats_counts
            ctx.has_signs, signs = stats_signs is not None, stats_signs
        else:
            ctx.has_signs = want_covariance and store_signs
            stats_words = words if want_covariance else None
        ctx.save_for_backward(
            x, W_enc, b_enc, W_dec, b_dec, row_mask, words, window,
            n_rows, counts, stats_words, signs,
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_recon: Tensor | None,
        grad_entropy: Tensor | None,
        grad_covariance: Tensor | None,
        *_: None,
    ) -> tuple[Tensor | None, ...]:
        (
            x,
            W_enc,
            b_enc,
            W_dec,
            b_dec,
            row_mask,
            words,
            window,
            n_rows,
            counts,
            stats_words,
            signs,
        ) = ctx.saved_tensors
        ops = _ops(ctx.impl)
        need_x, need_W_enc, need_b_enc, need_W_dec, need_b_dec = ctx.needs_input_grad[:5]
        grads: list[Tensor | None] = [None] * 5

        if grad_recon is not None:
            if row_mask is not None:
                grad_recon = grad_recon.masked_fill(~row_mask[:, None], 0)
            if need_W_dec or need_b_dec:
                grad_W, grad_b = ops["decoder_backward"](
                    words, grad_recon, W_enc.shape[1], ctx.n_bits, W_dec.dtype
                )
                grads[3] = grad_W if need_W_dec else None
                grads[4] = grad_b.to(b_dec.dtype) if need_b_dec else None

        used = not (grad_recon is None and grad_entropy is None and grad_covariance is None)
        if used and (need_x or need_W_enc or need_b_enc):
            columns = None
            if grad_entropy is not None:
                columns = entropy_gradient(counts, n_rows) * grad_entropy
            grad_x, grad_W, grad_b = ops["encoder_backward"](
                x, W_enc, b_enc, W_dec, words, window, row_mask,
                grad_recon, columns, grad_covariance,
                signs if ctx.has_signs else None, stats_words, counts, n_rows,
                ctx.surrogate, ctx.width, ctx.n_bits, [need_x, need_W_enc, need_b_enc],
            )  # fmt: skip
            grads[0] = grad_x if need_x else None
            grads[1] = grad_W if need_W_enc else None
            grads[2] = grad_b if need_b_enc else None
        return *grads, *[None] * 12

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError(
            "binary_autoencoder has no vmap: pass x with leading dimensions [..., d_in]"
        )


# -- arguments ---------------------------------------------------------------------------------


def compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where autocast is active for x's device, else x's own."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _require(name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    sizes = tuple(tensor.shape)
    if len(sizes) != len(shape) or any(
        isinstance(s, int) and s != t for s, t in zip(shape, sizes, strict=True)
    ):
        expected = ", ".join(str(s) for s in shape)
        raise ValueError(f"{name} must have shape [{expected}]; got {list(sizes)}")


def _check_parameters(x: Tensor, parameters: dict[str, Tensor]) -> None:
    """One device; one floating dtype outside autocast."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor; got {type(x).__name__}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"x must be floating point; got {x.dtype}")
    autocast = torch.is_autocast_enabled(x.device.type)
    for name, tensor in parameters.items():
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}; got {tensor.device}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point; got {tensor.dtype}")
        if tensor.dtype != x.dtype and not autocast:
            raise TypeError(
                f"{name} must have x's dtype {x.dtype} outside autocast; got {tensor.dtype}"
            )


def _check_x(
    x: Tensor, W_enc: Tensor, n_bits: int, mask: Tensor | None, check_finite: bool
) -> None:
    if x.dim() < 1 or x.shape[-1] != W_enc.shape[0]:
        raise ValueError(f"x must have shape [..., {W_enc.shape[0]}]; got {list(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"x must hold at least one row; got shape {list(x.shape)}")
    if not isinstance(n_bits, int) or n_bits < 1 or W_enc.shape[1] % n_bits:
        raise ValueError(
            f"n_bits must be an int >= 1 that divides the {W_enc.shape[1]} columns of W_enc; "
            f"got {n_bits!r}"
        )
    if mask is not None and (
        mask.dtype != torch.bool or mask.shape != x.shape[:-1] or mask.device != x.device
    ):
        raise ValueError(
            f"mask must be bool {list(x.shape[:-1])} on {x.device}; "
            f"got {mask.dtype} {list(mask.shape)} on {mask.device}"
        )
    if check_finite:
        finite = torch.isfinite(x)
        if not bool(finite.all()):
            raise ValueError(
                f"x must be finite; got {int((~finite).sum())} NaN or Inf of {x.numel()}"
            )


def _as_code(
    words: Tensor,
    counts: Tensor | None,
    lead: torch.Size,
    n_columns: int,
    n_bits: int,
    mask: Tensor | None,
) -> BinaryCode:
    """Words [N, W] in the leading shape of the hidden states."""
    words = words.view(*lead, words.shape[-1])
    return BinaryCode(words, n_columns, n_bits=n_bits, row_mask=mask, counts=counts)


# -- functions ---------------------------------------------------------------------------------


def binary_autoencoder(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    *,
    surrogate: str = "rectangle",
    surrogate_width: float | None = None,
    n_bits: int = 1,
    covariance: bool = False,
    mask: Tensor | None = None,
    stats: CodeStatistics | None = None,
    impl: str = "auto",
    check_finite: bool = False,
) -> BAEOutput:
    """Encode to bits, decode, and measure the bits: arXiv 2509.20997, section 3.

    Args:
        x: ``[..., d_in]``, floating.
        W_enc, b_enc: ``[d_in, k F]``, ``[k F]`` with k = ``n_bits``; bit i of feature j is
            column j k + i, least significant first.
        W_dec, b_dec: ``[F, d_out]``, ``[d_out]``; d_out may differ from d_in (transcoder).
        surrogate, surrogate_width: gradient through the step, see :mod:`bae_fast.surrogates`.
        covariance: also compute D, which costs O(F^2 N) bit operations.
        mask: bool ``[...]``; rows where it is False get zero bits, no gradient, and do not count.
        stats: statistics of more rows than x, which replace the call's own
            (:class:`bae_fast.CodeStatistics`). Without it the statistics are those of this call;
            averaging calls is then another loss.
        impl: "auto", "reference", "torch", "cpp", "triton" or "cuda"; an explicit choice never
            falls back.
        check_finite: raise on NaN or Inf in x (synchronises a GPU).

    Returns:
        :class:`BAEOutput`; recon, entropy and covariance are differentiable once, in x and the
        four parameters.

    Raises:
        TypeError: x or a parameter is not floating point, or dtypes differ outside autocast.
        ValueError: wrong shape, device, mask or option, an empty batch, a covariance of fewer
            than two rows or beyond int64, or non-finite x when checking.
        BackendUnavailableError: an explicit ``impl`` cannot serve the call.
    """
    parameters = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    _check_parameters(x, parameters)
    _require("W_enc", W_enc, ("d_in", "k F"))
    _check_x(x, W_enc, n_bits, mask, check_finite)
    n_columns = W_enc.shape[1]
    _require("b_enc", b_enc, (n_columns,))
    _require("W_dec", W_dec, (n_columns // n_bits, "d_out"))
    _require("b_dec", b_dec, (W_dec.shape[1],))
    surrogate, width = resolve_surrogate(surrogate, surrogate_width)

    lead = x.shape[:-1]
    dtype = compute_dtype(x)
    rows = x.reshape(-1, x.shape[-1])
    row_mask = None if mask is None else mask.reshape(-1)
    if stats is not None:
        _require("stats.counts", stats.counts, (n_columns,))
        if covariance and stats.numerator is None:
            raise ValueError("stats has no covariance: make it with statistics(covariance=True)")
    elif covariance:
        check_covariance_size(rows.shape[0], n_columns)

    name = registry.choose(impl, x.device.type, dtype, n_columns, n_bits)
    if name == "reference":
        dense = reference.binary_autoencoder(
            rows, W_enc, b_enc, W_dec, b_dec,
            surrogate=surrogate, width=width, n_bits=n_bits, covariance=covariance,
            mask=row_mask, stats=stats,
        )  # fmt: skip
        recon, entropy, spread = dense.recon, dense.entropy, dense.covariance
        words, counts = pack_rows(dense.bits.detach()), None
    else:
        parts = (None,) * 5
        if stats is not None:
            parts = (stats.n_rows, stats.counts, stats.words, stats.numerator, stats.signs)  # type: ignore[assignment]
        recon, entropy, spread, words, _, counts, *_ = _PackedAutoencoder.apply(
            rows.to(dtype), W_enc, b_enc, W_dec, b_dec, row_mask, *parts,
            name, surrogate, width, n_bits, covariance, keep_signs(n_columns),
        )  # fmt: skip
        if not covariance:
            spread = None
    code = _as_code(words, counts, lead, n_columns, n_bits, mask)
    return BAEOutput(recon.to(dtype).view(*lead, recon.shape[-1]), entropy, spread, code)


@torch.no_grad()
def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    *,
    n_bits: int = 1,
    mask: Tensor | None = None,
    impl: str = "auto",
    check_finite: bool = False,
) -> BinaryCode:
    """Bits only: [x W_enc + b_enc > 0], packed, without gradient.

    Arguments, errors: as :func:`binary_autoencoder`.
    """
    _check_parameters(x, {"W_enc": W_enc, "b_enc": b_enc})
    _require("W_enc", W_enc, ("d_in", "k F"))
    _check_x(x, W_enc, n_bits, mask, check_finite)
    n_columns = W_enc.shape[1]
    _require("b_enc", b_enc, (n_columns,))
    dtype = compute_dtype(x)
    name = registry.choose(impl, x.device.type, dtype, n_columns, n_bits)
    rows = x.reshape(-1, x.shape[-1])
    row_mask = None if mask is None else mask.reshape(-1)
    if name == "reference":
        bits = rows @ W_enc + b_enc > 0
        words = pack_rows(bits if row_mask is None else bits & row_mask[:, None])
        counts = None
    else:
        words, _, counts, _ = _ops(name)["encode"](rows.to(dtype), W_enc, b_enc, row_mask, None)
    return _as_code(words, counts, x.shape[:-1], n_columns, n_bits, mask)


class _PackedDecoder(torch.autograd.Function):
    """(W_dec, b_dec) -> recon for fixed packed bits."""

    @staticmethod
    def forward(
        words: Tensor, W_dec: Tensor, b_dec: Tensor, impl: str, n_bits: int, dtype: torch.dtype
    ) -> Tensor:
        return _ops(impl)["decode"](words, W_dec, b_dec, n_bits, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        words, W_dec, b_dec, ctx.impl, ctx.n_bits, _ = inputs
        ctx.save_for_backward(words, W_dec, b_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_recon: Tensor) -> tuple[Tensor | None, ...]:
        words, W_dec, b_dec = ctx.saved_tensors
        n_columns = W_dec.shape[0] * ctx.n_bits
        grad_W, grad_b = _ops(ctx.impl)["decoder_backward"](
            words, grad_recon, n_columns, ctx.n_bits, W_dec.dtype
        )
        _, need_W, need_b = ctx.needs_input_grad[:3]
        return (
            None,
            grad_W if need_W else None,
            grad_b.to(b_dec.dtype) if need_b else None,
            None,
            None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError(
            "decode of a packed code has no vmap: give the code leading dimensions [..., F]"
        )


def decode(
    code: BinaryCode | Tensor, W_dec: Tensor, b_dec: Tensor, *, impl: str = "auto"
) -> Tensor:
    """value(code) W_dec + b_dec, differentiable in W_dec and b_dec.

    Args:
        code: a :class:`BinaryCode`, or dense feature values ``[..., F]`` of W_dec's dtype, which
            are used as they are (interventions: nothing is forced to 0 or 1) and are
            differentiable too. Masked rows of a code have zero bits and give b_dec.

    Returns:
        ``[..., d_out]`` in the compute dtype.
    """
    _require("W_dec", W_dec, ("F", "d_out"))
    _require("b_dec", b_dec, (W_dec.shape[1],))
    if isinstance(code, Tensor):
        _check_parameters(code, {"W_dec": W_dec, "b_dec": b_dec})
        if code.dim() < 1 or code.shape[-1] != W_dec.shape[0]:
            raise ValueError(
                f"code must have shape [..., {W_dec.shape[0]}]; got {list(code.shape)}"
            )
        return code @ W_dec + b_dec
    if code.n_features != W_dec.shape[0]:
        raise ValueError(f"code must have {W_dec.shape[0]} features; got {code.n_features}")
    if code.device != W_dec.device:
        raise ValueError(f"code must be on W_dec's device {W_dec.device}; got {code.device}")
    dtype = compute_dtype(W_dec)
    name = registry.choose(impl, W_dec.device.type, dtype, code.n_columns, code.n_bits)
    if name == "reference":
        return (code.values(W_dec.dtype) @ W_dec + b_dec).to(dtype)
    recon = _PackedDecoder.apply(code.flatten().words, W_dec, b_dec, name, code.n_bits, dtype)
    return recon.view(*code.shape[:-1], W_dec.shape[1])
