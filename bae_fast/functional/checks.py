"""Checks of arguments: an error names the argument, what is allowed and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.arguments import all_finite
from bae_fast.codes import check_covariance_size, check_strided, check_tail
from bae_fast.devices import autocasts
from bae_fast.functional.outputs import Encoded
from bae_fast.ops.limits import check_counted
from bae_fast.packing import n_words
from bae_fast.statistics import CodeStatistics

# dtype and sizes of a packed field
Kind = tuple[torch.dtype, tuple[int | str, ...]]

# -- parameters and rows -----------------------------------------------------------------------


def check_encoder(
    x: Tensor,
    parameters: dict[str, Tensor],
    n_bits: int,
    mask: Tensor | None,
    check_finite: bool,
) -> None:
    """Rows, and parameters of which W_enc and b_enc are some."""
    check_parameters(x, parameters)
    W_enc = parameters["W_enc"]
    require("W_enc", W_enc, ("d_in", "k F"))
    _check_x(x, W_enc, n_bits, mask, check_finite)
    require("b_enc", parameters["b_enc"], (W_enc.shape[1],))


def require(name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
    sizes = tuple(tensor.shape)
    if len(sizes) != len(shape) or any(
        isinstance(s, int) and s != t for s, t in zip(shape, sizes, strict=True)
    ):
        expected = ", ".join(str(s) for s in shape)
        raise ValueError(f"{name} must have shape [{expected}]; got {list(sizes)}")


def check_whole(name: str, tensor: Tensor) -> None:
    if hasattr(tensor, "full_tensor"):
        raise TypeError(
            f"{name} must be whole; got one process's shard of it (DTensor): FSDP gathers shards "
            "in forward, and in methods that register_fsdp_forward_method names"
        )


def check_columns(name: str, weight: Tensor) -> None:
    if weight.shape[1] == 0:
        raise ValueError(f"{name} must have at least one column; got none")


def check_parameters(x: Tensor, parameters: dict[str, Tensor], x_name: str = "x") -> None:
    """Dense; one device; one floating dtype outside autocast."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{x_name} must be a tensor; got {type(x).__name__}")
    check_strided(x_name, x)
    if not x.dtype.is_floating_point:
        raise TypeError(f"{x_name} must be floating point; got {x.dtype}")
    autocast = autocasts(x.device)
    for name, tensor in parameters.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
        check_strided(name, tensor)
        if not hasattr(x, "full_tensor"):
            check_whole(name, tensor)
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x_name}'s device {x.device}; got {tensor.device}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point; got {tensor.dtype}")
        if tensor.dtype != x.dtype and not autocast:
            raise TypeError(
                f"{name} must have {x_name}'s dtype {x.dtype} outside autocast; "
                f"got {tensor.dtype}: {x_name}.to({tensor.dtype}) has that of {name}"
            )


