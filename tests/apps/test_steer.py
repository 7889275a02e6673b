"""Steering: features that differ, what setting them does, and the command."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_lm import save_tiny_model

import bae_fast as bf
from bae_fast.baselines import make_baseline
from bae_fast.causal import (
    Differences,
    FeatureDifference,
    divergence,
    feature_differences,
    generate,
    matched_controls,
    next_token,
    next_token_shifted,
    prompt_tokens,
    set_distance,
    spliced,
    steering_edit,
)
from bae_fast.cli import main
from bae_fast.entropy.icl import make_prompts
from bae_fast.lm import load_language_model, states_at
from bae_fast.lm.tasks import load_task

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("undrawn")

# the words of the tasks' prompts that are tokens of their own
WORDS = [*(f"word{i}" for i in range(56)), "positive", "negative", ":", "Sentiment"]
PATH = "model.layers.1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), WORDS)


@pytest.fixture(scope="module")
def lm(folder):
    return load_language_model(str(folder), dtype="float32")


def prompts(last, n=6):
    """Prompts that end in one word after others that differ."""
    return [f"word{i} word{2 * i + 1} {last}" for i in range(n)]


def last_states(lm, texts):
    return states_at(lm, prompt_tokens(lm, texts), [PATH])[0][PATH][:, 0]


class Planted:
    """One feature a word: on where the state is that word's own; decoded to itself."""

    def __init__(self, lm, words):
        ids = [lm.tokenizer(word)["input_ids"][0] for word in words]
        head = lm.model.get_output_embeddings().weight[ids].detach()
        self.directions = 4 * head / head.norm(dim=1, keepdim=True)
        states = [
            states_at(lm, prompt_tokens(lm, prompts(w)), [PATH])[0][PATH][:, 0] for w in words
        ]
        self.centres = torch.stack([s.mean(0) for s in states])

    def encode(self, x):
        nearest = torch.cdist(x, self.centres).argmin(-1, keepdim=True)
        return torch.zeros(*x.shape[:-1], len(self.centres)).scatter(-1, nearest, 1.0)

    def decode(self, features):
        return features @ self.directions


def test_features_that_differ_are_counted_at_the_last_token(lm):
    planted = Planted(lm, ["word7", "word50", "word30"])
    found = feature_differences(lm, PATH, planted, prompts("word7"), prompts("word50", 4))
    assert (found.n_a, found.n_b) == (6, 4)
    states = [last_states(lm, texts) for texts in (prompts("word7"), prompts("word50", 4))]
    counts = [planted.encode(s).sum(0).long() for s in states]
    assert torch.equal(found.count_a, counts[0])
    assert torch.equal(found.count_b, counts[1])
    assert {one.feature for one in found.largest(2)} == {0, 1}
    gap = states[0].mean(0) - states[1].mean(0)
    assert torch.allclose(found.state_gap.float(), gap, atol=1e-5)
    tokens = prompt_tokens(lm, prompts("word50", 4))
    moved = next_token_shifted(lm, PATH, tokens, gap)
    with torch.no_grad():
        final = lm.model.base_model.norm(states[1] + gap)
        expected = lm.model.get_output_embeddings()(final).log_softmax(-1)
    assert torch.allclose(moved, expected, atol=1e-4)


def test_z_and_p_are_those_of_two_proportions():
    found = Differences(
        torch.tensor([30, 5, 0, 40]),
        torch.tensor([10, 5, 0, 40]),
        40,
        40,
        torch.ones(4),
        torch.zeros(2),
    )
    first, *rest = found.largest(4)
    assert rest == []  # the others have equal shares
    z = 0.5 / math.sqrt(0.5 * 0.5 * 2 / 40)
    assert first.z == pytest.approx(z)
    # two features vary
    assert first.p == pytest.approx(2 * math.erfc(z / math.sqrt(2)), rel=1e-9)
    assert torch.equal(found.z[1:], torch.zeros(3).double())


def test_controls_are_other_features_of_the_nearest_density():
    count_b = torch.arange(200)
    ones, nothing = torch.full((200,), 3.0), torch.zeros(2)
    found = Differences(torch.zeros(200).long(), count_b, 200, 200, ones, nothing)
    chosen = found.largest(5)
    for seed in range(5):
        controls = matched_controls(found, chosen, seed)
        ids = [one.feature for one in controls]
        assert len(set(ids)) == 5
        assert not set(ids) & {one.feature for one in chosen}
        for one, control in zip(chosen, controls, strict=True):
            assert abs(int(count_b[control.feature]) - one.share_b * 200) <= 30
            assert (control.share_a > control.share_b) == (one.share_a > one.share_b)
            assert control.value == 3
    assert matched_controls(found, chosen, 1) == matched_controls(found, chosen, 1)
    with pytest.raises(ValueError, match="at most half of the 200 features; got 101"):
        matched_controls(found, found.largest(101), 0)


