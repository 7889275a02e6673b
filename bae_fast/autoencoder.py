"""The contract that every autoencoder of the package keeps, its normalisation and its two files.

Training, evaluation, interventions, names of features and comparison ask an autoencoder only what
stands in :class:`Autoencoder`: a further method is a subclass of it in one file.

A saved model is ``cfg.json`` and ``sae_weights.safetensors``. Each file appears whole or not at
all, and the weights carry the configuration they were saved with: a process killed between the two
leaves a loadable model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from bae_fast import hub
from bae_fast.codes import BinaryCode, check_strided
from bae_fast.files import read_json, read_safetensors, write_json, write_safetensors
from bae_fast.progress import tracked

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIG_NAME = "cfg.json"
WEIGHTS_NAME = "sae_weights.safetensors"

# elements of dense features, or of rows upcast to float64, held at a time
_CHUNK_ELEMENTS = 16 * 2**20


# -- arguments ---------------------------------------------------------------------------------


def numpy_hint(name: str, value: Any) -> str:
    """How an array of NumPy becomes a tensor, for an error's end; nothing for other values."""
    known = type(value).__module__.partition(".")[0] == "numpy"
    return f"; torch.from_numpy({name}) makes one of it" if known else ""


def check_rows(name: str, rows: Any, width: int, *, least: int = 1) -> None:
    """Refuse what is no tensor of hidden states ``[n, width]``.

    Raises:
        TypeError: no tensor, or one that is not of floating point.
        ValueError: another shape, or fewer than ``least`` rows.
    """
    if not isinstance(rows, Tensor):
        hint = ""
        if isinstance(getattr(rows, "rows", None), Tensor):
            hint = f"; its rows are {name}.rows"
        hint = hint or numpy_hint(name, rows)
        raise TypeError(f"{name} must be a tensor [n, {width}]; got {type(rows).__name__}{hint}")
    if rows.dim() != 2 or rows.shape[1] != width or not len(rows):
        hint = ""
        if rows.dim() > 2 and rows.shape[-1] == width and rows.numel():
            hint = f"; {name}.flatten(0, -2) has that shape"
        raise ValueError(f"{name} must have shape [n, {width}]; got {list(rows.shape)}{hint}")
    if not rows.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point; got {rows.dtype}")
    if len(rows) < least:
        raise ValueError(f"{name} must hold at least {least} rows; got {len(rows)}")


def check_sizes(config: Any, names: tuple[str, ...], source: str) -> None:
    """Raise ValueError unless the named sizes are ints >= 1 that a machine could hold.

    ``names`` holds d_in, d_sae and d_out at least; ``n_bits`` counts as a factor of d_sae.
    """
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{source}: {name} must be an int >= 1; got {value!r}")
    columns = config.d_sae * (config.n_bits if "n_bits" in names else 1)
    n_weights = columns * max(config.d_in, config.d_out)
    if n_weights >= 2**56:
        factors = "n_bits x d_sae" if "n_bits" in names else "d_sae"
        # the number itself may have thousands of digits
        raise ValueError(
            f"{source}: {factors} x d_in (and d_out) must be below 2^56; got about "
            f"2^{n_weights.bit_length() - 1}"
        )


