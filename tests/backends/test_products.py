"""Dense products that backends share: where their results are written."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bae_fast.ops.products import half_chunks, product_into


class Recorded(TorchDispatchMode):
    """Names of the operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_lands_in_its_columns_and_nowhere_else(dtype, out_dtype):
    a, b = torch.randint(-3, 4, (5, 7)).to(dtype), torch.randint(-3, 4, (7, 6)).to(dtype)
    out = torch.full((5, 20), torch.nan, dtype=out_dtype)
    product_into(out[:, 4:10], a, b)
    assert torch.equal(out[:, 4:10].long(), a.long() @ b.long())
    assert out[:, :4].isnan().all()
    assert out[:, 10:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_in_fp32_are_written_in_place_off_the_cpu(dtype):
    """On a device that returns fp32 sums of half-precision products: no product beside ``out``."""
    a, b = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((5, 7), (7, 6)))
    out = torch.empty(5, 20, device="meta")[:, 4:10]
    with Recorded() as seen:
        product_into(out, a, b)
    assert seen.names == ["aten.mm.out" if dtype == torch.float32 else "aten.mm.dtype_out"]


def test_chunks_of_a_half_precision_copy_fit_the_budget(monkeypatch):
    monkeypatch.setenv("BAE_FAST_SCRATCH_MB", "1")
    chunks = list(half_chunks(999, 5000, torch.device("cpu")))
    assert (chunks[0][0], chunks[-1][1]) == (0, 5000)
    assert all(2 * 999 * (stop - start) <= 2**20 for start, stop in chunks)
    assert all(start % 32 == 0 for start, _ in chunks)
