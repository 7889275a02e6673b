"""The Binary Autoencoder beside the field's sparse autoencoders.

Every method is trained by the same trainer, on the same rows in the same order, for the same
number of rows, and judged by the same metrics on the same held-out windows. One file a run: taken
up again, the experiment goes on where it was.

What is judged beside the code itself is a scorer (:mod:`bae_fast.experiments.scorers`), with files
of its own: it can be added to runs that are done, from the models they saved.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from bae_fast.analysis.metrics import FVUAccumulator
from bae_fast.autoencoder import seeded
from bae_fast.baselines import load_autoencoder
from bae_fast.experiments import methods, runs
from bae_fast.experiments.data import (
    N_HELDOUT,
    Data,
    block_width,
    cache_of,
    harvest_rows,
    pick_device,
)
from bae_fast.experiments.judges import JudgeOptions
from bae_fast.experiments.metric import check_metric, error_metric
from bae_fast.experiments.scorers import Context, Scorer, scorer_makers
from bae_fast.files import read_json, write_json, write_text
from bae_fast.progress import Stages, say
from bae_fast.spacing import evenly
from bae_fast.training import Trainer
from bae_fast.training.recipe import MAX_REFIT_FEATURES

if TYPE_CHECKING:
    from bae_fast.causal import InPlaceDivergence
    from bae_fast.lm import ActivationCache

# rows reconstructed at a time
_FVU_ROWS = 4096

# a saved model belongs to a run if it has the run's held-out FVU, up to another machine's rounding
_SAME_FVU = 1e-3

# what a method may be trained with several values of, as the sparse autoencoders are with several
# k, and its sign in the name of a run: three of the Binary Autoencoder, and one of all others
VARIED = {
    "entropy_weight": "a_e",
    "covariance_weight": "a_c",
    "bank_batches": "past",
    "lr": "lr",
}

# what stands in a variant for the steps of a tail, and in the name of a run
TAIL, TAIL_SIGN = "kl_tail", "tail"


@dataclasses.dataclass(frozen=True)
class Config(JudgeOptions, Data):
    """Train methods at matched rows, judge them alike, write a table and a plot.

    Attributes:
        methods: The methods that are trained: bae, bae_paper, relu, rescaled_relu, topk,
            batchtopk, gated, jumprelu, transcoder, binary_topk, random, and what is registered.
        k: The number of features in a row, for the sparse autoencoders.
        entropy_weight: The weights of the entropy that the Binary Autoencoder is trained with, one
            after the other: a larger one ends at fewer bits. Without any it is the preset's.
        covariance_weight: The same for the weight of the covariance.
        bank_batches: The same for the number of past batches that are counted together with each
            batch by the entropy and the covariance.
        seeds: The seeds; every method is trained with each.
        expansion: The number of features over the width of a row, F / d.
        steps: The number of optimizer steps.
        batch_size: The number of rows in a step.
        metric: The unit in which each dimension's error is measured, for every method alike: none
            is the same for all, std the standard deviation, robust a scale that outliers do not
            move, sensitivity how little the language model's next token depends on the dimension,
            and fisher the same for all directions, a matrix. A power may follow, as in std^0.5. The
            table's FVU is in raw units for any metric.
        kl_tail: The numbers of further steps, after the others, in which the reconstruction stands
            in the language model and the divergence of its next token takes the place of half of
            the squared error. Every method is trained with each number, and 0 leaves the tail out.
        lr: The learning rates that each sparse autoencoder is trained with, one after the other.
            Without any it is the method's own, as it always is for the Binary Autoencoder.
        value_bits: The number of bits that a feature's value counts for.
        precision: The precision of the products; auto is bfloat16 where it is native.
        transcoder_hooks: The modules that the transcoder reads and writes. Without them those are
            the norm before the MLP of the hook's block, and the MLP.
        heldout_rows: The number of rows at the end of the text, in whole windows, that nothing is
            trained on.
        substitution_tokens: The number of held-out tokens on which the language model runs with
            each reconstruction in its state's place; 0 leaves this out.
        description: Bits under one and the same coder for every method stand in the table, those
            of independent columns and those along a tree, fitted to the training rows (at most
            262,144 of them, evenly spread) and charged on the held-out ones. Values lie in as many
            even steps as is best for the method, are coded by the shares of these steps, and are
            read as the mean of each.
        search_prices: The prices of a bit at which codes of the Binary Autoencoder are searched for
            instead of encoded. With any, the table has every method's error and bits with searched
            codes too: those of a sparse autoencoder by orthogonal matching pursuit with its k. What
            probe and encoder measure is measured of these codes as well.
        search_dense_bits: The bits that a one of a feature on in many rows costs more in that
            search, for each doubling of the feature's share of rows beyond 1/16. Some 12 leave few
            features that are on in more than a tenth of the rows.
        search_steps: The number of steps for which every dictionary is trained on with the codes
            that are searched for, at each price; 0 fits the decoder to them by least squares.
        probe: How well the best 1, 2 and 5 features tell properties of tokens, such as capitals,
            digits or code, stands in the table.
        encoder: The folder of a sentence encoder. With it the table has the share of draws in
            which the odd context out among those of a feature is found.
        judge: The judges that name features and judge the names: rule, local or openai.
        judge_features: The number of features of a method that a judge names, one number or one
            for each judge.
        out: The folder of the results.
        report_only: The table and the plot are made from the results in the folder, and nothing
            is run.
    """

    methods: tuple[str, ...] = methods.names()
    k: tuple[int, ...] = (32,)
    entropy_weight: tuple[float, ...] = ()
    covariance_weight: tuple[float, ...] = ()
    bank_batches: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0,)
    expansion: int = 4
    steps: int = 2000
    batch_size: int = 512
    metric: str = "none"
    kl_tail: tuple[int, ...] = (0,)
    lr: tuple[float, ...] = ()
    value_bits: int = 5
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    transcoder_hooks: tuple[str, str] | None = None
    heldout_rows: int = N_HELDOUT
    substitution_tokens: int = 2048
    description: bool = True
    search_prices: tuple[float, ...] = ()
    search_dense_bits: float = 0.0
    search_steps: int = 0
    probe: bool = False
    encoder: Path | None = None
    judge: tuple[str, ...] = ()
    judge_features: tuple[int, ...] = (30,)
    out: Path = Path("results/compare")
    report_only: bool = False


def run(config: Config) -> runs.Result:
    """Train and judge what is not done yet, and write the table and the plot.

    Raises:
        ValueError, ImportError, OSError: naming the field, the package or the file.
        InterruptedRunError: it was interrupted while it trained.
    """
    from bae_fast.report import compare as report
    from bae_fast.report.plots import save_png
    from bae_fast.report.style import check_figures

    runs.check_out(config)
    check_figures()
    path = config.out / "compare.json"
    values = read_json(path) if config.report_only else train_all(config)
    with runs.reading(path, kept=config.report_only):
        text = report.table(values)
        plot = report.plot(values)
    with runs.results(config, wait=True) as folder:
        write_json(folder / "compare.json", values)
        write_text(folder / "compare.md", text)
        save_png(folder / "compare.png", plot)
    names = ("compare.json", "compare.md", "compare.png")
    return runs.Result(values, text, tuple(config.out / name for name in names))


def train_all(config: Config) -> dict[str, Any]:
    """Every run of the experiment, those done before from their files."""
    from bae_fast.analysis.metrics import covariance_eigenvalues

    check(config)
    stages = Stages(config.progress)
    cache, tokenizer, facts = harvest_rows(config, stages, config.batch_size, config.heldout_rows)
    _check_k(config, cache.d_in)  # of any other module the width is known by its states
    split = cache.split(config.heldout_rows)
    _check_search(config, len(split.train), cache.d_in)
    facts["split"] = split.as_dict()
    del facts["harvest_tokens_per_second"]  # of this call, not of the result

    def hook_rows(hook: str) -> ActivationCache:
        other = dataclasses.replace(config, hook=hook)
        return harvest_rows(other, stages, config.batch_size, config.heldout_rows)[0]

    pair: dict[str, Tensor] = {}
    if "transcoder" in config.methods:
        caches = [hook_rows(hook) for hook in transcoder_hooks(config)]
        pair = transcoder_rows(caches, cache, split.train.stop, split.heldout.start)
    context = Context(config, stages, cache, tokenizer, transcoder_hooks(config), pair, hook_rows)
    trainings = Trainings(context, facts)
    with stages.stage("train and evaluate"):
        done = [
            trainings.one(wanted) | dataclasses.asdict(wanted) for wanted in wanted_runs(config)
        ]
    scorers = [scorer for make in scorer_makers() for scorer in make(context)]
    if scorers:
        with stages.stage("score"):
            for kept in done:
                kept["scores"] = scores(context, kept, scorers)
    heldout = cache.rows[split.heldout.start : split.heldout.stop]
    return {
        "environment": runs.environment(),
        "data": facts,
        "spectrum": [float(v) for v in covariance_eigenvalues(heldout)],
        "columns": [[scorer.name, *column] for scorer in scorers for column in scorer.columns],
        "runs": done,
    }


# -- which runs --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One run of the experiment.

    Attributes:
        method, k, seed: what is trained, with how many features in a row (None: the method has no
            such number), from which seed.
        variant: the constants that the run replaces, see :func:`variants`.
    """

    method: str
    k: int | None
    variant: dict[str, Any]
    seed: int

    @property
    def name(self) -> str:
        """What the run's files are called."""
        signs = {**VARIED, TAIL: TAIL_SIGN}
        parts = [self.method, *([] if self.k is None else [f"k{self.k}"])]
        parts += [f"{signs[name]}{value:g}" for name, value in self.variant.items()]
        return "-".join([*parts, f"s{self.seed}"])

    @property
    def constants(self) -> dict[str, Any]:
        """The constants of training on rows that the run replaces."""
        return {name: value for name, value in self.variant.items() if name != TAIL}

    def without_tail(self) -> Wanted:
        """The run whose model a tail goes on from."""
        return dataclasses.replace(self, variant=self.constants)


