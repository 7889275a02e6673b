"""The Binary Autoencoder as an architecture of SAELens: importing this module registers it.

    import bae_fast.saelens
    from sae_lens import SAE
    sae = SAE.load_from_disk(folder)        # a folder of BinaryAutoencoder.save_pretrained
    sae.encode(x)                           # the bits as floats, dense, as SAELens has features

Files go both ways: what SAELens saves, :meth:`BinaryAutoencoder.from_pretrained` loads.

``BinaryTrainingSAE`` trains in SAELens' loop. The first batch sets the normalisation, the
directions of the features and their density, so that nothing depends on the scale of the rows. The
mse is summed over dimensions, as SAELens has it, so the weights of entropy and covariance are
``d_in`` times those of :class:`bae_fast.training.Trainer`. Updates of the optimizer are lengthened,
as the learning rates that suit SAELens' other classes are slow for this one. SAELens' loop has no
bank of past codes and no refit: the figures of the README are those of our trainer.

SAEDashboard 0.8 does not take a Binary Autoencoder: it knows a fixed list of architectures, and
pins an older safetensors and transformers. ``bae-fast interpret`` makes a page of features instead.

Needs SAELens 6 (extra ``saelens``).
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from bae_fast import functional
from bae_fast.codes import BinaryCode
from bae_fast.model import ARCHITECTURE, BAEConfig, BinaryAutoencoder
from bae_fast.search import ARCHITECTURE as SEARCHED
from bae_fast.training.binary import STARTS, TrainingConfig
from bae_fast.training.config import check_bounds, check_integers
from bae_fast.training.recipe import init_from_rows_, residual, revive_
from bae_fast.units import divided, inverse_units, multiplied

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

# rows of the first batch that are longer than the median row times this do not set the start: the
# first tokens of a text have states a hundred times as long, and SAELens' store may hold them
_LONGEST = 5.0

_DEFAULTS = TrainingConfig()

# the entropy's weight, times d_in. It is two thirds of our trainer's: after the 300 steps of
# bench/results/saelens/smollm2.json about as many features are on as SAELens' TopK has, 100, and
# the FVU is a few per cent above that one's. With our trainer's it is 15 % above at 83 features.
_ENTROPY_WEIGHT = 1e-4

# times the learning rate. With 1, a learning rate of 3e-4, which is SAELens' own, and the weight
# 0.75e-4, the same run ends at an FVU of 0.21 where it ends at 0.13; decoders that learn at half or
# twice the encoders' rate are no better at equally many features.
_LR_SCALE = 4.0


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


class SearchedSAEConfig(BinarySAEConfig):
    """The architecture of :class:`bae_fast.SearchedAutoencoder`, which says that it is not read.

    SAELens' own error of an unknown architecture is its name alone.

    Raises:
        ValueError: always.
    """

    @classmethod
    def architecture(cls) -> str:
        return SEARCHED

    def __post_init__(self) -> None:
        raise ValueError(
            f"architecture must be one that SAELens can encode with; got {SEARCHED!r}, whose codes "
            "are searched for: bae_fast.BinaryAutoencoder.from_pretrained loads it"
        )


@dataclasses.dataclass(kw_only=True)
class BinaryTrainingSAEConfig(_Fields, TrainingSAEConfig):
    """Configuration of :class:`BinaryTrainingSAE`.

    Attributes:
        entropy_coefficient, covariance_coefficient: weights beside the squared error summed over
            dimensions. None for the entropy: 1e-4 d_in, whatever the width and the scale of the
            rows, which leaves one to two times as many features on in a row as SAELens' TopK has;
            :class:`bae_fast.training.TrainingConfig` has 1.5e-4. Without a weight nothing makes the
            code sparse.
        entropy_warm_up_steps: steps over which the entropy's weight rises from zero.
        start: what the first batch of training sets, in a module that was not loaded: "rows", the
            normalisation, the features' directions along rows and their density; "density", the
            normalisation and the density; "none", nothing. A normalisation that was fitted before
            stays.
        density: share of the rows in which each bit is on at the start.
        decoder_norm: norm of the rows of W_dec at the start "rows", in normalised units; None: the
            one at which the first batch is reconstructed best.
        revive_every: steps between revivals of dead features (0: never); SAELens' optimizer keeps
            what it knew of them.
        lr_scale: the optimizer's updates are lengthened by this factor, so that the learning rate
            is that of SAELens' other classes: those of every optimizer, by a hook on its steps,
            from the first forward pass in training on. With 1 none is lengthened.

    Raises:
        ValueError: a constant of another type or out of its range.
    """

    entropy_coefficient: float | None = None
    entropy_warm_up_steps: int = 0
    covariance_coefficient: float = 0.0
    start: str = "rows"
    density: float = 0.05
    decoder_norm: float | None = None
    revive_every: int = _DEFAULTS.revive_every
    lr_scale: float = _LR_SCALE

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self)
        if self.entropy_coefficient is None:
            self.entropy_coefficient = _ENTROPY_WEIGHT * self.d_in
        if self.start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)}; got {self.start!r}")
        check_integers(self, {"revive_every": 0})
        if self.decoder_norm is not None:
            check_bounds(self, {"decoder_norm": (0.0, math.inf)})
        check_bounds(self, {"lr_scale": (1.0, 1000.0)})
        if not 0 < self.density < 1:
            raise ValueError(f"density must lie between 0 and 1; got {self.density!r}")

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


class _Binary(SAE[Any]):
    """What the two modules share."""

    b_enc: nn.Parameter
    x_mean: Tensor
    x_scale: Tensor
    x_metric: Tensor | None
    x_metric_inverse: Tensor | None
    feature_scale: Tensor
    learned: bool

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
        # the relative unit of each dimension, in files of a module that has one
        self.register_buffer("x_metric", None)
        self.register_buffer("x_metric_inverse", None, persistent=False)
        # of fold_W_dec_norm; not in files
        scale = torch.ones_like(self.W_dec[:, 0])
        self.register_buffer("feature_scale", scale.detach(), persistent=False)
        # whether weights were loaded or trained, see bae_fast.autoencoder.Autoencoder.learned
        self.learned = False
        self.register_load_state_dict_post_hook(_mark_as_learned)

    def autoencoder(self) -> BinaryAutoencoder:
        """A Binary Autoencoder that shares this module's tensors: what it changes, changes here.

        Weights that were loaded or trained count as learned: a trainer does not start them anew.
        """
        cfg = self.cfg
        bae = BinaryAutoencoder(cfg.d_in, cfg.d_sae, n_bits=cfg.n_bits, device="meta")
        if self.x_metric is not None:
            bae.x_metric = torch.empty_like(self.x_metric)
        bae.load_state_dict(self.state_dict(), assign=True)
        bae.learned = self.learned
        return bae

    def fit_normalization_(self, x: Tensor) -> Any:
        """Set x_mean and x_scale from raw rows ``[..., d_in]``, see the Binary Autoencoder."""
        bae = self.autoencoder().fit_normalization_(x)
        self.x_metric, self.x_metric_inverse = bae.x_metric, None
        return self

    def _normalized(self, x: Tensor) -> Tensor:
        x = self.hook_sae_input(self.reshape_fn_in(x.to(self.dtype)))
        return divided(x - self.x_mean, self.x_scale, self.x_metric, self.x_metric_inverse)

    def _raw(self, rows: Tensor) -> Tensor:
        return multiplied(rows, self.x_scale, self.x_metric) + self.x_mean

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
        recon = self._raw(feature_acts @ self.W_dec + self.b_dec)
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
        if "x_metric" in state_dict:
            self.x_metric = torch.empty_like(state_dict["x_metric"])
            self.x_metric_inverse = inverse_units(state_dict["x_metric"])

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """Files hold W_dec unfolded."""
        state_dict["W_dec"] = state_dict["W_dec"] * self.feature_scale[:, None]


class BinarySAE(_Binary, SAE[BinarySAEConfig]):
    """A Binary Autoencoder for SAELens' tools."""


