"""What hidden states depend on: one digest of all that a language model computes with.

A digest covers, byte for byte, every parameter and buffer (buffers that are not saved too, such as
rope's frequencies), the configuration, and the plain settings that modules keep as attributes: a
rope's scaling, an adapter's strength, whether adapters are switched off or merged. Each tensor is
read once as 64-bit words in rows of a prime number of words; the wrapping sums of all columns and
of all rows go into a SHA-256. A change of any one element changes a sum for certain; two different
tensors with equal sums need four words changed to cancel out, in two rows and in two columns.

Code counts too, see `bae_fast.lm.code`: classes and functions that are no installed package's, and
those that were put in the place of a package's own (a patched class, a registered attention).
What forward hooks of the user's own do is not compared: they are listed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bae_fast.lm import code

# a digest that is kept holds as long as these files say how it is made
SOURCES = (__file__, code.__file__)

# words of 8 bytes in a row: a prime, so that no row of a weight matrix is a whole number of rows
_ROW_WORDS = 8191
# rows read at a time: 2 MiB, which a core's cache holds for the second sum
_BLOCK_ROWS = 32

# attributes that change while a model runs, or say where it runs, and change no state in
# evaluation mode
_NO_SETTING = frozenset(
    {
        "forward", "gradient_checkpointing", "hf_device_map", "max_seq_len_cached", "name_or_path",
        "training", "warnings_issued",
        # RecurrentGemma's state, begun anew by every pass without a cache
        "conv1d_state", "key_states", "recurrent_states", "value_states",
    }
)  # fmt: skip
# private attributes that switch adapters
_ADAPTER_SETTINGS = frozenset({"_active_adapter", "_disable_adapters"})
# of every module: parameters and buffers, which are read elsewhere, and hooks
_NO_MODULE_SETTING = frozenset(vars(nn.Module()))
# functions that a model's code calls by these modules' names, and that another may have replaced
_CALLED_BY_NAME = ("torch", "torch.nn.functional")
_NO_CONFIG = frozenset(
    {
        "_commit_hash", "_name_or_path", "output_attentions", "output_hidden_states",
        "return_dict", "transformers_version", "use_cache",
    }
)  # fmt: skip
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
# forward hooks of these are part of the model's own code, or only read
_LIBRARIES = ("torch.", "transformers.", "accelerate.", "bae_fast.lm.")
# these put a forward around a module's own that changes no value
_WRAPPING_LIBRARIES = ("transformers.", "accelerate.")


def tensor_digest(tensor: Tensor) -> bytes:
    """A digest of a tensor's bytes, the same on every device: 32 bytes.

    Raises:
        ValueError: a tensor without data, on the meta device.
    """
    if tensor.device.type == "meta":
        raise ValueError("model must hold its weights; a tensor is on the meta device")
    digest = hashlib.sha256()
    plain = tensor.detach()
    if plain.layout != torch.strided:
        plain = plain.to_dense()
    if plain.is_quantized:
        plain = plain.dequantize()
    try:
        data = plain.contiguous().view(-1).view(torch.uint8)
    except (NotImplementedError, RuntimeError):  # packed tensors of quantisation libraries
        data = plain.float().contiguous().view(-1).view(torch.uint8)
    n_words = data.numel() // 8
    n_rows = n_words // _ROW_WORDS
    body = data[: n_rows * _ROW_WORDS * 8]
    digest.update(data[body.numel() :].cpu().numpy().tobytes())
    if n_rows:
        if body.storage_offset() % 8:
            body = body.clone()
        words = body.view(torch.int64).view(n_rows, _ROW_WORDS)
        if words.device.type == "cpu":
            columns, rows = _sums(words.numpy())
        else:
            columns, rows = words.sum(0).cpu().numpy(), words.sum(1).cpu().numpy()
        digest.update(columns.tobytes())
        digest.update(rows.tobytes())
    return digest.digest()


def _sums(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sums of the columns and of the rows of int64 words, modulo 2^64.

    NumPy's, because torch starts its threads for every small sum, and beside a busy core each of
    them waits: 22 s in place of 0.5 s for 1.5 billion bfloat16 weights.
    """
    columns = np.zeros(words.shape[1], dtype=np.int64)
    rows = np.empty(len(words), dtype=np.int64)
    for start in range(0, len(words), _BLOCK_ROWS):
        block = words[start : start + _BLOCK_ROWS]
        columns += block.sum(0)
        block.sum(1, out=rows[start : start + _BLOCK_ROWS])
    return columns, rows


def model_digest(model: nn.Module) -> str:
    """A digest of all that a model's hidden states depend on, hooks left out; see the module.

    The same for the same model whenever it is asked, on whatever device and in whatever mode the
    model is. Every byte is read: 0.7 s for 1.5 billion bfloat16
    weights on one core of an AMD EPYC.
    """
    digest = hashlib.sha256()
    modules = dict(model.named_modules())
    made_anew = {f"{path}.{name}" for path in modules for name in _made_anew(modules[path])}
    walk = code.Walk(digest.update, tensor_digest, modules.values())
    _add_weights(digest.update, walk, model, made_anew)
    for path, module in modules.items():
        _add_settings(digest.update, walk, path, module, made_anew)
    _add_code(walk, {type(module) for module in modules.values()})
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        plain = {k: v for k, v in config.to_dict().items() if k not in _NO_CONFIG}
        plain["attention"] = getattr(config, "_attn_implementation", None)
        digest.update(json.dumps(plain, sort_keys=True, default=str).encode())
        walk.value(_attention(str(plain["attention"])))
    return "parameters-" + digest.hexdigest()[:16]


