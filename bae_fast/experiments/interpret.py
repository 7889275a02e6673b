"""A judge names a model's features and says how well the names fit.

Model -> hidden states -> the tokens of each feature -> phrases -> scores -> a folder with
features.jsonl, summary.json, summary.md and features.html. Every answer of the judge is kept as it
comes: interrupted or killed, the experiment goes on where it was and pays for nothing twice.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bae_fast.autoencoder import Autoencoder
from bae_fast.baselines import load_autoencoder
from bae_fast.experiments import demo, runs
from bae_fast.experiments.data import (
    DEFAULT_HOOK,
    HELDOUT_WINDOWS,
    Data,
    Source,
    TrainedOn,
    block_width,
    cache_of,
    check_width,
    harvest_rows,
    heldout_rows,
    model_name,
    pick_device,
)
from bae_fast.experiments.features_page import Beside, Looked, look_at, read_names, side_by_side
from bae_fast.experiments.judges import JudgeOptions, make_judge
from bae_fast.files import write_json, write_text
from bae_fast.lm.origin import check_model, check_origin
from bae_fast.progress import Stages, say

if TYPE_CHECKING:
    from torch import Tensor

    from bae_fast.interpret.answers import Prices
    from bae_fast.interpret.comsem import ComSemConfig, FeatureTokens
    from bae_fast.interpret.judges import Judge
    from bae_fast.lm import ActivationCache, LanguageModel


@dataclasses.dataclass(frozen=True)
class Config(JudgeOptions, Beside, Source):
    """Name features by a language model and score the names (ComSem, detection).

    Attributes:
        hook: The path of the module whose output the model reads. Without it that is the module
            the model was trained on.
        context: The number of tokens in a window of text. Without it that is the training's.
        text: Text files, files of JSON lines, and folders of them, which the model reads. Without
            them that is the training's text, where the saved model names it, and else the topics
            of Python's standard library.
        load: The folder of a Binary Autoencoder or a sparse autoencoder. Without it that is
            results/demo, trained as bae-fast demo does where there is none.
        steps: The number of optimizer steps, where a model is trained.
        rows: The hidden states that are looked at: the held-out ones, or all.
        k: The number of features that a token goes to.
        features: The largest number of features that are named.
        order: Which tokens of a feature are shown: the first of the text, corpus, as the released
            program does, or the strongest.
        negatives: The number of tokens on which a feature is off that are judged too.
        draws: The number of judgments of each token.
        shuffled: Features are also judged by other features' phrases, which says what this judge
            answers to nonsense.
        seed: The seed of every random draw.
        judge: The judge that names features and judges the names: rule, local or openai.
        second_judge: A second judge, for the agreement of the two.
        second_model: The second judge's model.
        budget_calls: At most this many questions are asked.
        price: The prices of a million prompt tokens and of a million completion tokens, to show
            the cost.
        answers: The file of answers. Without it that is answers.sqlite in the results.
        dry_run: Calls and tokens are counted, and nothing is asked.
        lens: The page shows the vocabulary tokens that features point to, for which the language
            model is loaded.
        delphi: A folder in which the features are also written as delphi's cache of latents.
        out: The folder of the results.
    """

    hook: str | None = None
    context: int | None = None
    text: tuple[str, ...] | None = None
    load: Path | None = None
    steps: int = 2000
    rows: Literal["heldout", "all"] = "heldout"
    k: int = 10
    features: int = 100
    order: Literal["corpus", "strongest"] = "corpus"
    negatives: int = 0
    draws: int = 1
    shuffled: bool = False
    seed: int = 0
    judge: str = "local"
    second_judge: str | None = None
    second_model: str | None = None
    budget_calls: int | None = None
    price: tuple[float, float] | None = None
    answers: Path | None = None
    dry_run: bool = False
    lens: bool = True
    delphi: Path | None = None
    out: Path = Path("results/interpret")


def run(config: Config) -> runs.Result:
    """Name the features, judge the names, write scores and page.

    Raises:
        ValueError, ImportError, OSError, JudgeError: naming the field, the package or the file.
        InterruptedRunError: it was interrupted; all answers are kept.
    """
    from bae_fast.interpret.answers import Answers, Asker
    from bae_fast.interpret.comsem import (
        ComSemConfig,
        Passages,
        feature_tokens,
        score_features,
    )
    from bae_fast.interpret.judges import JudgeError
    from bae_fast.report.comsem import table

    constants = ComSemConfig(
        n_features=config.features,
        n_negatives=config.negatives,
        order=config.order,
        draws=config.draws,
        shuffled=config.shuffled,
        seed=config.seed,
    )
    runs.check_one_of("rows", config.rows, ("heldout", "all"))
    prices = _prices(config)
    device = pick_device(config)
    # what cannot work is found before anything slow has run
    cache_of(config)
    judge = second = None
    if not config.dry_run:
        judge = make_judge(config, config.judge, config.judge_model, device)
        if config.second_judge is not None:
            second = make_judge(config, config.second_judge, config.second_model, device)
    stages = Stages(config.progress)
    model, folder, data = find_model(config)
    beside = open_beside(config, folder)
    cache, tokenizer, facts = harvest_rows(data, stages, batch_size=1)
    check_origin(model.config.metadata, facts)
    if cache.d_in != model.config.d_in:
        raise runs.ConfigError(
            "load",
            f"{folder}: the model reads rows of width {model.config.d_in}; {data.hook} of "
            f"{facts['model_label']} gives {cache.d_in}",
        )
    if beside is not None:
        beside.check(cache.rows, facts)
    rows = range(cache.n_rows)
    if config.rows == "heldout":
        rows = heldout_rows(data, cache)
    with stages.stage("collect tokens"):
        found = feature_tokens(model, cache.rows[rows.start : rows.stop], k=config.k)
        say(f"   {len(found.tokens.rows):,} tokens of {found.tokens.n_features:,} features")
    if config.delphi is not None:
        from bae_fast.interpret.delphi import write_delphi_cache

        with stages.stage("write delphi's cache"):
            say(f"   {write_delphi_cache(config.delphi, model, cache, rows)}")
    passages = Passages(cache, rows, tokenizer, constants)
    if judge is None:
        return dry_run(config, constants, found, passages, prices, tokenizer)

    path = config.answers or config.out / "answers.sqlite"
    with Answers(path) as kept:
        before = len(kept)
        asker = Asker(
            kept,
            budget_calls=config.budget_calls,
            prices=prices,
            progress=config.progress,
        )
        try:
            with stages.stage("name and judge"):
                values = score_features(
                    found, passages, judge, asker, config=constants, second=second
                )
        except (KeyboardInterrupt, JudgeError) as error:
            note = (
                f"{len(kept) - before:,} new answers are kept in {path}: the same command goes on "
                "from there"
            )
            if isinstance(error, KeyboardInterrupt):
                raise runs.InterruptedRunError(note) from error
            say(note, error=True)
            raise
    values["environment"] = runs.environment()
    values["model"] = str(folder)
    values["data"] = {name: value for name, value in facts.items() if value is not None}
    features = values.pop("features")
    text = table(values)
    with runs.results(config, wait=True) as out:
        write_json(out / "summary.json", values)
        write_text(out / "summary.md", text)
        lines = [json.dumps(one, allow_nan=False) for one in features]
        write_text(out / "features.jsonl", "\n".join(lines) + "\n")
        lens = None
        if config.lens:
            with stages.stage("logit lens"):
                lens = language_model(data, judge)
        with stages.stage("page"):
            write_page(out, model, cache, rows, tokenizer, found, features, facts, text, lens,
                       beside)  # fmt: skip
    report = [text, *feature_lines(features)]
    if values["budget_spent"]:
        report += [
            "",
            f"--budget-calls {config.budget_calls} was spent: the same command goes on from the "
            f"{before + asker.usage.calls:,} answers in {path}",
        ]
    names = ("summary.json", "summary.md", "features.jsonl", "features.html")
    files = tuple(config.out / name for name in names)
    return runs.Result(values, "\n".join(report), files)


def _prices(config: Config) -> Prices:
    from bae_fast.interpret.answers import Prices

    if config.price is None:
        return Prices()
    if len(config.price) != 2 or not all(math.isfinite(p) and p >= 0 for p in config.price):
        raise runs.ConfigError(
            "price", f"must be two numbers of at least 0; got {list(config.price)}"
        )
    return Prices(*config.price)


def language_model(data: Data, judge: Judge) -> LanguageModel:
    """The model that was harvested; the judge's own where it is the same."""
    from bae_fast.interpret.judges import TransformersJudge
    from bae_fast.lm import load_language_model

    name = model_name(data.model)
    if isinstance(judge, TransformersJudge) and judge.name == name and data.revision is None:
        return judge.lm
    return load_language_model(name, device=pick_device(data), revision=data.revision)


