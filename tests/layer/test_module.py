"""BinaryAutoencoder: what the drop-in layer does beyond the exactness of its terms."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import threading

import pytest
import safetensors.torch
import torch

import bae_fast as bf
from bae_fast import files
from bae_fast.autoencoder import load_autoencoder

D, F = 7, 45


def rows(n: int = 40, d: int = D, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, d, dtype=dtype) * 3 + 2


def module(**options) -> bf.BinaryAutoencoder:
    """A fitted float64 module; the identity surrogate lets every bit carry gradient."""
    options = {"surrogate": "identity", "dtype": torch.float64, **options}
    bae = bf.BinaryAutoencoder(D, F, **options)
    if bae.is_transcoder:
        bae.fit_normalization_(rows(200), rows(200, bae.config.d_out))
    else:
        bae.fit_normalization_(rows(200))
    return bae.init_density_(rows(200), 0.3)


def gradients(bae: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in bae.named_parameters()}


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """The float64 bound of spec.md, section 6."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-12 * expected.abs().max()


def assert_same_gradients(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    for name, want in gradients(expected).items():
        got = gradients(actual)[name]
        assert (got is None) == (want is None), name
        if want is not None:
            assert_close(got, want)


# -- presets, starts ---------------------------------------------------------------------------


def test_sparse_is_the_default_preset_with_a_rectangle_and_no_covariance():
    bae = bf.BinaryAutoencoder(D, F)
    assert bae.config == bf.BinaryAutoencoder(D, F, preset="sparse").config
    config = bae.config
    assert (config.surrogate, config.surrogate_width, config.covariance) == (
        "rectangle", 0.4, False,
    )  # fmt: skip
    assert bae(torch.randn(9, D)).covariance is None


def test_paper_preset_has_the_identity_surrogate_and_covariance():
    bae = bf.BinaryAutoencoder(D, F, preset="paper")
    assert (bae.config.surrogate, bae.config.covariance) == ("identity", True)
    assert bae(torch.randn(9, D)).covariance is not None


@pytest.mark.parametrize(("preset", "density"), [("sparse", 0.05), ("paper", 0.5)])
def test_a_preset_starts_at_its_density_on_normalised_rows(preset, density):
    bae = bf.BinaryAutoencoder(64, 512, preset=preset)
    found = bae.encode(torch.randn(2000, 64)).density().mean().item()
    assert found == pytest.approx(density, rel=0.1)


def test_arguments_override_the_preset():
    bae = bf.BinaryAutoencoder(D, F, preset="paper", surrogate="sigmoid", covariance=False)
    config = bae.config
    assert (config.surrogate, config.surrogate_width, config.covariance) == ("sigmoid", 0.5, False)


def test_parameters_are_named_and_shaped_as_in_saelens():
    shapes = {name: tuple(p.shape) for name, p in bf.BinaryAutoencoder(D, F).named_parameters()}
    assert shapes == {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}


def test_the_same_seed_makes_the_same_module():
    made = []
    for _ in range(2):
        torch.manual_seed(5)
        made.append(bf.BinaryAutoencoder(D, F).W_enc.detach())
    assert torch.equal(*made)


@pytest.mark.parametrize("density", [0.05, 0.1, 0.5, 0.93])
def test_init_density_turns_on_exactly_the_rounded_share_of_rows_in_every_column(density):
    bae = bf.BinaryAutoencoder(D, F).fit_normalization_(rows(77, dtype=torch.float32))
    x = rows(77, dtype=torch.float32)
    assert bae.init_density_(x, density) is bae
    assert bae.encode(x).counts().tolist() == [round(density * 77)] * F


@pytest.mark.parametrize(("density", "on"), [(0.001, 1), (0.999, 9)])
def test_init_density_never_makes_a_column_constant(density, on):
    bae = bf.BinaryAutoencoder(D, F)
    x = torch.randn(10, D)
    assert bae.init_density_(x, density).encode(x).counts().tolist() == [on] * F


def test_init_density_sees_the_same_columns_whatever_its_chunks(monkeypatch):
    x = torch.randn(50, D)
    whole = bf.BinaryAutoencoder(D, F)
    chunked = copy.deepcopy(whole)
    whole.init_density_(x, 0.2)
    monkeypatch.setattr("bae_fast.model._CHUNK_ELEMENTS", 350)
    chunked.init_density_(x, 0.2)
    assert chunked.encode(x).equal(whole.encode(x))
    assert chunked.encode(x).counts().tolist() == [10] * F


# -- normalisation -----------------------------------------------------------------------------


def test_normalisation_is_the_identity_until_it_is_fitted():
    bae = bf.BinaryAutoencoder(D, F)
    x = rows(dtype=torch.float32)
    assert torch.equal(bae.normalize(x), x)


def test_fitted_rows_are_centred_with_unit_mean_square(monkeypatch):
    monkeypatch.setattr("bae_fast.normalization._CHUNK_ELEMENTS", 3 * D)  # several blocks of rows
    x = rows(100)
    bae = bf.BinaryAutoencoder(D, F, dtype=torch.float64)
    assert bae.fit_normalization_(x.view(4, 25, D)) is bae
    z = bae.normalize(x)
    assert z.mean(0).abs().max() < 1e-14
    assert abs(z.square().mean() - 1) < 1e-14
    assert bae.x_scale.shape == ()


def test_normalisation_is_kept_as_buffers_and_never_folded_into_the_weights():
    bae = bf.BinaryAutoencoder(D, F)
    before = bae.W_enc.detach().clone(), bae.b_enc.detach().clone()
    bae.fit_normalization_(rows())
    assert {"x_mean", "x_scale"} <= set(bae.state_dict())
    assert torch.equal(bae.W_enc, before[0])
    assert torch.equal(bae.b_enc, before[1])


def test_a_failing_fit_leaves_the_normalisation_of_x_as_it_was():
    bae = bf.BinaryAutoencoder(D, F, d_out=3)
    before = copy.deepcopy(bae.state_dict())
    with pytest.raises(ValueError, match="target"):
        bae.fit_normalization_(rows(), torch.ones(40, 3))
    assert all(torch.equal(before[name], tensor) for name, tensor in bae.state_dict().items())


def test_raw_rows_go_in_and_raw_reconstructions_come_out():
    x, bae = rows(), module()
    z = (x - bae.x_mean) / bae.x_scale
    bits = (z @ bae.W_enc + bae.b_enc > 0).double()
    out = bae(x)
    assert torch.equal(out.code.to_dense(torch.float64), bits)
    assert_close(out.recon, (bits @ bae.W_dec + bae.b_dec) * bae.x_scale + bae.x_mean)
    assert_close(bae.decode(out.code), out.recon)


def test_mse_is_the_mean_over_rows_and_dimensions_in_normalised_units():
    x, bae = rows(), module()
    out = bae(x)
    z, z_hat = bae.normalize(x), (out.recon - bae.x_mean) / bae.x_scale
    by_hand = sum(e**2 for e in (z - z_hat).flatten().tolist()) / (len(x) * D)
    assert bae.mse(out, x).item() == pytest.approx(by_hand, rel=1e-12)


def test_mse_leaves_masked_rows_out():
    x, bae, keep = rows(), module(), torch.rand(40) < 0.5
    out = bae(x, mask=keep)
    kept = ((x - out.recon) / bae.x_scale)[keep]
    assert_close(bae.mse(out, x), kept.square().mean())


def test_mse_refuses_a_target_of_another_shape():
    x, bae = rows(), module()
    with pytest.raises(ValueError, match=r"^target must have shape \[40, 7\]; got \[1, 7\]$"):
        bae.mse(bae(x), x[:1])


# -- the layer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 4)])
def test_leading_dimensions_are_kept_and_mean_nothing_else(lead):
    bae = module()
    x = torch.randn(*lead, D, dtype=torch.float64)
    out, flat = bae(x), bae(x.reshape(-1, D))
    assert out.recon.shape == x.shape
    assert out.code.shape == (*lead, F)
    assert torch.equal(out.recon.reshape(-1, D), flat.recon)
    assert torch.equal(out.entropy, flat.entropy)
    assert out.code.flatten().equal(flat.code)


def test_a_non_contiguous_batch_gives_the_same_as_its_copy():
    bae = module()
    x = torch.randn(D, 5, 6, dtype=torch.float64).permute(2, 1, 0)
    out, copied = bae(x), bae(x.contiguous())
    assert out.code.equal(copied.code)
    assert torch.equal(out.recon, copied.recon)


@pytest.mark.parametrize("surrogate", ["identity", "rectangle", "sigmoid", "official"])
def test_a_mask_equals_running_on_the_kept_rows_only(surrogate):
    masked = module(surrogate=surrogate)
    alone = copy.deepcopy(masked)
    keep = torch.rand(4, 10) < 0.6
    x = torch.randn(4, 10, D, dtype=torch.float64, requires_grad=True)
    kept_x = x.detach()[keep].requires_grad_()

    out = masked(x, mask=keep, covariance=True)
    want = alone(kept_x, covariance=True)
    assert out.code[keep].words.equal(want.code.words)
    assert not out.code.to_dense()[~keep].any()
    assert out.code.n_rows() == keep.sum()
    assert torch.equal(out.code.counts(), want.code.counts())
    assert torch.equal(out.entropy, want.entropy)
    assert torch.equal(out.covariance, want.covariance)

    for bae, result, rows_in in ((masked, out, x), (alone, want, kept_x)):
        (
            bae.mse(result, rows_in.detach()) + 0.1 * result.entropy + 0.2 * result.covariance
        ).backward()
    assert_same_gradients(masked, alone)
    assert_close(x.grad[keep], kept_x.grad)
    assert not x.grad[~keep].any()


def test_dropped_rows_give_no_gradient_even_to_a_loss_that_reads_them():
    bae, keep = module(), torch.tensor([True, False, True])
    x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    bae(x, mask=keep).recon[1].sum().backward()
    assert not x.grad.any()
    assert not any(parameter.grad.any() for parameter in bae.parameters())


def test_non_finite_dropped_rows_do_no_harm():
    bae = module()
    x = rows(6)
    x[2], x[4] = torch.nan, torch.inf
    keep = torch.isfinite(x).all(1)
    out = bae(x, mask=keep, covariance=True)
    (out.recon[keep].square().sum() + out.entropy + out.covariance).backward()
    alone = module()
    alone.load_state_dict(bae.state_dict())
    want = alone(x[keep], covariance=True)
    (want.recon.square().sum() + want.entropy + want.covariance).backward()
    assert_same_gradients(bae, alone)


def test_the_layer_works_in_inference_mode_and_gives_the_same():
    bae, x = module(), rows()
    expected = bae(x)
    with torch.inference_mode():
        out, code = bae(x), bae.encode(x)
        assert bae.decode(code).equal(out.recon)
    assert out.recon.is_inference()
    assert not out.recon.requires_grad
    assert torch.equal(out.recon, expected.recon)
    assert code.equal(expected.code)
    assert torch.equal(out.entropy, expected.entropy.detach())


def test_covariance_follows_the_setting_while_training_and_is_off_otherwise():
    bae, x = module(covariance=True), rows()
    assert bae(x).covariance is not None
    assert bae(x, covariance=False).covariance is None
    with torch.no_grad():
        assert bae(x).covariance is None
    bae.eval()
    assert bae(x).covariance is None
    assert bae(x, covariance=True).covariance is not None


def test_encode_gives_the_bits_of_forward_without_gradient():
    bae, x, keep = module(), rows(), torch.rand(40) < 0.5
    code = bae.encode(x, mask=keep)
    assert code.equal(bae(x, mask=keep).code)
    assert not code.words.requires_grad


def test_preactivation_is_the_margin_of_each_bit():
    bae, x = module(), rows()
    pre = bae.preactivation(x)
    assert torch.equal(pre > 0, bae.encode(x).to_dense())
    assert_close(bae.preactivation(x, torch.tensor([3, 1])), pre[:, [3, 1]])


def test_the_layer_inside_a_model_passes_the_gradient_on():
    bae = module()
    reference = copy.deepcopy(bae)
    reference.impl = "reference"
    first = torch.nn.Linear(D, D, dtype=torch.float64)
    x = rows()
    grads = []
    for layer in (bae, reference):
        first.zero_grad()
        out = layer(first(x), covariance=True)
        (out.recon.square().mean() + 0.1 * out.entropy + 0.1 * out.covariance).backward()
        grads.append((first.weight.grad.clone(), first.bias.grad.clone()))
    assert grads[1][0].any()
    for got, want in zip(*grads, strict=True):
        assert_close(got, want)
    assert_same_gradients(bae, reference)


@pytest.mark.parametrize("covariance", [False, True])
def test_micro_batches_with_common_statistics_add_up_to_the_whole_batch(covariance):
    whole = module()
    parts = copy.deepcopy(whole)
    x = rows(50)
    out = whole(x, covariance=covariance)
    loss = whole.mse(out, x) + 0.3 * out.entropy
    (loss + 0.2 * out.covariance if covariance else loss).backward()

    stats = parts.encode(x).statistics(covariance=covariance)
    for part in x.split([7, 30, 13]):
        mine = parts(part, stats=stats, covariance=covariance)
        assert torch.equal(mine.entropy, out.entropy)  # undivided: that of all counted rows
        loss = parts.mse(mine, part) * len(part) / len(x) + 0.3 * mine.entropy
        (loss + 0.2 * mine.covariance if covariance else loss).backward()
    assert_same_gradients(parts, whole)


def test_statistics_without_kept_signs_give_the_same_gradients(monkeypatch):
    kept = module()
    recomputed = copy.deepcopy(kept)
    x = rows()
    for bae, budget in ((kept, "256"), (recomputed, "0")):
        # 0 is "nothing", and 45 columns are 720 bytes of planes
        monkeypatch.setenv("BAE_FAST_SIGN_PLANES_MB", budget)
        out = bae(x[:20], covariance=True, stats=bae.encode(x).statistics(covariance=True))
        out.covariance.backward()
    assert_same_gradients(recomputed, kept)


def test_a_transcoder_maps_to_the_width_and_units_of_its_target():
    bae = module(d_out=3)
    x, y = rows(), rows(40, 3) * 5
    bae.fit_normalization_(x, y)
    out = bae(x)
    assert out.recon.shape == (40, 3)
    assert bae.W_dec.shape == (F, 3)
    bits = out.code.to_dense(torch.float64)
    assert_close(out.recon, (bits @ bae.W_dec + bae.b_dec) * bae.y_scale + bae.y_mean)
    assert_close(bae.mse(out, y), ((y - out.recon) / bae.y_scale).square().mean())
    bae.mse(out, y).backward()
    assert bae.W_enc.grad.any()


def test_a_square_transcoder_keeps_its_own_target_normalisation():
    bae = module(d_out=D)
    assert bae.is_transcoder
    bae.fit_normalization_(rows(), rows() + 50)
    assert bae(rows()).recon.mean() > 25


def test_multi_bit_features_take_the_values_between_zero_and_one():
    bae = module(n_bits=3)
    x = rows()
    out = bae(x)
    pre = bae.preactivation(x)
    bits = (pre > 0).double().view(40, F, 3)
    values = bits @ torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64) / 7
    assert bae.W_enc.shape == (D, 3 * F)
    assert bae.W_dec.shape == (F, D)
    assert out.code.shape == (40, 3 * F)
    assert_close(out.code.values(torch.float64), values)
    assert_close(bae.normalize(out.recon), values @ bae.W_dec + bae.b_dec)


