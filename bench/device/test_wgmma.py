"""Pairs and products with the signs by wgmma, by stand-ins of their kernels."""

import os

import pytest
from fake_wgmma import covariance, digits, one_sign, sign_product

from bench import exact
from bench.device import cases, wgmma


def test_pairs_by_wgmma_are_checked_against_exact_ones_and_against_mma():
    shapes, asked = [(2, 1), (33, 129), (70, 300)], []
    assert wgmma.check_panels(covariance(asked=asked), shapes) == 3 * wgmma.REPEATS
    assert asked.count("mma") == 6
    assert asked.count("wgmma") == 6 * wgmma.REPEATS
    assert "BAE_FAST_CUDA_PAIRS" not in os.environ
    with pytest.raises(exact.WrongResultError, match=r"by wgmma of 2 rows .* call 1: "):
        wgmma.check_panels(covariance(lambda numerator, signs: (numerator + 1, signs)), shapes)
    with pytest.raises(exact.WrongResultError, match="1 words of signs"):
        wgmma.check_panels(covariance(one_sign), shapes)


def test_products_with_the_signs_by_wgmma_are_checked_against_exact_ones_and_against_mma():
    shapes, asked = [(2, 1, 1), (33, 129, 70), (300, 40, 65)], []
    done = wgmma.check_sign_panels(sign_product(asked=asked), digits, shapes)
    assert done == 3 * wgmma.REPEATS
    assert asked == (["mma"] + ["wgmma"] * wgmma.REPEATS) * 3
    assert "BAE_FAST_CUDA_SIGNS" not in os.environ
    with pytest.raises(exact.WrongResultError, match=r"B S by wgmma of 2 rows, .*: 1 numbers"):
        wgmma.check_sign_panels(sign_product(1.0), digits, shapes)


@pytest.mark.parametrize("kind", ["panels", "sign panels"])
def test_where_no_device_has_wgmma_the_case_says_so(kind, worked):
    kinds = [each["kind"] for each in cases.cases(cases.FULL, ["triton", "cuda"], "cuda")]
    assert kinds.index(kind) < kinds.index("pairs")
    assert kind not in [each["kind"] for each in cases.cases(cases.FULL, ["triton"], "cuda")]
    _, result = worked({"kind": kind})
    (row,) = result["rows"]
    assert row["sides"][cases.PANELS]["unavailable"]
