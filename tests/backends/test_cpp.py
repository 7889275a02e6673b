"""impl="cpp": every instruction set gives the same integers."""

import importlib
import itertools
import os
import re
from pathlib import Path

import numpy as np
import processes
import pytest
import torch

import bae_fast as bf
from bae_fast import packing
from bae_fast.ops import registry
from bae_fast.packing import pack_rows, unpack_rows

CPP = registry.BACKENDS["cpp"]
ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.usefixtures("by_bits"),
    pytest.mark.skipif(
        CPP.unavailable is not None, reason=f"impl='cpp' cannot run: {CPP.unavailable}"
    ),
]

EDGES = [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513]


def levels():
    """Every instruction set that this CPU has."""
    if CPP.unavailable is not None:
        return []
    from bae_fast.backends.cpp import extension

    found = [n for n, k in extension.LEVELS.items() if extension.op("simd")(k) >= 0]
    extension.use_simd(None)
    return found


def levels_with_products():
    """Those that multiply numbers as they are, in kernels of the package's own."""
    from bae_fast.backends.cpp import extension

    found = []
    for name in levels():
        extension.use_simd(name)
        found += [name] if extension.op("unit_kind")() == 1 else []
        extension.use_simd(None)
    return found


def _at(request):
    from bae_fast.backends.cpp import extension

    extension.use_simd(request.param)
    yield request.param
    extension.use_simd(None)


level = pytest.fixture(params=levels(), name="level")(_at)
level_with_products = pytest.fixture(params=levels_with_products(), name="level_with_products")(_at)


@pytest.fixture(params=[1, 2])
def threads(request):
    torch.set_num_threads(request.param)


