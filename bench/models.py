"""Real language models: loads, and what stands inside a running model beside the model's own.

What is right comes from the model itself. Harvested rows are held against
``output_hidden_states``, and logits of the head, of a splice and of a substitution against those of
the model's plain forward, window by window. The splice has two codes: the identity, which must
change nothing, and one that halves every state, whose right result comes from a hook written here;
the divergences of both are computed again in float64.

``python -m bench models --model FOLDER_OR_FILE`` measures one model; without ``--model`` it is the
package's default. Rows of other models stay in the result. A time is the median of calls that take
turns; loads are of fresh processes, from the GGUF file and then from its dequantised copy.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bae_fast.causal import SubstitutionTest, spliced
from bae_fast.files import read_json
from bae_fast.lm import (
    DEFAULT_MODEL,
    LanguageModel,
    find_language_model,
    harvest,
    load_language_model,
    standard_library_text,
    windows,
)
from bae_fast.lm.hooks import block_path
from bench import tables
from bench.exact import WrongResultError

CONTEXT = 256
# windows whose every logit is compared, and windows that are timed
CHECKED, TIMED = 2, 8
ROUNDS = 3
# tokens of float64 distributions at a time
_BLOCK = 64

# largest difference of a log-probability from the model's own, and of a row from the model's own
# beside its norm; a model in half precision rounds the logits themselves
BOUNDS = {"float32": 2e-3, "bfloat16": 0.25, "float16": 0.05}

# the part of transformers that every model needs, a load, and one more with all modules imported
_LOAD = """
import json, sys, time
import torch
seconds = {}
def timed(name, call):
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    seconds[name] = [time.perf_counter() - wall, time.process_time() - cpu]
def imports():
    from transformers import AutoModelForCausalLM, AutoTokenizer
timed("import", imports)
from bae_fast.lm import load_language_model
for name in ("load", "again"):
    timed(name, lambda: load_language_model(sys.argv[1], dtype=sys.argv[2]))