class BinaryTrainingSAE(_Binary, TrainingSAE[BinaryTrainingSAEConfig]):
    """A Binary Autoencoder for SAELens' trainer."""

    def __init__(self, cfg: BinaryTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self._started = cfg.start == "none"
        self._fired: Tensor | None = None
        self._seen = self._steps = 0
        # the parameters as they were, while an optimizer updates them
        self._before: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def start_(self, x: Tensor) -> None:
        """Set what ``cfg.start`` says from raw rows ``[n, d_in]``, n >= 2; the first batch does.

        Raises:
            ValueError: fewer than 2 rows, or rows that are constant or not finite.
        """
        # a product in bfloat16 would shift the densities
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, self.cfg.d_in).to(self.dtype)
            norms = rows.float().norm(dim=1)
            rows = rows[norms <= _LONGEST * norms.median()]
            bae = self.autoencoder()
            if not bae.is_normalized():
                bae.fit_normalization_(rows)
            if self.cfg.start == "rows":
                norm = self.cfg.decoder_norm
                init_from_rows_(bae, rows, self.cfg.density, decoder_norm=norm or 1.0)
                if norm is None:
                    _fit_decoder_norm_(bae, rows)
            elif self.cfg.start == "density":
                bae.init_density_(rows, self.cfg.density)
        self._started = True

    def _updated_by(self, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
        updated = {p for group in optimizer.param_groups for p in group["params"]}
        return [p for p in self.parameters() if p in updated]

    @torch.no_grad()
    def remember(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the parameters that a step of an optimizer is about to update."""
        for parameter in self._updated_by(optimizer):
            self._before[parameter] = parameter.detach().clone()

    @torch.no_grad()
    def lengthen(self, optimizer: torch.optim.Optimizer) -> None:
        """Multiply what the step has added by ``cfg.lr_scale``.

        To Adam, whose updates do not depend on the size of gradients, that is a learning rate of so
        many times as much; of its own the class can give SAELens' trainer none.
        """
        for parameter in self._updated_by(optimizer):
            before = self._before.pop(parameter, None)
            if before is not None:  # none where the step itself made the first forward pass
                parameter.copy_(before.lerp(parameter, self.cfg.lr_scale))

    def _count(self, code: BinaryCode) -> None:
        """Note in how many rows each feature was on since the last revival."""
        counts = code.counts().unflatten(0, (-1, self.cfg.n_bits)).sum(1)
        self._fired = counts if self._fired is None else self._fired + counts
        self._seen += code.shape[0]
        self._steps += 1

    @torch.no_grad()
    def _revive(self, x: Tensor) -> None:
        """Every so often, before a pass: point features that hardly were on at the residual."""
        every = self.cfg.revive_every
        if not every or self._fired is None or self._steps % every:
            return
        dead = self._fired < _DEFAULTS.dead_below * self._seen
        with torch.autocast(x.device.type, enabled=False):
            bae = self.autoencoder()
            rows, error = residual(bae, x)
            revive_(
                bae,
                dead,
                rows,
                error,
                None,
                quantile=_DEFAULTS.revive_quantile,
                decoder_scale=_DEFAULTS.revive_decoder_scale,
            )
        self._fired, self._seen = None, 0

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
        if not self._started:
            self.start_(x)
        self.learned = True
        if self.cfg.lr_scale != 1:
            _lengthen(self)
        self._revive(x)
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
        self._count(out.code)
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
            sae_out=self._raw(out.recon).to(x.dtype),
            feature_acts=out.code.values(self.dtype),
            hidden_pre=x.new_empty(0),
            loss=sum(losses.values(), x.new_zeros(())),
            losses=losses,
            metrics={"bits": out.entropy.detach()},
        )


@torch.no_grad()
def _fit_decoder_norm_(bae: BinaryAutoencoder, x: Tensor) -> None:
    """Scale W_dec by one number, and set b_dec, so that raw rows are reconstructed best."""
    rows = bae.normalize(x)
    bae.b_dec.zero_()
    recon = functional.decode(bae.encode(x), bae.W_dec, bae.b_dec)
    centre = recon.mean(0)
    recon = recon - centre
    energy = recon.double().square().sum()
    along = (recon.double() * rows.double()).sum() / energy.clamp_min(1e-30)
    # rows along the data reconstruct some of it; where chance has it otherwise, nothing is scaled
    scale = float(along) if float(along) > 0 else 1.0
    bae.W_dec.mul_(scale)
    bae.b_dec.copy_(-scale * centre)


def _mark_as_learned(module: Any, _: Any) -> None:
    module.learned = True
    # weights that were loaded, from a checkpoint or by hand, are trained on from where they are
    module._started = True


# modules in training whose updates are lengthened; SAELens makes the optimizer, and asks nobody
_LENGTHENED: weakref.WeakSet[BinaryTrainingSAE] = weakref.WeakSet()
_WATCHED: list[Any] = []  # handles of the two hooks


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for module in _LENGTHENED:
        module.remember(optimizer)


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for module in _LENGTHENED:
        module.lengthen(optimizer)


def _lengthen(module: BinaryTrainingSAE) -> None:
    """Lengthen every later update of a module; torch's optimizers are watched from the first on."""
    if not _WATCHED:
        _WATCHED.append(register_optimizer_step_pre_hook(_before_step))
        _WATCHED.append(register_optimizer_step_post_hook(_after_step))
    _LENGTHENED.add(module)


def _register() -> None:
    """Once: SAELens refuses a second time."""
    if ARCHITECTURE not in registry.SAE_CLASS_REGISTRY:
        registry.register_sae_class(ARCHITECTURE, BinarySAE, BinarySAEConfig)
    if SEARCHED not in registry.SAE_CLASS_REGISTRY:
        registry.register_sae_class(SEARCHED, BinarySAE, SearchedSAEConfig)
    if ARCHITECTURE not in registry.SAE_TRAINING_CLASS_REGISTRY:
        registry.register_sae_training_class(
            ARCHITECTURE, BinaryTrainingSAE, BinaryTrainingSAEConfig
        )


_register()
