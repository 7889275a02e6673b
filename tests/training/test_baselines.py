"""The baselines: one interface, one trainer, one set of metrics."""

import copy
import dataclasses
import functools
import json
import math

import pytest
import torch

import bae_fast as bf
from bae_fast.analysis import evaluate, fvu
from bae_fast.analysis.quantisers import quantize
from bae_fast.baselines import METHODS, TRAINING, make_baseline
from bae_fast.baselines.base import SparseAutoencoder
from bae_fast.statistics import entropy_bits
from bae_fast.training import PRESETS, Trainer

D, F, K = 16, 48, 4
SMALL = dataclasses.replace(TRAINING, steps=300, batch_size=64, lr=3e-3, precision="float32")
PLAIN = [name for name in METHODS if name != "transcoder"]
STEERED = 1500  # steps after which L0 is at its target


def rows(n=1500, d=D, r=24, seed=0):
    """Sparse sums of r directions with real coefficients, a mean, a little noise."""
    g = torch.Generator().manual_seed(seed)
    size = (torch.rand(n, r, generator=g) < 0.12) * (0.5 + torch.rand(n, r, generator=g))
    clean = size @ torch.randn(r, d, generator=g) + 3.0
    return clean + 0.02 * torch.randn(n, d, generator=g)


def make(method, x, **options):
    return make_baseline(method, x.shape[1], F, k=K, **options).fit_normalization_(x)


@functools.cache
def _trained(method, steps):
    x = rows()
    torch.manual_seed(0)
    model = make(method, x)
    return model, Trainer(model, x, dataclasses.replace(SMALL, steps=steps)).fit()


def trained(method, steps=SMALL.steps):
    """A model trained on `rows()`, trained once and copied for each test, and its log."""
    return copy.deepcopy(_trained(method, steps))


def unexplained(model, x):
    with torch.no_grad():
        return fvu(x, model.decode(model.encode(x)))


@pytest.mark.parametrize("method", PLAIN)
def test_parameters_lie_as_fsdp_shards_them(method):
    model = make(method, rows())
    assert all(parameter.is_contiguous() for parameter in model.parameters())


@pytest.mark.parametrize("method", PLAIN)
def test_training_explains_most_of_the_variance(method):
    x = rows()
    torch.manual_seed(0)
    before = unexplained(make(method, x).eval(), x)
    # values that a penalty shrinks come late
    steps = {"relu": STEERED, "rescaled_relu": 900}.get(method, 300)
    model, lines = trained(method, steps)
    limit = {"random": 0.75, "binary_topk": 0.6}.get(method, 0.35)
    assert unexplained(model, x) < min(limit, 0.9 * before)
    assert lines[-1]["step"] == steps
    assert lines[-1]["mse"] < lines[0]["mse"]
    assert not model.training


def test_learned_directions_beat_random_ones():
    x = rows()
    found = {name: unexplained(trained(name)[0], x) for name in ("topk", "random")}
    assert found["topk"] < 0.75 * found["random"]


@pytest.mark.parametrize(
    "method", ["relu", "jumprelu", pytest.param("gated", marks=pytest.mark.long)]
)
def test_lambda_steers_l0_to_its_target(method):
    x = rows()
    model, _ = trained(method, STEERED)
    l0 = float((model.encode(x) > 0).sum(1).double().mean())
    assert K / 1.5 < l0 < 1.5 * K
    assert unexplained(model, x) < (0.3 if method == "relu" else 0.15)


@pytest.mark.parametrize("method", [*PLAIN, "bae"])
def test_rows_that_are_wider_than_the_module_are_named_and_narrower_ones_serve(method):
    x = torch.randn(8, 16)
    if method == "bae":
        model = bf.BinaryAutoencoder(16, 32)
        encode = model.preactivation
    else:
        model = make_baseline(method, 16, 32, k=4).eval()
        encode = model.encode
    with pytest.raises(TypeError, match=r"x must have the module's dtype torch\.float32, or a nar"):
        encode(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match=r"got torch\.float64: x\.to\(torch\.float32\) has it"):
            encode(x.double())
        encode(x)
    assert torch.equal(encode(x.bfloat16()), encode(x.bfloat16().float()))
    assert encode(x.double().float()).shape == (8, 32)


