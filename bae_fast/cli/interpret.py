"""``bae-fast interpret``: a judge names a model's features and says how well the names fit.

Model -> hidden states -> the tokens of each feature -> phrases -> scores -> a folder with
features.jsonl, summary.json, summary.md and features.html. Every answer of the judge is kept as it
comes: interrupted or killed, the command goes on where it was and pays for nothing twice.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bae_fast.autoencoder import Autoencoder
from bae_fast.baselines import load_autoencoder
from bae_fast.cli import demo
from bae_fast.cli.runs import environment
from bae_fast.files import write_json, write_text

if TYPE_CHECKING:
    from bae_fast.interpret.answers import Prices
    from bae_fast.interpret.comsem import ComSemConfig, FeatureTokens
    from bae_fast.interpret.judges import Judge
    from bae_fast.lm import ActivationCache, LanguageModel

JUDGES = ("rule", "local", "openai")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "interpret",
        help="features named and scored by a judge",
        description="Name features by a language model and score the names (ComSem, detection).",
    )
    demo.add_data_arguments(parser)
    # None: what the loaded model was trained on
    parser.set_defaults(hook=None, context=None)
    parser.add_argument(
        "--load", type=Path, default=None,
        help="folder of a Binary Autoencoder or a baseline; default: results/demo, trained as "
        "`bae-fast demo` does where there is none",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=2000, help="where a model is trained")
    parser.add_argument(
        "--rows", choices=("heldout", "all"), default="heldout", help="hidden states looked at"
    )
    parser.add_argument("--k", type=int, default=10, help="features a token goes to")
    parser.add_argument("--features", type=int, default=100, help="features named, at most")
    parser.add_argument(
        "--order", choices=("corpus", "strongest"), default="corpus",
        help="which tokens of a feature: the first of the text (as released), or the strongest",
    )  # fmt: skip
    parser.add_argument(
        "--negatives", type=int, default=0, help="tokens judged on which the feature is off"
    )
    parser.add_argument("--draws", type=int, default=1, help="judgments of each token")
    parser.add_argument(
        "--shuffled", action="store_true",
        help="also judge against other features' phrases: what this judge says to nonsense",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    add_judge_arguments(parser, default="local")
    parser.add_argument(
        "--second-judge", choices=JUDGES, default=None, help="for the agreement of two judges"
    )
    parser.add_argument("--second-model", default=None, help="of --second-judge")
    parser.add_argument(
        "--budget-calls", type=int, default=None, help="ask at most this many questions"
    )
    parser.add_argument(
        "--price", type=float, nargs=2, default=None, metavar=("PROMPT", "COMPLETION"),
        help="of a million tokens, to show the cost",
    )  # fmt: skip
    parser.add_argument(
        "--answers", type=Path, default=None, help="file of answers; default: in --out"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="count calls and tokens, and ask nothing"
    )
    parser.add_argument(
        "--no-lens", action="store_true",
        help="leave out the vocabulary tokens that features point to, for which the language model "
        "is loaded",
    )  # fmt: skip
    parser.add_argument(
        "--delphi", type=Path, default=None, metavar="FOLDER",
        help="also write the features as delphi's cache of latents",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("results/interpret"))
    parser.set_defaults(run=run)


def add_judge_arguments(parser: argparse.ArgumentParser, **judge: Any) -> None:
    """Which judge, and how it is reached; ``judge``: default and number of ``--judge``."""
    parser.add_argument(
        "--judge", choices=JUDGES, help="who names features and judges the names", **judge
    )
    parser.add_argument(
        "--judge-model", default=None,
        help="local: as --model, default SmolLM2-135M-Instruct; openai: the name at the server",
    )  # fmt: skip
    parser.add_argument("--base-url", default=None, help="of an OpenAI-compatible server")
    parser.add_argument(
        "--api-key-env", default="OPENAI_API_KEY", help="environment variable with the key"
    )
    parser.add_argument(
        "--temperature", type=_temperature, default=0.0,
        help="of the openai judge; 'default' sends none",
    )  # fmt: skip
    parser.add_argument(
        "--max-tokens", type=int, default=None, help="of an answer of the openai judge"
    )
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds a request")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at once")


def _temperature(text: str) -> float | None:
    return None if text == "default" else float(text)


def run(arguments: argparse.Namespace) -> int:
    from bae_fast.interpret.answers import Answers, Asker
    from bae_fast.interpret.comsem import (
        ComSemConfig,
        Passages,
        feature_tokens,
        score_features,
        table,
    )
    from bae_fast.interpret.judges import JudgeError

    config = ComSemConfig(
        n_features=arguments.features,
        n_negatives=arguments.negatives,
        order=arguments.order,
        draws=arguments.draws,
        shuffled=arguments.shuffled,
        seed=arguments.seed,
    )
    prices = _prices(arguments)
    # what cannot work is found before anything slow has run
    judge = second = None
    if not arguments.dry_run:
        judge = make_judge(arguments, arguments.judge, arguments.judge_model)
        if arguments.second_judge is not None:
            second = make_judge(arguments, arguments.second_judge, arguments.second_model)
    stages = demo.Stages()
    model, folder = find_model(arguments)
    cache, tokenizer, facts = demo.harvest_rows(arguments, stages, batch_size=1)
    if cache.d_in != model.config.d_in:
        raise ValueError(
            f"--load {folder}: the model reads rows of width {model.config.d_in}; "
            f"{arguments.hook} of {facts['model_label']} gives {cache.d_in}"
        )
    rows = range(cache.n_rows)
    if arguments.rows == "heldout":
        rows = cache.split(demo.N_HELDOUT).heldout
    with stages.stage("collect tokens"):
        found = feature_tokens(model, cache.rows[rows.start : rows.stop], k=arguments.k)
        print(f"   {len(found.tokens.rows):,} tokens of {found.tokens.n_features:,} features")
    if arguments.delphi is not None:
        from bae_fast.interpret.delphi import write_delphi_cache

        with stages.stage("write delphi's cache"):
            print(f"   {write_delphi_cache(arguments.delphi, model, cache, rows)}")
    passages = Passages(cache, rows, tokenizer, config)
    if judge is None:
        return dry_run(arguments, config, found, passages, prices, tokenizer)

    path = arguments.answers or arguments.out / "answers.sqlite"
    with Answers(path) as kept:
        before = len(kept)
        asker = Asker(
            kept,
            budget_calls=arguments.budget_calls,
            prices=prices,
            progress=not arguments.no_progress,
        )
        try:
            with stages.stage("name and judge"):
                result = score_features(found, passages, judge, asker, config=config, second=second)
        except (KeyboardInterrupt, JudgeError) as error:
            print(
                f"\n{len(kept) - before:,} new answers are kept in {path}: the same command goes "
                "on from there",
                file=sys.stderr,
            )
            if isinstance(error, KeyboardInterrupt):
                return 130
            raise
    result["environment"] = environment()
    result["model"] = str(folder)
    result["data"] = {name: value for name, value in facts.items() if value is not None}
    features = result.pop("features")
    text = table(result)
    out: Path = arguments.out
    write_json(out / "summary.json", result)
    write_text(out / "summary.md", text)
    lines = [json.dumps(one, allow_nan=False) for one in features]
    write_text(out / "features.jsonl", "\n".join(lines) + "\n")
    lens = None
    if not arguments.no_lens:
        with stages.stage("logit lens"):
            lens = language_model(arguments, judge)
    page = write_page(out, model, cache, rows, tokenizer, found, features, facts, text, lens)
    print("\n" + text)
    print_features(features)
    if result["budget_spent"]:
        print(
            f"\n--budget-calls {arguments.budget_calls} was spent: the same command goes on from "
            f"the {before + asker.usage.calls:,} answers in {path}"
        )
    print(f"\n{out / 'summary.json'}, summary.md, features.jsonl, {page.name}")
    return 0


def _prices(arguments: argparse.Namespace) -> Prices:
    from bae_fast.interpret.answers import Prices

    if arguments.price is None:
        return Prices()
    if not all(math.isfinite(price) and price >= 0 for price in arguments.price):
        raise ValueError(f"--price must be two numbers of at least 0; got {arguments.price}")
    return Prices(*arguments.price)


def make_judge(arguments: argparse.Namespace, kind: str, model: str | None) -> Judge:
    """The judge that the options name.

    Raises:
        ImportError, ValueError: it cannot be made.
    """
    from bae_fast.interpret.judges import OpenAIJudge, RuleJudge, TransformersJudge
    from bae_fast.lm import DEFAULT_MODEL

    if kind == "rule":
        return RuleJudge()
    if kind == "local":
        return TransformersJudge(model or DEFAULT_MODEL, device=arguments.device)
    if model is None:
        raise ValueError("the openai judge needs --judge-model, the model's name at the server")
    return OpenAIJudge(
        model,
        base_url=arguments.base_url,
        api_key_env=arguments.api_key_env,
        temperature=arguments.temperature,
        max_tokens=arguments.max_tokens,
        timeout=arguments.timeout,
        concurrency=arguments.concurrency,
    )


def language_model(arguments: argparse.Namespace, judge: Judge) -> LanguageModel:
    """The model that was harvested; the judge's own where it is the same."""
    from bae_fast.interpret.judges import TransformersJudge
    from bae_fast.lm import DEFAULT_MODEL, load_language_model

    name = arguments.model or DEFAULT_MODEL
    if isinstance(judge, TransformersJudge) and judge.name == name:
        return judge.lm
    return load_language_model(name, device=arguments.device)


