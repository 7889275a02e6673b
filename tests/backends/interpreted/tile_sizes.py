"""Sizes of tiles and of grids, tuning, and first calls under capture, in Triton's interpreter."""

import json
import threading
import types

import pytest
import torch
import triton
from triton_steps import NAMES, OPS, problem, run

from bae_fast import files
from bae_fast.kernels import bits, configs, launch


def test_defaults_cover_every_kernel_of_every_chip():
    kernels = set(configs.DEFAULTS["sm_90"])
    assert kernels >= set(configs.CANDIDATES)
    for chip, table in configs.DEFAULTS.items():
        assert set(table) == kernels, chip
        for name, entries in table.items():
            if name == "covariance":
                assert all(c.m == c.n >= 128 and 256 % c.k == 0 for c in entries)
            elif name in configs.CANDIDATES:
                assert all(c.m % 32 == c.n % 64 == c.k % 32 == 0 for c in entries)


@pytest.mark.parametrize(
    ("name", "rows", "columns", "expected"),
    [
        ("encode", 1, 16384, 64),
        ("encode", 512, 16384, 128),  # 256 large tiles: two waves of 132
        ("encode", 513, 16384, 128),
        ("encode", 4096, 65536, 128),
        ("gradient", 512, 2048, 64),  # 32 large tiles would leave most multiprocessors idle
        ("sign_product", 13, 16384, 64),
        ("sign_product", 512, 16384, 128),
    ],
)
def test_the_tile_is_that_which_ends_first(name, rows, columns, expected):
    assert launch.default(name, "sm_90", rows, columns, 132).m == expected


def test_more_rows_never_end_before_fewer():
    """The choice itself: a tile of the table that ends later than another is never taken."""
    for rows in (1, 63, 64, 65, 511, 512, 513, 4096, 100_000):
        for columns in (33, 2048, 16384, 65536):
            chosen = launch.default("encode", "sm_90", rows, columns, 132)
            ends = [launch.cost(c, rows, columns, 132) for c in configs.DEFAULTS["sm_90"]["encode"]]
            assert launch.cost(chosen, rows, columns, 132) == min(ends)


def test_tuned_sizes_are_kept_on_disk_and_a_broken_file_is_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seconds = {config: i for i, config in enumerate(reversed(configs.CANDIDATES["encode"]))}
    monkeypatch.setattr(launch, "_milliseconds", lambda call: call())
    launch._tuned.cache_clear()
    sizes, cpu = (7, 8, 8, 9), torch.device("cpu")

    def measured(config):
        return seconds.get(config, 10**6)

    launch._tune("encode", cpu, torch.bfloat16, sizes, -1, measured)
    best = configs.CANDIDATES["encode"][-1]
    assert launch.configuration("encode", cpu, torch.bfloat16, sizes) == best
    (file,) = tmp_path.rglob("*.json")
    assert json.loads(file.read_text()) == {"tiles": [[list(sizes), list(best)]]}
    launch._tuned.cache_clear()  # as a later process
    assert launch.configuration("encode", cpu, torch.bfloat16, sizes) == best
    assert launch.configuration("encode", cpu, torch.float16, sizes) != best
    file.write_text("[[1, 2")
    launch._tuned.cache_clear()
    assert launch.configuration("encode", cpu, torch.bfloat16, sizes) != best
    launch._tuned.cache_clear()


