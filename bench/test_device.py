"""``python -m bench device`` without a GPU: the whole program on tiny sizes by the host's clock."""

import dataclasses
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from recorded_graph import RecordedGraphs

from bae_fast.files import read_json, write_json
from bae_fast.ops import registry
from bae_fast.packing import pack_rows, unpack_rows
from bench import checkout, device, eager, exact
from bench.__main__ import main

# the command, and its worker, on a device in name; what only kernels could do is stood in for
ON_A_DEVICE = """
import sys
import torch
import fake_cuda
from bench import device, eager, test_device
from bae_fast.kernels import counts
from bae_fast.kernels_cuda import covariance, driver
fake_cuda.use()
try:
    torch.ones(3, device="cuda") + torch.ones(3)
except fake_cuda.MixedDevicesError:
    pass
else:
    sys.exit("tensors of two devices must be refused")
device.REPEATS, device.TRAINED = 3, 8
eager.COMPILER = "eager"  # no C++ compiler, no minutes
device.PANEL_SHAPES[:] = [(2, 1), (33, 129)]
device.SIGN_SHAPES[:] = [(2, 1, 1), (33, 129, 70)]
pairs = device.check_panels
device.check_panels = lambda op: pairs(test_device._covariance())
counts.sign_operands, covariance.sign_product = test_device._digits, test_device._sign_product()
driver.start = lambda *given: None
device.PARTS, device.TESTING = ("bf16", "paper"), 1
device.WARMUP = "print('seconds', 1.0)"
device.tool = lambda name: None
sys.exit(device.main(
    sys.argv[1:], lambda: {"torch": "2"}, command=(sys.executable, "-c", sys.orig_argv[2])
))
"""
# what a worker's process runs: the command itself, with a fault where it is asked for
WORKER = """
import os, sys
from bench import device, eager
from bae_fast.ops import registry
eager.COMPILER = "eager"  # no C++ compiler, no minutes
ops = registry.BACKENDS["torch"].ops
right = ops["decode"]
def dies(words, *args):
    if words.shape[0] == device.TINY.head[0]:
        os._exit(66)
    return right(words, *args)
def hangs(*args):
    import time
    time.sleep(600)
fault = {"dies": dies, "hangs": hangs}.get(sys.argv[1])
if fault:
    ops["decode"] = fault
    kinds = ("step", "pairs") if fault is dies else ("operator", "pairs")
    every = device.cases(device.TINY, ["torch"], "cpu")
    few = [case for case in every if case["kind"] in kinds][:3]
    device.cases = lambda *_: few
sys.exit(device.main(sys.argv[2:]))
"""
needs_kernels = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which kernels import"
)
SMALL = device.TINY._replace(checked=[(66, 24, 331)], more=[(32, 24, 256)])


