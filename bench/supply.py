"""Rows for training: what a harvest, a supply from disk and a live one cost beside the work itself.

``harvest``: a sharded harvest of two hooks against the model's own passes up to the second of them,
in the same batches and threads. ``live``: training steps on a live supply against as many passes
alone and as many steps alone. ``reads``: rows a second of :class:`ShardSupply`, checked,
from a cache that the system holds in memory, against picking rows of a memory-mapped file.
``asleep``: a model and a step that each sleep 50 ms, so that only the overlap is measured.
``memory``: how far reading a large cache drives resident memory. SmolLM2-135M in windows of 256 for
the first two. ``--model`` measures a harvest of that model instead, in fewer windows, and adds it
to the results.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bae_fast import BinaryAutoencoder
from bae_fast.files import read_json
from bae_fast.lm import (
    DEFAULT_MODEL,
    Engine,
    LanguageModel,
    harvest_shards,
    load_language_model,
    standard_library_text,
    windows,
)
from bae_fast.lm.hooks import block_path, in_order
from bae_fast.training import LiveSupply, MemorySupply, ShardSupply
from bench import tables
from bench.exact import WrongResultError
from bench.timing import peak_bytes

HOOKS = ["model.layers.5", "model.layers.11"]
BATCH_WINDOWS = 8
ROUNDS = 5
SLEEP = 0.05
OTHER_WINDOWS = 8  # of a model that was named
N_PASSES = 8  # of a round of the live case: one for every stream
STEPS_ALONE = 16
N = 512
EXPANSION = 4

# (case, size): windows, passes, rows a batch, milliseconds, and gigabytes on disk
CASES = [
    ("harvest", 48),
    ("live", N_PASSES),
    ("reads", 4096),
    ("asleep", 160),
    ("memory", 1),
    ("memory", 5),
]


class Table(nn.Module):
    """A model whose passes cost next to nothing: rows of a table."""

    def __init__(self, width: int, dtype: torch.dtype, pause: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(1024, width, dtype=dtype)
        self._pause = pause

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        time.sleep(self._pause)
        out: Tensor = self.embedding(input_ids)
        return out


def table_lm(width: int, dtype: torch.dtype = torch.float32, pause: float = 0.0) -> LanguageModel:
    """:class:`Table` as a language model without a tokenizer's special tokens."""
    model = Table(width, dtype, pause).eval().requires_grad_(False)
    return LanguageModel(model, object(), "table", "Table", dtype, width)


def random_tokens(n: int, length: int) -> Tensor:
    """``[n, length]``."""
    return torch.randint(0, 1024, (n, length), generator=torch.Generator().manual_seed(0))


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turns(sides: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each side in each round; the sides take turns, so that a busy while meets all."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            seconds[name].append(timed(sides[name]))
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(found) for name, found in seconds.items()}


def model_and_text(n_windows: int, name: str = DEFAULT_MODEL) -> tuple[LanguageModel, Tensor]:
    """SmolLM2 or the model of that name, and the first windows of the text."""
    lm = load_language_model(name)
    return lm, windows(lm.tokenizer, standard_library_text(), n_tokens=n_windows * 256)


def passes(lm: LanguageModel, tokens: Tensor, hooks: list[str]) -> None:
    """The model's own passes up to the last hook; nothing is kept."""
    with Engine(lm, hooks) as engine:
        batches = tokens.split(BATCH_WINDOWS)
        for _ in in_order(lambda batch: len(engine.forward(batch)), batches, lm.device.type):
            pass


