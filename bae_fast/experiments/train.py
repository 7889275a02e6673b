"""Autoencoders trained on hidden states, several at once, on one process or many.

Under ``torchrun`` every process runs the same call; the first one writes the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from bae_fast.autoencoder import seeded
from bae_fast.distributed import TIMEOUT_SECONDS, Mesh
from bae_fast.experiments import runs
from bae_fast.experiments.data import check_one_source
from bae_fast.experiments.metric import error_metric
from bae_fast.experiments.reading import local_device
from bae_fast.experiments.supplies import SOURCES, RowsFrom, Source, rows_for
from bae_fast.experiments.training import Training, check, features_of, training_config
from bae_fast.files import check_writable, read_json, write_text
from bae_fast.model import BinaryAutoencoder
from bae_fast.pretrained import find_weights
from bae_fast.progress import Stages, say
from bae_fast.training import Job, JobTrainer, RunConfig, StoppedError
from bae_fast.training.checkpoints import checkpoints
from bae_fast.training.jobs import CHECKPOINTS, CONSTANTS

# rows that the normalisation is fitted to
_NORMALIZATION_ROWS = 65536

# options of a job beside those of training
_JOB_OPTIONS = ("hook",)


@dataclasses.dataclass(frozen=True)
class Config(runs.Overwriting, RowsFrom, Training):
    """Train autoencoders on hidden states, on one process or many, and go on where a run stopped.

    Attributes:
        jobs: A YAML file with a list of jobs, which are trained on the same batches. Each is a
            mapping with a name of its own, a hook, and any of the options of training, which
            overrule those of the command. Without it there is one job, called bae.
        load: The folder of a saved model that training starts from. Features start as they are in
            it; its sizes, its surrogate and its normalisation stay. A run that was stopped goes on
            with the same folder alone.
        data: The number of processes that rows are divided among.
        feature: The number of processes that features are divided among.
        streams: The number of streams that the order of the rows is made of; a run goes on with any
            number of processes along data that divides it.
        micro_batches: The number of parts that each process computes a batch in.
        shard_optimizer: The moments of Adam are divided among the processes along data, which saves
            memory, and each step sends the parameters.
        log_every: The number of steps between two lines of the log.
        checkpoint_every: The number of steps between two checkpoints; 0 writes one only when the
            run is stopped.
        keep: The number of checkpoints that stay, beside the best one.
        evaluate_every: The number of steps between two looks at the held-out rows; 0 never looks.
        patience: The number of looks without a better one after which a job stops; 0 stops none.
        trackers: Where the numbers of the log go beside the log itself, of tensorboard, wandb and
            trackio.
        peak_flops: The operations a second of all devices together that the MFU in the log is a
            share of; 0 logs no MFU.
        timeout: The number of seconds that a process waits for the others.
        resume: Whether the run goes on from its last checkpoint; auto does where there is one,
            never begins anew.
        out: The folder of the run.
    """

    jobs: Path | None = None
    load: Path | None = None
    data: int = 1
    feature: int = 1
    streams: int = 8
    micro_batches: int = 1
    shard_optimizer: bool = False
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 2
    evaluate_every: int = 0
    patience: int = 0
    trackers: tuple[str, ...] = ()
    peak_flops: float = 0.0
    timeout: float = TIMEOUT_SECONDS
    resume: Literal["auto", "never"] = "auto"
    out: Path = Path("results/train")


def run(config: Config) -> runs.Result:
    """Train, or go on with, every job; write models, logs and checkpoints into ``config.out``.

    Raises:
        ValueError, OSError: naming the field or the file.
        RuntimeError: three updates in a row were not finite, or a process did not answer.
        InterruptedRunError: it was stopped by a signal; the same call goes on.
    """
    runs.check_one_of("resume", config.resume, ("auto", "never"))
    runs.check_at_least(config, 1, "data", "feature", "streams")
    runs.check_at_least(config, 0, "peak_flops", "timeout")
    for given in ("states", "cache"):
        if getattr(config, given) is not None:
            check_one_source(config, given)
    if config.load is not None:
        find_weights(config.load)  # before a language model is loaded for the rows
    settings = read_jobs(config)
    for one in settings.values():
        check(one)
        if config.load is not None:
            _check_loaded(one)
    run_config = RunConfig(
        out=config.out,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        keep=config.keep,
        evaluate_every=config.evaluate_every,
        patience=config.patience,
        micro_batches=config.micro_batches,
        shard_optimizer=config.shard_optimizer,
        trackers=tuple(config.trackers),
        peak_flops=config.peak_flops,
    )
    check_writable(config.out)
    if any(config.out.glob("*/cfg.json")):  # what a run leaves that has ended
        runs.check_kept(config)
    if config.resume == "auto":
        _check_same_start(config)
    order = {"seed": config.seed, "streams": config.streams}
    hooks = [one.hook for one in settings.values()]
    writes = int(os.environ.get("RANK", "0")) == 0  # one process writes the files
    with (
        runs.alone(config.out) if writes else contextlib.nullcontext(),
        processes(config) as mesh,
        rows_for(config, hooks, mesh, order=order) as source,
    ):
        jobs = [_job(name, one, config, source) for name, one in settings.items()]
        trainer = JobTrainer(jobs, source.supply, run_config, mesh=mesh)
        if not config.overwrite:
            _check_kept_jobs(config.out, trainer)
        if trainer.is_first:
            write_text(config.out / runs.RESOLVED, runs.resolved(config))
        if config.resume == "auto" and trainer.resume() and trainer.is_first:
            say(f"goes on from step {trainer.step:,}")
        try:
            lines = trainer.fit(progress=config.progress)
        except StoppedError as error:
            raise runs.InterruptedRunError(str(error)) from error
        finally:
            trainer.close()
        first = trainer.is_first
    rows = [
        f"{name}: " + ", ".join(
            f"{key} {line[key]:.4g}"
            for key in ("mse", "entropy_bits", "l0", "dead_share", "heldout_fvu")
            if key in line
        )
        for name, line in lines.items()
    ]  # fmt: skip
    values = {"steps": trainer.step, "jobs": lines}
    files = tuple(config.out / name / "cfg.json" for name in lines) if first else ()
    return runs.Result(values, "\n".join(rows) if first else "", files)


def read_jobs(config: Config) -> dict[str, Config]:
    """The configuration of every job, by its name.

    Raises:
        ConfigError: a file that is no list of mappings, a name that is missing or there twice, or
            an option that is none of a job's.
    """
    if config.jobs is None:
        return {"bae": config}
    import yaml

    try:
        listed = yaml.safe_load(config.jobs.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise runs.ConfigError("jobs", f"{config.jobs} cannot be read: {reason}") from error
    if not isinstance(listed, list) or not listed or not all(isinstance(j, dict) for j in listed):
        raise runs.ConfigError("jobs", f"{config.jobs} must hold a list of mappings")
    allowed = {field.name for field in dataclasses.fields(Training)}.union(_JOB_OPTIONS)
    found: dict[str, Config] = {}
    for job in listed:
        name = job.pop("name", None)
        if not isinstance(name, str) or not name or name in found:
            raise runs.ConfigError(
                "jobs", f"{config.jobs}: every job must have a name of its own; got {name!r}"
            )
        unknown = sorted(set(job) - allowed)
        if unknown:
            raise runs.ConfigError(
                "jobs",
                f"{config.jobs}: {name} has {', '.join(unknown)}, which is no option of a job",
            )
        values = {option: _number(value) for option, value in job.items()}
        several = sorted(
            option
            for option, value in values.items()
            if isinstance(value, (list, dict)) and option != "betas"
        )
        if several:
            raise runs.ConfigError(
                "jobs", f"{config.jobs}: {name} must give one value for {', '.join(several)}"
            )
        found[name] = dataclasses.replace(config, **values)
    return found


def _check_kept_jobs(out: Path, trainer: JobTrainer) -> None:
    """Refuse to replace a job that has ended by one of other constants: the file of jobs may have
    been changed under its name."""
    for name, learner in trainer.learners.items():
        kept = out / name / CONSTANTS
        if not ((out / name / "cfg.json").is_file() and kept.is_file()):
            continue
        before, here = read_json(kept), json.loads(json.dumps(learner.config.settings()))
        for key, value in here.items():
            if before.get(key, value) != value:
                raise runs.ConfigError(
                    "out",
                    "must be a folder without results of other settings, unless --overwrite is "
                    f"given; {out / name} has {key} {before[key]}, here {value}",
                )


def _check_same_start(config: Config) -> None:
    """Refuse to go on with a run that started from another model: its checkpoints would take the
    place of the one that is named."""
    if not (checkpoints(config.out / CHECKPOINTS) and (config.out / runs.RESOLVED).is_file()):
        return
    before, here = (
        None if load is None else load.resolve()
        for load in (resolved_config(config.out).load, config.load)
    )
    if before != here:
        raise runs.ConfigError(
            "load",
            f"must be {before or 'left out'}, as the run in {config.out} was started so and goes "
            f"on (--resume never begins anew); got {here or 'none'}",
        )


def _number(value: Any) -> Any:
    """A number as a command line reads it: YAML 1.1 takes 1e-3 for a text, as it has no point."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def _check_loaded(one: Config) -> None:
    """Refuse options of a job that a loaded model has decided already."""
    for name, unset in (("d_sae", None), ("metric", "none"), ("init", None)):
        value = getattr(one, name)
        if value not in (unset, "none"):
            raise runs.ConfigError(name, f"must be left out with load; got {value!r}")


