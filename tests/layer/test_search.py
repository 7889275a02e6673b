"""Codes that are searched for: no flip of one bit improves them, whatever serves the search."""

import copy
import json
import pickle
import types
import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode

from bae_fast import BinaryAutoencoder, BinaryCode, SearchedAutoencoder
from bae_fast import search as searching
from bae_fast.analysis import evaluate
from bae_fast.autoencoder import load_autoencoder
from bae_fast.ops import registry
from bae_fast.packing import pack_rows, unpack_rows
from bae_fast.report.live import live_facts
from bae_fast.search import flip_bits
from bae_fast.training import Trainer, TrainingConfig, fit_search_

D, F = 6, 20


def rows(n=60, d=D, dtype=torch.float64):
    return (torch.randn(n, d, dtype=torch.float64) * 3 + 2).to(dtype)


def trained(dtype=torch.float64, n_bits=1, **options):
    """A fitted module with random weights, of which many flips improve a code."""
    bae = BinaryAutoencoder(D, F, n_bits=n_bits, dtype=dtype, **options)
    bae.fit_normalization_(rows(300, dtype=dtype))
    with torch.no_grad():
        bae.W_dec.copy_(torch.randn(F, D) / 2)
        bae.b_dec.copy_(torch.randn(D) / 4)
    return bae.init_density_(rows(300, dtype=dtype), 0.2)


def searched(dtype=torch.float64, bit_price=0.02, n_bits=1, **options):
    bae = trained(dtype, n_bits)
    return SearchedAutoencoder.of(bae, rows(200, dtype=dtype), bit_price=bit_price, **options)


def objective(model, x, bits):
    """What the search lowers, of dense bits ``[n, K]``, as the module's text has it, with
    ``dense_bits`` for each doubling of a share beyond 1/16."""
    code = BinaryCode.from_dense(bits, n_bits=model.n_bits)
    error = (model.normalize(x) - model.normalize(model.decode(code))).square().mean(1)
    share = model.density.double()
    dense = model.dense_bits * (16 * share).log2().clamp_min(0)
    cost = torch.where(bits, dense - share.log2(), -(1 - share).log2()).sum(1)
    return error.double() + model.bit_price * cost


@pytest.mark.parametrize("n_bits", [1, 3])
@pytest.mark.parametrize(("bit_price", "dense_bits"), [(0.0, 9), (0.02, 0), (0.02, 9), (0.5, 0)])
def test_no_flip_of_a_single_bit_improves_a_searched_code(n_bits, bit_price, dense_bits):
    model, x = searched(n_bits=n_bits, bit_price=bit_price, dense_bits=dense_bits), rows()
    bits = model.encode(x).to_dense(torch.bool)
    found = objective(model, x, bits)
    first = objective(model, x, BinaryAutoencoder.encode(model, x).to_dense(torch.bool))
    assert (found <= first + 1e-12).all()
    assert (found < first - 0.01).float().mean() > 0.5
    least = 2.0**-20 * float(model._products(model.W_dec)[0].diagonal().max())
    for column in range(bits.shape[1]):
        other = bits.clone()
        other[:, column] ^= True
        assert (objective(model, x, other) >= found - 2 * least - 1e-12).all(), column


def test_ones_that_cost_more_beyond_a_share_leave_fewer_dense_features():
    def densities(dense_bits):
        torch.manual_seed(0)
        model = searched(bit_price=0.05, dense_bits=dense_bits)
        return model.encode(rows(2000)).density()

    free, dear = densities(0.0), densities(12.0)
    assert (free > 0.15).sum() >= 8
    assert (dear > 0.15).sum() <= (free > 0.15).sum() // 2
    assert dear.max() < free.max() - 0.2


def test_each_flip_is_the_one_that_gains_most():
    model, x = searched(), rows(40)
    model.max_flips = 0
    bits = model.encode(x).to_dense(torch.bool)
    assert model.encode(x).equal(BinaryAutoencoder.encode(model, x))
    for flips in (1, 2, 3):
        model.max_flips = flips
        tried = bits[:, None] ^ torch.eye(F, dtype=torch.bool)
        values = torch.stack([objective(model, x, tried[:, j]) for j in range(F)], 1)
        best, at = values.min(1)
        better = best < objective(model, x, bits) - 1e-9
        bits[better, at[better]] ^= True
        assert torch.equal(model.encode(x).to_dense(torch.bool), bits)
        assert better.any()