def wanted_runs(config: Config) -> Iterator[Wanted]:
    """All runs, in their order."""
    for seed, method in itertools.product(config.seeds, config.methods):
        ks = config.k if methods.method(method).takes_k else [None]
        for k, variant in itertools.product(ks, variants(config, method)):
            yield Wanted(method, k, variant, seed)


def variants(config: Config, method: str) -> list[dict[str, Any]]:
    """The constants that a method's runs replace, a run each; one run with none where none is."""
    known = methods.method(method)
    own = {field.name for field in dataclasses.fields(known.training)}
    if known.own_lr:
        own.remove("lr")
    asked = {
        name: getattr(config, name) for name in VARIED if name in own and getattr(config, name)
    }
    found = [dict(zip(asked, values, strict=True)) for values in itertools.product(*asked.values())]
    tails = [{TAIL: steps} if steps else {} for steps in config.kl_tail]
    return [{**one, **tail} for one, tail in itertools.product(found, tails)]


def check(config: Config) -> None:
    """Find what would fail later before anything slow has run.

    Raises:
        ValueError: naming the field.
    """
    runs.check_one_of("methods", config.methods, methods.names())
    runs.check_at_least(config, 1, "expansion", "steps", "batch_size", "k")
    runs.check_at_least(config, 0, "kl_tail", "search_steps")
    runs.check_prices(config, "search_prices")
    runs.check_dense_bits(config, "search_dense_bits", "search_prices")
    runs.check_searches(config, "search_steps", "search_prices")
    runs.check_at_least(config, 2 * config.context, "heldout_rows")
    check_metric(config)
    _check_variants(config)
    cache_of(config)
    width = block_width(config)
    if width is not None:
        _check_k(config, width)


