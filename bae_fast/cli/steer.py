"""``bae-fast steer``: features that tell few-shot from zero-shot prompts, and steering by them.

Features are chosen on half of the questions; all accuracies are of the other half. Zero-shot
prompts are steered by setting the chosen features at their last token, beside as many random
features of the same density, set in the same way.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bae_fast.baselines import load_autoencoder
from bae_fast.cli import demo
from bae_fast.cli.runs import environment
from bae_fast.entropy.icl import label_tokens, make_prompts
from bae_fast.files import read_json, write_json, write_text
from bae_fast.lm.tasks import TASKS, load_task
from bae_fast.model import ARCHITECTURE, BinaryAutoencoder
from bae_fast.training import PRESETS as TRAINING_PRESETS
from bae_fast.training import Trainer

if TYPE_CHECKING:
    from bae_fast.lm import LanguageModel

# features in the table, and what stands of a prompt in an example
N_FEATURES_SHOWN = 12
_PROMPT_SHOWN = 200


class Prompts(NamedTuple):
    """Two sets of prompts, of one half of the questions.

    Attributes:
        a, b: prompts: few-shot and zero-shot, or the lines of two files.
        answers: place of the true label of each, empty where there is none.
    """

    a: list[str]
    b: list[str]
    answers: list[int]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "steer",
        help="features that differ between two sets of prompts, and steering by them",
        description="Find features that differ between two sets of prompts and set them by hand.",
    )
    demo.add_data_arguments(parser)
    parser.add_argument(
        "--load", type=Path, default=None,
        help="folder of a saved autoencoder of --hook; default: one is trained as by the demo",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=2000, help="of the training without --load")
    parser.add_argument("--expansion", type=int, default=4, help="of that training, F / d")
    parser.add_argument(
        "--source", default=None, help="of a transcoder: path of the module whose output it reads"
    )
    parser.add_argument("--task", choices=TASKS, default="sentiment", help="few- against zero-shot")
    parser.add_argument("--shots", type=int, default=8, help="demonstrations of the few-shot set")
    parser.add_argument("--prompts", type=int, default=256, help="of a task, both halves")
    parser.add_argument(
        "--positive", type=Path, default=None, help="text file, a prompt a line, in place of --task"
    )
    parser.add_argument("--negative", type=Path, default=None, help="the set that is steered")
    parser.add_argument("--features", type=int, nargs="+", default=[8, 32], help="how many are set")
    parser.add_argument(
        "--strengths",
        type=float,
        nargs="+",
        default=[1.0, 2.0, 4.0],
        help="times a feature's value",
    )
    parser.add_argument("--mode", choices=("clamp", "add"), default="clamp", help="set or add")
    parser.add_argument("--controls", type=int, default=3, help="draws of random features")
    parser.add_argument("--examples", type=int, default=3, help="continuations shown")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/steer"))
    parser.add_argument(
        "--report-only", action="store_true", help="table and plot from --out/steer.json"
    )
    parser.set_defaults(run=run, preset="sparse", impl="auto")


def run(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    if arguments.report_only:
        result = read_json(out / "steer.json")
    else:
        check(arguments)
        result = steer(arguments)
        write_json(out / "steer.json", result)
    text = report(result)
    write_text(out / "steer.md", text)
    print("\n" + text)
    from bae_fast.report.plots import save_png

    save_png(out / "plot.png", plot(result))
    print(f"{out / 'steer.json'}, steer.md, plot.png")
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Find what would fail later before anything slow has run.

    Raises:
        ValueError: naming the option.
    """
    if (arguments.positive is None) != (arguments.negative is None):
        raise ValueError("--positive and --negative must be given together")
    for name in ("prompts", "controls", "expansion", "steps"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1; got {getattr(arguments, name)}")
    if min(arguments.features) < 1:
        raise ValueError(f"--features must be at least 1; got {arguments.features}")
    if arguments.examples < 0:
        raise ValueError(f"--examples must be at least 0; got {arguments.examples}")
    if arguments.positive is None and (arguments.shots < 1 or arguments.prompts < 4):
        raise ValueError(
            f"--shots must be at least 1 and --prompts 4; got {arguments.shots}, "
            f"{arguments.prompts}"
        )


def train_autoencoder(arguments: argparse.Namespace) -> BinaryAutoencoder:
    """Train as the demo does and save beside the results."""
    stages = demo.Stages()
    config = dataclasses.replace(
        TRAINING_PRESETS["sparse"], steps=arguments.steps, seed=arguments.seed
    )
    cache, _, facts = demo.harvest_rows(arguments, stages, config.batch_size)
    rows = cache.rows[: cache.split(demo.N_HELDOUT).train.stop]
    with stages.stage("train"):
        bae = demo.new_autoencoder(arguments, rows, facts)
        Trainer(bae, rows, config).fit(progress=not arguments.no_progress)
        bae.save_pretrained(arguments.out / "model")
    return bae.eval()


# -- prompts -----------------------------------------------------------------------------------


def read_prompts(path: Path) -> list[str]:
    """Lines of a text file that hold text."""
    from bae_fast.lm import read_text

    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def make_sets(arguments: argparse.Namespace) -> tuple[Prompts, Prompts, list[str]]:
    """Prompts to choose features on, prompts to measure on, and the labels.

    A question is in one half only, however often it is asked.
    """
    if arguments.positive is not None:
        a, b = read_prompts(arguments.positive), read_prompts(arguments.negative)
        if min(len(a), len(b)) < 4:
            raise ValueError(
                f"--positive and --negative must have at least 4 lines; got {len(a)} and {len(b)}"
            )
        return Prompts(a[::2], b[::2], []), Prompts(a[1::2], b[1::2], []), []
    task = load_task(arguments.task)
    n = arguments.prompts
    few, answers = make_prompts(
        task, n, arguments.shots, draw="fresh", labels="true", seed=arguments.seed
    )
    zero, _ = make_prompts(task, n, 0, draw="fresh", labels="true", seed=arguments.seed)
    places = [task.labels.index(answer) for answer in answers]
    n_questions = len(task.examples) - max(len(task.examples) // 4, 1)
    halves = [[i for i in range(n) if (i % n_questions) % 2 == side] for side in (0, 1)]
    chosen, measured = (
        Prompts([few[i] for i in half], [zero[i] for i in half], [places[i] for i in half])
        for half in halves
    )
    return chosen, measured, list(task.labels)


# -- the experiment ----------------------------------------------------------------------------


def steer(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole experiment; JSON values."""
    from bae_fast import causal
    from bae_fast import lm as lm_tools

    chosen_on, measured_on, labels = make_sets(arguments)
    stages = demo.Stages()
    autoencoder: Any
    if arguments.load is None:
        autoencoder = train_autoencoder(arguments)
    else:
        autoencoder = load_autoencoder(arguments.load, device=arguments.device)
    with stages.stage("load the language model"):
        lm = lm_tools.load_language_model(
            arguments.model or lm_tools.DEFAULT_MODEL, device=arguments.device
        )
    hook, source = arguments.hook, arguments.source
    at = label_tokens(lm.tokenizer, labels) if labels else None
    with stages.stage("features that differ"):
        found = causal.feature_differences(
            lm, hook, autoencoder, chosen_on.a, chosen_on.b, source=source
        )
    most = found.largest(max(arguments.features))
    if not most:
        raise ValueError("no feature differs between the two sets at their last tokens")

    tokens = {
        "a": causal.prompt_tokens(lm, measured_on.a),
        "b": causal.prompt_tokens(lm, measured_on.b),
    }

    def after(which: str, edit: Any = None) -> Tensor:
        return causal.next_token(lm, hook, autoencoder, tokens[which], edit, source=source)

    with stages.stage("the model as it is"):
        after_a, after_b = after("a"), after("b")

    def measure(found: Tensor) -> dict[str, Any]:
        row: dict[str, Any] = {
            "distance_to_a": causal.set_distance(after_a, found),
            "js_to_b": float(causal.divergence(after_b, found).js.mean()),
        }
        if at is not None:
            answers = torch.tensor(measured_on.answers)
            row["accuracy"] = float((found[:, at].argmax(1) == answers).double().mean())
            row["label_mass"] = float(found[:, at].exp().sum(1).double().mean())
        return row

    rows = [{"what": "set A", **measure(after_a)}, {"what": "set B", **measure(after_b)}]
    with stages.stage("steer"):
        if source is None:
            moved = causal.next_token_shifted(lm, hook, tokens["b"], found.state_gap)
            rows.append({"what": "state", **measure(moved)})
        for n in sorted({min(n, len(most)) for n in arguments.features}):
            picked = most[:n]
            sets = [("steered", 0, picked)] + [
                ("control", draw, causal.matched_controls(found, picked, arguments.seed + draw))
                for draw in range(arguments.controls)
            ]
            for strength in arguments.strengths:
                for what, draw, features in sets:
                    edit = causal.steering_edit(features, strength, arguments.mode)
                    rows.append(
                        {"what": what, "draw": draw, "features": n, "strength": strength}
                        | measure(after("b", edit))
                    )
    with stages.stage("continue some prompts"):
        examples = continuations(arguments, lm, autoencoder, measured_on, rows, most)
    # a Binary Autoencoder's configuration holds only what may differ
    kind = getattr(autoencoder.config, "architecture", ARCHITECTURE)
    return {
        "environment": environment(),
        "settings": {
            "model_label": lm.label,
            "hook": hook,
            "source": source,
            "autoencoder": kind,
            "d_sae": autoencoder.config.d_sae,
            "trained_steps": None if arguments.load is not None else arguments.steps,
            "task": None if not labels else arguments.task,
            "shots": arguments.shots if labels else None,
            "n_chosen_on": [len(chosen_on.a), len(chosen_on.b)],
            "n_measured_on": [len(measured_on.a), len(measured_on.b)],
            "labels": labels,
            "mode": arguments.mode,
            "controls": arguments.controls,
            "seed": arguments.seed,
        },
        "features": [one._asdict() for one in most],
        "rows": rows,
        "examples": examples,
    }


def continuations(
    arguments: argparse.Namespace,
    lm: LanguageModel,
    autoencoder: Any,
    prompts: Prompts,
    rows: list[dict[str, Any]],
    most: list[Any],
) -> list[dict[str, Any]]:
    """Greedy continuations of prompts of B: as it is, and steered most strongly towards A."""
    from bae_fast import causal

    steered = [row for row in rows if row["what"] == "steered"]
    best = min(steered, key=lambda row: row["distance_to_a"])
    edit = causal.steering_edit(most[: best["features"]], best["strength"], arguments.mode)
    examples = []
    for prompt in prompts.b[: arguments.examples]:
        plain, moved = (
            causal.generate(lm, arguments.hook, autoencoder, prompt, e, source=arguments.source)
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


# -- the report --------------------------------------------------------------------------------


def _features(n: int, random: bool = False) -> str:
    return f"{n} {'random ' if random else ''}feature{'' if n == 1 else 's'}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _spread(rows: list[dict[str, Any]], key: str, form: str) -> str:
    values = [row[key] for row in rows]
    mean, low, high = (
        form.format(v) for v in (sum(values) / len(values), min(values), max(values))
    )
    return mean if low == high else f"{mean} ({low} to {high})"


def _groups(rows: list[dict[str, Any]]) -> dict[tuple[str, int, float], list[dict[str, Any]]]:
    groups: dict[tuple[str, int, float], list[dict[str, Any]]] = {}
    for row in rows:
        if "strength" in row:
            groups.setdefault((row["what"], row["features"], row["strength"]), []).append(row)
    return groups


def report(result: dict[str, Any]) -> str:
    """Markdown: features that differ, what steering does, examples."""
    settings = result["settings"]
    task = settings["task"]
    a, b = (f"{settings['shots']}-shot", "zero-shot") if task else ("positive", "negative")
    lines = [
        f"# Steering, {settings['model_label']}, `{settings['hook']}`",
        "",
        _line(["feature", f"on in {a}", f"on in {b}", "z", "p"]),
        "|---|---|---|---|---|",
    ]
    lines += [
        _line([
            str(one["feature"]), f"{one['share_a']:.0%}", f"{one['share_b']:.0%}",
            f"{one['z']:.1f}", f"{one['p']:.1g}",
        ])
        for one in result["features"][:N_FEATURES_SHOWN]
    ]  # fmt: skip
    lines += [
        "",
        f"Share of prompts with the feature on at the last token, of {settings['n_chosen_on'][0]} "
        f"and {settings['n_chosen_on'][1]}; z of two proportions, p two-sided, times the number "
        f"of features that vary. {settings['autoencoder']}, F = {settings['d_sae']}.",
        "",
    ]
    columns = [("distance_to_a", f"JS to {a}", "{:.3f}"), ("js_to_b", "JS to unsteered", "{:.3f}")]
    if task:
        columns = [
            ("accuracy", "accuracy", "{:.1%}"), ("label_mass", "on labels", "{:.1%}"), *columns
        ]  # fmt: skip
    lines += [
        _line(["prompts", *(title for _, title, _ in columns)]),
        "|---" * (len(columns) + 1) + "|",
    ]
    for row, name in zip(result["rows"][:2], (a, b), strict=True):
        lines.append(_line([name, *(form.format(row[key]) for key, _, form in columns)]))
    for row in result["rows"]:
        if row["what"] == "state":
            cells = [form.format(row[key]) for key, _, form in columns]
            lines.append(_line([f"{b}, difference of mean states added", *cells]))
    for (what, n, strength), rows in _groups(result["rows"]).items():
        name = f"{b}, {_features(n, what == 'control')}, x {strength:g}"
        lines.append(_line([name, *(_spread(rows, key, form) for key, _, form in columns)]))
    lines += [
        "",
        f"{settings['n_measured_on'][1]} prompts, none of whose questions chose the features. "
        f"Features are {'set' if settings['mode'] == 'clamp' else 'raised or lowered'} at the last "
        f"token as they mostly are in {a}, x strength. Random features: each as common in {b} as "
        f"the one it stands for; draws: {settings['controls']}, mean and range. Difference of mean "
        f"states: between the last tokens of {a} and {b}, whatever the features: about what this "
        f"state can do at all. JS to {a}: in bits, between the mean next-token distributions of "
        "the two sets; to unsteered: mean over prompts.",
    ]
    for example in result["examples"]:
        lines += [
            "",
            f"{_features(example['features'])}, x {example['strength']:g}:",
            "",
            *("    " + line for line in example["prompt"].splitlines()),
            "",
            f"- as it is: {example['plain']!r}",
            f"- steered: {example['steered']!r}",
        ]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any]) -> bytes:
    """Accuracy (of a task) and distance to set A against strength; PNG."""
    from bae_fast.report.series import Panel, Series, plot_panels

    labelled = bool(result["settings"]["task"])
    few, zero = result["rows"][:2]
    panels = []
    wanted = [("accuracy", "accuracy")] if labelled else []
    for key, title in [*wanted, ("distance_to_a", "JS to set A, bits")]:
        by_set: dict[tuple[str, int], list[tuple[float, tuple[float, float, float]]]] = {}
        for (what, n, strength), rows in _groups(result["rows"]).items():
            values = [row[key] for row in rows]
            spread = (sum(values) / len(values), min(values), max(values))
            by_set.setdefault((what, n), []).append((strength, spread))
        series = [
            Series(_features(n, what == "control"),
                   [x for x, _ in sorted(points)], [y for _, y in sorted(points)])
            for (what, n), points in by_set.items()
        ]  # fmt: skip
        ends = [s for points in by_set.values() for s, _ in points]
        for name, row in (("set A", few), ("set B, as it is", zero)):
            level = (row[key],) * 3
            series.append(Series(name, [min(ends), max(ends)], [level, level], dashed=True))
        panels.append(Panel(title, "strength", title, series))
    return plot_panels(panels)
