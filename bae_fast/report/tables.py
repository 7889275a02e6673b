"""Tables of results as Markdown, and numbers as "mean (low to high)"."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """Mean, least and largest of some values."""

    mean: float
    low: float
    high: float


def row(cells: Iterable[str]) -> str:
    """One line of a table."""
    return "| " + " | ".join(cells) + " |"


def table(titles: Sequence[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a table, its titles first."""
    return [row(titles), "|---" * len(titles) + "|", *(row(cells) for cells in rows)]


def spread(rows: Iterable[dict[str, Any]], key: str) -> Spread:
    """Mean and range of ``key`` over rows, of which there is at least one."""
    values = [float(one[key]) for one in rows]
    return Spread(sum(values) / len(values), min(values), max(values))


def cell(rows: Iterable[dict[str, Any]], key: str, form: str) -> str:
    """``mean (low to high)`` of the rows that have ``key``; empty where none has.

    One number stands where the three look alike.
    """
    rows = [one for one in rows if one.get(key) is not None]
    if not rows:
        return ""
    mean, low, high = (
        form.format(value).replace("-0.0%", "+0.0%" if "+" in form else "0.0%")
        for value in spread(rows, key)
    )
    return mean if low == high else f"{mean} ({low} to {high})"


def grouped(
    rows: Iterable[dict[str, Any]], keys: tuple[str, ...]
) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Rows by their values of ``keys``, in the order in which those first come."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in rows:
        groups.setdefault(tuple(one[key] for key in keys), []).append(one)
    return groups
