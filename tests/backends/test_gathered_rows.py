"""impl="cpp": sums of rows where bits are one, of rows that are read where they lie."""

import pytest
import torch
from test_cpp import levels

from bae_fast.ops import registry
from bae_fast.packing import pack_rows

CPP = registry.BACKENDS["cpp"]
if CPP.unavailable is not None:
    pytest.skip(f"impl='cpp' cannot run: {CPP.unavailable}", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("by_bits")

from bae_fast.backends.cpp import decode, extension  # noqa: E402


@pytest.fixture(autouse=True, params=levels())
def level(request):
    extension.use_simd(request.param)
    yield request.param
    extension.use_simd(None)


# rows that have every number of ones up to twice those that are added at once, and none
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 3, 4, 7, 8, 15, 16, 17, 33, 64, 130])
def test_rows_that_are_added_where_they_lie(width, dtype, biased, out_dtype, threads):
    torch.set_num_threads(threads)
    n, k = 40, 75
    bits = torch.zeros(n, k, dtype=torch.bool)
    for row in range(n):
        bits[row, torch.randperm(k)[: row if row < 20 else row % 3 * 30]] = True
    dense = torch.randn(k, width + 5).to(dtype)[:, 3 : 3 + width]
    # no row that is not listed is read as a number
    dense[~bits.any(0)] = torch.nan
    out = torch.full((n, width + 2), torch.nan, dtype=out_dtype)[:, :width]
    bias = torch.randn(width) if biased else None
    extension.op("gather_rows")(pack_rows(bits), dense, bias, out)
    assert out._base is not None
    assert out._base[:, width:].isnan().all()
    for row in range(n):
        listed = dense[bits[row]].double()
        exact = listed.sum(0) + (0 if bias is None else bias.double())
        allowed = 2.0**-24 * (len(listed) + 1) * (listed.abs().sum(0) + exact.abs())
        if out_dtype == torch.bfloat16:
            allowed = allowed + 2.0**-8 * exact.abs()
        assert ((out[row].double() - exact).abs() <= allowed).all()


def test_rows_in_bfloat16_are_rounded_as_torch_rounds():
    """To the nearest number, of two the even one; what is not finite stays so."""
    bits = torch.ones(1, 1, dtype=torch.int32)
    dense = torch.cat(
        [
            torch.tensor([0x3F808000, 0x3F818000, 0x3F80FFFF, 0x7F7FFFFF], dtype=torch.int32).view(
                torch.float32
            ),
            torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -1e-40, 3e-39]),
            torch.randn(500).exp(),
        ]
    )[None]
    out = torch.empty(dense.shape, dtype=torch.bfloat16)
    extension.op("gather_rows")(bits, dense, None, out)
    right = dense.to(torch.bfloat16)
    assert torch.equal(out.isnan(), right.isnan())
    assert torch.equal(out[~right.isnan()], right[~right.isnan()])


# a sparse code of many columns and few rows, where blocks serve nobody; one whose rows are too far
# apart for any cache, with more ones and with fewer than that pays for; and a dense one
@pytest.mark.parametrize(
    ("n", "k", "d", "density", "names"),
    [
        (64, 2048, 24, 0.01, {"gather_rows"}),
        (64, 2048, 24, 0.12, {"bits_product"}),
        (24, 131072, 72, 0.001, {"gather_rows"}),
        (24, 131072, 72, 0.02, {"bits_product", "gather_rows"}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_density_decides_how_rows_are_added(monkeypatch, n, k, d, density, names, dtype):
    seen = set()

    def spy(name):
        seen.add(name)
        return extension.op(name)

    monkeypatch.setattr(decode, "op", spy)
    if decode.has_matrix_units():
        pytest.skip("matrix units multiply bits of these densities")
    bits = torch.rand(n, k) < density
    words, W, b = pack_rows(bits), torch.randn(k, d).to(dtype), torch.randn(d)
    g = torch.randn(n, d).to(dtype)
    recon = CPP.ops["decode"](words, W, b, 1, torch.float32)
    grad_W, _ = CPP.ops["decoder_backward"](words, g, k, 1, torch.float32)
    seen &= {"gather_rows", "bits_product"}
    # numbers of float16 are widened before
    assert seen == (names if dtype != torch.float16 else {"bits_product"})
    dense = bits.double()
    for got, exact in (
        (recon, dense @ W.double() + b.double()),
        (grad_W, dense.T @ g.double()),
    ):
        assert (got.double() - exact).abs().max() <= 1e-5 * exact.abs().max()
