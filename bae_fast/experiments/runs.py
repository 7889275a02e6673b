"""What experiments share: their results, errors and interruptions, and runs that are kept."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bae_fast._version import __version__
from bae_fast.files import (
    UNFINISHED,
    check_place,
    locked,
    publishing,
    read_json,
    write_json,
    write_text,
)
from bae_fast.progress import say
from bae_fast.training import Trainer

CHECKPOINT, RESOLVED = "checkpoint.pt", "resolved.yaml"

# steps between two checkpoints of a training
CHECKPOINT_EVERY = 500


class ConfigError(ValueError):
    """A field of a configuration that is not allowed.

    Attributes:
        field: its name.
        text: the rest of the sentence.
    """

    def __init__(self, field: str, text: str) -> None:
        super().__init__(f"{field} {text}")
        self.field, self.text = field, text


@dataclasses.dataclass(frozen=True)
class Overwriting:
    """What a configuration has whose results take the place of those of the last run.

    Attributes:
        overwrite: What lies in the folder of other settings is replaced, results as well as a run
            that was stopped. Without this option it is refused; the same settings run again.
    """

    overwrite: bool = False


class InterruptedRunError(KeyboardInterrupt):
    """An interruption after which the same call goes on; its text says from where."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What an experiment found.

    Attributes:
        values: all of it, JSON values only.
        text: the report, Markdown or plain text.
        files: what was written, the most telling first.
    """

    values: dict[str, Any]
    text: str
    files: tuple[Path, ...]


def check_at_least(config: Any, least: int, *names: str) -> None:
    """Raise ConfigError where a field, or a number of a tuple of numbers, is below ``least``."""
    for name in names:
        value = getattr(config, name)
        numbers = value if isinstance(value, (list, tuple)) else (value,)
        if any(number < least for number in numbers):
            shown = list(value) if isinstance(value, tuple) else value
            raise ConfigError(name, f"must be at least {least}; got {shown}")


def check_prices(config: Any, name: str) -> None:
    """Raise ConfigError where a price, or one of a tuple of prices, is negative or not finite."""
    value = getattr(config, name)
    for price in value if isinstance(value, tuple) else (value,):
        if not 0 <= price < math.inf:
            raise ConfigError(name, f"must be finite and at least 0; got {price:g}")


def check_dense_bits(config: Any, name: str, price: str) -> None:
    """Raise ConfigError where the bits that ones of dense features cost more in a search are no
    price, or the field of its prices asks for no search."""
    check_prices(config, name)
    check_searches(config, name, price)


def check_searches(config: Any, name: str, price: str) -> None:
    """Raise ConfigError where a field of a search is set, and that of its prices asks for none."""
    value = getattr(config, name)
    if value and getattr(config, price) in (None, ()):
        raise ConfigError(
            name, f"must be left out where nothing is searched; got {value:g} without {price}"
        )


def check_one_of(name: str, value: Any, allowed: Any) -> None:
    """Raise ConfigError where a field's value, or one of a tuple of values, is unknown."""
    for one in value if isinstance(value, (list, tuple)) else (value,):
        if one not in allowed:
            raise ConfigError(name, f"must be one of {', '.join(map(str, allowed))}; got {one!r}")


def check_out(config: Any) -> None:
    """Find out before anything slow has run whether the results have a place.

    Raises:
        ConfigError: ``out`` cannot be written.
    """
    out = getattr(config, "out", None)
    if out is None:
        return
    # a command writes one file where it makes up its name if none is given
    default = {field.name: field.default for field in dataclasses.fields(config)}["out"]
    folder = default is not None or getattr(config, "OUT_IS_A_FOLDER", False)
    check_field(config, "out", folder=folder)


