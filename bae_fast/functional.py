"""The layer as functions: one autograd Function over the packed operators.

Kept between forward and backward: x and the parameters themselves, the packed bits, the packed
window of the ``rectangle`` surrogate, the counts, and the sign planes of the covariance (or lists
of the ones of sparse codes, or nothing: then backward counts the pairs again). Under autocast GPU
backends keep a half-precision copy of W_dec as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bae_fast import reference
from bae_fast.codes import (
    BinaryCode,
    check_covariance_size,
    check_strided,
    check_tail,
    keep_signs,
)
from bae_fast.devices import autocasts
from bae_fast.ops import registry
from bae_fast.ops.limits import check_counted
from bae_fast.ops.products import HALF
from bae_fast.ops.schemas import EncoderBackward
from bae_fast.packing import bit_weights, n_words, pack_rows
from bae_fast.statistics import CodeStatistics
from bae_fast.surrogates import resolve_surrogate


class BAEOutput(NamedTuple):
    """What one forward pass gives.

    Attributes:
        recon: ``[..., d_out]`` in the compute dtype (autocast's where that is active).
        entropy: ``[]``, H in bits, summed over columns; float32 (float64 for float64 input).
        covariance: ``[]``, D, of the same dtype as entropy; None unless ``covariance=True``.
        code: the bits, packed; no gradient.
        variance: ``[]``, sum over rows and columns of |dv/db W_dec|^2 b (1 - b): zero in value,
            see ``multilinear`` in :func:`binary_autoencoder`; None where it was not asked for.
    """

    recon: Tensor
    entropy: Tensor
    covariance: Tensor | None
    code: BinaryCode
    variance: Tensor | None = None


class Encoded(NamedTuple):
    """Rows that are encoded already, see :func:`encode_rows`; no gradient.

    Attributes:
        words: int32 ``[n, ceil(K/32)]``, the bits, row-packed.
        window: the same shape, the packed window of the ``rectangle`` surrogate; empty else.
        counts: int64 ``[K]``, ones in each column of the rows kept.
        n_rows: int64 ``[]``, the rows kept.
    """

    words: Tensor
    window: Tensor
    counts: Tensor
    n_rows: Tensor


class _Options(NamedTuple):
    """What a call asks of the Function besides its tensors."""

    impl: str
    surrogate: str
    width: float
    n_bits: int
    covariance: bool
    store_signs: bool
    store_lists: bool
    variance: bool
    copy: bool  # of W_dec in half precision, for forward and backward
    extend: bool  # the given statistics are of more rows, to be added to the call's own
    recon_dtype: torch.dtype


def _ops(name: str) -> dict[str, Callable[..., Any]]:
    return registry.BACKENDS[name].ops


def _squared_steps(W_dec: Tensor, n_bits: int, dtype: torch.dtype) -> Tensor:
    """Squared length of what flipping a bit adds to the reconstruction: ``[k F]``."""
    wide = torch.promote_types(W_dec.dtype, dtype)
    squared = torch.linalg.vector_norm(W_dec, dim=1, dtype=wide).square().to(dtype)
    if n_bits == 1:
        return squared
    steps = bit_weights(n_bits, dtype, W_dec.device)
    return torch.outer(squared, steps.square()).flatten()


class _Once(torch.autograd.Function):
    """Gradients as they are, behind which none is taken: what they depend on follows them.

    torch's ``once_differentiable`` refuses a second derivative only where an incoming gradient
    depends on something. Behind a loss that is linear in the reconstruction none does, and a
    penalty on the gradient would be taken for a constant, without a word.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:n])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise RuntimeError(
            "binary_autoencoder is differentiable once: its gradient was differentiated "
            "(impl='reference' can be differentiated again)"
        )


def _differentiable_once(
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., tuple[Tensor | None, ...]]:
    """A backward pass whose gradients refuse to be differentiated."""

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return found
        own = [grad for grad in found if grad is not None]
        given = [tensor for tensor in (*ctx.saved_tensors[:5], *grads) if tensor is not None]
        refusing = iter(_Once.apply(len(own), *own, *given))
        return tuple(None if grad is None else next(refusing) for grad in found)

    return once