# -- the model ---------------------------------------------------------------------------------


def find_model(config: Config) -> tuple[Autoencoder, Path, Data]:
    """The model to interpret, trained now where there is none, its folder, and its data.

    Raises:
        ConfigError: see :func:`open_model`.
    """
    folder = config.load
    if folder is None:
        folder = Path("results/demo")
        if not (folder / "cfg.json").is_file():
            train_as_demo(config, folder)
    model, data = open_model(config, folder)
    return model, folder, data


def open_model(
    config: Any, folder: Path | str, *, with_text: bool = True
) -> tuple[Autoencoder, Data]:
    """A saved model and the hidden states that it reads.

    Language model, hook, window and text are the training's where the configuration leaves them
    open.

    Args:
        config: a :class:`Source` with ``hook`` and ``context``, which may be None.
        folder: where the model is saved; a text may be ``user/name`` of a repository on the Hub.
        with_text: whether the text of the training is looked for.

    Raises:
        ConfigError: the model was trained on another hook, on rows of a file whose language model
            is not named, or on a text that is not here; or it reads rows of another width.
    """
    model = load_autoencoder(folder, device=pick_device(config))
    metadata = model.config.metadata
    hooks = metadata.get("transcoder_hooks") or [metadata.get("hook_name")]
    if config.hook is not None and hooks[0] is not None and config.hook != hooks[0]:
        raise runs.ConfigError(
            "hook", f"{config.hook}: the model in {folder} was trained on {hooks[0]}"
        )
    if config.model is not None:
        check_model(metadata, config.model, "--model")
    elif metadata.get("model_name") is None and metadata.get("rows") is not None:
        raise runs.ConfigError(
            "model",
            f"and --hook must name whose hidden states it reads: the model in {folder} was trained "
            f"on the file {metadata['rows']}",
        )
    data = _data(
        config,
        model=metadata.get("model_name") if config.model is None else config.model,
        hook=config.hook or hooks[0],
        context=config.context or metadata.get("context_size"),
    )
    width = block_width(data)
    if width is not None and width != model.d_in:
        raise runs.ConfigError(
            "model",
            f"must be one whose states the model in {folder} reads, of width {model.d_in}; those "
            f"of {model_name(data.model)} are {width} wide",
        )
    return model, text_of(config, data, metadata) if with_text else data


