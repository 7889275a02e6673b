"""Language models of two or three blocks, random, and a tokenizer that is trained here.

The right value is always the model's own.
"""

from __future__ import annotations

import pytest
import torch

from bae_fast.lm import LanguageModel, harvest

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WIDTH = 32
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


LLAMA = {
    "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128,
}  # fmt: skip

GPT2 = {"n_embd": WIDTH, "n_layer": 3, "n_head": 2, "n_positions": 128}

GEMMA = {**LLAMA, "head_dim": 16, "sliding_window": 16, "pad_token_id": 0}

NEOX = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}

OPT = {
    "hidden_size": WIDTH, "ffn_dim": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 128, "word_embed_proj_dim": 16, "pad_token_id": 1,
}  # fmt: skip

BART = {
    "d_model": WIDTH, "encoder_layers": 3, "decoder_layers": 3, "decoder_attention_heads": 2,
    "encoder_attention_heads": 2, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64,
    "max_position_embeddings": 128,
}  # fmt: skip

# class, its arguments, path of the middle block, name of the scale that its head has
MODELS = {
    "llama": ("Llama", LLAMA, "model.layers.1"),
    "qwen2": ("Qwen2", LLAMA, "model.layers.1"),
    "mistral": ("Mistral", {**LLAMA, "sliding_window": 16}, "model.layers.1"),
    "gemma2": ("Gemma2", {**GEMMA, "final_logit_softcapping": 1.0}, "model.layers.1"),
    "gemma3": ("Gemma3Text", GEMMA, "model.layers.1"),
    "cohere": ("Cohere", {**LLAMA, "logit_scale": 0.0625, "pad_token_id": 0}, "model.layers.1"),
    "granite": ("Granite", {**LLAMA, "logits_scaling": 8.0}, "model.layers.1"),
    "gpt2": ("GPT2", GPT2, "transformer.h.1"),
    "openai-gpt": ("OpenAIGPT", GPT2, "transformer.h.1"),
    "gptj": ("GPTJ", {**GPT2, "rotary_dim": 8}, "transformer.h.1"),
    "neox": ("GPTNeoX", NEOX, "gpt_neox.layers.1"),
    "phi": ("Phi", NEOX, "model.layers.1"),
    "bloom": ("Bloom", {"hidden_size": WIDTH, "n_layer": 3, "n_head": 2}, "transformer.h.1"),
    "falcon": (
        "Falcon",
        {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2},
        "transformer.h.1",
    ),
    "opt": ("OPT", OPT, "model.decoder.layers.1"),
    "bart": ("Bart", BART, "model.decoder.layers.1"),
    "mamba": (
        "Mamba",
        {"hidden_size": WIDTH, "num_hidden_layers": 3, "state_size": 4},
        "backbone.layers.1",
    ),
    "roberta": ("Roberta", {**NEOX, "is_decoder": True}, "roberta.encoder.layer.1"),
    "lfm2": ("Lfm2", {**LLAMA, "full_attn_idxs": [1], "pad_token_id": 0}, "model.layers.1"),
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