def _check_variants(config: Config) -> None:
    for name in VARIED:
        values = getattr(config, name)
        if not values:
            continue
        takers = [m for m in config.methods if any(name in v for v in variants(config, m))]
        if not takers:
            whose = "the sparse autoencoders" if name == "lr" else "the Binary Autoencoder"
            raise ValueError(f"{name} is of {whose}, and methods has none; got {name} {values}")
        for method, value in itertools.product(takers, values):
            dataclasses.replace(methods.method(method).training, **{name: value})


def _check_k(config: Config, width: int) -> None:
    """Refuse a k above the number of features, before anything has run for hours."""
    most, found = config.expansion * width, max(config.k, default=0)
    if found > most and any(methods.method(name).takes_k for name in config.methods):
        raise runs.ConfigError(
            "k", f"must be at most d_sae={most}, the expansion times the width {width}; got {found}"
        )


def _check_search(config: Config, n_rows: int, width: int) -> None:
    """Refuse searched codes whose decoders cannot be fitted, before anything has run for hours."""
    d_sae = config.expansion * width
    most = min(n_rows, MAX_REFIT_FEATURES)
    if config.search_prices and d_sae > most:
        raise runs.ConfigError(
            "search_prices",
            f"must be left out for {d_sae:,} features: with {n_rows:,} training rows, decoders of "
            f"up to {most:,} are fitted to searched codes",
        )


# -- training ----------------------------------------------------------------------------------