def check_field(config: Any, name: str, *, folder: bool) -> None:
    """Find out whether the folder, or the file, that a field names can be written.

    Raises:
        ConfigError: naming the field, its value and the reason.
    """
    place = getattr(config, name)
    if place is None:
        return
    try:
        check_place(place, folder=folder)
    except OSError as error:
        kind = "folder" if folder else "file"
        raise ConfigError(
            name, f"must name a {kind} that can be written; {place}: {error.strerror or error}"
        ) from error


# what decides how a run is made and shown, and not what it finds
_NO_SETTINGS = ("out", "overwrite", "resume", "progress", "cache")


def check_kept(config: Any) -> None:
    """Refuse to replace results, or a run that was stopped, of other settings.

    Args:
        config: where it has no field ``overwrite``, or asks for the report of a result alone,
            nothing is replaced.

    Raises:
        ConfigError: naming what differs.
    """
    if getattr(config, "overwrite", True) or getattr(config, "report_only", False):
        return
    out, unfinished = config.out, config.out / UNFINISHED
    stopped = (unfinished / CHECKPOINT).is_file()
    for path in (out / RESOLVED, *([unfinished / RESOLVED] if stopped else [])):
        kept, here = _settings(path), dict(_lines(config))
        differing = [name for name, value in here.items() if kept.get(name, value) != value]
        differing = [name for name in differing if name not in _NO_SETTINGS]
        if differing:
            parts = [f"{name} {kept[name]}, here {here[name]}" for name in differing[:3]]
            more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
            what = "results" if path.parent == out else "a run that was stopped,"
            raise ConfigError(
                "out",
                f"must be a folder without {what} of other settings, unless --overwrite is given; "
                f"{out} has {'; '.join(parts)}{more}",
            )


def _settings(path: Path) -> dict[str, str]:
    """The lines of a saved configuration by their names; none where there is no such file."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return {name: value for name, mark, value in (line.partition(": ") for line in lines) if mark}


@contextmanager
def reading(path: Path, *, kept: bool = True) -> Iterator[None]:
    """Name the file where what it holds is no result: JSON of another command, or damaged.

    Args:
        path: what was read.
        kept: whether the block uses what was read; if not, its errors are its own.

    Raises:
        ValueError: naming the file.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        if not kept:
            raise
        raise ValueError(
            f"{path} must hold a result as this command writes it; got another file "
            f"({type(error).__name__}: {error})"
        ) from error


