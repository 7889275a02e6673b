"""impl="torch" and impl="cpp" against the reference in float64, and the integers against NumPy."""

import functools
import itertools

import numpy as np
import pytest
import torch

import bae_fast as bf
from bae_fast.ops import registry
from bae_fast.packing import unpack_rows
from bae_fast.surrogates import SURROGATES

_CPP = registry.BACKENDS["cpp"].unavailable
IMPLS = ["torch", pytest.param("cpp", marks=pytest.mark.skipif(_CPP is not None, reason=str(_CPP)))]
NAMES = ["recon", "entropy", "covariance", "x", "W_enc", "b_enc", "W_dec", "b_dec"]

# (N, d_in, F, n_bits, d_out): every size hugs a word's edge somewhere
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 1, 1, 1, 3),
    (2, 3, 31, 1, 3),
    (31, 5, 33, 1, 5),
    (32, 67, 64, 1, 67),
    (33, 8, 65, 1, 2),
    (64, 4, 257, 1, 4),
    (130, 67, 257, 1, 67),
    (7, 6, 5, 2, 6),
    (65, 9, 33, 3, 4),
    (64, 5, 17, 8, 5),
]


def problem(n, d, f, k, d_out, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    x = normal(n, d)
    W_enc, b_enc = normal(d, k * f) * d**-0.5, normal(k * f) * 0.3
    # constant columns: never on, always on
    b_enc[:: max(f * k // 5, 1)] = -100
    b_enc[1 :: max(f * k // 5, 1)] = 100
    if f * k > 4:  # twin columns, and equal halves of a power of two: ties V = 0
        W_enc[:, 2], b_enc[2] = W_enc[:, 3], b_enc[3]
    return x, [W_enc, b_enc, normal(f, d_out), normal(d_out)], normal(n, d_out)


def run(impl, x, parameters, direction, terms=("recon", "entropy", "covariance"), **options):
    leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
    out = bf.binary_autoencoder(*leaves, impl=impl, covariance="covariance" in terms, **options)
    # squares, so that every term's upstream gradient differs by entry and from one
    loss = 0
    if "recon" in terms:
        loss = loss + ((out.recon - direction) ** 2).sum()
    if "entropy" in terms:
        loss = loss + out.entropy**2 * 0.01
    if "covariance" in terms:
        loss = loss + out.covariance**2 * 0.01
    if out.variance is not None:
        assert out.variance.item() == 0
        loss = loss + 0.7 * out.variance
    loss.backward()
    values = [out.recon, out.entropy, out.covariance, *(leaf.grad for leaf in leaves)]
    return {
        k: None if v is None else v.detach() for k, v in zip(NAMES, values, strict=True)
    }, out.code


def assert_same(actual, expected, tolerance=1e-12):
    for name in NAMES:
        a, e = actual[name], expected[name]
        assert (a is None) == (e is None), name
        if e is not None:
            assert a.dtype == e.dtype
            scale = e.abs().max()
            if name == "b_enc" and scale < 1e-12 * expected["W_enc"].abs().max():
                # the covariance's gradient sums to zero over the counted rows: under `identity`
                # what is left of b_enc's is rounding on both sides, to be judged by its summands
                scale = expected["W_enc"].abs().max()
            assert (a - e).abs().max() <= tolerance * scale, name


@functools.lru_cache(maxsize=1)
def reference_of_every_term(surrogate, shape):
    """Terms, options, values with gradients, and code, for each choice of terms and each mask."""
    x, parameters, direction = problem(*shape)
    n, found = shape[0], []
    keep = torch.arange(n) % 3 != 1
    terms = ["recon", "entropy", "covariance"]
    for mask, size in itertools.product([None, keep], [1, 2, 3]):
        if mask is not None and n < 4:
            continue
        for used in itertools.combinations(terms, size):
            if n == 1 and "covariance" in used:
                continue
            options = {"surrogate": surrogate, "n_bits": shape[3], "mask": mask}
            values, code = run("reference", x, parameters, direction, used, **options)
            found.append((used, options, values, code))
    return found


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_equal_the_reference(impl, surrogate, shape):
    x, parameters, direction = problem(*shape)
    for used, options, expected, code in reference_of_every_term(surrogate, shape):
        actual, packed = run(impl, x, parameters, direction, used, **options)
        assert packed.equal(code)
        assert_same(actual, expected)


@functools.cache
def reference_of_several_chunks():
    return run("reference", *problem(1024, 3, 2500, 1, 2), surrogate="identity")[0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sign_planes_mb", ["0", "64"])
def test_several_chunks_and_tiles_with_stored_or_recomputed_signs(
    impl, sign_planes_mb, monkeypatch
):
    monkeypatch.setenv("BAE_FAST_SIGN_PLANES_MB", sign_planes_mb)
    monkeypatch.setenv("BAE_FAST_SCRATCH_MB", "1")
    x, parameters, direction = problem(1024, 3, 2500, 1, 2)  # 256-column chunks, 3 tiles
    expected = reference_of_several_chunks()
    actual, _ = run(impl, x, parameters, direction, surrogate="identity")
    assert_same(actual, expected)


def numpy_covariance(bits):
    """Counts, V and its signs with NumPy's integers: shares no code with the package."""
    b = bits.numpy().astype(np.float64)  # NumPy has no BLAS for integers: exact below 2^53
    n, joint = len(b), (b.T @ b).astype(np.int64)
    counts = joint.diagonal()
    v = n * joint - np.outer(counts, counts)
    np.fill_diagonal(v, 0)
    return counts, v


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n", [2, 3, 31, 64, 100, 256, 5000])
@pytest.mark.parametrize("density", [0.02, 0.5, 0.97])
@pytest.mark.parametrize("form", ["chosen", "bits"])
def test_counts_numerator_and_signs_equal_numpy(impl, n, density, form, request):
    """In the form that is chosen, and in the one that keeps signs, which lists of ones do not."""
    if form == "bits":
        request.getfixturevalue("by_bits")
    bits = torch.rand(n, 101) < density
    bits[:, :3] = torch.tensor([False, True, True])
    counts, v = numpy_covariance(bits)
    code = bf.BinaryCode.from_dense(bits)
    stats = code.statistics(covariance=True, impl=impl)
    np.testing.assert_array_equal(stats.counts.numpy(), counts)
    assert int(stats.numerator) == int(np.abs(v).sum())
    if form == "bits":
        assert stats.signs is not None
    if stats.signs is not None:
        above, below = unpack_rows(stats.signs, 101, torch.int8)
        np.testing.assert_array_equal((above - below).numpy(), np.sign(v))
    assert float(stats.covariance()) == pytest.approx(np.abs(v).sum() / (n * (n - 1)), rel=1e-15)


def test_ties_are_common_in_what_is_tested():
    """The tests above hold 0 apart from +1 only if V is 0 somewhere off the diagonal."""
    _, v = numpy_covariance(torch.rand(64, 101) < 0.5)
    assert (v == 0).sum() > 101


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sign_planes_mb", ["0", "64"])
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_the_covariance_is_exact_at_any_precision_of_products(
    impl, precision, sign_planes_mb, monkeypatch
):
    """Counts above 2^12 have more digits than bf16 or TF32 hold."""
    monkeypatch.setenv("BAE_FAST_SIGN_PLANES_MB", sign_planes_mb)
    before = torch.get_float32_matmul_precision()
    x, parameters, direction = problem(6000, 3, 70, 1, 2)
    expected, _ = run("reference", x, parameters, direction, ["covariance"], surrogate="identity")
    torch.set_float32_matmul_precision(precision)
    try:
        actual, _ = run(impl, x, parameters, direction, ["covariance"], surrogate="identity")
    finally:
        torch.set_float32_matmul_precision(before)
    assert_same(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
def test_the_numerator_is_exact_beyond_what_float64_counts(impl):
    """A million rows of almost the same coin: sum |V| passes 2^53 within one tile."""
    words, k, counts, v = almost_the_same_coin()
    code = bf.BinaryCode(torch.from_numpy(words.view(np.int32)), k)
    stats = code.statistics(covariance=True, impl=impl)
    assert int(stats.counts.sum()) == counts.sum()
    assert int(np.abs(v).sum()) > 2**53
    assert int(stats.numerator) == int(np.abs(v).sum())


@functools.cache
def almost_the_same_coin():
    """Packed words of a million rows, their columns, counts and V."""
    n, k = 1_000_003, 256
    rng = np.random.default_rng(0)
    rare = rng.integers(0, 2**32, (4, n, k // 32), dtype=np.uint32)  # and of four: one in 16
    coin = np.where(rng.random((n, 1)) < 0.5, np.uint32(2**32 - 1), np.uint32(0))
    words = coin ^ rare[0] & rare[1] & rare[2] & rare[3]
    joint = np.zeros((k, k), dtype=np.int64)
    for part in np.array_split(words, 64):
        bits = np.unpackbits(part.view(np.uint8), axis=1, bitorder="little").astype(np.float32)
        joint += np.rint(bits.T @ bits).astype(np.int64)  # below 2^24: exact
    counts = np.diagonal(joint)
    v = n * joint - np.outer(counts, counts)
    np.fill_diagonal(v, 0)
    return words, k, counts, v


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_infinite_or_huge_bias_decides_its_bit(impl, dtype):
    x, W = torch.ones(2, 3, dtype=dtype), torch.zeros(3, 4, dtype=dtype)
    huge = torch.finfo(dtype).max
    bias = torch.tensor([float("inf"), float("-inf"), huge, -huge], dtype=dtype)
    assert bf.encode(x, W, bias, impl=impl).to_dense()[0].tolist() == [True, False] * 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = torch.tensor([float("inf"), float("-inf"), 3.4e38, -3.4e38])
        code = bf.encode(x.float(), W.float(), wide, impl=impl)
    assert code.to_dense()[0].tolist() == [True, False] * 2


@pytest.mark.parametrize("impl", IMPLS)
def test_more_rows_than_fp32_can_square(impl):
    """Beyond 4096 rows V leaves fp32's integers, beyond 46,340 int32's."""
    bits = torch.rand(70_000, 9) < torch.linspace(0.01, 0.99, 9)
    _, v = numpy_covariance(bits)
    stats = bf.BinaryCode.from_dense(bits).statistics(covariance=True, impl=impl)
    assert int(stats.numerator) == int(np.abs(v).sum())


def test_covariance_equals_torch_cov_where_there_is_no_tie():
    bits = torch.rand(101, 12) < 0.4  # 101 is prime: V = 0 only for constant columns
    c = torch.cov(bits.double().T)
    expected = c.abs().sum() - c.diagonal().abs().sum()
    stats = bf.BinaryCode.from_dense(bits).statistics(covariance=True)
    assert float(stats.covariance()) == pytest.approx(float(expected), rel=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
def test_statistics_of_more_rows_replace_those_of_the_call(impl):
    x, parameters, direction = problem(96, 5, 70, 1, 5)
    whole = bf.encode(x, *parameters[:2])
    stats = whole.statistics(covariance=True)
    part = slice(10, 40)
    expected, _ = run("reference", x[part], parameters, direction[part], stats=stats)
    actual, _ = run(impl, x[part], parameters, direction[part], stats=stats)
    assert_same(actual, expected)
    everything, _ = run(impl, x, parameters, direction)
    assert actual["entropy"] == everything["entropy"]
    assert actual["covariance"] == everything["covariance"]


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_a_part_whose_rows_are_all_masked_adds_nothing_to_the_others(impl):
    """As where one rank's share of a batch is padding: the others wait for it in a collective."""
    x, parameters, _ = problem(48, 6, 40, 1, 6)
    bae = bf.BinaryAutoencoder(6, 40, preset="paper", dtype=torch.float64, impl=impl)
    with torch.no_grad():
        for own, given in zip(bae.parameters(), parameters, strict=True):
            own.copy_(given)
    mask = torch.arange(48) < 24
    parts = list(zip(x.chunk(2), mask.chunk(2), strict=True))
    codes = [bae.encode(part, mask=kept) for part, kept in parts]
    stats = bf.BinaryCode.cat(codes).statistics(covariance=True)
    assert int(codes[1].n_rows()) == 0

    def gradients(*parts):
        bae.zero_grad()
        for part, kept in parts:
            out = bae(part, mask=kept, stats=stats)
            bae.loss(out, part, entropy_weight=0.1, covariance_weight=0.1).backward()
        return [p.grad for p in bae.parameters()]

    assert all(map(torch.equal, gradients(*parts), gradients(parts[0])))
    assert all(grad is not None and not grad.any() for grad in gradients(parts[1]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("covariance", [False, True])
def test_past_statistics_are_added_to_those_of_the_call(impl, covariance):
    """One call over all rows, with gradient to the last part only, is the definition."""
    x, parameters, direction = problem(96, 5, 70, 1, 5)
    terms = ["recon", "entropy", "covariance"][: 2 + covariance]
    past = bf.encode(x[:60], *parameters[:2]).statistics()
    kept = slice(60, 96)
    actual, _ = run(impl, x[kept], parameters, direction[kept], terms, past=past)
    expected, _ = run("reference", x[kept], parameters, direction[kept], terms, past=past)
    assert_same(actual, expected)
    everything, _ = run(impl, x, parameters, direction, terms)
    assert actual["entropy"] == everything["entropy"]
    statistics_only = [t for t in terms if t != "recon"]
    part, _ = run(impl, x[kept], parameters, direction[kept], statistics_only, past=past)
    whole, _ = run(impl, x, parameters, direction, statistics_only)
    assert (part["x"] - whole["x"][kept]).abs().max() <= 1e-12 * whole["x"].abs().max()
    if covariance:
        assert actual["covariance"] == everything["covariance"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
def test_the_multilinear_term_equals_the_reference(impl, shape):
    x, parameters, direction = problem(*shape)
    mask = torch.arange(shape[0]) % 3 != 1
    for used in (["recon", "entropy"], ["recon"]):
        options = {"n_bits": shape[3], "mask": mask, "multilinear": True}
        expected, _ = run("reference", x, parameters, direction, used, **options)
        actual, _ = run(impl, x, parameters, direction, used, **options)
        assert_same(actual, expected)


def test_the_multilinear_gradient_is_the_exact_change_when_a_bit_flips():
    """Identity surrogate and W_enc = I: the gradient at x is the gradient at the bits."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(6, 8, generator=g, dtype=torch.float64).requires_grad_()
    eye, zero = torch.eye(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    W_dec = torch.randn(8, 5, generator=g, dtype=torch.float64)
    b_dec = torch.randn(5, generator=g, dtype=torch.float64)
    target = torch.randn(6, 5, generator=g, dtype=torch.float64)
    out = bf.binary_autoencoder(x, eye, zero, W_dec, b_dec, surrogate="identity", multilinear=True)
    (((out.recon - target) ** 2).mean() + out.variance / target.numel()).backward()
    bits = out.code.to_dense(torch.float64)

    def loss(b):
        return ((b @ W_dec + b_dec - target) ** 2).mean()

    for row in range(6):
        for column in range(8):
            on, off = bits.clone(), bits.clone()
            on[row, column], off[row, column] = 1, 0
            assert float(x.grad[row, column]) == pytest.approx(float(loss(on) - loss(off)))


@pytest.mark.parametrize("surrogate", ["identity", "sigmoid", "rectangle"])
def test_gradients_of_the_terms_add_up(surrogate):
    """All surrogates but `official` are linear in the incoming gradient."""
    x, parameters, _ = problem(50, 4, 40, 1, 4)

    def gradient(*weights):
        leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
        out = bf.binary_autoencoder(*leaves, surrogate=surrogate, covariance=True)
        parts = (out.recon.sum(), out.entropy, out.covariance)
        sum(w * p for w, p in zip(weights, parts, strict=True)).backward()
        return leaves[0].grad

    apart = gradient(2, 0, 0) + gradient(0, 3, 0) + gradient(0, 0, 5)
    torch.testing.assert_close(gradient(2, 3, 5), apart, rtol=1e-11, atol=1e-11)


def test_official_surrogate_is_not_linear():
    x, parameters, _ = problem(50, 4, 40, 1, 4)
    once, _ = run("torch", x, parameters, x, ("recon",), surrogate="official")
    leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
    out = bf.binary_autoencoder(*leaves, surrogate="official")
    (2 * ((out.recon - x) ** 2).sum()).backward()
    assert not torch.allclose(leaves[0].grad, 2 * once["x"])


@pytest.mark.parametrize("impl", IMPLS)
def test_integer_inputs_are_exact_and_zero_gives_zero(impl):
    g = torch.Generator().manual_seed(1)
    x = torch.randint(-3, 4, (200, 16), generator=g).float()
    W = torch.randint(-2, 3, (16, 90), generator=g).float()
    b = torch.randint(-4, 5, (90,), generator=g).float()
    pre = x.long() @ W.long() + b.long()
    assert (pre == 0).any()
    assert torch.equal(bf.encode(x, W, b, impl=impl).to_dense(), pre > 0)
    half = bf.encode(x.bfloat16(), W.bfloat16(), b.bfloat16(), impl=impl)
    assert torch.equal(half.to_dense(), pre > 0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_equal_float64_outside_the_rounding_bound(impl, dtype):
    """|pre| <= delta = gamma_d (sum |x||W| + |b|) may differ, with fp32 sums in every dtype."""
    x, (W, b, *_), _ = problem(300, 96, 500, 1, 4, dtype)
    pre = x.double() @ W.double() + b.double()
    unit = 2.0**-24
    gamma = (96 + 2) * unit / (1 - (96 + 2) * unit)
    delta = gamma * (x.double().abs() @ W.double().abs() + b.double().abs())
    bits = bf.encode(x, W, b, impl=impl).to_dense()
    differ = bits != (pre > 0)
    assert not (differ & (pre.abs() > delta)).any()
    assert differ.float().mean() < 1e-3


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_adds_the_fp32_bias_before_rounding(impl):
    """A bias with more bits than bf16 decides the sign of pre-activations near zero."""
    x = torch.ones(4, 8)
    W = torch.full((8, 64), 1.0)
    b = -8.0 + torch.linspace(-1, 1, 64) * 1e-3  # bf16 would round every one of them to -8
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bits = bf.encode(x, W, b, impl=impl).to_dense()
    assert torch.equal(bits[0], b > -8.0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_err_at_most_twice_as_much_as_eager_in_the_same_dtype(impl, dtype):
    """Values and gradients against float64 formulas evaluated on the implementation's own bits."""
    x, parameters, _ = problem(128, 48, 300, 1, 48, dtype)
    g = torch.randn(128, 48).to(dtype)
    leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
    out = bf.binary_autoencoder(*leaves, impl=impl, surrogate="identity")
    out.recon.backward(g)
    bits = out.code.to_dense(torch.float64)

    def formulas(kind):
        bits_, x_, W_enc, W_dec, b_dec, g_ = (
            t.to(kind) for t in (bits, x, parameters[0], parameters[2], parameters[3], g)
        )
        g_pre = g_ @ W_dec.T
        return {
            "recon": bits_ @ W_dec + b_dec,
            "x": g_pre @ W_enc.T,
            "W_enc": x_.T @ g_pre,
            "b_enc": g_pre.sum(0),
            "W_dec": bits_.T @ g_,
            "b_dec": g_.sum(0),
        }

    exact, eager = formulas(torch.float64), formulas(dtype)
    got = dict(
        zip(["x", "W_enc", "b_enc", "W_dec", "b_dec"], (p.grad for p in leaves), strict=True)
    )
    got["recon"] = out.recon.detach()
    for name, value in got.items():
        assert value.dtype == dtype
        scale = exact[name].abs().max()
        allowed = 2 * (eager[name].double() - exact[name]).abs().max()
        allowed += torch.finfo(dtype).eps * scale
        assert (value.double() - exact[name]).abs().max() <= allowed, name


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_and_inf_never_crash_and_nan_gives_zero(impl):
    x, parameters, _ = problem(20, 4, 40, 1, 4)
    x[3, 1], x[4, 0] = float("nan"), float("inf")
    out = bf.binary_autoencoder(x, *parameters, impl=impl, covariance=True)
    assert int(out.code.l0()[3]) == 0
    assert int(out.code.counts().sum()) == int(out.code.to_dense().sum())


@pytest.mark.parametrize("impl", IMPLS)
def test_two_runs_give_the_same_bits_and_gradients(impl):
    torch.set_num_threads(2)
    x, parameters, direction = problem(300, 33, 400, 1, 33, torch.float32)
    first, code = run(impl, x, parameters, direction)
    second, again = run(impl, x, parameters, direction)
    assert code.equal(again)
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_and_offset_inputs_equal_contiguous_ones(impl):
    x, parameters, direction = problem(40, 10, 70, 1, 10)
    base = torch.zeros(81, 23, dtype=x.dtype)
    base[1::2, 3:23:2] = x
    views = [base[1::2, 3:23:2], parameters[0].T.contiguous().T, *parameters[1:]]
    expected, _ = run(impl, x, parameters, direction)
    leaves = [t.detach().requires_grad_() for t in views]
    out = bf.binary_autoencoder(*leaves, impl=impl, covariance=True)
    (
        ((out.recon - direction) ** 2).sum() + out.entropy**2 * 0.01 + out.covariance**2 * 0.01
    ).backward()
    assert (leaves[0].grad - expected["x"]).abs().max() <= 1e-12 * expected["x"].abs().max()
    assert (leaves[1].grad - expected["W_enc"]).abs().max() <= 1e-12 * expected["W_enc"].abs().max()


@pytest.mark.parametrize(
    "impl",
    [
        # the plain operators of `torch` count offsets themselves
        pytest.param("torch", marks=pytest.mark.matrix),
        pytest.param("cpp", marks=[*IMPLS[1].marks, pytest.mark.long]),
    ],
)
def test_more_than_2_to_the_31_bits(impl):
    """Offsets into N x F pass 2^31: the last rows and columns must still be theirs."""
    n, f = 70_000, 32_768
    x = torch.zeros(n, 2)
    x[-1], x[40_000, 0] = 1, 1
    W = torch.zeros(2, f)
    W[0, -1], W[1, 5] = 1, 1
    code = bf.encode(x, W, torch.zeros(f), impl=impl)
    assert code[[40_000, n - 1]].indices().tolist() == [[0, f - 1], [1, 5], [1, f - 1]]
    assert int(code.l0().sum()) == 3