# -- decode ------------------------------------------------------------------------------------


def test_decoding_a_code_is_differentiable_in_the_decoder_alone():
    bae = module()
    code = bae.encode(rows())
    bae.decode(code).square().sum().backward()
    dense = copy.deepcopy(bae)
    dense.zero_grad()
    dense.decode(code.values(torch.float64)).square().sum().backward()
    assert bae.W_enc.grad is None
    assert bae.b_enc.grad is None
    assert_same_gradients(bae, dense)


def test_decoding_dense_values_takes_them_as_they_are_and_differentiates_them():
    bae = module()
    values = bae.encode(rows()).values(torch.float64)
    values[:, 4] = 2.5
    values.requires_grad_()
    recon = bae.decode(values)
    assert_close(recon, (values @ bae.W_dec + bae.b_dec) * bae.x_scale + bae.x_mean)
    (grad,) = torch.autograd.grad(recon.sum(), values)
    assert_close(grad, (bae.W_dec.sum(1) * bae.x_scale).expand(40, F))


def test_decoding_a_code_with_leading_dimensions_keeps_them():
    bae = module(n_bits=2)
    x = rows(24).view(2, 3, 4, D)
    assert torch.equal(bae.decode(bae.encode(x)), bae(x).recon)


# -- copies, dtypes, state ---------------------------------------------------------------------


