"""Folders of two other libraries, read and written: dictionary_learning's and sparsify's.

dictionary_learning keeps ``ae.pt`` (a state dict) and ``config.json`` (``trainer`` with
``dict_class``, ``activation_dim``, ``dict_size``); sparsify keeps ``cfg.json`` (``k``, ``d_in``,
``num_latents``) and ``sae.safetensors``. Neither normalises rows and neither has bits, so a Binary
Autoencoder is refused, and what was normalised here is written for raw rows: its features are then
those of the module times ``x_scale``. What is read reconstructs as its own library does.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bae_fast.autoencoder import Autoencoder
from bae_fast.baselines.base import METHODS, SAEConfig, SparseAutoencoder
from bae_fast.files import (
    read_json,
    read_safetensors,
    read_torch,
    write_json,
    write_safetensors,
    write_torch,
)
from bae_fast.pretrained import check_weights
from bae_fast.units import divided, inverse_units, multiplied

# dict_class -> our method; AutoEncoderNew is read too
CLASSES = {
    "AutoEncoder": "relu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu",
}


def _raw(model: Autoencoder, allowed: tuple[str, ...], library: str) -> dict[str, Tensor]:
    """Tensors of a module for raw rows, by our names, in float64.

    Raises:
        ValueError: a method that the library lacks.
    """
    method = getattr(model.config, "architecture", None)
    if not isinstance(model, SparseAutoencoder) or method not in allowed:
        raise ValueError(
            f"model must be one of {', '.join(allowed)} for {library}; "
            f"got {method or type(model).__name__}"
        )
    found = {name: t.detach().cpu().double() for name, t in model.state_dict().items()}
    scale, mean = found["x_scale"], found["x_mean"]
    one = torch.ones_like(scale)
    metric = found.pop("x_metric", None)
    target = found.pop("y_metric", None) if model.is_transcoder else metric
    found["W_enc"] = divided(found["W_enc"].T, one, metric, inverse_units(metric)).T
    for name in ("W_dec", "b_dec"):
        found[name] = multiplied(found[name], one, target)
    if model.is_transcoder:
        # theirs subtracts nothing before the encoder
        found["b_enc"] = found["b_enc"] - mean / scale @ found["W_enc"]
        found["W_enc"] = found["W_enc"] / scale
        found["W_dec"] = found["W_dec"] * found["y_scale"]
        found["b_dec"] = found["b_dec"] * found["y_scale"] + found["y_mean"]
        return found
    # pre and everything that it is compared with, times the scale: rows of W_dec keep their norm
    for name in ("b_enc", "b_gate", "b_mag", "threshold"):
        if name in found:
            found[name] = found[name] * scale
    if "log_threshold" in found:
        found["threshold"] = found["log_threshold"].exp() * scale
    found["b_dec"] = found["b_dec"] * scale + mean
    return found


def _config_of(folder: Path, name: str, holds: str) -> dict[str, Any]:
    """The configuration in a folder of another library.

    Raises:
        FileNotFoundError: it is not there; what such a folder holds is said.
        ValueError: a file that is no JSON object.
    """
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder / name} does not exist: a folder of {holds}")
    return read_json(folder / name)


def _module(
    method: str, tensors: dict[str, Tensor], k: int, metadata: dict[str, Any], source: Path
) -> SparseAutoencoder:
    """A module in eval mode that holds the tensors, by our names.

    Raises:
        ValueError: tensors that do not fit together.
    """
    for name, tensor in tensors.items():
        check_weights(name, tensor, str(source))
    if tensors["W_enc"].dim() != 2:
        raise ValueError(
            f"{source}: the encoder must be a matrix; got {list(tensors['W_enc'].shape)}"
        )
    d_in, f = tensors["W_enc"].shape
    config = SAEConfig(
        method, d_in, f, tensors["b_dec"].numel(), k, METHODS[method].default_bandwidth, metadata
    )
    config.check(str(source))
    dtype = tensors["W_enc"].dtype
    module = METHODS[method](config, transcoder=method == "transcoder", dtype=dtype)
    expected = module.state_dict()
    for name, tensor in tensors.items():
        if name not in expected or expected[name].shape != tensor.shape:
            wanted = list(expected[name].shape) if name in expected else "no such tensor"
            raise ValueError(f"{source}: {name} must be {wanted}; got {list(tensor.shape)}")
    module.load_state_dict({**expected, **{n: t.to(dtype) for n, t in tensors.items()}})
    return module.eval()


def _taken(state: dict[str, Tensor], names: tuple[str, ...], source: Path) -> list[Tensor]:
    missing = [name for name in names if not isinstance(state.get(name), Tensor)]
    if missing:
        raise ValueError(f"{source} must hold {', '.join(names)}; it lacks {', '.join(missing)}")
    for name in names:
        tensor = state[name]
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{source}: {name} must be dense and floating point; got {kind}")
    return [state[name] for name in names]


# -- dictionary_learning -----------------------------------------------------------------------


def load_dictionary_learning(folder: str | os.PathLike[str]) -> SparseAutoencoder:
    """Read a folder of dictionary_learning.

    Args:
        folder: the folder with ``ae.pt`` and ``config.json``.

    Returns:
        The module in eval mode, in the dtype of the file. Where the library scales features by the
        norms of decoder rows (Gated, JumpReLU), the norms are in the encoder here.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a class that is not known, or a file that is damaged or holds other tensors.
    """
    folder = Path(folder)
    config = _config_of(folder, "config.json", "dictionary_learning has config.json and ae.pt")
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        raise ValueError(f"{folder / 'config.json'} must have a trainer; got {trainer!r}")
    name = trainer.get("dict_class")
    if name not in (*CLASSES, "AutoEncoderNew"):
        raise ValueError(
            f"{folder / 'config.json'}: dict_class must be one of {', '.join(CLASSES)}, "
            f"AutoEncoderNew; got {name!r}"
        )
    source = folder / "ae.pt"
    state = read_torch(source, "state dict")
    if not isinstance(state, dict):
        raise ValueError(f"{source} must hold a state dict; got {type(state).__name__}")
    k = trainer.get("k", trainer.get("target_l0", 1))
    if isinstance(state.get("k"), Tensor) and state["k"].numel() == 1:
        k = state["k"].item()
    if not isinstance(k, (int, float)) or not math.isfinite(k):
        raise ValueError(f"{folder}: k must be a number; got {k!r}")
    metadata = {
        ours: trainer[theirs]
        for theirs, ours in (("lm_name", "model_name"), ("submodule_name", "hook_name"))
        if isinstance(trainer.get(theirs), str)
    }
    try:
        tensors = _of_dictionary(name, state, source)
    except RuntimeError as error:  # of a product or a sum
        reason = str(error).splitlines()[0]
        raise ValueError(f"{source}: its tensors do not fit together: {reason}") from error
    return _module(CLASSES.get(name, "relu"), tensors, max(round(k), 1), metadata, source)


def _turned(weight: Tensor) -> Tensor:
    """The transpose of a matrix; what is none stays, and its shape is refused later."""
    return weight.T.contiguous() if weight.dim() == 2 else weight


def _divisors(norms: Tensor) -> Tensor:
    """Norms to divide by: a feature without a direction adds nothing, whatever it is."""
    return torch.where(norms > 0, norms, 1.0)


def _of_dictionary(name: str, state: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Our tensors of a state dict of dictionary_learning."""
    names: tuple[str, ...]
    if name == "JumpReluAutoEncoder":
        names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
        W_enc, b_enc, W_dec, b_dec, threshold = _taken(state, names, source)
        norms = W_dec.norm(dim=1)
        return {
            "W_enc": W_enc * norms,
            # theirs does not subtract b_dec before the encoder
            "b_enc": (b_enc + b_dec @ W_enc) * norms,
            "W_dec": W_dec / _divisors(norms)[:, None],
            "b_dec": b_dec,
            # below zero nothing but relu is left; the logarithm of zero is exact again as its exp
            "log_threshold": (threshold.clamp_min(0) * norms).log(),
        }
    if name == "GatedAutoEncoder":
        names = ("encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias",
                 "mag_bias")  # fmt: skip
        W, D, b_dec, r_mag, b_gate, b_mag = _taken(state, names, source)
        norms = D.norm(dim=0)
        return {
            "W_enc": _turned(W),
            "W_dec": _turned(D / _divisors(norms)),
            "b_dec": b_dec,
            "b_gate": b_gate,
            "r_mag": r_mag + norms.log(),
            "b_mag": b_mag * norms,
        }
    bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(name, "b_dec")
    names = ("encoder.weight", "encoder.bias", "decoder.weight", bias)
    W, b_enc, D, b_dec = _taken(state, names, source)
    if name == "AutoEncoderNew":  # does not subtract its bias before the encoder
        b_enc = b_enc + W @ b_dec
    found = {
        "W_enc": _turned(W),
        "b_enc": b_enc,
        "W_dec": _turned(D),
        "b_dec": b_dec,
    }
    if name == "BatchTopKSAE":
        (found["threshold"],) = _taken(state, ("threshold",), source)
    return found


