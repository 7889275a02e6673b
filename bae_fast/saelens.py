"""The Binary Autoencoder as an architecture of SAELens: importing this module registers it.

    import bae_fast.saelens
    from sae_lens import SAE
    sae = SAE.load_from_disk(folder)        # a folder of BinaryAutoencoder.save_pretrained
    sae.encode(x)                           # the bits as floats, dense, as SAELens has features

Files go both ways: what SAELens saves, :meth:`BinaryAutoencoder.from_pretrained` loads. Dashboards
and benchmarks that are built on SAELens follow from that.

``BinaryTrainingSAE`` trains in SAELens' loop: mse summed over dimensions, as SAELens has it, so the
weights of entropy and covariance are ``d_in`` times those of :class:`bae_fast.training.Trainer`.
SAELens' loop has no start from rows, no bank of past codes and no refit: the figures of the README
are those of our trainer.

Needs SAELens 6 (extra ``saelens``).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from bae_fast import functional
from bae_fast.model import ARCHITECTURE, BAEConfig, BinaryAutoencoder

try:
    from sae_lens import registry
    from sae_lens.saes.sae import (
        SAE,
        SAEConfig,
        TrainCoefficientConfig,
        TrainingSAE,
        TrainingSAEConfig,
        TrainStepInput,
        TrainStepOutput,
    )
except ImportError as error:
    raise ImportError("bae_fast.saelens needs SAELens: pip install 'bae-fast[saelens]'") from error

# buffers of the module beside its parameters
_NORMALIZATION = ("x_mean", "x_scale")


@dataclasses.dataclass
class _Fields:
    """What both configurations have beside SAELens' own; see :class:`bae_fast.model.BAEConfig`."""

    n_bits: int = 1
    surrogate: str = "rectangle"
    surrogate_width: float = 0.4
    covariance: bool = False
    preset: str = "sparse"
    d_out: int | None = None
    transcoder: bool = False

    def _check(self, config: Any) -> None:
        if self.d_out is None:
            self.d_out = config.d_in
        if self.transcoder:
            raise ValueError("transcoder must be False: a SAELens module reconstructs its input")
        if config.normalize_activations != "none":
            raise ValueError(
                "normalize_activations must be 'none': x_mean and x_scale normalise; "
                f"got {config.normalize_activations!r}"
            )
        # older files are given True, which a Binary Autoencoder has no use for
        config.apply_b_dec_to_input = False
        BAEConfig(
            config.d_in,
            config.d_sae,
            self.d_out,
            self.n_bits,
            self.surrogate,
            self.surrogate_width,
            self.covariance,
            self.preset,
        ).check("BinarySAEConfig")


