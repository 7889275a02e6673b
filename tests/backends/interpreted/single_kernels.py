"""Single kernels in Triton's interpreter against integers and float64."""

import numpy as np
import pytest
import torch
from count_digits import count_digits, from_digits
from triton_steps import (
    DTYPES,
    NAMES,
    OPS,
    assert_as_good_as_eager,
    assert_as_torch_under_autocast,
    codes,
    exact_covariance,
    problem,
    run,
)

from bae_fast import packing
from bae_fast.kernels import bits, configs, covariance, launch, products
from bae_fast.kernels import counts as count_kernels
from bae_fast.kernels.bodies import decode, encoder_backward
from bae_fast.packing import pack_rows, unpack_rows
from bae_fast.statistics import entropy_bits, entropy_gradient

EDGES = [(2, 97), (31, 33), (64, 1), (70, 31), (33, 127), (64, 129), (70, 257), (520, 65)]


@pytest.mark.parametrize("shape", EDGES, ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
def test_the_covariance_and_its_signs_equal_numpy(shape, wide, monkeypatch):
    if wide:
        monkeypatch.setattr(covariance, "INT32_ROWS", 1)
    dense, words = codes(*shape)
    counts, v = exact_covariance(dense)
    total, ones = torch.tensor(shape[0]), torch.from_numpy(counts)
    numerator, signs = OPS["covariance"](words, ones, total, True)
    assert int(numerator) == int(np.abs(v).sum())
    above, below = unpack_rows(signs, shape[1], torch.int8)
    np.testing.assert_array_equal((above - below).numpy(), np.sign(v))
    assert all(packing.tail_is_zero(plane, shape[1]) for plane in signs)
    alone, nothing = OPS["covariance"](words, ones, total, False)
    assert int(alone) == int(numerator)
    assert nothing.numel() == 0


def test_ties_are_common_in_what_is_tested():
    _, v = exact_covariance(codes(64, 129)[0])
    assert (v == 0).sum() > 129


@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_the_product_with_the_signs_is_exact_stored_and_recomputed(shape):
    n, k = shape
    dense, words = codes(n, k)
    counts, v = exact_covariance(dense)
    s, b = np.sign(v), dense.numpy().astype(np.int64)
    expected = n * (b @ s) - counts @ s
    assert np.abs(expected).max() < 2**24  # exact in fp32
    ones, total = torch.from_numpy(counts), torch.tensor(n)
    _, signs = OPS["covariance"](words, ones, total, True)
    middle = max(k // 2 // 32 * 32, min(k, 32))
    for planes, rows in ((signs, None), (None, words)):
        spread = encoder_backward._Signs(
            covariance, words, None, total * 0.5, planes, rows, ones, total
        )
        spread.scale = torch.tensor(1.0)
        parts = [spread(0, middle), *([spread(middle, k)] if middle < k else [])]
        np.testing.assert_array_equal(torch.cat(parts, 1).numpy(), expected)


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("n", [48_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_more_rows_than_int32_can_hold(n, monkeypatch):
    """V itself leaves int32 beyond 92,681 rows, products on the way to it beyond 46,340."""
    table = {"covariance": (configs.Config(128, 128, 256, 4, 1),)}
    monkeypatch.setitem(
        configs.DEFAULTS, "interpreter", {**configs.DEFAULTS["interpreter"], **table}
    )
    dense = torch.rand(n, 9) < torch.linspace(0.01, 0.99, 9)
    dense[:, 5:7] = torch.rand(n, 2) < 0.99
    dense[::2, 7], dense[1::2, 7] = True, False
    dense[:, 8] = dense[:, 7]
    counts, v = exact_covariance(dense)
    assert n * int((dense[:, 5] & dense[:, 6]).sum()) > 2**31
    assert n < 92_682 or np.abs(v).max() > 2**31
    numerator, signs = OPS["covariance"](
        pack_rows(dense), torch.from_numpy(counts), torch.tensor(n), True
    )
    assert int(numerator) == int(np.abs(v).sum())
    above, below = unpack_rows(signs, 9, torch.int8)
    np.testing.assert_array_equal((above - below).numpy(), np.sign(v))


@pytest.mark.parametrize("shape", [*EDGES, (300, 300)], ids=str)
def test_transposed_words_equal_the_layouts_definition(shape):
    _, words = codes(*shape)
    columns = packing.rows_to_columns(words, shape[1])
    assert torch.equal(bits.feature_packed(words, shape[1]), packing.columns_to_features(columns))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 65, 70), (40, 200, 3), (65, 31, 129)], ids=str)
def test_bits_times_integers_are_exact(dtype, shape):
    """Every bit of a word meets its own row of numbers: distinct integers, exact sums."""
    n, k, d = shape
    dense, words = codes(n, k)
    g = torch.Generator().manual_seed(1)
    numbers = torch.randint(-100, 101, (k, d), generator=g)
    expected = dense.long() @ numbers
    got = products.bits_product(words, numbers.to(dtype), None, torch.float32)
    assert torch.equal(got.long(), expected)
    features = bits.feature_packed(words, k)
    rows = torch.randint(-100, 101, (n, d), generator=g)
    got = products.bits_product(features, rows.to(dtype), None, torch.float32)
    assert torch.equal(got.long(), dense.t().long() @ rows)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, torch.bfloat16) for shape in EDGES] + [((300, 300), dtype) for dtype in DTYPES],
    ids=str,
)
def test_unpacked_words_equal_the_layouts_definition(shape, dtype):
    dense, words = codes(*shape)
    got = bits.unpack(words, shape[1], dtype)
    assert got.dtype == dtype
    assert torch.equal(got, dense.to(dtype))
    assert got.stride(0) % 32 == 0
    padded = torch.full((shape[0], words.shape[1] + 3), -1, dtype=torch.int32)
    padded[:, 1:-2] = words
    assert torch.equal(bits.unpack(padded[:, 1:-2], shape[1], dtype), got)


