"""Entropy of the last prompt token as demonstrations are added.

A prompt is k demonstrations and a question; the state read is that of its last token, from which
the answer is predicted. Conditions: the same k demonstrations for every prompt ("fixed", as the
released program draws them) or fresh ones for each ("fresh"); their labels true or random.
Questions never stand among the demonstrations.

One autoencoder a module is fitted to the states of half of the questions, all conditions and
numbers of demonstrations together, so that all entropies are of one code; they are measured on
the other half. Beside each: accuracy (the largest probability among the labels' first tokens) and
the entropy of the next token over the whole vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bae_fast.entropy.fit import fit_bae, measure
from bae_fast.entropy.layers import usual_rows
from bae_fast.lm.inputs import text_tokens
from bae_fast.lm.loading import LanguageModel
from bae_fast.lm.states import states_at
from bae_fast.lm.tasks import Task
from bae_fast.model import PRESETS as MODEL_PRESETS
from bae_fast.training import TrainingConfig

DRAWS = ("fixed", "fresh")
LABELS = ("true", "random")


class Condition(NamedTuple):
    """How the prompts of a set are made.

    Attributes:
        draw: one of :data:`DRAWS`.
        labels: one of :data:`LABELS`.
        sample: which of the draws of demonstrations that all prompts share.
        shots: demonstrations before the question.
    """

    draw: str
    labels: str
    sample: int
    shots: int


def divide(task: Task) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """Examples that are asked, and the quarter at the end that demonstrations come from."""
    n_questions = len(task.examples) - max(len(task.examples) // 4, 1)
    return task.examples[:n_questions], task.examples[n_questions:]


def make_prompts(
    task: Task, n_prompts: int, shots: int, *, draw: str, labels: str, seed: int, sample: int = 0
) -> tuple[list[str], list[str]]:
    """Prompts and the true answers of their questions.

    The questions are the first examples of the task, the same in every condition, again from the
    first where they run out; demonstrations come from the quarter at the end. For a seed, the
    demonstrations of k shots begin with those of k - 1.

    Args:
        sample: which of the draws of demonstrations that all prompts share.

    Raises:
        ValueError: too few examples for the shots, or an unknown condition.
    """
    if draw not in DRAWS or labels not in LABELS:
        raise ValueError(
            f"draw must be one of {', '.join(DRAWS)} and labels of {', '.join(LABELS)}; "
            f"got {draw!r}, {labels!r}"
        )
    questions, pool = divide(task)
    if not 0 <= shots <= len(pool):
        raise ValueError(f"shots must lie in 0 to {len(pool)} for {task.name}; got {shots}")
    prompts, answers = [], []
    for i in range(n_prompts):
        text, answer = questions[i % len(questions)]
        which = -sample if draw == "fixed" else i + 1
        # strings seed alike on every machine; one order a prompt, cut after k
        order, noise = random.Random(f"{seed} {which}"), random.Random(f"labels {seed} {which}")
        shown = order.sample(pool, len(pool))[:shots]
        parts = [
            task.show(demo, label if labels == "true" else noise.choice(task.labels))
            for demo, label in shown
        ]
        prompts.append("".join(parts) + task.show(text))
        answers.append(answer)
    return prompts, answers


def label_tokens(tokenizer: Any, labels: Sequence[str]) -> Tensor:
    """The first token of each label after the colon, int64 ``[L]``.

    Raises:
        ValueError: two labels begin with the same token.
    """
    first = [tokenizer(f" {label}", add_special_tokens=False)["input_ids"][0] for label in labels]
    if len(set(first)) < len(first):
        raise ValueError(
            f"labels must begin with different tokens; got {', '.join(labels)}: rename them"
        )
    return torch.tensor(first)


def run_task(
    lm: LanguageModel,
    task: Task,
    hooks: Sequence[str],
    shots: Sequence[int],
    *,
    n_prompts: int,
    expansion: int,
    config: TrainingConfig,
    draws: Sequence[str] = DRAWS,
    labels: Sequence[str] = LABELS,
    fixed_samples: int = 1,
    prepend_bos: bool | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Every condition of one task: an entry a hook, condition, draw and number of demonstrations.

    Fixed demonstrations are one draw out of many: ``fixed_samples`` draws, each measured alone
    ("sample" of an entry). Without demonstrations all conditions are one prompt: run once, entered
    for each. ``config.seed`` also draws the demonstrations. Prompts begin with BOS if
    ``prepend_bos``, or (None) if the tokenizer itself begins a text with it.
    """
    answers_at = label_tokens(lm.tokenizer, task.labels)
    conditions = [
        Condition(draw, kind, sample, k)
        for draw in draws
        for kind in labels
        for sample in range(fixed_samples if draw == "fixed" else 1)
        for k in shots
    ]
    first = Condition(draws[0], labels[0], 0, 0)  # stands for every prompt without demonstrations
    cells: dict[Condition, dict[str, Any]] = {}
    states: dict[Condition, dict[str, Tensor]] = {}
    for condition in conditions:
        if condition.shots == 0 and condition != first:
            continue
        prompts, answers = make_prompts(
            task,
            n_prompts,
            condition.shots,
            draw=condition.draw,
            labels=condition.labels,
            seed=config.seed,
            sample=condition.sample,
        )
        tokens = [text_tokens(lm.tokenizer, one, prepend_bos=prepend_bos) for one in prompts]
        shared = condition.draw == "fixed"
        found, after = states_at(
            lm, tokens, hooks, next_token=True, share_prefix=shared, progress=progress
        )
        assert after is not None
        states[condition] = {hook: part[:, 0] for hook, part in found.items()}
        truth = torch.tensor([task.labels.index(answer) for answer in answers])
        cells[condition] = _answered(after, answers_at, truth) | {
            "prompt_tokens": sum(map(len, tokens)) / len(tokens)
        }
    # a question is on one side only, however often it is asked
    question = torch.arange(n_prompts) % len(divide(task)[0])
    heldout = question % 2 == 1
    results = []
    for hook in hooks:
        parts = []
        for condition, found in states.items():
            # all draws of fixed demonstrations together weigh as much as fresh ones
            n_draws = fixed_samples if condition.draw == "fixed" and condition.shots > 0 else 1
            own = question // 2 % n_draws == condition.sample % n_draws
            parts.append(found[hook][~heldout & own])
        rows, limit = usual_rows(torch.cat(parts))
        bae = fit_bae(
            rows,
            expansion * rows.shape[1],
            dataclasses.replace(config, batch_size=min(config.batch_size, len(rows) // 2)),
            start="random",
            surrogate_width=MODEL_PRESETS["sparse"]["surrogate_width"],
        )
        measured = {
            condition: measure(bae, usual_rows(found[hook][heldout], limit)[0])
            for condition, found in states.items()
        }
        for condition in conditions:
            run = condition if condition.shots else first
            results.append(
                {"hook": hook, **condition._asdict(), "n_train": len(rows)}
                | {**cells[run], **measured[run]}
            )
    return results


def _answered(after: Tensor, answers_at: Tensor, truth: Tensor) -> dict[str, float]:
    """What log-probabilities ``[n, V]`` of the next token say of the answers.

    Args:
        answers_at: the first token of each label.
        truth: int64 ``[n]``, the label that is right.
    """
    of_labels = after[:, answers_at]
    entropy = torch.special.entr(after.exp()).sum(1) / math.log(2)  # of -inf too
    return {
        "accuracy": float((of_labels.argmax(1) == truth).double().mean()),
        "next_token_bits": float(entropy.double().mean()),
        "label_mass": float(of_labels.exp().sum(1).double().mean()),
    }
