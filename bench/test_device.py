"""``python -m bench device`` without a GPU: the whole program on tiny sizes by the host's clock."""

import dataclasses
import importlib.util
import os
import shutil
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

    def run(*wanted, impls=("torch",), until=None, rows=(), ended=None):
        path = tmp_path / "device.json"
        blank = {"environment": {"torch": "", "device": {"name": "none"}}, "impls": {}}
        lists = {"rows": list(rows), "skipped": [], "ended": ended or {}}
        write_json(path, {**blank, **lists, "running": None, "complete": False})
        monkeypatch.setattr(device, "cases", lambda plan, impls, kind: list(wanted))
        status = device.work(
            path, list(impls), "cpu", SMALL, time.time() + 100 if until is None else until
        )
        return status, read_json(path)

    return run


def case(kind, **more):
    return {"kind": kind, **more, **dict(zip("ndf", SMALL.head, strict=True))}


STEP = case("step", objective="paper")
DECODE = case("operator", operator="decode", density=0.5)
LAYER = {"kind": "layer", "impl": "torch", "dtype": "bf16"}
CHECK = case("check", operator="decode", density=0.5)


# -- the whole -----------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.slow
def test_the_whole_command_ends_with_every_case_table_and_plot(tmp_path, capsys):
    begin = time.time()
    assert command(tmp_path) == 0, capsys.readouterr()
    result = read_json(tmp_path / "device.json")
    assert result["complete"]
    assert result["running"] is None
    expected = device.cases(device.TINY, ["torch"], "cpu")
    assert [row["case"] for row in result["rows"]] == expected
    assert all(row["sides"] for row in result["rows"] if row["case"]["kind"] != "ceilings")
    # everything is checked before anything is timed
    kinds = [row["case"]["kind"] for row in result["rows"]]
    last = max(i for i, kind in enumerate(kinds) if kind in ("layer", "check"))
    assert not {"step", "operator", "pairs", "profile"} & set(kinds[:last])
    for row in result["rows"]:
        if row["case"]["kind"] in ("step", "operator", "pairs"):
            assert all(side["seconds"] > 0 for side in row["sides"].values()), row
    assert result["ceilings"]["gemm_bfloat16"] > 0
    assert result["ceilings"]["bit_macs"]["int8"] > 0
    assert result["spent"] < time.time() - begin + 1
    text = capsys.readouterr().out
    assert "| paper | 64, 24, 256 |" in text
    assert (tmp_path / "device.png").read_bytes().startswith(b"\x89PNG")
    # again from the file alone
    (tmp_path / "device.png").unlink()
    readme = tmp_path / "README.md"
    assert device.main(["--report-only", "--out", str(tmp_path)], readme=readme) == 0
    assert (tmp_path / "device.png").is_file()
    assert capsys.readouterr().out.strip() in text


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
    return str(folder)


def test_what_a_checker_finds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert "not on the PATH" in device.sanitize("memcheck", "torch", 5.0)["unavailable"]
    text = "========= ERROR SUMMARY: 0 errors"
    monkeypatch.setenv("PATH", fake_checker(tmp_path, 0, text) + ":/bin:/usr/bin")
    assert device.sanitize("racecheck", "torch", 5.0) == {"checked": "racecheck"}
    text = "========= Invalid __global__ write of size 4 bytes"
    monkeypatch.setenv("PATH", fake_checker(tmp_path, device.FOUND, text) + ":/bin:/usr/bin")
    assert device.sanitize("memcheck", "torch", 5.0) == {
        "refused": "Invalid __global__ write of size 4 bytes"
    }


def test_the_small_checks_run_and_refuse(monkeypatch, capsys):
    assert device.main(["--small", "--device", "cpu", "--impl", "torch"]) == 0
    right = registry.BACKENDS["torch"].ops["decode"]
    monkeypatch.setitem(registry.BACKENDS["torch"].ops, "decode", lambda *a: 1.05 * right(*a))
    assert device.main(["--small", "--device", "cpu", "--impl", "torch"]) == 1
    assert "refused: torch: recon is off by" in capsys.readouterr().err


# -- a checkout in which nothing is installed ----------------------------------------------------

PLAIN = """
import sys
if sys.argv[1] == "bench":
    import bench
from bae_fast.ops import registry
print(registry.BACKENDS["triton"].unavailable, registry.BACKENDS["cuda"].unavailable)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which kernels import"
)
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
