"""What a language model loses when an autoencoder stands in the place of a module's output.

At every token of text (no padding, no special token) but the first ones of a window the next-token
distribution of the model as it is, is compared with that of the model with the replaced states, see
:mod:`bae_fast.causal.distributions`.

Loss recovered is (loss_ablated - loss) / (loss_ablated - loss_original), with the same states
replaced by zeros or by their mean (the autoencoder's own, that of its training rows). Zeros in
the place of a residual stream break a model altogether, so nearly everything is recovered beside
them; the mean is the harder reference.

Final states are kept, ``[n, length, d]``; distributions over the vocabulary exist for a block of
tokens at a time, in fp32.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bae_fast.arguments import check_int
from bae_fast.causal.distributions import Divergence, divergence, judged_text, next_token_loss
from bae_fast.causal.splice import Edit, Splice, norm_bounds, replaced_output, spliced
from bae_fast.codes import BinaryCode
from bae_fast.lm.cache import MAX_NORM_RATIO
from bae_fast.lm.hooks import in_order, running
from bae_fast.lm.identity import own_functions
from bae_fast.lm.inputs import Padding
from bae_fast.lm.loading import LanguageModel
from bae_fast.progress import tracked


@dataclasses.dataclass(frozen=True)
class Substitution:
    """Means over tokens; the module's text says of what.

    Attributes:
        js_bits, kl_bits: divergence of the next-token distribution, in bits.
        js_standard_error: the standard error of the mean, from the means of windows; NaN where
            there is one window.
        loss_original, loss, loss_zero, loss_mean: cross-entropy in nats: as it is, with the
            autoencoder, and with zeros or the mean in the place of the same states.
        recovered_zero, recovered_mean: loss recovered beside each; 1 is no loss. NaN where
            ablation costs nothing.
        same_top1: share of tokens with the same most likely next token.
        replaced: share of the states that were replaced.
        n_tokens: next-token distributions compared.
    """

    js_bits: float
    js_standard_error: float
    kl_bits: float
    loss_original: float
    loss: float
    loss_zero: float
    loss_mean: float
    recovered_zero: float
    recovered_mean: float
    same_top1: float
    replaced: float
    n_tokens: int

    def summary(self) -> dict[str, Any]:
        """The numbers, for JSON: None for NaN."""
        values = dataclasses.asdict(self)
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in values.items()
        }


@dataclasses.dataclass(frozen=True)
class FeatureEffect:
    """What switching one feature off does at the tokens where it is on.

    Attributes:
        feature: its number.
        n_on: tokens where it was on and switched off, of those looked at.
        kl_bits: mean KL(as it is | switched off) of the next token there; None if never on.
        loss_change: mean change of the next token's cross-entropy there, in nats.
        lost, gained: tokens whose mean probability falls or rises most: (token id, change).
    """

    feature: int
    n_on: int
    kl_bits: float | None
    loss_change: float | None
    lost: list[tuple[int, float]]
    gained: list[tuple[int, float]]


class SubstitutionTest:
    """One language model and held-out windows, on which any number of autoencoders are judged.

    The pass of the model as it is, and those of the ablations, are made once.
    """

    def __init__(
        self,
        lm: LanguageModel,
        windows: Tensor,
        *,
        mask: Tensor | None = None,
        exclude_tokens: Iterable[int] | None = None,
        batch_size: int = 8,
        drop_positions: int = 1,
        max_norm_ratio: float | None = MAX_NORM_RATIO,
    ) -> None:
        """Run the model as it is.

        Args:
            lm: the model.
            windows: token ids ``[n_windows, length]``, length of at least drop_positions + 2.
            mask: ``[n_windows, length]``, false (or 0) at padding; given to the model. None:
                padding is where the tokenizer's padding token is, as in a harvest.
            exclude_tokens: ids whose states stay as they are and after which nothing is
                compared; None: the tokenizer's special tokens; empty: none.
            batch_size: windows a pass.
            drop_positions, max_norm_ratio: states left as they are, see
                :func:`bae_fast.causal.spliced`.

        Raises:
            TypeError: windows that are no integers.
            ValueError: windows or a mask of another shape, a batch size below 1, or no token of
                text with a known next one.
        """
        check_int("batch_size", batch_size, 1)
        text = judged_text(
            lm, windows, mask=mask, exclude_tokens=exclude_tokens, drop_positions=drop_positions
        )
        self.lm = lm
        self.windows = text.windows
        self.batch_size = batch_size
        self.drop_positions = drop_positions
        self.max_norm_ratio = max_norm_ratio
        self.exclude_tokens = text.exclude_tokens
        self._mask, self._text, self._has_next = text.mask, text.judged, text.has_next
        self._padding = Padding(lm.model)
        self._functions = _users_functions(lm)
        self.original = self._final_states(self.windows, self._mask)
        # behind the pass: the frequencies of some ropes follow from the longest text so far
        self._revision = lm.current_revision()
        self._ablated: dict[Any, float] = {}

    # -- the model -----------------------------------------------------------------------------

    def _final_states(
        self,
        windows: Tensor,
        mask: Tensor | None,
        replaced: Callable[[], Any] = contextlib.nullcontext,
    ) -> Tensor:
        """What the head is given, ``[n, length, d]`` on the CPU, in a context."""

        def forward(batch: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
            out = self._body(*batch).last_hidden_state.cpu()
            return out, out

        parts = windows.split(self.batch_size)
        masks = [None] * len(parts) if mask is None else mask.split(self.batch_size)
        batches = list(zip(parts, masks, strict=True))
        with (
            running(self.lm.model),
            replaced(),
            contextlib.closing(in_order(forward, batches, self.lm.device.type)) as results,
        ):
            return torch.cat([out for out, _ in results])

    @torch.no_grad()
    def _body(self, windows: Tensor, mask: Tensor | None) -> Any:
        ids = windows.to(self.lm.device)
        options = {} if mask is None else self._padding.arguments(ids, mask.to(self.lm.device))
        return self.lm.body(input_ids=ids, use_cache=False, **options)

    @torch.no_grad()
    def compare(self, changed: Tensor, window: Tensor, position: Tensor) -> Divergence:
        """Distributions after some tokens, as it is and from changed final states.

        Args:
            changed: final states ``[n, d]`` at these tokens.
            window, position: int64 ``[n]``, where they stand.
        """
        length = self.windows.shape[1]
        original = self.original[window, position]
        after = self.windows[window, (position + 1).clamp_max(length - 1)]
        targets = torch.where(self._has_next[window, position], after, -1)
        step = self.lm.head.rows_at_a_time
        parts = [
            divergence(self.lm.head(p), self.lm.head(q), t)
            for p, q, t in zip(
                original.split(step), changed.split(step), targets.split(step), strict=True
            )
        ]
        return Divergence(*(torch.cat(column) for column in zip(*parts, strict=True)))

    @torch.no_grad()
    def _losses(self, final: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of the next tokens from final states: no distribution to compare with."""
        step = self.lm.head.rows_at_a_time
        parts = []
        for states, after in zip(final.split(step), targets.split(step), strict=True):
            logits = self.lm.head(states)
            parts.append(next_token_loss(logits, logits.logsumexp(-1, keepdim=True), after))
        return torch.cat(parts)

    def _tokens(self) -> tuple[Tensor, Tensor]:
        """Tokens with a known next one, beyond those left out: (window, position)."""
        window, position = (self._text & self._has_next).nonzero(as_tuple=True)
        return window, position

    # -- what is measured ----------------------------------------------------------------------

    def run(
        self,
        path: str,
        autoencoder: Any,
        edit: Edit | None = None,
        *,
        source: str | None = None,
    ) -> Substitution:
        """The autoencoder in the place of a module's output, at all tokens at once.

        Args:
            path, autoencoder, edit, source: see :func:`bae_fast.causal.spliced`. An edit may write
                features with few bits, say.
        """
        self._check_model()
        window, position = self._tokens()
        done: list[Splice] = []

        @contextlib.contextmanager
        def replaced() -> Any:
            with self._spliced(path, autoencoder, edit=edit, source=source) as splice:
                done.append(splice)
                yield

        found = self.compare(
            self._final_states(self.windows, self._mask, replaced)[window, position],
            window,
            position,
        )
        zero, mean = (
            self._ablated_loss(path, autoencoder, kind, source=source) for kind in ("zero", "mean")
        )
        original, loss = float(found.loss_original.mean()), float(found.loss.mean())

        def recovered(ablated: float) -> float:
            cost = ablated - original
            return (ablated - loss) / cost if cost > 0 else math.nan

        return Substitution(
            js_bits=float(found.js.mean()),
            js_standard_error=_standard_error(found.js, window),
            kl_bits=float(found.kl.mean()),
            loss_original=original,
            loss=loss,
            loss_zero=zero,
            loss_mean=mean,
            recovered_zero=recovered(zero),
            recovered_mean=recovered(mean),
            same_top1=float(found.same.double().mean()),
            replaced=done[0].n_replaced / max(done[0].n_tokens, 1),
            n_tokens=len(window),
        )

    def ablated_loss(
        self, path: str, autoencoder: Any, kind: str, *, source: str | None = None
    ) -> float:
        """Cross-entropy in nats with the states that :meth:`run` replaces put to one value.

        Args:
            kind: "zero", or "mean": the target's mean in the autoencoder's normalisation, zero
                where it has none.
        """
        self._check_model()
        return self._ablated_loss(path, autoencoder, kind, source=source)

    def _ablated_loss(
        self, path: str, autoencoder: Any, kind: str, *, source: str | None = None
    ) -> float:
        if kind not in ("zero", "mean"):
            raise ValueError(f"kind must be 'zero' or 'mean'; got {kind!r}")
        mean = getattr(autoencoder, "target_mean", None) if kind == "mean" else None
        bounds = norm_bounds(autoencoder, self.max_norm_ratio)
        # autoencoders of the same rows share their ablations
        bytes_ = None if mean is None else mean.detach().cpu().float().numpy().tobytes()
        key = (path, source, kind, bounds, bytes_)
        if key not in self._ablated:
            window, position = self._tokens()

            def constant(_x: Tensor, y: Tensor) -> Tensor:
                return torch.zeros_like(y) if mean is None else mean.to(y).expand_as(y)

            def replaced() -> Any:
                return replaced_output(
                    self.lm,
                    path,
                    constant,
                    from_input=bool(getattr(autoencoder, "is_transcoder", False)),
                    source=source,
                    drop_positions=self.drop_positions,
                    exclude_tokens=self.exclude_tokens,
                    bounds=bounds,
                )

            final = self._final_states(self.windows, self._mask, replaced)[window, position]
            targets = self.windows[window, position + 1]
            self._ablated[key] = float(self._losses(final, targets).mean())
        return self._ablated[key]

    def last_token(
        self,
        path: str,
        autoencoder: Any,
        positions: Sequence[int] | None = None,
        *,
        source: str | None = None,
    ) -> Divergence:
        """The state of one token alone replaced, and the distribution of the token after it.

        The measure of the paper's second version: every window is cut after a position, and the
        state there is replaced; those before stay.

        Args:
            positions: where windows are cut; None: the middle and the end.

        Returns:
            A :class:`Divergence`, position by position, of each all windows with text there.

        Raises:
            ValueError: a position out of range, or one where no window has text.
        """
        self._check_model()
        length = self.windows.shape[1]
        chosen = [length // 2, length - 1] if positions is None else list(positions)
        if not chosen or not all(self.drop_positions <= p < length for p in chosen):
            raise ValueError(
                f"positions must lie in {self.drop_positions} to {length - 1}; got {chosen}"
            )
        parts = []
        for p in chosen:
            some = self._text[:, p].nonzero()[:, 0]
            if not len(some):
                raise ValueError(
                    f"positions must be some where a window has text; at {p} all are padding, "
                    "special tokens or among the first of their window"
                )
            states = self._final_states(
                self.windows[some, : p + 1],
                None if self._mask is None else self._mask[some, : p + 1],
                lambda: self._spliced(path, autoencoder, mask="last", source=source),
            )
            parts.append(self.compare(states[:, -1], some, torch.full_like(some, p)))
        return Divergence(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def codes(self, path: str, autoencoder: Any, *, source: str | None = None) -> BinaryCode:
        """Which features are on: ``[n_windows, length, F]``, masked where the state is left out."""
        self._check_model()
        return self._codes(path, autoencoder, source=source)

    def _codes(self, path: str, autoencoder: Any, *, source: str | None = None) -> BinaryCode:
        parts = []
        batches = torch.arange(len(self.windows)).split(self.batch_size)
        for rows in tracked(batches, len(self.windows), "windows", by=len):
            # one batch at a time: batches side by side would come in any order
            with (
                torch.no_grad(),
                self._spliced(
                    path,
                    autoencoder,
                    add_error=True,
                    source=source,
                    record=True,
                    may_replace_none=True,
                ) as splice,
            ):
                self._body(self.windows[rows], None if self._mask is None else self._mask[rows])
            if splice.n_tokens == 0:
                raise RuntimeError(f"path={path!r}: the model's forward never called this module")
            parts += [code.to("cpu") for code in splice.codes]
        return BinaryCode.cat(parts)

    def ablate_features(
        self,
        path: str,
        autoencoder: Any,
        feature_ids: Sequence[int],
        *,
        source: str | None = None,
        max_windows: int | None = None,
        n_tokens_shown: int = 5,
    ) -> list[FeatureEffect]:
        """Switch features off, one after the other, wherever they are on.

        The autoencoder's error stays, so nothing else changes. A feature is off at all tokens of
        a window at once: what is measured at one of them holds the effect of those before it.

        Args:
            feature_ids: features.
            max_windows: how many windows of each feature, the first in which it is on; None: all.
            n_tokens_shown: next tokens named in each direction.

        Raises:
            ValueError: a feature that is not there, or n_tokens_shown or max_windows below 1.
        """
        self._check_model()
        code = self._codes(path, autoencoder, source=source)
        if not all(0 <= j < code.n_columns for j in feature_ids):
            raise ValueError(
                f"feature_ids must lie in 0 to {code.n_columns - 1}; got {list(feature_ids)}"
            )
        if n_tokens_shown < 1 or (max_windows is not None and max_windows < 1):
            raise ValueError(
                f"n_tokens_shown and max_windows must be at least 1; got {n_tokens_shown}, "
                f"{max_windows}"
            )
        effects = []
        for j in feature_ids:
            on = ((code.words[..., j // 32] >> (j % 32)) & 1).bool()
            on &= self._has_next
            windows = on.any(1).nonzero()[:, 0][:max_windows]
            if len(windows) == 0:
                effects.append(FeatureEffect(j, 0, None, None, [], []))
                continue

            def off(found: Tensor, j: int = j) -> Tensor:
                return found.index_fill(-1, torch.tensor([j], device=found.device), 0.0)

            states = self._final_states(
                self.windows[windows],
                None if self._mask is None else self._mask[windows],
                lambda off=off: self._spliced(  # type: ignore[misc]
                    path, autoencoder, edit=off, add_error=True, source=source
                ),
            )
            row, position = on[windows].nonzero(as_tuple=True)
            window, changed = windows[row], states[row, position]
            found = self.compare(changed, window, position)
            change = self._probability_change(changed, window, position)
            up, down = change.topk(n_tokens_shown), (-change).topk(n_tokens_shown)
            effects.append(
                FeatureEffect(
                    j,
                    len(row),
                    float(found.kl.mean()),
                    float((found.loss - found.loss_original).mean()),
                    list(zip(down.indices.tolist(), (-down.values).tolist(), strict=True)),
                    list(zip(up.indices.tolist(), up.values.tolist(), strict=True)),
                )
            )
        return effects

    @torch.no_grad()
    def _probability_change(self, changed: Tensor, window: Tensor, position: Tensor) -> Tensor:
        """Mean over tokens of the change of every next token's probability, float64 ``[V]``."""
        total: Tensor | float = 0.0
        step = self.lm.head.rows_at_a_time
        original = self.original[window, position]
        for p, q in zip(original.split(step), changed.split(step), strict=True):
            change = self.lm.head(q).softmax(-1) - self.lm.head(p).softmax(-1)
            total = total + change.sum(0, dtype=torch.float64).cpu()
        return torch.as_tensor(total) / len(changed)

    def _spliced(self, path: str, autoencoder: Any, **options: Any) -> Any:
        return spliced(
            self.lm,
            path,
            autoencoder,
            drop_positions=self.drop_positions,
            exclude_tokens=self.exclude_tokens,
            max_norm_ratio=self.max_norm_ratio,
            **options,
        )

    def _check_model(self) -> None:
        """Refuse a model that is no longer the one whose own distributions are kept here."""
        now = _users_functions(self.lm)
        if [id(one) for one in now] != [id(one) for one in self._functions]:
            raise ValueError(
                "lm must have the forward hooks that it had when this test was made; some were "
                "added or removed since: make a new SubstitutionTest"
            )
        if self.lm.current_revision() != self._revision:
            raise ValueError(
                "lm must be as it was when this test was made; its weights, settings or adapters "
                "have changed since: make a new SubstitutionTest"
            )


def _users_functions(lm: LanguageModel) -> list[Any]:
    """Hooks and forwards that were put into a model, but for open splices: these are meant."""
    found = own_functions(lm.model)
    return [
        one for _, one in found if not str(getattr(one, "__module__", "")).startswith("bae_fast.")
    ]


def _standard_error(values: Tensor, group: Tensor) -> float:
    """The standard error of the mean of values ``[n]`` that are alike within a group; NaN for one.

    Groups of unequal sizes count by their size.
    """
    sizes = torch.bincount(group)
    sums = torch.zeros(len(sizes), dtype=values.dtype).index_add_(0, group, values)
    sums, sizes = sums[sizes > 0], sizes[sizes > 0]
    if len(sizes) < 2:
        return math.nan
    gaps = (sums - sizes * values.mean()) / sizes.double().mean()
    return float((gaps.square().sum() / (len(sizes) - 1) / len(sizes)).sqrt())
