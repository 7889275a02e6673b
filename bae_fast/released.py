"""Checkpoints of the program released with arXiv 2509.20997, read safely.

A checkpoint is a folder with ``model.pt`` (state dict: ``encoder.weight`` [F, d],
``encoder.bias``, ``decoder.weight`` [d, F], ``decoder.bias``) and ``config.pkl`` (a pickled
mapping or namespace). Tensors are read with ``weights_only=True``; the pickle goes through an
unpickler that knows plain values and nothing that can run.
"""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bae_fast.files import first_line, read_torch
from bae_fast.model import BinaryAutoencoder

# binarization_type of the released program -> surrogate; both are [pre > 0] in forward
SURROGATE_OF = {"sign": "identity", "sign_s": "official"}

_LINEAR_OUTPUTS = (None, "", "none", "None", "identity", "linear")


class _PlainUnpickler(pickle.Unpickler):
    """Containers, numbers, strings and argparse namespaces; anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("argparse", "Namespace"):
            return argparse.Namespace
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _config(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            config = _PlainUnpickler(file).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(
            f"{path} is not a plain pickled configuration: {first_line(error)}"
        ) from error
    if isinstance(config, argparse.Namespace):
        config = vars(config)
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a dict or a namespace; got {type(config).__name__}")
    return config


def _weights(path: Path) -> dict[str, Tensor]:
    state = read_torch(path, "state dict")
    names = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}
    if not isinstance(state, dict) or not names <= state.keys():
        found = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path} must hold {sorted(names)}; got {found}")
    weights = {name: state[name] for name in names}
    kinds = {w.dtype if isinstance(w, Tensor) else type(w) for w in weights.values()}
    kind = next(iter(kinds))
    if len(kinds) > 1 or not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise ValueError(f"{path} must hold tensors of one floating dtype; got {kinds}")
    return weights


def load_released(folder: str | os.PathLike[str], *, impl: str = "auto") -> BinaryAutoencoder:
    """Load a checkpoint of the released program, in eval mode.

    Raises:
        FileNotFoundError: ``model.pt`` or ``config.pkl`` is missing.
        ValueError: a file that is not what it should be, weights that do not fit together, or a
            model that is not [pre > 0] with a linear decoder (``squarewave``, an output
            activation).
    """
    folder = Path(folder)
    for name in ("model.pt", "config.pkl"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist")
    config = _config(folder / "config.pkl")
    kind = config.get("binarization_type", "sign_s")
    if not isinstance(kind, str) or kind not in SURROGATE_OF:
        raise ValueError(
            f"binarization_type must be one of {', '.join(SURROGATE_OF)} to be loaded; got {kind!r}"
        )
    activation = config.get("output_activation")
    if not (activation is None or isinstance(activation, str)) or (
        activation not in _LINEAR_OUTPUTS
    ):
        raise ValueError(f"output_activation must be none to be loaded; got {activation!r}")
    state = _weights(folder / "model.pt")
    encoder, decoder = state["encoder.weight"], state["decoder.weight"]
    if encoder.dim() != 2 or decoder.shape != encoder.T.shape:
        raise ValueError(
            "encoder.weight must be [F, d] and decoder.weight [d, F]; "
            f"got {list(encoder.shape)} and {list(decoder.shape)}"
        )
    d_sae, d_in = encoder.shape
    if state["encoder.bias"].shape != (d_sae,) or state["decoder.bias"].shape != (d_in,):
        raise ValueError(f"encoder.bias must be [{d_sae}] and decoder.bias [{d_in}]")
    bae = BinaryAutoencoder(
        d_in,
        d_sae,
        preset="paper",
        surrogate=SURROGATE_OF[kind],
        impl=impl,
        dtype=encoder.dtype,
        metadata={"released_config": {str(k): str(v) for k, v in config.items()}},
    )
    with torch.no_grad():
        bae.W_enc.copy_(encoder.T)
        bae.b_enc.copy_(state["encoder.bias"])
        bae.W_dec.copy_(decoder.T)
        bae.b_dec.copy_(state["decoder.bias"])
    bae.learned = True
    return bae.eval()
