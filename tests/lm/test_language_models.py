"""What holds for every language model: logits, positions, text tokens, the key of a harvest.

Random models of two or three blocks and a tokenizer trained here; the right value is always the
model's own.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch

import bae_fast as bf
from bae_fast.causal import SubstitutionTest, generate, prompt_tokens, spliced
from bae_fast.interpret.comsem import read_phrase, read_verdict
from bae_fast.interpret.judges import Request, TransformersJudge
from bae_fast.interpret.thoughts import close_thoughts, only_thoughts
from bae_fast.lm import (
    LanguageModel,
    asks_for_bos,
    harvest,
    load_language_model,
    load_tokenizer,
    model_digest,
    resolve_hook,
    special_tokens,
    states_at,
    windows,
)
from bae_fast.lm import gguf as gguf_copies
from bae_fast.lm import known as known_files
from bae_fast.lm import loading as model_loading
from bae_fast.lm.hooks import in_own_dtype, running
from bae_fast.lm.inputs import padding_mask
from bae_fast.lm.origin import check_origin

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WIDTH = 32
_LINE = "Number {} follows {}; a cat sat <b>on</b> mat {}."
TEXT = "\n".join(
    f"Number {i} follows {i - 1}; a cat sat <b>on</b> mat {i % 7}." for i in range(900)
)


def word_pieces(bos=False, **names):
    """A byte-level tokenizer; with `bos` it begins every text with <s>."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([TEXT], trainer)
    if bos:
        core.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
        names |= {"bos_token": "<s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names)


@pytest.fixture(scope="module")
def tokenizer():
    return word_pieces(eos_token="</s>")


_LLAMA = {
    "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128,
}  # fmt: skip
_GPT2 = {"n_embd": WIDTH, "n_layer": 3, "n_head": 2, "n_positions": 128}
_GEMMA = {**_LLAMA, "head_dim": 16, "sliding_window": 16, "pad_token_id": 0}
_NEOX = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}
_OPT = {
    "hidden_size": WIDTH, "ffn_dim": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 128, "word_embed_proj_dim": 16, "pad_token_id": 1,
}  # fmt: skip
_BART = {
    "d_model": WIDTH, "encoder_layers": 3, "decoder_layers": 3, "decoder_attention_heads": 2,
    "encoder_attention_heads": 2, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64,
    "max_position_embeddings": 128,
}  # fmt: skip

# class, its arguments, path of the middle block, name of the scale that its head has
MODELS = {
    "llama": ("Llama", _LLAMA, "model.layers.1"),
    "qwen2": ("Qwen2", _LLAMA, "model.layers.1"),
    "mistral": ("Mistral", {**_LLAMA, "sliding_window": 16}, "model.layers.1"),
    "gemma2": ("Gemma2", {**_GEMMA, "final_logit_softcapping": 1.0}, "model.layers.1"),
    "gemma3": ("Gemma3Text", _GEMMA, "model.layers.1"),
    "cohere": ("Cohere", {**_LLAMA, "logit_scale": 0.0625, "pad_token_id": 0}, "model.layers.1"),
    "granite": ("Granite", {**_LLAMA, "logits_scaling": 8.0}, "model.layers.1"),
    "gpt2": ("GPT2", _GPT2, "transformer.h.1"),
    "openai-gpt": ("OpenAIGPT", _GPT2, "transformer.h.1"),
    "gptj": ("GPTJ", {**_GPT2, "rotary_dim": 8}, "transformer.h.1"),
    "neox": ("GPTNeoX", _NEOX, "gpt_neox.layers.1"),
    "phi": ("Phi", _NEOX, "model.layers.1"),
    "bloom": ("Bloom", {"hidden_size": WIDTH, "n_layer": 3, "n_head": 2}, "transformer.h.1"),
    "falcon": (
        "Falcon",
        {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2},
        "transformer.h.1",
    ),
    "opt": ("OPT", _OPT, "model.decoder.layers.1"),
    "bart": ("Bart", _BART, "model.decoder.layers.1"),
    "mamba": (
        "Mamba",
        {"hidden_size": WIDTH, "num_hidden_layers": 3, "state_size": 4},
        "backbone.layers.1",
    ),
    "roberta": ("Roberta", {**_NEOX, "is_decoder": True}, "roberta.encoder.layer.1"),
    "lfm2": ("Lfm2", {**_LLAMA, "full_attn_idxs": [1], "pad_token_id": 0}, "model.layers.1"),
}