class _PackedAutoencoder(torch.autograd.Function):
    """(x, parameters) -> (recon, entropy, covariance, variance), and the packed state.

    The state (words and what follows) has no gradient; it is returned because only inputs and
    outputs may be saved for backward. An absent tensor of the state has zero elements.
    """

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
        options: _Options,
        *encoded: Tensor,
    ) -> tuple[Tensor, ...]:
        ops = _ops(options.impl)
        window_width = options.width if options.surrogate == "rectangle" else None
        if encoded:
            words, window, counts, n_rows = encoded
        else:
            words, window, counts, n_rows = ops["encode"](x, W_enc, b_enc, row_mask, window_width)
        # a tensor of its own for each: torch.compile cannot return one tensor twice
        signs, sum_counts, sum_n_rows, sum_words = (words.new_empty(0) for _ in range(4))
        narrow = W_dec.to(x.dtype) if options.copy else x.new_empty(0)
        recon = ops["decode"](
            words, narrow if options.copy else W_dec, b_dec, options.n_bits, options.recon_dtype
        )

        counted, total, counted_words = counts, n_rows, words
        if stats_counts is not None and stats_n_rows is not None:
            counted, total = stats_counts, stats_n_rows
            if options.extend:
                counted, total = stats_counts + counts, stats_n_rows + n_rows
                sum_counts, sum_n_rows = counted, total
                if options.covariance and stats_words is not None:
                    counted_words = sum_words = torch.cat([stats_words, words])

        wide = torch.promote_types(x.dtype, torch.float32)
        numerator: Tensor | None = None
        if options.covariance:
            numerator = stats_numerator
            if stats_counts is None or options.extend:
                numerator, signs = ops["covariance"](
                    counted_words, counted, total, options.store_signs, options.store_lists
                )
        entropy, covariance = ops["terms"](counted, total, numerator, wide)
        variance = entropy.new_zeros(()) if options.variance else entropy.new_empty(())
        if encoded:  # an input is not returned as well
            words, window, counts, n_rows = (words.new_empty(0) for _ in range(4))
        return (
            recon, entropy, covariance, variance, words, window, counts, n_rows,
            signs, sum_counts, sum_n_rows, sum_words, narrow,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, W_enc, b_enc, W_dec, b_dec, row_mask = inputs[:6]
        stats_n_rows, stats_counts, stats_words, _, stats_signs = inputs[6:11]
        options: _Options = inputs[11]
        state = output[4:]
        (
            words, window, counts, n_rows, signs, sum_counts, sum_n_rows, sum_words, narrow,
        ) = state  # fmt: skip
        ctx.n_encoded = len(inputs) - 12
        if ctx.n_encoded:
            words, window, counts, n_rows = inputs[12:]
        ctx.options = options
        ctx.mark_non_differentiable(*state)
        ctx.set_materialize_grads(False)
        ctx.has_signs = options.covariance and signs.numel() > 0
        counted_words = words if options.covariance else None
        if stats_counts is not None and options.extend:
            n_rows, counts = sum_n_rows, sum_counts
            counted_words = sum_words if options.covariance else None
        elif stats_counts is not None:
            n_rows, counts, counted_words = stats_n_rows, stats_counts, stats_words
            ctx.has_signs, signs = stats_signs is not None, stats_signs
        ctx.save_for_backward(
            x, W_enc, b_enc, W_dec, b_dec, row_mask, words, window,
            n_rows, counts, counted_words, signs, narrow if options.copy else None,
        )  # fmt: skip

    @staticmethod
    @_differentiable_once
    def backward(
        ctx: Any,
        grad_recon: Tensor | None,
        grad_entropy: Tensor | None,
        grad_covariance: Tensor | None,
        grad_variance: Tensor | None,
        *_: None,
    ) -> tuple[Tensor | None, ...]:
        (
            x, W_enc, b_enc, W_dec, b_dec, row_mask, words, window,
            n_rows, counts, counted_words, signs, narrow,
        ) = ctx.saved_tensors  # fmt: skip
        options: _Options = ctx.options
        # torch.compile gives zeros for outputs that nobody used
        grad_covariance = grad_covariance if options.covariance else None
        grad_variance = grad_variance if options.variance else None
        ops = _ops(options.impl)
        need_x, need_W_enc, need_b_enc, need_W_dec, need_b_dec = ctx.needs_input_grad[:5]
        grads: list[Tensor | None] = [None] * 5

        if grad_recon is not None:
            grad_recon = grad_recon.to(x.dtype)
            if row_mask is not None:
                grad_recon = grad_recon.masked_fill(~row_mask[:, None], 0)
            if need_W_dec or need_b_dec:
                grad_W, grad_b = ops["decoder_backward"](
                    words, grad_recon, W_enc.shape[1], options.n_bits, W_dec.dtype
                )
                grads[3] = grad_W if need_W_dec else None
                grads[4] = grad_b.to(b_dec.dtype) if need_b_dec else None

        incoming = (grad_recon, grad_entropy, grad_covariance, grad_variance)
        if any(g is not None for g in incoming) and (need_x or need_W_enc or need_b_enc):
            columns = curvature = None
            if grad_entropy is not None:
                columns = ops["slopes"](counts, n_rows, grad_entropy, grad_entropy.dtype)
            if grad_variance is not None:
                steps = _squared_steps(W_dec, options.n_bits, grad_variance.dtype)
                curvature = steps * grad_variance
            given = EncoderBackward(
                x=x, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec if narrow is None else narrow,
                words=words, window=window, row_mask=row_mask,
                grad_recon=grad_recon, grad_columns=columns, curvature=curvature,
                grad_covariance=grad_covariance, signs=signs if ctx.has_signs else None,
                stats_words=counted_words, stats_counts=counts, stats_n_rows=n_rows,
                surrogate=options.surrogate, width=options.width, n_bits=options.n_bits,
                needs=[need_x, need_W_enc, need_b_enc],
            )  # fmt: skip
            grad_x, grad_W, grad_b = ops["encoder_backward"](*given)
            grads[0] = grad_x if need_x else None
            grads[1] = grad_W if need_W_enc else None
            grads[2] = grad_b if need_b_enc else None
        return *grads, *[None] * (7 + ctx.n_encoded)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError(
            "binary_autoencoder has no vmap: pass x with leading dimensions [..., d_in]"
        )


# -- arguments ---------------------------------------------------------------------------------


def compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where autocast is active for x's device, else x's own."""
    if autocasts(x.device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _require(name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
    sizes = tuple(tensor.shape)
    if len(sizes) != len(shape) or any(
        isinstance(s, int) and s != t for s, t in zip(shape, sizes, strict=True)
    ):
        expected = ", ".join(str(s) for s in shape)
        raise ValueError(f"{name} must have shape [{expected}]; got {list(sizes)}")


def _check_whole(name: str, tensor: Tensor) -> None:
    if hasattr(tensor, "full_tensor"):
        raise TypeError(
            f"{name} must be whole; got one process's shard of it (DTensor): FSDP gathers shards "
            "in forward, and in methods that register_fsdp_forward_method names"
        )


def _check_columns(name: str, weight: Tensor) -> None:
    if weight.shape[1] == 0:
        raise ValueError(f"{name} must have at least one column; got none")


def _check_parameters(x: Tensor, parameters: dict[str, Tensor], x_name: str = "x") -> None:
    """Dense; one device; one floating dtype outside autocast."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{x_name} must be a tensor; got {type(x).__name__}")
    check_strided(x_name, x)
    if not x.dtype.is_floating_point:
        raise TypeError(f"{x_name} must be floating point; got {x.dtype}")
    autocast = autocasts(x.device)
    for name, tensor in parameters.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
        check_strided(name, tensor)
        if not hasattr(x, "full_tensor"):
            _check_whole(name, tensor)
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x_name}'s device {x.device}; got {tensor.device}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point; got {tensor.dtype}")
        if tensor.dtype != x.dtype and not autocast:
            raise TypeError(
                f"{name} must have {x_name}'s dtype {x.dtype} outside autocast; "
                f"got {tensor.dtype}: {x_name}.to({tensor.dtype}) has that of {name}"
            )