print(json.dumps(seconds))
"""


class _Identity:
    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, features: Tensor) -> Tensor:
        return features


class _Half(_Identity):
    def decode(self, features: Tensor) -> Tensor:
        return features / 2


def run(
    models: list[str] | None = None,
    dtype: str = "auto",
    n_timed: int = TIMED,
    later_loads: bool = False,
    only: str = "",
    seconds: float = 0.0,
) -> dict[str, Any]:
    """Measure every model given; ``seconds`` is not used, as a call is longer.

    Args:
        models: see `load_language_model`; None: the default model.
        dtype: the models run in it.
        n_timed: windows of 256 tokens that are timed.
        later_loads: leave out the first load, where a copy of a GGUF file is kept already.
        only: part of the label of the models that are measured.
    """
    rows = []
    for name in models or [DEFAULT_MODEL]:
        if only.lower() in find_language_model(name).label.lower():
            rows.append(measure(name, dtype, n_timed, later_loads))
            print(line(rows[-1]), flush=True)
    return {"rows": rows}


def merged(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """The result with the rows of other models, or in other dtypes, that a file holds."""
    for row in result["rows"]:
        row["environment"] = result["environment"]
    new = {(row["model"], row["dtype"]) for row in result["rows"]}
    old = read_json(path)["rows"] if path.is_file() else []
    kept = [row for row in old if (row["model"], row["dtype"]) not in new]
    rows = sorted([*kept, *result["rows"]], key=lambda row: (row["n_parameters"], row["dtype"]))
    return result | {"rows": rows}


# -- one model ---------------------------------------------------------------------------------


def measure(name: str, dtype: str, n_timed: int, later_loads: bool) -> dict[str, Any]:
    """Loads, checks and times of one model."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if not later_loads:
            stack.enter_context(_cache_in(folder))
        first = None if later_loads else _load_seconds(name, dtype)
        later = [_load_seconds(name, dtype) for _ in range(ROUNDS)]
        loads = [first, {key: statistics.median(load[key] for load in later) for key in later[0]}]
        lm = load_language_model(name, dtype=dtype)
        path = block_path(lm.model, lm.model.config.get_text_config().num_hidden_layers // 2)
        text = standard_library_text()
        tokens = windows(lm.tokenizer, text, CONTEXT, n_tokens=max(n_timed, CHECKED) * CONTEXT)
        row: dict[str, Any] = {
            "model": lm.label,
            "dtype": str(lm.dtype).removeprefix("torch."),
            "n_parameters": sum(p.numel() for p in lm.model.parameters()),
            "d": lm.d_model,
            "vocabulary": lm.head.vocabulary,
            "hook": path,
            "loads": loads,
            "copied": find_language_model(name).gguf_file is not None,
        }
        try:
            row |= check(lm, path, tokens[:CHECKED], Path(folder))
            row |= times(lm, path, tokens[:n_timed])
        except WrongResultError as error:
            row["sides"] = {"package": {"refused": str(error)}}
    return row


@contextlib.contextmanager
def _cache_in(folder: str) -> Iterator[None]:
    """Whatever the package keeps lies in a folder of its own meanwhile."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = folder
    try:
        yield
    finally:
        del os.environ["XDG_CACHE_HOME"]
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before


def _load_seconds(name: str, dtype: str) -> dict[str, float]:
    """Seconds and processor seconds of a load in a fresh process, transformers' import included.

    ``import_`` is that import alone, and ``again_`` one more load in the same process.
    """
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, name, dtype], check=True, stdout=subprocess.PIPE, text=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    found[""] = [sum(pair) for pair in zip(found["import"], found.pop("load"), strict=True)]
    return {
        f"{step}_{unit}".lstrip("_"): values[i]
        for step, values in found.items()
        for i, unit in enumerate(("seconds", "cpu_seconds"))
    }


# -- the model's own ---------------------------------------------------------------------------


def _log_probabilities(lm: LanguageModel, window: Tensor) -> Tensor:
    """The model's own, float64 ``[length, V]`` of one window."""
    return lm.model(input_ids=window[None], use_cache=False).logits[0].double().log_softmax(-1)


@contextlib.contextmanager
def _halved(lm: LanguageModel, path: str) -> Iterator[None]:
    """Halve a module's output but at the first token, by a hook that is no splice's."""

    def halve(_module: Any, _inputs: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        changed = torch.cat([states[:, :1], states[:, 1:] / 2], 1)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = lm.model.get_submodule(path).register_forward_hook(halve)
    try:
        yield
    finally:
        handle.remove()


def _divergences(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """(JS, KL) in bits, float64 ``[n]``, by their formulas, of log-probabilities ``[n, V]``."""
    js, kl = [], []
    for a, b in zip(p.split(_BLOCK), q.split(_BLOCK), strict=True):
        m = torch.logaddexp(a, b) - math.log(2)
        kl.append((a.exp() * (a - b)).sum(-1))
        js.append(((a.exp() * (a - m)).sum(-1) + (b.exp() * (b - m)).sum(-1)) / 2)
    return torch.cat(js) / math.log(2), torch.cat(kl) / math.log(2)


@torch.no_grad()
def check(lm: LanguageModel, path: str, tokens: Tensor, folder: Path) -> dict[str, Any]:
    """Rows, logits and divergences beside the model's own.

    Raises:
        WrongResultError: one of them is further away than the dtype rounds.
    """
    bound = BOUNDS[str(lm.dtype).removeprefix("torch.")]
    cache = harvest(
        lm, tokens, path, folder=folder / "rows", exclude_tokens=(), max_norm_ratio=math.inf,
        progress=False,
    )  # fmt: skip
    block = int(path.rsplit(".", 1)[1])
    rows = cache.rows.view(len(tokens), CONTEXT - 1, -1).float()
    gaps: dict[str, list[float]] = {name: [] for name in ("rows", "head", "identity")}
    halved = []
    losses = []
    for i, window in enumerate(tokens):
        out = lm.model(input_ids=window[None], use_cache=False, output_hidden_states=True)
        states = out.hidden_states[block + 1][0, 1:].float()
        own = out.logits[0].double().log_softmax(-1)
        del out
        gaps["rows"].append(float(((rows[i] - states).norm(dim=1) / states.norm(dim=1)).max()))
        final = lm.body(input_ids=window[None], use_cache=False).last_hidden_state[0]
        step = lm.head.rows_at_a_time
        parts = zip(final.split(step), own.split(step), strict=True)
        gaps["head"].append(
            max(float((lm.head(x).double().log_softmax(-1) - p).abs().max()) for x, p in parts)
        )
        with spliced(lm, path, _Identity(), max_norm_ratio=None):
            gaps["identity"].append(float((_log_probabilities(lm, window) - own).abs().max()))
        losses.append(-own[1:-1].gather(1, window[2:, None])[:, 0])
        with _halved(lm, path):
            changed = _log_probabilities(lm, window)
        halved.append(_divergences(own[1:-1], changed[1:-1]))
    test = SubstitutionTest(lm, tokens, batch_size=1, max_norm_ratio=None)
    same, half = (test.run(path, code()) for code in (_Identity, _Half))
    js, kl = (float(torch.cat(parts).mean()) for parts in zip(*halved, strict=True))
    found = {
        "n_checked": tokens.numel(),
        "rows_gap": max(gaps["rows"]),
        "head_gap": max(gaps["head"]),
        "identity_gap": max(gaps["identity"]),
        "identity_js_bits": same.js_bits,
        "identity_kl_bits": same.kl_bits,
        "loss_gap": abs(same.loss_original - float(torch.cat(losses).mean())),
        "half_js_bits": js,
        "half_kl_bits": kl,
        "half_js_gap": abs(half.js_bits / js - 1),
        "half_kl_gap": abs(half.kl_bits / kl - 1),
        "replaced": half.replaced,
    }
    for name in ("rows", "head", "identity", "loss", "half_js", "half_kl"):
        if not found[f"{name}_gap"] <= bound:
            raise WrongResultError(f"{name} is off by {found[f'{name}_gap']:.2g}, over {bound:g}")
    return found


def times(lm: LanguageModel, path: str, tokens: Tensor) -> dict[str, Any]:
    """Seconds of the model's own pass, and of the divergences with a code in a state's place."""

    @torch.no_grad()
    def own() -> None:
        for window in tokens:
            lm.model(input_ids=window[None], use_cache=False)

    test = SubstitutionTest(lm, tokens, batch_size=1, max_norm_ratio=None)
    test.run(path, _Half())  # the ablations beside it are made once a model
    sides: dict[str, Callable[[], Any]] = {"own": own, "judged": lambda: test.run(path, _Half())}
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, call in sides.items():
            begin = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - begin)
    ratios = [b / a for a, b in zip(taken["own"], taken["judged"], strict=True)]
    return {
        "n_judged": len(tokens) * (CONTEXT - 2),
        "own_seconds": statistics.median(taken["own"]),
        "judged_seconds": statistics.median(taken["judged"]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


# -- text --------------------------------------------------------------------------------------


def line(row: dict[str, Any]) -> str:
    """A row on one line, for the terminal."""
    return f"{row['model']}: " + ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
        if name not in ("model", "environment")
    )


def table(result: dict[str, Any]) -> str:
    """Markdown: gaps to the model's own, then seconds."""
    good = [row for row in result["rows"] if "sides" not in row]
    gaps = [
        [
            f"{row['model']}, {row['dtype']}",
            f"{row['rows_gap']:.1g}",
            f"{row['head_gap']:.1g}",
            f"{row['identity_gap']:.1g}",
            f"{row['identity_js_bits']:.1g}",
            f"{row['half_js_gap']:.1g}",
            f"{row['half_kl_gap']:.1g}",
        ]
        for row in good
    ]
    seconds = [
        [
            f"{row['model']}, {row['dtype']}",
            f"{row['vocabulary']:,}",
            *(_load_cell(row, i) for i in (0, 1)),
            *(_load_cell(row, 1, step) for step in ("import_", "again_")),
            f"{row['n_judged']:,}",
            f"{row['own_seconds']:.1f} s",
            f"{row['judged_seconds']:.1f} s ({row['ratio']:.1f})",
        ]
        for row in good
    ]
    head = ["model", "rows", "head", "identity", "its JS, bits", "JS of halves", "KL of halves"]
    times = [
        "model", "logits", "first load", "later loads", "its import", "load again", "tokens",
        "own pass", "JS and KL",
    ]  # fmt: skip
    machines = dict.fromkeys(tables.machine(row) for row in good)
    return "\n\n".join(
        [tables.markdown(head, gaps), tables.markdown(times, seconds), " ".join(machines)]
    )


def _load_cell(row: dict[str, Any], i: int, step: str = "") -> str:
    load = row["loads"][i]
    if load is None or f"{step}seconds" not in load:  # not measured
        return ""
    return f"{load[f'{step}seconds']:.0f} s ({load[f'{step}cpu_seconds']:.0f})"
