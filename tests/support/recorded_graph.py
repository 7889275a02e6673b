"""A stand-in for CUDA graphs on a CPU: operators are recorded once and replayed on the same memory.

As a graph does, it fixes whatever Python computed while it was recorded, and leaves every result
where it was first made. Recording leaves no trace: what it changed is put back.
"""

import contextlib

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def written(func, args, kwargs):
    """Tensors among the arguments that an operator changes."""
    schema = func._schema.arguments
    given = dict(zip((a.name for a in schema), args, strict=False)) | kwargs
    for argument in schema:
        alias = argument.alias_info
        if alias is not None and alias.is_write and argument.name in given:
            yield from (t for t in pytree.tree_leaves(given[argument.name]) if is_tensor(t))


def is_tensor(value):
    return isinstance(value, Tensor)


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.before, self.own = [], {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in written(func, args, kwargs):
            place = tensor.untyped_storage().data_ptr()
            if place not in self.own and place not in self.before:
                whole = tensor.new_empty(0).set_(tensor.untyped_storage())
                self.before[place] = whole, whole.clone()
        result = func(*args, **kwargs)
        made = [t for t in pytree.tree_leaves(result) if is_tensor(t)]
        places = {
            t.untyped_storage().data_ptr()
            for t in pytree.tree_leaves((args, kwargs))
            if is_tensor(t)
        }
        self.own |= {t.untyped_storage().data_ptr() for t in made} - places
        self.calls.append((func, args, kwargs, made))
        return result

    def put_back(self):
        for whole, before in self.before.values():
            whole.copy_(before)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, made in self.calls:
            again = [t for t in pytree.tree_leaves(func(*args, **kwargs)) if is_tensor(t)]
            for old, new in zip(made, again, strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class RecordedGraph:
    """In place of torch.cuda.CUDAGraph, with :func:`recording` in place of torch.cuda.graph."""

    replay = None


@contextlib.contextmanager
def recording(graph, stream=None, capture_error_mode="global"):
    """Record what is done inside, once, and put back what it changed."""
    recorder = _Recorder()
    with recorder:
        yield
    recorder.put_back()
    graph.replay = recorder.replay


class RecordedGraphs:
    """How :class:`bae_fast.training.CapturedStep` captures on a CPU."""

    def __init__(self):
        self.replays = 0
        self.aside_calls = 0

    def check(self, device):
        assert device.type == "cpu"

    @contextlib.contextmanager
    def aside(self):
        self.aside_calls += 1
        yield

    def capture(self, run):
        graph = RecordedGraph()
        with recording(graph):
            run()

        def replay():
            self.replays += 1
            graph.replay()

        return replay
