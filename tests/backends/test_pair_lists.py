"""The covariance from lists: the integers and the gradients of the form by bits, and of NumPy."""

import functools

import numpy as np
import pytest
import torch

import bae_fast as bf
from bae_fast.backends.cpp import covariance as cpp_covariance
from bae_fast.backends.cpp import extension
from bae_fast.backends.torch import pair_lists as torch_lists
from bae_fast.ops import registry
from bae_fast.packing import pack_rows

CPP = registry.BACKENDS["cpp"]
IMPLS = ["torch"] if CPP.unavailable is not None else ["cpp", "torch"]
NEVER = float("inf")
# No dense features; those on in 40 % of the rows; in 16 %: where rows have eight of them.
COSTS = [1e-9, 6.0, 40.0]


def set_cost(monkeypatch, cost):
    """Lists where they visit few entries beside bits; ``NEVER``: bits alone."""
    table = dict.fromkeys(cpp_covariance.LIST_COST, cost)
    monkeypatch.setattr(cpp_covariance, "LIST_COST", table)
    monkeypatch.setattr(torch_lists, "LIST_COST", cost)
    monkeypatch.setattr(torch_lists, "GATHER_COST", 1e-9)


def levels():
    if CPP.unavailable is not None:
        return ["scalar"]
    return [name for name in ("scalar", "avx2", "avx512", "neon", "amx") if has(name)]


def has(name):
    found = extension.op("simd")(extension.LEVELS[name]) >= 0
    extension.use_simd(None)
    return found


def codes(n, k, mean, dense=0, seed=0):
    """Log-normal densities with constant columns, twins, a half-dense tie and ``dense`` more."""
    g = torch.Generator().manual_seed(seed)
    density = torch.exp(torch.randn(k, generator=g) * 1.5)
    density = (density * mean / density.sum()).clamp(max=0.9)
    if dense:
        density[torch.randperm(k, generator=g)[:dense]] = 0.5
    bits = torch.rand(n, k, generator=g) < density
    bits[:, 0], bits[:, 1] = True, False
    if k > 6:
        bits[:, 3] = bits[:, 4]
        bits[:, 5] = torch.arange(n) % 2 == 0
        bits[:, 6] = torch.arange(n) % 4 < 2  # independent of the last: V is zero where 4 divides n
    return bits


def product(left, right):
    """Of integers whose sums of products are below 2^53: NumPy hands float64 to BLAS alone."""
    return (left.astype(np.float64) @ right.astype(np.float64)).astype(np.int64)


def exact(bits):
    b = bits.numpy().astype(np.int64)
    counts = b.sum(0)
    v = len(b) * product(b.T, b) - np.outer(counts, counts)
    np.fill_diagonal(v, 0)
    return torch.from_numpy(counts), v


def exact_gradient(bits, counts, v, n_rows):
    """N (B S) - n^T S for S the signs of V."""
    s = np.sign(v)
    return n_rows * product(bits.numpy(), s) - product(counts.numpy(), s)


@functools.cache
def exact_case(shape):
    """Of one of ``SHAPES``: words, counts, sum |V| and N (B S) - n^T S."""
    bits = codes(*shape)
    counts, v = exact(bits)
    gradient = exact_gradient(bits, counts, v, shape[0])
    return pack_rows(bits), counts, int(np.abs(v).sum()), gradient


def gradient_of_bits(impl, words, counted, counts, n_rows, window=None, signs=None):
    """N (B S) - n^T S at every bit of ``words``, by the encoder's backward on x = 1."""
    n, k = len(words), len(counts)
    zero = torch.zeros(n, k, dtype=torch.float64)
    empty = torch.empty(0, dtype=torch.int32)
    scale = torch.tensor(n_rows * (n_rows - 1) / 2, dtype=torch.float64)
    return registry.BACKENDS[impl].ops["encoder_backward"](
        torch.eye(n, dtype=torch.float64), zero, zero[0], torch.zeros(k, 1, dtype=torch.float64),
        words, empty if window is None else window, None, None, None, None, scale, signs, counted,
        counts, torch.tensor(n_rows), "identity" if window is None else "rectangle", 1.0, 1,
        [False, True, True],
    )[1]  # fmt: skip


SHAPES = [
    (2, 7, 2, 0), (3, 64, 2, 1), (31, 33, 3, 0), (32, 65, 4, 33), (64, 300, 5, 0),
    (257, 513, 8, 3), (512, 700, 8, 70), (1030, 129, 5, 64),
]  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numerator_and_gradient_equal_numpy(shape, cost, impl, monkeypatch):
    set_cost(monkeypatch, cost)
    n, k = shape[:2]
    words, counts, total, expected = exact_case(shape)
    numerator, signs = registry.BACKENDS[impl].ops["covariance"](
        words, counts, torch.tensor(n), True
    )
    assert int(numerator) == total
    if cost == COSTS[0]:
        assert signs.numel() == 0  # it was by lists
    assert np.array_equal(gradient_of_bits(impl, words, words, counts, n).numpy(), expected)
    window = torch.rand(n, k) < 0.1
    got = gradient_of_bits(impl, words, words, counts, n, pack_rows(window))
    assert np.array_equal(got.numpy(), expected * window.numpy())


