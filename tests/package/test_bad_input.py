"""Bad input: one line that names the argument and what is allowed, of the right type."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import safetensors.torch
import torch

import bae_fast as bf
from bae_fast.normalization import check_rows

D, F = 6, 40


@pytest.fixture
def x():
    return torch.randn(12, D)


@pytest.fixture
def parameters():
    return {
        "W_enc": torch.randn(D, F),
        "b_enc": torch.randn(F),
        "W_dec": torch.randn(F, D),
        "b_dec": torch.randn(D),
    }


@pytest.fixture
def bae():
    return bf.BinaryAutoencoder(D, F)


class Refused:
    """``with refused(ValueError, "x must", "[..., 6]"):`` checks type, words and one line."""

    def __init__(self, kind: type[Exception], *words: str) -> None:
        self.kind, self.words = kind, words
        self.raises = pytest.raises(kind)

    def __enter__(self):
        self.info = self.raises.__enter__()

    def __exit__(self, *exception):
        handled = self.raises.__exit__(*exception)
        if handled:
            text = str(self.info.value)
            assert self.info.type is self.kind, self.info.type
            assert "\n" not in text
            assert text
            for word in self.words:
                assert word in text, f"{word!r} is not in {text!r}"
        return handled


refused = Refused


# -- x -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, D + 1), (12, 1), (D + 1,), ()])
def test_x_of_the_wrong_width(bae, parameters, shape):
    bad = torch.randn(shape)
    for call in (bae, bae.encode, bae.normalize, lambda x: bae.init_density_(x, 0.1)):
        with refused(ValueError, "x must have shape [..., 6]", f"got {list(shape)}"):
            call(bad)
    for call in (
        lambda: bf.binary_autoencoder(bad, **parameters),
        lambda: bf.encode(bad, parameters["W_enc"], parameters["b_enc"]),
    ):
        with refused(ValueError, "x must have shape [..., 6]", f"got {list(shape)}"):
            call()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_x_that_is_not_floating(bae, parameters, dtype):
    bad = torch.ones(12, D, dtype=dtype)
    for call in (bae, bae.encode, lambda x: bf.binary_autoencoder(x, **parameters)):
        with refused(TypeError, "x must be floating point", f"got {dtype}"):
            call(bad)


def test_rows_of_numpy_or_of_more_dimensions_say_how_they_fit(bae, x):
    with refused(TypeError, "x must be a tensor", "torch.from_numpy(x) makes one of it"):
        bae(x.numpy())
    with refused(ValueError, "rows must have shape [n, 6]", "rows.flatten(0, -2) has that shape"):
        check_rows("rows", x.view(2, -1, D), D)


def test_x_that_is_no_tensor(bae, parameters):
    bad = [[0.0] * D]
    for call in (bae, bae.encode, lambda x: bf.binary_autoencoder(x, **parameters)):
        with refused(TypeError, "x must be a tensor", "got list"):
            call(bad)


@pytest.mark.parametrize("shape", [(0, D), (3, 0, D)])
def test_an_empty_batch(bae, parameters, shape):
    for call in (bae, bae.encode, lambda x: bf.binary_autoencoder(x, **parameters)):
        with refused(ValueError, "x must hold at least one row", f"got shape {list(shape)}"):
            call(torch.randn(shape))


def test_fitting_on_no_rows_on_one_value_or_on_nan(bae, x):
    with refused(ValueError, "x must have shape [..., 6] and rows", "got [0, 6]"):
        bae.fit_normalization_(x[:0])
    with refused(ValueError, "x must be finite and not constant"):
        bae.fit_normalization_(torch.ones(5, D))
    with refused(ValueError, "x must be finite and not constant", "got one row"):
        bae.fit_normalization_(x[:1])
    bad = torch.randn(5, D)
    bad[1, 2], bad[3] = torch.nan, torch.inf
    with refused(ValueError, "x must be finite and not constant", "NaN or Inf in 2 of 5 rows"):
        bae.fit_normalization_(bad)


@pytest.mark.parametrize(
    ("dtype", "factor", "shift"),
    [
        (torch.float16, 1e5, 0),
        (torch.float16, 1e-9, 0),
        (torch.float16, 1, 1e5),
        (torch.float32, 1e-50, 0),
        (torch.float32, 1e50, 0),
    ],
)
def test_fitting_a_scale_that_the_modules_dtype_does_not_hold(dtype, factor, shift):
    """Left to itself the scale would be 0 or infinite, and every row NaN or the mean."""
    bae = bf.BinaryAutoencoder(D, F, dtype=dtype)
    x = torch.randn(50, D, dtype=torch.float64) * factor + shift
    with refused(ValueError, "x must have a mean and a scale within", str(dtype)[6:], "got means"):
        bae.fit_normalization_(x)
    assert not bae.x_mean.any()
    assert bae.x_scale == 1


@pytest.mark.parametrize("kind", ["sparse_coo", "sparse_csr", "nested"])
def test_rows_that_are_no_rectangle_of_numbers(bae, parameters, x, kind):
    if kind == "nested":
        other = torch.nested.nested_tensor([x[:3], x[3:]])
    else:
        other = x.to_sparse() if kind == "sparse_coo" else x.to_sparse_csr()
    for call in (
        bae,
        bae.encode,
        bae.fit_normalization_,
        lambda x: bf.binary_autoencoder(x, **parameters),
        lambda x: bf.encode(x, parameters["W_enc"], parameters["b_enc"]),
    ):
        with refused(TypeError, "x must be a dense tensor", f"got a {kind} one"):
            call(other)


def test_weights_that_are_sparse_or_empty(parameters, x):
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        wrong = parameters | {name: parameters[name].to_sparse()}
        with refused(TypeError, f"{name} must be a dense tensor", "got a sparse_coo one"):
            bf.binary_autoencoder(x, **wrong)
    nothing = {"W_dec": torch.zeros(F, 0), "b_dec": torch.zeros(0)}
    code = bf.encode(x, parameters["W_enc"], parameters["b_enc"])
    for call in (
        lambda: bf.binary_autoencoder(x, **parameters | nothing),
        lambda: bf.decode(code, **nothing),
    ):
        with refused(ValueError, "W_dec must have at least one column", "got none"):
            call()


def test_a_bank_of_codes_of_other_columns():
    from bae_fast.training import CodeBank

    bank = CodeBank(2)
    bank.append(bf.BinaryCode.from_dense(torch.ones(3, 40)))
    with refused(ValueError, "code must have the 40 columns of those held", "got 64"):
        bank.append(bf.BinaryCode.from_dense(torch.ones(3, 64)))


def test_fitting_on_integers_or_on_no_tensor(bae):
    with refused(TypeError, "x must be floating point", "got torch.int64"):
        bae.fit_normalization_(torch.arange(12).view(2, D))
    with refused(TypeError, "x must be a tensor", "got list"):
        bae.fit_normalization_([[0.0] * D])


def test_a_target_where_none_belongs_and_the_other_way_round(bae, x):
    with refused(ValueError, "target must be None", "d_out"):
        bae.fit_normalization_(x, x)
    with refused(ValueError, "target must be given", "d_out"):
        bf.BinaryAutoencoder(D, F, d_out=3).fit_normalization_(x)


@pytest.mark.parametrize("density", [0, 1, -0.1, 1.5, float("nan")])
def test_a_density_outside_zero_and_one(bae, x, density):
    with refused(ValueError, "density must lie between 0 and 1", f"got {density!r}"):
        bae.init_density_(x, density)


def test_a_density_from_one_row(bae, x):
    with refused(ValueError, "x must hold at least 2 rows", "got 1"):
        bae.init_density_(x[:1], 0.5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_non_finite_x_is_counted_when_checking_is_on(parameters, x, value, impl):
    x[2, 3] = x[5, 0] = value
    bae = bf.BinaryAutoencoder(D, F, check_finite=True, impl=impl)
    for call in (
        lambda: bae(x),
        lambda: bae.encode(x),
        lambda: bf.binary_autoencoder(x, **parameters, check_finite=True, impl=impl),
    ):
        with refused(ValueError, "x must be finite", "got 2 NaN or Inf of 72"):
            call()


def test_rows_of_float8_are_checked_under_autocast(parameters, x):
    def layer(rows):
        with torch.autocast("cpu"):
            return bf.binary_autoencoder(
                rows.to(torch.float8_e5m2), **parameters, check_finite=True
            )

    assert layer(x).recon.isfinite().all()
    x[2, 3] = torch.inf
    with refused(ValueError, "x must be finite", "got 1 NaN or Inf of 72"):
        layer(x)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_non_finite_x_neither_crashes_nor_counts_as_one_when_checking_is_off(parameters, x, impl):
    x[2] = torch.nan
    out = bf.binary_autoencoder(x, **parameters, impl=impl)
    assert not out.code.to_dense()[2].any()
    assert torch.equal(out.code.counts(), out.code.to_dense(torch.int64).sum(0))


# -- devices and dtypes ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_a_parameter_on_another_device(parameters, x, name):
    parameters[name] = parameters[name].to("meta")
    with refused(ValueError, f"{name} must be on x's device cpu", "got meta"):
        bf.binary_autoencoder(x, **parameters)


def test_a_module_and_rows_on_different_devices(bae, x):
    for call in (bae, bae.encode):
        with refused(ValueError, "x must be on the module's device cpu", "got meta"):
            call(x.to("meta"))
    with refused(ValueError, "x must be on the module's device meta", "got cpu"):
        bae.to("meta")(x)


def test_a_code_on_another_device(bae, x):
    with refused(ValueError, "code must be on W_dec's device cpu", "got meta"):
        bae.decode(bae.encode(x).to("meta"))


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parameters_of_another_dtype_than_x_outside_autocast(parameters, x, name, dtype):
    parameters[name] = parameters[name].to(dtype)
    with refused(TypeError, f"{name} must have x's dtype torch.float32", f"got {dtype}"):
        bf.binary_autoencoder(x, **parameters)


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_integer_parameters(parameters, x, name):
    parameters[name] = parameters[name].long()
    with refused(TypeError, f"{name} must be floating point", "got torch.int64"):
        bf.binary_autoencoder(x, **parameters)


def test_rows_wider_than_the_module(bae, x):
    for call in (bae, bae.encode):
        with refused(
            TypeError,
            "W_enc must have x's dtype torch.float64",
            "got torch.float32: x.to(torch.float32) has that of W_enc",
        ):
            call(x.double())


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("W_enc", (D * F,), "[d_in, k F]"),
        ("b_enc", (F + 1,), "[40]"),
        ("b_enc", (F, 1), "[40]"),
        ("W_dec", (F - 1, D), "[40, d_out]"),
        ("W_dec", (F,), "[40, d_out]"),
        ("b_dec", (D + 1,), "[6]"),
    ],
)
def test_parameters_of_the_wrong_shape(parameters, x, name, shape, expected):
    parameters[name] = torch.randn(shape)
    with refused(ValueError, f"{name} must have shape {expected}", f"got {list(shape)}"):
        bf.binary_autoencoder(x, **parameters)


# -- options -----------------------------------------------------------------------------------


def test_an_unknown_surrogate(parameters, x):
    allowed = "identity, official, sigmoid, rectangle"
    with refused(ValueError, "surrogate must be one of", allowed, "'hard'"):
        bf.binary_autoencoder(x, **parameters, surrogate="hard")
    with refused(ValueError, "surrogate must be one of", allowed, "'hard'"):
        bf.BinaryAutoencoder(D, F, surrogate="hard")


@pytest.mark.parametrize("width", [0, -1.0, float("nan"), float("inf"), "0.5"])
@pytest.mark.parametrize("surrogate", ["rectangle", "sigmoid"])
def test_a_surrogate_width_that_is_no_positive_number(parameters, x, surrogate, width):
    options = {"surrogate": surrogate, "surrogate_width": width}
    words = "surrogate_width must be a positive finite number", f"got {width!r}"
    with refused(ValueError, *words):
        bf.binary_autoencoder(x, **parameters, **options)
    with refused(ValueError, *words):
        bf.BinaryAutoencoder(D, F, **options)


@pytest.mark.parametrize("surrogate", ["identity", "official"])
def test_a_surrogate_width_where_there_is_none(parameters, x, surrogate):
    words = "surrogate_width must be None", surrogate, "got 0.5"
    with refused(ValueError, *words):
        bf.binary_autoencoder(x, **parameters, surrogate=surrogate, surrogate_width=0.5)
    with refused(ValueError, *words):
        bf.BinaryAutoencoder(D, F, surrogate=surrogate, surrogate_width=0.5)


def test_an_unknown_preset():
    with refused(ValueError, "preset must be one of sparse, paper", "'dense'"):
        bf.BinaryAutoencoder(D, F, preset="dense")


@pytest.mark.parametrize("name", ["d_in", "d_sae", "d_out"])
@pytest.mark.parametrize("value", [0, -3, 2.5, "8", True])
def test_a_size_that_is_no_positive_integer(name, value):
    sizes = {"d_in": D, "d_sae": F, name: value}
    with refused(ValueError, f"{name} must be an int >= 1", f"got {value!r}"):
        bf.BinaryAutoencoder(**sizes)


@pytest.mark.parametrize("n_bits", [0, -1, 1.5, None, True])
def test_bits_a_feature_that_are_no_positive_integer(parameters, x, n_bits):
    with refused(ValueError, "n_bits must be an int >= 1", f"got {n_bits!r}"):
        bf.BinaryAutoencoder(D, F, n_bits=n_bits)
    for call in (
        lambda: bf.binary_autoencoder(x, **parameters, n_bits=n_bits),
        lambda: bf.encode(x, parameters["W_enc"], parameters["b_enc"], n_bits=n_bits),
    ):
        with refused(ValueError, "n_bits must be an int >= 1", f"got {n_bits!r}"):
            call()


def test_bits_a_feature_that_do_not_divide_the_columns(parameters, x):
    with refused(ValueError, "n_bits must", "divides the 40 columns of W_enc", "got 3"):
        bf.binary_autoencoder(x, **parameters, n_bits=3)


def test_more_bits_a_feature_than_allowed():
    with refused(ValueError, "n_bits must be at most 16", "got 17"):
        bf.BinaryAutoencoder(D, F, n_bits=17)


IMPLS = "auto, reference, torch, cpp, triton, cuda"


def test_an_unknown_impl(parameters, x):
    for call in (
        lambda: bf.binary_autoencoder(x, **parameters, impl="numpy"),
        lambda: bf.encode(x, parameters["W_enc"], parameters["b_enc"], impl="numpy"),
        lambda: bf.BinaryAutoencoder(D, F, impl="numpy"),
        lambda: bf.warmup("numpy"),
    ):
        with refused(ValueError, f"impl must be one of {IMPLS}", "got 'numpy'"):
            call()


def _column_63(words):
    """With a bit set that is no column's: a kernel's list of the ones would run over its end."""
    return words | torch.iinfo(torch.int32).min


@pytest.mark.parametrize(
    ("field", "change", "error", "said"),
    [
        (
            "counts",
            lambda t: t.int(),
            TypeError,
            "stats.counts must be torch.int64; got torch.int32",
        ),
        (
            "n_rows",
            lambda t: t.float(),
            TypeError,
            "stats.n_rows must be torch.int64; got torch.fl",
        ),
        (
            "words",
            lambda t: t.long(),
            TypeError,
            "stats.words must be torch.int32; got torch.int64",
        ),
        (
            "counts",
            lambda t: t.to("meta"),
            ValueError,
            "stats.counts must be on x's device cpu; got",
        ),
        ("words", lambda t: t.to("meta"), ValueError, "stats.words must be on x's device cpu; got"),
        ("n_rows", int, TypeError, "stats.n_rows must be a tensor; got int"),
        ("n_rows", lambda t: t[None], ValueError, "stats.n_rows must have shape []; got [1]"),
        ("words", lambda t: t[:, :1], ValueError, "stats.words must have shape [N, 2]; got [12"),
        ("numerator", lambda t: t[None], ValueError, "stats.numerator must have shape []; got"),
        ("signs", lambda t: t[..., :1], ValueError, "stats.signs must have shape [2, 40, 2]; got"),
        ("words", _column_63, ValueError, "stats.words must have no bits past column 40; some"),
        ("signs", _column_63, ValueError, "stats.signs must have no bits past column 40; some"),
    ],
)
def test_statistics_of_another_shape_dtype_or_device(parameters, x, field, change, error, said):
    """A kernel reads the memory as it is: an illegal access, or a wrong number."""
    stats = bf.encode(x, parameters["W_enc"], parameters["b_enc"]).statistics(covariance=True)
    if field == "signs":  # few rows of ones leave them unmade
        stats = dataclasses.replace(stats, signs=torch.zeros(2, F, 2, dtype=torch.int32))
    wrong = dataclasses.replace(stats, **{field: change(getattr(stats, field))})
    for covariance in (False, True):
        with refused(error, said):
            bf.binary_autoencoder(x, **parameters, covariance=covariance, stats=wrong)


@pytest.mark.parametrize(
    ("field", "change", "error", "said"),
    [
        ("words", lambda t: t[:-1], ValueError, "encoded.words must have shape [12, 2]; got [11,"),
        ("words", lambda t: t.long(), TypeError, "encoded.words must be torch.int32; got tor"),
        ("window", lambda t: t[:, :1], ValueError, "encoded.window must have shape [12, 2]; got"),
        ("window", lambda t: t[:0], ValueError, "encoded must be made for the surrogate"),
        ("counts", lambda t: t.float(), TypeError, "encoded.counts must be torch.int64; got tor"),
        ("counts", lambda t: t[1:], ValueError, "encoded.counts must have shape [40]; got [39]"),
        ("n_rows", int, TypeError, "encoded.n_rows must be a tensor; got int"),
        ("words", _column_63, ValueError, "encoded.words must have no bits past column 40; some"),
        ("window", _column_63, ValueError, "encoded.window must have no bits past column 40; so"),
    ],
)
def test_encoded_rows_of_another_shape_or_dtype(bae, x, field, change, error, said):
    encoded = bae.encode_rows(x)
    with refused(error, said):
        bae(x, encoded=encoded._replace(**{field: change(getattr(encoded, field))}))
    with refused(TypeError, "encoded must be what encode_rows gave; got tuple"):
        bae(x, encoded=tuple(encoded))


@pytest.mark.parametrize("surrogates", [(), ("step",), ("rectangle", "step")])
def test_a_warm_up_of_unknown_surrogates(surrogates):
    with refused(ValueError, "surrogates must name some of ", f"got {list(surrogates)}"):
        bf.warmup("torch", surrogates=surrogates)


def test_an_unknown_impl_in_the_environment(parameters, x, monkeypatch):
    monkeypatch.setenv("BAE_FAST_IMPL", "numpy")
    with refused(ValueError, f"BAE_FAST_IMPL must be one of {IMPLS}", "got 'numpy'"):
        bf.binary_autoencoder(x, **parameters)
    bf.binary_autoencoder(x, **parameters, impl="torch")  # the argument comes first


def unavailable(name: str) -> bool:
    return bf.info()["backends"][name] != "available"


@pytest.mark.parametrize("impl", ["cpp", "triton", "cuda"])
@pytest.mark.parametrize("by_environment", [False, True], ids=["argument", "environment"])
def test_an_explicit_impl_that_is_not_available_says_so_and_never_falls_back(
    parameters, x, impl, by_environment, monkeypatch
):
    if not unavailable(impl):
        pytest.skip(f"{impl} is available here")
    options = {"impl": impl}
    if by_environment:
        monkeypatch.setenv("BAE_FAST_IMPL", impl)
        options = {}
    for call in (
        lambda: bf.binary_autoencoder(x, **parameters, **options),
        lambda: bf.encode(x, parameters["W_enc"], parameters["b_enc"], **options),
        lambda: bf.BinaryAutoencoder(D, F, **options)(x),
    ):
        with refused(bf.BackendUnavailableError, f"impl={impl!r} cannot serve", "cpu"):
            call()


@pytest.mark.parametrize("text", ["lots", "-1", "1.5"])
@pytest.mark.parametrize("name", ["BAE_FAST_SCRATCH_MB", "BAE_FAST_SIGN_PLANES_MB"])
def test_a_budget_in_the_environment_that_is_no_number(parameters, x, name, text, monkeypatch):
    monkeypatch.setenv(name, text)
    with refused(ValueError, f"{name} must be an integer >= 0, in MiB", f"got {text!r}"):
        bf.binary_autoencoder(x, **parameters, covariance=True, impl="torch")


# -- masks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (torch.ones(12), "torch.float32 [12]"),
        (torch.ones(12, dtype=torch.int64), "torch.int64 [12]"),
        (torch.ones(11, dtype=torch.bool), "torch.bool [11]"),
        (torch.ones(12, 1, dtype=torch.bool), "torch.bool [12, 1]"),
        (torch.ones(12, dtype=torch.bool, device="meta"), "on meta"),
    ],
)
def test_a_mask_of_the_wrong_dtype_shape_or_device(bae, parameters, x, mask, got):
    for call in (
        lambda: bae(x, mask=mask),
        lambda: bae.encode(x, mask=mask),
        lambda: bf.binary_autoencoder(x, **parameters, mask=mask),
    ):
        with refused(ValueError, "mask must be bool [12] on cpu", got):
            call()


def test_a_mask_that_is_no_tensor(bae, x):
    for call in (bae, bae.encode):
        with refused(TypeError, "mask must be a bool tensor", "got list"):
            call(x, mask=[True] * 12)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_mask_that_drops_every_row(parameters, x, impl):
    mask = torch.zeros(12, dtype=torch.bool)
    with refused(ValueError, "mask must keep at least one of the rows that are counted", "none"):
        bf.binary_autoencoder(x, **parameters, mask=mask, impl=impl)
    with refused(ValueError, "covariance needs at least 2 rows", "got 0"):
        code = bf.encode(x, parameters["W_enc"], parameters["b_enc"], mask=mask, impl=impl)
        code.statistics(covariance=True)


# -- covariance and statistics -----------------------------------------------------------------


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_the_covariance_of_one_row(parameters, x, impl):
    with refused(ValueError, "covariance needs at least 2 rows", "got N=1"):
        bf.binary_autoencoder(x[:1], **parameters, covariance=True, impl=impl)
    assert bf.binary_autoencoder(x[:1], **parameters, impl=impl).entropy.isfinite()


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_the_covariance_of_one_kept_row(parameters, x, impl):
    mask = torch.arange(12) == 3
    with refused(ValueError, "covariance needs at least 2 rows", "got 1"):
        bf.binary_autoencoder(x, **parameters, mask=mask, covariance=True, impl=impl)


def test_the_covariance_statistics_of_one_row(bae, x):
    with refused(ValueError, "covariance needs at least 2 rows", "got N=1"):
        bae.encode(x[:1]).statistics(covariance=True)


def test_the_limit_of_the_covariance_is_exactly_where_int64_ends():
    from bae_fast.codes import check_covariance_size

    check_covariance_size(2**16, 92681, "cuda")  # (F N)^2 / 4 just below 2^63
    with refused(ValueError, "(F N)^2 / 4 < 2^63 on cuda", "N=65536", "F=92682"):
        check_covariance_size(2**16, 92682, "cuda")
    assert (2**16 * 92681) ** 2 < 2**65 <= (2**16 * 92682) ** 2
    check_covariance_size(2**16, 92682)  # on a CPU the ones decide


def test_a_covariance_whose_sum_may_leave_int64_is_refused_for_its_ones():
    from bae_fast.ops.limits import check_numerator, fits_any

    # rows that are one row in memory, so nothing of this size is made; with fewer any ones may be
    n, k = 92_682, 2**16
    assert fits_any(n - 1, k)
    row = torch.full((1, k // 32), -1, dtype=torch.int32)
    counts, total = torch.full((k,), n), torch.tensor(n)
    with refused(ValueError, "N sum(l^2) + (sum n)^2 < 2^63", f"N={n}", f"F={k} columns"):
        check_numerator(row.expand(n, -1), counts, total)
    one = torch.zeros(1, k // 32, dtype=torch.int32)
    one[0, 5] = 1 << 3
    counts = torch.zeros(k, dtype=torch.int64)
    counts[5 * 32 + 3] = n
    check_numerator(one.expand(n, -1), counts, total)


def test_statistics_of_other_columns_or_without_covariance(bae, x):
    stats = bae.encode(x).statistics()
    with refused(ValueError, "stats", "statistics(covariance=True)"):
        bae(x, covariance=True, stats=stats)
    other = bf.BinaryAutoencoder(D, F + 1).encode(x).statistics()
    with refused(ValueError, "stats.counts must have shape [40]", "got [41]"):
        bae(x, stats=other)
    with refused(ValueError, "past.counts must have shape [40]", "got [41]"):
        bae(x, past=other)
    with refused(ValueError, "stats and past must not both be given"):
        bae(x, stats=stats, past=stats)


def test_a_code_of_other_features(bae, x):
    code = bf.BinaryAutoencoder(D, F + 1).encode(x)
    with refused(ValueError, "code must have 40 features", "got 41"):
        bae.decode(code)
    with refused(ValueError, "code must have shape [..., 40]", "got [12, 41]"):
        bae.decode(code.values())
    with refused(TypeError, "must be floating point", "torch.bool"):
        bae.decode(code.to_dense())


# -- files -------------------------------------------------------------------------------------


@pytest.fixture
def folder(bae, tmp_path):
    return bae.save_pretrained(tmp_path / "model")


def load(folder):
    return bf.BinaryAutoencoder.from_pretrained(folder)


def change_config(folder, **changes):
    path = folder / "cfg.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def change_weights(folder, changes, keep_header=True):
    path = folder / "sae_weights.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        # the checksums are those of the tensors before
        header = {k: v for k, v in file.metadata().items() if k != "bae_fast.crc32"}
    tensors = {**safetensors.torch.load_file(path), **changes}
    tensors = {name: t.clone() for name, t in tensors.items() if t is not None}
    safetensors.torch.save_file(tensors, path, header if keep_header else None)


@pytest.mark.parametrize("name", ["W_enc", "b_dec", "x_scale"])
def test_a_bit_that_has_changed_in_weights_is_found(folder, name):
    path = folder / "sae_weights.safetensors"
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    place = json.loads(data[8 : 8 + size])[name]["data_offsets"][1] - 4
    data[8 + size + place] ^= 1  # the last bit of a number
    path.write_bytes(data)
    with refused(ValueError, str(path), f"is damaged: the checksum of {name}"):
        load(folder)


def test_weights_without_checksums_are_read(folder, bae):
    change_weights(folder, {})
    for name, tensor in load(folder).state_dict().items():
        assert torch.equal(tensor, bae.state_dict()[name])


@pytest.mark.parametrize("sums", ["3", "{", '{"W_enc": "a"}'])
def test_checksums_of_another_kind_are_refused(folder, sums):
    path = folder / "sae_weights.safetensors"
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        header = {**file.metadata(), "bae_fast.crc32": sums}
    safetensors.torch.save_file(tensors, path, header)
    with refused(ValueError, str(path), "checksum"):
        load(folder)


def test_a_bit_that_has_changed_in_a_saved_code_is_found(bae, tmp_path):
    code = bae.encode(torch.randn(12, bae.d_in))
    path = code.save(tmp_path / "code.safetensors", {"from": "here"})
    assert bf.BinaryCode.load(path) == code
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    with refused(ValueError, str(path), "is damaged: the checksum of "):
        bf.BinaryCode.load(path)


def test_a_folder_that_does_not_exist(tmp_path):
    with refused(FileNotFoundError, "folder", "nowhere", "does not exist"):
        load(tmp_path / "nowhere")


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "file").touch()
    with refused(FileNotFoundError, "folder", "file is a file"):
        load(tmp_path / "file")
    for wrong in (None, 3):
        with refused(TypeError, f"folder must be a path; got {wrong}"):
            load(wrong)


def test_a_configuration_of_a_windows_editor_is_read(folder):
    path = folder / "cfg.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    load(folder)


def test_a_configuration_nested_too_deeply(folder):
    (folder / "cfg.json").write_text("[" * 100_000)
    with refused(ValueError, "cfg.json is not valid JSON"):
        load(folder)


def test_the_users_home_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert bf.BinaryAutoencoder(8, 16).save_pretrained("~/my model") == tmp_path / "my model"
    assert load("~/my model").config.d_sae == 16


def test_an_empty_folder(tmp_path):
    with refused(FileNotFoundError, "sae_weights.safetensors", "does not exist"):
        load(tmp_path)


def test_a_folder_without_weights(folder):
    (folder / "sae_weights.safetensors").unlink()
    with refused(FileNotFoundError, "sae_weights.safetensors", "does not exist"):
        load(folder)


def test_the_folder_of_a_run_whose_model_lies_in_a_folder_of_its_own(tmp_path):
    bf.BinaryAutoencoder(8, 16).save_pretrained(tmp_path / "run" / "bae")
    place = str(tmp_path / "run" / "bae")
    with refused(FileNotFoundError, "sae_weights.safetensors does not exist", place, "a model"):
        load(tmp_path / "run")


def test_foreign_weights_without_a_config(folder):
    (folder / "cfg.json").unlink()
    change_weights(folder, {}, keep_header=False)
    with refused(FileNotFoundError, "cfg.json", "does not exist"):
        load(folder)


@pytest.mark.parametrize("text", ["", "{", "not json", "\x00\x01", "{'d_in': 6}"])
def test_a_config_that_is_not_json(folder, text):
    (folder / "cfg.json").write_text(text)
    with refused(ValueError, "cfg.json is not valid JSON"):
        load(folder)


def test_a_config_that_is_not_text(folder):
    (folder / "cfg.json").write_bytes(b"\xff\xfe\x80")
    with refused(ValueError, "cfg.json is not valid JSON"):
        load(folder)


@pytest.mark.parametrize(("text", "kind"), [("[1, 2]", "list"), ("3", "int"), ("null", "NoneType")])
def test_a_config_that_is_no_object(folder, text, kind):
    (folder / "cfg.json").write_text(text)
    with refused(ValueError, "cfg.json must hold a JSON object", f"got {kind}"):
        load(folder)


@pytest.mark.parametrize("other", ["standard", "jumprelu", None, ..., 3])
def test_a_config_of_another_architecture(folder, other):
    change_config(folder, architecture=other)
    got = None if other is ... else other
    with refused(ValueError, "architecture 'binary_autoencoder'", f"got {got!r}"):
        load(folder)


KEYS = (
    "d_in", "d_sae", "d_out", "n_bits", "surrogate", "surrogate_width", "covariance", "preset",
    "metadata",
)  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_a_config_that_lacks_a_key(folder, key):
    change_config(folder, **{key: ...})
    with refused(ValueError, "cfg.json", f"lacks {key!r}"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("d_in", "6", "int"),
        ("d_in", 6.0, "int"),
        ("d_in", True, "int"),
        ("d_in", 0, "int >= 1"),
        ("d_sae", -1, "int >= 1"),
        ("d_out", None, "int"),
        ("n_bits", 17, "at most 16"),
        ("surrogate", 1, "str"),
        ("surrogate", "hard", "identity, official, sigmoid, rectangle"),
        ("surrogate_width", "wide", "float"),
        ("surrogate_width", -1.0, "positive finite number"),
        ("covariance", 1, "bool"),
        ("preset", "dense", "sparse, paper"),
        ("metadata", [1], "dict"),
        ("transcoder", "no", "bool"),
    ],
)
def test_a_config_with_a_bad_value(folder, key, value, allowed):
    change_config(folder, **{key: value})
    with refused(ValueError, "cfg.json", key, allowed, repr(value)):
        load(folder)


@pytest.mark.parametrize("key", ["d_in", "d_sae", "n_bits"])
def test_a_config_whose_sizes_do_not_fit_the_weights(folder, key):
    change_config(folder, **{key: 5})
    with refused(ValueError, "sae_weights.safetensors", "must be floating point", "; got"):
        load(folder)


def test_a_config_with_sizes_no_memory_could_hold(folder):
    change_config(folder, d_in=2**40, d_sae=2**40)
    with refused(ValueError, "cfg.json", "n_bits x d_sae x d_in", "below 2^56"):
        load(folder)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, -1, -40])
def test_truncated_weights(folder, size):
    path = folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with refused(ValueError, "sae_weights.safetensors is not a readable safetensors file"):
        load(folder)


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04 a zip file", b"\x80\x02 a pickle" * 10, b"\xff" * 200, b"\x00" * 200]
)
def test_weights_of_another_format(folder, content):
    (folder / "sae_weights.safetensors").write_bytes(content)
    with refused(ValueError, "sae_weights.safetensors is not a readable safetensors file"):
        load(folder)


def test_weights_that_are_a_folder(folder):
    path = folder / "sae_weights.safetensors"
    path.unlink()
    path.mkdir()
    with refused(FileNotFoundError, "sae_weights.safetensors"):
        load(folder)


def test_weights_with_an_extra_tensor(folder):
    change_weights(folder, {"threshold": torch.zeros(F)})
    with refused(ValueError, "must hold ['W_dec', 'W_enc'", "'threshold'"):
        load(folder)


@pytest.mark.parametrize("name", ["W_enc", "b_dec", "x_mean", "x_scale"])
def test_weights_that_lack_a_tensor(folder, name):
    change_weights(folder, {name: None})
    with refused(ValueError, "sae_weights.safetensors must hold", f"'{name}'"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("W_enc", torch.zeros(F, D), ("[6, 40]", "got torch.float32 [40, 6]")),
        ("b_enc", torch.zeros(F + 1), ("[40]", "got torch.float32 [41]")),
        ("x_scale", torch.zeros(1), ("[]", "got torch.float32 [1]")),
        ("W_dec", torch.zeros(F, D, dtype=torch.int32), ("floating point", "got torch.int32")),
    ],
)
def test_weights_of_the_wrong_shape_or_dtype(folder, name, tensor, words):
    change_weights(folder, {name: tensor})
    with refused(ValueError, f"{name} must be", *words):
        load(folder)


def test_weights_of_several_dtypes(folder):
    change_weights(folder, {"W_dec": torch.zeros(F, D, dtype=torch.float64)})
    with refused(ValueError, "sae_weights.safetensors", "one dtype", "torch.float64"):
        load(folder)


def test_a_foreign_autoencoder_of_the_same_tensor_names(folder):
    """A SAELens model has the same names; its config says another architecture."""
    change_weights(folder, {"x_mean": None, "x_scale": None}, keep_header=False)
    change_config(folder, architecture="standard", save_id=...)
    with refused(ValueError, "architecture 'binary_autoencoder'", "got 'standard'"):
        load(folder)


@pytest.mark.parametrize("text", ["{", "[]", '"x"', '{"save_id": 1}'])
def test_weights_whose_header_holds_a_bad_configuration(folder, text):
    path = folder / "sae_weights.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {"config": text})
    if text in ("[]", '"x"'):  # no configuration at all: that of cfg.json counts
        load(folder)
        return
    with refused(ValueError, "sae_weights.safetensors"):
        load(folder)


def test_a_saved_code_is_no_model(bae, folder, x):
    bae.encode(x).save(folder / "sae_weights.safetensors")
    with refused(ValueError, "sae_weights.safetensors must hold", "'words'"):
        load(folder)


def test_a_saved_model_is_no_code(folder):
    with refused(ValueError, "is not a saved BinaryCode"):
        bf.BinaryCode.load(folder / "sae_weights.safetensors")


def test_bad_code_files(bae, tmp_path, x):
    path = bae.encode(x).save(tmp_path / "code.safetensors")
    with refused(FileNotFoundError, "nothing.safetensors does not exist"):
        bf.BinaryCode.load(tmp_path / "nothing.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with refused(ValueError, "code.safetensors is not a readable safetensors file"):
        bf.BinaryCode.load(path)
    header = {"format": "bae_fast.binary_code", "version": "2", "n_columns": "40", "n_bits": "1"}
    words = torch.zeros(3, 2, dtype=torch.int32)
    for changes, told in (
        ({}, "has version '2'"),
        ({"version": "1", "n_columns": "many"}, "code.safetensors"),
        ({"version": "1", "n_columns": "400"}, "code.safetensors"),
    ):
        safetensors.torch.save_file({"words": words}, path, {**header, **changes})
        with refused(ValueError, told):
            bf.BinaryCode.load(path)
    for text in ("", "[]", "3"):
        safetensors.torch.save_file({"words": words}, path, {**header, "metadata": text})
        with refused(ValueError, "code.safetensors holds metadata that is no JSON object"):
            bf.BinaryCode.read_metadata(path)


def test_loading_never_writes(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    load(copy)
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {
        p.name: p.read_bytes() for p in folder.iterdir()
    }