@pytest.mark.parametrize("method", ["relu", "rescaled_relu", "gated", "jumprelu"])
def test_a_steered_method_starts_near_its_target(method):
    torch.manual_seed(0)
    x = torch.randn(2000, 64) @ torch.randn(64, 64)
    model = make_baseline(method, 64, 512, k=10).fit_normalization_(x)
    l0 = float((model.encode(x) > 0).sum(1).double().mean())
    assert 10 < l0 < 60  # half of the features would be 256
    # k above a quarter of the features: half of them are on, and none by less than nothing
    model = make_baseline(method, 64, 512, k=400).fit_normalization_(x)
    l0 = float((model.encode(x) > 0).sum(1).double().mean())
    assert 200 < l0 < 312


@pytest.mark.parametrize("method", ["relu", "gated"])
def test_few_steps_lead_to_the_target_without_losing_what_was_learned(method):
    """From half of the features on, lambda runs ahead of L0 and then switches off too many."""
    x = rows(3000, d=48, r=120)
    torch.manual_seed(0)
    model = make_baseline(method, 48, 384, k=8).fit_normalization_(x)
    seen = []

    def look(line):
        seen.append((line["mse"], line["l0"], float(model.sparsity_weight)))

    config = dataclasses.replace(SMALL, steps=400, batch_size=128, lr=1e-3)
    Trainer(model, x, config).fit(on_log=look)
    mse, l0, weight = (torch.tensor(column) for column in zip(*seen, strict=True))
    assert 8 / 1.3 < float(l0[-10:].mean()) < 8 * 1.3
    assert float(l0.min()) > 8 / 1.6
    assert float(mse.max()) < 1.2  # no better than the mean is 1
    assert float(weight.max()) < 2 * float(weight[-1])


@pytest.mark.parametrize("method", ["topk", "binary_topk", "random"])
def test_no_row_has_more_than_k_features(method):
    x = rows()
    features = make(method, x).encode(x)
    on = (features > 0).sum(1)
    assert int(on.max()) <= K
    if method == "binary_topk":
        assert set(on.tolist()) == {K}
        assert set(features.unique().tolist()) == {0.0, 1.0}


def test_batchtopk_keeps_k_a_row_on_average_and_about_as_many_through_its_threshold():
    x = rows()
    model = make("batchtopk", x).train()
    on = model.encode(x) > 0
    assert int(on.sum()) == K * len(x)
    assert len(set(on.sum(1).tolist())) > 1  # not k in every row
    model, _ = trained("batchtopk")
    l0 = float((model.encode(x) > 0).sum(1).double().mean())
    assert K / 1.4 < l0 < 1.4 * K
    # one row's features do not depend on the others
    assert torch.allclose(model.encode(x[:1]), model.encode(x)[:1], atol=1e-5)


@pytest.mark.parametrize("method", [m for m in PLAIN if m not in ("binary_topk",)])
def test_rows_of_the_decoder_keep_unit_norm(method):
    model, _ = trained(method, steps=5)
    assert (model.W_dec.norm(dim=1) - 1).abs().max() < 1e-5


def test_the_gradient_of_a_unit_row_has_no_part_along_it():
    x = rows()
    model = make("topk", x)
    model(x[:64]).loss.backward()
    assert (model.W_dec.grad * model.W_dec).sum(1).abs().max() > 1e-4
    model.before_update()
    assert (model.W_dec.grad * model.W_dec).sum(1).abs().max() < 1e-6


def test_random_directions_stay_and_its_decoder_learns():
    x = rows()
    torch.manual_seed(0)
    start = {name: t.clone() for name, t in make("random", x).state_dict().items()}
    model, _ = trained("random")
    assert torch.equal(model.W_enc, start["W_enc"])
    assert torch.equal(model.b_enc, start["b_enc"])
    assert not torch.equal(model.W_dec, start["W_dec"])


def test_auxk_is_the_share_of_the_error_that_dead_features_leave():
    x = rows()[:64]
    model = make("topk", x)
    dead = torch.zeros(F, dtype=torch.bool)
    assert float(model(x, dead=dead).parts["auxk"].detach()) == 0
    dead[:20] = True
    out = model(x, dead=dead)
    pre = model.preactivation(x)
    goal = model.normalize(x)
    error = goal - model.normalize(out.recon)
    k_aux = 8  # the power of two nearest to d / 2
    top = torch.where(dead, pre, -torch.inf).topk(k_aux)
    aux = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu()) @ model.W_dec
    expected = (error - aux).square().sum() / error.square().sum()
    assert float(out.parts["auxk"].detach()) == pytest.approx(expected.item(), rel=1e-4)
    assert out.loss.item() == pytest.approx(
        (out.parts["mse"] + out.parts["auxk"] / 32).item(), rel=1e-6
    )
    # its gradient reaches dead features, and the error is a constant to it
    model.zero_grad()
    out.parts["auxk"].backward()
    assert model.W_enc.grad[:, :20].abs().sum() > 0
    assert model.W_enc.grad[:, 20:].abs().sum() == 0
    assert model.b_dec.grad is None or model.b_dec.grad.abs().max() < 1