def test_a_user_without_a_home_computes_and_tunes(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(files.Path, "home", homeless)
    monkeypatch.setattr(launch, "_milliseconds", lambda call: call())
    launch._tuned.cache_clear()
    sizes, cpu = (7, 8, 8, 9), torch.device("cpu")
    own = launch.configuration("encode", cpu, torch.bfloat16, sizes)
    assert own in configs.DEFAULTS["interpreter"]["encode"]
    best = configs.CANDIDATES["encode"][-1]
    launch._tune("encode", cpu, torch.bfloat16, sizes, -1, lambda config: config != best)
    assert launch.configuration("encode", cpu, torch.bfloat16, sizes) == best
    launch._tuned.cache_clear()


@pytest.fixture
def tuning(tmp_path, monkeypatch):
    """BAE_FAST_AUTOTUNE=1 as on a device: every candidate is run, and several times over."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("BAE_FAST_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "family", lambda device: "interpreter")
    monkeypatch.setattr(launch, "_chip", lambda device: "interpreter")
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    few = {name: (configs.DEFAULTS["interpreter"][name][0]._replace(warps=8),)
           for name in configs.CANDIDATES}  # fmt: skip
    monkeypatch.setattr(launch, "CANDIDATES", few)
    runs = []

    def milliseconds(call):
        for _ in range(2):
            call()
        runs.append(call)
        return float(len(runs))

    monkeypatch.setattr(launch, "_milliseconds", milliseconds)
    launch._tuned.cache_clear()
    yield runs
    launch._tuned.cache_clear()


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.long)], ids=str
)
def test_tuning_changes_no_result(dtype, tuning, monkeypatch):
    """Launchers are called many times over on the same memory: none may add to it."""
    x, parameters, direction = problem(34, 9, 70, 1, 5, dtype)
    got, code = run("triton", x, parameters, direction)
    assert len(tuning) >= (6 if dtype == torch.bfloat16 else 2)
    monkeypatch.setenv("BAE_FAST_AUTOTUNE", "0")
    expected, right = run("triton", x, parameters, direction)
    assert torch.equal(code.counts(), right.counts())
    assert torch.equal(code.counts(), code.to_dense().sum(0))
    for name in NAMES:
        assert torch.equal(got[name], expected[name]), name


def test_tuning_is_timed_on_the_device_of_the_tensors(tuning, monkeypatch):
    """Events, the cache that is overwritten and the capture are those of the current device."""
    now, asked = [0], []

    class Guard:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            now.append(self.index)

        def __exit__(self, *args):
            now.pop()

    def asked_here(answer):
        def ask(*args):
            asked.append(now[-1])
            return answer

        return ask

    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", asked_here(False))
    monkeypatch.setattr(launch, "_milliseconds", asked_here(1.0))
    rows = types.SimpleNamespace(
        shape=(20, 9), device=torch.device("cuda", 1), dtype=torch.bfloat16
    )
    config = launch.tuned("encode")(lambda config, first, second: config)(rows, 7)
    assert config in configs.DEFAULTS["interpreter"]["encode"]
    assert asked == [1, 1, 1]
    assert now == [0]


def test_no_grid_is_higher_than_a_device_starts(monkeypatch):
    """2^16 - 1 in all but the first number: eight bits of a million features are 2^23 columns."""
    grids = {}
    monkeypatch.setattr(
        launch, "start", lambda kernel, grid, *args, **options: grids.update({kernel: grid})
    )
    k = 2**23
    words = torch.empty(2**17, k // 32, dtype=torch.int32, device="meta")
    bits.feature_packed(words, k)
    bits.unpack(words, k, torch.bfloat16)
    assert len(grids) == 2
    for grid in grids.values():
        assert 2**16 < grid[0] < 2**31
        assert max(grid[1:], default=1) < 2**16


def test_ranks_do_not_tune_apart(tuning, monkeypatch):
    """Other tiles would be other bits near zero: several ranks take the defaults."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    x, (W, b, *_), _ = problem(20, 9, 70, 1, 5, torch.bfloat16)
    OPS["encode"](x, W, b, None, None)
    assert tuning == []
    sizes, cpu = (20, 9, 9, 70), torch.device("cpu")
    other = configs.Config(32, 64, 32, 8, 1)
    launch._tuned("interpreter", "encode", torch.bfloat16)[sizes] = other
    default = configs.DEFAULTS["interpreter"]["encode"][0]
    assert launch.configuration("encode", cpu, torch.bfloat16, sizes) == default
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    assert launch.configuration("encode", cpu, torch.bfloat16, sizes) == other


@pytest.mark.parametrize("error", [RuntimeError, triton.runtime.errors.OutOfResources])
def test_tiles_that_do_not_run_are_left_out(error, tmp_path, monkeypatch):
    def call():
        raise error("too much", 1, 2) if error is not RuntimeError else error("invalid argument")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert launch._milliseconds(call) == float("inf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="no tile sizes of the kernel encode run for sizes"):
        launch._tune(
            "encode", torch.device("cpu"), torch.bfloat16, (1, 2, 2, 4), -1, lambda c: call()
        )

    def dead():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        launch._milliseconds(call)


def test_tiles_are_timed_with_a_cold_cache(monkeypatch):
    """By triton's own measurement, which overwrites the cache and keeps the host ahead."""
    asked = []

    def do_bench(call, **options):
        asked.append((call, options["return_mode"]))
        return 2.5

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    assert launch._milliseconds(dict) == 2.5
    assert asked == [(dict, "min")]


class FakeKernel:
    """Compiles as triton does: asks the hook, then starts."""

    def __init__(self):
        self.compiled, self.started = False, 0

    def __getitem__(self, grid):
        def go(*args, **constants):
            if not self.compiled:
                hook = triton.knobs.runtime.jit_cache_hook
                if hook is not None:
                    hook(key="", repr="", fn=None, compile={}, is_manual_warmup=False)
                self.compiled = True
            self.started += 1

        return go


def test_a_first_call_under_capture_says_to_warm_up(monkeypatch):
    class OnDevice:
        is_cuda, device = True, None

    class Guard:
        def __init__(self, device):
            pass

        __enter__ = __exit__ = lambda self, *args: None

    capturing = [True]
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    kernel = FakeKernel()
    with pytest.raises(RuntimeError, match=r"bae_fast\.warmup\('triton'"):
        launch.start(kernel, (1,), OnDevice())
    assert kernel.started == 0
    # other kernels, and other threads beside a capture, compile as ever
    hook = triton.knobs.runtime.jit_cache_hook
    assert not hook(key="", repr="", fn=None, compile={}, is_manual_warmup=False)
    elsewhere = FakeKernel()
    launch._capture.going = True
    try:
        thread = threading.Thread(target=lambda: elsewhere[(1,)]())
        thread.start()
        thread.join()
    finally:
        launch._capture.going = False
    assert elsewhere.started == 1
    capturing[0] = False
    launch.start(kernel, (1,), OnDevice())
    capturing[0] = True
    launch.start(kernel, (1,), OnDevice())
    assert kernel.started == 2