# -- the model ---------------------------------------------------------------------------------


def find_model(
    arguments: argparse.Namespace,
) -> tuple[Autoencoder, Path]:
    """The model to interpret, trained now where there is none, and its folder.

    Fills in what the command line leaves open from the model's metadata: language model, hook and
    window.
    """
    folder = arguments.load
    if folder is None:
        folder = Path("results/demo")
        if not (folder / "cfg.json").is_file():
            train_as_demo(arguments, folder)
    model = load_autoencoder(folder, device=arguments.device)
    metadata = model.config.metadata
    hooks = metadata.get("transcoder_hooks") or [metadata.get("hook_name")]
    if arguments.hook is None:
        arguments.hook = hooks[0] or "model.layers.11"
    elif hooks[0] is not None and arguments.hook != hooks[0]:
        raise ValueError(
            f"--hook {arguments.hook}: the model in {folder} was trained on {hooks[0]}"
        )
    if arguments.model is None:
        arguments.model = metadata.get("model_name")
    if arguments.context is None:
        arguments.context = metadata.get("context_size") or 256
    return model, folder


def train_as_demo(arguments: argparse.Namespace, folder: Path) -> None:
    """Run ``bae-fast demo`` with the options the two commands share."""
    parser = argparse.ArgumentParser()
    demo.add_parser(parser.add_subparsers())
    shared = ["demo", "--out", str(folder), "--steps", str(arguments.steps)]
    for name in ("model", "hook", "tokens", "context", "device", "cache"):
        value = getattr(arguments, name)
        if value is not None:
            shared += [f"--{name}", str(value)]
    if arguments.text is not None:
        shared += ["--text", *arguments.text]
    if arguments.no_progress:
        shared.append("--no-progress")
    print(f"no model in {folder}: training one as `bae-fast demo` does", flush=True)
    if demo.run(parser.parse_args(shared)) != 0:
        raise KeyboardInterrupt


