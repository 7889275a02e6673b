"""The interface of the sparse autoencoders of the field: raw rows in, features, raw rows out.

All of them compute pre = (x - b_dec) W_enc + b_enc on normalised rows (a transcoder leaves b_dec
out: its output lives elsewhere), turn pre into features, and reconstruct with W_dec + b_dec. The
methods are in :mod:`bae_fast.baselines.methods`; a further one is a subclass of
:class:`SparseAutoencoder` with a name (:func:`register_method`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from bae_fast.autoencoder import (
    Autoencoder,
    check_metadata,
    check_sizes,
    normal_quantile,
    register_architecture,
)
from bae_fast.training.pool import ALONE, Pool

# how fast lambda follows L0 to its target, in units of log(lambda) a step
_LAMBDA_RATE = 0.02

# share of the steps over which lambda rises from zero
_LAMBDA_WARMUP = 0.05


@dataclasses.dataclass(frozen=True)
class SAEConfig:
    """Everything but the weights; the content of ``cfg.json``.

    Attributes:
        architecture: the method, a key of :data:`METHODS`.
        d_in, d_sae, d_out: widths of x, of the features and of the reconstruction.
        k: features a row; for ``relu``, ``gated`` and ``jumprelu`` the mean L0 that lambda is
            steered to.
        bandwidth: the width of the straight-through estimate of ``jumprelu``, and the temperature
            of the surrogate of ``binary_topk``; in units of pre, whose deviation starts near 1.
        metadata: where the rows came from; JSON values only.
    """

    architecture: str
    d_in: int
    d_sae: int
    d_out: int
    k: int
    bandwidth: float
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    def check(self, source: str) -> None:
        """Raise ValueError where a value is of the wrong kind or out of range."""
        if not isinstance(self.architecture, str) or self.architecture not in METHODS:
            raise ValueError(
                f"{source}: architecture must be one of {', '.join(METHODS)}; "
                f"got {self.architecture!r}"
            )
        check_sizes(self, ("d_in", "d_sae", "d_out", "k"), source)
        if self.k > self.d_sae:
            raise ValueError(f"{source}: k must be at most d_sae={self.d_sae}; got {self.k}")
        width = self.bandwidth
        number = isinstance(width, (int, float)) and not isinstance(width, bool)
        if not (number and 0 < width <= sys.float_info.max):
            raise ValueError(f"{source}: bandwidth must be positive and finite; got {width!r}")
        check_metadata(self.metadata, source)


class SAEOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        loss: ``[]``: the sum of the parts, each with its weight. It is not all of a method's
            training: unit rows of W_dec and the steering of lambda are of ``training_loss``,
            ``before_update`` and ``after_update``, which ``Trainer`` calls.
        parts: the terms by name, each ``[]``, unweighted; ``mse`` always.
        features: ``[..., d_sae]``.
        recon: raw reconstruction ``[..., d_out]``.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    features: Tensor
    recon: Tensor


class UnitDirections(nn.Module):
    """Rows of ``W_dec`` that stay at unit norm while a trainer changes them."""

    W_dec: nn.Parameter

    @torch.no_grad()
    def before_update(self) -> None:
        """Take out of the gradient of W_dec what would change its rows' norms."""
        grad = self.W_dec.grad
        if grad is not None:
            grad.sub_((grad * self.W_dec).sum(1, keepdim=True) * self.W_dec)

    @torch.no_grad()
    def after_update(self) -> None:
        """Put the rows of W_dec back to unit norm."""
        self.W_dec.copy_(nn.functional.normalize(self.W_dec, dim=1))


