"""A process that watches another: a worker that dies, hangs, or has no time left."""

import sys

import pytest
import torch
from device_results import STEP, check_schema

from bae_fast.files import read_json
from bench.device import cases, command, deadlines, report, watching

# what a worker's process runs: the command itself, with a fault where it is asked for
WORKER = """
import os, sys
from bench import device, eager
from bench.device import cases, worker
from bae_fast.ops import registry
eager.COMPILER = "eager"  # no C++ compiler, no minutes
ops = registry.BACKENDS["torch"].ops
right = ops["decode"]
def dies(words, *args):
    if words.shape[0] == cases.TINY.head[0]:
        os._exit(66)
    return right(words, *args)
def hangs(*args):
    import time
    time.sleep(600)
fault = {"dies": dies, "hangs": hangs}.get(sys.argv[1])
if fault:
    ops["decode"] = fault
    kinds = ("step", "pairs") if fault is dies else ("operator", "pairs")
    every = cases.cases(cases.TINY, ["torch"], "cpu")
    few = [case for case in every if case["kind"] in kinds][:3]
    worker.cases = lambda *_: few
sys.exit(device.main(sys.argv[2:]))
"""


def run(folder, fault, seconds=300.0):
    script = folder / "worker.py"
    script.write_text(WORKER)
    arguments = ["--device", "cpu", "--tiny", "--impl", "torch", "--out", str(folder)]
    return command.main(
        [*arguments, "--seconds", str(seconds)],
        environment=lambda: {"torch": torch.__version__},
        readme=folder / "README.md",
        command=(sys.executable, str(script), fault),
    )


@pytest.mark.long
@pytest.mark.slow
def test_a_process_that_dies_costs_one_side_and_the_run_goes_on(tmp_path, capsys):
    assert run(tmp_path, fault="dies") == 1
    result = read_json(tmp_path / "device.json")
    rows = {cases.name_of(row["case"]): row["sides"] for row in result["rows"]}
    hit = rows[cases.name_of(STEP)]
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
    monkeypatch.setattr(watching, "STALL", 30.0)
    assert run(tmp_path, fault="hangs") == 1
    rows = read_json(tmp_path / "device.json")["rows"]
    hung = [row["sides"]["torch bf16"] for row in rows if row["case"].get("operator") == "decode"]
    assert hung == [{"refused": "no answer within 30 s"}]
    assert rows[-1]["case"] != hung
    assert len(rows) == 3


def test_time_that_is_up_leaves_a_whole_file(tmp_path):
    run(tmp_path, fault="hangs", seconds=deadlines.SPARE + 12)
    result = read_json(tmp_path / "device.json")
    check_schema(result)
    assert result["running"] is None
    assert not result["complete"]
    assert report.table(result)
