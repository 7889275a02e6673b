"""What is compared in a case."""

import dataclasses
import os

import pytest
from device_results import DECODE, case

from bae_fast.ops import registry
from bench import exact, operators
from bench.device import comparisons, wgmma
from bench.timing import Comparison, Side


def test_a_graph_holds_no_step_that_may_wait(monkeypatch):
    graph = case("graph", objective="paper")
    assert list(comparisons.build(graph, ["torch"], "cpu").sides) == []
    backend = dataclasses.replace(registry.BACKENDS["torch"], capturable=True)
    monkeypatch.setitem(registry.BACKENDS, "torch", backend)
    assert list(comparisons.build(graph, ["torch"], "cpu").sides) == ["torch bf16"]


@pytest.mark.parametrize("density", [0.5, 0.01])
def test_int8_products_are_checked_against_integers(density, monkeypatch):
    monkeypatch.setattr(comparisons, "PAIRS_BLOCK", 96)
    comparison = comparisons.pairs(64, 256, density, ["torch"])
    for name, side in comparison.sides.items():
        result = side.run()
        comparison.check(name, result)
        wrong = (result[0] + 2,) if isinstance(result, tuple) else result + 1
        with pytest.raises(exact.WrongResultError):
            comparison.check(name, wrong)


def test_products_with_the_signs_by_wgmma_are_timed_beside_the_others(monkeypatch):
    seen = []

    def build(operator, *shape):
        run = lambda: seen.append(os.environ.get("BAE_FAST_CUDA_SIGNS"))  # noqa: E731
        return Comparison({}, {"cuda": Side(run)}, None, {})

    monkeypatch.setattr(operators, "build", build)
    monkeypatch.setattr(wgmma, "unavailable", lambda device: None)
    backward = case("operator", operator="covariance_backward", density=0.5)
    for side in comparisons.build(backward, ["cuda"], "cpu").sides.values():
        side.run()
    assert seen == [None, "wgmma"]
    assert list(comparisons.build(DECODE, ["cuda"], "cpu").sides) == ["cuda"]
