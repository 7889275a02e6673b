"""One contract: an autoencoder that the package does not know goes everywhere the others go."""

import ast
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from toy_autoencoder import Toy

import bae_fast as bf
from bae_fast.analysis import evaluate
from bae_fast.analysis.quantisers import value_ranges
from bae_fast.autoencoder import (
    ARCHITECTURES,
    Autoencoder,
    Foreign,
    as_autoencoder,
    as_code,
    load_autoencoder,
    register_architecture,
)
from bae_fast.baselines import METHODS, TRAINING, SparseAutoencoder, make_baseline, register_method
from bae_fast.interpret.comsem import feature_tokens
from bae_fast.training import Trainer

D, F = 12, 40


# -- a method of one's own, in one file ----------------------------------------------------------


def rows(n=600, seed=0):
    g = torch.Generator().manual_seed(seed)
    on = torch.rand(n, 20, generator=g) < 0.1
    return on.float() @ torch.randn(20, D, generator=g) + 0.05 * torch.randn(n, D, generator=g)


def make(kind: str) -> Autoencoder:
    torch.manual_seed(0)
    if kind == "toy":
        model: Autoencoder = Toy(D, F)
    elif kind == "bae":
        model = bf.BinaryAutoencoder(D, F)
    elif kind == "bae-2":
        model = bf.BinaryAutoencoder(D, F, n_bits=2)
    else:
        model = make_baseline(kind, D, F, k=5)
    return model.fit_normalization_(rows()).eval()


KINDS = ["toy", "bae", "bae-2", "topk", "binary_topk", "jumprelu"]


def test_a_method_of_ones_own_is_trained_saved_loaded_and_evaluated(tmp_path):
    x = rows()
    model = make("toy")
    config = dataclasses.replace(TRAINING, steps=200, batch_size=64, precision="float32")
    lines = Trainer(model, x, config).fit()
    assert lines[-1]["mse"] < 0.5 * lines[0]["mse"]
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "cfg.json").read_text())
    assert (values["architecture"], values["dtype"]) == ("test_toy", "float32")
    loaded = load_autoencoder(tmp_path)
    assert type(loaded) is Toy
    assert not loaded.training
    assert torch.equal(loaded.encode(x), model.encode(x))
    found = evaluate(loaded, x, training_rows=x)
    assert found.fvu < 0.5
    assert found.fvu < found.fvu_quantized < 1.2 * found.fvu + 0.05
    assert found.bits == pytest.approx(found.support_bits + 5 * found.l0)


def test_a_method_of_ones_own_gives_every_row_to_its_strongest_features():
    x = rows()
    model = make("toy")
    found = feature_tokens(model, x, k=2)
    features = model.encode(x).detach()
    assert found.code.equal(bf.BinaryCode.from_dense(features > 0))
    feature = int(features[7].argmax())
    assert 7 in found.tokens.of(feature)[0].tolist()
    assert not found.either_way


def test_a_method_of_ones_own_stands_in_a_running_model_and_is_edited():
    from bae_fast.causal import spliced

    x, model = rows(), make("toy")
    place = nn.Sequential(nn.Identity())
    batch = x.view(4, 150, D)
    with torch.no_grad(), spliced(place, "0", model, drop_positions=0, record=True) as splice:
        changed = place(batch)
    with torch.no_grad():
        torch.testing.assert_close(changed.view(-1, D), model.reconstruct(x))
    assert splice.n_replaced == 600
    assert splice.codes[0].flatten().equal(model.active(x))

    def off(features):
        return features.index_fill(-1, torch.tensor([3]), 0.0)

    with (
        torch.no_grad(),
        spliced(place, "0", model, off, drop_positions=0, add_error=True),
    ):
        steered = place(batch).view(-1, D)
    with torch.no_grad():
        features = model.activations(x)
        expected = x + model.decode(off(features)) - model.decode(features)
    torch.testing.assert_close(steered, expected)


def test_a_method_that_is_not_registered_is_not_saved(tmp_path):
    class Other(Toy):
        pass

    with pytest.raises(ValueError, match="Other must be registered by register_architecture"):
        Other(D, F).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_name_belongs_to_one_class():
    with pytest.raises(ValueError, match=r"'topk' must be registered once; it belongs to .*TopK"):
        register_architecture("topk")(Toy)
    assert ARCHITECTURES["topk"] is METHODS["topk"]


