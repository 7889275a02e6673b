"""impl="triton" in Triton's interpreter, on CPU tensors; run by ``test_triton.py``.

In a process of its own, for TRITON_INTERPRET has to be set before triton is imported. Inputs of
the encoder are small integers, so that every dtype's pre-activations are exact, zero included, and
bits, windows and counts can be asked to be equal; everything else is compared in float64.
"""

import dataclasses
import itertools
import json
import threading
import types

import numpy as np
import pytest
import torch
import triton
from count_digits import count_digits, from_digits

import bae_fast as bf
from bae_fast import files, packing
from bae_fast.kernels import bits, configs, covariance, launch, pair_lists, products
from bae_fast.kernels import counts as count_kernels
from bae_fast.kernels.bodies import covariance as covariance_body
from bae_fast.kernels.bodies import decode, encode, encoder_backward
from bae_fast.ops import nvidia, registry
from bae_fast.ops.nvidia import interpreted
from bae_fast.packing import pack_rows, unpack_rows
from bae_fast.statistics import entropy_bits, entropy_gradient
from bae_fast.surrogates import SURROGATES

OPS = registry.BACKENDS["triton"].ops
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["recon", "entropy", "covariance", "x", "W_enc", "b_enc", "W_dec", "b_dec"]
WIDTHS = {"identity": None, "official": None, "sigmoid": 3.0, "rectangle": 2.5}


CONVERT = triton.runtime.interpreter._convert_float


def halves(data, source, target, rounding):
    """bfloat16 is the upper half of float32, but for what the interpreter makes of subnormals."""
    names = source.name, target.name
    if rounding is not None or names not in (("bf16", "fp32"), ("fp32", "bf16")):
        return CONVERT(data, source, target, rounding)
    bits = np.ascontiguousarray(data).reshape(data.shape)
    bits = bits.view(np.uint32 if names[0] == "fp32" else np.uint16)
    exponent = 0x7F800000 if names[0] == "fp32" else 0x7F80
    if ((bits & exponent == 0) & (bits << 1 != 0)).any():
        return CONVERT(data, source, target, rounding)
    return (bits >> 16).astype(np.uint16) if names[0] == "fp32" else bits.astype(np.uint32) << 16