def harvest_case(n_windows: int, name: str = DEFAULT_MODEL) -> dict[str, Any]:
    """Two hooks of SmolLM2, or of another model as deep in it."""
    lm, tokens = model_and_text(n_windows, name)
    hooks = HOOKS
    if name != DEFAULT_MODEL:
        n_blocks = lm.model.config.get_text_config().num_hidden_layers
        hooks = [block_path(lm.model, n_blocks * share // 30) for share in (6, 12)]

    def harvested() -> None:
        with tempfile.TemporaryDirectory() as folder:
            cache = harvest_shards(
                lm, tokens, hooks, folder, batch_size=BATCH_WINDOWS, shard_windows=n_windows,
                progress=False,
            )  # fmt: skip
            if cache.n_windows != n_windows:
                raise WrongResultError(f"{cache.n_windows} of {n_windows} windows")

    passes(lm, tokens[:BATCH_WINDOWS], hooks)
    seconds = in_turns({"passes": lambda: passes(lm, tokens, hooks), "harvest": harvested})
    ratios = [alone / own for alone, own in zip(*seconds.values(), strict=True)]
    found = {**medians(seconds), "ratio": statistics.median(ratios), "tokens": tokens.numel()}
    of_model = (
        {} if name is None else {"model": lm.label, "n_parameters": lm.model.num_parameters()}
    )
    return {**found, **of_model, "rounds": ROUNDS}


def live_case(n_passes: int) -> dict[str, Any]:
    """Steps of 512 rows between the ends of the model's passes, each step as soon as it has rows.

    A pass fills the buffer of one stream, and those of all streams come due together, so a number
    of steps does not stand for a number of passes: both are counted by the times of their ends.
    Every round times the passes alone, the steps alone and a live stretch, one after the other.
    """
    hook = HOOKS[-1]
    lm, tokens = model_and_text(128)
    with LiveSupply(lm, tokens, [hook], buffer_rows=4096) as supply:
        rows = supply.sample(4096, 0).x[hook].float()
        bae = BinaryAutoencoder(rows.shape[1], EXPANSION * rows.shape[1])
        bae.fit_normalization_(rows).init_density_(rows, 0.05)
        optimizer = torch.optim.Adam(bae.parameters(), lr=1e-3, fused=True)
        ended: list[float] = []  # times at which passes of the supply ended
        own = supply.capture.candidates

        def counted(tokens: Tensor) -> Any:
            found = own(tokens)
            ended.append(time.perf_counter())
            return found

        supply.capture.candidates = counted  # type: ignore[method-assign]

        def step_on(x: Tensor) -> None:
            out = bae(x)
            optimizer.zero_grad(set_to_none=True)
            (bae.mse(out, x) + 1.5e-4 * out.entropy).backward()
            optimizer.step()

        memory = MemorySupply(rows)

        def alone() -> None:
            for _ in range(STEPS_ALONE):
                step_on(memory.next(N).x["rows"])

        def live() -> tuple[float, int]:
            """Seconds from the end of a pass to the end of the n-th after it; steps between."""
            first = len(ended)
            steps: list[float] = []
            while len(ended) <= first + n_passes:
                step_on(supply.next(N).x[hook].float())
                steps.append(time.perf_counter())
            begin, end = ended[first], ended[first + n_passes]
            return end - begin, sum(begin < moment <= end for moment in steps)

        model_alone = functools.partial(passes, lm, tokens[: 2 * BATCH_WINDOWS], [hook])
        supply.next(N)  # fills the buffers
        rounds = []
        for _ in range(ROUNDS):
            a_pass, a_step = timed(model_alone) / 2, timed(alone) / STEPS_ALONE
            together, n_steps = live()
            found = {"passes": n_passes * a_pass, "steps": n_steps * a_step, "live": together}
            ratio = together / (found["passes"] + found["steps"])
            rounds.append({**found, "n_steps": n_steps, "ratio": ratio})
    rounds.sort(key=lambda found: found["ratio"])
    return {**rounds[ROUNDS // 2], "rounds": ROUNDS}


def reads_case(n: int, width: int = 1024) -> dict[str, Any]:
    batches = 20
    with tempfile.TemporaryDirectory() as folder:
        lm = table_lm(width, torch.bfloat16)
        cache = harvest_shards(
            lm, random_tokens(600, 256), ["embedding"], folder, batch_size=64, progress=False
        )
        with ShardSupply(cache, buffer_rows=1 << 16, n_heldout=0) as supply:
            supply.next(n)

            def shards() -> None:
                for _ in range(batches):
                    supply.next(n)

            path = Path(folder) / "rows.bin"
            blocks = [cache.read_block(i)["embedding"] for i in range(cache.n_blocks)]
            path.write_bytes(torch.cat(blocks).view(torch.uint8).numpy().data)
            rows = torch.from_file(str(path), size=cache.n_rows * width, dtype=torch.bfloat16).view(
                -1, width
            )
            memory = MemorySupply(rows)

            def mapped() -> None:
                for _ in range(batches):
                    memory.next(n)

            seconds = medians(in_turns({"mapped": mapped, "shards": shards}))
    rates = {name: batches * n / value for name, value in seconds.items()}
    return {**rates, "width": width}


def asleep_case(steps: int) -> dict[str, Any]:
    """A pass that gives one batch sleeps 50 ms, and so does a step."""
    tokens = random_tokens(4096, 65)
    lm = table_lm(8, pause=SLEEP)
    supply = LiveSupply(
        lm, tokens, ["embedding"], buffer_rows=512, batch_size=4, max_norm_ratio=float("inf"),
        ahead=2,
    )  # fmt: skip
    with contextlib.closing(supply):
        for _ in range(3):
            supply.next(256)
        start = time.perf_counter()
        for _ in range(steps):
            supply.next(256)
            time.sleep(SLEEP)
        seconds = time.perf_counter() - start
    return {"milliseconds": 1e3 * seconds / steps, "alone": 2e3 * SLEEP}


def memory_case(gigabytes: int, width: int = 2048) -> dict[str, Any]:
    """An epoch of a cache of so many gigabytes, through a buffer of 2^16 rows (256 MiB)."""
    n_windows = gigabytes * 10**9 // (2 * width * 255)
    with tempfile.TemporaryDirectory() as folder:
        lm = table_lm(width, torch.bfloat16)
        tokens = random_tokens(n_windows, 256)
        found: dict[str, Any] = {}
        found["harvest_peak_bytes"] = peak_bytes(
            lambda: harvest_shards(lm, tokens, ["embedding"], folder, batch_size=32, progress=False)
        )

        def epoch() -> None:
            with ShardSupply(folder, buffer_rows=1 << 16) as supply:
                for _ in range(supply.n_train // 4096):
                    supply.next(4096)

        found["peak_bytes"] = peak_bytes(epoch)
        found["disk_bytes"] = sum(p.stat().st_size for p in Path(folder).rglob("*.safetensors"))
    return found


RUNS: dict[str, Callable[[int], dict[str, Any]]] = {
    "harvest": harvest_case,
    "live": live_case,
    "reads": reads_case,
    "asleep": asleep_case,
    "memory": memory_case,
}


def run(only: str = "", seconds: float = 0.0, models: list[str] | None = None) -> dict[str, Any]:
    """Every case, or a harvest of each model; a call takes seconds, so the number of calls is
    fixed."""
    rows = []
    for name in models or ():
        found = harvest_case(OTHER_WINDOWS, name)
        rows.append({"case": "harvest", "size": OTHER_WINDOWS, **found})
        print(said(rows[-1]), flush=True)
    for case, size in () if models else CASES:
        if only in tables.name((case, size)):
            rows.append({"case": case, "size": size, **RUNS[case](size)})
            print(said(rows[-1]), flush=True)
    return {"rows": rows}


def merged(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """The result with what a file holds and these runs did not measure: harvests of other models,
    or where models were named, all the rest, under its own environment."""
    old = read_json(path) if path.is_file() else {"rows": []}
    measured = {row.get("model") for row in result["rows"]}
    kept = [row for row in old["rows"] if row.get("model") not in measured]
    of_smollm2 = [row for row in kept if "model" not in row]
    if of_smollm2:
        result = result | {"environment": old["environment"]}
    return result | {"rows": of_smollm2 + [
        row for row in [*kept, *result["rows"]] if row not in of_smollm2
    ]}  # fmt: skip


def said(row: dict[str, Any]) -> str:
    """A case's result in words."""
    case = row["case"]
    # results that were kept before rounds were counted do not say how many
    rounds = f" (medians of {row['rounds']} rounds, of the share too)" if "rounds" in row else ""
    if case == "harvest":
        of_model = (
            f" of {row['model']} ({row['n_parameters'] / 1e9:.1f} billion parameters)"
            if "model" in row
            else ""
        )
        return (
            f"harvest of {row['tokens']:,} tokens{of_model}, two hooks: {row['harvest']:.2f} s, "
            f"the passes alone {row['passes']:.2f} s: {row['ratio']:.0%} of their speed{rounds}"
        )
    if case == "live":
        return (
            f"{row['size']} passes and {row['n_steps']} steps of {N} rows live: "
            f"{row['live']:.2f} s, the passes alone {row['passes']:.2f} s, the steps alone "
            f"{row['steps']:.2f} s: {row['ratio']:.2f} of the sum"
            f"{rounds}"
        )
    if case == "reads":
        return (
            f"batches of {row['size']:,} rows of {row['width']} bfloat16: {row['shards']:,.0f} "
            f"rows/s from shards, {row['mapped']:,.0f} rows/s of a memory-mapped file"
        )
    if case == "asleep":
        return (
            f"pass and step asleep {1e3 * SLEEP:.0f} ms each: {row['milliseconds']:.1f} ms a step, "
            f"{row['alone']:.0f} ms one after the other"
        )
    own, other = (tables.mebibytes(row[name]) for name in ("peak_bytes", "harvest_peak_bytes"))
    return (
        f"an epoch of {row['disk_bytes'] / 1e9:.1f} GB on disk: {own} above the start; "
        f"its harvest {other}"
    )


def table(result: dict[str, Any]) -> str:
    """Markdown: a line a case."""
    lines = [f"- {said(row)}" for row in result["rows"]]
    return "\n".join(lines) + f"\n\n{tables.machine(result)}"
