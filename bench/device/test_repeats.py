"""A decode that is made again, and a training run in a CUDA graph."""

import dataclasses

import pytest
import torch
from device_results import STEP, case
from recorded_graph import RecordedGraphs

from bae_fast.ops import registry
from bench import exact
from bench.device import cases, repeats


def test_a_decode_that_changes_from_call_to_call_is_refused(worked, monkeypatch):
    repeat = case("repeat", impl="torch", density=0.5)
    _, result = worked(repeat)
    assert result["rows"][0]["sides"]["torch bf16"] == {"checked": repeats.REPEATS}
    right, calls = registry.BACKENDS["torch"].ops["decode"], []

    def racing(*args):
        calls.append(args)
        recon = right(*args)
        if len(calls) == 7:
            recon[3, 5] = torch.nextafter(recon[3, 5], recon.new_tensor(9.0))
        return recon

    monkeypatch.setitem(registry.BACKENDS["torch"].ops, "decode", racing)
    _, result = worked(repeat, STEP)
    (row, step) = result["rows"]
    assert "other bits in call 7 than in the first: 1 of" in row["sides"]["torch bf16"]["refused"]
    assert step["marked"] == ["torch bf16"]


def test_a_run_in_a_graph_is_held_to_the_run_without(monkeypatch):
    """Operators recorded on a CPU in place of the graph; replays that do nothing are refused."""
    backend = dataclasses.replace(registry.BACKENDS["torch"], capturable=True)
    monkeypatch.setitem(registry.BACKENDS, "torch", backend)
    assert repeats.check_trainer("torch", "cpu", RecordedGraphs()) == repeats.TRAINED

    class Idle(RecordedGraphs):
        def capture(self, run):
            replay = super().capture(run)
            return lambda: None if self.replays == 2 else replay()

    with pytest.raises(exact.WrongResultError, match=r"in a graph and .* without"):
        repeats.check_trainer("torch", "cpu", Idle())
    with (
        pytest.warns(UserWarning, match="has no effect"),
        pytest.raises(RuntimeError, match=r"steps were not captured: .*CUDA device; got cpu"),
    ):
        repeats.check_trainer("torch", "cpu")
    kinds = [each["kind"] for each in cases.cases(cases.FULL, ["triton", "cuda"], "cuda")]
    assert kinds.count("trainer") == 2
    assert kinds.index("trainer") < kinds.index("step")
