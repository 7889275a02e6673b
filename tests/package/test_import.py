"""What `import bae_fast` needs and costs, and which module may import which."""

from __future__ import annotations

import ast
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "bae_fast"

# everything optional: extras of pyproject.toml, what they bring, and safetensors
BLOCKED = (
    "accelerate", "constriction", "datasets", "gguf", "hypothesis", "matplotlib", "openai",
    "pandas", "psutil", "sae_lens", "safetensors", "scipy", "sklearn", "tqdm", "transformers",
    "triton",
)  # fmt: skip

BLOCK = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocked())
"""


def fresh(program: str) -> str:
    """What a program prints in a fresh process that sees the repository."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BAE_FAST_")}
    environment.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_block_is_real():
    """Otherwise the tests below would pass without saying anything."""
    program = BLOCK + (
        "import importlib\n"
        f"for name in {BLOCKED!r} + ('safetensors.torch',):\n"
        "    try: importlib.import_module(name)\n"
        "    except ImportError as error: assert 'is blocked' in str(error)\n"
        "    else: print(name)\n"
    )
    assert fresh(program) == ""


def test_the_layer_trains_with_every_optional_package_blocked():
    program = BLOCK + (
        "import torch, bae_fast as bf\n"
        "bae = bf.BinaryAutoencoder(6, 40, preset='paper')\n"
        "x = torch.randn(20, 6)\n"
        "out = bae.fit_normalization_(x).init_density_(x, 0.3)(x)\n"
        "(bae.mse(out, x) + out.entropy + out.covariance).backward()\n"
        "assert all(p.grad.isfinite().all() and p.grad.any() for p in bae.parameters())\n"
        "code = bae.encode(x)\n"
        "assert bae.decode(code).shape == x.shape\n"
        "bf.info()\n"
        "print(int(code.counts().sum()))\n"
    )
    assert int(fresh(program)) > 0


def test_saving_without_safetensors_says_which_package_is_missing(tmp_path):
    program = BLOCK + (
        "import bae_fast as bf\n"
        "try: bf.BinaryAutoencoder(6, 40).save_pretrained(sys.argv[1] if sys.argv[1:] else '.')\n"
        "except ImportError as error: print(error)\n"
    )
    program = program.replace("sys.argv[1] if sys.argv[1:] else '.'", repr(str(tmp_path)))
    assert "safetensors" in fresh(program)
    assert list(tmp_path.iterdir()) == []


def test_importing_loads_neither_optional_packages_nor_the_compiler():
    program = (
        "import json, sys, torch\n"
        "before = set(sys.modules)\n"
        "import bae_fast\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))\n"
    )
    new = json.loads(fresh(program))
    heavy = {name.partition(".")[0] for name in new} & {*BLOCKED, "sympy"}
    assert heavy == set()
    assert [name for name in new if name.startswith(("torch._dynamo", "torch._inductor"))] == []
    own = [name for name in new if name.startswith("bae_fast.")]
    for part in (
        "lm",
        "training",
        "analysis",
        "report",
        "cli",
        "distributed",
        "kernels",
        "saelens",
        "kernels_cuda",
    ):
        assert [name for name in own if name.split(".")[1] == part] == []


def test_importing_costs_under_three_tenths_of_a_second_beyond_torch():
    program = BLOCK + (
        "import time, torch\n"
        "start = time.perf_counter()\n"
        "import bae_fast\n"
        "print(time.perf_counter() - start)\n"
    )
    seconds = [float(fresh(program)) for _ in range(3)]
    assert statistics.median(seconds) < 0.3, seconds


