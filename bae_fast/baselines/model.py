"""Sparse autoencoders of the field behind one interface: raw rows in, features, raw rows out.

All of them compute pre = (x - b_dec) W_enc + b_enc on normalised rows (a transcoder leaves b_dec
out: its output lives elsewhere), turn pre into features, and reconstruct with W_dec + b_dec.
They differ in the step from pre to features and in what keeps the features few:

=================  ================================  ============================================
method             features                          objective beside mse
=================  ================================  ============================================
``relu``           relu(pre)                         lambda sum_j f_j
``rescaled_relu``  relu(pre)                         the same; ``scores`` are standardised
``topk``           the k largest of relu(pre)        AuxK
``batchtopk``      the k N largest of a batch;       AuxK
                   those over a threshold later
``gated``          relu(magnitude) where gate > 0    lambda sum_j relu(gate_j), auxiliary mse
``jumprelu``       pre where pre > threshold_j       lambda L0, straight-through
``transcoder``     as ``topk``, to another target    AuxK
``binary_topk``    1 for the k largest of pre        AuxK
``random``         as ``topk``                       none; W_enc and b_enc stay random
=================  ================================  ============================================

Sources: ReLU with unit-norm decoder and pre-bias, Bricken et al. 2023 and Conerly et al. 2024
(Transformer Circuits); TopK and AuxK, Gao et al., arXiv 2406.04093; BatchTopK, Bussmann et al.,
arXiv 2412.06410; Gated, Rajamanoharan et al., arXiv 2404.16014; JumpReLU, the same, arXiv
2407.14435; transcoder, Dunefsky et al., arXiv 2406.11944; binary top-k, Quirke et al., arXiv
2509.25596, as described there: top-k of (pre - theta), sigmoid surrogate, no entropy term.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from bae_fast.model import BinaryAutoencoder
from bae_fast.normalization import Normalized
from bae_fast.pretrained import load_tensors_, read_pretrained, write_pretrained
from bae_fast.training import TrainingConfig

# of the AuxK loss, as in Gao et al.
AUXK_WEIGHT = 1 / 32

# how fast lambda follows L0 to its target, in units of log(lambda) a step
_LAMBDA_RATE = 0.02

# share of the steps over which lambda rises from zero
_LAMBDA_WARMUP = 0.05

# lambda's start for a penalty on L0; that of one on values has a scale, see `_first_weight`
_FIRST_LAMBDA = 1e-3

# Features on at the start, in multiples of the target. With half of them on, lambda has risen to
# several times its final value by the time L0 comes down, and the features are lost: 500 steps of
# ReLU then end at an FVU of 0.72 instead of 0.28, of Gated at 0.58 instead of 0.20 (k = 16,
# F = 512, 128 principal axes of layer 11 of SmolLM2).
_START_L0 = 2

# weight of the newest batch in BatchTopK's running threshold
_THRESHOLD_RATE = 0.01


@dataclasses.dataclass(frozen=True)
class SAEConfig:
    """Everything but the weights; the content of ``cfg.json``.

    Attributes:
        architecture: the method, a key of :data:`METHODS`.
        d_in, d_sae, d_out: widths of x, of the features and of the reconstruction.
        k: features a row; for ``relu``, ``gated`` and ``jumprelu`` the mean L0 that lambda is
            steered to.
        bandwidth: of the straight-through estimate of ``jumprelu``, and temperature of the
            surrogate of ``binary_topk``; in units of pre, whose deviation starts near 1.
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
        if self.architecture not in METHODS:
            raise ValueError(
                f"{source}: architecture must be one of {', '.join(METHODS)}; "
                f"got {self.architecture!r}"
            )
        for name in ("d_in", "d_sae", "d_out", "k"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{source}: {name} must be an int >= 1; got {value!r}")
        if self.k > self.d_sae:
            raise ValueError(f"{source}: k must be at most d_sae={self.d_sae}; got {self.k}")
        width = self.bandwidth
        if not isinstance(width, (int, float)) or not 0 < width < math.inf:
            raise ValueError(f"{source}: bandwidth must be positive and finite; got {width!r}")
        try:
            json.dumps(self.metadata, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: metadata must hold JSON values only: {error}") from None


class SAEOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        loss: ``[]``, to be minimised: the sum of the parts, each with its weight.
        parts: the terms by name, each ``[]``, unweighted; ``mse`` always.
        features: ``[..., d_sae]``.
        recon: raw reconstruction ``[..., d_out]``.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    features: Tensor
    recon: Tensor


class SparseAutoencoder(Normalized):
    """One of the baselines; make one with :func:`make_baseline`.

    ``W_enc [d_in, d_sae]``, ``b_enc``, ``W_dec [d_sae, d_out]``, ``b_dec`` (and ``threshold``
    where there is one) are named and shaped as in SAELens. Rows of W_dec have unit norm;
    W_enc starts as its transpose.
    """

    # whether features are 0 or 1, and so cost no bits for their values
    binary: ClassVar[bool] = False
    # whether lambda is steered to the target L0
    steered: ClassVar[bool] = False
    # weight of AuxK, 0 for none
    auxk: ClassVar[float] = 0.0
    # see SAEConfig
    default_bandwidth: ClassVar[float] = 1.0

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
            W_enc = directions.T.clone()
        self.W_enc = nn.Parameter(W_enc)
        self.W_dec = nn.Parameter(directions)
        self.b_enc = nn.Parameter(W_enc.new_zeros(f))
        self.b_dec = nn.Parameter(W_enc.new_zeros(d_out))
        self._register_normalization(
            d_in, d_out if transcoder else None, device=device, dtype=dtype
        )
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
        return max(-float(torch.special.ndtri(torch.tensor(share, dtype=torch.float64))), 0.0)

    @property
    def dtype_and_device(self) -> dict[str, Any]:
        return {"dtype": self.W_enc.dtype, "device": self.W_enc.device}

    # -- the layer -----------------------------------------------------------------------------

    def _centred(self, x: Tensor) -> Tensor:
        rows = self.normalize(x)
        return rows if self.is_transcoder else rows - self.b_dec

    def preactivation(self, x: Tensor) -> Tensor:
        """pre of raw x, ``[..., d_sae]``."""
        return self._centred(x) @ self.W_enc + self.b_enc

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

    def scores(self, x: Tensor) -> Tensor:
        """By how much each feature stands out in raw x, ``[..., d_sae]``: what tokens are
        ranked by when features are named."""
        return self.encode(x)

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
        goal = (wanted.to(wide) - self._target_mean) / self._target_scale
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
        share = (error - found).square().mean() / error.square().mean().clamp_min(1e-12)
        return torch.where(dead.any(), share, 0.0)

    # -- training ------------------------------------------------------------------------------

    def training_loss(
        self, x: Tensor, target: Tensor | None, *, dead: Tensor, done: float
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """What the trainer minimises: (loss, its parts, ones in each column of the active set).

        Args:
            dead: bool ``[d_sae]``.
            done: share of the steps done.
        """
        out = self(x, target, dead=dead, warmup=min(done / _LAMBDA_WARMUP, 1.0))
        counts = (out.features.detach() > 0).flatten(0, -2).sum(0)
        if self.steered and done >= _LAMBDA_WARMUP:
            # dual ascent: lambda rises while there are too many features, falls while too few
            l0 = counts.sum() / x[..., 0].numel()
            step = (l0 / self.config.k).log().clamp(-1, 1) * _LAMBDA_RATE
            self.sparsity_weight.mul_(step.nan_to_num(neginf=-_LAMBDA_RATE).exp())
        return out.loss, out.parts, counts

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

    def finish(self, x: Tensor) -> None:
        """Called once with raw rows after the last step."""

    def extra_repr(self) -> str:
        config = self.config
        return f"{config.architecture}, d_in={config.d_in}, d_sae={config.d_sae}, k={config.k}"

    # -- files ---------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``cfg.json`` and ``sae_weights.safetensors``, each whole or not at all."""
        values = dataclasses.asdict(self.config)
        values["dtype"] = str(self.W_enc.dtype).removeprefix("torch.")
        values["apply_b_dec_to_input"] = not self.is_transcoder
        return write_pretrained(folder, self, values)

    @staticmethod
    def from_pretrained(
        folder: str | os.PathLike[str], *, device: torch.device | str | None = None
    ) -> SparseAutoencoder:
        """Load what :meth:`save_pretrained` wrote, in eval mode, as the class it was.

        Raises:
            FileNotFoundError: no such folder or file.
            ValueError: a corrupt or foreign file, or weights that do not fit the configuration.
        """
        values, source, tensors = read_pretrained(folder)
        names = [field.name for field in dataclasses.fields(SAEConfig)]
        missing = [name for name in (*names, "apply_b_dec_to_input") if name not in values]
        if missing:
            raise ValueError(f"{source} lacks {', '.join(missing)}")
        config = SAEConfig(**{name: values[name] for name in names})
        config.check(str(source))
        cls = METHODS[config.architecture]
        module = cls(config, transcoder=not values["apply_b_dec_to_input"], device="meta")
        load_tensors_(module, tensors, folder)
        return module.to(device).eval() if device is not None else module.eval()


def _keep_largest(pre: Tensor, k: int) -> Tensor:
    """relu(pre) where it is among the k largest of its row, 0 elsewhere."""
    top = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())


class ReLU(SparseAutoencoder):
    """relu(pre) with an L1 penalty; rows of W_dec have unit norm, so it has no way around."""

    steered = True

    def _make_extras(self) -> None:
        self.b_enc.data.fill_(-self._start_threshold(_START_L0))

    def activate(self, pre: Tensor) -> Tensor:
        return pre.relu()

    def _penalties(
        self, x: Tensor, pre: Tensor, features: Tensor, goal: Tensor
    ) -> dict[str, tuple[Tensor | float, Tensor]]:
        return {"l1": (self.sparsity_weight, features.float().sum(-1).mean())}


class RescaledReLU(ReLU):
    """ReLU whose scores are standardised per feature, so that loud features do not win them all."""

    score_mean: Tensor
    score_std: Tensor

    def _make_extras(self) -> None:
        super()._make_extras()
        self.register_buffer("score_mean", torch.zeros_like(self.b_enc.data))
        self.register_buffer("score_std", torch.ones_like(self.b_enc.data))

    def scores(self, x: Tensor) -> Tensor:
        return (self.encode(x) - self.score_mean) / self.score_std

    @torch.no_grad()
    def finish(self, x: Tensor) -> None:
        """Mean and deviation of every feature; those that never fire keep scores of zero."""
        n = 0
        total = squares = torch.zeros_like(self.score_mean, dtype=torch.float64)
        for block in x.split(8192):
            features = self.encode(block.to(**self.dtype_and_device)).double()
            n += len(features)
            total = total + features.sum(0)
            squares = squares + features.square().sum(0)
        mean = total / n
        variance = squares / n - mean.square()
        self.score_mean.copy_(mean)
        self.score_std.copy_(torch.where(variance > 0, variance, 1).sqrt())


class TopK(SparseAutoencoder):
    """The k largest of relu(pre) in each row."""

    auxk = AUXK_WEIGHT

    def activate(self, pre: Tensor) -> Tensor:
        return _keep_largest(pre, self.config.k)


class Transcoder(TopK):
    """TopK from one place of the model to another, such as the input of an MLP to its output."""


class Random(TopK):
    """TopK along random directions that stay; only the decoder learns."""

    auxk = 0.0

    def _make_extras(self) -> None:
        self.W_enc.requires_grad_(False)
        self.b_enc.requires_grad_(False)


class BatchTopK(SparseAutoencoder):
    """The k N largest of relu(pre) in a batch of N rows; over a running threshold in eval mode."""

    auxk = AUXK_WEIGHT
    threshold: Tensor

    def _make_extras(self) -> None:
        # negative: not measured yet
        self.register_buffer("threshold", torch.full_like(self.b_dec.data[:1].sum(), -1.0))

    def activate(self, pre: Tensor) -> Tensor:
        if not self.training:
            return torch.where(pre > self.threshold.clamp_min(0), pre, 0)
        n = self.config.k * pre[..., 0].numel()
        flat = pre.flatten()
        top = flat.topk(n)
        with torch.no_grad():
            # the mean over batches of the smallest activation kept
            least = top.values[-1].relu().to(self.threshold.dtype)
            first = self.threshold < 0
            self.threshold.copy_(
                torch.where(first, least, self.threshold.lerp(least, _THRESHOLD_RATE))
            )
        return torch.zeros_like(flat).scatter(0, top.indices, top.values.relu()).view_as(pre)


class Gated(SparseAutoencoder):
    """A gate says which features are on, a magnitude by how much; they share W_enc.

    gate = c W_enc + b_gate, magnitude = c (W_enc exp(r_mag)) + b_mag, c = x - b_dec. The penalty
    falls on relu(gate) alone; the auxiliary loss lets relu(gate) reconstruct through a decoder
    that it does not move, so that the gate learns what is worth its price.
    """

    steered = True

    def _make_extras(self) -> None:
        del self.b_enc
        f = self.W_enc.shape[1]
        start = self.W_enc.new_full((f,), -self._start_threshold(_START_L0)).detach()
        self.b_gate = nn.Parameter(start)
        self.b_mag = nn.Parameter(start.clone())
        self.r_mag = nn.Parameter(self.W_enc.new_zeros(f).detach())

    def preactivation(self, x: Tensor) -> Tensor:
        """The gate, ``[..., d_sae]``."""
        return self._centred(x) @ self.W_enc + self.b_gate

    def activate(self, pre: Tensor) -> Tensor:
        magnitude = (pre - self.b_gate) * self.r_mag.exp() + self.b_mag
        return torch.where(pre > 0, magnitude.relu(), 0)

    def _penalties(
        self, x: Tensor, pre: Tensor, features: Tensor, goal: Tensor
    ) -> dict[str, tuple[Tensor | float, Tensor]]:
        gate = pre.relu()
        through = gate @ self.W_dec.detach() + self.b_dec.detach()
        return {
            "l1": (self.sparsity_weight, gate.float().sum(-1).mean()),
            "auxiliary": (1.0, (goal - through).square().mean()),
        }


class _Jump(torch.autograd.Function):
    """pre where pre > threshold: the threshold's derivative is that of a smoothed step."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return torch.where(pre > threshold, pre, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        (grad,) = grads
        near = (pre - threshold).abs() < ctx.width / 2
        slope = torch.where(near, grad, 0).flatten(0, -2).sum(0, dtype=threshold.dtype)
        return torch.where(pre > threshold, grad, 0), -threshold / ctx.width * slope, None


class _Step(torch.autograd.Function):
    """1 where pre > threshold: derivative with respect to the threshold only."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return (pre > threshold).to(threshold.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        (grad,) = grads
        near = (pre - threshold).abs() < ctx.width / 2
        slope = torch.where(near, grad, 0).flatten(0, -2).sum(0, dtype=threshold.dtype)
        return None, -slope / ctx.width, None


class JumpReLU(SparseAutoencoder):
    """pre where it exceeds a learned threshold, with a penalty on L0.

    The threshold is positive: its logarithm is learned, and moves by the learning rate a step. It
    starts where four times the target of features are on, if pre is about normal as on normalised
    rows; from near zero, where its paper starts, it would need many times the steps. pre is
    relu(pre) inside, as in the paper.
    """

    steered = True
    default_bandwidth = 0.5

    def _make_extras(self) -> None:
        start = max(self._start_threshold(4), 0.1)
        self.log_threshold = nn.Parameter(torch.full_like(self.W_enc[0].detach(), start).log())

    def _first_weight(self) -> float:
        return _FIRST_LAMBDA

    @property
    def threshold(self) -> Tensor:
        """``[d_sae]``, positive."""
        return self.log_threshold.exp()

    def activate(self, pre: Tensor) -> Tensor:
        found: Tensor = _Jump.apply(pre.relu(), self.threshold, self.config.bandwidth)
        return found

    def _penalties(
        self, x: Tensor, pre: Tensor, features: Tensor, goal: Tensor
    ) -> dict[str, tuple[Tensor | float, Tensor]]:
        on = _Step.apply(pre.relu(), self.threshold, self.config.bandwidth)
        return {"l0": (self.sparsity_weight, on.sum(-1).mean())}


class BinaryTopK(SparseAutoencoder):
    """1 for the k largest of pre - theta in each row, 0 elsewhere (theta is -b_enc).

    Backward the step is sigmoid((pre - boundary) / bandwidth), the boundary midway between the
    row's k-th and next largest: near misses learn too. Rows of W_dec are free, a bit has no size;
    they start as those of the Binary Autoencoder's recipe.
    """

    binary = True
    auxk = AUXK_WEIGHT
    default_bandwidth = 0.25

    def _make_extras(self) -> None:
        self.W_dec.data.mul_(TrainingConfig.decoder_norm)

    def activate(self, pre: Tensor) -> Tensor:
        k = self.config.k
        top = pre.detach().topk(min(k + 1, pre.shape[-1]), dim=-1)
        chosen = top.indices[..., :k]
        bits = torch.zeros_like(pre).scatter(-1, chosen, 1.0)
        if not torch.is_grad_enabled():
            return bits
        boundary = (top.values[..., k - 1 : k] + top.values[..., -1:]) / 2
        soft = torch.sigmoid((pre - boundary) / self.config.bandwidth)
        return bits + (soft - soft.detach())

    def before_update(self) -> None:
        pass

    def after_update(self) -> None:
        pass


METHODS: dict[str, type[SparseAutoencoder]] = {
    "relu": ReLU,
    "rescaled_relu": RescaledReLU,
    "topk": TopK,
    "batchtopk": BatchTopK,
    "gated": Gated,
    "jumprelu": JumpReLU,
    "transcoder": Transcoder,
    "binary_topk": BinaryTopK,
    "random": Random,
}


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


def load_autoencoder(
    folder: str | os.PathLike[str], *, device: torch.device | str | None = None
) -> BinaryAutoencoder | SparseAutoencoder:
    """Load whichever autoencoder of the package a folder holds, in eval mode.

    Raises:
        FileNotFoundError, ValueError: see ``from_pretrained`` of the two.
    """
    if read_pretrained(folder)[0].get("architecture") in METHODS:
        return SparseAutoencoder.from_pretrained(folder, device=device)
    return BinaryAutoencoder.from_pretrained(folder, device=device)
