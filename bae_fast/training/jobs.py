"""Several modules trained on the same batches, by one process or many, with checkpoints.

Each job learns as it would alone: the batches come from the supply, whose order knows nothing of
the jobs, and every job has a generator, an optimizer and a log of its own.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bae_fast.autoencoder import Autoencoder
from bae_fast.distributed import Mesh
from bae_fast.files import append_text, write_json
from bae_fast.model import BinaryAutoencoder
from bae_fast.progress import progress_bar
from bae_fast.starting import SIGNALS
from bae_fast.training.binary import BinaryTrainable
from bae_fast.training.checkpoints import Checkpoints
from bae_fast.training.config import LoopConfig, check_integers
from bae_fast.training.feature_shards import gather_features, shard_features
from bae_fast.training.graph import CudaGraphs, Graphs
from bae_fast.training.learner import Learner, check_same_run, learning
from bae_fast.training.log import Failures, append_line, drop_later_lines
from bae_fast.training.objective import Loss
from bae_fast.training.signals import first_signals
from bae_fast.training.supply import Closing, Rows, Supply, merge_states
from bae_fast.training.trackers import TRACKERS, Tracker

# after so many steps, or saves, that failed one after the other the run ends
FAILURES = 3

# file of a job's constants; folder of a run's checkpoints, beside those of its jobs
CONSTANTS, CHECKPOINTS = "training.json", "checkpoints"

# floating-point operations a row, feature and dimension: encoder and decoder, forward and backward
OPERATIONS = 10


@dataclasses.dataclass(frozen=True)
class Job:
    """One module to be trained.

    Attributes:
        name: the name of its folder of results; no other job has it.
        module: what is trained, normalised already; on several processes the same on each.
        config: its constants.
        hook: which of the supply's hidden states are its rows.
        target_hook: which are the targets of a transcoder.
    """

    name: str
    module: Autoencoder
    config: LoopConfig
    hook: str
    target_hook: str | None = None


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How a run goes on, whatever its jobs learn.

    Attributes:
        out: folder of logs, checkpoints and results, a path of any kind; None: nothing is written.
        log_every: steps between two lines of the logs.
        checkpoint_every: steps between two checkpoints; 0: only when the run is stopped.
        keep: checkpoints that stay, beside the best.
        evaluate_every: steps between two looks at the held-out rows; 0: none.
        patience: looks without a better one after which a job stops; 0: none stops early. What is
            compared is the held-out FVU, plus a_e times the entropy in bits.
        micro_batches: parts that each process computes its batch in; rows are encoded once, and
            the statistics are those of the whole batch.
        shard_optimizer: divide Adam's moments among the processes along "data": 8 bytes a
            parameter become 8 / R_d, and each step sends the parameters.
        refit_rows: rows drawn for what an objective does at the end.
        trackers: any of "tensorboard", "wandb" and "trackio".
        peak_flops: operations a second that the MFU in the log is a share of, for all processes
            together; 0: no MFU in the log.

    Raises:
        ValueError: a constant of another type or out of its range, an unknown tracker, or
            checkpoints and trackers without a folder.
    """

    out: Path | None = None
    log_every: int = 10
    checkpoint_every: int = 0
    keep: int = 2
    evaluate_every: int = 0
    patience: int = 0
    micro_batches: int = 1
    shard_optimizer: bool = False
    refit_rows: int = 131072
    trackers: tuple[str, ...] = ()
    peak_flops: float = 0.0

    def __post_init__(self) -> None:
        if self.out is not None:
            object.__setattr__(self, "out", Path(self.out))
        check_integers(
            self,
            {"log_every": 1, "checkpoint_every": 0, "keep": 1, "evaluate_every": 0,
             "patience": 0, "micro_batches": 1, "refit_rows": 1},
        )  # fmt: skip
        unknown = [name for name in self.trackers if name not in TRACKERS]
        if unknown:
            raise ValueError(f"trackers must be of {', '.join(TRACKERS)}; got {', '.join(unknown)}")
        if self.patience and not self.evaluate_every:
            raise ValueError("evaluate_every must be at least 1 with a patience; got 0")
        if self.out is None and (self.checkpoint_every or self.trackers):
            raise ValueError("out must be a folder for checkpoints and trackers; got None")


