"""``bae-fast match``: which features of two saved autoencoders are the same, on held-out text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bae_fast.baselines import load_autoencoder
from bae_fast.cli import demo
from bae_fast.cli.runs import environment
from bae_fast.files import write_json, write_text


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "match",
        help="which features of two saved autoencoders are the same",
        description="Match the features of two autoencoders by the rows in which they are on.",
    )
    parser.add_argument("folders", type=Path, nargs=2, metavar="FOLDER", help="of saved models")
    demo.add_data_arguments(parser)
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--score", choices=("jaccard", "phi"), default="jaccard")
    parser.add_argument("--min-count", type=int, default=10, help="rows; rarer ones are not judged")
    parser.add_argument("--rows", type=int, default=32768, help="the last so many of the text")
    parser.add_argument("--seed", type=int, default=0, help="of the control")
    parser.add_argument("--out", type=Path, default=Path("results/match"))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from bae_fast import causal

    if arguments.rows < 2:
        raise ValueError(f"--rows must be at least 2; got {arguments.rows}")
    models = [load_autoencoder(folder, device=arguments.device) for folder in arguments.folders]
    if any(model.is_transcoder for model in models):
        raise ValueError("FOLDER must be of an autoencoder of --hook; a transcoder reads elsewhere")
    stages = demo.Stages()
    cache, _, facts = demo.harvest_rows(arguments, stages, 1)
    rows = cache.rows[-arguments.rows :]
    with stages.stage("match"):
        a, b = (model.active(rows).to("cpu") for model in models)
        options = {
            "threshold": arguments.threshold,
            "score": arguments.score,
            "min_count": arguments.min_count,
        }
        found = causal.match_codes(a, b, **options)
        control = causal.match_codes(a, causal.shuffled_rows(b, arguments.seed), **options)
    names = (str(arguments.folders[0]), str(arguments.folders[1]))
    write_json(
        arguments.out / "match.json",
        {
            "environment": environment(),
            "data": {name: facts[name] for name in ("model_label", "hook_name", "dataset_path")},
            "folders": names,
            "n_rows": found.n_rows,
            **options,
            "classes": list(causal.matching.CLASSES),
            "summary": found.summary(),
            "control": control.summary(),
            "a": {"partner": found.partner_a.tolist(), "score": found.score_a.tolist(),
                  "class": found.class_a.tolist()},
            "b": {"partner": found.partner_b.tolist(), "score": found.score_b.tolist(),
                  "class": found.class_b.tolist()},
        },
    )  # fmt: skip
    text = causal.matching_table(found, control, names)
    write_text(arguments.out / "match.md", text)
    print("\n" + text)
    print(f"{arguments.out / 'match.json'}, match.md")
    return 0
