"""A Binary Autoencoder in equal parts of its features, one on each rank along "feature"."""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.distributed import Mesh
from bae_fast.model import ARCHITECTURE, BinaryAutoencoder

# dimension along which a parameter's features lie; b_dec and the normalisation are whole everywhere
FEATURE_DIM = {"W_enc": 1, "b_enc": 0, "W_dec": 0}


def check_features(d_sae: int, n_bits: int, mesh: Mesh) -> None:
    """Raise ValueError unless every rank gets the same whole words of columns."""
    mesh.columns(d_sae * n_bits)
    if d_sae % mesh.feature:
        raise ValueError(
            f"d_sae must be a multiple of the {mesh.feature} processes along feature; got {d_sae}"
        )


@torch.no_grad()
def shard_features(bae: BinaryAutoencoder, mesh: Mesh) -> BinaryAutoencoder:
    """The features of this rank, as a module of their own; the module itself on one process.

    The module's reconstruction is a part of the whole one: see ``combine`` of
    :meth:`bae_fast.BinaryAutoencoder.forward`.

    Args:
        bae: the whole module, the same on every rank; copied from.
        mesh: the processes.

    Raises:
        ValueError: features that cannot be divided among the ranks by words of 32 columns, or a
            module whose codes are searched for.
    """
    if mesh.feature == 1:
        return bae
    if bae.config_values()["architecture"] != ARCHITECTURE:
        raise ValueError(
            f"bae must be a BinaryAutoencoder for {mesh.feature} processes along feature; got "
            f"{type(bae).__name__}, of which a part encodes otherwise than the whole"
        )
    config = bae.config
    check_features(config.d_sae, config.n_bits, mesh)
    each = config.d_sae // mesh.feature
    values = {**bae.config_values(), "d_sae": each}
    own = BinaryAutoencoder.from_config(values, "the module", impl=bae.impl)
    state = {name: _own_part(name, value, mesh) for name, value in bae.state_dict().items()}
    own.load_state_dict(state, assign=True)
    own.check_finite, own.learned = bae.check_finite, bae.learned
    for name, parameter in own.named_parameters():
        parameter.requires_grad_(bae.get_parameter(name).requires_grad)
    return own.train(bae.training)


def _own_part(name: str, value: Tensor, mesh: Mesh) -> Tensor:
    dim = FEATURE_DIM.get(name)
    if dim is None:
        return value.detach().clone()
    each = value.shape[dim] // mesh.feature
    return value.detach().narrow(dim, mesh.feature_rank * each, each).clone()


@torch.no_grad()
def gather_features(own: BinaryAutoencoder, mesh: Mesh) -> BinaryAutoencoder:
    """The whole module of all ranks' parts, on every rank; a collective.

    Its files (``save_pretrained``) are those of a module that was trained by one process.
    """
    if mesh.feature == 1:
        return own
    values = {**own.config_values(), "d_sae": own.config.d_sae * mesh.feature}
    whole = BinaryAutoencoder.from_config(values, "the module", impl=own.impl)
    state = {}
    for name, value in own.state_dict().items():
        dim = FEATURE_DIM.get(name)
        value = value.detach()
        state[name] = value.clone() if dim is None else mesh.gather(value, "feature", name, dim=dim)
    whole.load_state_dict(state, assign=True)
    whole.check_finite, whole.learned = own.check_finite, own.learned
    return whole.train(own.training)
