"""Runs that are kept as they end, one JSON file each, so that a command can be taken up again."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bae_fast._version import __version__
from bae_fast.files import read_json, write_json


def once(
    folder: Path, name: str, settings: dict[str, Any], run: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The result of a run: from its file if it was made with the same settings, else made now.

    Args:
        folder: where the files lie; one is called ``<name>-<digest of settings>.json``.
        settings: all that the result depends on, JSON values only; part of the file.
        run: gives the result, JSON values only.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    path = folder / f"{name}-{digest}.json"
    if path.is_file():
        print(f"   {name}: done before", flush=True)
        return read_json(path)
    start = time.perf_counter()
    result = {"settings": settings, **run()}
    result["seconds"] = round(time.perf_counter() - start, 1)
    write_json(path, result)
    print(f"   {name}: {result['seconds']:.0f} s", flush=True)
    return result


def environment() -> dict[str, Any]:
    """What figures depend on besides the settings."""
    return {
        "bae_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