# -- the kernels -------------------------------------------------------------------------------


def levels():
    if registry.BACKENDS["cpp"].unavailable is not None:
        return []
    from bae_fast.backends.cpp import extension

    found = [name for name, k in extension.LEVELS.items() if extension.op("simd")(k) >= 0]
    extension.use_simd(None)
    return found


@pytest.fixture(params=levels())
def at_level(request):
    from bae_fast.backends.cpp import extension

    extension.use_simd(request.param)
    yield request.param
    extension.use_simd(None)


def problem(n, k, d=9, whole=False):
    """Operands of a search for random rows; whole numbers tie often."""
    added, x = torch.randn(k, d), 4 * torch.randn(n, d)
    if whole:
        added, x = added.round(), x.round()
    bits = torch.rand(n, k) < 0.2
    gram = added @ added.T
    squares, price = gram.diagonal(), torch.rand(k).round(decimals=1 if whole else 8)
    projection = (x - bits.float() @ added) @ added.T
    return projection, gram, (price + squares) / 2, (price - squares) / 2, pack_rows(bits)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("n", "k"), [(5, 1), (7, 31), (6, 64), (9, 65), (40, 100), (3, 513), (0, 40)]
)
def test_kernels_flip_the_same_bits_as_plain_torch(at_level, n, k, whole):
    kernel = registry.BACKENDS["cpp"].extras.search
    arguments = problem(n, k, whole=whole)
    for most in (0, 1, 2, 500):
        words, flips = flip_bits(*arguments, most, 1e-3)
        got = kernel(arguments[0].clone(), *arguments[1:], most, 1e-3)
        assert torch.equal(got[0], words)
        assert torch.equal(got[1], flips)
    assert n < 3 or k < 30 or flips.sum() > n


@pytest.mark.parametrize("whole", [False, True])
def test_threads_share_the_rows_and_change_no_bit(at_level, whole):
    kernel = registry.BACKENDS["cpp"].extras.search
    arguments = problem(301, 130, whole=whole)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(kernel(arguments[0].clone(), *arguments[1:], 500, 1e-3))
    for words, flips in found[1:]:
        assert torch.equal(words, found[0][0])
        assert torch.equal(flips, found[0][1])


def test_rows_that_are_not_finite_keep_the_encoders_bits(at_level):
    kernel = registry.BACKENDS["cpp"].extras.search
    projection, *rest, words = problem(4, 70)
    projection[1], projection[2, 3], projection[3] = torch.nan, torch.nan, -torch.inf
    projection[2, 5] = torch.inf
    bits = unpack_rows(words, 70)
    bits[3] = False
    arguments = (projection, *rest, pack_rows(bits))
    words, flips = flip_bits(*arguments, 500, 1e-3)
    got = kernel(projection.clone(), *arguments[1:], 500, 1e-3)
    assert torch.equal(got[0], words)
    assert torch.equal(got[1], flips)
    assert flips.tolist()[1] == flips.tolist()[3] == 0
    assert flips[0] > 0


def test_a_float32_module_is_served_by_the_kernel_and_others_by_torch(monkeypatch):
    if not levels():
        pytest.skip("impl='cpp' cannot run here")
    used = []

    def spied(*arguments):
        used.append("torch")
        return flip_bits(*arguments)

    monkeypatch.setattr(searching, "flip_bits", spied)
    for dtype, by in ((torch.float32, []), (torch.float64, ["torch"]), (torch.bfloat16, [])):
        model = searched(dtype)
        used.clear()
        assert model.encode(rows(dtype=dtype)).shape == (60, F)
        assert used == by, dtype


# -- the module --------------------------------------------------------------------------------


