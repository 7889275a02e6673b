"""One row of the table of versions: a wheel in a new environment, tested outside the checkout.

    python -m bench.versions --python python3.12 --torch 2.12.1 --triton 3.7.1

The row goes into ``bench/results/versions.json`` and the table into docs/install.md. The wheel is
built once, by the Python that runs this, unless ``--wheel`` names one. torch comes as pip chooses
it; ``--pip "--index-url ..."`` chooses otherwise. With ``--pip=--no-deps`` nothing of CUDA is
installed, and a CUDA build of torch then finds its libraries by ``LD_LIBRARY_PATH``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bae_fast.files import read_json, write_json, write_text
from bench import tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
FILE = "versions.json"
TESTS = {
    "values": "tests/layer/test_exactness.py",
    "compile": "tests/layer/test_compile.py",
    "kernels": "tests/backends/test_cpp.py",
    "trainer": "tests/training/test_training.py",
}
TRITON_TESTS = "tests/backends/test_triton_compile.py"
# what the tests read besides the installed package
READ = ("tests", "csrc", "pyproject.toml")
HEADER = [
    "Python",
    "PyTorch",
    "Triton",
    "NumPy",
    "tests of",
    "passed",
    "failed",
    "skipped",
    "tried",
]

# printed by the new environment; torch's requirements without those of a GPU
ASKS = """
import importlib.metadata as m, json
asked = m.requires("torch") or []
gpu = ("nvidia", "cuda", "triton", "pytorch-triton")
print(json.dumps([r for r in asked if "extra ==" not in r and not r.lower().startswith(gpu)]))
"""
FOUND = """
import importlib.metadata as m, json, platform
names = ("torch", "triton", "numpy")
have = {d.metadata["Name"].lower() for d in m.distributions()}
found = {n: m.version(n) for n in names if n in have}
import torch
found["torch"] = torch.__version__
print(json.dumps({"python": platform.python_version(), **found}))
"""


def run(command: list[str], folder: Path, *, may_fail: bool = False) -> str:
    """What a command prints, without the variables that lend it the checkout.

    Raises:
        RuntimeError: it failed; the message ends with what it printed.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("BAE_FAST_", "PYTHON"))}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode and not may_fail:
        said = (done.stdout + done.stderr)[-2000:]
        raise RuntimeError(f"{shlex.join(command)} failed:\n{said}")
    return done.stdout


def build(folder: Path) -> Path:
    """A wheel of this checkout, in ``folder``."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), "."]
    run(command, ROOT)
    (wheel,) = folder.glob("*.whl")
    return wheel


def counts(report: Path) -> dict[str, int]:
    """Tests that passed, failed and were skipped, from pytest's file of JUnit's format."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))

    def total(*names: str) -> int:
        return sum(int(suite.get(name, "0")) for suite in suites for name in names)

    failed, skipped = total("failures", "errors"), total("skipped")
    return {"passed": total("tests") - failed - skipped, "failed": failed, "skipped": skipped}


def row(
    python: str,
    torch: str,
    triton: str | None,
    wheel: Path,
    options: list[str],
    tests: list[str],
    folder: Path,
) -> dict[str, Any]:
    """Make an environment in ``folder``, install, test; what came of it.

    Raises:
        RuntimeError: something could not be installed, or the smoke test failed.
    """
    run([python, "-m", "venv", str(folder / "venv")], folder)
    own = str(folder / "venv" / "bin" / "python")
    pip = [own, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    run([*pip, *options, f"torch=={torch}"], folder)
    asked = json.loads(run([own, "-c", ASKS], folder))
    run([*pip, *asked, "numpy>=1.26", "safetensors>=0.5", "pytest", "hypothesis"], folder)
    if triton:
        run([*pip, "--no-deps", f"triton=={triton}"], folder)
    run([*pip, "--no-deps", str(wheel)], folder)

    run([own, str(ROOT / ".ci" / "smoke.py"), "kernels"], folder)
    # the checkout's tests, where its package cannot be found
    tree = folder / "tree"
    tree.mkdir()
    for name in READ:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    report = folder / "report.xml"
    command = [own, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += ["-o", "addopts=-q", "-m", "not long and not matrix"]
    files = [TESTS[name] for name in tests] + [TRITON_TESTS] * bool(triton)
    said = run([*command, *files], tree, may_fail=True)
    if not report.is_file():
        raise RuntimeError(f"the tests did not run:\n{said[-2000:]}")
    found = counts(report)
    if found["failed"]:
        print(said[-4000:], file=sys.stderr)
    return {
        **json.loads(run([own, "-c", FOUND], folder)),
        "wheel": wheel.name,
        "machine": platform.machine(),
        "tests": [*tests, *["Triton"] * bool(triton)],
        **found,
        "date": datetime.date.today().isoformat(),
    }


def _order(entry: dict[str, Any]) -> list[tuple[int, ...]]:
    def numbers(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdigit())

    return [numbers(entry.get(name, "0")) for name in ("python", "torch", "triton")]


def kept(path: Path, new: dict[str, Any]) -> dict[str, Any]:
    """The rows of a file with this one among them, in place of an older try of the same."""
    rows = read_json(path)["rows"] if path.is_file() else []
    rows = [old for old in rows if _order(old) != _order(new)]
    return {"rows": sorted([*rows, new], key=_order)}


def table(result: dict[str, Any]) -> str:
    """Python, torch, Triton, NumPy, tests and the day."""
    lines = [
        [
            entry["python"],
            entry["torch"],
            entry.get("triton", "none"),
            entry["numpy"],
            ", ".join(entry["tests"]),
            *(f"{entry[name]:,}" for name in ("passed", "failed", "skipped")),
            entry["date"],
        ]
        for entry in result["rows"]
    ]
    return tables.markdown(HEADER, lines)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 1 where a test failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.versions", description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="The Python that is tried.")
    parser.add_argument("--torch", required=True, help="The version of torch that is tried.")
    parser.add_argument("--triton", help="The version of Triton that is tried (none).")
    parser.add_argument("--wheel", type=Path, help="A wheel with kernels that is built already.")
    parser.add_argument(
        "--pip", default="", help="The options of pip for the installation of torch."
    )
    parser.add_argument(
        "--tests",
        nargs="+",
        choices=TESTS,
        default=list(TESTS),
        help="The tests that run (all); with Triton its kernels are compiled too.",
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            wheel = options.wheel.resolve() if options.wheel else build(folder)
            found = row(
                options.python,
                options.torch,
                options.triton,
                wheel,
                shlex.split(options.pip),
                options.tests,
                folder,
            )
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    result = kept(RESULTS / FILE, found)
    write_json(RESULTS / FILE, result)
    page = ROOT / "docs" / "install.md"
    text = page.read_text(encoding="utf-8")
    write_text(page, tables.splice(text, "versions", table(result)))
    print(table({"rows": [found]}))
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
