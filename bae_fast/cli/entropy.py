"""``bae-fast entropy``: the entropy of sets of hidden states, read off a binary code.

``synthetic``  sets of known entropy: estimate against truth
``layers``     a language model's layers and token positions
``icl``        the last prompt token as demonstrations are added

Each writes ``<name>.json``, ``<name>.csv`` and ``<name>.png`` into ``--out`` and keeps every run
in a file of its own, so that it can be taken up again.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bae_fast.cli.runs import environment, once
from bae_fast.entropy.fit import STARTS, run_synthetic
from bae_fast.entropy.synthetic import KINDS, SyntheticSpec
from bae_fast.files import read_json, write_json, write_text


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "entropy",
        help="entropy of sets of vectors against truth, over layers, over demonstrations",
        description="Entropy of sets of hidden states, read off a binary code.",
    )
    parts = parser.add_subparsers(dest="part", required=True)
    for add in (_add_synthetic,):
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
) -> int:
    """Run or read, then write the three files; the CSV has a row for each measured entropy."""
    out: Path = arguments.out
    if arguments.report_only:
        result = read_json(out / f"{name}.json")
    else:
        result = {"environment": environment(), "runs": make(arguments)}
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


# -- synthetic ---------------------------------------------------------------------------------


def _add_synthetic(parts: Any) -> None:
    parser = parts.add_parser("synthetic", help="sets of known entropy: estimate against truth")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--r", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="bits")
    parser.add_argument("--d", type=int, nargs="+", default=[64, 256, 1024], help="width")
    parser.add_argument("--expansion", type=int, default=2, help="features over width, F / d")
    parser.add_argument("--start", choices=sorted(STARTS), default="components")
    parser.add_argument("--steps", type=int, default=None, help="default: the start's own")
    parser.add_argument("--rows", type=int, default=16384, help="to train on")
    parser.add_argument("--heldout", type=int, default=8192, help="rows measured")
    parser.add_argument("--p", type=float, default=0.1, help="of sparse bits")
    parser.add_argument("--group", type=int, default=4, help="bits that depend on each other")
    parser.add_argument("--flip", type=float, default=0.05, help="of copies")
    parser.add_argument("--noise", type=float, default=0.01, help="variance over the signal's")
    _common(parser, "synthetic", run_synthetic_command)


def run_synthetic_command(arguments: argparse.Namespace) -> int:
    code = _finish(arguments, "synthetic", _synthetic_runs, _synthetic_rows, _synthetic_panels)
    rows = [
        row
        for one in read_json(arguments.out / "synthetic.json")["runs"]
        for row in _synthetic_rows(one)
    ]
    print(synthetic_table(rows))
    return code


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
                        "d_sae": arguments.expansion * d,
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
    names = ("kind", "r", "d", "start", "seed", "d_sae", "n_train", "n_heldout")
    truth = one["joint_bits"]
    return [
        {name: settings[name] for name in names}
        | {
            "joint_bits": truth,
            "marginal_bits": one["marginal_bits"],
            "true_bits_marginal": one["of_true_bits"]["marginal"],
            "true_bits_tree": one["of_true_bits"]["tree"],
            **estimate,
            "marginal_error": estimate["marginal"] / truth - 1,
            "tree_error": estimate["tree"] / truth - 1,
        }
    ]


def synthetic_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean and range over seeds."""
    lines = [
        "| set | start | d | r | truth | sum of marginals | tree | tree of the true bits | FVU "
        "| error of the tree |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (kind, start, d, r), group in _grouped(rows, ("kind", "start", "d", "r")).items():
        cells = []
        forms = (
            ("joint_bits", "{:.1f}"), ("marginal", "{:.1f}"), ("tree", "{:.1f}"),
            ("true_bits_tree", "{:.1f}"), ("fvu", "{:.3f}"), ("tree_error", "{:+.1%}"),
        )  # fmt: skip
        for key, form in forms:
            mean, low, high = (form.format(value) for value in _spread(group, key))
            cells.append(mean if low == high else f"{mean} ({low} to {high})")
        lines.append(f"| {kind} | {start} | {d} | {r} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _synthetic_panels(rows: list[dict[str, Any]]) -> list[Any]:
    from bae_fast.report.series import Panel, Series

    panels = []
    for (kind, start), of_kind in _grouped(rows, ("kind", "start")).items():
        series = []
        for (d,), group in _grouped(of_kind, ("d",)).items():
            points = sorted(_grouped(group, ("r", "joint_bits")).items())
            x = [truth for (_, truth), _ in points]
            series.append(
                Series(f"tree, d = {d}", x, [_spread(part, "tree") for _, part in points])
            )
        longest = max(_grouped(of_kind, ("d",)).values(), key=len)
        by_r = sorted(_grouped(longest, ("r", "joint_bits", "marginal_bits")).items())
        x = [truth for (_, truth, _), _ in by_r]
        series.append(Series("truth", x, [(t, t, t) for t in x], dashed=True))
        if any(marginal > 1.01 * truth for (_, truth, marginal), _ in by_r):
            exact = [(m, m, m) for (_, _, m), _ in by_r]
            series.append(Series("true bits, sum of marginals", x, exact, dashed=True))
        panels.append(
            Panel(f"{kind}, start {start}", "joint entropy, bits", "estimate, bits", series,
                  logarithmic=True)
        )  # fmt: skip
    return panels
