"""A checkout in which nothing is installed."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

from bench import checkout
from bench.checkout import ROOT

PLAIN = """
import sys
if sys.argv[1] == "bench":
    import bench
from bae_fast.ops import registry
print(registry.BACKENDS["triton"].unavailable, registry.BACKENDS["cuda"].unavailable)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which kernels import"
)
@pytest.mark.long
@pytest.mark.slow
def test_kernels_are_found_in_a_plain_checkout(tmp_path):
    """Without the installed package: site's hooks off, the libraries' folder on the path."""
    for folder in ("bae_fast", "bench", *checkout.PACKAGES.values()):
        shutil.copytree(
            ROOT / folder, tmp_path / folder,
            ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"), dirs_exist_ok=True,
        )  # fmt: skip
    libraries = {str(Path(m.__file__).parent.parent) for m in (torch, np, safetensors)}
    libraries.add(str(Path(importlib.util.find_spec("triton").origin).parent.parent))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sorted(libraries)])

    def said(what):
        done = subprocess.run(
            [sys.executable, "-S", "-c", PLAIN, what], env=environment, cwd=tmp_path,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "kernels are not installed" in said("nothing")
    assert said("bench").strip() == "None None"


def test_the_folders_of_kernels_are_those_of_the_package():
    tomllib = pytest.importorskip("tomllib")
    with open(ROOT / "pyproject.toml", "rb") as file:
        folders = tomllib.load(file)["tool"]["setuptools"]["package-dir"]
    assert {k: v for k, v in folders.items() if k != "bae_fast"} == checkout.PACKAGES
