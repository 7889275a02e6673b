"""What holds for every language model: its logits, how it is run, what its modules are called."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from language_models import (
    GPT2,
    LLAMA,
    MODELS,
    TEXT,
    WIDTH,
    lm_of,
    model_of,
    own_rows,
    rows_of,
    word_pieces,
)

import bae_fast as bf
from bae_fast.causal import SubstitutionTest, generate
from bae_fast.causal.splice import replaced_output
from bae_fast.interpret.judges import Request, TransformersJudge
from bae_fast.lm import (
    LanguageModel,
    harvest,
    harvest_shards,
    resolve_hook,
    states_at,
    windows,
)
from bae_fast.lm.gradients import sensitivity
from bae_fast.lm.hooks import in_own_dtype, running
from bae_fast.lm.inputs import padding_mask
from bae_fast.lm.logits import final_norm

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("kind", MODELS)
def test_next_token_probabilities_are_the_models_own(kind, tokenizer):
    lm, path = lm_of(kind, tokenizer), MODELS[kind][2]
    prompts = [[5, 9, 30, 7, 60], [5, 9, 30], [5, 9, 4, 4]]
    with torch.no_grad():
        own = [lm.model(input_ids=torch.tensor([p])).logits[0, -1].float() for p in prompts]
    for share_prefix in (False, True):
        found = states_at(lm, prompts, [path], next_token=True, share_prefix=share_prefix)[1]
        torch.testing.assert_close(found, torch.stack(own).log_softmax(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_the_last_norm_is_found_whatever_it_is_called(kind, tokenizer):
    model = model_of(kind, tokenizer)
    norm = final_norm(model)
    if kind == "opt":  # a product stands behind its norm
        assert norm is None
        return
    assert norm is not None
    ids = torch.tensor([[5, 9, 30, 7]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
        # nothing but the head stands behind it
        handle = norm.register_forward_hook(lambda _m, _a, output: torch.ones_like(output))
        same = model(input_ids=ids).logits[0]
        handle.remove()
    assert not torch.equal(logits[0], logits[1])
    torch.testing.assert_close(same, same[:1].expand_as(same), rtol=1e-5, atol=1e-6)


def test_rows_of_several_hooks_are_those_that_each_gave(tokenizer, tmp_path):
    """Falcon adds the attention to the output of its MLP in place."""
    lm = lm_of("falcon", tokenizer)
    tokens = windows(tokenizer, TEXT, 16, n_tokens=64)
    hooks = ["transformer.h.1.mlp", "transformer.h.1"]
    kept = {}
    handle = lm.model.get_submodule(hooks[0]).register_forward_hook(
        lambda _m, _a, output: kept.update(own=output.clone())
    )
    with torch.no_grad():
        lm.model(input_ids=tokens)
    handle.remove()
    own = kept["own"][:, 1:].flatten(0, 1)
    found = harvest_shards(
        lm, tokens, hooks, tmp_path, max_norm_ratio=float("inf"), progress=False
    ).read_block(0)
    torch.testing.assert_close(found[hooks[0]], own, rtol=1e-5, atol=1e-6)
    prompts = [window.tolist() for window in tokens]
    one, _ = states_at(lm, prompts, hooks[:1])
    both, _ = states_at(lm, prompts, hooks[:1], next_token=True)
    torch.testing.assert_close(one[hooks[0]], both[hooks[0]], rtol=1e-5, atol=1e-6)


def test_a_hook_without_a_state_a_token_is_named(tokenizer):
    lm = lm_of("llama", tokenizer)

    class Watched(torch.nn.Module):
        """A module with a part that gives nothing."""

        def __init__(self, inner):
            super().__init__()
            self.inner, self.silent = inner, Silent()

        def forward(self, x):
            self.silent(x)
            return self.inner(x)

    class Silent(torch.nn.Module):
        def forward(self, _x):
            return None

    lm.model.model.layers[0].mlp = Watched(lm.model.model.layers[0].mlp)
    for hook, given in (
        ("model.layers.0.mlp.silent", "NoneType"),
        ("model.rotary_emb", r"\[1, 3, 16\]"),
    ):
        words = rf"output is \[batch, length, d\], here \[2, 3, d\]; '{hook}' gives {given}"
        with pytest.raises(ValueError, match=words):
            states_at(lm, [[5, 6, 7]] * 2, [hook])


def test_a_source_is_what_the_module_gave_and_has_a_gradient(tokenizer):
    """Of a model that adds to the output in its place behind the module."""
    lm = lm_of("falcon", tokenizer)
    tokens = windows(tokenizer, TEXT, 16, n_tokens=64)
    hook = "transformer.h.1.mlp"
    own, seen = [], []

    class Kept(torch.nn.Module):
        """Gives its input on, in a memory that is added to by nobody."""

        def forward(self, x):
            return x.clone()

    handle = lm.model.get_submodule(hook).register_forward_hook(
        lambda _m, _a, output: own.append(output.clone())
    )
    with (
        torch.no_grad(),
        replaced_output(
            lm, "transformer.h.1", lambda _x, y: y, source=hook, drop_positions=0,
            watch=lambda x, _chosen: seen.append(x.clone()),
        ),
    ):  # fmt: skip
        lm.model(input_ids=tokens)
    handle.remove()
    assert torch.equal(seen[0], own[0])
    found = sensitivity(lm, tokens, hook)
    block = lm.model.get_submodule("transformer.h.1")
    block.mlp = torch.nn.Sequential(block.mlp, Kept())
    torch.testing.assert_close(found, sensitivity(lm, tokens, f"{hook}.0"))


@pytest.mark.parametrize(
    ("kind", "hook"),
    [
        ("gpt2", "transformer.drop"),
        ("gpt2", "transformer.h.0.ln_1"),
        ("opt", "model.decoder.layers.0.self_attn_layer_norm"),
        ("gpt2", "transformer.h.1"),
    ],
)
def test_a_shared_prefix_changes_no_state_wherever_the_hook_is(kind, hook, tokenizer):
    lm = lm_of(kind, tokenizer)
    g = torch.Generator().manual_seed(0)
    prefix = torch.randint(5, 60, (12,), generator=g).tolist()
    prompts = [prefix + torch.randint(5, 60, (n,), generator=g).tolist() for n in (3, 5, 4)]
    plain, _ = states_at(lm, prompts, [hook])
    shared, _ = states_at(lm, prompts, [hook], share_prefix=True)
    torch.testing.assert_close(shared[hook], plain[hook], rtol=1e-4, atol=1e-4)


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
        vocab_size=len(tokenizer), **LLAMA, pad_token_id=0, original_max_position_embeddings=20,
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
    config = transformers.GPT2Config(vocab_size=len(tokenizer), **{**GPT2, "n_positions": 6})
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
