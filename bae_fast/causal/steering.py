"""Features that tell two sets of prompts apart, and what setting them by hand does.

A feature's share of prompts in which it is on, at the last token, is compared between sets A and
B by the z of two proportions with pooled variance; p is two-sided and multiplied by the number of
features that vary (Bonferroni). The z takes prompts for independent: for few-shot and zero-shot
prompts of the same questions it errs to the safe side.

Steering sets the features of the largest difference at the last token of prompts of B (and at
every token generated after it) to what they mostly are in A, and leaves all else as it is, the
autoencoder's error included. The control sets as many random features the same way, each drawn
among those whose share of B is nearest to that of the feature it stands for, so that as many
features change their value.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bae_fast.autoencoder import as_autoencoder
from bae_fast.causal.distributions import divergence
from bae_fast.causal.splice import replaced_output, spliced
from bae_fast.lm.inputs import check_length, text_tokens
from bae_fast.lm.loading import LanguageModel
from bae_fast.lm.states import states_at

MODES = ("clamp", "add")

# a control is drawn among this many features of the nearest density
_NEAREST = 16


class FeatureDifference(NamedTuple):
    """One feature in two sets of prompts.

    Attributes:
        feature: its number.
        share_a, share_b: share of the prompts in which it is on at the last token.
        z: the z score of two proportions.
        p: two-sided, times the number of features that vary, at most 1.
        value: mean of the feature where it is on, over both sets.
    """

    feature: int
    share_a: float
    share_b: float
    z: float
    p: float
    value: float


@dataclasses.dataclass(frozen=True)
class Differences:
    """All features in two sets; ``[F]``.

    Attributes:
        count_a, count_b: int64, prompts in which a feature is on.
        n_a, n_b: prompts.
        value: float64, mean of a feature where it is on; 0 where it never is.
        state_gap: float64 ``[d]``, mean state of A less mean state of B.
    """

    count_a: Tensor
    count_b: Tensor
    n_a: int
    n_b: int
    value: Tensor
    state_gap: Tensor

    @property
    def z(self) -> Tensor:
        """float64 ``[F]``; 0 where a feature does not vary."""
        share = (self.count_a + self.count_b).double() / (self.n_a + self.n_b)
        deviation = (share * (1 - share) * (1 / self.n_a + 1 / self.n_b)).sqrt()
        gap = self.count_a.double() / self.n_a - self.count_b.double() / self.n_b
        return torch.where(deviation > 0, gap / deviation, 0.0)

    def largest(self, n: int) -> list[FeatureDifference]:
        """The features with the largest difference of shares, fewest where only so many differ."""
        share_a = self.count_a.double() / self.n_a
        share_b = self.count_b.double() / self.n_b
        gap = (share_a - share_b).abs()
        # stable: of equal differences the lower number
        order = gap.argsort(descending=True, stable=True)[:n]
        total = self.count_a + self.count_b
        n_vary = int(((total > 0) & (total < self.n_a + self.n_b)).sum())
        z = self.z
        return [
            FeatureDifference(
                j,
                float(share_a[j]),
                float(share_b[j]),
                float(z[j]),
                min(math.erfc(abs(float(z[j])) / 2**0.5) * n_vary, 1.0),
                float(self.value[j]),
            )
            for j in order.tolist()
            if float(gap[j]) > 0
        ]


def prompt_tokens(
    lm: LanguageModel, prompts: Sequence[str], *, prepend_bos: bool | None = None
) -> list[list[int]]:
    """Token ids of every prompt.

    Args:
        prepend_bos: put the beginning-of-text token first; None: if the tokenizer does so itself.

    Raises:
        ValueError: no prompt, or one without a token.
    """
    tokens = [text_tokens(lm.tokenizer, prompt, prepend_bos=prepend_bos) for prompt in prompts]
    if not tokens or not all(tokens):
        raise ValueError("prompts must hold at least one prompt, none of them empty")
    return tokens


def feature_differences(
    lm: LanguageModel,
    path: str,
    autoencoder: Any,
    prompts_a: Sequence[str],
    prompts_b: Sequence[str],
    *,
    source: str | None = None,
) -> Differences:
    """Count features at the last token of two sets of prompts.

    Args:
        path: the path of the module whose output the autoencoder stands for.
        source: for a transcoder, the path of the module whose output it encodes.

    Raises:
        ValueError: an empty set or prompt, or a transcoder without a source.
    """
    if getattr(autoencoder, "is_transcoder", False) and source is None:
        raise ValueError("source must name the module whose output the transcoder encodes")
    read = path if source is None else source
    model = as_autoencoder(autoencoder)
    counts, sizes, means = [], [], []
    total: Tensor | float = 0.0
    for prompts in (prompts_a, prompts_b):
        states = states_at(lm, prompt_tokens(lm, prompts), [read])[0][read][:, 0]
        counts.append(model.active(states).counts().cpu())
        sizes.append(len(prompts))
        means.append(states.double().mean(0).cpu())
        with torch.no_grad():
            for part in model.blocks(states):
                found = model.activations(part)
                total = total + found.sum(0, dtype=torch.float64).cpu()
    on = counts[0] + counts[1]
    value = torch.as_tensor(total) / on.clamp_min(1)
    return Differences(counts[0], counts[1], sizes[0], sizes[1], value, means[0] - means[1])


def matched_controls(
    differences: Differences, chosen: Sequence[FeatureDifference], seed: int
) -> list[FeatureDifference]:
    """Random features, none of the chosen, each of nearly the same share of B as one of them.

    Raises:
        ValueError: fewer other features than chosen ones.
    """
    share_b = differences.count_b.double() / differences.n_b
    taken = {one.feature for one in chosen}
    if len(share_b) < 2 * len(taken):
        raise ValueError(
            f"chosen must be at most half of the {len(share_b)} features; got {len(taken)}"
        )
    draw = random.Random(seed)
    controls = []
    for one in chosen:
        order = (share_b - one.share_b).abs().argsort(stable=True).tolist()
        near = [j for j in order if j not in taken][:_NEAREST]
        j = draw.choice(near)
        taken.add(j)
        controls.append(
            one._replace(
                feature=j,
                # switched as the feature it stands for, at the strength of its own values
                value=float(differences.value[j]) or one.value,
            )
        )
    return controls


def steering_edit(
    chosen: Sequence[FeatureDifference], strength: float = 1.0, mode: str = "clamp"
) -> Callable[[Tensor], Tensor]:
    """An edit for :func:`bae_fast.causal.spliced` that moves features towards their state in A.

    Args:
        chosen: features; those commoner in A are switched on, the others off.
        strength: "clamp": on is ``strength`` times the feature's mean value where it is on (1
            for a bit), off is 0 at strength 1 and (1 - strength) times that value beyond.
            "add": ``strength`` times that value is added or taken away, whatever is there: the
            decoder's direction added to the state.
        mode: one of ``MODES``.

    Raises:
        ValueError: an unknown mode, or no feature.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    if not chosen:
        raise ValueError("chosen must hold at least one feature; got none")
    ids = torch.tensor([one.feature for one in chosen])
    value = torch.tensor([one.value for one in chosen], dtype=torch.float32)
    up = torch.tensor([one.share_a > one.share_b for one in chosen])

    def edit(found: Tensor) -> Tensor:
        at, size, rise = ids.to(found.device), value.to(found), up.to(found.device)
        if mode == "add":
            return found.index_add(-1, at, (strength * torch.where(rise, size, -size)).expand(
                *found.shape[:-1], -1
            ))  # fmt: skip
        goal = torch.where(rise, strength * size, (1 - max(strength, 1.0)) * size)
        return set_features(at, goal)(found)

    return edit


