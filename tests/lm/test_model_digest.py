"""The key of a harvest: whatever changes what a model computes makes it another model."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from language_models import TEXT, lm_of, model_of, own_rows, rows_of

from bae_fast.lm import load_language_model, model_digest, windows

transformers = pytest.importorskip("transformers")


def _scale_rope(model):
    model.model.rotary_emb.attention_scaling = 1.3


EDITS = {
    "one weight, in place": lambda m: m.model.layers[0].self_attn.o_proj.weight[9, 17].add_(1e-3),
    "past autograd": lambda m: m.model.layers[0].mlp.up_proj.weight.data[40, 3].add_(1e-3),
    "two rows exchanged": lambda m: m.model.layers[1].mlp.down_proj.weight.copy_(
        m.model.layers[1].mlp.down_proj.weight.flip(0).clone()
    ),
    "a buffer": lambda m: m.model.rotary_emb.inv_freq.mul_(0.5),
    "a setting of the rope": _scale_rope,
    "a user's hook": lambda m: m.model.layers[0].register_forward_hook(
        lambda _m, _i, out: (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2
    ),
    "a forward replaced": lambda m: setattr(m.model.layers[0].mlp, "forward", torch.zeros_like),
}


@pytest.mark.parametrize("edit", EDITS)
def test_rows_are_always_those_of_the_model_as_it_is(edit, tokenizer, tmp_path):
    lm = lm_of("llama", tokenizer)
    tokens = windows(tokenizer, TEXT, 16, n_tokens=64)
    before = rows_of(lm, tokens, tmp_path).clone()
    assert torch.equal(rows_of(lm, tokens, tmp_path), before)
    EDITS[edit](lm.model)
    own = own_rows(lm.model, tokens)
    assert not torch.allclose(before, own, atol=1e-6)
    torch.testing.assert_close(rows_of(lm, tokens, tmp_path), own, rtol=1e-5, atol=1e-6)
    again = lm_of("llama", tokenizer, lm.model)  # a new LanguageModel of the edited model
    torch.testing.assert_close(rows_of(again, tokens, tmp_path), own, rtol=1e-5, atol=1e-6)


class _Times(torch.nn.Module):
    """A block whose output is multiplied by what ``factor`` says."""

    def __init__(self, block, factor):
        super().__init__()
        self.block, self.factor = block, factor

    def forward(self, *arguments, **options):
        return self.block(*arguments, **options) * self.factor.value


class _Private(_Times):
    """The same with a number that no other code should ask for."""

    def __init__(self, block, factor):
        super().__init__(block, None)
        self._factor = factor

    def forward(self, *arguments, **options):
        return self.block(*arguments, **options) * self._factor


class _Counting(_Private):
    """The same with what its passes leave behind."""

    def forward(self, *arguments, **options):
        out = super().forward(*arguments, **options)
        self._keep(out)
        return out

    def _keep(self, out):
        self._calls = getattr(self, "_calls", 0) + 1
        self._last = out


def test_what_passes_leave_in_a_module_is_no_setting_of_it(tokenizer, tmp_path):
    lm = lm_of("llama", tokenizer)
    block = lm.model.model.layers[0] = _Counting(lm.model.model.layers[0], 2.0)
    tokens = windows(tokenizer, TEXT, 16, n_tokens=64)
    before = model_digest(lm.model)
    rows_of(lm, tokens, tmp_path)
    calls = block._calls
    assert calls > 0
    assert model_digest(lm.model) == before
    rows_of(lm, tokens, tmp_path)
    assert block._calls == calls
    block._factor = 3.0
    assert model_digest(lm.model) != before


def _wrapped(factor):
    """A class of one name whose code is another for every factor."""

    class Wrapped(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, *arguments, **options):
            return self.block(*arguments, **options) * factor

    return Wrapped


def _first(make):
    def put(model):
        layers = model.model.layers
        layers[0] = make(getattr(layers[0], "block", layers[0]))

    return put


def _activation(factor):
    def put(model):
        mlp = model.model.layers[0].mlp
        if isinstance(mlp.act_fn, torch.nn.Module):
            del mlp.act_fn
        mlp.act_fn = lambda x: x * factor

    return put


def _attention(factor):
    table = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS

    def put(model):
        def scaled(module, query, *arguments, **options):
            return table["sdpa"](module, query * factor, *arguments, **options)

        table.register("scaled", scaled)
        model.set_attn_implementation("scaled")

    return put


# what is done before the first harvest, and what between the two
CODE_EDITS = {
    "a closure": (_activation(0.5), _activation(2.5)),
    "a class of the same name": (_first(_wrapped(0.5)), _first(_wrapped(2.0))),
    "an object of a module": (
        _first(lambda block: _Times(block, SimpleNamespace(value=0.5))),
        lambda m: setattr(m.model.layers[0].factor, "value", 2.0),
    ),
    "an attribute a user's module keeps to itself": (
        _first(lambda block: _Private(block, 1.0)),
        lambda m: setattr(m.model.layers[0], "_factor", 3.0),
    ),
    "a registered attention": (_attention(1.0), _attention(0.1)),
    "a NumPy number": (
        lambda _: None,
        lambda m: setattr(m.model.layers[0].self_attn, "scaling", np.float32(3.0)),
    ),
}


@pytest.mark.parametrize("edit", CODE_EDITS)
def test_rows_are_those_of_the_code_as_it_is(edit, tokenizer, tmp_path):
    prepare, change = CODE_EDITS[edit]
    lm = lm_of("llama", tokenizer)
    tokens = windows(tokenizer, TEXT, 16, n_tokens=64)
    prepare(lm.model)
    before = rows_of(lm, tokens, tmp_path).clone()
    assert len({model_digest(lm.model), model_digest(lm.model)}) == 1
    change(lm.model)
    own = rows_of(lm, tokens, tmp_path / "empty")
    assert not torch.allclose(before, own, atol=1e-6)
    torch.testing.assert_close(rows_of(lm, tokens, tmp_path), own, rtol=1e-5, atol=1e-6)


def test_a_patched_class_is_another_model(tokenizer, monkeypatch):
    model = model_of("llama", tokenizer)
    before = model_digest(model)
    kind = type(model.model.layers[0].mlp)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: own(self, x) * 0.1)
    assert model_digest(model) != before
    monkeypatch.undo()
    assert model_digest(model) == before


def test_a_function_of_torch_that_another_replaced_is_another_model(tokenizer, monkeypatch):
    functional = torch.nn.functional
    model, own = model_of("llama", tokenizer), functional.scaled_dot_product_attention
    before = model_digest(model)
    monkeypatch.setattr(
        functional, "scaled_dot_product_attention", lambda q, k, v, **_options: own(q * 2, k, v)
    )
    assert model_digest(model) != before
    monkeypatch.undo()
    assert model_digest(model) == before


def test_sparse_and_quantised_weights_count(tokenizer):
    def digest(change):
        model = model_of("llama", tokenizer)
        change(model)
        return model_digest(model)

    def sparse(factor):
        def put(model):
            linear = model.model.layers[0].mlp.down_proj
            weight = (linear.weight * factor).to_sparse()
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)

        return put

    assert len({digest(sparse(1.0)), digest(sparse(1.0))}) == 1
    assert digest(sparse(1.0)) != digest(sparse(2.0))


def test_a_loaded_model_keeps_its_files_revision_until_it_is_edited(tokenizer, tmp_path):
    model_of("llama", tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lm = load_language_model(str(tmp_path / "model"), dtype="float32")
    assert lm.current_revision() == lm.revision
    lm.model(input_ids=torch.tensor([[5, 6, 7]]), output_hidden_states=True)
    assert lm.current_revision() == lm.revision  # libraries' own hooks are no edit
    lm.model.lm_head.weight[0, 0] += 1
    assert lm.current_revision() != lm.revision


def test_the_digest_of_rwkv_is_the_same_after_its_first_pass_and_sees_its_weights():
    options = {"attention_hidden_size": 16, "intermediate_size": 32, "context_length": 32}
    config = transformers.RwkvConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=4, rescale_every=1, **options
    )
    model = transformers.RwkvForCausalLM(config).eval().requires_grad_(False)
    weight = model.rwkv.blocks[3].feed_forward.value.weight
    before, digest = weight.clone(), model_digest(model)
    model(torch.arange(8)[None])
    assert weight.equal(before / 8)  # the pass itself divides it
    assert model_digest(model) == digest
    weight[5, 7] *= 1 + 2**-20
    assert model_digest(model) != digest
    weight.copy_(before)  # eight times what it computed with
    assert model_digest(model) != digest


def test_the_digest_sees_every_element_of_a_large_tensor_and_not_the_mode(tokenizer):
    model = model_of("llama", tokenizer)
    model.register_buffer("large", torch.zeros(3 * 8191 * 64 + 5), persistent=False)
    seen = {model_digest(model), model_digest(model.train()), model_digest(model.eval())}
    assert len(seen) == 1
    for place in (0, 8191 * 2, 8191 * 33, 3 * 8191 * 64, 3 * 8191 * 64 + 4):
        model.large[place] = 1.0
        seen.add(model_digest(model))
        model.large[place] = 0.0
    assert len(seen) == 6
