"""impl="cuda" without a GPU: its kernels' text run on a CPU, its compiler, when it refuses.

tests/backends/csrc/cuda_emulation.h gives the few instructions that the kernels need, so that g++
compiles csrc/cuda as it is; the launchers run unchanged, with the emulation in place of CUDA's
driver.
``test_cuda_compile.py`` compiles the same files for real chips.
"""

import contextlib
import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from count_digits import count_digits, from_digits
from once import once

import bae_fast as bf
from bae_fast.ops import registry
from bae_fast.packing import columns_to_features, n_words, pack_rows, rows_to_columns, unpack_rows

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
CXX = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
# with fortified functions a jump from one stack to another would be a fault
FLAGS = ("-std=c++17", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
         "-x", "c++")  # fmt: skip
CUDA = registry.BACKENDS["cuda"]
needs_kernels = pytest.mark.skipif(
    CUDA.unavailable is not None, reason=f"impl='cuda' cannot run: {CUDA.unavailable}"
)

if CUDA.unavailable is None:
    from bae_fast.kernels_cuda import covariance as kernels
    from bae_fast.kernels_cuda import driver, nvrtc


def build(target, source, *flags):
    """Compile one file of tests/backends/csrc; fails the test with what the compiler wrote."""
    if shutil.which(shlex.split(CXX)[0]) is None:
        pytest.skip(f"needs the C++ compiler {CXX}")
    command = (
        *shlex.split(CXX),
        *FLAGS,
        *flags,
        f"-I{ROOT}/tests/backends/csrc",
        source,
        "-o",
        target,
    )
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return target


def emulation_of(sources, folder, optimize="-O2"):
    """The kernels as a library with the functions of CUDA's driver."""
    flags = (optimize, "-fPIC", "-shared", "-Wno-clobbered", f"-I{sources}")
    return build(folder / "emulated.so", ROOT / "tests/backends/csrc/cuda_emulated.cpp", *flags)