def model_of(kind, tokenizer, seed=0):
    name, arguments, _ = MODELS[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(vocab_size=len(tokenizer), **arguments)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.eval().requires_grad_(False)
    model.get_output_embeddings().weight.mul_(10)  # otherwise all tokens are about as likely
    return model


def lm_of(kind, tokenizer, model=None):
    model = model_of(kind, tokenizer) if model is None else model
    return LanguageModel(model, tokenizer, kind, kind, torch.float32, WIDTH)


def own_rows(model, tokens):
    with torch.no_grad():
        states = model(input_ids=tokens, output_hidden_states=True).hidden_states[2]
    return states[:, 1:].reshape(-1, WIDTH)


def rows_of(lm, tokens, folder, **options):
    options = {"max_norm_ratio": float("inf"), "progress": False, **options}
    return harvest(lm, tokens, MODELS[lm.name][2], folder=folder, **options).rows


# -- the model's own logits ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_next_token_probabilities_are_the_models_own(kind, tokenizer):
    lm, path = lm_of(kind, tokenizer), MODELS[kind][2]
    prompts = [[5, 9, 30, 7, 60], [5, 9, 30], [5, 9, 4, 4]]
    with torch.no_grad():
        own = [lm.model(input_ids=torch.tensor([p])).logits[0, -1].float() for p in prompts]
    for share_prefix in (False, True):
        found = states_at(lm, prompts, [path], next_token=True, share_prefix=share_prefix)[1]
        torch.testing.assert_close(found, torch.stack(own).log_softmax(-1), rtol=1e-4, atol=1e-4)


def test_the_local_judge_reads_the_models_own_probabilities(tokenizer):
    lm = lm_of("cohere", tokenizer)
    judge = TransformersJudge(lm=lm)
    judge.verdict_tokens = lambda: (60, 70)
    answers = {}
    judge.answer([Request("judge", "does it fit?")], answers.__setitem__)
    ids = torch.tensor([judge.encode("does it fit?")])
    with torch.no_grad():
        own = lm.model(input_ids=ids).logits[0, -1, [60, 70]].double().softmax(-1)[0]
    assert abs(answers[0].p_yes - float(own)) < 1e-5


def test_a_model_that_sees_later_tokens_is_refused(tokenizer):
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    lm = lm_of("bert", tokenizer, transformers.BertLMHeadModel(config))
    with pytest.raises(ValueError, match="model must be causal"):
        _ = lm.head


# -- which tokens are replaced -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in MODELS if k not in ("mamba", "openai-gpt")])
def test_generation_and_padding_leave_the_first_token_and_pads_alone(kind, tokenizer):
    model, path = model_of(kind, tokenizer), MODELS[kind][2]
    bae = bf.BinaryAutoencoder(WIDTH, 64)
    ids = torch.randint(3, 200, (1, 8), generator=torch.Generator().manual_seed(0))
    with spliced(model, path, bae) as splice:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6,
            do_sample=False, pad_token_id=1,
        )  # fmt: skip
    assert splice.n_tokens - splice.n_replaced == splice.n_tokens - 12 >= 1
    padded = torch.cat([torch.ones(1, 5, dtype=torch.int64), ids], 1)
    mask = (torch.arange(13) >= 5).long()[None]
    with spliced(model, path, bae, record=True) as splice, torch.no_grad():
        model(input_ids=padded, attention_mask=mask)
    assert splice.codes[0].row_mask[0].tolist() == [False] * 6 + [True] * 7


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_passes_of_the_body_alone_know_their_own_padding(kind, tokenizer):
    lm, path = lm_of(kind, tokenizer), MODELS[kind][2]
    ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    masks = [torch.ones(2, 9), (torch.arange(9) >= torch.tensor([[4], [2]])), torch.ones(2, 9)]
    with (
        spliced(lm, path, bf.BinaryAutoencoder(WIDTH, 64), record=True) as splice,
        torch.no_grad(),
    ):
        for mask in masks:
            lm.body(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    for code, mask in zip(splice.codes, masks, strict=True):
        real = mask != 0
        assert torch.equal(code.row_mask, real & (real.cumsum(1) > 1))


def test_every_text_of_a_packed_sequence_has_a_first_token(tokenizer):
    model, bae = model_of("llama", tokenizer), bf.BinaryAutoencoder(WIDTH, 64)
    ids = torch.randint(3, 200, (1, 9), generator=torch.Generator().manual_seed(0))
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    for given in (places, places + 100):  # positions that begin elsewhere are no new text
        with spliced(model, "model.layers.1", bae, record=True) as splice, torch.no_grad():
            model(input_ids=ids, position_ids=given)
        expected = [p > 0 for p in places[0].tolist()] if given is places else [False] + [True] * 8
        assert splice.codes[0].row_mask[0].tolist() == expected


@pytest.mark.parametrize("form", ["bool", "added", "a dict"])
def test_a_mask_of_every_pair_of_tokens_tells_where_texts_begin(form, tokenizer):
    kind = "gemma3" if form == "a dict" else "llama"  # which has two kinds of attention
    model, bae = model_of(kind, tokenizer), bf.BinaryAutoencoder(WIDTH, 64)
    ids = torch.randint(3, 200, (1, 9), generator=torch.Generator().manual_seed(0))
    text = torch.tensor([-1, -1, 0, 0, 0, 0, 1, 1, 1])  # two of padding, then two texts
    sees = (text[:, None] == text).tril() & (text >= 0)
    mask = (sees | torch.eye(9, dtype=torch.bool))[None, None]
    if form != "bool":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    if form == "a dict":
        mask = {"full_attention": mask, "sliding_attention": mask}
    for which in (None, "last"):
        with (
            spliced(model, "model.layers.1", bae, mask=which, record=True) as splice,
            torch.no_grad(),
        ):
            model(input_ids=ids, attention_mask=mask)
        firsts = torch.tensor([True, True, True, False, False, False, True, False, False])
        expected = ~firsts if which is None else torch.arange(9) == 8
        assert torch.equal(splice.codes[0].row_mask[0], expected)


def test_a_model_in_double_precision_is_harvested_and_spliced(tokenizer, tmp_path):
    model = model_of("llama", tokenizer).double()
    lm = LanguageModel(model, tokenizer, "llama", "llama", torch.float64, WIDTH)
    tokens = windows(tokenizer, TEXT, 16, n_tokens=64)
    assert torch.equal(rows_of(lm, tokens, tmp_path), own_rows(model, tokens))
    found = SubstitutionTest(lm, tokens).run("model.layers.1", bf.BinaryAutoencoder(WIDTH, 64))
    assert found.replaced > 0.9


def test_a_recurrent_model_going_on_from_its_state_is_refused(tokenizer):
    model, ids = model_of("mamba", tokenizer), torch.tensor([[5, 6, 7, 8]])
    bae = bf.BinaryAutoencoder(WIDTH, 64)
    with (
        pytest.raises(ValueError, match="does not say how many tokens it has seen"),
        spliced(model, "backbone.layers.1", bae),
    ):
        model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)


def test_a_module_called_past_the_models_forward_is_refused(tokenizer):
    model = model_of("llama", tokenizer)
    block, hidden = model.model.layers[1], torch.randn(1, 4, WIDTH)
    places = model.model.rotary_emb(hidden, torch.arange(4)[None])
    with (
        pytest.raises(ValueError, match="called outside the model's forward"),
        spliced(model, "model.layers.1", bf.BinaryAutoencoder(WIDTH, 64)),
        torch.no_grad(),
    ):
        block(hidden, position_embeddings=places)


def test_a_compiled_model_is_spliced_all_the_same(tokenizer):
    lm = lm_of("llama", tokenizer)
    bae = bf.BinaryAutoencoder(WIDTH, 64)
    tokens = windows(tokenizer, TEXT, 16, n_tokens=64)
    expected = SubstitutionTest(lm, tokens).run("model.layers.1", bae)
    lm.model.model.compile(backend="eager")
    with torch.no_grad():
        lm.model(input_ids=tokens)
    found = SubstitutionTest(lm, tokens).run("model.layers.1", bae)
    assert found.replaced == expected.replaced > 0.9
    assert found.js_bits == pytest.approx(expected.js_bits, rel=1e-3)
    assert found.js_bits > 0.01


