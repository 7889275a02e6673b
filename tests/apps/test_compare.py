"""``bae-fast compare`` on a tiny language model."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_lm import Same, save_tiny_model
from toy_autoencoder import Toy

import bae_fast as bf
from bae_fast.analysis import description_length, fvu
from bae_fast.autoencoder import load_autoencoder
from bae_fast.baselines.base import SparseAutoencoder
from bae_fast.causal import SubstitutionTest, Tail
from bae_fast.cli import main
from bae_fast.experiments import compare, methods, runs, scorers
from bae_fast.experiments.scorers import description, intruder, probing
from bae_fast.files import write_json
from bae_fast.interpret.intruder import intruder_scores
from bae_fast.lm import ActivationCache, gradients, load_language_model
from bae_fast.report import compare as report

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("undrawn")

WORDS = [f"word{i}" for i in range(60)]
HOOK = "model.layers.0"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    model = save_tiny_model(folder / "model", WORDS)
    order = torch.randint(len(WORDS), (9000,), generator=torch.Generator().manual_seed(0))
    (folder / "text.txt").write_text(" ".join(WORDS[i] for i in order))
    return [
        "compare", "--model", str(model), "--hook", "model.layers.0",
        "--text", str(folder / "text.txt"), "--context", "16", "--expansion", "2",
        "--steps", "25", "--batch-size", "64", "--k", "3", "--device", "cpu", "--no-progress",
        "--cache", str(folder / "cache"), "--out", str(folder / "out"),
    ]  # fmt: skip


def folder_of(arguments, name):
    return Path(arguments[arguments.index(name) + 1])


def test_every_method_gets_a_line_a_point_and_a_model(arguments, capsys):
    assert main(arguments) == 0
    out = folder_of(arguments, "--out")
    result = json.loads((out / "compare.json").read_text())
    assert [run["method"] for run in result["runs"]] == list(methods.names())
    text = (out / "compare.md").read_text()
    for name in ("BAE (sparse)", "TopK k=3", "JumpReLU k=3", "transcoder k=3*", "random k=3"):
        assert f"| {name} |" in text
    assert text in capsys.readouterr().out
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    cache = ActivationCache.open(next(folder_of(arguments, "--cache").glob("*layers.0-*")))
    heldout = cache.rows[cache.split(4096).heldout.start :].float()
    for run in result["runs"]:
        found = run["heldout"]
        assert found["bits"] == pytest.approx(
            found["support_bits"] + found["value_bits"] * found["l0"]
        )
        assert run["settings"]["training"]["steps"] == 25
        load = (
            SparseAutoencoder if methods.method(run["method"]).takes_k else bf.BinaryAutoencoder
        ).from_pretrained
        model = load(out / run["model"])
        if run["method"] != "transcoder":
            with torch.no_grad():
                recon = model.decode(model.encode(heldout))
            assert found["fvu"] == pytest.approx(fvu(heldout, recon), rel=1e-5)


def test_every_dictionary_is_scored_with_codes_that_are_searched_for(
    arguments, tmp_path, monkeypatch
):
    methods_ = ["--methods", "bae", "topk", "random", "transcoder"]
    options = [*arguments[:-1], str(tmp_path), *methods_, "--substitution-tokens", "64"]
    assert main([*options, "--search-prices", "1e-4", "1e-2"]) == 0
    result = json.loads((tmp_path / "compare.json").read_text())
    by_method = {run["method"]: run["scores"]["search"] for run in result["runs"]}
    cheap, dear = by_method["bae"]["points"]
    assert [point["bit_price"] for point in (cheap, dear)] == [1e-4, 1e-2]
    assert cheap["fvu"] < dear["fvu"]
    assert cheap["tree"] > dear["tree"]
    assert set(cheap["kl_by_value_bits"]) == {"0"}
    assert by_method["bae"]["fvu"] == dear["fvu"]
    for method in ("topk", "random"):
        fixed, *priced = by_method[method]["points"]
        assert fixed["k"] == 3
        assert fixed["l0"] <= 3
        assert [point["bit_price"] for point in priced] == [1e-4, 1e-2]
        errors = [point["fvu_by_value_bits"]["8"] for point in priced]
        assert errors == sorted(errors)
        assert priced[0]["tree_support"] > priced[1]["tree_support"]
        for point in (fixed, *priced):
            assert {"1", "2", "3"} <= set(point["kl_by_value_bits"])
    assert by_method["transcoder"]["points"] == []
    for run in result["runs"][:2]:
        first = run["scores"]["search"]["points"][0]
        # with values as precise as they were tried
        assert min(first["fvu_by_value_bits"].values()) < run["heldout"]["fvu"]
    assert "FVU, searched" in (tmp_path / "compare.md").read_text()
    monkeypatch.setattr("bae_fast.experiments.scorers.search.searched", None)
    assert main([*options, "--search-prices", "1e-4", "1e-2"]) == 0  # from files
    assert json.loads((tmp_path / "compare.json").read_text())["runs"] == result["runs"]


def test_fewer_features_are_dense_where_their_ones_cost_more(arguments, tmp_path):
    options = [*arguments[:-1], str(tmp_path), "--methods", "bae", "--search-prices", "1e-2"]
    found = []
    for dense_bits in ("0", "40"):
        assert main([*options, "--search-dense-bits", dense_bits]) == 0
        (run,) = json.loads((tmp_path / "compare.json").read_text())["runs"]
        found.append(run)
    assert found[0]["settings"] == found[1]["settings"]  # nothing was trained again
    free, dear = (run["scores"]["search"]["points"][0] for run in found)
    assert dear["dense_share"] < free["dense_share"]
    assert dear["fitted_dense_share"] < free["fitted_dense_share"]


def test_dictionaries_are_trained_on_with_the_codes_that_are_searched_for(arguments, tmp_path):
    options = [*arguments[:-1], str(tmp_path), "--methods", "bae", "topk", "random"]
    options += ["--search-prices", "1e-3"]
    found = []
    for steps in ([], ["--search-steps", "60"]):
        assert main([*options, *steps]) == 0
        found.append(json.loads((tmp_path / "compare.json").read_text())["runs"])
    for fitted, trained in zip(*found, strict=True):
        assert fitted["settings"] == trained["settings"]  # the model is the same
        (point,) = trained["scores"]["search"]["points"]
        before = fitted["scores"]["search"]["points"][-1]
        assert point["steps"] == 60
        assert "steps" not in before
        assert point["bit_price"] == before["bit_price"]
        same = point["fvu_by_value_bits"] == before["fvu_by_value_bits"]
        assert same == (fitted["method"] == "random")  # which learns nothing


def test_a_second_call_trains_nothing_and_says_the_same(arguments, monkeypatch, capsys):
    out = folder_of(arguments, "--out")
    if not (out / "compare.json").is_file():
        assert main(arguments) == 0
    before = json.loads((out / "compare.json").read_text())

    def fail(*_arguments, **_options):
        raise AssertionError("trained again")

    monkeypatch.setattr(runs.Trainer, "fit", fail)
    assert main(arguments) == 0
    assert json.loads((out / "compare.json").read_text()) == before
    (out / "compare.md").unlink()
    assert main(["compare", "--out", str(out), "--report-only"]) == 0
    assert (out / "compare.md").is_file()
    table, values = ((out / name).read_text() for name in ("compare.md", "compare.json"))
    for damaged in ('{"runs": [3]}', "{}", "[]"):
        (out / "compare.json").write_text(damaged)
        capsys.readouterr()
        assert main(["compare", "--out", str(out), "--report-only"]) == 1
        error = capsys.readouterr().err.strip()
        assert str(out / "compare.json") in error
        assert "\n" not in error
    assert (out / "compare.md").read_text() == table
    (out / "compare.json").write_text(values)


def finished(arguments):
    out = folder_of(arguments, "--out")
    if not (out / "compare.json").is_file():
        assert main(arguments) == 0
    return out, json.loads((out / "compare.json").read_text())


def test_what_the_language_model_loses_stands_in_every_run(arguments):
    out, result = finished(arguments)
    lm = load_language_model(str(folder_of(arguments, "--model")))
    cache = ActivationCache.open(next(folder_of(arguments, "--cache").glob("*layers.0-[0-9a-f]*")))
    first = int(cache.row_window[cache.split(4096).heldout.start])
    test = SubstitutionTest(lm, cache.tokens[first : first + 2048 // 16].long())
    for run in result["runs"]:
        found = run["scores"]["substitution"]
        assert 0 <= found["js_bits"] <= 1
        assert found["n_tokens"] == 128 * 14
        assert found["loss_original"] == pytest.approx(float(test.run(HOOK, Same()).loss))
        if run["method"] == "topk":
            model = SparseAutoencoder.from_pretrained(out / run["model"])
            assert found == test.run(HOOK, model).summary()
        if run["method"] == "transcoder":
            model = SparseAutoencoder.from_pretrained(out / run["model"])
            norm = f"{HOOK}.post_attention_layernorm"
            again = test.run(f"{HOOK}.mlp", model, source=norm)
            assert found == again.summary()
            # the module's input is that norm's output
            assert test.run(f"{HOOK}.mlp", model).js_bits == again.js_bits
    head, _, *lines = (out / "compare.md").read_text().splitlines()
    assert "| JS, bits | KL, bits | loss recovered |" in head
    assert all(line.count("|") == head.count("|") for line in lines if line.startswith("|"))


def test_bits_under_one_coder_stand_in_every_run(arguments):
    out, result = finished(arguments)
    cache = ActivationCache.open(next(folder_of(arguments, "--cache").glob("*layers.0-[0-9a-f]*")))
    split = cache.split(4096)
    rows = cache.rows.float()
    train, held = rows[: split.train.stop], rows[split.heldout.start :]
    for run in result["runs"]:
        found = run["scores"]["description"]
        for coder in ("columns", "tree"):
            support = found[f"{coder}_support"]
            values = found["values_by_value_bits"][str(found["value_bits"])]
            assert found[coder] == pytest.approx(support + values)
            # steps that are not as likely take fewer bits than their number has
            assert values <= 1.02 * found["value_bits"] * found["l0"]
            assert found[f"{coder}_model_bits"] > 0
        assert found["fvu"] == found["fvu_by_value_bits"][str(found["value_bits"])]
        if run["method"] == "bae":
            model = bf.BinaryAutoencoder.from_pretrained(out / run["model"])
            assert found["value_bits"] == 0
            assert found["fvu"] == pytest.approx(run["heldout"]["fvu"], rel=1e-5)
            length = description_length(model.active(held), "tree", fitted_to=model.active(train))
            assert found["tree"] == pytest.approx(length.bits)
            density = model.active(train).density()
            assert found["fitted_dead_share"] == (density == 0).double().mean()
            assert found["fitted_dense_share"] == (density > 0.1).double().mean()
        if run["method"] == "topk":
            assert found["value_bits"] in description.VALUE_BITS
            # a step's mean is a better value for it than its middle
            middles = run["heldout"]["fvu_quantized"]
            assert 0.98 * middles < found["fvu_by_value_bits"]["5"] < 1.001 * middles
    assert "| bits, tree |" in (out / "compare.md").read_text()


def test_as_many_rows_are_held_out_as_asked_for(arguments, tmp_path, capsys):
    more = ["--methods", "bae", "--out", str(tmp_path), "--heldout-rows"]
    assert main([*arguments, *more, "600"]) == 0
    (run,) = json.loads((tmp_path / "compare.json").read_text())["runs"]
    cache = ActivationCache.open(next(folder_of(arguments, "--cache").glob("*layers.0-[0-9a-f]*")))
    split, rows = cache.split(600), cache.rows.float()
    assert run["settings"]["data"]["split"] == split.as_dict()
    train, held = rows[: split.train.stop], rows[split.heldout.start :]
    assert 500 < run["heldout"]["n_rows"] == len(held) <= 600
    model = bf.BinaryAutoencoder.from_pretrained(tmp_path / run["model"])
    assert torch.allclose(model.x_mean, train.mean(0), atol=1e-5)
    with torch.no_grad():
        assert run["heldout"]["fvu"] == pytest.approx(fvu(held, model.reconstruct(held)), rel=1e-5)
    length = description_length(model.active(held), "tree", fitted_to=model.active(train))
    assert run["scores"]["description"]["tree"] == pytest.approx(length.bits)
    # the text is 37 windows long, of 14 judged tokens each
    assert run["scores"]["substitution"]["n_tokens"] == len(held) // 15 * 14
    assert main([*arguments, *more, "9"]) == 1
    assert "--heldout-rows must be at least 32; got 9" in capsys.readouterr().err


class Rounded:
    """An autoencoder whose decoder reads values of so many bits."""

    def __init__(self, model, train, bits):
        self.model = model
        self.bits = bits
        features = torch.cat([model.activations(row[None]) for row in train])
        self.low = features.masked_fill(features <= 0, torch.inf).amin(0)
        self.step = (features.amax(0) - self.low) / 2**bits
        self.means = torch.zeros(features.shape[1], 2**bits)
        for level in range(2**bits):
            same = (features > 0) & (self.level(features) == level)
            middle = self.low + (level + 0.5) * self.step
            mean = (features * same).sum(0) / same.sum(0)
            self.means[:, level] = torch.where(same.any(0), mean, middle)

    def level(self, features):
        level = ((features - self.low) / self.step).nan_to_num(0, 0, 0).floor()
        return level.clamp(0, 2**self.bits - 1)

    def encode(self, x):
        features = self.model.activations(x)
        read = self.means[torch.arange(features.shape[-1]), self.level(features).long()]
        return torch.where(features > 0, read, 0.0)

    def decode(self, features):
        return self.model.decode(features)


def test_the_loss_with_rounded_values_is_that_of_a_decoder_that_reads_these(arguments):
    out, result = finished(arguments)
    lm = load_language_model(str(folder_of(arguments, "--model")))
    cache = ActivationCache.open(next(folder_of(arguments, "--cache").glob("*layers.0-[0-9a-f]*")))
    split = cache.split(4096)
    first = int(cache.row_window[split.heldout.start])
    test = SubstitutionTest(lm, cache.tokens[first : first + 2048 // 16].long())
    for run in result["runs"]:
        found, whole = (run["scores"][name] for name in ("rounded", "substitution"))
        best = found["value_bits"]
        assert best == run["scores"]["description"]["value_bits"]
        assert found["kl_bits"] == found["kl_by_value_bits"][str(best)]
        if run["method"] == "bae":
            assert list(found["kl_by_value_bits"]) == ["0"]
            assert found["kl_bits"] == whole["kl_bits"]
            assert found["js_bits"] == whole["js_bits"]
        if run["method"] == "topk":
            model = SparseAutoencoder.from_pretrained(out / run["model"])
            train = cache.rows[: split.train.stop].float()
            for bits in (1, 2):
                again = test.run(HOOK, Rounded(model, train, bits))
                assert found["kl_by_value_bits"][str(bits)] == pytest.approx(again.kl_bits)
                assert found["js_by_value_bits"][str(bits)] == pytest.approx(again.js_bits)
            assert found["kl_by_value_bits"]["1"] != pytest.approx(whole["kl_bits"])


def test_what_scorers_share_is_made_once_a_model(arguments, tmp_path, monkeypatch):
    looked_at, passes = [], []

    def looking(model, *rows, whole=description.value_precision):
        looked_at.append(type(model).__name__)
        return whole(model, *rows)

    def passing(self, path, model, edit=None, *, source=None, whole=SubstitutionTest.run):
        passes.append((type(model).__name__, None if edit is None else edit.__self__.bits))
        return whole(self, path, model, edit, source=source)

    monkeypatch.setattr(description, "value_precision", looking)
    monkeypatch.setattr(SubstitutionTest, "run", passing)
    assert main([*arguments, "--methods", "bae", "topk", "--out", str(tmp_path)]) == 0
    bae, topk = json.loads((tmp_path / "compare.json").read_text())["runs"]
    assert looked_at == ["BinaryAutoencoder", "TopK"]
    assert passes[:2] == [("BinaryAutoencoder", None), ("TopK", None)]
    tried = sorted({1, 2, 3, topk["scores"]["description"]["value_bits"]})
    assert passes[2:] == [("TopK", bits) for bits in tried]
    assert bae["scores"]["rounded"]["js_bits"] == bae["scores"]["substitution"]["js_bits"]


def test_a_description_encodes_every_row_once(monkeypatch):
    torch.manual_seed(0)
    rows = torch.randn(700, 8)
    bae = bf.BinaryAutoencoder(8, 32, preset="sparse").fit_normalization_(rows).eval()
    bae.init_density_(rows, 0.05)
    with torch.no_grad():
        bae.b_enc[:3] = torch.tensor([-1e9, -1e9, 1e9])
    encoded = []

    def encode(self, x, whole=bf.BinaryAutoencoder.encode):
        encoded.append(len(x))
        return whole(self, x)

    monkeypatch.setattr(bf.BinaryAutoencoder, "encode", encode)
    train, held = rows[:500], rows[500:]
    precision = description.value_precision(bae, train, held, held)
    found = description.describe(precision)
    assert sum(encoded) == 700
    monkeypatch.undo()
    assert torch.equal(precision.code.to_dense(), bae.encode(held).to_dense())
    assert found["l0"] == pytest.approx(float(bae.encode(held).to_dense().sum(1).double().mean()))
    assert found["fitted_dead_share"] == 2 / 32
    assert found["fitted_dense_share"] == 1 / 32


@pytest.mark.parametrize("metric", ["std^0.5", "sensitivity", "fisher"])
def test_a_metric_is_given_to_every_method_and_names_the_run(
    arguments, metric, tmp_path, monkeypatch
):
    monkeypatch.setattr("bae_fast.experiments.metric._TOKENS", 1024)
    methods = ["bae", "topk", "transcoder"]
    change = ["--methods", *methods, "--metric", metric, "--no-description", "--out", str(tmp_path)]
    assert main([*arguments, *change, "--substitution-tokens", "0"]) == 0
    result = json.loads((tmp_path / "compare.json").read_text())
    assert [run["settings"]["metric"] for run in result["runs"]] == [metric] * 3
    models = [load_autoencoder(tmp_path / run["model"]) for run in result["runs"]]
    assert torch.equal(models[0].x_metric, models[1].x_metric)
    shape = (16, 16) if metric == "fisher" else (16,)
    assert models[0].x_metric.shape == models[2].y_metric.shape == shape
    cache = ActivationCache.open(next(folder_of(arguments, "--cache").glob("*layers.0-[0-9a-f]*")))
    rows = cache.rows[: cache.split(4096).train.stop].float()
    if metric == "std^0.5":
        ratio = models[0].x_metric / rows.std(0).sqrt()
        assert float(ratio.std() / ratio.mean()) < 1e-2
    assert f"unit {metric}" in (tmp_path / "compare.md").read_text()


def test_gradients_are_taken_once_of_a_harvest(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("bae_fast.experiments.metric._TOKENS", 768)
    taken = []
    whole = gradients.fisher
    monkeypatch.setattr(gradients, "fisher", lambda *a, **k: taken.append(1) or whole(*a, **k))
    change = ["--methods", "topk", "--metric", "fisher", "--no-description"]

    def metric_of(name):
        more = ["--substitution-tokens", "0", "--out", str(tmp_path / name)]
        assert main([*arguments, *change, *more]) == 0
        (run,) = json.loads((tmp_path / name / "compare.json").read_text())["runs"]
        return load_autoencoder(tmp_path / name / run["model"]).x_metric

    harvest = next(folder_of(arguments, "--cache").glob("*layers.0-[0-9a-f]*"))
    before = set(harvest.iterdir())
    first = metric_of("first")
    (kept,) = set(harvest.iterdir()) - before
    assert torch.equal(metric_of("second"), first)
    assert len(taken) == 1
    data = bytearray(kept.read_bytes())
    data[-3] ^= 4
    kept.write_bytes(data)  # a changed bit is found, and they are taken again
    assert torch.equal(metric_of("third"), first)
    assert len(taken) == 2
    monkeypatch.setattr("bae_fast.experiments.metric._TOKENS", 512)  # nor are others taken for them
    assert not torch.equal(metric_of("fourth"), first)


def test_weights_of_the_binary_autoencoder_are_varied_as_k_is(arguments, tmp_path):
    more = ["--methods", "bae", "topk", "--entropy-weight", "1e-4", "0.02", "--bank-batches", "0",
            "--no-description", "--substitution-tokens", "0", "--out", str(tmp_path)]  # fmt: skip
    before = torch.random.get_rng_state()
    assert main([*arguments, *more]) == 0
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's random numbers
    done = json.loads((tmp_path / "compare.json").read_text())["runs"]
    assert [run["variant"] for run in done] == [
        {"entropy_weight": 1e-4, "bank_batches": 0},
        {"entropy_weight": 0.02, "bank_batches": 0},
        {},
    ]
    assert [run["settings"]["training"]["entropy_weight"] for run in done] == [1e-4, 0.02, 0.0]
    assert [run["settings"]["training"]["bank_batches"] for run in done] == [0, 0, 0]
    assert done[0]["heldout"]["bits"] > done[1]["heldout"]["bits"]
    assert len({run["model"] for run in done}) == 3
    text = (tmp_path / "compare.md").read_text()
    assert "| BAE (sparse) a_e=0.02 0 past batches |" in text
    assert "| TopK k=3 |" in text


def test_every_sparse_autoencoder_is_trained_with_every_learning_rate(arguments, tmp_path):
    more = ["--methods", "bae", "topk", "relu", "--no-description", "--substitution-tokens", "0",
            "--out", str(tmp_path), "--lr"]  # fmt: skip
    assert main([*arguments, *more, "3e-3", "1e-4"]) == 0
    done = json.loads((tmp_path / "compare.json").read_text())["runs"]
    both = [{"lr": 3e-3}, {"lr": 1e-4}]
    assert [run["variant"] for run in done] == [{}, *both, *both]
    own = methods.method("bae").training.lr
    assert [run["settings"]["training"]["lr"] for run in done] == [own, 3e-3, 1e-4, 3e-3, 1e-4]
    assert done[1]["model"] == "models/topk-k3-lr0.003-s0"
    assert len({run["heldout"]["fvu"] for run in done}) == 5
    text = (tmp_path / "compare.md").read_text()
    for label in ("BAE (sparse)", "TopK k=3 lr=0.003", "TopK k=3 lr=0.0001", "ReLU k=3 lr=0.003"):
        assert f"| {label} |" in text
    # a run of one rate is the same run
    assert main([*arguments, *more, "3e-3"]) == 0
    assert json.loads((tmp_path / "compare.json").read_text())["runs"] == [
        done[0], done[1], done[3],
    ]  # fmt: skip


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), 0.0])
def test_a_learning_rate_that_none_can_have_is_named(rate):
    with pytest.raises(ValueError, match=f"^lr must be .*; got {rate}$"):
        compare.check(compare.Config(methods=("bae", "topk"), lr=(1e-3, rate)))


def test_a_tail_goes_on_from_the_run_without_it(arguments, tmp_path, monkeypatch, capsys):
    methods = ["bae", "topk", "transcoder"]
    change = ["--methods", *methods, "--no-description", "--substitution-tokens", "0"]
    change += ["--out", str(tmp_path)]
    assert main([*arguments, *change, "--kl-tail", "0", "4"]) == 0
    done = json.loads((tmp_path / "compare.json").read_text())["runs"]
    assert [run["variant"] for run in done] == [{}, {"kl_tail": 4}] * 3
    for before, after in zip(done[::2], done[1::2], strict=True):
        tail = {"tail": dataclasses.asdict(Tail(4))}
        assert after["settings"] == {**before["settings"], **tail}
        assert after["last_line"]["step"] == 4
        assert after["last_line"]["kl_bits"] > 0
        assert after["heldout"]["fvu"] != before["heldout"]["fvu"]
        first, second = (load_autoencoder(tmp_path / run["model"]) for run in (before, after))
        assert torch.equal(first.x_mean, second.x_mean)
        assert not torch.equal(first.W_dec, second.W_dec)
    text = (tmp_path / "compare.md").read_text()
    assert "| TopK k=3 KL tail 4 |" in text
    assert "KL tail: so many further steps" in text
    assert "kl_tail: [0, 4]" in (tmp_path / "resolved.yaml").read_text()

    def fail(*_arguments, **_options):
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(runs.Trainer, "fit", fail)
        assert main([*arguments, *change, "--kl-tail", "4"]) == 0
    shutil.rmtree(tmp_path / "models" / "topk-k3-s0")
    capsys.readouterr()
    assert main([*arguments, *change, "--methods", "topk", "--kl-tail", "5"]) == 1
    assert "--kl-tail must have the model of the run without it" in capsys.readouterr().err


def test_a_tail_is_the_same_for_every_method(arguments, tmp_path, monkeypatch):
    made = []

    class Seen(compare.Trainer):
        def __init__(self, model, rows, config, **options):
            made.append((rows, config))
            super().__init__(model, rows, config, **options)

    monkeypatch.setattr(compare, "Trainer", Seen)
    change = ["--methods", "bae", "topk", "batchtopk", "--kl-tail", "0", "4", "--no-description"]
    change += ["--substitution-tokens", "0", "--out", str(tmp_path)]
    assert main([*arguments, *change]) == 0
    ordinary, tails = made[::2], made[1::2]
    assert len(tails) == 3
    rows, first = tails[0]
    for (before_rows, before), (tail_rows, tail) in zip(ordinary, tails, strict=True):
        assert torch.equal(tail_rows, rows)
        assert torch.equal(tail_rows, before_rows)
        assert tail.tail == first.tail == Tail(4)
        assert (tail.steps, tail.batch_size, tail.seed) == (4, before.batch_size, before.seed)
        assert tail.lr == Tail().lr_scale * before.lr
        assert tail.divergence.settings() == first.divergence.settings()


def test_probes_stand_in_the_table_and_in_files_of_their_own(arguments, monkeypatch, tmp_path):
    def by_word(_tokenizer, tokens):
        return {"low": tokens < 30, "never": tokens < 0}

    monkeypatch.setattr(probing, "token_labels", by_word)
    change = ["--methods", "bae", "transcoder", "random", "--probe", "--no-description"]
    assert main([*arguments, *change, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "compare.json").read_text())
    for run in result["runs"]:
        found = run["scores"]["probing"]
        (probe,) = found["labels_5"]
        assert probe["label"] == "low"
        assert probe["accuracy"] == found["probe_5"]
        assert probe["low"] <= probe["accuracy"] <= probe["high"]
        assert len(probe["features"]) == 5
    # a state after one block still tells the word it is of
    assert result["runs"][0]["scores"]["probing"]["probe_5"] > 0.55
    assert "| probe, 5 features |" in (tmp_path / "compare.md").read_text()


class CountsOfWords:
    """A sentence encoder that knows no more of a text than how often each word is in it."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, texts):
        counts = torch.tensor([[float(text.count(word)) for word in WORDS] for text in texts])
        return torch.nn.functional.normalize(counts + 1e-3, dim=1)


