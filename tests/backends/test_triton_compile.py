"""Every Triton kernel compiled ahead of time for real chips, without a GPU.

What is compiled is what the backend starts, with every default tile size of the chip. A build that
lost its matrix instructions or spilled would be many times slower and pass every other test.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bae_fast.ops import registry

ROOT = Path(__file__).resolve().parents[2]
TRITON = registry.BACKENDS["triton"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        TRITON.unavailable is not None, reason=f"impl='triton' cannot run: {TRITON.unavailable}"
    ),
]

# kernels that hold a product, by the dtype of its operands
HALF = {"encode_kernel", "bits_product_kernel", "gradient_kernel"}
INTEGER = {"covariance_kernel", "sign_product_kernel"}
# the instruction that each chip's products must become
INSTRUCTION = {
    "sm_80": "mma", "sm_86": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "sm_120": "mma"
}  # fmt: skip
# 86 shares its table with 80 and 120; fp16 differs from bf16 by one constant
BUILDS = [
    ("sm_80", "bfloat16"),
    ("sm_90", "bfloat16"),
    ("sm_100", "bfloat16"),
    ("sm_120", "bfloat16"),
    ("sm_90", "float32"),
]
EVERY = [(chip, dtype) for chip in INSTRUCTION for dtype in ("bfloat16", "float16", "float32")]
MORE = [build for build in EVERY if build not in BUILDS]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Triton's cache: empty at first, so that everything is compiled, but once."""
    return tmp_path_factory.mktemp("triton")


def worker(chip, what, folder):
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("BAE_FAST_", "TRITON_"))
    }
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "tests/backends/triton_compile_worker.py", chip, what],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(chip, dtype, rows):
    from bae_fast.kernels.configs import SHARED_MEMORY  # needs no triton

    kernels = {row["kernel"] for row in rows}
    if dtype == "float32":
        assert kernels == {"threshold_kernel", "gradient_kernel", "transpose_kernel"} | INTEGER
    else:
        assert kernels == HALF | INTEGER | {"transpose_kernel"}
    for row in rows:
        assert row["stack"] == row["local"] == row["spills"] == row["ptx_local"] == 0, row
        assert row["shared"] <= SHARED_MEMORY[chip], row
        assert row["registers"] <= 255, row
        assert row["float_atomics"] == 0, row
        product = row["kernel"] in HALF | INTEGER and row["constants"].get("PRODUCT") != "False"
        if product:
            assert row[INSTRUCTION[chip]] > 0, row
            assert row["cp_async"] > 0, row
        else:
            assert row["mma"] == row["wgmma"] == row["tcgen05"] == 0, row
        if row["kernel"] in INTEGER:
            # unpacked bits reach shared memory by the word or wider, never byte by byte
            assert row["byte_stores"] == 0, row
            assert row["imma"] > 0 or chip == "sm_100", row


@pytest.mark.parametrize(("chip", "dtype"), BUILDS)
def test_every_kernel_compiles_to_matrix_instructions_without_spills(chip, dtype, cache):
    check(chip, dtype, worker(chip, dtype, cache))


@pytest.mark.skipif(
    os.environ.get("BAE_FAST_TEST_ALL_BUILDS") != "1",
    reason="BAE_FAST_TEST_ALL_BUILDS=1 compiles the other chips and dtypes too, some minutes",
)
@pytest.mark.parametrize(("chip", "dtype"), MORE)
def test_the_other_builds(chip, dtype, cache):
    check(chip, dtype, worker(chip, dtype, cache))


def test_warmup_starts_every_kernel_that_a_step_starts(cache):
    """For d and K in multiples of 16: a CUDA graph may then be captured."""
    assert worker("sm_90", "uncovered", cache) == []


def test_the_checks_can_fail():
    """One row that spills, or lost its instruction, is refused."""
    good = {
        "kernel": "encode_kernel", "constants": {}, "stack": 0, "local": 0, "spills": 0,
        "ptx_local": 0, "shared": 1, "registers": 9, "float_atomics": 0, "wgmma": 1, "mma": 0,
        "tcgen05": 0, "cp_async": 1, "imma": 1, "byte_stores": 0,
    }  # fmt: skip
    names = ("encode_kernel", "bits_product_kernel", "gradient_kernel", *INTEGER)
    rows = [{**good, "kernel": name} for name in names]
    rows.append({**good, "kernel": "transpose_kernel", "wgmma": 0})
    check("sm_90", "bfloat16", rows)
    for change in ({"spills": 1}, {"wgmma": 0}, {"shared": 10**6}, {"float_atomics": 1}):
        with pytest.raises(AssertionError):
            check("sm_90", "bfloat16", [{**rows[0], **change}, *rows[1:]])