def emulate(library, patch):
    """Start kernels of ``library`` on CPU tensors, by the code that starts them on a GPU."""
    for cached in (driver._driver, driver._primary):
        cached.cache_clear()
    patch(driver, "LIBRARY", str(library))
    patch(driver, "_modules", {})
    patch(driver, "_functions", {})
    patch(driver, "arch", lambda device: "sm_90")
    patch(nvrtc, "cubin", lambda name, arch: name.encode())
    patch(kernels, "from_digits", from_digits)  # no kernel of CUDA's
    patch(torch.cuda, "device", lambda device: contextlib.nullcontext())
    patch(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0))
    patch(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if sys.platform != "linux":
        pytest.skip("the emulation needs ucontext")
    make = functools.partial(emulation_of, SOURCES)
    return once(tmp_path_factory, "emulated", make) / "emulated.so"


@pytest.fixture
def emulated(library, monkeypatch):
    emulate(library, monkeypatch.setattr)
    yield
    driver._driver.cache_clear()
    driver._primary.cache_clear()


def codes(n, k, seed=0):
    """Bits with constant columns, twins, opposites, halves (ties) and rare columns."""
    g = torch.Generator().manual_seed(seed + 1000 * n + k)
    dense = torch.rand(n, k, generator=g) < torch.rand(k, generator=g)
    dense[:, :: max(k // 5, 1)] = False
    dense[:, 1 :: max(k // 5, 2)] = True
    if k > 40:
        dense[:, 2], dense[:, k - 1] = dense[:, 3], ~dense[:, 4]
        dense[:, 20:40] = torch.rand(n, 20, generator=g).argsort(0) < n // 2
    return dense


def features_of(dense):
    return columns_to_features(rows_to_columns(pack_rows(dense), dense.shape[1]))


def exact_covariance(dense):
    b = dense.numpy().astype(np.int64)
    counts = b.sum(0)
    # below 2^53: exact
    v = len(b) * (b.T.astype(np.float64) @ b.astype(np.float64)).astype(np.int64)
    v -= np.outer(counts, counts)
    np.fill_diagonal(v, 0)
    return torch.from_numpy(counts), v


def check_planes(signs, k, v):
    """Planes [2, rows, words] hold the signs of v [rows, k], and nothing behind them."""
    above, below = unpack_rows(signs, k, torch.int8)
    np.testing.assert_array_equal((above - below).numpy(), np.sign(v))
    assert not (unpack_rows(signs, 32 * n_words(k))[..., k:]).any()


# around the edges of words, of 256 bits, of stages of 512, of the pipeline's depth, and of tiles
PAIRS = [
    (2, 1), (3, 33), (32, 64), (64, 127), (255, 128), (256, 129), (257, 255), (300, 257),
    (512, 300), (513, 385), (1025, 96), (2100, 513), (4097, 65),
]  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("shape", PAIRS, ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
def test_the_covariance_and_its_signs_equal_numpy(shape, wide, emulated, monkeypatch):
    if wide:
        monkeypatch.setattr(kernels, "INT32_ROWS", 1)
    n, k = shape
    dense = codes(n, k)
    counts, v = exact_covariance(dense)
    numerator, signs = kernels.covariance(features_of(dense), counts, torch.tensor(n), True, n)
    assert int(numerator) == int(np.abs(v).sum())
    check_planes(signs, k, v)
    if not wide:
        alone, nothing = kernels.covariance(features_of(dense), counts, torch.tensor(n), False, n)
        assert int(alone) == int(numerator)
        assert nothing.numel() == 0


@needs_kernels
def test_numbers_of_rows_from_1_to_300(emulated):
    for n in range(1, 301, 29):
        dense = codes(n, 9, seed=n)
        counts, v = exact_covariance(dense)
        numerator, signs = kernels.covariance(features_of(dense), counts, torch.tensor(n), True, n)
        assert int(numerator) == int(np.abs(v).sum()), n
        check_planes(signs, 9, v)


def test_ties_are_common_in_what_is_tested():
    _, v = exact_covariance(codes(64, 127))
    constant = (v == 0).all(0)
    assert (v[~constant][:, ~constant] == 0).sum() > 2 * (~constant).sum()


@needs_kernels
@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
@pytest.mark.parametrize(
    ("k", "start", "stop"), [(300, 0, 300), (300, 32, 289), (129, 128, 129), (520, 200, 480)]
)
def test_a_slab_of_signs_equals_rows_of_the_planes(k, start, stop, wide, emulated, monkeypatch):
    if wide:
        monkeypatch.setattr(kernels, "INT32_ROWS", 1)
    dense = codes(70, k)
    counts, v = exact_covariance(dense)
    signs = kernels.sign_slab(features_of(dense), counts, torch.tensor(70), start, stop, 70)
    check_planes(signs, k, v[start:stop])


@needs_kernels
@pytest.mark.parametrize("n", [46_340, 92_683])
def test_rows_at_the_edge_of_int32_and_beyond(n, emulated):
    """N n_ij leaves int32 from 46,341 rows on, V itself from 92,682."""
    dense = torch.rand(n, 5) < 0.5
    dense[::2, 2], dense[1::2, 2] = True, False
    dense[:, 3], dense[:, 4] = dense[:, 2], ~dense[:, 2]
    counts, v = exact_covariance(dense)
    assert np.abs(v).max() == n // 2 * ((n + 1) // 2)
    numerator, signs = kernels.covariance(features_of(dense), counts, torch.tensor(n), True, n)
    assert int(numerator) == int(np.abs(v).sum())
    check_planes(signs, 5, v)


@needs_kernels
def test_counts_of_sixteen_million_rows(emulated):
    """Given as statistics: the kernel reads N and n_i as they are."""
    n, k = 2**24, 140
    dense = codes(300, k)
    b = dense.numpy().astype(np.int64)
    g = np.random.default_rng(0)
    counts = g.integers(0, 2**8, k)
    counts[::7] = n
    v = n * (b.T @ b) - np.outer(counts, counts)
    np.fill_diagonal(v, 0)
    assert np.abs(v).max() > 2**47
    numerator, signs = kernels.covariance(
        features_of(dense), torch.from_numpy(counts), torch.tensor(n), True, n
    )
    assert int(numerator) == int(np.abs(v).sum())
    check_planes(signs, k, v)


# rows of bits, columns of S, features summed
PRODUCTS = [
    (1, 1, 1),
    (3, 40, 33),
    (63, 129, 128),
    (257, 127, 300),
    (300, 130, 513),
    (70, 96, 1700),
]


def padded(words, front, back):
    """The same rows in a wider matrix whose other words are all ones."""
    wide = torch.full((*words.shape[:-1], words.shape[-1] + front + back), -1, dtype=torch.int32)
    view = wide[..., front : front + words.shape[-1]]
    return view.copy_(words)


@needs_kernels
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
@pytest.mark.parametrize("padding", [None, (4, 4), (1, 2)], ids=["packed", "aligned", "odd"])
def test_the_product_with_the_signs_is_exact(shape, padding, emulated):
    """Rows of both operands start on 16 bytes or not; what lies beside them is not read."""
    n, columns, k = shape
    dense = codes(n, k)
    g = torch.Generator().manual_seed(k)
    s = torch.randint(-1, 2, (columns, k), generator=g)
    counts = torch.randint(0, n + 1, (k,), generator=g)
    words, planes = pack_rows(dense), torch.stack([pack_rows(s > 0), pack_rows(s < 0)])
    if padding is not None:
        extra = -words.shape[-1] % 4 if padding == (4, 4) else 0
        words = padded(words, padding[0], padding[1] + extra)
        planes = padded(planes, padding[0], padding[1] + extra)
        assert kernels._aligned(words, planes) == (padding == (4, 4))
    expected = n * (dense.long() @ s.t()) - counts @ s.t()
    assert expected.abs().max() < 2**24  # exact in fp32
    got = kernels.sign_product(
        words, planes, count_digits(counts), torch.tensor(n), torch.tensor(0.5)
    )
    torch.testing.assert_close(got, expected * 0.5, rtol=0, atol=0)


@needs_kernels
def test_nothing_is_made_where_the_flag_is_set(emulated, monkeypatch):
    """The flag lies on the device: what is written to stays as it was."""
    n, k = 70, 130
    dense = codes(n, k)
    counts, v = exact_covariance(dense)
    args = (features_of(dense), counts, torch.tensor(n))
    off, on = (torch.tensor([value], dtype=torch.int32) for value in (0, 1))
    right, signs = kernels.covariance(*args, True, n, off)
    assert int(right) == int(np.abs(v).sum())
    product = (pack_rows(dense), signs, count_digits(counts), torch.tensor(n), torch.tensor(0.5))
    expected = kernels.sign_product(*product, off)
    planes = torch.full_like(signs[:, 3:40], 7)
    kernels.sign_slab(*args, 3, 40, n, on, planes)
    assert (planes == 7).all()
    kernels.sign_slab(*args, 3, 40, n, off, planes)
    assert torch.equal(planes, signs[:, 3:40])
    filled = []

    def seven(*size, **options):  # new memory, as it may be
        filled.append(torch.full(size, 7, **options))
        return filled[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", seven)
        kernels.covariance(*args, False, n, on)
        kernels.sign_product(*product, on)
        assert all((tensor == 7).all() for tensor in filled)
        assert len(filled) == 2
    assert torch.equal(kernels.sign_product(*product), expected)


@needs_kernels
def test_the_product_of_large_counts_is_rounded_once(emulated):
    dense, n = codes(40, 200), 2**24
    s = torch.randint(-1, 2, (50, 200))
    counts = torch.randint(0, n, (200,))
    planes = torch.stack([pack_rows(s > 0), pack_rows(s < 0)])
    exact = n * (dense.long() @ s.t()) - counts @ s.t()
    assert exact.abs().max() > 2**26
    scale = torch.tensor(1 / 3)
    got = kernels.sign_product(
        pack_rows(dense), planes, count_digits(counts), torch.tensor(n), scale
    )
    assert torch.equal(got, exact.float() * scale)


@needs_kernels
@pytest.mark.parametrize(
    ("given", "chip", "rows", "started"),
    [
        (None, "sm_90", 300, ["covariance"]),
        ("mma", "sm_90", 300, ["covariance"]),
        ("wgmma", "sm_90", 300, ["feature_tiles", "panel_covariance"]),
        ("wgmma", "sm_90", 8192, ["feature_tiles", "panel_covariance"]),
        ("wgmma", "sm_90", 8193, ["covariance"]),
        ("wgmma", "sm_80", 300, ["covariance"]),
        ("wgmma", "sm_89", 300, ["covariance"]),
    ],
)
def test_asynchronous_pairs_are_made_where_they_are_asked_for(
    given, chip, rows, started, monkeypatch
):
    """No device has shown them: by name, on the one chip that has them, within their sizes."""
    names = []
    monkeypatch.setattr(driver, "start", lambda kernel, *_: names.append(kernel.name))
    monkeypatch.setattr(driver, "arch", lambda device: chip)
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 132)
    if given is not None:
        monkeypatch.setenv("BAE_FAST_CUDA_PAIRS", given)
    dense = codes(rows, 9)
    kernels.covariance(features_of(dense), dense.sum(0), torch.tensor(rows), True, rows)
    assert names == started


@needs_kernels
@pytest.mark.parametrize(
    ("given", "chip", "started"),
    [
        (None, "sm_90", ["digit_product", "sign_product"]),
        ("mma", "sm_90", ["digit_product", "sign_product"]),
        ("wgmma", "sm_80", ["digit_product", "sign_product"]),
        ("wgmma", "sm_89", ["digit_product", "sign_product"]),
        (
            "wgmma",
            "sm_90",
            ["digit_product", "row_tiles", *2 * ["sign_tiles", "sign_panel_product"]],
        ),
    ],
)
def test_asynchronous_products_with_the_signs_are_made_where_they_are_asked_for(
    given, chip, started, monkeypatch
):
    """In parts of as many columns as tiles of planes may take at once; pointers are right."""
    calls = []

    def start(kernel, blocks, *args):
        calls.append((kernel, blocks, args, driver.pack(kernel, args)))

    monkeypatch.setattr(driver, "start", start)
    monkeypatch.setattr(driver, "arch", lambda device: chip)
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 3)
    monkeypatch.setattr(kernels, "from_digits", lambda raw: raw.sum(0))
    monkeypatch.setattr(kernels, "TILES_BYTES", 5 * 2**15)  # two panels of 1,100 bits a line
    if given is not None:
        monkeypatch.setenv("BAE_FAST_CUDA_SIGNS", given)
    dense, s = codes(600, 1100), torch.randint(-1, 2, (300, 1100))
    planes = torch.stack([pack_rows(s > 0), pack_rows(s < 0)])
    out = kernels.sign_product(
        pack_rows(dense), planes, count_digits(dense.sum(0)), torch.tensor(600), torch.tensor(1.0)
    )
    assert [kernel.name for kernel, *_ in calls] == started
    if len(started) > 2:
        # lines by eight; 3 x 2 results and 3 x 1 on three multiprocessors
        assert [blocks for _, blocks, *_ in calls[1:]] == [96, 64, 3, 32, 3]
        *_, last = calls
        assert last[2][4] == 44  # columns of the last part
        assert last[2][10].data_ptr() == out.data_ptr() + 4 * 256
        assert last[2][3].shape == (2, 2, 256, 32)


@needs_kernels
def test_pointers_of_asynchronous_products_are_checked():
    """Of another dtype or device they would be an illegal access."""
    bits, sums = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    number = torch.zeros(1)
    rest = (bits, bits, 1, bits, 1, 1, 1, sums, sums, number, number, 1, None)
    driver.pack(kernels.SIGN_PANEL_PRODUCT, rest)
    for at, other in ((1, sums), (3, number), (7, bits), (8, bits), (9, sums), (10, bits)):
        with pytest.raises(TypeError, match=f"argument {at} of sign_panel_product must be torch."):
            driver.pack(kernels.SIGN_PANEL_PRODUCT, (*rest[:at], other, *rest[at + 1 :]))
        changed = (*rest[:at], rest[at].to("meta"), *rest[at + 1 :])
        with pytest.raises(ValueError, match=f"argument {at} .* must be on cpu; got meta"):
            driver.pack(kernels.SIGN_PANEL_PRODUCT, changed)


@needs_kernels
def test_another_form_of_the_products_with_the_signs_is_refused(monkeypatch):
    monkeypatch.setenv("BAE_FAST_CUDA_SIGNS", "b1")
    with pytest.raises(ValueError, match="BAE_FAST_CUDA_SIGNS must be 'mma' or 'wgmma'; got 'b1'"):
        kernels.asynchronous("BAE_FAST_CUDA_SIGNS", torch.device("cpu"))


@needs_kernels
def test_another_form_of_pairs_is_refused(monkeypatch):
    monkeypatch.setenv("BAE_FAST_CUDA_PAIRS", "WGMMA")
    dense = codes(40, 9)
    with pytest.raises(
        ValueError, match="BAE_FAST_CUDA_PAIRS must be 'mma' or 'wgmma'; got 'WGMMA'"
    ):
        kernels.covariance(features_of(dense), dense.sum(0), torch.tensor(40), True, 40)


@needs_kernels
def test_integers_that_an_argument_cannot_hold_are_refused():
    bits = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(OverflowError, match="argument 2 of covariance is too large"):
        driver.pack(kernels.COVARIANCE, (bits, 1, 2**31, *[None] * 4, *[0] * 6, None))
    with pytest.raises(ValueError, match="argument"):
        driver.pack(kernels.COVARIANCE, (bits, 1))


@needs_kernels
def test_pointers_of_another_dtype_or_device_are_refused():
    """Either is an illegal access on a device, or a wrong number."""
    bits = torch.zeros(1, dtype=torch.int32)
    rest = (bits, 1, 1, torch.zeros(1, dtype=torch.int64), *[None] * 3, *[0] * 6, None)
    driver.pack(kernels.COVARIANCE, rest)
    with pytest.raises(TypeError, match=r"argument 3 of covariance must be torch.int64; got .*32"):
        driver.pack(kernels.COVARIANCE, (*rest[:3], bits, *rest[4:]))
    with pytest.raises(ValueError, match="argument 3 of covariance must be on cpu; got meta"):
        driver.pack(kernels.COVARIANCE, (*rest[:3], rest[3].to("meta"), *rest[4:]))
    with pytest.raises(ValueError, match="argument 0 of covariance must be a tensor; got None"):
        driver.pack(kernels.COVARIANCE, (None, *rest[1:]))


@needs_kernels
def test_a_context_that_the_caller_has_made_current_stays(emulated):
    """The thread's own context is used; the primary one is only for a thread without any."""
    dense = codes(9, 5)
    args = (features_of(dense), dense.sum(0), torch.tensor(9), False, 9)
    expected = kernels.covariance(*args)[0]
    library = driver._driver()
    library.another_context.restype = ctypes.c_void_p
    mine, now = ctypes.c_void_p(library.another_context()), ctypes.c_void_p()
    assert library.cuCtxSetCurrent(mine) == 0
    assert kernels.covariance(*args)[0] == expected
    assert library.cuCtxGetCurrent(ctypes.byref(now)) == 0
    assert now.value == mine.value
    # a module belongs to its context: both have one of their own
    assert len({context for _, _, context in driver._functions}) == 2


# what each change of the sources breaks; every one must be found by the emulation
MUTATIONS = {
    "copies are not waited for": ("product.cuh", "wait_copies<S::kStages - 2>();", ""),
    "no barrier in the loop": ("product.cuh", "synchronize();  // everybody's", "// everybody's"),
    "a bank conflict": ("tiles.cuh", "(chunk ^ (row >> 1 & 3))", "chunk"),
    "a lane's columns": ("tiles.cuh", "(lane & 3) * 2 + (reg & 1)", "(lane & 3) + (reg & 1) * 4"),
    "no mirror on the diagonal": ("cooccurrence.cu", "first + r < column_word", "false"),
    "no barrier before the signs are written": (
        "cooccurrence.cu", "  synchronize();\n  if (Triangle && thread_index() == 0)",
        "  if (Triangle && thread_index() == 0)",
    ),
    "the diagonal counts": ("cooccurrence.cu", "distance == beyond", "false"),
    "a plane is not complemented": ("product.cuh", "b[r] = ~b[r]", "b[r] = b[r]"),
    "ones of a row's lanes": ("product.cuh", "shuffle_xor(sums.ones[m][half], 2)", "0"),
}  # fmt: skip


def check_every_kernel():
    n, k = 1100, 140
    dense = codes(n, k)
    counts, v = exact_covariance(dense)
    for _ in range(2):  # copies late, copies early
        total, signs = kernels.covariance(features_of(dense), counts, torch.tensor(n), True, n)
        assert int(total) == int(np.abs(v).sum())
        check_planes(signs, k, v)
    s = torch.randint(-1, 2, (20, k))
    planes = torch.stack([pack_rows(s > 0), pack_rows(s < 0)])
    got = kernels.sign_product(
        pack_rows(dense[:70]), planes, count_digits(counts), torch.tensor(1), torch.tensor(1.0)
    )
    assert torch.equal(got.long(), dense[:70].long() @ s.t() - counts @ s.t())


@pytest.fixture(scope="module")
def found_right(library):
    """What is not changed passes: once for all changes."""
    with pytest.MonkeyPatch.context() as patch:
        emulate(library, patch.setattr)
        check_every_kernel()
    driver._driver.cache_clear()
    driver._primary.cache_clear()


@needs_kernels
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_emulation_finds_what_is_wrong(name, found_right, tmp_path, monkeypatch):
    file, before, after = MUTATIONS[name]
    shutil.copytree(SOURCES, tmp_path / "cuda")
    text = (SOURCES / file).read_text()
    assert text.count(before) == 1, before
    (tmp_path / "cuda" / file).write_text(text.replace(before, after))
    emulate(emulation_of(tmp_path / "cuda", tmp_path, "-O0"), monkeypatch.setattr)
    with pytest.raises((AssertionError, driver.DriverError)):
        check_every_kernel()


def test_places_of_tiles_fragments_and_signs(tmp_path):
    program = build(tmp_path / "tiles", ROOT / "tests/backends/csrc/cuda_tiles.cpp", f"-I{SOURCES}")
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if CUDA.unavailable is None:
        sizes = {"pairs": kernels.PAIRS, "signs": kernels.SIGNS, "digits": kernels.COUNT_DIGITS}
        sizes |= {"panels": kernels.PANELS, "lines": kernels.LINES}
        for line in done.stdout.splitlines():
            name, *numbers = line.split()
            assert sizes.pop(name) == tuple(map(int, numbers))
        assert sizes == {}


def process(program, *args, **variables):
    """What a program prints that sees this file and the repository."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BAE_FAST_")}
    environment |= {
        "PYTHONPATH": f"{ROOT}:{ROOT}/tests/backends:{ROOT}/tests/support",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    if "TRITON_INTERPRET" in variables:
        done = subprocess.run(
            [sys.executable, "-c", program, *args],
            capture_output=True,
            text=True,
            env=environment,
            cwd=ROOT,
            check=False,
        )
    else:
        done = processes.run("-c", program, *args, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@needs_kernels
@pytest.mark.long
def test_its_bodies_give_the_numbers_of_triton(library):
    """Whole operators, Triton's kernels in the interpreter and these in the emulation."""
    program = (
        "import sys, torch\n"
        "from test_cuda import emulate\n"
        "from bae_fast.ops import nvidia\n"
        "emulate(sys.argv[1], setattr)\n"
        "a, b = (nvidia.bodies('bae_fast.kernels.bodies', f'bae_fast.{m}.covariance')\n"
        "        for m in ('kernels', 'kernels_cuda'))\n"
        "x, W, c = torch.randn(34, 9), torch.randn(9, 260), torch.randn(260)\n"
        "W_dec, G = torch.randn(260, 5), torch.randn(34, 5)\n"
        "words, window, counts, n = b['encode'](x, W, c, None, 0.5)\n"
        "total, signs = b['covariance'](words, counts, n, True)\n"
        "expected = a['covariance'](words, counts, n, True)\n"
        "assert torch.equal(total, expected[0]) and torch.equal(signs, expected[1])\n"
        "for planes, rows in ((signs, None), (None, words)):\n"
        "    args = (x, W, c, W_dec, words, window, None, G, None, None, torch.tensor(0.25),\n"
        "            planes, rows, counts, n, 'rectangle', 0.5, 1, [True] * 3)\n"
        "    for left, right in zip(a['encoder_backward'](*args), b['encoder_backward'](*args)):\n"
        "        assert left.any() and torch.equal(left, right)\n"
        "print('equal')\n"
    )
    variables = {"TRITON_INTERPRET": "1", "BAE_FAST_SCRATCH_MB": "0"}
    assert process(program, library, **variables) == "equal"


@needs_kernels
def test_nothing_beside_a_tensor_is_touched(library):
    """Every argument of every kernel against a page that faults."""
    program = (
        "import itertools, sys, torch\n"
        "from guard_pages import guarded\n"
        "from test_cuda import *\n"
        "emulate(sys.argv[1], setattr)\n"
        "plain = driver.start\n"
        "def start(kernel, blocks, *args):\n"
        "    copies = [guarded(a, place) if isinstance(a, torch.Tensor) and a.dim()\n"
        "              else a for a in args]\n"
        "    plain(kernel, blocks, *copies)\n"
        "    for a, copy in zip(args, copies):\n"
        "        if a is not copy: a.copy_(copy)\n"
        "driver.start = start\n"
        "sizes = ((70, 129), (300, 257), (64, 384), (2, 1))\n"
        "for place, (n, k) in itertools.product(('front', 'back'), sizes):\n"
        "    print(place, n, k, flush=True)\n"
        "    dense = codes(n, k)\n"
        "    (counts, v), total = exact_covariance(dense), torch.tensor(n)\n"
        "    for keep in (False, True):\n"
        "        args = (features_of(dense), counts, total)\n"
        "        sum_, signs = kernels.covariance(*args, keep, n)\n"
        "        assert int(sum_) == int(np.abs(v).sum())\n"
        "    check_planes(signs, k, v)\n"
        "    check_planes(kernels.sign_slab(*args, k // 3, k, n), k, v[k // 3 :])\n"
        "    got = kernels.sign_product(\n"
        "        pack_rows(dense), signs, count_digits(counts), total, torch.tensor(1.0))\n"
        "    s = torch.from_numpy(np.sign(v))\n"
        "    assert torch.equal(got.long(), n * (dense.long() @ s) - counts @ s)\n"
        "print('right')\n"
    )
    assert process(program, library).endswith("right")


# -- the compiler --------------------------------------------------------------------------------


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """NVRTC with an empty cache."""
    if CUDA.unavailable is not None:
        pytest.skip(f"impl='cuda' cannot run: {CUDA.unavailable}")
    if nvrtc.missing() is not None:
        pytest.skip(nvrtc.missing())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "bae_fast" / "cuda"


def test_nvrtc_compiles_the_sources_and_keeps_them(compiler, monkeypatch):
    code = nvrtc.cubin("sign_product.cu", "sm_90")
    assert code.startswith(b"\x7fELF")
    assert b"digit_product" in code
    (kept,) = compiler.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "compile_cubin", None)  # not called
        assert nvrtc.cubin("sign_product.cu", "sm_90") == code
    # damaged: made again
    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 1
    for broken in (bytes(data), data[:100], b""):
        kept.write_bytes(broken)
        assert nvrtc._read(kept) is None
    calls = []
    monkeypatch.setattr(nvrtc, "compile_cubin", lambda *args: calls.append(args) or code)
    assert nvrtc.cubin("sign_product.cu", "sm_90") == code
    assert len(calls) == 1
    assert nvrtc._read(kept) == code
    assert [path.name for path in compiler.iterdir()] == [kept.name]


def test_the_key_of_what_is_kept_is_sources_options_chip_and_version(compiler, monkeypatch):
    text, headers = nvrtc.read_sources("cooccurrence.cu")
    own = {"tiles.cuh", "instructions.cuh", "product.cuh"}
    assert set(headers) == own | {"signs.cuh", "warpgroup.cuh"}
    key = nvrtc._key(text, headers, "sm_90")
    assert key == nvrtc._key(text, dict(headers), "sm_90")
    others = [
        nvrtc._key(text + " ", headers, "sm_90"),
        nvrtc._key(text, headers | {"tiles.cuh": ""}, "sm_90"),
        nvrtc._key(text, headers, "sm_80"),
    ]
    monkeypatch.setattr(nvrtc, "version", lambda: (1, 0))
    others.append(nvrtc._key(text, headers, "sm_90"))
    monkeypatch.setattr(nvrtc, "OPTIONS", ("--std=c++20",))
    others.append(nvrtc._key(text, headers, "sm_90"))
    assert len({key, *others}) == 6


def test_errors_carry_the_compilers_log(compiler):
    with pytest.raises(nvrtc.CompilationError, match=r"(?s)wrong\.cu for sm_90.*no_such_type"):
        nvrtc.compile_cubin("wrong.cu", "no_such_type x;", {}, "sm_90")
    with pytest.raises(nvrtc.CompilationError, match="sm_1"):
        nvrtc.compile_cubin("empty.cu", "", {}, "sm_1")


def test_a_cache_that_cannot_be_written_costs_a_compilation_only(compiler, monkeypatch):
    compiler.parent.write_text("a file where the folder should be")
    monkeypatch.setattr(nvrtc, "compile_cubin", lambda *args: b"code")
    assert nvrtc.cubin("sign_product.cu", "sm_90") == b"code"

    def homeless():
        raise RuntimeError("Could not determine home directory.")  # of a user without an entry

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert nvrtc.cubin("sign_product.cu", "sm_90") == b"code"


# -- when it serves ------------------------------------------------------------------------------


@pytest.fixture
def device(monkeypatch):
    """A function that pretends there is a GPU of some capability, with or without NVRTC."""

    def pretend(capability, compiler=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(nvrtc, "missing", lambda: compiler)

    return pretend


@needs_kernels
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0)], ids=str)
def test_it_serves_the_chips_that_have_the_instruction(capability, device):
    device(capability)
    request = registry.Request("cuda", torch.bfloat16)
    assert registry.reasons_against("cuda", request) == []
    assert registry.choose("cuda", "cuda", torch.bfloat16, 64, 1) == "cuda"
    # until a device has shown that it is right and faster
    assert registry.choose("auto", "cuda", torch.bfloat16, 64, 1) == "triton"


@needs_kernels
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_the_capability_is_that_of_the_tensors_device(name, device, monkeypatch):
    """Not that of the device that happens to be current."""
    device((9, 0))

    def capability(index=None):
        return (9, 0) if index == 1 else (7, 5)

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    request = registry.Request("cuda", torch.bfloat16, device_index=1)
    assert registry.reasons_against(name, request) == []
    assert registry.choose(name, "cuda", torch.bfloat16, 64, 1, 1) == name
    with monkeypatch.context() as patch:  # nor where that one is too new
        patch.setattr(
            torch.cuda, "get_device_capability", lambda index=None: (9 if index == 1 else 12, 0)
        )
        assert registry.reasons_against(name, request) == []
    with pytest.raises(
        bf.BackendUnavailableError, match=r"needs compute capability 8\.0; got 7\.5"
    ):
        registry.choose(name, "cuda", torch.bfloat16, 64, 1)


@needs_kernels
@pytest.mark.parametrize("capability", [(10, 0), (10, 3), (12, 0)], ids=str)
def test_it_leaves_later_chips_to_triton(capability, device):
    device(capability)
    with pytest.raises(bf.BackendUnavailableError, match="emulated on compute capability 1"):
        registry.choose("cuda", "cuda", torch.bfloat16, 64, 1)
    assert registry.choose("auto", "cuda", torch.bfloat16, 64, 1) == "triton"


def test_info_says_why_not_where_there_is_no_gpu():
    assert bf.info()["backends"]["cuda"] != "available" or torch.cuda.is_available()


@needs_kernels
def test_without_nvrtc_the_reason_is_said(device):
    device((9, 0), "the library libnvrtc is not found")
    with pytest.raises(bf.BackendUnavailableError, match="libnvrtc is not found"):
        registry.choose("cuda", "cuda", torch.float32, 64, 1)


@needs_kernels
def test_nvrtc_of_torchs_own_version_is_looked_for(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert nvrtc.candidates()[-1] == "libnvrtc.so.12"
    assert not any("13" in Path(name).name for name in nvrtc.candidates())


@needs_kernels
def test_what_nvrtc_opens_by_name_is_loaded_before(tmp_path, monkeypatch):
    """In the wheels of CUDA 13.0, those of torch 2.11, it finds its second library nowhere."""
    first, second = tmp_path / "libnvrtc.so.13", tmp_path / "libnvrtc-builtins.so.13.0"
    for path in (first, second, tmp_path / "libnvrtc-builtins.alt.so.13.0"):
        path.touch()
    loaded = []
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", lambda name: loaded.append(name) or name)
    monkeypatch.chdir(tmp_path)
    for name, wanted in (
        (str(first), [str(first), str(second)]),
        ("libnvrtc.so.13", ["libnvrtc.so.13"]),  # the system's: nothing of the folder one is in
    ):
        monkeypatch.setattr(nvrtc, "candidates", lambda name=name: [name])
        nvrtc._library.cache_clear()
        try:
            assert nvrtc._library() == name
        finally:
            nvrtc._library.cache_clear()
        assert loaded == wanted
        loaded.clear()


@needs_kernels
def test_a_library_that_is_nowhere_is_named(monkeypatch):
    monkeypatch.setattr(nvrtc, "candidates", lambda: ["libno_such_library.so"])
    nvrtc._library.cache_clear()
    try:
        assert "libnvrtc is not found" in nvrtc.missing()
        with pytest.raises(nvrtc.CompilationError, match="libnvrtc is not found"):
            nvrtc.version()
    finally:
        nvrtc._library.cache_clear()


@needs_kernels
@pytest.mark.parametrize(
    ("capability", "request_", "reason"),
    [
        ((7, 5), registry.Request("cuda", torch.float32), "needs compute capability 8.0; got 7.5"),
        ((9, 0), registry.Request("cuda", torch.float64), "float32, bfloat16 and float16; got"),
        ((9, 0), registry.Request("cpu", torch.float32), "runs on CUDA devices"),
    ],
)
def test_every_reason_against_a_request_is_said(capability, request_, reason, device):
    device(capability)
    assert any(reason in text for text in registry.reasons_against("cuda", request_))


@needs_kernels
def test_a_cold_kernel_under_capture_says_to_warm_up(emulated, monkeypatch):
    def covariance():
        return kernels.covariance(features, counts, torch.tensor(9), False, 9)[0]

    dense = codes(9, 5)
    features, counts = features_of(dense), dense.sum(0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match=r"bae_fast\.warmup\('cuda'"):
            covariance()
    total = covariance()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert covariance() == total


@needs_kernels
def test_what_the_driver_refuses_is_said(emulated, monkeypatch):
    tensor = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(driver.DriverError, match=r"finding the kernel nothing failed with 500: no"):
        driver.start(driver.Kernel("cooccurrence.cu", "nothing", 0, 128, "p"), 1, tensor)
    monkeypatch.setattr(nvrtc, "cubin", lambda name, arch: b"garbage")
    with pytest.raises(driver.DriverError, match=r"loading sign_product\.cu failed with 1: not an"):
        driver.start(kernels.SIGN_PRODUCT._replace(arguments="p"), 1, tensor)


@needs_kernels
def test_a_missing_driver_is_named(emulated, monkeypatch):
    monkeypatch.setattr(driver, "LIBRARY", "libno_such_library.so")
    with pytest.raises(OSError, match="libno_such_library"):
        driver.start(kernels.COVARIANCE._replace(arguments="p"), 1, torch.zeros(1).int())
