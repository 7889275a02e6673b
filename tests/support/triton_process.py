"""Compilations with triton in a process of their own, by the installed triton or the oldest one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from once import folder_of_run

ROOT = Path(__file__).resolve().parents[2]
# where `make` puts the oldest triton that is supported, alone: torch's CUDA builds come with it
OLDEST = "3.6"
OLDEST_FOLDER = Path(sys.prefix) / f"triton-{OLDEST}"


def cache_of_run(tmp_path_factory, name):
    """Triton's cache for the tests of one file, empty at the start of a run of any processes.

    Not of several files: what one finds compiled, its assembler says nothing about.
    """
    folder = folder_of_run(tmp_path_factory) / f"triton-{name}"
    folder.mkdir(exist_ok=True)
    return folder


def printed(script, *arguments, folder, oldest=False, root=ROOT):
    """The JSON that a script of tests/backends prints; ``folder`` is triton's cache.

    An object that names its triton must name the one that was asked for. ``root`` is the checkout.
    """
    if oldest and not OLDEST_FOLDER.is_dir():
        pytest.skip(f"needs triton {OLDEST} in {OLDEST_FOLDER}: make installs it")
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("BAE_FAST_", "TRITON_"))
    }
    path = [*[str(OLDEST_FOLDER)] * oldest, str(root), str(root / "tests" / "support")]
    environment |= {"PYTHONPATH": os.pathsep.join(path), "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, str(root / "tests" / "backends" / script), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=root,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if oldest:
        assert found["triton"].startswith(OLDEST)
    return found
