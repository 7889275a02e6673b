"""A step seen from inside."""

from device_results import case

from bench.device import report


def test_a_step_is_seen_from_inside(worked):
    _, result = worked(case("profile", impl="torch"))
    (row,) = result["rows"]
    assert row["kernels"]
    name, count, microseconds = row["kernels"][0]
    assert isinstance(name, str)
    assert count > 0 < microseconds
    assert "A step of `torch` from inside" in report.table(result)
