"""The training loop: rows of hidden states in, a trained autoencoder out.

The loop owns the order of the rows, the learning rate, the precision, the count of dead features,
the log, interrupts and checkpoints. What is minimised comes from the configuration as an
:class:`bae_fast.training.Objective`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from bae_fast.autoencoder import Autoencoder, check_rows
from bae_fast.devices import has_bfloat16
from bae_fast.files import replacing, write_text
from bae_fast.progress import progress_bar
from bae_fast.training.config import LoopConfig
from bae_fast.training.objective import Loss, Step
from bae_fast.training.supply import fingerprint

# steps without a one after which the log counts a column as dead
DEAD_WINDOW = 200

# signals that wait for the end of a step
_HELD = (signal.SIGINT, signal.SIGTERM)


Config = TypeVar("Config", bound=LoopConfig)


class Trainer(Generic[Config]):
    """Trains a module on rows held in memory (or memory-mapped).

    Example::

        trainer = Trainer(bae, rows, TrainingConfig(steps=2000))
        trainer.fit(log=Path("run/log.jsonl"))

    The module's normalisation should be fitted first. :meth:`state_dict` and
    :meth:`load_state_dict` (or :meth:`save` and :meth:`load`, with a file) resume a run exactly:
    the same batches, the same optimizer state.

    Gradients are switched on inside, whatever the caller's setting. A module of float16 or
    bfloat16 parameters is trained as a float32 copy, whose rounded values the module gets after
    every step: steps of Adam would be lost in the rounding of half precision.

    Attributes:
        model: the caller's module.
        objective: what is minimised, see :mod:`bae_fast.training.objective`.
        step: steps done.
    """

    def __init__(
        self,
        model: Autoencoder,
        rows: Tensor,
        config: Config,
        *,
        targets: Tensor | None = None,
    ) -> None:
        """Prepare the start of the features, the optimizer and the order of the rows.

        Args:
            model: what the configuration's objective can train: a Binary Autoencoder for a
                :class:`TrainingConfig`, a :class:`Trainable` for a :class:`SparseConfig`.
            rows: raw hidden states ``[n, d_in]``, floating point and finite, on any device;
                batches are moved to the module's.
            targets: of a transcoder, ``[n, d_out]``, row by row.

        Raises:
            TypeError: a module that the objective cannot train, or rows that are no tensor of
                floats.
            ValueError: rows of another width, fewer rows than a batch, targets that do not fit,
                a module without a parameter to train, or a constant that does not fit the module.
        """
        if not isinstance(config, LoopConfig):
            raise TypeError(
                f"config must be a TrainingConfig or a SparseConfig; got {type(config).__name__}"
            )
        with _learning():
            self.model, self.config = model, config
            narrow = any(p.element_size() < 4 for p in model.parameters())
            self._trained = copy.deepcopy(model).float() if narrow else model
            self.objective = config.objective(self._trained)
            _check_parameters(model)
            if model.is_transcoder != (targets is not None):
                raise ValueError(
                    f"targets must {'be given' if model.is_transcoder else 'be None'}: "
                    "d_out decides"
                )
            check_rows("rows", rows, model.d_in)
            if targets is not None:
                check_rows("targets", targets, model.d_out)
                if len(targets) != len(rows):
                    raise ValueError(
                        f"targets must have shape [{len(rows)}, {model.d_out}]; "
                        f"got {list(targets.shape)}"
                    )
            if len(rows) < config.batch_size:
                raise ValueError(
                    f"rows must hold at least one batch of {config.batch_size}; got {len(rows)}"
                )
            self.rows = rows.detach()
            self.targets = None if targets is None else targets.detach()
            first = next(self._trained.parameters())
            self.device, self._dtype = first.device, first.dtype
            self.step = 0
            self.generator = torch.Generator().manual_seed(config.seed)
            self._order = torch.empty(0, dtype=torch.int64)
            self._last_fired = torch.zeros(
                self.objective.n_columns, dtype=torch.int64, device=self.device
            )
            self._in_step = False
            self.bfloat16 = config.precision == "bfloat16" or (
                config.precision == "auto"
                and has_bfloat16(self.device)
                and self._dtype == torch.float32
            )
            self.objective.start(self._sample, self.generator)
            decoder = [p for n, p in self._trained.named_parameters() if n == "W_dec"]
            rest = [
                p for n, p in self._trained.named_parameters() if n != "W_dec" and p.requires_grad
            ]
            groups = [
                {"params": rest, "scale": 1.0},
                {"params": decoder, "scale": config.decoder_lr_scale},
            ]
            self.optimizer = torch.optim.Adam(
                [group for group in groups if group["params"]],
                lr=config.lr,
                betas=config.betas,
                eps=config.eps,
                fused=self.device.type in ("cpu", "cuda"),
            )
            self._publish()

    @property
    def bae(self) -> Any:
        """The caller's module, by the name it had when only Binary Autoencoders were trained."""
        return self.model

    def _sample(self, n: int) -> Tensor:
        picked = torch.randperm(len(self.rows), generator=self.generator)[:n]
        sample = self.rows[picked.to(self.rows.device)]
        _check_finite("rows", sample, picked)
        return sample

    @torch.no_grad()
    def _publish(self) -> None:
        """Give the caller's module the values of its float32 copy, where there is one."""
        if self._trained is not self.model:
            own = self.model.state_dict()
            for name, value in self._trained.state_dict().items():
                own[name].copy_(value)

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
        return self._batch("rows", self.rows, picked), (
            None if self.targets is None else self._batch("targets", self.targets, picked)
        )

    def _batch(self, name: str, rows: Tensor, picked: Tensor) -> Tensor:
        batch = rows[picked.to(rows.device)]
        if batch.device.type == "cpu":  # elsewhere it would wait for the device: mse tells later
            _check_finite(name, batch, picked)
        batch = batch.to(self.device)
        return batch if self.bfloat16 else batch.to(self._dtype)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of a forward pass: autocast where products are bfloat16."""
        if self.bfloat16:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def train_step(self) -> dict[str, Tensor]:
        """One optimizer step; returns the parts of its loss, entropy and L0 as device tensors.

        Raises:
            ValueError: a row of the batch holds NaN or Inf.
        """
        config = self.config
        with _learning():
            x, target = self._next_batch()
            self._in_step = True
            lr = self.learning_rate(self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            at = Step(self.step, self.step / config.steps, self._dead(DEAD_WINDOW))
            with self.autocast():
                loss: Loss = self.objective.loss(x, target, at)
            self.optimizer.zero_grad(set_to_none=True)
            loss.total.backward()
            self.objective.before_update()
            self.optimizer.step()
            self.step += 1
            self.objective.after_update(x, self.optimizer, self.step, self.generator)
            self._last_fired.masked_fill_(loss.counts > 0, self.step)
            self._publish()
            self._in_step = False
            result = {name: value.detach() for name, value in loss.parts.items()}
            result["l0"] = loss.counts.sum().float() / len(x)
            result["dead_share"] = self._dead(min(DEAD_WINDOW, self.step)).double().mean()
        return result

    def _dead(self, window: int) -> Tensor:
        """Columns without a one in the last steps, bool ``[K]``."""
        return self.step - self._last_fired >= window

    # -- the loop ------------------------------------------------------------------------------

    def fit(
        self,
        *,
        log: Path | None = None,
        log_every: int = 10,
        progress: bool = False,
        on_log: Callable[[dict[str, float]], None] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 0,
    ) -> list[dict[str, float]]:
        """Run the remaining steps, then what the objective does at the end (the refit).

        Args:
            log: JSONL file to append a line to every ``log_every`` steps (and at the last). Lines
                of later steps than this run has done are dropped first where it was resumed.
            progress: show a progress bar, see :func:`bae_fast.progress.progress_bar`.
            on_log: called with each line.
            checkpoint: file for :meth:`save`, written when the run is interrupted; remove it when
                the result is on disk.
            checkpoint_every: also write it every so many steps; 0: only when interrupted.

        Returns:
            The lines: step, lr, seconds, mse, entropy_bits (pooled over the bank), l0,
            dead_share (no one in the last 200 steps).

        Raises:
            KeyboardInterrupt: Ctrl-C; in the main thread it waits for the end of the step (or
                refit) in hand, so that the module and :meth:`state_dict` are whole. A second one
                does not wait. The same holds for SIGTERM, where the caller has given it a handler
                that raises.
            ValueError: a row holds NaN or Inf.
            RuntimeError: the loss is not finite any more.
        """
        if not isinstance(log_every, int) or log_every < 1:
            raise ValueError(f"log_every must be an int >= 1; got {log_every!r}")
        if not isinstance(checkpoint_every, int) or checkpoint_every < 0:
            raise ValueError(f"checkpoint_every must be an int >= 0; got {checkpoint_every!r}")
        lines: list[dict[str, float]] = []
        start = time.perf_counter()
        if log is not None and self.step:
            _drop_later_lines(log, self.step)
        self._train(True)
        try:
            with progress_bar(
                self.config.steps, what="train", unit="step", initial=self.step, show=progress
            ) as bar:
                while self.step < self.config.steps:
                    lr = self.learning_rate(self.step)
                    with _whole():
                        result = self.train_step()
                    bar.update(1)
                    if self.step % log_every == 0 or self.step == self.config.steps:
                        seconds = time.perf_counter() - start
                        line: dict[str, float] = {"step": self.step, "lr": lr, "seconds": seconds}
                        line.update({name: float(value) for name, value in result.items()})
                        if not math.isfinite(line["mse"]):
                            raise RuntimeError(
                                f"mse is {line['mse']} at step {self.step}: rows hold NaN or Inf, "
                                "or lr is too high"
                            )
                        lines.append(line)
                        bar.set_postfix(
                            mse=f"{line['mse']:.4f}", bits=f"{line['entropy_bits']:.0f}"
                        )
                        if log is not None:
                            log.parent.mkdir(parents=True, exist_ok=True)
                            with log.open("a", encoding="utf-8") as file:
                                file.write(json.dumps(line) + "\n")
                        if on_log is not None:
                            on_log(line)
                    if checkpoint and checkpoint_every and self.step % checkpoint_every == 0:
                        with _whole():
                            self.save(checkpoint)
            with _whole(), _learning():
                self.objective.finish(self.rows)
                self._publish()
        except (KeyboardInterrupt, SystemExit):
            if checkpoint is not None and not self._in_step:
                with _whole():
                    self.save(checkpoint)
            raise
        finally:
            self._train(False)
        return lines

    def _train(self, mode: bool) -> None:
        self.model.train(mode)
        self._trained.train(mode)

    # -- resume --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly, but the rows; a copy.

        It carries what it belongs to: the constants, the module's sizes, and a digest of at most
        64 MiB of rows.
        """
        live = {
            "model": self._trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.state_dict(),
            "step": self.step,
            "generator": self.generator.get_state(),
            "order": self._order,
            "last_fired": self._last_fired,
            "belongs_to": self._belongs_to(),
        }
        return copy.deepcopy(live)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict` of a trainer with the same rows and configuration.

        Raises:
            ValueError: the state of a run with other constants, another module or other rows, or
                one that lacks a part; nothing is changed then.
        """
        lacking = sorted(
            {"model", "optimizer", "objective", "step", "generator", "order", "last_fired",
             "belongs_to"} - set(state)
        )  # fmt: skip
        if lacking:
            raise ValueError(
                f"state must be what state_dict of a Trainer gave; it lacks {', '.join(lacking)}"
            )
        theirs, ours = state["belongs_to"], self._belongs_to()
        differing = [
            f"{name} {theirs.get(name)!r} (here {ours.get(name)!r})"
            for name in {**theirs, **ours}
            if theirs.get(name) != ours.get(name)
        ]
        if differing:
            raise ValueError(
                "state must be of a run with the same module, constants and rows; it is of one "
                f"with {', '.join(differing)}"
            )
        with _learning():
            self._trained.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.objective.load_state_dict(state["objective"])
            self.step = state["step"]
            self.generator.set_state(state["generator"].cpu())
            self._order = state["order"].cpu().clone()
            self._last_fired = state["last_fired"].to(self.device, copy=True)
            self._in_step = False
            self._publish()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write :meth:`state_dict` into a file, whole or not at all."""
        with replacing(path) as temporary:
            torch.save(self.state_dict(), temporary)
        return Path(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from a file of :meth:`save`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file of another kind, or see :meth:`load_state_dict`.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (
            RuntimeError, OSError, pickle.UnpicklingError, EOFError, ValueError, KeyError
        ) as error:  # fmt: skip
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path} is not a readable checkpoint: {reason}") from error
        if not isinstance(state, dict):
            raise ValueError(f"{path} must hold a checkpoint; got {type(state).__name__}")
        self.load_state_dict(state)

    def _belongs_to(self) -> dict[str, Any]:
        """What a state fits: constants, module and rows."""
        found: dict[str, Any] = {
            "module": type(self._trained).__name__,
            "parameters": {
                name: list(tensor.shape) for name, tensor in self._trained.state_dict().items()
            },
            **self.config.settings(),
            "rows": fingerprint(self.rows),
        }
        if self.targets is not None:
            found["targets"] = fingerprint(self.targets)
        return found


def _check_parameters(model: Autoencoder) -> None:
    parameters = dict(model.named_parameters())
    if any(p.is_inference() for p in parameters.values()):
        raise ValueError(
            "model must be made outside of torch.inference_mode(): its parameters cannot be "
            "trained; got inference tensors"
        )
    if not any(p.requires_grad for p in parameters.values()):
        raise ValueError(
            "model must have a parameter that requires a gradient (model.requires_grad_(True)); "
            f"got none of {len(parameters)}"
        )


def _check_finite(name: str, rows: Tensor, numbers: Tensor) -> None:
    """Refuse NaN and Inf; ``numbers`` are those of the rows among all."""
    finite = rows.isfinite().all(1)
    if not bool(finite.all()):
        row = int(numbers[int((~finite).int().argmax())])
        raise ValueError(f"{name} must be finite; got NaN or Inf in row {row}")


@contextlib.contextmanager
def _learning() -> Iterator[None]:
    """Gradients on and inference mode off, whatever the caller's setting."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _drop_later_lines(log: Path, step: int) -> None:
    """Keep the lines of a log up to a step: those after it are about to be written again."""
    if not log.is_file():
        return
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            known = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            continue  # cut off while it was written
        if known:
            kept.append(line + "\n")
    write_text(log, "".join(kept))


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Hold back one interrupt of each kind until the block is done; a second goes through."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # a signal that is ignored, or that ends the process at once, is not ours to hold
    before = {number: signal.getsignal(number) for number in _HELD}
    held: list[tuple[int, Any]] = []

    def hold(number: int, frame: Any) -> None:
        held.append((number, frame))
        signal.signal(number, before[signal.Signals(number)])

    ours = [kind for kind, handler in before.items() if callable(handler)]
    for kind in ours:
        signal.signal(kind, hold)
    try:
        yield
    finally:
        for kind in ours:
            signal.signal(kind, before[kind])
    for number, frame in held:
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)
