"""The unit of each dimension: what training sees, files, folding, and every baseline."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch.testing import assert_close

import bae_fast as bf
from bae_fast.analysis.error_metric import metric_scales, parse_metric
from bae_fast.autoencoder import load_autoencoder
from bae_fast.baselines import METHODS, make_baseline
from bae_fast.pretrained import load_tensors_
from bae_fast.training import gather_features, shard_features

D, F = 12, 40


def rows(n: int = 300, seed: int = 0, width: int = D) -> torch.Tensor:
    """Dimensions of very different deviation, none centred."""
    generator = torch.Generator().manual_seed(seed)
    scales = 10.0 ** torch.linspace(-1, 2, width)
    return torch.randn(n, width, generator=generator) * scales + 5


def module(metric: torch.Tensor | None, **options) -> bf.BinaryAutoencoder:
    torch.manual_seed(0)
    x = rows()
    bae = bf.BinaryAutoencoder(D, F, **options).fit_normalization_(x, metric=metric)
    return bae.init_density_(x, 0.2).eval()


def test_without_a_metric_nothing_changes():
    bae, x = module(None), rows()
    assert bae.x_metric is None
    assert set(bae.state_dict()) == {"W_enc", "b_enc", "W_dec", "b_dec", "x_mean", "x_scale"}
    assert torch.equal(bae.normalize(x), (x - bae.x_mean) / bae.x_scale)


def test_rows_have_unit_mean_square_in_the_metric_and_errors_its_weights():
    x = rows()
    metric = x.std(0)
    bae = module(metric)
    z = bae.normalize(x)
    assert float(z.square().mean()) == pytest.approx(1, rel=1e-5)
    assert_close(z.square().mean(0), torch.ones(D), rtol=0.01, atol=0)
    assert_close(bae.denormalize(z), x, rtol=1e-5, atol=1e-4)
    # raw scale and usual norms are those of raw rows, whatever the metric
    assert_close(bae.x_scale, module(None).x_scale)
    assert bae.usual_norms() == module(None).usual_norms()
    out = bae(x)
    unit = bae.x_scale * bae.x_metric
    assert_close(bae.mse(out, x), ((x - out.recon) / unit).square().mean())
    # only ratios count
    again = module(7 * metric)
    assert_close(again.x_metric, bae.x_metric)


def test_it_is_division_before_and_multiplication_after():
    """A module with a metric is one without, on rows that were divided."""
    x = rows()
    metric = x.std(0).sqrt()
    with_metric = module(metric)
    torch.manual_seed(0)
    plain = bf.BinaryAutoencoder(D, F).fit_normalization_(x / metric)
    plain.init_density_(x / metric, 0.2).eval()
    assert_close(with_metric.normalize(x), plain.normalize(x / metric), rtol=1e-4, atol=1e-4)
    plain.load_state_dict(
        {**plain.state_dict(), "W_enc": with_metric.W_enc, "b_enc": with_metric.b_enc}
    )
    code = with_metric.encode(x)
    assert_close(with_metric.decode(code), plain.decode(code) * metric, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("n_bits", [1, 3])
def test_files_keep_it(tmp_path, n_bits):
    x = rows()
    bae = module(x.std(0), n_bits=n_bits)
    bae.save_pretrained(tmp_path)
    for again in (bf.BinaryAutoencoder.from_pretrained(tmp_path), load_autoencoder(tmp_path)):
        assert torch.equal(again.x_metric, bae.x_metric)
        assert again.encode(x).equal(bae.encode(x))
    assert "metric" not in json.loads((tmp_path / "cfg.json").read_text())


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_baseline_takes_it_and_keeps_it(tmp_path, method):
    torch.manual_seed(0)
    x = rows()
    options = {"d_out": 7} if method == "transcoder" else {}
    y = rows(width=7) if options else None
    target_metric = None if y is None else y.std(0)
    model = make_baseline(method, D, F, k=4, **options)
    model.fit_normalization_(x, y, metric=x.std(0), target_metric=target_metric).eval()
    z = model.normalize(x)
    assert_close(z.square().mean(0), torch.ones(D), rtol=0.01, atol=0)
    with torch.no_grad():
        found = model.training_loss(x, y, dead=None, done=0.5)
    assert torch.isfinite(found[0])
    model.save_pretrained(tmp_path)
    again = load_autoencoder(tmp_path)
    assert torch.equal(again.x_metric, model.x_metric)
    assert_close(again.decode(again.encode(x)), model.decode(model.encode(x)))
    if y is not None:
        assert torch.equal(again.y_metric, model.y_metric)


@pytest.mark.parametrize("n_bits", [1, 2])
def test_folding_changes_no_bit_and_no_reconstruction(n_bits):
    x = rows().double()
    bae = module(rows().std(0), n_bits=n_bits).double()
    before = bae.encode(x)
    recon = bae.decode(before)
    assert bae.fold_metric_(x) is bae
    assert bae.x_metric is None
    assert bae.encode(x).equal(before)
    assert_close(bae.decode(before), recon)
    assert bae.fold_metric_(x) is bae  # nothing to fold


def test_a_fold_that_would_change_a_bit_is_not_made(monkeypatch):
    x = rows()
    bae = module(x.std(0))
    kept = {name: tensor.clone() for name, tensor in bae.state_dict().items()}
    found = iter([bae.active(x), bae.active(x + 1)])
    monkeypatch.setattr(type(bae), "active", lambda self, rows: next(found))
    with pytest.raises(ValueError, match="every bit"):
        bae.fold_metric_(x)
    for name, tensor in bae.state_dict().items():
        assert torch.equal(tensor, kept[name]), name


@pytest.mark.parametrize(
    ("metric", "expected"),
    [("none", ("none", 0.0)), ("std", ("std", 1.0)), ("robust^0.5", ("robust", 0.5))],
)
def test_a_metric_is_a_kind_and_a_power(metric, expected):
    assert parse_metric(metric) == expected


def test_scales_are_what_their_names_say():
    x = rows(5001)
    assert metric_scales("none", x) is None
    std = x.double().std(0, correction=0)
    assert_close(metric_scales("std", x), std)
    assert_close(metric_scales("std^0.5", x), std.sqrt())
    x[:40] *= 1000  # outliers
    assert_close(metric_scales("robust", x), std, rtol=0.1, atol=0)
    square = torch.linspace(0.5, 2, D, dtype=torch.float64)
    assert_close(metric_scales("sensitivity", x, sensitivity=square), square.rsqrt())
    # a dimension that is constant, or that nothing reads, is not all that counts, nor nothing
    x[:, 0] = 3
    square[0] = 0
    assert float(metric_scales("std", x)[0]) > 0
    assert torch.isfinite(metric_scales("sensitivity", x, sensitivity=square)).all()


@pytest.mark.parametrize("metric", ["var", "std^", "std^0", "std^-1", "std^nan", "", "none^2"])
def test_other_metrics_are_named(metric):
    with pytest.raises(
        ValueError, match="metric must be none or one of std, robust, sensitivity, fisher"
    ):
        metric_scales(metric, rows())


def test_what_it_cannot_take_is_named():
    x = rows()
    bae = bf.BinaryAutoencoder(D, F)
    with pytest.raises(
        ValueError, match=r"metric must be a tensor \[12\] or \[12, 12\]; got \[3\]"
    ):
        bae.fit_normalization_(x, metric=torch.ones(3))
    with pytest.raises(ValueError, match="metric must be finite and positive; the least is 0"):
        bae.fit_normalization_(x, metric=torch.zeros(D))
    with pytest.raises(ValueError, match="target_metric must be None"):
        bae.fit_normalization_(x, target_metric=torch.ones(D))
    with pytest.raises(ValueError, match=r"sensitivity must have shape \[12\]; got None"):
        metric_scales("sensitivity", x)
    with pytest.raises(ValueError, match="sensitivity must be finite and somewhere positive"):
        metric_scales("sensitivity", x, sensitivity=torch.zeros(D))
    with pytest.raises(ValueError, match="rows must vary"):
        metric_scales("std", torch.ones(9, D))


def test_a_state_says_whether_there_is_a_metric():
    x = rows()
    bae, plain = module(x.std(0)), module(None)
    for strict in (True, False):
        net = torch.nn.Sequential(bf.BinaryAutoencoder(D, F))
        for given in (bae, plain, bae):
            state = {f"0.{k}": v for k, v in given.state_dict().items()}
            net.load_state_dict(state, strict=strict)
            if given is plain:
                assert net[0].x_metric is None
            else:
                assert torch.equal(net[0].x_metric, bae.x_metric)
            assert net[0].encode(x).equal(given.encode(x))
    net[0].load_state_dict({"b_dec": bae.b_dec}, strict=False)  # says nothing of a normalisation
    assert torch.equal(net[0].x_metric, bae.x_metric)
    state = {**bae.state_dict(), "y_metric": torch.ones(3)}
    with pytest.raises(RuntimeError, match="y_metric"):  # a module without targets has no place
        bf.BinaryAutoencoder(D, F).load_state_dict(state)


class _Rank:
    """What the division of features asks of a mesh, for one of two ranks."""

    feature = 2

    def __init__(self, rank: int, parts: list | None = None) -> None:
        self.feature_rank, self.parts = rank, parts

    def columns(self, n_columns: int) -> slice:
        each = n_columns // 2
        return slice(self.feature_rank * each, (self.feature_rank + 1) * each)

    def gather(self, tensor, axis: str, what: str, dim: int = 0):
        return torch.cat([part.state_dict()[what] for part in self.parts], dim)


def test_a_module_with_a_metric_is_divided_by_features_and_put_together_again():
    x = rows()
    whole = bf.BinaryAutoencoder(D, 64).fit_normalization_(x, metric=x.std(0)).eval()
    parts = [shard_features(whole, _Rank(rank)) for rank in (0, 1)]
    halves = [part.encode(x).to_dense() for part in parts]
    assert torch.equal(torch.cat(halves, 1), whole.encode(x).to_dense())
    again = gather_features(parts[0], _Rank(0, parts))
    assert torch.equal(again.x_metric, whole.x_metric)
    assert again.encode(x).equal(whole.encode(x))


def test_features_of_a_module_that_searches_are_not_divided():
    whole = bf.SearchedAutoencoder(6, 128)
    with pytest.raises(ValueError, match="got SearchedAutoencoder, of which a part encodes"):
        shard_features(whole, _Rank(0))


# -- a matrix of units -----------------------------------------------------------------------------


def matrix(width: int = D) -> torch.Tensor:
    """Symmetric, of eigenvalues from 1/4 to 4, along no dimension."""
    generator = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator).double())[0]
    return (turn * torch.logspace(-0.6, 0.6, width, dtype=torch.float64)) @ turn.T


def test_a_matrix_of_one_scale_for_each_dimension_is_these_scales():
    x, scales = rows(), rows().std(0)
    plain, made = module(scales), module(scales.diag())
    assert_close(made.x_metric, plain.x_metric.diag())
    assert_close(made.normalize(x), plain.normalize(x), rtol=1e-5, atol=1e-5)
    state = {k: v for k, v in plain.state_dict().items() if k != "x_metric"}
    made.load_state_dict({**state, "x_metric": made.x_metric})
    code = plain.encode(x)
    assert made.encode(x).equal(code)
    assert_close(made.decode(code), plain.decode(code), rtol=1e-5, atol=1e-4)


def test_errors_are_measured_by_the_matrix():
    x = rows().double()
    bae = module(matrix()).double()
    z = bae.normalize(x)
    assert float(z.square().mean()) == pytest.approx(1, rel=1e-5)
    assert_close(bae.denormalize(z), x)
    assert_close(bae.x_scale, module(None).double().x_scale)
    # up to one factor, the inverse of the metric's square
    ratio = bae.x_metric / matrix()
    assert_close(ratio, ratio.mean().expand(D, D), rtol=1e-4, atol=0)
    out = bae(x)
    unit = bae.x_scale * bae.x_metric
    assert_close(bae.mse(out, x), torch.linalg.solve(unit, (x - out.recon).T).square().mean())
    assert_close(module(7 * matrix()).x_metric.double(), bae.x_metric)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_rounds_no_row_before_the_layer(dtype):
    bae, x = module(matrix()), rows()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = bae.normalize(x.to(dtype))
    assert found.dtype == torch.float32
    assert torch.equal(found, bae.normalize(x.to(dtype)))


@pytest.mark.parametrize("n_bits", [1, 3])
def test_files_keep_a_matrix(tmp_path, n_bits):
    x = rows()
    bae = module(matrix(), n_bits=n_bits)
    bae.save_pretrained(tmp_path)
    for again in (bf.BinaryAutoencoder.from_pretrained(tmp_path), load_autoencoder(tmp_path)):
        assert torch.equal(again.x_metric, bae.x_metric)
        assert again.encode(x).equal(bae.encode(x))
        assert_close(again.decode(again.encode(x)), bae.decode(bae.encode(x)))
    for bad, said in (
        (-bae.x_metric, "x_metric must be symmetric and positive definite where it is a matrix"),
        (torch.ones(D, 3), "x_metric"),
    ):
        tensors = {**bae.state_dict(), "x_metric": bad}
        with pytest.raises(ValueError, match=said):
            load_tensors_(bf.BinaryAutoencoder(D, F, n_bits=n_bits, device="meta"), tensors, ".")


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_baseline_takes_a_matrix_and_keeps_it(tmp_path, method):
    torch.manual_seed(0)
    x = rows()
    options = {"d_out": 7} if method == "transcoder" else {}
    y = rows(width=7) if options else None
    model = make_baseline(method, D, F, k=4, **options)
    model.fit_normalization_(x, y, metric=matrix(), target_metric=matrix(7) if options else None)
    model.eval()
    with torch.no_grad():
        found = model.training_loss(x, y, dead=None, done=0.5)
    assert torch.isfinite(found[0])
    goal = x if y is None else y
    error = model.in_target_units(goal - model.reconstruct(x)).square().mean()
    assert float(found[1]["mse"]) == pytest.approx(float(error.detach()), rel=1e-3)
    model.save_pretrained(tmp_path)
    again = load_autoencoder(tmp_path)
    assert torch.equal(again.x_metric, model.x_metric)
    assert_close(again.reconstruct(x), model.reconstruct(x))


def test_a_matrix_is_folded_and_shared_and_copied():
    x = rows().double()
    bae = module(matrix()).double()
    before = bae.encode(x)
    recon = bae.decode(before)
    copied, moved = copy.deepcopy(bae), bf.BinaryAutoencoder(D, F)
    assert copied.encode(x).equal(before)
    moved.double().load_state_dict(bae.state_dict())
    assert moved.encode(x).equal(before)
    searched = bf.SearchedAutoencoder.of(bae, x, bit_price=1e-3)
    assert torch.equal(searched.x_metric, bae.x_metric)
    error = bae.in_target_units(x - recon).square().mean()
    assert bae.in_target_units(x - searched.reconstruct(x)).square().mean() < error
    assert bae.fold_metric_(x) is bae
    assert bae.x_metric is bae.x_metric_inverse is None
    assert bae.encode(x).equal(before)
    assert_close(bae.decode(before), recon)


@pytest.mark.parametrize("shape", [(3,), (D, 3), (3, 3), (D, D, 1)], ids=str)
def test_a_state_with_a_metric_of_another_shape_is_refused(shape):
    for own in (None, rows().std(0), matrix()):
        bae = module(own)
        state = {**bae.state_dict(), "x_metric": torch.ones(shape)}
        with pytest.raises(RuntimeError, match="size mismatch for x_metric"):
            bae.load_state_dict(state)


def test_a_module_with_a_matrix_is_divided_by_features():
    x = rows()
    whole = bf.BinaryAutoencoder(D, 64).fit_normalization_(x, metric=matrix()).eval()
    parts = [shard_features(whole, _Rank(rank)) for rank in (0, 1)]
    halves = [part.encode(x).to_dense() for part in parts]
    assert torch.equal(torch.cat(halves, 1), whole.encode(x).to_dense())


def test_what_is_no_matrix_of_units_is_named():
    x = rows()
    bae = bf.BinaryAutoencoder(D, F)
    for bad in (
        torch.zeros(D, D),
        -torch.eye(D),
        torch.eye(D).roll(1, 0),
        torch.full((D, D), torch.nan),
    ):
        with pytest.raises(ValueError, match="metric must be symmetric and positive definite"):
            bae.fit_normalization_(x, metric=bad)
    assert not bae.is_normalized()
    with pytest.raises(ValueError, match=r"fisher must have shape \[12, 12\]; got \[12\]"):
        metric_scales("fisher", x, fisher=torch.ones(D))
    with pytest.raises(ValueError, match="fisher must be finite and somewhere positive"):
        metric_scales("fisher", x, fisher=torch.zeros(D, D))


def test_units_of_a_fisher_information_make_it_the_square_of_errors():
    x = rows()
    root = torch.randn(D, D, dtype=torch.float64)
    information = root @ root.T
    made = metric_scales("fisher", x, fisher=information)
    inverse = torch.linalg.inv(made)
    shifted = information / information.diagonal().mean() + 0.02 * torch.eye(D)
    assert_close(inverse @ inverse, shifted)
    assert_close(
        metric_scales("fisher^0.5", x, fisher=information)
        @ metric_scales("fisher^0.5", x, fisher=information),
        made,
    )
    # of fewer gradients than dimensions
    few = root[:, :3] @ root[:, :3].T
    assert torch.linalg.eigvalsh(metric_scales("fisher", x, fisher=few)).min() > 0
