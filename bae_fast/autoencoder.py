"""The contract that every autoencoder of the package keeps, and the registry of their classes.

Training, evaluation, interventions, names of features and comparison ask an autoencoder only what
stands in :class:`Autoencoder`: a further method is a subclass of it in one file. Its normalisation
is in :mod:`bae_fast.normalization`, the two files of a saved one in :mod:`bae_fast.pretrained`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from bae_fast import hub
from bae_fast.arguments import check_int
from bae_fast.codes import BinaryCode
from bae_fast.normalization import Normalized
from bae_fast.pretrained import (
    find_pretrained,
    load_tensors_,
    publish_,
    read_pretrained,
    write_pretrained,
)
from bae_fast.progress import tracked
from bae_fast.units import divided, multiplied

if TYPE_CHECKING:
    from typing_extensions import Self

# elements of dense features held at a time
_CHUNK_ELEMENTS = 16 * 2**20


# -- configurations ----------------------------------------------------------------------------


def check_sizes(config: Any, names: tuple[str, ...], source: str) -> None:
    """Raise ValueError unless the named sizes are ints >= 1 that a machine could hold.

    ``names`` holds d_in, d_sae and d_out at least; ``n_bits`` counts as a factor of d_sae.
    """
    for name in names:
        check_int(f"{source}: {name}", getattr(config, name), 1)
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


class Autoencoder(Normalized):
    """Raw rows in, features, raw rows out.

    A subclass sets ``config`` (with d_in, d_sae, d_out, metadata), calls
    :meth:`register_normalization`, and defines :meth:`encode` and :meth:`decode`. It is trained by
    ``Trainer`` if it has the methods of :class:`bae_fast.training.Trainable`, and loaded by
    :func:`load_autoencoder` if it is registered (:func:`register_architecture`) and has
    :meth:`from_config`.

    Attributes:
        is_binary: whether features are bits, whose values cost nothing to write down.
        ranks_bits: whether bits that are off can be what stands out in a row. Features are then
            given rows by the burstiness of their bits and ``preactivation(x, columns)``, the
            margin of a bit; else by :meth:`scores`.
        n_bits: bits a feature; 1 but for a Binary Autoencoder of several.
        learned: whether it was trained or loaded, so that no training starts its features anew.
            ``load_state_dict`` leaves it as it is: a state may be a fresh module's.
    """

    is_binary: ClassVar[bool] = False
    ranks_bits: ClassVar[bool] = False
    learned: bool = False
    config: Any

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

    @property
    def value_name(self) -> str:
        """What a page calls the number of a feature in a row."""
        return "activation"

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
        one = torch.ones_like(self.x_scale)
        w_enc.copy_(divided(w_enc.T, one, metric, self.x_metric_inverse).T)  # type: ignore[union-attr]
        for weight in (w_dec, b_dec):
            weight.copy_(multiplied(weight, one, metric))  # type: ignore[union-attr, arg-type]
        self.set_metric_(None)
        if not self.active(rows).equal(before):
            self.set_metric_(metric)
            self.load_state_dict(kept)
            raise ValueError("rows must keep every bit for the metric to be folded; some changed")
        return self

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
        dtype: torch.dtype | None = None,
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
            dtype: floating, of its parameters; None: that of the file.
            revision: a branch, tag or commit of the repository.
            subfolder: where in the folder or the repository the files lie.
            token: the Hub's, as ``huggingface_hub`` takes it.
            options: passed to :meth:`from_config`.

        Raises:
            FileNotFoundError: no such folder, repository or file.
            TypeError: a dtype that is not floating.
            ValueError: a corrupt or foreign file, or weights that do not fit the configuration.
        """
        found = find_pretrained(folder, revision=revision, subfolder=subfolder, token=token)
        files = read_pretrained(found)
        named = files[0].get("architecture")
        kind = ARCHITECTURES.get(named) if isinstance(named, str) else None
        own = kind if kind is not None and issubclass(kind, cls) else cls
        return _made(own, found, files, device, dtype, **options)

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

        Of paths on this machine, which the metadata may name, the last part alone is published.

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
            publish_(self.save_pretrained(Path(made) / (subfolder or "")))
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
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Any:
    """A module of a kind from what :func:`read_pretrained` read, in eval mode."""
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    if dtype is not None and not floating:
        raise TypeError(f"dtype must be a floating torch.dtype or None; got {dtype!r}")
    values, source, tensors = files
    module = kind.from_config(values, str(source), **options)
    load_tensors_(module, tensors, folder)
    module.learned = True
    return module.to(device=device, dtype=dtype).eval()


def load_autoencoder(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Autoencoder:
    """Load whichever registered autoencoder a folder or a repository holds, in eval mode.

    Args:
        folder, device, dtype, revision, subfolder, token: see :meth:`Autoencoder.from_pretrained`.

    Raises:
        FileNotFoundError: no such folder, repository or file.
        TypeError: a dtype that is not floating.
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
    return _made(ARCHITECTURES[name], found, files, device, dtype)
