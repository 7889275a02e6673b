"""Labels that are read off the text, and how well the best few features tell them."""

from __future__ import annotations

import pytest
import torch

from bae_fast.analysis.labels import LABELS, token_labels
from bae_fast.analysis.probing import sparse_probes
from bae_fast.autoencoder import Autoencoder, AutoencoderConfig

TOKENS = [
    "The", " prompt", " 3.14", ".", "\n", "  ", "   x", " =", " 1", "\n\n", ">>>", " print",
    '("', "hello", '")', "\n", "End", " \"", "said", " he", "\"", "<pad>",
]  # fmt: skip


class Tokenizer:
    all_special_ids = (len(TOKENS) - 1,)

    def decode(self, ids, **_options):
        return "".join(TOKENS[i] for i in ids)

    def convert_ids_to_tokens(self, token):
        return TOKENS[token]


def test_labels_are_what_their_names_say():
    tokens = torch.arange(len(TOKENS)).view(2, -1)
    found = token_labels(Tokenizer(), tokens)
    assert set(found) == set(LABELS)

    def marked(name):
        assert found[name].shape == tokens.shape
        return [TOKENS[i] for i in found[name].flatten().nonzero().flatten().tolist()]

    assert marked("capital") == ["The", "End"]
    assert marked("digit") == [" 3.14", " 1"]
    assert marked("punctuation") == [".", " =", ">>>", '("', '")', ' "', '"']
    assert marked("inside a word") == []
    assert marked("quoted") == ["hello", "said", " he"]
    assert marked("line start") == ["The", "   x", ">>>", "End"]
    assert marked("code") == ["  ", "   x", " =", " 1", ">>>", " print", '("', "hello", '")']


def test_words_of_a_class_are_whole_words():
    texts = [
        "In", " the", " the", "atre", " with", "out", "\n", "to", "day", "'", "s", " THAT", " is",
        "_", "by", "<pad>", "and", " ", "or", ".", "In",
    ]  # fmt: skip

    class Reads(Tokenizer):
        all_special_ids = (texts.index("<pad>"),)

        def decode(self, ids, **_options):
            return "".join(texts[i] for i in ids)

        def convert_ids_to_tokens(self, token):
            return texts[token]

    found = token_labels(Reads(), torch.arange(len(texts)).view(3, 7))

    def places(name):
        return found[name].flatten().nonzero().flatten().tolist()

    assert places("inside a word") == [3, 5, 8]
    assert places("determiner") == [1, 11]
    assert places("preposition") == [0, 14, 20]
    assert places("conjunction") == [11, 16, 18]
    assert places("auxiliary") == [12]
    assert places("pronoun") == []


class Given(Autoencoder):
    """Features that are the columns of x as they are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.config = AutoencoderConfig(width, width, width)
        self.register_normalization(width, None)

    def encode(self, x):
        return x.clamp_min(0)

    def decode(self, code):
        return code


def data(n: int, seed: int):
    """Feature 3 is the label "one"; "both" is features 5 or 7; the rest is noise."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(n, 12, generator=generator) < 0.3).float()
    both = (x[:, 5] + x[:, 7]) > 0
    rare = torch.zeros(n, dtype=torch.bool)
    rare[:5] = True
    return x, {"one": x[:, 3] > 0, "both": both, "rare": rare}


def test_the_best_features_are_found_and_judged_held_out():
    model = Given(12).eval()
    (x, labels), (z, held) = data(2000, 0), data(1500, 1)
    found = sparse_probes(model, x, labels, z, held, k=(1, 2))
    one, both = found[1]
    assert (one.label, both.label) == ("one", "both")  # the rare one has too few rows
    assert one.features == (3,)
    assert (one.accuracy, one.low, one.high, one.missed) == (1, 1, 1, 0)
    # one of two is found, and of it what it says by itself
    assert both.features[0] in (5, 7)
    told = z[:, both.features[0]] > 0
    right = held["both"]
    with_it, without = float(told[right].float().mean()), float((~told)[~right].float().mean())
    assert both.accuracy == pytest.approx((with_it + without) / 2)
    assert both.missed == pytest.approx(1 - with_it)
    assert both.low < both.accuracy < both.high
    assert set(found[2][1].features) == {5, 7}
    assert found[2][1].accuracy == 1


def test_a_label_that_no_feature_knows_is_told_by_chance():
    model = Given(12).eval()
    (x, _), (z, _) = data(3000, 0), data(3000, 1)
    generator = torch.Generator().manual_seed(2)
    labels = [{"none": torch.rand(3000, generator=generator) < 0.1} for _ in range(2)]
    (probe,) = sparse_probes(model, x, labels[0], z, labels[1], k=(5,))[5]
    assert probe.accuracy == pytest.approx(0.5, abs=0.05)
    assert probe.low < 0.5 < probe.high


def test_groups_are_drawn_together():
    """Rows repeated eight times in a group tell no more than once."""
    model = Given(12).eval()
    (x, labels), (z, held) = data(2000, 0), data(300, 1)
    labels, held = ({"both": part["both"]} for part in (labels, held))
    alone = sparse_probes(model, x, labels, z, held, k=(1,))[1][0]
    again = {"both": held["both"].repeat_interleave(8)}
    groups = torch.arange(300).repeat_interleave(8)
    together = sparse_probes(
        model, x, labels, z.repeat_interleave(8, 0), again, k=(1,), groups=groups
    )[1][0]
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))


def test_what_it_cannot_take_is_named():
    model = Given(12).eval()
    x, labels = data(100, 0)
    with pytest.raises(ValueError, match=r"train_labels must have shape \[100\]; 'one' has \[99\]"):
        sparse_probes(model, x, {"one": labels["one"][:99]}, x, labels)
    with pytest.raises(ValueError, match="k must be ints of 1 to d_sae=12"):
        sparse_probes(model, x, labels, x, labels, k=(13,))
    with pytest.raises(ValueError, match="labels must have at least 20 rows of either class"):
        sparse_probes(model, x, {"rare": labels["rare"]}, x, {"rare": labels["rare"]}, k=(1,))