def test_edits_set_or_add():
    up = FeatureDifference(1, 0.9, 0.1, 5.0, 0.0, 2.0)
    down = FeatureDifference(3, 0.1, 0.9, -5.0, 0.0, 0.5)
    x = torch.arange(8.0).view(2, 4)
    assert steering_edit([up, down])(x)[:, [0, 1, 2, 3]].tolist() == [[0, 2, 2, 0], [4, 2, 6, 0]]
    assert steering_edit([up, down], 3.0)(x)[0].tolist() == [0, 6, 2, -1]
    assert steering_edit([up, down], 0.5)(x)[0].tolist() == [0, 1, 2, 0]
    assert steering_edit([up, down], 2.0, "add")(x)[0].tolist() == [0, 5, 2, 2]
    assert x.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="mode must be one of clamp, add; got 'set'"):
        steering_edit([up], mode="set")
    with pytest.raises(ValueError, match="chosen must hold at least one feature"):
        steering_edit([])


def test_a_planted_feature_changes_the_answer(lm):
    """The feature's direction is that of a word: switched on, the model says the word."""
    tokens = prompt_tokens(lm, prompts("word50"))
    plain = next_token(lm, PATH, Planted(lm, ["word50"]), tokens)
    # a word that answers most to its own row of the head, and that the model does not say
    head = lm.model.get_output_embeddings().weight
    own = (head @ head.T).argmax(1) == torch.arange(len(head))
    own[[0, *plain.argmax(1).tolist()]] = False
    word = int(own[:57].nonzero()[0])
    name = lm.tokenizer.decode([word])
    planted = Planted(lm, [name, "word50", "word30"])
    with torch.no_grad():
        own = torch.cat([lm.model(torch.tensor([t])).logits[:, -1] for t in tokens])
    assert torch.allclose(plain, own.log_softmax(-1), atol=1e-4)
    on = steering_edit([FeatureDifference(0, 1.0, 0.0, 9.0, 0.0, 1.0)], 20.0)
    moved = next_token(lm, PATH, planted, tokens, on)
    assert (moved.argmax(1) == word).all()
    said = generate(lm, PATH, planted, prompts("word50")[0], on, n_tokens=3)
    assert said.split() == [name] * 3
    a = next_token(lm, PATH, planted, prompt_tokens(lm, prompts("word7")))
    assert set_distance(a, a) == 0
    means = [found.exp().double().mean(0, keepdim=True).log() for found in (plain, moved)]
    assert set_distance(plain, moved) == pytest.approx(float(divergence(*means).js), rel=1e-3)
    assert set_distance(plain, moved) > 1e-3


def test_a_prompt_without_an_edit_is_continued_as_ever(lm):
    planted = Planted(lm, ["word7", "word50"])
    ids = torch.tensor(prompt_tokens(lm, prompts("word7")[:1]))
    out = lm.model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected = lm.tokenizer.decode(out[0, 3:], skip_special_tokens=True)
    assert generate(lm, PATH, planted, prompts("word7")[0], n_tokens=5) == expected


def test_a_transcoder_needs_the_place_it_reads(lm):
    sae = make_baseline("transcoder", 16, 24, k=4, d_out=16).eval()
    sets = (prompts("word7"), prompts("word50"))
    with pytest.raises(ValueError, match="source must name the module"):
        feature_differences(lm, "model.layers.0.mlp", sae, *sets)
    found = feature_differences(
        lm, "model.layers.0.mlp", sae, *sets, source="model.layers.0.post_attention_layernorm"
    )
    options = {"mask": "last", "add_error": True, "record": True}
    with spliced(lm, "model.layers.0.mlp", sae, **options) as splice:
        lm.model(torch.tensor(prompt_tokens(lm, sets[0])))
    assert torch.equal(splice.codes[0].counts(), found.count_a)


@pytest.fixture(scope="module")
def arguments(folder, lm, tmp_path_factory):
    base = tmp_path_factory.mktemp("steer")
    generator = torch.Generator().manual_seed(0)
    order = torch.randint(len(WORDS), (9000,), generator=generator)
    (base / "text.txt").write_text(" ".join(WORDS[i] for i in order))
    texts = []
    for shots in (0, 8):
        texts += make_prompts(
            load_task("sentiment"), 24, shots, draw="fresh", labels="true", seed=0
        )[0]
    rows = last_states(lm, texts)
    bae = bf.BinaryAutoencoder(16, 64).fit_normalization_(rows)
    bae.init_density_(rows, 0.4).save_pretrained(base / "bae")
    return base, [
        "steer", "--model", str(folder), "--hook", PATH, "--device", "cpu",
        "--prompts", "24", "--features", "2", "4", "--strengths", "1", "3", "--controls", "2",
        "--examples", "1", "--no-progress", "--cache", str(base / "cache"),
    ]  # fmt: skip


