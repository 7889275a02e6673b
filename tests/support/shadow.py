"""A second checkout in which a text is changed: what tests say of a fault that is put back."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("bae_fast", "bench", "kernels", "csrc", "tests")
FILES = ("pyproject.toml", "setup.py")
# source folders of packages, where an import finds them before those that are installed
LINKS = {
    "bae_fast/kernels": "../kernels/triton",
    "bae_fast/kernels_cuda": "../kernels/cuda",
    "kernels/cuda/source": "../../csrc/cuda",
}


def checkout(folder, changes):
    """Copy this checkout to ``folder`` and change it.

    Args:
        changes: (file, text, what replaces it); each text must be there once.
    """
    for name in FOLDERS:
        left_out = shutil.ignore_patterns("__pycache__", "results", "*.so")
        shutil.copytree(ROOT / name, folder / name, ignore=left_out, symlinks=True)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    for library in (ROOT / "bae_fast").glob("*.so"):
        (folder / "bae_fast" / library.name).symlink_to(library)
    for place, to in LINKS.items():
        (folder / place).symlink_to(to, target_is_directory=True)
    for name, before, after in changes:
        path = folder / name
        text = path.read_text("utf-8")
        assert text.count(before) == 1, f"{name} has {before!r} {text.count(before)} times"
        path.write_text(text.replace(before, after), "utf-8")
    return folder


def failures(root, tests, **variables):
    """Run tests of a checkout in a process of their own.

    Returns:
        What each test that failed says, by its name without parameters; those that could not be
        run say nothing.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(root)} | variables
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-o", "addopts=-p no:logging", "-p",
         "no:cacheprovider", "--junitxml", "found.xml", *tests],
        env=environment, cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = {}
    for case in ElementTree.parse(root / "found.xml").iter("testcase"):
        name = case.get("name").partition("[")[0]
        said = "".join(f"{each.get('message')}\n{each.text}" for each in case.iter("failure"))
        found[name] = found.get(name, "") + said
    return found
