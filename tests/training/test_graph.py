"""A captured step gives what the same calls without a graph give; no CUDA device is needed."""

import contextlib
import copy
import dataclasses
import warnings
from typing import ClassVar

import pytest
import torch
from recorded_graph import RecordedGraphs
from sparse_rows import module, synthetic

import bae_fast as bf
from bae_fast import baselines
from bae_fast.ops import registry
from bae_fast.training import (
    CapturedStep,
    Job,
    JobTrainer,
    MemorySupply,
    RunConfig,
    SparseConfig,
    Trainer,
    TrainingConfig,
)

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
    with pytest.raises(ValueError, match=r"warm_calls must be an int >= 1; got 0"):
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
    """Calls before the capture run on a stream of their own, which both sides wait for.

    A capture is on a stream of the current device, and refuses nothing that other threads do.
    """
    said, here = [], [0]

    class Stream:
        def __init__(self, name="side"):
            self.name, self.device = name, here[-1]

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def going(what, stream=None, capture_error_mode="global"):
        said.append(what.name)
        if isinstance(what, Graph):
            said.append(f"on {stream.device}, {capture_error_mode}")
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
    monkeypatch.setattr(torch.cuda, "current_device", lambda: here[-1])
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
    assert said == [*warm, "capture", "on 0, thread_local", "end", "replay", "replay"]
    # torch's own stream would be that of the first device ever after
    graphs, streams = OnCpu(), []
    for device in (0, 1, 0):
        here[:] = [device]
        graphs.capture(lambda: None)
        streams.append(graphs._streams[device])
    assert [x for x in said if x.startswith("on ")][1:] == [
        f"on {device}, thread_local" for device in (0, 1, 0)
    ]
    assert streams[0] is streams[2]


class Guard:
    """In place of torch.cuda.device: which device is current."""

    current: ClassVar[list[int]] = [0]

    def __init__(self, device):
        self.index = device.index

    def __enter__(self):
        self.current.append(self.index)

    def __exit__(self, *args):
        self.current.pop()


def test_a_step_is_captured_on_the_device_of_its_parameters(monkeypatch):
    """A capture is of a stream of the current device: a graph of another one would be empty."""
    where = []

    class Noted(RecordedGraphs):
        def check(self, device):
            pass

        def aside(self):
            where.append(Guard.current[-1])
            return super().aside()

        def capture(self, run):
            where.append(Guard.current[-1])
            replay = super().capture(run)
            return lambda: (where.append(Guard.current[-1]), replay())[0]

    monkeypatch.setattr(torch.cuda, "device", Guard)
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    loss_of = lambda x: (weight * x).sum()  # noqa: E731
    step = CapturedStep(loss_of, optimizer, warm_calls=1, graphs=Noted())
    step._device = torch.device("cuda", 1)
    for _ in range(3):
        step(torch.ones(1))
    assert where == [1, 1, 1, 1]
    assert Guard.current == [0]
    assert weight.item() == -3
    elsewhere = torch.zeros(1, device="meta", requires_grad=True)
    with pytest.raises(ValueError, match="parameters on one device; got cpu, meta"):
        CapturedStep(loss_of, torch.optim.SGD([weight, elsewhere]), graphs=Noted())


# -- the trainer ---------------------------------------------------------------------------------

# every learning rate is exact in float32, as a captured step reads it
RUN = TrainingConfig(
    steps=14, batch_size=32, lr=2.0**-8, decay_from=1.0, precision="float32", revive_every=5,
    dead_below=0.02, bank_batches=3, refit=False, entropy_from=0.5, cuda_graph=True,
)  # fmt: skip


@pytest.fixture
def capturable(monkeypatch, by_bits):
    """``torch`` on a CPU stands in for the backends that never wait."""
    backend = dataclasses.replace(registry.BACKENDS["torch"], capturable=True)
    monkeypatch.setitem(registry.BACKENDS, "torch", backend)


