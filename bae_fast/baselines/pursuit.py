"""Features with values that are searched for in a trained dictionary, without its encoder.

The counterpart of :mod:`bae_fast.search` for features with values: orthogonal matching pursuit
(Pati, Rezaiifar and Krishnaprasad 1993) takes the direction nearest to what is left of a row, fits
the values of all that were taken anew, and goes on, k times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bae_fast.arguments import at_least_0, check_int
from bae_fast.autoencoder import Autoencoder
from bae_fast.baselines.base import SparseAutoencoder, UnitDirections
from bae_fast.normalization import check_rows
from bae_fast.training.recipe import least_squares

# added to the diagonal of the products of directions, which have unit norm
_RIDGE = 1e-4

# steps of projected gradient descent that make the values at the end optimal and not negative
_STEPS = 100


class PursuedAutoencoder(UnitDirections, Autoencoder):
    """A trained sparse autoencoder whose features are found by orthogonal matching pursuit.

    Without a price a row takes k features. With one it takes those that are worth their bits, as a
    searched binary code does: a feature is taken where the squared error that it saves is more
    than the price of saying that it is on and of writing its value, and the dearest saving first.

    It is evaluated, spliced and described as any autoencoder; it is not saved. Directions are
    fitted to such features by :meth:`fit_`, or learned with them by ``Trainer(pursued, rows,
    SparseConfig())``, as those of a searched binary code are: the values are held fixed in each
    step, and the shares that price features are those of :meth:`fit_density_`.
    """

    density: Tensor

    def __init__(
        self,
        model: SparseAutoencoder,
        k: int,
        *,
        bit_price: float = 0.0,
        rows: Tensor | None = None,
        value_bits: float = 2.0,
    ) -> None:
        """Wrap a trained model, whose weights are copied.

        Args:
            model: not a transcoder, whose target is not known where it encodes.
            k: features of a row, at most.
            bit_price: the mean squared error, in normalised units, that a bit of code length is
                worth, see :class:`bae_fast.SearchedAutoencoder`; 0: every row takes k features.
            rows: raw rows ``[n, d_in]``, where a price is given: held-in ones, by the model's codes
                of which a feature's bits are counted, log2((1 - p) / p) for its share p of rows.
            value_bits: what a value is taken to cost beside that.

        Raises:
            TypeError: another kind of model.
            ValueError: a transcoder, k below 1 or above the number of features, a price without
                rows, or numbers below 0.
        """
        super().__init__()
        if not isinstance(model, SparseAutoencoder):
            raise TypeError(f"model must be a SparseAutoencoder; got {type(model).__name__}")
        if model.is_transcoder:
            raise ValueError("model must be no transcoder: a pursuit needs the target")
        check_int("k", k, 1, model.d_sae)
        self.bit_price = at_least_0("bit_price", bit_price)
        self.value_bits = at_least_0("value_bits", value_bits)
        if bit_price and rows is None:
            raise ValueError("rows must be given with a bit_price: they say what a feature costs")
        self.config, self.k = model.config, k
        self.register_normalization(
            model.d_in, None, device=model.W_dec.device, dtype=model.W_dec.dtype
        )
        self.x_mean.copy_(model.x_mean)
        self.x_scale.copy_(model.x_scale)
        self.set_metric_(None if model.x_metric is None else model.x_metric.clone())
        directions = nn.functional.normalize(model.W_dec.detach(), dim=1)
        self.W_dec = nn.Parameter(directions.clone())
        self.b_dec = nn.Parameter(model.b_dec.detach().clone())
        self.register_buffer("density", torch.full_like(model.b_enc.detach(), 0.5))
        if bit_price and rows is not None:
            check_rows("rows", rows, self.d_in)
            with torch.no_grad():
                on = sum(model.active(block).counts() for block in model.blocks(rows))
            self._set_density(torch.as_tensor(on), len(rows))

    def _set_density(self, on: Tensor, n: int) -> None:
        self.density.copy_((on.double() + 0.5) / (n + 1))

    def _cost(self, dtype: torch.dtype) -> Tensor | None:
        """Squared error of a row that each feature has to save, ``[F]``."""
        if not self.bit_price:
            return None
        p = self.density.double()
        bits = ((1 - p) / p).log2().clamp_min(0) + self.value_bits
        return (self.bit_price * self.d_in * bits).to(dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Values of the features of raw x, ``[..., d_in]`` to ``[..., d_sae]``, none negative."""
        rows = (self.normalized_rows(x) - self.b_dec).reshape(-1, self.d_in)
        directions = self.W_dec.to(torch.promote_types(rows.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):  # equations are not solved in halves
            cost = self._cost(directions.dtype)
            found = _pursue(rows.to(directions.dtype), directions, self.k, cost)
        return found.to(x.dtype).reshape(*x.shape[:-1], self.d_sae)

    def decode(self, code: Any) -> Tensor:
        """Raw reconstruction ``[..., d_in]`` of features ``[..., d_sae]``."""
        return self.denormalize(code @ self.W_dec + self.b_dec)

    def training_loss(
        self, x: Tensor, target: Tensor | None, *, dead: Tensor, done: float
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """See :class:`bae_fast.training.Trainable`: the squared error of the values found."""
        features = self.encode(x)
        error = self.normalize(x) - (features @ self.W_dec + self.b_dec)
        mse = error.square().mean()
        return mse, {"mse": mse}, (features > 0).sum(0)

    def finish(self, x: Tensor) -> None:
        """Nothing is left to do: :meth:`fit_density_` says of which rows shares are taken."""

    @torch.no_grad()
    def fit_density_(self, rows: Tensor) -> PursuedAutoencoder:
        """Set the shares that price features to those of the features found in raw rows.

        Raises:
            TypeError, ValueError: rows are no tensor of floats ``[n, d_in]``, n >= 1.
        """
        check_rows("rows", rows, self.d_in)
        on = sum((self.encode(block) > 0).sum(0) for block in self.blocks(rows))
        self._set_density(torch.as_tensor(on), len(rows))
        return self

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
        on = torch.zeros_like(self.density, dtype=torch.int64)
        for block in self.blocks(x):
            values = nn.functional.pad(self.encode(block), (0, 1), value=1.0)
            on += (values[:, :f] > 0).sum(0)
            system += values.T @ values
            moment += values.T @ self.normalize(block)
        solution = least_squares(system, moment, ridge * len(x)).to(self.W_dec.dtype)
        norms = solution[:f].norm(dim=1, keepdim=True)
        # a feature that no row has keeps its direction
        used = (system.diagonal()[:f, None] > 2 * ridge * len(x)) & (norms > 0)
        self.W_dec.copy_(torch.where(used, solution[:f] / norms, self.W_dec))
        self.b_dec.copy_(solution[f])
        self._set_density(on, len(x))
        return self


def _pursue(rows: Tensor, directions: Tensor, k: int, cost: Tensor | None = None) -> Tensor:
    """Values ``[N, F]`` of at most k features of each row ``[N, d]``.

    Args:
        directions: ``[F, d]``, unit norm.
        cost: ``[F]``, what a feature has to save of the squared error; None: k of each row.
    """
    gram, products = directions @ directions.T, rows @ directions.T
    n = len(rows)
    taken = torch.zeros(n, k, dtype=torch.int64, device=rows.device)
    number = torch.zeros(n, dtype=torch.int64, device=rows.device)
    going, left = torch.arange(n, device=rows.device), products.clone()
    for step in range(k):
        score = left if cost is None else left.clamp_min_(0).square_().sub_(cost)
        best, feature = score.scatter_(1, taken[going, :step], -torch.inf).max(1)
        if cost is not None:
            more = ~(best <= 0)  # NaN goes on: a row of it is none of zeros
            going, feature = going[more], feature[more]
            if not len(going):
                break
        taken[going, step] = feature
        number[going] = step + 1
        system, goal = _of_taken(gram, products[going], taken[going, : step + 1])
        values = torch.linalg.solve(system, goal)
        # what of the products the taken features leave
        first = torch.arange(0, values.numel(), step + 1, device=rows.device)
        left = products[going] - nn.functional.embedding_bag(
            taken[going, : step + 1].flatten(), gram, first,
            per_sample_weights=values.flatten(), mode="sum",
        )  # fmt: skip
    found = torch.zeros_like(products)
    for size in number.unique().tolist():
        if size:
            these = (number == size).nonzero().flatten()
            own = taken[these, :size]
            values = _not_negative(*_of_taken(gram, products[these], own))
            found[these] = found[these].scatter(1, own, values)
    return found


def _not_negative(system: Tensor, goal: Tensor) -> Tensor:
    """The best values that are not negative."""
    best = torch.linalg.solve(system, goal)
    values = best.clamp_min(0)
    # where the best values are not negative, nothing is left to do
    rows = (best < 0).any(1).nonzero().flatten()
    system, goal, some = system[rows], goal[rows], values[rows]
    steepest = system.abs().sum(2).amax(1, keepdim=True)  # no eigenvalue is larger
    for _ in range(_STEPS if len(rows) else 0):
        slope = torch.baddbmm(goal[..., None], system, some[..., None], beta=-1)[..., 0]
        some = (some - slope / steepest).clamp_min_(0)
    return values.index_copy(0, rows, some)


def _of_taken(gram: Tensor, products: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
    """The normal equations of the features that each row has taken: (``[N, s, s]``, ``[N, s]``)."""
    system = gram[taken[:, :, None], taken[:, None, :]]
    system.diagonal(dim1=1, dim2=2).add_(_RIDGE)
    return system, products.gather(1, taken)
