"""Shared fixtures: a fixed seed, one thread, no environment that changes the choice of backend.

torch is imported where it is used: the process that hands out tests to others reads this file too,
and starts them that much sooner.
"""

import atexit
import functools
import gc
import importlib.util
import io
import os
import signal
import sys

import pytest

# A run under nohup ignores it, and so would the commands under test.
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@atexit.register
def _last_words():
    """Triton's binding lists what was not freed when its process ends, whatever the tests did.

    torch's compiler imports it. All of pytest's output came before: what is written to standard
    error from here on is dropped.
    """
    if "triton._C.libtriton" in sys.modules:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


@functools.cache
def _seed_everywhere():
    """``torch.manual_seed``, or the same for the CPU alone where there is no other device.

    For each kind of device that has not been started torch keeps the whole stack of the caller,
    which takes more time than most tests.
    """
    import torch

    if torch.accelerator.is_available():
        return torch.manual_seed
    return torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def _same_start(monkeypatch):
    import torch

    for name in (
        "BAE_FAST_IMPL",
        "BAE_FAST_SCRATCH_MB",
        "BAE_FAST_SIGN_PLANES_MB",
        "BAE_FAST_CUDA_PAIRS",
        "BAE_FAST_CUDA_SIGNS",
    ):
        monkeypatch.delenv(name, raising=False)
    _seed_everywhere()(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Files with slow tests first: what the processes share out at the end is short."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@functools.cache
def _a_dot():
    """The smallest picture, as the contents of a PNG file."""
    from matplotlib.figure import Figure

    file = io.BytesIO()
    Figure(figsize=(0.01, 0.01)).savefig(file, format="png")
    return file.getvalue()


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are built and not drawn: that takes seconds a run, and test_report.py does it."""
    if importlib.util.find_spec("matplotlib") is not None:
        dot = _a_dot()
        monkeypatch.setattr(
            "matplotlib.figure.Figure.savefig", lambda _, file, **__: file.write(dot)
        )


def pytest_collection_finish():
    """What is there by now stays: the garbage collector need not visit it again and again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device; torch sees none")


def _cost_of_lists(monkeypatch, cost):
    from bae_fast.backends.cpp import covariance
    from bae_fast.backends.torch import pair_lists

    monkeypatch.setattr(covariance, "LIST_COST", dict.fromkeys(covariance.LIST_COST, cost))
    monkeypatch.setattr(pair_lists, "LIST_COST", cost)


@pytest.fixture
def by_bits(monkeypatch):
    """The covariance by products of bits, whatever the codes: lists would serve the sparse ones."""
    _cost_of_lists(monkeypatch, float("inf"))


@pytest.fixture
def by_lists(monkeypatch):
    """The covariance by lists of ones, on every level's machine, where a code is at all sparse."""
    _cost_of_lists(monkeypatch, 1.0)
