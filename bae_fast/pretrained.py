"""The two files of a saved model: ``cfg.json`` and ``sae_weights.safetensors``.

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

from bae_fast.files import read_json, read_safetensors, write_json, write_safetensors

CONFIG_NAME = "cfg.json"
WEIGHTS_NAME = "sae_weights.safetensors"


def write_pretrained(
    folder: str | os.PathLike[str], module: nn.Module, values: dict[str, Any]
) -> Path:
    """Write a module's tensors and its configuration (JSON values) into a folder."""
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()
    }
    content = json.dumps(values, sort_keys=True, allow_nan=False)
    save_id = hashlib.sha256(content.encode() + os.urandom(16)).hexdigest()[:16]
    values = {**values, "save_id": save_id}
    folder = Path(folder)
    write_safetensors(folder / WEIGHTS_NAME, tensors, {"config": json.dumps(values)})
    write_json(folder / CONFIG_NAME, values)
    return folder


def read_pretrained(
    folder: str | os.PathLike[str],
) -> tuple[dict[str, Any], Path, dict[str, Tensor]]:
    """Read both files: (configuration, the file it came from, tensors).

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: a corrupt file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist")
    source = folder / CONFIG_NAME
    # a first save cut off between the two files leaves the weights, which carry the same
    values = read_json(source) if source.is_file() else None
    tensors, header = read_safetensors(folder / WEIGHTS_NAME)
    try:
        saved_with = json.loads(header.get("config", "null"))
    except ValueError as error:
        raise ValueError(
            f"{folder / WEIGHTS_NAME} holds an invalid configuration: {error}"
        ) from error
    if isinstance(saved_with, dict) and (
        values is None or saved_with.get("save_id") != values.get("save_id")
    ):
        # a save was cut off between the two files: the weights' own configuration is theirs
        values, source = saved_with, folder / WEIGHTS_NAME
    if values is None:
        raise FileNotFoundError(f"{source} does not exist")
    return values, source, tensors


def load_tensors_(
    module: nn.Module, tensors: dict[str, Tensor], folder: str | os.PathLike[str]
) -> None:
    """Give a module made on the meta device the tensors read from a folder.

    Raises:
        ValueError: other names, shapes or kinds than the module's, or parameters of two dtypes.
    """
    source = Path(folder) / WEIGHTS_NAME
    expected = module.state_dict()
    if tensors.keys() != expected.keys():
        raise ValueError(f"{source} must hold {sorted(expected)}; got {sorted(tensors)}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or not tensor.dtype.is_floating_point:
            raise ValueError(
                f"{source}: {name} must be floating point {list(expected[name].shape)}; "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
    dtypes = {str(tensors[name].dtype) for name, _ in module.named_parameters()}
    if len(dtypes) > 1:
        raise ValueError(
            f"{source}: parameters must have one dtype; got {', '.join(sorted(dtypes))}"
        )
    learned = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    module.load_state_dict(tensors, assign=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(learned[name])