@dataclasses.dataclass
class BinarySAEConfig(_Fields, SAEConfig):
    """Configuration of :class:`BinarySAE`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self)

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


@dataclasses.dataclass(kw_only=True)
class BinaryTrainingSAEConfig(_Fields, TrainingSAEConfig):
    """Configuration of :class:`BinaryTrainingSAE`.

    Attributes:
        entropy_coefficient, covariance_coefficient: weights beside the squared error summed over
            dimensions.
        entropy_warm_up_steps: steps over which the entropy's weight rises from zero.
    """

    entropy_coefficient: float = 0.0
    entropy_warm_up_steps: int = 0
    covariance_coefficient: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self)

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


class _Binary(SAE[Any]):
    """What the two modules share."""

    b_enc: nn.Parameter
    x_mean: Tensor
    x_scale: Tensor
    feature_scale: Tensor

    def initialize_weights(self) -> None:
        cfg = self.cfg
        bae = BinaryAutoencoder(
            cfg.d_in,
            cfg.d_sae,
            n_bits=cfg.n_bits,
            preset=cfg.preset,
            device=self.device,
            dtype=self.dtype,
        )
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            setattr(self, name, getattr(bae, name))
        for name in _NORMALIZATION:
            self.register_buffer(name, getattr(bae, name))
        # of fold_W_dec_norm; not in files
        scale = torch.ones_like(self.W_dec[:, 0])
        self.register_buffer("feature_scale", scale.detach(), persistent=False)

    @torch.no_grad()
    def fit_normalization_(self, x: Tensor) -> Any:
        """Set x_mean and x_scale from raw rows ``[..., d_in]``, see the Binary Autoencoder."""
        bae = BinaryAutoencoder(self.cfg.d_in, 1).fit_normalization_(x)
        for name in _NORMALIZATION:
            getattr(self, name).copy_(getattr(bae, name))
        return self

    def _normalized(self, x: Tensor) -> Tensor:
        x = self.hook_sae_input(self.reshape_fn_in(x.to(self.dtype)))
        return (x - self.x_mean) / self.x_scale

    def encode(self, x: Tensor) -> Tensor:
        """Values of the features, ``[..., d_sae]``: 0 and 1, times the scale of a folded decoder.

        No gradient, as the bits have none here; hooks see the values alone, pre never exists.
        """
        code = functional.encode(
            self._normalized(x), self.W_enc, self.b_enc, n_bits=self.cfg.n_bits
        )
        values = code.values(self.dtype) * self.feature_scale
        return self.hook_sae_acts_post(values)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Raw reconstruction of values, which may be any floats."""
        recon = (feature_acts @ self.W_dec + self.b_dec) * self.x_scale + self.x_mean
        recon = self.hook_sae_recons(recon)
        return self.reshape_fn_out(recon, self.d_head)

    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:  # noqa: N802 (theirs)
        """Unit rows of W_dec, their norms in the features' values.

        SAELens' own way scales pre-activations, which changes no bit and would lose the norms.
        """
        norms = self.get_W_dec_norm()
        self.W_dec.data.div_(norms[:, None])
        self.feature_scale.mul_(norms)

    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Read raw rows after training on rows times a factor."""
        # (s x - mean) / scale, and back: exact where s is a power of two, else as exact as x s was
        self.x_mean.div_(scaling_factor)
        self.x_scale.div_(scaling_factor)

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """A module is made on the meta device: give it the one tensor that no file holds."""
        self.feature_scale = torch.ones_like(state_dict["W_dec"][:, 0])

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """Files hold W_dec unfolded."""
        state_dict["W_dec"] = state_dict["W_dec"] * self.feature_scale[:, None]


class BinarySAE(_Binary, SAE[BinarySAEConfig]):
    """A Binary Autoencoder for SAELens' tools."""


class BinaryTrainingSAE(_Binary, TrainingSAE[BinaryTrainingSAEConfig]):
    """A Binary Autoencoder for SAELens' trainer."""

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {
            "entropy": TrainCoefficientConfig(
                self.cfg.entropy_coefficient, self.cfg.entropy_warm_up_steps
            ),
            "covariance": self.cfg.covariance_coefficient,
        }

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values and pre-activations, both dense; training makes neither."""
        pre = self._normalized(x) @ self.W_enc + self.b_enc
        return self.encode(x), pre

    def calculate_aux_loss(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        raise NotImplementedError("the terms come with the forward pass: training_forward_pass")

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One pass of the packed layer; the pre-activations are not made (``hidden_pre`` empty)."""
        x = step_input.sae_in.to(self.dtype)
        target = self._normalized(x)
        weights = step_input.coefficients
        out = functional.binary_autoencoder(
            target,
            self.W_enc,
            self.b_enc,
            self.W_dec,
            self.b_dec,
            surrogate=self.cfg.surrogate,
            surrogate_width=self.cfg.surrogate_width or None,
            n_bits=self.cfg.n_bits,
            covariance=self.cfg.covariance or weights["covariance"] != 0,
            multilinear=True,
        )
        error = (out.recon.float() - target.float()).square().sum()
        if out.variance is not None:
            error = error + out.variance  # zero; carries the exact change of a flipped bit
        losses = {
            "mse_loss": error / len(x),
            "entropy_loss": weights["entropy"] * out.entropy,
        }
        if out.covariance is not None:
            losses["covariance_loss"] = weights["covariance"] * out.covariance
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=(out.recon * self.x_scale + self.x_mean).to(x.dtype),
            feature_acts=out.code.values(self.dtype),
            hidden_pre=x.new_empty(0),
            loss=sum(losses.values(), x.new_zeros(())),
            losses=losses,
            metrics={"bits": out.entropy.detach()},
        )


def _register() -> None:
    """Once: SAELens refuses a second time."""
    if ARCHITECTURE not in registry.SAE_CLASS_REGISTRY:
        registry.register_sae_class(ARCHITECTURE, BinarySAE, BinarySAEConfig)
    if ARCHITECTURE not in registry.SAE_TRAINING_CLASS_REGISTRY:
        registry.register_sae_training_class(
            ARCHITECTURE, BinaryTrainingSAE, BinaryTrainingSAEConfig
        )


_register()
