"""Features in Neuronpedia's import format: its fields, and numbers that equal dense ones."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from bae_fast import BinaryAutoencoder
from bae_fast.baselines import make_baseline
from bae_fast.experiments import neuronpedia
from bae_fast.interpret.neuronpedia import Release, write_neuronpedia_export
from bae_fast.lm import ActivationCache

D, F, WINDOWS, CONTEXT, VOCABULARY = 6, 21, 7, 9, 50

# What Neuronpedia's importer knows of each object: field -> (types, whether it must be there). None
# is allowed where NoneType is among the types. From the dataclasses of its public utilities.
TEXT, MAYBE, NUMBER = (str,), (str, type(None)), (int, float)
LIST, FLAG, WHOLE = (list,), (bool,), (int,)
FIELDS = {
    "release": {
        "name": (TEXT, True), "description": (TEXT, True), "creatorName": (TEXT, True),
        "creatorId": (TEXT, True), "visibility": (TEXT, False), "createdAt": (TEXT, False),
        "descriptionShort": (MAYBE, False), "urls": (LIST, False),
        "creatorNameShort": (MAYBE, False),
    },
    "model": {
        "id": (TEXT, True), "instruct": (FLAG, True), "creatorId": (TEXT, True),
        "displayName": (TEXT, False), "displayNameShort": (TEXT, False),
        "visibility": (TEXT, False), "createdAt": (TEXT, False), "updatedAt": (TEXT, False),
    },
    "sourceset": {
        "modelId": (TEXT, True), "name": (TEXT, True), "creatorId": (TEXT, True),
        "visibility": (TEXT, False), "description": (TEXT, False), "creatorName": (TEXT, False),
        "releaseName": (MAYBE, False), "createdAt": (TEXT, False),
    },
    "source": {
        "id": (TEXT, True), "modelId": (TEXT, True), "setName": (TEXT, True),
        "creatorId": (TEXT, True), "inferenceEnabled": (FLAG, False), "hfRepoId": (MAYBE, False),
        "hfFolderId": (MAYBE, False), "visibility": (TEXT, False), "dataset": (MAYBE, False),
        "num_prompts": (WHOLE, False), "num_tokens_in_prompt": (WHOLE, False),
        "createdAt": (TEXT, False),
    },
    "features": {
        "modelId": (TEXT, True), "layer": (TEXT, True), "index": (TEXT, True),
        "creatorId": (MAYBE, False), "createdAt": (TEXT, False), "maxActApprox": (NUMBER, False),
        "hasVector": (FLAG, False), "vector": (LIST, False),
        "vectorDefaultSteerStrength": (NUMBER, False), "hookName": (MAYBE, False),
        "frac_nonzero": (NUMBER, False), "pos_str": (LIST, False), "pos_values": (LIST, False),
        "neg_str": (LIST, False), "neg_values": (LIST, False),
        "freq_hist_data_bar_heights": (LIST, False), "freq_hist_data_bar_values": (LIST, False),
    },
    "activations": {
        "id": (TEXT, True), "tokens": (LIST, True), "index": (TEXT, True), "layer": (TEXT, True),
        "modelId": (TEXT, True), "maxValue": (NUMBER, True), "maxValueTokenIndex": (WHOLE, True),
        "minValue": (NUMBER, True), "values": (LIST, True), "creatorId": (TEXT, True),
        "createdAt": (TEXT, False), "binMin": (NUMBER, False), "binMax": (NUMBER, False),
        "binContains": (NUMBER, False), "qualifyingTokenIndex": (WHOLE, False),
    },
}  # fmt: skip
RELEASE = Release("bae", "Bits of a model", "res-bae", "A group", "c0", urls=("https://a.b",))


class Words:
    """A tokenizer of one word a number."""

    def decode(self, ids, **_options):
        return f" w{ids[0]}"

    def convert_ids_to_tokens(self, token):
        return f"Ġw{token}"


class Pieces(Words):
    """The same in the manner of SentencePiece, which drops the space before the first word."""

    def decode(self, ids, **_options):
        return f"w{ids[0]}"

    def convert_ids_to_tokens(self, token):
        return f"▁w{token}"


@pytest.fixture
def cache(tmp_path):
    torch.manual_seed(0)
    place = torch.arange(WINDOWS * CONTEXT)
    place = place[place % CONTEXT > 0]
    return ActivationCache(
        folder=tmp_path,
        manifest={
            "hook_name": "layers.1",
            "model_name": "user/tiny",
            "dataset_path": "/home/me/text",
            "context_size": CONTEXT,
        },
        rows=torch.randn(len(place), D),
        row_window=(place // CONTEXT).int(),
        row_position=(place % CONTEXT).int(),
        tokens=torch.randint(0, VOCABULARY, (WINDOWS, CONTEXT), dtype=torch.int32),
    )


def read(folder) -> dict[str, list[dict]]:
    """All objects by kind; every one has the importer's fields and no other."""
    found = {}
    for kind in ("release", "model", "sourceset", "source"):
        found[kind] = [json.loads(s) for s in (folder / f"{kind}.jsonl").read_text().splitlines()]
        assert len(found[kind]) == 1
    for kind in ("features", "activations"):
        files = sorted((folder / kind).glob("batch-*.jsonl.gz"))
        lines = [line for f in files for line in gzip.decompress(f.read_bytes()).splitlines()]
        found[kind] = [json.loads(line) for line in lines]
    for kind, objects in found.items():
        for one in objects:
            assert one.keys() <= FIELDS[kind].keys(), kind
            for field, (types, needed) in FIELDS[kind].items():
                assert field in one or not needed, (kind, field)
                assert isinstance(one.get(field), types) or field not in one, (kind, field)
    return found