@pytest.fixture
def unpacked(monkeypatch):
    """Decode and its gradient as on compute capability 9.x."""
    monkeypatch.setattr(decode, "_UNPACKED", ("interpreter",))
    monkeypatch.setattr(decode, "bits_product", None)


@pytest.mark.parametrize(
    ("dtype", "scratch"), [(torch.bfloat16, "0"), (torch.float16, "64")], ids=str
)
def test_products_of_unpacked_bits(dtype, scratch, unpacked, monkeypatch):
    monkeypatch.setenv("BAE_FAST_SCRATCH_MB", scratch)  # 256 columns at a time, or all
    monkeypatch.setattr(decode, "ROW_BLOCK", 32)
    x, parameters, direction = problem(40, 9, 300, 1, 5, dtype)
    assert_as_good_as_eager(
        x, parameters, direction, NAMES[:3], surrogate="rectangle", surrogate_width=2.5
    )


def test_unpacked_products_under_autocast(unpacked, monkeypatch):
    """fp32 gradients of fp32 weights; weights are copied a chunk at a time."""
    monkeypatch.setenv("BAE_FAST_SCRATCH_MB", "0")
    x, parameters, direction = problem(34, 9, 300, 1, 5)
    assert_as_torch_under_autocast(x, parameters, direction)


