"""Splices in every kind of language model: which tokens are replaced, and what is refused."""

from __future__ import annotations

import pytest
import torch
from language_models import MODELS, TEXT, WIDTH, lm_of, model_of, own_rows, rows_of

import bae_fast as bf
from bae_fast.causal import SubstitutionTest, spliced
from bae_fast.lm import LanguageModel, windows


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
