"""Where things run: the device's clock, its memory, and whether it still answers."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from bench import timing
from bench.device.cases import Plan
from bench.timing import Side

# cycles of a kernel that keeps the device busy while the host starts what is timed: half a
# millisecond, or half as long again as the host took for the same call before where that is more,
# up to a tenth of a second; and cycles a second of a fast clock
SLEEP, SLEEP_SHARE, MOST_SLEEP, CYCLES = 1_000_000, 1.5, 200_000_000, 2e9


class Machine:
    """Where things run, and how they are timed."""

    def __init__(self, device: str, plan: Plan) -> None:
        self.device, self.plan = device, plan
        size = 2**16
        if device == "cuda":
            properties = torch.cuda.get_device_properties(0)
            size = max(4 * getattr(properties, "L2_cache_size", 0), 2**28)
        self.cache = torch.zeros(size, dtype=torch.uint8, device=device)
        # seconds that the host took to start a call, by the address of what is called
        self.starting: dict[int, list[float]] = {}

    def clock(self, run: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
        """Device seconds of a call, its inputs not in the L2 cache."""
        self.cache.zero_()
        if self.device != "cuda":
            return timing.host_seconds(run, arguments)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        starting = self.starting.setdefault(id(run), [])
        ahead = SLEEP_SHARE * CYCLES * min(starting, default=0.0)
        torch.cuda._sleep(min(max(int(ahead), SLEEP), MOST_SLEEP))
        begin.record()  # reached after the sleep: the host is ahead by then
        host = time.perf_counter()
        result = run(*arguments)
        starting.append(time.perf_counter() - host)
        end.record()
        end.synchronize()
        del result
        return begin.elapsed_time(end) / 1e3

    def best(self, run: Callable[[], Any]) -> float:
        """Least of a few timed calls after one that is not."""
        times = timing.interleaved({"": Side(run)}, self.plan.seconds, self.clock)[""]
        return min(times)

    def peak(self, side: Side) -> int | None:
        """Bytes that a call takes above what was there; None where there is no such count."""
        if self.device != "cuda":
            return None
        arguments = side.prepare()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side.run(*arguments)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def release(self) -> None:
        """Give freed memory back."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def forget(self) -> None:
        """Free what the program before this one left: memory and compiled code."""
        self.starting.clear()
        self.release()
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # every shape compiled for itself

    def answers(self) -> bool:
        """Whether the device still computes: an illegal access ends that for the process."""
        if self.device != "cuda":
            return True
        try:
            return float(torch.ones(1, device="cuda").sum()) == 1
        except RuntimeError:
            return False
