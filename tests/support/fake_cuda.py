"""A CUDA device in name, for programs that would run on one: its tensors lie on the CPU.

What ``torch.cuda`` is asked is answered as an H200 would, by a host that waits for everything.
Kernels do not run: ``impl="triton"`` and ``impl="cuda"`` are the operators of ``impl="torch"``.
"""

import contextlib
import dataclasses
import time
import types

import torch
from recorded_graph import RecordedGraph, RecordedGraphs, recording
from torch.overrides import TorchFunctionMode
from torch.utils import _device
from torch.utils import _pytree as pytree

CAPABILITY = (9, 0)
MEMORY = 141 * 10**9


def _here(value):
    named = isinstance(value, str) and value.partition(":")[0] == "cuda"
    if named or (isinstance(value, torch.device) and value.type == "cuda"):
        return torch.device("cpu")
    return value


class _OnCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is not torch.device:  # a name is no place
            args, kwargs = pytree.tree_map(_here, (args, kwargs))
        return func(*args, **kwargs)


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


class _Device:
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
    "device": _Device,
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
        pass


def use():
    """Let this process have the device, for good."""
    import bae_fast.training.trainer
    from bae_fast.ops import registry

    for name, answer in ANSWERS.items():
        assert hasattr(torch.cuda, name), name
        setattr(torch.cuda, name, answer)
    torch.version.cuda = "13.0"
    made = _device.DeviceContext.__init__
    _device.DeviceContext.__init__ = lambda self, device: made(self, _here(device))
    bae_fast.training.trainer.CudaGraphs = _Graphs
    for name in ("triton", "cuda"):
        registry.BACKENDS[name] = dataclasses.replace(
            registry.BACKENDS["torch"], name=name, capturable=True, warmup=lambda *args: None
        )
    _OnCpu().__enter__()