class SparseAutoencoder(UnitDirections, Autoencoder):
    """One of the baselines; make one with :func:`make_baseline`.

    ``W_enc [d_in, d_sae]``, ``b_enc``, ``W_dec [d_sae, d_out]``, ``b_dec`` (and ``threshold``
    where there is one) are named and shaped as in SAELens. Rows of W_dec have unit norm;
    W_enc starts as its transpose.

    Attributes:
        pool: the processes that a training batch is spread over, see :meth:`pooled`.
    """

    # whether lambda is steered to the target L0
    steered: ClassVar[bool] = False
    # weight of AuxK, 0 for none
    auxk: ClassVar[float] = 0.0
    # see SAEConfig
    default_bandwidth: ClassVar[float] = 1.0

    config: SAEConfig
    sparsity_weight: Tensor

    def __init__(
        self,
        config: SAEConfig,
        *,
        transcoder: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.pool = ALONE
        config.check(type(self).__name__)
        self.config = config
        d_in, f, d_out = config.d_in, config.d_sae, config.d_out
        # on the CPU first: the draws do not depend on the device
        directions = torch.randn(f, d_out, dtype=dtype, device=device)
        directions = nn.functional.normalize(directions, dim=1)
        if transcoder:
            other = torch.randn(f, d_in, dtype=dtype, device=device)
            W_enc = nn.functional.normalize(other, dim=1).T.contiguous()
        else:
            W_enc = directions.T.clone(memory_format=torch.contiguous_format)
        self.W_enc = nn.Parameter(W_enc)
        self.W_dec = nn.Parameter(directions)
        self.b_enc = nn.Parameter(W_enc.new_zeros(f))
        self.b_dec = nn.Parameter(W_enc.new_zeros(d_out))
        self.register_normalization(d_in, d_out if transcoder else None, device=device, dtype=dtype)
        if self.steered:
            self.register_buffer("sparsity_weight", W_enc.new_full((), self._first_weight()))
        self._make_extras()

    def _make_extras(self) -> None:
        """Further parameters and buffers of a method."""

    def _first_weight(self) -> float:
        """Lambda at the start, where the penalty is on the sum of values.

        It shrinks a value by lambda d_out / 2, at first by one deviation of pre.
        """
        return 2 / self.config.d_out

    def _start_threshold(self, multiple: float) -> float:
        """What ``multiple`` k features exceed at the start, if pre is about normal, as it is on
        normalised rows; not below 0, where half of the features are on."""
        share = min(multiple * self.config.k / self.config.d_sae, 0.5)
        return max(-normal_quantile(share), 0.0)

    # -- the layer -----------------------------------------------------------------------------

    def _centred(self, x: Tensor) -> Tensor:
        rows = self.normalized_rows(x)
        return rows if self.is_transcoder else rows - self.b_dec

    def preactivation(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        """pre of raw x, ``[..., d_sae]``, or only the given features of it."""
        pre = self._centred(x) @ self.W_enc + self.b_enc
        return pre if columns is None else pre[..., columns]

    def activate(self, pre: Tensor) -> Tensor:
        """Features of pre, ``[..., d_sae]``; while training as the training loss needs them."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """Features of raw x: ``[..., d_in]`` to ``[..., d_sae]``, none negative."""
        return self.activate(self.preactivation(x))

    def decode(self, features: Tensor) -> Tensor:
        """Raw reconstruction ``[..., d_out]`` of features ``[..., d_sae]``.

        Raises:
            ValueError: features of another width.
        """
        if features.shape[-1:] != self.W_enc.shape[1:]:
            raise ValueError(
                f"features must have shape [..., {self.config.d_sae}]; got {list(features.shape)}"
            )
        return self.denormalize(self._decoded(features))

    def _decoded(self, features: Tensor) -> Tensor:
        product = features @ self.W_dec  # bfloat16 under autocast; the sum is wider
        return product.to(torch.promote_types(product.dtype, torch.float32)) + self.b_dec

    def forward(
        self,
        x: Tensor,
        target: Tensor | None = None,
        *,
        dead: Tensor | None = None,
        warmup: float = 1.0,
    ) -> SAEOutput:
        """Encode, decode and measure.

        Args:
            x: raw rows ``[..., d_in]``.
            target: raw rows ``[..., d_out]`` of a transcoder; None: x.
            dead: bool ``[d_sae]``, features that AuxK revives; None: none.
            warmup: factor of lambda.

        Raises:
            ValueError: a target missing, not wanted, or of another shape.
        """
        if self.is_transcoder != (target is not None):
            raise ValueError(
                f"target must {'be given' if self.is_transcoder else 'be None'}: d_out decides"
            )
        wanted = x if target is None else target
        if wanted.shape != (*x.shape[:-1], self.config.d_out):
            raise ValueError(
                f"target must have shape {[*x.shape[:-1], self.config.d_out]}; "
                f"got {list(wanted.shape)}"
            )
        wide = torch.promote_types(wanted.dtype, torch.float32)
        goal = self.in_target_units(wanted.to(wide) - self.target_mean)
        pre = self.preactivation(x)
        features = self.activate(pre)
        recon = self._decoded(features)
        error = goal - recon
        parts = {"mse": error.square().mean()}
        loss = parts["mse"]
        for name, (weight, value) in self._penalties(x, pre, features, goal).items():
            parts[name] = value
            loss = loss + weight * warmup * value
        if self.auxk and dead is not None:
            parts["auxk"] = self._auxk_loss(pre, error.detach(), dead)
            loss = loss + self.auxk * parts["auxk"]
        return SAEOutput(loss, parts, features, self.denormalize(recon))

    def _penalties(
        self, x: Tensor, pre: Tensor, features: Tensor, goal: Tensor
    ) -> dict[str, tuple[Tensor | float, Tensor]]:
        """Further terms of the loss: name -> (weight, value)."""
        return {}

    def _auxk_loss(self, pre: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        """Share of the error's energy that the k_aux best dead features leave unexplained.

        Zero where nothing is dead. No index depends on the data's sizes but k_aux, so nothing
        waits for a GPU: features that live are out of reach, and count for nothing.
        """
        k = min(2 ** round(math.log2(max(self.config.d_out / 2, 1))), self.config.d_sae)
        top = torch.where(dead, pre, -torch.inf).topk(k, dim=-1)
        values = torch.where(top.values > 0, top.values, 0)
        features = torch.zeros_like(pre).scatter(-1, top.indices, values.to(pre.dtype))
        found = (features @ self.W_dec).to(error.dtype)
        energy = self.pool.mean(error.square().mean(), "error")
        share = (error - found).square().mean() / energy.clamp_min(1e-12)
        return torch.where(dead.any(), share, 0.0)

    # -- training ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def pooled(self, pool: Pool) -> Iterator[None]:
        """Within it, ``training_loss`` is of this process's part of a batch: see ``Poolable``."""
        self.pool = pool
        try:
            yield
        finally:
            self.pool = ALONE

    def training_loss(
        self, x: Tensor, target: Tensor | None, *, dead: Tensor, done: float
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """What the trainer minimises: (loss, its parts, ones in each column of the active set).

        Args:
            dead: bool ``[d_sae]``.
            done: share of the steps done.
        """
        out = self(x, target, dead=dead, warmup=min(done / _LAMBDA_WARMUP, 1.0))
        counts = self.pool.sum((out.features.detach() > 0).flatten(0, -2).sum(0), "counts")
        if self.steered and done >= _LAMBDA_WARMUP:
            # dual ascent: lambda rises while there are too many features, falls while too few
            l0 = counts.sum().float() / (x[..., 0].numel() * self.pool.parts)
            step = (l0 / self.config.k).log().clamp(-1, 1) * _LAMBDA_RATE
            self.sparsity_weight.mul_(step.nan_to_num(neginf=-_LAMBDA_RATE).exp())
        return out.loss, out.parts, counts

    def finish(self, x: Tensor) -> None:
        """Called once with raw rows after the last step."""

    def extra_repr(self) -> str:
        config = self.config
        return f"{config.architecture}, d_in={config.d_in}, d_sae={config.d_sae}, k={config.k}"

    # -- files ---------------------------------------------------------------------------------

    def config_values(self) -> dict[str, Any]:
        """The content of ``cfg.json``."""
        return {
            **dataclasses.asdict(self.config),
            "apply_b_dec_to_input": not self.is_transcoder,
        }

    @classmethod
    def from_config(cls, values: dict[str, Any], source: str) -> SparseAutoencoder:
        """A module on the meta device, of the class that the architecture names.

        Raises:
            ValueError: a missing key, or see :meth:`SAEConfig.check`.
        """
        names = [field.name for field in dataclasses.fields(SAEConfig)]
        missing = [name for name in (*names, "apply_b_dec_to_input") if name not in values]
        if missing:
            raise ValueError(f"{source} lacks {', '.join(missing)}")
        config = SAEConfig(**{name: values[name] for name in names})
        config.check(source)
        kind = METHODS[config.architecture]
        return kind(config, transcoder=not values["apply_b_dec_to_input"], device="meta")


# name -> class of every baseline; `bae_fast.baselines.methods` has the table
METHODS: dict[str, type[SparseAutoencoder]] = {}


def register_method(
    name: str,
) -> Callable[[type[SparseAutoencoder]], type[SparseAutoencoder]]:
    """A decorator that gives a further baseline its name in files, commands and comparisons."""

    def register(kind: type[SparseAutoencoder]) -> type[SparseAutoencoder]:
        METHODS[name] = register_architecture(name)(kind)
        return kind

    return register


def make_baseline(
    method: str,
    d_in: int,
    d_sae: int,
    *,
    k: int,
    d_out: int | None = None,
    bandwidth: float | None = None,
    metadata: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SparseAutoencoder:
    """Make a baseline with random weights (torch's global generator).

    Args:
        method: a key of :data:`METHODS`.
        d_in, d_sae: width of the hidden state, number of features.
        k: features a row, or the mean L0 that the method is steered to.
        d_out: width of the target, for a transcoder (any method may be one; ``"transcoder"``
            must); None: d_in, and the target is x.
        bandwidth: see :class:`SAEConfig`; None: the method's own.
        metadata: kept in cfg.json.

    Raises:
        ValueError: an unknown method, a size below 1, or ``"transcoder"`` without d_out.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    cls = METHODS[method]
    if method == "transcoder" and d_out is None:
        raise ValueError("d_out must be given for method='transcoder'; got None")
    config = SAEConfig(
        architecture=method,
        d_in=d_in,
        d_sae=d_sae,
        d_out=d_in if d_out is None else d_out,
        k=k,
        bandwidth=cls.default_bandwidth if bandwidth is None else bandwidth,
        metadata=dict(metadata or {}),
    )
    return cls(config, transcoder=d_out is not None, device=device, dtype=dtype)