def once(
    folder: Path, name: str, settings: dict[str, Any], run: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The result of a run: from its file if it was made with the same settings, else made now.

    Args:
        folder: where the files lie; one is called ``<name>-<digest of settings>.json``.
        settings: all that the result depends on, JSON values only; part of the file.
        run: gives the result, JSON values only.
    """
    path = folder / f"{name}-{digest(settings)}.json"
    if path.is_file():
        return _kept(path, name, settings)
    lock = folder / f".{path.stem}.lock"
    try:
        with _waiting(lock, f"   {name}: another process is at it; waiting for its result"):
            made_meanwhile = path.is_file()
            if not made_meanwhile:
                start = time.perf_counter()
                result = {"settings": settings, **run()}
                result["seconds"] = round(time.perf_counter() - start, 1)
                write_json(path, result)
    except BaseException:
        with contextlib.suppress(OSError):  # another run's files are there
            folder.rmdir()
        raise
    if made_meanwhile:
        return _kept(path, name, settings)
    say(f"   {name}: {result['seconds']:.0f} s")
    return result


def _kept(path: Path, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    kept = read_json(path)
    if digest(kept.get("settings", {})) != digest(settings):
        raise ValueError(f"{path} must hold a run of its own settings; remove it to run again")
    say(f"   {name}: done before")
    return kept


@contextmanager
def _waiting(path: Path, text: str) -> Iterator[None]:
    """Hold the lock that a file stands for, and say so where that takes waiting for another."""
    with locked(path, wait=False, passing=True) as held:
        if held:
            yield
            return
    say(text)
    with locked(path, wait=True, passing=True):
        yield


def digest(settings: dict[str, Any]) -> str:
    """What a kept run's file is called by."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def environment() -> dict[str, Any]:
    """What figures depend on besides the settings."""
    return {
        "bae_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


@contextmanager
def results(config: Any, *, wait: bool = False) -> Iterator[Path]:
    """A folder for the files of a result, which take the old ones' place when all are whole.

    The configuration is saved beside them, unless it only asks for the report of a result.

    Args:
        config: has ``out``.
        wait: wait for another process that writes its results there: where the block takes
            little time and adds to what is there.

    Raises:
        ConfigError: another process writes its results there, and ``wait`` is False; or see
            :func:`check_kept`.
    """
    check_kept(config)
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(publishing(config.out, wait=wait))
        except BlockingIOError as error:
            raise _taken(config.out) from error
        if not getattr(config, "report_only", False):
            write_text(folder / RESOLVED, resolved(config))
        try:
            yield folder
        except BaseException:
            _leave_nothing(folder)
            raise


def _leave_nothing(folder: Path) -> None:
    """Remove the folder of a run that has made nothing which the next call could go on from."""
    with contextlib.suppress(OSError):
        if [path.name for path in folder.iterdir()] == [RESOLVED]:
            (folder / RESOLVED).unlink()
            folder.rmdir()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Refuse a folder that another process works in, and keep others out meanwhile.

    Raises:
        ConfigError: another process works in it.
    """
    with locked(folder, wait=False) as held:
        if not held:
            raise _taken(folder)
        yield


def _taken(folder: Path) -> ConfigError:
    return ConfigError("out", f"must be a folder that no other process writes to now; got {folder}")


def resolved(config: Any) -> str:
    """A configuration as YAML, a line a field."""
    return "".join(f"{name}: {value}\n" for name, value in _lines(config))


def _lines(config: Any) -> Iterator[tuple[str, str]]:
    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    for field in dataclasses.fields(config):
        # a saved configuration repeats its run, and gives no leave to replace another
        value = getattr(config, field.name) if field.name != "overwrite" else False
        value = [plain(v) for v in value] if isinstance(value, (list, tuple)) else plain(value)
        yield field.name, json.dumps(value)


def fit(
    trainer: Trainer, folder: Path, *, log: Path | None = None, progress: bool = True
) -> list[dict[str, float]]:
    """Train, from the checkpoint in ``folder`` where it is of the same run.

    A checkpoint is written now and then and when the run is interrupted, and removed at the end;
    a run that is killed loses what came after the last one.

    Args:
        folder: where the checkpoint lies; made if missing.
        log: a file with a line every few steps; one of another run is replaced.

    Returns:
        The lines of the log, those of before the interruption only where ``log`` is given.

    Raises:
        InterruptedRunError: Ctrl-C, or a signal that was made one; the checkpoint is written.
    """
    checkpoint = folder / CHECKPOINT
    resumed = False
    if checkpoint.is_file():
        try:
            trainer.load(checkpoint)
            resumed = True
            say(f"   goes on from step {trainer.step:,}, by {checkpoint}")
        except ValueError as error:
            say(f"   {checkpoint} is not used: {error}")
            checkpoint.unlink()
    if log is not None and not resumed:
        log.unlink(missing_ok=True)
    try:
        lines = trainer.fit(
            log=log,
            progress=progress,
            checkpoint=checkpoint,
            checkpoint_every=CHECKPOINT_EVERY,
        )
    except KeyboardInterrupt as error:
        raise InterruptedRunError(
            f"stopped at step {trainer.step:,}; the same command goes on from there "
            f"({checkpoint}), and the last results are as they were"
        ) from error
    if log is not None:
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    checkpoint.unlink(missing_ok=True)
    return lines


def discard(folder: Path) -> None:
    """Remove what an unfinished run left, once its result is kept."""
    shutil.rmtree(folder, ignore_errors=True)
