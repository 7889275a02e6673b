"""Shared by tests of language models."""

import pytest


@pytest.fixture(scope="module")
def tokenizer():
    from language_models import word_pieces

    return word_pieces(eos_token="</s>")
