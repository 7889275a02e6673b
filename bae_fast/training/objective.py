"""What a training run minimises, as objects: the Binary Autoencoder's objective, and any other.

The loop (:mod:`bae_fast.training.trainer`) owns the order of the rows, the optimizer and the log.
An objective owns the rest: how features start, the loss of a batch, what happens around an update,
what is done at the end, and the state all that needs. A further objective is a subclass of
:class:`Objective` and a configuration whose ``objective`` makes it; neither touches a file here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from bae_fast.autoencoder import Autoencoder
from bae_fast.codes import BinaryCode
from bae_fast.functional import BAEOutput
from bae_fast.model import BinaryAutoencoder
from bae_fast.statistics import entropy_bits
from bae_fast.training.bank import CodeBank
from bae_fast.training.config import LoopConfig, TrainingConfig
from bae_fast.training.recipe import (
    START_ROWS,
    init_from_rows_,
    refit_decoder_,
    residual,
    revive_,
)

# given n, that many raw rows drawn at random (all of them where there are fewer)
Sample = Callable[[int], Tensor]


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

    def start(self, sample: Sample, generator: torch.Generator) -> None:  # noqa: B027
        """Prepare the module before the first step; draws come from the generator alone."""

    @abstractmethod
    def loss(self, x: Tensor, target: Tensor | None, step: Step) -> Loss:
        """The loss of raw rows ``[n, d_in]``; the target is None unless the run has targets."""

    def before_update(self) -> None:  # noqa: B027
        """Between the backward pass and the optimizer's step."""

    def after_update(  # noqa: B027
        self, x: Tensor, optimizer: torch.optim.Optimizer, step: int, generator: torch.Generator
    ) -> None:
        """After the optimizer's step; ``step`` is the number of steps done."""

    def finish(self, rows: Tensor) -> None:  # noqa: B027
        """After the last step, with all raw rows."""

    def state_dict(self) -> dict[str, Any]:
        """What the objective must know to go on exactly, beside the module: tensors and numbers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Go on from :meth:`state_dict`."""


# -- the Binary Autoencoder --------------------------------------------------------------------


@runtime_checkable
class BinaryTrainable(Protocol):
    """What :class:`BinaryObjective` asks of a module beside its four parameters."""

    def mse(self, out: BAEOutput, target: Tensor) -> Tensor:
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
        if frozen and changed:
            raise ValueError(
                f"{frozen[0]} must require a gradient, or {' and '.join(changed)} be off, as "
                f"{'it changes' if len(changed) == 1 else 'they change'} parameters; "
                f"got requires_grad=False for {', '.join(frozen)}"
            )
        self.n_columns = self.model.W_enc.shape[1]
        self.bank = CodeBank(config.bank_batches) if config.bank_batches else None
        self._fired = torch.zeros(self.n_columns, dtype=torch.int64, device=self.model.W_enc.device)
        self._seen = 0

    def start(self, sample: Sample, generator: torch.Generator) -> None:
        config, model = self.config, self.model
        if config.init == "none":
            return
        rows = sample(max(START_ROWS, model.config.d_sae))
        rows = rows.to(model.W_enc.device, model.W_enc.dtype)
        if config.init == "rows":
            init_from_rows_(
                model,
                rows,
                config.density,
                decoder_norm=config.decoder_norm,
                generator=generator,
            )
        else:
            model.init_density_(rows, config.density)

    def loss(self, x: Tensor, target: Tensor | None, step: Step) -> Loss:
        config, model = self.config, self.model
        late = step.number >= config.entropy_from * config.steps
        a_e = config.entropy_weight if late else 0.0
        a_c = config.covariance_weight
        past = None
        if self.bank is not None and len(self.bank):
            past = self.bank.statistics(words=a_c > 0)
        out = model(x, covariance=a_c > 0, past=past, multilinear=config.multilinear)
        mse = model.mse(out, x if target is None else target)
        terms = a_e * out.entropy
        if out.covariance is not None:
            terms = terms + a_c * out.covariance
        if past is not None:
            # a row's gradient is that of one among all rows counted; the batch stands for them
            terms = terms * (1 + past.n_rows.float() / len(x))
        if self.bank is not None:
            self.bank.append(out.code)
        parts = {"mse": mse, "entropy_bits": out.entropy}
        if out.covariance is not None:
            parts["covariance"] = out.covariance
        counts = out.code.counts()
        self._fired += counts
        self._seen += len(x)
        return Loss(mse + terms, parts, counts)

    def after_update(
        self, x: Tensor, optimizer: torch.optim.Optimizer, step: int, generator: torch.Generator
    ) -> None:
        """Revive dead features where it is time."""
        config, model = self.config, self.model
        if not config.revive_every or step % config.revive_every:
            return
        if step < config.revive_until * config.steps and not model.is_transcoder:
            fired = self._fired.unflatten(0, (-1, model.config.n_bits)).sum(1)
            rows, error = residual(model, x.to(model.W_enc.dtype))
            revive_(
                model,
                fired < config.dead_below * self._seen,
                rows,
                error,
                optimizer,
                quantile=config.revive_quantile,
                decoder_scale=config.revive_decoder_scale,
                generator=generator,
            )
        self._fired.zero_()
        self._seen = 0

    def finish(self, rows: Tensor) -> None:
        """Refit the decoder."""
        if self.config.refit and not self.model.is_transcoder:
            refit_decoder_(self.model, rows)

    def state_dict(self) -> dict[str, Any]:
        codes = [] if self.bank is None else self.bank.codes
        return {
            "fired": self._fired,
            "seen": self._seen,
            "bank": [code.words for code in codes],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self._fired.device
        self._fired = state["fired"].to(device, copy=True)
        self._seen = state["seen"]
        if self.bank is not None:
            self.bank = CodeBank(self.config.bank_batches)
            for words in state["bank"]:
                code = BinaryCode(words.to(device), self.n_columns, n_bits=self.model.config.n_bits)
                self.bank.append(code)


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
