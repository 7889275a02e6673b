"""The two files of a saved model, ``cfg.json`` and ``sae_weights.safetensors``.

Each file appears whole or not at all, and the weights carry the configuration they were saved
with: a process killed between the two leaves a loadable model.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bae_fast import hub
from bae_fast.files import read_json, read_safetensors, write_json, write_safetensors
from bae_fast.units import empty_metric, inverse_units

CONFIG_NAME = "cfg.json"
WEIGHTS_NAME = "sae_weights.safetensors"


def find_pretrained(
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """The folder on disk of a model's two files, fetched from the Hub where it is a repository's.

    Raises:
        FileNotFoundError: no such repository, or the Hub cannot be reached.
        ValueError: revision is given for a folder on disk.
    """
    if isinstance(folder, str) and hub.is_repo_id(folder):
        return hub.download(
            folder,
            (CONFIG_NAME, WEIGHTS_NAME),
            revision=revision,
            subfolder=subfolder,
            token=token,
        )
    if revision is not None:
        raise ValueError(f"revision must be None for a folder on disk; got {revision!r}")
    return folder_path(folder) / (subfolder or "")


def folder_path(folder: str | os.PathLike[str]) -> Path:
    """A folder as it is given; a leading ``~`` is the user's home.

    Raises:
        TypeError: no path.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"folder must be a path; got {folder!r}")
    return Path(folder).expanduser()


def write_pretrained(
    folder: str | os.PathLike[str], module: nn.Module, values: dict[str, Any]
) -> Path:
    """Write a module's tensors and its configuration (JSON values) into a folder."""
    tensors = {name: _whole(tensor).cpu().contiguous() for name, tensor in _as_used(module).items()}
    content = json.dumps(values, sort_keys=True, allow_nan=False)
    save_id = hashlib.sha256(content.encode() + os.urandom(16)).hexdigest()[:16]
    values = {**values, "save_id": save_id}
    folder = folder_path(folder)
    write_safetensors(folder / WEIGHTS_NAME, tensors, {"config": json.dumps(values)}, sums=True)
    write_json(folder / CONFIG_NAME, values)
    return folder


def publish_(folder: str | os.PathLike[str]) -> None:
    """Cut local paths in the metadata of a saved model's two files, which others will read.

    Files without any stay as they are, byte for byte. Tensors and the id of the save stay, so that
    codes made with the model still belong to it.
    """
    config, weights = Path(folder) / CONFIG_NAME, Path(folder) / WEIGHTS_NAME
    values = read_json(config)
    if values != (public := _public(values)):
        write_json(config, public)
    tensors, header = read_safetensors(weights)
    try:
        kept = json.loads(header.get("config", "null"))
    except ValueError:  # of another program
        return
    if kept != (public := _public(kept)):
        header = {**header, "config": json.dumps(public)}
        write_safetensors(weights, tensors, header, sums=True)


def _public(values: Any) -> Any:
    """A configuration with metadata that others may read."""
    metadata = values.get("metadata") if isinstance(values, dict) else None
    if not isinstance(metadata, dict):
        return values
    return {**values, "metadata": hub.public_metadata(metadata)}


def _as_used(module: nn.Module) -> dict[str, Tensor]:
    """A module's state, where parametrized and pruned tensors stand by their names, as they are
    used: a file says nothing of how they are made."""
    state = module.state_dict()
    found = {}
    for name, tensor in state.items():
        stem = name.removesuffix("_orig").removesuffix("_mask")
        if name.startswith("parametrizations."):
            stem = name.split(".")[1]
        elif f"{stem}_orig" not in state:
            stem = name
        found[stem] = tensor if stem == name else getattr(module, stem)
    return found


def _whole(tensor: Any) -> Tensor:
    """A tensor of a state dict; one that FSDP divided is gathered, by all processes together."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach()


def find_weights(folder: str | os.PathLike[str]) -> Path:
    """The file of the weights in a model's folder.

    Raises:
        FileNotFoundError: no such folder or file.
    """
    folder = folder_path(folder)
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"folder {folder} {kind}")
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        inside = sorted(folder.glob(f"*/{WEIGHTS_NAME}"))  # of a run, whose models have folders
        hint = f"; {inside[0].parent} holds a model" if inside else ""
        raise FileNotFoundError(f"{weights} does not exist{hint}")
    return weights


def read_pretrained(
    folder: str | os.PathLike[str],
) -> tuple[dict[str, Any], Path, dict[str, Tensor]]:
    """Read both files: (configuration, the file it came from, tensors).

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: a corrupt file.
    """
    weights = find_weights(folder)
    folder = weights.parent
    source = folder / CONFIG_NAME
    # a first save cut off between the two files leaves the weights, which carry the same
    values = read_json(source) if source.is_file() else None
    tensors, header = read_safetensors(weights)
    try:
        saved_with = json.loads(header.get("config", "null"))
    except ValueError as error:
        raise ValueError(f"{weights} holds an invalid configuration: {error}") from error
    if isinstance(saved_with, dict) and (
        values is None or saved_with.get("save_id") != values.get("save_id")
    ):
        # a save was cut off between the two files: the weights' own configuration is theirs
        values, source = saved_with, weights
    if values is None:
        raise FileNotFoundError(f"{source} does not exist")
    return values, source, tensors


def check_weights(name: str, tensor: Tensor, source: str) -> None:
    """Refuse what no training leaves: a feature whose weights are NaN is off, and nobody is told.

    Raises:
        ValueError: NaN, or a scale or metric that is not positive and finite.
    """
    bad = int(tensor.isnan().sum())
    if bad:
        raise ValueError(f"{source}: {name} must hold no NaN; got {bad:,} of {tensor.numel():,}")
    divides = name in ("x_scale", "y_scale", "x_metric", "y_metric")
    if divides and tensor.dim() == 2:
        inverse_units(tensor, f"{source}: {name}")
    elif divides and not bool((tensor.isfinite() & (tensor > 0)).all()):
        raise ValueError(f"{source}: {name} must be positive and finite; got {tensor.min():g}")


def load_tensors_(
    module: nn.Module, tensors: dict[str, Tensor], folder: str | os.PathLike[str]
) -> None:
    """Give a module made on the meta device the tensors read from a folder.

    Raises:
        ValueError: other names, shapes or kinds than the module's, parameters of two dtypes, NaN,
            or a scale that rows cannot be divided by.
    """
    source = Path(folder) / WEIGHTS_NAME
    for side in "xy":
        # a buffer that only files of a module with a metric hold
        mean = getattr(module, f"{side}_mean", None)
        name = f"{side}_metric"
        if name in tensors and isinstance(mean, Tensor):
            setattr(module, name, empty_metric(mean, tensors[name]))
    expected = module.state_dict()
    if tensors.keys() != expected.keys():
        raise ValueError(f"{source} must hold {sorted(expected)}; got {sorted(tensors)}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or not tensor.dtype.is_floating_point:
            raise ValueError(
                f"{source}: {name} must be floating point {list(expected[name].shape)}; "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        check_weights(name, tensor, str(source))
    dtypes = {str(tensors[name].dtype) for name, _ in module.named_parameters()}
    if len(dtypes) > 1:
        raise ValueError(
            f"{source}: parameters must have one dtype; got {', '.join(sorted(dtypes))}"
        )
    learned = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    module.load_state_dict(tensors, assign=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(learned[name])