def test_rows_may_have_any_leading_shape_and_be_masked():
    model, x = searched(), rows(24)
    code = model.encode(x)
    assert model.encode(x.view(2, 3, 4, D)).to_dense().flatten(0, -2).equal(code.to_dense())
    assert model.encode(x[0]).to_dense().equal(code[0].to_dense())
    mask = torch.arange(24) % 3 > 0
    masked = model.encode(x, mask=mask)
    assert masked[mask].to_dense().equal(code[mask].to_dense())
    assert not masked.to_dense(torch.bool)[~mask].any()
    assert masked.n_rows() == 16


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_that_is_not_finite_keeps_the_encoders_bits_and_changes_no_other(dtype, bad):
    model, x = searched(dtype), rows(dtype=dtype)
    found = model.encode(x).words
    x[3, 2] = bad
    words = model.encode(x).words
    assert torch.equal(words[3], BinaryAutoencoder.encode(model, x).words[3])
    assert torch.equal(words[torch.arange(60) != 3], found[torch.arange(60) != 3])
    model.check_finite = True
    with pytest.raises(ValueError, match="x must be finite"):
        model.encode(x)


def test_blocks_of_rows_change_no_bit(monkeypatch):
    model, x = searched(torch.float32), rows(50, dtype=torch.float32)
    mask = torch.rand(50) < 0.7
    whole, masked = model.encode(x), model.encode(x, mask=mask)
    monkeypatch.setattr(searching, "_CHUNK_ELEMENTS", 7 * F)
    assert model.encode(x).equal(whole)
    assert model.encode(x, mask=mask).equal(masked)


def test_a_module_that_searches_is_as_the_one_it_is_made_of():
    options = {"surrogate": "sigmoid", "surrogate_width": 0.7, "metadata": {"hook_name": "h"}}
    bae = trained(n_bits=2, preset="paper", covariance=False, **options)
    bae.fit_normalization_(rows(300), metric=torch.linspace(0.5, 2, D))
    bae.impl, bae.check_finite = "torch", True
    model = SearchedAutoencoder.of(bae, rows(), bit_price=0.1, dense_bits=3, max_flips=7)
    assert model.config == bae.config
    assert (model.impl, model.check_finite, model.training) == ("torch", True, False)
    assert (model.bit_price, model.dense_bits, model.max_flips) == (0.1, 3.0, 7)
    assert model.learned
    state = model.state_dict()
    assert state.keys() - bae.state_dict().keys() == {"density"}
    for name, tensor in bae.state_dict().items():
        assert torch.equal(state[name], tensor)
        assert state[name].data_ptr() != tensor.data_ptr()


def test_shares_are_those_of_codes_searched_with_the_shares_of_the_encoders():
    bae, x = trained(), rows(101)
    model = SearchedAutoencoder.of(bae, x, bit_price=0.1)
    shares = model.density.clone()
    for code in (bae.encode(x), model.encode):
        ones = (code if isinstance(code, BinaryCode) else code(x)).counts()
        model.density.copy_((ones + 0.5) / 102)
    assert torch.allclose(model.density, shares, rtol=1e-12)
    model.fit_density_(x)
    assert not torch.allclose(model.density, shares)


def test_the_layer_masks_rows():
    model, x = searched(), rows(30)
    mask = torch.arange(30) % 3 > 0
    out, code = model(x, mask=mask), model.encode(x, mask=mask)
    assert out.code.equal(code)
    assert torch.allclose(out.entropy, code.statistics().entropy())
    assert model(x, encoded=BinaryAutoencoder.encode_rows(model, x)).code.equal(
        BinaryAutoencoder.encode(model, x)
    )


def test_the_layer_decodes_and_counts_searched_codes():
    model, x = searched(), rows(30)
    model.train()
    out = model(x, covariance=True)
    code = model.encode(x)
    assert out.code.equal(code)
    assert torch.allclose(out.recon, model.decode(code))
    assert torch.allclose(out.entropy, code.statistics().entropy())
    model.mse(out, x).backward()
    values = code.values(torch.float64)
    error = model.normalize(out.recon.detach()) - model.normalize(x)
    assert torch.allclose(model.W_dec.grad, 2 * values.T @ error / x.numel())
    assert model.reconstruct(x).equal(out.recon)


