"""Where a run's numbers go beside its own JSONL: TensorBoard, Weights & Biases, Trackio.

Each is a small adapter around a package of its own, imported when it is asked for. Only the first
process makes any.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Takes numbers of a run."""

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Numbers by name, ``<job>/<what>``, after a step."""

    def close(self) -> None:
        """Write what is buffered and end."""


class TensorBoard:
    """Event files beside the run's own."""

    def __init__(self, name: str, folder: Path, settings: dict[str, Any]) -> None:
        board = _package("torch.utils.tensorboard", "tensorboard")
        self._writer = board.SummaryWriter(str(folder / "tensorboard"))

    def log(self, numbers: dict[str, float], step: int) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _Session:
    """Weights & Biases, and Trackio, which has its interface."""

    package = ""

    def __init__(self, name: str, folder: Path, settings: dict[str, Any]) -> None:
        self._module = _package(self.package, self.package)
        self._module.init(project="bae_fast", name=name, config=settings)

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._module.log(numbers, step=step)

    def close(self) -> None:
        self._module.finish()


class WeightsAndBiases(_Session):
    """A run of wandb, in the project bae_fast."""

    package = "wandb"


class Trackio(_Session):
    """A run of trackio, in the project bae_fast."""

    package = "trackio"


TRACKERS: dict[str, Callable[[str, Path, dict[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def _package(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this tracker needs {name}: pip install {name}") from error