def save_dictionary_learning(model: Autoencoder, folder: str | os.PathLike[str]) -> Path:
    """Write a module as a folder of dictionary_learning, for raw rows.

    Raises:
        ValueError: a method that the library lacks.
    """
    folder = Path(folder)
    tensors = _raw(model, tuple(CLASSES.values()), "dictionary_learning")
    method: str = model.config.architecture
    name = next(key for key, value in CLASSES.items() if value == method)
    W_enc, b_dec = tensors["W_enc"], tensors["b_dec"]
    if method == "jumprelu":
        state = {key: tensors[key] for key in ("W_enc", "W_dec", "b_dec", "threshold")}
        state["b_enc"] = tensors["b_enc"] - b_dec @ W_enc
    else:
        state = {"encoder.weight": W_enc.T, "decoder.weight": tensors["W_dec"].T}
        if method == "gated":
            state |= {
                "decoder_bias": b_dec,
                "r_mag": tensors["r_mag"],
                "gate_bias": tensors["b_gate"],
                "mag_bias": tensors["b_mag"],
            }
        else:
            state["encoder.bias"] = tensors["b_enc"]
            state["bias" if method == "relu" else "b_dec"] = b_dec
    dtype = next(model.parameters()).dtype
    state = {key: tensor.to(dtype).contiguous() for key, tensor in state.items()}
    if method in ("topk", "batchtopk"):
        state["k"] = torch.tensor(model.config.k)
        state["threshold"] = tensors.get("threshold", torch.tensor(-1.0)).to(torch.float32)
    write_torch(folder / "ae.pt", state)
    metadata = model.config.metadata
    trainer: dict[str, Any] = {
        "dict_class": name,
        "activation_dim": model.d_in,
        "dict_size": model.d_sae,
        "lm_name": str(metadata.get("model_name", "")),
        "submodule_name": str(metadata.get("hook_name", "")),
        "k" if method in ("topk", "batchtopk") else "target_l0": model.config.k,
    }
    # last: a folder without it is refused
    write_json(folder / "config.json", {"trainer": trainer, "buffer": {"d_submodule": model.d_in}})
    return folder


