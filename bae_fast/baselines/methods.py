"""The sparse autoencoders of the field, behind the interface of :mod:`bae_fast.baselines.base`.

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

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bae_fast.baselines.base import SparseAutoencoder, register_method
from bae_fast.training import TrainingConfig

# of the AuxK loss, as in Gao et al.
AUXK_WEIGHT = 1 / 32

# lambda's start for a penalty on L0; that of one on values has a scale, see `_first_weight`
_FIRST_LAMBDA = 1e-3

# Features on at the start, in multiples of the target. With half of them on, lambda has risen to
# several times its final value by the time L0 comes down, and the features are lost: 500 steps of
# ReLU then end at an FVU of 0.72 instead of 0.28, of Gated at 0.58 instead of 0.20 (k = 16,
# F = 512, 128 principal axes of layer 11 of SmolLM2).
_START_L0 = 2

# weight of the newest batch in BatchTopK's running threshold
_THRESHOLD_RATE = 0.01


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

    def scores(self, x: Tensor, features: Tensor | None = None) -> Tensor:
        features = self.encode(x) if features is None else features
        return (features - self.score_mean) / self.score_std

    @torch.no_grad()
    def finish(self, x: Tensor) -> None:
        """Mean and deviation of every feature; those that never fire keep scores of zero."""
        n = 0
        total = squares = torch.zeros_like(self.score_mean, dtype=torch.float64)
        for block in self.blocks(x):
            features = self.encode(block).double()
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
        n = self.config.k * pre[..., 0].numel() * self.pool.parts
        flat = pre.flatten()
        top = self.pool.largest(flat, n, "largest activations")
        with torch.no_grad():
            # the mean over batches of the smallest activation kept
            least = top.least.relu().to(self.threshold.dtype)
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

    def preactivation(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        """The gate, ``[..., d_sae]``, or only the given features of it."""
        gate = self._centred(x) @ self.W_enc + self.b_gate
        return gate if columns is None else gate[..., columns]

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

    generate_vmap_rule = True

    @staticmethod
    def forward(pre: Tensor, threshold: Tensor, width: float) -> Tensor:
        return torch.where(pre > threshold, pre, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pre, threshold, ctx.width = inputs
        ctx.save_for_backward(pre, threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        (grad,) = grads
        near = (pre - threshold).abs() < ctx.width / 2
        slope = torch.where(near, grad, 0).flatten(0, -2).sum(0, dtype=threshold.dtype)
        return torch.where(pre > threshold, grad, 0), -threshold / ctx.width * slope, None


class _Step(torch.autograd.Function):
    """1 where pre > threshold: derivative with respect to the threshold only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(pre: Tensor, threshold: Tensor, width: float) -> Tensor:
        return (pre > threshold).to(threshold.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pre, threshold, ctx.width = inputs
        ctx.save_for_backward(pre, threshold)

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

    is_binary: ClassVar[bool] = True
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


_TABLE: dict[str, type[SparseAutoencoder]] = {
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
for _name, _kind in _TABLE.items():
    register_method(_name)(_kind)
