"""Launches of a step counted on fake tensors, and that nothing of it waits for the device."""

import pytest
import torch

from bae_fast.ops import registry
from bench import estimate, launches
from bench.step import packed_step

pytestmark = pytest.mark.skipif(
    registry.BACKENDS["triton"].unavailable is not None, reason="triton is not installed"
)


@pytest.mark.parametrize("impl", ["triton", "cuda"])
@pytest.mark.parametrize("objective", ["paper", "rectangle"])
def test_no_operator_of_a_step_waits_for_the_device(impl, objective):
    for f in (16384, 65536):  # products alone, and lists beside them
        counts = launches.count(impl, 512, 2048, f, objective)
        assert counts["kernels"]["encode_kernel"] == counts["kernels"]["gradient_kernel"] == 1
        assert counts["kernels"]["pairs_kernel"] == (f > 16384)
        assert counts["operators"]["_fused_adam_"] == 1


def test_a_step_that_waits_is_refused():
    def waiting(*args):
        step = packed_step(*args)
        return lambda: float(step())

    with pytest.raises(launches.WaitsForDeviceError, match="_local_scalar_dense"):
        launches.count("triton", 64, 32, 128, "paper", waiting)


def test_the_table_has_both_implementations():
    result = launches.run(only="512-2048-16384")
    rows = result["rows"]
    assert [row["impl"] for row in rows] == ["triton", "cuda"]
    assert rows[1]["kernels"]["sign_product"] == 1
    assert len(launches.table(result).splitlines()) == 4


def test_the_estimate_adds_up_and_says_what_it_assumes():
    result = estimate.run(only="512-2048-16384")
    for row in result["rows"]:
        assert sum(row["parts"].values()) < row["graph"] <= row["started"]
    triton, cuda, panels = (row["parts"] for row in result["rows"])
    assert triton["products"] == cuda["products"] == panels["products"]
    assert triton["pairs"] > cuda["pairs"] > panels["pairs"]
    assert cuda["B S"] > panels["B S"]
    assert cuda["moved"] < panels["moved"]  # planes are made into tiles
    (small,) = estimate.run(only="triton-512-1024-4096")["rows"]
    assert small["graph"] < small["started"]
    dense, lists = estimate.run(only="triton")["rows"][-2:]
    assert (lists["impl"], lists["f"]) == (estimate.LISTS, dense["f"])
    assert lists["parts"]["B S"] < dense["parts"]["B S"] / 10
    assert lists["parts"]["products"] == dense["parts"]["products"]
    assert "by arithmetic, not run on a device" in estimate.table(result)


def test_the_form_of_the_products_with_the_signs_that_is_built_gains():
    """A form that did not gain by the estimate would not be worth its code."""
    rows = estimate.run(only="none of the steps")["forms"]
    assert rows == []
    rows = estimate.run(only="B S-4096-2048-65536")["forms"]
    took = [sum(row["parts"].values()) for row in rows]
    assert [row["form"] for row in rows] == list(estimate.FORMS)
    mma, int8, bits, fused = took
    assert fused < bits < mma < int8
    assert mma - bits > 5 * (bits - fused)


def test_asynchronous_products_start_what_makes_their_tiles(monkeypatch):
    monkeypatch.setenv("BAE_FAST_CUDA_SIGNS", "wgmma")
    kernels = launches.count("cuda", 512, 2048, 16384)["kernels"]
    assert kernels["row_tiles"] == kernels["sign_tiles"] == kernels["sign_panel_product"] == 1
    assert kernels["sign_product"] == 0


def test_what_autograd_itself_starts_is_counted():
    with launches.SaysCuda():
        x, w = torch.empty(4, 3, device="cuda"), torch.empty(3, device="cuda", requires_grad=True)
        loss = (x * w).sum()
        with launches.Watch() as watch:
            loss.backward()
    assert dict(watch.counts) == {"ones_like": 1, "mul": 1, "sum": 1}


def test_a_step_of_dense_codes_starts_no_more_than_it_did():
    """Numbers of columns, digits and lists by kernels of their own, one cast of each weight."""
    for impl, f, most in (("triton", 16384, 44), ("triton", 65536, 86), ("cuda", 65536, 86)):
        n = 512 if f == 16384 else 4096
        counts = launches.count(impl, n, 2048, f)
        assert sum(sum(each.values()) for each in counts.values()) <= most
        assert counts["operators"]["_to_copy"] <= 3  # W_enc, W_dec, and the loss's


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.tensor([1.0, 2.0]).to(x.device),
        lambda x: x.copy_(torch.zeros(3)),
        lambda x: bool((x > 0).all()),
    ],
)
def test_what_waits_for_the_device_is_refused(wait):
    with launches.SaysCuda():
        x = torch.zeros(3, device="cuda")
        with pytest.raises(launches.WaitsForDeviceError), launches.Watch():
            wait(x)


def test_views_and_memory_start_nothing():
    with launches.SaysCuda():
        x = torch.zeros(4, 3, device="cuda")
        assert x.is_cuda
        assert not torch.zeros(3).is_cuda
        with launches.Watch() as watch:
            y = torch.empty_like(x).t()[1:].view(2, 4)
            y.add_(1)
            torch.zeros(3, device="cpu") + 1
    assert dict(watch.counts) == {"add_": 1}