def halve(model):
    with torch.no_grad():
        model.W_dec.mul_(0.5)


def halve_out_of_sight(model):
    model.W_dec.data.mul_(0.5)  # counts no version


def step_fused(model):
    model.W_dec.grad = torch.randn_like(model.W_dec)
    torch.optim.Adam([model.W_dec], lr=0.5, fused=True).step()  # counts none either


def load_other_weights(model):
    state = model.state_dict()
    model.load_state_dict({**state, "W_dec": state["W_dec"] * 0.5}, assign=True)


@pytest.mark.parametrize("change", [halve, halve_out_of_sight, step_fused, load_other_weights])
@pytest.mark.parametrize("n_bits", [1, 2])
def test_a_decoder_that_changes_is_searched_anew(change, n_bits):
    model, x = searched(n_bits=n_bits), rows()
    before = model.encode(x)
    change(model)
    after = model.encode(x)
    assert not after.equal(before)
    assert copy.deepcopy(model).encode(x).equal(after)


def test_a_decoder_that_is_computed_is_searched_as_it_is():
    model, x = searched(), rows()
    plain = copy.deepcopy(model)
    torch.nn.utils.parametrize.register_parametrization(model, "W_dec", torch.nn.Hardtanh(-9, 9))
    for scale in (1.0, 0.5, 2.0):
        for weight in (model.parametrizations.W_dec.original, plain.W_dec):
            weight.data.mul_(scale)
        assert model.encode(x).equal(plain.encode(x))


def test_a_module_of_another_dtype_is_searched_in_that_one():
    model, x = searched(), rows()
    for dtype in (torch.float64, torch.float32, torch.float64):
        model.to(dtype)
        model.encode(x.to(dtype))
        assert model._products(model.W_dec)[0].dtype == dtype


def test_a_bit_that_no_row_has_or_every_row_has_costs_as_in_65536_rows():
    model = searched()
    model.density[:4] = torch.tensor([0, 1, 2.0**-14, 0.5])
    costs = model.bits_of_ones(torch.float64)
    assert costs[:2].tolist() == pytest.approx([17, -17], abs=1e-4)
    assert costs[2:4].tolist() == pytest.approx([14, 0], abs=1e-4)


def test_a_gain_that_is_no_more_than_the_least_is_none():
    projection, gram = torch.tensor([[0.75, 0.75]]), torch.eye(2)
    on, off = torch.tensor([0.5, 0.25]), torch.zeros(2)
    arguments = (projection, gram, on, off, torch.zeros(1, 1, dtype=torch.int32))
    by = [flip_bits]
    if levels():
        by.append(registry.BACKENDS["cpp"].extras.search)
    for flip in by:
        for least, words in ((0.5, 0), (0.25, 2), (0.125, 3)):
            assert flip(projection.clone(), *arguments[1:], 5, least)[0].tolist() == [[words]]


