"""Hidden states of several modules at chosen positions of many sequences, in one pass each.

For sets of states that are not a text's every token: one position of every window, the last token
of every prompt. What comes back lies in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bae_fast.lm.capture import Engine, check_states
from bae_fast.lm.inputs import check_ids, check_length, padded
from bae_fast.lm.keys import keys_name, repeated
from bae_fast.lm.loading import LanguageModel
from bae_fast.lm.logits import causal_model
from bae_fast.progress import progress_bar


@torch.no_grad()
def states_at(
    lm: LanguageModel,
    sequences: Sequence[Sequence[int]],
    hooks: Sequence[str],
    *,
    positions: Sequence[int] | None = None,
    next_token: bool = False,
    share_prefix: bool = False,
    batch_tokens: int = 1024,
    progress: bool = False,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Run the model over sequences and keep the outputs of modules at some positions.

    Sequences of similar length share a batch, padded at the end: attention is causal, so padding
    changes nothing before it.

    Args:
        lm: the model.
        sequences: token ids, each at least one.
        hooks: paths of modules whose output (or its first part) is [batch, length, d].
        positions: kept of every sequence, from 0; None: the last token alone.
        next_token: also log-probabilities of the token after the last.
        share_prefix: run the tokens that all sequences begin with once and keep their keys and
            values; the last token alone is kept. The same states up to rounding.
        batch_tokens: at most this many tokens a batch, padding included (but one sequence). On a
            CPU small batches are the quicker ones: 2,000 tokens/s on one core at 1,024 tokens
            (SmolLM2-135M, windows of 64), 1,200 at 4,096.

    Returns:
        hook -> ``[n, P, d]`` in the model's dtype (P = 1 for the last token), and float32
        ``[n, vocabulary]`` log-probabilities or None. The model runs in evaluation mode; the
        tensors are plain ones that autograd takes and that may be changed in place.

    Raises:
        ValueError: no sequence or hook, an empty sequence or one longer than the model has
            positions, a position beyond a sequence, an unknown token or no such module.
        RuntimeError: the model finished without calling a module.
    """
    if not sequences or not all(len(sequence) for sequence in sequences):
        raise ValueError("sequences must hold at least one sequence, none of them empty")
    if not hooks:
        raise ValueError("hooks must name at least one module; got none")
    shortest = min(len(sequence) for sequence in sequences)
    if positions is not None and not all(0 <= p < shortest for p in positions):
        raise ValueError(
            f"positions must lie in 0 to {shortest - 1}, the shortest sequence's last; "
            f"got {list(positions)}"
        )
    if share_prefix and positions is not None:
        raise ValueError("share_prefix must be False where positions are given")
    check_length(lm.model, max(map(len, sequences)), "sequences")
    for extreme in (min, max):
        ends = torch.tensor([extreme(sequence) for sequence in sequences])
        check_ids(lm.model, ends, "sequences")
    engine = Engine(lm, hooks)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    states: dict[str, list[Tensor]] = {name: [] for name in hooks}
    after: list[Tensor] = []
    total = sum(map(len, sequences))
    prefix: Sequence[int] = []
    kept: dict[str, Any] = {}
    step = lm.head.rows_at_a_time if next_token else 1
    with engine:
        name = keys_name(lm.model) if share_prefix else None
        if name is not None and (prefix := _common_prefix(sequences)):
            kept = _keys_and_values(engine, prefix, name, stop=not next_token)
            if kept[name].get_seq_length() == len(prefix):
                sequences = [sequence[len(prefix) :] for sequence in sequences]
            else:  # the pass ended before the first attention: nothing is kept to go on from
                prefix, kept = [], {}
        with progress_bar(total, what="states", unit="tok", show=progress) as bar:
            for batch in _batches(order, sequences, batch_tokens):
                ids, mask, lengths = padded([sequences[i] for i in batch])
                mask = torch.nn.functional.pad(mask, (len(prefix), 0), value=True)
                options = {
                    "input_ids": ids.to(lm.device),
                    "attention_mask": mask.to(lm.device).long(),
                    "use_cache": bool(kept),
                    **repeated(kept, len(batch)),
                }
                found, out = engine.run(functools.partial(lm.body, **options), stop=not next_token)
                rows = torch.arange(len(batch))[:, None].to(lm.device)
                at = (
                    (lengths - 1)[:, None]
                    if positions is None
                    else torch.tensor(list(positions))[None].expand(len(batch), -1)
                ).to(lm.device)
                check_states(found, ids)
                for name, output in zip(hooks, found.values(), strict=True):
                    states[name].append(output[rows, at].cpu())
                if next_token:
                    final = out.last_hidden_state[rows[:, 0], (lengths - 1).to(lm.device)]
                    after += [lm.head(part).log_softmax(-1).cpu() for part in final.split(step)]
                bar.update(int(lengths.sum()) + len(prefix) * len(batch))
    back = torch.empty(len(order), dtype=torch.int64)
    back[torch.tensor(order)] = torch.arange(len(order))
    kept = {name: torch.cat(parts)[back] for name, parts in states.items()}
    return kept, torch.cat(after)[back] if next_token else None


def _common_prefix(sequences: Sequence[Sequence[int]]) -> Sequence[int]:
    """The tokens that all sequences begin with, the last of the shortest left out."""
    first, last = min(map(list, sequences)), max(map(list, sequences))
    most = min(map(len, sequences)) - 1
    same = 0
    while same < most and first[same] == last[same]:
        same += 1
    return first[:same]


def _keys_and_values(
    engine: Engine, prefix: Sequence[int], name: str, *, stop: bool
) -> dict[str, Any]:
    """The argument by which every sequence goes on from the prefix."""
    from transformers import DynamicCache

    lm = engine.lm
    cache = DynamicCache(config=causal_model(lm.model).config)
    # blocks that are not run later are not run here either
    engine.run(
        functools.partial(
            lm.body,
            input_ids=torch.tensor([list(prefix)], device=lm.device),
            use_cache=True,
            **{name: cache},
        ),
        stop=stop,
    )
    return {name: cache}


def _batches(
    order: list[int], sequences: Sequence[Sequence[int]], batch_tokens: int
) -> list[list[int]]:
    """Runs of the order (short to long) whose padded size stays within the bound."""
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * len(sequences[i]) <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