def text_of(config: Source, data: Data, metadata: Mapping[str, Any]) -> Data:
    """The data with the text that a model was trained on, where a configuration names none.

    Metadata without ``text_files`` do not say which files that was: the standard library's text is
    read, and a line says so.

    Raises:
        ConfigError: one of the files or folders is not here.
    """
    if config.text is not None:
        return data
    if "text_files" not in metadata:
        name = metadata.get("dataset_path")
        if name is None:
            say("   the model does not say which text it was trained on; --text names another one")
        else:
            say(
                f"   the model was trained on {name}, which is not read again: this is Python's "
                "standard library, and --text names another text"
            )
        return data
    files = metadata["text_files"] or ()  # none are the topics of Python's standard library
    for name in files:
        if not Path(name).exists():
            raise runs.ConfigError(
                "text", f"must be given: the model was trained on {name}, which is not here"
            )
    values = {field.name: getattr(data, field.name) for field in dataclasses.fields(Data)}
    return TrainedOn(
        **values
        | {
            "text": tuple(files) or None,
            "field": metadata.get("text_field") or "text",
            "tokens": metadata.get("tokens") if config.tokens is None else config.tokens,
            "bos": metadata.get("prepend_bos") if config.bos is None else config.bos,
        },
        packed=bool(metadata.get("text_packed")),
        sha256=metadata.get("text_sha256"),
        heldout_windows=_heldout_windows(data, metadata),
    )