@contextlib.contextmanager
def processes(config: Config) -> Iterator[Mesh | None]:
    """The processes that torchrun started, or None for this one alone.

    Raises:
        ConfigError: data x feature is another number than that of the processes.
    """
    import torch.distributed as dist

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config.data * config.feature != world:
        raise runs.ConfigError(
            "data",
            f"times feature must be the number of processes that torchrun starts, {world}; "
            f"got {config.data} x {config.feature}",
        )
    if world == 1:
        yield None
        return
    kind = torch.device(local_device(config)).type
    if kind == "cuda":
        torch.cuda.set_device(local_device(config))
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
            timeout=datetime.timedelta(seconds=config.timeout),
        )
    try:
        yield Mesh(config.data, config.feature, device_type=kind, timeout=config.timeout)
    finally:
        if ours:
            dist.destroy_process_group()


def _job(name: str, one: Config, config: Config, source: Source) -> Job:
    """A job with its module, the same on every process."""
    constants = training_config(one)
    hook = source.hooks[one.hook]
    width = source.supply.widths[hook]
    device = local_device(config)
    if config.load is not None:
        bae = BinaryAutoencoder.from_pretrained(config.load, device=device, impl=one.impl)
        if bae.d_in != width:
            raise runs.ConfigError("load", f"{config.load} has rows of {bae.d_in}; got {width}")
        constants = dataclasses.replace(constants, init="none")
        return Job(name, bae, constants, hook)
    with seeded(one.seed, device):
        bae = BinaryAutoencoder(
            width,
            features_of(one, width),
            preset=one.preset,
            impl=one.impl,
            metadata=source.metadata_of(one.hook),
            device=device,
        )
    rows = source.supply.sample(_NORMALIZATION_ROWS, one.seed).x[hook]
    stages = Stages(config.progress)
    bae.fit_normalization_(rows, metric=error_metric(one, rows, stages, None, len(rows) - 1))
    return Job(name, bae, constants, hook)