@pytest.mark.parametrize("name", ["user/tiny", "tiny", "{}/tiny", "{}/tiny/", "{}/tiny/."])
def test_a_model_is_called_as_its_folder_however_that_is_given(cache, tmp_path, name):
    (tmp_path / "tiny").mkdir()
    cache.manifest["model_name"] = name.format(tmp_path)
    model = BinaryAutoencoder(D, F).init_density_(cache.rows, 0.2).eval()
    folder = write_neuronpedia_export(tmp_path / "out", model, cache, Words(), RELEASE, layer=1)
    assert folder == tmp_path / "out" / "tiny" / "1-res-bae"
    assert read(folder)["model"][0]["id"] == "tiny"


@pytest.mark.parametrize("kind", ["bae", "topk"])
def test_every_object_has_the_importers_fields_and_the_numbers_of_the_model(cache, tmp_path, kind):
    if kind == "bae":
        model = BinaryAutoencoder(D, F).init_density_(cache.rows, 0.2).eval()
        strength = torch.where(
            model.encode(cache.rows).to_dense(), model.preactivation(cache.rows), 0
        )
    else:
        model = make_baseline("topk", D, F, k=3).eval()
        strength = model.encode(cache.rows)
    unembedding = torch.randn(VOCABULARY, D)
    folder = write_neuronpedia_export(
        tmp_path / "out", model, cache, Words(), RELEASE, layer=1, unembedding=unembedding,
        examples=3, batch_features=8,
    )  # fmt: skip
    assert folder == tmp_path / "out" / "tiny" / "1-res-bae"
    found = read(folder)
    assert len(list((folder / "features").iterdir())) == 3
    assert found["source"][0]["id"] == "1-res-bae"
    assert found["source"][0]["dataset"] == "text"  # and not whose home it lies in
    assert [one["index"] for one in found["features"]] == [str(j) for j in range(F)]

    dense = torch.zeros(WINDOWS, CONTEXT, F)
    dense[cache.row_window.long(), cache.row_position.long()] = strength.detach()
    logits = unembedding @ (model.W_dec * model.x_scale).detach().T
    for j, one in enumerate(found["features"]):
        own = strength[:, j]
        assert one["frac_nonzero"] == pytest.approx((own > 0).double().mean().item())
        assert one["maxActApprox"] == pytest.approx(own.max().item(), rel=1e-5)
        assert sum(one["freq_hist_data_bar_heights"]) == (own > 0).sum()
        assert one["pos_str"][0] == f" w{logits[:, j].argmax()}"
        assert one["neg_values"][0] == pytest.approx(logits[:, j].min().item(), rel=1e-4)
        shown = [a for a in found["activations"] if a["index"] == str(j)]
        best = dense[..., j].amax(1).sort(descending=True).values
        best = best[best > 0][:3]
        assert [a["maxValue"] for a in shown] == pytest.approx(best.tolist(), rel=1e-5)
        for a in shown:
            windows = cache.tokens == cache.tokens.new_tensor([int(t[2:]) for t in a["tokens"]])
            window = int(windows.all(1).nonzero()[0])
            torch.testing.assert_close(
                torch.tensor(a["values"]), dense[window, :, j], rtol=1e-5, atol=1e-6
            )
            assert a["values"][a["maxValueTokenIndex"]] == a["maxValue"]
    ids = [a["id"] for a in found["activations"]]
    assert len(set(ids)) == len(ids) > 0