class StoppedError(KeyboardInterrupt):
    """The run was stopped by a signal, on this process or on another, and can go on.

    Attributes:
        signal: its number.
    """

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.signal = number


def _is_ours(number: signal.Signals, handler: Any) -> bool:
    """Whether a signal ends a run: not where it is ignored, or a batch library waits for it."""
    if number in (signal.SIGINT, signal.SIGTERM):
        return bool(handler != signal.SIG_IGN)
    ours = str(getattr(handler, "__module__", "")).startswith("bae_fast.")
    return bool(handler == signal.SIG_DFL) or ours


class _Part:
    """A job at work."""

    def __init__(self, job: Job, learner: Learner[Any]) -> None:
        self.name, self.hook, self.target_hook = job.name, job.hook, job.target_hook
        self.learner = learner
        self.skipped = 0  # steps one after the other
        self.best, self.looks, self.stopped = math.inf, 0, False
        self.line: dict[str, float] = {}

    def state(self) -> dict[str, Any]:
        return {
            "learner": self.learner.live_state(),
            "skipped": self.skipped,
            "best": None if math.isinf(self.best) else self.best,
            "looks": self.looks,
            "stopped": self.stopped,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.learner.load_state(state["learner"])
        self.skipped, self.looks, self.stopped = state["skipped"], state["looks"], state["stopped"]
        self.best = math.inf if state["best"] is None else state["best"]


class JobTrainer(Closing):
    """Trains jobs on the batches of a supply.

    Example::

        jobs = [Job("a", bae_a, config, hook="rows"), Job("b", bae_b, config, hook="rows")]
        trainer = JobTrainer(jobs, MemorySupply(rows), RunConfig(out=Path("runs/x")))
        trainer.resume()
        trainer.fit()

    Results lie in ``out/<job>``: ``cfg.json``, ``sae_weights.safetensors``, ``log.jsonl`` and
    ``training.json``, the constants as they hold for the job's sizes.

    A batch whose gradients are not finite changes nothing, on no process: its rows are named in the
    log, and three such steps in a row end the run.

    Attributes:
        step: steps done.
        skipped: (step, job, ids of rows that are not finite) of updates that were left out.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        supply: Supply,
        run: RunConfig | None = None,
        *,
        mesh: Mesh | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        """Start every job's features.

        Args:
            jobs: at least one; all of one batch size and number of steps.
            supply: gives their rows; on several processes, this rank's share along "data".
            run: see :class:`RunConfig`.
            mesh: the processes; None: this one alone.
            graphs: how forward and backward of a job are captured where its ``cuda_graph`` asks for
                it; None: by CUDA graphs.

        Raises:
            TypeError, ValueError: a job that its objective cannot train or that differs from the
                others in steps or batch size, a hook that the supply lacks, or a supply for
                another number of processes.
        """
        self.run, self.supply, self.mesh = run or RunConfig(), supply, mesh
        self._graphs = graphs or CudaGraphs()
        self.step = 0
        self.skipped: list[tuple[int, str, list[int]]] = []
        self._received: list[int] = []
        self._stop: signal.Signals | None = None
        self._save_failures = 0
        self._best = math.inf
        _check_jobs(jobs, supply)
        if mesh is not None and (supply.rank, supply.world) != (mesh.data_rank, mesh.data):
            raise ValueError(
                f"supply must be for rank {mesh.data_rank} of {mesh.data} along data; got rank "
                f"{supply.rank} of {supply.world}"
            )
        self.steps, self.batch_size = jobs[0].config.steps, jobs[0].config.batch_size
        self._parts: list[_Part] = []
        for job in jobs:
            self._parts.append(self._begin(job))
        self._store: Checkpoints | None = None
        if self.run.out is not None:
            self._store = Checkpoints(
                self.run.out / CHECKPOINTS, keep=self.run.keep, mesh=self.mesh
            )
        self._trackers: dict[str, Tracker] = {}
        self._failures = Failures()

    def _begin(self, job: Job) -> _Part:
        module = job.module
        if self.mesh is not None and isinstance(module, BinaryTrainable):
            module = shard_features(cast(BinaryAutoencoder, module), self.mesh)

        def draw(n: int, generator: torch.Generator) -> Tensor:
            rows = self.supply.sample(n, generator)
            return _finite(rows.x[job.hook])

        learner = Learner(
            module,
            job.config,
            draw,
            mesh=self.mesh,
            micro_batches=self.run.micro_batches,
            graphs=self._graphs,
            capture_update=False,  # whether gradients are finite is known to the host before it
            shard_optimizer=self.run.shard_optimizer,
        )
        learner.start()
        return _Part(job, learner)

    @property
    def learners(self) -> dict[str, Learner[Any]]:
        """What trains each job, by its name; on several processes, their features of this one."""
        return {part.name: part.learner for part in self._parts}

    @property
    def is_first(self) -> bool:
        """Whether this process writes the logs and results."""
        return self.mesh is None or self.mesh.is_first

    # -- one step ------------------------------------------------------------------------------

    def train_step(self) -> dict[str, dict[str, float]]:
        """One step of every job that still learns; what is logged of each, by name.

        Raises:
            RuntimeError: three updates of a job in a row whose gradients are not finite.
        """
        if self.mesh is not None:
            self.mesh.step = self.step + 1
        batch = self.supply.next(self.batch_size)
        active = [part for part in self._parts if not part.stopped]
        done: list[tuple[_Part, Tensor, Loss]] = []
        numbers: list[Tensor] = []
        with learning():
            for part in active:
                x = part.learner.as_input(batch.x[part.hook])
                target = None
                if part.target_hook is not None:
                    target = part.learner.as_input(batch.x[part.target_hook])
                loss = part.learner.backward(x, target)
                done.append((part, x, loss))
                numbers += part.learner.summary(loss)
            control = self._control(numbers)
            results = {}
            for (part, x, loss), (squares, mse, l0, dead) in zip(done, control, strict=True):
                if math.isfinite(squares):
                    part.learner.clip(squares)
                    part.learner.update(x, loss)
                    part.skipped = 0
                else:
                    self._skip(part, batch)
                found = {name: float(value.detach()) for name, value in loss.parts.items()}
                results[part.name] = {**found, "mse": mse, "l0": l0, "dead_share": dead}
        self.step += 1
        for part, _, loss in done:
            if (self.step % self.run.log_every == 0 or self.step == self.steps) and (
                "entropy_bits" in loss.parts
            ):
                entropy = part.learner.objective.entropy(loss.parts["entropy_bits"])
                results[part.name]["entropy_bits"] = float(entropy.detach())
        for part in active:
            if part.skipped >= FAILURES:
                raise RuntimeError(
                    f"the gradients of job {part.name} must be finite; got {part.skipped} steps in "
                    f"a row, up to {self.step}, whose rows hold NaN or Inf, or lr is too high"
                )
        return results

    def _control(self, numbers: list[Tensor]) -> list[list[float]]:
        """Sums over all processes of what each adds; whether one was stopped is among them."""
        flags = [float(number in self._received) for number in SIGNALS]
        # every process knows of failed saves what the first does, and so all end together
        flags.append(float(self._store.failures()) if self._store and self.is_first else 0.0)
        vector = torch.cat(
            [torch.stack([n.double().cpu() for n in numbers]), torch.tensor(flags).double()]
        )
        if self.mesh is not None:
            device = self.mesh.device_mesh.device_type
            vector = self.mesh.sum_(vector.to(device), "world", "control word").cpu()
        values = vector.tolist()
        values, came, failed = values[: -len(flags)], values[-len(flags) : -1], values[-1]
        self._stop = next((number for number, n in zip(SIGNALS, came, strict=True) if n), None)
        self._save_failures = int(failed)
        return [values[i : i + 4] for i in range(0, len(values), 4)]

    def _skip(self, part: _Part, batch: Rows) -> None:
        part.learner.skip()
        part.skipped += 1
        rows = batch.x[part.hook]
        bad = batch.ids[~rows.isfinite().all(1).cpu()].tolist()
        if self.mesh is not None:
            every = self.mesh.gather_objects(bad, "data", "rows that are not finite")
            bad = [one for some in every for one in some]
        self.skipped.append((self.step + 1, part.name, bad))
        self._write_line(part, {"step": self.step + 1, "skipped_rows": bad})

    # -- the loop ------------------------------------------------------------------------------

    def fit(self, *, progress: bool = False) -> dict[str, dict[str, float]]:
        """Run the remaining steps and write the results; the last line of every job's log.

        Raises:
            StoppedError: SIGTERM, SIGINT or another of :data:`bae_fast.starting.SIGNALS` came, to
                this process or another. All processes end after the same step, with a checkpoint
                where there is a folder. A second signal does not wait.
            RuntimeError: three updates in a row were not finite.
            OSError: a log cannot be opened, or three checkpoints in a row could not be written;
                the older ones stay. A line of a log that cannot be written later, and a tracker
                that fails, are said once on standard error, and the run goes on.
        """
        run = self.run
        self._open()
        self._received = []
        start = time.perf_counter()
        rows, last = 0, start
        try:
            with (
                first_signals(_is_ours, lambda number, _frame: self._received.append(number)),
                progress_bar(
                    self.steps,
                    what="train",
                    unit="step",
                    initial=self.step,
                    show=progress and self.is_first,
                ) as bar,
            ):
                while self.step < self.steps and not all(part.stopped for part in self._parts):
                    results = self.train_step()
                    rows += self.batch_size
                    bar.update(1)
                    if self.step % run.log_every == 0 or self.step == self.steps:
                        now = time.perf_counter()
                        self._log(results, rows / max(now - last, 1e-9), now - start)
                        rows, last = 0, now
                    better = False
                    if run.evaluate_every and self.step % run.evaluate_every == 0:
                        better = self._evaluate()
                    due = run.checkpoint_every and self.step % run.checkpoint_every == 0
                    if self._store is not None and (due or better or self._stop is not None):
                        self.save(best=better)
                    if self._save_failures >= FAILURES:
                        error = None if self._store is None else self._store.error
                        raise error or OSError(f"{FAILURES} checkpoints could not be written")
                    if self._stop is not None:
                        self._end_early(self._stop)
                self._finish()
        finally:
            self._train(False)
            for name, tracker in self._trackers.items():
                with self._failures.going_on(f"tracker {name}", Exception):
                    tracker.close()
            self._trackers = {}
            if self._store is not None:
                self._store.wait()
        return {part.name: part.line for part in self._parts}

    def _train(self, mode: bool) -> None:
        for part in self._parts:
            part.learner.train(mode)

    def _open(self) -> None:
        self._train(True)
        out = self.run.out
        if out is None or not self.is_first:
            return
        if self._store is not None:
            self._store.begin(self.step)
        for part in self._parts:
            (out / part.name).mkdir(parents=True, exist_ok=True)
            write_json(out / part.name / CONSTANTS, part.learner.config.settings())
            if self.step:
                drop_later_lines(self._log_file(part), self.step)
            else:
                self._log_file(part).unlink(missing_ok=True)
            append_text(self._log_file(part), "")  # a log that cannot be opened ends the run here
        settings = {part.name: part.learner.config.settings() for part in self._parts}
        self._failures = Failures()
        self._trackers = {
            name: TRACKERS[name](out.name, out, settings) for name in self.run.trackers
        }

    def _log_file(self, part: _Part) -> Path:
        assert self.run.out is not None
        return self.run.out / part.name / "log.jsonl"

    def _write_line(self, part: _Part, line: dict[str, Any]) -> None:
        if self.run.out is not None and self.is_first:
            with self._failures.going_on("the log", OSError):
                append_line(self._log_file(part), line)

    def _log(self, results: dict[str, dict[str, float]], rate: float, seconds: float) -> None:
        active = [part for part in self._parts if part.name in results]
        features = 1 if self.mesh is None else self.mesh.feature
        for part in active:
            model = part.learner.model
            line: dict[str, float] = {
                "step": self.step,
                "lr": part.learner.learning_rate(self.step - 1),
                "seconds": seconds,
                **results[part.name],
                "rows_per_second": rate,
            }
            if self.run.peak_flops:
                columns = part.learner.objective.n_columns * features
                line["mfu"] = OPERATIONS * model.d_in * columns * rate / self.run.peak_flops
            if part.skipped:
                continue  # of a step that was left out
            part.line = {**part.line, **line}
            self._write_line(part, line)
            self._track(part, line)

    def _track(self, part: _Part, line: dict[str, float]) -> None:
        numbers = {f"{part.name}/{key}": value for key, value in line.items() if key != "step"}
        for name, tracker in self._trackers.items():
            with self._failures.going_on(f"tracker {name}", Exception):
                tracker.log(numbers, self.step)

    def _end_early(self, number: signal.Signals) -> None:
        text = f"stopped by {number.name} after step {self.step}"
        if self._store is not None:
            self._store.wait()
            if self._store.error is not None:
                text += f", and {self._store.error}"
            else:
                text += f"; the same call goes on from {self._store.path(self.step)}"
        raise StoppedError(text, number)

    # -- held-out rows and the end -------------------------------------------------------------

    @torch.no_grad()
    def _evaluate(self) -> bool:
        """Look at the held-out rows; whether the mean over jobs is the best so far."""
        self._train(False)
        scores = []
        for part in self._parts:
            if part.stopped:
                scores.append(part.best)
                continue
            blocks = (
                (rows.x[part.hook], None if part.target_hook is None else rows.x[part.target_hook])
                for rows in self.supply.heldout()
            )
            found = part.learner.heldout(blocks)
            self._write_line(part, {"step": self.step, **found})
            self._track(part, {"step": self.step, **found})
            part.line = {**part.line, **found}
            score = found["heldout_score"]
            scores.append(score)
            part.looks = 0 if score < part.best else part.looks + 1
            part.best = min(part.best, score)
            part.stopped = bool(self.run.patience) and part.looks >= self.run.patience
        self._train(True)
        score = sum(scores) / len(scores)
        better = score < self._best
        self._best = min(self._best, score)
        return better

    def _finish(self) -> None:
        """What the objectives do at the end, and the files."""
        self._check_parameters()
        for part in self._parts:
            if part.learner.objective.finishes:  # rows of a running model cost its passes
                with learning():
                    rows = self.supply.sample(self.run.refit_rows, part.learner.config.seed)
                    part.learner.objective.finish(_finite(rows.x[part.hook]))
                    part.learner.publish()
            model = self.whole(part.name)
            if self.run.out is not None and self.is_first:
                model.eval().save_pretrained(self.run.out / part.name)

    def _check_parameters(self) -> None:
        """On every process alike: no checkpoint or result of parameters that are not finite."""
        diverged = sum(not part.learner.is_finite() for part in self._parts)
        bad = torch.tensor([float(diverged)], dtype=torch.float64)
        if self.mesh is not None:
            device = self.mesh.device_mesh.device_type
            bad = self.mesh.sum_(bad.to(device), "world", "parameters that are not finite").cpu()
        if float(bad):
            raise RuntimeError(f"parameters hold NaN or Inf after step {self.step}: lr is too high")

    def whole(self, name: str) -> Any:
        """A job's module with all its features; a collective on several processes."""
        learner = self.learners[name]
        if self.mesh is None or self.mesh.feature == 1:
            return learner.model
        return gather_features(cast(BinaryAutoencoder, learner.model), self.mesh)

    # -- resume --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly, of this process's features; not copied."""
        supply = self.supply.state_dict()
        if self.mesh is not None and self.mesh.data > 1:
            supply = merge_states(self.mesh.gather_objects(supply, "data", "order of rows"))
        return {
            "identity": self._identity(),
            "step": self.step,
            "best": None if math.isinf(self._best) else self._best,
            "supply": supply,
            "jobs": {part.name: part.state() for part in self._parts},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, made by any number of processes.

        Raises:
            ValueError: the state of other jobs, constants or rows; nothing is changed then. A
                constant that the state is too old to hold is taken to be the run's, with a warning.
        """
        what, same = "the checkpoint", "jobs and constants"
        own, theirs = sorted(part.name for part in self._parts), sorted(state["jobs"])
        check_same_run(what, same, {"jobs": theirs}, {"jobs": own}, always=("jobs",))
        always = [f"{name}.{key}" for name in own for key in ("module", "hook", "columns")]
        check_same_run(what, same, state["identity"], self._identity(), always=always)
        for part in self._parts:
            _check_metric(part, state["jobs"][part.name]["learner"]["model"])
        self.supply.load_state_dict(state["supply"])
        for part in self._parts:
            part.load(state["jobs"][part.name])
        self.step = state["step"]
        self._best = math.inf if state["best"] is None else state["best"]

    def _identity(self) -> dict[str, Any]:
        """What a state fits: for every job, its constants and the sizes of its whole module."""
        features = 1 if self.mesh is None else self.mesh.feature
        found: dict[str, Any] = {}
        for part in self._parts:
            values = part.learner.identity()
            del values["parameters"]
            if part.target_hook is not None:
                values["target_hook"] = part.target_hook
            values |= {"hook": part.hook, "columns": part.learner.objective.n_columns * features}
            found |= {f"{part.name}.{name}": value for name, value in values.items()}
        return found

    def _dims(self, path: tuple[Any, ...]) -> tuple[int | None, int | None]:
        if path[0] != "jobs" or path[2] != "learner":
            return None, None
        return self.learners[path[1]].dims(tuple(map(str, path[3:])))

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint in the background; a collective.

        Raises:
            ValueError: the run has no folder.
        """
        if self._store is None:
            raise ValueError("out must be a folder for checkpoints; got None")
        self._check_parameters()
        self._store.save(self.state_dict(), self.step, self._dims, best=best)

    def resume(self, path: str | os.PathLike[str] | None = None) -> bool:
        """Go on from a checkpoint, or from the last whole one where there is any.

        Returns:
            Whether there was one.

        Raises:
            FileNotFoundError, ValueError: a checkpoint that is not whole, or of another run.
        """
        if self._store is None:
            raise ValueError("out must be a folder for checkpoints; got None")
        found = self._store.latest() if path is None else Path(path)
        if found is None:
            return False
        self.load_state_dict(self._store.load(found, self._dims))
        return True

    def close(self) -> None:
        """Wait for the checkpoint in hand and close the supply."""
        if self._store is not None:
            self._store.close()
        self.supply.close()


def _finite(rows: Tensor) -> Tensor:
    """The rows that a step would not be left out for."""
    return rows[rows.isfinite().all(1)]


def _check_jobs(jobs: Sequence[Job], supply: Supply) -> None:
    if not jobs:
        raise ValueError("jobs must hold at least one job; got none")
    batch_size = jobs[0].config.batch_size
    if batch_size % supply.streams:  # the supply would say so too, of a number n, after the start
        raise ValueError(
            f"batch_size must be a multiple of the {supply.streams} streams of rows; "
            f"got {batch_size}"
        )
    names = [job.name for job in jobs]
    if len(set(names)) < len(names):
        raise ValueError(f"jobs must have names of their own; got {', '.join(names)}")
    for job in jobs:
        name = job.name
        if not name or Path(name).name != name or name in ("..", CHECKPOINTS) or "\0" in name:
            raise ValueError(
                f"the name of a job must be that of a folder beside {CHECKPOINTS!r}; got {name!r}"
            )
        for field in ("steps", "batch_size"):
            value, first = getattr(job.config, field), getattr(jobs[0].config, field)
            if value != first:
                raise ValueError(
                    f"{field} must be the same for all jobs; got {first} for {jobs[0].name} and "
                    f"{value} for {job.name}"
                )
        if job.module.is_transcoder != (job.target_hook is not None):
            raise ValueError(
                f"target_hook of job {job.name} must be given for a transcoder, and for no other "
                f"module; got {job.target_hook!r}"
            )
        for hook, width in ((job.hook, job.module.d_in), (job.target_hook, job.module.d_out)):
            if hook is not None and supply.widths.get(hook) != width:
                raise ValueError(
                    f"job {job.name} needs a hook {hook!r} of width {width}; the supply has "
                    f"{supply.widths}"
                )


def _check_metric(part: _Part, kept: Mapping[str, Tensor]) -> None:
    """Refuse a state whose errors are measured in other units, which no constant names."""
    own, theirs = part.learner.trained.state_dict().get("x_metric"), kept.get("x_metric")
    same = own is None and theirs is None
    if own is not None and theirs is not None and own.shape == theirs.shape:
        same = torch.allclose(own.double().cpu(), theirs.double().cpu(), rtol=1e-3)
    if not same:
        raise ValueError(f"the checkpoint must be of a run with the same metric of job {part.name}")