def test_state_dict_round_trips_into_another_module():
    x, bae, other = rows(), module(), bf.BinaryAutoencoder(D, F, dtype=torch.float64)
    assert not other.encode(x).equal(bae.encode(x))
    other.load_state_dict(bae.state_dict())
    assert other.encode(x).equal(bae.encode(x))
    assert torch.equal(other(x).recon, bae(x).recon)


def test_a_deep_copy_is_equal_and_independent():
    x, bae = rows(), module(impl="torch", metadata={"hook_name": "here"})
    twin = copy.deepcopy(bae)
    assert (twin.config, twin.impl) == (bae.config, bae.impl)
    assert torch.equal(twin(x).recon, bae(x).recon)
    with torch.no_grad():
        twin.b_dec += 1
    assert not torch.equal(twin(x).recon, bae(x).recon)


def test_a_module_after_a_backward_can_be_pickled():
    x, bae = rows(), module()
    bae(x).recon.sum().backward()
    assert torch.equal(pickle.loads(pickle.dumps(bae))(x).recon, bae(x).recon)


def test_bf16_parameters_give_bf16_reconstructions_and_gradients_and_fp32_statistics():
    bae = module(covariance=True).to(torch.bfloat16)
    x = rows(dtype=torch.bfloat16)
    out = bae(x)
    assert out.recon.dtype == torch.bfloat16
    assert out.entropy.dtype == out.covariance.dtype == torch.float32
    loss = bae.mse(out, x) + 0.1 * out.entropy + 0.1 * out.covariance
    assert loss.dtype == torch.float32
    loss.backward()
    for parameter in bae.parameters():
        assert parameter.grad.dtype == parameter.dtype == torch.bfloat16
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


