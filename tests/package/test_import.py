"""What `import bae_fast` needs and loads."""

from __future__ import annotations

import json
import os
from pathlib import Path

import processes
import pytest

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


# each begins where torch has been imported behind the block
PROGRAMS = {
    "the block": f"""
import importlib

passed = []
for name in {BLOCKED!r} + ("safetensors.torch",):
    try:
        importlib.import_module(name)
    except ImportError as error:
        assert "is blocked" in str(error)
    else:
        passed.append(name)
print(json.dumps(passed))
""",
    "a step": """
import bae_fast as bf

bae = bf.BinaryAutoencoder(6, 40, preset="paper")
x = torch.randn(20, 6)
out = bae.fit_normalization_(x).init_density_(x, 0.3)(x)
(bae.mse(out, x) + out.entropy + out.covariance).backward()
assert all(p.grad.isfinite().all() and p.grad.any() for p in bae.parameters())
code = bae.encode(x)
assert bae.decode(code).shape == x.shape
bf.info()
print(int(code.counts().sum()))
""",
    "an import": """
del sys.meta_path[0]  # whatever is there may be imported
before = set(sys.modules)
import bae_fast

print(json.dumps(sorted(set(sys.modules) - before)))
""",
}


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """What each of the programs prints that sees the repository."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BAE_FAST_")}
    environment.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    found = processes.forked(*PROGRAMS.values(), first=BLOCK, env=environment)
    return dict(zip(PROGRAMS, found, strict=True))


def test_the_block_is_real(printed):
    """Otherwise the test below would pass without saying anything."""
    assert json.loads(printed["the block"]) == []


def test_the_layer_trains_with_every_optional_package_blocked(printed):
    assert int(printed["a step"]) > 0


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


def test_importing_loads_neither_optional_packages_nor_the_compiler(printed):
    new = json.loads(printed["an import"])
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
