"""The tail of training inside a language model: its divergence, gradient, steps and resume."""

import copy
import dataclasses
import math

import pytest
import torch
from tiny_lm import save_tiny_model
from torch import nn
from toy_autoencoder import Toy

import bae_fast as bf
from bae_fast.baselines import METHODS, TRAINING, make_baseline
from bae_fast.causal import InPlaceDivergence, SubstitutionTest, Tail, TailConfig
from bae_fast.lm import load_language_model
from bae_fast.lm.logits import Head
from bae_fast.training import PRESETS, Trainer

pytest.importorskip("transformers")

WORDS = [f"word{i}" for i in range(60)]
PATH = "model.layers.0"
D, F = 16, 48
LOOP = {"steps": 60, "batch_size": 64, "precision": "float32"}
CONSTANTS = {
    "bae": dataclasses.replace(PRESETS["sparse"], **LOOP),
    "topk": dataclasses.replace(TRAINING, **LOOP),
}


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    lm = load_language_model(
        str(save_tiny_model(tmp_path_factory.mktemp("tiny"), WORDS)), dtype="float32"
    )
    for parameter in lm.model.parameters():
        if parameter.dim() == 2:  # weights as they start leave every next token about as likely
            parameter.mul_(6)
    return lm


@pytest.fixture(scope="module")
def wide(lm):
    """The same model in float64, its norms too."""
    lm = copy.deepcopy(lm)
    for module in list(lm.model.modules()):
        for name, norm in list(module.named_children()):
            if type(norm).__name__ == "LlamaRMSNorm":
                exact = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(module, name, exact)
    lm.model.double()
    return lm


