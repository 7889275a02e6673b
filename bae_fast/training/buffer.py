"""Rows of one stream that wait to be drawn at random."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def distinct(n: int, k: int, generator: torch.Generator) -> Tensor:
    """k different numbers below n, every choice as likely as any other: int64 ``[k]``."""
    if 2 * k >= n:
        return torch.randperm(n, generator=generator)[:k]
    # drawing until k different ones have come is a uniform choice, and quick where k is small
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < k:
        more = torch.randint(n, (k - len(found),), generator=generator)
        found = torch.cat([found, more]).unique()
    return found


class _Slots:
    """Numbers of slots in an array of fixed size."""

    def __init__(self, capacity: int) -> None:
        self.numbers = torch.empty(capacity, dtype=torch.int64)
        self.n = 0

    def add(self, slots: Tensor) -> None:
        n = slots.shape[0]
        self.numbers[self.n : self.n + n] = slots
        self.n += n

    def pop(self, n: int) -> Tensor:
        """Remove the last n."""
        self.n -= n
        return self.numbers[self.n : self.n + n].clone()

    def take(self, places: Tensor) -> Tensor:
        """Remove what stands at some places, and close the gaps with the last ones."""
        taken = self.numbers[places]
        n = places.shape[0]
        left = self.n - n
        last = torch.ones(n, dtype=torch.bool)
        last[places[places >= left] - left] = False
        self.numbers[places[places < left]] = self.numbers[left : self.n][last]
        self.n = left
        return taken

    def held(self) -> Tensor:
        return self.numbers[: self.n]


class Buffer:
    """Holds rows of one stream and gives them out at random.

    Rows belong to the epoch in hand or to the one that comes after it. Those of the next epoch
    wait until all rows of this one have been given out.

    Attributes:
        capacity: rows at most.
        x: hook -> ``[capacity, d]``.
        ids: int64 ``[capacity]``.
        turns: epochs that are over.
    """

    def __init__(
        self,
        capacity: int,
        widths: dict[str, int],
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        self.capacity, self.generator = capacity, generator
        self.x = {hook: torch.empty(capacity, d, dtype=dtype) for hook, d in widths.items()}
        self.ids = torch.full((capacity,), -1, dtype=torch.int64)
        self._now, self._coming, self._free = (_Slots(capacity) for _ in range(3))
        self._free.add(torch.arange(capacity))
        self.turns = 0

    @property
    def room(self) -> int:
        """Rows that can be put in."""
        return self._free.n

    def __len__(self) -> int:
        return self._now.n + self._coming.n

    def put(self, x: dict[str, Tensor], ids: Tensor, *, coming: bool = False) -> None:
        """Add rows, at most :attr:`room`; ``coming``: of the next epoch."""
        n = len(ids)
        slots = self._free.pop(n)
        self.ids[slots] = ids
        for hook, rows in x.items():
            self.x[hook][slots] = rows
        (self._coming if coming else self._now).add(slots)

    def draw(self, x: dict[str, Tensor], ids: Tensor) -> None:
        """Fill tensors with rows drawn from those held, which leave; the buffer holds enough."""
        done = 0
        while done < len(ids):
            n = min(len(ids) - done, self._now.n)
            slots = self._now.take(distinct(self._now.n, n, self.generator))
            ids[done : done + n] = self.ids[slots]
            for hook, out in x.items():
                torch.index_select(self.x[hook], 0, slots, out=out[done : done + n])
            self._free.add(slots)
            done += n
            if not self._now.n:
                self._now, self._coming = self._coming, self._now
                self.turns += 1

    def state_dict(self) -> dict[str, Any]:
        """Which rows are held, by number, and the generator; a copy."""
        return {
            "now": self.ids[self._now.held()],
            "coming": self.ids[self._coming.held()],
            "turns": self.turns,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> Tensor:
        """Take the places of a state: the numbers of rows that must be written into ``x``.

        Row i of the result belongs into slot i of every hook's ``x``.
        """
        now, coming = state["now"].cpu(), state["coming"].cpu()
        ids = torch.cat([now, coming])
        self.generator.set_state(state["generator"].cpu())
        self.turns = state["turns"]
        self.ids.fill_(-1)
        self.ids[: len(ids)] = ids
        for slots in (self._now, self._coming, self._free):
            slots.n = 0
        self._now.add(torch.arange(len(now)))
        self._coming.add(torch.arange(len(now), len(ids)))
        self._free.add(torch.arange(len(ids), self.capacity))
        return ids
