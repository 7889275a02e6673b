"""The whole program, and what it says where there is nothing to measure."""

import importlib.util
import os
import subprocess
import sys
import time

import pytest
import torch
from device_results import check_schema

from bae_fast.files import read_json
from bench.__main__ import main
from bench.checkout import ROOT
from bench.device import cases, command

# the command, and its worker, on a device in name; what only kernels could do is stood in for
ON_A_DEVICE = """
import sys
import torch
import fake_cuda
import fake_wgmma
from bench import device, eager
from bench.device import compiling, gpu_tests, repeats, sanitizer, warmup, wgmma
from bae_fast.kernels import counts
from bae_fast.kernels_cuda import covariance, driver
fake_cuda.use()
try:
    torch.ones(3, device="cuda") + torch.ones(3)
except fake_cuda.MixedDevicesError:
    pass
else:
    sys.exit("tensors of two devices must be refused")
repeats.REPEATS, repeats.TRAINED = 3, 8
eager.COMPILER = "eager"  # no C++ compiler, no minutes
wgmma.PANEL_SHAPES[:] = [(2, 1), (33, 129)]
wgmma.SIGN_SHAPES[:] = [(2, 1, 1), (33, 129, 70)]
pairs = wgmma.check_panels
wgmma.check_panels = lambda op: pairs(fake_wgmma.covariance())
counts.sign_operands, covariance.sign_product = fake_wgmma.digits, fake_wgmma.sign_product()
driver.start = lambda *given: None
compiling.PARTS, gpu_tests.WORKERS = ("bf16", "paper"), 1
warmup.PROGRAM = "print('seconds', 1.0)"
sanitizer.tool = lambda name: None
sys.exit(device.main(
    sys.argv[1:], lambda: {"torch": "2"}, command=(sys.executable, "-c", sys.orig_argv[2])
))
"""
needs_kernels = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which kernels import"
)


@needs_kernels
@pytest.mark.long
@pytest.mark.slow
def test_the_whole_command_ends_with_every_case_table_and_plot(tmp_path, capsys):
    """As on a device, in every kind of case: what it would say first must not be Python's error."""
    begin = time.time()
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support")))
    done = subprocess.run(
        [sys.executable, "-c", ON_A_DEVICE, "--tiny", "--impl", "cuda", "--out", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = read_json(tmp_path / "device.json")
    check_schema(result)
    assert result["complete"]
    assert result["environment"]["device"]["capability"] == [9, 0]
    expected = cases.cases(cases.TINY, ["cuda"], "cuda")
    assert [row["case"] for row in result["rows"]] == expected
    assert {case["kind"] for case in expected} == set(cases.KINDS)
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
    assert command.main(["--report-only", "--out", str(tmp_path)], readme=readme) == 0
    assert (tmp_path / "device.png").is_file()
    assert capsys.readouterr().out.strip() in done.stdout


def test_kinds_that_are_not_known_are_refused(tmp_path, capsys):
    assert command.main(["--device", "cpu", "--only", "pair", "--out", str(tmp_path)]) == 2
    assert "--only must be of layer, check, panels," in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path, capsys):
    assert main(["device", "--out", str(tmp_path)]) == 2
    streams = capsys.readouterr()
    assert streams.err.strip() == "python -m bench device needs an NVIDIA GPU; torch sees none"
    assert os.listdir(tmp_path) == []


def test_an_implementation_that_cannot_run_is_said(tmp_path, capsys):
    arguments = ["--device", "cpu", "--tiny", "--impl", "cuda", "--out", str(tmp_path)]
    assert command.main(arguments) == 1
    assert read_json(tmp_path / "device.json")["impls"]["cuda"] != "available"
    assert "cuda: " in capsys.readouterr().out
