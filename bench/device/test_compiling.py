"""Kernels compiled ahead."""

import torch
from device_results import SMALL

from bae_fast.ops import registry
from bench import exact
from bench.device import compiling, layer


def test_kernels_are_compiled_ahead_by_a_process_a_part(tmp_path):
    command = ["sh", "-c", f'test "$2" = paper && exit 1; echo > "{tmp_path}/$2"', "sh"]
    assert compiling.compile_ahead(command, 60.0) > 0
    wanted = {"fp32", "bf16", "fp16", "rectangle", "no covariance"}
    assert {path.name for path in tmp_path.iterdir()} == wanted
    # what hangs ends with the time
    assert compiling.compile_ahead(["sh", "-c", "exec sleep 600"], 0.0) > 0


def test_a_part_compiles_whatever_is_wrong(monkeypatch):
    made = []

    def wrong(*args, **options):
        made.append(args)
        raise exact.WrongResultError("off")

    monkeypatch.setattr(layer, "check_layer", wrong)
    compiling.compile_part("bf16", ["torch"], "cpu", SMALL)
    assert len(made) == layer.check_whole_layer("torch", torch.bfloat16, SMALL, lambda *a, **b: 0)
    right, ran = registry.BACKENDS["torch"].ops["decode"], []
    monkeypatch.setitem(
        registry.BACKENDS["torch"].ops, "decode", lambda *a: (ran.append(a), right(*a))[1]
    )
    compiling.compile_part("paper", ["torch"], "cpu", SMALL)
    assert len(ran) == 1
