"""A case in a worker's hands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from bench.device.cases import Case, Row
from bench.device.machine import Machine


class Job(NamedTuple):
    """A case that is run.

    Attributes:
        case: what is asked.
        row: its row of device.json, which is filled.
        result: all of device.json, with the rows before.
        impls: the implementations that are compared.
        machine: where it runs.
        note: told which side is at work, and that it still is.
        seconds_left: of the command.
    """

    case: Case
    row: Row
    result: dict[str, Any]
    impls: list[str]
    machine: Machine
    note: Callable[[str], None]
    seconds_left: Callable[[], float]

    @property
    def sides(self) -> dict[str, Any]:
        """What became of each side so far."""
        sides: dict[str, Any] = self.row["sides"]
        return sides