def test_bf16_bits_are_those_of_the_exact_product_up_to_its_rounding():
    bae = module().to(torch.bfloat16)
    x = rows(200, dtype=torch.bfloat16)
    z, weight = bae.normalize(x).double(), bae.W_enc.double()
    exact = z @ weight + bae.b_enc.double()
    # fp32 sums of d + 1 products of bf16 numbers, which are exact
    delta = (D + 4) * 2.0**-23 * (z.abs() @ weight.abs() + bae.b_enc.double().abs())
    wrong = bae.encode(x).to_dense() != (exact > 0)
    assert not (wrong & (exact.abs() > delta)).any()


def test_half_of_a_module_is_the_module_of_half_its_dtype():
    bae = module().to(torch.float16)
    assert bae(rows(dtype=torch.float16)).recon.dtype == torch.float16


def test_repr_says_what_was_chosen():
    text = repr(module(n_bits=2, d_out=3, impl="torch"))
    for part in (
        "d_in=7",
        "d_sae=45",
        "d_out=3",
        "n_bits=2",
        "surrogate='identity'",
        "impl='torch'",
    ):
        assert part in text


def test_codes_can_be_pickled():
    bae, keep = module(n_bits=2), torch.rand(40) < 0.5
    code = bae.encode(rows(), mask=keep)
    back = pickle.loads(pickle.dumps(code))
    assert back.equal(code)
    assert back.n_bits == 2
    assert torch.equal(back.row_mask, keep)


