"""Eight jobs, two hooks by four weights of the entropy, on the same batches against eight runs.

``memory``: the rows lie in memory, so the jobs share the drawing of batches alone; both sides take
turns, three times, and medians are kept. ``live``: SmolLM2 makes the rows while they are learned,
so its passes are shared too; each side once, as eight runs take minutes. Both sides start the
features and train the same steps. ``OMP_WAIT_POLICY=PASSIVE python -m bench jobs`` measures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from bae_fast import BinaryAutoencoder
from bae_fast.lm import load_language_model, standard_library_text, windows
from bae_fast.training import Job, JobTrainer, LiveSupply, MemorySupply, Supply, TrainingConfig
from bench import tables
from bench.supply import HOOKS, in_turns, medians

WEIGHTS = (0.0, 1e-4, 3e-4, 1e-3)
ROUNDS = 3
# of the rows in memory
WIDTH, N_ROWS = 128, 8192
EXPANSION = 4
BATCH = 256
# of a live supply: rows that batches are drawn from, streams, windows of a pass
BUFFER, STREAMS, BATCH_WINDOWS = 1024, 2, 2

# (case, steps of every job)
CASES = [("memory", 40), ("live", 8)]

# opens a supply of some hooks for each run, whose rows are the same
Opened = Callable[[list[str]], contextlib.AbstractContextManager[Supply]]


def jobs_of(
    hooks: Iterable[str], weights: Iterable[float], supply: Supply, steps: int, batch: int
) -> list[Job]:
    """Every hook by every weight."""
    found = []
    for hook in hooks:
        x = supply.sample(4096, 0).x[hook].float()
        for weight in weights:
            config = TrainingConfig(
                steps=steps, batch_size=batch, entropy_weight=weight, refit=False
            )
            torch.manual_seed(0)
            bae = BinaryAutoencoder(x.shape[1], EXPANSION * x.shape[1]).fit_normalization_(x)
            found.append(Job(f"{hook} {weight}", bae, config, hook))
    return found


def sides(opened: Opened, hooks: list[str], steps: int, batch: int) -> dict[str, Callable[[], Any]]:
    """The jobs together, and each in a run of its own."""

    def together() -> None:
        with opened(hooks) as supply:
            JobTrainer(jobs_of(hooks, WEIGHTS, supply, steps, batch), supply).fit()

    def apart() -> None:
        for hook in hooks:
            for weight in WEIGHTS:
                with opened([hook]) as supply:
                    JobTrainer(jobs_of([hook], [weight], supply, steps, batch), supply).fit()

    return {"together": together, "apart": apart}


def memory_case(steps: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    rows = {
        hook: torch.randn(N_ROWS, 16, generator=generator)
        @ torch.randn(16, WIDTH, generator=generator)
        for hook in ("first", "second")
    }

    def opened(hooks: list[str]) -> contextlib.AbstractContextManager[Supply]:
        return contextlib.nullcontext(MemorySupply({h: rows[h] for h in hooks}, streams=8))

    return medians(in_turns(sides(opened, list(rows), steps, BATCH), ROUNDS))


def live_case(steps: int) -> dict[str, Any]:
    lm = load_language_model()
    tokens = windows(lm.tokenizer, standard_library_text(), n_tokens=128 * 256)

    @contextlib.contextmanager
    def opened(hooks: list[str]) -> Iterator[Supply]:
        with LiveSupply(
            lm, tokens, hooks, buffer_rows=BUFFER, streams=STREAMS, batch_size=BATCH_WINDOWS
        ) as supply:
            yield supply

    return medians(in_turns(sides(opened, HOOKS, steps, BATCH), 1))


RUNS: dict[str, Callable[[int], dict[str, Any]]] = {"memory": memory_case, "live": live_case}


def run(only: str = "", seconds: float = 0.0) -> dict[str, Any]:
    """Every case; the number of calls is fixed."""
    rows = []
    for case, steps in CASES:
        if only in tables.name((case, steps)):
            found = RUNS[case](steps)
            found["ratio"] = found["together"] / found["apart"]
            rows.append({"case": case, "steps": steps, **found})
            print(rows[-1], flush=True)
    return {"rows": rows}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    names = {
        "memory": f"rows in memory, d = {WIDTH}",
        "live": "SmolLM2-135M meanwhile, d = 576",
    }
    text = tables.markdown(
        ["rows of two hooks", "steps", "eight jobs", "eight runs", "ratio"],
        [
            [
                names[row["case"]],
                str(row["steps"]),
                f"{row['together']:.1f} s",
                f"{row['apart']:.1f} s",
                f"{row['ratio']:.2f}",
            ]
            for row in result["rows"]
        ],
    )
    return f"{text}\n\nF = {EXPANSION} d. {tables.machine(result)}"
