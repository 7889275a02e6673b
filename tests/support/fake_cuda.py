"""A CUDA device in name, for programs that would run on one: its tensors lie on the CPU.

What ``torch.cuda`` is asked is answered as an H200 would, by a host that waits for everything.
Tensors that are made on the device, or copied there, say so, and an operator that takes some of
the device and some of the host is refused as torch's CUDA build refuses it. Kernels do not run:
``impl="triton"`` and ``impl="cuda"`` are the operators of ``impl="torch"``.
"""

import contextlib
import dataclasses
import time
import types

import torch
from recorded_graph import RecordedGraph, RecordedGraphs, recording
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CAPABILITY = (9, 0)
MEMORY = 141 * 10**9
DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")

# storages of the device; a weak reference keeps the number from being another's
_storages = {}


def _number(tensor):
    return tensor.untyped_storage()._cdata


def on_device(tensor):
    """Whether a tensor is of the device in name."""
    return _number(tensor) in _storages


def _move(tensor, there):
    if there:
        storage = tensor.untyped_storage()
        _storages[storage._cdata] = StorageWeakRef(storage)
    else:
        _storages.pop(_number(tensor), None)
    if len(_storages) > 5000:
        for number in [n for n, ref in _storages.items() if ref.expired()]:
            del _storages[number]


def _tensors(values):
    return [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]


def _asked(values):
    """Devices among arguments that a caller names: "cuda", "cpu" or neither."""
    found = set()
    for value in pytree.tree_leaves(values):
        if isinstance(value, torch.device):
            found.add(value.type)
        elif isinstance(value, str) and value.partition(":")[0] in ("cuda", "cpu"):
            found.add(value.partition(":")[0])
    return found


def _here(value):
    return CPU if _asked(value) == {"cuda"} else value


# operators between the device and the host
_BETWEEN = {
    "copy_",
    "_to_copy",
    "_foreach_copy_",
    "index",
    "index_put_",
    "_index_put_impl_",
    "copy",
}


class MixedDevicesError(RuntimeError):
    """What torch would say of tensors on two devices."""


class _Places(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        given = _tensors((args, kwargs))
        there = any(on_device(t) for t in given if t.numel() or t.dim())
        if name not in _BETWEEN:
            host = [t for t in given if t.dim() and t.numel() and not on_device(t)]
            if there and host:
                raise MixedDevicesError(
                    f"{name}: expected all tensors on one device; got "
                    f"{[(list(t.shape), str(t.dtype), on_device(t)) for t in given]}"
                )
        result = func(*args, **kwargs)
        if name in ("copy_", "_foreach_copy_"):
            return result
        if there or any(on_device(t) for t in given):
            known = {_number(t) for t in given}
            for t in _tensors(result):
                if _number(t) not in known:
                    _move(t, True)
        return result


def _backward(loss, gradient=None, retain_graph=None, create_graph=False, inputs=None):
    """``Tensor.backward``, which would ask the mode again."""
    assert inputs is None
    gradient = torch.ones_like(loss) if gradient is None else gradient
    _engine_run_backward(
        (loss,), (gradient,), bool(retain_graph or create_graph), create_graph, (),
        allow_unreachable=True, accumulate_grad=True,
    )  # fmt: skip


class _Device(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        # a name is no place, and operators that a recorder calls again name the CPU
        names = (torch.device, torch._C._nn._parse_to)
        if func in names or isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        if func == Tensor.device.__get__:  # made anew whenever it is asked for
            return DEVICE if on_device(args[0]) else CPU
        if func == Tensor.is_cuda.__get__:
            return on_device(args[0])
        if func is Tensor.get_device:
            return 0 if on_device(args[0]) else -1
        if func is Tensor.backward:
            with self:  # a mode is off while it handles a function, and this one calls others
                return _backward(*args, **kwargs)
        asked = _asked((args, kwargs))
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            asked = {"cuda" if on_device(args[1]) else "cpu"}
        if func is Tensor.cuda:
            func, asked = Tensor.clone, {"cuda"}
        if func is Tensor.cpu:
            asked = {"cpu"}
        args, kwargs = pytree.tree_map(_here, (args, kwargs))
        if func is torch.mm and "out_dtype" in kwargs:
            kwargs["out"] = kwargs.get("out")
            wide = kwargs.pop("out_dtype")
            return func(*(t.to(wide) for t in args), **kwargs)
        before = {_number(t): on_device(t) for t in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        if len(asked) == 1:
            there = asked == {"cuda"}

            def placed(t):
                if not isinstance(t, Tensor) or on_device(t) == there:
                    return t
                if _number(t) in before:
                    t = t.clone()
                _move(t, there)
                return t

            result = pytree.tree_map(placed, result)
        return result


class _Event:
    def __init__(self, enable_timing=False):
        self.at = None

    def record(self, stream=None):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


class _Stream:
    cuda_stream = 0

    def wait_stream(self, other):
        pass


class _Guard:
    def __init__(self, device):
        assert torch.device(device).type == "cuda"

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


def _properties(device=None):
    return types.SimpleNamespace(
        name="A device in name", multi_processor_count=132, total_memory=MEMORY,
        L2_cache_size=2**16, major=CAPABILITY[0], minor=CAPABILITY[1],
    )  # fmt: skip


ANSWERS = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "get_device_capability": lambda device=None: CAPABILITY,
    "get_device_properties": _properties,
    "get_device_name": lambda device=None: _properties().name,
    "current_device": lambda: 0,
    "is_bf16_supported": lambda *args: True,
    "device": _Guard,
    "synchronize": lambda device=None: None,
    "Event": _Event,
    "Stream": _Stream,
    "stream": lambda stream: contextlib.nullcontext(),
    "current_stream": lambda device=None: _Stream(),
    "is_current_stream_capturing": lambda: False,
    "CUDAGraph": RecordedGraph,
    "graph": recording,
    "_sleep": lambda cycles: None,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: None,
    "empty_cache": lambda: None,
    "memory_allocated": lambda device=None: 1000,
    "max_memory_allocated": lambda device=None: 5000,
    "reset_peak_memory_stats": lambda device=None: None,
}


class _Graphs(RecordedGraphs):
    def check(self, device):
        assert device.type == "cuda"


def _autocast_here():
    """Autocast of the device is that of the CPU."""
    made, enabled = torch.autocast.__init__, torch.is_autocast_enabled
    dtype = torch.get_autocast_dtype

    def begin(self, device_type, *args, **kwargs):
        made(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    torch.autocast.__init__ = begin
    torch.is_autocast_enabled = lambda kind="cuda": enabled("cpu" if kind == "cuda" else kind)
    torch.get_autocast_dtype = lambda kind: dtype("cpu" if kind == "cuda" else kind)


def use():
    """Let this process have the device, for good."""
    import bae_fast.training.trainer
    from bae_fast.ops import registry

    for name, answer in ANSWERS.items():
        assert hasattr(torch.cuda, name), name
        setattr(torch.cuda, name, answer)
    torch.version.cuda = "13.0"
    _autocast_here()
    bae_fast.training.trainer.CudaGraphs = _Graphs
    for name in ("triton", "cuda"):
        registry.BACKENDS[name] = dataclasses.replace(
            registry.BACKENDS["torch"], name=name, capturable=True, warmup=lambda *args: None
        )
    _Places().__enter__()
    _Device().__enter__()
