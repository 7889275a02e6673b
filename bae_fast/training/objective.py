"""What a training run minimises, as objects: the Binary Autoencoder's objective, and any other.

The loop (:mod:`bae_fast.training.trainer`) owns the order of the rows, the optimizer and the log.
An objective owns the rest: how features start, the loss of a batch, what happens around an update,
what is done at the end, and the state all that needs. A further objective is a subclass of
:class:`Objective` and a configuration whose ``objective`` makes it; neither touches a file here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from bae_fast.autoencoder import Autoencoder
from bae_fast.codes import BinaryCode
from bae_fast.columns import covariance_of_columns
from bae_fast.distributed import Mesh
from bae_fast.functional import BAEOutput, Encoded, compute_dtype
from bae_fast.model import BinaryAutoencoder
from bae_fast.ops import registry
from bae_fast.statistics import CodeStatistics, entropy_bits
from bae_fast.training.bank import CodeBank
from bae_fast.training.config import LoopConfig, TrainingConfig
from bae_fast.training.feature_shards import gather_features
from bae_fast.training.pool import Pool, Poolable
from bae_fast.training.recipe import (
    START_ROWS,
    init_from_rows_,
    reconstruct,
    refit_decoder_,
    residual,
    revive_,
)

# given n, that many raw rows drawn at random (all of them where there are fewer)
Sample = Callable[[int], Tensor]

# gives the context of a forward pass: autocast, or nothing
Precision = Callable[[], AbstractContextManager[Any]]


class Step(NamedTuple):
    """Where a run stands when a loss is asked for.

    Attributes:
        number: steps done before this one.
        done: share of all steps that they are.
        dead: bool ``[K]``, columns that were off in the last 200 steps.
    """

    number: int
    done: float
    dead: Tensor


class Loss(NamedTuple):
    """What an objective says of a batch.

    Attributes:
        total: ``[]``, to be minimised.
        parts: what the log shows, by name, each ``[]``; ``mse`` and ``entropy_bits`` always.
        counts: int64 ``[K]``, rows in which each column is on.
    """

    total: Tensor
    parts: dict[str, Tensor]
    counts: Tensor


class Objective(ABC):
    """One objective for one module.

    Attributes:
        model: the module that is trained.
        n_columns: columns K of its code, of which the loss counts the ones.
    """

    model: Autoencoder
    n_columns: int

    def spread(self, mesh: Mesh | None, micro_batches: int) -> None:
        """Told once, before :meth:`start`: the processes and the parts that a batch is cut into.

        Raises:
            ValueError: more than one of either, for an objective whose statistics are not pooled.
        """
        if micro_batches > 1 or (mesh is not None and mesh.world > 1):
            processes = 1 if mesh is None else mesh.world
            raise ValueError(
                f"micro_batches and the number of processes must be 1 for {type(self).__name__}, "
                f"whose loss is not made of parts; got {micro_batches} and {processes}"
            )

    def start(self, sample: Sample, generator: torch.Generator) -> None:  # noqa: B027
        """Prepare the module before the first step; draws come from the generator alone."""

    @abstractmethod
    def loss(self, x: Tensor, target: Tensor | None, step: Step) -> Loss:
        """The loss of raw rows ``[n, d_in]``; the target is None unless the run has targets."""

    def backward(self, x: Tensor, target: Tensor | None, step: Step, precision: Precision) -> Loss:
        """The loss of a batch, after its gradients have been added to the parameters.

        Args:
            x, target: raw rows of this process.
            precision: gives the context of a forward pass.
        """
        with precision():
            loss = self.loss(x, target, step)
        loss.total.backward()
        return loss

    def entropy(self, own: Tensor) -> Tensor:
        """H for the log, ``[]``, given the one of this process; a collective on several."""
        return own

    def look(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(reconstruction, ones in each column of this process) of raw rows, without gradient.

        The reconstruction is raw and of all features; None for a code that is not of bits.
        """
        return self.model.reconstruct(x), None

    def before_update(self) -> None:  # noqa: B027
        """Between the backward pass and the optimizer's step."""

    def after_update(  # noqa: B027
        self, x: Tensor, optimizer: torch.optim.Optimizer, step: int, generator: torch.Generator
    ) -> None:
        """After the optimizer's step; ``step`` is the number of steps done."""

    @property
    def finishes(self) -> bool:
        """Whether :meth:`finish` does anything: rows for it are drawn only then."""
        return True

    def finish(self, rows: Tensor) -> None:  # noqa: B027
        """After the last step, with all raw rows."""

    def state_dict(self) -> dict[str, Any]:
        """What the objective must know to go on exactly, beside the module: tensors and numbers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Go on from :meth:`state_dict`."""


