"""impl="cpp" and "torch" in half precision on a CPU: no dtype is served by a slower way than fp32.

Whether the CPU multiplies bfloat16 is set by the tests, so that both ways are tried on any machine.
"""

import pytest
import torch

from bae_fast import devices
from bae_fast.backends import cpp
from bae_fast.backends.cpp import decode as cpp_decode
from bae_fast.backends.cpp import sparse_backward as cpp_sparse
from bae_fast.backends.cpp.units import has_matrix_units
from bae_fast.ops import products, registry
from bae_fast.packing import bit_weights, n_words, pack_rows, unpack_rows

if cpp.BACKEND.unavailable is not None:
    pytest.skip(f"impl='cpp' cannot run: {cpp.BACKEND.unavailable}", allow_module_level=True)

from bae_fast.backends.cpp import extension

HALF = (torch.bfloat16, torch.float16)
# (N, d, F, d_out): not multiples of a word, a panel or a vector
SHAPES = [(1, 3, 5, 2), (33, 17, 65, 9), (130, 70, 331, 41), (513, 20, 96, 33)]


@pytest.fixture(params=[True, False], ids=["native", "not native"])
def native(request, monkeypatch):
    monkeypatch.setattr(products, "cpu_has_bfloat16", lambda: request.param)
    return request.param


@pytest.fixture(params=["cpp", "torch"])
def ops(request):
    return registry.BACKENDS[request.param].ops


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_bits(n, k, density, seed=0):
    return torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) < density


def assert_close(got, eager, exact):
    """At most twice the error of the eager program of the dtype."""
    assert got.shape == exact.shape
    allowed = 2 * (eager.double() - exact).abs().max() + 2.0**-8 * exact.abs().max()
    assert (got.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("parameters", "n_bits"), [("float32", 1), ("half", 1), ("float32", 2)])
def test_bits_times_numbers(ops, native, shape, density, dtype, parameters, n_bits, monkeypatch):
    monkeypatch.setenv("BAE_FAST_SCRATCH_MB", "0")  # chunks of 256 columns
    n, _, f, d_out = shape
    bits = random_bits(n, f * n_bits, density)
    # strides that are not the shape's
    words = torch.zeros(n, n_words(f * n_bits) + 3, dtype=torch.int32)[:, : n_words(f * n_bits)]
    words.copy_(pack_rows(bits))
    kind = dtype if parameters == "half" else torch.float32
    W, b, g = (normal(rows, d_out + 5)[:, 3 : 3 + d_out].to(kind) for rows in (f, 1, n))
    b, g = b[0], g.to(dtype)
    values = bits.double()
    if n_bits > 1:
        values = values.unflatten(1, (-1, n_bits)) @ bit_weights(n_bits, torch.float64, W.device)
    recon = ops["decode"](words, W, b, n_bits, dtype)
    grad_W, grad_b = ops["decoder_backward"](words, g, f * n_bits, n_bits, kind)
    assert (recon.dtype, grad_W.dtype, grad_b.dtype) == (dtype, kind, kind)
    v = values.to(dtype)
    assert_close(recon, v @ W.to(dtype) + b.to(dtype), values @ W.double() + b.double())
    assert_close(grad_W, v.t() @ g, values.t() @ g.double())
    assert_close(grad_b, g.sum(0), g.double().sum(0))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_what_is_not_finite_reaches_the_rows_that_have_it(ops, native, dtype):
    bits, W = random_bits(40, 96, 0.1), normal(96, 8)
    W[7], bits[3, 7], bits[4, 7] = torch.inf, True, False
    recon = ops["decode"](pack_rows(bits), W, torch.zeros(8), 1, dtype)
    # a dense product of bf16 numbers makes NaN of 0 x infinity; adding rows does not
    assert torch.equal(recon[3].isinf(), torch.ones(8, dtype=torch.bool))
    if ops is registry.BACKENDS["cpp"].ops and not has_matrix_units():
        assert torch.equal(recon.isinf().all(1), bits[:, 7])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_density_decides_in_half_precision(native, dtype, monkeypatch):
    """On both sides of the constant, by adding rows or not, by listing entries or not."""
    gathered = []

    def spy(name):
        if name == "gather_rows":
            gathered.append(True)
        if name != "bits_product":
            return extension.op(name)

        def run(bits, dense, gather, *rest):
            gathered.append(gather)
            return extension.op(name)(bits, dense, gather, *rest)

        return run

    monkeypatch.setattr(cpp_decode, "op", spy)
    units = dtype == torch.bfloat16 and has_matrix_units()
    below = cpp_decode.GATHER_BELOW_UNITS if units else cpp_decode.GATHER_BELOW[extension.simd()]
    for share, adds in ((0.8 * below, True), (1.2 * below, False)):
        gathered.clear()
        words = pack_rows(random_bits(200, 960, share))
        cpp_decode.decode(words, normal(960, 4), torch.zeros(4), 1, dtype)
        assert gathered == ([adds] if adds or not units else [])

    x, W = normal(200, 4).to(dtype), normal(4, 960)
    level = extension.simd()
    for units in (False, True) if level != "amx" else (True,):
        monkeypatch.setattr(cpp_sparse, "cpu_has_matrix_units", lambda units=units: units)
        table = cpp_sparse.SPARSE_BELOW
        if native and dtype == torch.bfloat16:
            table = cpp_sparse.SPARSE_BELOW_UNITS if units else cpp_sparse.SPARSE_BELOW_VECTORS
        for share in (0.8, 1.2):
            window = pack_rows(random_bits(200, 960, share * table[level]))
            listed = cpp_sparse.listed_window(x, W, window, None, 1)
            assert (listed is not None) == (share < 1)
            assert cpp_sparse.listed_window(x, W, window, None, 2) is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.03, 0.12, 0.5])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("parameters", "masked"), [("float32", False), ("half", True)])
