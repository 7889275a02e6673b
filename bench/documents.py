"""Numbers in README.md and docs/, taken from the committed results.

A document names its source in a comment that a reader of the page does not see:

    <!-- bench:step --> ... <!-- /bench:step -->                 a table: see ``blocks``
    <!-- step: rows[f=8192,d=2048].n as d -->512<!-- / -->      one number

The first form holds a whole table. The second names a file of ``bench/results`` without its
ending, a path into its JSON, and how the value is written: a format of Python's mini-language, or
a format and a factor (``as .0f x1000``). A path is made of keys and numbers joined by points;
``[key=value]`` takes the first entry of a list whose keys have these values (``*`` alone: the
first entry).

``python -m bench --tables`` rewrites every document; a test compares them with the results.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bae_fast.files import read_json, write_text
from bae_fast.report import entropy as report
from bench import rates, tables

_FIGURE = re.compile(
    r"(?P<open><!-- (?P<file>[\w/]+): (?P<path>\S.*?) as (?P<form>\S+?)"
    r"(?: x(?P<factor>[\d.e-]+))? -->)"
    r"(?P<shown>[^<]*)<!-- / -->"
)
_STEP = re.compile(r"\.?(?:\[(?P<select>[^\]]*)\]|(?P<key>[^.\[\]]+))")


def documents(root: Path) -> list[Path]:
    """README.md and every page of docs/, where they are there."""
    found = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [path for path in found if path.is_file()]


# -- one number --------------------------------------------------------------------------------


def value(result: Any, path: str) -> Any:
    """The value at a path.

    Raises:
        ValueError: a path that leads nowhere.
    """
    for step in _STEP.finditer(path):
        if step["key"] is not None:
            key = step["key"]
            inside = isinstance(result, dict) and key in result
            if not inside and not (isinstance(result, list) and key.lstrip("-").isdigit()):
                raise ValueError(f"path must name what the result holds; got {key!r} in {path!r}")
            result = result[key] if inside else result[int(key)]
        else:
            wanted = [part.split("=", 1) for part in step["select"].split(",") if part != "*"]
            rows = [r for r in result if all(str(r.get(k)) == v for k, v in wanted)]
            if not rows:
                raise ValueError(
                    f"path must select an entry; none is [{step['select']}] in {path!r}"
                )
            result = rows[0]
    return result


def figures(text: str, results: Path) -> str:
    """The text with every single number as its result has it.

    Raises:
        FileNotFoundError: a result that is not there.
        ValueError: a path that leads nowhere.
    """
    read: dict[str, Any] = {}

    def shown(match: re.Match[str]) -> str:
        name = match["file"]
        if name not in read:
            read[name] = read_json(results / f"{name}.json")
        found = value(read[name], match["path"])
        if match["factor"]:
            found = found * float(match["factor"])
        if match["form"].endswith("d"):
            found = round(found)
        return f"{match['open']}{found:{match['form']}}<!-- / -->"

    return _FIGURE.sub(shown, text)


# -- tables that no suite of measurements makes ------------------------------------------------


def _markdown_of(name: str) -> Callable[[Path], str]:
    """A table that an experiment wrote beside its JSON."""
    return lambda results: (results / f"{name}.md").read_text(encoding="utf-8")


def _first_table_of(name: str) -> Callable[[Path], str]:
    def first(results: Path) -> str:
        lines = (results / f"{name}.md").read_text(encoding="utf-8").splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("|"))
        rest = lines[start:]
        end = next((i for i, line in enumerate(rest) if not line.startswith("|")), len(rest))
        return "\n".join(rest[:end])

    return first


def _rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


POSITIONS = ("1", "2", "4", "10", "25", "63")
_FITS = {"shared": "one for all", "own": "one each"}


def layers_excerpt(results: Path) -> str:
    """Seed 0, most windows: entropy along the tree by block, kind of autoencoder and position."""
    rows = _rows_of(results / "entropy" / "layers.csv")
    most = max(int(r["windows"]) for r in rows)
    rows = [r for r in rows if r["seed"] == "0" and int(r["windows"]) == most]
    lines = []
    for hook in dict.fromkeys(r["hook"] for r in rows):
        for fit in dict.fromkeys(r["fit"] for r in rows):
            of = {r["position"]: r for r in rows if r["hook"] == hook and r["fit"] == fit}
            if not all(p in of for p in POSITIONS):
                continue
            block = int(hook.rsplit(".", 1)[1]) + 1
            bits = [f"{float(of[p]['tree']):.0f}" for p in POSITIONS]
            lines.append(
                [str(block), _FITS.get(fit, fit), *bits, f"{_mean(of.values(), 'fvu'):.2f}"]
            )
    first, *rest = POSITIONS
    return tables.markdown(["block", "autoencoder", f"position {first}", *rest, "FVU"], lines)


def _mean(rows: Iterable[dict[str, str]], key: str) -> float:
    values = [float(row[key]) for row in rows]
    return sum(values) / len(values)


def icl_excerpt(results: Path) -> str:
    """True labels, from none to the most demonstrations, mean over draws of the fixed ones."""
    rows = [r for r in _rows_of(results / "entropy" / "icl.csv") if r["labels"] == "true"]
    lines = []
    for task in dict.fromkeys(r["task"] for r in rows):
        of_task = [r for r in rows if r["task"] == task]
        least, most = (f(int(r["shots"]) for r in of_task) for f in (min, max))

        def at(
            shots: int, of: list[dict[str, str]] = of_task, **wanted: str
        ) -> list[dict[str, str]]:
            return [
                r
                for r in of
                if int(r["shots"]) == shots and all(r[k] == v for k, v in wanted.items())
            ]

        hooks = dict.fromkeys(r["hook"] for r in of_task)
        for i, hook in enumerate(hooks):
            cells = [task, str(int(hook.rsplit(".", 1)[1]) + 1)]
            for draw in ("fixed", "fresh"):
                start, end = (_mean(at(s, hook=hook, draw=draw), "tree") for s in (least, most))
                cells.append(f"{start:.0f} to {end:.0f}")
            if i == 0:
                start = _mean(at(least, hook=hook), "accuracy")
                last = {
                    d: _mean(at(most, hook=hook, draw=d), "accuracy") for d in ("fixed", "fresh")
                }
                cells.append(f"{start:.2f} to {last['fixed']:.2f} / {last['fresh']:.2f}")
                bits = [
                    _mean(at(s, hook=hook, draw="fixed"), "next_token_bits") for s in (least, most)
                ]
                cells.append(f"{bits[0]:.1f} to {bits[1]:.1f}")
            else:
                cells += ["", ""]
            lines.append(cells)
    header = ["task", "block", "fixed", "fresh", "accuracy, fixed / fresh", "next token, bits"]
    return tables.markdown(header, lines)


def synthetic(results: Path) -> str:
    """Estimates against the truth, from the runs as they are kept."""
    runs = read_json(results / "entropy" / "synthetic.json")["runs"]
    return report.synthetic_table([row for one in runs for row in report.synthetic_rows(one)])


def _in_saelens(name: str) -> Callable[[Path], str]:
    """What SAELens' trainer reached, as examples/train_in_saelens.py kept it."""

    def made(results: Path) -> str:
        lines = []
        for run in read_json(results / "saelens" / f"{name}.json")["runs"]:
            topk = run["method"] == "topk"
            entropy = f"entropy {run['entropy']:.3g}" if run.get("entropy") else "no entropy term"
            lines.append(
                [
                    f"TopK, k = {run['k']}" if topk else f"binary, {entropy}",
                    f"{run['lr']:.0e}".replace("e-0", "e-"),
                    f"{run['fvu']:.3f}",
                    f"{run['l0']:.0f}",
                    f"{run['dead']:.0%}",
                ]
            )
        return tables.markdown(["", "learning rate", "FVU", "on in a row", "dead"], lines)

    return made


