"""What one training step starts on a GPU, counted without one, and whether anything waits for it.

The step runs on torch's meta tensors, which have shapes and no memory, and say that they are on a
CUDA device: every operator is counted, kernels are recorded in place of their start. What would
make the host wait for the device, or copy between them, is refused: such a step could not be
captured in a CUDA graph.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.cuda.amp import common
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bae_fast.ops import nvidia, registry
from bench import tables
from bench.step import OBJECTIVES, packed_step

# of an H200: what sizes of chunks and tiles go by
FAMILY, MULTIPROCESSORS, MEMORY_BYTES = "sm_90", 132, 141 * 10**9

KERNELS = {"triton": "bae_fast.kernels.covariance", "cuda": "bae_fast.kernels_cuda.covariance"}

# (N, d, F)
SHAPES = [(512, 2048, 16384), (4096, 2048, 16384), (4096, 2048, 65536)]

# operators that give memory and start nothing
_ROOM = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_ROOM |= {"lift_fresh", "_unsafe_view", "_reshape_alias", "set_"}


DEVICE = torch.device("cuda", 0)


class SaysCuda(TorchFunctionMode):
    """Meta tensors, which autograd knows without a GPU, say that they are on a CUDA device."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        args, given = pytree.tree_map(_meta, (args, dict(kwargs or {})))
        if func is Tensor.backward:
            loss = args[0]
            with self:  # a mode is off while it handles a function, and this one calls others
                return _engine_run_backward(
                    (loss,), (torch.ones_like(loss),), False, False, (),
                    allow_unreachable=True, accumulate_grad=True,
                )  # fmt: skip
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return args[0].is_meta
        if func is Tensor.data_ptr:
            return 16 * args[0].storage_offset()
        result = func(*args, **given)
        is_meta = isinstance(result, torch.device) and result.type == "meta"
        return DEVICE if is_meta else result


def _meta(value: Any) -> Any:
    named = isinstance(value, str) and value.partition(":")[0] == "cuda"
    if named or (isinstance(value, torch.device) and value.type == "cuda"):
        return torch.device("meta")
    return value


class WaitsForDeviceError(RuntimeError):
    """An operator for which the host would wait until the device has come so far."""


class Watch(TorchDispatchMode):
    """Counts operators that start something on a CUDA device, and refuses those that wait for it.

    Attributes:
        counts: starts of each operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        name = func._schema.name.split("::")[1]
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            raise WaitsForDeviceError(f"{name}: what it returns depends on a tensor's numbers")
        # a tensor without memory, whatever it says of its device in the backward pass
        devices = {"meta" if t.is_meta else t.device.type for t in _tensors((args, given))}
        if isinstance(given.get("device"), torch.device):
            devices.add(_meta(given["device"]).type)
        if name in ("_to_copy", "copy_", "copy", "_foreach_copy_") and len(devices) > 1:
            raise WaitsForDeviceError(f"{name} between the device and the host")
        result = func(*args, **given)
        made = _tensors(result)
        works = not made or any(t.numel() for t in made)
        if "meta" in devices and works and not func.is_view and name not in _ROOM:
            self.counts[name] += 1
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]


@contextmanager
def recorded() -> Iterator[collections.Counter[str]]:
    """No kernel is started; the result counts each by name. The device is an H200."""
    from bae_fast.kernels import launch
    from bae_fast.kernels_cuda import driver

    counts: collections.Counter[str] = collections.Counter()

    def triton(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        counts[kernel.fn.__name__] += 1

    def cuda(kernel: Any, blocks: int, *args: Any) -> None:
        counts[kernel.name] += 1

    properties = SimpleNamespace(total_memory=MEMORY_BYTES, multi_processor_count=MULTIPROCESSORS)
    with (
        mock.patch.object(launch, "start", triton),
        mock.patch.object(driver, "start", cuda),
        mock.patch.object(driver, "arch", return_value=FAMILY),
        mock.patch.object(launch, "family", return_value=FAMILY),
        mock.patch.object(launch, "_chip", return_value=FAMILY),
        mock.patch.object(launch, "multiprocessors", return_value=MULTIPROCESSORS),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(common, "amp_definitely_not_available", return_value=False),
        mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True),
    ):
        yield counts


@contextmanager
def bodies_of(impl: str) -> Iterator[None]:
    """A GPU backend serves fake tensors by the bodies of its operators, so that these are seen."""
    importlib.import_module(KERNELS[impl])
    backend = dataclasses.replace(
        registry.BACKENDS[impl],
        ops=nvidia.bodies("bae_fast.kernels.bodies", KERNELS[impl]),
        not_supported_reasons=lambda request: [],
    )
    with mock.patch.dict(registry.BACKENDS, {impl: backend}):
        yield


def count(
    impl: str,
    n: int,
    d: int,
    f: int,
    objective: str = "paper",
    step_of: Callable[..., Callable[[], Any]] = packed_step,
) -> dict[str, collections.Counter[str]]:
    """Starts of one step under bfloat16 autocast, after the one that makes the optimizer's state.

    Raises:
        WaitsForDeviceError: something in it would wait for the device.
    """
    with bodies_of(impl), recorded() as kernels, SaysCuda():
        sizes = ((n, d), (d, f), (f,), (f, d), (d,))
        x, *parameters = (torch.empty(size, device=DEVICE) for size in sizes)
        for parameter in parameters:
            parameter.requires_grad_()
        step = step_of(f"{impl} bf16", OBJECTIVES[objective], x, parameters)
        with Watch() as watch:
            step()
            kernels.clear()
            watch.counts.clear()
            step()
        return {"kernels": kernels, "operators": watch.counts}


def run(only: str = "", seconds: float = 0.0) -> dict[str, Any]:
    """Every shape by both implementations; nothing is timed."""
    rows = []
    for (n, d, f), impl in ((shape, impl) for shape in SHAPES for impl in KERNELS):
        if only in f"{impl}-{n}-{d}-{f}":
            counts = {what: dict(counter) for what, counter in count(impl, n, d, f).items()}
            rows.append({"impl": impl, "n": n, "d": d, "f": f, **counts})
            print(line(rows[-1]), flush=True)
    return {"rows": rows}


def line(row: dict[str, Any]) -> str:
    """One shape by one implementation."""
    return ", ".join(cells(row))


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    kernels, operators = (sum(row[what].values()) for what in ("kernels", "operators"))
    shape = (f"{row[key]:,}" for key in "ndf")
    return [", ".join(shape), row["impl"], str(kernels), str(operators), str(kernels + operators)]


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    header = ["N, d, F", "impl", "kernels", "operators of torch", "starts"]
    return tables.markdown(header, [cells(row) for row in result["rows"]])
