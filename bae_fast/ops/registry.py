"""Which backend serves a call: by the tensor's device, dtype and shape, at call time.

Backends register themselves here (:func:`register`); this module knows none of them. Registering
must be cheap and must not need the backend's toolchain: a backend that cannot run says so through
:attr:`Backend.unavailable`.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

IMPLS = ("auto", "reference", "torch", "cpp", "triton", "cuda")

# order of preference of impl="auto" on each device type
AUTO_ORDER = {"cpu": ("cpp", "torch"), "cuda": ("triton", "torch")}
# only asked for by name, until a device has shown that it is right and faster
BY_NAME = {"cuda": ("cuda",)}
ENV_IMPL = "BAE_FAST_IMPL"

# how the reason of a backend begins that the installation left out
NOT_COMPILED = "not compiled"


class BackendUnavailableError(RuntimeError):
    """An explicitly chosen implementation cannot run here, or not on these inputs."""


@dataclass(frozen=True)
class Request:
    """What a backend is asked to serve; sizes are None where they are not known yet.

    ``device_index`` is the tensor's own; None: the device that is current.
    """

    device_type: str
    dtype: torch.dtype
    n_columns: int | None = None
    n_bits: int = 1
    device_index: int | None = None

    def __str__(self) -> str:
        columns = "" if self.n_columns is None else f" with {self.n_columns:,} columns"
        return f"{str(self.dtype).removeprefix('torch.')} on {self.device_type}{columns}"


def environment_megabytes(name: str, default: int) -> int:
    """The value of a budget in the environment, in MiB, or ``default`` where it is not set.

    Raises:
        ValueError: the variable is not an integer >= 0.
    """
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise ValueError(f"{name} must be an integer >= 0, in MiB; got {text!r}")
    return int(text)


def _no_reasons(request: Request) -> list[str]:
    return []


def _never(*args: Any) -> bool:
    return False


@dataclass(frozen=True)
class Extras:
    """Functions on packed words beyond the contract; None: the caller's own in plain torch serves.

    Attributes:
        column_counts: (words int32 ``[N, W]``, K) -> ones in each column, int64 ``[K]``.
        salient: (words, order int64 ``[m]``, K, k) -> places in ``order`` of the first k entries
            that hold in each row, int32 ``[N, k]``; m where a row has fewer.
        search: (projection float32 ``[N, K]``, gram ``[K, K]``, on ``[K]``, off ``[K]``, words,
            most, least) -> (words, flips int32 ``[N]``), see :func:`bae_fast.search.flip_bits`.
            The projection may be written to.
        grouped: (numbers int32 ``[M]``, G) -> offsets int64 ``[G + 1]`` and the rising indices of
            each number in 0 .. G-1; other numbers are left out.
        pair_counts: (words, different columns int64 ``[k]``, K) -> rows in which two of the columns
            are on, float32 ``[k, k]``, of fewer than 2^24 rows.
        common_ones: (words int32 ``[G, a, m]``, others int32 ``[k, m]``, index int64 ``[G, c]``) ->
            ones that word i of a group and the others chosen for it have in common, float32
            ``[G, a, c]``, of fewer than 2^24 bits and k at most 2^16.
        squared_error: (recon ``[n, d]``, target ``[n, d]``, unit float32 ``[d]``, keep bool ``[n]``
            or None) -> sum of ((recon - target) unit)^2 over the rows kept, float64 ``[]``; recon
            and target in float32 or bfloat16.
        squared_error_gradient: (the same, scale) -> its gradient at recon times scale, in recon's
            dtype.
        covariance_columns: (gradient at D ``[]``, words of the rows at hand, words, counts and
            number of the rows counted) -> a function (g ``[rows at hand, columns]``, first) that
            adds D's gradient at the bits of those columns, from a multiple of 32 on, to g. All
            words are of all K columns.
    """

    column_counts: Callable[[Tensor, int], Tensor] | None = None
    salient: Callable[[Tensor, Tensor, int, int], Tensor] | None = None
    search: Callable[..., tuple[Tensor, Tensor]] | None = None
    grouped: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None = None
    pair_counts: Callable[[Tensor, Tensor, int], Tensor] | None = None
    common_ones: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    squared_error: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] | None = None
    squared_error_gradient: (
        Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor] | None
    ) = None
    covariance_columns: (
        Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Callable[[Tensor, int], None]] | None
    ) = None


@dataclass(frozen=True)
class Backend:
    """One implementation of every operator in :mod:`bae_fast.ops.schemas`.

    Attributes:
        name: the overload's name, and the value of ``impl=``.
        unavailable: why it cannot run in this process at all, or None.
        ops: operator name -> callable; empty where unavailable.
        not_supported_reasons: every reason against serving a request; empty to accept it.
        warmup: compiles what a first call on a device would, given the device, the surrogates and
            whether steps have the multilinear term; None where nothing is compiled.
        simd: name of the CPU instruction set in use, or None where there is no such choice.
        may_leave_planes: whether sign planes of so many rows and columns may be left unmade where
            the codes are sparse, and marked so on the device.
        keeps_copy: whether a half-precision copy of W_dec, of so many numbers on a device, is made
            once a step, for decode and encoder_backward; they make it by parts else.
        capturable: whether no operator waits for the device or takes a shape from a tensor's
            numbers, so that a CUDA graph can hold a step.
        extras: functions beyond the contract.
    """

    name: str
    unavailable: str | None = None
    ops: dict[str, Callable[..., Any]] = field(default_factory=dict)
    not_supported_reasons: Callable[[Request], list[str]] = _no_reasons
    warmup: Callable[[torch.device, Sequence[str], bool], None] | None = None
    simd: Callable[[], str] | None = None
    may_leave_planes: Callable[[int, int], bool] = _never
    keeps_copy: Callable[[int, torch.device], bool] = _never
    capturable: bool = False
    extras: Extras = Extras()  # frozen


BACKENDS: dict[str, Backend] = {}


def register(backend: Backend) -> Backend:
    """Add a backend, and return it.

    Raises:
        ValueError: its name is no value of ``impl=``, or is taken.
    """
    if backend.name not in IMPLS[2:]:
        raise ValueError(f"backend must be one of {', '.join(IMPLS[2:])}; got {backend.name!r}")
    if backend.name in BACKENDS:
        raise ValueError(f"backend {backend.name!r} must be registered once; got it twice")
    BACKENDS[backend.name] = backend
    return backend


def reasons_against(name: str, request: Request) -> list[str]:
    """Why backend ``name`` cannot serve ``request``; an empty list when it can."""
    backend = BACKENDS.get(name)
    if backend is None:
        return ["not part of this version of bae_fast"]
    if backend.unavailable is not None:
        return [backend.unavailable]
    return backend.not_supported_reasons(request)


def check_impl(impl: str) -> str:
    """Return ``impl`` if it is a known name; raise ValueError otherwise."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}; got {impl!r}")
    return impl


