"""What is done for a case of each kind, and which sides the checks have marked."""

from device_results import CHECK, DECODE, LAYER, STEP, case

from bae_fast.ops import registry
from bench.device import cases, parts, report


def test_every_kind_of_case_has_its_part():
    assert parts.PARTS.keys() == set(cases.KINDS)
    assert set(parts.COMPARED) < parts.PARTS.keys()


def test_a_layer_that_is_wrong_is_refused_by_name(worked, monkeypatch):
    right = registry.BACKENDS["torch"].ops["encoder_backward"]

    def wrong(*args):
        grad_x, grad_W, grad_b = right(*args)
        return grad_x, grad_W, grad_b * 1.5

    monkeypatch.setitem(registry.BACKENDS["torch"].ops, "encoder_backward", wrong)
    _, result = worked(LAYER)
    assert "b_enc is off by" in result["rows"][0]["sides"]["torch bf16"]["refused"]


def test_what_the_checks_refuse_is_timed_and_marked(worked):
    """One refused check must not cost the times of a side; what it is wrong in itself has none."""
    wrong = {"case": CHECK, "sides": {"torch bf16": {"refused": "off"}}, "wall_seconds": 1.0}
    _, result = worked(DECODE, STEP, case("pairs", density=0.5), rows=[wrong])
    _, decode, step, pairs = result["rows"]
    for row in (decode, step):
        assert row["sides"]["torch bf16"]["seconds"] > 0
        assert row["marked"] == ["torch bf16"]
    assert pairs["sides"]["torch"]["seconds"] > 0
    assert pairs["marked"] == []
    text = report.table(result)
    assert f"s{report.MARK} |" in text or f"){report.MARK} |" in text
    assert "was refused in the checks" in text


def test_a_wrong_covariance_spoils_the_steps_of_its_implementation():
    check = CHECK | {"operator": "covariance"}
    rows = [{"case": check, "sides": {"torch": {"refused": "off"}, "cpp": {}}}]
    assert "torch bf16" in parts.spoiled(rows, STEP)
    assert parts.spoiled(rows, case("pairs", density=0.5)) == {"torch"}
    assert parts.spoiled(rows, DECODE) == set()


def test_wrong_pairs_by_wgmma_are_marked_where_they_are_timed():
    rows = [{"case": {"kind": "panels"}, "sides": {cases.PANELS: {"refused": "off"}}}]
    assert parts.spoiled(rows, case("pairs", density=0.5)) == {cases.PANELS}
    assert parts.spoiled(rows, DECODE) == set()


def test_wrong_products_with_the_signs_by_wgmma_are_marked_where_they_are_timed():
    rows = [{"case": {"kind": "sign panels"}, "sides": {cases.PANELS: {"refused": "off"}}}]
    backward = case("operator", operator="covariance_backward", density=0.5)
    assert parts.spoiled(rows, backward) == {cases.PANELS}
    assert parts.spoiled(rows, case("pairs", density=0.5)) == set()