def test_encoder_backward(ops, native, shape, density, dtype, parameters, masked):
    n, d, k, d_out = shape
    kind = dtype if parameters == "half" else torch.float32
    x, g = normal(n, d).to(dtype), normal(n, d_out, seed=1).to(dtype)
    W_enc, W_dec = normal(d, k, seed=2).to(kind), normal(k, d_out, seed=3).to(kind)
    shift, curvature = normal(k, seed=4), normal(k, seed=5)
    keep = torch.arange(n) % 3 != 1
    bits, inside = random_bits(n, k, 0.1), random_bits(n, k, density, 1)
    words, window = pack_rows(bits & keep[:, None] if masked else bits), pack_rows(inside)
    bits = unpack_rows(words, k)
    covariance = n > 2
    counts, n_rows = bits.sum(0), torch.tensor(int(keep.sum()) if masked else n)
    scale = torch.tensor(0.01) if covariance else None

    def call(operators, numbers, statistics):
        signs = None
        if covariance:
            _, signs = operators["covariance"](words, counts, n_rows, True)
        return operators["encoder_backward"](
            *numbers[:2], b_enc.to(numbers[1].dtype), numbers[2], words, window,
            keep if masked else None, numbers[3], *statistics, signs, words, counts, n_rows,
            "rectangle", 0.25, 1, [True, True, True],
        )  # fmt: skip

    b_enc = torch.zeros(k)
    given = [x, W_enc, W_dec, g]
    wide = [t.double() for t in given]
    found = call(ops, given, [shift, curvature, scale])
    exact = call(
        registry.BACKENDS["torch"].ops, wide,
        [shift.double(), curvature.double(), None if scale is None else scale.double()],
    )  # fmt: skip
    at_bits = call(
        registry.BACKENDS["torch"].ops,
        [torch.eye(n, dtype=torch.float64), torch.zeros(n, k).double(), *wide[2:]],
        [shift.double(), curvature.double(), None if scale is None else scale.double()],
    )[1].to(dtype)
    eager = (at_bits @ W_enc.to(dtype).t(), x.t() @ at_bits, at_bits.sum(0))
    assert [t.dtype for t in found] == [dtype, kind, kind]
    for got, half, right in zip(found, eager, exact, strict=True):
        assert_close(got, half, right)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_sparse_ways_give_the_same_bits_with_any_number_of_threads(native, dtype):
    n, d, k, density = 600, 40, 700, 0.015
    x, g = normal(n, d).to(dtype), normal(n, d, seed=1).to(dtype)
    W, words = normal(d, k, seed=2), pack_rows(random_bits(n, k, density))
    ops, found = registry.BACKENDS["cpp"].ops, []
    before = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        gradients = ops["encoder_backward"](
            x, W, torch.zeros(k), W.t(), words, words, None, g, None, None, None, None, None,
            unpack_rows(words, k).sum(0), torch.tensor(n), "rectangle", 0.25, 1, [True, True, True],
        )  # fmt: skip
        decoded = ops["decode"](words, W.t(), torch.zeros(d), 1, dtype)
        found.append([*gradients, decoded, *ops["decoder_backward"](words, g, k, 1, dtype)])
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", [(n, k) for n in (1, 31, 33, 513) for k in (1, 65, 331)])
def test_encode_by_widened_operands_has_the_bits_of_float64(ops, shape, dtype, monkeypatch):
    """Parameters stay in fp32 where the CPU would not multiply the half: nothing is rounded."""
    monkeypatch.setattr(products, "cpu_has_bfloat16", lambda: False)
    n, k = shape
    x, W, b = normal(n, 24).to(dtype), normal(24, k, seed=1), normal(k, seed=2)
    if has_matrix_units() and dtype == torch.bfloat16:
        W = W.to(dtype).float()
    words, window, counts, _ = ops["encode"](x, W, b, None, 0.5)
    pre = x.double() @ W.double() + b.double()
    bound = 26 * 2.0**-24 * 1.01 * (x.double().abs() @ W.double().abs() + b.double().abs())
    for packed, exact, distance in (
        (words, pre > 0, pre.abs()),
        (window, pre.abs() < 0.5, (pre.abs() - 0.5).abs()),
    ):
        differ = unpack_rows(packed, k) != exact
        assert not (differ & (distance > bound)).any()
    assert torch.equal(counts, unpack_rows(words, k).sum(0))


@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (40, 515), (700, 33)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_ones_of_all_words(threads, shape, density):
    bits = random_bits(*shape, density)
    padded = torch.full((shape[0], n_words(shape[1]) + 2), -1, dtype=torch.int32)
    padded[:, : n_words(shape[1])] = pack_rows(bits)
    count = extension.op("count_ones")
    assert count(padded[:, : n_words(shape[1])]) == int(bits.sum())
    assert count(pack_rows(bits)) == int(bits.sum())


@pytest.mark.parametrize(
    ("variable", "value", "trusted"),
    [
        ("OMP_DYNAMIC", "true", False),
        ("OMP_DYNAMIC", "FALSE", True),
        ("OMP_THREAD_LIMIT", "1", False),
        ("OMP_THREAD_LIMIT", "64", True),
    ],
)
def test_bfloat16_products_of_torch_are_left_out_where_they_may_be_wrong(
    variable, value, trusted, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setenv(variable, value)
    assert devices.cpu_has_bfloat16() == trusted
    narrow = products.product_dtype(torch.bfloat16, torch.device("cpu"))
    assert narrow == (torch.bfloat16 if trusted else torch.float32)