def test_auxk_wakes_dead_features():
    x = rows()
    share = {}
    for weight in (0.0, 1 / 32):
        torch.manual_seed(0)
        model = make("topk", x)
        with torch.no_grad():
            model.b_enc[: F // 2] = -2.5  # asleep
        model.auxk = weight
        Trainer(model, x, dataclasses.replace(SMALL, steps=500)).fit()
        share[weight] = float((model.encode(x) > 0).any(0).logical_not().double().mean())
    assert share[1 / 32] < share[0.0]


def test_the_penalty_of_relu_is_lambda_times_the_sum_of_features():
    x = rows()[:64]
    model = make("relu", x)
    out = model(x)
    expected = out.parts["mse"] + 2 / D * model.encode(x).sum(1).mean()
    assert out.loss.item() == pytest.approx(float(expected), rel=1e-6)
    assert model(x, warmup=0.0).loss.item() == pytest.approx(out.parts["mse"].item(), rel=1e-6)


def test_gated_penalises_the_gate_alone_and_its_auxiliary_loss_leaves_the_decoder():
    x = rows()[:64]
    model = make("gated", x)
    with torch.no_grad():
        model.r_mag.normal_()
        model.b_mag.normal_()
    out = model(x)
    centred = model.normalize(x) - model.b_dec
    gate = centred @ model.W_enc + model.b_gate
    magnitude = centred @ (model.W_enc * model.r_mag.exp()) + model.b_mag
    features = torch.where(gate > 0, magnitude.relu(), 0)
    assert torch.allclose(out.features, features, atol=1e-5)
    through = gate.relu() @ model.W_dec + model.b_dec
    auxiliary = (model.normalize(x) - through).square().mean()
    assert out.parts["auxiliary"].item() == pytest.approx(auxiliary.item(), rel=1e-5)
    out.parts["auxiliary"].backward()
    assert model.W_dec.grad is None
    assert model.r_mag.grad is None
    assert model.W_enc.grad.abs().sum() > 0
    model.zero_grad(set_to_none=True)
    model(x).parts["l1"].backward()
    assert model.b_mag.grad is None
    assert model.b_gate.grad.abs().sum() > 0


def test_jumprelu_has_the_straight_through_gradients_of_its_paper():
    pre = torch.tensor([[0.2, 0.96, 1.04, 3.0, -1.0]])
    width = 0.1
    model = make("jumprelu", rows(), bandwidth=width)
    # 4 K of F features, as normal quantile
    start = -torch.special.ndtri(torch.tensor(4 * K / F))
    assert torch.allclose(model.threshold, start.expand(F))
    from bae_fast.baselines.methods import _Jump, _Step

    threshold = torch.ones(5, requires_grad=True)
    pre.requires_grad_()
    out = _Jump.apply(pre, threshold, width)
    assert torch.equal(out, torch.tensor([[0, 0, 1.04, 3.0, 0]]))
    out.sum().backward()
    assert torch.equal(pre.grad, torch.tensor([[0.0, 0, 1, 1, 0]]))
    expected = torch.tensor([0.0, -1, -1, 0, 0]) / width
    assert torch.allclose(threshold.grad, expected)
    threshold.grad = pre.grad = None
    _Step.apply(pre, threshold, width).sum().backward()
    assert pre.grad is None
    assert torch.allclose(threshold.grad, expected)


@pytest.mark.parametrize("method", METHODS)
def test_functional_transforms_see_what_backward_and_a_loop_see(method):
    x = rows(n=48)
    options = {"d_out": D} if method == "transcoder" else {}
    model = make_baseline(method, D, F, k=K, **options).double()
    goal = (x,) if model.is_transcoder else ()
    model.fit_normalization_(x, *goal).eval()
    named = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, x):
        out = torch.func.functional_call(model, parameters, (x, *([x] * len(goal))))
        return out.loss + out.recon.square().sum()

    x = x.double().requires_grad_()
    loss(dict(model.named_parameters()), x).backward()
    by_name, at_x = torch.func.grad(loss, argnums=(0, 1))(named, x.detach())
    assert x.grad.any()
    torch.testing.assert_close(at_x, x.grad)
    for name, found in by_name.items():
        torch.testing.assert_close(found, model.get_parameter(name).grad)
    groups = x.detach().view(4, 12, D)
    torch.testing.assert_close(
        torch.func.vmap(model.reconstruct)(groups),
        torch.stack([model.reconstruct(part) for part in groups]),
    )


