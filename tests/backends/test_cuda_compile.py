"""The CUDA sources compiled for real chips, without a GPU: matrix instructions, no spills.

By nvcc where there is one, else by NVRTC where that is found; both take the same files. A build
that lost its 1-bit instruction or spilled would be many times slower and pass every other test.
"""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import machine_code
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
    path = source if Path(source).is_absolute() else ROOT / "csrc" / "cuda" / source
    said = output(
        "nvcc", "-std=c++17", "-cubin", f"-arch={chip}", "-Werror", "all-warnings",
        "-Xptxas", "-v,-warn-spills,-warn-lmem-usage", path, "-o", target,
        f"-I{ROOT}/csrc/cuda",
    )  # fmt: skip
    assert machine_code.serialized(said) == []
    return said


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


# instructions of a stage of 512 bits beside the 1-bit products, of each kernel
BESIDE = {"product": 270, "": 185}


def loop_of(sass):
    """Instructions of the shortest loop that holds 1-bit products."""
    found, labels = [], {}
    for line in sass.split("\n"):
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label.group(1)] = len(found)
        match = re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        found += [match.group(1)] if match else []
    loops = []
    for at, text in enumerate(found):
        back = re.search(r"BRA.*`\((\.L_x_\d+)\)", text)
        if back and labels.get(back.group(1), at + 1) <= at:
            loops.append(found[labels[back.group(1)] : at + 1])
    return min((loop for loop in loops if any("BMMA" in x for x in loop)), key=len)


def check_loop(name, sass):
    """Addresses are made before the loop: what runs beside its products is little."""
    loop = loop_of(sass)
    beside = sum("BMMA" not in text for text in loop)
    assert beside <= BESIDE["product" * name.endswith("_product")], (name, beside, len(loop))


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
    ("compiler", "chip"),
    [
        (by_nvrtc, "sm_90"),
        *(pytest.param(BY_CHIP, f"sm_{n}", marks=pytest.mark.long) for n in (80, 86, 89)),
        *([pytest.param(by_nvcc, "sm_90", marks=pytest.mark.long)] * (BY_CHIP is by_nvcc)),
    ],
)
def test_every_kernel_compiles_to_bit_instructions_without_spills(compiler, chip, tmp_path):
    from bae_fast.kernels_cuda.covariance import KERNELS

    found = {}
    for source, n_kernels in SOURCES.items():
        cubin = tmp_path / f"{source}.cubin"
        compiler(source, chip, cubin)
        rows = kernels_of(cubin)
        check(rows, n_kernels, chip)
        for name, row in rows.items():
            check_loop(name, row["sass"])
        found |= dict.fromkeys(rows, source)
    assert found == {kernel.name: kernel.source for kernel in KERNELS}
    assert all(kernel.shared_bytes <= CHIPS[chip] for kernel in KERNELS)


class Panels(NamedTuple):
    """The kernel that multiplies in a source for sm_90a.

    Attributes:
        products: of a stage of 1024 bits.
        stage: most instructions from the first to the last of them, they included.
    """

    kernel: str
    products: int
    stage: int


PANELS = {
    "panels.cu": Panels("panel_covariance", 8, 110),
    "sign_panels.cu": Panels("sign_panel_product", 16, 220),
}


@pytest.mark.parametrize("source", PANELS)
@pytest.mark.parametrize(
    "compiler",
    [by_nvrtc, *([pytest.param(by_nvcc, marks=pytest.mark.long)] * (BY_CHIP is by_nvcc))],
)
def test_panels_compile_to_asynchronous_products_that_follow_one_another(
    compiler, source, tmp_path
):
    """Products of a stage with nothing that waits between them; what by_nvcc says besides."""
    from bae_fast.kernels_cuda.covariance import PANEL_KERNELS

    compiler(source, "sm_90a", tmp_path / "panels.cubin")
    rows = kernels_of(tmp_path / "panels.cubin")
    assert rows.keys() == {kernel.name for kernel in PANEL_KERNELS if kernel.source == source}
    check_panels(rows, PANELS[source])
    assert {kernel.source for kernel in PANEL_KERNELS} == PANELS.keys()
    assert all(kernel.shared_bytes <= CHIPS["sm_90"] for kernel in PANEL_KERNELS)


