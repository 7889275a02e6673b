"""The bench code runs: correctness checks of every suite, and pytest-benchmark on one small step.

``pytest bench --benchmark-enable`` times; without it each function runs once, untimed.
"""

import pytest
import torch

from bench import step
from bench.__main__ import splice


@pytest.mark.parametrize("impl", step.implementations())
def test_the_timed_side_is_checked_before_it_is_timed(impl):
    step.check(impl, *step.tensors(64, 24, 600))


@pytest.mark.parametrize("covariance", [False, True])
@pytest.mark.parametrize("side", [*step.implementations(), "dense"])
def test_step(benchmark, side, covariance):
    inputs = step.tensors(128, 64, 512)
    run = step.dense(covariance) if side == "dense" else step.packed(side, covariance)
    benchmark(run, *inputs)
    assert all(torch.isfinite(p.grad).all() for p in inputs[1:])


def test_tables_replace_what_stands_between_their_markers():
    text = "a\n<!-- bench:x -->\nold\n<!-- /bench:x -->\nb\n"
    assert splice(text, "x", "new") == "a\n<!-- bench:x -->\nnew\n<!-- /bench:x -->\nb\n"
    with pytest.raises(ValueError, match=r"README\.md must hold"):
        splice(text, "y", "new")
