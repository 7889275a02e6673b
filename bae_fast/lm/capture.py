"""Outputs of several modules of one forward pass, and which of their rows are kept.

Harvests, supplies that run the model while a trainer works, and states at chosen positions all
read a model's modules here.
"""

from __future__ import annotations

import contextlib
import fnmatch
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bae_fast.arguments import check_int
from bae_fast.lm.cache import MAX_NORM_RATIO, row_norms
from bae_fast.lm.hooks import find_module, first_part, in_own_dtype, resolve_hook, running
from bae_fast.lm.inputs import Padding, padding_mask, text_mask
from bae_fast.lm.loading import LanguageModel


def match_hooks(lm: LanguageModel, patterns: Sequence[str]) -> list[str]:
    """Paths of modules that match, in the model's order; ``*`` stands for one part of a path.

    Raises:
        ValueError: a pattern that matches no module.
    """
    names = [name for name, _ in lm.model.named_modules()]
    matched: set[str] = set()
    for pattern in patterns:
        parts = pattern.split(".")
        found = [
            name
            for name in names
            if len(name.split(".")) == len(parts)
            and all(map(fnmatch.fnmatchcase, name.split("."), parts))
        ]
        if not found:
            find_module(lm.model, pattern)  # its error names what is near
        matched.update(found)
    return [name for name in names if name in matched]


class _Done(Exception):  # noqa: N818 (no error: the way out)
    """Leaves a model's forward when all wanted modules have been called."""