def test_codes_in_a_file_of_torch_are_read_by_its_safe_default(tmp_path):
    code = module().encode(rows())
    torch.save({"codes": [code]}, tmp_path / "codes.pt")
    assert torch.load(tmp_path / "codes.pt", weights_only=True)["codes"][0].equal(code)
    code.words[3, -1] |= 1 << (code.n_columns % 32)  # kernels would count it
    torch.save(code, tmp_path / "codes.pt")
    with pytest.raises(ValueError, match="words must have no bits past column"):
        torch.load(tmp_path / "codes.pt", weights_only=True)


# -- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_bits": 3},
        {"d_out": 4},
        {"d_out": D},
        {"dtype": torch.bfloat16},
        {"surrogate": "sigmoid", "surrogate_width": 0.7, "covariance": True},
        {"preset": "paper", "metadata": {"hook_name": "blocks.3", "context_size": 128}},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_a_saved_module_comes_back_with_the_same_bits(tmp_path, options):
    bae = module(**options)
    x = rows(dtype=bae.W_enc.dtype)
    assert bae.save_pretrained(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    back = bf.BinaryAutoencoder.from_pretrained(tmp_path / "new" / "folder")
    assert back.config == bae.config
    assert back.is_transcoder == bae.is_transcoder
    assert not back.training
    assert all(parameter.requires_grad for parameter in back.parameters())
    assert back.state_dict().keys() == bae.state_dict().keys()
    for name, tensor in bae.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
        assert back.state_dict()[name].dtype == tensor.dtype
    assert back.encode(x).equal(bae.encode(x))
    assert torch.equal(back(x).recon, bae(x).recon)
    back(x).recon.sum().backward()


def test_the_folder_holds_a_config_and_the_weights_and_nothing_else(tmp_path):
    module(metadata={"model_name": "m"}).save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    values = json.loads((tmp_path / "cfg.json").read_text())
    assert values["architecture"] == "binary_autoencoder"
    assert (values["d_in"], values["d_sae"], values["dtype"]) == (D, F, "float64")
    assert values["metadata"] == {"model_name": "m"}
    tensors = safetensors.torch.load_file(tmp_path / "sae_weights.safetensors")
    assert set(tensors) == {"W_enc", "b_enc", "W_dec", "b_dec", "x_mean", "x_scale"}


def test_unknown_keys_of_a_later_version_are_ignored(tmp_path):
    bae = module()
    bae.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**values, "from_the_future": 1}))
    assert bf.BinaryAutoencoder.from_pretrained(tmp_path).config == bae.config


