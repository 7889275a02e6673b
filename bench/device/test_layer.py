"""The checks of the layer, by kernels in Triton's interpreter."""

import os
import subprocess
import sys

import pytest

from bae_fast.ops import registry
from bench.checkout import ROOT

INTERPRETED = """
import sys
from bench import operators, timing
from bench.device import layer
import torch
layer.check_layer("triton", torch.bfloat16, 34, 9, 70, surrogate="rectangle", surrogate_width=2.5)
for name in operators.OPERATORS:
    plain = name.startswith("covariance")
    sides = ["eager", "autocast", "triton", *([] if plain else ["triton bf16", "triton fp16"])]
    comparison = operators.build(name, 34, 24, 70, 0.5, sides)
    for side in sides:
        timing.verify(comparison, side)
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
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "right", done.stderr
