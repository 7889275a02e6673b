"""The functions: the whole layer, bits alone, and a reconstruction of bits or values."""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast import reference
from bae_fast.codes import BinaryCode, keep_signs
from bae_fast.devices import autocasts
from bae_fast.functional.autograd import (
    Options,
    PackedAutoencoder,
    PackedDecoder,
    ops_of,
    savable,
)
from bae_fast.functional.checks import (
    check_columns,
    check_covariance,
    check_encoded,
    check_encoder,
    check_kept,
    check_more,
    check_parameters,
    check_whole,
    require,
)
from bae_fast.functional.outputs import BAEOutput, Encoded
from bae_fast.ops import registry
from bae_fast.ops.products import HALF
from bae_fast.packing import pack_rows
from bae_fast.statistics import CodeStatistics
from bae_fast.surrogates import resolve_surrogate


def compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where autocast is active for x's device, else x's own."""
    if autocasts(x.device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


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
    check_encoder(x, parameters, n_bits, mask, check_finite)
    n_columns = W_enc.shape[1]
    require("W_dec", W_dec, (n_columns // n_bits, "d_out"))
    check_columns("W_dec", W_dec)
    require("b_dec", b_dec, (W_dec.shape[1],))
    surrogate, width = resolve_surrogate(surrogate, surrogate_width)

    dtype = compute_dtype(x)
    rows, row_mask = _kept_rows(x, mask)
    more = check_more(stats, past, n_columns, x.device)
    if covariance:
        check_covariance(stats, past, rows.shape[0], n_columns, x.device)
    if encoded is not None:
        check_encoded(encoded, rows.shape[0], n_columns, surrogate, x.device)

    name = registry.choose(impl, x.device.type, dtype, n_columns, n_bits, x.device.index)
    if name == "reference":
        if more is None:
            check_kept(row_mask, 2 if covariance else 1)
        recon, entropy, spread, variance, bits = reference.binary_autoencoder(
            rows, W_enc, b_enc, W_dec, b_dec,
            surrogate=surrogate, width=width, n_bits=n_bits, covariance=covariance,
            mask=row_mask, stats=stats, past=past,
        )  # fmt: skip
        words, counts = pack_rows(bits.detach()), None
    else:
        options = Options(
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
        recon, entropy, spread, variance, words, _, counts, *_ = PackedAutoencoder.apply(
            rows.to(dtype), W_enc, b_enc, W_dec, b_dec, row_mask, *_savable_fields(more), options,
            *((None,) * 4 if encoded is None else map(savable, encoded)),
        )  # fmt: skip
        if encoded is not None:
            words, counts = encoded.words, encoded.counts
        if not covariance:
            spread = None
    code = _as_code(words, counts, x.shape[:-1], n_columns, n_bits, mask)
    recon = recon.to(recon_dtype or dtype).view(*x.shape[:-1], recon.shape[-1])
    return BAEOutput(recon, entropy, spread, code, variance if multilinear else None)


def _kept_rows(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows ``[n, d_in]``, those that are dropped zero, and their mask ``[n]``."""
    rows = savable(x.reshape(-1, x.shape[-1]))
    if mask is None:
        return rows, None
    row_mask = savable(mask.reshape(-1))
    # a dropped row may hold anything: 0 x NaN would reach the gradient of W_enc
    return rows.masked_fill(~row_mask[:, None], 0), row_mask


def _savable_fields(more: CodeStatistics | None) -> tuple[Tensor | None, ...]:
    """Statistics as the Function takes them."""
    if more is None:
        return (None,) * 5
    fields = (more.n_rows, more.counts, more.words, more.numerator, more.signs)
    return tuple(None if field is None else savable(field) for field in fields)


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
    check_encoder(x, {"W_enc": W_enc, "b_enc": b_enc}, n_bits, mask, check_finite)
    n_columns = W_enc.shape[1]
    dtype = compute_dtype(x)
    name = registry.choose(impl, x.device.type, dtype, n_columns, n_bits, x.device.index)
    rows = x.reshape(-1, x.shape[-1])
    row_mask = None if mask is None else mask.reshape(-1)
    if name == "reference":
        bits = rows @ W_enc + b_enc > 0
        words = pack_rows(bits if row_mask is None else bits & row_mask[:, None])
        counts = None
    else:
        words, _, counts, _ = ops_of(name)["encode"](rows.to(dtype), W_enc, b_enc, row_mask, None)
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
    check_encoder(x, {"W_enc": W_enc, "b_enc": b_enc}, n_bits, mask, check_finite)
    n_columns, dtype = W_enc.shape[1], compute_dtype(x)
    surrogate, width = resolve_surrogate(surrogate, surrogate_width)
    rows, row_mask = _kept_rows(x, mask)
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
    return Encoded(*ops_of(name)["encode"](rows.to(dtype), W_enc, b_enc, row_mask, window_width))


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
    require("W_dec", W_dec, ("F", "d_out"))
    check_columns("W_dec", W_dec)
    require("b_dec", b_dec, (W_dec.shape[1],))
    if isinstance(code, Tensor):
        check_parameters(code, {"W_dec": W_dec, "b_dec": b_dec}, "code")
        if code.dim() < 1 or code.shape[-1] != W_dec.shape[0]:
            raise ValueError(
                f"code must have shape [..., {W_dec.shape[0]}]; got {list(code.shape)}"
            )
        return (code @ W_dec + b_dec).to(compute_dtype(W_dec))
    if not isinstance(code, BinaryCode):
        raise TypeError(f"code must be a BinaryCode or a tensor; got {type(code).__name__}")
    check_parameters(W_dec, {"b_dec": b_dec}, "W_dec")
    check_whole("W_dec", W_dec)
    if code.n_features != W_dec.shape[0]:
        raise ValueError(f"code must have {W_dec.shape[0]} features; got {code.n_features}")
    if code.device != W_dec.device:
        raise ValueError(f"code must be on W_dec's device {W_dec.device}; got {code.device}")
    dtype = compute_dtype(W_dec)
    device = W_dec.device
    name = registry.choose(impl, device.type, dtype, code.n_columns, code.n_bits, device.index)
    if name == "reference":
        return (code.values(W_dec.dtype) @ W_dec + b_dec).to(dtype)
    words = savable(code.flatten().words)
    recon = PackedDecoder.apply(words, W_dec, b_dec, name, code.n_bits, dtype)
    return recon.view(*code.shape[:-1], W_dec.shape[1])
