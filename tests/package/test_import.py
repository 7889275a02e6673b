"""What `import bae_fast` needs and loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import processes

ROOT = Path(__file__).resolve().parents[2]

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
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BAE_FAST_")}
    done = processes.run("-c", program, env=environment | {"PYTHONPATH": str(ROOT)})
    assert "safetensors" in done.stdout, done.stderr
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


def test_every_public_name_is_there_and_sorted_in_one_list():
    import bae_fast

    assert sorted(bae_fast.__all__) == sorted(set(bae_fast.__all__))
    assert all(hasattr(bae_fast, name) for name in bae_fast.__all__)


def test_the_folder_of_kernels_does_not_shadow_the_package_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "triton" / "__init__.py").exists()


def test_the_objective_is_one_file_under_150_lines():
    assert len((ROOT / "bae_fast" / "reference.py").read_text().splitlines()) < 150