def choose(
    impl: str,
    device_type: str,
    dtype: torch.dtype,
    n_columns: int | None,
    n_bits: int,
    device_index: int | None = None,
) -> str:
    """The implementation that serves a call: "reference" or the name of a backend.

    ``impl="auto"`` is replaced by ``BAE_FAST_IMPL`` where that is set. An explicit choice never
    falls back.

    Raises:
        ValueError: unknown name, in the argument or the environment.
        BackendUnavailableError: the explicit choice cannot serve the call; every reason is said.
    """
    if check_impl(impl) == "auto":
        impl = os.environ.get(ENV_IMPL) or "auto"
        if impl not in IMPLS:
            raise ValueError(f"{ENV_IMPL} must be one of {', '.join(IMPLS)}; got {impl!r}")
    if impl == "reference":
        return impl
    request = Request(device_type, dtype, n_columns, n_bits, device_index)
    if impl == "auto":
        order = AUTO_ORDER.get(device_type, ("torch",))
        for name in order:
            if not reasons_against(name, request):
                if name != order[0]:
                    _say_what_is_missing(order[0], name)
                return name
        refused = "; ".join(
            f"{name}: {', '.join(reasons_against(name, request))}" for name in order
        )
        raise BackendUnavailableError(f"no implementation serves {request}: {refused}")
    reasons = reasons_against(impl, request)
    if reasons:
        raise BackendUnavailableError(f"impl={impl!r} cannot serve {request}: {'; '.join(reasons)}")
    return impl


@functools.cache
def _say_what_is_missing(wanted: str, served: str) -> None:
    """Warn once, at the first use, that the fastest backend was never installed."""
    reason = BACKENDS[wanted].unavailable if wanted in BACKENDS else None
    if reason is not None and reason.startswith(NOT_COMPILED):
        warnings.warn(f"impl='auto' is {served!r} here; {wanted!r} is {reason}", stacklevel=5)


def extras(impl: str, device_type: str) -> Extras:
    """What serves beyond the contract on a device, where ``impl`` is chosen as for a float32 call.

    ``reference`` has none.

    Raises:
        ValueError, BackendUnavailableError: as :func:`choose`.
    """
    name = choose(impl, device_type, torch.float32, None, 1)
    return Extras() if name == "reference" else BACKENDS[name].extras


# What torch.compiler.assume_constant_result(choose) sets: under torch.compile the choice is made
# once, while tracing. Calling that function would import torch._dynamo, over a second.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
