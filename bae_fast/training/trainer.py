"""The training loop: rows of hidden states in, a trained autoencoder out.

The loop (order of the rows, learning rate, precision, dead features, log, Ctrl-C, resume) serves
the Binary Autoencoder, whose objective is here, and every :class:`Trainable`, which brings its own.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from bae_fast.codes import BinaryCode
from bae_fast.devices import has_bfloat16
from bae_fast.model import BinaryAutoencoder
from bae_fast.progress import progress_bar
from bae_fast.statistics import entropy_bits
from bae_fast.training.bank import CodeBank
from bae_fast.training.recipe import (
    MAX_REFIT_FEATURES,
    START_ROWS,
    init_from_rows_,
    refit_decoder_,
    residual,
    revive_,
)

# steps without a one after which the log counts a column as dead
DEAD_WINDOW = 200


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Every constant of a training run.

    Attributes:
        steps: optimizer steps.
        batch_size: rows a step, N.
        lr, betas, eps: of Adam.
        decoder_lr_scale: the learning rate of W_dec is lr times this.
        decay_from: share of the steps after which the learning rate falls to zero as a cosine;
            1 keeps it constant.
        entropy_weight, covariance_weight: a_e and a_c; the loss is mse (mean over rows and
            dimensions, normalised units) + a_e H + a_c D.
        entropy_from: share of the steps before which a_e is zero (step schedule).
        init: "rows" (features start along rows of the data), "density" (random weights, bits on
            in ``density`` of the rows) or "none" (as the module is).
        density: share of ones at the start.
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
            the demo it lowers the FVU by 0.0003, after 200 by 0.015.
        precision: "bfloat16" (autocast), "float32", or "auto" (bfloat16 where it is native).
        seed: of the draws of rows, start and revival.
    """

    steps: int = 2000
    batch_size: int = 512
    lr: float = 4e-3
    betas: tuple[float, float] = (0.7, 0.9)
    eps: float = 1e-12
    decoder_lr_scale: float = 2.0
    decay_from: float = 0.2
    entropy_weight: float = 1.5e-4
    covariance_weight: float = 0.0
    entropy_from: float = 0.0
    init: str = "rows"
    density: float = 0.02
    decoder_norm: float = 1.44
    bank_batches: int = 32
    multilinear: bool = True
    revive_every: int = 50
    revive_until: float = 0.9
    dead_below: float = 3e-4
    revive_quantile: float = 0.99
    revive_decoder_scale: float = 0.3
    refit: bool = True
    precision: str = "auto"
    seed: int = 0

    def check_size(self, d_sae: int) -> None:
        """Raise ValueError where the refit cannot serve that many features."""
        if self.refit and d_sae > MAX_REFIT_FEATURES:
            raise ValueError(
                f"refit must be False for d_sae > {MAX_REFIT_FEATURES}, as it solves an F x F "
                f"system; got d_sae={d_sae}"
            )

    def __post_init__(self) -> None:
        integers = {"steps": 1, "batch_size": 1, "bank_batches": 0, "revive_every": 0, "seed": 0}
        for name, least in integers.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} must be an int; got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")
        bounds = {
            "entropy_weight": (0.0, math.inf),
            "covariance_weight": (0.0, math.inf),
            "lr": (0.0, math.inf),
            "eps": (0.0, math.inf),
            "decoder_lr_scale": (0.0, math.inf),
            "decoder_norm": (0.0, math.inf),
            "decay_from": (0.0, 1.0),
            "entropy_from": (0.0, 1.0),
            "density": (0.0, 1.0),
            "revive_until": (0.0, 1.0),
            "dead_below": (0.0, 1.0),
            "revive_quantile": (0.0, 1.0),
            "revive_decoder_scale": (0.0, math.inf),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and low <= value <= high and math.isfinite(value)):
                allowed = "not be negative" if high == math.inf else f"lie in [{low:g}, {high:g}]"
                raise ValueError(f"{name} must {allowed} and be finite; got {value!r}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive; got {self.lr}")
        if self.init not in ("rows", "density", "none"):
            raise ValueError(f"init must be rows, density or none; got {self.init!r}")
        if self.precision not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"precision must be auto, bfloat16 or float32; got {self.precision!r}")


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
class Trainable(Protocol):
    """An autoencoder that brings its own objective, such as those of :mod:`bae_fast.baselines`.

    It is also an ``nn.Module`` with ``W_enc [d_in, d_sae]``, ``W_dec`` and ``is_transcoder``;
    whatever a step changes besides parameters lies in its buffers, so that runs resume exactly.
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


# what only the Binary Autoencoder's objective has, and its value for other models
_BINARY_ONLY: dict[str, Any] = {
    "entropy_weight": 0.0,
    "covariance_weight": 0.0,
    "init": "none",
    "bank_batches": 0,
    "multilinear": False,
    "revive_every": 0,
    "refit": False,
}


class Trainer:
    """Trains a module on rows held in memory (or memory-mapped).

    Example::

        trainer = Trainer(bae, rows, TrainingConfig(steps=2000))
        trainer.fit(log=Path("run/log.jsonl"))

    The module's normalisation should be fitted first. :meth:`state_dict` and
    :meth:`load_state_dict` resume a run exactly: the same batches, the same optimizer state.
    """

    def __init__(
        self,
        bae: Any,
        rows: Tensor,
        config: TrainingConfig,
        *,
        targets: Tensor | None = None,
    ) -> None:
        """Prepare the start of the features, the optimizer and the order of the rows.

        Args:
            bae: a Binary Autoencoder, or a :class:`Trainable`.
            rows: raw hidden states ``[n, d_in]``, on any device; batches are moved to bae's.
            targets: of a transcoder, ``[n, d_out]``, row by row.

        Raises:
            TypeError: bae is neither.
            ValueError: rows of another width, fewer rows than a batch, targets that do not fit,
                or for a Trainable a constant that only the Binary Autoencoder's objective has.
        """
        self.own_objective = not isinstance(bae, BinaryAutoencoder)
        if self.own_objective:
            if not isinstance(bae, Trainable):
                raise TypeError(
                    f"bae must be a BinaryAutoencoder or a Trainable; got {type(bae).__name__}"
                )
            for name, value in _BINARY_ONLY.items():
                if getattr(config, name) != value:
                    raise ValueError(
                        f"{name} must be {value!r} for {type(bae).__name__}, which brings its own "
                        f"objective (bae_fast.baselines.TRAINING); got {getattr(config, name)!r}"
                    )
        if bae.is_transcoder != (targets is not None):
            raise ValueError(
                f"targets must {'be given' if bae.is_transcoder else 'be None'}: d_out decides"
            )
        if targets is not None and targets.shape != (len(rows), bae.config.d_out):
            raise ValueError(
                f"targets must have shape [{len(rows)}, {bae.config.d_out}]; "
                f"got {list(targets.shape)}"
            )
        if rows.dim() != 2 or rows.shape[1] != bae.config.d_in:
            raise ValueError(f"rows must have shape [n, {bae.config.d_in}]; got {list(rows.shape)}")
        if len(rows) < config.batch_size:
            raise ValueError(
                f"rows must hold at least one batch of {config.batch_size}; got {len(rows)}"
            )
        config.check_size(bae.config.d_sae)
        if config.covariance_weight and config.batch_size < 2:
            raise ValueError("batch_size must be at least 2 with a covariance_weight; got 1")
        self.bae, self.rows, self.targets, self.config = bae, rows, targets, config
        self.device = bae.W_enc.device
        self.step = 0
        self.generator = torch.Generator().manual_seed(config.seed)
        self._order = torch.empty(0, dtype=torch.int64)
        self._fired = torch.zeros(bae.W_enc.shape[1], dtype=torch.int64, device=self.device)
        self._seen = 0
        self._last_fired = torch.zeros_like(self._fired)
        self.bank = CodeBank(config.bank_batches) if config.bank_batches else None
        self.bfloat16 = config.precision == "bfloat16" or (
            config.precision == "auto"
            and has_bfloat16(self.device)
            and bae.W_enc.dtype == torch.float32
        )
        self._start()
        rest = [p for p in bae.parameters() if p is not bae.W_dec and p.requires_grad]
        self.optimizer = torch.optim.Adam(
            [
                {"params": rest, "scale": 1.0},
                {"params": [bae.W_dec], "scale": config.decoder_lr_scale},
            ],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=self.device.type in ("cpu", "cuda"),
        )

    def _start(self) -> None:
        config, bae = self.config, self.bae
        if config.init == "none":
            return
        n = max(START_ROWS, bae.config.d_sae)
        picked = torch.randperm(len(self.rows), generator=self.generator)[:n]
        rows = self.rows[picked].to(self.device, bae.W_enc.dtype)
        if config.init == "rows":
            init_from_rows_(
                bae,
                rows,
                config.density,
                decoder_norm=config.decoder_norm,
                generator=self.generator,
            )
        else:
            bae.init_density_(rows, config.density)

    # -- one step ------------------------------------------------------------------------------

    def learning_rate(self, step: int) -> float:
        """Constant, then a cosine to zero."""
        done, start = step / self.config.steps, self.config.decay_from
        if done < start:
            return self.config.lr
        return self.config.lr * 0.5 * (1 + math.cos(math.pi * (done - start) / (1 - start)))

    def _next_batch(self) -> tuple[Tensor, Tensor | None]:
        n = self.config.batch_size
        if len(self._order) < n:
            self._order = torch.randperm(len(self.rows), generator=self.generator)
        picked, self._order = self._order[:n], self._order[n:]
        return self._batch(self.rows[picked]), (
            None if self.targets is None else self._batch(self.targets[picked])
        )

    def _batch(self, rows: Tensor) -> Tensor:
        rows = rows.to(self.device)
        return rows if self.bfloat16 else rows.to(self.bae.W_enc.dtype)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of a forward pass: autocast where products are bfloat16."""
        if self.bfloat16:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def train_step(self) -> dict[str, Tensor]:
        """One optimizer step; returns the parts of its loss, entropy and L0 as device tensors."""
        config = self.config
        x, target = self._next_batch()
        lr = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        objective = self._own_loss if self.own_objective else self._binary_loss
        loss, result, counts = objective(x, target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.own_objective:
            self.bae.before_update()
        self.optimizer.step()
        if self.own_objective:
            self.bae.after_update()

        self._fired += counts
        self._seen += len(x)
        self.step += 1
        self._last_fired.masked_fill_(counts > 0, self.step)
        result = {name: value.detach() for name, value in result.items()}
        result["l0"] = counts.sum() / len(x)
        result["dead_share"] = self._dead(min(DEAD_WINDOW, self.step)).double().mean()
        if config.revive_every and self.step % config.revive_every == 0:
            self._revive(x)
        return result

    def _dead(self, window: int) -> Tensor:
        """Columns without a one in the last steps, bool ``[K]``."""
        return self.step - self._last_fired >= window

    def _own_loss(
        self, x: Tensor, target: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        with self.autocast():
            loss, parts, counts = self.bae.training_loss(
                x, target, dead=self._dead(DEAD_WINDOW), done=self.step / self.config.steps
            )
        n_rows = torch.full_like(counts[:1].sum(), len(x))
        return loss, {**parts, "entropy_bits": entropy_bits(counts, n_rows)}, counts

    def _binary_loss(
        self, x: Tensor, target: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        config, bae = self.config, self.bae
        a_e = config.entropy_weight if self.step >= config.entropy_from * config.steps else 0.0
        a_c = config.covariance_weight
        past = None
        if self.bank is not None and len(self.bank):
            past = self.bank.statistics(words=a_c > 0)
        with self.autocast():
            out = bae(x, covariance=a_c > 0, past=past, multilinear=config.multilinear)
            mse = bae.mse(out, x if target is None else target)
        terms = a_e * out.entropy
        if out.covariance is not None:
            terms = terms + a_c * out.covariance
        if past is not None:
            # a row's gradient is that of one among all rows counted; the batch stands for them
            terms = terms * (1 + past.n_rows / len(x))
        if self.bank is not None:
            self.bank.append(out.code)
        parts = {"mse": mse, "entropy_bits": out.entropy}
        if out.covariance is not None:
            parts["covariance"] = out.covariance
        return mse + terms, parts, out.code.counts()

    def _revive(self, x: Tensor) -> None:
        config, bae = self.config, self.bae
        if self.step < config.revive_until * config.steps and not bae.is_transcoder:
            fired = self._fired.unflatten(0, (-1, bae.config.n_bits)).sum(1)
            rows, error = residual(bae, x.to(bae.W_enc.dtype))
            revive_(
                bae,
                fired < config.dead_below * self._seen,
                rows,
                error,
                self.optimizer,
                quantile=config.revive_quantile,
                decoder_scale=config.revive_decoder_scale,
                generator=self.generator,
            )
        self._fired.zero_()
        self._seen = 0

    # -- the loop ------------------------------------------------------------------------------

    def fit(
        self,
        *,
        log: Path | None = None,
        log_every: int = 10,
        progress: bool = False,
        on_log: Callable[[dict[str, float]], None] | None = None,
    ) -> list[dict[str, float]]:
        """Run the remaining steps, then the refit.

        Args:
            log: JSONL file to append a line to every ``log_every`` steps (and at the last).
            progress: show a progress bar, see :func:`bae_fast.progress.progress_bar`.
            on_log: called with each line.

        Returns:
            The lines: step, lr, seconds, mse, entropy_bits (pooled over the bank), l0,
            dead_share (no one in the last 200 steps).

        Raises:
            KeyboardInterrupt: Ctrl-C; in the main thread it waits for the end of the step (or
                refit) in hand, so that the module and :meth:`state_dict` are whole. A second one
                does not wait.
            RuntimeError: the loss is not finite any more.
        """
        lines: list[dict[str, float]] = []
        start = time.perf_counter()
        self.bae.train()
        try:
            with progress_bar(
                self.config.steps, what="train", unit="step", initial=self.step, show=progress
            ) as bar:
                while self.step < self.config.steps:
                    lr = self.learning_rate(self.step)
                    with _whole():
                        result = self.train_step()
                    bar.update(1)
                    if self.step % log_every and self.step != self.config.steps:
                        continue
                    seconds = time.perf_counter() - start
                    line: dict[str, float] = {"step": self.step, "lr": lr, "seconds": seconds}
                    line.update({name: float(value) for name, value in result.items()})
                    if not math.isfinite(line["mse"]):
                        raise RuntimeError(
                            f"mse is {line['mse']} at step {self.step}: rows hold NaN or Inf, or "
                            "lr is too high"
                        )
                    lines.append(line)
                    bar.set_postfix(mse=f"{line['mse']:.4f}", bits=f"{line['entropy_bits']:.0f}")
                    if log is not None:
                        log.parent.mkdir(parents=True, exist_ok=True)
                        with log.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(line) + "\n")
                    if on_log is not None:
                        on_log(line)
            with _whole():
                if self.own_objective:
                    self.bae.finish(self.rows)
                elif self.config.refit and not self.bae.is_transcoder:
                    refit_decoder_(self.bae, self.rows)
        finally:
            self.bae.eval()
        return lines

    # -- resume --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly, but the rows and the configuration; a copy."""
        live = {
            "bae": self.bae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "generator": self.generator.get_state(),
            "order": self._order,
            "fired": self._fired,
            "seen": self._seen,
            "last_fired": self._last_fired,
            "bank": [] if self.bank is None else [code.words for code in self.bank.codes],
        }
        return copy.deepcopy(live)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict` of a trainer with the same rows and configuration."""
        self.bae.load_state_dict(state["bae"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self._seen = state["step"], state["seen"]
        self.generator.set_state(state["generator"])
        self._order = state["order"].clone()
        self._fired = state["fired"].clone()
        self._last_fired = state["last_fired"].clone()
        if self.bank is not None:
            self.bank = CodeBank(self.config.bank_batches)
            n_columns, n_bits = self.bae.W_enc.shape[1], self.bae.config.n_bits
            for words in state["bank"]:
                self.bank.append(BinaryCode(words, n_columns, n_bits=n_bits))


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Hold back one Ctrl-C until the block is done; the second goes through."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if not callable(before):  # ignored, or not Python's
        yield
        return
    held: list[tuple[int, Any]] = []

    def hold(number: int, frame: Any) -> None:
        held.append((number, frame))
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        before(*held[0])