def trained(config, graphs, stop=0, **options):
    x = synthetic()
    torch.manual_seed(0)
    bae = module(x, impl="torch", **options)
    trainer = Trainer(bae, x, config, graphs=graphs)
    lines = []
    if stop:
        for _ in range(stop):
            trainer.train_step()
        state = trainer.state_dict()
        trainer = Trainer(bae, x, config, graphs=graphs)
        trainer.load_state_dict(state)
    trainer.fit(log_every=1, on_log=lines.append)
    for line in lines:
        line.pop("seconds")
    return bae, lines, trainer


@pytest.mark.parametrize(
    ("changes", "stop", "captures"),
    [
        ({}, 0, 2),  # the entropy's weight sets in: captured anew
        ({"entropy_from": 0.0}, 6, 2),  # resumed: the memory of the state is another
        ({"bank_batches": 0, "covariance_weight": 2.0**-10, "entropy_from": 0.0}, 0, 1),
    ],
)
def test_a_run_of_captured_steps_is_that_of_plain_ones(changes, stop, captures, capturable):
    config = dataclasses.replace(RUN, **changes)
    plain = dataclasses.replace(config, cuda_graph=False)
    right, expected, _ = trained(plain, None)

    class Counted(RecordedGraphs):
        made = 0

        def capture(self, run):
            Counted.made += 1
            return super().capture(run)

    graphs = Counted()
    got, lines, trainer = trained(config, graphs, stop)
    assert trainer.learner.uncaptured is None
    assert Counted.made == captures
    assert graphs.replays == RUN.steps - 3 * captures  # the first three of each run as they are
    assert lines == expected[stop:]
    for mine, theirs in zip(got.parameters(), right.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert trainer.state_dict()["belongs_to"] == trained(plain, None)[2].state_dict()["belongs_to"]


def reason(config, graphs=None, model=None):
    """Why the trainer captures nothing, which it warns of."""
    x = synthetic()
    model = module(x, impl="torch") if model is None else model
    with pytest.warns(UserWarning, match="cuda_graph has no effect: ") as found:
        trainer = Trainer(model, x, config, graphs=graphs)
    (warning,) = found
    assert str(warning.message).endswith(trainer.learner.uncaptured)
    trainer.train_step()
    assert not trainer.optimizer.param_groups[0]["capturable"]
    return trainer.learner.uncaptured


def test_what_cannot_be_captured_runs_as_it_is_and_says_why(capturable):
    graphs = RecordedGraphs()
    assert reason(RUN) == "optimizer must hold parameters on a CUDA device; got cpu"
    limited = dataclasses.replace(RUN, clip_norm=1.0)
    assert reason(limited, graphs) == "clip_norm must be 0: the host compares norms; got 1.0"
    growing = dataclasses.replace(RUN, covariance_weight=1e-4)
    assert "bank_batches must be 0 with a covariance_weight" in reason(growing, graphs)
    waiting = module(synthetic(), impl="torch", check_finite=True)
    assert "check_finite must be off" in reason(RUN, graphs, waiting)
    dense = module(synthetic(), impl="reference")
    assert reason(RUN, graphs, dense).endswith("never wait for the device; got 'reference'")
    searched = bf.SearchedAutoencoder.of(module(synthetic(), impl="torch"), synthetic())
    assert "model must not search" in reason(RUN.going_on(), graphs, searched)
    sparse = baselines.make_baseline("topk", 16, 24, k=3)
    config = SparseConfig(steps=3, batch_size=32, cuda_graph=True)
    assert "SparseObjective has numbers of the host" in reason(config, graphs, sparse)
    assert graphs.replays == 0


def test_backends_that_never_wait_are_those_whose_launches_are_watched():
    """bench/test_launches.py refuses what waits in a step of these."""
    assert {n for n, b in registry.BACKENDS.items() if b.capturable} <= {"triton", "cuda"}
    x = synthetic()
    assert reason(RUN, RecordedGraphs(), module(x, impl="torch")).endswith("got 'torch'")
    jobs, supply = [Job("a", module(x), RUN, hook="rows")], MemorySupply({"rows": x})
    with pytest.warns(UserWarning, match="must hold parameters on a CUDA device; got cpu"):
        JobTrainer(jobs, supply)
    with pytest.warns(UserWarning, match="micro_batches must be 1, and one process alone learn"):
        JobTrainer(jobs, supply, RunConfig(micro_batches=2), graphs=RecordedGraphs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        off = dataclasses.replace(RUN, cuda_graph=False)
        assert Trainer(module(x), x, off).learner.uncaptured == "cuda_graph is False"
    with pytest.raises(ValueError, match="cuda_graph must be a bool; got 1"):
        TrainingConfig(cuda_graph=1)


# -- jobs ----------------------------------------------------------------------------------------


class Counted(RecordedGraphs):
    """How often a step was captured, whatever it is of."""

    def __init__(self):
        super().__init__()
        self.made = 0

    def capture(self, run):
        self.made += 1
        return super().capture(run)


def trained_jobs(changes, graphs, bad=(), stop=0):
    """Two jobs of different constants, some of their rows not finite; modules and what was left
    out."""
    x = synthetic()
    x[list(bad)] = torch.nan
    found = []
    for name, change in changes.items():
        torch.manual_seed(len(name))
        bae = module(synthetic(), impl="torch")
        config = dataclasses.replace(RUN, init="none", cuda_graph=graphs is not None, **change)
        found.append(Job(name, bae, config, hook="rows"))

    def trainer():
        return JobTrainer(found, MemorySupply({"rows": x}), graphs=graphs)

    one = trainer()
    for _ in range(stop):
        one.train_step()
    if stop:
        state = copy.deepcopy(one.state_dict())
        one = trainer()
        one.load_state_dict(state)
    one.fit()
    return one


JOBS = {"a": {}, "bb": {"clip_norm": 0.05, "bank_batches": 0, "entropy_from": 0.0}}


@pytest.mark.parametrize(
    ("bad", "stop", "captures"),
    [
        ((), 0, 3),  # the entropy's weight of the first sets in: captured anew
        (range(0, 1500, 150), 0, 3),  # batches whose updates are left out
        ((), 7, 4),  # resumed: the memory of the state is another
    ],
)
def test_jobs_whose_gradients_are_replayed_are_plain_ones(bad, stop, captures, capturable):
    right, graphs = trained_jobs(JOBS, None, bad), Counted()
    got = trained_jobs(JOBS, graphs, bad, stop)
    assert graphs.made == captures
    assert graphs.replays == 2 * RUN.steps - 3 * captures
    assert bool(right.skipped) == bool(bad)
    assert got.skipped == right.skipped
    for name, learner in got.learners.items():
        assert learner.uncaptured is None
        assert not learner.optimizer.param_groups[0]["capturable"]
        theirs = dict(right.learners[name].model.named_parameters())
        for at, mine in learner.model.named_parameters():
            assert torch.equal(mine, theirs[at]), (name, at)


def test_gradients_of_a_captured_step_are_the_callers():
    """They may be dropped or changed; the next call writes all of them again."""
    weight = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.Adam([weight])
    step = CapturedStep(
        lambda x: (weight * x).sum(), optimizer, warm_calls=1, update=False, graphs=RecordedGraphs()
    )
    for number in range(1, 6):
        step(torch.full((2,), float(number)))
        assert weight.grad.tolist() == [number, number]
        weight.grad.mul_(7)
        if number % 2:
            optimizer.zero_grad(set_to_none=True)
    assert step.captured
    assert weight.tolist() == [1, 1]


def test_a_capture_that_fails_ends_in_plain_steps(capturable):
    class Failing(RecordedGraphs):
        def capture(self, run):
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    right, expected, _ = trained(dataclasses.replace(RUN, cuda_graph=False), None)
    with pytest.warns(UserWarning, match="the step cannot be captured: operation not permitted$"):
        got, lines, trainer = trained(RUN, Failing())
    assert trainer.learner.uncaptured.endswith("operation not permitted")
    assert lines == expected
    for mine, theirs in zip(got.parameters(), right.parameters(), strict=True):
        assert torch.equal(mine, theirs)
