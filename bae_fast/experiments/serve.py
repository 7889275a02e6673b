"""The page of features with a live prompt, served to a browser on this machine.

Model -> hidden states -> the records of its features -> the page. A text that is typed there goes
through the language model; its tokens are coloured by a feature, and features that are set by hand
show how the next token's probabilities change.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bae_fast.autoencoder import Autoencoder
from bae_fast.experiments import runs
from bae_fast.experiments.data import (
    N_HELDOUT,
    Source,
    cache_of,
    check_width,
    harvest_rows,
    load_model,
)
from bae_fast.experiments.features_page import Beside, look_at, read_names, side_by_side
from bae_fast.experiments.saved import open_beside, open_model
from bae_fast.lm.origin import check_origin
from bae_fast.progress import Stages, say

if TYPE_CHECKING:
    from bae_fast.report.server import PageServer


@dataclasses.dataclass(frozen=True)
class Config(Beside, Source):
    """Serve the page of a model's features, with a prompt that runs through the language model.

    Attributes:
        folder: The folder of the saved autoencoder, or user/name of its repository on the Hub.
        hook: The path of the module whose output the model reads. Without it that is the module
            the model was trained on.
        context: The number of tokens in a window of the text that features are looked at on.
            Without it that is the training's.
        text: Text files, files of JSON lines, and folders of them, on which features are looked
            at. Without them that is the training's text, where the saved model names it, and else
            the topics of Python's standard library.
        names: The file features.jsonl of bae-fast interpret, whose names are shown.
        rows: The number of hidden states that features are looked at on, the last of the text.
        prompt: The text that the prompt holds at first.
        max_tokens: The largest number of tokens of a prompt.
        host: The address to listen at, which must be of this machine alone.
        port: The port to listen at; 0 takes a free one.
    """

    folder: Path | None = None
    hook: str | None = None
    context: int | None = None
    text: tuple[str, ...] | None = None
    names: Path | None = None
    rows: int = N_HELDOUT
    prompt: str = "The old library opened its doors at noon, and the first readers came in."
    max_tokens: int = 256
    host: str = "127.0.0.1"
    port: int = 8765


def run(config: Config) -> runs.Result:
    """Make the page and serve it until it is interrupted.

    Raises:
        ValueError, ImportError, OSError: naming the field, the package or the file.
    """
    with listening(config) as server:
        facts = publish(config, server)
        say(f"{server.address} (Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:  # the way to end it; SIGTERM comes as one
            say("ended")
        values: dict[str, Any] = {
            "environment": runs.environment(),
            "data": {name: facts[name] for name in ("model_label", "hook_name", "dataset_path")},
            "address": server.address,
            "calls": server.n_calls,
        }
    return runs.Result(values, f"{server.n_calls:,} questions were answered", ())


def listening(config: Config) -> PageServer:
    """A server that holds the address and has no page yet: a port that is taken is found before
    anything slow has run.

    Raises:
        ConfigError: naming the field.
    """
    from bae_fast.report.server import PageServer

    if config.folder is None:
        raise runs.ConfigError("folder", "must name a saved model; got none")
    runs.check_at_least(config, 1, "rows", "max_tokens")
    cache_of(config)
    try:
        return PageServer("", {}, host=config.host, port=config.port)
    except ValueError as error:
        field, _, text = str(error).partition(" ")
        raise runs.ConfigError(field, text) from error
    except OSError as error:
        raise runs.ConfigError(
            "port", f"{config.port} cannot be had: {error.strerror or error}; 0 takes a free one"
        ) from error


def publish(config: Config, server: PageServer) -> dict[str, Any]:
    """Give a server its page and its prompt; where the hidden states come from."""
    from bae_fast.causal import Prompt
    from bae_fast.interpret.comsem import feature_tokens
    from bae_fast.report.browser import browser_page
    from bae_fast.report.live import live_facts, prompt_call

    assert config.folder is not None
    phrases = {} if config.names is None else read_names(config.names, "names")
    second = open_beside(config, config.folder)
    stages = Stages(config.progress)
    # a Path is a folder; a text may name a repository too
    model, data = open_model(config, str(config.folder))
    read, hook = places(model, data.hook)
    cache, tokenizer, facts = harvest_rows(data, stages, batch_size=1)
    check_origin(model.config.metadata, facts)
    check_width("folder", config.folder, model.d_in, cache.rows)
    if second is not None:
        second.check(cache.rows, facts)
    lm = load_model(data, stages)
    prompt = Prompt(lm, hook, model, source=read, max_tokens=config.max_tokens)
    rows = range(max(cache.n_rows - config.rows, 0), cache.n_rows)
    states = cache.rows[rows.start : rows.stop]
    with stages.stage("look at the features"):
        found = feature_tokens(model, states)
        looked = look_at(
            model, cache, rows, tokenizer, found, language_model=lm.model, phrases=phrases
        )
        if second is not None:
            other = second.look_at(cache, rows, tokenizer, language_model=lm.model)
            looked = side_by_side(looked, other, second.names)
        usual = usual_values(model, states, found.code.counts())
        page = browser_page(
            looked.records,
            title="Features",
            subtitle=f"{facts['model_label']}, {facts['hook_name']}, {type(model).__name__}",
            notes=[f"{len(rows):,} hidden states of {facts['dataset_path']}", *looked.notes],
            live=live_facts(prompt, usual, config.prompt),
            **looked.labels,
        )
    server.publish(page, {"prompt": prompt_call(prompt)})
    return facts


def places(model: Autoencoder, hook: str) -> tuple[str | None, str]:
    """Where a model reads, None for the place itself, and the module whose output it stands for.

    Raises:
        ConfigError: a transcoder that does not say where its target is.
    """
    if not model.is_transcoder:
        return None, hook
    hooks = model.config.metadata.get("transcoder_hooks")
    if not isinstance(hooks, (list, tuple)) or len(hooks) != 2:
        raise runs.ConfigError(
            "folder", "must hold metadata transcoder_hooks, the two modules of a transcoder"
        )
    return hook, str(hooks[1])


@torch.no_grad()
def usual_values(model: Autoencoder, rows: Tensor, counts: Tensor) -> Tensor:
    """The mean of each feature where it is on, float64 ``[F]``; 1 where it never is, and for bits.

    Args:
        rows: raw hidden states.
        counts: int64 ``[F]``, of how many of them each feature is on.
    """
    total = torch.zeros(model.d_sae, dtype=torch.float64)
    for block in model.blocks(rows):
        total += model.activations(block).sum(0, dtype=torch.float64).cpu()
    counts = counts.cpu()
    return torch.where(counts > 0, total / counts.clamp_min(1), 1.0)
