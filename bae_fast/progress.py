"""A progress bar where tqdm is installed and standard error is a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


class _NoBar:
    def update(self, n: int) -> None:
        pass

    def set_postfix(self, **values: str) -> None:
        pass


@contextlib.contextmanager
def progress_bar(
    total: int, *, what: str, unit: str, initial: int = 0, show: bool = True
) -> Iterator[Any]:
    """A bar with ``update(n)`` and ``set_postfix(**values)``; the same without effect if not shown.

    Args:
        total: units until done, of which ``initial`` are.
        what, unit: said beside the bar.
        show: False: no bar.
    """
    if show:
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            with tqdm(
                total=total,
                initial=initial,
                desc=what,
                unit=unit,
                unit_scale=total >= 10_000,
                disable=not sys.stderr.isatty(),
            ) as bar:
                yield bar
            return
    yield _NoBar()
