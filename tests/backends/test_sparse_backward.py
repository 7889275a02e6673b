"""impl="cpp": the rectangle's backward on listed entries, against the reference and the dense way.

Every test runs on each instruction set of this CPU.
"""

import pytest
import torch
from test_cpp import levels

import bae_fast as bf
from bae_fast.ops import registry
from bae_fast.packing import pack_rows, unpack_rows

CPP = registry.BACKENDS["cpp"]
if CPP.unavailable is not None:
    pytest.skip(f"impl='cpp' cannot run: {CPP.unavailable}", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("by_bits")

from bae_fast.backends.cpp import extension, sparse_backward  # noqa: E402

NAMES = ("x", "W_enc", "b_enc", "W_dec", "b_dec")

# (N, d_in, F, d_out): edges of words, tiles of 64 columns, panels (512 rows; 128 floats or 64
# doubles of depth) and of 512 columns
SHAPES = [
    (1, 1, 1, 1),
    (1, 70, 65, 3),
    (2, 3, 31, 5),
    (33, 17, 64, 64),
    (65, 129, 257, 131),
    (511, 5, 70, 7),
    (512, 64, 96, 63),
    (513, 65, 33, 66),
    (1100, 6, 600, 4),
]


@pytest.fixture(autouse=True, params=levels())
def level(request):
    extension.use_simd(request.param)
    yield request.param
    extension.use_simd(None)


def lists_below(monkeypatch, density):
    table = dict.fromkeys(sparse_backward.SPARSE_BELOW, density)
    monkeypatch.setattr(sparse_backward, "SPARSE_BELOW", table)


@pytest.fixture
def always(monkeypatch):
    """Every window is listed, and what was listed is counted."""
    calls = []
    lists_below(monkeypatch, 2.0)
    real = sparse_backward.op

    def spy(name):
        if name == "sparse_backward":
            calls.append(name)
        return real(name)

    monkeypatch.setattr(sparse_backward, "op", spy)
    return calls


def problem(n, d, f, d_out, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    x, W_enc, b_enc = normal(n, d), normal(d, f) * d**-0.5, normal(f) * 0.3
    b_enc[:: max(f // 5, 1)] = -100  # constant columns: outside of every window
    if f > 4:
        W_enc[:, 2], b_enc[2] = W_enc[:, 3], b_enc[3]
    return x, [W_enc, b_enc, normal(f, d_out), normal(d_out)], normal(n, d_out)


def run(impl, x, parameters, direction, x_needs=True, weights=(1.0, 0.01, 0.01, 0.7), **options):
    """Gradients by name; terms of weight 0 are left out."""
    leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
    leaves[0].requires_grad_(x_needs)
    recon, entropy, covariance, variance = weights
    out = bf.binary_autoencoder(
        *leaves,
        impl=impl,
        covariance=covariance > 0,
        multilinear=variance > 0,
        **{"surrogate": "rectangle", "surrogate_width": 0.4} | options,
    )
    loss = torch.zeros((), dtype=x.dtype)
    if recon:
        loss = loss + recon * ((out.recon - direction) ** 2).sum()
    if entropy:
        loss = loss + entropy * out.entropy**2
    if covariance:
        loss = loss + covariance * out.covariance**2
    if variance:
        loss = loss + variance * out.variance
    loss.backward()
    return {name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}


def assert_same(actual, expected, tolerance=1e-12):
    for name in NAMES:
        a, e = actual[name], expected[name]
        assert (a is None) == (e is None), name
        if e is not None:
            assert (a - e).abs().max() <= tolerance * e.abs().max(), name


def terms(n):
    yield from ((1.0, 0, 0, 0), (0, 0.01, 0, 0), (1.0, 0.01, 0, 0.7))
    if n > 3:
        yield from ((1.0, 0.01, 0.01, 0), (0, 0, 0.01, 0), (1.0, 0.01, 0.01, 0.7))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sign_planes_mb", ["0", "64"])
def test_gradients_equal_the_reference(shape, sign_planes_mb, always, monkeypatch):
    monkeypatch.setenv("BAE_FAST_SIGN_PLANES_MB", sign_planes_mb)
    x, parameters, direction = problem(*shape)
    n = shape[0]
    for i, weights in enumerate(terms(n)):
        for mask in (None, torch.arange(n) % 3 != 1):
            # pairwise: with a mask and without, in turns
            x_needs = (i % 2 == 0) == (mask is None)
            options = {"mask": mask, "x_needs": x_needs, "weights": weights}
            expected = run("reference", x, parameters, direction, **options)
            before = len(always)
            actual = run("cpp", x, parameters, direction, **options)
            assert len(always) == before + 1
            assert_same(actual, expected)


@pytest.mark.parametrize("kind", ["stats", "past"])
@pytest.mark.parametrize("sign_planes_mb", ["0", "64"])
def test_statistics_of_more_rows(kind, sign_planes_mb, always, monkeypatch):
    monkeypatch.setenv("BAE_FAST_SIGN_PLANES_MB", sign_planes_mb)
    x, parameters, direction = problem(700, 9, 130, 9)
    code = bf.encode(x, *parameters[:2])
    stats = code.statistics(covariance=True) if kind == "stats" else code[:600].statistics()
    part = slice(0, 560) if kind == "stats" else slice(600, 700)
    expected = run("reference", x[part], parameters, direction[part], **{kind: stats})
    actual = run("cpp", x[part], parameters, direction[part], **{kind: stats})
    assert always
    assert_same(actual, expected)


@pytest.mark.parametrize("width", [1e-300, 1e300])
def test_an_empty_and_a_full_window(width, always):
    x, parameters, direction = problem(70, 33, 129, 20)
    parameters[1].clamp_(-1, 1)
    options = {"surrogate_width": width}
    expected = run("reference", x, parameters, direction, **options)
    actual = run("cpp", x, parameters, direction, **options)
    assert always
    assert_same(actual, expected)
    assert (actual["W_enc"] == 0).all() == (width < 1)


def test_strided_and_expanded_inputs(always):
    x, parameters, _ = problem(40, 10, 70, 11)
    base = torch.zeros(81, 23, dtype=x.dtype)
    base[1::2, 3:23:2] = x
    views = [base[1::2, 3:23:2], *(p.t().contiguous().t() for p in parameters)]

    def gradients(impl, tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        bf.binary_autoencoder(*leaves, impl=impl).recon.sum().backward()  # a gradient of stride 0
        return {name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}

    expected = gradients("reference", [x, *parameters])
    actual = gradients("cpp", views)
    assert always
    assert_same(actual, expected)


@pytest.mark.parametrize("kind", ["first columns", "one row for all"])
def test_a_gradient_that_begins_where_x_does_is_another_matrix(kind, always):
    n, d, f = 300, 64, 512
    d_out = 8 if kind == "first columns" else d
    x, (W_enc, b_enc, W_dec, b_dec), _ = problem(n, d, f, d_out, torch.float32)
    view = x[:, :d_out] if kind == "first columns" else x[:1].expand(n, d)
    found = []
    for direction in (view, view.clone()):
        leaves = [W_enc.clone().requires_grad_(), b_enc.clone().requires_grad_()]
        out = bf.binary_autoencoder(x, *leaves, W_dec, b_dec, surrogate_width=0.1, impl="cpp")
        found.append(torch.autograd.grad(out.recon, leaves, grad_outputs=direction))
    assert len(always) == 2
    for left, right in zip(*found, strict=True):
        assert torch.equal(left, right)


def test_more_entries_than_one_span_lists(always):
    """4,096 rows, 1,100 columns, all inside: spans end between tiles, and dx adds over them."""
    x, parameters, direction = problem(4096, 3, 1100, 2)
    parameters[1].zero_()
    options = {"surrogate_width": 1e6, "weights": (1.0, 0.01, 0, 0.7)}
    expected = run("reference", x, parameters, direction, **options)
    assert_same(run("cpp", x, parameters, direction, **options), expected)
    assert always


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_entries_read_rows_where_they_lie(dtype, always):
    """Fewer than two entries a row in a group of 512 columns, rows of whole cache lines."""
    x, parameters, direction = problem(1100, 48, 600, 32)
    options = {"surrogate_width": 1e-3, "weights": (1.0, 0.01, 0, 0.7)}
    expected = run("reference", x, parameters, direction, **options)
    assert 0 < (expected["W_enc"] != 0).any(0).sum() < 600
    given = [t.to(dtype) for t in (x, *parameters, direction)]
    if dtype == torch.float32:  # the bits and windows of the numbers that the other side is given
        x, *parameters, direction = (t.double() for t in given)
        expected = run("reference", x, parameters, direction, **options)
    actual = run("cpp", given[0], given[1:5], given[5], **options)
    assert always
    actual = {name: g.double() for name, g in actual.items()}
    assert_same(actual, expected, 1e-12 if dtype == torch.float64 else 1e-4)


def test_panels_of_several_blocks_serve_more_columns_than_a_group_has(always):
    """Blocks of 512 rows, groups of 2048 columns."""
    torch.set_num_threads(1)
    x, parameters, direction = problem(520, 5, 4200, 3)
    options = {"surrogate_width": 1.0, "weights": (1.0, 0.01, 0, 0.7)}
    expected = run("reference", x, parameters, direction, **options)
    assert_same(run("cpp", x, parameters, direction, **options), expected)
    assert always


@pytest.mark.parametrize(("n", "k"), [(70_000, 40), (3, 2**18 + 70)])
def test_few_entries_of_many_rows_or_columns(n, k, always):
    """More rows than an index names, and more columns than a span has; rows of no whole line."""
    g = torch.Generator().manual_seed(0)
    d, few = 5, 900
    rows, columns = torch.randint(n, (few,), generator=g), torch.randint(k, (few,), generator=g)
    rows[:2], columns[:2] = torch.tensor([0, n - 1]), torch.tensor([k - 1, 0])
    window = torch.zeros(n, -(-k // 32) * 32, dtype=torch.bool)
    window[rows, columns] = True
    rows, columns = window.nonzero().t()
    keep = torch.rand(n, generator=g) < 0.8
    x, grad = (torch.randn(n, d, generator=g, dtype=torch.float64) for _ in range(2))
    W_enc, W_dec = (torch.randn(d, k, generator=g, dtype=torch.float64) for _ in range(2))
    packed = pack_rows(window)
    got = CPP.ops["encoder_backward"](
        x, W_enc, W_enc[0], W_dec.t().contiguous(), torch.zeros_like(packed), packed, keep, grad,
        W_dec[1], None, None, None, None, torch.ones(k, dtype=torch.int64), torch.tensor(n),
        "rectangle", 0.25, 1, [True, True, True],
    )  # fmt: skip
    assert always
    rows, columns = rows[keep[rows]], columns[keep[rows]]
    value = (grad[rows] * W_dec.t()[columns]).sum(1) + W_dec[1, columns]
    expected = [torch.zeros_like(t) for t in (x, W_enc.t(), W_dec[1])]
    expected[0].index_add_(0, rows, value[:, None] * W_enc.t()[columns])
    expected[1].index_add_(0, columns, value[:, None] * x[rows])
    expected[2].index_add_(0, columns, value)
    expected[1] = expected[1].t()
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def operands(dtype, n=530, d=200, k=300, density=0.1, seed=0):
    """Arguments of the operator with a window of given density, whatever the pre-activations."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    words = pack_rows(torch.rand(n, k, generator=g) < 0.2)
    window = pack_rows(torch.rand(n, k, generator=g) < density)
    counts, n_rows = extension.op("column_counts")(words, k), torch.tensor(n)
    _, signs = CPP.ops["covariance"](words, counts, n_rows, True)
    return [
        normal(n, d), normal(d, k), normal(k), normal(k, d), words, window, None,
        normal(n, d), normal(k), normal(k), torch.ones((), dtype=dtype) * 0.1, signs, words,
        counts, n_rows, "rectangle", 0.25, 1, [True, True, True],
    ]  # fmt: skip


@pytest.mark.parametrize("density", [0.01, 0.1, 0.9])
def test_fp32_errs_at_most_twice_as_much_as_the_dense_way(density, monkeypatch):
    narrow = operands(torch.float32, density=density)
    wide = [
        t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in narrow
    ]
    lists_below(monkeypatch, 0.0)
    exact, dense = CPP.ops["encoder_backward"](*wide), CPP.ops["encoder_backward"](*narrow)
    lists_below(monkeypatch, 2.0)
    for got, eager, true in zip(CPP.ops["encoder_backward"](*narrow), dense, exact, strict=True):
        allowed = 2 * (eager.double() - true).abs().max() + 2**-23 * true.abs().max()
        assert (got.double() - true).abs().max() <= allowed
        assert got.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_number_of_threads_gives_the_same_bits(dtype, always):
    arguments = operands(dtype)
    torch.set_num_threads(1)
    one = CPP.ops["encoder_backward"](*arguments)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert all(map(torch.equal, one, CPP.ops["encoder_backward"](*arguments)))
    assert always


def test_what_is_not_finite_outside_of_the_window_stays_there(always):
    """Row 3 of G and column 5 of W_dec are infinite; nothing of theirs is in the window."""
    arguments = operands(torch.float64, n=40, d=20, k=70)
    inside = unpack_rows(arguments[5], 70)
    inside[3], inside[:, 5] = False, False
    arguments[5] = pack_rows(inside)
    arguments[7][3], arguments[3][5] = torch.inf, -torch.inf
    finite = [t.clone() if isinstance(t, torch.Tensor) else t for t in arguments]
    finite[7][3], finite[3][5] = 0, 0
    expected = CPP.ops["encoder_backward"](*finite)
    got = CPP.ops["encoder_backward"](*arguments)
    assert all(map(torch.equal, got, expected))
    assert all(bool(t.isfinite().all()) for t in got)
    arguments[7][4, 0] = torch.inf  # and inside it reaches what it must
    columns = unpack_rows(arguments[5], 70)[4]
    _, grad_W, _ = CPP.ops["encoder_backward"](*arguments)
    assert torch.equal(~grad_W.isfinite().all(0), columns)


def test_the_density_of_the_window_decides(level):
    arguments = operands(torch.float32, density=0.5)
    x, W_enc = arguments[:2]
    n, k = x.shape[0], W_enc.shape[1]
    limit = sparse_backward.SPARSE_BELOW[level]

    def decided(density, n_bits=1):
        window = pack_rows(torch.arange(n * k).view(n, k) < density * n * k)
        return sparse_backward.listed_window(x, W_enc, window, None, n_bits) is not None

    assert decided(limit * 0.99)
    assert not decided(limit * 1.01)
    assert not decided(0.0, n_bits=2)
