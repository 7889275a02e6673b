"""An autoencoder's features as files that Neuronpedia imports."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from bae_fast.experiments import runs
from bae_fast.experiments.data import Source, check_width, harvest_rows, model_name
from bae_fast.experiments.saved import open_model
from bae_fast.lm.origin import check_origin
from bae_fast.progress import Stages


@dataclasses.dataclass(frozen=True)
class Config(Source):
    """Write an autoencoder's features in the format that Neuronpedia imports.

    Attributes:
        load: The folder of the saved model, or user/name of its repository on the Hub.
        hook: The path of the module whose output the model reads. Without it that is the module
            the model was trained on.
        context: The number of tokens in a window of text. Without it that is the training's.
        text: Text files, files of JSON lines, and folders of them, which the model reads. Without
            them that is the training's text, where the saved model names it, and else the topics
            of Python's standard library.
        release: The id of the release.
        title: One line about the release. Without it that is the id.
        source_set: The id of the set of sources, such as res-bae-2k.
        creator: The publisher's name.
        creator_id: The id of the publisher's account on Neuronpedia.
        url: The address of a paper or of code.
        layer: The number of the block, from 0. Without it that is the last number in the hook.
        examples: The number of windows of text that are shown for a feature.
        logits: The tokens that a feature raises and lowers are written too; the language model is
            loaded for its unembedding.
        out: The folder of the files.
    """

    load: Path | None = None
    hook: str | None = None
    context: int | None = None
    release: str = ""
    title: str = ""
    source_set: str = ""
    creator: str = ""
    creator_id: str = ""
    url: str | None = None
    layer: int | None = None
    examples: int = 20
    logits: bool = True
    out: Path = Path("results/neuronpedia")


def run(config: Config) -> runs.Result:
    """Harvest hidden states, read the features, write the files.

    Raises:
        ValueError, ImportError, OSError: naming the field, the package or the file.
    """
    from bae_fast.interpret.neuronpedia import Release, write_neuronpedia_export

    if config.load is None:
        raise runs.ConfigError("load", "must name a saved model; got none")
    needed = ("release", "source_set", "creator", "creator_id")
    missing = [name for name in needed if not getattr(config, name)]
    if missing:
        others = ", ".join(f"--{name.replace('_', '-')}" for name in missing[1:])
        raise runs.ConfigError(
            missing[0], "must be given; got none" + (f", and none of {others}" if others else "")
        )
    runs.check_at_least(config, 1, "examples")
    try:
        release = Release(
            name=config.release,
            title=config.title or config.release,
            source_set=config.source_set,
            creator=config.creator,
            creator_id=config.creator_id,
            urls=() if config.url is None else (config.url,),
        )
    except ValueError as error:
        field, _, text = str(error).partition(" ")
        raise runs.ConfigError("release" if field == "name" else field, text) from error
    # a Path is a folder; a text may name a repository too
    model, data = open_model(config, str(config.load))
    if model.is_transcoder:
        raise runs.ConfigError("load", "must be an autoencoder of the hook; it is a transcoder")
    numbers = re.findall(r"\d+", data.hook)
    if config.layer is None and not numbers:
        raise runs.ConfigError("layer", f"must be given, as hook {data.hook!r} holds no number")
    layer = int(numbers[-1]) if config.layer is None else config.layer
    stages = Stages(config.progress)
    cache, tokenizer, facts = harvest_rows(data, stages, 1)
    check_origin(model.config.metadata, facts)
    check_width("load", config.load, model.d_in, cache.rows)
    unembedding = None
    if config.logits:
        from bae_fast.lm import load_language_model

        with stages.stage("load the unembedding"):
            lm = load_language_model(model_name(data.model), revision=data.revision)
            unembedding = lm.model.get_output_embeddings().weight.detach()
    with stages.stage("write"):
        folder = write_neuronpedia_export(
            config.out,
            model,
            cache,
            tokenizer,
            release,
            layer=layer,
            unembedding=unembedding,
            examples=config.examples,
            progress=config.progress,
        )
    names = sorted(path for path in folder.rglob("*.jsonl*") if path.is_file())
    values: dict[str, Any] = {
        "environment": runs.environment(),
        "data": {name: facts[name] for name in ("model_label", "hook_name", "dataset_path")},
        "source": folder.name,
        "features": model.d_sae,
        "files": [str(path.relative_to(config.out)) for path in names],
    }
    text = f"{model.d_sae:,} features of {values['data']['model_label']} as source {folder.name}"
    return runs.Result(values, text, (folder,))
