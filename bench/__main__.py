"""Run suites, write their results, regenerate the README's tables: see :mod:`bench`."""

from __future__ import annotations

import argparse
import datetime
import platform
from pathlib import Path
from typing import Any

import torch

import bae_fast
from bae_fast.files import read_json, write_json, write_text
from bench import ablation, memory, recipe, step

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"

SUITES = {"memory": memory, "step": step, "recipe": recipe, "ablation": ablation}


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    capabilities = torch.cpu.get_capabilities()
    wanted = ("avx2", "avx512_f", "avx512_bf16", "avx512_vpopcntdq", "amx_bf16")
    return {
        "date": datetime.date.today().isoformat(),
        "bae_fast": bae_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "capabilities": [name for name in wanted if capabilities.get(name)],
        "threads": torch.get_num_threads(),
    }


def splice(text: str, name: str, table: str) -> str:
    """Replace what stands between the markers of one suite.

    Raises:
        ValueError: the markers are missing.
    """
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    if begin not in text or end not in text:
        raise ValueError(f"README.md must hold {begin} and {end}")
    before, rest = text.split(begin, 1)
    return before + begin + "\n" + table.strip() + "\n" + end + rest.split(end, 1)[1]


def regenerate() -> None:
    """Write every committed result's table into README.md."""
    text = README.read_text(encoding="utf-8")
    for name, suite in SUITES.items():
        path = RESULTS / f"{name}.json"
        if path.is_file():
            text = splice(text, name, suite.table(read_json(path)))
    write_text(README, text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("suites", nargs="*", choices=[[], *SUITES], help="default: all")
    parser.add_argument("--tables", action="store_true", help="only regenerate the README's tables")
    arguments = parser.parse_args()
    if not arguments.tables:
        for name in arguments.suites or SUITES:
            print(f"== {name}", flush=True)
            result = {"environment": environment(), "rows": SUITES[name].run()}
            write_json(RESULTS / f"{name}.json", result)
            print(SUITES[name].table(result), flush=True)
    regenerate()


if __name__ == "__main__":
    main()
