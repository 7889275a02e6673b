"""The autograd Function of the layer, and that of decoding fixed bits.

Its arguments are checked before; every number comes from the operators of a backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bae_fast.ops import registry
from bae_fast.ops.schemas import EncoderBackward
from bae_fast.packing import bit_weights


class Options(NamedTuple):
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


def ops_of(name: str) -> dict[str, Callable[..., Any]]:
    """The operators of a backend, by name."""
    return registry.BACKENDS[name].ops


def savable(tensor: Tensor) -> Tensor:
    """A tensor that backward may keep: codes made in inference mode are copied."""
    if not torch.compiler.is_compiling() and tensor.is_inference() and torch.is_grad_enabled():
        return tensor.clone()
    return tensor


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


class PackedAutoencoder(torch.autograd.Function):
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
        options: Options,
        encoded_words: Tensor | None,
        encoded_window: Tensor | None,
        encoded_counts: Tensor | None,
        encoded_n_rows: Tensor | None,
    ) -> tuple[Tensor, ...]:
        # each by name: a variable number of arguments is misread by torch.compile without gradients
        ops = ops_of(options.impl)
        window_width = options.width if options.surrogate == "rectangle" else None
        given = (encoded_words, encoded_window, encoded_counts, encoded_n_rows)
        encoded = encoded_words is not None
        if encoded:
            words, window, counts, n_rows = cast(tuple[Tensor, Tensor, Tensor, Tensor], given)
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
        options: Options = inputs[11]
        state = output[4:]
        (
            words, window, counts, n_rows, signs, sum_counts, sum_n_rows, sum_words, narrow,
        ) = state  # fmt: skip
        if inputs[12] is not None:
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
        options: Options = ctx.options
        # torch.compile gives zeros for outputs that nobody used
        grad_covariance = grad_covariance if options.covariance else None
        grad_variance = grad_variance if options.variance else None
        ops = ops_of(options.impl)
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
        return *grads, *[None] * 11

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError(
            "binary_autoencoder has no vmap: pass x with leading dimensions [..., d_in]"
        )


class PackedDecoder(torch.autograd.Function):
    """(W_dec, b_dec) -> recon for fixed packed bits."""

    @staticmethod
    def forward(
        words: Tensor, W_dec: Tensor, b_dec: Tensor, impl: str, n_bits: int, dtype: torch.dtype
    ) -> Tensor:
        return ops_of(impl)["decode"](words, W_dec, b_dec, n_bits, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        words, W_dec, b_dec, ctx.impl, ctx.n_bits, _ = inputs
        ctx.save_for_backward(words, W_dec, b_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_recon: Tensor) -> tuple[Tensor | None, ...]:
        words, W_dec, b_dec = ctx.saved_tensors
        n_columns = W_dec.shape[0] * ctx.n_bits
        grad_W, grad_b = ops_of(ctx.impl)["decoder_backward"](
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
