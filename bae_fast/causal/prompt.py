"""One text through a language model: features of its tokens, and what setting some of them changes.

The model as it is and the model with features set by hand read the same tokens. At every token p
and q are the two next-token distributions, and KL(p | q) in bits says how much the change matters
there. The autoencoder's error stays in place, so nothing but the features that are set changes.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bae_fast.arguments import all_finite, check_int
from bae_fast.autoencoder import as_autoencoder
from bae_fast.causal.distributions import divergence
from bae_fast.causal.splice import norm_bounds, replaced_output, spliced
from bae_fast.causal.steering import set_features
from bae_fast.codes import BinaryCode
from bae_fast.lm.cache import MAX_NORM_RATIO
from bae_fast.lm.inputs import check_ids, check_length, text_tokens
from bae_fast.lm.loading import LanguageModel

# passes whose states are kept: a reader goes back and forth between a few
_KEPT = 8


@dataclasses.dataclass(frozen=True)
class PromptFeatures:
    """The features of one text's tokens.

    Attributes:
        tokens: token ids, int64 ``[n]``.
        read: bool ``[n]``, tokens whose state the autoencoder is given; the first ones and those
            of outlying norm are left out, as in a harvest.
        code: which features are on, a code ``[m, F]`` of the m tokens that are read, in order.
        values: float32 ``[m, F]``: the margin of each bit, or the activation of each feature.
    """

    tokens: Tensor
    read: Tensor
    code: BinaryCode
    values: Tensor


@dataclasses.dataclass(frozen=True)
class PromptChange:
    """What setting features does to the tokens that could come next.

    Attributes:
        kl_bits: KL(as it is | changed) at each token, in bits, float64 ``[n]``.
        tokens: ids of the likeliest tokens after the chosen one, as it is and changed, each
            int64 ``[k]``, the likeliest first.
        before, after: probabilities of both lists, as it is and changed, float32 ``[2, k]``.
    """

    kl_bits: Tensor
    tokens: tuple[Tensor, Tensor]
    before: Tensor
    after: Tensor


class Prompt:
    """A language model with an autoencoder at one of its modules, which reads texts of a reader.

    The states of the last few passes are kept, so that another question about the same text costs
    no further pass. One thread at a time may ask.
    """

    def __init__(
        self,
        lm: LanguageModel,
        path: str,
        autoencoder: Any,
        *,
        source: str | None = None,
        max_tokens: int = 256,
        drop_positions: int = 1,
        max_norm_ratio: float | None = MAX_NORM_RATIO,
    ) -> None:
        """Put an autoencoder beside a module.

        Args:
            lm, path, autoencoder, source, drop_positions, max_norm_ratio: see
                :func:`bae_fast.causal.spliced`.
            max_tokens: the most tokens of a text, the beginning-of-text token included.

        Raises:
            ValueError: max_tokens is below 1, or more than the model has positions.
        """
        check_int("max_tokens", max_tokens, 1)
        check_length(lm.model, max_tokens, "max_tokens")
        self.lm, self.path, self.source = lm, path, source
        self.autoencoder, self.model = autoencoder, as_autoencoder(autoencoder)
        self.max_tokens = max_tokens
        self.drop_positions, self.max_norm_ratio = drop_positions, max_norm_ratio
        self._passes: OrderedDict[Any, Any] = OrderedDict()

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with the beginning-of-text token where the tokenizer asks for it.

        Raises:
            ValueError: a text without a token, or of more than max_tokens.
        """
        tokens = text_tokens(self.lm.tokenizer, text)
        if not 1 <= len(tokens) <= self.max_tokens:
            raise ValueError(f"text must give 1 to {self.max_tokens:,} tokens; got {len(tokens):,}")
        check_ids(self.lm.model, torch.tensor(tokens), "text")
        return tokens

    def features(self, tokens: list[int]) -> PromptFeatures:
        """The features of every token."""
        found: PromptFeatures = self._read(tokens)[1]
        return found

    def change(
        self,
        tokens: list[int],
        settings: Mapping[int, float],
        *,
        at: int | None = None,
        only_there: bool = False,
        n_tokens_shown: int = 10,
    ) -> PromptChange:
        """What setting features does to the tokens that could come next.

        Args:
            tokens: as :meth:`tokenize` gives them.
            settings: value by feature: 0 switches it off, 1 sets a bit.
            at: the token after which the likeliest are listed; None: the last.
            only_there: set the features at that token alone; without it, at every token that is
                read.
            n_tokens_shown: the number of tokens listed.

        Raises:
            ValueError: a feature or a token that is not there, or a value that is not finite.
        """
        at = len(tokens) - 1 if at is None else at
        if not 0 <= at < len(tokens):
            raise ValueError(f"at must lie in 0 to {len(tokens) - 1}; got {at}")
        ids = sorted(settings)
        if ids and not 0 <= ids[0] <= ids[-1] < self.model.d_sae:
            raise ValueError(
                f"settings must name features from 0 to {self.model.d_sae - 1}; got {ids}"
            )
        values = torch.tensor([settings[j] for j in ids], dtype=torch.float32)
        if not all_finite(values):
            raise ValueError(f"settings must be finite; got {values.tolist()}")
        original = self._read(tokens)[0]
        changed = original
        if ids:
            mask = None
            if only_there:
                mask = torch.zeros(1, len(tokens), dtype=torch.bool)
                mask[0, at] = True
            key = (tuple(tokens), tuple(ids), tuple(values.tolist()), at if only_there else None)
            changed = self._keep(key, lambda: self._changed(tokens, ids, values, mask))
        head = self.lm.head
        with torch.no_grad():
            kl = [
                divergence(head(p), head(q)).kl
                for p, q in zip(
                    original.split(head.rows_at_a_time),
                    changed.split(head.rows_at_a_time),
                    strict=True,
                )
            ]
            both = [
                head(states[at : at + 1]).softmax(-1)[0].cpu() for states in (original, changed)
            ]
        k = min(n_tokens_shown, len(both[0]))
        p_best, q_best = (p.topk(k).indices for p in both)
        before, after = (torch.stack([p[p_best], p[q_best]]) for p in both)
        return PromptChange(torch.cat(kl), (p_best, q_best), before, after)

    # -- passes --------------------------------------------------------------------------------

    def _keep(self, key: Any, make: Any) -> Any:
        """What was made for a key, made now where it is not kept."""
        if key not in self._passes:
            self._passes[key] = make()
        self._passes.move_to_end(key)
        while len(self._passes) > _KEPT:
            self._passes.popitem(last=False)
        return self._passes[key]

    def _final(self, tokens: list[int]) -> Tensor:
        """What the head is given, ``[n, d]``, in the contexts that the caller has opened."""
        ids = torch.tensor([tokens], device=self.lm.device)
        states: Tensor = self.lm.body(input_ids=ids, use_cache=False).last_hidden_state[0]
        return states

    def _read(self, tokens: list[int]) -> tuple[Tensor, PromptFeatures]:
        found: tuple[Tensor, PromptFeatures] = self._keep(tuple(tokens), lambda: self._pass(tokens))
        return found

    @torch.no_grad()
    def _pass(self, tokens: list[int]) -> tuple[Tensor, PromptFeatures]:
        seen: list[tuple[Tensor, Tensor]] = []
        with replaced_output(
            self.lm,
            self.path,
            lambda _x, y: y,
            from_input=self.model.is_transcoder,
            source=self.source,
            drop_positions=self.drop_positions,
            bounds=norm_bounds(self.autoencoder, self.max_norm_ratio),
            watch=lambda x, chosen: seen.append((x.detach(), chosen)),
            may_replace_none=True,
        ):
            final = self._final(tokens)
        x, chosen = seen[0]
        x, read = x.reshape(-1, x.shape[-1]), chosen.reshape(-1)
        # without a token that is read, any row tells the shapes
        rows = x[read] if bool(read.any()) else x[:1]
        code, own = self.model.active(rows), self.model.as_own(rows)
        # a feature of several bits has no one margin
        margins = self.model.ranks_bits and self.model.n_bits == 1
        values = self.model.preactivation(own) if margins else self.model.activations(own)
        n = int(read.sum())
        features = PromptFeatures(
            torch.tensor(tokens), read.cpu(), code[:n].to("cpu"), values[:n].float().cpu()
        )
        return final, features

    @torch.no_grad()
    def _changed(
        self, tokens: list[int], ids: list[int], values: Tensor, mask: Tensor | None
    ) -> Tensor:
        with spliced(
            self.lm,
            self.path,
            self.autoencoder,
            set_features(ids, values),
            mask,
            add_error=True,
            source=self.source,
            drop_positions=self.drop_positions,
            max_norm_ratio=self.max_norm_ratio,
            may_replace_none=True,
        ):
            return self._final(tokens)