def command(folder, *more, fault="", seconds=300.0):
    script = folder / "worker.py"
    script.write_text(WORKER)
    arguments = ["--device", "cpu", "--tiny", "--impl", "torch", "--out", str(folder)]
    return device.main(
        [*arguments, "--seconds", str(seconds), *more],
        environment=lambda: {"torch": torch.__version__},
        readme=folder / "README.md",
        command=(sys.executable, str(script), fault),
    )


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(device.ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def worked(tmp_path, monkeypatch):
    """Some cases in this process; returns the result."""

    def run(*wanted, impls=("torch",), until=None, rows=(), ended=None, only=()):
        path = tmp_path / "device.json"
        blank = {"environment": {"torch": "", "device": {"name": "none"}}, "impls": {}}
        lists = {"rows": list(rows), "skipped": [], "ended": ended or {}}
        write_json(path, {**blank, **lists, "running": None, "complete": False})
        monkeypatch.setattr(device, "cases", lambda plan, impls, kind: list(wanted))
        status = device.work(
            path, list(impls), "cpu", SMALL, time.time() + 100 if until is None else until, only
        )
        return status, read_json(path)

    return run


def case(kind, **more):
    return {"kind": kind, **more, **dict(zip("ndf", SMALL.head, strict=True))}


STEP = case("step", objective="paper")
DECODE = case("operator", operator="decode", density=0.5)
LAYER = {"kind": "layer", "impl": "torch", "dtype": "bf16"}
CHECK = case("check", operator="decode", density=0.5)


NUMBER = (int, float)
# keys of device.json, those that must be there and those that may be, and their types
SCHEMA = {
    "schema": int, "environment": dict, "impls": dict, "seconds": NUMBER, "complete": bool,
    "running": (dict, type(None)), "rows": list, "skipped": list, "ended": dict,
}  # fmt: skip
MORE = {
    "ceilings": dict, "compiled_seconds": NUMBER, "spent": NUMBER, "clocks_after": dict,
    "error": str,
}  # fmt: skip
ROW = {"case": dict, "sides": dict, "wall_seconds": NUMBER}
MORE_OF_ROW = {"work": dict, "marked": list, "kernels": list, "unavailable": str}
# of a side: one of these says what became of it
SIDE = {"seconds": NUMBER, "checked": (int, str), "refused": str, "unavailable": str}
MORE_OF_SIDE = {
    "first_seconds": NUMBER, "least": NUMBER, "most": NUMBER, "rounds": int, "peak_bytes": int,
    "ratio": NUMBER, "failed": list, "host_seconds": NUMBER, "cold_seconds": NUMBER,
    "warm_seconds": NUMBER,
}  # fmt: skip


def check_schema(result):
    """Tables, later commands and readers of committed results go by these keys."""

    def check(found, needed, more):
        assert needed.keys() <= found.keys(), found
        for key, value in found.items():
            rate = key.endswith(("_per_second", "_share", "floor_seconds"))
            assert isinstance(value, NUMBER if rate else (needed | more)[key]), (key, value)

    check(result, SCHEMA, MORE)
    assert result["schema"] == device.SCHEMA
    for row in result["rows"]:
        check(row, ROW, MORE_OF_ROW)
        for side in row["sides"].values():
            check(side, {}, SIDE | MORE_OF_SIDE)
            assert {"first_seconds", "warm_seconds", *SIDE} & side.keys(), side


# -- the whole -----------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.long
@pytest.mark.slow
def test_the_whole_command_ends_with_every_case_table_and_plot(tmp_path, capsys):
    """As on a device, in every kind of case: what it would say first must not be Python's error."""
    begin = time.time()
    path = os.pathsep.join(map(str, (device.ROOT, device.ROOT / "tests" / "support")))
    done = subprocess.run(
        [sys.executable, "-c", ON_A_DEVICE, "--tiny", "--impl", "cuda", "--out", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path}, cwd=device.ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = read_json(tmp_path / "device.json")
    check_schema(result)
    assert result["complete"]
    assert result["environment"]["device"]["capability"] == [9, 0]
    expected = device.cases(device.TINY, ["cuda"], "cuda")
    assert [row["case"] for row in result["rows"]] == expected
    assert {case["kind"] for case in expected} == set(device.KINDS)
    # everything is checked before anything is timed
    kinds = [row["case"]["kind"] for row in result["rows"]]
    last = max(i for i, kind in enumerate(kinds) if kind in ("layer", "check", "trainer"))
    assert not {"step", "operator", "pairs", "profile"} & set(kinds[:last])
    for row in result["rows"]:
        assert "unavailable" not in row, row
        kind, sides = row["case"]["kind"], row["sides"]
        assert sides or kind == "ceilings"
        if kind in ("step", "operator", "pairs", "graph"):
            assert all(side["seconds"] > 0 for side in sides.values()), row
        elif kind in ("sanitize", "tests"):  # a toolkit and a device that are none
            assert all("unavailable" in side for side in sides.values()), row
        elif kind != "warmup":
            assert all({"checked", "first_seconds"} & side.keys() for side in sides.values()), row
    assert result["ceilings"]["gemm_bfloat16"] > 0
    assert result["ceilings"]["bit_macs"].keys() == {"int8", "b1"}
    assert 0 < result["compiled_seconds"] < result["spent"] < time.time() - begin + 1
    assert "| paper | 64, 24, 256 |" in done.stdout
    assert (tmp_path / "device.png").read_bytes().startswith(b"\x89PNG")
    # again from the file alone
    (tmp_path / "device.png").unlink()
    readme = tmp_path / "README.md"
    assert device.main(["--report-only", "--out", str(tmp_path)], readme=readme) == 0
    assert (tmp_path / "device.png").is_file()
    assert capsys.readouterr().out.strip() in done.stdout


@pytest.mark.long
@pytest.mark.slow
def test_a_process_that_dies_costs_one_side_and_the_run_goes_on(tmp_path, capsys):
    assert command(tmp_path, fault="dies") == 1
    result = read_json(tmp_path / "device.json")
    rows = {device.name_of(row["case"]): row["sides"] for row in result["rows"]}
    hit = rows[device.name_of(STEP)]
    assert hit["torch bf16"] == {"refused": "its process ended with status 66"}
    assert hit["autocast"]["seconds"] > 0
    # what does not decode is timed all the same
    pairs = [s for n, s in rows.items() if n.startswith("pairs")]
    assert pairs
    assert all("seconds" in s["torch"] for s in pairs)
    assert "status 66" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.slow
def test_a_hanging_kernel_is_ended_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "STALL", 30.0)
    assert command(tmp_path, fault="hangs") == 1
    rows = read_json(tmp_path / "device.json")["rows"]
    hung = [row["sides"]["torch bf16"] for row in rows if row["case"].get("operator") == "decode"]
    assert hung == [{"refused": "no answer within 30 s"}]
    assert rows[-1]["case"] != hung
    assert len(rows) == 3


def test_time_that_is_up_leaves_a_whole_file(tmp_path):
    command(tmp_path, fault="hangs", seconds=device.SPARE + 12)
    result = read_json(tmp_path / "device.json")
    check_schema(result)
    assert result["running"] is None
    assert not result["complete"]
    assert device.table(result)


# -- sides ---------------------------------------------------------------------------------------


def test_a_wrong_side_is_refused_and_never_timed(worked, monkeypatch):
    right = registry.BACKENDS["torch"].ops["decode"]
    monkeypatch.setitem(registry.BACKENDS["torch"].ops, "decode", lambda *a: 1.05 * right(*a))
    status, result = worked(DECODE)
    assert status == 0
    (row,) = result["rows"]
    assert row["sides"]["torch bf16"].keys() == {"refused"}
    assert row["sides"]["autocast"]["seconds"] > 0
    assert device.refusals(result) == [
        f"{device.name_of(DECODE)}: torch bf16: {row['sides']['torch bf16']['refused']}"
    ]
    assert "recon is off by" in device.refusals(result)[0]
    assert "| refused |" in device.table(result)


def test_what_the_checks_refuse_is_timed_and_marked(worked):
    """One refused check must not cost the times of a side; what it is wrong in itself has none."""
    wrong = {"case": CHECK, "sides": {"torch bf16": {"refused": "off"}}, "wall_seconds": 1.0}
    _, result = worked(DECODE, STEP, case("pairs", density=0.5), rows=[wrong])
    _, decode, step, pairs = result["rows"]
    for row in (decode, step):
        assert row["sides"]["torch bf16"]["seconds"] > 0
        assert row["marked"] == ["torch bf16"]
    assert pairs["sides"]["torch"]["seconds"] > 0
    assert pairs["marked"] == []
    text = device.table(result)
    assert f"s{device.MARK} |" in text or f"){device.MARK} |" in text
    assert "was refused in the checks" in text


def test_a_decode_that_changes_from_call_to_call_is_refused(worked, monkeypatch):
    repeat = case("repeat", impl="torch", density=0.5)
    _, result = worked(repeat)
    assert result["rows"][0]["sides"]["torch bf16"] == {"checked": device.REPEATS}
    right, calls = registry.BACKENDS["torch"].ops["decode"], []

    def racing(*args):
        calls.append(args)
        recon = right(*args)
        if len(calls) == 7:
            recon[3, 5] = torch.nextafter(recon[3, 5], recon.new_tensor(9.0))
        return recon

    monkeypatch.setitem(registry.BACKENDS["torch"].ops, "decode", racing)
    _, result = worked(repeat, STEP)
    (row, step) = result["rows"]
    assert "other bits in call 7 than in the first: 1 of" in row["sides"]["torch bf16"]["refused"]
    assert step["marked"] == ["torch bf16"]


def test_a_step_is_seen_from_inside(worked):
    _, result = worked(case("profile", impl="torch"))
    (row,) = result["rows"]
    assert row["kernels"]
    name, count, microseconds = row["kernels"][0]
    assert isinstance(name, str)
    assert count > 0 < microseconds
    assert "A step of `torch` from inside" in device.table(result)


def fake_checker(folder, status, text):
    """A program in place of compute-sanitizer: says something and ends."""
    script = folder / "compute-sanitizer"
    script.write_text(f"#!/bin/sh\necho '{text}'\nexit {status}\n")
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize(
    ("status", "text", "found"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", {"checked": "memcheck"}),
        (
            device.FOUND,
            "========= Invalid __global__ write of size 4 bytes",
            {"refused": "Invalid __global__ write of size 4 bytes"},
        ),
        (
            device.FOUND,
            "========= Invalid __global__ write of size 4 bytes\n=========     at a_kernel+0x70\n"
            "=========     by thread (3,0,0) in block (1,0,0)\n=========     Address 0x7f",
            {
                "refused": "Invalid __global__ write of size 4 bytes; at a_kernel+0x70; "
                "by thread (3,0,0) in block (1,0,0)"
            },
        ),
        (
            1,
            "refused: triton: recon is off by 3",
            {"refused": "refused: triton: recon is off by 3"},
        ),
        # the tool's own end: some machines let it see no device
        (
            255,
            "========= Error: Device not supported",
            {"unavailable": "Error: Device not supported"},
        ),
    ],
)
def test_what_a_checker_finds_is_refused(status, text, found, tmp_path, monkeypatch):
    checker = fake_checker(tmp_path, status, text)
    monkeypatch.setattr(device, "tool", lambda name: checker)
    assert device.sanitize("memcheck", "torch", 5.0) == found


def test_tools_are_looked_for_where_the_toolkit_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert device.tool("no-such-checker") is None
    monkeypatch.setattr(device, "tool", lambda name: None)
    assert "not found" in device.sanitize("memcheck", "torch", 5.0)["unavailable"]
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    checker = fake_checker(tmp_path / "bin", 0, "")
    renamed = Path(checker).rename(tmp_path / "bin" / "a-checker")
    assert device.tool("a-checker") == str(renamed)


def test_the_small_checks_run_and_refuse(monkeypatch, capsys):
    assert device.main(["--small", "--device", "cpu", "--impl", "torch"]) == 0
    right = registry.BACKENDS["torch"].ops["decode"]
    monkeypatch.setitem(registry.BACKENDS["torch"].ops, "decode", lambda *a: 1.05 * right(*a))
    assert device.main(["--small", "--device", "cpu", "--impl", "torch"]) == 1
    assert "refused: torch: recon is off by" in capsys.readouterr().err


def test_the_small_checks_of_wgmma_ask_for_it(monkeypatch):
    asked = []

    def layer(impl, *args, **options):
        asked.append((impl, os.environ.get(device.ENV_PAIRS), os.environ.get(device.ENV_SIGNS)))

    monkeypatch.setattr(device, "check_layer", layer)
    assert device.main(["--small", "--device", "cpu", "--impl", device.PANELS]) == 0
    assert asked == [("cuda", "wgmma", "wgmma")]
    checked = [c for c in device.cases(device.FULL, ["triton", "cuda"], "cuda") if "tool" in c]
    assert checked[-1] == {"kind": "sanitize", "tool": "memcheck", "impl": device.PANELS}
    # both tools see what needs no asking
    assert {(c["tool"], c["impl"]) for c in checked[:-1]} == {
        (tool, impl) for tool in device.SANITIZERS for impl in device.IMPLS
    }


# -- processes -----------------------------------------------------------------------------------

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def test_what_a_process_has_started_ends_with_it():
    """A checker that is killed would leave its program on the device."""
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    with process:
        child = int(process.stdout.readline())
        assert set(device.below(process.pid)) == {process.pid, child}
        device.end(process)
        assert process.wait() == -signal.SIGKILL
        assert process.stdout.read() == ""  # the child had it open as well
    assert device.below(process.pid) == [process.pid]


def test_a_command_whose_time_is_up_has_said_what_it_said():
    done = device.run_process(["sh", "-c", "echo before; exec sleep 600"], 1.0)
    assert done == (None, "before\n")
    assert device.run_process(["sh", "-c", "echo $WORD >&2; exit 3"], 60.0, WORD="a") == (3, "a\n")


PYTEST = """
tests/backends/test_triton_gpu.py::test_a[triton] PASSED                   [  1%]
tests/backends/test_triton_gpu.py::test_b[triton-x y] FAILED               [  2%]
[gw3] [ 63%] FAILED tests/backends/test_triton_gpu.py::test_c[cuda]
[gw1] [ 64%] PASSED tests/backends/test_triton_gpu.py::test_d
"""


@pytest.mark.parametrize(
    ("status", "text", "found"),
    [
        (0, "==== 9 passed in 3.0s ====", {"checked": "9 passed in 3.0s"}),
        # where no test finds the device nothing is shown
        (0, "==== 9 skipped in 3.0s ====", {"unavailable": "9 skipped in 3.0s"}),
        (None, "", {"unavailable": "took more than 5 s; 0 tests had passed"}),
        (
            None,
            PYTEST,
            {
                "refused": "took more than 5 s; 2 tests had passed",
                "failed": [
                    "tests/backends/test_triton_gpu.py::test_b[triton-x y]",
                    "tests/backends/test_triton_gpu.py::test_c[cuda]",
                ],
            },
        ),
        (2, "no module named x", {"refused": "no module named x"}),
    ],
)
def test_of_tests_that_time_cuts_short_those_that_failed_are_named(
    status, text, found, monkeypatch
):
    monkeypatch.setattr(device, "run_process", lambda *args: device.Ended(status, text))
    assert device.run_tests(5.0) == found


def test_kernels_are_compiled_ahead_by_a_process_a_part(tmp_path):
    command = ["sh", "-c", f'test "$2" = paper && exit 1; echo > "{tmp_path}/$2"', "sh"]
    assert device.compile_ahead(command, 60.0) > 0
    wanted = {"fp32", "bf16", "fp16", "rectangle", "no covariance"}
    assert {path.name for path in tmp_path.iterdir()} == wanted
    # what hangs ends with the time
    assert device.compile_ahead(["sh", "-c", "exec sleep 600"], 0.0) > 0


def test_a_part_compiles_whatever_is_wrong(monkeypatch):
    made = []

    def wrong(*args, **options):
        made.append(args)
        raise exact.WrongResultError("off")

    monkeypatch.setattr(device, "check_layer", wrong)
    device.compile_part("bf16", ["torch"], "cpu", SMALL)
    assert len(made) == device.check_whole_layer("torch", torch.bfloat16, SMALL, lambda *a, **b: 0)
    right, ran = registry.BACKENDS["torch"].ops["decode"], []
    monkeypatch.setitem(
        registry.BACKENDS["torch"].ops, "decode", lambda *a: (ran.append(a), right(*a))[1]
    )
    device.compile_part("paper", ["torch"], "cpu", SMALL)
    assert len(ran) == 1


# -- several commands ----------------------------------------------------------------------------


def test_a_later_command_goes_on_on_the_same_device(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device, "watch", lambda *args: None)
    arguments = ["--device", "cpu", "--tiny", "--impl", "torch"]
    environment = lambda: {"torch": "2.11"}  # noqa: E731
    first, later = tmp_path / "first", tmp_path / "later"
    assert device.main([*arguments, "--out", str(first)], environment) == 0
    result = read_json(first / "device.json")
    done = {"case": DECODE, "sides": {"torch bf16": {"seconds": 1.0}}, "wall_seconds": 0.1}
    late = {"case": STEP, "sides": {"torch bf16": {"unavailable": device.TIME_UP}}}
    result["rows"] = [done, late | {"wall_seconds": 0.0}]
    result |= {"skipped": [{"case": LAYER, "reason": "1 s left"}], "spent": 500.0}
    crashed = {"autocast": {"refused": "its process ended"}}
    result["ended"] = {device.name_of(STEP): crashed | late["sides"]}
    write_json(first / "device.json", result)
    more = ["--out", str(later), "--resume", str(first)]
    assert device.main([*arguments, *more], environment) == 0
    found = read_json(later / "device.json")
    check_schema(found)
    assert found["rows"] == [done]
    assert found["skipped"] == []
    assert found["ended"] == {device.name_of(STEP): crashed}  # what time cut short is run again
    assert found["spent"] > 500
    capsys.readouterr()
    assert device.main([*arguments, *more], lambda: {"torch": "2.12"}) == 2
    assert "'torch': '2.12'" in capsys.readouterr().err
    assert device.main([*arguments, "--resume", str(tmp_path / "nowhere")], environment) == 2
    assert "nowhere" in capsys.readouterr().err


def test_only_the_kinds_that_are_named_are_run(worked, tmp_path, capsys):
    _, result = worked(LAYER, DECODE, case("pairs", density=0.5), only=["operator", "pairs"])
    assert [row["case"]["kind"] for row in result["rows"]] == ["operator", "pairs"]
    assert not result["complete"]
    assert device.main(["--device", "cpu", "--only", "pair", "--out", str(tmp_path)]) == 2
    assert "--only must be of layer, check, panels," in capsys.readouterr().err


# -- a sample of results ---------------------------------------------------------------------------


def sample():
    """Rows of every kind as an H200 might give them, in the keys that SCHEMA has."""

    def timed(seconds, **more):
        found = {"seconds": seconds, "least": seconds, "most": 2 * seconds, "rounds": 9}
        return {"first_seconds": 1.0, **found, **more}

    def row(case, sides, **more):
        return {"case": case, "sides": sides, "wall_seconds": 1.0, **more}

    floor = {"floor_seconds": 3e-3, "floor_share": 0.6, "ratio": 2.0, "peak_bytes": 3 * 2**20}
    step = {"autocast": timed(10e-3, ratio=1.0), "triton bf16": timed(5e-3, **floor)}
    step["cuda bf16"] = {"refused": "grad is off"}
    off = {"cuda bf16": {"refused": "recon is off"}, "triton bf16": {"first_seconds": 0.1}}
    off["triton bf16"]["checked"] = 1
    return {
        "schema": device.SCHEMA,
        "environment": {
            "torch": "2.11",
            "device": {"name": "H200", "triton": "3.6.0", "driver_version": "580"},
        },
        "impls": {"triton": "available", "cuda": "no nvrtc"},
        "seconds": 540.0,
        "complete": False,
        "running": None,
        "rows": [
            row(LAYER | {"impl": "triton"}, {"triton bf16": {"checked": 18}}),
            row(CHECK, off),
            row({"kind": "ceilings"}, {}),
            row(STEP, step, marked=["triton bf16"], work={"flops": 1.0}),
            row(
                case("profile", impl="triton"),
                {"triton": {"checked": 1}},
                kernels=[["a_kernel", 2, 750.0], ["copy", 1, 250.0]],
            ),
            row(case("graph", objective="paper"), {"triton bf16": timed(4e-3, **floor)}),
            row(DECODE, {"autocast": timed(2e-3, ratio=1.0), "triton bf16": timed(1e-3, **floor)}),
            row(
                case("pairs", density=0.5),
                {"int8": timed(3e-3, ratio=1.0), "triton": {"unavailable": "out of memory"}},
            ),
            row(case("pairs", density=0.1), {}, unavailable="out of memory"),
            row(
                {"kind": "warmup", "impl": "triton"},
                {"triton": {"cold_seconds": 90.0, "warm_seconds": 6.0}},
            ),
            row({"kind": "tests"}, {"pytest": {"refused": "2 failed", "failed": ["a", "b"]}}),
        ],
        "skipped": [{"case": STEP | {"objective": "rectangle"}, "reason": "1 s left"}],
        "ended": {},
        "ceilings": {
            "copy": 4.3e12, "gemm_float32": 5e13, "gemm_bfloat16": 7.9e14,
            "bit_macs": {"int8": 1e15, "b1": 4e15},
        },
        "spent": 500.0,
    }  # fmt: skip


def test_tables_are_made_from_a_sample_of_results(tmp_path, capsys):
    result = sample()
    check_schema(result)
    write_json(tmp_path / "device.json", result)
    readme = tmp_path / "speed.md"
    readme.write_text("before\n<!-- bench:device -->\n<!-- /bench:device -->\nafter\n")
    device.report(tmp_path, readme)
    text = capsys.readouterr().out
    for line in (
        "| objective | N, d, F | autocast | `triton bf16` | `cuda bf16` | peak | of the floor |",
        "| paper | 64, 24, 256 | 10 ms (1.0) | 5 ms (2.0) † | refused | 3 MiB | 60% |",
        "| paper, graph | 64, 24, 256 | 4 ms (2.0) | 3 MiB | 60% |",
        "| decode | 64, 24, 256 | 0.5 | 2 ms (1.0) | 1 ms (2.0) | 3 MiB | 60% |",
        "| covariance | 64, 256 | 0.5 | 3 ms (1.0) | out of memory |  |  |",
        "A step of `triton` from inside (3 launches, 1.00 ms):",
        "| `a_kernel` | 2 | 750 | 75% |",
    ):
        assert line in text.splitlines(), text
    for words in (
        "bf16 product 790 TFLOP/s, copy 4.30 TB/s, int8 products 1,000 T multiply-adds/s, 1-bit "
        "ones 4,000.",
        '`bf.warmup("triton")` takes 90 s, 6 s with its kernels on disk.',
        "was refused in the checks.",
        "Refused: 3;",
        "Cases left out for time: 1.",
        "`cuda`: no nvrtc.",
        "H200, torch 2.11, triton 3.6.0, driver 580.",
    ):
        assert words in text, words
    assert (tmp_path / "device.png").read_bytes().startswith(b"\x89PNG")
    assert "bench:device" in readme.read_text()  # only committed results reach the documents


@pytest.mark.parametrize("least", range(12))
def test_whatever_part_of_the_results_is_there_is_shown(least, tmp_path, capsys):
    """The first command on a device may end anywhere."""
    result = sample()
    result["rows"] = result["rows"][:least]
    if least < 3:
        del result["ceilings"]
    write_json(tmp_path / "device.json", result)
    device.report(tmp_path, tmp_path / "none.md")
    assert "H200, torch 2.11" in capsys.readouterr().out


def test_a_plot_that_fails_costs_no_table(tmp_path, monkeypatch, capsys):
    def broken(result):
        raise RuntimeError("no font")

    monkeypatch.setattr(device, "plot", broken)
    write_json(tmp_path / "device.json", sample())
    device.report(tmp_path, tmp_path / "none.md")
    text = capsys.readouterr().out
    assert "no plot: RuntimeError: no font" in text
    assert "| paper | 64, 24, 256 |" in text


# -- a checkout in which nothing is installed ----------------------------------------------------

PLAIN = """
import sys
if sys.argv[1] == "bench":
    import bench
from bae_fast.ops import registry
print(registry.BACKENDS["triton"].unavailable, registry.BACKENDS["cuda"].unavailable)
"""


@needs_kernels
@pytest.mark.long
@pytest.mark.slow
def test_kernels_are_found_in_a_plain_checkout(tmp_path):
    """Without the installed package: site's hooks off, the libraries' folder on the path."""
    for folder in ("bae_fast", "bench", *checkout.PACKAGES.values()):
        shutil.copytree(
            device.ROOT / folder, tmp_path / folder,
            ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"), dirs_exist_ok=True,
        )  # fmt: skip
    libraries = {str(Path(m.__file__).parent.parent) for m in (torch, np, safetensors)}
    libraries.add(str(Path(importlib.util.find_spec("triton").origin).parent.parent))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sorted(libraries)])

    def said(what):
        done = subprocess.run(
            [sys.executable, "-S", "-c", PLAIN, what], env=environment, cwd=tmp_path,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "kernels are not installed" in said("nothing")
    assert said("bench").strip() == "None None"


def test_the_folders_of_kernels_are_those_of_the_package():
    tomllib = pytest.importorskip("tomllib")
    with open(device.ROOT / "pyproject.toml", "rb") as file:
        folders = tomllib.load(file)["tool"]["setuptools"]["package-dir"]
    assert {k: v for k, v in folders.items() if k != "bae_fast"} == checkout.PACKAGES


def test_a_side_that_raises_is_reported_with_its_first_line(worked, monkeypatch):
    def broken(*args):
        raise RuntimeError("no such luck\nand a long story")

    monkeypatch.setitem(registry.BACKENDS["torch"].ops, "decode", broken)
    _, result = worked(DECODE, case("pairs", density=0.5), LAYER)
    decode, pairs, layer = result["rows"]
    assert decode["sides"]["torch bf16"]["refused"].startswith("RuntimeError: no such luck")
    assert pairs["sides"]["torch"]["seconds"] > 0
    assert layer["sides"]["torch bf16"] == {"refused": "RuntimeError: no such luck"}


def test_a_device_that_no_longer_answers_is_left_to_the_next_process(worked, monkeypatch):
    def broken(*args):
        raise RuntimeError("an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setitem(registry.BACKENDS["torch"].ops, "decode", broken)
        patch.setattr(device.Machine, "answers", lambda machine: False)
        status, result = worked(DECODE)
    assert status == device.DEAD
    assert result["rows"] == []
    name = device.name_of(DECODE)
    assert "illegal memory access" in result["ended"][name]["torch bf16"]["refused"]
    status, again = worked(DECODE, ended=result["ended"])
    assert status == 0
    (row,) = again["rows"]
    assert row["sides"]["torch bf16"] == result["ended"][name]["torch bf16"]
    assert row["sides"]["autocast"]["seconds"] > 0


def test_a_fault_that_shows_while_a_result_is_checked_is_the_sides_own(worked, monkeypatch):
    """A kernel's illegal access is told by the next call that waits, and that is the check."""
    right = exact.Closeness.check

    def late(self, side, *args):
        if side == "torch bf16":
            raise RuntimeError("an illegal memory access was encountered")
        right(self, side, *args)

    with monkeypatch.context() as patch:
        patch.setattr(exact.Closeness, "check", late)
        patch.setattr(device.Machine, "answers", lambda machine: False)
        status, result = worked(DECODE)
    assert status == device.DEAD
    ended = result["ended"][device.name_of(DECODE)]
    assert "illegal memory access" in ended["torch bf16"]["refused"]
    status, again = worked(DECODE, ended=result["ended"])
    assert status == 0
    assert again["rows"][0]["sides"]["torch bf16"] == ended["torch bf16"]
    assert again["rows"][0]["sides"]["autocast"]["seconds"] > 0
    assert len(device.refusals(again)) == 1


@pytest.mark.parametrize(
    ("wanted", "check"),
    [
        ({"kind": "panels"}, "check_panels_of"),
        ({"kind": "sign panels"}, "check_panels_of"),
        ({"kind": "trainer", "impl": "torch"}, "check_trainer"),
        (case("repeat", impl="torch", density=0.5), "check_repeats"),
        (LAYER, "check_whole_layer"),
    ],
    ids=["panels", "sign panels", "trainer", "repeat", "layer"],
)
def test_a_check_that_ends_its_process_is_not_made_again(wanted, check, worked, monkeypatch):
    """Neither where it has killed the device for the process, nor where it hung: time is short."""
    made = []

    def broken(*args):
        made.append(args)
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(device, check, broken)
    monkeypatch.setattr(device, "panels_unavailable", lambda device: None)
    with monkeypatch.context() as patch:
        patch.setattr(device.Machine, "answers", lambda machine: False)
        status, result = worked(wanted)
    assert (status, result["rows"], len(made)) == (device.DEAD, [], 1)
    status, again = worked(wanted, ended=result["ended"])
    assert (status, len(made)) == (0, 1)
    (row,) = again["rows"]
    (side,) = row["sides"].values()
    assert "illegal memory access" in side["refused"]


def test_a_graph_holds_no_step_that_may_wait(monkeypatch):
    graph = case("graph", objective="paper")
    assert list(device.build(graph, ["torch"], "cpu").sides) == []
    backend = dataclasses.replace(registry.BACKENDS["torch"], capturable=True)
    monkeypatch.setitem(registry.BACKENDS, "torch", backend)
    assert list(device.build(graph, ["torch"], "cpu").sides) == ["torch bf16"]


def test_memory_that_is_not_there_is_said_and_refuses_nothing(worked, monkeypatch):
    def greedy(bits):
        raise torch.OutOfMemoryError("tried to allocate 70 GiB")

    monkeypatch.setattr(eager, "absolute_covariance", greedy)
    _, result = worked(STEP)
    (row,) = result["rows"]
    assert row["sides"]["autocast"] == {"unavailable": "out of memory"}
    assert row["sides"]["torch bf16"]["seconds"] > 0
    assert device.refusals(result) == []
    assert "out of memory" in device.table(result)


def test_inputs_that_do_not_fit_leave_the_next_case_to_be_run(worked, monkeypatch):
    def greedy(*args):
        raise torch.OutOfMemoryError("tried to allocate 70 GiB")

    monkeypatch.setitem(device.operators.OPERATORS, "decode", greedy)
    _, result = worked(DECODE, case("pairs", density=0.5))
    assert result["rows"][0]["unavailable"] == "out of memory"
    assert result["rows"][1]["sides"]["torch"]["seconds"] > 0


def test_a_layer_that_is_wrong_is_refused_by_name(worked, monkeypatch):
    right = registry.BACKENDS["torch"].ops["encoder_backward"]

    def wrong(*args):
        grad_x, grad_W, grad_b = right(*args)
        return grad_x, grad_W, grad_b * 1.5

    monkeypatch.setitem(registry.BACKENDS["torch"].ops, "encoder_backward", wrong)
    _, result = worked(LAYER)
    assert "b_enc is off by" in result["rows"][0]["sides"]["torch bf16"]["refused"]


@pytest.mark.parametrize("density", [0.5, 0.01])
def test_int8_products_are_checked_against_integers(density, monkeypatch):
    monkeypatch.setattr(device, "PAIRS_BLOCK", 96)
    comparison = device.pairs(64, 256, density, ["torch"])
    for name, side in comparison.sides.items():
        result = side.run()
        comparison.check(name, result)
        wrong = (result[0] + 2,) if isinstance(result, tuple) else result + 1
        with pytest.raises(device.WrongResultError):
            comparison.check(name, wrong)


# -- time ----------------------------------------------------------------------------------------


def test_the_host_is_ahead_of_what_is_timed(monkeypatch):
    """A step of many starts is its time on the device, not that of the host, which is kept too."""
    now, slept = [0.0], []

    class Event:
        def __init__(self, **given):
            pass

        record = synchronize = lambda self: None
        elapsed_time = lambda self, end: 7.0  # noqa: E731

    def run():
        now[0] += 3e-3 if len(slept) == 1 else 2e-3

    machine = device.Machine("cpu", SMALL)
    machine.device = "cuda"
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(device.time, "perf_counter", lambda: now[0])
    assert [machine.clock(run, ()) for _ in range(4)] == [7e-3] * 4
    assert slept == pytest.approx([device.SLEEP, 9e6, 6e6, 6e6])
    assert min(machine.starting[id(run)]) == pytest.approx(2e-3)
    for _ in range(2):  # whatever waits itself is waited for no longer
        machine.clock(lambda: now.__setitem__(0, now[0] + 60), ())
    assert max(slept) <= device.MOST_SLEEP


def test_a_case_that_would_not_fit_is_left_out_and_said(worked):
    seen = {"case": DECODE, "sides": {}, "wall_seconds": 60.0}
    other = DECODE | {"density": 0.1}
    _, result = worked(other, case("pairs", density=0.5), rows=[seen], until=time.time() + 20)
    assert [row["case"]["kind"] for row in result["rows"]] == ["operator", "pairs"]
    (left_out,) = result["skipped"]
    assert left_out["case"] == other
    assert "expected" in left_out["reason"]
    assert not result["complete"]
    assert "left out for time: 1" in device.table(result)


def _covariance(wrong=None, asked=None):
    """A stand-in for the operator of impl="cuda"; ``wrong`` changes what wgmma makes."""

    def covariance(words, counts, n_rows, keep_signs):
        form = os.environ.get("BAE_FAST_CUDA_PAIRS")
        if asked is not None:
            asked.append(form)
        dense = unpack_rows(words, len(counts), torch.float32)
        v = exact.pair_values(dense, slice(None))
        numerator = v.abs().sum().long()
        signs = torch.stack([pack_rows(v > 0), pack_rows(v < 0)])
        signs = signs if keep_signs else signs.new_empty(0)
        if form == "wgmma" and wrong is not None:
            numerator, signs = wrong(numerator, signs.clone())
        return numerator, signs

    return covariance


def _one_sign(numerator, signs):
    if signs.numel():
        signs.view(-1)[-1] ^= 1
    return numerator, signs


def test_pairs_by_wgmma_are_checked_against_exact_ones_and_against_mma():
    shapes, asked = [(2, 1), (33, 129), (70, 300)], []
    assert device.check_panels(_covariance(asked=asked), shapes) == 3 * device.PANEL_REPEATS
    assert asked.count("mma") == 6
    assert asked.count("wgmma") == 6 * device.PANEL_REPEATS
    assert "BAE_FAST_CUDA_PAIRS" not in os.environ
    with pytest.raises(device.WrongResultError, match=r"by wgmma of 2 rows .* call 1: "):
        device.check_panels(_covariance(lambda numerator, signs: (numerator + 1, signs)), shapes)
    with pytest.raises(device.WrongResultError, match="1 words of signs"):
        device.check_panels(_covariance(_one_sign), shapes)


def test_wrong_pairs_by_wgmma_are_marked_where_they_are_timed():
    rows = [{"case": {"kind": "panels"}, "sides": {device.PANELS: {"refused": "off"}}}]
    assert device.spoiled(rows, case("pairs", density=0.5)) == {device.PANELS}
    assert device.spoiled(rows, DECODE) == set()


def _sign_product(wrong=0.0, asked=None):
    """A stand-in for the launcher of impl="cuda"; ``wrong`` is added to what wgmma makes."""

    def sign_product(words, signs, digits, n_rows, scale):
        form = os.environ.get("BAE_FAST_CUDA_SIGNS")
        if asked is not None:
            asked.append(form)
        k = 32 * words.shape[1]
        above, below = unpack_rows(signs, k, torch.int64)
        s, dense = (above - below).t(), unpack_rows(words, k, torch.int64)
        weights = 2 ** torch.arange(len(digits))
        exact = n_rows * (dense @ s) - weights @ unpack_rows(digits, k, torch.int64) @ s
        product = exact.float() * scale
        if form == "wgmma":
            product[-1, -1] += wrong
        return product

    return sign_product


def _digits(counts, n_rows, grad, n_bound):
    places = torch.arange(n_bound.bit_length())[:, None]
    return pack_rows(counts >> places & 1), (grad * 2 / (n_rows * (n_rows - 1))).float()


def test_products_with_the_signs_by_wgmma_are_checked_against_exact_ones_and_against_mma():
    shapes, asked = [(2, 1, 1), (33, 129, 70), (300, 40, 65)], []
    done = device.check_sign_panels(_sign_product(asked=asked), _digits, shapes)
    assert done == 3 * device.PANEL_REPEATS
    assert asked == (["mma"] + ["wgmma"] * device.PANEL_REPEATS) * 3
    assert "BAE_FAST_CUDA_SIGNS" not in os.environ
    with pytest.raises(device.WrongResultError, match=r"B S by wgmma of 2 rows, .*: 1 numbers"):
        device.check_sign_panels(_sign_product(1.0), _digits, shapes)


def test_wrong_products_with_the_signs_by_wgmma_are_marked_where_they_are_timed():
    rows = [{"case": {"kind": "sign panels"}, "sides": {device.PANELS: {"refused": "off"}}}]
    backward = case("operator", operator="covariance_backward", density=0.5)
    assert device.spoiled(rows, backward) == {device.PANELS}
    assert device.spoiled(rows, case("pairs", density=0.5)) == set()


def test_products_with_the_signs_by_wgmma_are_timed_beside_the_others(monkeypatch):
    seen = []

    def build(operator, *shape):
        run = lambda: seen.append(os.environ.get("BAE_FAST_CUDA_SIGNS"))  # noqa: E731
        return device.Comparison({}, {"cuda": device.Side(run)}, None, {})

    monkeypatch.setattr(device.operators, "build", build)
    monkeypatch.setattr(device, "panels_unavailable", lambda device: None)
    backward = case("operator", operator="covariance_backward", density=0.5)
    for side in device.build(backward, ["cuda"], "cpu").sides.values():
        side.run()
    assert seen == [None, "wgmma"]
    assert list(device.build(DECODE, ["cuda"], "cpu").sides) == ["cuda"]


@pytest.mark.parametrize("kind", ["panels", "sign panels"])
def test_where_no_device_has_wgmma_the_case_says_so(kind, worked):
    kinds = [each["kind"] for each in device.cases(device.FULL, ["triton", "cuda"], "cuda")]
    assert kinds.index(kind) < kinds.index("pairs")
    assert kind not in [each["kind"] for each in device.cases(device.FULL, ["triton"], "cuda")]
    _, result = worked({"kind": kind})
    (row,) = result["rows"]
    assert row["sides"][device.PANELS]["unavailable"]


def test_a_wrong_covariance_spoils_the_steps_of_its_implementation():
    check = CHECK | {"operator": "covariance"}
    rows = [{"case": check, "sides": {"torch": {"refused": "off"}, "cpp": {}}}]
    assert "torch bf16" in device.spoiled(rows, STEP)
    assert device.spoiled(rows, case("pairs", density=0.5)) == {"torch"}
    assert device.spoiled(rows, DECODE) == set()


def test_a_larger_case_is_expected_to_take_longer():
    assert device.size_of(STEP | {"f": 512}) > 2 * device.size_of(STEP)
    assert device.size_of(STEP) > device.size_of(STEP | {"objective": "no covariance"})


def test_a_worker_goes_on_where_the_one_before_ended(worked, monkeypatch):
    done = {"case": DECODE, "sides": {"torch bf16": {"seconds": 1.0}}, "wall_seconds": 0.1}
    _, result = worked(DECODE, case("pairs", density=0.5), rows=[done])
    assert result["rows"][0] == done
    assert len(result["rows"]) == 2


# -- where there is nothing to measure -----------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path, capsys):
    assert main(["device", "--out", str(tmp_path)]) == 2
    streams = capsys.readouterr()
    assert streams.err.strip() == "python -m bench device needs an NVIDIA GPU; torch sees none"
    assert os.listdir(tmp_path) == []


def test_an_implementation_that_cannot_run_is_said(tmp_path, capsys):
    arguments = ["--device", "cpu", "--tiny", "--impl", "cuda", "--out", str(tmp_path)]
    assert device.main(arguments) == 1
    assert read_json(tmp_path / "device.json")["impls"]["cuda"] != "available"
    assert "cuda: " in capsys.readouterr().out


def test_every_case_has_a_name_of_its_own():
    names = [device.name_of(c) for c in device.cases(device.FULL, ["triton", "torch"], "cuda")]
    assert len(set(names)) == len(names)


# -- Triton's interpreter ------------------------------------------------------------------------

INTERPRETED = """
import sys
from bench import device, operators
import torch
device.check_layer("triton", torch.bfloat16, 34, 9, 70, surrogate="rectangle", surrogate_width=2.5)
for name in operators.OPERATORS:
    plain = name.startswith("covariance")
    sides = ["eager", "autocast", "triton", *([] if plain else ["triton bf16", "triton fp16"])]
    comparison = operators.build(name, 34, 24, 70, 0.5, sides)
    for side in sides:
        device.timing.verify(comparison, side)
print("right")
"""


@pytest.mark.skipif(
    registry.BACKENDS["triton"].unavailable is not None, reason="triton cannot run here"
)
@pytest.mark.long
@pytest.mark.slow
def test_the_checks_pass_for_triton_in_its_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=device.ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "right", done.stderr


def test_a_run_in_a_graph_is_held_to_the_run_without(monkeypatch):
    """Operators recorded on a CPU in place of the graph; replays that do nothing are refused."""
    backend = dataclasses.replace(registry.BACKENDS["torch"], capturable=True)
    monkeypatch.setitem(registry.BACKENDS, "torch", backend)
    assert device.check_trainer("torch", "cpu", RecordedGraphs()) == device.TRAINED

    class Idle(RecordedGraphs):
        def capture(self, run):
            replay = super().capture(run)
            return lambda: None if self.replays == 2 else replay()

    with pytest.raises(exact.WrongResultError, match=r"in a graph and .* without"):
        device.check_trainer("torch", "cpu", Idle())
    with (
        pytest.warns(UserWarning, match="has no effect"),
        pytest.raises(RuntimeError, match=r"steps were not captured: .*CUDA device; got cpu"),
    ):
        device.check_trainer("torch", "cpu")
    kinds = [each["kind"] for each in device.cases(device.FULL, ["triton", "cuda"], "cuda")]
    assert kinds.count("trainer") == 2
    assert kinds.index("trainer") < kinds.index("step")
