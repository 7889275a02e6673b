"""Features as delphi's cache: read back the way delphi reads them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from bae_fast import BinaryAutoencoder
from bae_fast.baselines import make_baseline
from bae_fast.interpret.delphi import write_delphi_cache
from bae_fast.lm import ActivationCache

D, F, WINDOWS, CONTEXT = 6, 21, 7, 9


@pytest.fixture
def cache(tmp_path):
    torch.manual_seed(0)
    place = torch.arange(WINDOWS * CONTEXT)
    place = place[place % CONTEXT > 0]
    return ActivationCache(
        folder=tmp_path,
        manifest={"hook_name": "layers.1", "model_name": "tiny", "dataset_path": "text"},
        rows=torch.randn(len(place), D),
        row_window=(place // CONTEXT).int(),
        row_position=(place % CONTEXT).int(),
        tokens=torch.randint(0, 50, (WINDOWS, CONTEXT), dtype=torch.int32),
    )


def read(folder) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(dense strengths by window, position and feature; how many files; tokens)."""
    dense, tokens = None, None
    files = sorted(folder.glob("*.safetensors"), key=lambda f: int(f.stem.split("_")[0]))
    assert int(files[0].stem.split("_")[0]) == 0
    assert int(files[-1].stem.split("_")[1]) == F - 1
    for file in files:
        first, last = (int(part) for part in file.stem.split("_"))
        data = load_file(file)
        tokens = data["tokens"]
        dense = np.zeros((*tokens.shape, F)) if dense is None else dense
        window, position, feature = data["locations"].T
        assert data["activations"].dtype == np.float16
        assert ((feature >= 0) & (feature <= last - first)).all()
        dense[window, position, first + feature] = data["activations"]
    return dense, np.array(len(files)), tokens


@pytest.mark.parametrize("rows", [None, range(8, 40)])
def test_bits_come_back_with_their_margins(cache, tmp_path, rows):
    bae = BinaryAutoencoder(D, F).init_density_(cache.rows, 0.2).eval()
    dense, n_files, tokens = read(write_delphi_cache(tmp_path / "out", bae, cache, rows))
    assert n_files == 5
    rows = range(cache.n_rows) if rows is None else rows
    part = slice(rows.start, rows.stop)
    first = int(cache.row_window[rows.start])
    assert (tokens == cache.tokens[first : int(cache.row_window[rows.stop - 1]) + 1].numpy()).all()
    window, position = cache.row_window[part] - first, cache.row_position[part]
    found = torch.from_numpy(dense)[window.long(), position.long()]
    x = cache.rows[part]
    expected = torch.where(bae.encode(x).to_dense(), bae.preactivation(x), 0)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-3)
    assert dense.sum() == pytest.approx(found.sum().item())  # nothing where no row is


def test_a_baseline_comes_back_with_its_activations(cache, tmp_path):
    sae = make_baseline("topk", D, F, k=3).eval()
    folder = write_delphi_cache(tmp_path, sae, cache, n_splits=1)
    dense, n_files, _ = read(folder)
    assert n_files == 1
    found = torch.from_numpy(dense)[cache.row_window.long(), cache.row_position.long()]
    torch.testing.assert_close(found.float(), sae.encode(cache.rows), rtol=1e-3, atol=1e-3)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_name"] == "tiny"
    assert config["n_tokens"] == WINDOWS * CONTEXT


def test_a_feature_that_is_never_on_leaves_a_file_all_the_same(cache, tmp_path):
    bae = BinaryAutoencoder(D, F).eval()
    with torch.no_grad():
        bae.b_enc.fill_(-1e4)
    dense, n_files, _ = read(write_delphi_cache(tmp_path, bae, cache))
    assert n_files == 5
    assert not dense.any()


def test_bad_input_is_named(cache, tmp_path):
    bae = BinaryAutoencoder(D, F)
    with pytest.raises(ValueError, match="rows must be a range"):
        write_delphi_cache(tmp_path, bae, cache, range(10_000))
    with pytest.raises(ValueError, match="n_splits must lie in"):
        write_delphi_cache(tmp_path, bae, cache, n_splits=0)
    with pytest.raises(ValueError, match="n_bits=1"):
        write_delphi_cache(tmp_path, BinaryAutoencoder(D, F, n_bits=2), cache)


# -- delphi itself, where it is installed (make test-delphi) -------------------------------------


@pytest.fixture
def loader():
    return pytest.importorskip("delphi.latents.loader", reason="delphi is not installed")


@pytest.mark.parametrize("kind", ["bae", "topk"])
def test_delphi_itself_reads_every_feature(loader, cache, tmp_path, kind):
    """Its records against the model's own values, window by window."""
    from delphi.config import ConstructorConfig, SamplerConfig
    from tiny_lm import save_tiny_model

    name = save_tiny_model(tmp_path / "lm", [f"word{i}" for i in range(50)])
    cache.manifest["model_name"] = str(name)  # whose tokenizer delphi loads by this name
    x = cache.rows
    if kind == "bae":
        model = BinaryAutoencoder(D, F).init_density_(x, 0.2).eval()
        with torch.no_grad():
            model.b_enc[4] = -1e4  # never on
        values = torch.where(model.encode(x).to_dense(), model.preactivation(x), 0).detach()
    else:
        model = make_baseline("topk", D, F, k=3).eval()
        values = model.encode(x).detach()
    write_delphi_cache(tmp_path / "latents", model, cache)
    dense = torch.zeros(WINDOWS, CONTEXT, F)
    dense[cache.row_window.long(), cache.row_position.long()] = values.half().float()

    def records(**more):
        return list(
            loader.LatentDataset(
                tmp_path / "latents",
                SamplerConfig(n_examples_train=4, n_examples_test=2, n_quantiles=2),
                ConstructorConfig(example_ctx_len=CONTEXT, min_examples=1, n_non_activating=2),
                **more,
            )
        )

    found = {record.latent.latent_index: record for record in records()}
    assert set(found) == {f for f in range(F) if dense[..., f].any()}
    assert len(found) > F // 2
    for feature, record in found.items():
        own = dense[..., feature]
        assert record.per_token_frequency == pytest.approx(float((own > 0).float().mean()))
        best = own.amax(1)
        on = best.argsort(descending=True, stable=True)[: int((best > 0).sum())]
        assert len(record.examples) == len(on)
        shown = torch.stack([example.activations.float() for example in record.examples])
        tokens = torch.stack([example.tokens for example in record.examples])
        # examples of equal strength may stand in any order
        assert shown.amax(1).equal(best[on])
        expected = {tuple(cache.tokens[w].tolist()): own[w] for w in on.tolist()}
        for window, strengths in zip(tokens.tolist(), shown, strict=True):
            assert strengths.equal(expected[tuple(window)])
        # its samplers have what they ask for: strengths that differ, and windows that are off
        assert all(one.normalized_activations.max() > 0 for one in record.train)
        quiet = {tuple(cache.tokens[w].tolist()) for w in range(WINDOWS) if w not in on.tolist()}
        assert {tuple(one.tokens.tolist()) for one in record.not_active} <= quiet
    some = torch.tensor(sorted(found)[1::4])
    chosen = records(modules=["layers.1"], latents={"layers.1": some})
    assert sorted(record.latent.latent_index for record in chosen) == some.tolist()
