"""Orthogonal matching pursuit in the dictionary of a trained sparse autoencoder."""

import math

import pytest
import torch

from bae_fast.analysis import evaluate
from bae_fast.baselines import PursuedAutoencoder, make_baseline
from bae_fast.training import SparseConfig, Trainer

D, F = 24, 40


def rows_of(directions, n, k=3):
    """Rows of k features each, with values from 1 to 2, and these features."""
    features = torch.zeros(n, len(directions), dtype=directions.dtype)
    at = torch.rand(n, len(directions)).topk(k, dim=1).indices
    features.scatter_(1, at, 1 + torch.rand(n, k, dtype=directions.dtype))
    return features @ directions, features


def model(method="topk", dtype=torch.float64, k=3):
    torch.manual_seed(0)
    made = make_baseline(method, D, F, k=k, dtype=dtype)
    x, _ = rows_of(made.W_dec.detach(), 400)
    made.fit_normalization_(x)
    with torch.no_grad():  # b_dec in its place, so that features are those of the raw rows
        made.b_dec.copy_(-made.x_mean / made.x_scale)
    return made


def pursued_by_hand(row, directions, k):
    """One row, with the solver of least squares."""
    left, taken = row.clone(), []
    for _ in range(k):
        score = directions @ left
        score[taken] = -torch.inf
        taken.append(int(score.argmax()))
        values = torch.linalg.lstsq(directions[taken].T, row[:, None]).solution[:, 0]
        left = row - values @ directions[taken]
    return taken, values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_features_of_few_directions_are_found_with_their_values(dtype):
    made = model(dtype=dtype)
    x, features = rows_of(made.W_dec.detach(), 50)
    found = PursuedAutoencoder(made, 3).encode(x)
    right = ((found > 0) == (features > 0)).all(1)
    assert right.float().mean() > 0.8  # it is greedy
    values = found[right] * made.x_scale
    assert torch.allclose(values, features[right], rtol=2e-3)
    assert found.dtype == dtype


def test_it_takes_what_the_method_says_row_by_row():
    made = model()
    x = torch.randn(30, D, dtype=torch.float64)
    found = PursuedAutoencoder(made, 5).encode(x)
    rows = made.normalize(x) - made.b_dec
    agree = 0
    for row, values in zip(rows, found.detach(), strict=True):
        taken, best = pursued_by_hand(row, made.W_dec.detach(), 5)
        assert set(values.nonzero().flatten().tolist()) <= set(taken)
        if (best > 0).all():  # else the values are of a smaller set
            agree += 1
            assert torch.allclose(values[taken], best, rtol=1e-2, atol=1e-3)
    assert agree > 10
    assert (found >= 0).all()


def test_values_that_would_be_negative_are_left_out_and_the_others_fitted_without_them():
    made = model()
    x = torch.randn(200, D, dtype=torch.float64)
    found = PursuedAutoencoder(made, 12).encode(x).detach()
    directions, cuts = made.W_dec.detach(), 0
    for row, values in zip((made.normalize(x) - made.b_dec).detach(), found, strict=True):
        taken, best = pursued_by_hand(row, directions, 12)
        if (best > 0).all() or not set(values.nonzero().flatten().tolist()) <= set(taken):
            continue
        cuts += 1
        left = row - values @ directions
        assert left.norm() < (row - best.clamp_min(0) @ directions[taken]).norm()
        # the optimum without negative ones: nothing is gained by more or less of any
        slope = directions[taken] @ left
        assert slope[values[taken] > 1e-3].abs().max() < 5e-2 * row.norm()
        assert slope.max() < 5e-2 * row.norm()
    assert cuts > 10


def test_directions_have_unit_norm_whatever_the_models_have():
    made = model()
    x, found = torch.randn(20, D, dtype=torch.float64), PursuedAutoencoder(made, 3)
    with torch.no_grad():
        made.W_dec.mul_(torch.linspace(0.5, 2, F, dtype=torch.float64)[:, None])
    assert torch.allclose(PursuedAutoencoder(made, 3).encode(x), found.encode(x))


def test_a_fit_gives_the_bias_too_and_keeps_directions_that_no_row_has():
    made = model()
    x = made.W_dec.detach()[torch.arange(200) % 6] * torch.linspace(1, 2, 200)[:, None].double()
    x = x + 0.05  # which the bias does not have
    found = PursuedAutoencoder(made, 1)
    before, off = found.W_dec.clone(), found.b_dec.clone()
    rows, values = found.normalize(x), found.encode(x).detach()
    used = values.any(0)
    assert 6 <= int(used.sum()) < F
    found.fit_(x, ridge=1e-9)
    design = torch.cat([values[:, used], torch.ones(200, 1, dtype=x.dtype)], 1)
    expected = torch.linalg.lstsq(design, rows).solution
    assert torch.allclose(found.b_dec, expected[-1], atol=1e-4)
    assert not torch.allclose(found.b_dec, off, atol=1e-9)
    assert torch.equal(found.W_dec[~used], before[~used])


