"""The objective of the Binary Autoencoder: mse + a_e H + a_c D, its start, bank, revival, refit.

Its constants and their presets come first.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from bae_fast.autoencoder import Autoencoder
from bae_fast.codes import BinaryCode
from bae_fast.columns import covariance_of_columns
from bae_fast.distributed import Mesh
from bae_fast.functional import BAEOutput, Encoded, compute_dtype
from bae_fast.model import BinaryAutoencoder
from bae_fast.ops import registry
from bae_fast.search import SearchedAutoencoder
from bae_fast.statistics import CodeStatistics, entropy_bits
from bae_fast.training.bank import CodeBank
from bae_fast.training.config import LoopConfig, check_bounds, check_integers
from bae_fast.training.feature_shards import gather_features
from bae_fast.training.objective import Loss, Objective, Precision, Sample, Step
from bae_fast.training.recipe import (
    MAX_REFIT_FEATURES,
    START_ROWS,
    init_from_rows_,
    reconstruct,
    refit_decoder_,
    residual,
    revive_,
)

if TYPE_CHECKING:
    from typing_extensions import Self

STARTS = ("rows", "density", "none")

# features a dimension beyond which a dictionary is wide, see TrainingConfig
WIDE_FROM = 16.0


@dataclasses.dataclass(frozen=True)
class TrainingConfig(LoopConfig):
    """The constants of a Binary Autoencoder's training run.

    The loss is mse (mean over rows and dimensions, normalised units) + a_e H + a_c D.

    Attributes:
        steps, batch_size, lr, betas, eps, decoder_lr_scale, decay_from, precision, seed,
            warmup_steps, clip_norm, cuda_graph: see :class:`LoopConfig`.
        entropy_weight, covariance_weight: a_e and a_c.
        entropy_from: share of the steps before which a_e is zero (step schedule).
        init: "rows" (features start along rows of the data), "density" (random weights, bits on
            in ``density`` of the rows) or "none" (as the module is).
        density: share of ones at the start, for up to ``wide_from`` d features.
        wide_from: features a dimension, F / d, beyond which a dictionary is wide. The shares of
            rows that belong to one feature (``density``, ``dead_below`` and
            1 - ``revive_quantile``) are then multiplied by ``wide_from`` d / F, so that a row
            starts with as many ones as at F = ``wide_from`` d, by default 0.32 d; see
            :meth:`for_sizes`. 0: they hold for any F.
        decoder_norm: norm of the decoder's rows at the start, for ``init="rows"``.
        bank_batches: past batches counted together with each batch by the entropy and the
            covariance.
        multilinear: pass exact differences of the error to the bits instead of slopes, see
            :func:`bae_fast.binary_autoencoder`.
        revive_every: steps between revivals of dead features (0: never), until
            ``revive_until`` of the steps.
        dead_below: a feature is dead if fewer than this share of rows had it since last time.
        revive_quantile, revive_decoder_scale: see :func:`bae_fast.training.revive_`.
        refit: replace the decoder by its least-squares optimum at the end. After 2,000 steps of
            the demo it lowers the FVU by 0.0006. ``Trainer`` takes at most
            262,144 rows for it, evenly spread.
    """

    lr: float = 4e-3
    betas: tuple[float, float] = (0.7, 0.9)
    eps: float = 1e-12
    decoder_lr_scale: float = 2.0
    entropy_weight: float = 1.5e-4
    covariance_weight: float = 0.0
    entropy_from: float = 0.0
    init: str = "rows"
    density: float = 0.02
    wide_from: float = WIDE_FROM
    decoder_norm: float = 1.44
    bank_batches: int = 32
    multilinear: bool = True
    revive_every: int = 50
    revive_until: float = 0.9
    dead_below: float = 3e-4
    revive_quantile: float = 0.99
    revive_decoder_scale: float = 0.3
    refit: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, {"bank_batches": 0, "revive_every": 0})
        positive, share = (0.0, math.inf), (0.0, 1.0)
        check_bounds(
            self,
            {
                "entropy_weight": positive,
                "covariance_weight": positive,
                "decoder_norm": positive,
                "entropy_from": share,
                "density": share,
                "wide_from": positive,
                "revive_until": share,
                "dead_below": share,
                "revive_quantile": share,
                "revive_decoder_scale": positive,
            },
        )
        if self.init not in STARTS:
            raise ValueError(f"init must be rows, density or none; got {self.init!r}")

    def for_sizes(self, d_in: int, d_sae: int) -> Self:
        """The constants with the shares of a dictionary of that width, and ``wide_from`` 0.

        Up to ``wide_from`` d_in features nothing else differs.

        Args:
            d_in: width of the rows.
            d_sae: features of the whole dictionary, over all processes.
        """
        scale = 1.0
        if self.wide_from:
            scale = min(1.0, self.wide_from * d_in / d_sae)
        if scale == 1.0:  # 1 - (1 - quantile) would be rounded
            return dataclasses.replace(self, wide_from=0.0)
        return dataclasses.replace(
            self,
            wide_from=0.0,
            density=scale * self.density,
            dead_below=scale * self.dead_below,
            revive_quantile=1 - scale * (1 - self.revive_quantile),
        )

    def going_on(self) -> Self:
        return dataclasses.replace(self, entropy_from=0.0, init="none", revive_every=0, refit=False)

    def settings(self) -> dict[str, Any]:
        values = super().settings()
        if self.wide_from in (0.0, WIDE_FROM):  # as without the constant, see for_sizes
            del values["wide_from"]
        return values

    def check_size(self, d_sae: int) -> None:
        """Raise ValueError where the refit cannot serve that many features."""
        if self.refit and d_sae > MAX_REFIT_FEATURES:
            raise ValueError(
                f"refit must be False for d_sae > {MAX_REFIT_FEATURES}, as it solves an F x F "
                f"system; got d_sae={d_sae}"
            )

    def objective(self, model: Autoencoder) -> Objective:
        """:class:`BinaryObjective`."""
        return BinaryObjective(model, self)


PRESETS: dict[str, TrainingConfig] = {
    "sparse": TrainingConfig(),
    # the released program's README: Adam 5e-4, a_e = a_c = 1e-7, entropy from a quarter on
    "paper": TrainingConfig(
        lr=5e-4,
        betas=(0.9, 0.999),
        eps=1e-8,
        decoder_lr_scale=1.0,
        decay_from=1.0,
        entropy_weight=1e-7,
        covariance_weight=1e-7,
        entropy_from=0.25,
        init="none",
        bank_batches=0,
        multilinear=False,
        revive_every=0,
        refit=False,
        precision="float32",
    ),
}


@runtime_checkable
class BinaryTrainable(Protocol):
    """What :class:`BinaryObjective` asks of a module beside its four parameters."""

    def mse(self, out: BAEOutput, target: Tensor, *, total: int | None = None) -> Tensor:
        """See :meth:`bae_fast.BinaryAutoencoder.mse`."""

    def init_density_(self, x: Tensor, density: float) -> Any:
        """See :meth:`bae_fast.BinaryAutoencoder.init_density_`."""


class _WholeBatch(NamedTuple):
    """A batch of all micro-batches of all processes, as its parts need it.

    Attributes:
        n, n_rows: its rows; the same as int64 ``[]``.
        counts: int64 ``[K]``, its ones in the columns of this process.
        stats: statistics of the batch and of the bank.
        scale: rows of both over rows of the batch, which stands for them in the gradient.
        words, row_words: the bits of all its rows in all columns, and of this process's rows; None
            without a covariance.
        pairs: the statistics with the covariance of all columns; None without one.
    """

    n: int
    n_rows: Tensor
    counts: Tensor
    stats: CodeStatistics
    scale: float | Tensor
    words: Tensor | None
    row_words: Tensor | None
    pairs: CodeStatistics | None


class BinaryObjective(Objective):
    """mse + a_e H + a_c D of a Binary Autoencoder, with its start, bank, revival and refit."""

    def __init__(self, model: Autoencoder, config: TrainingConfig) -> None:
        """Check that the module and the constants fit together.

        Raises:
            TypeError: the module is no Binary Autoencoder.
            ValueError: too many features for the refit, a batch too small for the covariance, or
                frozen parameters that the start, the revival or the refit would change.
        """
        if not isinstance(model, BinaryTrainable):
            raise TypeError(
                f"model must be a BinaryAutoencoder for {type(config).__name__}; got "
                f"{type(model).__name__}, whose constants are a bae_fast.training.SparseConfig"
            )
        self.model: BinaryAutoencoder = cast(BinaryAutoencoder, model)
        self.config = config
        config.check_size(self.model.config.d_sae)
        if config.covariance_weight and config.batch_size < 2:
            raise ValueError("batch_size must be at least 2 with a covariance_weight; got 1")
        frozen = [name for name, p in self.model.named_parameters() if not p.requires_grad]
        changed = [
            name
            for name, used in (
                ("init", config.init != "none"),
                ("revive_every", config.revive_every > 0),
                ("refit", config.refit),
            )
            if used
        ]
        computed = [
            name
            for name in ("W_enc", "b_enc", "W_dec", "b_dec")
            if not isinstance(getattr(self.model, name), nn.Parameter)
        ]
        if computed and changed:
            raise ValueError(
                f"{computed[0]} must be a parameter itself, or {' and '.join(changed)} be off, as "
                "they change it in place; got one that is parametrized or pruned"
            )
        if frozen and changed:
            raise ValueError(
                f"{frozen[0]} must require a gradient, or {' and '.join(changed)} be off, as "
                f"{'it changes' if len(changed) == 1 else 'they change'} parameters; "
                f"got requires_grad=False for {', '.join(frozen)}"
            )
        self.n_columns = self.model.W_enc.shape[1]
        self.mesh: Mesh | None = None
        self.micro_batches = 1
        self._counted: CodeStatistics | None = None
        self.bank = self._new_bank()
        self._fired = torch.zeros(self.n_columns, dtype=torch.int64, device=self.model.W_enc.device)
        self._seen = 0
        self._new: Any = None

    def _new_bank(self) -> CodeBank | None:
        config = self.config
        if not config.bank_batches:
            return None
        return CodeBank(config.bank_batches, keep_codes=config.covariance_weight > 0)

    def spread(self, mesh: Mesh | None, micro_batches: int) -> None:
        config = self.config
        n_parts = micro_batches * (1 if mesh is None else mesh.data)
        if config.batch_size % n_parts:
            raise ValueError(
                f"batch_size must be a multiple of {n_parts}, the micro-batches of all processes "
                f"along data; got {config.batch_size}"
            )
        if mesh is not None and mesh.feature > 1:
            config.check_size(self.model.config.d_sae * mesh.feature)
            if self.model.config.surrogate == "official" and config.covariance_weight:
                raise ValueError(
                    "covariance_weight must be 0 for the surrogate 'official' with features on "
                    f"several processes; got {config.covariance_weight}"
                )
        self.mesh, self.micro_batches = mesh, micro_batches

    @property
    def _features(self) -> int:
        """Processes that the features are divided among."""
        return 1 if self.mesh is None else self.mesh.feature

    @property
    def starts(self) -> bool:
        return self.config.init != "none"

    def start(self, sample: Sample, generator: torch.Generator) -> None:
        config, model = self.config, self.model
        if config.init == "none":
            return
        rows = sample(max(START_ROWS, model.config.d_sae * self._features))
        rows = rows.to(model.W_enc.device, model.W_enc.dtype)
        if config.init == "rows":
            init_from_rows_(
                model,
                rows,
                config.density,
                decoder_norm=config.decoder_norm,
                generator=generator,
                part=(0 if self.mesh is None else self.mesh.feature_rank, self._features),
            )
        else:
            model.init_density_(rows, config.density)

    def _entropy_weight(self, number: int) -> float:
        config = self.config
        late = number >= config.entropy_from * config.steps
        return config.entropy_weight if late else 0.0

    def loss(self, x: Tensor, target: Tensor | None, step: Step) -> Loss:
        past = None
        if self.bank is not None and len(self.bank):
            past = self.bank.statistics(words=self.config.covariance_weight > 0)
        loss, code = self._loss(x, target, past, self._entropy_weight(step.number))
        self._remember(loss.counts, len(x), code)
        return loss

    def _loss(
        self, x: Tensor, target: Tensor | None, past: CodeStatistics | None, a_e: float
    ) -> tuple[Loss, BinaryCode]:
        config, model = self.config, self.model
        a_c = config.covariance_weight
        out = model(x, covariance=a_c > 0, past=past, multilinear=config.multilinear)
        mse = model.mse(out, x if target is None else target)
        terms = a_e * out.entropy
        if out.covariance is not None:
            terms = terms + a_c * out.covariance
        if past is not None:
            # a row's gradient is that of one among all rows counted; the batch stands for them
            terms = terms * (1 + past.n_rows.float() / len(x))
        parts = {"mse": mse, "entropy_bits": out.entropy}
        if out.covariance is not None:
            parts["covariance"] = out.covariance
        return Loss(mse + terms, parts, out.code.counts()), out.code

    def _remember(self, counts: Tensor, n: int, code: BinaryCode | None) -> None:
        """Count a batch for the bank, which may keep its code, and for the revival."""
        self._new = (torch.full_like(counts[0], n), counts, code, n)

    def _commit(self) -> None:
        """Remember the batch of the update that was made: one that is left out leaves nothing."""
        if self._new is None:
            return
        (n_rows, counts, code, n), self._new = self._new, None
        if self.bank is not None:
            self.bank.append_counts(n_rows, counts, code)
        self._fired += counts
        self._seen += n

    def forget(self) -> None:
        self._new = None

    # what a replayed step needs, see Capturable

    def against_capture(self, dtype: torch.dtype) -> str | None:
        model, config = self.model, self.config
        if isinstance(model, SearchedAutoencoder):
            return "model must not search for its codes: the numbers say how many flips there are"
        if self.bank is not None and config.covariance_weight:
            return "bank_batches must be 0 with a covariance_weight: codes are added to it"
        if model.check_finite:
            return "check_finite must be off: it waits for the device"
        device = model.W_enc.device
        n_bits = model.config.n_bits
        name = registry.choose(model.impl, device.type, dtype, self.n_columns, n_bits, device.index)
        if name == "reference" or not registry.BACKENDS[name].capturable:
            return f"impl must be one whose operators never wait for the device; got {name!r}"
        return None

    def constants(self, number: int) -> tuple[float, ...]:
        return (self._entropy_weight(number),)

    def given(self) -> tuple[Tensor, ...]:
        if self.bank is None:
            return ()
        if not len(self.bank):
            return torch.zeros_like(self._fired[0]), torch.zeros_like(self._fired)
        past = self.bank.statistics()
        return past.n_rows, past.counts

    def loss_given(
        self,
        x: Tensor,
        target: Tensor | None,
        given: tuple[Tensor, ...],
        constants: tuple[float, ...],
    ) -> Loss:
        past = CodeStatistics(*given) if given else None
        return self._loss(x, target, past, *constants)[0]

    def count(self, loss: Loss, n_rows: int) -> None:
        self._remember(loss.counts, n_rows, None)

    def backward(self, x: Tensor, target: Tensor | None, step: Step, precision: Precision) -> Loss:
        """As the loss of all micro-batches of all processes at once: rows are encoded first.

        Gradients are this process's part of the whole batch's: added over "data" they are whole.
        """
        if self.mesh is None and self.micro_batches == 1:
            return super().backward(x, target, step, precision)
        config, model, mesh = self.config, self.model, self.mesh
        a_e, a_c = self._entropy_weight(step.number), config.covariance_weight
        parts = x.chunk(self.micro_batches)
        targets = parts if target is None else target.chunk(self.micro_batches)
        with precision():
            encoded = [model.encode_rows(part) for part in parts]
        whole = self._whole_batch(encoded, len(x))
        self._counted = whole.stats

        combine = mesh.sum_reconstructions if mesh is not None and mesh.feature > 1 else None
        mse, terms = torch.zeros((), device=x.device), torch.zeros((), device=x.device)
        found: dict[str, Tensor] = {}
        at = 0
        for part, goal, one in zip(parts, targets, encoded, strict=True):
            with precision():
                out = model(
                    part,
                    covariance=a_c > 0 and self._features == 1,
                    stats=whole.stats,
                    multilinear=config.multilinear,
                    encoded=one,
                    combine=combine,
                )
                error = model.mse(out, goal, total=whole.n)
                terms = a_e * out.entropy
                covariance = out.covariance
                if self._features > 1 and whole.pairs is not None and whole.row_words is not None:
                    row_words = whole.row_words[at : at + len(part)]
                    covariance = self._covariance(part, one, row_words, whole.pairs)
                if covariance is not None:
                    terms = terms + a_c * covariance
                terms = terms * whole.scale
            (error + terms).backward()
            at += len(part)
            mse = mse + error.detach()
            found = {"entropy_bits": out.entropy.detach()}
            if covariance is not None:
                found["covariance"] = covariance.detach()
        code = None if whole.words is None else self._code(whole.words)
        self._new = (whole.n_rows, whole.counts, code, whole.n)
        # H and D are of the whole batch, and so the same in every part
        return Loss(mse + terms.detach(), {"mse": mse, **found}, whole.counts)

    def _whole_batch(self, encoded: list[Encoded], n_own: int) -> _WholeBatch:
        """What the parts of a batch share, from the encoded rows of this process."""
        mesh = self.mesh
        with_pairs = self.config.covariance_weight > 0
        n = n_own * (1 if mesh is None else mesh.data)
        counts = torch.stack([one.counts for one in encoded]).sum(0)
        if mesh is not None:
            mesh.sum_(counts, "data", "counts")
        n_rows = torch.full_like(counts[:1].sum(), n)
        past = None
        if self.bank is not None and len(self.bank):
            past = self.bank.statistics(words=with_pairs)
        stats = CodeStatistics(n_rows, counts)
        if past is not None:
            stats = CodeStatistics(n_rows + past.n_rows, counts + past.counts)
        words = row_words = pairs = None
        if with_pairs:
            words = row_words = torch.cat([one.words for one in encoded])
            if mesh is not None:
                row_words, words = mesh.gather_words(words)
            counted = words if past is None else torch.cat([past.require_words(), words])
            pairs = self._code(counted).statistics(covariance=True, impl=self.model.impl)
            if self._features == 1:
                stats = pairs
        scale = 1.0 if past is None else 1 + past.n_rows.float() / n
        return _WholeBatch(n, n_rows, counts, stats, scale, words, row_words, pairs)

    def _code(self, words: Tensor) -> BinaryCode:
        """Packed bits of all columns, those of other processes among them."""
        columns = self.n_columns * self._features
        return BinaryCode(words, columns, n_bits=self.model.config.n_bits, trusted=True)

    def _covariance(
        self, x: Tensor, encoded: Encoded, row_words: Tensor, stats: CodeStatistics
    ) -> Tensor:
        """D of all columns, with its gradient at this process's."""
        model, mesh = self.model, self.mesh
        assert mesh is not None
        rows = model.normalize(x)
        return covariance_of_columns(
            rows.to(compute_dtype(rows)),
            model.W_enc,
            model.b_enc,
            encoded,
            row_words,
            stats,
            mesh.feature_rank * model.W_enc.shape[1],
            surrogate=model.config.surrogate,
            surrogate_width=model.config.surrogate_width or None,
            impl=model.impl,
        )

    def entropy(self, own: Tensor) -> Tensor:
        """H of all columns, in the order of one process that holds them all."""
        if self.mesh is None or self.mesh.feature == 1 or self._counted is None:
            return own
        counts = self.mesh.gather(self._counted.counts, "feature", "counts")
        return entropy_bits(counts, self._counted.n_rows).to(own.dtype)

    def after_update(
        self, x: Tensor, optimizer: torch.optim.Optimizer, step: int, generator: torch.Generator
    ) -> None:
        """Revive dead features where it is time."""
        self._commit()
        config, model = self.config, self.model
        if not config.revive_every or step % config.revive_every:
            return
        if step < config.revive_until * config.steps and not model.is_transcoder:
            fired = self._fired.unflatten(0, (-1, model.config.n_bits)).sum(1)
            rows, error = residual(model, x.to(model.W_enc.dtype), self.mesh)
            revive_(
                model,
                fired < config.dead_below * self._seen,
                rows,
                error,
                optimizer,
                quantile=config.revive_quantile,
                decoder_scale=config.revive_decoder_scale,
                generator=generator,
                mesh=self.mesh,
            )
        self._fired.zero_()
        self._seen = 0

    def look(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        model = self.model
        recon, code = reconstruct(model, x.to(model.W_enc.dtype), self.mesh)
        return model.denormalize(recon), code.counts()

    @property
    def finishes(self) -> bool:
        return self.config.refit and not self.model.is_transcoder

    @torch.no_grad()
    def finish(self, rows: Tensor) -> None:
        """Refit the decoder."""
        model, mesh = self.model, self.mesh
        if not self.finishes:
            return
        if mesh is None or mesh.feature == 1:
            refit_decoder_(model, rows)
            return
        whole = gather_features(model, mesh)  # small: the refit has a largest number of features
        refit_decoder_(whole, rows)
        each = model.config.d_sae
        model.W_dec.copy_(whole.W_dec[mesh.feature_rank * each :][:each])
        model.b_dec.copy_(whole.b_dec)

    def state_dict(self) -> dict[str, Any]:
        bank = self.bank
        held: list[Any] = []
        if bank is not None and bank.keep_codes:
            held = [code.words for code in bank.codes]
        elif bank is not None:
            held = [{"n_rows": n_rows, "counts": counts} for n_rows, counts in bank.counts]
        return {"fired": self._fired, "seen": self._seen, "bank": held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self._fired.device
        self._fired = state["fired"].to(device, copy=True)
        self._seen = state["seen"]
        self.bank = self._new_bank()
        if self.bank is None:
            return
        for held in state["bank"]:
            if isinstance(held, Tensor):
                columns = self.n_columns * self._features
                code = BinaryCode(held.to(device), columns, n_bits=self.model.config.n_bits)
                # counts are of this process's columns
                own = slice(None) if self.mesh is None else self.mesh.columns(columns)
                self.bank.append_counts(code.n_rows(), code.counts()[own], code)
            else:
                self.bank.append_counts(
                    held["n_rows"].to(device, copy=True), held["counts"].to(device, copy=True)
                )
