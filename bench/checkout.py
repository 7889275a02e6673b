"""The kernels of a plain checkout, where the package is not installed.

Installed or editable, ``pyproject.toml`` says which source folder is which package. On a machine
where nothing can be installed, :func:`use` says the same, behind whatever is installed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "bae_fast.kernels": "kernels/triton",
    "bae_fast.kernels_cuda": "kernels/cuda",
    "bae_fast.kernels_cuda.source": "csrc/cuda",
}


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        folder = PACKAGES.get(name)
        if folder is None:
            return None
        place = ROOT / folder
        return importlib.util.spec_from_file_location(
            name, place / "__init__.py", submodule_search_locations=[str(place)]
        )


def use() -> None:
    """Let this process find the kernels; before bae_fast is imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