def _heldout_windows(data: Data, metadata: Mapping[str, Any]) -> int | None:
    """How many windows of the data's size were held out at the beginning of the text, if any."""
    n, context = metadata.get(HELDOUT_WINDOWS), metadata.get("context_size")
    if not isinstance(n, int) or not isinstance(context, int):
        return None
    return n * context // data.context


@dataclasses.dataclass(frozen=True)
class Second:
    """A second model, whose features stand beside those of the first.

    Attributes:
        folder: where it is saved.
        model: the autoencoder.
        names: what the page calls the first model and this one.
        phrases: names by feature.
    """

    folder: Path
    model: Autoencoder
    names: tuple[str, str]
    phrases: dict[int, str]

    def check(self, rows: Tensor, facts: dict[str, Any]) -> None:
        """Refuse hidden states that this model does not read.

        Raises:
            ConfigError, ValueError: naming the option, both modules or both widths.
        """
        check_origin(self.model.config.metadata, facts)
        check_width("beside", self.folder, self.model.d_in, rows)

    def look_at(
        self, cache: ActivationCache, rows: range, tokenizer: Any, *, language_model: Any
    ) -> Looked:
        """What the page shows of it, see :func:`look_at`."""
        from bae_fast.interpret.comsem import feature_tokens

        found = feature_tokens(self.model, cache.rows[rows.start : rows.stop])
        return look_at(
            self.model,
            cache,
            rows,
            tokenizer,
            found,
            language_model=language_model,
            phrases=self.phrases,
        )


def open_beside(config: Any, folder: Path) -> Second | None:
    """The second model that a configuration names, if it does.

    Args:
        config: a :class:`Beside` and :class:`Source` with ``hook`` and ``context``.
        folder: the folder of the first model.

    Raises:
        ConfigError: names without a second model, or see :func:`open_model`.
    """
    if config.beside is None:
        if config.beside_names is not None:
            raise runs.ConfigError("beside_names", "must stand with --beside, whose names they are")
        return None
    phrases = {}
    if config.beside_names is not None:
        phrases = read_names(config.beside_names, "beside_names")
    model, _ = open_model(config, config.beside, with_text=False)
    return Second(config.beside, model, (str(folder), str(config.beside)), phrases)


def _data(config: Any, **given: Any) -> Data:
    """The configuration's data, with what is given in place of None."""
    names = [field.name for field in dataclasses.fields(Data)]
    values = {name: getattr(config, name) for name in names}
    values |= {name: value for name, value in given.items() if value is not None}
    return Data(**{name: value for name, value in values.items() if value is not None})


def train_as_demo(config: Config, folder: Path) -> None:
    """Train a model as the demo does, with the options the two share."""
    say(f"no model in {folder}: training one as `bae-fast demo` does")
    data = dataclasses.asdict(_data(config, hook=config.hook or DEFAULT_HOOK))
    demo.run(demo.Config(**data, steps=config.steps, out=folder))