# -- what is written and printed ---------------------------------------------------------------


def dry_run(
    arguments: argparse.Namespace,
    config: ComSemConfig,
    found: FeatureTokens,
    passages: Any,
    prices: Prices,
    tokenizer: Any,
) -> int:
    """Print how many questions and tokens the command would take."""
    from bae_fast.interpret.comsem import choose_tokens, count_questions

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    counted = count_questions(choose_tokens(found, config), passages, config, count)
    print(
        f"\n{counted['features']} features: {counted['naming_calls']:,} calls to name, "
        f"{counted['judging_calls']:,} to judge"
    )
    if arguments.budget_calls is not None and counted["calls"] > arguments.budget_calls:
        print(f"--budget-calls {arguments.budget_calls:,} ends it before")
    print(
        f"about {counted['prompt_tokens']:,} prompt tokens (by the tokenizer of the model that is "
        f"interpreted), at most {counted['completion_tokens']:,} completion tokens"
    )
    cost = prices.cost(counted["prompt_tokens"], counted["completion_tokens"])
    print("cost: unknown without --price" if cost is None else f"cost: at most about {cost:.4f}")
    path = arguments.answers or arguments.out / "answers.sqlite"
    if path.is_file():
        print(f"answers that are in {path} cost nothing: they are not taken off")
    return 0


