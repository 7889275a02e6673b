"""The odd one out: a tiny random encoder finds it where contexts share words, and not elsewhere."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

import bae_fast as bf
from bae_fast.interpret.intruder import IntruderConfig, SentenceEncoder, intruder_scores
from bae_fast.lm.cache import ActivationCache

N_TOPICS, WORDS_EACH, LENGTH = 8, 4, 16
WORDS = [f"t{topic}w{i}" for topic in range(N_TOPICS) for i in range(WORDS_EACH)]


class Tokenizer:
    def decode(self, ids, **_options):
        return "".join(f" {WORDS[i]}" for i in ids)

    def convert_ids_to_tokens(self, token):
        return WORDS[token]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A random BERT of one block over the words, saved and read as a user's would be."""
    import transformers
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers

    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS) + 2, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=160, initializer_range=0.5,
    )  # fmt: skip
    model = transformers.BertModel(config)
    # what a text is about decides, not where its words stand
    torch.nn.init.zeros_(model.embeddings.position_embeddings.weight)
    model.save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Fast(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(folder)
    return folder


def cache_and_topics(n_windows: int = 64) -> tuple[ActivationCache, torch.Tensor]:
    """Windows of the words of one topic each."""
    generator = torch.Generator().manual_seed(0)
    topics = torch.arange(n_windows) % N_TOPICS
    words = torch.randint(WORDS_EACH, (n_windows, LENGTH), generator=generator)
    tokens = (topics[:, None] * WORDS_EACH + words).int()
    n = n_windows * LENGTH
    cache = ActivationCache(
        folder=None, manifest={}, rows=torch.zeros(n, 1),
        row_window=(torch.arange(n) // LENGTH).int(),
        row_position=(torch.arange(n) % LENGTH).int(), tokens=tokens,
    )  # fmt: skip
    return cache, topics.repeat_interleave(LENGTH)


CONFIG = IntruderConfig(n_features=8, n_draws=12, before=5, after=2)


def test_features_of_topics_have_alike_contexts(encoder):
    cache, topics = cache_and_topics()
    code = bf.BinaryCode.from_dense(topics[:, None] == torch.arange(N_TOPICS))
    found = intruder_scores(
        code, cache, range(cache.n_rows), Tokenizer(), SentenceEncoder(encoder), CONFIG
    )
    assert found.n_features == N_TOPICS
    assert found.chance == 0.2
    assert found.mean > 0.7
    assert found.low <= found.mean <= found.high
    assert found == intruder_scores(
        code, cache, range(cache.n_rows), Tokenizer(), SentenceEncoder(encoder), CONFIG
    )


def test_features_at_random_are_found_by_chance(encoder):
    cache, topics = cache_and_topics()
    generator = torch.Generator().manual_seed(1)
    code = bf.BinaryCode.from_dense(torch.rand(len(topics), 40, generator=generator) < 0.1)
    config = IntruderConfig(n_features=40, n_draws=10, before=5, after=2)
    found = intruder_scores(
        code, cache, range(cache.n_rows), Tokenizer(), SentenceEncoder(encoder), config
    )
    assert found.mean == pytest.approx(0.2, abs=0.08)


def test_an_encoder_that_tells_nothing_is_right_by_chance():
    """Contexts that are all as alike: any is as good a guess, and the odd one is one of five."""
    cache, topics = cache_and_topics()
    code = bf.BinaryCode.from_dense(topics[:, None] == torch.arange(N_TOPICS))

    def constant(texts):
        return torch.ones(len(texts), 3) / 3**0.5

    found = intruder_scores(code, cache, range(cache.n_rows), Tokenizer(), constant, CONFIG)
    assert found.mean == pytest.approx(0.2)
    with pytest.raises(ValueError, match="encoder must give finite vectors; got NaN or Inf"):
        intruder_scores(
            code, cache, range(cache.n_rows), Tokenizer(), lambda t: constant(t) * math.nan, CONFIG
        )


def test_rows_are_counted_from_where_the_code_begins(encoder):
    cache, topics = cache_and_topics()
    rows = range(LENGTH * 3, cache.n_rows)
    code = bf.BinaryCode.from_dense(topics[rows.start :, None] == torch.arange(N_TOPICS))
    found = intruder_scores(code, cache, rows, Tokenizer(), SentenceEncoder(encoder), CONFIG)
    assert found.mean > 0.7


def test_the_encoder_gives_unit_vectors_whatever_the_padding(encoder):
    encode = SentenceEncoder(encoder)
    texts = ["t0w0 t0w1", "t1w0 t1w1 t1w2 t1w3 t1w4", "t2w0"]
    found = encode(texts)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    alone = torch.cat([encode([text]) for text in texts])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_what_it_cannot_take_is_named(tmp_path):
    with pytest.raises(ValueError, match="encoder must be the folder of a sentence encoder"):
        SentenceEncoder(tmp_path)
    with pytest.raises(ValueError, match="n_own must be an int >= 2; got 1"):
        IntruderConfig(n_own=1)
    with pytest.raises(ValueError, match="least must be at least n_own=4; got 3"):
        IntruderConfig(least=3)
    cache, _ = cache_and_topics(2)
    equal = bf.BinaryCode.from_dense((torch.arange(32) < 12)[:, None].expand(32, 3))
    with pytest.raises(ValueError, match="features that are on in different rows; got 3 that are"):
        intruder_scores(equal, cache, range(32), Tokenizer(), lambda texts: torch.zeros(1))
    never = bf.BinaryCode.from_dense(torch.zeros(32, 4))
    with pytest.raises(ValueError, match="two features that are on in 10 rows or more"):
        intruder_scores(never, cache, range(32), Tokenizer(), lambda texts: torch.zeros(1))
    with pytest.raises(ValueError, match="code must have 31 rows; got 32"):
        intruder_scores(never, cache, range(31), Tokenizer(), lambda texts: torch.zeros(1))
