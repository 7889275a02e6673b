"""The compiled objects: what instructions they hold, and that kernels keep to their memory.

The extension is built twice in a temporary folder by setup.py itself, as it ships and with
sanitizers; tests/backends/csrc/kernels_driver.cpp runs the kernels of both builds without torch,
and those for ARM under an emulator, against plain loops.
"""

import fcntl
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from test_cpp import levels

ROOT = Path(__file__).resolve().parents[2]
DRIVER = ROOT / "tests" / "backends" / "csrc" / "kernels_driver.cpp"
CXX = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
SANITIZE = "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all"
# ends by a signal, so that the driver names the case
STOP = {
    "ASAN_OPTIONS": "abort_on_error=1:detect_leaks=0",
    "UBSAN_OPTIONS": "abort_on_error=1:print_stacktrace=1",
}

spec = importlib.util.spec_from_file_location("bae_fast_setup", ROOT / "setup.py")
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)

needs_x86 = pytest.mark.skipif(
    "kernels_avx2" not in setup.KERNELS, reason=f"no x86-64 machine: {setup.MACHINE}"
)


def run(*command, **environment):
    """Run a command; fails the test with what it wrote where it does not end with 0."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        tail = (done.stdout[-1000:] + done.stderr[-3000:]).strip()
        pytest.fail(f"{command[0]} ended with {done.returncode}: {tail}", pytrace=False)
    return done.stdout


def build(folder, *options, **environment):
    """Everything that setup.py compiles, folder/bae_fast/_C.abi3.so at the end."""
    if shutil.which(shlex.split(CXX)[0]) is None:
        pytest.skip(f"needs the C++ compiler {CXX}")
    command = (sys.executable, "setup.py", "build_ext", "--build-lib", folder, *options)
    written = run(*command, BAE_FAST_BUILD_EXT="1", **environment)
    assert (folder / "bae_fast" / "_C.abi3.so").exists(), written[-3000:]
    return folder


@pytest.fixture(scope="session")
def shipped(tmp_path_factory):
    """The objects that are installed, in folder/csrc: ninja compiles those that are old."""
    folder = tmp_path_factory.mktemp("shipped")
    kept = ROOT / "build" / f"objects-{sys.implementation.cache_tag}"
    if setup.find_ninja() is None:
        return build(folder, "--build-temp", folder)
    kept.mkdir(parents=True, exist_ok=True)
    with (kept / "lock").open("w") as lock:  # the suite's processes share the folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        build(folder)
        shutil.copytree(kept / "csrc", folder / "csrc")
    return folder


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory):
    if not runtime("libasan.so"):
        pytest.skip(f"needs libasan.so of {CXX}")
    folder = tmp_path_factory.mktemp("sanitized")
    # what comes last wins over setup.py's -O3, which takes five times as long to compile and
    # leaves fewer accesses to watch
    compiler = folder / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {CXX} "$@" {SANITIZE} -O1\n')
    compiler.chmod(0o755)
    return build(folder, "--build-temp", folder, CXX=str(compiler))


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """The driver's object: the same for all builds, since only kernels are under test."""
    target = tmp_path_factory.mktemp("driver") / "driver.o"
    # the plain loops in vectors, and the rest compiled in a third of the time of -O3
    flags = ("-std=c++17", "-O1", "-ftree-vectorize", "-Wall", "-Wextra", "-Werror", "-Icsrc")
    run(*shlex.split(CXX), *flags, "-c", DRIVER, "-o", target)
    return target


def runtime(name):
    """The path of a library of the compiler, or ""."""
    if shutil.which(shlex.split(CXX)[0]) is None:
        return ""
    found = run(*shlex.split(CXX), f"-print-file-name={name}").strip()
    return found if os.path.isabs(found) else ""


def link(objects, driver, *flags):
    target = objects / "driver"
    kernels = [objects / "csrc" / f"{name}.o" for name in setup.KERNELS]
    run(*shlex.split(CXX), *flags, driver, *kernels, "-o", target)
    return target


# -- against plain loops -----------------------------------------------------------------------


def test_kernels_equal_plain_loops_and_touch_nothing_beside_their_buffers(shipped, driver):
    """Pages that fault, behind the buffers and before them: what every level reads and writes, AMX
    tiles included. One process does both: what the plain loops say is the same."""
    done = run(link(shipped, driver), "back,front", *levels())
    found = re.findall(r"(\w+): \d{4,} cases", done)
    assert set(found) >= {"scalar", *levels()}
    assert all(found.count(name) == 2 for name in found)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.xdist_group("sanitized")
