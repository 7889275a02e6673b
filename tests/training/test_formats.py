"""Folders of dictionary_learning and sparsify: what is read computes what those libraries compute.

Their formulas are written out here once more, in float64, from a file's tensors alone.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bae_fast import BinaryAutoencoder
from bae_fast.baselines import make_baseline
from bae_fast.baselines.formats import (
    CLASSES,
    load_dictionary_learning,
    load_sparsify,
    save_dictionary_learning,
    save_sparsify,
)

D, F, K, N = 6, 20, 3, 40


def top(values: Tensor, k: int) -> Tensor:
    found = values.topk(k, dim=-1)
    return torch.zeros_like(values).scatter(-1, found.indices, found.values)


def dictionary(name: str, s: dict[str, Tensor], x: Tensor) -> Tensor:
    """The reconstruction of dictionary_learning's class of that name."""
    s = {key: value.double() for key, value in s.items()}
    if name == "JumpReluAutoEncoder":
        pre = x @ s["W_enc"] + s["b_enc"]
        return torch.relu(pre * (pre > s["threshold"])) @ s["W_dec"] + s["b_dec"]
    W, decoder = s["encoder.weight"], s["decoder.weight"]
    if name == "GatedAutoEncoder":
        inner = (x - s["decoder_bias"]) @ W.T
        gate = (inner + s["gate_bias"] > 0).double()
        features = gate * torch.relu(s["r_mag"].exp() * inner + s["mag_bias"])
        return features @ decoder.T + s["decoder_bias"]
    if name == "AutoEncoderNew":
        features = torch.relu(x @ W.T + s["encoder.bias"])
        return features @ decoder.T + s["decoder.bias"]
    bias = s["bias"] if name == "AutoEncoder" else s["b_dec"]
    features = torch.relu((x - bias) @ W.T + s["encoder.bias"])
    if name == "AutoEncoderTopK":
        features = top(features, int(s["k"]))
    elif name == "BatchTopKSAE":
        features = features * (features > s["threshold"])
    return features @ decoder.T + bias


def state(name: str) -> dict[str, Tensor]:
    """Random tensors as that class keeps them; rows of the decoder are not of unit norm."""
    torch.manual_seed(0)
    if name == "JumpReluAutoEncoder":
        return {
            "W_enc": torch.randn(D, F), "b_enc": torch.randn(F), "W_dec": torch.randn(F, D),
            "b_dec": torch.randn(D), "threshold": torch.randn(F),  # some below zero
        }  # fmt: skip
    found = {"encoder.weight": torch.randn(F, D), "decoder.weight": torch.randn(D, F)}
    if name == "GatedAutoEncoder":
        return found | {
            "decoder_bias": torch.randn(D), "r_mag": torch.randn(F),
            "gate_bias": torch.randn(F), "mag_bias": torch.randn(F),
        }  # fmt: skip
    bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(name, "b_dec")
    found |= {"encoder.bias": torch.randn(F), bias: torch.randn(D)}
    if name in ("AutoEncoderTopK", "BatchTopKSAE"):
        found |= {"k": torch.tensor(K), "threshold": torch.tensor(0.7)}
    return found


@pytest.mark.parametrize("name", [*CLASSES, "AutoEncoderNew"])
def test_what_dictionary_learning_wrote_reconstructs_as_there(tmp_path, name):
    tensors = state(name)
    torch.save(tensors, tmp_path / "ae.pt")
    config = {"trainer": {"dict_class": name, "lm_name": "lm", "submodule_name": "layers.1"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_dictionary_learning(tmp_path)
    x = torch.randn(N, D, dtype=torch.float64)
    found = model.double().reconstruct(x)
    torch.testing.assert_close(found, dictionary(name, tensors, x), rtol=1e-4, atol=1e-4)
    assert model.config.metadata == {"model_name": "lm", "hook_name": "layers.1"}


def units(kind: str | None) -> Tensor | None:
    """A metric: none, a scale for each dimension, or a matrix of them."""
    scales = torch.linspace(0.5, 2, D)
    if kind != "matrix":
        return None if kind is None else scales
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(7)))[0]
    return (turn * scales) @ turn.T


