"""Features with values that are searched for in a trained dictionary, without its encoder.

The counterpart of :mod:`bae_fast.search` for features with values: orthogonal matching pursuit
(Pati, Rezaiifar and Krishnaprasad 1993) takes the direction nearest to what is left of a row, fits
the values of all that were taken anew, and goes on, k times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bae_fast.arguments import check_int
from bae_fast.autoencoder import Autoencoder
from bae_fast.baselines.base import SparseAutoencoder
from bae_fast.normalization import check_rows
from bae_fast.training.recipe import least_squares

# added to the diagonal of the products of directions, which have unit norm
_RIDGE = 1e-4

# steps of projected gradient descent that make the values at the end optimal and not negative
_STEPS = 100


class PursuedAutoencoder(Autoencoder):
    """A trained sparse autoencoder whose features are found by orthogonal matching pursuit.

    It is evaluated, spliced and described as any autoencoder; it is not saved.
    """

    def __init__(self, model: SparseAutoencoder, k: int) -> None:
        """Wrap a trained model, whose weights are copied.

        Args:
            model: not a transcoder, whose target is not known where it encodes.
            k: features of a row, at most.

        Raises:
            TypeError: another kind of model.
            ValueError: a transcoder, or k below 1 or above the number of features.
        """
        super().__init__()
        if not isinstance(model, SparseAutoencoder):
            raise TypeError(f"model must be a SparseAutoencoder; got {type(model).__name__}")
        if model.is_transcoder:
            raise ValueError("model must be no transcoder: a pursuit needs the target")
        check_int("k", k, 1, model.d_sae)
        self.config, self.k = model.config, k
        self.register_normalization(
            model.d_in, None, device=model.W_dec.device, dtype=model.W_dec.dtype
        )
        self.x_mean.copy_(model.x_mean)
        self.x_scale.copy_(model.x_scale)
        self.set_metric_(None if model.x_metric is None else model.x_metric.clone())
        directions = nn.functional.normalize(model.W_dec.detach(), dim=1)
        self.W_dec = nn.Parameter(directions.clone(), requires_grad=False)
        self.b_dec = nn.Parameter(model.b_dec.detach().clone(), requires_grad=False)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Values of the features of raw x, ``[..., d_in]`` to ``[..., d_sae]``, none negative."""
        rows = (self.normalized_rows(x) - self.b_dec).reshape(-1, self.d_in)
        directions = self.W_dec.to(torch.promote_types(rows.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):  # equations are not solved in halves
            found = _pursue(rows.to(directions.dtype), directions, self.k)
        return found.to(x.dtype).reshape(*x.shape[:-1], self.d_sae)

    def decode(self, code: Any) -> Tensor:
        """Raw reconstruction ``[..., d_in]`` of features ``[..., d_sae]``."""
        return self.denormalize(code @ self.W_dec + self.b_dec)

    @torch.no_grad()
    def fit_(self, x: Tensor, *, ridge: float = 1e-5) -> PursuedAutoencoder:
        """Replace the directions by the least-squares optimum for the features of raw rows x, at
        unit norm, as :func:`bae_fast.training.fit_search_` does for bits.

        Raises:
            TypeError, ValueError: x is no tensor of finite floats ``[n, d_in]``, n >= d_sae.
        """
        check_rows("x", x, self.d_in, least=self.d_sae)
        f = self.d_sae
        system = torch.zeros(f + 1, f + 1, dtype=torch.float64, device=self.W_dec.device)
        moment = torch.zeros(f + 1, self.d_in, dtype=torch.float64, device=self.W_dec.device)
        for block in self.blocks(x):
            values = nn.functional.pad(self.encode(block), (0, 1), value=1.0)
            system += values.T @ values
            moment += values.T @ self.normalize(block)
        solution = least_squares(system, moment, ridge * len(x)).to(self.W_dec.dtype)
        norms = solution[:f].norm(dim=1, keepdim=True)
        # a feature that no row has keeps its direction
        used = (system.diagonal()[:f, None] > 2 * ridge * len(x)) & (norms > 0)
        self.W_dec.copy_(torch.where(used, solution[:f] / norms, self.W_dec))
        self.b_dec.copy_(solution[f])
        return self


def _pursue(rows: Tensor, directions: Tensor, k: int) -> Tensor:
    """Values ``[N, F]`` of k features of each row ``[N, d]``; directions ``[F, d]``, unit norm."""
    gram, products = directions @ directions.T, rows @ directions.T
    taken = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
    left, values = products.clone(), products[:, :0]
    for _ in range(k):
        taken = torch.cat([taken, left.scatter(1, taken, -torch.inf).argmax(1, keepdim=True)], 1)
        system, goal = _of_taken(gram, products, taken)
        values = torch.linalg.solve(system, goal)
        # what of the products the taken features leave
        first = torch.arange(0, taken.numel(), taken.shape[1], device=rows.device)
        left = products - nn.functional.embedding_bag(
            taken.flatten(), gram, first, per_sample_weights=values.flatten(), mode="sum"
        )
    values = values.clamp_min(0)
    system, goal = _of_taken(gram, products, taken)
    steepest = system.abs().sum(2).amax(1, keepdim=True)  # no eigenvalue is larger
    for _ in range(_STEPS):
        slope = (system @ values[..., None])[..., 0] - goal
        values = (values - slope / steepest).clamp_min(0)
    return torch.zeros_like(products).scatter(1, taken, values)


def _of_taken(gram: Tensor, products: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
    """The normal equations of the features that each row has taken: (``[N, s, s]``, ``[N, s]``)."""
    system = gram[taken[:, :, None], taken[:, None, :]]
    system.diagonal(dim1=1, dim2=2).add_(_RIDGE)
    return system, products.gather(1, taken)