def resolved_config(folder: Path) -> Config:
    """The configuration that a run's folder was made with.

    Raises:
        FileNotFoundError, ValueError: no run in the folder, an empty file or one of another kind.
    """
    path = folder / runs.RESOLVED
    if not path.is_file():
        whole = folder.parent
        inside = (folder / "cfg.json").is_file() and (whole / runs.RESOLVED).is_file()
        hint = f"; it is a model of the run in {whole}" if inside else ""
        raise FileNotFoundError(f"{folder} holds no run: {path} does not exist{hint}")
    values: dict[str, Any] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not the configuration of a run: {error}") from error
    for line in lines:
        name, _, value = line.partition(": ")
        try:
            values[name] = json.loads(value)
            if name in ("states", "cache", "jobs", "load", "out") and values[name] is not None:
                values[name] = Path(values[name])
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not the configuration of a run: {line!r}") from error
    given = [name for name in SOURCES if values.get(name)]
    if len(given) != 1:
        got = " and ".join(given) or (f"{len(values)} others" if values else "an empty file")
        raise ValueError(
            f"{path} must hold the options of a run of bae-fast train, a line each, one of "
            f"{', '.join(SOURCES)} among them; got {got}"
        )
    fields = {field.name for field in dataclasses.fields(Config)}
    lists: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in fields
    }
    return Config(**lists)