def write_page(
    out: Path,
    model: Autoencoder,
    cache: ActivationCache,
    rows: range,
    tokenizer: Any,
    found: FeatureTokens,
    features: list[dict[str, Any]],
    facts: dict[str, Any],
    summary: str,
    lens: LanguageModel | None,
) -> Path:
    """All features as one page to look through, the named ones with their phrases and scores."""
    from bae_fast.interpret.comsem import ordered_rows
    from bae_fast.interpret.facts import Contexts, feature_records, gather_facts
    from bae_fast.report.browser import write_browser

    part = slice(rows.start, rows.stop)
    states = cache.rows[part].split(4096)
    windows = cache.row_window[part].long()
    binary = model.ranks_bits
    see = model.preactivation if binary else model.activations
    gathered = gather_facts(
        found.code,
        row_tokens=cache.tokens[windows, cache.row_position[part].long()],
        windows=windows,
        values=(see(model.as_own(block)) for block in states),
        positive_only=not binary,
        W_dec=None if lens is None else model.directions(),
        model=None if lens is None else lens.model,
    )
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
    records = feature_records(
        gathered,
        tokenizer,
        contexts=Contexts(cache, tokenizer, rows),
        shown=lambda number: [
            (row, None) for row in ordered_rows(found, number, "strongest")[:10].tolist()
        ],
        code=found.code,
        phrases={number: one["phrase"] for number, one in shown.items()},
        scores={label: values for label, values in scores.items() if values},
    )
    return write_browser(
        out / "features.html",
        records,
        title="Features and their names",
        subtitle=f"{facts['model_label']}, {facts['hook_name']}, {type(model).__name__}",
        notes=[line for line in summary.splitlines() if line and not line.startswith("|")],
        histogram_label="pre-activation" if binary else "activation where on",
    )


def print_features(features: list[dict[str, Any]], n: int = 20) -> None:
    """The first of the features, best scores first."""
    from bae_fast.analysis.text import visible_text

    def cell(value: float | None) -> str:
        return "    -" if value is None else f"{value:5.2f}"

    scored = [one for one in features if one["comsem"] is not None]
    scored.sort(key=lambda one: (-one["comsem"], -(one["detection"] or 0)))
    print("feature  density  ComSem  detect  shuffled  phrase")
    for one in scored[:n]:
        print(
            f"{one['feature']:7d}  {one['density']:7.4f}   {cell(one['comsem'])}   "
            f"{cell(one['detection'])}     {cell(one['shuffled'])}  "
            f"{visible_text(one['phrase'])[:60]}"
        )
    if len(scored) > n:
        print(f"... {len(scored) - n} more in features.jsonl and features.html")