def test_a_token_has_the_space_before_it(cache, tmp_path):
    bae = BinaryAutoencoder(D, F).init_density_(cache.rows, 0.2).eval()
    unembedding = torch.randn(VOCABULARY, D)
    found = {
        kind: read(
            write_neuronpedia_export(
                tmp_path / kind.__name__, bae, cache, kind(), RELEASE, layer=0,
                unembedding=unembedding,
            )
        )
        for kind in (Words, Pieces)
    }  # fmt: skip
    words, pieces = found[Words], found[Pieces]
    assert words["activations"]
    assert [a["tokens"] for a in pieces["activations"]] == [
        a["tokens"] for a in words["activations"]
    ]
    assert [f["pos_str"] for f in pieces["features"]] == [f["pos_str"] for f in words["features"]]


def test_a_feature_that_is_never_on_has_no_example(cache, tmp_path):
    bae = BinaryAutoencoder(D, F).eval()
    with torch.no_grad():
        bae.b_enc.fill_(-1e4)
    found = read(write_neuronpedia_export(tmp_path / "out", bae, cache, Words(), RELEASE, layer=0))
    assert found["activations"] == []
    assert {one["maxActApprox"] for one in found["features"]} == {0.0}


def test_bad_input_is_named(cache, tmp_path):
    def write(model=None, release=RELEASE, **options):
        model = BinaryAutoencoder(D, F) if model is None else model
        options = {"layer": 0, **options}
        write_neuronpedia_export(tmp_path / "out", model, cache, Words(), release, **options)

    with pytest.raises(ValueError, match="rows must be a range"):
        write(rows=range(10_000))
    with pytest.raises(ValueError, match="examples must be at least 1; got 0"):
        write(examples=0)
    with pytest.raises(ValueError, match="layer must not be negative"):
        write(layer=-1)
    with pytest.raises(ValueError, match="n_bits=1; got 2"):
        write(BinaryAutoencoder(D, F, n_bits=2))
    with pytest.raises(ValueError, match=r"unembedding must have shape \[vocabulary, 6\]"):
        write(unembedding=torch.zeros(5, 7))
    with pytest.raises(ValueError, match="source_set must be letters"):
        Release("bae", "title", "../up", "A group", "c0")
    assert not (tmp_path / "out").exists()


def test_an_export_that_is_interrupted_leaves_the_last_one_whole(cache, tmp_path):
    class Interrupted(Words):
        left = 20

        def decode(self, ids, **_options):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return super().decode(ids)

    def files():
        return {path: path.read_bytes() for path in sorted(folder.rglob("*.jsonl*"))}

    bae = BinaryAutoencoder(D, F).init_density_(cache.rows, 0.3).eval()
    options = {"layer": 3, "examples": 2, "batch_features": 2}
    folder = write_neuronpedia_export(tmp_path / "out", bae, cache, Words(), RELEASE, **options)
    before = files()
    with pytest.raises(KeyboardInterrupt):
        write_neuronpedia_export(tmp_path / "out", bae, cache, Interrupted(), RELEASE, **options)
    assert {path: content for path, content in files().items() if path in before} == before
    # what it had made belongs to no later export
    options["batch_features"] = F
    write_neuronpedia_export(tmp_path / "out", bae, cache, Words(), RELEASE, **options)
    assert len(list(folder.rglob("batch-*"))) == 2
    assert not (folder / ".unfinished").exists()


def test_all_that_must_be_given_is_named_at_once(tmp_path):
    config = neuronpedia.Config(load=tmp_path, release="r", creator="c")
    with pytest.raises(ValueError, match="must be given; got none, and none of --creator-id"):
        neuronpedia.run(config)
    config = neuronpedia.Config(load=tmp_path, release="r", creator="c", source_set="s")
    with pytest.raises(ValueError, match=r"must be given; got none$"):
        neuronpedia.run(config)