@runtime_checkable
class Capturable(Protocol):
    """An objective whose step can be replayed: its loss reads tensors, and numbers that stay.

    What :meth:`Objective.loss` does is ``loss_given`` followed by ``count``.
    """

    def against_capture(self, dtype: torch.dtype) -> str | None:
        """Why a step with products of ``dtype`` cannot be replayed, or None."""

    def constants(self, number: int) -> tuple[float, ...]:
        """Numbers of the host in the loss of step ``number``; with others it is captured anew."""

    def given(self) -> tuple[Tensor, ...]:
        """Tensors beside the batch that the loss of the next step reads, always of one shape."""

    def loss_given(
        self,
        x: Tensor,
        target: Tensor | None,
        given: tuple[Tensor, ...],
        constants: tuple[float, ...],
    ) -> Loss:
        """The loss of raw rows, which changes nothing."""

    def count(self, loss: Loss, n_rows: int) -> None:
        """Remember a batch for later losses, the bank and the revival."""


# -- the Binary Autoencoder --------------------------------------------------------------------


@runtime_checkable
class BinaryTrainable(Protocol):
    """What :class:`BinaryObjective` asks of a module beside its four parameters."""

    def mse(self, out: BAEOutput, target: Tensor, *, total: int | None = None) -> Tensor:
        """See :meth:`bae_fast.BinaryAutoencoder.mse`."""

    def init_density_(self, x: Tensor, density: float) -> Any:
        """See :meth:`bae_fast.BinaryAutoencoder.init_density_`."""


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
        if self.bank is not None:
            self.bank.append_counts(torch.full_like(counts[0], n), counts, code)
        self._fired += counts
        self._seen += n

    # what a replayed step needs, see Capturable

    def against_capture(self, dtype: torch.dtype) -> str | None:
        model, config = self.model, self.config
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
        n = len(x) * (1 if mesh is None else mesh.data)
        parts = x.chunk(self.micro_batches)
        targets = parts if target is None else target.chunk(self.micro_batches)
        with precision():
            encoded = [model.encode_rows(part) for part in parts]
        counts = torch.stack([one.counts for one in encoded]).sum(0)
        if mesh is not None:
            mesh.sum_(counts, "data", "counts")
        n_rows = torch.full_like(counts[:1].sum(), n)

        past = None
        if self.bank is not None and len(self.bank):
            past = self.bank.statistics(words=a_c > 0)
        stats = CodeStatistics(n_rows, counts)
        if past is not None:
            stats = CodeStatistics(n_rows + past.n_rows, counts + past.counts)
        everywhere: CodeStatistics | None = None
        words = row_words = None
        if a_c:
            words = row_words = torch.cat([one.words for one in encoded])
            if mesh is not None:
                row_words, words = mesh.gather_words(words)
            everywhere = self._pairs(words, past)
            if self._features == 1:
                stats = everywhere
        self._counted = stats

        scale = 1.0 if past is None else 1 + past.n_rows.float() / n
        combine = mesh.sum_reconstructions if mesh is not None and mesh.feature > 1 else None
        mse, terms = torch.zeros((), device=x.device), torch.zeros((), device=x.device)
        found: dict[str, Tensor] = {}
        at = 0
        for part, goal, one in zip(parts, targets, encoded, strict=True):
            with precision():
                out = model(
                    part,
                    covariance=a_c > 0 and self._features == 1,
                    stats=stats,
                    multilinear=config.multilinear,
                    encoded=one,
                    combine=combine,
                )
                error = model.mse(out, goal, total=n)
                terms = a_e * out.entropy
                spread = out.covariance
                if self._features > 1 and everywhere is not None and row_words is not None:
                    spread = self._spread(part, one, row_words[at : at + len(part)], everywhere)
                if spread is not None:
                    terms = terms + a_c * spread
                terms = terms * scale
            (error + terms).backward()
            at += len(part)
            mse = mse + error.detach()
            found = {"entropy_bits": out.entropy.detach()}
            if spread is not None:
                found["covariance"] = spread.detach()
        if self.bank is not None:
            code = None
            if words is not None:
                columns = model.W_enc.shape[1] * self._features
                code = BinaryCode(words, columns, n_bits=model.config.n_bits, trusted=True)
            self.bank.append_counts(n_rows, counts, code)
        self._fired += counts
        self._seen += n
        return Loss(mse + terms.detach(), {"mse": mse, **found}, counts)

    def _pairs(self, words: Tensor, past: CodeStatistics | None) -> CodeStatistics:
        """Statistics of all rows counted in all columns, with the covariance."""
        if past is not None:
            words = torch.cat([past.require_words(), words])
        columns = self.model.W_enc.shape[1] * self._features
        code = BinaryCode(words, columns, n_bits=self.model.config.n_bits, trusted=True)
        return code.statistics(covariance=True, impl=self.model.impl)

    def _spread(
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
        recon, code = reconstruct(model, model.normalize(x.to(model.W_enc.dtype)), self.mesh)
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


# -- any other ---------------------------------------------------------------------------------


@runtime_checkable
class Trainable(Protocol):
    """An autoencoder that brings its own objective, such as those of :mod:`bae_fast.baselines`.

    It is also an :class:`bae_fast.autoencoder.Autoencoder`; whatever a step changes besides
    parameters lies in its buffers, so that runs resume exactly.
    """

    def training_loss(
        self, x: Tensor, target: Tensor | None, *, dead: Tensor, done: float
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """(loss ``[]``, its parts by name with ``mse``, rows in which each feature is on ``[F]``).

        Args:
            x, target: raw rows; the target is None unless the trainer has targets.
            dead: bool ``[F]``, features that were off for the last 200 steps.
            done: share of the steps done.
        """

    def before_update(self) -> None:
        """Between the backward pass and the optimizer's step."""

    def after_update(self) -> None:
        """After the optimizer's step, to put back what the parameters must satisfy."""

    def finish(self, x: Tensor) -> None:
        """After the last step, with all raw rows."""


class SparseObjective(Objective):
    """The objective that a :class:`Trainable` brings along."""

    def __init__(self, model: Autoencoder, config: LoopConfig) -> None:
        """Wrap a module.

        Raises:
            TypeError: the module lacks a method of :class:`Trainable`.
        """
        if not isinstance(model, Trainable):
            wanted = ("training_loss", "before_update", "after_update", "finish")
            lacking = ", ".join(name for name in wanted if not hasattr(model, name))
            raise TypeError(
                f"model must have training_loss, before_update, after_update and finish for "
                f"{type(config).__name__}; got {type(model).__name__}, which lacks {lacking}"
            )
        self.model: Autoencoder = cast(Autoencoder, model)
        self.trainable: Trainable = model
        self.n_columns = self.model.d_sae
        self.pool: Pool | None = None

    def spread(self, mesh: Mesh | None, micro_batches: int) -> None:
        name = type(self.model).__name__
        if micro_batches > 1:
            raise ValueError(
                f"micro_batches must be 1 for {name}, whose loss needs the whole batch at once; "
                f"got {micro_batches}"
            )
        if mesh is None or mesh.world == 1:
            return
        if mesh.feature > 1:
            raise ValueError(
                f"feature must be 1 for {name}: only the features of a BinaryAutoencoder can be "
                f"divided among processes; got {mesh.feature}"
            )
        if not isinstance(self.model, Poolable):
            raise ValueError(
                f"data must be 1 for {name}, which has no method pooled (see "
                f"bae_fast.training.Poolable); got {mesh.data}"
            )
        self.pool = Pool(mesh)

    def backward(self, x: Tensor, target: Tensor | None, step: Step, precision: Precision) -> Loss:
        """As the loss of the rows of all processes: gradients are this one's part of it."""
        if self.pool is None:
            return super().backward(x, target, step, precision)
        pool = self.pool
        with cast(Poolable, self.trainable).pooled(pool), precision():
            total, parts, counts = self.trainable.training_loss(
                x, target, dead=step.dead, done=step.done
            )
        (total / pool.parts).backward()
        others = {name: value for name, value in parts.items() if name != "mse"}
        found = {"mse": parts["mse"] / pool.parts}  # the log adds the processes' up
        if others:
            means = pool.mean(torch.stack([v.double() for v in others.values()]), "parts")
            found |= dict(zip(others, means.unbind(), strict=True))
        n_rows = torch.full_like(counts[:1].sum(), len(x) * pool.parts)
        found["entropy_bits"] = entropy_bits(counts, n_rows)
        return Loss(total / pool.parts, found, counts)

    def loss(self, x: Tensor, target: Tensor | None, step: Step) -> Loss:
        total, parts, counts = self.trainable.training_loss(
            x, target, dead=step.dead, done=step.done
        )
        n_rows = torch.full_like(counts[:1].sum(), len(x))
        return Loss(total, {**parts, "entropy_bits": entropy_bits(counts, n_rows)}, counts)

    def before_update(self) -> None:
        self.trainable.before_update()

    def after_update(
        self, x: Tensor, optimizer: torch.optim.Optimizer, step: int, generator: torch.Generator
    ) -> None:
        self.trainable.after_update()

    def finish(self, rows: Tensor) -> None:
        self.trainable.finish(rows)