@pytest.mark.parametrize("kind", ["weight norm", "orthogonal", "pruned"])
def test_a_tensor_that_is_computed_is_saved_as_it_is_used(tmp_path, kind):
    x, bae = rows(), module(impl="torch")
    if kind == "weight norm":
        torch.nn.utils.parametrizations.weight_norm(bae, "W_dec", dim=0)
    elif kind == "orthogonal":
        torch.nn.utils.parametrizations.orthogonal(bae, "W_dec")
    else:
        from torch.nn.utils import prune

        prune.l1_unstructured(bae, "W_dec", 0.5)
    loaded = bf.BinaryAutoencoder.from_pretrained(bae.save_pretrained(tmp_path))
    assert torch.equal(loaded.W_dec, bae.W_dec)
    assert torch.equal(loaded.decode(bae.encode(x)), bae.decode(bae.encode(x)))


def test_saving_again_replaces_the_first_model(tmp_path):
    module(n_bits=2).save_pretrained(tmp_path)
    second = module()
    second.save_pretrained(tmp_path)
    assert bf.BinaryAutoencoder.from_pretrained(tmp_path).config == second.config


class Killed(BaseException):
    """Stands for a signal between two steps of a save."""


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("first", [{}, {"n_bits": 2, "d_out": 3}], ids=["same", "other"])
def test_a_save_killed_between_the_two_files_leaves_the_new_model_loadable(
    tmp_path, monkeypatch, first
):
    module(**first).save_pretrained(tmp_path)
    second, x = module(surrogate="sigmoid"), rows()

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("bae_fast.pretrained.write_json", killed)
        with pytest.raises(Killed):
            second.save_pretrained(tmp_path)
    back = bf.BinaryAutoencoder.from_pretrained(tmp_path)
    assert back.config == second.config
    assert back.encode(x).equal(second.encode(x))


