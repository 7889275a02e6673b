"""impl="triton" without a GPU: when it says it cannot run, and its tests in the interpreter.

The folder ``interpreted`` holds the tests of the kernels; they run in a process of their own with
TRITON_INTERPRET=1. ``test_triton_compile.py`` compiles every kernel for real chips.
"""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch

import bae_fast as bf
from bae_fast.ops import registry

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = [
    str(path)
    for path in sorted((ROOT / "tests" / "backends" / "interpreted").glob("*.py"))
    if path.name != "conftest.py"
]
TRITON = registry.BACKENDS["triton"]
needs_triton = pytest.mark.skipif(
    TRITON.unavailable is not None, reason=f"impl='triton' cannot run: {TRITON.unavailable}"
)


def version_of(package):
    """Major and minor; (0, 0) of what is not installed."""
    try:
        return tuple(map(int, importlib.metadata.version(package).split(".")[:2]))
    except importlib.metadata.PackageNotFoundError:
        return (0, 0)


needs_interpreter = pytest.mark.skipif(
    version_of("triton") < (3, 7) and version_of("numpy") >= (2, 5),
    reason="Triton 3.6's interpreter makes an int of an array, which NumPy refuses from 2.5 on",
)


def bare():
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith(("BAE_FAST_", "TRITON_"))},
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


def process(*command, **variables):
    """Run python in a process that sees the repository and no choice of backend."""
    environment = bare() | variables
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        check=False,
    )


def in_the_interpreter(*arguments):
    """Tests in a process of their own with Triton's interpreter."""
    done = process(
        "-m", "pytest", *arguments, "-x", "-o", "addopts=-p no:logging", "-p", "no:cacheprovider",
        TRITON_INTERPRET="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d{2,} passed", done.stdout)
    assert "skipped" not in done.stdout


@needs_triton
@needs_interpreter
@pytest.mark.slow
def test_the_kernels_in_the_interpreter():
    in_the_interpreter(*INTERPRETED, "-m", "not long")


@needs_triton
@needs_interpreter
@pytest.mark.long
@pytest.mark.slow
def test_every_kind_of_step_in_the_interpreter():
    in_the_interpreter(*INTERPRETED, "-m", "long")


@needs_triton
@pytest.mark.long
@pytest.mark.slow
def test_its_operators_pass_opcheck_in_the_interpreter():
    in_the_interpreter("tests/layer/test_compile.py", "-k", "triton")


def test_it_says_why_it_cannot_serve_a_cpu():
    if importlib.util.find_spec("triton") is None:
        assert "triton is not installed" in TRITON.unavailable
    x, W, b = torch.zeros(2, 3), torch.zeros(3, 4), torch.zeros(4)
    with pytest.raises(bf.BackendUnavailableError, match=r"impl='triton' cannot serve .*cpu"):
        bf.encode(x, W, b, impl="triton")
    assert bf.info()["backends"]["triton"] != "available" or torch.cuda.is_available()


@needs_triton
@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (registry.Request("cpu", torch.float32), "runs on CUDA devices"),
        (registry.Request("cuda", torch.float64), "float32, bfloat16 and float16; got"),
        (registry.Request("cuda", torch.float32), "torch sees no CUDA device"),
        (registry.Request("cuda", torch.float32, 62, 31), "up to 30 bits a feature; got 31"),
    ],
)
def test_every_reason_against_a_request_is_said(request_, reason):
    if "CUDA device" in reason and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert any(reason in text for text in registry.reasons_against("triton", request_))


# each begins in a process that has imported torch, and neither this package nor triton
PROGRAMS = {
    "the first call": """
os.environ["TRITON_INTERPRET"] = "1"
assert not {"triton", "bae_fast"} & set(sys.modules)
import bae_fast as bf
bf.info()
assert "triton" not in sys.modules
code = bf.encode(torch.ones(2, 3), torch.ones(3, 4), torch.zeros(4), impl="triton")
assert "triton" in sys.modules
print(code.to_dense().all().item())
""",
    "without the package": """
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "triton":
            raise ImportError("blocked")

sys.meta_path.insert(0, Blocked())
import bae_fast as bf
print(bf.info()["backends"]["triton"])
""",
}


@pytest.fixture(scope="module")
def printed():
    """What each of the programs prints."""
    return dict(zip(PROGRAMS, processes.forked(*PROGRAMS.values(), env=bare()), strict=True))


@needs_triton
def test_triton_is_imported_by_the_first_call_and_not_before(printed):
    assert printed["the first call"] == "True"


@needs_triton
def test_without_the_package_the_reason_is_its_absence(printed):
    assert "the package triton is not installed" in printed["without the package"]
