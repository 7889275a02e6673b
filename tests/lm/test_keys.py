"""Keys and values of earlier tokens, whatever this version of transformers calls them."""

import pytest
import torch

from bae_fast.lm.keys import NAMES, cache_name, given_cache, kept_cache, keys_name


class Newer(torch.nn.Module):
    def forward(self, input_ids, cache=None, use_cache=None, **others):
        pass


class Older(torch.nn.Module):
    def forward(self, input_ids, past_key_values=None, use_cache=None):
        pass


class Recurrent(torch.nn.Module):
    def forward(self, input_ids, cache_params=None, cache_position=None):
        pass


def test_the_name_is_that_of_the_models_own_forward():
    assert [cache_name(made()) for made in (Newer, Older, Recurrent)] == [*NAMES, None]


@pytest.mark.parametrize("name", NAMES)
def test_both_names_are_read_from_calls_and_from_outputs(name):
    keys = object()
    other = next(one for one in NAMES if one != name)
    assert given_cache({"input_ids": 0, name: keys}) is keys
    assert given_cache({name: keys, other: None}) is keys
    assert given_cache({name: None, "cache_params": keys}) is None
    assert kept_cache({"last_hidden_state": 0, name: keys}) is keys
    assert kept_cache({"last_hidden_state": 0}) is None


def test_this_versions_models_have_one_of_the_names():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    name = cache_name(model)
    assert name in NAMES
    assert keys_name(model) == name
    first = kept_cache(model.model(input_ids=torch.tensor([[3, 4]]), use_cache=True))
    assert first.get_seq_length() == 2
    whole = model(input_ids=torch.tensor([[3, 4, 5]])).logits[:, -1]
    rest = model(input_ids=torch.tensor([[5]]), **{name: first}, use_cache=True).logits[:, -1]
    assert torch.allclose(rest, whole, atol=1e-5)


def test_a_recurrent_model_has_no_keys_to_share():
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4
    )
    assert keys_name(transformers.MambaForCausalLM(config)) is None