def test_jumprelu_learns_its_thresholds_and_they_are_the_least_features():
    x = rows()
    model, _ = trained("jumprelu")
    assert model.threshold.std() > 0
    features = model.encode(x)
    on = features > 0
    assert bool((features >= model.threshold)[on].all())


def test_rescaled_relu_has_standard_scores_and_the_features_of_relu():
    x = rows()
    plain, _ = trained("relu")
    model, _ = trained("rescaled_relu")
    assert torch.equal(model.encode(x), plain.encode(x))
    scores = model.scores(x)
    live = (model.encode(x) > 0).any(0)
    assert scores.mean(0).abs().max() < 1e-4
    assert (scores[:, live].std(0, correction=0) - 1).abs().max() < 1e-3
    assert not torch.allclose(scores, model.encode(x))


def test_a_transcoder_learns_a_map_to_another_width():
    x = rows()
    g = torch.Generator().manual_seed(1)
    y = ((x - x.mean(0)) @ torch.randn(D, 10, generator=g)).relu() + 1
    torch.manual_seed(0)
    model = make_baseline("transcoder", D, F, k=8, d_out=10).fit_normalization_(x, y)
    Trainer(model, x, dataclasses.replace(SMALL, steps=500), targets=y).fit()
    with torch.no_grad():
        assert fvu(y, model.decode(model.encode(x))) < 0.4
    with pytest.raises(ValueError, match="targets must be given"):
        Trainer(model, x, SMALL)
    with pytest.raises(ValueError, match=r"targets must have shape \[1500, 10\]; got \[3, 10\]"):
        Trainer(model, x, SMALL, targets=y[:3])
    with pytest.raises(ValueError, match="target must be given"):
        model(x)
    found = evaluate(model, x, y, training_rows=x)
    assert 0 < found.fvu < 0.4


def test_a_transcoding_binary_autoencoder_goes_through_the_same_trainer():
    x = rows()
    y = (x - x.mean(0)).relu()
    bae = bf.BinaryAutoencoder(D, F, d_out=D).fit_normalization_(x, y)
    config = dataclasses.replace(
        PRESETS["sparse"], steps=200, batch_size=64, init="density", density=0.3,
        precision="float32",
    )  # fmt: skip
    lines = Trainer(bae, x, config, targets=y).fit()
    assert lines[-1]["mse"] < 0.5 * lines[0]["mse"]


# -- the trainer -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["relu", "batchtopk", "jumprelu"])
def test_a_run_resumes_exactly(method):
    x = rows()
    config = dataclasses.replace(SMALL, steps=60)
    torch.manual_seed(0)
    whole = Trainer(make(method, x), x, config)
    whole.fit()
    torch.manual_seed(0)
    first = Trainer(make(method, x), x, config)
    first.model.train()
    for _ in range(25):
        first.train_step()
    state = first.state_dict()
    second = Trainer(make(method, x), x, config)
    second.load_state_dict(state)
    second.fit()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_the_configuration_of_another_objective_is_refused():
    x = rows()
    with pytest.raises(TypeError, match=r"model must be a BinaryAutoencoder .* got TopK"):
        Trainer(make("topk", x), x, PRESETS["sparse"])
    bae = bf.BinaryAutoencoder(D, F)
    with pytest.raises(TypeError, match=r"got BinaryAutoencoder, which lacks training_loss"):
        Trainer(bae, x, SMALL)
    with pytest.raises(TypeError, match=r"got Linear, which lacks training_loss, before_update"):
        Trainer(torch.nn.Linear(D, F), x, SMALL)


def test_a_log_line_names_the_parts_of_the_loss():
    _, lines = trained("gated", steps=10)
    assert {"mse", "l1", "auxiliary", "entropy_bits", "l0", "dead_share"} <= lines[-1].keys()


# -- metrics -----------------------------------------------------------------------------------


def test_description_length_is_the_entropy_of_the_active_set_plus_the_values():
    x = rows()
    model, _ = trained("topk")
    found = evaluate(model, x, training_rows=x, value_bits=6)
    on = model.encode(x) > 0
    support = float(entropy_bits(on.sum(0), torch.tensor(len(x))))
    assert found.support_bits == pytest.approx(support, rel=1e-9)
    assert found.bits == pytest.approx(support + 6 * found.l0, rel=1e-9)
    assert found.fvu == pytest.approx(unexplained(model, x), rel=1e-6)
    density = on.double().mean(0)
    assert found.dead_share == pytest.approx(float((density == 0).double().mean()))
    assert found.dense_share == pytest.approx(float((density > 0.1).double().mean()))
    assert found.max_density == pytest.approx(float(density.max()))