def check_panels(rows, panels):
    for name, row in rows.items():
        assert row["STACK"] == row["LOCAL"] == 0, name
        assert not re.search(r"\b(?:STL|LDL|ATOM|RED|ATOMG)\b", row["sass"]), name
    row = rows[panels.kernel]
    text = row["sass"]
    assert row["REG"] * 384 <= REGISTERS
    # all m64n128k256, sums in place, operands by descriptors
    products = re.findall(r"\bBGMMA\.64x128x256\.AND\.POPC R(\d+), gdesc\[UR\d+\], R\1\b", text)
    assert len(products) == len(re.findall("GMMA", text)) == panels.products
    assert len(set(products)) == 2
    first, last = text.index("BGMMA"), text.rindex("BGMMA")
    assert "WARPGROUP" not in text[first:last]
    assert text[first:last].count(";") <= panels.stage
    assert len(re.findall(r"\bWARPGROUP\.ARRIVE\b", text)) == 1
    assert re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d)", text) == ["0x1", "0x0"]
    assert len(re.findall(r"\bUBLKCP\b", text)) == 2
    # 40 registers for who copies, 232 for who multiplies: 168 for each at the start
    assert re.search(r"USETMAXREG\.DEALLOC\S* 0x28\b", text)
    assert re.search(r"USETMAXREG\.TRY_ALLOC\S* \S+ 0xe8\b", text)


@pytest.mark.long
@pytest.mark.parametrize("name", PANELS)
def test_without_the_fence_the_products_of_panels_are_found_to_wait(name, tmp_path):
    """What the check of the machine code and the assembler's notes are for."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    text = (ROOT / "csrc" / "cuda" / name).read_text()
    source = tmp_path / name
    source.write_text(text.replace("fence_products();", "wait_products<0>();"))
    assert source.read_text() != text
    said = output(
        "nvcc", "-std=c++17", "-cubin", "-arch=sm_90a", f"-I{ROOT}/csrc/cuda", source,
        "-o", tmp_path / "panels.cubin",
    )  # fmt: skip
    rows = kernels_of(tmp_path / "panels.cubin")
    with pytest.raises(AssertionError):
        check_panels(rows, PANELS[name])
    assert machine_code.serialized(said), said


def test_the_loop_that_measures_the_rate_is_nothing_but_the_instruction(tmp_path):
    """bench/device/ceilings.py measures with it: memory is not touched between the products."""
    BY_CHIP(str(ROOT / "bench" / "device" / "rate.cu"), "sm_90", tmp_path / "rate.cubin")
    (row,) = kernels_of(tmp_path / "rate.cubin").values()
    assert row["STACK"] == row["LOCAL"] == 0
    loop = row["sass"].split("BMMA", 1)[1].rsplit("BMMA", 1)[0]
    assert row["sass"].count("BMMA") >= 8
    assert not re.search(r"\b(?:LD\w*|ST\w*|BAR)\.", loop)


# a product of one warpgroup without the fence that its registers need
UNFENCED = """
extern "C" __global__ void product(float* out, unsigned long long a, unsigned long long b) {
  float c[4] = {};
  for (int turn = 0; turn < 4; ++turn) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, 1, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3}, %4, %5, p, 1, 1, 0, 0; }"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "l"(a), "l"(b));
    c[0] += out[turn];
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  out[threadIdx.x] = c[0] + c[1] + c[2] + c[3];
}
"""


def test_a_product_that_the_assembler_serializes_is_found(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    (tmp_path / "product.cu").write_text(UNFENCED)
    said = output(
        "nvcc", "-cubin", "-gencode=arch=compute_90a,code=sm_90a", tmp_path / "product.cu",
        "-o", tmp_path / "product.cubin",
    )  # fmt: skip
    assert machine_code.serialized(said), said


def test_later_chips_take_the_instruction_apart(tmp_path):
    """Why the backend refuses them."""
    by_nvcc("sign_product.cu", "sm_100", tmp_path / "sm_100.cubin")
    for row in kernels_of(tmp_path / "sm_100.cubin").values():
        assert "BMMA" not in row["sass"]
        assert re.search(r"\bIMMA\b", row["sass"])


def test_arguments_are_those_of_the_sources():
    """A launcher's letters against the kernels' parameters, in order."""
    from bae_fast.kernels_cuda.covariance import KERNELS, PANEL_KERNELS

    folder = ROOT / "csrc" / "cuda"
    sources = (*SOURCES, *PANELS)
    text = "".join((folder / source).read_text() for source in sources).replace("\\\n", " ")
    for kernel in (*KERNELS, *PANEL_KERNELS):
        macro = "name" if kernel.source == "cooccurrence.cu" else kernel.name
        (parameters,) = re.findall(rf"__global__[^;{{]*?\b{macro}\(([^)]*)\)\s*\{{", text)
        letters = "".join(
            ("l" if "long long" in parameter else "f" if "float" in parameter else "p")
            if "*" in parameter
            else ("q" if "long long" in parameter else "i")
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