def test_products_are_made_once_and_stay_out_of_copies_and_files():
    model = searched()
    model.encode(rows())
    gram = model._products(model.W_dec)[0]
    assert model._products(model.W_dec)[0] is gram
    assert copy.deepcopy(model)._pairs is None
    assert pickle.loads(pickle.dumps(model))._pairs is None
    assert model._products(model.W_dec)[0] is gram


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_does_not_round_the_search(dtype):
    model, x = searched(dtype), rows(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, found = BinaryAutoencoder.encode(model, x), model.encode(x)
    assert model._products(model.W_dec)[0].dtype == dtype
    assert torch.equal(model._searched(x, first.words, None), found.words)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_the_implementation_that_was_asked_for_searches(monkeypatch, impl):
    model, x = searched(torch.float32), rows(dtype=torch.float32)
    found, used = model.encode(x), []
    monkeypatch.setattr(searching, "flip_bits", lambda *a: used.append(impl) or flip_bits(*a))
    model.impl = impl
    assert model.encode(x).equal(found)
    assert used == [impl]


def test_it_encodes_in_inference_mode_and_trains_after_it():
    model, x = searched(), rows()
    with torch.inference_mode():
        made, code = copy.deepcopy(model), model.encode(x)
        assert made.encode(x).equal(code)
    assert made.encode(x).equal(code)  # weights that were made there count no versions
    model.train()
    model.mse(model(x), x).backward()
    assert model.W_dec.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_saved_and_loaded_whole(tmp_path, dtype):
    model, x = searched(dtype, bit_price=0.01, dense_bits=8, max_flips=9), rows(dtype=dtype)
    model.save_pretrained(tmp_path)
    for found in (load_autoencoder(tmp_path), SearchedAutoencoder.from_pretrained(tmp_path)):
        assert type(found) is SearchedAutoencoder
        assert (found.bit_price, found.dense_bits, found.max_flips) == (0.01, 8.0, 9)
        assert found.encode(x).equal(model.encode(x))


def test_a_file_without_a_price_of_dense_features_is_of_before_there_was_one(tmp_path):
    model = searched(max_flips=9)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "cfg.json").read_text())
    assert values.pop("dense_bits") == 0
    (tmp_path / "cfg.json").write_text(json.dumps(values))
    found, x = load_autoencoder(tmp_path), rows()
    assert found.dense_bits == 0
    assert found.encode(x).equal(model.encode(x))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("bit_price", None, "lacks 'bit_price'"),
        ("max_flips", None, "lacks 'max_flips'"),
        ("bit_price", "1", "bit_price must be a number >= 0; got '1'"),
        ("dense_bits", -1, "dense_bits must be a number >= 0; got -1"),
        ("max_flips", 1.5, "max_flips must be an int >= 0; got 1.5"),
    ],
)
def test_a_file_with_other_values_is_refused(tmp_path, name, value, says):
    searched().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "cfg.json").read_text())
    values.pop(name)
    if value is not None:
        values[name] = value
    (tmp_path / "cfg.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=says):
        load_autoencoder(tmp_path)


def test_a_file_of_a_module_that_does_not_search_says_how_one_is_made(tmp_path):
    trained().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"got 'binary_autoencoder': SearchedAutoencoder.of makes"):
        SearchedAutoencoder.from_pretrained(tmp_path)


def test_without_numbers_it_has_the_shapes():
    made = SearchedAutoencoder(D, F, device="meta")(torch.empty(5, D, device="meta"))
    with FakeTensorMode():
        faked = SearchedAutoencoder(D, F)(torch.empty(5, D))
    for out in (made, faked):
        assert (out.recon.shape, out.code.shape) == ((5, D), (5, F))