# -- layout ------------------------------------------------------------------------------------


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """Modules of the package that one module imports, anywhere in its text.

    ``from bae_fast import BinaryAutoencoder`` counts as ``bae_fast``, the whole public face.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
                for _ in range(node.level - 1):
                    package = package.rpartition(".")[0]
                base = f"{package}.{base}" if base else package
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.add(whole if whole in MODULES else base)
    return {target for target in found if target.partition(".")[0] == "bae_fast"}


def part(name: str) -> str:
    """``bae_fast.ops.registry`` -> ``ops``; ``bae_fast`` itself -> "" ."""
    return name.split(".")[1] if "." in name else ""


# Arrows point down this list and within a line, never up. `bae_fast/__init__` is the public face:
# what lies below the line of `model` may not use it, for it imports them all.
LAYERS = (
    {"cli", "__main__"},
    {"experiments"},
    {"training", "analysis", "report", "lm", "baselines", "entropy", "causal", "interpret"},
    {"", "model", "info", "distributed", "released", "saelens"},
    {"functional", "compression", "autoencoder"},
    {"codes", "reference"},
    {"ops", "backends", "kernels", "kernels_cuda"},
    {
        "packing",
        "statistics",
        "surrogates",
        "files",
        "devices",
        "progress",
        "waiting",
        "_version",
    },
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def test_every_module_has_a_place_in_the_layers():
    assert {part(name) for name in MODULES} - LEVEL.keys() == set()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_arrow_points_up(name):
    up = {target for target in imports(name) if LEVEL[part(target)] < LEVEL[part(name)]}
    assert up == set(), f"{name} must not import {sorted(up)}"


def test_no_command_imports_another_and_no_experiment_reads_a_command_line():
    shared = {f"bae_fast.cli.{name}" for name in ("command", "errors", "net", "options")}
    for name in MODULES:
        commands = {target for target in imports(name) if target.startswith("bae_fast.cli.")}
        assert commands <= shared, name
        # an old checkpoint holds a namespace of the released program's options
        if part(name) not in ("cli", "released"):
            text = MODULES[name].read_text(encoding="utf-8")
            assert "argparse" not in text, name
    for path in (ROOT / "bench").glob("*.py"):
        assert "bae_fast.cli" not in path.read_text(encoding="utf-8"), path


def test_every_file_of_the_commands_is_short():
    for name, path in MODULES.items():
        if part(name) == "cli":
            assert len(path.read_text(encoding="utf-8").splitlines()) < 120, name


def test_the_imports_are_read_from_the_text():
    """The tests of the arrows would pass on an empty graph."""
    assert "bae_fast.functional" in imports("bae_fast.model")
    assert "bae_fast.ops.registry" in imports("bae_fast.functional")
    assert "bae_fast.packing" in imports("bae_fast.backends.torch.encode")
    assert "bae_fast.model" in imports("bae_fast")


def test_no_backend_imports_another():
    for name in MODULES:
        if name.startswith("bae_fast.backends."):
            own = ".".join(name.split(".")[:3])
            for target in imports(name):
                if target.startswith("bae_fast.backends"):
                    assert target == own or target.startswith(own + "."), f"{name}: {target}"


def test_nothing_but_discovery_names_a_backend():
    """Callers reach backends through the registry, so that one is added without touching them."""
    for name in MODULES:
        if not name.startswith("bae_fast.backends"):
            named = {target for target in imports(name) if part(target) == "backends"}
            assert named <= ({"bae_fast.backends"} if name == "bae_fast" else set()), name


def test_the_reference_and_the_packed_side_share_no_arithmetic():
    allowed = {"bae_fast.packing", "bae_fast.statistics"}
    assert imports("bae_fast.reference") <= allowed
    assert all("reference" not in t for n in MODULES if part(n) == "backends" for t in imports(n))


def test_backends_use_only_layouts_operators_and_themselves():
    for name in MODULES:
        if part(name) == "backends":
            allowed = {
                "packing",
                "ops",
                "backends",
                "kernels",
                "kernels_cuda",
                "statistics",
                "surrogates",
            }
            assert {part(target) for target in imports(name)} <= allowed, name


def test_every_public_name_is_there_and_sorted_in_one_list():
    import bae_fast

    assert sorted(bae_fast.__all__) == sorted(set(bae_fast.__all__))
    assert all(hasattr(bae_fast, name) for name in bae_fast.__all__)


def test_the_folder_of_kernels_does_not_shadow_the_package_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "triton" / "__init__.py").exists()


def test_the_objective_is_one_file_under_150_lines():
    assert len((PACKAGE / "reference.py").read_text().splitlines()) < 150
