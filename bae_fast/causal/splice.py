"""An autoencoder in the place of a module's output, inside a running model.

A forward hook replaces the module's output y, at the tokens that are not left out, by

    decode(edit(encode(x)))                                    as it is
    y + decode(edit(encode(x))) - decode(encode(x))            with ``add_error``

x is y itself, or for a transcoder the input of the module. With ``add_error`` what the autoencoder
does not explain stays: without an edit the model is the one it was, bit for bit, and with one
nothing changes but the edit.

Left out are the tokens whose states a harvest drops, which the autoencoder has never seen: the
first of every sequence, padding, special tokens, and those of outlying norm. The harvest's bound is
a multiple of the median norm of its rows; here it is the same multiple of sqrt(|mean|^2 + d
scale^2), the root mean square norm of the rows that the autoencoder's normalisation was fitted to.
It needs no other token, so a pass with a cache of keys and values leaves out the same tokens as one
without.
"""

from __future__ import annotations

import inspect
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bae_fast.arguments import check_int
from bae_fast.autoencoder import as_autoencoder
from bae_fast.codes import BinaryCode
from bae_fast.lm.cache import MAX_NORM_RATIO, row_norms
from bae_fast.lm.hooks import (
    find_module,
    first_part,
    resolve_hook,
    running,
    with_first_part,
)
from bae_fast.lm.inputs import excluded_tokens
from bae_fast.lm.keys import given_cache
from bae_fast.lm.loading import LanguageModel
from bae_fast.lm.logits import causal_model, under_head
from bae_fast.lm.origin import mismatch

Edit = Callable[[Tensor], Tensor]

# what masks that are added to scores hold where nothing is seen: this, or less
_LEFT_OUT = -9e3


def reconstruct(
    autoencoder: Any, rows: Tensor, target: Tensor, edit: Edit | None, add_error: bool
) -> Tensor:
    """What stands in the place of rows of a module's output.

    Args:
        autoencoder: an :class:`bae_fast.autoencoder.Autoencoder`, or anything with ``encode``, raw
            rows to dense features, and ``decode``, features to raw rows.
        rows: ``[n, d_in]``, what it encodes.
        target: ``[n, d_out]``, the output itself.
        edit: dense features ``[m, F]`` to features of that shape; None: as they are.
        add_error: add what the autoencoder does not explain.

    Returns:
        ``[n, d_out]`` in the target's dtype.

    Raises:
        ValueError: an edit that changes the shape, or a reconstruction of another width.
    """
    if edit is None and add_error:
        return target
    model = as_autoencoder(autoencoder)
    parts, first = [], 0
    for part in model.blocks(rows):
        goal = target[first : first + len(part)]
        first += len(part)
        if edit is None:
            made = model.reconstruct(part)
        else:
            before = model.activations(part)
            after = edit(before.clone())
            if not isinstance(after, Tensor) or after.shape != before.shape:
                kind = list(after.shape) if isinstance(after, Tensor) else type(after).__name__
                raise ValueError(f"edit must return shape {list(before.shape)}; got {kind}")
            made = model.decode(after.to(before.dtype))
            if add_error:
                made = goal.to(made) + (made - model.decode(before))
        if made.shape != goal.shape:
            raise ValueError(
                f"autoencoder must reconstruct {list(goal.shape)}; got {list(made.shape)}"
            )
        parts.append(made.to(goal))
    return torch.cat(parts)


# -- which tokens ------------------------------------------------------------------------------


@dataclass
class Splice:
    """What a splice has done so far.

    Attributes:
        path: the module's path.
        n_replaced, n_tokens: tokens whose state was replaced, of all that passed.
        codes: with ``record``, which features were on: a code ``[batch, length, F]`` a forward
            pass, before the edit, in order; tokens left alone are masked.
    """

    path: str
    codes: list[BinaryCode] = field(default_factory=list)
    _passes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def n_replaced(self) -> int:
        """Tokens whose state was replaced."""
        return sum(replaced for replaced, _ in self._passes)

    @property
    def n_tokens(self) -> int:
        """All tokens that passed."""
        return sum(tokens for _, tokens in self._passes)


