"""A judge names a model's features and says how well the names fit.

Model -> hidden states -> the tokens of each feature -> phrases -> scores -> a folder with
features.jsonl, summary.json, summary.md and features.html. Every answer of the judge is kept as it
comes: interrupted or killed, the experiment goes on where it was and pays for nothing twice.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bae_fast.autoencoder import Autoencoder
from bae_fast.experiments import demo, runs
from bae_fast.experiments.data import (
    DEFAULT_HOOK,
    Data,
    Source,
    cache_of,
    harvest_rows,
    heldout_rows,
    model_name,
    pick_device,
)
from bae_fast.experiments.features_page import Beside, look_at, side_by_side
from bae_fast.experiments.judges import JudgeOptions, make_judge
from bae_fast.experiments.saved import Second, data_of, open_beside, open_model
from bae_fast.files import write_json, write_text
from bae_fast.lm.origin import check_origin
from bae_fast.progress import Stages, say

if TYPE_CHECKING:
    from bae_fast.interpret.answers import Prices
    from bae_fast.interpret.comsem import ComSemConfig, FeatureTokens, Passages
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
    from bae_fast.interpret.comsem import ComSemConfig, Passages
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
    runs.check_field(config, "answers", folder=False)
    runs.check_field(config, "delphi", folder=True)
    judges = None if config.dry_run else _judges(config, device)
    stages = Stages(config.progress)
    seen = see(config, stages)
    if config.delphi is not None:
        from bae_fast.interpret.delphi import write_delphi_cache

        with stages.stage("write delphi's cache"):
            say(f"   {write_delphi_cache(config.delphi, seen.model, seen.cache, seen.rows)}")
    passages = Passages(seen.cache, seen.rows, seen.tokenizer, constants)
    if judges is None:
        return dry_run(config, constants, seen, passages, prices)

    values, n_answers = ask(config, constants, seen, passages, judges, prices, stages)
    values["environment"] = runs.environment()
    values["model"] = str(seen.folder)
    values["data"] = {name: value for name, value in seen.facts.items() if value is not None}
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
                lens = language_model(seen.data, judges[0])
        with stages.stage("page"):
            write_page(out, seen, features, text, lens)
    report = [text, *feature_lines(features)]
    if values["budget_spent"]:
        report += [
            "",
            f"--budget-calls {config.budget_calls} was spent: the same command goes on from the "
            f"{n_answers:,} answers in {_answers_path(config)}",
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


def _judges(config: Config, device: str) -> tuple[Judge, Judge | None]:
    """Who names and judges, and the second judge if there is one."""
    judge = make_judge(config, config.judge, config.judge_model, device)
    if config.second_judge is None:
        return judge, None
    return judge, make_judge(config, config.second_judge, config.second_model, device)


def _answers_path(config: Config) -> Path:
    return config.answers or config.out / "answers.sqlite"


def language_model(data: Data, judge: Judge) -> LanguageModel:
    """The model that was harvested; the judge's own where it is the same."""
    from bae_fast.interpret.judges import TransformersJudge
    from bae_fast.lm import load_language_model

    name = model_name(data.model)
    if isinstance(judge, TransformersJudge) and judge.name == name and data.revision is None:
        return judge.lm
    return load_language_model(name, device=pick_device(data), revision=data.revision)


# -- the model and what it reads ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Seen:
    """A model, the hidden states that it reads, and the tokens of its features.

    Attributes:
        folder, model, data: the saved model and its data, see :func:`find_model`.
        cache, tokenizer, facts: what was harvested, see :func:`harvest_rows`.
        rows: which rows of the cache are looked at.
        found: the tokens of each feature among them.
        beside: the second model, if there is one.
    """

    folder: Path
    model: Autoencoder
    data: Data
    cache: ActivationCache
    tokenizer: Any
    facts: dict[str, Any]
    rows: range
    found: FeatureTokens
    beside: Second | None


def see(config: Config, stages: Stages) -> Seen:
    """Find the model, harvest what it reads, and collect the tokens of its features.

    Raises:
        ConfigError, ValueError: models and hidden states that do not belong together.
    """
    from bae_fast.interpret.comsem import feature_tokens

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
    return Seen(folder, model, data, cache, tokenizer, facts, rows, found, beside)


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


def train_as_demo(config: Config, folder: Path) -> None:
    """Train a model as the demo does, with the options the two share."""
    say(f"no model in {folder}: training one as `bae-fast demo` does")
    data = dataclasses.asdict(data_of(config, hook=config.hook or DEFAULT_HOOK))
    demo.run(demo.Config(**data, steps=config.steps, out=folder))


# -- questions ---------------------------------------------------------------------------------


def ask(
    config: Config,
    constants: ComSemConfig,
    seen: Seen,
    passages: Passages,
    judges: tuple[Judge, Judge | None],
    prices: Prices,
    stages: Stages,
) -> tuple[dict[str, Any], int]:
    """Scores of the features, and how many answers are on disk.

    Raises:
        JudgeError: the judge cannot be reached, or refuses; what it answered is kept.
        InterruptedRunError: it was interrupted; all answers are kept.
    """
    from bae_fast.interpret.answers import Answers, Asker
    from bae_fast.interpret.comsem import score_features
    from bae_fast.interpret.judges import JudgeError

    judge, second = judges
    path = _answers_path(config)
    with Answers(path) as kept:
        before = len(kept)
        asker = Asker(
            kept, budget_calls=config.budget_calls, prices=prices, progress=config.progress
        )
        try:
            with stages.stage("name and judge"):
                values = score_features(
                    seen.found, passages, judge, asker, config=constants, second=second
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
    return values, before + asker.usage.calls


def dry_run(
    config: Config, constants: ComSemConfig, seen: Seen, passages: Passages, prices: Prices
) -> runs.Result:
    """How many questions and tokens the experiment would take."""
    from bae_fast.interpret.comsem import choose_tokens, count_questions

    def count(text: str) -> int:
        return len(seen.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    counted = count_questions(choose_tokens(seen.found, constants), passages, constants, count)
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
    path = _answers_path(config)
    if path.is_file():
        lines.append(f"answers that are in {path} cost nothing: they are not taken off")
    return runs.Result(dict(counted), "\n".join(lines), ())


# -- what is written and shown -----------------------------------------------------------------


def write_page(
    folder: Path,
    seen: Seen,
    features: list[dict[str, Any]],
    summary: str,
    lens: LanguageModel | None,
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
        seen.model,
        seen.cache,
        seen.rows,
        seen.tokenizer,
        seen.found,
        language_model=language_model,
        phrases={number: one["phrase"] for number, one in shown.items()},
        scores={label: values for label, values in scores.items() if values},
    )
    if seen.beside is not None:
        other = seen.beside.look_at(
            seen.cache, seen.rows, seen.tokenizer, language_model=language_model
        )
        looked = side_by_side(looked, other, seen.beside.names)
    about = [line for line in summary.splitlines() if line and not line.startswith("|")]
    return write_browser(
        folder / "features.html",
        looked.records,
        title="Features and their names",
        subtitle=(
            f"{seen.facts['model_label']}, {seen.facts['hook_name']}, {type(seen.model).__name__}"
        ),
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
