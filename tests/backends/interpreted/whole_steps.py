"""Whole steps in Triton's interpreter against the definition in float64.

Inputs of the encoder are small integers, so that every dtype's pre-activations are exact, zero
included, and bits, windows and counts can be asked to be equal; everything else is compared in
float64.
"""

import itertools

import pytest
import torch
from triton_steps import (
    DTYPES,
    NAMES,
    OPS,
    WIDTHS,
    assert_as_good_as_eager,
    assert_as_torch_under_autocast,
    problem,
    run,
)

import bae_fast as bf
from bae_fast.kernels import configs, launch
from bae_fast.kernels.bodies import decode, encode
from bae_fast.ops import registry
from bae_fast.surrogates import SURROGATES

# by place, so that every two values of different columns meet in one of twelve
KINDS = list(itertools.product(range(len(DTYPES)), range(len(SURROGATES)), (0, 1), (0, 1)))

PAIRED = {(i, j, (i + j) % 2, (i + j // 2) % 2) for i, j, *_ in KINDS}


def test_every_two_of_dtype_surrogate_mask_and_terms_meet():
    for first, second in itertools.combinations(range(4), 2):
        met = {(kind[first], kind[second]) for kind in PAIRED}
        assert met == {(kind[first], kind[second]) for kind in KINDS}


@pytest.mark.parametrize(
    ("dtype", "surrogate", "masked", "terms"),
    [
        pytest.param(
            DTYPES[i], list(SURROGATES)[j], bool(mask), NAMES[: 3 - plain],
            id=f"{DTYPES[i]}-{list(SURROGATES)[j]}-{'masked' * mask}-{'plain' * plain}",
            marks=[] if (i, j, mask, plain) in PAIRED else pytest.mark.long,
        )
        for i, j, mask, plain in KINDS
    ],
)  # fmt: skip
def test_every_surrogate_term_mask_and_dtype(dtype, surrogate, masked, terms):
    """Pairwise; all of them together are a long proof."""
    x, parameters, direction = problem(34, 9, 70, 1, 5, dtype)
    mask = torch.arange(34) % 3 != 1 if masked else None
    options = {"surrogate": surrogate, "surrogate_width": WIDTHS[surrogate], "mask": mask}
    assert_as_good_as_eager(x, parameters, direction, terms, **options)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (1, 7, 33, 1, 3), (2, 3, 31, 1, 3), (97, 67, 129, 1, 70)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes_that_fill_no_tile(shape, dtype):
    x, parameters, direction = problem(*shape, dtype)
    terms = NAMES[:3] if shape[0] > 1 else NAMES[:2]
    assert_as_good_as_eager(x, parameters, direction, terms, surrogate="identity")


@pytest.mark.parametrize("used", [["recon"], ["entropy"], ["covariance"]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_each_term_alone(used, dtype):
    x, parameters, direction = problem(33, 6, 40, 1, 5, dtype)
    assert_as_good_as_eager(
        x, parameters, direction, used, surrogate="rectangle", surrogate_width=2.5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_bits", [2, 3])
def test_multi_bit_codes_and_the_multilinear_term(dtype, n_bits):
    x, parameters, direction = problem(40, 6, 22, n_bits, 5, dtype)
    options = {"n_bits": n_bits, "multilinear": True, "surrogate": "identity"}
    mask = torch.arange(40) % 3 != 1
    assert_as_good_as_eager(x, parameters, direction, NAMES[:3], mask=mask, **options)


@pytest.mark.parametrize(
    ("columns", "parts"), [(128, 4), pytest.param(256, 16, marks=pytest.mark.long)]
)
def test_wide_tiles_of_the_gradient_go_part_by_part(columns, parts, monkeypatch):
    tile = configs.Config(32, columns, 64, 4, 1)
    monkeypatch.setitem(configs.DEFAULTS["interpreter"], "gradient", (tile,))
    monkeypatch.setitem(configs.NARROW_PARTS, "interpreter", 16)
    start, seen = launch.start, set()

    def watched(kernel, grid, *args, **constants):
        if constants.get("PRODUCT"):
            seen.add(constants["PARTS"])
        start(kernel, grid, *args, **constants)

    monkeypatch.setattr(launch, "start", watched)
    x, parameters, direction = problem(34, 9, 300, 1, 5, torch.bfloat16)
    options = {"surrogate": "sigmoid", "surrogate_width": 3.0, "multilinear": True}
    assert_as_good_as_eager(x, parameters, direction, NAMES[:3], **options)
    assert seen == {parts}


def test_several_chunks_with_stored_or_recomputed_signs(monkeypatch):
    monkeypatch.setenv("BAE_FAST_SCRATCH_MB", "0")  # 256 columns at a time
    x, parameters, direction = problem(33, 5, 290, 1, 4, torch.bfloat16)
    options = {"surrogate": "rectangle", "surrogate_width": 2.5}
    stored, _ = run("triton", x, parameters, direction, **options)
    monkeypatch.setenv("BAE_FAST_SIGN_PLANES_MB", "0")
    recomputed, _ = run("triton", x, parameters, direction, **options)
    assert all(torch.equal(stored[name], recomputed[name]) for name in NAMES)
    assert_as_good_as_eager(x, parameters, direction, NAMES[:3], **options)


def test_autocast_adds_the_fp32_bias_before_rounding():
    """bf16 rows and fp32 parameters; a bias that bf16 would round decides the bits."""
    x, W = torch.ones(4, 8), torch.ones(8, 64)
    b = -8.0 + torch.linspace(-1, 1, 64) * 1e-3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        code = bf.encode(x, W, b, impl="triton")
    assert torch.equal(code.to_dense()[0], b > -8.0)
    x, parameters, direction = problem(34, 9, 40, 1, 5)
    assert_as_torch_under_autocast(x, parameters, direction)


def test_autocast_copies_weights_by_chunks(monkeypatch):
    """A half-precision copy of a whole weight would be the largest tensor of the step."""
    x, (W, b, *_), _ = problem(20, 9, 300, 1, 5)
    W_dec, b_dec = torch.randn(300, 290), torch.randn(290)

    def forward():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            code = bf.encode(x, W, b, impl="triton")
            return code, bf.decode(code, W_dec, b_dec, impl="triton")

    code, recon = forward()
    copied = []
    for module, name in ((encode.kernels, "encode"), (decode, "bits_product")):
        right = getattr(module, name)

        def noted(first, second, *args, right=right):
            copied.append((second.dtype, second.shape[1]))
            return right(first, second, *args)

        monkeypatch.setattr(module, name, noted)
    monkeypatch.setenv("BAE_FAST_SCRATCH_MB", "0")  # 256 columns at a time
    again, other = forward()
    assert copied == [(torch.bfloat16, n) for n in (256, 44, 256, 34)]
    assert again.equal(code)
    assert torch.equal(again.counts(), code.counts())
    assert torch.equal(other, recon)


def test_statistics_of_more_rows_and_of_past_rows():
    x, parameters, direction = problem(60, 5, 40, 1, 5)
    part = slice(10, 45)
    stats = bf.encode(x, *parameters[:2], impl="triton").statistics(covariance=True, impl="triton")
    past = bf.encode(x[:10], *parameters[:2]).statistics()
    for extra in ({"stats": stats}, {"past": past}):
        got, _ = run("triton", x[part], parameters, direction[part], **extra)
        expected, _ = run("torch", x[part], parameters, direction[part], **extra)
        assert got["entropy"] == expected["entropy"]
        assert got["covariance"] == expected["covariance"]
        for name in NAMES:
            error = (got[name] - expected[name]).abs().max()
            assert error <= 1e-5 * expected[name].abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_and_offset_inputs_equal_contiguous_ones(dtype):
    x, parameters, direction = problem(34, 10, 70, 1, 6, dtype)
    expected, code = run("triton", x, parameters, direction)
    base = torch.full((69, 23), torch.nan, dtype=dtype)
    base[1::2, 3:23:2] = x
    views = [base[1::2, 3:23:2], *(p.mT.contiguous().mT if p.dim() == 2 else p for p in parameters)]
    got, again = run("triton", views[0], views[1:], direction.mT.contiguous().mT)
    assert again.equal(code)
    for name in NAMES:  # torch's own sums and products may take another order
        error = (got[name].double() - expected[name].double()).abs().max()
        assert error <= 2 * torch.finfo(dtype).eps * expected[name].double().abs().max(), name


def test_rows_of_x_may_be_far_apart_and_words_padded():
    """A row stride larger than the row, read in place: nothing beside the rows is touched."""
    x, (W, b, W_dec, b_dec), _ = problem(34, 10, 70, 1, 6, torch.bfloat16)
    wide = torch.full((34, 40), torch.nan, dtype=x.dtype)
    wide[:, 5:15] = x
    words, _, counts, _ = OPS["encode"](wide[:, 5:15], W, b, None, None)
    assert torch.equal(words, OPS["encode"](x, W, b, None, None)[0])
    padded = torch.full((34, 8), -1, dtype=torch.int32)
    padded[:, 2:5] = words
    recon = OPS["decode"](padded[:, 2:5], W_dec, b_dec, 1, x.dtype)
    assert torch.equal(recon, OPS["decode"](words, W_dec, b_dec, 1, x.dtype))
    n_rows = torch.tensor(34)
    for a, e in zip(
        OPS["covariance"](padded[:, 2:5], counts, n_rows, True),
        OPS["covariance"](words, counts, n_rows, True),
        strict=True,
    ):
        assert torch.equal(a, e)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_infinite_or_huge_bias_and_nan_rows_decide_their_bits(dtype):
    x, W = torch.ones(3, 3, dtype=dtype), torch.zeros(3, 4, dtype=dtype)
    x[2, 0] = torch.nan
    huge = torch.finfo(dtype).max
    bias = torch.tensor([float("inf"), float("-inf"), huge, -huge], dtype=dtype)
    dense = bf.encode(x, W, bias, impl="triton").to_dense()
    assert dense[:2].tolist() == [[True, False] * 2] * 2
    assert not dense[2].any()


def test_what_it_refuses_is_said():
    x, parameters, _ = problem(4, 3, 8, 1, 3)
    with pytest.raises(bf.BackendUnavailableError, match="float64"):
        bf.binary_autoencoder(x.double(), *(p.double() for p in parameters), impl="triton")
    none = torch.zeros(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask must keep at least one of the rows"):
        bf.binary_autoencoder(x, *parameters, mask=none, impl="triton")
    assert registry.choose("auto", "cpu", torch.float32, 8, 1) in ("cpp", "torch")


@pytest.mark.parametrize("terms", [NAMES[:2], NAMES[1:3]], ids=str)
def test_two_runs_give_the_same_bits_and_gradients(terms):
    x, parameters, direction = problem(34, 9, 70, 1, 5, torch.bfloat16)
    first, code = run("triton", x, parameters, direction, terms)
    second, again = run("triton", x, parameters, direction, terms)
    assert code.equal(again)
    for name in NAMES:
        assert (first[name] is None and second[name] is None) or torch.equal(
            first[name], second[name]
        )