@pytest.mark.parametrize("metric", [None, "scales", "matrix"])
@pytest.mark.parametrize("method", CLASSES.values())
def test_what_is_written_reconstructs_the_same_on_raw_rows(tmp_path, method, metric):
    torch.manual_seed(1)
    x = 5 + 3 * torch.randn(N, D)
    model = make_baseline(method, D, F, k=K).fit_normalization_(x, metric=units(metric))
    with torch.no_grad():
        model.b_dec.normal_()
    if method == "batchtopk":
        model(x)  # measures the threshold, which one activation equals
        model.threshold.mul_(0.99)
    model.eval()
    folder = save_dictionary_learning(model, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())["trainer"]
    assert (config["activation_dim"], config["dict_size"]) == (D, F)
    tensors = torch.load(folder / "ae.pt", weights_only=True)
    wanted = model.reconstruct(x)
    assert wanted.std() > 0.1
    found = dictionary(config["dict_class"], tensors, x.double())
    torch.testing.assert_close(found.float(), wanted, rtol=1e-4, atol=1e-3)
    again = load_dictionary_learning(folder)
    torch.testing.assert_close(again.reconstruct(x), wanted, rtol=1e-4, atol=1e-3)
    assert again.config.k == K


def sparsify(s: dict[str, Tensor], config: dict, x: Tensor) -> Tensor:
    """The reconstruction of sparsify's coder."""
    s = {key: value.double() for key, value in s.items()}
    inner = x if config["transcode"] else x - s["b_dec"]
    pre = torch.relu(inner @ s["encoder.weight"].T + s["encoder.bias"])
    return top(pre, config["k"]) @ s["W_dec"] + s["b_dec"]