class _Metrics:
    """The unit of each dimension, made when a run first needs it."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._made: dict[str, Tensor | None] = {}

    def of(self, method: str) -> tuple[Tensor | None, Tensor | None]:
        """That of a method's inputs, and of its targets if it has others."""
        context = self._context
        if method != "transcoder":
            return self._once(context.config.hook, context.cache.rows[: context.train.stop]), None
        source, target = context.transcoder_hooks
        return (
            self._once(source, context.pair["x_train"]),
            self._once(target, context.pair["y_train"]),
        )

    def _once(self, hook: str, rows: Tensor) -> Tensor | None:
        context = self._context
        if hook not in self._made:
            config = dataclasses.replace(context.config, hook=hook)
            self._made[hook] = error_metric(
                config, rows, context.stages, context.cache, context.train.stop - 1
            )
        return self._made[hook]


def settings_of(config: Config, facts: dict[str, Any], d: int, wanted: Wanted) -> dict[str, Any]:
    """All that a run's result depends on; kept runs are known by it."""
    d_sae = config.expansion * d
    names = ("model_name", "hook_name", "context_size", "prepend_bos", "dataset_path")
    data = {name: facts[name] for name in names} | {
        "tokens": facts["tokens"],
        "split": facts["split"],
    }
    if config.revision is not None:  # a kept run of the main one is known without it
        data["model_revision"] = facts["model_revision"]
    if wanted.method == "transcoder":
        data["transcoder_hooks"] = transcoder_hooks(config)
    tail = wanted.variant.get(TAIL)
    return {
        "method": wanted.method,
        "k": wanted.k,
        "d_sae": d_sae,
        "value_bits": config.value_bits,
        "training": training_config(config, wanted).for_sizes(d, d_sae).settings(),
        "data": data,
        # runs that were made without them keep their name
        **({} if config.metric == "none" else {"metric": config.metric}),
        **({} if tail is None else {"tail": _tail_settings(tail)}),
    }


def training_config(config: Config, wanted: Wanted) -> Any:
    """The constants of a run's training on rows."""
    return dataclasses.replace(
        methods.method(wanted.method).training,
        steps=config.steps,
        batch_size=config.batch_size,
        seed=wanted.seed,
        precision=config.precision,
        **wanted.constants,
    )


def _tail_settings(steps: int) -> dict[str, Any]:
    from bae_fast.causal import Tail

    return dataclasses.asdict(Tail(steps))