def test_a_splice_that_replaces_nothing_says_why(tokenizer):
    model, bae = model_of("llama", tokenizer), bf.BinaryAutoencoder(WIDTH, 64)
    with (
        pytest.raises(RuntimeError, match=r"'model.layers.1': no token .* all 1 tokens"),
        spliced(model, "model.layers.1", bae),
        torch.no_grad(),
    ):
        model(input_ids=torch.tensor([[5]]))
    with pytest.raises(RuntimeError, match="never called"), spliced(model, "model.layers.1", bae):
        model_of("llama", tokenizer)(input_ids=torch.tensor([[5, 6, 7]]))  # another copy
    with spliced(model, "model.layers.1", bae, may_replace_none=True) as splice:
        pass
    assert splice.n_tokens == 0


def test_a_test_of_a_model_that_was_edited_since_is_refused(tokenizer):
    lm = lm_of("llama", tokenizer)
    test = SubstitutionTest(lm, windows(tokenizer, TEXT, 16, n_tokens=32))
    lm.model.model.layers[0].mlp.down_proj.weight[3, 5] += 1
    with pytest.raises(ValueError, match="make a new SubstitutionTest"):
        test.run("model.layers.1", bf.BinaryAutoencoder(WIDTH, 64))


# -- the key of a harvest ------------------------------------------------------------------------


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


# -- how a model is run --------------------------------------------------------------------------


def test_dropout_is_off_in_a_harvest_and_the_mode_comes_back(tokenizer, tmp_path):
    model = model_of("gpt2", tokenizer)
    lm = lm_of("gpt2", tokenizer, model)
    tokens = windows(tokenizer, TEXT, 16, n_tokens=64)
    own = own_rows(model, tokens)
    model.train()
    model.transformer.h[2].eval()
    torch.testing.assert_close(rows_of(lm, tokens, tmp_path), own, rtol=1e-5, atol=1e-5)
    assert model.training
    assert not model.transformer.h[2].training


@pytest.mark.parametrize("kind", ["cpu", "meta"])  # which has no autocast, and is not asked
def test_a_model_computes_in_its_own_dtype_on_every_kind_of_device(kind):
    with torch.autocast("cpu", torch.bfloat16):
        with in_own_dtype(torch.device(kind)):
            product = torch.ones(2, 2, device=kind) @ torch.ones(2, 2, device=kind)
        assert torch.is_autocast_enabled("cpu")
    assert product.dtype == torch.float32


def test_autocast_around_a_harvest_changes_no_row(tokenizer, tmp_path):
    lm = lm_of("llama", tokenizer)
    tokens = windows(tokenizer, TEXT, 16, n_tokens=64)
    own = own_rows(lm.model, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        rows = rows_of(lm, tokens, tmp_path)
    torch.testing.assert_close(rows, own, rtol=1e-5, atol=1e-6)


def _padded(tokens, n, pad=0):
    mask = torch.arange(n + tokens.shape[1]) >= n
    padded = torch.nn.functional.pad(tokens, (n, 0), value=pad)
    return padded, mask.expand(len(tokens), -1)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "bloom", "falcon"])