@pytest.mark.parametrize("metric", [None, "scales", "matrix"])
@pytest.mark.parametrize("transcode", [False, True])
def test_sparsify_folders_go_both_ways(tmp_path, transcode, metric):
    torch.manual_seed(2)
    x, y = 5 + 3 * torch.randn(N, D), 2 - torch.randn(N, D)
    given = units(metric)
    if transcode:
        model = make_baseline("transcoder", D, F, k=K, d_out=D)
        model.fit_normalization_(
            x, y, metric=given, target_metric=None if given is None else given.flip(0).flip(-1)
        )
    else:
        model = make_baseline("topk", D, F, k=K).fit_normalization_(x, metric=given)
    with torch.no_grad():
        model.b_dec.normal_()
    folder = save_sparsify(model.eval(), tmp_path / "out")
    config = json.loads((folder / "cfg.json").read_text())
    assert (config["d_in"], config["num_latents"], config["transcode"]) == (D, F, transcode)
    wanted = model.reconstruct(x)
    found = sparsify(load_file(folder / "sae.safetensors"), config, x.double())
    torch.testing.assert_close(found.float(), wanted, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(load_sparsify(folder).reconstruct(x), wanted, rtol=1e-4, atol=1e-3)


def test_what_cannot_be_said_in_a_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model must be one of relu, topk"):
        save_dictionary_learning(BinaryAutoencoder(D, F), tmp_path)
    with pytest.raises(ValueError, match="for sparsify; got gated"):
        save_sparsify(make_baseline("gated", D, F, k=K), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has config\.json and ae\.pt"):
        load_dictionary_learning(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has cfg\.json and sae\.safetensors"):
        load_sparsify(tmp_path)
    (tmp_path / "config.json").write_text('{"trainer": {"dict_class": "CrossCoder"}}')
    with pytest.raises(ValueError, match="dict_class must be one of AutoEncoder"):
        load_dictionary_learning(tmp_path)
    (tmp_path / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoder"}}')
    with pytest.raises(FileNotFoundError, match=r"ae\.pt does not exist"):
        load_dictionary_learning(tmp_path)
    torch.save({"bias": torch.zeros(D)}, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match=r"it lacks encoder\.weight"):
        load_dictionary_learning(tmp_path)
    (tmp_path / "ae.pt").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="not a readable state dict"):
        load_dictionary_learning(tmp_path)
    (tmp_path / "cfg.json").write_text('{"k": 3, "skip_connection": true}')
    with pytest.raises(ValueError, match="skip_connection must be False"):
        load_sparsify(tmp_path)
    (tmp_path / "cfg.json").write_text('{"k": 3}')
    save_file({"b_dec": torch.zeros(D)}, tmp_path / "sae.safetensors")
    with pytest.raises(ValueError, match=r"must hold encoder\.weight"):
        load_sparsify(tmp_path)


def odd_dictionary(folder, state, **trainer):
    """A folder of dictionary_learning."""
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    return folder


@pytest.mark.parametrize(
    ("changes", "trainer", "said"),
    [
        ({"k": torch.tensor([1, 2])}, {"k": "4"}, "k must be a number; got '4'"),
        ({"k": torch.tensor(float("nan"))}, {}, "k must be a number; got nan"),
        ({"k": None}, {"k": float("inf")}, "k must be a number; got inf"),
        ({"encoder.weight": torch.ones(F, D).int()}, {}, "dense and floating point; got int32"),
        ({"encoder.weight": torch.ones(F, D).to_sparse()}, {}, "dense and floating point"),
        ({"encoder.weight": torch.ones(F)}, {}, r"encoder.*must be a matrix; got \[\d+\]"),
        ({"b_dec": torch.full((D,), float("nan"))}, {}, "b_dec must hold no NaN; got"),
        ({"encoder.bias": torch.ones(3)}, {}, r"b_enc must be \[\d+\]; got \[3\]"),
    ],
)
def test_odd_contents_of_a_dictionary_are_named(tmp_path, changes, trainer, said):
    state = {
        "encoder.weight": torch.randn(F, D), "encoder.bias": torch.randn(F),
        "decoder.weight": torch.randn(D, F), "b_dec": torch.randn(D), "k": torch.tensor(3),
    }  # fmt: skip
    state = {name: one for name, one in (state | changes).items() if one is not None}
    folder = odd_dictionary(tmp_path, state, dict_class="AutoEncoderTopK", **trainer)
    with pytest.raises(ValueError, match=said):
        load_dictionary_learning(folder)


def test_tensors_of_a_dictionary_that_do_not_fit_are_named(tmp_path):
    state = {
        "encoder.weight": torch.randn(F, D), "encoder.bias": torch.randn(F),
        "decoder.weight": torch.randn(D, F), "decoder.bias": torch.randn(D + 1),
    }  # fmt: skip
    folder = odd_dictionary(tmp_path, state, dict_class="AutoEncoderNew")
    with pytest.raises(ValueError, match="its tensors do not fit together"):
        load_dictionary_learning(folder)


def test_a_feature_without_a_direction_adds_nothing(tmp_path):
    torch.manual_seed(0)
    W_dec, W_enc, x = torch.randn(F, D), torch.randn(D, F), torch.randn(20, D)
    W_dec[2] = 0
    b_enc, b_dec, threshold = torch.randn(F), torch.randn(D), torch.rand(F)
    state = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    folder = odd_dictionary(
        tmp_path, state | {"threshold": threshold}, dict_class="JumpReluAutoEncoder"
    )
    pre = x @ W_enc + b_enc
    theirs = (pre.relu() * (pre > threshold)) @ W_dec + b_dec
    torch.testing.assert_close(load_dictionary_learning(folder).reconstruct(x), theirs)


def test_signed_features_of_sparsify_are_refused(tmp_path):
    (tmp_path / "cfg.json").write_text('{"k": 3, "signed": true}')
    with pytest.raises(ValueError, match="signed must be False; got True"):
        load_sparsify(tmp_path)
