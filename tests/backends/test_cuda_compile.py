"""The CUDA sources compiled for real chips, without a GPU: matrix instructions, no spills.

By nvcc where there is one, else by NVRTC where that is found; both take the same files. A build
that lost its 1-bit instruction or spilled would be many times slower and pass every other test.
"""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bae_fast.ops import registry

ROOT = Path(__file__).resolve().parents[2]
CUDA = registry.BACKENDS["cuda"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CUDA.unavailable is not None, reason=f"impl='cuda' cannot run: {CUDA.unavailable}"
    ),
]

# shared memory that one block may have, bytes
CHIPS = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448}
SOURCES = {"cooccurrence.cu": 4, "sign_product.cu": 2}
REGISTERS = 65536  # of one multiprocessor, whose blocks hold 256 threads together


def tool(name):
    """A tool of the toolkit, or the one that triton brings."""
    found = shutil.which(name)
    if found is None and importlib.util.find_spec("triton") is not None:
        found = importlib.util.find_spec("triton").submodule_search_locations[0]
        found = str(Path(found) / "backends" / "nvidia" / "bin" / name)
    if found is None or not Path(found).exists():
        pytest.skip(f"needs {name}")
    return found


def output(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def by_nvcc(source, chip, target):
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    path = ROOT / "csrc" / "cuda" / source
    return output(
        "nvcc", "-std=c++17", "-cubin", f"-arch={chip}", "-Werror", "all-warnings",
        "-Xptxas", "-v,-warn-spills,-warn-lmem-usage", path, "-o", target,
    )  # fmt: skip


def by_nvrtc(source, chip, target):
    from bae_fast.kernels_cuda import nvrtc

    if nvrtc.missing() is not None:
        pytest.skip(nvrtc.missing())
    target.write_bytes(nvrtc.compile_cubin(source, *nvrtc.read_sources(source), chip))


def kernels_of(cubin):
    """Usage by name, from the compiled file itself."""
    usage = output(tool("cuobjdump"), "-res-usage", cubin)
    rows = {}
    for name, numbers in re.findall(r"Function (\w+):\s*\n\s*(.*)", usage):
        rows[name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
    sass = output(tool("nvdisasm"), "-c", cubin)
    parts = re.split(r"\.text\.(\w+):", sass)
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        rows[name]["sass"] = text
    return rows


def check(rows, n_kernels, chip):
    assert len(rows) == n_kernels, sorted(rows)
    for name, row in rows.items():
        assert row["STACK"] == row["LOCAL"] == 0, (name, row["STACK"], row["LOCAL"])
        assert row["REG"] * 256 <= REGISTERS, (name, row["REG"])
        text = row["sass"]
        assert re.search(r"\bBMMA\.168256\.AND\.POPC\b", text), name
        assert re.search(r"\bLDGSTS\.", text), name
        assert re.search(r"\bLDSM\.16\.M88\.4\b", text), name
        for other in (r"\bIMMA\b", r"\b(?:STL|LDL)\b", r"\b(?:ATOM|RED|ATOMG)\b"):
            assert not re.search(other, text), (name, other)


BY_CHIP = by_nvcc if shutil.which("nvcc") else by_nvrtc


@pytest.mark.parametrize(
    ("compiler", "chip"), [*((BY_CHIP, chip) for chip in CHIPS), (by_nvrtc, "sm_90")]
)
def test_every_kernel_compiles_to_bit_instructions_without_spills(compiler, chip, tmp_path):
    from bae_fast.kernels_cuda.covariance import KERNELS

    found = {}
    for source, n_kernels in SOURCES.items():
        cubin = tmp_path / f"{source}.cubin"
        compiler(source, chip, cubin)
        rows = kernels_of(cubin)
        check(rows, n_kernels, chip)
        found |= dict.fromkeys(rows, source)
    assert found == {kernel.name: kernel.source for kernel in KERNELS}
    assert all(kernel.shared_bytes <= CHIPS[chip] for kernel in KERNELS)


def test_later_chips_take_the_instruction_apart(tmp_path):
    """Why the backend refuses them."""
    by_nvcc("sign_product.cu", "sm_100", tmp_path / "sm_100.cubin")
    for row in kernels_of(tmp_path / "sm_100.cubin").values():
        assert "BMMA" not in row["sass"]
        assert re.search(r"\bIMMA\b", row["sass"])


def test_arguments_are_those_of_the_sources():
    """A launcher's letters against the kernels' parameters, in order."""
    from bae_fast.kernels_cuda.covariance import KERNELS

    folder = ROOT / "csrc" / "cuda"
    text = "".join((folder / source).read_text() for source in SOURCES).replace("\\\n", " ")
    for kernel in KERNELS:
        macro = "name" if kernel.source == "cooccurrence.cu" else kernel.name
        (parameters,) = re.findall(rf"__global__[^;{{]*?\b{macro}\(([^)]*)\)\s*\{{", text)
        letters = "".join(
            "p" if "*" in parameter else "q" if "long long" in parameter else "i"
            for parameter in parameters.split(",")
        )
        assert letters == kernel.arguments, kernel.name


def test_the_checks_can_fail():
    good = {
        "STACK": 0, "LOCAL": 0, "REG": 200,
        "sass": "BMMA.168256.AND.POPC LDGSTS.E.BYPASS LDSM.16.M88.4",
    }  # fmt: skip
    check({"a": good}, 1, "sm_80")
    for change in (
        {"STACK": 8}, {"REG": 257}, {"sass": good["sass"] + " STL [R1]"}, {"sass": "IMMA.16832"},
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            check({"a": good | change}, 1, "sm_80")