def test_values_are_really_rounded_and_more_bits_cost_less_error():
    x = rows()
    model, _ = trained("topk")
    found = [evaluate(model, x, training_rows=x, value_bits=b).fvu_quantized for b in (1, 3, 5, 12)]
    plain = evaluate(model, x, training_rows=x).fvu
    assert found == sorted(found, reverse=True)
    assert found[0] > plain + 1e-3
    assert found[-1] == pytest.approx(plain, abs=1e-4)


def test_a_quantised_value_is_the_middle_of_its_step():
    low, high = torch.tensor([1.0]), torch.tensor([5.0])
    values = torch.tensor([[0.0], [1.0], [1.9], [2.1], [4.9], [5.0], [9.0], [0.5]])
    expected = torch.tensor([[0.0], [1.5], [1.5], [2.5], [4.5], [4.5], [4.5], [1.5]])
    assert torch.equal(quantize(values, low, high, 2), expected)
    # a feature that took one value keeps it, one never seen gets zero
    assert torch.equal(quantize(torch.tensor([[2.0]]), low * 2, low * 2, 3), torch.tensor([[2.0]]))
    zero = torch.zeros(1)
    assert torch.equal(quantize(torch.tensor([[2.0]]), zero, zero, 3), torch.zeros(1, 1))
    for dtype in (torch.bfloat16, torch.float16):
        narrow = quantize(values.to(dtype), low.to(dtype), high.to(dtype), 2)
        assert torch.equal(narrow, quantize(values.to(dtype).float(), low, high, 2).to(dtype))
        half = torch.full((1, 1), 2.0, dtype=dtype)
        assert torch.equal(quantize(half, half[0], half[0], 16), half)


def test_codes_of_bits_pay_nothing_for_values():
    x = rows()
    model, _ = trained("binary_topk")
    found = evaluate(model, x, training_rows=x)
    assert found.bits == found.support_bits
    assert found.fvu == found.fvu_quantized
    assert found.value_bits == 0


# -- files and errors --------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_saved_model_comes_back_the_same(method, tmp_path):
    x = rows()
    d_out = 5 if method == "transcoder" else None
    model = make_baseline(method, D, F, k=K, d_out=d_out, metadata={"hook_name": "here"})
    model.fit_normalization_(x, x[:, :5] if d_out else None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.eval()
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "cfg.json").read_text())
    assert values["architecture"] == method
    loaded = SparseAutoencoder.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert torch.equal(loaded.encode(x), model.encode(x))
    assert torch.equal(loaded.decode(loaded.encode(x)), model.decode(model.encode(x)))
    learned = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == learned
    names = set(loaded.state_dict())
    assert {"W_enc", "W_dec", "b_dec", "x_mean", "x_scale"} <= names


def test_a_foreign_model_is_refused(tmp_path):
    bf.BinaryAutoencoder(D, F).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks k, bandwidth, apply_b_dec_to_input"):
        SparseAutoencoder.from_pretrained(tmp_path)
    make_baseline("topk", D, F, k=K).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="architecture"):
        bf.BinaryAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "pca"}, "method must be one of relu"),
        ({"k": 0}, "k must be an int >= 1; got 0"),
        ({"k": F + 1}, f"k must be at most d_sae={F}; got {F + 1}"),
        ({"d_in": 2.5}, "d_in must be an int >= 1; got 2.5"),
        ({"bandwidth": math.inf}, "bandwidth must be positive and finite; got inf"),
        ({"method": "transcoder"}, "d_out must be given for method='transcoder'"),
        ({"metadata": {"a": math.nan}}, "metadata must hold JSON values only"),
    ],
)
def test_bad_arguments_are_named(options, message):
    arguments = {"method": "topk", "d_in": D, "d_sae": F, "k": K} | options
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make_baseline(**arguments)


def test_bad_tensors_are_named():
    x = rows()
    model = make("topk", x)
    with pytest.raises(ValueError, match=r"features must have shape \[..., 48\]; got \[3, 5\]"):
        model.decode(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="target must be None"):
        model(x, x)
    with pytest.raises(ValueError, match="model must be in eval mode"):
        evaluate(model, x, training_rows=x)
    model.eval()
    with pytest.raises(ValueError, match="value_bits must be an int from 0 to 16; got"):
        evaluate(model, x, training_rows=x, value_bits=40)