def text(n, length=12, seed=3):
    return torch.randint(1, 61, (n, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def rows_of(lm, windows, path=PATH):
    found = []
    handle = lm.model.get_submodule(path).register_forward_hook(
        lambda _m, _i, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    lm.model(input_ids=windows)
    handle.remove()
    return found[0][:, 1:].reshape(-1, D)


def made(kind, rows):
    torch.manual_seed(0)
    if kind == "bae":
        model = bf.BinaryAutoencoder(D, F, dtype=rows.dtype)
    else:
        d_out = D if kind == "transcoder" else None
        model = make_baseline(kind, D, F, k=4, d_out=d_out, dtype=rows.dtype)
    targets = rows if model.is_transcoder else None
    metric = rows.std(0).sqrt()
    model.fit_normalization_(
        rows, targets, metric=metric, target_metric=None if targets is None else metric
    )
    if kind == "bae":
        model.init_density_(rows, 0.2)
    return model


def by_whole_passes(lm, windows, model, replaced, compared):
    """The same divergence from two whole forwards of the model, every logit at once."""
    with torch.no_grad():
        log_p = lm.model(input_ids=windows).logits.log_softmax(-1)

    def put(_module, _arguments, output):
        states = output[0] if isinstance(output, tuple) else output
        states = states.clone()
        states[replaced] = model.reconstruct(states[replaced])
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = lm.model.get_submodule(PATH).register_forward_hook(put)
    log_q = lm.model(input_ids=windows).logits.log_softmax(-1)
    handle.remove()
    return (log_p.exp() * (log_p - log_q)).sum(-1)[compared].mean()


def gradients(model, value):
    model.zero_grad(set_to_none=True)
    value.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# -- the divergence ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bae", "topk", "jumprelu"])
@pytest.mark.parametrize("rows_at_a_time", [3, 1000])
def test_value_and_gradient_are_those_of_whole_passes(wide, kind, rows_at_a_time, monkeypatch):
    monkeypatch.setattr(Head, "rows_at_a_time", rows_at_a_time)
    windows = text(3)
    windows[1, 5] = 60
    model = made(kind, rows_of(wide, text(40)))
    replaced = torch.ones_like(windows, dtype=torch.bool)
    replaced[:, 0] = False
    replaced &= windows != 60
    compared = replaced.clone()
    compared[:, -1] = False
    expected = by_whole_passes(wide, windows, model, replaced, compared)
    wanted = gradients(model, expected)
    found = InPlaceDivergence(
        wide, windows, PATH, exclude_tokens=[60], max_norm_ratio=None
    )(model.train(), torch.arange(3))  # fmt: skip
    assert model.training
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    assert found.item() > 1e-3
    got = gradients(model, found)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.any(), name
        assert torch.allclose(
            got[name], gradient, rtol=1e-7, atol=1e-9 * float(gradient.abs().max())
        )
    assert all(p.grad is None for p in wide.model.parameters())


def test_the_gradient_is_what_small_changes_do(wide):
    windows = text(4)
    model = made("topk", rows_of(wide, text(40)))
    divergence = InPlaceDivergence(wide, windows, PATH)
    chosen = torch.tensor([2, 0])
    got = gradients(model, divergence(model, chosen))
    g = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        way = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
        values = []
        for step in (1e-6, -1e-6):
            parameter.data.add_(way, alpha=step)
            values.append(divergence(model, chosen).item())
            parameter.data.sub_(way, alpha=step)
        slope = (values[0] - values[1]) / 2e-6
        assert slope == pytest.approx(float((got[name] * way).sum()), rel=1e-4), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_it_is_the_divergence_that_a_test_measures_padding_left_out(lm, side):
    windows = text(5)
    model = made("bae", rows_of(lm, text(40)))
    at = (4, 0) if side == "left" else (0, 4)
    padded = nn.functional.pad(windows, at, value=7)
    mask = nn.functional.pad(torch.ones_like(windows), at)
    found = InPlaceDivergence(lm, padded, PATH, mask=mask)(model, torch.arange(5))
    bits = SubstitutionTest(lm, windows).run(PATH, model.eval()).kl_bits
    assert found.item() / math.log(2) == pytest.approx(bits, rel=1e-4)


@pytest.mark.parametrize(
    ("path", "calls"), [("model.layers.0", (1, 2)), ("model.layers.1", (1, 1)),
                        ("model.layers.1.mlp", (1, 2))]
)  # fmt: skip
def test_blocks_below_run_once_and_are_left_as_they_were(lm, path, calls):
    windows = text(2)
    model = made("topk", rows_of(lm, text(40), path))
    seen = [0, 0]
    handles = []
    for i, block in enumerate(lm.model.model.layers):

        def count(_module, _arguments, i=i):
            seen[i] += 1

        handles.append(block.self_attn.register_forward_pre_hook(count))
        # a hook of the user's own holds in both passes
        handles.append(block.register_forward_hook(lambda _m, _a, out: _scaled(out)))
    expected = SubstitutionTest(lm, windows).run(path, model.eval()).kl_bits
    divergence = InPlaceDivergence(lm, windows, path)
    assert lm.head is not None  # made and checked by passes of its own
    seen[:] = [0, 0]
    found = divergence(model, torch.arange(2))
    for handle in handles:
        handle.remove()
    assert tuple(seen) == calls
    assert found.item() / math.log(2) == pytest.approx(expected, rel=1e-4)
    assert all("forward" not in vars(block) for block in lm.model.model.layers)


def _scaled(output):
    return (output[0] * 1.5, *output[1:]) if isinstance(output, tuple) else output * 1.5


# -- the tail ----------------------------------------------------------------------------------


def trained(lm, kind, rows):
    model = made(kind, rows)
    Trainer(model, rows, dataclasses.replace(CONSTANTS[kind], steps=150)).fit()
    return model


@pytest.mark.parametrize("kind", ["bae", "topk"])
def test_a_tail_loses_less_than_as_many_steps_on_rows_at_the_same_rate(lm, kind):
    windows = text(150)
    rows = rows_of(lm, windows)
    model = trained(lm, kind, rows)
    held = text(60, seed=9)
    test, held_rows = SubstitutionTest(lm, held), rows_of(lm, held)

    def measured(model):
        p = model.active(held_rows).density().double()
        entropy = torch.special.entr(p) + torch.special.entr(1 - p)
        return test.run(PATH, model.eval()).kl_bits, float(entropy.sum())

    divergence = InPlaceDivergence(lm, windows, PATH)
    found = []
    for share in (0.0, 0.5):
        tail = Tail(steps=40, windows=16, kl_share=share, lr_scale=1.0)
        going_on = copy.deepcopy(model)
        Trainer(going_on, rows, TailConfig.after(CONSTANTS[kind], divergence, tail)).fit()
        found.append(measured(going_on))
    (on_rows, rate), (in_place, rate_in_place) = found
    assert in_place < 0.97 * on_rows
    assert in_place < 0.95 * measured(model)[0]
    assert rate_in_place == pytest.approx(rate, rel=0.1)


def test_without_a_share_it_is_the_ordinary_training_going_on(lm):
    windows = text(30)
    rows = rows_of(lm, windows)
    first = made("bae", rows)
    second = copy.deepcopy(first)
    divergence = InPlaceDivergence(lm, windows, PATH)
    config = TailConfig.after(CONSTANTS["bae"], divergence, Tail(steps=12, kl_share=0.0))
    Trainer(first, rows, config).fit()
    plain = dataclasses.replace(
        CONSTANTS["bae"].going_on(), steps=12, lr=config.lr, warmup_steps=1, decay_from=0.1
    )
    Trainer(second, rows, plain).fit()
    for name, value in first.state_dict().items():
        assert torch.allclose(value, second.state_dict()[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("kind", ["bae", *METHODS, "own"])
def test_every_method_has_it(lm, kind):
    windows = text(20)
    rows = rows_of(lm, windows)
    model = Toy(D, F).fit_normalization_(rows) if kind == "own" else made(kind, rows)
    model.config.metadata.clear()
    path, source = (PATH, None) if kind != "transcoder" else (f"{PATH}.mlp", None)
    divergence = InPlaceDivergence(lm, windows, path, source=source, max_norm_ratio=None)
    config = TailConfig.after(
        CONSTANTS["bae" if kind == "bae" else "topk"], divergence, Tail(steps=2)
    )
    before = {name: p.clone() for name, p in model.named_parameters()}
    targets = rows if model.is_transcoder else None
    lines = Trainer(model, rows, config, targets=targets).fit(log_every=1)
    assert all(line["kl_bits"] > 0 for line in lines)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_a_tail_resumes_to_the_bit(lm, tmp_path):
    windows = text(5)
    rows = rows_of(lm, windows)

    def new(seed=3):
        model = made("bae", rows)
        divergence = InPlaceDivergence(lm, text(5, seed=seed), PATH)
        constants = dataclasses.replace(CONSTANTS["bae"], batch_size=32)
        return Trainer(model, rows, TailConfig.after(constants, divergence, Tail(steps=7)))

    whole = new()
    whole.fit()
    first = new()
    for _ in range(3):
        first.train_step()
    first.save(tmp_path / "tail.pt")
    second = new()
    second.load(tmp_path / "tail.pt")
    assert second.step == 3
    second.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    with pytest.raises(ValueError, match="state must be of a run with the same"):
        new(seed=4).load(tmp_path / "tail.pt")


def test_windows_come_in_a_random_order_each_as_often(lm):
    divergence = InPlaceDivergence(lm, text(6), PATH)
    config = TailConfig.after(CONSTANTS["topk"], divergence, Tail(steps=6, windows=4))
    drawn = []
    asked = InPlaceDivergence.__call__

    def note(self, model, chosen):
        drawn.append(chosen.tolist())
        return asked(self, model, chosen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InPlaceDivergence, "__call__", note)
        rows = rows_of(lm, text(20))
        Trainer(made("topk", rows), rows, config).fit()
    flat = [i for step in drawn for i in step]
    assert [sorted(flat[i : i + 6]) for i in range(0, 24, 6)] == [list(range(6))] * 4
    assert flat[:6] != flat[6:12]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"windows": 2.0}, "windows must be an int; got 2.0"),
        ({"kl_share": 1.5}, r"kl_share must lie in \[0, 1\]"),
        ({"lr_scale": 0.0}, "lr_scale must be positive"),
        ({"windows": 7}, "windows must be at most 6, the number of windows with text; got 7"),
    ],
)
def test_constants_out_of_range_are_named(lm, options, message):
    divergence = InPlaceDivergence(lm, text(6), PATH)
    with pytest.raises(ValueError, match=message):
        TailConfig.after(CONSTANTS["bae"], divergence, Tail(**options))


def test_what_it_cannot_take_is_named(lm):
    with pytest.raises(ValueError, match=r"must name a module of this model; got 'no\.such'"):
        InPlaceDivergence(lm, text(2), "no.such")
    with pytest.raises(ValueError, match=r"windows must be \[n_windows, length\]"):
        InPlaceDivergence(lm, text(2)[0], PATH)
    with pytest.raises(ValueError, match="windows must hold a token of text"):
        InPlaceDivergence(lm, text(2), PATH, exclude_tokens=range(61))
    with pytest.raises(TypeError, match="divergence must be an InPlaceDivergence; got NoneType"):
        TailConfig()
    model = made("topk", rows_of(lm, text(20)))
    divergence = InPlaceDivergence(lm, text(2), f"{PATH}.mlp", source=f"{PATH}.self_attn")
    with pytest.raises(ValueError, match="is for a transcoder; the autoencoder is none"):
        divergence(model, torch.tensor([0]))
