"""impl="triton" and impl="cuda" on a device: what no interpreter shows. Not run on one so far.

Exactness against the reference at sizes of several tiles, no synchronisation, CUDA graphs, peak
memory.
"""

from collections import defaultdict

import pytest
import torch

import bae_fast as bf
from bae_fast.ops import registry
from bae_fast.packing import unpack_rows
from bae_fast.surrogates import SURROGATES
from bae_fast.training import CapturedStep

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = {"identity": None, "official": None, "sigmoid": 3.0, "rectangle": 2.5}
SHAPES = [(1, 16, 33, 8), (97, 67, 129, 70), (512, 256, 1000, 256), (1000, 512, 4096, 512)]
NAMES = ["recon", "entropy", "covariance", "x", "W_enc", "b_enc", "W_dec", "b_dec"]


@pytest.fixture(params=["triton", "cuda"])
def impl(request):
    reasons = registry.reasons_against(request.param, registry.Request("cuda", torch.float32))
    if reasons:
        pytest.skip(f"impl={request.param!r} cannot run: {'; '.join(reasons)}")
    return request.param


def problem(n, d, f, d_out, dtype, seed=0):
    """Encoder inputs in small integers: pre-activations are exact in every dtype, 0 included."""
    g = torch.Generator().manual_seed(seed)

    def integers(bound, *shape):
        return torch.randint(-bound, bound + 1, shape, generator=g).to("cuda", dtype)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to("cuda", dtype)

    W_enc, b_enc = integers(1, d, f), integers(3, f)
    b_enc[:: max(f // 5, 1)] = -2000
    b_enc[1 :: max(f // 5, 2)] = 2000
    x = integers(1, n, d)
    return x, [W_enc, b_enc, normal(f, d_out) * f**-0.5, normal(d_out)], normal(n, d_out)


def run(impl, x, parameters, direction, covariance=True, **options):
    leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
    out = bf.binary_autoencoder(*leaves, impl=impl, covariance=covariance, **options)
    loss = (out.recon * direction).sum() * 0.25 + out.entropy * 3
    if covariance:
        loss = loss + out.covariance * 1e-3
    loss.backward()
    values = [out.recon, out.entropy, out.covariance, *(leaf.grad for leaf in leaves)]
    return dict(zip(NAMES, values, strict=True)), out.code


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_as_good_as_the_dense_program(impl, dtype, surrogate, shape):
    x, parameters, direction = problem(*shape, dtype)
    mask = None if len(x) < 4 else torch.arange(len(x), device="cuda") % 3 != 1
    options = {
        "surrogate": surrogate, "surrogate_width": WIDTHS[surrogate], "mask": mask,
        "covariance": len(x) > 1,
    }  # fmt: skip
    wide = [p.double() for p in parameters]
    exact, code = run("reference", x.double(), wide, direction.double(), **options)
    eager, _ = run("reference", x, parameters, direction, **options)
    got, packed = run(impl, x, parameters, direction, **options)
    assert packed.equal(code)
    assert torch.equal(packed.counts(), code.counts())
    for name in NAMES:
        if exact[name] is None:
            continue
        scale = exact[name].abs().max()
        if name == "b_enc":  # sums of what W_enc's gradient sums: may cancel
            scale = torch.maximum(scale, exact["W_enc"].abs().max())
        allowed = 2 * (eager[name].double() - exact[name]).abs().max()
        allowed += 4 * torch.finfo(got[name].dtype).eps * scale
        assert (got[name].double() - exact[name]).abs().max() <= allowed, name


@pytest.mark.parametrize(("n", "k"), [(2, 300), (64, 300), (1000, 1300), (50_000, 300)])
def test_the_covariance_and_its_signs_equal_integers(impl, n, k):
    dense = torch.rand(n, k, device="cuda") < torch.rand(k, device="cuda")
    dense[:, 5] = dense[:, 6]
    b = dense.double()
    counts = b.sum(0)
    v = n * b.t() @ b - torch.outer(counts, counts)  # below 2^53: exact
    v.fill_diagonal_(0)
    code = bf.BinaryCode.from_dense(dense)
    stats = code.statistics(covariance=True, impl=impl)
    assert int(stats.numerator) == int(v.abs().sum())
    above, below = unpack_rows(stats.signs, k, torch.int8)
    assert torch.equal((above - below).double(), v.sign())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_synchronises(impl, dtype):
    x, parameters, direction = problem(512, 256, 1024, 256, dtype)
    run(impl, x, parameters, direction)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(impl, x, parameters, direction)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("planes_mb", ["0", "256"])
def test_a_warm_step_is_captured_and_replays_on_new_inputs(impl, dtype, planes_mb, monkeypatch):
    monkeypatch.setenv("BAE_FAST_SIGN_PLANES_MB", planes_mb)
    x, parameters, direction = problem(512, 256, 1024, 256, dtype)
    leaves = [t.clone().requires_grad_() for t in (x, *parameters)]

    def step():
        out = bf.binary_autoencoder(*leaves, impl=impl, covariance=True)
        ((out.recon * direction).sum() + out.entropy + out.covariance).backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels, cuBLAS's workspaces, and the gradients' memory
        step()
    torch.cuda.current_stream().wait_stream(side)
    for leaf in leaves:
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    other = problem(512, 256, 1024, 256, dtype, seed=1)[0]
    with torch.no_grad():
        leaves[0].copy_(other)
    graph.replay()
    replayed = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    step()
    for gradient, leaf in zip(replayed, leaves, strict=True):
        torch.testing.assert_close(gradient, leaf.grad)


def test_a_captured_step_gives_what_the_same_calls_give(impl):
    def parameters_after(captured):
        x, parameters, _ = problem(512, 256, 1024, 256, torch.bfloat16)
        leaves = [t.float().requires_grad_() for t in parameters]
        optimizer = torch.optim.Adam(leaves, lr=2.0**-10, fused=True, capturable=True)

        def loss_of(rows):
            with torch.autocast("cuda", torch.bfloat16):
                out = bf.binary_autoencoder(rows, *leaves, impl=impl, covariance=True)
            error = (rows - out.recon).square().mean(dtype=torch.float32)
            return error + 1e-5 * out.entropy + 1e-5 * out.covariance

        step = CapturedStep(loss_of, optimizer, warm_calls=2 if captured else 9)
        losses = [step(x.roll(at, 0)) for at in range(6)]
        assert step.captured == captured
        return [*losses, *leaves]

    for a, b in zip(parameters_after(True), parameters_after(False), strict=True):
        torch.testing.assert_close(a, b)


def test_a_cold_kernel_under_capture_says_to_warm_up(impl, monkeypatch):
    x, parameters, _ = problem(33, 13, 77, 7, torch.bfloat16)
    code = bf.encode(x, *parameters[:2], impl="torch")

    def cold():
        return code.statistics(covariance=True, impl=impl)

    if impl == "cuda":
        from bae_fast.kernels_cuda import driver

        cold()  # compiles what it shares with Triton
        monkeypatch.setattr(driver, "_functions", {})
    else:
        from bae_fast.kernels import bits, covariance

        # tests of other odd sizes have compiled these in the same process
        for kernel in (bits.transpose_kernel, covariance.covariance_kernel):
            monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match=r"bae_fast\.warmup\("), torch.cuda.graph(graph):
        cold()


@pytest.mark.parametrize("covariance", [False, True])
def test_peak_memory_is_packed_bits_and_one_chunk(impl, covariance, monkeypatch):
    from bae_fast.kernels import pair_lists

    monkeypatch.setenv("BAE_FAST_SCRATCH_MB", "16")
    n, d, f = 4096, 256, 32768
    x, parameters, direction = problem(n, d, f, d, torch.bfloat16)
    options = {"surrogate": "rectangle", "surrogate_width": 2.5, "covariance": covariance}
    run(impl, x, parameters, direction, **options)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(impl, x, parameters, direction, **options)
    used = torch.cuda.max_memory_allocated() - before
    parameters_twice = 2 * 2 * 2 * d * f + 4 * 2 * n * d  # clones and gradients, bf16; x, recon
    packed = 3 * n * f // 8  # words, window, feature-packed
    planes = f * f // 4 if covariance else 0
    chunks = 5 * 16 * 2**20  # product, covariance, gradient, and their temporaries
    digits = 64 * f * 10 if covariance else 0
    lists = 0
    if covariance:  # which may serve: ones of rows and features, of the window, and counters
        counters = 2 * torch.cuda.get_device_properties(0).multi_processor_count * f
        lists = n * f // 8 + 4 * (2 * n * pair_lists.MOST_ONES + n * f // 64 + counters)
    assert used <= parameters_twice + packed + planes + chunks + digits + lists + 2**24
    # less than the dense program's largest matrix alone: C in fp32, or the bits in bf16
    assert used < (f * f * 4 if covariance else n * f * 2)


def test_two_runs_give_the_same_bits_and_gradients(impl):
    x, parameters, direction = problem(1000, 256, 2048, 256, torch.bfloat16)
    first, code = run(impl, x, parameters, direction)
    second, again = run(impl, x, parameters, direction)
    assert code.equal(again)
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_auto_chooses_it_on_a_device():
    has_bits = (8, 0) <= torch.cuda.get_device_capability() <= (9, 0)
    expected = ("cuda", "triton") if has_bits else ("triton",)
    assert registry.choose("auto", "cuda", torch.bfloat16, 64, 1) in expected
    assert registry.choose("auto", "cuda", torch.float64, 64, 1) == "torch"


def test_after_warmup_a_step_is_captured_at_once(impl):
    """Last: a process that has compiled nothing yet takes minutes to."""
    bf.warmup(impl, device="cuda", surrogates=("identity",))
    x, parameters, direction = problem(512, 256, 1024, 256, torch.bfloat16)
    leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
    (leaves[0] @ leaves[1]).sum().backward()  # cuBLAS's handle in the thread of backward
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = bf.binary_autoencoder(*leaves, impl=impl, surrogate="identity", covariance=True)
        ((out.recon * direction).sum() + out.entropy + out.covariance).backward()
    graph.replay()
    found = [out.recon.detach().clone(), *(leaf.grad.clone() for leaf in leaves)]
    for leaf in leaves:
        leaf.grad = None
    again = bf.binary_autoencoder(*leaves, impl=impl, surrogate="identity", covariance=True)
    ((again.recon * direction).sum() + again.entropy + again.covariance).backward()
    for got, expected in zip(found, [again.recon, *(leaf.grad for leaf in leaves)], strict=True):
        torch.testing.assert_close(got, expected)
