"""The training loop: rows of hidden states in, a trained autoencoder out.

The loop owns the order of the rows, the learning rate, the precision, the count of dead features,
the log, interrupts and checkpoints. What is minimised comes from the configuration as an
:class:`bae_fast.training.Objective`.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor

from bae_fast.arguments import check_int
from bae_fast.autoencoder import Autoencoder
from bae_fast.files import append_text, read_torch, write_torch
from bae_fast.normalization import check_rows
from bae_fast.progress import progress_bar
from bae_fast.spacing import evenly
from bae_fast.training.graph import CudaGraphs, Graphs
from bae_fast.training.learner import (
    Config,
    Learner,
    check_finite,
    check_same_run,
    learning,
)
from bae_fast.training.log import Failures, append_line, drop_later_lines
from bae_fast.training.signals import first_signals
from bae_fast.training.supply import MemorySupply, Rows


class Trainer(Generic[Config]):
    """Trains a module on rows held in memory (or memory-mapped).

    Example::

        trainer = Trainer(bae, rows, TrainingConfig(steps=2000))
        trainer.fit(log="run/log.jsonl")

    The module's normalisation should be fitted first. :meth:`state_dict` and
    :meth:`load_state_dict` (or :meth:`save` and :meth:`load`, with a file) resume a run exactly:
    the same batches, the same optimizer state. Several modules from one supply of rows, or several
    processes, are a :class:`bae_fast.training.JobTrainer`'s.

    Gradients are switched on inside, whatever the caller's setting. A module of float16 or
    bfloat16 parameters is trained as a float32 copy, whose rounded values the module gets after
    every step: steps of Adam would be lost in the rounding of half precision.

    Attributes:
        model: the caller's module.
        learner: what trains it.
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
        graphs: Graphs | None = None,
    ) -> None:
        """Prepare the start of the features, the optimizer and the order of the rows.

        Args:
            model: what the configuration's objective can train: a Binary Autoencoder for a
                :class:`TrainingConfig`, a :class:`Trainable` for a :class:`SparseConfig`.
            rows: raw hidden states ``[n, d_in]``, floating point and finite, on any device;
                batches are moved to the module's.
            targets: for a transcoder, its targets ``[n, d_out]``, row by row.
            graphs: how a step is captured where ``config.cuda_graph`` asks for it; None: by CUDA
                graphs.

        Raises:
            TypeError: a module that the objective cannot train, or rows that are no tensor of
                floats.
            ValueError: rows of another width, fewer rows than a batch, targets that do not fit,
                a module without a parameter to train, or a constant that does not fit the module.
        """
        self.learner = Learner(model, config, self._sample, graphs=graphs or CudaGraphs())
        self.model, self.config = model, self.learner.config
        if model.is_transcoder != (targets is not None):
            raise ValueError(
                f"targets must {'be given' if model.is_transcoder else 'be None'}: d_out decides"
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
        hooks = {"rows": self.rows}
        if self.targets is not None:
            hooks["targets"] = self.targets
        # one generator draws the order, the start and the revival, as runs have always had it
        self.supply = MemorySupply(hooks, generator=self.learner.generator)
        self._in_step = False
        self.learner.start()

    @property
    def objective(self) -> Any:
        """What is minimised."""
        return self.learner.objective

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Adam, over the parameters that are trained."""
        return self.learner.optimizer

    @property
    def step(self) -> int:
        """Steps done."""
        return self.learner.step

    @property
    def device(self) -> torch.device:
        """The module's."""
        return self.learner.device

    @property
    def bfloat16(self) -> bool:
        """Whether products are made in bfloat16."""
        return self.learner.bfloat16

    @property
    def generator(self) -> torch.Generator:
        """Of all draws."""
        return self.learner.generator

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        found = self.supply.sample(n, generator)
        check_finite("rows", found.x["rows"], found.ids)
        return found.x["rows"]

    # -- one step ------------------------------------------------------------------------------

    def learning_rate(self, step: int) -> float:
        """See :meth:`Learner.learning_rate`."""
        return self.learner.learning_rate(step)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of a forward pass: autocast where products are bfloat16."""
        return self.learner.autocast()

    def _next_batch(self) -> tuple[Tensor, Tensor | None]:
        batch = self.supply.next(self.config.batch_size)
        return self._input(batch, "rows"), (
            None if self.targets is None else self._input(batch, "targets")
        )

    def _input(self, batch: Rows, name: str) -> Tensor:
        rows = batch.x[name]
        if rows.device.type == "cpu":  # elsewhere it would wait for the device: mse tells later
            check_finite(name, rows, batch.ids)
        return self.learner.as_input(rows)

    def train_step(self) -> dict[str, Tensor]:
        """One optimizer step; returns the parts of its loss, entropy and L0 as device tensors.

        Raises:
            ValueError: a row of the batch holds NaN or Inf.
        """
        with learning():
            x, target = self._next_batch()
            self._in_step = True
            loss = self.learner.make(x, target)
            self._in_step = False
            return self.learner.result(loss, len(x))

    # -- the loop ------------------------------------------------------------------------------

    def fit(
        self,
        *,
        log: str | os.PathLike[str] | None = None,
        log_every: int = 10,
        progress: bool = False,
        on_log: Callable[[dict[str, float]], None] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 0,
    ) -> list[dict[str, float]]:
        """Run the remaining steps, then what the objective does at the end (the refit).

        Args:
            log: JSONL file to append a line to every ``log_every`` steps (and at the last). Lines
                of later steps than this run has done are dropped first where it was resumed. A line
                that cannot be written is said once on standard error, and the run goes on.
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
                does not wait. The same holds for SIGTERM, SIGHUP and the other signals of
                :data:`bae_fast.starting.SIGNALS`, where the caller has given them a handler that
                raises.
            ValueError: a row holds NaN or Inf.
            OSError: the log cannot be opened, or a checkpoint cannot be written.
            RuntimeError: the loss or a parameter is not finite any more. A checkpoint is of finite
                parameters alone.
        """
        check_int("log_every", log_every, 1)
        check_int("checkpoint_every", checkpoint_every, 0)
        lines: list[dict[str, float]] = []
        start = time.perf_counter()
        path = None if log is None else Path(log)
        failures = Failures()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if self.step:
                drop_later_lines(path, self.step)
            append_text(path, "")  # a log that cannot be opened ends the run here
        self.learner.train(True)
        try:
            with progress_bar(
                self.config.steps, what="train", unit="step", initial=self.step, show=progress
            ) as bar:
                while self.step < self.config.steps:
                    lr = self.learning_rate(self.step)
                    # The step and its line are one: a state saved between the two would leave a
                    # gap in the log of the run that goes on from it.
                    with _whole():
                        result = self.train_step()
                        bar.update(1)
                        if self.step % log_every == 0 or self.step == self.config.steps:
                            line = self._line(result, lr, time.perf_counter() - start)
                            lines.append(line)
                            bar.set_postfix(
                                mse=f"{line['mse']:.4f}", bits=f"{line['entropy_bits']:.0f}"
                            )
                            if path is not None:
                                with failures.going_on("the log", OSError):
                                    append_line(path, line)
                            if on_log is not None:
                                on_log(line)
                    if checkpoint and checkpoint_every and self.step % checkpoint_every == 0:
                        with _whole():
                            self._check_parameters()
                            self.save(checkpoint)
            self._check_parameters()
            with _whole(), learning():
                self.objective.finish(evenly(self.rows))
                self.learner.publish()
        except (KeyboardInterrupt, SystemExit):
            if checkpoint is not None and not self._in_step and self.learner.is_finite():
                with _whole():
                    self.save(checkpoint)
            raise
        finally:
            self.learner.train(False)
        return lines

    def _line(self, result: dict[str, Tensor], lr: float, seconds: float) -> dict[str, float]:
        """What the log says of the step that was just done.

        Raises:
            RuntimeError: its loss is not finite.
        """
        line: dict[str, float] = {"step": self.step, "lr": lr, "seconds": seconds}
        line.update({name: float(value) for name, value in result.items()})
        if not math.isfinite(line["mse"]):
            raise RuntimeError(
                f"mse is {line['mse']} at step {self.step}: rows hold NaN or Inf, or lr is too high"
            )
        return line

    def _check_parameters(self) -> None:
        """Refuse to go on, and to replace a good checkpoint, after a step that has diverged.

        The loss of that step was still finite, as it is of the parameters before.
        """
        if not self.learner.is_finite():
            raise RuntimeError(
                f"parameters hold NaN or Inf after step {self.step}: lr is too high; a "
                "checkpoint of an earlier step is as it was"
            )

    # -- resume --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly, but the rows; a copy.

        It carries what it belongs to: the constants, the module's sizes, and a digest of at most
        64 MiB of rows.
        """
        live = self.learner.live_state()
        live["order"] = self.supply.state_dict()["streams"][0]["order"]
        live["belongs_to"] = self._belongs_to()
        return copy.deepcopy(live)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict` of a trainer with the same rows and configuration.

        Raises:
            ValueError: the state of a run with other constants, another module or other rows, or
                one that lacks a part; nothing is changed then. A constant that the state is too old
                to hold is taken to be the run's, with a warning.
        """
        lacking = sorted(
            {"model", "optimizer", "objective", "step", "generator", "order", "last_fired",
             "belongs_to"} - set(state)
        )  # fmt: skip
        if lacking:
            raise ValueError(
                f"state must be what state_dict of a Trainer gave; it lacks {', '.join(lacking)}"
            )
        check_same_run(
            "state",
            "module, constants and rows",
            state["belongs_to"],
            self._belongs_to(),
            always=("module", "parameters", *self.supply.identity()),
        )
        self.learner.load_state(state)
        stream = {"order": state["order"], "generator": state["generator"]}
        self.supply.load_state_dict({**self.supply.state_dict(), "streams": {0: stream}})
        self._in_step = False

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write :meth:`state_dict` into a file, whole or not at all."""
        return write_torch(path, self.state_dict())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from a file of :meth:`save`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file of another kind, or see :meth:`load_state_dict`.
        """
        state = read_torch(path, "checkpoint", own=True)
        if not isinstance(state, dict):
            raise ValueError(f"{path} must hold a checkpoint; got {type(state).__name__}")
        self.load_state_dict(state)

    def _belongs_to(self) -> dict[str, Any]:
        """What a state fits: constants, module and rows."""
        return {**self.learner.identity(), **self.supply.identity()}


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Hold back one interrupt of each kind until the block is done; a second goes through."""
    held: list[tuple[int, Any]] = []
    # a signal that is ignored, or that ends the process at once, is not ours to hold
    with first_signals(
        lambda _number, handler: callable(handler),
        lambda number, frame: held.append((number, frame)),
    ) as before:
        yield
    for number, frame in held:
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)