def test_kernels_run_clean_under_sanitizers(sanitized, driver):
    """Overflow, shifts, alignment, and the heap: scratch and tensors end with their block.

    AddressSanitizer sees neither loads and stores of AMX tiles nor masked ones of AVX-512, which
    the compiler leaves uninstrumented: for those the test with pages above counts.
    """
    done = run(link(sanitized, driver, *SANITIZE.split()), "heap", *levels(), **STOP)
    assert set(re.findall(r"(\w+): \d{4,} cases", done)) >= {"scalar", *levels()}


@pytest.mark.xdist_group("sanitized")
@pytest.mark.parametrize(
    "level",
    [
        pytest.param("scalar", marks=pytest.mark.matrix),
        *(pytest.param(name, marks=pytest.mark.long) for name in levels()[-1:] if name != "scalar"),
    ],
)
def test_operators_run_clean_under_sanitizers(sanitized, tmp_path, level):
    """The operators' own allocations, results and scratch, which guard pages do not reach."""
    shutil.copytree(ROOT / "bae_fast", tmp_path / "bae_fast", ignore=shutil.ignore_patterns("*.so"))
    shutil.copy(sanitized / "bae_fast" / "_C.abi3.so", tmp_path / "bae_fast")
    done = run(
        sys.executable,
        ROOT / "tests" / "support" / "guard_pages.py",
        "heap",
        PYTHONPATH=str(tmp_path),
        LD_PRELOAD=runtime("libasan.so"),
        BAE_FAST_SIMD=level,
        **STOP,
    )
    assert done.endswith("done\n")


