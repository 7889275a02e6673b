"""A captured step gives what the same calls without a graph give; no CUDA device is needed."""

import contextlib

import pytest
import torch
from recorded_graph import RecordedGraphs

import bae_fast as bf
from bae_fast.training import CapturedStep

N, D, F = 24, 6, 40


def problem(impl, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = bf.BinaryAutoencoder(D, F, impl=impl, **options).to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True, capturable=True)

    def loss_of(x):
        out = model(x, covariance=True)
        loss = (x - out.recon).square().mean() + 1e-3 * out.entropy + 1e-3 * out.covariance
        return loss, out.code.counts()

    return model, optimizer, loss_of


def batches(n=7):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(N, D, generator=generator) for _ in range(n)]


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("surrogate", ["identity", "rectangle"])
def test_a_captured_step_gives_what_the_same_calls_give(impl, surrogate, by_bits):
    """By bits: on a CPU the sizes of lists go by the code, which a graph could not follow."""
    model, optimizer, loss_of = problem(impl, surrogate=surrogate)
    rates = [2.0 ** -(6 + at) for at in range(7)]  # exact in float32, as the step reads them
    right = []
    for x, rate in zip(batches(), rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss, counts = loss_of(x)
        loss.backward()
        optimizer.step()
        right.append((loss.detach(), counts))

    again, optimizer, loss_of = problem(impl, surrogate=surrogate)
    called = []

    def counted(x):
        called.append(len(x))
        return loss_of(x)

    graphs = RecordedGraphs()
    step = CapturedStep(counted, optimizer, warm_calls=2, graphs=graphs)
    got = []
    for x, rate in zip(batches(), rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        got.append(step(x))
    assert step.captured
    assert (graphs.aside_calls, graphs.replays, len(called)) == (2, 5, 3)
    for (loss, counts), (loss_right, counts_right) in zip(got, right, strict=True):
        assert torch.equal(loss, loss_right)
        assert torch.equal(counts, counts_right)
    for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(mine.grad, theirs.grad)


def test_a_scheduler_that_writes_into_the_rate_is_followed():
    model, optimizer, loss_of = problem("torch")
    step = CapturedStep(loss_of, optimizer, warm_calls=1, graphs=RecordedGraphs())
    x = batches(1)[0]
    step(x)
    step(x)
    optimizer.param_groups[0]["lr"].zero_()
    before = [p.detach().clone() for p in model.parameters()]
    step(x)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_what_python_computes_is_fixed_by_the_capture():
    """The stand-in replays; it does not call the function again."""
    weight = torch.zeros(1, requires_grad=True)
    seen = []

    def loss_of(x):
        seen.append(0)
        return (weight * x).sum() * len(seen)

    optimizer = torch.optim.SGD([weight], lr=1.0)
    step = CapturedStep(loss_of, optimizer, warm_calls=1, graphs=RecordedGraphs())
    for _ in range(4):
        step(torch.ones(1))
    assert weight.item() == -(1 + 2 + 2 + 2)


def test_it_says_what_it_cannot_capture():
    _, optimizer, loss_of = problem("torch")
    with pytest.raises(ValueError, match=r"optimizer must hold parameters on a CUDA device; got c"):
        CapturedStep(loss_of, optimizer)
    graphs = RecordedGraphs()
    with pytest.raises(ValueError, match=r"warm_calls must be an integer >= 1; got 0"):
        CapturedStep(loss_of, optimizer, warm_calls=0, graphs=graphs)
    plain = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    with pytest.raises(ValueError, match=r"Adam\(\.\.\., capturable=True\); got capturable=False"):
        CapturedStep(loss_of, plain, graphs=graphs)
    plain.param_groups[0]["params"] = []
    with pytest.raises(ValueError, match="must hold parameters in every group; got none in 0"):
        CapturedStep(loss_of, plain, graphs=graphs)
    step = CapturedStep(loss_of, optimizer, warm_calls=1, graphs=graphs)
    with pytest.raises(TypeError, match="input 0 must be a tensor; got list"):
        step([1.0])
    x = batches(1)[0]
    step(x)
    with pytest.raises(ValueError, match=r"float32\[24, 6\] on cpu; got float32\[3, 6\] on cpu"):
        step(x[:3])
    step(x)
    optimizer.param_groups[0]["eps"] = 1.0
    with pytest.raises(ValueError, match=r"must keep eps after the step was captured; got \[1\.0"):
        step(x)


def test_a_capture_that_fails_is_tried_again():
    """A kernel that is not compiled yet refuses; the parameters stay as they were."""
    weight = torch.ones(1, requires_grad=True)
    cold = [False, True, False]

    def loss_of(x):
        if cold.pop(0):
            raise RuntimeError("call bf.warmup")
        return (weight * x).sum()

    optimizer = torch.optim.SGD([weight], lr=1.0)
    step = CapturedStep(loss_of, optimizer, warm_calls=1, graphs=RecordedGraphs())
    step(torch.ones(1))
    with pytest.raises(RuntimeError, match="warmup"):
        step(torch.ones(1))
    assert not step.captured
    assert weight.item() == 0
    step(torch.ones(1))
    assert step.captured
    assert weight.item() == -1


def test_cuda_graphs_are_captured_in_torchs_order(monkeypatch):
    """Calls before the capture run on a stream of their own, which both sides wait for."""
    said = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def going(what):
        said.append(what if isinstance(what, str) else what.name)
        yield
        said.append("end")

    class Graph:
        name = "capture"

        def replay(self):
            said.append("replay")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", going)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", going)
    from bae_fast.training.graph import CudaGraphs

    class OnCpu(CudaGraphs):
        def check(self, device):
            pass

    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    step = CapturedStep(lambda x: (weight * x).sum(), optimizer, warm_calls=1, graphs=OnCpu())
    step(torch.ones(1))
    warm = ["side waits for main", "side", "end", "main waits for side"]
    assert said == warm
    step(torch.ones(1))
    step(torch.ones(1))
    assert said == [*warm, "capture", "end", "replay", "replay"]