@pytest.fixture(scope="session", autouse=True)
def faster():
    """Triton's interpreter without what costs half of its time and changes no result."""
    interpreter, core = triton.runtime.interpreter, triton.language.core
    block_parts, tensor_parts = core.block_type.__init__, core.tensor.__init__
    builder, replace = interpreter.InterpreterBuilder, interpreter._patch_lang
    product, np_dtype = builder.create_dot, interpreter._get_np_dtype
    replaced, np_dtypes, blocks, shapes = [], {}, {}, {}

    def once(function):
        """At every call of a kernel it looks for Triton's functions, replaces them and puts them
        back: here they stay, for this process does nothing else."""
        if not any(function.__globals__ is seen for seen in replaced):
            replace(function)
            replaced.append(function.__globals__)
        return types.SimpleNamespace(restore=lambda: None)

    def of_table(kind):
        """It makes its table of all dtypes at every call."""
        name = kind.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = np_dtype(kind)
        return np_dtypes[name]

    def block(self, element_ty, shape):
        """Types of one shape and of the same elements have the same parts."""
        key = (element_ty.name, *shape)
        if key in blocks:
            self.__dict__.update(blocks[key])
        else:
            block_parts(self, element_ty, shape)
            blocks[key] = dict(self.__dict__)

    def tensor(self, handle, kind):
        """Tensors of one type have the same shape."""
        if kind.name not in shapes:
            tensor_parts(self, handle, kind)
            shapes[kind.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.shape, self.numel = shapes[kind.name]

    def create_dot(self, a, b, c, *options):
        """NumPy multiplies integers one by one; float64 goes to BLAS, and is exact here."""
        if not (a.data.dtype == b.data.dtype == np.int8 and c.data.dtype == np.int32):
            return product(self, a, b, c, *options)
        exact = (a.data.astype(np.float64) @ b.data.astype(np.float64)).astype(np.int32)
        return interpreter.TensorHandle(exact + c.data, c.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        patch.setattr(interpreter, "_get_np_dtype", of_table)
        patch.setattr(interpreter, "_convert_float", halves)
        patch.setattr(builder, "create_dot", create_dot)
        patch.setattr(core.block_type, "__init__", block)
        patch.setattr(core.tensor, "__init__", tensor)
        overflow_is_watched(patch, False)
        yield


def overflow_is_watched(patch, watched):
    """Whether each sum and product of int32 is made in int64 too, and compared."""
    builder = triton.runtime.interpreter.interpreter_builder
    options = dataclasses.replace(builder.options, sanitize_overflow=watched)
    patch.setattr(builder, "options", options)


@pytest.fixture
def watched(monkeypatch):
    """For sizes at which a number could leave int32."""
    overflow_is_watched(monkeypatch, True)


def test_a_faster_conversion_is_that_of_the_interpreter():
    """For every number of bfloat16, subnormal ones together and apart, and every float32 so far
    from the next."""
    single, half = triton.language.float32, triton.language.bfloat16
    every = np.arange(2**16, dtype=np.uint16)
    tiny = (every & 0x7F80) == 0
    wide = (every.astype(np.uint32) << 16) + (np.arange(2**16, dtype=np.uint32) * 40503 & 0xFFFF)
    for part in (every, every[~tiny], every[tiny], every[:1], every[::2]):
        expected = CONVERT(part, half, single, None)
        np.testing.assert_array_equal(halves(part, half, single, None), expected)
    for part in (wide, wide[~tiny], wide[tiny], wide[:1], wide[::2]):
        numbers = part.view(np.float32)
        expected = CONVERT(numbers, single, half, None)
        np.testing.assert_array_equal(halves(numbers, single, half, None), expected)


def test_the_interpreter_is_on():
    assert interpreted()
    assert launch.INTERPRETED
    assert bf.info()["backends"]["triton"] == "available"


def problem(n, d, f, k, d_out, dtype=torch.float32, seed=0):
    """Encoder inputs in small integers, decoder and direction in any numbers of ``dtype``."""
    g = torch.Generator().manual_seed(seed)

    def integers(bound, *shape):
        return torch.randint(-bound, bound + 1, shape, generator=g).to(dtype)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    W_enc, b_enc = integers(2, d, k * f), integers(4, k * f)
    b_enc[:: max(f * k // 5, 1)] = -100  # constant columns: never on, always on
    b_enc[1 :: max(f * k // 5, 2)] = 100
    if f * k > 4:  # twins: ties V = 0 with constant columns, extremes with each other
        W_enc[:, 2], b_enc[2] = W_enc[:, 3], b_enc[3]
    return integers(2, n, d), [W_enc, b_enc, normal(f, d_out), normal(d_out)], normal(n, d_out)


def run(impl, x, parameters, direction, terms=("recon", "entropy", "covariance"), **options):
    leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
    out = bf.binary_autoencoder(*leaves, impl=impl, covariance="covariance" in terms, **options)
    loss = 0
    if "recon" in terms:
        loss = loss + (out.recon * direction).sum() * 0.25
    if "entropy" in terms:
        loss = loss + out.entropy * 3
    if "covariance" in terms:
        loss = loss + out.covariance * 2
    if out.variance is not None:
        loss = loss + out.variance * 0.7
    loss.backward()
    values = [out.recon, out.entropy, out.covariance, *(leaf.grad for leaf in leaves)]
    return {
        name: None if v is None else v.detach() for name, v in zip(NAMES, values, strict=True)
    }, out.code


def assert_as_good_as_eager(x, parameters, direction, terms, impl="triton", **options):
    """Bits equal float64's; errors at most twice those of the dense program in the same dtype."""
    wide = [p.double() for p in parameters]
    exact, code = run("reference", x.double(), wide, direction.double(), terms, **options)
    eager, _ = run("reference", x, parameters, direction, terms, **options)
    got, packed = run(impl, x, parameters, direction, terms, **options)
    assert packed.equal(code)
    assert torch.equal(packed.counts(), code.counts())
    for name in NAMES:
        assert (got[name] is None) == (exact[name] is None), name
        if exact[name] is None:
            continue
        assert got[name].dtype == eager[name].dtype, name
        scale = exact[name].abs().max()
        if name == "b_enc":  # sums of what W_enc's gradient sums: may cancel
            scale = torch.maximum(scale, exact["W_enc"].abs().max())
        allowed = 2 * (eager[name].double() - exact[name]).abs().max()
        allowed += 4 * torch.finfo(got[name].dtype).eps * scale
        assert (got[name].double() - exact[name]).abs().max() <= allowed, name


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
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = run("triton", x, parameters, direction, surrogate="identity")
        expected, _ = run("torch", x, parameters, direction, surrogate="identity")
    for name in NAMES:
        assert got[name].dtype == expected[name].dtype, name
        error = (got[name].double() - expected[name].double()).abs().max()
        assert error <= 2e-2 * expected[name].double().abs().max(), name


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


# -- the kernels alone ---------------------------------------------------------------------------


def codes(n, k, seed=0):
    """Bits with constant columns, twins and rare columns, in words whose rows are padded."""
    g = torch.Generator().manual_seed(seed)
    dense = torch.rand(n, k, generator=g) < torch.rand(k, generator=g)
    dense[:, :: max(k // 5, 1)] = False
    dense[:, 1 :: max(k // 5, 2)] = True
    if k > 4:
        dense[:, 2] = dense[:, 3]
    padded = torch.full((n, packing.n_words(k) + 3), -1, dtype=torch.int32)
    words = padded[:, 1 : 1 + packing.n_words(k)]
    words.copy_(pack_rows(dense))
    return dense, words


def exact_covariance(dense):
    b = dense.numpy().astype(np.int64)
    counts = b.sum(0)
    v = len(b) * (b.T @ b) - np.outer(counts, counts)
    np.fill_diagonal(v, 0)
    return counts, v


EDGES = [(2, 97), (31, 33), (64, 1), (70, 31), (33, 127), (64, 129), (70, 257), (520, 65)]


@pytest.mark.parametrize("shape", EDGES, ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
def test_the_covariance_and_its_signs_equal_numpy(shape, wide, monkeypatch):
    if wide:
        monkeypatch.setattr(covariance, "INT32_ROWS", 1)
    dense, words = codes(*shape)
    counts, v = exact_covariance(dense)
    total, ones = torch.tensor(shape[0]), torch.from_numpy(counts)
    numerator, signs = OPS["covariance"](words, ones, total, True)
    assert int(numerator) == int(np.abs(v).sum())
    above, below = unpack_rows(signs, shape[1], torch.int8)
    np.testing.assert_array_equal((above - below).numpy(), np.sign(v))
    assert all(packing.tail_is_zero(plane, shape[1]) for plane in signs)
    alone, nothing = OPS["covariance"](words, ones, total, False)
    assert int(alone) == int(numerator)
    assert nothing.numel() == 0


def test_ties_are_common_in_what_is_tested():
    _, v = exact_covariance(codes(64, 129)[0])
    assert (v == 0).sum() > 129


@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_the_product_with_the_signs_is_exact_stored_and_recomputed(shape):
    n, k = shape
    dense, words = codes(n, k)
    counts, v = exact_covariance(dense)
    s, b = np.sign(v), dense.numpy().astype(np.int64)
    expected = n * (b @ s) - counts @ s
    assert np.abs(expected).max() < 2**24  # exact in fp32
    ones, total = torch.from_numpy(counts), torch.tensor(n)
    _, signs = OPS["covariance"](words, ones, total, True)
    middle = max(k // 2 // 32 * 32, min(k, 32))
    for planes, rows in ((signs, None), (None, words)):
        spread = encoder_backward._Signs(
            covariance, words, None, total * 0.5, planes, rows, ones, total
        )
        spread.scale = torch.tensor(1.0)
        parts = [spread(0, middle), *([spread(middle, k)] if middle < k else [])]
        np.testing.assert_array_equal(torch.cat(parts, 1).numpy(), expected)


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("n", [48_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_more_rows_than_int32_can_hold(n, monkeypatch):
    """V itself leaves int32 beyond 92,681 rows, products on the way to it beyond 46,340."""
    table = {"covariance": (configs.Config(128, 128, 256, 4, 1),)}
    monkeypatch.setitem(
        configs.DEFAULTS, "interpreter", {**configs.DEFAULTS["interpreter"], **table}
    )
    dense = torch.rand(n, 9) < torch.linspace(0.01, 0.99, 9)
    dense[:, 5:7] = torch.rand(n, 2) < 0.99
    dense[::2, 7], dense[1::2, 7] = True, False
    dense[:, 8] = dense[:, 7]
    counts, v = exact_covariance(dense)
    assert n * int((dense[:, 5] & dense[:, 6]).sum()) > 2**31
    assert n < 92_682 or np.abs(v).max() > 2**31
    numerator, signs = OPS["covariance"](
        pack_rows(dense), torch.from_numpy(counts), torch.tensor(n), True
    )
    assert int(numerator) == int(np.abs(v).sum())
    above, below = unpack_rows(signs, 9, torch.int8)
    np.testing.assert_array_equal((above - below).numpy(), np.sign(v))


@pytest.mark.parametrize("shape", [*EDGES, (300, 300)], ids=str)
def test_transposed_words_equal_the_layouts_definition(shape):
    _, words = codes(*shape)
    columns = packing.rows_to_columns(words, shape[1])
    assert torch.equal(bits.feature_packed(words, shape[1]), packing.columns_to_features(columns))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 65, 70), (40, 200, 3), (65, 31, 129)], ids=str)
def test_bits_times_integers_are_exact(dtype, shape):
    """Every bit of a word meets its own row of numbers: distinct integers, exact sums."""
    n, k, d = shape
    dense, words = codes(n, k)
    g = torch.Generator().manual_seed(1)
    numbers = torch.randint(-100, 101, (k, d), generator=g)
    expected = dense.long() @ numbers
    got = products.bits_product(words, numbers.to(dtype), None, torch.float32)
    assert torch.equal(got.long(), expected)
    features = bits.feature_packed(words, k)
    rows = torch.randint(-100, 101, (n, d), generator=g)
    got = products.bits_product(features, rows.to(dtype), None, torch.float32)
    assert torch.equal(got.long(), dense.t().long() @ rows)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, torch.bfloat16) for shape in EDGES] + [((300, 300), dtype) for dtype in DTYPES],
    ids=str,
)
def test_unpacked_words_equal_the_layouts_definition(shape, dtype):
    dense, words = codes(*shape)
    got = bits.unpack(words, shape[1], dtype)
    assert got.dtype == dtype
    assert torch.equal(got, dense.to(dtype))
    assert got.stride(0) % 32 == 0
    padded = torch.full((shape[0], words.shape[1] + 3), -1, dtype=torch.int32)
    padded[:, 1:-2] = words
    assert torch.equal(bits.unpack(padded[:, 1:-2], shape[1], dtype), got)


@pytest.fixture
def unpacked(monkeypatch):
    """Decode and its gradient as on compute capability 9.x."""
    monkeypatch.setattr(decode, "_UNPACKED", ("interpreter",))
    monkeypatch.setattr(decode, "bits_product", None)


@pytest.mark.parametrize(
    ("dtype", "scratch"), [(torch.bfloat16, "0"), (torch.float16, "64")], ids=str
)
def test_products_of_unpacked_bits(dtype, scratch, unpacked, monkeypatch):
    monkeypatch.setenv("BAE_FAST_SCRATCH_MB", scratch)  # 256 columns at a time, or all
    monkeypatch.setattr(decode, "ROW_BLOCK", 32)
    x, parameters, direction = problem(40, 9, 300, 1, 5, dtype)
    assert_as_good_as_eager(
        x, parameters, direction, NAMES[:3], surrogate="rectangle", surrogate_width=2.5
    )


def test_unpacked_products_under_autocast(unpacked, monkeypatch):
    """fp32 gradients of fp32 weights; weights are copied a chunk at a time."""
    monkeypatch.setenv("BAE_FAST_SCRATCH_MB", "0")
    x, parameters, direction = problem(34, 9, 300, 1, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = run("triton", x, parameters, direction, surrogate="identity")
        expected, _ = run("torch", x, parameters, direction, surrogate="identity")
    for name in NAMES:
        assert got[name].dtype == expected[name].dtype, name
        error = (got[name].double() - expected[name].double()).abs().max()
        assert error <= 2e-2 * expected[name].double().abs().max(), name


@pytest.mark.parametrize("k", [1, 33, 1024, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropy_covariance_and_slopes_equal_float64(k, dtype):
    """Constant columns, where logarithms end at eps, among them."""
    n_rows = torch.tensor(977)
    counts = torch.randint(0, 978, (k,))
    counts[: k // 2 : 2], counts[1 : k // 2 : 3] = 0, 977
    numerator, grad = torch.tensor(2**53 + 1), torch.tensor(-1.5)
    entropy, covariance = OPS["terms"](counts, n_rows, numerator, dtype)
    for got, exact in (
        (entropy, entropy_bits(counts, n_rows)),
        (covariance, torch.tensor((2**53 + 1) / (977 * 976), dtype=torch.float64)),
        (OPS["slopes"](counts, n_rows, grad, dtype), entropy_gradient(counts, n_rows) * grad),
    ):
        assert got.dtype == dtype
        # logarithms of two libraries differ by a last place, and cancel where p is near a half
        allowed = 2 * torch.finfo(dtype).eps * exact.abs() + 1e-15 / 977
        assert ((got.double() - exact).abs() <= allowed).all()
    again, none = OPS["terms"](counts, n_rows, None, dtype)
    assert torch.equal(again, entropy)
    assert (none.dtype, float(none)) == (dtype, 0)


@pytest.mark.parametrize("n_bound", [None, 1, 2, 255, 256, 4096])
def test_binary_digits_of_counts(n_bound):
    counts = torch.tensor([0, 1, 2, 200, 255, 256, 4096, 2**40])
    if n_bound is not None:
        counts = counts.clamp(max=n_bound)
    grad, n_rows = torch.tensor(0.75), torch.tensor(4096)
    digits, scale = count_kernels.sign_operands(counts, n_rows, grad, n_bound)
    assert digits.shape[0] == (63 if n_bound is None else n_bound.bit_length())
    assert torch.equal(digits, count_digits(counts, n_bound))
    raw = unpack_rows(digits, 8, torch.int32)
    assert torch.equal(count_kernels.from_digits(raw), counts)
    assert torch.equal(count_kernels.from_digits(raw), from_digits(raw))
    exact = 0.75 * 2 / (4096 * 4095)
    assert scale.dtype == torch.float32
    assert float(scale) == float(torch.tensor(exact, dtype=torch.float64).float())


def test_the_tiles_of_a_triangle_are_each_there_once():
    """The order of tiles in the kernel, for odd and even numbers of tiles."""
    for side in range(1, 9):
        seen = []
        for program in range(covariance._tiles(side * 128, 128)):
            i, j = program // (side + 1), program // (side + 1) + program % (side + 1)
            if j >= side:
                i, j = side - 1 - i, j - 1 - i
            seen.append((i, j))
        expected = [(i, j) for i in range(side) for j in range(i, side)]
        assert sorted(seen) == expected


@pytest.mark.parametrize(
    ("chip", "entry"),
    [
        ("sm_90", 1),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (("sm_80", 0), ("sm_80", 1), ("sm_90", 0))
        ),
    ],
)  # fmt: skip
def test_the_tile_sizes_of_real_chips(chip, entry, monkeypatch):
    monkeypatch.setitem(configs.DEFAULTS, "interpreter", configs.DEFAULTS[chip])
    x, parameters, direction = problem(140, 70, 300, 1, 40, torch.bfloat16)
    with launch.table_entry(entry):
        assert_as_good_as_eager(
            x, parameters, direction, NAMES[:3], surrogate="rectangle", surrogate_width=2.5
        )


def test_results_are_written_whole():
    """Fresh memory is filled with NaN and large integers: none of it may show."""
    x, parameters, direction = problem(40, 9, 70, 1, 5, torch.bfloat16)
    mask = torch.arange(40) % 3 != 1
    expected, code = run("triton", x, parameters, direction, mask=mask)
    torch._C._set_deterministic_algorithms(True)  # torch's own function imports its compiler
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(1).isnan().all()
        got, again = run("triton", x, parameters, direction, mask=mask)
    finally:
        torch._C._set_deterministic_algorithms(False)
    assert again.equal(code)
    assert all(torch.equal(got[name], expected[name]) for name in NAMES)


# -- sparse codes: lists of ones -----------------------------------------------------------------


@pytest.fixture
def sparse(monkeypatch):
    """Lists serve as far as their capacity goes; the programs that run are two."""
    monkeypatch.setattr(nvidia, "DENSE_A_STEP", 1)
    monkeypatch.setattr(nvidia, "LEAST_PRODUCTS", 1)
    monkeypatch.setattr(pair_lists, "WINDOW_SHARE", 1)
    small = {"pair_lists": (configs.Config(4, 8, 1, 4, 1),)}
    monkeypatch.setitem(
        configs.DEFAULTS, "interpreter", {**configs.DEFAULTS["interpreter"], **small}
    )


def few_ones(n, k, ones=3.0, seed=0):
    """Sparse bits with constant columns, twins, columns that never meet, ties."""
    g = torch.Generator().manual_seed(seed)
    dense = torch.rand(n, k, generator=g) < ones / k
    dense[:, 0], dense[:, 1] = True, False
    dense[:, 2] = dense[:, 3]
    dense[:, 4] = torch.arange(n) % 2 == 0
    dense[:, 5], dense[:, 6] = ~dense[:, 4], torch.arange(n) % 4 < 2
    return dense


@pytest.mark.parametrize("lines", [(5, 33), (17, 7), (3, 2100)], ids=str)
def test_lists_are_where_the_ones_are(lines):
    dense = torch.rand(lines) < 0.3
    dense[1] = False
    on, off = (torch.tensor([value], dtype=torch.int32) for value in (1, 0))
    found = pair_lists.Lists(pack_rows(dense), dense.numel())
    found.entries.fill_(-7)
    found.fill(off)
    assert (found.entries == -7).all()
    found.fill(on)
    assert bool(found.fit())
    assert torch.equal(found.lengths(), dense.sum(1))
    expected = torch.cat([row.nonzero().flatten() for row in dense])
    assert torch.equal(found.entries[: len(expected)].long(), expected)
    short = pair_lists.Lists(pack_rows(dense), 5)  # more ones than there is room for
    short.fill(on)
    assert not bool(short.fit())
    assert torch.equal(short.entries.long(), expected[:5])
    assert torch.equal(short.starts, found.starts)


@pytest.mark.parametrize("shape", [(2, 9), (17, 20), (9, 33)], ids=str)
def test_the_covariance_by_lists_equals_integers(shape, sparse):
    dense = few_ones(*shape)
    counts, v = exact_covariance(dense)
    words, total = pack_rows(dense), torch.tensor(shape[0])
    args = (torch.from_numpy(counts), total)
    pairs = pair_lists.PairLists(words, bits.feature_packed(words, shape[1]), *args)
    assert bool(pairs.serves)
    total, planes = torch.tensor(-7), torch.zeros(2, 3, 1, dtype=torch.int32)
    pairs.settle(total, planes)
    assert int(total) == int(np.abs(v).sum())
    assert planes.flatten().tolist() == [-1, 0, 0, -1, 0, 0]
    numerator, signs = OPS["covariance"](words, *args, True)
    assert int(numerator) == int(np.abs(v).sum())
    # the dense kernel made nothing, and the planes say so
    assert covariance_body.made(signs) == 0


def test_a_code_with_too_many_ones_is_counted_by_products(sparse, monkeypatch):
    n, k = 12, 20
    dense = few_ones(n, k)
    counts, v = exact_covariance(dense)
    for name, value in (("MOST_ONES", 2), ("MOST_ONES", 256)):
        monkeypatch.setattr(pair_lists, name, value)
        step = 1 if value == 2 else k * k * n // 2  # lists too short; one step allowed
        monkeypatch.setattr(nvidia, "DENSE_A_STEP", step)
        monkeypatch.setattr(nvidia, "lists_may_serve", lambda n, k: True)
        args = (pack_rows(dense), torch.from_numpy(counts), torch.tensor(n), True)
        numerator, signs = OPS["covariance"](*args)
        assert int(numerator) == int(np.abs(v).sum())
        assert covariance_body.made(signs) != 0
        above, below = unpack_rows(signs, k, torch.int8)
        np.testing.assert_array_equal((above - below).numpy(), np.sign(v))


@pytest.mark.parametrize(
    ("other_rows", "fits"),
    [
        pytest.param(False, True, id="own-lists"),
        pytest.param(True, False, id="more rows-window too large"),
        pytest.param(True, True, id="more rows-lists", marks=pytest.mark.long),
        pytest.param(False, False, id="own-window too large", marks=pytest.mark.long),
    ],
)
def test_the_gradient_by_lists_is_that_by_products(fits, other_rows, sparse, monkeypatch):
    """To the last bit, with planes that were marked, kept or not kept."""
    n, k, d = 11, 16, 4
    g = torch.Generator().manual_seed(1)
    counted = few_ones(n, k)
    if other_rows:  # at hand: ones in columns that the counted rows do not have
        counted = torch.cat([counted, few_ones(5, k, seed=2)])
    at_hand = counted[:n].clone()
    at_hand[0, 1] = other_rows
    words, window = pack_rows(at_hand), pack_rows(torch.rand(n, k, generator=g) < 0.2)
    stats, total = pack_rows(counted), torch.tensor(len(counted))
    counts = counted.sum(0)
    x, W = torch.randn(n, d, generator=g), torch.randn(d, k, generator=g)
    b, W_dec = torch.randn(k, generator=g), torch.randn(k, d, generator=g)
    served = []
    plain = pair_lists.WindowSigns.add_to

    def noted(self, out, start):
        served.append(bool(self.serves))
        plain(self, out, start)

    monkeypatch.setattr(pair_lists.WindowSigns, "add_to", noted)
    if not fits:
        monkeypatch.setattr(pair_lists, "WINDOW_SHARE", 16)
    monkeypatch.setenv("BAE_FAST_SCRATCH_MB", "0")

    def gradients(planes, surrogate="rectangle"):
        return OPS["encoder_backward"](
            x, W, b, W_dec, words, window, None, None, None, None, torch.tensor(0.25), planes,
            stats, counts, total, surrogate, 0.5, 1, [True] * 3,
        )  # fmt: skip

    marked = OPS["covariance"](stats, counts, total, True)[1]
    assert covariance_body.made(marked) == 0
    got = [gradients(planes) for planes in (marked.clone(), None)]
    assert served == [fits] * 2
    got_identity = gradients(marked.clone(), "identity")
    monkeypatch.setattr(nvidia, "DENSE_A_STEP", 10**9)
    signs = OPS["covariance"](stats, counts, total, True)[1]
    expected = gradients(signs)
    assert len(served) == 2
    for found in got:
        for left, right in zip(found, expected, strict=True):
            assert right.any()
            assert torch.equal(left, right)
    for left, right in zip(got_identity, gradients(signs, "identity"), strict=True):
        assert torch.equal(left, right)


def test_a_whole_step_of_a_sparse_code(sparse):
    x, parameters, direction = problem(11, 5, 20, 1, 4, torch.bfloat16)
    parameters[1] = parameters[1] - 6
    assert_as_good_as_eager(
        x, parameters, direction, NAMES[:3], surrogate="rectangle", surrogate_width=1.5
    )


def test_small_codes_are_not_listed():
    assert not nvidia.lists_may_serve(10**6, 1024)  # dense enough wherever they are not empty
    assert not nvidia.lists_may_serve(512, 16384)  # done before a list would be
    assert nvidia.lists_may_serve(4096, 16384)


# -- offsets beyond 2^31 -------------------------------------------------------------------------


def far(rows, columns, dtype):
    """Rows 2^30 elements apart: the third begins past 2^31. Memory that is not touched is free."""
    stride = 2**30
    base = torch.empty((rows - 1) * stride + columns, dtype=dtype)
    return base.as_strided((rows, columns), (stride, 1))


@pytest.mark.usefixtures("watched")
def test_offsets_past_2_to_the_31_reach_their_rows():
    k, d = 70, 5
    x, (W, b, *_), _ = problem(3, d, k, 1, d, torch.bfloat16)
    distant = far(3, d, torch.bfloat16)
    distant.copy_(x)
    assert distant.stride(0) * 2 >= 2**31
    words, _, counts, _ = OPS["encode"](distant, W, b, None, None)
    near = OPS["encode"](x, W, b, None, None)
    assert torch.equal(words, near[0])
    assert torch.equal(counts, near[2])
    distant_words = far(3, 3, torch.int32)
    distant_words.copy_(words)
    dense = torch.randint(-9, 10, (k, d)).bfloat16()
    expected = unpack_rows(words, k).long() @ dense.long()
    got = products.bits_product(distant_words, dense, None, torch.float32)
    assert torch.equal(got.long(), expected)
    assert torch.equal(bits.feature_packed(distant_words, k), bits.feature_packed(words, k))
    features = bits.feature_packed(words, 3)
    distant_features = far(3, features.shape[1], torch.int32)
    distant_features.copy_(features)
    for a, e in zip(
        covariance.covariance(distant_features, counts[:3], torch.tensor(3), True, 3),
        covariance.covariance(features, counts[:3], torch.tensor(3), True, 3),
        strict=True,
    ):
        assert torch.equal(a, e)


# -- tile sizes and tuning -----------------------------------------------------------------------


def test_defaults_cover_every_kernel_of_every_chip():
    kernels = set(configs.DEFAULTS["sm_90"])
    assert kernels >= set(configs.CANDIDATES)
    for chip, table in configs.DEFAULTS.items():
        assert set(table) == kernels, chip
        for name, entries in table.items():
            if name == "covariance":
                assert all(c.m == c.n >= 128 and 256 % c.k == 0 for c in entries)
            elif name in configs.CANDIDATES:
                assert all(c.m % 32 == c.n % 64 == c.k % 32 == 0 for c in entries)


@pytest.mark.parametrize(
    ("name", "rows", "columns", "expected"),
    [
        ("encode", 1, 16384, 64),
        ("encode", 512, 16384, 128),  # 256 large tiles: two waves of 132
        ("encode", 513, 16384, 128),
        ("encode", 4096, 65536, 128),
        ("gradient", 512, 2048, 64),  # 32 large tiles would leave most multiprocessors idle
        ("sign_product", 13, 16384, 64),
        ("sign_product", 512, 16384, 128),
    ],
)
def test_the_tile_is_that_which_ends_first(name, rows, columns, expected):
    assert launch.default(name, "sm_90", rows, columns, 132).m == expected


def test_more_rows_never_end_before_fewer():
    """The choice itself: a tile of the table that ends later than another is never taken."""
    for rows in (1, 63, 64, 65, 511, 512, 513, 4096, 100_000):
        for columns in (33, 2048, 16384, 65536):
            chosen = launch.default("encode", "sm_90", rows, columns, 132)
            ends = [launch.cost(c, rows, columns, 132) for c in configs.DEFAULTS["sm_90"]["encode"]]
            assert launch.cost(chosen, rows, columns, 132) == min(ends)


def test_tuned_sizes_are_kept_on_disk_and_a_broken_file_is_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seconds = {config: i for i, config in enumerate(reversed(configs.CANDIDATES["encode"]))}
    monkeypatch.setattr(launch, "_milliseconds", lambda call: call())
    launch._tuned.cache_clear()
    sizes, cpu = (7, 8, 8, 9), torch.device("cpu")

    def measured(config):
        return seconds.get(config, 10**6)

    launch._tune("encode", cpu, torch.bfloat16, sizes, -1, measured)
    best = configs.CANDIDATES["encode"][-1]
    assert launch.configuration("encode", cpu, torch.bfloat16, sizes) == best
    (file,) = tmp_path.rglob("*.json")
    assert json.loads(file.read_text()) == {"tiles": [[list(sizes), list(best)]]}
    launch._tuned.cache_clear()  # as a later process
    assert launch.configuration("encode", cpu, torch.bfloat16, sizes) == best
    assert launch.configuration("encode", cpu, torch.float16, sizes) != best
    file.write_text("[[1, 2")
    launch._tuned.cache_clear()
    assert launch.configuration("encode", cpu, torch.bfloat16, sizes) != best
    launch._tuned.cache_clear()


def test_a_user_without_a_home_computes_and_tunes(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(files.Path, "home", homeless)
    monkeypatch.setattr(launch, "_milliseconds", lambda call: call())
    launch._tuned.cache_clear()
    sizes, cpu = (7, 8, 8, 9), torch.device("cpu")
    own = launch.configuration("encode", cpu, torch.bfloat16, sizes)
    assert own in configs.DEFAULTS["interpreter"]["encode"]
    best = configs.CANDIDATES["encode"][-1]
    launch._tune("encode", cpu, torch.bfloat16, sizes, -1, lambda config: config != best)
    assert launch.configuration("encode", cpu, torch.bfloat16, sizes) == best
    launch._tuned.cache_clear()


@pytest.fixture
def tuning(tmp_path, monkeypatch):
    """BAE_FAST_AUTOTUNE=1 as on a device: every candidate is run, and several times over."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("BAE_FAST_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "family", lambda device: "interpreter")
    monkeypatch.setattr(launch, "_chip", lambda device: "interpreter")
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    few = {name: (configs.DEFAULTS["interpreter"][name][0]._replace(warps=8),)
           for name in configs.CANDIDATES}  # fmt: skip
    monkeypatch.setattr(launch, "CANDIDATES", few)
    runs = []

    def milliseconds(call):
        for _ in range(2):
            call()
        runs.append(call)
        return float(len(runs))

    monkeypatch.setattr(launch, "_milliseconds", milliseconds)
    launch._tuned.cache_clear()
    yield runs
    launch._tuned.cache_clear()


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.long)], ids=str
)
def test_tuning_changes_no_result(dtype, tuning, monkeypatch):
    """Launchers are called many times over on the same memory: none may add to it."""
    x, parameters, direction = problem(34, 9, 70, 1, 5, dtype)
    got, code = run("triton", x, parameters, direction)
    assert len(tuning) >= (6 if dtype == torch.bfloat16 else 2)
    monkeypatch.setenv("BAE_FAST_AUTOTUNE", "0")
    expected, right = run("triton", x, parameters, direction)
    assert torch.equal(code.counts(), right.counts())
    assert torch.equal(code.counts(), code.to_dense().sum(0))
    for name in NAMES:
        assert torch.equal(got[name], expected[name]), name


def test_tuning_is_timed_on_the_device_of_the_tensors(tuning, monkeypatch):
    """Events, the cache that is overwritten and the capture are those of the current device."""
    now, asked = [0], []

    class Guard:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            now.append(self.index)

        def __exit__(self, *args):
            now.pop()

    def asked_here(answer):
        def ask(*args):
            asked.append(now[-1])
            return answer

        return ask

    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", asked_here(False))
    monkeypatch.setattr(launch, "_milliseconds", asked_here(1.0))
    rows = types.SimpleNamespace(
        shape=(20, 9), device=torch.device("cuda", 1), dtype=torch.bfloat16
    )
    config = launch.tuned("encode")(lambda config, first, second: config)(rows, 7)
    assert config in configs.DEFAULTS["interpreter"]["encode"]
    assert asked == [1, 1, 1]
    assert now == [0]


def test_no_grid_is_higher_than_a_device_starts(monkeypatch):
    """2^16 - 1 in all but the first number: eight bits of a million features are 2^23 columns."""
    grids = {}
    monkeypatch.setattr(
        launch, "start", lambda kernel, grid, *args, **options: grids.update({kernel: grid})
    )
    k = 2**23
    words = torch.empty(2**17, k // 32, dtype=torch.int32, device="meta")
    bits.feature_packed(words, k)
    bits.unpack(words, k, torch.bfloat16)
    assert len(grids) == 2
    for grid in grids.values():
        assert 2**16 < grid[0] < 2**31
        assert max(grid[1:], default=1) < 2**16


def test_ranks_do_not_tune_apart(tuning, monkeypatch):
    """Other tiles would be other bits near zero: several ranks take the defaults."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    x, (W, b, *_), _ = problem(20, 9, 70, 1, 5, torch.bfloat16)
    OPS["encode"](x, W, b, None, None)
    assert tuning == []
    sizes, cpu = (20, 9, 9, 70), torch.device("cpu")
    other = configs.Config(32, 64, 32, 8, 1)
    launch._tuned("interpreter", "encode", torch.bfloat16)[sizes] = other
    default = configs.DEFAULTS["interpreter"]["encode"][0]
    assert launch.configuration("encode", cpu, torch.bfloat16, sizes) == default
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    assert launch.configuration("encode", cpu, torch.bfloat16, sizes) == other


@pytest.mark.parametrize("error", [RuntimeError, triton.runtime.errors.OutOfResources])
def test_tiles_that_do_not_run_are_left_out(error, tmp_path, monkeypatch):
    def call():
        raise error("too much", 1, 2) if error is not RuntimeError else error("invalid argument")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert launch._milliseconds(call) == float("inf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="no tile sizes of the kernel encode run for sizes"):
        launch._tune(
            "encode", torch.device("cpu"), torch.bfloat16, (1, 2, 2, 4), -1, lambda c: call()
        )

    def dead():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        launch._milliseconds(call)


def test_tiles_are_timed_with_a_cold_cache(monkeypatch):
    """By triton's own measurement, which overwrites the cache and keeps the host ahead."""
    asked = []

    def do_bench(call, **options):
        asked.append((call, options["return_mode"]))
        return 2.5

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    assert launch._milliseconds(dict) == 2.5
    assert asked == [(dict, "min")]


# -- CUDA graphs, as far as they can be shown without a GPU --------------------------------------


class FakeKernel:
    """Compiles as triton does: asks the hook, then starts."""

    def __init__(self):
        self.compiled, self.started = False, 0

    def __getitem__(self, grid):
        def go(*args, **constants):
            if not self.compiled:
                hook = triton.knobs.runtime.jit_cache_hook
                if hook is not None:
                    hook(key="", repr="", fn=None, compile={}, is_manual_warmup=False)
                self.compiled = True
            self.started += 1

        return go


def test_a_first_call_under_capture_says_to_warm_up(monkeypatch):
    class OnDevice:
        is_cuda, device = True, None

    class Guard:
        def __init__(self, device):
            pass

        __enter__ = __exit__ = lambda self, *args: None

    capturing = [True]
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    kernel = FakeKernel()
    with pytest.raises(RuntimeError, match=r"bae_fast\.warmup\('triton'"):
        launch.start(kernel, (1,), OnDevice())
    assert kernel.started == 0
    # other kernels, and other threads beside a capture, compile as ever
    hook = triton.knobs.runtime.jit_cache_hook
    assert not hook(key="", repr="", fn=None, compile={}, is_manual_warmup=False)
    elsewhere = FakeKernel()
    launch._capture.going = True
    try:
        thread = threading.Thread(target=lambda: elsewhere[(1,)]())
        thread.start()
        thread.join()
    finally:
        launch._capture.going = False
    assert elsewhere.started == 1
    capturing[0] = False
    launch.start(kernel, (1,), OnDevice())
    capturing[0] = True
    launch.start(kernel, (1,), OnDevice())
    assert kernel.started == 2


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