def set_features(
    features: Sequence[int] | Tensor, values: Sequence[float] | Tensor
) -> Callable[[Tensor], Tensor]:
    """An edit for :func:`bae_fast.causal.spliced` that gives features these values everywhere.

    Args:
        features: k features, none twice.
        values: a value each: 0 switches a feature off, 1 sets a bit.
    """
    ids, goals = torch.as_tensor(features, dtype=torch.int64), torch.as_tensor(values)

    def edit(found: Tensor) -> Tensor:
        goal = goals.to(found).expand(*found.shape[:-1], -1).contiguous()
        return found.index_copy(-1, ids.to(found.device), goal)

    return edit


def next_token(
    lm: LanguageModel,
    path: str,
    autoencoder: Any,
    tokens: Sequence[Sequence[int]],
    edit: Callable[[Tensor], Tensor] | None = None,
    *,
    source: str | None = None,
) -> Tensor:
    """Log-probabilities of the token after each prompt, float32 ``[n, V]``, with an edit there.

    Args:
        path, autoencoder, source: see :func:`bae_fast.causal.spliced`.
        tokens: token ids of n prompts, as :func:`prompt_tokens` gives them.
        edit: what changes the features of each last token; None: the numbers are the model's own.
    """
    with spliced(
        lm, path, autoencoder, edit, "last", add_error=True, source=source, exclude_tokens=()
    ):
        after = states_at(lm, tokens, [path], next_token=True)[1]
    assert after is not None
    return after


def next_token_shifted(
    lm: LanguageModel, path: str, tokens: Sequence[Sequence[int]], gap: Tensor
) -> Tensor:
    """The same with a vector ``[d]`` added to the state of each prompt's last token.

    With the difference of two sets' mean states it is what no choice of features enters.
    """
    with replaced_output(lm, path, lambda _x, y: y + gap.to(y), mask="last", exclude_tokens=()):
        after = states_at(lm, tokens, [path], next_token=True)[1]
    assert after is not None
    return after


@torch.no_grad()
def generate(
    lm: LanguageModel,
    path: str,
    autoencoder: Any,
    prompt: str,
    edit: Callable[[Tensor], Tensor] | None = None,
    *,
    n_tokens: int = 24,
    source: str | None = None,
) -> str:
    """Greedy continuation of a prompt, with an edit at its last token and at all after it."""
    ids = torch.tensor(prompt_tokens(lm, [prompt]), device=lm.device)
    check_length(lm.model, ids.shape[1] + n_tokens, "prompt and n_tokens")
    end = lm.tokenizer.eos_token_id
    with spliced(
        lm, path, autoencoder, edit, "last", add_error=True, source=source, exclude_tokens=()
    ):
        out = lm.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_tokens,
            do_sample=False,
            pad_token_id=end if end is not None else 0,
        )
    return str(lm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def set_distance(after_a: Tensor, after_b: Tensor) -> float:
    """JS in bits between the mean next-token distributions of two sets of prompts.

    Args:
        after_a, after_b: log-probabilities ``[n, V]``.
    """
    p, q = (after.exp().mean(0, keepdim=True).log() for after in (after_a, after_b))
    return float(divergence(p, q).js)
