"""Saved models and the hidden states that they read: of the training, but for what is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bae_fast.autoencoder import Autoencoder
from bae_fast.baselines import load_autoencoder
from bae_fast.experiments import runs
from bae_fast.experiments.data import (
    HELDOUT_WINDOWS,
    Data,
    Source,
    TrainedOn,
    block_width,
    check_width,
    model_name,
    pick_device,
)
from bae_fast.experiments.features_page import Looked, look_at, read_names
from bae_fast.lm.origin import check_model, check_origin
from bae_fast.progress import say

if TYPE_CHECKING:
    from torch import Tensor

    from bae_fast.lm import ActivationCache


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
        ValueError: the model's metadata say where it was trained by values of another type.
    """
    model = load_autoencoder(folder, device=pick_device(config))
    metadata = model.config.metadata
    check_facts(metadata, folder)
    hooks = metadata.get("transcoder_hooks") or [metadata.get("hook_name")]
    if config.hook is not None and hooks[0] is not None and config.hook != hooks[0]:
        raise runs.ConfigError(
            "hook",
            f"must be {hooks[0]}, on which the model in {folder} was trained; got {config.hook!r}",
        )
    if config.model is not None:
        check_model(metadata, config.model, "--model")
    elif metadata.get("model_name") is None and metadata.get("rows") is not None:
        raise runs.ConfigError(
            "model",
            f"and --hook must name whose hidden states it reads: the model in {folder} was trained "
            f"on the file {metadata['rows']}",
        )
    data = data_of(
        config,
        model=metadata.get("model_name") if config.model is None else config.model,
        hook=hooks[0] if config.hook is None else config.hook,
        context=metadata.get("context_size") if config.context is None else config.context,
    )
    width = block_width(data)
    if width is not None and width != model.d_in:
        raise runs.ConfigError(
            "model",
            f"must be one whose states the model in {folder} reads, of width {model.d_in}; those "
            f"of {model_name(data.model)} are {width} wide",
        )
    return model, text_of(config, data, metadata) if with_text else data


# what is read of a model's metadata, which may be a stranger's: its type, and in words
_FACTS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("model_name", "hook_name", "text_field", "text_sha256"), (str, "a text")),
    **dict.fromkeys(("context_size", "tokens"), (int, "a whole number")),
    **dict.fromkeys(("prepend_bos", "text_packed"), (bool, "true or false")),
    **dict.fromkeys(("text_files", "transcoder_hooks"), (list, "a list of texts")),
}


def check_facts(metadata: Mapping[str, Any], folder: Path | str) -> None:
    """Refuse metadata that say where a model was trained by values of another type.

    Raises:
        ValueError: naming the folder, the entry and its value.
    """
    for name, (kind, words) in _FACTS.items():
        value = metadata.get(name)
        fits = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
        if isinstance(value, list):
            fits = fits and all(isinstance(one, str) for one in value)
        if value is not None and not fits:
            raise ValueError(f"{folder}: {name} in the metadata must be {words}; got {value!r}")


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


def data_of(config: Any, **given: Any) -> Data:
    """The configuration's data, with what is given in place of None."""
    names = [field.name for field in dataclasses.fields(Data)]
    values = {name: getattr(config, name) for name in names}
    values |= {name: value for name, value in given.items() if value is not None}
    return Data(**{name: value for name, value in values.items() if value is not None})


# -- a second model ----------------------------------------------------------------------------


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