# -- sparsify ----------------------------------------------------------------------------------


def load_sparsify(folder: str | os.PathLike[str]) -> SparseAutoencoder:
    """Read a folder of sparsify: TopK, or a transcoder without a skip.

    Args:
        folder: the folder with ``cfg.json`` and ``sae.safetensors``.

    Returns:
        The module in eval mode, in the dtype of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: groups, a skip, signed features, or a file that is damaged or holds other
            tensors.
    """
    folder = Path(folder)
    source = folder / "cfg.json"
    config = _config_of(folder, source.name, "sparsify has cfg.json and sae.safetensors")
    k = config.get("k")
    if not isinstance(k, int) or isinstance(k, bool):
        raise ValueError(f"{source}: k must be an int; got {k!r}")
    if config.get("activation", "topk") != "topk":
        raise ValueError(f"{source}: activation must be 'topk'; got {config['activation']!r}")
    for name in ("skip_connection", "signed"):  # signed ones keep negative features too
        if config.get(name, False):
            raise ValueError(f"{source}: {name} must be False; got {config[name]!r}")
    source = folder / "sae.safetensors"
    state, _ = read_safetensors(source)
    W, b_enc, W_dec, b_dec = _taken(
        state, ("encoder.weight", "encoder.bias", "W_dec", "b_dec"), source
    )
    tensors = {"W_enc": _turned(W), "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    method = "transcoder" if config.get("transcode", False) else "topk"
    return _module(method, tensors, k, {}, source)


def save_sparsify(model: Autoencoder, folder: str | os.PathLike[str]) -> Path:
    """Write a TopK autoencoder, or a transcoder of equal widths, as a folder of sparsify.

    Raises:
        ValueError: another method, or widths that differ.
    """
    folder = Path(folder)
    tensors = _raw(model, ("topk", "transcoder", "random"), "sparsify")
    if model.d_in != model.d_out:
        raise ValueError(f"model must have d_out = d_in = {model.d_in}; got {model.d_out}")
    state = {
        "encoder.weight": tensors["W_enc"].T,
        "encoder.bias": tensors["b_enc"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    dtype = next(model.parameters()).dtype
    state = {key: tensor.to(dtype).contiguous() for key, tensor in state.items()}
    write_safetensors(folder / "sae.safetensors", state, {"format": "pt"})
    values = {
        "activation": "topk",
        "expansion_factor": math.ceil(model.d_sae / model.d_in),
        "normalize_decoder": True,
        "num_latents": model.d_sae,
        "k": model.config.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": model.is_transcoder,
        "d_in": model.d_in,
    }
    write_json(folder / "cfg.json", values)
    return folder
