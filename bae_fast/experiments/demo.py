"""Train a Binary Autoencoder on a language model's hidden states and show what it learned.

Language model -> hidden states of one module -> training -> held-out metrics -> features in
context -> a folder with the model, metrics.json, plots and one HTML page.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bae_fast._version import __version__
from bae_fast.experiments import runs
from bae_fast.experiments.data import N_HELDOUT, Data, harvest_rows
from bae_fast.experiments.training import Training, check, estimate_seconds, new_autoencoder
from bae_fast.files import write_json
from bae_fast.progress import Stages, say
from bae_fast.training import Trainer

if TYPE_CHECKING:
    from bae_fast.analysis.evaluation import Evaluation
    from bae_fast.analysis.features import FeatureSummary

N_FEATURES_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Config(runs.Overwriting, Training, Data):
    """Train on a language model's hidden states and show what was learned.

    Attributes:
        out: The folder of the results.
    """

    out: Path = Path("results/demo")


def run(config: Config) -> runs.Result:
    """Harvest hidden states, train, evaluate on held-out text, describe features.

    Interrupted, it goes on from a checkpoint when it is called again. The results of the last
    run stay until the new ones are whole.

    Raises:
        ValueError, ImportError, OSError: naming the field, the package or the file.
        InterruptedRunError: it was interrupted while it trained.
    """
    from bae_fast.analysis.evaluation import evaluate
    from bae_fast.analysis.features import choose_features, describe_features
    from bae_fast.analysis.metrics import covariance_eigenvalues, gaussian_rate_distortion_bits

    begin = time.perf_counter()
    stages = Stages(config.progress)
    constants = check(config)
    for package in ("transformers", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"the demo needs {package}: pip install 'bae-fast[lm,report]'")
    with runs.results(config) as folder:
        cache, tokenizer, facts = harvest_rows(config, stages, constants.batch_size)
        split = cache.split(N_HELDOUT)
        facts["split"] = split.as_dict()
        rows = cache.rows[split.train.start : split.train.stop]
        heldout = cache.rows[split.heldout.start : split.heldout.stop]

        with stages.stage("train"):
            bae = new_autoencoder(config, rows, facts, stages, cache)
            trainer = Trainer(bae, rows, constants)
            precision = "bfloat16 products" if trainer.bfloat16 else "float32"
            say(
                f"   {bae.config.d_sae} features, {constants.steps} steps of "
                f"{constants.batch_size} rows, preset {config.preset}, {precision}, "
                f"{torch.get_num_threads()} threads; estimated {estimate_seconds(trainer):.0f} s "
                "(--steps, --tokens shorten)"
            )
            # beside the results, to be followed while it grows
            path = config.out / "log.jsonl"
            log = runs.fit(trainer, folder, log=path, progress=config.progress)
            bae.save_pretrained(folder)

        with stages.stage("evaluate and describe"):
            found = evaluate(bae, heldout)
            result = found.summary()
            spectrum = covariance_eigenvalues(rows)
            result["gaussian_bound_bits_training_rows"] = float(
                gaussian_rate_distortion_bits(spectrum, found.fvu)
            )
            features = describe_features(
                found.code,
                cache,
                split.heldout,
                choose_features(found.density, N_FEATURES_SHOWN),
                tokenizer,
                margins=lambda ids: bae.preactivation(heldout.to(bae.W_enc), ids).detach(),
            )
        values: dict[str, Any] = {
            "bae_fast": __version__,
            "torch": torch.__version__,
            "heldout": result,
            "training": {
                **trainer.config.settings(),
                "precision": precision,
                "threads": torch.get_num_threads(),
                "rows_per_second": constants.batch_size * _steps_per_second(log),
                "d_in": bae.config.d_in,
                "d_sae": bae.config.d_sae,
                "surrogate": bae.config.surrogate,
                "surrogate_width": bae.config.surrogate_width,
                "implementation": config.impl,
            },
            "data": facts,
            "seconds": {name: round(value, 2) for name, value in stages.seconds.items()},
        }
        write_json(folder / "metrics.json", values)
        write_page(folder, config, found, values, log, features)
    seconds = time.perf_counter() - begin
    names = ("report.html", "metrics.json", "log.jsonl", "cfg.json")
    return runs.Result(
        values,
        describe(config, values, found, features, seconds),
        tuple(config.out / name for name in names),
    )


def _steps_per_second(log: list[dict[str, float]]) -> float:
    """The speed by the lines since the last start, whose seconds begin anew."""
    first = max(
        (i for i in range(1, len(log)) if log[i]["seconds"] < log[i - 1]["seconds"]), default=0
    )
    before = log[first - 1]["step"] if first else 0
    return (log[-1]["step"] - before) / log[-1]["seconds"]


def describe(
    config: Config,
    values: dict[str, Any],
    found: Evaluation,
    features: list[FeatureSummary],
    seconds: float,
) -> str:
    """The figures, the densities and some features in context, as text."""
    from bae_fast.analysis.features import format_feature
    from bae_fast.analysis.metrics import density_histogram

    result = values["heldout"]
    lines = [
        f"Held out: {result['n_rows']:,} rows of {values['data']['model_label']}, {config.hook}",
        f"  FVU                       {result['fvu']:.4f}",
        f"  pooled bits a row         {result['bits']:.0f}",
        f"  Gaussian bound at this FVU {result['gaussian_bound_bits']:.0f} "
        f"({result['gaussian_bound_bits_training_rows']:.0f} with the training rows' covariance)",
        f"  L0                        {result['l0']:.1f}",
        f"  dead features             {result['dead_share']:.1%}",
        f"  dense (p > 0.1)           {result['dense_share']:.1%}",
        f"  always on (p > 0.9)       {result['always_on_share']:.1%}",
        "",
        "Density of features (share of held-out rows a feature is on in)",
        *(f"  {line}" for line in density_histogram(found.density).lines()),
        "",
        f"{len(features)} features, evenly over the range of densities",
        *("\n" + format_feature(feature) for feature in features),
        "",
        "Seconds: " + ", ".join(f"{name} {s:.1f}" for name, s in values["seconds"].items()),
        f"Training: {values['training']['rows_per_second']:,.0f} rows/s, one row a token",
        f"Total {seconds:.0f} s.",
    ]
    return "\n".join(lines)


def write_page(
    folder: Path,
    config: Config,
    found: Evaluation,
    values: dict[str, Any],
    log: list[dict[str, float]],
    features: list[FeatureSummary],
) -> Path:
    """The plots and the page; returns the page's path."""
    from bae_fast.report.page import Metric, write_report
    from bae_fast.report.plots import Point

    training, bound = values["training"], found.gaussian_bound_bits
    label = values["data"]["model_label"]
    files = write_report(
        folder,
        title="Binary Autoencoder",
        subtitle=f"{label}, {config.hook}, {training['d_sae']} features, {training['steps']} steps",
        metrics=[
            Metric("FVU", f"{found.fvu:.4f}", "share of variance unexplained, held out"),
            Metric("Bits", f"{found.bits:.0f}", "entropy of the code, pooled, bits a row"),
            Metric("Gaussian bound", f"{bound:.0f}", "bits a Gaussian would need at this FVU"),
            Metric("L0", f"{found.l0:.1f}", "features on in a row"),
            Metric("Dead", f"{found.dead_share:.1%}", "never on in the held-out rows"),
            Metric("Dense", f"{found.dense_share:.1%}", "on in more than 10 % of the rows"),
            Metric("Always on", f"{found.always_on_share:.1%}", "on in more than 90 %"),
            Metric("Held-out rows", f"{found.n_rows:,}", "whole windows, none trained on"),
            Metric("Training", f"{values['seconds']['train']:.0f} s", training["precision"]),
        ],
        log=log,
        density=found.density,
        eigenvalues=found.spectrum,
        points=[Point("this run", found.fvu, found.bits, True)],
        features=features,
    )
    return files["page"]
