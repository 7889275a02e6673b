"""Hidden states of several modules in shards on disk, by one process or by many."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from bae_fast.experiments import runs
from bae_fast.experiments.data import DEFAULT_HOOK
from bae_fast.experiments.reading import (
    Reading,
    check_reading,
    load_reader,
    open_documents,
    open_text,
)
from bae_fast.files import check_writable
from bae_fast.progress import Stages


@dataclasses.dataclass(frozen=True)
class Config(Reading):
    """Keep hidden states of several modules of a language model in shards on disk.

    The same command goes on where it was stopped. Several processes of the same command, started
    by torchrun or side by side, share the work.

    Attributes:
        out: The folder of the cache that is written.
        hooks: The paths of the modules whose outputs are kept, all of one pass.
        batch_size: The number of windows in a forward pass.
        shard_windows: The number of windows in a shard. Without it a shard has 65,536 tokens.
    """

    out: Path = Path("cache")
    hooks: tuple[str, ...] = (DEFAULT_HOOK,)
    batch_size: int = 8
    shard_windows: int | None = None


def run(config: Config) -> runs.Result:
    """Harvest, or open what is there.

    Under torchrun the environment's RANK and WORLD_SIZE say which shards a process begins with;
    no process group is needed, as processes meet at the files.

    Raises:
        ValueError, OSError: naming the field or the file.
    """
    from bae_fast import lm as lm_tools
    from bae_fast.lm.shard_harvest import OtherHarvestError

    start = time.perf_counter()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    runs.check_at_least(config, 1, "batch_size")
    if config.shard_windows is not None:
        runs.check_at_least(config, 1, "shard_windows")
    check_reading(config)
    if not config.hooks:
        raise runs.ConfigError("hooks", "must name at least one module; got none")
    check_writable(config.out)
    documents = open_documents(config)
    stages = Stages(config.progress)
    lm = load_reader(config, stages)
    text = open_text(config, lm, documents)
    try:
        with stages.stage("harvest hidden states"):
            cache = lm_tools.harvest_shards(
                lm,
                text,
                config.hooks,
                config.out,
                shard_windows=config.shard_windows,
                batch_size=config.batch_size,
                drop_positions=config.drop_positions,
                max_norm_ratio=config.max_norm_ratio,
                rank=rank,
                world=world,
                progress=config.progress and rank == 0,
            )
    except OtherHarvestError as error:
        raise runs.ConfigError(
            "out",
            f"{error.folder} holds a harvest of other settings, take another folder: "
            f"{error.difference}",
        ) from error
    values: dict[str, Any] = {
        "folder": str(config.out),
        "hooks": cache.widths,
        "rows": cache.n_rows,
        "windows": cache.n_windows,
        "shards": len(cache.shards),
        "dropped": cache.manifest["dropped"],
        "seconds": round(time.perf_counter() - start, 1),
    }
    hooks = ", ".join(f"{hook} ({d})" for hook, d in cache.widths.items())
    lines = [
        f"{cache.n_rows:,} rows of {hooks}, {cache.manifest['dtype']}, "
        f"in {len(cache.shards):,} shards",
        "dropped: " + ", ".join(f"{n:,} {why}" for why, n in values["dropped"].items()),
    ]
    return runs.Result(values, "\n".join(lines), (config.out / "manifest.json",))
