"""Which features of two saved autoencoders are the same, by the rows in which they are on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from bae_fast.baselines import load_autoencoder
from bae_fast.experiments import runs
from bae_fast.experiments.data import (
    OwnRows,
    Source,
    check_one_source,
    check_width,
    harvest_rows,
    pick_device,
    read_rows,
)
from bae_fast.experiments.saved import open_model
from bae_fast.files import write_json, write_text
from bae_fast.lm.origin import check_origin
from bae_fast.progress import Stages
from bae_fast.report.match import table


@dataclasses.dataclass(frozen=True)
class Config(runs.Overwriting, OwnRows, Source):
    """Match the features of two autoencoders by the rows in which they are on.

    Attributes:
        folders: The folders of the two saved models.
        hook: The path of the module whose output the models read. Without it that is the module
            the first model was trained on.
        context: The number of tokens in a window of text. Without it that is the first model's.
        text: Text files, files of JSON lines, and folders of them, which the models read. Without
            them that is the first model's text, where it names it, and else the topics of
            Python's standard library.
        threshold: The least score of two features that count as the same.
        score: How two features are compared.
        min_count: Features that are on in fewer rows than this are not judged.
        rows: The features are compared on this many rows, the last of the text or the file.
        seed: The seed of the control, whose rows are shuffled.
        out: The folder of the results.
    """

    folders: tuple[Path, ...] = ()
    hook: str | None = None
    context: int | None = None
    threshold: float = 0.5
    score: Literal["jaccard", "phi"] = "jaccard"
    min_count: int = 10
    rows: int = 32768
    seed: int = 0
    out: Path = Path("results/match")


def run(config: Config) -> runs.Result:
    """Compare the features and write the table.

    Raises:
        ValueError, ImportError, OSError: naming the field, the package or the file.
    """
    from bae_fast import causal

    runs.check_at_least(config, 0, "seed")
    if config.seed >= 2**63:
        raise runs.ConfigError("seed", f"must be below 2^63; got {config.seed}")
    if config.rows < 2:
        raise runs.ConfigError("rows", f"must be at least 2; got {config.rows}")
    if len(config.folders) != 2:
        raise runs.ConfigError("folders", f"must be two folders; got {len(config.folders)}")
    if config.states is not None:
        check_one_source(config, "states")
    device = pick_device(config)
    data, folders = None, list(config.folders)
    models = []
    if config.states is None:
        first, data = open_model(config, folders.pop(0))
        models.append(first)
    models += [load_autoencoder(folder, device=device) for folder in folders]
    if any(model.is_transcoder for model in models):
        raise ValueError("FOLDER must be of an autoencoder of --hook; a transcoder reads elsewhere")
    stages = Stages(config.progress)
    with runs.results(config) as folder:
        if config.states is not None:
            rows = read_rows(config.states)
            about = {"model_label": config.states.name, "hook_name": "rows", "dataset_path": None}
        else:
            assert data is not None
            cache, _, facts = harvest_rows(data, stages, 1)
            for model in models:
                check_origin(model.config.metadata, facts)
            rows = cache.rows
            about = {name: facts[name] for name in ("model_label", "hook_name", "dataset_path")}
        rows = rows[-config.rows :]
        for name, model in zip(config.folders, models, strict=True):
            check_width("folders", name, model.config.d_in, rows)
        with stages.stage("match"):
            a, b = (model.active(rows).to("cpu") for model in models)
            options: dict[str, Any] = {
                "threshold": config.threshold,
                "score": config.score,
                "min_count": config.min_count,
            }
            found = causal.match_codes(a, b, **options)
            control = causal.match_codes(a, causal.shuffled_rows(b, config.seed), **options)
        names = (str(config.folders[0]), str(config.folders[1]))
        values = {
            "environment": runs.environment(),
            "data": about,
            "folders": list(names),
            "n_rows": found.n_rows,
            **options,
            "classes": list(causal.matching.CLASSES),
            "summary": found.summary(),
            "control": control.summary(),
            "a": {"partner": found.partner_a.tolist(), "score": found.score_a.tolist(),
                  "class": found.class_a.tolist()},
            "b": {"partner": found.partner_b.tolist(), "score": found.score_b.tolist(),
                  "class": found.class_b.tolist()},
        }  # fmt: skip
        write_json(folder / "match.json", values)
        text = table(found, control, names)
        write_text(folder / "match.md", text)
    files = (config.out / "match.json", config.out / "match.md")
    return runs.Result(values, text, files)