def _add_weights(
    update: Callable[[bytes], None], walk: code.Walk, model: nn.Module, made_anew: set[str]
) -> None:
    """Parameters, buffers, and what else a module keeps as its state."""
    divided = {
        f"{path}.{name}".removeprefix("."): factor
        for path, module in model.named_modules()
        for name, factor in _divided(module).items()
    }
    named = dict((*model.named_parameters(), *model.named_buffers()))
    for name, tensor in named.items():
        if name in made_anew:
            continue
        if name in divided:
            tensor = tensor.detach() * divided[name]
        update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        update(tensor_digest(tensor))
    seen = {id(tensor) for tensor in named.values()}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:  # weights that are packed away, and states of modules' own kinds
            update(f"{name} ".encode())
            walk.value(value)


def _add_settings(
    update: Callable[[bytes], None],
    walk: code.Walk,
    path: str,
    module: nn.Module,
    made_anew: set[str],
) -> None:
    """What one module computes with besides its state."""
    own = not code.is_installed(type(module).__module__)
    made_by_passes = code.written_by_a_pass(type(module)) if own else set()
    settings = {}
    update(f"{path} {type(module).__qualname__} ".encode())
    for name, value in vars(module).items():
        if name in _NO_SETTING or name in _NO_MODULE_SETTING or name in made_by_passes:
            continue
        # what a library keeps to itself is its own matter; a user's module may compute with it
        if name.startswith("_") and not own and name not in _ADAPTER_SETTINGS:
            continue
        if f"{path}.{name}" in made_anew or (name == _RWKV_FLAG and _is_rwkv(module)):
            continue
        if isinstance(value, Tensor):
            settings[name] = tensor_digest(value).hex()
        elif _is_plain(value):
            settings[name] = repr(value)
        elif own or isinstance(value, _FUNCTIONS):
            update(f"{name} ".encode())
            walk.value(value)
    update(f"{sorted(settings.items())} ".encode())


def _add_code(walk: code.Walk, kinds: set[type]) -> None:
    """What the classes of the modules compute."""
    for kind in sorted(kinds, key=lambda kind: (kind.__module__, kind.__qualname__)):
        walk.own_class(kind)
    for name in sorted({kind.__module__ for kind in kinds}):
        if name.startswith("transformers."):
            walk.foreign_functions(name)
    for name in _CALLED_BY_NAME:
        walk.foreign_functions(name)


def _made_anew(module: nn.Module) -> list[str]:
    """Tensors that a module overwrites in every pass, by the length of the text: no weights.

    A rope of two sets of frequencies (Phi-3's long one) puts the one that is in use there.
    """
    kinds = getattr(module, "rope_type", None)
    parts = kinds.items() if isinstance(kinds, dict) else [(None, kinds)]
    before = ["" if part is None else f"{part}_" for part, kind in parts if kind == "longrope"]
    return [f"{one}{name}" for one in before for name in ("inv_freq", "long_inv_freq")]


_RWKV_FLAG = "layers_are_rescaled"


def _is_rwkv(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.models.rwkv.")


def _divided(module: nn.Module) -> dict[str, int]:
    """Weights that RWKV's first pass in evaluation mode divides in place, and the divisors.

    They are powers of two, so that a product gives the weights from before: the model is the same
    before and after that pass, and every edit of these weights shows.
    """
    if not (_is_rwkv(module) and getattr(module, _RWKV_FLAG, False)):
        return {}
    inner: Any = module
    every = inner.config.rescale_every
    if every <= 0:
        return {}
    weights = ("attention.output.weight", "feed_forward.value.weight")
    return {
        f"blocks.{i}.{name}": 2 ** (i // every)
        for i in range(len(inner.blocks))
        for name in weights
    }


def _attention(name: str) -> Any:
    """The function that transformers calls for attention under a name, if it has a register."""
    utilities = sys.modules.get("transformers.modeling_utils")
    return getattr(utilities, "ALL_ATTENTION_FUNCTIONS", {}).get(name)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.keys())) and all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, np.generic))


def own_hooks(model: nn.Module) -> list[str]:
    """The forward hooks and replaced forwards in a model that no library put there.

    Returns:
        ``path: function`` of each, in the model's order; empty for a model as it was loaded.
    """
    return [said for said, _ in own_functions(model)]


def own_functions(model: nn.Module) -> list[tuple[str, Any]]:
    """The same with the functions themselves, so that one put in another's place is noticed."""
    found = []
    everywhere = nn.modules.module
    for hook in (
        *everywhere._global_forward_hooks.values(),
        *everywhere._global_forward_pre_hooks.values(),
    ):
        found.append((f"every module: {_function_name(hook)}", hook))
    for path, module in model.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not f"{_origin(hook)}.".startswith(_LIBRARIES):
                found.append((f"{path or 'the model'}: {_function_name(hook)}", hook))
        forward = vars(module).get("forward")
        if forward is not None and not f"{_origin(forward)}.".startswith(_WRAPPING_LIBRARIES):
            said = f"{path or 'the model'}: forward = {_function_name(forward)}"
            found.append((said, forward))
    return found


def _bare(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__func__", function)


def _origin(function: Any) -> str:
    function = _bare(function)
    return str(getattr(function, "__module__", None) or type(function).__module__)


def _function_name(function: Any) -> str:
    function = _bare(function)
    return str(getattr(function, "__qualname__", type(function).__qualname__))