class Engine:
    """Runs a model and keeps the outputs of some of its modules.

    The outputs are of each module's call in a pass; one that stands at several places of the model,
    and is called more than once, has no one state a token and is refused. A pass ends behind the
    last module, so that later blocks and the output head cost nothing. Several threads may run
    passes at the same time, and passes of others through the same model are left alone.

    Example::

        with Engine(lm, ["model.layers.3", "model.layers.11"]) as engine:
            states = engine.forward(tokens)  # path -> [batch, length, d]

    Attributes:
        lm: the model.
        hooks: paths of the modules, resolved.
    """

    def __init__(self, lm: LanguageModel, hooks: Sequence[str]) -> None:
        """Find the modules.

        Raises:
            ValueError: no hook, one twice, or no such module.
        """
        if isinstance(hooks, str) or not hooks:
            raise ValueError(f"hooks must name at least one module, in a list; got {hooks!r}")
        self.lm = lm
        self.hooks = [resolve_hook(lm.model, hook) for hook in hooks]
        if len(set(self.hooks)) < len(self.hooks):
            raise ValueError(f"hooks must name each module once; got {list(hooks)}")
        self._padding = Padding(lm.model)
        # modules that may be called again behind their first call: one whole pass will tell
        self._shared = {hook: paths for hook in self.hooks if len(paths := self._places(hook)) > 1}
        self._here = threading.local()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Engine:
        with contextlib.ExitStack() as stack:
            stack.enter_context(running(self.lm.model))
            for hook in self.hooks:
                module = self.lm.model.get_submodule(hook)
                stack.enter_context(_removed(module.register_forward_hook(self._hook(hook))))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    def _places(self, hook: str) -> list[str]:
        """Every path at which a module stands."""
        module = self.lm.model.get_submodule(hook)
        everywhere = self.lm.model.named_modules(remove_duplicate=False)
        return [path for path, one in everywhere if one is module]

    def _hook(self, name: str) -> Callable[[Any, Any, Any], None]:
        def keep(_module: Any, _arguments: Any, output: Any) -> None:
            found = getattr(self._here, "found", None)
            if found is None:  # a pass that is not ours
                return
            if name in found and name in self._shared:
                raise ValueError(
                    "hook must name a module that gives one state a token; "
                    f"{name!r} is called more than once in a pass, as it is also "
                    f"{', '.join(path for path in self._shared[name] if path != name)}"
                )
            out = first_part(output)
            last = self._here.stop and len({*found, name}) == len(self.hooks)
            # the pass goes on: some models add to a module's output in its place (Falcon's MLP)
            found.setdefault(name, out if last or not isinstance(out, Tensor) else out.clone())
            if last:
                raise _Done

        return keep

    def run(self, forward: Callable[[], Any], *, stop: bool = True) -> tuple[dict[str, Any], Any]:
        """Call the model in some way: (path -> output, what the call gave).

        Args:
            forward: calls the model, on this thread.
            stop: end the call behind the last module, without a result.

        Raises:
            RuntimeError: the call ended and a module was never called.
        """
        found: dict[str, Any] = {}
        self._here.found, self._here.stop = found, stop and not self._shared
        result = None
        try:
            with torch.no_grad(), in_own_dtype(self.lm.device), contextlib.suppress(_Done):
                result = forward()
        finally:
            self._here.found = None
        self._shared = {}  # each was called once
        for hook in self.hooks:
            if hook not in found:
                raise RuntimeError(f"hook={hook!r}: the model's forward never called this module")
        return {hook: found[hook] for hook in self.hooks}, result

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The modules' outputs for windows of tokens.

        Args:
            tokens: integers ``[batch, length]`` on any device.
            mask: the same shape, false (or 0) at padding.

        Returns:
            path -> ``[batch, length, d]`` on the model's device, in its dtype.

        Raises:
            RuntimeError: the model finished without calling a module.
            ValueError: a module whose output has another shape.
        """
        lm = self.lm
        ids = tokens.to(lm.device, torch.int64)
        options = {} if mask is None else self._padding.arguments(ids, mask.to(lm.device))
        found, _ = self.run(lambda: lm.model(input_ids=ids, use_cache=False, **options))
        check_states(found, ids)
        return found


def check_states(found: Mapping[str, Any], ids: Tensor) -> None:
    """Refuse outputs, by the paths of their modules, that give no state for each of the tokens.

    Raises:
        ValueError: an output that is not ``[batch, length, d]``.
    """
    for hook, out in found.items():
        shape = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        if not isinstance(out, Tensor) or out.dim() != 3 or out.shape[:2] != ids.shape:
            raise ValueError(
                "hook must name a module whose output is [batch, length, d], here "
                f"[{ids.shape[0]}, {ids.shape[1]}, d]; {hook!r} gives {shape}"
            )


@contextlib.contextmanager
def _removed(handle: Any) -> Iterator[None]:
    """Take a forward hook away at the end."""
    try:
        yield
    finally:
        handle.remove()


# -- rows --------------------------------------------------------------------------------------


def text_places(
    token_windows: Tensor, mask: Tensor | None, text: Tensor | None, drop_positions: int
) -> Tensor:
    """Which rows belong to text behind the dropped positions: bool ``[n (length - drop)]``.

    Args:
        token_windows: ``[n, length]``.
        mask: false at padding, see :func:`bae_fast.lm.inputs.padding_mask`; None: no padding.
        text: false where no text is, see :func:`bae_fast.lm.inputs.text_mask`; None: all of it is.
        drop_positions: tokens dropped at the start of each window, padding not counted.
    """
    wanted = torch.ones(token_windows.shape, dtype=torch.bool) if text is None else text.clone()
    if mask is not None:
        first = (mask.cpu() != 0).int().argmax(1, keepdim=True)
        wanted &= torch.arange(token_windows.shape[1]) - first >= drop_positions
    return wanted[:, drop_positions:].reshape(-1)


class Candidates(NamedTuple):
    """Rows of some windows before those of outlying norms are dropped.

    Attributes:
        x: hook -> ``[n, d]`` on the CPU: the rows at tokens that are text.
        norms: hook -> ``[n]``, see :func:`bae_fast.lm.cache.row_norms`.
        places: int64 ``[n]``: window of the batch times its length, plus the position.
        dropped: rows that are gone already, by reason: "position", "not_text".
    """

    x: dict[str, Tensor]
    norms: dict[str, Tensor]
    places: Tensor
    dropped: dict[str, int]

    def kept(self, limits: dict[str, float]) -> tuple[Tensor, dict[str, int]]:
        """Rows within the limits at every hook, bool ``[n]``, and all dropped ones by reason."""
        return within(self.norms, limits, self.dropped)


def within(
    norms: dict[str, Tensor], limits: dict[str, float], dropped: dict[str, int]
) -> tuple[Tensor, dict[str, int]]:
    """Rows that are finite and not above the limits at every hook, and the dropped by reason."""
    finite = torch.stack([norm.isfinite() for norm in norms.values()]).all(0)
    keep = torch.stack([norm <= limits[hook] for hook, norm in norms.items()]).all(0) & finite
    return keep, {
        **dropped,
        "not_finite": int((~finite).sum()),
        "norm": int((finite & ~keep).sum()),
    }


class Capture:
    """How windows of tokens become rows: the hooks, and what is dropped.

    Attributes:
        engine: runs the model; it must be entered (``with capture.engine:``) before
            :meth:`candidates`.
        drop_positions, max_norm_ratio, exclude_tokens: see :func:`bae_fast.lm.harvest`.
    """

    def __init__(
        self,
        lm: LanguageModel,
        hooks: Sequence[str],
        *,
        exclude_tokens: Iterable[int] | None = None,
        drop_positions: int = 1,
        max_norm_ratio: float = MAX_NORM_RATIO,
    ) -> None:
        """Find the modules.

        Raises:
            ValueError: no such module, or a number out of range.
        """
        check_int("drop_positions", drop_positions, 0)
        if not max_norm_ratio > 1:
            raise ValueError(f"max_norm_ratio must be over 1; got {max_norm_ratio!r}")
        self.engine = Engine(lm, hooks)
        self.exclude_tokens = None if exclude_tokens is None else sorted(exclude_tokens)
        self.drop_positions, self.max_norm_ratio = drop_positions, max_norm_ratio

    @property
    def lm(self) -> LanguageModel:
        """The model."""
        return self.engine.lm

    @property
    def hooks(self) -> list[str]:
        """Paths of the modules."""
        return self.engine.hooks

    def candidates(self, tokens: Tensor) -> Candidates:
        """Run windows ``[batch, length]`` and take the rows at text."""
        tokenizer, drop = self.lm.tokenizer, self.drop_positions
        mask = padding_mask(tokenizer, tokens)
        text = text_mask(tokenizer, tokens, mask=mask, exclude_tokens=self.exclude_tokens)
        wanted = text_places(tokens, mask, text, drop)
        places = torch.arange(tokens.numel()).view(tokens.shape)[:, drop:].reshape(-1)[wanted]
        x = {}
        for hook, out in self.engine.forward(tokens, mask).items():
            rows = out[:, drop:].reshape(-1, out.shape[-1])
            if len(places) < len(wanted):
                rows = rows[wanted.to(rows.device)]
            x[hook] = rows.cpu()
        norms = {hook: row_norms(rows) for hook, rows in x.items()}
        dropped = {"position": len(tokens) * drop, "not_text": int((~wanted).sum())}
        return Candidates(x, norms, places, dropped)

    def limit(self, norms: Tensor) -> float:
        """The largest norm that is kept, by the norms of the first rows.

        Raises:
            ValueError: no row is finite.
        """
        finite = norms[norms.isfinite()]
        if not len(finite):
            raise ValueError(
                "text must give hidden states that are finite; none of the first "
                f"{len(norms):,} rows is: try dtype='float32'"
            )
        return float(self.max_norm_ratio * finite.median())
