"""Features that tell few-shot from zero-shot prompts, and steering by them.

Features are chosen on half of the questions; all accuracies are of the other half. Zero-shot
prompts are steered by setting the chosen features at their last token, beside as many random
features of the same density, set in the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from bae_fast.baselines import load_autoencoder
from bae_fast.entropy.icl import divide, label_tokens, make_prompts
from bae_fast.experiments import runs, training
from bae_fast.experiments.data import (
    N_HELDOUT,
    Data,
    harvest_rows,
    load_model,
    model_name,
    pick_device,
)
from bae_fast.experiments.training import Training, new_autoencoder, training_config
from bae_fast.files import read_json, write_json, write_text
from bae_fast.lm.origin import check_model
from bae_fast.lm.tasks import TASKS, load_task
from bae_fast.model import ARCHITECTURE, BinaryAutoencoder
from bae_fast.progress import Stages
from bae_fast.training import Trainer

if TYPE_CHECKING:
    from bae_fast.causal import Differences, FeatureDifference
    from bae_fast.lm import LanguageModel

# what changes the features of a token
Edit = Callable[[Tensor], Tensor]

# what stands of a prompt in an example
_PROMPT_SHOWN = 200


@dataclasses.dataclass(frozen=True)
class Config(runs.Overwriting, Training, Data):
    """Find features that differ between two sets of prompts and set them by hand.

    Attributes:
        load: The folder of a saved autoencoder of the hook. Without it one is trained as the demo
            does.
        source: The path of the module whose output a transcoder reads.
        task: The task whose few-shot and zero-shot prompts are compared: sentiment, tense or
            another of the package's.
        shots: The number of demonstrations of the few-shot set.
        prompts: The number of prompts of a task, both halves together.
        positive: A text file with a prompt a line, in place of the few-shot set.
        negative: A text file with a prompt a line, the set that is steered.
        features: How many features are set, one number or several to compare.
        strengths: The strengths that are tried, times a feature's value. As a rule of thumb 1
            changes little, 8 shows what the feature stands for, and 20 breaks the text.
        mode: Whether a feature's value is set, clamp, or raised, add.
        controls: The number of draws of random features.
        examples: The number of continuations that are shown.
        out: The folder of the results.
        report_only: The table and the plot are made from the results in the folder, and nothing
            is run.
    """

    load: Path | None = None
    source: str | None = None
    task: str = "sentiment"
    shots: int = 8
    prompts: int = 256
    positive: Path | None = None
    negative: Path | None = None
    features: tuple[int, ...] = (8, 32)
    strengths: tuple[float, ...] = (1.0, 2.0, 4.0)
    mode: Literal["clamp", "add"] = "clamp"
    controls: int = 3
    examples: int = 3
    out: Path = Path("results/steer")
    report_only: bool = False


class Prompts(NamedTuple):
    """Two sets of prompts, of one half of the questions.

    Attributes:
        a, b: prompts: few-shot and zero-shot, or the lines of two files.
        answers: place of the true label of each, empty where there is none.
    """

    a: list[str]
    b: list[str]
    answers: list[int]


def run(config: Config) -> runs.Result:
    """Find features, steer by them, measure; write the table and the plot.

    Raises:
        ValueError, ImportError, OSError: naming the field, the package or the file.
        InterruptedRunError: it was interrupted while it trained.
    """
    from bae_fast.report import steer as report
    from bae_fast.report.plots import save_png
    from bae_fast.report.style import check_figures

    check_figures()
    if not config.report_only:
        check(config)
    with runs.results(config) as folder:
        values = (
            read_json(config.out / "steer.json") if config.report_only else steer(config, folder)
        )
        write_json(folder / "steer.json", values)
        with runs.reading(config.out / "steer.json", kept=config.report_only):
            text = report.report(values)
            plot = report.plot(values)
        write_text(folder / "steer.md", text)
        save_png(folder / "plot.png", plot)
    names = ("steer.json", "steer.md", "plot.png")
    return runs.Result(values, text, tuple(config.out / name for name in names))


def check(config: Config) -> None:
    """Find what would fail later before anything slow has run.

    Raises:
        ValueError: naming the field.
    """
    if (config.positive is None) != (config.negative is None):
        raise runs.ConfigError("positive", "and --negative must be given together")
    runs.check_one_of("task", config.task, TASKS)
    runs.check_one_of("mode", config.mode, ("clamp", "add"))
    runs.check_at_least(config, 1, "prompts", "controls", "expansion", "steps", "features")
    runs.check_at_least(config, 0, "examples")
    if config.load is None:
        training.check(config)
    if config.positive is None and (config.shots < 1 or config.prompts < 4):
        raise runs.ConfigError(
            "shots",
            f"must be at least 1 and --prompts 4; got {config.shots}, {config.prompts}",
        )


def open_autoencoder(config: Config, folder: Path, stages: Stages) -> Any:
    """The saved autoencoder, or one that is trained."""
    if config.load is None:
        return train_autoencoder(config, folder, stages)
    autoencoder = load_autoencoder(config.load, device=pick_device(config))
    check_model(autoencoder.config.metadata, model_name(config.model), "--model")
    return autoencoder


def train_autoencoder(config: Config, folder: Path, stages: Stages) -> BinaryAutoencoder:
    """Train as the demo does and save beside the results."""
    constants = training_config(config)
    cache, _, facts = harvest_rows(config, stages, constants.batch_size)
    rows = cache.rows[: cache.split(N_HELDOUT).train.stop]
    with stages.stage("train"):
        bae = new_autoencoder(config, rows, facts, stages, cache)
        runs.fit(Trainer(bae, rows, constants), folder, progress=config.progress)
        bae.save_pretrained(folder / "model")
    return bae.eval()


# -- prompts -----------------------------------------------------------------------------------


def read_prompts(field: str, path: Path) -> list[str]:
    """Lines of a text file, which a field names, that hold text."""
    from bae_fast.lm import read_text

    try:
        text = read_text(path)
    except ValueError as error:
        raise runs.ConfigError(field, str(error).removeprefix("path ")) from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def make_sets(config: Config) -> tuple[Prompts, Prompts, list[str]]:
    """Prompts to choose features on, prompts to measure on, and the labels.

    A question is in one half only, however often it is asked.
    """
    if config.positive is not None and config.negative is not None:
        a = read_prompts("positive", config.positive)
        b = read_prompts("negative", config.negative)
        if min(len(a), len(b)) < 4:
            raise runs.ConfigError(
                "positive",
                f"and --negative must have at least 4 lines; got {len(a)} and {len(b)}",
            )
        return Prompts(a[::2], b[::2], []), Prompts(a[1::2], b[1::2], []), []
    task = load_task(config.task)
    n = config.prompts
    few, answers = make_prompts(
        task, n, config.shots, draw="fresh", labels="true", seed=config.seed
    )
    zero, _ = make_prompts(task, n, 0, draw="fresh", labels="true", seed=config.seed)
    places = [task.labels.index(answer) for answer in answers]
    n_questions = len(divide(task)[0])
    halves = [[i for i in range(n) if (i % n_questions) % 2 == side] for side in (0, 1)]
    chosen, measured = (
        Prompts([few[i] for i in half], [zero[i] for i in half], [places[i] for i in half])
        for half in halves
    )
    return chosen, measured, list(task.labels)


# -- the experiment ----------------------------------------------------------------------------


def steer(config: Config, folder: Path) -> dict[str, Any]:
    """The whole experiment; JSON values."""
    from bae_fast import causal

    chosen_on, measured_on, labels = make_sets(config)
    stages = Stages(config.progress)
    autoencoder = open_autoencoder(config, folder, stages)
    lm = load_model(config, stages)
    hook, source = config.hook, config.source
    label_ids = label_tokens(lm.tokenizer, labels) if labels else None
    with stages.stage("features that differ"):
        found = causal.feature_differences(
            lm, hook, autoencoder, chosen_on.a, chosen_on.b, source=source
        )
    most = found.largest(max(config.features))
    if not most:
        raise ValueError("no feature differs between the two sets at their last tokens")
    if 2 * len(most) > autoencoder.d_sae:
        raise runs.ConfigError(
            "features",
            f"must be at most half of the autoencoder's {autoencoder.d_sae:,}, as the controls are "
            f"others; got {len(most):,}",
        )

    tokens_a = causal.prompt_tokens(lm, measured_on.a)
    tokens_b = causal.prompt_tokens(lm, measured_on.b)

    def after(tokens: list[list[int]], edit: Edit | None = None) -> Tensor:
        return causal.next_token(lm, hook, autoencoder, tokens, edit, source=source)

    with stages.stage("the model as it is"):
        plain = Plain(after(tokens_a), after(tokens_b), label_ids, measured_on.answers)
    rows = [
        {"what": "set A", **plain.measure(plain.after_a)},
        {"what": "set B", **plain.measure(plain.after_b)},
    ]
    with stages.stage("steer"):
        if source is None:
            moved = causal.next_token_shifted(lm, hook, tokens_b, found.state_gap)
            rows.append({"what": "state", **plain.measure(moved)})
        for tried, edit in edits(config, found, most):
            rows.append(tried | plain.measure(after(tokens_b, edit)))
    with stages.stage("continue some prompts"):
        examples = continuations(config, lm, autoencoder, measured_on, rows, most)
    # a Binary Autoencoder's configuration holds only what may differ
    kind = getattr(autoencoder.config, "architecture", ARCHITECTURE)
    return {
        "environment": runs.environment(),
        "settings": {
            "model_label": lm.label,
            "hook": hook,
            "source": source,
            "autoencoder": kind,
            "d_sae": autoencoder.config.d_sae,
            "trained_steps": None if config.load is not None else config.steps,
            "task": None if not labels else config.task,
            "shots": config.shots if labels else None,
            "n_chosen_on": [len(chosen_on.a), len(chosen_on.b)],
            "n_measured_on": [len(measured_on.a), len(measured_on.b)],
            "labels": labels,
            "mode": config.mode,
            "controls": config.controls,
            "seed": config.seed,
        },
        "features": [one._asdict() for one in most],
        "rows": rows,
        "examples": examples,
    }


class Plain(NamedTuple):
    """What the model says after both sets as they are: steered prompts are measured by it.

    Attributes:
        after_a, after_b: log-probabilities of the next token, ``[n, V]``.
        label_ids: the first token of each label; None: prompts without labels.
        answers: place of the true label of each prompt.
    """

    after_a: Tensor
    after_b: Tensor
    label_ids: Tensor | None
    answers: list[int]

    def measure(self, after: Tensor) -> dict[str, Any]:
        """How near log-probabilities ``[n, V]`` lie to those of A and B, and how often right."""
        from bae_fast import causal

        row: dict[str, Any] = {
            "distance_to_a": causal.set_distance(self.after_a, after),
            "js_to_b": float(causal.divergence(self.after_b, after).js.mean()),
        }
        if self.label_ids is not None:
            of_labels = after[:, self.label_ids]
            right = of_labels.argmax(1) == torch.tensor(self.answers)
            row["accuracy"] = float(right.double().mean())
            row["label_mass"] = float(of_labels.exp().sum(1).double().mean())
        return row


def edits(
    config: Config, found: Differences, most: list[FeatureDifference]
) -> Iterator[tuple[dict[str, Any], Edit]]:
    """Every setting of features that is tried, and what it is called in the results.

    Args:
        found: all features in the two sets.
        most: those that differ most, the first of which are set.
    """
    from bae_fast import causal

    for n in sorted({min(n, len(most)) for n in config.features}):
        picked = most[:n]
        sets = [("steered", 0, picked)] + [
            ("control", draw, causal.matched_controls(found, picked, config.seed + draw))
            for draw in range(config.controls)
        ]
        for strength in config.strengths:
            for what, draw, features in sets:
                tried = {"what": what, "draw": draw, "features": n, "strength": strength}
                yield tried, causal.steering_edit(features, strength, config.mode)


def continuations(
    config: Config,
    lm: LanguageModel,
    autoencoder: Any,
    prompts: Prompts,
    rows: list[dict[str, Any]],
    most: list[FeatureDifference],
) -> list[dict[str, Any]]:
    """Greedy continuations of prompts of B: as it is, and steered most strongly towards A."""
    from bae_fast import causal

    steered = [row for row in rows if row["what"] == "steered"]
    best = min(steered, key=lambda row: row["distance_to_a"])
    edit = causal.steering_edit(most[: best["features"]], best["strength"], config.mode)
    examples = []
    for prompt in prompts.b[: config.examples]:
        plain, moved = (
            causal.generate(lm, config.hook, autoencoder, prompt, e, source=config.source)
            for e in (None, edit)
        )
        examples.append(
            {
                "prompt": prompt[-_PROMPT_SHOWN:],
                "plain": plain,
                "steered": moved,
                "features": best["features"],
                "strength": best["strength"],
            }
        )
    return examples