@pytest.mark.parametrize("impl", IMPLS)
def test_lists_and_bits_agree_on_two_hundred_codes(impl, monkeypatch):
    draw = np.random.default_rng(0)
    for seed in range(200):
        n, k = int(draw.integers(2, 97)), int(draw.integers(2, 161))
        bits = codes(n, k, float(draw.uniform(0.1, k / 4)), int(draw.integers(0, k)), seed)
        words, counts = pack_rows(bits), bits.sum(0)
        found = []
        for cost in (COSTS[0], NEVER):
            set_cost(monkeypatch, cost)
            numerator, signs = registry.BACKENDS[impl].ops["covariance"](
                words, counts, torch.tensor(n), True
            )
            assert (signs.numel() == 0) == (cost != NEVER)  # by lists, and by bits
            gradient = gradient_of_bits(impl, words, words, counts, n)
            found.append((int(numerator), gradient))
        assert found[0][0] == found[1][0], seed
        assert torch.equal(found[0][1], found[1][1]), seed


@pytest.mark.skipif(CPP.unavailable is not None, reason=f"cpp: {CPP.unavailable}")
@pytest.mark.parametrize("cost", COSTS)
def test_kept_lists_give_the_gradient_of_lists_made_again(cost, monkeypatch):
    set_cost(monkeypatch, cost)
    bits = codes(300, 200, 6, dense=25)
    words, (counts, v) = pack_rows(bits), exact(bits)
    _, kept = CPP.ops["covariance"](words, counts, torch.tensor(300), False, True)
    assert kept.dim() == 1
    assert kept.numel() > 3 * int(counts[(counts > 0) & (counts < 300)].sum())
    others = torch.rand(33, 200) < 0.1
    for at_hand, counted in ((bits, words), (bits, None), (others, words)):
        for window in (None, torch.rand(at_hand.shape) < 0.05):
            got = gradient_of_bits(
                "cpp", words if at_hand is bits else pack_rows(others), counted, counts, 300,
                None if window is None else pack_rows(window), kept,
            )  # fmt: skip
            want = exact_gradient(at_hand, counts, v, 300)
            want = want if window is None else want * window.numpy()
            assert np.array_equal(got.numpy(), want)


@pytest.mark.skipif(CPP.unavailable is not None, reason=f"cpp: {CPP.unavailable}")
@pytest.mark.parametrize("shape", [(0,), (2, 70, 2), (2, 69, 3)], ids=str)
@pytest.mark.parametrize("windowed", [False, True])
def test_signs_that_are_no_planes_are_refused(shape, windowed):
    bits = torch.rand(40, 70) < 0.3
    words, signs = pack_rows(bits), torch.zeros(shape, dtype=torch.int32)
    window = pack_rows(torch.rand(40, 70) < 0.1) if windowed else None
    with pytest.raises(RuntimeError, match=r"signs must hold planes \[2, 70, 3\]; got"):
        gradient_of_bits("cpp", words, words, bits.sum(0), 40, window, signs)


@pytest.mark.skipif(CPP.unavailable is not None, reason=f"cpp: {CPP.unavailable}")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", levels())
def test_every_level_and_number_of_threads_gives_the_integers_by_bits(name, threads, monkeypatch):
    extension.use_simd(name)
    torch.set_num_threads(threads)
    try:
        bits = codes(2050, 900, 12, dense=40)
        words, counts = pack_rows(bits), bits.sum(0)
        window = pack_rows(torch.rand(bits.shape) < 0.02)
        found = []
        for cost in (40.0, NEVER):
            set_cost(monkeypatch, cost)
            numerator, signs = CPP.ops["covariance"](words, counts, torch.tensor(2050), True)
            assert (signs.numel() == 0) == (cost < NEVER)
            parts = [gradient_of_bits("cpp", words, words, counts, 2050, w) for w in (None, window)]
            found.append([numerator, *parts])
        assert all(map(torch.equal, *found))
    finally:
        extension.use_simd(None)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["constant", "empty", "all dense", "one row on", "one column on"])
def test_degenerate_codes(kind, impl, monkeypatch):
    set_cost(monkeypatch, COSTS[0])
    bits = torch.zeros(40, 70, dtype=torch.bool)
    if kind == "constant":
        bits[:] = True
    elif kind == "all dense":
        bits = torch.rand(40, 70) < 0.5
    elif kind == "one row on":
        bits[3] = True
    elif kind == "one column on":
        bits[::3, 5] = True
    words = pack_rows(bits)
    counts, v = exact(bits)
    numerator, _ = registry.BACKENDS[impl].ops["covariance"](words, counts, torch.tensor(40), True)
    assert int(numerator) == int(np.abs(v).sum())
    got = gradient_of_bits(impl, words, words, counts, 40)
    assert np.array_equal(got.numpy(), exact_gradient(bits, counts, v, 40))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cost", COSTS)