@pytest.mark.parametrize("k", [1, 33, 1024, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropy_covariance_and_slopes_equal_float64(k, dtype):
    """Constant columns, where logarithms end at eps, among them."""
    n_rows = torch.tensor(977)
    counts = torch.randint(0, 978, (k,))
    counts[: k // 2 : 2], counts[1 : k // 2 : 3] = 0, 977
    numerator, grad = torch.tensor(2**53 + 1), torch.tensor(-1.5)
    entropy, covariance = OPS["terms"](counts, n_rows, numerator, dtype)
    for got, exact in (
        (entropy, entropy_bits(counts, n_rows)),
        (covariance, torch.tensor((2**53 + 1) / (977 * 976), dtype=torch.float64)),
        (OPS["slopes"](counts, n_rows, grad, dtype), entropy_gradient(counts, n_rows) * grad),
    ):
        assert got.dtype == dtype
        # logarithms of two libraries differ by a last place, and cancel where p is near a half
        allowed = 2 * torch.finfo(dtype).eps * exact.abs() + 1e-15 / 977
        assert ((got.double() - exact).abs() <= allowed).all()
    again, none = OPS["terms"](counts, n_rows, None, dtype)
    assert torch.equal(again, entropy)
    assert (none.dtype, float(none)) == (dtype, 0)


@pytest.mark.parametrize("n_bound", [None, 1, 2, 255, 256, 4096])
def test_binary_digits_of_counts(n_bound):
    counts = torch.tensor([0, 1, 2, 200, 255, 256, 4096, 2**40])
    if n_bound is not None:
        counts = counts.clamp(max=n_bound)
    grad, n_rows = torch.tensor(0.75), torch.tensor(4096)
    digits, scale = count_kernels.sign_operands(counts, n_rows, grad, n_bound)
    assert digits.shape[0] == (63 if n_bound is None else n_bound.bit_length())
    assert torch.equal(digits, count_digits(counts, n_bound))
    raw = unpack_rows(digits, 8, torch.int32)
    assert torch.equal(count_kernels.from_digits(raw), counts)
    assert torch.equal(count_kernels.from_digits(raw), from_digits(raw))
    exact = 0.75 * 2 / (4096 * 4095)
    assert scale.dtype == torch.float32
    assert float(scale) == float(torch.tensor(exact, dtype=torch.float64).float())


def test_the_tiles_of_a_triangle_are_each_there_once():
    """The order of tiles in the kernel, for odd and even numbers of tiles."""
    for side in range(1, 9):
        seen = []
        for program in range(covariance._tiles(side * 128, 128)):
            i, j = program // (side + 1), program // (side + 1) + program % (side + 1)
            if j >= side:
                i, j = side - 1 - i, j - 1 - i
            seen.append((i, j))
        expected = [(i, j) for i in range(side) for j in range(i, side)]
        assert sorted(seen) == expected


@pytest.mark.parametrize(
    ("chip", "entry"),
    [
        ("sm_90", 1),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (("sm_80", 0), ("sm_80", 1), ("sm_90", 0))
        ),
    ],
)  # fmt: skip
def test_the_tile_sizes_of_real_chips(chip, entry, monkeypatch):
    monkeypatch.setitem(configs.DEFAULTS, "interpreter", configs.DEFAULTS[chip])
    x, parameters, direction = problem(140, 70, 300, 1, 40, torch.bfloat16)
    with launch.table_entry(entry):
        assert_as_good_as_eager(
            x, parameters, direction, NAMES[:3], surrogate="rectangle", surrogate_width=2.5
        )


def test_results_are_written_whole():
    """Fresh memory is filled with NaN and large integers: none of it may show."""
    x, parameters, direction = problem(40, 9, 70, 1, 5, torch.bfloat16)
    mask = torch.arange(40) % 3 != 1
    expected, code = run("triton", x, parameters, direction, mask=mask)
    torch._C._set_deterministic_algorithms(True)  # torch's own function imports its compiler
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(1).isnan().all()
        got, again = run("triton", x, parameters, direction, mask=mask)
    finally:
        torch._C._set_deterministic_algorithms(False)
    assert again.equal(code)
    assert all(torch.equal(got[name], expected[name]) for name in NAMES)


def far(rows, columns, dtype):
    """Rows 2^30 elements apart: the third begins past 2^31. Memory that is not touched is free."""
    stride = 2**30
    base = torch.empty((rows - 1) * stride + columns, dtype=dtype)
    return base.as_strided((rows, columns), (stride, 1))


@pytest.mark.usefixtures("watched")
def test_offsets_past_2_to_the_31_reach_their_rows():
    k, d = 70, 5
    x, (W, b, *_), _ = problem(3, d, k, 1, d, torch.bfloat16)
    distant = far(3, d, torch.bfloat16)
    distant.copy_(x)
    assert distant.stride(0) * 2 >= 2**31
    words, _, counts, _ = OPS["encode"](distant, W, b, None, None)
    near = OPS["encode"](x, W, b, None, None)
    assert torch.equal(words, near[0])
    assert torch.equal(counts, near[2])
    distant_words = far(3, 3, torch.int32)
    distant_words.copy_(words)
    dense = torch.randint(-9, 10, (k, d)).bfloat16()
    expected = unpack_rows(words, k).long() @ dense.long()
    got = products.bits_product(distant_words, dense, None, torch.float32)
    assert torch.equal(got.long(), expected)
    assert torch.equal(bits.feature_packed(distant_words, k), bits.feature_packed(words, k))
    features = bits.feature_packed(words, 3)
    distant_features = far(3, features.shape[1], torch.int32)
    distant_features.copy_(features)
    for a, e in zip(
        covariance.covariance(distant_features, counts[:3], torch.tensor(3), True, 3),
        covariance.covariance(features, counts[:3], torch.tensor(3), True, 3),
        strict=True,
    ):
        assert torch.equal(a, e)