def test_the_command_writes_table_numbers_and_plot(arguments, capsys):
    pytest.importorskip("matplotlib")
    base, argv = arguments
    out = base / "out"
    argv = [*argv, "--load", str(base / "bae"), "--out", str(out)]
    assert main(argv) == 0
    result = json.loads((out / "steer.json").read_text())
    rows = result["rows"]
    # two sets, then for two numbers of features and two strengths: one steered, two controls
    each = ["steered", "control", "control"]
    assert [row["what"] for row in rows] == ["set A", "set B", "state", *4 * each]
    assert all(0 <= row["accuracy"] <= 1 and 0 <= row["distance_to_a"] <= 1 for row in rows)
    assert rows[0]["distance_to_a"] == rows[1]["js_to_b"] == 0
    assert len(result["features"]) == 4
    assert result["settings"]["n_measured_on"] == [12, 12]
    text = (out / "steer.md").read_text()
    assert "| zero-shot, 4 random features, x 3 |" in text
    assert text in capsys.readouterr().out
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    (out / "steer.md").unlink()
    assert main(["steer", "--out", str(out), "--report-only"]) == 0
    assert (out / "steer.md").read_text() == text


def test_two_files_of_prompts_and_an_autoencoder_trained_on_the_way(arguments, capsys):
    pytest.importorskip("matplotlib")
    base, argv = arguments
    for name, word in (("a", "word7"), ("b", "word50")):
        (base / f"{name}.txt").write_text("\n\n".join(prompts(word)) + "\n")
    out = base / "files"
    argv = [*argv, "--positive", str(base / "a.txt"), "--negative", str(base / "b.txt"),
            "--text", str(base / "text.txt"), "--context", "16", "--steps", "5",
            "--out", str(out)]  # fmt: skip
    assert main(argv) == 0, capsys.readouterr().err
    result = json.loads((out / "steer.json").read_text())
    assert "accuracy" not in result["rows"][0]
    assert result["settings"]["n_chosen_on"] == [3, 3]
    assert "| negative, 2 features, x 1 |" in (out / "steer.md").read_text()
    assert bf.BinaryAutoencoder.from_pretrained(out / "model").config.d_sae == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--positive", "a.txt"], "--positive and --negative must be given together"),
        (["--features", "0"], "--features must be at least 1; got [0]"),
        (["--controls", "0"], "--controls must be at least 1; got 0"),
        (["--metric", "inches"], "--metric must be none or one of std"),
        (["--prompts", "2"], "--prompts 4; got 8, 2"),
        (["--load", "nowhere"], "folder nowhere does not exist"),
    ],
)
def test_what_a_user_can_mend_is_one_line(arguments, change, message, capsys, tmp_path):
    assert main([*arguments[1], *change, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("bae-fast steer: ")
    assert message in error
    assert "\n" not in error


def test_more_features_than_leave_controls_are_named(arguments, capsys, tmp_path):
    base, argv = arguments
    options = ["--load", str(base / "bae"), "--features", "64", "--out", str(tmp_path / "out")]
    assert main([*argv, *options]) == 1
    said = capsys.readouterr().err
    assert "--features must be at most half of the autoencoder's 64, as the controls are" in said
    assert not list((tmp_path / "out").iterdir())


def test_two_saved_models_are_matched(arguments, capsys):
    base, argv = arguments
    bae = bf.BinaryAutoencoder.from_pretrained(base / "bae")
    order = torch.randperm(64)
    with torch.no_grad():
        bae.W_enc.copy_(bae.W_enc[:, order])
        bae.b_enc.copy_(bae.b_enc[order])
    bae.save_pretrained(base / "permuted")
    out = base / "match"
    data = [*argv[1:7], "--no-progress", "--cache", str(base / "cache"),
            "--text", str(base / "text.txt"), "--context", "16"]  # fmt: skip
    folders = [str(base / "bae"), str(base / "permuted")]
    assert main(["match", *folders, *data, "--out", str(out)]) == 0, capsys.readouterr().err
    result = json.loads((out / "match.json").read_text())
    counts = result["summary"]["a"]
    assert counts["same"] > 30
    assert counts["same"] + counts["rare"] + counts["dead"] == 64
    for i, (j, kind) in enumerate(zip(result["a"]["partner"], result["a"]["class"], strict=True)):
        if result["classes"][kind] == "same":
            assert int(order[j]) == i
    assert result["control"]["a"]["same"] <= 6  # dense features meet by chance
    assert Path(out / "match.md").read_text() in capsys.readouterr().out
