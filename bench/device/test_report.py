"""Tables and plots from whatever results are there."""

import pytest
from device_results import check_schema, sample

from bae_fast.files import write_json
from bench.device import report


def test_tables_are_made_from_a_sample_of_results(tmp_path, capsys):
    result = sample()
    check_schema(result)
    write_json(tmp_path / "device.json", result)
    readme = tmp_path / "speed.md"
    readme.write_text("before\n<!-- bench:device -->\n<!-- /bench:device -->\nafter\n")
    report.report(tmp_path, readme)
    text = capsys.readouterr().out
    for line in (
        "| objective | N, d, F | autocast | `triton bf16` | `cuda bf16` | peak | of the floor |",
        "| paper | 64, 24, 256 | 10 ms (1.0) | 5 ms (2.0) † | refused | 3 MiB | 60% |",
        "| paper, graph | 64, 24, 256 | 4 ms (2.0) | 3 MiB | 60% |",
        "| decode | 64, 24, 256 | 0.5 | 2 ms (1.0) | 1 ms (2.0) | 3 MiB | 60% |",
        "| covariance | 64, 256 | 0.5 | 3 ms (1.0) | out of memory |  |  |",
        "A step of `triton` from inside (3 launches, 1.00 ms):",
        "| `a_kernel` | 2 | 750 | 75% |",
    ):
        assert line in text.splitlines(), text
    for words in (
        "bf16 product 790 TFLOP/s, copy 4.30 TB/s, int8 products 1,000 T multiply-adds/s, 1-bit "
        "ones 4,000.",
        '`bf.warmup("triton")` takes 90 s, 6 s with its kernels on disk.',
        "was refused in the checks.",
        "Refused: 3;",
        "Cases left out for time: 1.",
        "`cuda`: no nvrtc.",
        "H200, torch 2.11, triton 3.6.0, driver 580.",
    ):
        assert words in text, words
    assert (tmp_path / "device.png").read_bytes().startswith(b"\x89PNG")
    assert "bench:device" in readme.read_text()  # only committed results reach the documents


@pytest.mark.parametrize("least", range(12))
def test_whatever_part_of_the_results_is_there_is_shown(least, tmp_path, capsys):
    """The first command on a device may end anywhere."""
    result = sample()
    result["rows"] = result["rows"][:least]
    if least < 3:
        del result["ceilings"]
    write_json(tmp_path / "device.json", result)
    report.report(tmp_path, tmp_path / "none.md")
    assert "H200, torch 2.11" in capsys.readouterr().out


def test_a_plot_that_fails_costs_no_table(tmp_path, monkeypatch, capsys):
    def broken(result):
        raise RuntimeError("no font")

    monkeypatch.setattr(report, "plot", broken)
    write_json(tmp_path / "device.json", sample())
    report.report(tmp_path, tmp_path / "none.md")
    text = capsys.readouterr().out
    assert "no plot: RuntimeError: no font" in text
    assert "| paper | 64, 24, 256 |" in text