def test_a_baseline_of_ones_own_is_made_saved_and_loaded_by_its_name(tmp_path):
    @register_method("test_absolute")
    class Absolute(SparseAutoencoder):
        def activate(self, pre):
            return pre.abs()

    try:
        model = make_baseline("test_absolute", D, F, k=3)
        assert torch.equal(model.encode(rows()), model.preactivation(rows()).abs())
        model.save_pretrained(tmp_path)
        assert type(load_autoencoder(tmp_path)) is Absolute
    finally:
        del METHODS["test_absolute"], ARCHITECTURES["test_absolute"]


def test_an_unknown_architecture_is_named(tmp_path):
    make("topk").save_pretrained(tmp_path)
    for name in ("cfg.json",):
        values = json.loads((tmp_path / name).read_text())
        values["architecture"] = "nothing"
        (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"architecture must be one of .*topk.* got 'nothing'"):
        load_autoencoder(tmp_path)


# -- what the contract says ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_active_says_where_activations_are_positive_whatever_the_blocks(kind, monkeypatch):
    x, model = rows(), make(kind)
    with torch.no_grad():
        expected = model.activations(x) > 0
    assert torch.equal(model.active(x).to_dense(torch.bool), expected)
    assert torch.equal(model.active(x.double()).to_dense(torch.bool), expected)
    monkeypatch.setattr(bf.autoencoder, "_CHUNK_ELEMENTS", 70 * F)
    assert model.block_rows == 70
    assert [len(b) for b in model.blocks(x)] == [70] * 8 + [40]
    assert torch.equal(model.active(x).to_dense(torch.bool), expected)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "bae-2"])
def test_strength_is_positive_exactly_where_a_feature_is_on(kind):
    x, model = rows(), make(kind)
    with torch.no_grad():
        strength = model.strength(x)
    assert strength.dtype == torch.float32
    assert torch.equal(strength > 0, model.active(x).to_dense(torch.bool))
    assert float(strength.min()) == 0
    if kind == "bae":
        on = strength > 0
        assert torch.equal(strength[on], model.preactivation(x).detach()[on])