def check_metadata(metadata: Any, source: str) -> None:
    """Raise ValueError unless metadata is a dict of JSON values."""
    if not isinstance(metadata, dict):
        raise ValueError(f"{source}: metadata must be dict; got {metadata!r}")
    try:
        json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: metadata must hold JSON values only: {error}") from None


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The least that an autoencoder's configuration holds.

    Attributes:
        d_in, d_sae, d_out: widths of x, of the features and of the reconstruction.
        metadata: where the rows came from; JSON values only.
    """

    d_in: int
    d_sae: int
    d_out: int
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    def check(self, source: str) -> None:
        """Raise ValueError where a value is of the wrong kind or out of range."""
        check_sizes(self, ("d_in", "d_sae", "d_out"), source)
        check_metadata(self.metadata, source)


# -- random weights ----------------------------------------------------------------------------


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | str | None = None) -> Iterator[None]:
    """Make modules of a seed: torch's global generators, of the CPU and of the device, begin with
    it in the block, and behind it go on as if there had been none."""
    place = torch.device("cpu" if device is None else device)
    with torch.random.fork_rng([place] if place.type == "cuda" else ()):
        torch.manual_seed(seed)
        yield


def normal_quantile(share: float) -> float:
    """The z that a standard normal number is below with probability ``share``."""
    # whatever device modules are made on (the meta device has no numbers)
    return float(torch.special.ndtri(torch.tensor(share, dtype=torch.float64, device="cpu")))


# -- the contract ------------------------------------------------------------------------------


class Autoencoder(nn.Module):
    """Raw rows in, features, raw rows out.

    A subclass sets ``config`` (with d_in, d_sae, d_out, metadata), calls
    :meth:`register_normalization`, and defines :meth:`encode` and :meth:`decode`. It is trained by
    ``Trainer`` if it has the methods of :class:`bae_fast.training.Trainable`, and loaded by
    :func:`load_autoencoder` if it is registered (:func:`register_architecture`) and has
    :meth:`from_config`.

    Buffers ``x_mean [d_in]`` and ``x_scale []`` (``y_mean``, ``y_scale`` for another target)
    normalise; they are 0 and 1 until :meth:`fit_normalization_`. Where a metric was given there is
    ``x_metric [d_in]`` too (``y_metric``), the relative unit of each dimension, else None.

    Attributes:
        is_binary: whether features are bits, whose values cost nothing to write down.
        is_transcoder: whether the target is something else than x.
        ranks_bits: whether bits that are off can be what stands out in a row. Features are then
            given rows by the burstiness of their bits and ``preactivation(x, columns)``, the
            margin of a bit; else by :meth:`scores`.
        n_bits: bits a feature; 1 but for a Binary Autoencoder of several.
    """

    is_binary: ClassVar[bool] = False
    ranks_bits: ClassVar[bool] = False
    is_transcoder: bool = False
    config: Any
    x_mean: Tensor
    x_scale: Tensor
    x_metric: Tensor | None

    @property
    def d_in(self) -> int:
        """Width of x."""
        return int(self.config.d_in)

    @property
    def d_sae(self) -> int:
        """Number of features F."""
        return int(self.config.d_sae)

    @property
    def d_out(self) -> int:
        """Width of the reconstruction."""
        return int(self.config.d_out)

    @property
    def n_bits(self) -> int:
        """Bits a feature."""
        return 1

    # -- features ------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> BinaryCode | Tensor:
        """Features of raw x ``[..., d_in]``: a code, or floats ``[..., d_sae]``, none negative.

        Raises:
            NotImplementedError: a subclass that does not define it.
        """
        raise NotImplementedError

    def decode(self, code: Any) -> Tensor:
        """Raw reconstruction ``[..., d_out]`` of what :meth:`encode` gives, or of dense features
        ``[..., d_sae]``, which are used as they are."""
        raise NotImplementedError

    def activations(self, x: Tensor) -> Tensor:
        """Dense features ``[..., d_sae]`` of raw x, differentiable in x and the parameters."""
        found = self.encode(x)
        if not isinstance(found, Tensor):
            raise NotImplementedError(f"{type(self).__name__} must define activations")
        return found

    def reconstruct(self, x: Tensor) -> Tensor:
        """Raw reconstruction ``[..., d_out]`` of raw x, differentiable in x and the parameters."""
        return self.decode(self.encode(x))

    def as_layer(self) -> Reconstruction:
        """A layer that gives the reconstruction alone, see :class:`Reconstruction`."""
        return Reconstruction(self)

    def strength(self, x: Tensor) -> Tensor:
        """How strongly each feature is on, float32 ``[n, F]``; 0 exactly where it is off."""
        return self.activations(x).float()

    def scores(self, x: Tensor, features: Tensor | None = None) -> Tensor:
        """How much each feature stands out in raw x, ``[..., d_sae]``: what tokens are ranked
        by when features are named.

        Args:
            features: :meth:`activations` of x where they are known.
        """
        return self.activations(x) if features is None else features

    def preactivation(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        """What is compared with a threshold, ``[..., K]``, or only the given columns of it.

        Raises:
            NotImplementedError: an autoencoder without pre-activations.
        """
        raise NotImplementedError(f"{type(self).__name__} has no pre-activation")

    def directions(self) -> Tensor | None:
        """What each feature adds to the normalised reconstruction, ``[F, d_out]``; None where it
        is no one direction."""
        found = getattr(self, "W_dec", None)
        return found if isinstance(found, Tensor) else None

    @torch.no_grad()
    def active(self, rows: Tensor) -> BinaryCode:
        """Which features are on (above 0) in raw rows ``[n, d_in]``, n >= 1: a code ``[n, F]``.

        Read in blocks, in any floating dtype, from any device; without gradient.
        """
        blocks = self.blocks(rows)
        return BinaryCode.cat(BinaryCode.from_dense(self.activations(b) > 0) for b in blocks)

    def as_own(self, rows: Tensor) -> Tensor:
        """Rows in the dtype and on the device of the parameters, if there are any."""
        first = next(self.parameters(), None)
        return rows if first is None else rows.to(first.device, first.dtype)

    @property
    def block_rows(self) -> int:
        """Rows whose dense features are held at a time."""
        return max(_CHUNK_ELEMENTS // self.d_sae, 1)

    def blocks(self, rows: Tensor, *, dense: bool = True) -> Iterator[Tensor]:
        """Rows ``[m, d_in]`` in blocks, each as :meth:`as_own` gives it.

        Args:
            dense: whether dense features are made of a block.
        """
        for block in tracked(rows.split(self.block_rows), len(rows), "rows", by=len):
            yield self.as_own(block)

    # -- normalisation -------------------------------------------------------------------------

    def register_normalization(
        self,
        d_in: int,
        d_out: int | None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the buffers; ``d_out`` is None where the target is x itself."""
        self.is_transcoder = d_out is not None
        for name, width in (("x", d_in), ("y", d_out)):
            if width is not None:
                self.register_buffer(f"{name}_mean", torch.zeros(width, device=device, dtype=dtype))
                self.register_buffer(f"{name}_scale", torch.ones((), device=device, dtype=dtype))
                # in files only where a metric was given
                self.register_buffer(f"{name}_metric", None)

    @property
    def target_mean(self) -> Tensor:
        """``[d_out]``, the mean of the target."""
        return self.y_mean if self.is_transcoder else self.x_mean  # type: ignore[return-value]

    @property
    def target_scale(self) -> Tensor:
        """The unit of the target: ``[]``, or ``[d_out]`` where a metric was given."""
        return self._unit("y" if self.is_transcoder else "x")

    def _unit(self, side: str) -> Tensor:
        scale: Tensor = getattr(self, f"{side}_scale")
        metric: Tensor | None = getattr(self, f"{side}_metric")
        return scale if metric is None else scale * metric

    def normalize(self, x: Tensor) -> Tensor:
        """(x - x_mean) / (x_scale x_metric), ``[..., d_in]``, in x's dtype, or in the parameters'
        where that is wider: rows of a bfloat16 cache go into a float32 layer.

        Raises:
            TypeError: x is not a tensor of floats.
            ValueError: x has another width, or lies on another device.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor; got {type(x).__name__}{numpy_hint('x', x)}")
        check_strided("x", x)
        if x.shape[-1:] != self.x_mean.shape:
            raise ValueError(f"x must have shape [..., {len(self.x_mean)}]; got {list(x.shape)}")
        if not x.dtype.is_floating_point:
            raise TypeError(f"x must be floating point; got {x.dtype}")
        if x.device != self.x_mean.device:
            raise ValueError(
                f"x must be on the module's device {self.x_mean.device}; got {x.device}"
            )
        # not the buffers' dtype: FSDP's mixed precision narrows parameters and leaves buffers wide
        own = next(self.parameters(), self.x_mean).dtype
        dtype = own if torch.promote_types(x.dtype, own) == own else x.dtype
        return ((x - self.x_mean) / self._unit("x")).to(dtype)

    def normalized_rows(self, x: Tensor) -> Tensor:
        """:meth:`normalize`, for a product with the parameters.

        Raises:
            TypeError: x is wider than the parameters, which a product outside autocast refuses;
                and see :meth:`normalize`.
            ValueError: see :meth:`normalize`.
        """
        rows = self.normalize(x)
        own = next(self.parameters(), rows).dtype
        kind = rows.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        # autocast narrows what a product is given, but for float64
        if rows.dtype != own and (rows.dtype == torch.float64 or not autocast):
            raise TypeError(
                f"x must have the module's dtype {own}, or a narrower one; got {x.dtype}: "
                f"x.to({own}) has it"
            )
        return rows

    def denormalize(self, recon: Tensor) -> Tensor:
        """Inverse of the target's normalisation, ``[..., d_out]``, in recon's dtype."""
        return (recon * self.target_scale + self.target_mean).to(recon.dtype)

    @torch.no_grad()
    def fit_normalization_(
        self,
        x: Tensor,
        target: Tensor | None = None,
        *,
        metric: Tensor | None = None,
        target_metric: Tensor | None = None,
    ) -> Self:
        """Set the buffers so that the rows of x are centred and of unit mean square.

        With a metric each dimension is divided by its own scale before, so its squared error in
        training weighs as the inverse square of that; see :mod:`bae_fast.analysis.error_metric`.

        Args:
            x: ``[..., d_in]``. Rows with outlying norms should be dropped before.
            target: ``[..., d_out]``, for a transcoder only.
            metric: ``[d_in]``, the scales of x's dimensions, positive; only their ratios count.
            target_metric: ``[d_out]``, those of the target, for a transcoder only.

        Returns:
            self.

        Raises:
            TypeError: x or target is not a floating point tensor.
            ValueError: no rows, non-finite or constant x, a mean or a scale that the module's
                dtype does not hold, a target missing or not wanted, or a metric that is not
                wanted, of another width, or not positive.
        """
        if self.is_transcoder != (target is not None):
            raise ValueError(
                f"target must {'be given' if self.is_transcoder else 'be None'}: d_out decides"
            )
        if target is None and target_metric is not None:
            raise ValueError("target_metric must be None where there is no target")
        parts = [("x", x, metric)]
        if target is not None:
            parts.append(("target", target, target_metric))
        fitted = []
        for name, rows, units in parts:
            mean = self.x_mean if name == "x" else self.target_mean
            if not isinstance(rows, Tensor):
                check_rows(name, rows, len(mean))
            check_strided(name, rows)
            if not rows.dtype.is_floating_point:
                raise TypeError(f"{name} must be floating point; got {rows.dtype}")
            if rows.shape[-1:] != mean.shape or rows.numel() == 0:
                raise ValueError(
                    f"{name} must have shape [..., {len(mean)}] and rows; got {list(rows.shape)}"
                )
            rows = rows.reshape(-1, len(mean))
            # float64 sums by blocks of rows: no float64 copy of all of x
            blocks = rows.split(max(_CHUNK_ELEMENTS // len(mean), 1))
            centre = sum(block.double().sum(0) for block in blocks) / len(rows)
            square = (
                sum((block.double() - centre).square().sum() for block in blocks) / rows.numel()
            )
            scale = math.sqrt(float(square))
            relative = None
            if units is not None:
                relative = _relative_units(name, units, blocks, centre, scale)
            if not (math.isfinite(scale) and scale > 0):
                bad = int(sum((~block.isfinite()).any(1).sum() for block in blocks))
                found = f"root mean square {scale}"
                if bad:
                    found = f"NaN or Inf in {bad:,} of {len(rows):,} rows"
                elif len(rows) == 1:
                    found = "one row"
                raise ValueError(f"{name} must be finite and not constant; got {found}")
            _check_held(name, centre, scale, mean.dtype)
            fitted.append((centre, scale, relative))
        for side, (centre, scale, relative) in zip("xy", fitted, strict=False):
            mean = getattr(self, f"{side}_mean")
            mean.copy_(centre)
            getattr(self, f"{side}_scale").fill_(scale)
            setattr(self, f"{side}_metric", None if relative is None else relative.to(mean))
        return self

    @torch.no_grad()
    def fold_metric_(self, rows: Tensor) -> Self:
        """Take x_metric into W_enc, W_dec and b_dec, if no bit of these raw rows changes.

        In real arithmetic nothing changes; in floating point a pre-activation beside its threshold
        may. Then the module is left as it was.

        Args:
            rows: ``[n, d_in]``, held-out rows.

        Raises:
            ValueError: a transcoder, a module without these weights, or rows of which a bit
                changes.
        """
        metric = self.x_metric
        if metric is None:
            return self
        weights = [getattr(self, name, None) for name in ("W_enc", "W_dec", "b_dec")]
        if self.is_transcoder or not all(isinstance(weight, Tensor) for weight in weights):
            raise ValueError(
                f"{type(self).__name__} must have W_enc, W_dec and b_dec and reconstruct its input "
                "for its metric to be folded"
            )
        before = self.active(rows)
        kept = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        w_enc, w_dec, b_dec = weights
        w_enc.div_(metric[:, None])  # type: ignore[union-attr]
        w_dec.mul_(metric)  # type: ignore[union-attr]
        b_dec.mul_(metric)  # type: ignore[union-attr]
        self.x_metric = None
        if not self.active(rows).equal(before):
            self.x_metric = metric
            self.load_state_dict(kept)
            raise ValueError("rows must keep every bit for the metric to be folded; some changed")
        return self

    def usual_norms(self) -> tuple[float, float]:
        """Root mean square norms of the inputs and of the targets that the normalisation was
        fitted to; infinite where it was not fitted (mean 0 and scale 1)."""
        norms = []
        for side in "xy" if self.is_transcoder else "xx":
            mean, scale = getattr(self, f"{side}_mean"), getattr(self, f"{side}_scale")
            fitted = bool(mean.any()) or float(scale) != 1
            square = float(mean.double().square().sum()) + len(mean) * float(scale) ** 2
            norms.append(square**0.5 if fitted else math.inf)
        return norms[0], norms[1]

    def is_normalized(self) -> bool:
        """Whether :meth:`fit_normalization_` was called; on a meta device it counts as called."""
        if self.x_mean.is_meta:
            return True
        return bool(self.x_mean.any()) or float(self.x_scale) != 1

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **options: Any
    ) -> None:
        """Have a metric where the state's normalisation has one, and none where it has none."""
        for side in "xy":
            name, mean = f"{side}_metric", getattr(self, f"{side}_mean", None)
            if not isinstance(mean, Tensor) or f"{prefix}{side}_mean" not in state_dict:
                continue
            if prefix + name not in state_dict:
                setattr(self, name, None)
            elif getattr(self, name) is None:
                setattr(self, name, torch.empty_like(mean))
        super()._load_from_state_dict(state_dict, prefix, *args, **options)

    # -- files ---------------------------------------------------------------------------------

    def config_values(self) -> dict[str, Any]:
        """The content of ``cfg.json``, JSON values, ``architecture`` among them."""
        values = dataclasses.asdict(self.config)
        values.setdefault("architecture", architecture_of(self))
        return values

    @classmethod
    def from_config(cls, values: dict[str, Any], source: str) -> Autoencoder:
        """A module on the meta device from the content of ``cfg.json``.

        Raises:
            ValueError: values that are missing, of the wrong kind or out of range; ``source`` says
                where they came from.
        """
        raise NotImplementedError(f"{cls.__name__} must define from_config to be loaded")

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``cfg.json`` and ``sae_weights.safetensors`` into a folder.

        Each file appears whole or not at all, and the weights carry the configuration they were
        saved with: a process killed between the two files leaves a loadable model. Where FSDP has
        divided the parameters every process calls it, and any of them may write the folder last.
        """
        first = next(self.parameters())
        dtype = str(first.dtype).removeprefix("torch.")
        return write_pretrained(folder, self, {**self.config_values(), "dtype": dtype})

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        **options: Any,
    ) -> Self:
        """Load what :meth:`save_pretrained` wrote, in eval mode, from disk or from the Hub.

        A file of a subclass is loaded as that.

        Args:
            folder: the folder of both files, or ``user/name`` of a repository on the Hugging Face
                Hub, whose files are kept in the Hub's cache.
            device: where the module is put; None leaves it on the CPU.
            revision: a branch, tag or commit of the repository.
            subfolder: where in the folder or the repository the files lie.
            token: the Hub's, as ``huggingface_hub`` takes it.
            options: passed to :meth:`from_config`.

        Raises:
            FileNotFoundError: no such folder, repository or file.
            ValueError: a corrupt or foreign file, or weights that do not fit the configuration.
        """
        found = find_pretrained(folder, revision=revision, subfolder=subfolder, token=token)
        files = read_pretrained(found)
        named = files[0].get("architecture")
        kind = ARCHITECTURES.get(named) if isinstance(named, str) else None
        own = kind if kind is not None and issubclass(kind, cls) else cls
        return _made(own, found, files, device, **options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        subfolder: str | None = None,
        figures: dict[str, Any] | None = None,
        private: bool | None = None,
        revision: str | None = None,
        license: str | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Put the module into a repository of the Hugging Face Hub, with a model card.

        Args:
            repo_id: ``user/name``; made where it is missing.
            subfolder: where in the repository the two files lie; SAELens asks for one. The card
                lies at the top and speaks of the module that was put there last.
            figures: the run's, for the card: ``evaluate(...).summary()``, or any numbers by name.
            private: whether a new repository is; None leaves it to the Hub.
            revision: the branch that is written to.
            license: the Hub's short name of a licence; with None the card names none.
            token: the Hub's, as ``huggingface_hub`` takes it.

        Returns:
            The address of the commit.

        Raises:
            ValueError: repo_id is not ``user/name``.
            OSError: the Hub refused or cannot be reached.
        """
        with tempfile.TemporaryDirectory() as made:
            self.save_pretrained(Path(made) / (subfolder or ""))
            # at the top, where the Hub reads it
            hub.write_card(
                Path(made) / hub.CARD_NAME,
                repo_id,
                self.config_values(),
                subfolder=subfolder,
                figures=figures,
                license=license,
            )
            return hub.upload(made, repo_id, private=private, revision=revision, token=token)


