"""Shared by tests of commands."""

import pytest


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Rows of 8 fair bits in 16 dimensions as files, and a model of them."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    import bae_fast as bf

    folder = tmp_path_factory.mktemp("own")
    g = torch.Generator().manual_seed(0)
    bits = torch.rand(2000, 8, generator=g) < 0.5
    rows = bits.float() @ torch.randn(8, 16, generator=g)
    np.save(folder / "rows.npy", rows.double().numpy())
    save_file({"rows": rows, "other": torch.ones(1)}, folder / "rows.safetensors")
    torch.manual_seed(0)
    bae = bf.BinaryAutoencoder(16, 32).fit_normalization_(rows)
    bae.init_density_(rows, 0.3).save_pretrained(folder / "bae")
    return folder