@pytest.mark.parametrize("kind", KINDS)
def test_reconstructions_are_those_of_the_activations(kind):
    x, model = rows(), make(kind)
    with torch.no_grad():
        expected = model.decode(model.activations(x))
        torch.testing.assert_close(model.reconstruct(x), expected)
    torch.testing.assert_close(model.reconstruct(x).detach(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["activations", "reconstruct"])
def test_gradients_reach_the_rows(kind, what):
    x, model = rows(64).requires_grad_(), make(kind)
    getattr(model, what)(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.any()


def test_the_gradient_of_activations_is_the_surrogates():
    x, model = rows(), make("bae")
    weight = torch.randn(F)
    model.activations(x).matmul(weight).sum().backward()
    with torch.no_grad():
        near = model.preactivation(x).abs() < model.config.surrogate_width
        expected = model.normalize(x).T @ (near * weight)
    torch.testing.assert_close(model.W_enc.grad, expected, rtol=1e-4, atol=1e-4)


def test_several_bits_have_no_one_margin():
    with pytest.raises(ValueError, match="strength needs n_bits=1; got 2"):
        make("bae-2").strength(rows())


def test_anything_with_encode_and_decode_is_wrapped():
    class Same:
        def encode(self, x):
            return x.relu()

        def decode(self, features):
            return features

    model = as_autoencoder(Same())
    assert isinstance(model, Foreign)
    x = rows()
    assert torch.equal(model.active(x).to_dense(torch.bool), x > 0)
    assert torch.equal(model.reconstruct(x), x.relu())
    assert not list(model.parameters())
    bae = make("bae")
    assert as_autoencoder(bae) is bae
    with pytest.raises(TypeError, match="autoencoder must have encode and decode; got int"):
        as_autoencoder(3)


def test_a_code_is_itself_and_floats_are_on_where_positive():
    dense = torch.tensor([[0.0, 2.0, -1.0]])
    code = bf.BinaryCode.from_dense(dense > 0)
    assert as_code(code) is code
    assert as_code(dense).equal(code)


# -- evaluation, one for all ---------------------------------------------------------------------


def test_a_transcoding_binary_autoencoder_is_judged_against_its_target():
    x = rows()
    y = x.flip(1).relu()[:, :5]
    model = bf.BinaryAutoencoder(D, F, d_out=5).fit_normalization_(x, y)
    with torch.no_grad():
        error = y - model.decode(model.encode(x))
    expected = float(error.square().sum() / (y - y.mean(0)).square().sum())
    assert evaluate(model, x, y).fvu == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="targets must be given"):
        evaluate(model, x)
    with pytest.raises(ValueError, match="targets must have 600 rows; got 3"):
        evaluate(model, x, y[:3])


def test_values_are_not_quantised_without_rows_to_take_ranges_from():
    found = evaluate(make("topk"), rows())
    assert found.fvu_quantized is None
    json.dumps(found.summary(), allow_nan=False)


def test_ranges_are_those_of_the_positive_values():
    x, model = rows(), make("topk")
    low, high = value_ranges(model, x)
    features = model.encode(x).detach()
    assert torch.equal(high, features.amax(0))
    for j in range(F):
        on = features[:, j][features[:, j] > 0]
        assert float(low[j]) == (float(on.min()) if len(on) else 0)


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (lambda x: x.numpy(), TypeError, r"rows must be a tensor .* got ndarray; torch.from_numpy"),
        (lambda x: (x * 10).int(), TypeError, "rows must be floating point; got torch.int32"),
        (lambda x: x[:1], ValueError, "rows must hold at least 2 rows; got 1"),
        (lambda x: x[:, :3], ValueError, r"rows must have shape \[n, 12\]; got \[600, 3\]"),
        (
            lambda x: x.index_fill(0, torch.tensor([41]), torch.nan),
            ValueError,
            r"must be finite; got NaN or Inf in row 41",
        ),
    ],
)
@pytest.mark.parametrize("model", ["bae", "topk"])
def test_rows_that_cannot_be_evaluated_are_named(model, spoil, kind, message):
    with pytest.raises(kind, match=message):
        evaluate(make(model), spoil(rows()))