def test_compiled_it_finds_the_same_bits_without_a_warning():
    model, x = searched(torch.float32), rows(dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Dynamo detected a call")
        words = torch.compile(lambda x: model.encode(x).words, backend="eager")(x)
    assert torch.equal(words, model.encode(x).words)


def test_it_is_not_exported_without_its_search():
    with pytest.raises(RuntimeError, match="a search cannot be exported"):
        torch.export.export(searched(torch.float32).as_layer(), (rows(dtype=torch.float32),))


def test_pages_say_that_its_margins_are_the_encoders():
    named = {
        "margin": trained(),
        "encoder's margin": searched(),
        "activation": searched(n_bits=2),
    }
    for name, model in named.items():
        prompt = types.SimpleNamespace(model=model)
        assert live_facts(prompt, torch.ones(F), "a text")["value"] == name


def test_evaluation_takes_it_as_it_is():
    bae, x = trained(torch.float32), rows(400, dtype=torch.float32)
    model = SearchedAutoencoder.of(bae, x, bit_price=0.001)
    before, after = evaluate(bae.eval(), x), evaluate(model, x)
    assert after.fvu < 0.8 * before.fvu
    assert after.code.equal(model.encode(x))


def test_bad_arguments_are_refused():
    bae = trained()
    with pytest.raises(TypeError, match="bae must be a BinaryAutoencoder; got Linear"):
        SearchedAutoencoder.of(torch.nn.Linear(2, 2), rows())
    with pytest.raises(ValueError, match=r"rows must have shape \[n, 6\]; got \[60, 5\]"):
        SearchedAutoencoder.of(bae, rows(d=5))
    for price in (-1, float("nan"), float("inf"), True, "1"):
        with pytest.raises(ValueError, match="bit_price must be a number >= 0"):
            SearchedAutoencoder.of(bae, rows(), bit_price=price)
        with pytest.raises(ValueError, match="dense_bits must be a number >= 0"):
            SearchedAutoencoder.of(bae, rows(), dense_bits=price)
    for flips in (-1, 1.5, True):
        with pytest.raises(ValueError, match="max_flips must be an int >= 0"):
            SearchedAutoencoder.of(bae, rows(), max_flips=flips)
    with pytest.raises(ValueError, match="a search needs d_out=None"):
        SearchedAutoencoder(4, 8, d_out=4)
    assert SearchedAutoencoder(4, 2**14, n_bits=2, device="meta").density.shape == (2**15,)
    with pytest.raises(ValueError, match="n_bits x d_sae <= 32,768"):
        SearchedAutoencoder(4, 2**14, n_bits=3, device="meta")


# -- the decoder of searched codes -------------------------------------------------------------


def test_the_fitted_decoder_is_better_on_other_rows():
    torch.manual_seed(1)
    truth = torch.randn(F, D, dtype=torch.float64)

    def drawn(n):
        return (torch.rand(n, F) < 0.1).double() @ truth + 0.1 * rows(n)

    bae = trained()
    bae.fit_normalization_(drawn(2000))
    with torch.no_grad():
        bae.W_dec.copy_(truth / bae.x_scale * 0.8 + 0.05 * torch.randn(F, D))
        bae.W_enc.copy_(bae.W_dec.T)
    held = drawn(3000)
    model = SearchedAutoencoder.of(bae, drawn(2000), bit_price=0.003)
    before, density = evaluate(model, held).fvu, model.density.clone()
    train = drawn(4000)
    assert fit_search_(model, train) is model
    assert evaluate(model, held).fvu < 0.8 * before
    assert not model.density.equal(density)
    # codes searched with the shares have others, but little
    assert (model.density - model.encode(train).density()).abs().max() < 0.02


def test_a_training_with_searched_codes_is_better_than_a_fit_to_them():
    directions = torch.randn(12, 32)
    features = torch.randn(6000, 12).relu() * (torch.rand(6000, 12) < 0.3)
    x = features @ directions + 0.05 * torch.randn(6000, 32)
    train, held = x[:5000], x[5000:]
    config = TrainingConfig(steps=150, batch_size=256, precision="float32")
    bae = BinaryAutoencoder(32, 96).fit_normalization_(train)
    Trainer(bae, train, config).fit()
    price = 1e-3

    def cost(model):
        found = evaluate(model.eval(), held)
        return found.fvu + price * found.bits

    fitted = fit_search_(SearchedAutoencoder.of(bae, train, bit_price=price), train)
    trained_on = SearchedAutoencoder.of(bae, train, bit_price=price)
    Trainer(trained_on.train(), train, config.going_on()).fit()
    trained_on.fit_density_(train)
    assert cost(fitted) < cost(bae)
    assert cost(trained_on) < 0.9 * cost(fitted)


def test_rounds_and_ridge_are_those_asked_for():
    model, x = searched(), rows(200)
    more, flat = copy.deepcopy(model), copy.deepcopy(model)
    fit_search_(fit_search_(model, x), x)
    fit_search_(more, x, rounds=2)
    assert torch.equal(more.W_dec, model.W_dec)
    assert torch.equal(more.density, model.density)
    fit_search_(flat, x, ridge=1e6)
    assert flat.W_dec.abs().max() < 1e-4


def test_fitting_refuses_what_it_cannot_fit():
    model = searched()
    with pytest.raises(TypeError, match="searched must be a SearchedAutoencoder; got Binary"):
        fit_search_(trained(), rows())
    with pytest.raises(ValueError, match="x must hold at least 20 rows; got 19"):
        fit_search_(model, rows(19))
    with pytest.raises(ValueError, match="rounds must be an int >= 1; got 0"):
        fit_search_(model, rows(), rounds=0)
