"""Which tokens are text, and how a long text becomes tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from language_models import TEXT, lm_of, own_rows, word_pieces

from bae_fast.causal import prompt_tokens
from bae_fast.lm import asks_for_bos, harvest, special_tokens, windows

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


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
