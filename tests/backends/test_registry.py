"""Backends register themselves; the registry knows none."""

import dataclasses
from pathlib import Path

import pytest

import bae_fast.backends
from bae_fast.ops import registry, schemas


def test_every_folder_of_backends_is_registered_under_its_own_name():
    folders = {p.parent.name for p in Path(bae_fast.backends.__path__[0]).glob("*/__init__.py")}
    assert registry.BACKENDS.keys() == folders
    assert all(backend.name == name for name, backend in registry.BACKENDS.items())


def test_a_backend_that_runs_has_every_operator_and_one_that_does_not_says_why():
    for backend in registry.BACKENDS.values():
        if backend.unavailable is None:
            assert backend.ops.keys() == schemas.SCHEMAS.keys()
        else:
            assert backend.unavailable
            assert backend.ops == {}


def test_a_name_is_taken_once_and_is_a_value_of_impl():
    backend = registry.BACKENDS["torch"]
    with pytest.raises(ValueError, match="'torch' must be registered once"):
        registry.register(backend)
    with pytest.raises(ValueError, match="must be one of torch, cpp, triton, cuda; got 'other'"):
        registry.register(dataclasses.replace(backend, name="other"))
    assert "other" not in registry.BACKENDS