def _check_packed(
    name: str,
    given: CodeStatistics | Encoded,
    kinds: dict[str, tuple[torch.dtype, tuple[int | str, ...]]],
    n_columns: int,
    device: torch.device,
) -> None:
    """Shape, dtype, device and last bits of each field that is there: kernels read them so."""
    for field, (dtype, shape) in kinds.items():
        tensor = getattr(given, field)
        if tensor is None:
            continue
        _require(f"{name}.{field}", tensor, shape)
        if tensor.dtype != dtype:
            raise TypeError(f"{name}.{field} must be {dtype}; got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}.{field} must be on x's device {device}; got {tensor.device}")
        if dtype == torch.int32:
            check_tail(f"{name}.{field}", tensor, n_columns)


def _check_statistics(
    name: str, given: CodeStatistics, n_columns: int, device: torch.device
) -> None:
    n = n_words(n_columns)
    kinds: dict[str, tuple[torch.dtype, tuple[int | str, ...]]] = {
        "n_rows": (torch.int64, ()),
        "counts": (torch.int64, (n_columns,)),
        "words": (torch.int32, ("N", n)),
        "numerator": (torch.int64, ()),
        "signs": (torch.int32, (2, n_columns, n)),
    }
    _check_packed(name, given, kinds, n_columns, device)


