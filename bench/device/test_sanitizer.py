"""The small checks, and what a checker finds in them."""

import os
from pathlib import Path

import pytest

from bae_fast.ops import registry
from bae_fast.ops.nvidia import ENV_PAIRS, ENV_SIGNS
from bench.device import cases, command, sanitizer
from bench.device.deadlines import TIME_UP, Limit


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
            sanitizer.FOUND,
            "========= Invalid __global__ write of size 4 bytes",
            {"refused": "Invalid __global__ write of size 4 bytes"},
        ),
        (
            sanitizer.FOUND,
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
    monkeypatch.setattr(sanitizer, "tool", lambda name: checker)
    assert sanitizer.sanitize("memcheck", "torch", Limit(5.0)) == found


def test_tools_are_looked_for_where_the_toolkit_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sanitizer.tool("no-such-checker") is None
    monkeypatch.setattr(sanitizer, "tool", lambda name: None)
    assert "not found" in sanitizer.sanitize("memcheck", "torch", Limit(5.0))["unavailable"]
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    checker = fake_checker(tmp_path / "bin", 0, "")
    renamed = Path(checker).rename(tmp_path / "bin" / "a-checker")
    assert sanitizer.tool("a-checker") == str(renamed)


def test_the_small_checks_run_and_refuse(monkeypatch, capsys):
    assert command.main(["--small", "--device", "cpu", "--impl", "torch"]) == 0
    right = registry.BACKENDS["torch"].ops["decode"]
    monkeypatch.setitem(registry.BACKENDS["torch"].ops, "decode", lambda *a: 1.05 * right(*a))
    assert command.main(["--small", "--device", "cpu", "--impl", "torch"]) == 1
    assert "refused: torch: recon is off by" in capsys.readouterr().err


def test_the_small_checks_of_wgmma_ask_for_it(monkeypatch):
    asked = []

    def layer(impl, *args, **options):
        asked.append((impl, os.environ.get(ENV_PAIRS), os.environ.get(ENV_SIGNS)))

    monkeypatch.setattr(sanitizer, "check_layer", layer)
    assert command.main(["--small", "--device", "cpu", "--impl", cases.PANELS]) == 0
    assert asked == [("cuda", "wgmma", "wgmma")]
    checked = [c for c in cases.cases(cases.FULL, ["triton", "cuda"], "cuda") if "tool" in c]
    assert checked[-1] == {"kind": "sanitize", "tool": "memcheck", "impl": cases.PANELS}
    # both tools see what needs no asking
    assert {(c["tool"], c["impl"]) for c in checked[:-1]} == {
        (tool, impl) for tool in cases.SANITIZERS for impl in cases.IMPLS
    }


@pytest.mark.parametrize(
    ("limit", "reason"), [(Limit(1.0), "took more than 1 s"), (Limit(1.0, own=False), TIME_UP)]
)
def test_a_checker_that_takes_too_long_is_ended(limit, reason, tmp_path, monkeypatch):
    checker = fake_checker(tmp_path, 0, "slow")
    Path(checker).write_text("#!/bin/sh\nexec sleep 600\n")
    monkeypatch.setattr(sanitizer, "tool", lambda name: checker)
    assert sanitizer.sanitize("memcheck", "torch", limit) == {"unavailable": reason}