EXPERIMENTS: dict[str, Callable[[Path], str]] = {
    "compare": _markdown_of("compare/compare"),
    "covariance": _first_table_of("covariance/compare"),
    "rate": _first_table_of("rate/compare"),
    "gemma": _first_table_of("gemma/compare"),
    "gemma-metric": _first_table_of("gemma_metric/compare"),
    "smollm": _first_table_of("smollm/compare"),
    "smollm-k12": _first_table_of("smollm_k12/compare"),
    "smollm-metric": _first_table_of("smollm_metric/compare"),
    "mixed": _first_table_of("mixed/compare"),
    "mixed-jumprelu": _first_table_of("mixed_jumprelu/compare"),
    "equal-bits-fair": rates.fair,
    "equal-bits-repeats": rates.repeats,
    "equal-bits-fisher": rates.fisher,
    "dense-features": rates.dense,
    "searched-features": rates.features,
    "equal-bits-small": rates.equal_bits_small,
    "compress": _first_table_of("compress/compress"),
    "synthetic": synthetic,
    "layers": layers_excerpt,
    "icl": icl_excerpt,
    "saelens-smollm2": _in_saelens("smollm2"),
    "saelens-qwen": _in_saelens("qwen"),
}


# -- documents ---------------------------------------------------------------------------------


def blocks(results: Path, suites: dict[str, Any]) -> dict[str, str]:
    """Tables by the names of their markers, for every result that is there.

    A folder MACHINE of results has the markers ``step-MACHINE`` and so on.
    """
    found = {}
    for name, suite in suites.items():
        for path in (results / f"{name}.json", *sorted(results.glob(f"*/{name}.json"))):
            if path.is_file():
                machine = "" if path.parent == results else f"-{path.parent.name}"
                found[name + machine] = suite.table(read_json(path))
    for name, make in EXPERIMENTS.items():
        try:
            found[name] = make(results)
        except FileNotFoundError:
            continue
    return found


def regenerated(text: str, made: dict[str, str], results: Path) -> str:
    """A document with every table and number as the results have them."""
    for name in dict.fromkeys(re.findall(r"<!-- bench:([\w-]+) -->", text)):
        if name in made:
            text = tables.splice(text, name, made[name])
    return figures(text, results)


def write(root: Path, results: Path, suites: dict[str, Any]) -> list[Path]:
    """Rewrite the documents whose tables or numbers changed; their paths."""
    made = blocks(results, suites)
    changed = []
    for path in documents(root):
        text = path.read_text(encoding="utf-8")
        new = regenerated(text, made, results)
        if new != text:
            changed.append(write_text(path, new))
    return changed