def test_a_first_save_killed_between_the_two_files_leaves_the_model_loadable(tmp_path, monkeypatch):
    bae, x = module(), rows()

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("bae_fast.pretrained.write_json", killed)
        with pytest.raises(Killed):
            bae.save_pretrained(tmp_path)
    assert bf.BinaryAutoencoder.from_pretrained(tmp_path).encode(x).equal(bae.encode(x))


def failing_save_file(monkeypatch):
    def fail(tensors, path, metadata=None):
        path.write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)


def failing_replace(monkeypatch):
    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)


@pytest.mark.parametrize("break_it", [failing_save_file, failing_replace])
def test_a_failing_save_leaves_the_old_files_whole_and_no_litter(tmp_path, monkeypatch, break_it):
    bae, x = module(), rows()
    bae.save_pretrained(tmp_path)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        break_it(patch)
        with pytest.raises(OSError, match="no space left"):
            module(n_bits=2).save_pretrained(tmp_path)
    assert contents(tmp_path) == before
    assert bf.BinaryAutoencoder.from_pretrained(tmp_path).encode(x).equal(bae.encode(x))


def test_a_save_that_fails_at_the_second_rename_leaves_a_loadable_model(tmp_path, monkeypatch):
    module().save_pretrained(tmp_path)
    second, x = module(n_bits=2), rows()
    real, calls = os.replace, []

    def fail_at_second(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise OSError("no space left on device")
        real(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_at_second)
        with pytest.raises(OSError, match="no space left"):
            second.save_pretrained(tmp_path)
    assert sorted(contents(tmp_path)) == ["cfg.json", "sae_weights.safetensors"]
    assert bf.BinaryAutoencoder.from_pretrained(tmp_path).encode(x).equal(second.encode(x))


def test_metadata_that_is_not_json_fails_before_anything_is_written(tmp_path):
    with pytest.raises((TypeError, ValueError)):
        module(metadata={"x": float("nan")}).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_written_files_have_the_mode_of_an_ordinary_file(tmp_path, monkeypatch):
    for i, umask in enumerate((0o022, 0o077)):
        before = os.umask(umask)
        try:
            plain = tmp_path / f"plain{i}"
            plain.write_text("")
            with monkeypatch.context() as patched:  # another thread would see what is set
                patched.setattr(os, "umask", lambda _: pytest.fail("umask is of all threads"))
                files.write_json(tmp_path / f"made{i}", {})
                files.write_safetensors(tmp_path / f"tensors{i}", {"x": torch.zeros(3)}, {})
        finally:
            os.umask(before)
        for name in ("made", "tensors"):
            assert (tmp_path / f"{name}{i}").stat().st_mode == plain.stat().st_mode


def test_a_dropped_row_that_holds_nan_gets_no_gradient():
    bae = bf.BinaryAutoencoder(6, 40)
    x = torch.randn(10, 6)
    keep = torch.arange(10) != 4
    x[4] = float("nan")
    x.requires_grad_()
    out = bae(x, mask=keep, multilinear=True)
    (bae.mse(out, x) + 1e-3 * out.entropy).backward()
    assert torch.isfinite(bae.W_enc.grad).all()
    assert not x.grad[4].any()
    assert torch.isfinite(x.grad[keep]).all()


def test_codes_made_in_inference_mode_serve_training():
    bae = bf.BinaryAutoencoder(6, 40)
    x = torch.randn(30, 6)
    with torch.inference_mode():
        code = bae.encode(x)
    bae.decode(code).sum().backward()
    assert bae.W_dec.grad.any()
    out = bae(x, stats=code.statistics(covariance=True), covariance=True)
    (out.entropy + out.covariance).backward()
    out = bae(x, past=code.statistics(), covariance=True)
    (out.entropy + out.covariance).backward()
    assert bae.W_enc.grad.any()


@pytest.mark.parametrize("impl", ["reference", "torch", "auto"])
def test_rows_made_in_inference_mode_are_trained_on(impl):
    bae = bf.BinaryAutoencoder(6, 40, impl=impl)
    plain = torch.randn(30, 6)
    kept = torch.rand(30) < 0.7
    with torch.inference_mode():
        x, mask = plain * 1, kept.clone()
        encoded = None if impl == "reference" else bae.encode_rows(plain, mask=kept)
    found = []
    for rows, keep, given in ((plain, kept, None), (x, mask, None), (x, mask, encoded)):
        bae.zero_grad()
        out = bae(rows, mask=keep, encoded=given, multilinear=True)
        (bae.mse(out, rows) + out.entropy + out.variance).backward()
        found.append([p.grad.clone() for p in bae.parameters()])
    for other in found[1:]:
        for left, right in zip(found[0], other, strict=True):
            assert torch.equal(left, right)


def test_a_module_is_loaded_in_another_dtype(tmp_path):
    bae = bf.BinaryAutoencoder(6, 40)
    bae.save_pretrained(tmp_path)
    for load in (bf.BinaryAutoencoder.from_pretrained, load_autoencoder):
        found = load(tmp_path, dtype=torch.bfloat16)
        assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
        assert torch.equal(found.W_enc, bae.W_enc.bfloat16())
        assert load(tmp_path).W_enc.dtype == torch.float32
        for bad in ("bfloat16", torch.int8, torch.complex64):
            words = f"dtype must be a floating torch.dtype or None; got {bad!r}"
            with pytest.raises(TypeError, match=re.escape(words)):
                load(tmp_path, dtype=bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_code_of_no_rows_has_a_gradient_of_zeros(dtype):
    bae = bf.BinaryAutoencoder(24, 70, dtype=dtype)
    for _ in range(3):  # memory that was used before
        torch.full((70, 24), 7.0, dtype=dtype)
        bae.zero_grad()
        code = bf.BinaryCode(torch.empty(0, 3, dtype=torch.int32), 70)
        bae.decode(code).sum().backward()
        assert not bae.W_dec.grad.any()
        assert not bae.b_dec.grad.any()


def test_dense_features_of_a_wrong_dtype_are_named():
    bae = bf.BinaryAutoencoder(6, 40)
    with pytest.raises(TypeError, match=r"code must be floating point; got torch\.bool"):
        bae.decode(torch.zeros(3, 40, dtype=torch.bool))
    with pytest.raises(TypeError, match="W_dec must have code's dtype"):
        bae.decode(torch.zeros(3, 40, dtype=torch.float16))


def test_float64_parameters_under_autocast_take_the_multilinear_gradient():
    bae = bf.BinaryAutoencoder(6, 40).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.randn(30, 6)
        out = bae(x, multilinear=True)
        bae.mse(out, x).backward()
    assert torch.isfinite(bae.W_enc.grad).all()


def test_loading_while_another_thread_saves_gives_one_save_or_the_other(tmp_path):
    """Every load must pair the configuration and the weights of one save."""
    saves = []
    for i in range(2):
        bae = bf.BinaryAutoencoder(8, 64 * (i + 1), metadata={"number": i})
        torch.nn.init.constant_(bae.b_dec, float(i))
        saves.append(bae)
    saves[0].save_pretrained(tmp_path)
    stop = threading.Event()

    def write():
        while not stop.is_set():
            for bae in saves:
                bae.save_pretrained(tmp_path)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(150):
            loaded = bf.BinaryAutoencoder.from_pretrained(tmp_path)
            number = loaded.config.metadata["number"]
            assert loaded.config.d_sae == 64 * (number + 1)
            assert loaded.b_dec[0] == number
    finally:
        stop.set()
        writer.join()


def test_warmup_names_the_backend():
    assert bf.BinaryAutoencoder(4, 8, impl="torch").warmup() == "torch"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"covariance": "no"}, "covariance must be bool"),
        ({"surrogate_width": True}, "surrogate_width must be a positive finite number"),
        ({"metadata": {"path": object()}}, "metadata must hold JSON values only"),
    ],
)
def test_options_that_could_not_be_saved_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bf.BinaryAutoencoder(4, 8, **options)