def _check_x(
    x: Tensor, W_enc: Tensor, n_bits: int, mask: Tensor | None, check_finite: bool
) -> None:
    if x.dim() < 1 or x.shape[-1] != W_enc.shape[0]:
        raise ValueError(f"x must have shape [..., {W_enc.shape[0]}]; got {list(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"x must hold at least one row; got shape {list(x.shape)}")
    check_columns("W_enc", W_enc)
    if (
        isinstance(n_bits, bool)
        or not isinstance(n_bits, int)
        or n_bits < 1
        or W_enc.shape[1] % n_bits
    ):
        raise ValueError(
            f"n_bits must be an int >= 1 that divides the {W_enc.shape[1]} columns of W_enc; "
            f"got {n_bits!r}"
        )
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a bool tensor; got {type(mask).__name__}")
    if mask is not None:
        check_strided("mask", mask)
    if mask is not None and (
        mask.dtype != torch.bool or mask.shape != x.shape[:-1] or mask.device != x.device
    ):
        raise ValueError(
            f"mask must be bool {list(x.shape[:-1])} on {x.device}; "
            f"got {mask.dtype} {list(mask.shape)} on {mask.device}"
        )
    if check_finite and not all_finite(x):
        raise ValueError(
            f"x must be finite; got {int((~x.isfinite()).sum())} NaN or Inf of {x.numel()}"
        )


# -- packed fields -----------------------------------------------------------------------------


def check_more(
    stats: CodeStatistics | None,
    past: CodeStatistics | None,
    n_columns: int,
    device: torch.device,
) -> CodeStatistics | None:
    """Statistics of more rows than a call's own; those that were given."""
    if stats is not None and past is not None:
        raise ValueError("stats and past must not both be given: one replaces, the other adds")
    name, given = ("stats", stats) if past is None else ("past", past)
    if given is None:
        return None
    if not isinstance(given, CodeStatistics):
        raise TypeError(f"{name} must be CodeStatistics; got {type(given).__name__}")
    _check_statistics(name, given, n_columns, device)
    return given


def check_covariance(
    stats: CodeStatistics | None,
    past: CodeStatistics | None,
    n_rows: int,
    n_columns: int,
    device: torch.device,
) -> None:
    """Whether a covariance can be made: of what is in stats, or of a call's own rows and past's."""
    if stats is None:
        n_past = 0 if past is None else len(past.require_words())
        check_covariance_size(n_rows + n_past, n_columns, device.type)
        return
    if stats.numerator is None:
        raise ValueError("stats has no covariance: make it with statistics(covariance=True)")
    if stats.words is None and stats.signs is None:
        raise ValueError("stats must hold words or signs for the covariance; got neither")


def _check_statistics(
    name: str, given: CodeStatistics, n_columns: int, device: torch.device
) -> None:
    n = n_words(n_columns)
    kinds: dict[str, tuple[torch.dtype, tuple[int | str, ...]]] = {
        "n_rows": (torch.int64, ()),
        "counts": (torch.int64, (n_columns,)),
        "words": (torch.int32, ("N", n)),
        "numerator": (torch.int64, ()),
        "signs": (torch.int32, (2, n_columns, n)),
    }
    _check_packed(name, given, kinds, n_columns, device)


def check_encoded(
    encoded: Encoded, n_rows: int, n_columns: int, surrogate: str, device: torch.device
) -> None:
    if not isinstance(encoded, Encoded):
        raise TypeError(f"encoded must be what encode_rows gave; got {type(encoded).__name__}")
    bits = (torch.int32, (n_rows, n_words(n_columns)))
    kinds: dict[str, tuple[torch.dtype, tuple[int | str, ...]]] = {
        "n_rows": (torch.int64, ()),
        "counts": (torch.int64, (n_columns,)),
        "words": bits,
    }
    if (surrogate == "rectangle") != (encoded.window.numel() > 0):
        raise ValueError(
            f"encoded must be made for the surrogate {surrogate!r}; got one "
            f"{'without' if surrogate == 'rectangle' else 'with'} a window"
        )
    if surrogate == "rectangle":
        kinds["window"] = bits
    _check_packed("encoded", encoded, kinds, n_columns, device)


def _check_packed(
    name: str,
    given: CodeStatistics | Encoded,
    kinds: dict[str, tuple[torch.dtype, tuple[int | str, ...]]],
    n_columns: int,
    device: torch.device,
) -> None:
    """Shape, dtype, device and last bits of each field that is there: kernels read them so."""
    for field, (dtype, shape) in kinds.items():
        tensor = getattr(given, field)
        if tensor is None:
            continue
        require(f"{name}.{field}", tensor, shape)
        if tensor.dtype != dtype:
            raise TypeError(f"{name}.{field} must be {dtype}; got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}.{field} must be on x's device {device}; got {tensor.device}")
        if dtype == torch.int32:
            check_tail(f"{name}.{field}", tensor, n_columns)


def check_kept(row_mask: Tensor | None, least: int) -> None:
    """Check for the reference what the operators check themselves, on a CPU only, as they do."""
    if row_mask is None or row_mask.device.type != "cpu" or torch.compiler.is_compiling():
        return
    kept = row_mask.sum()
    check_counted(kept)
    if kept < least:
        raise ValueError(f"covariance needs at least {least} rows; got {int(kept)}")
