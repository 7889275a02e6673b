"""The Binary Autoencoder as a module: parameters, normalisation, presets, files."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bae_fast import functional
from bae_fast.arguments import all_finite
from bae_fast.autoencoder import (
    Autoencoder,
    check_metadata,
    check_sizes,
    normal_quantile,
    register_architecture,
)
from bae_fast.codes import BinaryCode
from bae_fast.functional import BAEOutput, Encoded
from bae_fast.functional.checks import check_whole
from bae_fast.info import warmup
from bae_fast.normalization import check_rows
from bae_fast.ops.registry import check_impl
from bae_fast.packing import bit_weights
from bae_fast.progress import tracked
from bae_fast.reference import Step
from bae_fast.statistics import CodeStatistics
from bae_fast.surrogates import resolve_surrogate

ARCHITECTURE = "binary_autoencoder"

# of SAELens: files that do not name one are read as those before version 6, without metadata
FILE_FORMAT = "6.0.0"

# what a preset decides where the caller says nothing
PRESETS: dict[str, dict[str, Any]] = {
    # starts sparse, learns near the threshold only: the entropy term works
    "sparse": {
        "surrogate": "rectangle",
        "surrogate_width": 0.4,
        "covariance": False,
        "init_density": 0.05,
    },
    # arXiv 2509.20997 as released: half of the bits on at the start, both terms
    "paper": {
        "surrogate": "identity",
        "surrogate_width": None,
        "covariance": True,
        "init_density": 0.5,
    },
}

# pre-activations made at a time where a function looks at all rows
_CHUNK_ELEMENTS = 16 * 2**20

# rows encoded at a time where their code stays packed
_PACKED_ROWS = 8192


@dataclasses.dataclass(frozen=True)
class BAEConfig:
    """Everything but the weights; the content of ``cfg.json``.

    Attributes:
        d_in, d_sae: width of the hidden state, number of features F.
        d_out: width of the reconstruction; d_in unless the module is a transcoder.
        n_bits: bits a feature; ``W_enc`` has n_bits x d_sae columns.
        surrogate, surrogate_width: see :mod:`bae_fast.surrogates`.
        covariance: whether forward computes the covariance while training.
        preset: what filled in the values not given.
        metadata: where the hidden states came from (model_name, hook_name, context_size,
            prepend_bos, dataset_path, ...); JSON values only.
    """

    d_in: int
    d_sae: int
    d_out: int
    n_bits: int = 1
    surrogate: str = "rectangle"
    surrogate_width: float = 0.4
    covariance: bool = False
    preset: str = "sparse"
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields and the name of the architecture, as ``cfg.json`` has them."""
        return {"architecture": ARCHITECTURE, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config") -> BAEConfig:
        """Check and build from the content of ``cfg.json``; unknown keys are ignored.

        Raises:
            ValueError: another architecture, a missing key, or a value of the wrong kind.
        """
        if values.get("architecture") != ARCHITECTURE:
            raise ValueError(
                f"{source} must have architecture {ARCHITECTURE!r}; "
                f"got {values.get('architecture')!r}"
            )
        kinds: dict[str, tuple[type, ...]] = {
            "d_in": (int,),
            "d_sae": (int,),
            "d_out": (int,),
            "n_bits": (int,),
            "surrogate": (str,),
            "surrogate_width": (int, float),
            "covariance": (bool,),
            "preset": (str,),
            "metadata": (dict,),
        }
        known: dict[str, Any] = {}
        for name, allowed in kinds.items():
            if name not in values:
                raise ValueError(f"{source} lacks {name!r}")
            value = values[name]
            if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
                raise ValueError(f"{source}: {name} must be {allowed[-1].__name__}; got {value!r}")
            known[name] = value
        config = cls(**known)
        config.check(source)
        return config

    def check(self, source: str = "config") -> None:
        """Raise ValueError where a value is out of range."""
        check_sizes(self, ("d_in", "d_sae", "d_out", "n_bits"), source)
        if self.n_bits > 16:
            raise ValueError(f"{source}: n_bits must be at most 16; got {self.n_bits}")
        if self.preset not in PRESETS:
            raise ValueError(
                f"{source}: preset must be one of {', '.join(PRESETS)}; got {self.preset!r}"
            )
        if not isinstance(self.covariance, bool):
            raise ValueError(f"{source}: covariance must be bool; got {self.covariance!r}")
        check_metadata(self.metadata, source)
        try:
            resolve_surrogate(self.surrogate, self.surrogate_width or None)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None


@register_architecture(ARCHITECTURE)
class BinaryAutoencoder(Autoencoder):
    """Binary Autoencoder (Cho et al., arXiv 2509.20997) on packed codes.

    A drop-in layer: raw hidden states in, raw reconstruction out. ``W_enc [d_in, n_bits d_sae]``,
    ``b_enc``, ``W_dec [d_sae, d_out]``, ``b_dec`` are named and shaped as in SAELens. Buffers
    ``x_mean [d_in]`` and ``x_scale []`` (and ``y_mean``, ``y_scale`` for a transcoder) normalise;
    they are 0 and 1 until :meth:`fit_normalization_`, which can give each dimension a unit of its
    own (``x_metric [d_in]``), or all a matrix of units (``[d_in, d_in]``).

    Example::

        bae = BinaryAutoencoder(d_in=576, d_sae=2304)
        bae.fit_normalization_(x)
        bae.init_density_(x, 0.05)
        out = bae(x)
        loss = bae.mse(out, x) + 3e-4 * out.entropy
        loss.backward()
    """

    is_binary: ClassVar[bool] = True
    ranks_bits: ClassVar[bool] = True
    config: BAEConfig

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        d_out: int | None = None,
        n_bits: int = 1,
        preset: str = "sparse",
        surrogate: str | None = None,
        surrogate_width: float | None = None,
        covariance: bool | None = None,
        impl: str = "auto",
        check_finite: bool = False,
        metadata: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a module with random weights (torch's global generator).

        Args:
            d_in, d_sae: width of the hidden state, number of features.
            d_out: width of the target, for a transcoder; None: d_in, and the target is x.
            n_bits: bits a feature (1 to 16).
            preset: "sparse" (starts with about 5 % of the bits on) or "paper" (half of them on,
                identity surrogate, covariance on); decides what is not given.
            surrogate, surrogate_width, covariance: override the preset, whose width is 0.4 for
                the rectangle; other surrogates have the widths of :mod:`bae_fast.surrogates`.
            impl: see :func:`bae_fast.binary_autoencoder`.
            check_finite: raise on NaN or Inf in x.
            metadata: kept in cfg.json.

        Raises:
            ValueError: a size below 1 or too large, an unknown preset, surrogate or impl.
        """
        super().__init__()
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
        defaults = PRESETS[preset]
        if surrogate is None:
            surrogate = defaults["surrogate"]
        if surrogate_width is None and surrogate == defaults["surrogate"]:
            surrogate_width = defaults["surrogate_width"]
        surrogate, width = resolve_surrogate(surrogate, surrogate_width)
        self.config = BAEConfig(
            d_in=d_in,
            d_sae=d_sae,
            d_out=d_in if d_out is None else d_out,
            n_bits=n_bits,
            surrogate=surrogate,
            surrogate_width=width,
            covariance=defaults["covariance"] if covariance is None else covariance,
            preset=preset,
            metadata=dict(metadata or {}),
        )
        self.config.check("BinaryAutoencoder")
        self.is_transcoder = d_out is not None
        self.impl = check_impl(impl)
        self.check_finite = check_finite

        kind = {"device": device, "dtype": dtype}
        d_out, n_columns = self.config.d_out, n_bits * d_sae
        self.W_enc = nn.Parameter(torch.empty(d_in, n_columns, **kind))  # type: ignore[arg-type]
        self.b_enc = nn.Parameter(torch.empty(n_columns, **kind))  # type: ignore[arg-type]
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_out, **kind))  # type: ignore[arg-type]
        self.b_dec = nn.Parameter(torch.empty(d_out, **kind))  # type: ignore[arg-type]
        self.register_normalization(
            d_in, d_out if self.is_transcoder else None, device=device, dtype=dtype
        )
        self._hinted = False
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random weights of the preset's density for normalised rows.

        Columns of W_enc have norm about 1, so a normalised isotropic row has pre-activations of
        about unit variance; b_enc is the normal quantile of the preset's density. Rows of W_dec
        are scaled so that the first reconstruction does not exceed the row. The normalisation
        stays: where ``to_empty`` has left it without numbers, :meth:`fit_normalization_` sets it.
        """
        config = self.config
        self.learned = False
        nn.init.normal_(self.W_enc, std=config.d_in**-0.5)
        density = PRESETS[config.preset]["init_density"]
        self.b_enc.fill_(normal_quantile(density))
        nn.init.normal_(self.W_dec, std=(config.d_sae * density) ** -0.5)
        nn.init.zeros_(self.b_dec)

    @torch.no_grad()
    def init_density_(self, x: Tensor, density: float) -> BinaryAutoencoder:
        """Set b_enc so that every bit is on in the given share of the rows of x.

        The threshold lies midway between the two pre-activations around the batch's quantile, so
        without ties exactly ``round(density * N)`` rows (at least 1, at most N - 1) are on.

        Args:
            x: raw rows ``[..., d_in]``, at least 2.
            density: share of ones, in (0, 1).

        Returns:
            self.

        Raises:
            TypeError: x is not a tensor of floats, or the module was sharded by FSDP.
            ValueError: a density outside of (0, 1), fewer than two rows, or x that is not finite.
        """
        if any(kind.__name__ == "FSDPModule" for kind in type(self).__mro__):
            raise TypeError(
                "init_density_ must come before fully_shard: shards would keep the old thresholds"
            )
        if isinstance(density, str) or not 0 < density < 1:
            raise ValueError(f"density must lie between 0 and 1; got {density!r}")
        if not isinstance(x, Tensor):
            check_rows("x", x, self.config.d_in)
        rows = self.normalize(x).reshape(-1, self.config.d_in).to(self.W_enc.dtype)
        if len(rows) < 2:
            raise ValueError(f"x must hold at least 2 rows; got {len(rows)}")
        on = min(max(round(density * len(rows)), 1), len(rows) - 1)
        chunk = max(_CHUNK_ELEMENTS // len(rows), 1)
        for start in range(0, len(self.b_enc), chunk):
            pre = rows @ self.W_enc[:, start : start + chunk]
            top = pre.topk(on + 1, dim=0).values
            if not all_finite(top):
                raise ValueError("x must be finite; its pre-activations hold NaN or Inf")
            self.b_enc[start : start + chunk] = -(top[-1] + top[-2]) / 2
        return self

    # -- the layer -----------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        *,
        covariance: bool | None = None,
        mask: Tensor | None = None,
        stats: CodeStatistics | None = None,
        past: CodeStatistics | None = None,
        multilinear: bool = False,
        encoded: Encoded | None = None,
        combine: Callable[[Tensor], Tensor] | None = None,
    ) -> BAEOutput:
        """Encode, decode and measure.

        Args:
            x: ``[..., d_in]``, raw.
            covariance: None: ``config.covariance`` while training with gradient, else off.
            mask: bool ``[...]``; rows where it is False have zero bits, get no gradient and do
                not count.
            stats: statistics of more rows than x, in place of its own (micro-batches, ranks).
            past: statistics of more rows, added to those of x (a bank of past codes).
            multilinear: let :meth:`mse` pass the exact change of the error when a bit flips to
                the bits, instead of the slope; see :func:`bae_fast.binary_autoencoder`.
            encoded: what :meth:`encode_rows` gave for this x; then x is not encoded again.
            combine: where this module holds some of the features of a larger one: given the sum of
                its own features' decoder rows, float32 or wider, it returns the sum over all,
                differentiably. b_dec is added after it.

        Returns:
            :class:`BAEOutput` with the raw reconstruction ``[..., d_out]``.

        Raises:
            TypeError: x is not a tensor of floats.
            ValueError: x of another width or device, one row where the covariance is computed, or
                what :func:`bae_fast.binary_autoencoder` refuses.
        """
        if covariance is None:
            covariance = self.config.covariance and self.training and torch.is_grad_enabled()
            if covariance and isinstance(x, Tensor) and x.shape[:-1].numel() == 1:
                raise ValueError(
                    "x must hold at least 2 rows for the covariance, which this module computes "
                    "while it trains; got 1 (covariance=False, or eval(), does without)"
                )
        rows, wide = self.normalize(x), None
        if combine is not None:
            wide = torch.promote_types(functional.compute_dtype(rows), torch.float32)
        out = functional.binary_autoencoder(
            rows,
            self.W_enc,
            self.b_enc,
            self.W_dec,
            self.b_dec if combine is None else torch.zeros_like(self.b_dec),
            surrogate=self.config.surrogate,
            surrogate_width=self.config.surrogate_width or None,
            n_bits=self.config.n_bits,
            covariance=covariance,
            mask=mask,
            stats=stats,
            past=past,
            multilinear=multilinear,
            encoded=encoded,
            recon_dtype=wide,
            impl=self.impl,
            check_finite=self.check_finite,
        )
        if self.training and not torch.compiler.is_compiling() and not self._hinted:
            self._hint(out.code)
        # not out._replace(...): torch 2.11 cannot return its result from a compiled graph
        recon = out.recon if combine is None else combine(out.recon) + self.b_dec
        recon = self.denormalize(recon)
        return BAEOutput(recon, out.entropy, out.covariance, out.code, out.variance)

    def _hint(self, code: BinaryCode) -> None:
        """Say once, at the first training batch, that the start has another density than meant."""
        self._hinted = True
        # a device would be waited for, and a subclass (a fake tensor) may have no numbers
        if code.device.type != "cpu" or type(code.words) is not Tensor or self.is_normalized():
            return
        density, meant = float(code.density().mean()), PRESETS[self.config.preset]["init_density"]
        if not meant / 4 <= density <= 4 * meant:
            warnings.warn(
                f"{density:.3f} of the bits are on at the start, where preset "
                f"{self.config.preset!r} means {meant}, and x was not normalised: call "
                f"fit_normalization_(x) and init_density_(x, {meant}) before training",
                stacklevel=4,
            )

    def loss(
        self,
        out: BAEOutput,
        target: Tensor,
        *,
        entropy_weight: float = 0.0,
        covariance_weight: float = 0.0,
    ) -> Tensor:
        """mse + a_e H + a_c D, ``[]``, of what a forward pass gave.

        Args:
            out: what this module gave; with ``covariance=True`` where D has a weight.
            target: see :meth:`mse`.
            entropy_weight, covariance_weight: a_e and a_c.

        Raises:
            ValueError: a covariance_weight for an output without covariance.
        """
        if covariance_weight and out.covariance is None:
            raise ValueError(
                "covariance_weight must be 0 for an output without covariance, which the module "
                f"gives when it is called with covariance=True; got {covariance_weight!r}"
            )
        total = self.mse(out, target) + entropy_weight * out.entropy
        return total if out.covariance is None else total + covariance_weight * out.covariance

    def mse(self, out: BAEOutput, target: Tensor, *, total: int | Tensor | None = None) -> Tensor:
        """Mean over rows and dimensions of (target - recon)^2 in normalised units, ``[]``.

        float32 or wider; masked rows are left out, and of none it is 0. ``target`` is x, or the
        target of a transcoder, raw. (SAELens sums over dimensions: its weights are d_in times
        ours.)

        Args:
            total: rows that the sum is divided by in place of the call's own: the rows of the whole
                batch where the call has a part of it. The parts then add up to the mean.

        Raises:
            TypeError: target is no tensor.
            ValueError: target has another shape than the reconstruction.
        """
        if not isinstance(target, Tensor):
            raise TypeError(f"target must be a tensor; got {type(target).__name__}")
        if target.shape != out.recon.shape:
            raise ValueError(
                f"target must have shape {list(out.recon.shape)}; got {list(target.shape)}"
            )
        recon, mask, unit = out.recon, out.code.row_mask, self.target_unit
        n: int | Tensor = recon.numel()
        if mask is not None:
            n = mask.sum().clamp_min(1) * recon.shape[-1]
        if total is not None:
            n = total * recon.shape[-1]
        if unit is None:
            wide = torch.promote_types(recon.dtype, torch.float32)
            recon, target = (self.in_target_units(rows.to(wide)) for rows in (recon, target))
        squares = functional.squared_error(recon, target, unit, mask=mask, impl=self.impl)
        # out.variance is zero: it carries the curvature of the squares to the bits
        return (squares if out.variance is None else squares + out.variance) / n

    def encode_rows(self, x: Tensor, *, mask: Tensor | None = None) -> Encoded:
        """What forward needs of the bits of raw x ``[..., d_in]``, for its argument ``encoded``."""
        return functional.encode_rows(
            self.normalize(x),
            self.W_enc,
            self.b_enc,
            surrogate=self.config.surrogate,
            surrogate_width=self.config.surrogate_width or None,
            n_bits=self.config.n_bits,
            mask=mask,
            impl=self.impl,
            check_finite=self.check_finite,
        )

    def encode(self, x: Tensor, *, mask: Tensor | None = None) -> BinaryCode:
        """Packed bits of raw x ``[..., d_in]``; no gradient."""
        return functional.encode(
            self.normalize(x),
            self.W_enc,
            self.b_enc,
            n_bits=self.config.n_bits,
            mask=mask,
            impl=self.impl,
            check_finite=self.check_finite,
        )

    def decode(self, code: BinaryCode | Tensor) -> Tensor:
        """Raw reconstruction ``[..., d_out]`` of a code, or of dense values ``[..., d_sae]``.

        Differentiable in W_dec and b_dec. Dense values are used as they are, so features may be
        scaled, ablated or added.

        Raises:
            ValueError: a code of another number of bits a feature.
        """
        if isinstance(code, BinaryCode) and code.n_bits != self.config.n_bits:
            raise ValueError(f"code must have n_bits={self.config.n_bits}; got {code.n_bits}")
        return self.denormalize(functional.decode(code, self.W_dec, self.b_dec, impl=self.impl))

    # -- features ------------------------------------------------------------------------------

    @property
    def n_bits(self) -> int:
        """Bits a feature."""
        return self.config.n_bits

    @property
    def value_name(self) -> str:
        """What a page calls the number of a feature in a row."""
        return "margin" if self.config.n_bits == 1 else super().value_name

    def activations(self, x: Tensor) -> Tensor:
        """Feature values ``[..., d_sae]`` of raw x, those of :meth:`encode`; with gradient they
        carry the surrogate's of the pre-activation."""
        config, dtype = self.config, self.W_dec.dtype
        values = self.encode(x).values(dtype)
        learned = x.requires_grad or self.W_enc.requires_grad
        if not (torch.is_grad_enabled() and learned):
            return values
        soft = Step.apply(self.preactivation(x), config.surrogate, config.surrogate_width)
        weights = bit_weights(config.n_bits, soft.dtype, soft.device)
        soft = soft.unflatten(-1, (-1, config.n_bits)) @ weights
        return values + (soft - soft.detach()).to(dtype)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Raw reconstruction ``[..., d_out]`` of raw x, differentiable in x too."""
        if torch.is_grad_enabled():
            recon: Tensor = self(x, covariance=False).recon  # decode has no gradient of x
            return recon
        return self.decode(self.encode(x))

    def strength(self, x: Tensor) -> Tensor:
        """The margin of each bit that is on, float32 ``[..., F]``; 0 where it is off.

        Raises:
            ValueError: several bits a feature, which have no one margin.
        """
        if self.config.n_bits != 1:
            raise ValueError(f"strength needs n_bits=1; got {self.config.n_bits}")
        # a bit is on by the encoder's own sum, whose last digits may differ from this one's
        margin = self.preactivation(x).float().clamp_min(torch.finfo(torch.float16).tiny)
        return torch.where(self.encode(x).to_dense(torch.bool), margin, 0)

    @torch.no_grad()
    def active(self, rows: Tensor) -> BinaryCode:
        """Which features are on in raw rows ``[n, d_in]``: for one bit a feature, their code."""
        if self.config.n_bits > 1:
            return super().active(rows)
        return BinaryCode.cat(self.encode(block) for block in self.blocks(rows, dense=False))

    def blocks(self, rows: Tensor, *, dense: bool = True) -> Iterator[Tensor]:
        """See :meth:`Autoencoder.blocks`; a packed code needs no dense features."""
        if dense:
            yield from super().blocks(rows)
        else:
            for block in tracked(rows.split(_PACKED_ROWS), len(rows), "rows", by=len):
                yield self.as_own(block)

    def preactivation(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        """x W_enc + b_enc of normalised x, dense: ``[..., K]``, or only the given columns.

        The margin of a bit: how far the state lies from the threshold.
        """
        check_whole("W_enc", self.W_enc)
        weight = self.W_enc if columns is None else self.W_enc[:, columns]
        bias = self.b_enc if columns is None else self.b_enc[columns]
        return self.normalized_rows(x) @ weight + bias

    def warmup(self) -> str:
        """Compile what the first call would; returns the backend's name, see :func:`warmup`."""
        surrogates = (self.config.surrogate,)
        return warmup(self.impl, device=self.W_enc.device, surrogates=surrogates)

    def extra_repr(self) -> str:
        config = self.config
        parts = [f"d_in={config.d_in}", f"d_sae={config.d_sae}"]
        if self.is_transcoder:
            parts.append(f"d_out={config.d_out}")
        if config.n_bits > 1:
            parts.append(f"n_bits={config.n_bits}")
        parts += [
            f"surrogate={config.surrogate!r}",
            f"covariance={config.covariance}",
            f"impl={self.impl!r}",
        ]
        return ", ".join(parts)

    # -- files ---------------------------------------------------------------------------------

    def config_values(self) -> dict[str, Any]:
        """The content of ``cfg.json``."""
        return {
            **self.config.to_dict(),
            "transcoder": self.is_transcoder,
            "sae_lens_version": FILE_FORMAT,
        }

    @classmethod
    def from_config(
        cls, values: dict[str, Any], source: str, *, impl: str = "auto", **options: Any
    ) -> BinaryAutoencoder:
        """A module on the meta device from the content of ``cfg.json``.

        Args:
            options: further arguments of a subclass.

        Raises:
            ValueError: see :meth:`BAEConfig.from_dict`.
        """
        config = BAEConfig.from_dict(values, source)
        if not isinstance(values.get("transcoder", False), bool):
            raise ValueError(f"{source}: transcoder must be bool; got {values['transcoder']!r}")
        return cls(
            config.d_in,
            config.d_sae,
            d_out=config.d_out if values.get("transcoder", False) else None,
            n_bits=config.n_bits,
            preset=config.preset,
            surrogate=config.surrogate,
            surrogate_width=config.surrogate_width or None,
            covariance=config.covariance,
            impl=impl,
            metadata=config.metadata,
            device="meta",
            **options,
        )
