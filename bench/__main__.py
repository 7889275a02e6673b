"""Run suites, write their results, regenerate the documents' tables (see the package's text)."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

import bae_fast
from bae_fast.files import write_json
from bench import (
    ablation,
    collect,
    compiled,
    crossover,
    device,
    documents,
    estimate,
    jobs,
    launches,
    levels,
    memory,
    models,
    operators,
    pairs,
    recipe,
    rival,
    saebench,
    search,
    sparse,
    step,
    supply,
    tables,
    versions,
    wide,
)
from bench.checkout import ROOT
from bench.inputs import simd
from bench.timing import SECONDS

RESULTS = ROOT / "bench" / "results"
# the page with the table of a GPU
SPEED = ROOT / "docs" / "results" / "speed.md"

MEASURED: dict[str, Any] = {
    "step": step,
    "memory": memory,
    "operators": operators,
    "levels": levels,
    "collect": collect,
}
# its largest case takes minutes a side where bfloat16 is not native: only by name
LARGE: dict[str, Any] = {"rival": rival}
# these train, some for an hour and more: only by name
TRAINED: dict[str, Any] = {"recipe": recipe, "ablation": ablation, "wide": wide}
# of sparse codes: their covariance, the search for them, counts of pairs; only by name
LISTS: dict[str, Any] = {
    "sparse": sparse,
    "crossover": crossover,
    "search": search,
    "pairs": pairs,
}
# of a GPU, without one: what a step starts, what its kernels become, its time by arithmetic
COUNTED: dict[str, Any] = {"launches": launches, "compiled": compiled, "estimate": estimate}
# of real language models, which have to be named; only by name
MODELS: dict[str, Any] = {"models": models}
# of where rows come from, and who shares them; a case writes 5 GB: only by name
ROWS: dict[str, Any] = {"supply": supply, "jobs": jobs}
# with commands and options of their own: a GPU, and environments of their own
OWN: dict[str, Any] = {"device": device, "saebench": saebench, "versions": versions}
SUITES = MEASURED | LARGE | TRAINED | LISTS | COUNTED | MODELS | ROWS


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
        "simd": simd(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a run of suites; what is not allowed ends the program with a line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "suites",
        nargs="*",
        help=f"The suites to run, of {', '.join(SUITES)}. Without any these are "
        f"{', '.join(MEASURED)}. {', '.join(OWN)} have options of their own.",
    )
    parser.add_argument(
        "--tables",
        action="store_true",
        help="Only regenerate the tables and numbers in README.md and docs/.",
    )
    parser.add_argument(
        "--only", metavar="TEXT", help="Only run cases whose name holds this, and write nothing."
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        help=f"The seconds that one comparison is timed for ({SECONDS:g}).",
    )
    parser.add_argument(
        "--model",
        action="append",
        metavar="NAME",
        help="A language model for the suites models and supply: a folder, a GGUF file or a "
        "Hugging Face id. It may be given several times.",
    )
    parser.add_argument(
        "--dtype", default="auto", help="The dtype that the suite models runs them in (auto)."
    )
    parser.add_argument(
        "--windows",
        type=int,
        default=models.TIMED,
        help=f"The windows of 256 tokens that the suite models times ({models.TIMED}).",
    )
    parser.add_argument(
        "--leave-out",
        nargs="+",
        default=[],
        metavar="SIDE",
        help="The sides that the suites step and operators leave out, such as compile.",
    )
    parser.add_argument(
        "--machine",
        default="",
        metavar="NAME",
        help="Keep the results in this folder of bench/results, apart from those of another "
        "machine.",
    )
    parser.add_argument(
        "--later-loads",
        action="store_true",
        help="The suite models leaves out the first load of a GGUF file whose copy is kept.",
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.suites if name not in SUITES]
    if unknown:
        parser.error(f"suites must be of {', '.join(SUITES)}; got {unknown[0]!r}")
    if not re.fullmatch(r"[\w.-]*", options.machine):
        parser.error(f"--machine must be the name of a folder; got {options.machine!r}")
    return options


def options_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a suite's ``run`` is given of the options."""
    if name in TRAINED:
        return {}
    given: dict[str, Any] = {"only": options.only or "", "seconds": options.seconds}
    if name in ("step", "operators"):
        given["left_out"] = options.leave_out
    if name in MODELS or name == "supply":
        given["models"] = options.model
    if name in MODELS:
        given |= {
            "dtype": options.dtype,
            "n_timed": options.windows,
            "later_loads": options.later_loads,
        }
    return given


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 1 where a side was wrong and got no figure."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["device"]:
        return device.main(arguments[1:], environment, SPEED)
    if arguments[:1] and arguments[0] in ("saebench", "versions"):
        made: int = OWN[arguments[0]].main(arguments[1:])
        return made
    options = parse(arguments)
    folder = RESULTS / options.machine
    refused = []
    for name in () if options.tables else options.suites or MEASURED:
        print(f"== {name}", flush=True)
        result = {"environment": environment(), **SUITES[name].run(**options_of(name, options))}
        refused += tables.refusals(result["rows"], tables.case_of)
        if name in ("models", "supply"):
            result = SUITES[name].merged(folder / f"{name}.json", result)
        if options.only is None:
            write_json(folder / f"{name}.json", result)
            if name == "sparse":
                (folder / "sparse.png").write_bytes(sparse.plot(result))
            print(SUITES[name].table(result), flush=True)
    if options.only is None:
        for path in documents.write(ROOT, RESULTS, SUITES | OWN):
            print(f"wrote {path.relative_to(ROOT)}", flush=True)
    for line in refused:
        print(f"refused: {line}", file=sys.stderr)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