def codes(n, k, seed=0):
    """Bits with constant columns, twins and rare columns, in words whose rows are padded."""
    g = torch.Generator().manual_seed(seed)
    density = torch.rand(k, generator=g)
    bits = torch.rand(n, k, generator=g) < density
    bits[:, :: max(k // 5, 1)] = False
    bits[:, 1 :: max(k // 5, 2)] = True
    if k > 4:
        bits[:, 2] = bits[:, 3]
    exact = pack_rows(bits)
    padded = torch.full((n, exact.shape[1] + 3), -1, dtype=torch.int32)
    words = padded[:, 1 : 1 + exact.shape[1]]
    words.copy_(exact)
    return bits, words


def product(left, right):
    """Of integers below 2^53: exact in float64, which BLAS takes; NumPy's int64 takes long."""
    return (left.astype(np.float64) @ right.astype(np.float64)).astype(np.int64)


def exact_covariance(bits):
    b = bits.numpy().astype(np.int64)
    n, counts = len(b), b.sum(0)
    v = n * product(b.T, b) - np.outer(counts, counts)
    np.fill_diagonal(v, 0)
    return counts, v


def alternating(first, second):
    """Every pair, one by one on one thread and on two."""
    return [(a, b, 1 + (i + j) % 2) for i, a in enumerate(first) for j, b in enumerate(second)]


SHAPES = [(n, 97) for n in EDGES[1:]] + [(70, k) for k in EDGES] + [(513, 513), (2050, 321)]


@pytest.mark.parametrize(("shape", "keep_signs", "threads"), alternating(SHAPES, (True, False)))
def test_the_covariance_and_its_signs_equal_numpy_on_every_level(level, shape, keep_signs, threads):
    torch.set_num_threads(threads)
    bits, words = codes(*shape)
    counts, v = exact_covariance(bits)
    numerator, signs = CPP.ops["covariance"](
        words, torch.from_numpy(counts), torch.tensor(shape[0]), keep_signs
    )
    assert int(numerator) == int(np.abs(v).sum())
    if keep_signs:
        above, below = unpack_rows(signs, shape[1], torch.int8)
        np.testing.assert_array_equal((above - below).numpy(), np.sign(v))
        assert all(packing.tail_is_zero(plane, shape[1]) for plane in signs)


def test_the_covariance_of_more_rows_than_16_bits_hold(level):
    bits, words = codes(33_000, 70)
    counts, v = exact_covariance(bits)
    numerator, signs = CPP.ops["covariance"](
        words, torch.from_numpy(counts), torch.tensor(33_000), True
    )
    assert int(numerator) == int(np.abs(v).sum())
    above, below = unpack_rows(signs, 70, torch.int8)
    np.testing.assert_array_equal((above - below).numpy(), np.sign(v))


def check_sign_product(bits, words, stored):
    """The covariance's gradient at the bits, read off the gradient of b_enc row by row."""
    n, k = bits.shape
    counts, v = exact_covariance(bits)
    s, b = np.sign(v), bits.numpy().astype(np.int64)
    expected = (n * product(b, s) - product(counts, s)).astype(np.float64) * 2 / (n * (n - 1))
    total, ones = torch.tensor(n), torch.from_numpy(counts)
    _, signs = CPP.ops["covariance"](words, ones, total, True)
    eye = torch.eye(n, dtype=torch.float64)
    zero = torch.zeros(n, k, dtype=torch.float64)
    empty = torch.empty(0, dtype=torch.int32)
    _, grad_W, grad_b = CPP.ops["encoder_backward"](
        eye, zero, zero[0], torch.zeros(k, 1, dtype=torch.float64), words, empty, None,
        None, None, None, torch.ones((), dtype=torch.float64),
        signs if stored else None, None if stored else words, ones, total,
        "identity", 0.0, 1, [False, True, True],
    )  # fmt: skip
    scale = np.abs(expected).max()
    assert np.abs(grad_W.numpy() - expected).max() <= 1e-14 * scale
    assert np.abs(grad_b.numpy() - expected.sum(0)).max() <= 1e-12 * max(scale, 1) * n


# more rows and columns than a block of the products keeps
BLOCKS = [(577, 97), (3, 1600)]


@pytest.mark.parametrize(
    ("shape", "stored", "threads"), alternating(SHAPES + BLOCKS, (True, False))
)
def test_the_product_with_the_signs_is_exact_on_every_level(level, shape, stored, threads):
    torch.set_num_threads(threads)
    if shape[0] > 1:
        check_sign_product(*codes(*shape), stored)


@pytest.mark.parametrize("kind", ["twins", "opposites", "ties", "constant"])
def test_sums_of_signs_at_their_extremes_are_exact(level, kind):
    """Sums as large as can be, nearly all pairs tied, nothing that varies."""
    n, k = (4, 1700) if kind == "ties" else (70, 1700)
    column = torch.arange(n) % 2 == 0
    bits = column[:, None].repeat(1, k)
    if kind == "opposites":
        bits[:, k // 2 :] = ~bits[:, k // 2 :]
    elif kind == "ties":
        bits = torch.rand(n, k) < 0.5
    elif kind == "constant":
        bits = (torch.arange(k) % 3 == 0)[None].repeat(n, 1)
        bits[0, 0] = False
    counts, v = exact_covariance(bits)
    words = pack_rows(bits)
    numerator, _ = CPP.ops["covariance"](words, torch.from_numpy(counts), torch.tensor(n), True)
    assert int(numerator) == int(np.abs(v).sum())
    check_sign_product(bits, words, True)


@pytest.mark.parametrize(
    ("shape", "dtype", "threads"),
    alternating(
        [(n, 97) for n in EDGES] + [(3, k) for k in EDGES],
        (torch.float32, torch.float64, torch.bfloat16),
    ),
)
def test_bits_window_and_counts_on_every_level(level, shape, dtype, threads):
    """W_enc = I: x is the pre-activation itself, with zeros, signed zeros, NaN and the edge w."""
    torch.set_num_threads(threads)
    n, k = shape
    x = torch.randn(n, k).to(dtype)
    x.view(-1)[::5] = 0
    x.view(-1)[1::7] = 0.5
    x.view(-1)[2::11] = -0.0
    words, window, counts, _ = CPP.ops["encode"](
        x, torch.eye(k, dtype=dtype), torch.zeros(k, dtype=dtype), None, 0.5
    )
    assert torch.equal(unpack_rows(words, k), x > 0)
    assert torch.equal(unpack_rows(window, k), x.abs() < 0.5)
    assert torch.equal(counts, (x > 0).sum(0))
    assert packing.tail_is_zero(words, k)
    assert packing.tail_is_zero(window, k)


PRODUCTS = [(n, 97, 33) for n in EDGES] + [(33, k, 129) for k in EDGES]
PRODUCTS += [(3, 600, c) for c in EDGES]
# beyond the blocks of depth, of rows and of listed ones
PRODUCT_BLOCKS = [(5, 2700, 200), (600, 700, 40), (3000, 512, 5), (8200, 40, 5)]


@pytest.mark.parametrize(
    ("shape", "density", "threads"),
    alternating(PRODUCTS, (0.02, 0.5)) + alternating(PRODUCT_BLOCKS, (0.0, 0.09, 0.5, 1.0)),
)
def test_products_of_bits_err_less_than_twice_a_dense_product(level, shape, density, threads):
    torch.set_num_threads(threads)
    n, k, d_out = shape
    bits = torch.rand(n, k) < density
    words, dense = pack_rows(bits), bits.float()
    # views whose rows are neither next to each other nor on a cache line
    W, g = (torch.randn(rows, d_out + 5)[:, 3 : 3 + d_out] for rows in (k, n))
    b = torch.randn(d_out)
    recon = CPP.ops["decode"](words, W, b, 1, torch.float32)
    grad_W, _ = CPP.ops["decoder_backward"](words, g, k, 1, torch.float32)
    for got, left, right, plus in ((recon, dense, W, b), (grad_W, dense.T, g, 0)):
        exact = left.double() @ right.double() + plus
        eager = (left @ right + plus).double()
        allowed = 2 * (eager - exact).abs().max() + 2**-23 * exact.abs().max()
        assert (got.double() - exact).abs().max() <= allowed


# beyond a group of rows, a vector of columns and a block of the depth; and all three whole
DENSE = [(5, 3, 7), (7, 257, 17), (97, 255, 33), (13, 513, 300), (96, 256, 256), (6, 8, 16)]


@pytest.mark.parametrize("shape", DENSE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("level_with_products")
def test_dense_products_err_less_than_twice_torchs(shape, dtype):
    from bae_fast.backends.cpp import extension

    n, depth, columns = shape
    left, right = torch.randn(n, depth).to(dtype), torch.randn(depth, columns).to(dtype)
    left_by_columns, right_by_columns = left.t().contiguous().t(), right.t().contiguous().t()
    exact = left.double() @ right.double()
    allowed = 2 * (left.float() @ right.float() - exact).abs().max() + 2**-23 * exact.abs().max()
    made = []
    for a, b in itertools.product((left, left_by_columns), (right, right_by_columns)):
        out = torch.full((n, columns + 3), 9.0)[:, :columns]
        extension.op("unit_product")(a, b, 3, False, out)
        made.append(out)
        assert (out - exact).abs().max() <= allowed
    assert all(torch.equal(out, made[0]) for out in made)
    # a row alone, and with half of the columns, has the same bits
    alone = torch.empty(1, columns - columns // 2)
    extension.op("unit_product")(left[2:3], right[:, columns // 2 :], 3, False, alone)
    assert torch.equal(alone[0], made[0][2, columns // 2 :])
    extension.op("unit_product")(left, right, 3, True, made[0])
    assert (made[0] - 2 * exact).abs().max() <= 2 * allowed


def _operands(kind, n, d, k, *, sparse=False):
    """x, W_enc, b_enc. The bias leaves row 3 with nothing but its own rounding error, or, of a
    sparse code, the fourth of the largest entries of each column."""
    x, W = torch.randn(n, d), torch.randn(d, k) / d**0.5
    if kind == "outliers":
        x *= torch.exp(2 * torch.randn(d))
    elif kind == "one large dimension":
        x[:, 0] += 100
    elif kind == "features of all sizes":
        W *= torch.exp(6 * torch.randn(k))
    elif kind == "zeros and tiny numbers":
        x[5], W[:, 2], x[6], W[:, 7] = 0, 0, 1e-14 * x[6], 1e-13 * W[:, 7]
    elif kind == "products too small for float32":
        x[::10], W[:, ::10] = 3e-22 * x[::10], 3e-22 * W[:, ::10]
        x[3] = 0  # so that there is no bias
    elif kind == "too large for integers":
        x, W = x * 1e16, W * 1e-14
    elif kind == "mostly near zero":
        W = W * 1e-4 * torch.randn(k).abs() + torch.ones(d, 1) / d**0.5
        x -= x.mean(1, keepdim=True)
    if sparse:
        return x, W, -(x.double() @ W.double()).topk(4, dim=0).values[3].float()
    return x, W, (-(x[3].double() @ W.double())).float()


@pytest.mark.parametrize(
    ("kind", "exact"),
    [
        ("plain", True),
        ("outliers", True),
        ("one large dimension", True),
        ("features of all sizes", True),
        ("zeros and tiny numbers", True),
        ("products too small for float32", True),
        ("too large for integers", False),
        ("mostly near zero", False),
    ],
)
@pytest.mark.parametrize(
    ("shape", "dtype", "sparse"),
    [
        ((40, 7, 130), torch.float32, False),
        ((70, 300, 257), torch.float32, False),
        ((1030, 65, 96), torch.float32, False),
        ((70, 65, 150), torch.bfloat16, False),
        ((1030, 130, 600), torch.float32, True),
        ((1100, 70, 130), torch.bfloat16, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("width", [None, 0.3], ids=str)
@pytest.mark.usefixtures("level_with_products")
def test_bits_are_those_of_float64_sums(kind, exact, shape, dtype, sparse, width):
    """Whatever integers do not decide is summed again: those of 8 bits, which sparse codes of many
    rows begin with (screened_bytes.h), or of 16 (screened_encode.h)."""
    n, d, k = shape
    x, W, b = (t.to(dtype) for t in _operands(kind, n, d, k, sparse=sparse))
    pre = x.double() @ W.double() + b.double()
    limit = torch.tensor(0.0 if width is None else width).double()  # of float32
    sizes = x.double().abs() @ W.double().abs() + b.double().abs() + limit
    open_ = 1e-14 if exact else 1e-5  # of the sizes: a sum in fp32 where integers do not serve
    for by_columns in (False, True):
        W_enc = W.t().contiguous().t() if by_columns else W
        words, window, *_ = CPP.ops["encode"](x, W_enc, b, None, width)
        differ = unpack_rows(words, k) != (pre > 0)
        assert not (differ & (pre.abs() > open_ * sizes)).any()
        if width is not None:
            differ = unpack_rows(window, k) != (pre.abs() < limit)
            assert not (differ & ((pre.abs() - limit).abs() > open_ * sizes)).any()
    if exact:  # neither do other rows and columns change a bit, nor threads
        torch.set_num_threads(1)
        some = CPP.ops["encode"](x[:33], W[:, 3:], b[3:], None, width)
        assert torch.equal(unpack_rows(some[0], k - 3), unpack_rows(words, k)[:33, 3:])


def test_numbers_that_are_not_finite_reach_their_row_and_column_alone(level):
    """A panel is padded with zeros, and zero times infinity is NaN."""
    n, d, k = 70, 9, 150
    x, W = torch.randn(n, d), torch.randn(d, k)
    want = CPP.ops["encode"](x, W, torch.zeros(k), None, 0.5)
    x[68, 3], x[5, 0], W[2, 149], W[1, 64] = torch.inf, torch.nan, -torch.inf, torch.nan
    got = CPP.ops["encode"](x, W, torch.zeros(k), None, 0.5)
    pre = x @ W
    assert torch.equal(unpack_rows(got[0], k)[[5, 68]], pre[[5, 68]] > 0)
    assert torch.equal(unpack_rows(got[0], k)[:, [64, 149]], pre[:, [64, 149]] > 0)
    for mine, before in zip(got[:2], want[:2], strict=True):
        differs = unpack_rows(mine, k) != unpack_rows(before, k)
        differs[[5, 68]], differs[:, [64, 149]] = False, False
        assert not differs.any()


@pytest.mark.parametrize("surrogate", ["sigmoid", "identity"])
def test_the_whole_layer_gives_the_same_integers_and_nearly_the_same_gradients(
    level, threads, surrogate
):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(130, 17, generator=g)
    parameters = [torch.randn(s, generator=g) * 0.3 for s in ((17, 300), (300,), (300, 17), (17,))]

    def run(impl):
        leaves = [t.clone().requires_grad_() for t in parameters]
        out = bf.binary_autoencoder(
            x, *leaves, impl=impl, covariance=True, surrogate=surrogate, multilinear=True
        )
        loss = ((out.recon - x) ** 2).mean() + 0.01 * out.entropy + 0.01 * out.covariance
        (loss + 0.1 * out.variance).backward()
        return out, [leaf.grad for leaf in leaves]

    (mine, grads), (other, expected) = run("cpp"), run("torch")
    assert mine.code.equal(other.code)
    assert mine.entropy == other.entropy
    assert mine.covariance == other.covariance
    for a, e in zip(grads, expected, strict=True):
        assert (a - e).abs().max() <= 1e-5 * e.abs().max()


def test_layout_constants_are_those_of_packing():
    text = (ROOT / "csrc" / "layout.h").read_text()
    found = dict(re.findall(r"constexpr int64_t (k\w+) = (\d+);", text))
    assert int(found["kWordBits"]) == packing.WORD_BITS
    assert int(found["kFeatureAlignWords"]) == packing.FEATURE_ALIGN_WORDS


# -- choice of the level -----------------------------------------------------------------------


def fresh(program, **environment):
    return processes.run("-c", program, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment)


@pytest.mark.parametrize("name", levels())
def test_the_environment_forces_a_level_and_info_tells_it(name):
    program = "import bae_fast as bf; print(bf.info()['cpu']['simd'])"
    assert fresh(program, BAE_FAST_SIMD=name).stdout.strip() == name


def test_an_unknown_or_missing_level_is_an_error():
    done = fresh("import bae_fast", BAE_FAST_SIMD="sse9")
    assert "BAE_FAST_SIMD must be one of" in done.stderr
    lacking = "neon" if "scalar" in levels() and "avx2" in levels() else "avx2"
    program = "import bae_fast as bf; bf.warmup('cpp')"
    done = fresh(program, BAE_FAST_SIMD=lacking)
    assert f"BAE_FAST_SIMD={lacking}, which this CPU lacks" in done.stderr


def test_the_extension_names_no_folder_of_the_machine_that_built_it():
    content = Path(importlib.import_module("bae_fast._C").__file__).read_bytes()
    for folder in (ROOT, Path(torch.__file__).parent):
        assert str(folder).encode() not in content