@pytest.mark.long
def test_neon_kernels_equal_plain_loops_under_an_emulator(tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
    target = tmp_path / "driver"
    sources = [f"csrc/{name}.cpp" for name in ("dispatch", "kernels_scalar", "kernels_neon")]
    flags = (*setup.FLAGS, "-Werror", "-static", "-Icsrc")
    run(compiler, *flags, *sources, DRIVER, "-o", target)
    assert re.fullmatch(r"neon: \d{4,} cases\n", run(emulator, target, "back", "neon"))


# -- operators without torch -------------------------------------------------------------------

REPLAY = ROOT / "tests" / "backends" / "csrc" / "operators_replay.cpp"
REPLAY_FLAGS = (
    "-Icsrc",
    f"-I{sysconfig.get_path('include')}",
    f"-DPy_LIMITED_API={setup.PYTHON_TARGET_VERSION}",
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Calls of every operator with the results that the scalar kernels give on this machine, which
    test_cpp_memory.py and the tests of the layer hold against torch."""
    file = tmp_path_factory.mktemp("recorded") / "calls"
    script = ROOT / "tests" / "support" / "recorded_calls.py"
    run(sys.executable, script, file, BAE_FAST_SIMD="scalar", PYTHONPATH=str(ROOT))
    return file


def operators_of(printed):
    """Numbers of calls by operator, and the level they were made at."""
    level = int(re.search(r"^level (\d)$", printed, re.MULTILINE)[1])
    return level, dict(re.findall(r"^cpp_(\w+): (\d+) calls$", printed, re.MULTILINE))


@pytest.mark.long
def test_operators_give_the_same_without_torch_and_a_wrong_result_is_found(
    shipped, recorded, tmp_path
):
    """The stand-in for torch, on this machine at its best level."""
    target = tmp_path / "replay"
    objects = [shipped / "csrc" / f"{name}.o" for name in setup.SOURCES]
    options = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *REPLAY_FLAGS)
    run(*shlex.split(CXX), *options, REPLAY, *objects, "-o", target)
    _, found = operators_of(run(target, recorded))
    assert set(found) == RECORDED
    # the last bytes are of a result of cpp_grouped: an index in 64 bits
    spoilt = bytearray(recorded.read_bytes())
    spoilt[-8] ^= 1
    (tmp_path / "spoilt").write_bytes(spoilt)
    done = subprocess.run([target, tmp_path / "spoilt"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("cpp_grouped: result 1 differs at element")


RECORDED = {
    "rows_to_columns", "column_counts", "count_ones", "rows_to_features", "salient", "grouped",
    "search", "threshold", "covariance", "pair_lists", "list_rows", "listed_covariance",
    "pair_counts", "common_ones", "backward", "list_window", "sparse_backward", "bits_product",
    "gather_rows", "entropy", "entropy_slopes", "squared_error", "squared_error_gradient",
}  # fmt: skip


@pytest.mark.long
@pytest.mark.slow
def test_operators_for_arm_give_what_they_give_here_under_an_emulator(recorded, tmp_path):
    """Every operator that an ARM machine has: products on units of their own are of x86-64."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
    target = tmp_path / "replay"
    own = [name for name in setup.SOURCES if name not in setup.KERNELS]
    names = [*own, "dispatch", "kernels_scalar", "kernels_neon"]
    sources = [f"csrc/{name}.cpp" for name in names]
    run(compiler, *setup.FLAGS, "-static", *REPLAY_FLAGS, *sources, REPLAY, "-o", target)
    level, found = operators_of(run(emulator, target, recorded))
    assert level == 3  # NEON, as in csrc/dispatch.h
    assert set(found) == RECORDED
    assert sum(map(int, found.values())) > 500


# -- instructions and symbols ------------------------------------------------------------------

# before the opcode: operand and address size, lock, repeat, segments, REX. None may stand before
# VEX (C4, C5) and EVEX (62) but address size and segments, and in 64-bit code the three are
# nothing else.
PREFIX = re.compile(r"^(?:(?:66|67|f0|f2|f3|2e|36|3e|26|64|65|4[0-9a-f]) )*")


def instructions(folder, name):
    """Bytes and text of each instruction of an object file."""
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump")
    shown = run("objdump", "-d", "--wide", folder / "csrc" / f"{name}.o")
    found = re.findall(r"^\s+[0-9a-f]+:\t((?:[0-9a-f]{2} )+)\s*\t(.+)$", shown, re.MULTILINE)
    assert len(found) > 50
    return found


def encoding(code):
    first = PREFIX.sub("", code)[:2]
    return {"c4": "vex", "c5": "vex", "62": "evex"}.get(first, "legacy")


@needs_x86
@pytest.mark.parametrize("name", ["kernels_scalar", "dispatch", "operators"])
def test_what_every_cpu_runs_holds_only_what_every_cpu_has(shipped, name):
    # SSE2 is the last that x86-64 promises; popcnt and SSE4 came later
    later = re.compile(
        r"^(v\w+|popcnt|lzcnt|crc32\w*|movbe|p(shufb|abs\w|hadd\w+|sign\w|mulld|minud|maxud"
        r"|minsd|maxsd|blend\w+|extr[bdq]|insr[bdq]|mov[sz]x\w+|test)|blend\w+|round\w+|dpp[sd])\b"
        r"|%[yz]mm|%k[1-7]"
    )
    for code, text in instructions(shipped, name):
        assert encoding(code) == "legacy", text
        assert not later.search(text), text


@needs_x86
def test_the_avx2_object_holds_no_avx512(shipped):
    listed = instructions(shipped, "kernels_avx2")
    assert any("%ymm" in text for _, text in listed)
    for code, text in listed:
        assert encoding(code) != "evex", text
        assert not re.search(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])", text), text


@needs_x86
def test_only_the_amx_object_holds_tiles(shipped):
    for name in setup.SOURCES:
        text = "\n".join(t for _, t in instructions(shipped, name))
        assert bool(re.search(r"%tmm|ldtilecfg", text)) == (name == "kernels_amx")


def symbols(path, *flags):
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    return re.findall(r"^[0-9a-f ]*(\w) (\S+)$", run("nm", *flags, path), re.MULTILINE)


@pytest.mark.parametrize("name", [n for n in setup.KERNELS if n != "dispatch"])
def test_each_level_gives_the_linker_its_table_and_nothing_else(shipped, name):
    """Otherwise it could take a wide copy of a common function for every CPU."""
    found = symbols(shipped / "csrc" / f"{name}.o")
    given = [s for kind, s in found if kind not in "Uabdrt" and not s.startswith("DW.ref.")]
    level = name.removeprefix("kernels_")
    assert len(given) == 1
    assert f"k{level.capitalize()}Kernels" in given[0]


def test_the_extension_exports_its_init_function_alone(shipped):
    found = symbols(shipped / "bae_fast" / "_C.abi3.so", "--dynamic", "--defined-only")
    own = [s for _, s in found if "bae_fast" in s or s.startswith("PyInit")]
    assert own == ["PyInit__C"]
    for level in setup.KERNELS[1:]:
        table = f"k{level.removeprefix('kernels_').capitalize()}Kernels"
        local = [kind for kind, s in symbols(shipped / "bae_fast" / "_C.abi3.so") if table in s]
        assert local
        assert all(kind.islower() for kind in local)
