"""impl="cpp" beside its tensors and on several threads: no fault, and the same bits."""

import os
import threading
from pathlib import Path

import processes
import pytest
import torch
from test_cpp import CPP, levels

import bae_fast as bf
from bae_fast.backends.cpp import extension
from bae_fast.packing import pack_rows

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.usefixtures("by_bits"),
    pytest.mark.skipif(
        CPP.unavailable is not None, reason=f"impl='cpp' cannot run: {CPP.unavailable}"
    ),
]


@pytest.fixture(params=levels())
def level(request):
    extension.use_simd(request.param)
    yield request.param
    extension.use_simd(None)


def check_operators(name, n_cases, *more):
    """In a process of its own: a fault ends it, and the last line names the case."""
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "BAE_FAST_SIMD": name}
    script = ROOT / "tests" / "support" / "guard_pages.py"
    done = processes.run(script, "back", "front", *more, env=os.environ | variables)
    lines = done.stdout.splitlines() or ["before the first case"]
    assert done.returncode == 0, f"{done.returncode} in {lines[-1]}: {done.stderr[-1000:]}"
    assert lines[-1] == "done"
    assert len(lines) > n_cases


@pytest.mark.parametrize("name", levels())
def test_operators_touch_nothing_beside_their_tensors(name):
    """At every other size; at every one, and any distance of rows, in the long proof."""
    check_operators(name, 1000, "some")


@pytest.mark.long
@pytest.mark.parametrize("name", levels())
def test_operators_touch_nothing_at_any_distance_of_rows(name):
    check_operators(name, 3000, "all")


def everything(n, k, d):
    """Results of every compiled operator."""
    op = extension.op
    g = torch.Generator().manual_seed(n)
    bits = torch.rand(n, k, generator=g) < torch.rand(k, generator=g)
    words, counts = pack_rows(bits), bits.sum(0)
    weight, grad = torch.randn(k, d, generator=g), torch.randn(n, k, generator=g)
    window, chosen = torch.zeros_like(words), torch.zeros_like(words)
    op("threshold")(grad, None, None, 0.5, 0, chosen, window)
    results = [
        op("rows_to_columns")(words, k),
        op("column_counts")(words, k),
        op("rows_to_features")(words, k),
        *op("covariance")(words, counts, n, True),
        chosen,
        window,
    ]
    for gather in (True, False):
        results.append(torch.ones(n, d))
        op("bits_product")(words, weight, gather, True, results[-1])
    results.append(torch.ones(n, d))
    op("gather_rows")(words, weight, weight[0], results[-1])
    results.append(op("entropy")(counts, n))
    results.append(torch.ones(k))
    op("entropy_slopes")(counts, n, 0.5, results[-1])
    recon, unit = grad[:, :d].contiguous(), torch.ones(min(d, k))
    results.append(op("squared_error")(recon, recon.flip(0), unit, None))
    results.append(torch.ones_like(recon))
    op("squared_error_gradient")(recon, recon.flip(0), unit, None, 0.5, results[-1])
    columns, signs = results[0], results[4]
    digits = pack_rows((counts >> torch.arange(n.bit_length())[:, None]) & 1)
    for dtype in (torch.float32, torch.float64):
        for planes in (signs, None):
            pre, sums = grad.to(dtype), torch.zeros(k, dtype=torch.float64)
            op("backward")(
                pre, words, 0, None, None, True, planes, None if planes is not None else columns,
                None, None, None, counts, n, digits, 0.25, window, None, None, False, sums,
            )  # fmt: skip
            results += [pre, sums]
    return results


SHAPES = [(257, 65, 33), (300, 1100, 130), (70, 513, 257), (1, 33, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_thread_and_two_give_the_same_bits(level, shape):
    torch.set_num_threads(1)
    one = everything(*shape)
    torch.set_num_threads(2)
    two = everything(*shape)
    assert len(one) == len(two) >= 16
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def layer(seed, impl="cpp"):
    """Integers of the statistics and gradients of one step."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(130, 16, generator=g)
    shapes = ((16, 700), (700,), (700, 16), (16,))
    leaves = [(torch.randn(s, generator=g) * 0.3).requires_grad_() for s in shapes]
    out = bf.binary_autoencoder(x, *leaves, impl=impl, covariance=True)
    (((out.recon - x) ** 2).mean() + 0.01 * out.entropy + 0.01 * out.covariance).backward()
    return [out.code.words, out.code.counts(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("threads", [1, 2])
def test_several_threads_may_each_run_forward_and_backward(level, threads):
    """Parallel regions inside autograd's calls, from Python threads at the same time."""
    torch.set_num_threads(threads)
    alone = [layer(seed) for seed in range(4)]
    together = [None] * 4
    failed = []
    ready = threading.Barrier(4)

    def work(seed):
        try:
            torch.set_num_threads(threads)  # a thread starts with the number of cores
            ready.wait(timeout=60)
            for _ in range(3):
                together[seed] = layer(seed)
        except BaseException as error:
            failed.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failed == []
    for expected, got in zip(alone, together, strict=True):
        for a, b in zip(expected, got, strict=True):
            assert torch.equal(a, b)


def test_a_worker_of_autograd_runs_the_backward_of_reentrant_checkpoints(level):
    """The reentrant form calls backward inside backward, with the operators under both."""
    torch.set_num_threads(2)
    x = torch.randn(130, 16)
    parameters = [torch.randn(s) * 0.3 for s in ((16, 300), (300,), (300, 16), (16,))]

    def step(leaves, x):
        out = bf.binary_autoencoder(x, *leaves, impl="cpp", covariance=True)
        return out.recon.square().mean() + 0.01 * out.entropy + 0.01 * out.covariance

    def gradients(checkpointed):
        leaves = [t.clone().requires_grad_() for t in parameters]
        inside = x.clone().requires_grad_()
        if checkpointed:
            from torch.utils.checkpoint import checkpoint

            loss = checkpoint(lambda y: step(leaves, y), inside, use_reentrant=True)
        else:
            loss = step(leaves, inside)
        loss.backward()
        return [inside.grad, *(leaf.grad for leaf in leaves)]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(a, b)
