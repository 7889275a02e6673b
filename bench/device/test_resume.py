"""A later command goes on where an earlier one had no time left."""

from device_results import DECODE, LAYER, STEP, check_schema

from bae_fast.files import read_json, write_json
from bench.device import cases, command, deadlines


def test_a_later_command_goes_on_on_the_same_device(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "watch", lambda *args: None)
    arguments = ["--device", "cpu", "--tiny", "--impl", "torch"]
    environment = lambda: {"torch": "2.11"}  # noqa: E731
    first, later = tmp_path / "first", tmp_path / "later"
    assert command.main([*arguments, "--out", str(first)], environment) == 0
    result = read_json(first / "device.json")
    done = {"case": DECODE, "sides": {"torch bf16": {"seconds": 1.0}}, "wall_seconds": 0.1}
    late = {"case": STEP, "sides": {"torch bf16": {"unavailable": deadlines.TIME_UP}}}
    result["rows"] = [done, late | {"wall_seconds": 0.0}]
    result |= {"skipped": [{"case": LAYER, "reason": "1 s left"}], "spent": 500.0}
    crashed = {"autocast": {"refused": "its process ended"}}
    result["ended"] = {cases.name_of(STEP): crashed | late["sides"]}
    write_json(first / "device.json", result)
    more = ["--out", str(later), "--resume", str(first)]
    assert command.main([*arguments, *more], environment) == 0
    found = read_json(later / "device.json")
    check_schema(found)
    assert found["rows"] == [done]
    assert found["skipped"] == []
    assert found["ended"] == {cases.name_of(STEP): crashed}  # what time cut short is run again
    assert found["spent"] > 500
    capsys.readouterr()
    assert command.main([*arguments, *more], lambda: {"torch": "2.12"}) == 2
    assert "'torch': '2.12'" in capsys.readouterr().err
    assert command.main([*arguments, "--resume", str(tmp_path / "nowhere")], environment) == 2
    assert "nowhere" in capsys.readouterr().err
