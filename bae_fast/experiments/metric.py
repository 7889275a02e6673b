"""The metric of the error that a configuration asks for, made from training rows."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bae_fast.analysis.error_metric import metric_scales, parse_metric
from bae_fast.experiments.data import load_model
from bae_fast.experiments.runs import ConfigError, digest
from bae_fast.files import read_safetensors, write_safetensors
from bae_fast.progress import Stages, say
from bae_fast.spacing import even_numbers

if TYPE_CHECKING:
    from bae_fast.lm import ActivationCache

# held-in text that gradients are taken on, in whole windows evenly over it: tokens at least, and
# for each dimension of a matrix
_TOKENS, _TOKENS_A_DIMENSION = 8192, 32


def check_metric(config: Any) -> str:
    """The kind of a configuration's metric.

    Raises:
        ConfigError: there is no such metric.
    """
    try:
        return parse_metric(config.metric)[0]
    except ValueError as error:
        raise ConfigError("metric", str(error).removeprefix("metric ")) from error


def error_metric(
    config: Any, rows: Tensor, stages: Stages, cache: ActivationCache | None, last_row: int
) -> Tensor | None:
    """The scale of each dimension, ``[d]``, or a matrix; None for a configuration without a metric.

    Args:
        config: has ``metric``, and for gradients the fields of a language model.
        rows: those that are trained on.
        cache: the harvest that they are of, for gradients.
        last_row: number in the cache of the last row that is trained on.

    Raises:
        ConfigError: another metric, or gradients without a language model.
    """
    kind = check_metric(config)
    if kind not in ("sensitivity", "fisher"):
        return metric_scales(config.metric, rows)
    if cache is None:
        raise ConfigError(
            "metric",
            f"{kind} must have the rows of a harvest of this command; got those of a file, of "
            "shards or of a running model",
        )
    made = _gradients(kind, config, stages, cache, last_row)
    return metric_scales(config.metric, rows, **{kind: made})


def _gradients(
    kind: str, config: Any, stages: Stages, cache: ActivationCache, last_row: int
) -> Tensor:
    """Moments of gradients at the hook, of the harvest's folder if they were made before: to make
    them takes minutes."""
    from bae_fast.lm.cache import tokens_digest
    from bae_fast.lm.gradients import fisher, sensitivity

    tokens = cache.tokens[: int(cache.row_window[last_row]) + 1].long()
    wanted = max(_TOKENS, _TOKENS_A_DIMENSION * cache.d_in if kind == "fisher" else 0)
    n = min(max(wanted // tokens.shape[1], 1), len(tokens))
    windows = tokens[even_numbers(len(tokens), n)]
    # the folder stands for the language model
    name = digest({"hook": config.hook, "windows": tokens_digest(windows), "version": 1})
    path = cache.folder / f"{kind}-{name}.safetensors"
    with contextlib.suppress(OSError, ValueError, KeyError):  # none, or a damaged one
        kept = read_safetensors(path)[0][kind]
        say(f"   gradients of the language model at the hook: those of {path}")
        return kept
    lm = load_model(config, stages)
    with stages.stage("gradients of the language model at the hook"):
        made = (fisher if kind == "fisher" else sensitivity)(
            lm, windows, config.hook, progress=config.progress
        )
    with contextlib.suppress(OSError):  # a folder that others share may not be written to
        write_safetensors(path, {kind: made}, {}, sums=True)
    return made