class Trainings:
    """Trains and evaluates runs, all on the same rows; what is done comes from its file."""

    def __init__(self, context: Context, facts: dict[str, Any]) -> None:
        """
        Args:
            context: the configuration and the rows.
            facts: where the rows come from, with the split.
        """
        self.context, self.config, self.facts = context, context.config, facts
        self.metrics = _Metrics(context)

    def one(self, wanted: Wanted) -> dict[str, Any]:
        """One run; a tail goes on from the model of the run without it."""
        settings = settings_of(self.config, self.facts, self.context.cache.d_in, wanted)
        return runs.once(
            self.config.out / "runs", wanted.name, settings, lambda: self._train(wanted, settings)
        )

    def _train(self, wanted: Wanted, settings: dict[str, Any]) -> dict[str, Any]:
        from bae_fast.analysis.evaluation import evaluate
        from bae_fast.causal import Tail, TailConfig

        x, y, x_held, y_held = self._rows(wanted.method)
        constants = training_config(self.config, wanted)
        if TAIL in wanted.variant:
            model = self._without_tail(wanted)
            constants = TailConfig.after(
                constants, _divergence(self.context, wanted.method), Tail(wanted.variant[TAIL])
            )
        else:
            model = self._new(wanted, settings, x, y)
        trainer = Trainer(model, x, constants, targets=y)
        say(f"   {wanted.name}")
        unfinished = self.config.out / "runs" / f"{wanted.name}-{runs.digest(settings)}"
        log = runs.fit(
            trainer, unfinished, log=unfinished / "log.jsonl", progress=self.config.progress
        )
        folder = model.save_pretrained(self.config.out / "models" / wanted.name)
        found = evaluate(
            model, x_held, y_held, training_rows=evenly(x), value_bits=self.config.value_bits
        ).summary()
        runs.discard(unfinished)
        return {
            "heldout": found,
            "last_line": log[-1],
            "model": str(folder.relative_to(self.config.out)),
        }

    def _rows(self, method: str) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Rows and targets to train on, and held-out ones; targets are None if rows are theirs."""
        context = self.context
        if method == "transcoder":
            x, y, x_held, y_held = (
                context.pair[part] for part in ("x_train", "y_train", "x_heldout", "y_heldout")
            )
            return x, y, x_held, y_held
        train, held = (
            context.cache.rows[part.start : part.stop] for part in (context.train, context.heldout)
        )
        return train, None, held, None

    def _new(self, wanted: Wanted, settings: dict[str, Any], x: Tensor, y: Tensor | None) -> Any:
        """A module at its start, with the normalisation of the rows."""
        units, device = self.metrics.of(wanted.method), pick_device(self.config)
        # the files are no part of what a run is known by: dataset_path names them there
        names = [name for name in ("text_files", "text_sha256") if name in self.facts]
        with seeded(wanted.seed, device):
            model: Any = methods.method(wanted.method).make(
                x.shape[1],
                settings["d_sae"],
                k=wanted.k,
                d_out=None if y is None else y.shape[1],
                metadata=settings["data"] | {name: self.facts[name] for name in names},
                device=device,
            )
        return model.fit_normalization_(x, y, metric=units[0], target_metric=units[1])

    def _without_tail(self, wanted: Wanted) -> Any:
        """The model that a tail goes on from, trained now where there is none."""
        kept = self.one(wanted.without_tail())
        try:
            return saved_model(self.context, {**kept, "method": wanted.method})
        except _NoModelError as error:
            raise runs.ConfigError(
                TAIL, f"must have the model of the run without it; {error}: take another --out"
            ) from error


def _divergence(context: Context, method: str) -> InPlaceDivergence:
    """What the language model loses on the text that methods are trained on."""
    from bae_fast.causal import InPlaceDivergence

    path, source = context.place(method)
    return InPlaceDivergence(context.lm(), context.training_windows(), path, source=source)


# -- scores ------------------------------------------------------------------------------------


def scores(
    context: Context, kept: dict[str, Any], scorers: Sequence[Scorer]
) -> dict[str, dict[str, Any]]:
    """What scorers say of a run's model: from their files, or now; nothing without the model."""
    out: Path = context.config.out
    loaded: list[Any] = []

    def model() -> Any:
        if not loaded:
            loaded.append(saved_model(context, kept))
        return loaded[0]

    found = {}
    for scorer in scorers:
        name = Path(kept["model"]).name
        settings = {"scorer": scorer.name, **scorer.settings, "run": kept["settings"]}

        def make(scorer: Scorer = scorer) -> dict[str, Any]:
            return {"found": scorer.score(model(), kept["method"], kept["k"], kept["seed"])}

        try:
            found[scorer.name] = runs.once(out / "runs", f"{scorer.name}-{name}", settings, make)[
                "found"
            ]
        except _NoModelError as error:
            say(f"   {scorer.name}-{name}: {error}; not scored")
    return found


class _NoModelError(Exception):
    """A run whose model is not on disk any more."""


def saved_model(context: Context, kept: dict[str, Any]) -> Any:
    """The model of a run, in eval mode.

    Folders are named by method, k or variant, and seed: a later run with other settings writes
    over it. So the model is the run's only if its held-out FVU is.
    """
    folder: Path = context.config.out / kept["model"]
    if not folder.is_dir():
        raise _NoModelError(f"{folder} is gone")
    model: Any = load_autoencoder(folder, device=pick_device(context.config))
    rows = context.cache.rows[context.heldout.start : context.heldout.stop]
    x, y = rows, rows
    if kept["method"] == "transcoder":
        x, y = context.pair["x_heldout"], context.pair["y_heldout"]
    error = FVUAccumulator()
    with torch.no_grad():
        for block, goal in zip(x.split(_FVU_ROWS), y.split(_FVU_ROWS), strict=True):
            error.update(model.as_own(goal), model.decode(model.encode(model.as_own(block))))
    fvu, expected = error.compute(), kept["heldout"]["fvu"]
    if not math.isclose(fvu, expected, rel_tol=_SAME_FVU):
        raise _NoModelError(f"{folder} is another run's (FVU {fvu:.4f}, not {expected:.4f})")
    return model


# -- the transcoder's rows ---------------------------------------------------------------------


def transcoder_hooks(config: Config) -> list[str]:
    """Modules whose outputs are the input and the target."""
    if config.transcoder_hooks is not None:
        return list(config.transcoder_hooks)
    return [f"{config.hook}.post_attention_layernorm", f"{config.hook}.mlp"]


def transcoder_rows(
    caches: Sequence[ActivationCache], base: ActivationCache, train_stop: int, heldout_start: int
) -> dict[str, Tensor]:
    """Inputs and targets at the same tokens, split by the same windows as the other methods.

    Args:
        caches: the rows of the input and those of the target.
        base: the other methods' rows.
        train_stop, heldout_start: where those end and begin in ``base``.
    """
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