def _check_encoded(
    encoded: Encoded, n_rows: int, n_columns: int, surrogate: str, device: torch.device
) -> None:
    if not isinstance(encoded, Encoded):
        raise TypeError(f"encoded must be what encode_rows gave; got {type(encoded).__name__}")
    bits = (torch.int32, (n_rows, n_words(n_columns)))
    kinds: dict[str, tuple[torch.dtype, tuple[int | str, ...]]] = {
        "n_rows": (torch.int64, ()),
        "counts": (torch.int64, (n_columns,)),
        "words": bits,
    }
    if (surrogate == "rectangle") != (encoded.window.numel() > 0):
        raise ValueError(
            f"encoded must be made for the surrogate {surrogate!r}; got one "
            f"{'without' if surrogate == 'rectangle' else 'with'} a window"
        )
    if surrogate == "rectangle":
        kinds["window"] = bits
    _check_packed("encoded", encoded, kinds, n_columns, device)


def _check_x(
    x: Tensor, W_enc: Tensor, n_bits: int, mask: Tensor | None, check_finite: bool
) -> None:
    if x.dim() < 1 or x.shape[-1] != W_enc.shape[0]:
        raise ValueError(f"x must have shape [..., {W_enc.shape[0]}]; got {list(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"x must hold at least one row; got shape {list(x.shape)}")
    _check_columns("W_enc", W_enc)
    if (
        isinstance(n_bits, bool)
        or not isinstance(n_bits, int)
        or n_bits < 1
        or W_enc.shape[1] % n_bits
    ):
        raise ValueError(
            f"n_bits must be an int >= 1 that divides the {W_enc.shape[1]} columns of W_enc; "
            f"got {n_bits!r}"
        )
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a bool tensor; got {type(mask).__name__}")
    if mask is not None:
        check_strided("mask", mask)
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


def _check_kept(row_mask: Tensor | None, least: int) -> None:
    """Check for the reference what the operators check themselves, on a CPU only, as they do."""
    if row_mask is None or row_mask.device.type != "cpu" or torch.compiler.is_compiling():
        return
    kept = row_mask.sum()
    check_counted(kept)
    if kept < least:
        raise ValueError(f"covariance needs at least {least} rows; got {int(kept)}")


def _copies(
    backend: registry.Backend, W_dec: Tensor, dtype: torch.dtype, recon_dtype: torch.dtype
) -> bool:
    """Whether a half-precision copy of W_dec is made for the whole step."""
    return (
        dtype in HALF
        and W_dec.dtype != dtype
        and recon_dtype == dtype
        and not torch.compiler.is_compiling()
        and backend.keeps_copy(W_dec.numel(), W_dec.device)
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
    return BinaryCode(words, n_columns, n_bits=n_bits, row_mask=mask, counts=counts, trusted=True)


def _savable(tensor: Tensor) -> Tensor:
    """A tensor that backward may keep: codes made in inference mode are copied."""
    if not torch.compiler.is_compiling() and tensor.is_inference() and torch.is_grad_enabled():
        return tensor.clone()
    return tensor


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
    past: CodeStatistics | None = None,
    multilinear: bool = False,
    encoded: Encoded | None = None,
    recon_dtype: torch.dtype | None = None,
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
        covariance: also compute D, which costs O(F^2 N) bit operations, or O(N L0^2) where codes
            have few ones a row.
        mask: bool ``[...]``; rows where it is False get zero bits, no gradient, and do not count.
            With ``stats`` it may keep none, as a rank's share of a batch may be padding alone.
        stats: statistics of more rows than x, which replace the call's own
            (:class:`bae_fast.CodeStatistics`). Without it the statistics are those of this call;
            averaging calls is then another loss.
        past: statistics of more rows than x, to which the call's own are added (a bank of past
            codes); excludes ``stats``.
        multilinear: also return ``variance``. A loss that is quadratic in recon, continued from
            bits to the cube [0, 1]^K as its expectation over independent random bits, is the loss
            at the mean plus a variance term in b (1 - b). On bits that term is zero; its
            derivative, c (1 - 2 b), turns the slope of the loss at a bit into the exact change of
            the loss when the bit flips. For the mean of squares over n numbers add
            ``out.variance / n`` to the loss.
        encoded: what :func:`encode_rows` gave for this x and these parameters, mask and
            surrogate: the rows are not encoded again. Micro-batches and ranks encode first, add
            their counts, and go on from here.
        recon_dtype: dtype of recon, float32 or wider; None: the compute dtype. Sums of partial
            reconstructions over processes want a wide one.
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
    _check_columns("W_dec", W_dec)
    _require("b_dec", b_dec, (W_dec.shape[1],))
    surrogate, width = resolve_surrogate(surrogate, surrogate_width)

    lead = x.shape[:-1]
    dtype = compute_dtype(x)
    rows = x.reshape(-1, x.shape[-1])
    row_mask = None if mask is None else mask.reshape(-1)
    if row_mask is not None:
        # a dropped row may hold anything: 0 x NaN would reach the gradient of W_enc
        rows = rows.masked_fill(~row_mask[:, None], 0)
    extra = stats if past is None else past
    if stats is not None and past is not None:
        raise ValueError("stats and past must not both be given: one replaces, the other adds")
    if extra is not None:
        if not isinstance(extra, CodeStatistics):
            name = "stats" if past is None else "past"
            raise TypeError(f"{name} must be CodeStatistics; got {type(extra).__name__}")
        _check_statistics("stats" if past is None else "past", extra, n_columns, x.device)
    if covariance:
        if stats is not None and stats.numerator is None:
            raise ValueError("stats has no covariance: make it with statistics(covariance=True)")
        if stats is not None and stats.words is None and stats.signs is None:
            raise ValueError("stats must hold words or signs for the covariance; got neither")
        if stats is None:
            n_past = 0 if past is None else len(past.require_words())
            check_covariance_size(rows.shape[0] + n_past, n_columns, x.device.type)
    if encoded is not None:
        _check_encoded(encoded, rows.shape[0], n_columns, surrogate, x.device)

    name = registry.choose(impl, x.device.type, dtype, n_columns, n_bits, x.device.index)
    if name == "reference":
        if extra is None:
            _check_kept(row_mask, 2 if covariance else 1)
        dense = reference.binary_autoencoder(
            rows, W_enc, b_enc, W_dec, b_dec,
            surrogate=surrogate, width=width, n_bits=n_bits, covariance=covariance,
            mask=row_mask, stats=stats, past=past,
        )  # fmt: skip
        recon, entropy, spread, variance, bits = dense
        words, counts = pack_rows(bits.detach()), None
    else:
        parts: tuple[Tensor | None, ...] = (None,) * 5
        if extra is not None:
            given = (extra.n_rows, extra.counts, extra.words, extra.numerator, extra.signs)
            parts = tuple(None if part is None else _savable(part) for part in given)
        options = _Options(
            impl=name,
            surrogate=surrogate,
            width=width,
            n_bits=n_bits,
            covariance=covariance,
            # what comes back depends on the codes, and a trace has one shape
            store_signs=keep_signs(n_columns, x.device) and not torch.compiler.is_compiling(),
            store_lists=not torch.compiler.is_compiling(),
            variance=multilinear,
            copy=_copies(registry.BACKENDS[name], W_dec, dtype, recon_dtype or dtype),
            extend=past is not None,
            recon_dtype=recon_dtype or dtype,
        )
        given_rows = () if encoded is None else encoded
        recon, entropy, spread, variance, words, _, counts, *_ = _PackedAutoencoder.apply(
            rows.to(dtype), W_enc, b_enc, W_dec, b_dec, row_mask, *parts, options, *given_rows
        )
        if encoded is not None:
            words, counts = encoded.words, encoded.counts
        if not covariance:
            spread = None
    code = _as_code(words, counts, lead, n_columns, n_bits, mask)
    recon = recon.to(recon_dtype or dtype).view(*lead, recon.shape[-1])
    return BAEOutput(recon, entropy, spread, code, variance if multilinear else None)


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

    Arguments, errors: as :func:`binary_autoencoder`; a mask may keep no row.
    """
    _check_parameters(x, {"W_enc": W_enc, "b_enc": b_enc})
    _require("W_enc", W_enc, ("d_in", "k F"))
    _check_x(x, W_enc, n_bits, mask, check_finite)
    n_columns = W_enc.shape[1]
    _require("b_enc", b_enc, (n_columns,))
    dtype = compute_dtype(x)
    name = registry.choose(impl, x.device.type, dtype, n_columns, n_bits, x.device.index)
    rows = x.reshape(-1, x.shape[-1])
    row_mask = None if mask is None else mask.reshape(-1)
    if name == "reference":
        bits = rows @ W_enc + b_enc > 0
        words = pack_rows(bits if row_mask is None else bits & row_mask[:, None])
        counts = None
    else:
        words, _, counts, _ = _ops(name)["encode"](rows.to(dtype), W_enc, b_enc, row_mask, None)
    return _as_code(words, counts, x.shape[:-1], n_columns, n_bits, mask)


@torch.no_grad()
def encode_rows(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    *,
    surrogate: str = "rectangle",
    surrogate_width: float | None = None,
    n_bits: int = 1,
    mask: Tensor | None = None,
    impl: str = "auto",
    check_finite: bool = False,
) -> Encoded:
    """What :func:`binary_autoencoder` needs of the bits of x, for its argument ``encoded``.

    Arguments, errors: as :func:`binary_autoencoder`.
    """
    _check_parameters(x, {"W_enc": W_enc, "b_enc": b_enc})
    _require("W_enc", W_enc, ("d_in", "k F"))
    _check_x(x, W_enc, n_bits, mask, check_finite)
    n_columns, dtype = W_enc.shape[1], compute_dtype(x)
    _require("b_enc", b_enc, (n_columns,))
    surrogate, width = resolve_surrogate(surrogate, surrogate_width)
    rows = x.reshape(-1, x.shape[-1])
    row_mask = None if mask is None else mask.reshape(-1)
    if row_mask is not None:
        rows = rows.masked_fill(~row_mask[:, None], 0)
    name = registry.choose(impl, x.device.type, dtype, n_columns, n_bits, x.device.index)
    window_width = width if surrogate == "rectangle" else None
    if name == "reference":
        pre = rows @ W_enc + b_enc
        bits = pre > 0 if row_mask is None else (pre > 0) & row_mask[:, None]
        inside = rows.new_empty(0, dtype=torch.int32)
        if window_width is not None:
            inside = pack_rows(pre.abs() < window_width)
        n_rows = bits.new_full((), rows.shape[0], dtype=torch.int64)
        n_rows = n_rows if row_mask is None else row_mask.sum()
        return Encoded(pack_rows(bits), inside, bits.sum(0), n_rows)
    return Encoded(*_ops(name)["encode"](rows.to(dtype), W_enc, b_enc, row_mask, window_width))


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

    Raises:
        TypeError: code is neither, or dtypes are not floating or differ outside autocast.
        ValueError: another number of features, shape or device.
    """
    _require("W_dec", W_dec, ("F", "d_out"))
    _check_columns("W_dec", W_dec)
    _require("b_dec", b_dec, (W_dec.shape[1],))
    if isinstance(code, Tensor):
        _check_parameters(code, {"W_dec": W_dec, "b_dec": b_dec})
        if code.dim() < 1 or code.shape[-1] != W_dec.shape[0]:
            raise ValueError(
                f"code must have shape [..., {W_dec.shape[0]}]; got {list(code.shape)}"
            )
        return (code @ W_dec + b_dec).to(compute_dtype(W_dec))
    if not isinstance(code, BinaryCode):
        raise TypeError(f"code must be a BinaryCode or a tensor; got {type(code).__name__}")
    _check_parameters(W_dec, {"b_dec": b_dec}, "W_dec")
    _check_whole("W_dec", W_dec)
    if code.n_features != W_dec.shape[0]:
        raise ValueError(f"code must have {W_dec.shape[0]} features; got {code.n_features}")
    if code.device != W_dec.device:
        raise ValueError(f"code must be on W_dec's device {W_dec.device}; got {code.device}")
    dtype = compute_dtype(W_dec)
    device = W_dec.device
    name = registry.choose(impl, device.type, dtype, code.n_columns, code.n_bits, device.index)
    if name == "reference":
        return (code.values(W_dec.dtype) @ W_dec + b_dec).to(dtype)
    words = _savable(code.flatten().words)
    recon = _PackedDecoder.apply(words, W_dec, b_dec, name, code.n_bits, dtype)
    return recon.view(*code.shape[:-1], W_dec.shape[1])