class _Place(threading.local):
    """Where the tokens of the forward pass under way stand in their sequences, a thread each.

    A model calls its parts with what it was given, or with less: a head may call the decoder inside
    its body (OPT), a wrapper may take anything (peft). All of them are listened to. What the
    outermost says counts; those inside it fill in what it left open.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the pass: nothing is under way."""
        self.depth = -1
        self.outermost: int | None = None
        self.shape: tuple[int, int] | None = None
        self.offset: int | None = None
        self.uncounted = False
        self.attention_mask: Tensor | None = None
        self.square: Tensor | None = None
        self.position_ids: Tensor | None = None
        self.ids: Tensor | None = None
        self.calls = 0
        self.source: Tensor | None = None

    def note(self, depth: int, arguments: dict[str, Any]) -> None:
        """Take down the arguments of a forward, 0 being the outermost."""
        if depth <= self.depth:  # another pass: the last one was left without its end
            self.clear()
        if self.outermost is None:
            self.outermost = depth
        self.depth = depth
        given = arguments.get("input_ids")
        if self.ids is None and isinstance(given, Tensor):
            self.ids = given
        given = arguments.get("inputs_embeds") if given is None else given
        if self.shape is None and isinstance(given, Tensor) and given.dim() >= 2:
            self.shape = (int(given.shape[0]), int(given.shape[1]))
        mask = arguments.get("attention_mask")
        if isinstance(mask, dict):  # one for each kind of attention
            mask = mask.get("full_attention", next(iter(mask.values()), None))
        if self.square is None and isinstance(mask, Tensor) and mask.dim() == 4:
            self.square = mask
        if self.attention_mask is None and isinstance(mask, Tensor) and mask.dim() == 2:
            self.attention_mask = mask
        places = arguments.get("position_ids")
        if self.position_ids is None and isinstance(places, Tensor) and places.dim() == 2:
            self.position_ids = places
        if self.offset is None:
            self.offset = _tokens_before(arguments)
        state = arguments.get("cache_params", arguments.get("state"))
        if state is None and self.offset is None:
            state = given_cache(arguments)
        if state is not None and self.shape is not None and self.shape[1] == 1:
            self.uncounted = True  # a recurrent state goes on, and does not say from where

    def leave(self, depth: int) -> None:
        """A forward has returned; with the outermost that was called the pass is over.

        That need not be the wrapper's: peft's ``generate`` calls the model inside it.
        """
        if depth == self.outermost:
            self.clear()
        else:
            self.depth = depth - 1

    def positions(self, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Position of every token from the first real one, and which tokens are real.

        Positions that were given count too where they are smaller: several texts in one sequence.
        """
        batch, length = shape
        offset = self.offset or 0
        mask, square = self.attention_mask, self.square
        if not offset and mask is not None and self.offset is not None:
            # a cache whose first layer keeps no keys does not know its length; the mask is as long
            offset = max(mask.shape[1] - length, 0)
        position = torch.arange(offset, offset + length, device=device)
        position = position.expand(batch, length)
        real = torch.ones(shape, dtype=torch.bool, device=device)
        if mask is not None and len(mask) == batch and mask.shape[1] >= offset + length:
            whole = mask.to(device) != 0
            position = position - whole.int().argmax(1, keepdim=True)
            real = whole[:, offset : offset + length]
        elif square is not None and square.shape[2] == length <= square.shape[3] - offset:
            sees = _attended(square.to(device)).expand(batch, -1, -1)
            # a text's first token sees itself alone, the next one two tokens
            position = torch.minimum(position, sees.sum(-1) - 1)
            real = sees.diagonal(offset, -2, -1)
        given = self.position_ids
        if given is not None and given.shape[1] == length and len(given) in (1, batch):
            position = torch.minimum(position, given.to(device))
        return position, real


def _attended(square: Tensor) -> Tensor:
    """Which tokens each token sees, bool ``[batch, length, keys]``, by a mask with heads."""
    if square.is_floating_point():  # added to scores: large negative numbers are left out
        return (square > _LEFT_OUT).any(1)
    return (square != 0).any(1)


def _tokens_before(arguments: dict[str, Any]) -> int | None:
    """Tokens of earlier passes whose keys and values a pass goes on from; None: not said."""
    places = arguments.get("cache_position")
    if isinstance(places, Tensor) and places.numel():
        return int(places.min())
    cache: Any = given_cache(arguments)
    if hasattr(cache, "get_seq_length"):
        try:
            return int(cache.get_seq_length())
        except ValueError:  # it holds recurrent states alone, which do not count tokens
            return None
    if isinstance(cache, (tuple, list)) and cache and isinstance(cache[0], (tuple, list)):
        return int(cache[0][0].shape[-2])  # of older models: (keys, values) a layer
    return None


# a forward that takes one of these is called with the tokens
_TOKENS = ("input_ids", "inputs_embeds")


def _listened(model: nn.Module, path: str) -> list[nn.Module]:
    """A model and the parts inside it that may be called with the tokens, outermost first.

    Those are what stands around the module at ``path`` and takes tokens, under a wrapper of the
    user's own too, and the body of a causal language model.
    """
    base = under_head(model)
    parts = [model, causal_model(model), base, getattr(base, "decoder", None)]
    names = path.split(".")
    for n in range(1, len(names)):
        around = model.get_submodule(".".join(names[:n]))
        if not set(_TOKENS).isdisjoint(inspect.signature(around.forward).parameters):
            parts.append(around)
    wanted = {id(part) for part in parts}
    return [module for module in model.modules() if id(module) in wanted]


def _arguments(signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by name; those that a forward takes as any number of keywords too."""
    bound = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return bound


def norm_bounds(autoencoder: Any, max_norm_ratio: float | None) -> tuple[float, float]:
    """The largest norms of a usual input and of a usual output.

    Infinite where there is no ratio, or nothing was fitted (mean 0 and scale 1).
    """
    bounds = [math.inf, math.inf]
    if max_norm_ratio is not None:
        for i, norm in enumerate(as_autoencoder(autoencoder).usual_norms()):
            bounds[i] = max_norm_ratio * norm
    return bounds[0], bounds[1]


def _within(rows: Tensor, bound: float) -> Tensor:
    """Finite rows of at most this norm: bool ``[...]``; norms as in a harvest."""
    norms = row_norms(rows)
    return norms.isfinite() & (norms <= bound)


class _Replacement:
    """The hooks that replace a module's output; arguments as of :func:`replaced_output`."""

    def __init__(
        self,
        whole: nn.Module,
        path: str,
        function: Callable[[Tensor, Tensor], Tensor],
        *,
        from_input: bool,
        source: str | None,
        mask: Tensor | Literal["last"] | None,
        drop_positions: int,
        excluded: Tensor,
        bounds: tuple[float, float],
        watch: Callable[[Tensor, Tensor], None] | None,
    ) -> None:
        self.whole, self.path, self.function = whole, path, function
        self.from_input, self.source = from_input, source
        self.mask, self.drop_positions, self.excluded = mask, drop_positions, excluded
        self.bounds, self.watch = bounds, watch
        self.place, self.done = _Place(), Splice(path)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Every hook in its place while the block runs."""
        with ExitStack() as hooks:
            for depth, part in enumerate(_listened(self.whole, self.path)):
                note, leave = self._listeners(part, depth)
                hooks.callback(part.register_forward_pre_hook(note, with_kwargs=True).remove)
                hooks.callback(part.register_forward_hook(leave, always_call=True).remove)
            if self.source is not None:
                module = find_module(self.whole, self.source)
                hooks.callback(module.register_forward_hook(self._see).remove)
            module = self.whole.get_submodule(self.path)
            hooks.callback(module.register_forward_hook(self._replace, with_kwargs=True).remove)
            yield

    def _listeners(self, part: nn.Module, depth: int) -> tuple[Callable[..., None], ...]:
        """What a part that may be called with the tokens tells, before it runs and behind it."""
        signature = inspect.signature(part.forward)

        def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self.place.note(depth, _arguments(signature, args, kwargs))

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            self.place.leave(depth)

        return note, leave

    def _see(self, _module: nn.Module, _args: Any, output: Any) -> None:
        seen = first_part(output)
        # some models add to a module's output in its place (Falcon's MLP)
        self.place.source = seen.clone() if isinstance(seen, Tensor) else seen

    def _replace(self, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        y = first_part(output)
        if not isinstance(y, Tensor) or y.dim() < 2 or not y.is_floating_point():
            raise TypeError(
                f"path must name a module that gives rows of floats; {self.path!r} gives "
                f"{type(y).__name__}"
            )
        x = self._input(y, [*args, *kwargs.values()])
        if x.shape[:-1] != y.shape[:-1]:
            raise ValueError(
                "path must name a module that gives a row for each that it is given; "
                f"{self.path!r} makes {list(y.shape)} of {list(x.shape)}"
            )
        if self.place.depth >= 0:
            self.place.calls += 1
            if self.place.calls > 1:
                raise ValueError(
                    f"path={self.path!r}: the model calls this module more than once in a pass, so "
                    "a token has no one state there; name a module that is called once"
                )
        chosen = self._chosen(x, y)
        n = int(chosen.sum())
        self.done._passes.append((n, chosen.numel()))
        if self.watch is not None:
            self.watch(x, chosen)
        if n == 0:
            return None
        changed = y.clone()
        changed[chosen] = self.function(x[chosen], y[chosen]).to(y.dtype)
        return with_first_part(output, changed)

    def _input(self, y: Tensor, given: list[Any]) -> Tensor:
        """x for an output y, given what the module was called with."""
        if self.source is not None:
            if self.place.source is None:
                raise RuntimeError(f"source={self.source!r} was not called before {self.path!r}")
            return self.place.source
        if not self.from_input:
            return y
        return next((v for v in given if isinstance(v, Tensor) and v.is_floating_point()), y)

    def _chosen(self, x: Tensor, y: Tensor) -> Tensor:
        """The tokens whose state is replaced: bool, y's shape without the last dimension."""
        self._check_known(y)
        shape, place = y.shape[:-1], self.place
        within = _within(x, self.bounds[0]) & _within(y, self.bounds[1])
        batch = place.shape
        if batch is None or shape.numel() != batch[0] * batch[1]:
            if len(shape) != 2:
                return within  # nothing depends on where a token stands
            batch = (shape[0], shape[1])
        position, real = place.positions(batch, y.device)
        chosen = real & (position >= self.drop_positions)
        if len(self.excluded) and place.ids is not None and place.ids.shape == chosen.shape:
            excluded = torch.isin(place.ids.to(y.device), self.excluded.to(y.device))
            chosen = chosen & ~excluded
        if isinstance(self.mask, Tensor):
            try:
                chosen = chosen & self.mask.to(y.device).expand(batch)
            except RuntimeError:
                raise ValueError(
                    f"mask must be [batch, length] = {list(batch)}; got {list(self.mask.shape)}"
                ) from None
        elif self.mask == "last":
            at = torch.arange(batch[1], device=y.device)
            chosen = chosen & (at == torch.where(real, at, -1).amax(1, keepdim=True))
        return chosen.view(shape) & within

    def _check_known(self, y: Tensor) -> None:
        """Refuse a pass that does not tell what drop_positions and mask ask for."""
        place, shape = self.place, y.shape[:-1]
        asks = bool(self.drop_positions) or self.mask is not None
        if place.uncounted and self.drop_positions:
            raise ValueError(
                f"path={self.path!r}: a recurrent model that goes on from its state does not say "
                "how many tokens it has seen; give drop_positions=0, or run it with use_cache=False"
            )
        if hasattr(self.whole, "get_output_embeddings") and place.depth < 0 and asks:
            raise ValueError(
                f"path={self.path!r} was called outside the model's forward, so positions and "
                f"padding of its tokens are not known: call {type(self.whole).__name__}, or give "
                "drop_positions=0 and no mask"
            )
        known = place.shape is not None and shape.numel() == place.shape[0] * place.shape[1]
        if not known and len(shape) != 2 and (asks or place.offset):
            raise ValueError(
                "path must name a module that gives [batch, length, d], as drop_positions and mask "
                f"speak of positions; {self.path!r} gives {list(y.shape)}"
            )


@contextmanager
def replaced_output(
    model: LanguageModel | nn.Module,
    path: str,
    function: Callable[[Tensor, Tensor], Tensor],
    *,
    from_input: bool = False,
    source: str | None = None,
    mask: Tensor | Literal["last"] | None = None,
    drop_positions: int = 1,
    exclude_tokens: Iterable[int] | None = None,
    bounds: tuple[float, float] = (math.inf, math.inf),
    watch: Callable[[Tensor, Tensor], None] | None = None,
    may_replace_none: bool = False,
) -> Iterator[Splice]:
    """Replace states of a module's output by a function of them while the block runs.

    The model is in evaluation mode meanwhile and runs uncompiled, see
    :func:`bae_fast.lm.hooks.running`.

    Args:
        model, path, mask, drop_positions, exclude_tokens, source: see :func:`spliced`.
        function: (x ``[n, d_in]``, y ``[n, d_out]``) of the tokens to replace, to rows in the
            place of y.
        from_input: x is the input of the module (or the output of ``source``), not its output.
        bounds: tokens whose x or y has a larger norm, or is not finite, are left alone.
        watch: given all x ``[batch, length, d_in]`` and the tokens replaced, bool.
        may_replace_none: let a block end in which no token was replaced.

    Raises:
        ValueError: the model calls the module more than once in a pass.
        RuntimeError: the block ends and no token was replaced.
    """
    tokenizer = model.tokenizer if isinstance(model, LanguageModel) else None
    excluded = torch.tensor(excluded_tokens(tokenizer, exclude_tokens), dtype=torch.int64)
    whole = model.model if isinstance(model, LanguageModel) else model
    if not isinstance(whole, nn.Module):
        raise TypeError(f"model must be a LanguageModel or a module; got {type(model).__name__}")
    check_int("drop_positions", drop_positions, 0)
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool; got {mask.dtype}")
    elif mask not in (None, "last"):
        raise ValueError(f"mask must be a bool tensor, 'last' or None; got {mask!r}")
    path = resolve_hook(whole, path)
    replacement = _Replacement(
        whole,
        path,
        function,
        from_input=from_input,
        source=source,
        mask=mask,
        drop_positions=drop_positions,
        excluded=excluded,
        bounds=bounds,
        watch=watch,
    )
    done = replacement.done
    with running(whole), replacement.hooked():
        yield done
        if done.n_replaced == 0 and not may_replace_none:
            raise RuntimeError(f"path={path!r}: no token was replaced; {_why_none(done, bounds)}")


def _why_none(done: Splice, bounds: tuple[float, float]) -> str:
    if done.n_tokens == 0:
        return (
            "the module was never called while the block ran: no forward of this model ran, "
            "another copy of it did (a compiled or exported one), or its forward takes a path that "
            "bypasses the module"
        )
    norms = "" if math.isinf(max(bounds)) else f", or have a norm over {min(bounds):.3g}"
    return (
        f"all {done.n_tokens:,} tokens that passed are left out: they are among the first "
        f"drop_positions of their sequence, masked, padding or special tokens{norms}"
    )


@contextmanager
def spliced(
    model: LanguageModel | nn.Module,
    path: str,
    autoencoder: Any,
    edit: Edit | None = None,
    mask: Tensor | Literal["last"] | None = None,
    *,
    add_error: bool = False,
    source: str | None = None,
    drop_positions: int = 1,
    exclude_tokens: Iterable[int] | None = None,
    max_norm_ratio: float | None = MAX_NORM_RATIO,
    record: bool = False,
    may_replace_none: bool = False,
) -> Iterator[Splice]:
    """Put an autoencoder in the place of a module's output while the block runs.

    Works in any forward of the model: under ``generate`` with its cache of keys and values, with
    padding on either side, under autograd (gradients reach the states before, and the
    autoencoder's parameters; bits by their surrogate). Blocks may be nested, for several modules
    or one; hooks go when the block ends, however it ends.

    Example::

        off = torch.tensor([feature])
        with spliced(lm, "model.layers.11", bae, lambda f: f.index_fill(1, off, 0.0)):
            lm.model.generate(**prompt)

    Args:
        model: a :class:`LanguageModel`, or any module.
        path: the module's path, as ``named_modules()`` spells it. Its output, or the first part of
            it, is ``[batch, length, d]``.
        autoencoder: see :func:`reconstruct`. A transcoder encodes the module's input.
        edit: dense features ``[m, F]`` of some tokens to features in their place; floats need not
            be 0 or 1. It is given a copy.
        mask: bool, ``[batch, length]`` after broadcasting: tokens that may be replaced; "last":
            the last real token of each sequence in every forward, so under ``generate`` the
            prompt's last and all that follow. None: all.
        add_error: keep what the autoencoder does not explain.
        source: for a transcoder, the path of the module whose output it encodes, called earlier in
            the same forward; None: the input of the module at ``path``.
        drop_positions: this many tokens at the start of each sequence stay as they are.
        exclude_tokens: ids whose states stay as they are; None: the special tokens of a
            :class:`LanguageModel`'s tokenizer, as a harvest drops them; empty: none.
        max_norm_ratio: so do tokens whose norm is over this multiple of the usual, see above;
            None: no bound.
        record: keep which features are on.
        may_replace_none: let a block end in which no token was replaced.

    The model is in evaluation mode and runs uncompiled until the block ends. A warning says where
    the autoencoder's metadata name another language model or another module.

    Yields:
        A :class:`Splice` that counts.

    Raises:
        TypeError: an autoencoder without encode and decode, or a model that is no module.
        ValueError: no such module, an argument out of range, or shapes that do not fit.
        RuntimeError: a source that is called after the module, or no token was replaced when the
            block ends: the module was not called, or all its tokens are left out.
    """
    as_autoencoder(autoencoder)
    if max_norm_ratio is not None and not max_norm_ratio > 0:
        raise ValueError(f"max_norm_ratio must be over 0 or None; got {max_norm_ratio!r}")
    transcoder = bool(getattr(autoencoder, "is_transcoder", False))
    if source is not None and not transcoder:
        raise ValueError(f"source={source!r} is for a transcoder; the autoencoder is none")

    whole = model.model if isinstance(model, LanguageModel) else model
    metadata = getattr(getattr(autoencoder, "config", None), "metadata", None)
    if isinstance(metadata, dict) and isinstance(whole, nn.Module):
        name = model.name if isinstance(model, LanguageModel) else None
        gap = mismatch(metadata, model_name=name, model=whole, path=resolve_hook(whole, path))
        if gap is not None:
            warnings.warn(f"autoencoder: {gap}", UserWarning, stacklevel=3)

    codes: list[BinaryCode] = []

    def watch(x: Tensor, chosen: Tensor) -> None:
        some = bool(chosen.any())
        # without a token to keep, any row tells the width
        code = as_autoencoder(autoencoder).active(
            x[chosen] if some else x.reshape(-1, x.shape[-1])[:1]
        )
        words = code.words.new_zeros(*chosen.shape, code.words.shape[-1])
        if some:
            words[chosen.to(words.device)] = code.words
        codes.append(BinaryCode(words, code.n_columns, row_mask=chosen.to(words.device)))

    with replaced_output(
        model,
        path,
        lambda x, y: reconstruct(autoencoder, x, y, edit, add_error),
        from_input=transcoder,
        source=source,
        mask=mask,
        drop_positions=drop_positions,
        exclude_tokens=exclude_tokens,
        bounds=norm_bounds(autoencoder, max_norm_ratio),
        watch=watch if record else None,
        may_replace_none=may_replace_none,
    ) as done:
        done.codes = codes
        yield done