# -- what is written and shown -----------------------------------------------------------------


def dry_run(
    config: Config,
    constants: ComSemConfig,
    found: FeatureTokens,
    passages: Any,
    prices: Prices,
    tokenizer: Any,
) -> runs.Result:
    """How many questions and tokens the experiment would take."""
    from bae_fast.interpret.comsem import choose_tokens, count_questions

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    counted = count_questions(choose_tokens(found, constants), passages, constants, count)
    lines = [
        f"{counted['features']} features: {counted['naming_calls']:,} calls to name, "
        f"{counted['judging_calls']:,} to judge"
    ]
    if config.budget_calls is not None and counted["calls"] > config.budget_calls:
        lines.append(f"--budget-calls {config.budget_calls:,} ends it before")
    lines.append(
        f"about {counted['prompt_tokens']:,} prompt tokens (by the tokenizer of the model that is "
        f"interpreted), at most {counted['completion_tokens']:,} completion tokens"
    )
    cost = prices.cost(counted["prompt_tokens"], counted["completion_tokens"])
    lines.append(
        "cost: unknown without --price" if cost is None else f"cost: at most about {cost:.4f}"
    )
    path = config.answers or config.out / "answers.sqlite"
    if path.is_file():
        lines.append(f"answers that are in {path} cost nothing: they are not taken off")
    return runs.Result(dict(counted), "\n".join(lines), ())


def write_page(
    folder: Path,
    model: Autoencoder,
    cache: ActivationCache,
    rows: range,
    tokenizer: Any,
    found: FeatureTokens,
    features: list[dict[str, Any]],
    facts: dict[str, Any],
    summary: str,
    lens: LanguageModel | None,
    beside: Second | None = None,
) -> Path:
    """All features as one page to look through, the named ones with their phrases and scores, and
    beside each its partner of a second model."""
    from bae_fast.report.browser import write_browser

    shown = {one["feature"]: one for one in features if one["phrase"]}
    labels = {
        "comsem": "ComSem",
        "detection": "Detection",
        "auc": "Detection AUC",
        "shuffled": "Other phrase",
    }
    scores = {
        label: {number: one[name] for number, one in shown.items() if one[name] is not None}
        for name, label in labels.items()
    }
    language_model = None if lens is None else lens.model
    looked = look_at(
        model,
        cache,
        rows,
        tokenizer,
        found,
        language_model=language_model,
        phrases={number: one["phrase"] for number, one in shown.items()},
        scores={label: values for label, values in scores.items() if values},
    )
    if beside is not None:
        other = beside.look_at(cache, rows, tokenizer, language_model=language_model)
        looked = side_by_side(looked, other, beside.names)
    about = [line for line in summary.splitlines() if line and not line.startswith("|")]
    return write_browser(
        folder / "features.html",
        looked.records,
        title="Features and their names",
        subtitle=f"{facts['model_label']}, {facts['hook_name']}, {type(model).__name__}",
        notes=[*about, *looked.notes],
        **looked.labels,
    )


def feature_lines(features: list[dict[str, Any]], n: int = 20) -> list[str]:
    """The first of the features, best scores first."""
    from bae_fast.analysis.text import visible_text

    def cell(value: float | None) -> str:
        return "    -" if value is None else f"{value:5.2f}"

    scored = [one for one in features if one["comsem"] is not None]
    scored.sort(key=lambda one: (-one["comsem"], -(one["detection"] or 0)))
    lines = ["feature  density  ComSem  detect  shuffled  phrase"]
    lines += [
        f"{one['feature']:7d}  {one['density']:7.4f}   {cell(one['comsem'])}   "
        f"{cell(one['detection'])}     {cell(one['shuffled'])}  "
        f"{visible_text(one['phrase'])[:60]}"
        for one in scored[:n]
    ]
    if len(scored) > n:
        lines.append(f"... {len(scored) - n} more in features.jsonl and features.html")
    return lines