@pytest.fixture
def encoder_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(intruder, "SentenceEncoder", CountsOfWords)
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text("{}")
    return str(tmp_path / "encoder")


def test_the_odd_one_out_stands_in_the_table(arguments, encoder_folder, tmp_path):
    change = ["--methods", "bae", "--encoder", encoder_folder, "--no-description"]
    assert main([*arguments, *change, "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "compare.json").read_text())["runs"][0]["scores"]
    assert found["intruder"]["chance"] == 0.2
    assert 0 <= found["intruder"]["low"] <= found["intruder"]["mean"] <= 1
    assert "| intruder found |" in (tmp_path / "out" / "compare.md").read_text()


def test_features_that_a_search_finds_are_measured_as_the_encoders(
    arguments, encoder_folder, monkeypatch, tmp_path
):
    seen = []

    def score(code, *others):
        seen.append(code)
        return intruder_scores(code, *others)

    monkeypatch.setattr(intruder, "intruder_scores", score)
    monkeypatch.setattr(probing, "token_labels", lambda _, tokens: {"low": tokens < 30})
    change = ["--methods", "bae", "topk", "transcoder", "--encoder", encoder_folder, "--probe"]
    change += ["--search-prices", "1e-4", "1e-3", "--out", str(tmp_path / "out")]
    assert main([*arguments, *change]) == 0
    own, rival, other = json.loads((tmp_path / "out" / "compare.json").read_text())["runs"]
    densities = [float(code.density().sum()) for code in seen]
    of_searched = [
        point["l0"] for run in (own, rival) for point in run["scores"]["search"]["points"]
    ]
    # of a run first the features of each price, and of the pursuit with k, then the encoder's
    encoded = [own["heldout"]["l0"], rival["heldout"]["l0"], other["heldout"]["l0"]]
    assert len(of_searched) == 5
    wanted = [*of_searched[:2], encoded[0], *of_searched[2:], encoded[1], encoded[2]]
    assert densities == pytest.approx(wanted)
    for run in (own, rival):
        found = run["scores"]["searched_features"]
        assert [point["intruder"]["chance"] for point in found["points"]] == [0.2] * len(
            run["scores"]["search"]["points"]
        )
        middle = found["points"][len(found["points"]) // 2]
        assert found["probing_probe_1"] == middle["probing"]["probe_1"]
        assert found["intruder_mean"] == middle["intruder"]["mean"]
    assert own["scores"]["searched_features"]["points"][0]["bit_price"] == 1e-4
    assert other["scores"]["searched_features"]["points"] == []
    table = (tmp_path / "out" / "compare.md").read_text()
    assert "| probe, 5 features, searched | intruder found, searched |" in table


def test_runs_without_scores_get_them_from_their_models_alone(arguments, monkeypatch, capsys):
    out, before = finished(arguments)
    for name in ("substitution-*", "description-*", "rounded-*"):
        for path in (out / "runs").glob(name):
            path.unlink()

    def fail(*_arguments, **_options):
        raise AssertionError("trained again")

    monkeypatch.setattr(runs.Trainer, "fit", fail)
    # one model is gone, one is of a run with other settings
    gone, other, source = (out / "models" / f"{m}-k3-s0" for m in ("relu", "gated", "random"))
    moved = out / "moved"
    gone.rename(moved)
    kept = {path: path.read_bytes() for path in other.iterdir()}
    SparseAutoencoder.from_pretrained(source).save_pretrained(other)
    try:
        assert main(arguments) == 0
    finally:
        moved.rename(gone)
        for path, data in kept.items():
            path.write_bytes(data)
    said = capsys.readouterr().out
    assert "is gone; not scored" in said
    assert "is another run's" in said
    after = json.loads((out / "compare.json").read_text())
    for old, new in zip(before["runs"], after["runs"], strict=True):
        if new["method"] in ("relu", "gated"):
            assert new["scores"] == {}
        else:
            assert new["scores"] == old["scores"]
    line = next(x for x in (out / "compare.md").read_text().splitlines() if "| ReLU k=3 |" in x)
    assert line.endswith("|  |  |  |  |  |")
    write_json(out / "compare.json", before)


def test_a_judge_names_the_features_of_every_method(arguments, capsys):
    methods = ["bae", "topk", "transcoder"]
    judged = [*arguments, "--methods", *methods, "--judge", "rule", "--judge-features", "4"]
    assert main(judged) == 0
    out = folder_of(arguments, "--out")
    result = json.loads((out / "compare.json").read_text())
    for run in result["runs"]:
        found = run["scores"]["comsem-rule"]
        assert 0 <= found["comsem"] <= 1
        assert 0 <= found["detection"] <= 1
        low, high = found["detection_interval"]
        assert low <= found["detection"] <= high
    header = (out / "compare.md").read_text().splitlines()[0]
    assert "ComSem" in header
    assert "JS, bits" in header
    capsys.readouterr()
    assert main(judged) == 0
    again = [line for line in capsys.readouterr().out.splitlines() if "comsem-" in line]
    assert len(again) == len(methods)
    assert all(line.endswith("done before") for line in again)


def test_a_further_scorer_adds_its_result_and_its_columns(arguments, monkeypatch, tmp_path):
    seen = []

    def judge(context):
        def score(model, method, k, seed):
            seen.append((method, k, seed, model.training, context.windows(40).shape))
            return {"good": 0.25, "detail": ["kept"]}

        column = scorers.Column("good", "how good", "{:.0%}")
        return [scorers.Scorer("judge", {"version": 1}, score, [column])]

    monkeypatch.setattr(compare, "scorer_makers", lambda: [judge])
    change = ["--methods", "bae", "topk", "--out", str(tmp_path)]
    for _ in range(2):
        assert main([*arguments, *change]) == 0
        assert seen == [("bae", None, 0, False, (3, 16)), ("topk", 3, 0, False, (3, 16))]
    result = json.loads((tmp_path / "compare.json").read_text())
    assert [run["scores"]["judge"]["detail"] for run in result["runs"]] == [["kept"]] * 2
    text = (tmp_path / "compare.md").read_text()
    assert text.count("| how good |") == 1
    assert text.count("| 25% |") == 2


def test_results_of_before_the_scores_can_be_reported(arguments, tmp_path):
    _, result = finished(arguments)
    del result["columns"]
    for run in result["runs"]:
        run.pop("scores")
    text = report.table(result)
    assert "JS" not in text
    assert report.plot(result).startswith(b"\x89PNG")
    off = [*arguments, "--methods", "topk", "--substitution-tokens", "0", "--no-description"]
    off += ["--out", str(tmp_path)]
    assert main(off) == 0
    assert "scores" not in json.loads((tmp_path / "compare.json").read_text())["runs"][0]


def test_rows_of_the_transcoder_are_of_the_same_tokens(arguments):
    finished(arguments)
    cache_folder = folder_of(arguments, "--cache")
    lm = load_language_model(str(folder_of(arguments, "--model")))
    base = ActivationCache.open(next(cache_folder.glob("*layers.0-[0-9a-f]*")))
    opened = [ActivationCache.open(folder) for folder in cache_folder.iterdir()]
    by_hook = {cache.manifest["hook_name"]: cache for cache in opened}
    caches = [by_hook[f"{HOOK}.{part}"] for part in ("post_attention_layernorm", "mlp")]
    split = base.split(4096)
    pair = compare.transcoder_rows(caches, base, split.train.stop, split.heldout.start)
    mlp = lm.model.get_submodule("model.layers.0.mlp")
    with torch.no_grad():
        for side in ("train", "heldout"):
            x, y = pair[f"x_{side}"], pair[f"y_{side}"]
            assert len(x) == len(y) > 1000
            again = mlp(x[:50])
            assert torch.allclose(again.float(), y[:50].float(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--encoder", "nowhere"], "--encoder must be the folder of a sentence encoder"),
        (["--metric", "var"], "--metric must be none or one of std, robust, sensitivity, fisher"),
        (["--k", "0"], "--k must be at least 1; got [0]"),
        (["--search-dense-bits", "9"], "--search-dense-bits must be left out where nothing is"),
        (
            ["--search-prices", "1", "--search-dense-bits", "-1"],
            "--search-dense-bits must be finite and at least 0; got -1",
        ),
        (["--search-steps", "9"], "--search-steps must be left out where nothing is searched"),
        (
            ["--search-prices", "1", "--search-steps", "-1"],
            "--search-steps must be at least 0; got -1",
        ),
        (["--kl-tail", "-1"], "--kl-tail must be at least 0; got [-1]"),
        (
            ["--bank-batches", "4"],
            "bank_batches is of the Binary Autoencoder, and methods",
        ),
        (
            ["--methods", "bae", "--entropy-weight", "-1"],
            "entropy_weight must be finite and not negative",
        ),
        (
            ["--methods", "bae", "bae_paper", "--lr", "1e-3"],
            "lr is of the sparse autoencoders, and methods has none; got lr (0.001,)",
        ),
        (["--lr", "1e-3", "0"], "lr must be positive; got 0.0"),
        (["--lr", "-1"], "lr must be finite and not negative; got -1.0"),
        (["--expansion", "0"], "--expansion must be at least 1; got 0"),
        (
            ["--k", "3", "33"],
            "--k must be at most d_sae=32, the expansion times the width 16; got 33",
        ),
        (
            ["--methods", "transcoder", "--transcoder-hooks", "no", "way"],
            "module of this model; got 'no'",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_line(arguments, change, message, capsys, tmp_path):
    assert main([*arguments, "--methods", "topk", *change, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("bae-fast compare: ")
    assert message in error
    assert "\n" not in error


def test_a_k_that_no_block_can_have_is_found_before_anything_runs(
    arguments, capsys, monkeypatch, tmp_path
):
    def fail(*_arguments, **_options):
        raise AssertionError("read the text")

    monkeypatch.setattr("bae_fast.experiments.compare.harvest_rows", fail)
    options = ["--methods", "bae", "topk", "--k", "64", "--out", str(tmp_path)]
    assert main([*arguments, *options]) == 1
    assert "--k must be at most d_sae=32" in capsys.readouterr().err


def test_decoders_that_cannot_be_fitted_to_searched_codes_are_refused_before_the_training(
    arguments, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr("bae_fast.experiments.compare.Trainings.one", None)
    options = ["--methods", "topk", "--search-prices", "0", "--out", str(tmp_path)]
    assert main([*arguments, *options, "--expansion", "2000"]) == 1
    error = capsys.readouterr().err
    assert "--search-prices must be left out for 32,000 features: with " in error
    monkeypatch.setattr("bae_fast.experiments.compare.MAX_REFIT_FEATURES", 31)
    assert main([*arguments, *options]) == 1
    assert "decoders of up to 31 are fitted to searched codes" in capsys.readouterr().err


def test_an_autoencoder_of_the_users_own_is_compared(arguments, tmp_path):
    @methods.register("of my own")
    def make(d_in, d_sae, *, k, d_out=None, metadata=None, device=None):
        assert k is None
        assert d_out is None
        model = Toy(d_in, d_sae, device=device)
        model.config.metadata.update(metadata)
        return model

    try:
        with pytest.raises(ValueError, match="name must be a new method's; got 'of my own'"):
            methods.register("of my own")(make)
        out = tmp_path / "out"
        found = compare.run(
            compare.Config(
                model=str(folder_of(arguments, "--model")), hook=HOOK, context=16, device="cpu",
                text=(folder_of(arguments, "--text"),), cache=folder_of(arguments, "--cache"),
                methods=("of my own",), steps=5, batch_size=64, expansion=2, out=out,
                progress=False,
            )
        )  # fmt: skip
    finally:
        del methods.NAMED["of my own"]
    (run,) = found.values["runs"]
    assert "| of my own |" in found.text
    assert 0 <= run["scores"]["substitution"]["js_bits"] <= 1
    assert isinstance(load_autoencoder(out / run["model"]), Toy)
