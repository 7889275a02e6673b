"""``bae-fast compare``: the Binary Autoencoder beside the field's sparse autoencoders.

Every method is trained by the same trainer, on the same rows in the same order, for the same
number of rows, and judged by the same metrics on the same held-out windows. One file a run: taken
up again, the command goes on where it was.

What is judged beside the code itself is a :class:`Scorer`, with files of its own: it can be added
to runs that are done, from the models they saved.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bae_fast.analysis.metrics import FVUAccumulator
from bae_fast.baselines import (
    METHODS,
    TRAINING,
    load_autoencoder,
    make_baseline,
)
from bae_fast.cli import demo
from bae_fast.cli.interpret import JUDGES, add_judge_arguments
from bae_fast.cli.runs import environment, once
from bae_fast.files import read_json, write_json, write_text
from bae_fast.model import BinaryAutoencoder
from bae_fast.training import PRESETS, Trainer

if TYPE_CHECKING:
    from bae_fast.causal import SubstitutionTest
    from bae_fast.lm import ActivationCache, LanguageModel

BINARY = {"bae": "sparse", "bae_paper": "paper"}

# rows reconstructed at a time
_FVU_ROWS = 4096

_NAMES = {
    "bae": "BAE (sparse)",
    "bae_paper": "BAE (paper)",
    "relu": "ReLU",
    "rescaled_relu": "rescaled ReLU",
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "gated": "Gated",
    "jumprelu": "JumpReLU",
    "transcoder": "transcoder",
    "binary_topk": "binary top-k",
    "random": "random",
}


# a saved model is a run's if its held-out FVU is, but for another machine's rounding
_SAME_FVU = 1e-3


class Column(NamedTuple):
    """One column of the table.

    Attributes:
        key: of a scorer's result; a value of None leaves the cell empty.
        header: its title.
        form: of a number, for str.format.
    """

    key: str
    header: str
    form: str


class Scorer(NamedTuple):
    """A further judge of trained models.

    Attributes:
        name: of its part of a run's ``scores``, and of its files.
        settings: all that its results depend on besides the run, JSON values only.
        score: (model, method, k, seed) to its results, JSON values only; the model is in eval
            mode.
        columns: what of it stands in the table.
    """

    name: str
    settings: dict[str, Any]
    score: Callable[[Any, str, int | None, int], dict[str, Any]]
    columns: Sequence[Column]


class Context:
    """What scorers may need: the command line, the held-out text and the language model.

    Attributes:
        arguments: the command line.
        cache: hidden states of ``--hook`` and the tokens they belong to.
        heldout: row numbers of the cache that nothing was trained on.
        tokenizer: of the language model.
        pair: rows of the transcoder, empty where there is none.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        stages: demo.Stages,
        cache: ActivationCache,
        tokenizer: Any,
        pair: dict[str, Tensor],
    ) -> None:
        self.arguments = arguments
        self.stages = stages
        self.cache = cache
        self.tokenizer = tokenizer
        self.heldout = cache.split(demo.N_HELDOUT).heldout
        self.pair = pair
        self._lm: LanguageModel | None = None
        self._source: ActivationCache | None = None

    def read_by(self, method: str) -> ActivationCache:
        """Hidden states of the module that a method reads, opened once."""
        if method != "transcoder":
            return self.cache
        if self._source is None:
            hook = transcoder_hooks(self.arguments)[0]
            self._source = hook_rows(self.arguments, self.stages, hook)
        return self._source

    def windows(self, n_tokens: int) -> Tensor:
        """Held-out windows of at least so many tokens if there are, from the first."""
        first = int(self.cache.row_window[self.heldout.start])
        n = max(-(-n_tokens // self.cache.context_size), 1)
        return self.cache.tokens[first : first + n].long()

    def lm(self) -> LanguageModel:
        """The language model, loaded once."""
        if self._lm is None:
            from bae_fast import lm as lm_tools

            with self.stages.stage("load the language model"):
                self._lm = lm_tools.load_language_model(
                    self.arguments.model or lm_tools.DEFAULT_MODEL, device=self.arguments.device
                )
        return self._lm


def substitution_scorer(context: Context) -> Scorer | None:
    """What the language model loses with the reconstruction in the state's place."""
    arguments = context.arguments
    if arguments.substitution_tokens < 1:
        return None
    windows = context.windows(arguments.substitution_tokens)
    made: list[SubstitutionTest] = []

    def score(model: Any, method: str, _k: int | None, _seed: int) -> dict[str, Any]:
        from bae_fast.causal import SubstitutionTest

        if not made:
            lm = context.lm()
            with context.stages.stage("the language model as it is"):
                made.append(SubstitutionTest(lm, windows))
        path, source = arguments.hook, None
        if method == "transcoder":
            source, path = transcoder_hooks(arguments)
        return made[0].run(path, model, source=source).summary()

    return Scorer(
        "substitution",
        {"tokens": windows.numel()},
        score,
        [
            Column("js_bits", "JS, bits", "{:.4f}"),
            Column("kl_bits", "KL, bits", "{:.4f}"),
            # that beside zeros is near 1 for anything: in the file only
            Column("recovered_mean", "loss recovered", "{:.4f}"),
        ],
    )


def comsem_scorer(context: Context, kind: str) -> Scorer | None:
    """How well a judge can name the features, beside what it says of other features' names."""
    arguments = context.arguments
    if kind not in arguments.judge:
        return None
    from bae_fast.cli.interpret import make_judge
    from bae_fast.interpret.comsem import ComSemConfig, score_model

    numbers = arguments.judge_features
    if len(numbers) not in (1, len(arguments.judge)):
        raise ValueError(
            f"--judge-features must be one number or {len(arguments.judge)}, one a judge; "
            f"got {len(numbers)}"
        )
    n_features = dict(zip(arguments.judge, numbers * len(arguments.judge), strict=False))[kind]
    config = ComSemConfig(n_features=n_features, n_negatives=8, shuffled=True)
    judge = make_judge(arguments, kind, arguments.judge_model)

    def score(model: Any, method: str, _k: int | None, _seed: int) -> dict[str, Any]:
        cache = context.read_by(method)
        # the same windows of either module
        first = int(context.cache.row_window[context.heldout.start])
        rows = range(int((cache.row_window < first).sum()), cache.n_rows)
        found = score_model(
            model,
            cache,
            rows,
            context.tokenizer,
            judge,
            config=config,
            answers=arguments.out / "answers.sqlite",
            progress=not arguments.no_progress,
        )
        scores: dict[str, Any] = {"counts": found["counts"]}
        for name in ("comsem", "shuffled", "detection", "auc"):
            value = found[name] or {"mean": None, "low": None, "high": None}
            scores |= {name: value["mean"], f"{name}_interval": [value["low"], value["high"]]}
        return scores

    return Scorer(
        f"comsem-{kind}",
        {"judge": judge.identity, "config": dataclasses.asdict(config)},
        score,
        [
            Column("comsem", f"ComSem, {kind}", "{:.2f}"),
            Column("shuffled", "others' names", "{:.2f}"),
            Column("detection", "detection", "{:.2f}"),
        ],
    )


# each makes a scorer of a command, or None where the command line leaves it out
SCORERS: list[Callable[[Context], Scorer | None]] = [
    substitution_scorer,
    *(functools.partial(comsem_scorer, kind=kind) for kind in JUDGES),
]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="train sparse autoencoders beside the binary one; a table and a plot",
        description="Train methods at matched rows, judge them alike, write a table and a plot.",
    )
    demo.add_data_arguments(parser)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[*BINARY, *METHODS],
        default=[*BINARY, *METHODS],
        metavar="METHOD",
        help=f"default: all of {', '.join([*BINARY, *METHODS])}",
    )
    parser.add_argument("--k", type=int, nargs="+", default=[32], help="features a row")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--expansion", type=int, default=4, help="features over width, F / d")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=512, help="rows a step")
    parser.add_argument("--lr", type=float, default=None, help="of the baselines")
    parser.add_argument("--value-bits", type=int, default=5, help="bits of a feature's value")
    parser.add_argument("--precision", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument(
        "--transcoder-hooks",
        nargs=2,
        default=None,
        metavar=("INPUT", "OUTPUT"),
        help="default: the MLP of --hook's block, from its post_attention_layernorm",
    )
    parser.add_argument(
        "--substitution-tokens",
        type=int,
        default=2048,
        help="held-out tokens on which the language model runs with each reconstruction in the "
        "place of its state; 0: none",
    )
    add_judge_arguments(parser, nargs="+", default=[])
    parser.add_argument(
        "--judge-features",
        type=int,
        nargs="+",
        default=[30],
        help="features of a method that a judge names: one number, or one for each judge",
    )
    parser.add_argument("--out", type=Path, default=Path("results/compare"))
    parser.add_argument(
        "--report-only", action="store_true", help="table and plot from --out/compare.json"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    if arguments.report_only:
        result = read_json(out / "compare.json")
    else:
        result = train_all(arguments)
        write_json(out / "compare.json", result)
    text = table(result)
    write_text(out / "compare.md", text)
    print("\n" + text)
    from bae_fast.report.plots import save_png

    save_png(out / "compare.png", plot(result))
    print(f"{out / 'compare.json'}, compare.md, compare.png")
    return 0


def train_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every run of the command, those done before from their files."""
    for name in ("expansion", "steps", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least 1; got {getattr(arguments, name)}"
            )
    stages = demo.Stages()
    cache, tokenizer, facts = demo.harvest_rows(arguments, stages, arguments.batch_size)
    split = cache.split(demo.N_HELDOUT)
    train = cache.rows[split.train.start : split.train.stop]
    heldout = cache.rows[split.heldout.start : split.heldout.stop]
    facts["split"] = split.as_dict()
    del facts["harvest_tokens_per_second"]  # of this call, not of the result
    pair: dict[str, Tensor] = {}
    if "transcoder" in arguments.methods:
        pair = transcoder_rows(arguments, stages, cache, split.train.stop, split.heldout.start)
    runs = []
    with stages.stage("train and evaluate"):
        for seed in arguments.seeds:
            for method in arguments.methods:
                for k in [None] if method in BINARY else arguments.k:
                    runs.append(
                        one(arguments, facts, method, k, seed, train, heldout, pair)
                        | {"method": method, "k": k, "seed": seed}
                    )
    context = Context(arguments, stages, cache, tokenizer, pair)
    scorers = [scorer for make in SCORERS if (scorer := make(context)) is not None]
    if scorers:
        with stages.stage("score"):
            for run in runs:
                run["scores"] = scores(context, run, scorers)
    from bae_fast.analysis.metrics import covariance_eigenvalues

    return {
        "environment": environment(),
        "data": facts,
        "spectrum": [float(v) for v in covariance_eigenvalues(heldout)],
        "columns": [[scorer.name, *column] for scorer in scorers for column in scorer.columns],
        "runs": runs,
    }


def one(
    arguments: argparse.Namespace,
    facts: dict[str, Any],
    method: str,
    k: int | None,
    seed: int,
    train: Tensor,
    heldout: Tensor,
    pair: dict[str, Tensor],
) -> dict[str, Any]:
    """Train and evaluate one method."""
    config = dataclasses.replace(
        PRESETS[BINARY[method]] if method in BINARY else TRAINING,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        seed=seed,
        precision=arguments.precision,
    )
    if method not in BINARY and arguments.lr is not None:
        config = dataclasses.replace(config, lr=arguments.lr)
    names = ("model_name", "hook_name", "context_size", "prepend_bos", "dataset_path")
    data = {name: facts[name] for name in names} | {
        "tokens": facts["tokens"],
        "split": facts["split"],
    }
    if method == "transcoder":
        data["transcoder_hooks"] = transcoder_hooks(arguments)
    d = train.shape[1]
    settings = {
        "method": method,
        "k": k,
        "d_sae": arguments.expansion * d,
        "value_bits": arguments.value_bits,
        "training": config.settings(),
        "data": data,
    }
    name = f"{method}{'' if k is None else f'-k{k}'}-s{seed}"

    def make() -> dict[str, Any]:
        from bae_fast.analysis.evaluation import evaluate

        torch.manual_seed(seed)
        options: dict[str, Any] = {"metadata": data, "device": arguments.device}
        x, y, x_held, y_held = train, None, heldout, None
        if method == "transcoder":
            x, y, x_held, y_held = (
                pair[part] for part in ("x_train", "y_train", "x_heldout", "y_heldout")
            )
        model: Any
        if method in BINARY:
            model = BinaryAutoencoder(d, settings["d_sae"], preset=BINARY[method], **options)
        else:
            assert k is not None
            model = make_baseline(
                method,
                x.shape[1],
                settings["d_sae"],
                k=k,
                d_out=None if y is None else y.shape[1],
                **options,
            )
        model.fit_normalization_(x, y)
        log = Trainer(model, x, config, targets=y).fit(progress=not arguments.no_progress)
        folder = model.save_pretrained(arguments.out / "models" / name)
        found = evaluate(
            model, x_held, y_held, training_rows=x, value_bits=arguments.value_bits
        ).summary()
        return {
            "heldout": found,
            "last_line": log[-1],
            "model": str(folder.relative_to(arguments.out)),
        }

    return once(arguments.out / "runs", name, settings, make)


def scores(
    context: Context, run: dict[str, Any], scorers: Sequence[Scorer]
) -> dict[str, dict[str, Any]]:
    """What scorers say of a run's model: from their files, or now; nothing without the model."""
    out: Path = context.arguments.out
    loaded: list[Any] = []

    def model() -> Any:
        if not loaded:
            loaded.append(saved_model(context, run))
        return loaded[0]

    found = {}
    for scorer in scorers:
        name = Path(run["model"]).name
        settings = {"scorer": scorer.name, **scorer.settings, "run": run["settings"]}

        def make(scorer: Scorer = scorer) -> dict[str, Any]:
            return {"found": scorer.score(model(), run["method"], run["k"], run["seed"])}

        try:
            found[scorer.name] = once(out / "runs", f"{scorer.name}-{name}", settings, make)[
                "found"
            ]
        except _NoModelError as error:
            print(f"   {scorer.name}-{name}: {error}", flush=True)
    return found


class _NoModelError(Exception):
    """A run whose model is not on disk any more."""


def saved_model(context: Context, run: dict[str, Any]) -> Any:
    """The model of a run, in eval mode.

    Folders are named by method, k and seed: a later run with other settings writes over it. So
    the model is the run's only if its held-out FVU is.
    """
    folder: Path = context.arguments.out / run["model"]
    device = context.arguments.device
    if not folder.is_dir():
        raise _NoModelError(f"{folder} is gone; not scored")
    model: Any = load_autoencoder(folder, device=device)
    rows = context.cache.rows[context.heldout.start : context.heldout.stop]
    x, y = rows, rows
    if run["method"] == "transcoder":
        x, y = context.pair["x_heldout"], context.pair["y_heldout"]
    error = FVUAccumulator()
    with torch.no_grad():
        for block, goal in zip(x.split(_FVU_ROWS), y.split(_FVU_ROWS), strict=True):
            error.update(model.as_own(goal), model.decode(model.encode(model.as_own(block))))
    fvu, expected = error.compute(), run["heldout"]["fvu"]
    if not math.isclose(fvu, expected, rel_tol=_SAME_FVU):
        raise _NoModelError(f"{folder} is another run's (FVU {fvu:.4f}, not {expected:.4f})")
    return model


# -- the transcoder's rows ---------------------------------------------------------------------


def transcoder_hooks(arguments: argparse.Namespace) -> list[str]:
    """Modules whose outputs are the input and the target."""
    if arguments.transcoder_hooks is not None:
        return list(arguments.transcoder_hooks)
    return [f"{arguments.hook}.post_attention_layernorm", f"{arguments.hook}.mlp"]


def hook_rows(arguments: argparse.Namespace, stages: demo.Stages, hook: str) -> ActivationCache:
    """Hidden states of another module over the same text."""
    other = copy.copy(arguments)
    other.hook = hook
    return demo.harvest_rows(other, stages, arguments.batch_size)[0]


def transcoder_rows(
    arguments: argparse.Namespace,
    stages: demo.Stages,
    base: ActivationCache,
    train_stop: int,
    heldout_start: int,
) -> dict[str, Tensor]:
    """Inputs and targets at the same tokens, split by the same windows as the other methods."""
    caches = [hook_rows(arguments, stages, hook) for hook in transcoder_hooks(arguments)]
    places = [cache.row_window.long() * cache.context_size + cache.row_position for cache in caches]
    # a row that either cache dropped for its norm is in neither
    kept = [torch.isin(places[i], places[1 - i]) for i in (0, 1)]
    x, y = (cache.rows[keep] for cache, keep in zip(caches, kept, strict=True))
    window = caches[0].row_window[kept[0]]
    train = window <= base.row_window[train_stop - 1]
    held = window >= base.row_window[heldout_start]
    return {
        "x_train": x[train], "y_train": y[train], "x_heldout": x[held], "y_heldout": y[held],
    }  # fmt: skip


# -- the table and the plot --------------------------------------------------------------------


def _label(method: str, k: int | None) -> str:
    return _NAMES[method] + ("" if k is None else f" k={k}")


def _groups(result: dict[str, Any]) -> dict[tuple[str, int | None], list[dict[str, Any]]]:
    groups: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for one_run in result["runs"]:
        # scores beside the rest, under names that cannot meet
        row = dict(one_run["heldout"])
        for name, found in one_run.get("scores", {}).items():
            row |= {f"{name}.{key}": value for key, value in found.items()}
        groups.setdefault((one_run["method"], one_run["k"]), []).append(row)
    return groups


def table(result: dict[str, Any]) -> str:
    """Markdown: mean and range over seeds, a line a method."""
    extra = [
        (f"{name}.{key}", header, form) for name, key, header, form in result.get("columns", [])
    ]
    titles = "".join(f" {header} |" for _, header, _ in extra)
    lines = [
        "| code | L0 | FVU | FVU, values rounded | bits a row | of these, which features "
        f"| dead | p > 0.1 | p > 0.9 |{titles}",
        "|---|---|---|---|---|---|---|---|---|" + "---|" * len(extra),
    ]

    def cell(found: list[dict[str, Any]], key: str, form: str) -> str:
        values = [row[key] for row in found if row.get(key) is not None]
        if not values:
            return ""
        mean = form.format(sum(values) / len(values))
        low, high = form.format(min(values)), form.format(max(values))
        return mean if low == high else f"{mean} ({low} to {high})"

    columns = [
        ("l0", "{:.1f}"), ("fvu", "{:.4f}"), ("fvu_quantized", "{:.4f}"), ("bits", "{:.0f}"),
        ("support_bits", "{:.0f}"), ("dead_share", "{:.1%}"), ("dense_share", "{:.1%}"),
        ("always_on_share", "{:.1%}"), *((key, form) for key, _, form in extra),
    ]  # fmt: skip
    for (method, k), found in _groups(result).items():
        mark = "*" if method == "transcoder" else ""
        cells = [cell(found, key, form) for key, form in columns]
        lines.append(f"| {_label(method, k)}{mark} | " + " | ".join(cells) + " |")
    data, first = result["data"], result["runs"][0]["settings"]
    training = first["training"]
    seeds = len({one_run["seed"] for one_run in result["runs"]})
    bits = max(one_run["settings"]["value_bits"] for one_run in result["runs"])
    lines += [
        "",
        f"{data['model_label']}, `{data['hook_name']}`, F = {first['d_sae']}, {training['steps']} "
        f"steps of {training['batch_size']} rows, {data['split']['n_heldout']} rows held out by "
        f"whole windows, {seeds} seed{'s' if seeds > 1 else ''}. Bits: entropy of the active set "
        f"summed over features and pooled over the held-out rows, plus {bits} bits for each value "
        "of a code that is not of bits; the rounded FVU is that of such values. p: share of the "
        "rows in which a feature is on.",
    ]
    tokens = {
        one_run["scores"]["substitution"]["n_tokens"]
        for one_run in result["runs"]
        if "substitution" in one_run.get("scores", {})
    }
    if tokens:
        lines[-1] += (
            f" JS and KL: divergence of the next-token distribution with every state of "
            f"`{data['hook_name']}` replaced by its reconstruction, mean of {max(tokens):,} "
            "held-out tokens; loss recovered: 1 where that costs nothing, 0 where it costs what "
            "the mean state in the same places costs."
        )
    named = {
        f"{found['counts']['chosen']} ({name.removeprefix('comsem-')})"
        for one_run in result["runs"]
        for name, found in one_run.get("scores", {}).items()
        if name.startswith("comsem-")
    }
    if named:
        lines[-1] += (
            f" ComSem: share of Yes of a judge shown a feature's tokens and its name, mean of "
            f"{', '.join(sorted(named))} features; others' names: with another feature's "
            "name; detection: balanced accuracy, tokens of other features among them."
        )
    if any(one_run["method"] == "transcoder" for one_run in result["runs"]):
        lines.append(
            "\\* of another target, the MLP's output, and in its place: not comparable by FVU, nor "
            "by what the model loses."
        )
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any]) -> bytes:
    """FVU, values rounded, against bits; PNG. The transcoder has another target: left out."""
    from bae_fast.report.plots import Point, plot_fvu_bits

    points = []
    for (method, k), found in _groups(result).items():
        fvu = sum(row["fvu_quantized"] for row in found) / len(found)
        bits = sum(row["bits"] for row in found) / len(found)
        # a code without a bit, or worse than the mean, has no place in the plane
        if method != "transcoder" and bits > 0 and math.isfinite(fvu) and fvu < 1:
            points.append(Point(_label(method, k), fvu, bits, method in BINARY))
    return plot_fvu_bits(torch.tensor(result["spectrum"], dtype=torch.float64), points)
