"""The rows that ``train`` learns from: of a file, of a cache in shards, or of a running model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bae_fast.distributed import Mesh
from bae_fast.experiments import runs
from bae_fast.experiments.data import (
    DEFAULT_HOOK,
    HELDOUT_WINDOWS,
    N_HELDOUT,
    TEXT_FACTS,
    own_rows,
)
from bae_fast.experiments.reading import Reading, check_reading, load_reader, open_documents
from bae_fast.experiments.reading import open_text as open_text_of
from bae_fast.progress import Stages
from bae_fast.training import LiveSupply, MemorySupply, ShardSupply, Supply

# the hook of a file's rows
FILE_HOOK = "rows"

# options of which exactly one says where rows come from, see RowsFrom
SOURCES = ("states", "cache", "live")


@dataclasses.dataclass(frozen=True)
class RowsFrom(Reading):
    """Where rows for training come from: exactly one of ``states``, ``cache`` and ``live``.

    Attributes:
        states: A file of hidden states, [n, d], .npy or .safetensors. The last 4,096 rows, or a
            tenth if there are fewer than 40,960, are held out.
        cache: The folder of a cache that bae-fast harvest wrote, which may be larger than memory.
            About 4,096 rows at its end are held out.
        live: The language model runs over the text while the autoencoders learn, and no row is
            written. About 4,096 tokens at the beginning of the text are held out.
        hook: The module whose rows are learned. Without it that is the only one of a cache, and
            for a running model that after block 12, model.layers.11.
        buffer_rows: The number of rows that batches of a cache or of a running model are drawn
            from, over all processes. Without it that is 1,048,576 for a cache and 65,536 for a
            model.
        windows: The number of windows in a forward pass of a running model.
    """

    states: Path | None = None
    cache: Path | None = None
    live: bool = False
    hook: str | None = None
    buffer_rows: int | None = None
    windows: int = 8


class Source(NamedTuple):
    """Rows for some hooks.

    Attributes:
        supply: gives the rows.
        hooks: the hook as it was asked for (None: the default) -> its name in the supply.
        metadata: where the rows come from, for ``cfg.json``, without the hook.
    """

    supply: Supply
    hooks: dict[str | None, str]
    metadata: dict[str, Any]

    def metadata_of(self, hook: str | None) -> dict[str, Any]:
        """What ``cfg.json`` keeps of the rows of one hook."""
        name = self.hooks[hook]
        return self.metadata if name == FILE_HOOK else {**self.metadata, "hook_name": name}


@contextlib.contextmanager
def rows_for(
    config: RowsFrom,
    asked: Iterable[str | None],
    mesh: Mesh | None = None,
    *,
    order: dict[str, Any],
) -> Iterator[Source]:
    """Open the rows of a configuration, this process's share of them, and close them at the end.

    Args:
        config: says where the rows come from.
        asked: the hooks of the jobs.
        mesh: the processes; None for this one alone.
        order: ``seed`` and ``streams`` of the order of the rows.

    Raises:
        ConfigError: not exactly one source, rows that cannot be read, or a hook that is not there.
        ValueError, OSError: naming the file.
    """
    given = [name for name in SOURCES if getattr(config, name)]
    if len(given) != 1:
        shown = " and ".join(given) or "none"
        raise runs.ConfigError("states", f"or cache or live must be given, one alone; got {shown}")
    rank, world = (0, 1) if mesh is None else (mesh.data_rank, mesh.data)
    share = {**order, "rank": rank, "world": world}
    if config.buffer_rows is not None:
        runs.check_at_least(config, order["streams"], "buffer_rows")
    hooks = list(dict.fromkeys(asked))
    make = {"states": _from_file, "cache": _from_shards, "live": _from_model}[given[0]]
    source = make(config, hooks, share)
    with contextlib.closing(source.supply):
        yield source


def _buffer(config: RowsFrom) -> dict[str, Any]:
    return {} if config.buffer_rows is None else {"buffer_rows": config.buffer_rows}


def _from_file(config: RowsFrom, asked: list[str | None], share: dict[str, Any]) -> Source:
    assert config.states is not None
    named = [hook for hook in asked if hook not in (None, FILE_HOOK)]
    if named:
        raise runs.ConfigError("hook", f"must be left out for a file of rows; got {named[0]!r}")
    rows = own_rows(config.states)
    supply = MemorySupply(rows.train_rows, heldout=rows.heldout_rows, **share)
    return Source(supply, dict.fromkeys(asked, FILE_HOOK), {"rows": config.states.name})


def _from_shards(config: RowsFrom, asked: list[str | None], share: dict[str, Any]) -> Source:
    assert config.cache is not None
    supply = ShardSupply(config.cache, **_buffer(config), **share)
    there = list(supply.widths)
    hooks = {}
    for hook in asked:
        if hook is None and len(there) > 1:
            raise runs.ConfigError("hook", f"must be one of {', '.join(there)}; got none")
        if hook is not None and hook not in there:
            raise runs.ConfigError("hook", f"must be one of {', '.join(there)}; got {hook!r}")
        hooks[hook] = there[0] if hook is None else hook
    manifest = supply.cache.manifest
    metadata = {name: manifest[name] for name in ("model_name", "context_size")}
    # a cache of an earlier version does not say which text it is of
    return Source(supply, hooks, metadata | _about_text(manifest.get("text_source")))


def _about_text(source: Any) -> dict[str, Any]:
    """What a model's metadata keep of :meth:`bae_fast.lm.TextWindows.source`."""
    found = source if isinstance(source, dict) else {}
    return {name: found[name] for name in TEXT_FACTS if name in found}


def _from_model(config: RowsFrom, asked: list[str | None], share: dict[str, Any]) -> Source:
    from bae_fast.lm import resolve_hook

    runs.check_at_least(config, 1, "windows")
    check_reading(config)
    documents = open_documents(config)
    lm = load_reader(config, Stages(config.progress))
    text = open_text_of(config, lm, documents)
    hooks: dict[str | None, str] = {}
    for hook in asked:
        try:
            hooks[hook] = resolve_hook(lm.model, DEFAULT_HOOK if hook is None else hook)
        except ValueError as error:
            raise runs.ConfigError("hook", str(error).removeprefix("hook ")) from error
    supply = LiveSupply(
        lm,
        text,
        list(dict.fromkeys(hooks.values())),
        batch_size=config.windows,
        n_heldout=-(-N_HELDOUT // config.context),
        drop_positions=config.drop_positions,
        max_norm_ratio=config.max_norm_ratio,
        **_buffer(config),
        **share,
    )
    metadata = {
        "model_name": lm.name,
        "context_size": config.context,
        **_about_text(text.source()),
        HELDOUT_WINDOWS: supply.n_heldout,
    }
    return Source(supply, hooks, metadata)