# -- sizes and dtypes ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bae", "topk", "toy"])
@pytest.mark.parametrize("value", [10**19, 10**400, -1, 2.5, True, None, "many"])
@pytest.mark.parametrize("name", ["d_sae", "d_in"])
def test_a_size_that_no_machine_holds_is_one_line(tmp_path, kind, name, value):
    make(kind).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "cfg.json").read_text())
    values[name] = value
    (tmp_path / "cfg.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"cfg\.json") as caught:
        load_autoencoder(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("kind", "name"), [("bae", "surrogate_width"), ("topk", "bandwidth"), ("topk", "k")]
)
def test_a_number_too_large_for_a_float_is_one_line(tmp_path, kind, name):
    make(kind).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "cfg.json").read_text())
    values[name] = 10**400
    (tmp_path / "cfg.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=name) as caught:
        load_autoencoder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["bae", "topk"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_of_a_cache_go_into_a_float32_layer(kind, dtype):
    x, model = rows().to(dtype), make(kind)
    encoded, expected = model.encode(x), model.encode(x.float())
    assert as_code(encoded).equal(as_code(expected))
    recon = model.decode(encoded)
    assert recon.dtype == torch.float32
    assert torch.equal(recon, model.decode(expected))


def test_float64_rows_are_not_narrowed_unasked():
    with pytest.raises(TypeError, match=r"W_enc must have x's dtype torch\.float64"):
        make("bae").encode(rows().double())


@pytest.fixture(params=[torch.float16, torch.float64, "meta"], ids=str)
def default(request):
    """A default dtype, or a default device: numbers that are asked of "meta" are an error."""
    is_dtype = isinstance(request.param, torch.dtype)
    expected = numbers()
    (torch.set_default_dtype if is_dtype else torch.set_default_device)(request.param)
    yield expected
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def numbers():
    """What must not depend on torch's defaults: counts, statistics, short trainings."""
    from bae_fast.analysis.recovery import FeatureSpec
    from bae_fast.entropy import autoregressive_bound, estimate_entropy
    from bae_fast.interpret import facts
    from bae_fast.pairs import joint_counts, pair_counts
    from bae_fast.training import TrainingConfig

    kind = {"dtype": torch.float32, "device": "cpu"}
    g = torch.Generator().manual_seed(0)
    drawn = torch.rand(5000, 40, generator=g, **kind)
    code = bf.BinaryCode.from_dense(drawn < 0.6)
    every = torch.arange(40, device="cpu")
    statistics = code.statistics(covariance=True)
    near = facts.neighbours(code, k=3)
    tokens = facts.top_tokens(code, torch.arange(5000, device="cpu") % 7)
    # with pairs whose count no half-precision number is, and rows by which columns are sparse
    sparse_code = bf.BinaryCode.from_dense((drawn < 0.02) | (every < 2) & (drawn[:, :1] < 0.6))
    x = torch.randn(400, D, generator=g, **kind)
    torch.manual_seed(0)
    bae = bf.BinaryAutoencoder(D, F, **kind).fit_normalization_(x)
    config = TrainingConfig(
        steps=12, batch_size=64, revive_every=5, bank_batches=2, precision="float32"
    )
    line = Trainer(bae, x, config).fit()[-1]
    sae = make_baseline("batchtopk", D, F, k=5, **kind).fit_normalization_(x)
    sparse = dataclasses.replace(TRAINING, steps=12, batch_size=64, precision="float32")
    other = Trainer(sae, x, sparse).fit()[-1]
    return {
        "counts": code.counts().tolist(),
        "entropy": float(code.entropy()),
        "covariance": float(statistics.covariance()),
        "pairs": joint_counts(code, every, code, every).double().tolist(),
        "sparse pairs": pair_counts(sparse_code, every).double().tolist(),
        "neighbours": (near.indices.tolist(), near.scores.double().tolist()),
        "tokens": (tokens.tokens.tolist(), tokens.lift.double().tolist()),
        "bits": estimate_entropy(code).summary(),
        "bound": autoregressive_bound(code[:600]).bits,
        "known features": FeatureSpec(roots=4, d=6).sample(5, 0)[0].double().tolist(),
        "bae": {k: v for k, v in line.items() if k != "seconds"},
        "sae": {k: v for k, v in other.items() if k != "seconds"},
        "evaluation": evaluate(bae, x).summary(),
        "values": evaluate(sae, x, training_rows=x).summary(),
    }


def test_nothing_depends_on_the_default_dtype_or_device(default):
    found = numbers()
    assert found.keys() == default.keys()
    for name, value in default.items():
        assert found[name] == value, name


# -- nobody asks a type --------------------------------------------------------------------------


def test_no_file_asks_whether_an_autoencoder_is_binary_by_its_type():
    root = Path(bf.__file__).parent
    allowed = {"model.py", "search.py", "experiments/compress.py"}
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "isinstance"
        and "BinaryAutoencoder" in ast.unparse(node)
    }
    assert found <= allowed


@pytest.mark.parametrize("method", ["bae", "topk"])
def test_any_autoencoder_is_a_layer_from_tensor_to_tensor(method):
    torch.manual_seed(0)
    model = bf.BinaryAutoencoder(D, F) if method == "bae" else make_baseline("topk", D, F, k=3)
    net = nn.Sequential(nn.Linear(4, D), model.as_layer(), nn.Linear(D, 2))
    x = torch.randn(9, 4)
    hidden = net[0](x)
    torch.testing.assert_close(net(x), net[2](model.reconstruct(hidden)))
    net(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert net[0].weight.grad.any()


def test_rows_that_come_back_without_an_error_are_evaluated():
    bae = bf.BinaryAutoencoder(1, 1)
    with torch.no_grad():
        for parameter, value in ((bae.W_enc, 1), (bae.W_dec, 1), (bae.b_enc, -0.5), (bae.b_dec, 0)):
            parameter.fill_(value)
    found = evaluate(bae.eval(), torch.tensor([[0.0], [1.0], [1.0]]))
    assert (found.fvu, found.gaussian_bound_bits) == (0, math.inf)
    summary = found.summary()
    assert (summary["fvu"], summary["gaussian_bound_bits"]) == (0, None)
    assert json.dumps(summary, allow_nan=False)
