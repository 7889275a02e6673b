"""Tests of impl="triton" in Triton's interpreter, on CPU tensors; run by ``test_triton.py``.

In a process of their own, for TRITON_INTERPRET has to be set before triton is imported: so no file
here has a name that pytest would collect by itself.
"""

import pytest


@pytest.fixture(scope="session", autouse=True)
def faster():
    from fast_interpreter import faster

    with faster():
        yield


@pytest.fixture
def watched(monkeypatch):
    """For sizes at which a number could leave int32."""
    from fast_interpreter import overflow_is_watched

    overflow_is_watched(monkeypatch, True)