def test_padding_before_a_text_changes_no_row(kind, tokenizer, tmp_path):
    lm = lm_of(kind, tokenizer)
    tokens = windows(tokenizer, TEXT, 16, n_tokens=64)
    padded, mask = _padded(tokens, 5)
    rows = rows_of(lm, padded, tmp_path, mask=mask)
    torch.testing.assert_close(rows, own_rows(lm.model, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bart", "roberta"])
def test_a_model_that_cannot_leave_padding_out_is_refused(kind, tokenizer, tmp_path):
    lm = lm_of(kind, tokenizer)
    tokens = windows(tokenizer, TEXT, 16, n_tokens=64)
    padded, mask = _padded(tokens, 5)
    with pytest.raises(ValueError, match="put padding behind it"):
        rows_of(lm, padded, tmp_path, mask=mask)
    behind = torch.nn.functional.pad(tokens, (0, 5), value=0)
    rows = rows_of(lm, behind, tmp_path, mask=mask.flip(1))
    torch.testing.assert_close(rows, own_rows(lm.model, tokens), rtol=1e-4, atol=1e-4)


def test_a_padding_token_that_means_more_is_said(tokenizer):
    ambiguous = word_pieces(eos_token="</s>", pad_token="</s>")
    tokens = torch.tensor([[2, 2, 5, 6], [7, 8, 9, 5]])
    with pytest.warns(UserWarning, match="several of the padding token 2"):
        assert padding_mask(ambiguous, tokens) is None


def test_a_shared_prefix_is_not_used_where_the_rope_follows_the_length(tokenizer):
    config = transformers.Phi3Config(
        vocab_size=len(tokenizer), **_LLAMA, pad_token_id=0, original_max_position_embeddings=20,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
            "long_factor": [3.0] * 8,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    lm = LanguageModel(model, tokenizer, "phi3", "phi3", torch.float32, WIDTH)
    prefix = list(range(5, 21))
    texts = [prefix + [30 + i] * (4 + i) for i in range(4)]
    found = [
        states_at(lm, texts, ["model.layers.1"], next_token=True, share_prefix=share)[1]
        for share in (False, True)
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    assert lm.current_revision() == lm.revision  # a longer text puts other frequencies there
    model.model.rotary_emb.original_inv_freq.mul_(0.5)
    assert lm.current_revision() != lm.revision


def test_padding_is_tried_on_models_of_few_positions(tokenizer, tmp_path):
    config = transformers.GPT2Config(vocab_size=len(tokenizer), **{**_GPT2, "n_positions": 6})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    lm = lm_of("gpt2", tokenizer, model)
    tokens = windows(tokenizer, TEXT, 4, n_tokens=16)
    padded, mask = _padded(tokens, 2)
    rows = rows_of(lm, padded, tmp_path, mask=mask)
    torch.testing.assert_close(rows, own_rows(model, tokens), rtol=1e-4, atol=1e-4)


def test_states_take_part_in_autograd_and_may_be_changed(tokenizer):
    states = states_at(lm_of("llama", tokenizer), [[5, 6, 7], [8, 9]], ["model.layers.1"])[0]
    x = states["model.layers.1"][:, 0]
    torch.nn.Linear(WIDTH, 2)(x).sum().backward()
    x.sub_(x.mean(0))
    assert x.requires_grad_().requires_grad


def test_sequences_longer_than_the_model_has_positions_are_refused(tokenizer, tmp_path):
    lm = lm_of("gpt2", tokenizer)
    long = torch.full((2, 129), 5)
    bae = bf.BinaryAutoencoder(WIDTH, 64)
    for call in (
        lambda: harvest(lm, long, "transformer.h.1", folder=tmp_path),
        lambda: states_at(lm, long.tolist(), ["transformer.h.1"]),
        lambda: SubstitutionTest(lm, long),
        lambda: generate(lm, "transformer.h.1", bae, "a cat sat", n_tokens=127),
    ):
        with pytest.raises(ValueError, match="must have at most 128 tokens a sequence"):
            call()


def test_a_harvest_under_way_is_never_swept(tokenizer, tmp_path, monkeypatch):
    started, go_on = threading.Event(), threading.Event()
    slow = lm_of("llama", tokenizer)

    def wait(*_arguments):
        started.set()
        go_on.wait(60)

    slow.model.model.layers[0].register_forward_pre_hook(wait)
    tokens = windows(tokenizer, TEXT, 16, n_tokens=64)
    found = []
    thread = threading.Thread(target=lambda: found.append(rows_of(slow, tokens, tmp_path)))
    thread.start()
    assert started.wait(60)
    (folder,) = tmp_path.glob(".unfinished-*")
    for path in (folder, *folder.iterdir()):
        os.utime(path, (1, 1))  # as if nothing had been written for years
    dead = tmp_path / ".unfinished-dead"
    dead.mkdir()
    os.utime(dead, (1, 1))
    rows_of(lm_of("llama", tokenizer), tokens, tmp_path)
    assert not dead.exists()
    assert folder.exists()
    go_on.set()
    thread.join(60)
    assert len(found) == 1


def test_a_folder_that_cannot_be_written_is_found_before_the_model_runs(tokenizer, tmp_path):
    lm = lm_of("llama", tokenizer)
    tokens = windows(tokenizer, TEXT, 16, n_tokens=64)
    (tmp_path / "file").touch()
    lm.model.forward = None
    with pytest.raises(OSError, match="folder must be one that can be written") as caught:
        rows_of(lm, tokens, tmp_path / "file" / "cache")
    assert caught.value.filename == str(tmp_path / "file" / "cache")


# -- which tokens are text -----------------------------------------------------------------------


def test_bos_is_put_first_where_the_tokenizer_asks_for_it(tokenizer, tmp_path):
    asking = word_pieces(bos=True, eos_token="</s>")
    assert (asks_for_bos(asking), asks_for_bos(tokenizer)) == (True, False)
    assert windows(asking, TEXT, 16, n_tokens=64)[:, 0].tolist() == [1] * 4
    assert 1 not in windows(asking, TEXT, 16, n_tokens=64, prepend_bos=False)
    again = windows(asking, "<s>" + TEXT, 16, n_tokens=64)  # a text that has it by itself
    assert torch.equal(again, windows(asking, TEXT, 16, n_tokens=64))
    lm = lm_of("llama", asking)
    assert prompt_tokens(lm, ["a cat"])[0][0] == 1
    assert prompt_tokens(lm, ["a cat"], prepend_bos=False)[0][0] != 1
    tokens = windows(asking, TEXT, 16, n_tokens=64)
    cache = harvest(lm, tokens, "model.layers.1", folder=tmp_path, progress=False)
    assert cache.manifest["prepend_bos"] is True
    assert cache.manifest["dropped"]["not_text"] == 0  # BOS is the position that is dropped


def test_windows_begin_with_what_the_tokenizer_puts_first_whatever_it_calls_it(tokenizer, tmp_path):
    def beginning(single, **names):
        made = word_pieces(**names)
        marks = [("<s>", 1), ("</s>", 2)]
        made.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=single, special_tokens=marks
        )
        return made

    end_first = beginning("</s> $A", bos_token="<s>", eos_token="</s>")  # as XGLM's
    framed = beginning("<s> $A </s>", cls_token="<s>", sep_token="</s>")  # as BERT's
    for made, first in ((end_first, 2), (framed, 1)):
        for asked in (None, True):
            tokens = windows(made, TEXT, 16, n_tokens=64, prepend_bos=asked)
            assert tokens[:, 0].tolist() == [first] * 4
        cache = harvest(
            lm_of("llama", made), tokens, "model.layers.1", folder=tmp_path, progress=False
        )
        assert cache.manifest["prepend_bos"] is True
        assert first not in windows(made, TEXT, 16, n_tokens=64, prepend_bos=False)
    behind = beginning("$A </s>", eos_token="</s>")
    assert not asks_for_bos(behind)
    assert torch.equal(windows(behind, TEXT, 16), windows(tokenizer, TEXT, 16))
    with pytest.warns(UserWarning, match=r"begins a text with the tokens \[1, 2\]"):
        windows(beginning("<s> </s> $A", bos_token="<s>", eos_token="</s>"), TEXT, 16)


def test_halves_of_characters_in_a_text_are_replaced_or_joined(tokenizer):
    broken, whole = TEXT[:50] + "\ud83d" + TEXT[50:], TEXT[:50] + "\ufffd" + TEXT[50:]
    assert torch.equal(windows(tokenizer, broken, 16), windows(tokenizer, whole, 16))
    broken, whole = TEXT[:50] + "\ud83d\ude00" + TEXT[50:], TEXT[:50] + "\U0001f600" + TEXT[50:]
    assert torch.equal(windows(tokenizer, broken, 16), windows(tokenizer, whole, 16))
    assert prompt_tokens(lm_of("llama", tokenizer), ["a cat \ud83d"])


def test_tokens_to_leave_out_may_come_as_any_numbers(tokenizer, tmp_path):
    lm = lm_of("llama", tokenizer)
    tokens = windows(tokenizer, TEXT, 16, n_tokens=64)
    out = sorted({int(i) for i in tokens[:, 3]})
    forms = (out, (i for i in out), torch.tensor(out), np.array(out), set(out))
    for number, form in enumerate(forms):
        cache = harvest(
            lm, tokens, "model.layers.1", folder=tmp_path / str(number), exclude_tokens=form,
            max_norm_ratio=np.float32(100), progress=False,
        )  # fmt: skip
        assert cache.manifest["exclude_tokens"] == out
        kept = cache.tokens[cache.row_window.long(), cache.row_position.long()]
        assert len(kept) == int((~torch.isin(tokens[:, 1:], torch.tensor(out))).sum())
    with pytest.raises(TypeError, match=r"hook must be the path of a module.*got 11"):
        harvest(lm, tokens, 11, folder=tmp_path)


def test_what_is_no_text_tokens_or_model_is_named(tokenizer, tmp_path):
    lm = lm_of("llama", tokenizer)
    tokens = windows(tokenizer, TEXT, 16, n_tokens=64)
    with pytest.raises(TypeError, match=r"text must be a string; got list; '.*join\(texts\)"):
        windows(tokenizer, [TEXT, TEXT], 16)
    with pytest.raises(TypeError, match="text must be a string; got NoneType"):
        windows(tokenizer, None, 16)
    for wrong, message in (
        ({"token_windows": tokens.numpy()}, "token_windows must be an integer tensor; got ndarray"),
        ({"token_windows": tokens.float()}, "token_windows must be an integer .*; got torch.float"),
        ({"exclude_tokens": 5}, "exclude_tokens must be token ids, or None; got 5"),
        (
            {"max_norm_ratio": None},
            "max_norm_ratio must be over 1, or infinite to keep all; got None",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            harvest(lm, **{"token_windows": tokens, "folder": tmp_path, **wrong})
    with pytest.raises(TypeError, match=r"got DataParallel; give its \.module"):
        lm_of("llama", tokenizer, torch.nn.DataParallel(lm.model))


def test_padding_is_masked_and_special_tokens_are_no_rows(tmp_path):
    padded = word_pieces(bos=True, eos_token="</s>", pad_token="<pad>")
    lm = lm_of("gpt2", padded)
    assert special_tokens(padded) == [0, 1, 2]
    texts = [[1, 5, 6, 7, 2], [1, 8, 9, 10, 11, 12]]
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    tokens[0, 3:] = torch.tensor(texts[0])  # padding on the left
    tokens[1, :6] = torch.tensor(texts[1])
    cache = harvest(
        lm, tokens, "transformer.h.1", folder=tmp_path, max_norm_ratio=1e9, progress=False
    )
    expected = torch.cat(
        [
            own_rows(lm.model, torch.tensor([texts[0]]))[:-1],
            own_rows(lm.model, torch.tensor([texts[1]])),
        ]
    )
    torch.testing.assert_close(cache.rows, expected, rtol=1e-4, atol=1e-5)
    kept = cache.tokens[cache.row_window.long(), cache.row_position.long()].tolist()
    assert kept == [5, 6, 7, 8, 9, 10, 11, 12]
    assert "at padding or special tokens" in cache.dropped_rows()
    everything = harvest(
        lm, tokens, "transformer.h.1", folder=tmp_path, mask=tokens != 0, exclude_tokens=(2,),
        max_norm_ratio=1e9, progress=False,
    )  # fmt: skip
    assert len(everything) == 8
    with pytest.raises(ValueError, match=r"mask must be \[2, 8\]"):
        harvest(lm, tokens, "transformer.h.1", folder=tmp_path, mask=torch.ones(2, 7))


def test_only_as_much_text_as_needed_is_tokenized_and_it_is_the_same(tokenizer):
    seen = []

    class Spy:
        bos_token_id = None

        def __call__(self, text, **options):
            seen.append(len(text))
            return tokenizer(text, **options)

    whole = windows(tokenizer, TEXT, 16)
    for n in (16, 160, 1600, 6400):
        seen.clear()
        assert torch.equal(windows(Spy(), TEXT, 16, n_tokens=n), whole[: n // 16])
        assert sum(seen) < 12 * (n + 128)
    dense = "漢字" * 5000  # many tokens a character
    assert torch.equal(
        windows(tokenizer, dense, 16, n_tokens=320), windows(tokenizer, dense, 16)[:20]
    )


LONG = {"lines": TEXT, "dense": "漢字é" * 4000, "breaks": "\n" * 9000}


@pytest.mark.parametrize("kind", ["bytes", "spaces", "words"])
@pytest.mark.parametrize(
    "text", [TEXT, "漢字é" * 4000, "\n" * 9000], ids=["lines", "dense", "breaks"]
)
def test_a_long_text_is_tokenized_by_pieces_and_the_tokens_are_the_same(kind, text, monkeypatch):
    if kind == "bytes":
        tokenizer = word_pieces(eos_token="</s>")
    else:
        core = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<u>"))
        if kind == "spaces":  # as SentencePiece does it: the whole text is one word
            core.normalizer = tokenizers.normalizers.Sequence(
                [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
            )
        else:
            core.normalizer = tokenizers.normalizers.NFKD()  # places in the text as it was
            core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        lines = [line.replace(" ", "▁") if kind == "spaces" else line for line in TEXT.split("\n")]
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=200, special_tokens=["<u>"], show_progress=False, max_token_length=12
        )
        core.train_from_iterator([*lines, "\n", "漢字é"], trainer)
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<u>")
    if not tokenizer(text, add_special_tokens=False)["input_ids"]:
        return  # nothing but space, and this tokenizer drops it
    whole = windows(tokenizer, text, 16)
    seen = []

    def spy(part, **options):
        seen.append(len(part))
        return tokenizer(part, **options)

    monkeypatch.setattr("bae_fast.lm.text._PIECE", 2048)
    monkeypatch.setattr("bae_fast.lm.text._OVERLAP", 512)
    assert torch.equal(windows(spy, text, 16, prepend_bos=False), whole)
    assert len(seen) > 2
    assert max(seen) <= 2048 + 512
    seen.clear()
    n = whole.numel() // 2
    found = windows(spy, text, 16, n_tokens=n, prepend_bos=False)
    assert torch.equal(found, whole[: -(-n // 16)])
    assert max(seen) <= 2048 + 512


def test_pieces_that_do_not_fit_together_are_given_up(monkeypatch):
    monkeypatch.setattr("bae_fast.lm.text._PIECE", 100)
    monkeypatch.setattr("bae_fast.lm.text._OVERLAP", 40)
    seen = []

    def pairs(text, **options):
        seen.append(len(text))
        starts = range(0, len(text), 3)  # three characters a token, from wherever a piece begins
        places = [(i, i + 3) for i in starts]
        return {"input_ids": [ord(text[i]) for i in starts], "offset_mapping": places}

    found = windows(pairs, TEXT[:1000], 10, prepend_bos=False)
    assert found.view(-1).tolist() == [ord(c) for c in TEXT[:1000:3]][: found.numel()]
    assert seen[-1] == 1000


# -- names, answers, files -----------------------------------------------------------------------


def test_names_of_transformerlens_are_understood(tokenizer):
    for kind, path in (("llama", "model.layers.1"), ("gpt2", "transformer.h.1")):
        model = model_of(kind, tokenizer)
        assert resolve_hook(model, "blocks.1.hook_resid_post") == path
        assert resolve_hook(model, "blocks.2.hook_resid_pre") == path
        assert resolve_hook(model, "blocks.1.hook_mlp_out") == f"{path}.mlp"
        with pytest.raises(ValueError, match=r"must name a module's output .*\.1' \(the output of"):
            resolve_hook(model, "blocks.1.hook_resid_mid")
        with pytest.raises(ValueError, match="got block 9"):
            resolve_hook(model, "blocks.9.hook_resid_post")
    gemma = model_of("gemma3", tokenizer)
    added = resolve_hook(gemma, "blocks.1.hook_mlp_out")
    assert added == "model.layers.1.post_feedforward_layernorm"


@pytest.mark.parametrize(
    ("text", "verdict", "phrase"),
    [
        ("<think>\nNo digit, yet a number.\n</think>\n\nYes", True, "Yes"),
        ("Yes, or rather a comma.\n</think>\n\nNo", False, "No"),
        ("[THINK]yes?[/THINK]No", False, "No"),
        ("◁think▷yes◁/think▷ no", False, "no"),
        ("<|begin_of_thought|>yes<|end_of_thought|>\n\nNo", False, "No"),
        ("<|channel|>analysis<|message|>yes<|end|><|channel|>final<|message|>No", False, "No"),
        ("analysisIs it? yes.assistantfinalNo", False, "No"),
        ("<Thinking>yes</Thinking><answer>No</answer>", False, "No"),
        ("No reason to say so. Final answer: yes", True, None),
        ("<think>yes, I think", None, ""),
        ("Yes.", True, "Yes"),
    ],
)
def test_thoughts_are_not_taken_for_the_answer(text, verdict, phrase):
    assert read_verdict(text) is verdict
    if phrase is not None:
        assert read_phrase(text) == phrase
    assert only_thoughts(text) == (verdict is None)


def test_thoughts_begun_by_the_question_are_closed():
    assert close_thoughts("<|assistant|>\n<think>\n") == "\n</think>\n\n"
    assert close_thoughts("<think>\n\n</think>\n\n") == ""
    assert close_thoughts("Answer:") == ""


def test_a_folder_of_another_kind_of_model_is_refused_in_one_line(tokenizer, tmp_path):
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=32, d_ff=64, num_layers=1, num_heads=2
    )
    transformers.AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a causal language model") as caught:
        load_language_model(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.safetensors", lambda data: data[:-40]),
        ("model.safetensors", lambda data: (10**19 % 2**64).to_bytes(8, "little") + data[8:]),
        ("model.safetensors", lambda data: data.replace(b'"F32"', b'"F99"', 1)),
        ("config.json", lambda data: data.replace(b'"vocab_size": ', b'"vocab_size": {}, "x": ')),
        ("config.json", lambda data: data.replace(b'"rope_theta": ', b'"rope_theta": "a", "x": ')),
        ("config.json", lambda _data: b"[1]"),
        ("tokenizer.json", lambda data: data.replace(b'"id": 1', b'"id": 1.5', 1)),
        ("tokenizer_config.json", lambda _data: b'{"eos_token": 3}'),
        ("generation_config.json", lambda _data: b"7"),
    ],
)
def test_a_damaged_file_of_a_model_is_one_line(name, change, tokenizer, tmp_path):
    model_of("llama", tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / name
    data = path.read_bytes()
    assert change(data) != data
    path.write_bytes(change(data))
    with pytest.raises(ValueError, match="could not be loaded") as caught:
        load_language_model(str(tmp_path), dtype="float32")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


HUB = """
import sys
from bae_fast.lm import load_language_model, load_tokenizer
for revision in (None, "old", sys.argv[1], "gone"):
    try:
        lm = load_language_model("tiny/llama", dtype="float32", revision=revision)
        assert len(load_tokenizer("tiny/llama", revision=revision)) == len(lm.tokenizer)
        print(lm.revision, float(lm.model.lm_head.weight[0, 0]))
    except ValueError as error:
        print("refused:", error)
"""


def test_weights_that_a_folder_lacks_are_not_drawn_at_random(tokenizer, tmp_path):
    from safetensors.torch import load_file, save_file

    model = model_of("llama", tokenizer)
    model.save_pretrained(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "body")
    for folder in ("whole", "body"):
        tokenizer.save_pretrained(tmp_path / folder)
    with pytest.warns(UserWarning, match=r"holds no head .* random weights \(lm_head\.weight\)"):
        lm = load_language_model(str(tmp_path / "body"), dtype="float32")
    tokens = windows(tokenizer, TEXT, 16, n_tokens=64)
    torch.testing.assert_close(own_rows(lm.model, tokens), own_rows(model, tokens))
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1, which would be random: model\.layers\.1\.mlp"):
        load_language_model(str(tmp_path / "whole"), dtype="float32")


def test_a_revision_of_the_hub_is_the_one_that_is_loaded(tokenizer, tmp_path):
    # the hub's folder on disk, two commits of one model
    repository = tmp_path / "hub" / "models--tiny--llama"
    commits = {"main": "a" * 40, "old": "b" * 40}
    (repository / "refs").mkdir(parents=True)
    for number, (name, commit) in enumerate(commits.items()):
        (repository / "refs" / name).write_text(commit)
        model = model_of("llama", tokenizer)
        model.lm_head.weight[0, 0] = number + 1
        model.save_pretrained(repository / "snapshots" / commit)
        tokenizer.save_pretrained(repository / "snapshots" / commit)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = processes.run("-c", HUB, commits["old"], env=environment)
    assert done.returncode == 0, done.stderr
    *found, gone = done.stdout.splitlines()
    assert found == [f"{'a' * 40} 1.0", f"{'b' * 40} 2.0", f"{'b' * 40} 2.0"]
    assert gone.startswith("refused: name must be a folder with")
    assert "'tiny/llama' could not be loaded" in gone


def test_hidden_states_of_another_place_are_refused():
    trained = {"model_name": "tiny/llama", "hook_name": "model.layers.1"}
    facts = {**trained, "model_revision": "a" * 40}
    for metadata in (trained, {}, {**trained, "hook_name": "blocks.1.hook_resid_post"}):
        check_origin(metadata, facts)
    check_origin({**trained, "model_name": "elsewhere/llama"}, facts)  # a folder that was moved
    with pytest.raises(ValueError, match=r"--model must be 'tiny/llama'.*got 'tiny/gemma'"):
        check_origin(trained, {**facts, "model_name": "tiny/gemma"})
    with pytest.raises(ValueError, match=r"--hook must be 'model.layers.1'.*'model.layers.2'"):
        check_origin(trained, {**facts, "hook_name": "model.layers.2"})
    pair = {"transcoder_hooks": ["model.norm", "model.layers.1"]}
    check_origin(pair, {**facts, "hook_name": "model.norm"})
    with pytest.raises(ValueError, match=r"--hook must be 'model.norm'"):
        check_origin(pair, facts)
    with pytest.warns(UserWarning, match=f"revision {'b' * 40} of 'tiny/llama'"):
        check_origin({**trained, "model_revision": "b" * 40}, facts)
    check_origin({**trained, "model_revision": "files-0123"}, facts)


def gguf_file(changes=()):
    """A GGUF file of one tensor [4, 4] of float32, with numbers put at some places of it."""

    def text(value):
        return struct.pack("<Q", len(value)) + value

    parts = {
        "start": b"GGUF",
        "version": struct.pack("<I", 3),
        "tensors": struct.pack("<Q", 1),
        "values": struct.pack("<Q", 3),
        "key": text(b"general.name"),
        "kind": struct.pack("<I", 8),
        "string": text(b"tiny"),
        "numbers": text(b"numbers") + struct.pack("<II", 9, 5),
        "n_numbers": struct.pack("<Q", 2),
        "words": struct.pack("<ii", 1, 2) + text(b"words") + struct.pack("<II", 9, 8),
        "n_words": struct.pack("<Q", 2),
        "name": text(b"a") + text(b"bc") + text(b"weight"),
        "n_dimensions": struct.pack("<I", 2),
        "rows": struct.pack("<Q", 4),
        "columns": struct.pack("<Q", 4) + struct.pack("<I", 0),
        "offset": struct.pack("<Q", 0),
    }
    for name, value in dict(changes).items():
        form = "<I" if name in ("version", "kind", "n_dimensions") else "<Q"
        parts[name] = struct.pack(form, value) + parts[name][struct.calcsize(form) :]
    header = b"".join(parts.values())
    return header + bytes(-len(header) % 32) + torch.arange(16.0).numpy().tobytes()


def test_a_header_of_gguf_is_walked_as_its_library_reads_it(tmp_path):
    reader = pytest.importorskip("gguf").GGUFReader
    path = tmp_path / "weights.gguf"
    path.write_bytes(gguf_file())
    gguf_copies.check_header(path)
    (tensor,) = reader(path).tensors
    assert (tensor.name, tensor.data.tolist()) == ("weight", torch.arange(16.0).view(4, 4).tolist())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 9}, "must be of GGUF version 2 or 3; got 9"),
        ({"tensors": 10**19}, "is cut off or damaged"),
        ({"values": 4}, "damaged"),
        ({"values": 10**19}, "damaged"),
        ({"key": 10**19}, "its header counts 10,000,000,000,000,000,000 bytes"),
        ({"kind": 77}, "is of the kind 77, which GGUF lacks"),
        ({"n_numbers": 10**19}, "40,000,000,000,000,000,000 bytes, and"),
        ({"n_words": 10**19}, "is cut off or damaged"),
        ({"n_dimensions": 2**32 - 1}, "has 4,294,967,295 dimensions, and 8 are allowed"),
        ({"rows": 10**19}, "bytes of weights more than it has"),
        ({"rows": 5}, "its header counts 16 bytes of weights more than it has"),
        ({"offset": 10**19}, "bytes of weights more than it has"),
    ],
)
def test_counts_of_gguf_are_bounded_by_the_file(changes, said, tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "weights.gguf"
    path.write_bytes(gguf_file(changes))
    with pytest.raises(ValueError, match=said) as caught:
        load_tokenizer(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_arrays_within_arrays_of_gguf_have_an_end(tmp_path):
    depth = 100_000
    key = struct.pack("<Q", 4) + b"deep" + struct.pack("<I", 9)
    nested = depth * struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 4, 0)
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + nested)
    with pytest.raises(ValueError, match="arrays lie in more than 8 others"):
        gguf_copies.check_header(path)


def test_a_header_of_gguf_is_walked_once_as_long_as_the_file_is_the_same(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    path, walks = tmp_path / "weights.gguf", []
    walk = gguf_copies._Header.check
    monkeypatch.setattr(
        gguf_copies._Header, "check", lambda header: (walks.append(0), walk(header))[1]
    )
    path.write_bytes(gguf_file())
    gguf_copies.check_header(path)
    gguf_copies.check_header(path)
    assert len(walks) == 1
    path.write_bytes(gguf_file({"rows": 5}))
    os.utime(path, ns=(0, 0))
    with pytest.raises(ValueError, match="16 bytes of weights more"):
        gguf_copies.check_header(path)
    assert len(walks) == 2


@pytest.mark.parametrize("size", [0, 3, 4, 20, 100])
def test_a_cut_gguf_file_is_one_line(size, tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "weights.gguf"
    path.write_bytes(gguf_file()[:size])
    with pytest.raises(ValueError, match=r"weights.gguf (does not begin as|is cut off)"):
        load_tokenizer(str(path))


def test_a_dequantised_copy_is_whole_or_absent(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"stands for the weights")
    model = model_of("llama", tokenizer)
    assert gguf_copies.copy_of(path, torch.float32) is None
    assert gguf_copies.can_keep_copy(path, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "save_pretrained", _full_disk)
        with pytest.warns(RuntimeWarning, match=r"weights.gguf is not kept.*No space left"):
            gguf_copies.keep_copy(path, model, tokenizer, torch.float32)
    assert list((tmp_path / "cache" / "bae_fast" / "models").iterdir()) == []
    gguf_copies.keep_copy(path, model, tokenizer, torch.float32)
    folder = gguf_copies.copy_of(path, torch.float32)
    lm = load_language_model(str(folder), dtype="float32")
    assert torch.equal(lm.model.lm_head.weight, model.lm_head.weight)
    assert lm.tokenizer(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    path.write_bytes(b"other weights, same name")
    os.utime(path, (time.time() + 5,) * 2)
    assert gguf_copies.copy_of(path, torch.float32) is None
    with pytest.warns(RuntimeWarning, match="bytes free and"):
        assert not gguf_copies.can_keep_copy(path, 10**18)


def _rewrite(path, content):
    """Write a file in place, with its old time of modification, once the clock has ticked."""
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def at_rest(monkeypatch, tmp_path):
    """Whatever is kept is kept here, of files that were written just now too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(known_files, "AT_REST", -(10.0**6))


def test_a_value_of_files_is_kept_until_one_of_them_changes(at_rest, tmp_path, monkeypatch):
    first, second = tmp_path / "a", tmp_path / "b"
    for path in (first, second):
        path.write_bytes(b"123")
    looked = known_files.Known("sum", [first, second], "float32")
    assert looked.value() is None
    looked.keep("12")
    assert known_files.Known("sum", [first, second], "float32").value() == "12"
    for other in (("sum", [first], "float32"), ("sum", [first, second]), ("mean", [first, second])):
        assert known_files.Known(*other).value() is None
    # same size, same name, same time of modification
    _rewrite(second, b"124")
    changed = known_files.Known("sum", [first, second], "float32")
    assert changed.value() is None
    # a file that changes while it is read
    _rewrite(second, b"125")
    changed.keep("13")
    now = known_files.Known("sum", [first, second], "float32")
    assert now.value() is None
    # a file that may change once more within a tick of the clock
    monkeypatch.setattr(known_files, "AT_REST", 10.0**6)
    known_files.Known("sum", [first, second], "float32").keep("14")
    assert now.value() is None
    now.keep("14")
    assert known_files.Known("sum", [first, second], "float32").value() == "14"
    (kept,) = (tmp_path / "cache" / "bae_fast" / "digests").iterdir()
    kept.write_text('{"files":')
    assert now.value() is None
    # another file put in one's place
    now.keep("14")
    third = tmp_path / "c"
    third.write_bytes(b"123")
    os.utime(third, ns=(0, first.stat().st_mtime_ns))
    third.rename(first)
    assert known_files.Known("sum", [first, second], "float32").value() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(third.parent / "b" / "no folder"))
    nowhere = known_files.Known("sum", [first])
    nowhere.keep("6")
    assert nowhere.value() is None


def test_a_dequantised_copy_is_read_through_once(at_rest, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"stands for the weights")
    model = model_of("llama", tokenizer)
    assert gguf_copies.can_keep_copy(path, 1000)
    gguf_copies.keep_copy(path, model, tokenizer, torch.float32)
    hashed, summed = [], []
    file_digest, model_digest_ = known_files.file_digest, model_loading.model_digest
    monkeypatch.setattr(
        known_files, "file_digest", lambda *given: hashed.append(given) or file_digest(*given)
    )
    monkeypatch.setattr(
        model_loading, "model_digest", lambda given: summed.append(given) or model_digest_(given)
    )
    lms = [load_language_model(str(path), dtype="float32") for _ in range(3)]
    assert (len(hashed), len(summed)) == (0, 1)  # the file was hashed for the copy
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for lm in lms:
        held = {**dict(lm.model.named_parameters()), **dict(lm.model.named_buffers())}
        assert held.keys() == own.keys()
        assert all(torch.equal(held[name], own[name]) for name in own)
        assert lm.loaded == model_digest(lm.model)
        assert lm.current_revision() == lm.revision
    # weights are mapped: what is changed in memory is seen, and does not reach the file
    with torch.no_grad():
        lms[2].model.lm_head.weight[3, 4] += 1
    assert lms[2].current_revision() == f"{lms[2].revision}+{model_digest(lms[2].model)}"
    assert lms[1].current_revision() == lms[1].revision
    # the copy's own weights are written anew, then the file is
    folder = gguf_copies.copy_of(path, torch.float32)
    lms[2].model.save_pretrained(folder)
    summed.clear()
    edited = load_language_model(str(path), dtype="float32")
    assert len(summed) == 1
    assert edited.loaded == model_digest(edited.model) != lms[0].loaded
    _rewrite(path, b"Stands for the weights")
    assert gguf_copies.copy_of(path, torch.float32) is None
    assert len(hashed) == 1


def _full_disk(*_arguments, **_options):
    raise OSError(28, "No space left on device")


def test_blocks_of_a_running_model_overlap():
    """As those of two threads do: the one that began first may end first."""
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(2, 2)).train()
    model[1].eval()
    torch._dynamo.reset()
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    function = torch.compile(lambda x: x + 1, backend=backend)
    first, second = running(model), running(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(module.training for module in model.modules())
    function(torch.ones(2))
    assert not compiled
    second.__exit__(None, None, None)
    assert [module.training for module in model.modules()] == [True, True, False]
    function(torch.ones(2))
    assert compiled