def test_rows_at_hand_may_be_others_than_those_counted(cost, impl, monkeypatch):
    """They may have features that no counted row has: S is zero there."""
    set_cost(monkeypatch, cost)
    bits = codes(300, 200, 6, dense=25)
    counts, v = exact(bits)
    others = torch.rand(33, 200) < 0.1
    expected = exact_gradient(others, counts, v, 300)
    for window in (None, torch.rand(33, 200) < 0.2):
        got = gradient_of_bits(
            impl, pack_rows(others), pack_rows(bits), counts, 300,
            None if window is None else pack_rows(window),
        )  # fmt: skip
        want = expected if window is None else expected * window.numpy()
        assert np.array_equal(got.numpy(), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_at_hand_that_begin_where_those_counted_do_are_other_rows(impl, monkeypatch):
    set_cost(monkeypatch, 1e-9)
    bits = codes(128, 200, 6)
    words = pack_rows(bits)
    counts, v = exact(bits[::2])
    window = torch.rand(64, 200) < 0.2
    got = gradient_of_bits(impl, words[:64], words[::2], counts, 64, pack_rows(window))
    want = exact_gradient(bits[:64], counts, v, 64) * window.numpy()
    assert np.array_equal(got.numpy(), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_seventy_thousand_rows(impl, monkeypatch):
    set_cost(monkeypatch, 40.0)
    bits = codes(70_000, 90, 4, dense=2)
    counts, v = exact(bits)
    numerator, signs = registry.BACKENDS[impl].ops["covariance"](
        pack_rows(bits), counts, torch.tensor(70_000), True
    )
    assert signs.numel() == 0
    assert int(numerator) == int(np.abs(v).sum())


def layer_gradients(impl, cost, monkeypatch, **options):
    set_cost(monkeypatch, cost)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(130, 16, generator=g)
    k = 200 * options.get("n_bits", 1)
    shapes = ((16, k), (k,), (200, 16), (16,))
    leaves = [torch.randn(s, generator=g) * 0.3 for s in shapes]
    leaves[1] -= 1.5
    leaves = [x, *leaves]
    for leaf in leaves:
        leaf.requires_grad_()
    past = None
    if options.pop("bank", False):
        past = bf.encode(torch.randn(90, 16, generator=g), *leaves[1:3]).statistics()
    out = bf.binary_autoencoder(*leaves, impl=impl, covariance=True, past=past, **options)
    (((out.recon - x) ** 2).mean() + 0.01 * out.entropy + 0.01 * out.covariance).backward()
    return [out.covariance.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "options",
    [
        {"surrogate": "rectangle"},
        {"surrogate": "rectangle", "surrogate_width": 50.0},
        {"surrogate": "identity"},
        {"surrogate": "sigmoid"},
        {"surrogate": "rectangle", "n_bits": 2},
        {"surrogate": "rectangle", "mask": torch.arange(130) % 3 != 1},
        {"surrogate": "rectangle", "bank": True},
    ],
    ids=str,
)
def test_the_layer_gives_the_same_bits_by_lists_and_by_bits(options, impl, monkeypatch):
    """fp32, every term, and whatever else the layer can be asked for."""
    by_bits = layer_gradients(impl, NEVER, monkeypatch, **options)
    for cost in COSTS[:2]:
        assert all(map(torch.equal, layer_gradients(impl, cost, monkeypatch, **options), by_bits))


@pytest.mark.skipif(CPP.unavailable is not None, reason=f"cpp: {CPP.unavailable}")
def test_the_measured_ones_decide_and_dense_columns_do_not_throw_it_back():
    n, k = 512, 4096

    def listed(bits):
        counts = bits.sum(0)
        _, signs = CPP.ops["covariance"](pack_rows(bits), counts, torch.tensor(n), True)
        return signs.numel() == 0

    sparse = torch.rand(n, k) < 0.002
    assert listed(sparse)
    assert not listed(torch.rand(n, k) < 0.4)
    sparse[:, ::32] = torch.rand(n, k // 32) < 0.5
    assert listed(sparse)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_million_columns_with_sizes_beyond_int64(impl):
    """(F N)^2 / 4 = 2^65 at F = 2^20, N = 12,289, in memory of 300 rows."""
    k, n = 2**20, 300
    words = torch.zeros(n, k // 32, dtype=torch.int32)
    at = torch.arange(0, n, 2)
    words[at, at * 3], words[at[::2], 5] = 1, 4
    counts = bf.BinaryCode(words, k).counts()
    total = 12_289  # of which all but 300 are empty
    numerator, _ = registry.BACKENDS[impl].ops["covariance"](
        words, counts, torch.tensor(total), True
    )
    used = (counts > 0).nonzero().flatten()
    small = torch.stack([words[:, c // 32] >> int(c % 32) & 1 for c in used], 1).long()
    ones = small.sum(0)
    v = total * (small.T @ small) - torch.outer(ones, ones)
    v.fill_diagonal_(0)
    assert int(numerator) == int(v.abs().sum())