def test_no_feature_is_taken_twice():
    made = model()
    x = made.W_dec.detach()[:5] * 3
    found = PursuedAutoencoder(made, 4).encode(x) * made.x_scale
    assert torch.allclose(found[:, :5], 3 * torch.eye(5, dtype=x.dtype), atol=2e-3)
    assert (found[:, 5:] < 2e-3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_round_the_equations(dtype):
    made = model().to(dtype)
    x, pursued = torch.randn(20, D, dtype=dtype), PursuedAutoencoder(made, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pursued.encode(x)
    assert found.dtype == dtype
    assert torch.equal(found, pursued.encode(x))


def test_fewer_errors_than_the_encoder_and_fewer_still_when_fitted():
    made = model(k=4)
    with torch.no_grad():  # a dictionary that is off
        noise = 0.1 * torch.randn(F, D, dtype=torch.float64)
        made.W_dec.copy_(torch.nn.functional.normalize(made.W_dec + noise, dim=1))
    truth = model(k=4).W_dec.detach()
    train, held = rows_of(truth, 3000)[0], rows_of(truth, 500)[0]
    found = PursuedAutoencoder(made, 4).eval()
    first = evaluate(found, held)
    assert first.fvu < 0.7 * evaluate(made.eval(), held).fvu
    assert first.l0 <= 4
    assert found.fit_(train) is found
    assert evaluate(found, held).fvu < 0.7 * first.fvu
    assert torch.allclose(found.W_dec.norm(dim=1), torch.ones(F, dtype=torch.float64))


def test_directions_are_learned_with_the_values_that_are_found():
    made = model(k=4, dtype=torch.float32)
    truth = made.W_dec.detach().clone()
    with torch.no_grad():  # a dictionary that is off
        made.W_dec.add_(0.1 * torch.randn(F, D))
    train, held = rows_of(truth, 3000)[0], rows_of(truth, 500)[0]
    found = PursuedAutoencoder(made, 8, bit_price=1e-3, rows=train)
    found.fit_density_(train)
    first, before = evaluate(found.eval(), held), found.W_dec.clone()
    config = SparseConfig(steps=150, batch_size=256, lr=3e-3, precision="float32")
    Trainer(found.train(), train, config).fit()
    last = evaluate(found.eval(), held)
    assert last.fvu < 0.5 * first.fvu
    assert last.l0 < first.l0 + 0.5
    assert torch.allclose(found.W_dec.norm(dim=1), torch.ones(F), atol=1e-5)
    # nearer to the directions that rows are made of
    assert (found.W_dec @ truth.T).amax(1).mean() > (before @ truth.T).amax(1).mean() + 0.02


def test_the_slope_of_its_training_is_that_of_the_error_with_values_held_fixed():
    made = model()
    found = PursuedAutoencoder(made, 3)
    x = torch.randn(50, D, dtype=torch.float64)
    dead = torch.zeros(F, dtype=torch.bool)
    loss, parts, counts = found.training_loss(x, None, dead=dead, done=0.0)
    loss.backward()
    values = found.encode(x)
    error = (found.normalize(x) - values @ found.W_dec - found.b_dec).detach()
    assert loss.item() == pytest.approx(error.square().mean().item())
    assert parts["mse"].item() == loss.item()
    assert torch.equal(counts, (values > 0).sum(0))
    assert torch.allclose(found.W_dec.grad, -2 * values.T @ error / error.numel())
    assert torch.allclose(found.b_dec.grad, -2 * error.sum(0) / error.numel())


def test_shares_that_price_features_are_those_of_the_features_found():
    made = model()
    train, _ = rows_of(made.W_dec.detach(), 400)
    found = PursuedAutoencoder(made, 12, bit_price=1e-2, rows=train)
    on = (found.encode(train) > 0).sum(0)
    assert found.fit_density_(train) is found
    assert torch.allclose(found.density, (on.double() + 0.5) / 401)
    with pytest.raises(ValueError, match=r"rows must have shape \[n, 24\]"):
        found.fit_density_(train[:, 1:])


def test_leading_dimensions_and_a_metric_are_kept():
    made = model()
    x = torch.randn(6, D, dtype=torch.float64)
    found = PursuedAutoencoder(made, 3)
    assert found.encode(x.view(2, 3, D)).shape == (2, 3, F)
    metric = torch.linspace(0.5, 2, D, dtype=torch.float64)
    made.fit_normalization_(rows_of(made.W_dec.detach(), 400)[0], metric=metric)
    weighted = PursuedAutoencoder(made, 3)
    assert not weighted.encode(x).equal(found.encode(x))
    assert torch.allclose(weighted.normalize(x), made.normalize(x))


def test_what_it_cannot_take_is_refused():
    made = model()
    with pytest.raises(TypeError, match="model must be a SparseAutoencoder; got Linear"):
        PursuedAutoencoder(torch.nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="model must be no transcoder"):
        PursuedAutoencoder(make_baseline("transcoder", D, F, k=2, d_out=D), 2)
    for k in (0, F + 1, 1.5, True):
        with pytest.raises(ValueError, match="k must be an int from 1 to 40"):
            PursuedAutoencoder(made, k)
    with pytest.raises(ValueError, match="x must hold at least 40 rows; got 39"):
        PursuedAutoencoder(made, 2).fit_(torch.randn(39, D))
    bad = torch.full((50, D), torch.inf, dtype=torch.float64)
    found = PursuedAutoencoder(made, 2)
    with pytest.raises(ValueError, match="x must be finite; it holds NaN or Inf"):
        found.fit_(bad)
    assert found.W_dec.isfinite().all()


def test_with_a_price_a_row_takes_what_is_worth_its_bits():
    made = model()
    train, _ = rows_of(made.W_dec.detach(), 400)
    x = torch.randn(30, D, dtype=torch.float64)
    price, value_bits = 2e-2, 1.5
    found = PursuedAutoencoder(made, 12, bit_price=price, rows=train, value_bits=value_bits)
    p = (made.activations(train) > 0).double().mean(0)
    p = (p * 400 + 0.5) / 401
    cost = price * D * (((1 - p) / p).log2().clamp_min(0) + value_bits)
    rows, directions = (made.normalize(x) - made.b_dec).detach(), made.W_dec.detach()
    sizes = set()
    for row, values in zip(rows, found.encode(x), strict=True):
        left, taken = row.clone(), []
        while len(taken) < 12:
            score = (directions @ left).clamp_min(0).square() - cost
            score[taken] = -torch.inf
            if score.max() <= 0:
                break
            taken.append(int(score.argmax()))
            best = torch.linalg.lstsq(directions[taken].T, row[:, None]).solution[:, 0]
            left = row - best @ directions[taken]
        assert set(values.nonzero().flatten().tolist()) <= set(taken)
        sizes.add(len(taken))
    assert len(sizes) > 2  # rows differ in how many they take


def test_a_higher_price_gives_fewer_features_and_a_larger_error():
    made = model()
    train, held = rows_of(made.W_dec.detach(), 2000)[0], rows_of(made.W_dec.detach(), 300)[0]
    l0, fvu = [], []
    for price in (1e-3, 1e-2, 5e-2, 10.0):
        pursued = PursuedAutoencoder(made, 12, bit_price=price, rows=train).eval()
        found = evaluate(pursued.fit_(train), held)
        l0.append(found.l0)
        fvu.append(found.fvu)
        share = (pursued.encode(train) > 0).double().mean(0)
        assert torch.allclose(pursued.density, share, atol=0.1)
    assert l0 == sorted(l0, reverse=True)
    assert l0[-1] == 0
    assert fvu == sorted(fvu)
    with pytest.raises(ValueError, match="rows must be given with a bit_price"):
        PursuedAutoencoder(made, 3, bit_price=1e-3)
    for bad in (-1, math.nan, "dear", True):
        with pytest.raises(ValueError, match=f"bit_price must be a number >= 0; got {bad!r}"):
            PursuedAutoencoder(made, 3, bit_price=bad, rows=train)


@pytest.mark.parametrize("price", [0.0, 1e-2])
def test_a_row_that_is_not_finite_is_not_coded_as_zeros(price):
    made = model()
    train, _ = rows_of(made.W_dec.detach(), 400)
    pursued = PursuedAutoencoder(made, 3, bit_price=price, rows=train)
    spoiled = train[:5].clone()
    spoiled[2, 1] = math.nan
    found = pursued.encode(spoiled)
    assert found[2].isnan().any()
    others = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(found[others], pursued.encode(train[others]))
