"""Models with adapters of peft: whose states they are, names of modules, positions, logits."""

from __future__ import annotations

import pytest
import torch

import bae_fast as bf
from bae_fast.causal import SubstitutionTest, spliced
from bae_fast.lm import LanguageModel, harvest, model_digest, resolve_hook, states_at

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

WIDTH = 32
KINDS = {"llama": "model.layers.1", "opt": "model.decoder.layers.1"}


class Same:
    def encode(self, x):
        return x

    def decode(self, features):
        return features


def base(kind):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 100, "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2,
        "max_position_embeddings": 64, "pad_token_id": 1,
    }  # fmt: skip
    config = {
        "llama": lambda: transformers.LlamaConfig(intermediate_size=64, **sizes),
        "opt": lambda: transformers.OPTConfig(ffn_dim=64, word_embed_proj_dim=16, **sizes),
    }[kind]()
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.get_output_embeddings().weight.data.mul_(10)
    return model


def adapted(kind):
    """A model with LoRA that changes something: B is zero as peft makes it."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base(kind), config).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    return model.requires_grad_(False)


def lm_of(model):
    return LanguageModel(model, None, "tiny", "tiny", torch.float32, WIDTH)


def tokens():
    return torch.randint(2, 100, (3, 12), generator=torch.Generator().manual_seed(2))


def own_rows(model):
    with torch.no_grad():
        states = model(input_ids=tokens(), output_hidden_states=True).hidden_states[2]
    return states[:, 1:].reshape(-1, WIDTH)


def rows_of(model, kind, folder):
    return harvest(
        lm_of(model), tokens(), KINDS[kind], folder=folder, max_norm_ratio=float("inf"),
        progress=False,
    ).rows.clone()  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_adapters_as_they_are(kind, tmp_path):
    model = adapted(kind)
    without, digests = own_rows(base(kind)), {model_digest(base(kind))}

    def look(expected=None):
        digests.add(model_digest(model))
        found = rows_of(model, kind, tmp_path)
        torch.testing.assert_close(found, own_rows(model), rtol=1e-4, atol=1e-5)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        return found

    on = look()
    assert not torch.allclose(on, without, atol=1e-3)
    with model.disable_adapter():
        look(without)
    look(on)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    look(without)  # whose B is zero
    model.set_adapter("default")
    model.delete_adapter("second")
    model.merge_adapter()
    look(on)
    model.unmerge_adapter()
    model.base_model.model.get_submodule(KINDS[kind]).self_attn.q_proj.scaling["default"] *= 3
    look()
    assert len(digests) == 6
    assert model_digest(model.merge_and_unload()) not in digests


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_positions_are_the_models_own(kind):
    model, path = adapted(kind), KINDS[kind]
    assert resolve_hook(model, path) == f"base_model.model.{path}"
    assert resolve_hook(model, "blocks.1.hook_resid_post") == f"base_model.model.{path}"
    ids = tokens()[:1, :8]
    padded = torch.cat([torch.ones(1, 5, dtype=torch.int64), ids], 1)
    mask = (torch.arange(13) >= 5).long()[None]
    bae = bf.BinaryAutoencoder(WIDTH, 64)
    for part in (model, lm_of(model)):
        with spliced(part, path, bae, record=True) as splice, torch.no_grad():
            model(input_ids=padded, attention_mask=mask)
        assert splice.codes[0].row_mask[0].tolist() == [False] * 6 + [True] * 7
    with spliced(model, path, bae) as splice:
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6,
            do_sample=False, pad_token_id=1,
        )  # fmt: skip
    assert (splice.n_replaced, splice.n_tokens) == (12, 13)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_model_with_its_adapters(kind):
    lm = lm_of(adapted(kind))
    sequences = [[5, 9, 30, 7, 60], [5, 9, 30]]
    states, after = states_at(lm, sequences, [KINDS[kind]], next_token=True)
    with torch.no_grad():
        own = [lm.model(input_ids=torch.tensor([s]), output_hidden_states=True) for s in sequences]
    logits = torch.stack([out.logits[0, -1] for out in own])
    torch.testing.assert_close(after, logits.log_softmax(-1), rtol=1e-4, atol=1e-4)
    rows = torch.stack([out.hidden_states[2][0, -1] for out in own])
    torch.testing.assert_close(states[KINDS[kind]][:, 0], rows, rtol=1e-4, atol=1e-5)
    found = SubstitutionTest(lm, tokens(), max_norm_ratio=None).run(KINDS[kind], Same())
    assert found.js_bits < 1e-6
    assert found.replaced == pytest.approx(11 / 12)
    with lm.model.disable_adapter():
        plain = states_at(lm, sequences, [KINDS[kind]], next_token=True)[1]
    assert float((plain - after).abs().max()) > 1e-2


def test_adapters_that_add_tokens_are_refused():
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    lm = lm_of(peft.get_peft_model(base("llama"), config).eval())
    with pytest.raises(ValueError, match="model must not have an adapter that adds tokens"):
        _ = lm.head
    with (
        pytest.raises(ValueError, match="model must not have an adapter that adds tokens"),
        spliced(lm, KINDS["llama"], bf.BinaryAutoencoder(WIDTH, 64)),
    ):
        pass