def find_pretrained(
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """The folder on disk of a model's two files, fetched from the Hub where it is a repository's.

    Raises:
        FileNotFoundError: no such repository, or the Hub cannot be reached.
        ValueError: revision is given for a folder on disk.
    """
    if isinstance(folder, str) and hub.is_repo_id(folder):
        return hub.download(
            folder,
            (CONFIG_NAME, WEIGHTS_NAME),
            revision=revision,
            subfolder=subfolder,
            token=token,
        )
    if revision is not None:
        raise ValueError(f"revision must be None for a folder on disk; got {revision!r}")
    return folder_path(folder) / (subfolder or "")


class Reconstruction(nn.Module):
    """An autoencoder as a layer from tensor to tensor, for ``nn.Sequential`` and the like.

    Raw rows ``[..., d_in]`` in, the raw reconstruction ``[..., d_out]`` out, differentiable in both
    and in the parameters. Terms of a loss beside it come from ``layer.model`` itself.

    Example::

        net = nn.Sequential(nn.Linear(10, 64), bae.as_layer(), nn.Linear(64, 2))
    """

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.reconstruct(x)


def _check_held(name: str, centre: Any, scale: float, dtype: torch.dtype) -> None:
    """Refuse a normalisation that the module's dtype has no numbers for."""
    held = centre.new_tensor(scale).to(dtype)
    if not (bool(held.isfinite()) and held > 0 and bool(centre.to(dtype).isfinite().all())):
        raise ValueError(
            f"{name} must have a mean and a scale within {str(dtype).removeprefix('torch.')}, the "
            f"dtype of x_mean and x_scale; got means up to {float(centre.abs().max()):.3g} and a "
            f"root mean square of {scale:.3g}"
        )


def _relative_units(
    name: str, units: Tensor, blocks: Sequence[Tensor], centre: Any, scale: float
) -> Tensor:
    """Units of dimensions over the scale, such that rows divided by both have unit mean square."""
    what = "metric" if name == "x" else "target_metric"
    width = blocks[0].shape[1]
    if not isinstance(units, Tensor) or units.shape != (width,):
        got = list(units.shape) if isinstance(units, Tensor) else type(units).__name__
        raise ValueError(f"{what} must be a tensor [{width}]; got {got}")
    units = units.to(blocks[0].device, torch.float64)
    if not bool((units.isfinite() & (units > 0)).all()):
        raise ValueError(f"{what} must be finite and positive; the least is {float(units.min())}")
    n = sum(block.numel() for block in blocks)
    square = sum(((block.double() - centre) / units).square().sum() for block in blocks) / n
    return units * math.sqrt(float(square)) / scale


def as_code(features: BinaryCode | Tensor) -> BinaryCode:
    """Which features are on, of what an autoencoder's ``encode`` gives."""
    if isinstance(features, BinaryCode):
        return features
    return BinaryCode.from_dense(features.detach() > 0)


class Foreign(Autoencoder):
    """Anything with ``encode`` (raw rows to dense features) and ``decode`` as an autoencoder.

    It has no sizes, no normalisation and no files; it serves where features are read and changed.
    """

    def __init__(self, wrapped: Any) -> None:
        super().__init__()
        # no submodule: it keeps its own mode, names and parameters
        object.__setattr__(self, "wrapped", wrapped)
        self.is_transcoder = bool(getattr(wrapped, "is_transcoder", False))

    wrapped: Any

    @property
    def block_rows(self) -> int:
        found = getattr(getattr(self.wrapped, "config", None), "d_sae", None)
        return max(_CHUNK_ELEMENTS // (found if isinstance(found, int) else 4096), 1)

    def as_own(self, rows: Tensor) -> Tensor:
        of = self.wrapped.parameters() if isinstance(self.wrapped, nn.Module) else iter(())
        first = next(iter(of), None)
        return rows if first is None else rows.to(first.device, first.dtype)

    def usual_norms(self) -> tuple[float, float]:
        return math.inf, math.inf

    def encode(self, x: Tensor) -> Tensor:
        found: Tensor = self.wrapped.encode(x)
        return found

    def decode(self, code: Any) -> Tensor:
        found: Tensor = self.wrapped.decode(code)
        return found


def as_autoencoder(model: Any) -> Autoencoder:
    """An :class:`Autoencoder` as it is; anything with ``encode`` and ``decode`` wrapped as one.

    Raises:
        TypeError: it lacks one of the two.
    """
    if isinstance(model, Autoencoder):
        return model
    if not (hasattr(model, "encode") and hasattr(model, "decode")):
        raise TypeError(f"autoencoder must have encode and decode; got {type(model).__name__}")
    return Foreign(model)


# -- by name -----------------------------------------------------------------------------------

# architecture in cfg.json -> the class that reads it
ARCHITECTURES: dict[str, type[Autoencoder]] = {}

Kind = TypeVar("Kind", bound=type[Autoencoder])


def register_architecture(name: str) -> Callable[[Kind], Kind]:
    """A decorator that lets :func:`load_autoencoder` load a class by the name in ``cfg.json``.

    Raises:
        ValueError: the name belongs to another class.
    """

    def register(kind: Kind) -> Kind:
        taken = ARCHITECTURES.get(name)
        # a module that is imported again (a notebook's cell) brings the same class anew
        if taken is not None and (taken.__module__, taken.__qualname__) != (
            kind.__module__,
            kind.__qualname__,
        ):
            raise ValueError(
                f"architecture {name!r} must be registered once; it belongs to "
                f"{taken.__module__}.{taken.__qualname__}"
            )
        ARCHITECTURES[name] = kind
        return kind

    return register


def architecture_of(model: Autoencoder) -> str:
    """The name under which a module's class is registered.

    Raises:
        ValueError: it is not.
    """
    for name, kind in ARCHITECTURES.items():
        if kind is type(model):
            return name
    raise ValueError(
        f"{type(model).__name__} must be registered by register_architecture to be saved"
    )


def _made(
    kind: type[Autoencoder],
    folder: str | os.PathLike[str],
    files: tuple[dict[str, Any], Path, dict[str, Tensor]],
    device: torch.device | str | None,
    **options: Any,
) -> Any:
    """A module of a kind from what :func:`read_pretrained` read, in eval mode."""
    values, source, tensors = files
    module = kind.from_config(values, str(source), **options)
    load_tensors_(module, tensors, folder)
    return module.to(device).eval() if device is not None else module.eval()


def load_autoencoder(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Autoencoder:
    """Load whichever registered autoencoder a folder or a repository holds, in eval mode.

    Args:
        folder, device, revision, subfolder, token: see :meth:`Autoencoder.from_pretrained`.

    Raises:
        FileNotFoundError: no such folder, repository or file.
        ValueError: an architecture that is not registered, or see ``from_pretrained`` of the class.
    """
    found = find_pretrained(folder, revision=revision, subfolder=subfolder, token=token)
    files = read_pretrained(found)
    values, source, _ = files
    name = values.get("architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(
            f"{source}: architecture must be one of {', '.join(sorted(ARCHITECTURES))} "
            f"(bae_fast.baselines registers more); got {name!r}"
        )
    return _made(ARCHITECTURES[name], found, files, device)


# -- the two files -----------------------------------------------------------------------------


def folder_path(folder: str | os.PathLike[str]) -> Path:
    """A folder as it is given; a leading ``~`` is the user's home.

    Raises:
        TypeError: no path.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"folder must be a path; got {folder!r}")
    return Path(folder).expanduser()


def write_pretrained(
    folder: str | os.PathLike[str], module: nn.Module, values: dict[str, Any]
) -> Path:
    """Write a module's tensors and its configuration (JSON values) into a folder."""
    tensors = {name: _whole(tensor).cpu().contiguous() for name, tensor in _as_used(module).items()}
    content = json.dumps(values, sort_keys=True, allow_nan=False)
    save_id = hashlib.sha256(content.encode() + os.urandom(16)).hexdigest()[:16]
    values = {**values, "save_id": save_id}
    folder = folder_path(folder)
    write_safetensors(folder / WEIGHTS_NAME, tensors, {"config": json.dumps(values)})
    write_json(folder / CONFIG_NAME, values)
    return folder


def _as_used(module: nn.Module) -> dict[str, Tensor]:
    """A module's state, where parametrized and pruned tensors stand by their names, as they are
    used: a file says nothing of how they are made."""
    state = module.state_dict()
    found = {}
    for name, tensor in state.items():
        stem = name.removesuffix("_orig").removesuffix("_mask")
        if name.startswith("parametrizations."):
            stem = name.split(".")[1]
        elif f"{stem}_orig" not in state:
            stem = name
        found[stem] = tensor if stem == name else getattr(module, stem)
    return found


def _whole(tensor: Any) -> Tensor:
    """A tensor of a state dict; one that FSDP divided is gathered, by all processes together."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach()


def read_pretrained(
    folder: str | os.PathLike[str],
) -> tuple[dict[str, Any], Path, dict[str, Tensor]]:
    """Read both files: (configuration, the file it came from, tensors).

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: a corrupt file.
    """
    folder = folder_path(folder)
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"folder {folder} {kind}")
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        inside = sorted(folder.glob(f"*/{WEIGHTS_NAME}"))  # of a run, whose models have folders
        hint = f"; {inside[0].parent} holds a model" if inside else ""
        raise FileNotFoundError(f"{weights} does not exist{hint}")
    source = folder / CONFIG_NAME
    # a first save cut off between the two files leaves the weights, which carry the same
    values = read_json(source) if source.is_file() else None
    tensors, header = read_safetensors(weights)
    try:
        saved_with = json.loads(header.get("config", "null"))
    except ValueError as error:
        raise ValueError(f"{weights} holds an invalid configuration: {error}") from error
    if isinstance(saved_with, dict) and (
        values is None or saved_with.get("save_id") != values.get("save_id")
    ):
        # a save was cut off between the two files: the weights' own configuration is theirs
        values, source = saved_with, weights
    if values is None:
        raise FileNotFoundError(f"{source} does not exist")
    return values, source, tensors


def check_weights(name: str, tensor: Tensor, source: str) -> None:
    """Refuse what no training leaves: a feature whose weights are NaN is off, and nobody is told.

    Raises:
        ValueError: NaN, or a scale or metric that is not positive and finite.
    """
    bad = int(tensor.isnan().sum())
    if bad:
        raise ValueError(f"{source}: {name} must hold no NaN; got {bad:,} of {tensor.numel():,}")
    divides = name in ("x_scale", "y_scale", "x_metric", "y_metric")
    if divides and not bool((tensor.isfinite() & (tensor > 0)).all()):
        raise ValueError(f"{source}: {name} must be positive and finite; got {tensor.min():g}")


def load_tensors_(
    module: nn.Module, tensors: dict[str, Tensor], folder: str | os.PathLike[str]
) -> None:
    """Give a module made on the meta device the tensors read from a folder.

    Raises:
        ValueError: other names, shapes or kinds than the module's, parameters of two dtypes, NaN,
            or a scale that rows cannot be divided by.
    """
    source = Path(folder) / WEIGHTS_NAME
    for side in "xy":
        # a buffer that only files of a module with a metric hold
        mean = getattr(module, f"{side}_mean", None)
        if f"{side}_metric" in tensors and isinstance(mean, Tensor):
            setattr(module, f"{side}_metric", torch.empty_like(mean))
    expected = module.state_dict()
    if tensors.keys() != expected.keys():
        raise ValueError(f"{source} must hold {sorted(expected)}; got {sorted(tensors)}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or not tensor.dtype.is_floating_point:
            raise ValueError(
                f"{source}: {name} must be floating point {list(expected[name].shape)}; "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        check_weights(name, tensor, str(source))
    dtypes = {str(tensors[name].dtype) for name, _ in module.named_parameters()}
    if len(dtypes) > 1:
        raise ValueError(
            f"{source}: parameters must have one dtype; got {', '.join(sorted(dtypes))}"
        )
    learned = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    module.load_state_dict(tensors, assign=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(learned[name])
