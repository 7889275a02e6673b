"""Checkpoints of the released program: loaded, and loaded safely."""

import argparse
import os
import pickle

import pytest
import torch

import bae_fast as bf


@pytest.fixture
def checkpoint(tmp_path):
    """A folder as the released program leaves it, and its two linear layers."""
    encoder, decoder = torch.nn.Linear(6, 24), torch.nn.Linear(24, 6)
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    state |= {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    torch.save(state, tmp_path / "model.pt")
    write_config(tmp_path, {"inner_expand_rate": 4, "binarization_type": "sign_s"})
    return tmp_path, encoder, decoder


def write_config(folder, config):
    (folder / "config.pkl").write_bytes(pickle.dumps(config))


@pytest.mark.parametrize("wrap", [dict, lambda c: argparse.Namespace(**c)])
@pytest.mark.parametrize(("kind", "surrogate"), [("sign", "identity"), ("sign_s", "official")])
def test_a_released_checkpoint_computes_what_its_layers_do(checkpoint, wrap, kind, surrogate):
    folder, encoder, decoder = checkpoint
    write_config(folder, wrap({"inner_expand_rate": 4, "binarization_type": kind}))
    bae = bf.load_released(folder)
    x = torch.randn(50, 6)
    with torch.no_grad():
        bits = encoder(x) > 0
        assert torch.equal(bae.encode(x).to_dense(), bits)
        torch.testing.assert_close(bae(x).recon, decoder(bits.float()))
    assert bae.config.surrogate == surrogate


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(checkpoint):
    folder, *_ = checkpoint
    marker = folder / "ran"

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    write_config(folder, {"binarization_type": Attack()})
    with pytest.raises(ValueError, match=r"config\.pkl is not a plain pickled configuration"):
        bf.load_released(folder)
    torch.save(Attack(), folder / "model.pt")
    write_config(folder, {})
    with pytest.raises(ValueError, match=r"model\.pt is not a readable state dict"):
        bf.load_released(folder)
    assert not marker.exists()


def test_damaged_pickles_raise_nothing_but_value_errors(checkpoint):
    folder, *_ = checkpoint
    good = pickle.dumps({"inner_expand_rate": 4, "binarization_type": "sign", "names": ["a"] * 5})
    generator = torch.Generator().manual_seed(0)
    refused = []
    for _ in range(300):
        bad = bytearray(good)
        at = int(torch.randint(len(bad), (1,), generator=generator))
        bad[at] = int(torch.randint(256, (1,), generator=generator))
        (folder / "config.pkl").write_bytes(bytes(bad))
        try:
            bf.load_released(folder)
        except ValueError as error:
            refused.append(str(error))
    assert refused
    assert not any("\n" in message for message in refused)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"binarization_type": "squarewave"}, "binarization_type must be one of sign, sign_s"),
        ({"output_activation": "relu"}, "output_activation must be none"),
        ({"binarization_type": ["sign"]}, "binarization_type must be one of"),
        ({"output_activation": [1]}, "output_activation must be none"),
        ([1], "must hold a dict or a namespace; got list"),
    ],
)
def test_models_that_are_another_function_are_refused(checkpoint, config, message):
    folder, *_ = checkpoint
    write_config(folder, config)
    with pytest.raises(ValueError, match=message):
        bf.load_released(folder)


def test_missing_foreign_and_unfitting_files_are_named(checkpoint):
    folder, *_ = checkpoint
    torch.save({"weight": torch.zeros(2)}, folder / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt must hold"):
        bf.load_released(folder)
    state = {
        "encoder.weight": torch.zeros(24, 6),
        "encoder.bias": torch.zeros(24),
        "decoder.weight": torch.zeros(5, 24),
        "decoder.bias": torch.zeros(5),
    }
    torch.save(state, folder / "model.pt")
    with pytest.raises(ValueError, match=r"decoder\.weight \[d, F\]"):
        bf.load_released(folder)
    (folder / "config.pkl").write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match=r"config\.pkl is not a plain"):
        bf.load_released(folder)
    (folder / "config.pkl").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.pkl does not exist"):
        bf.load_released(folder)
