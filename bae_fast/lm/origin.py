"""Whose hidden states an autoencoder was trained on, compared where it meets a language model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bae_fast.lm.hooks import resolve_hook


def same_model(trained_on: str, given: str) -> bool:
    """Whether two names may mean one language model: equal, or the same last part of a path.

    A folder may have been moved, and a Hugging Face id may be a folder here.
    """
    return trained_on == given or Path(trained_on).name == Path(given).name


def check_model(metadata: dict[str, Any], model_name: str, argument: str = "model") -> None:
    """Refuse a language model that is not the one an autoencoder's metadata names.

    Metadata that names none says nothing.

    Raises:
        ValueError: naming both models.
    """
    trained_on = metadata.get("model_name")
    if isinstance(trained_on, str) and not same_model(trained_on, model_name):
        raise ValueError(
            f"{argument} must be {trained_on!r}, whose hidden states the autoencoder was trained "
            f"on; got {model_name!r}"
        )


# a commit of the hub; other revisions (a file's time, a package's version) differ without a change
_COMMIT = re.compile(r"[0-9a-f]{40}")


def check_origin(metadata: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Refuse hidden states of another model or module than an autoencoder was trained on.

    Metadata that does not say where it comes from says nothing. A warning says where both are of
    one model of the hub and its commits differ.

    Args:
        metadata: the metadata of the autoencoder's configuration.
        facts: where the states come from: ``model_name``, ``hook_name`` and ``model_revision``.

    Raises:
        ValueError: naming both models, or both modules.
    """
    check_model(dict(metadata), str(facts["model_name"]), "--model")
    hooks = metadata.get("transcoder_hooks")
    hook = hooks[0] if isinstance(hooks, (list, tuple)) and hooks else metadata.get("hook_name")
    given = facts.get("hook_name")
    # a name of TransformerLens is understood only with the model at hand
    known = isinstance(hook, str) and ".hook_" not in hook
    if known and given is not None and hook != given:
        raise ValueError(
            f"--hook must be {hook!r}, whose output the autoencoder was trained on; got {given!r}"
        )
    before, now = (str(one.get("model_revision") or "") for one in (metadata, facts))
    if before != now and _COMMIT.fullmatch(before) and _COMMIT.fullmatch(now):
        warnings.warn(
            f"the autoencoder was trained on revision {before} of {facts['model_name']!r}, and "
            f"these hidden states are of {now}; --revision names one",
            UserWarning,
            stacklevel=2,
        )


def mismatch(
    metadata: dict[str, Any], *, model_name: str | None, model: nn.Module, path: str
) -> str | None:
    """What of the place an autoencoder is put differs from where it was trained; None: nothing.

    Args:
        metadata: its configuration's: ``model_name`` and ``hook_name`` or ``transcoder_hooks``.
        model_name: the name of the language model, None where it is not known.
        model, path: the place, by its resolved path.
    """
    trained_on = metadata.get("model_name")
    if isinstance(trained_on, str) and model_name and not same_model(trained_on, model_name):
        return f"it was trained on {trained_on!r} and the model is {model_name!r}"
    hooks = metadata.get("transcoder_hooks")
    hook = hooks[-1] if isinstance(hooks, (list, tuple)) and hooks else metadata.get("hook_name")
    if not isinstance(hook, str):
        return None
    try:
        hook = resolve_hook(model, hook)
    except ValueError:  # a name of another model's module
        return f"it was trained on {hook!r}, which this model does not have"
    return None if hook == path else f"it was trained on {hook!r} and the path is {path!r}"
