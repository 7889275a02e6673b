"""What the language model loses with each method at the same number of bits a row.

Methods end at whatever bits they end at, so no two lines of a comparison cost the same. Here the
loss of a method is read off at given numbers of bits. A run is one point for each precision of its
values: bits a row along the tree, and the divergence with values that are really rounded so. Of a
method's runs, one seed at a time, the points that no other beats in both are joined by straight
lines in the logarithms. Nothing is said beyond the first and the last of them.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bae_fast.files import read_json
from bae_fast.report import tables
from bae_fast.report.compare import LABELS, Group

# folders with comparisons by the same rules for all methods, by model: a learning rate of each
# one's own, coded values, and searches at prices of a bit. Runs of one model may lie in several
FAIR: dict[str, tuple[str, ...]] = {
    "SmolLM2, block 12": (
        "mixed_fair_bae",
        "mixed_fair",
        "mixed_fair_k28",
        "mixed_fair_low",
        "mixed_fair_jumprelu_gated",
        "mixed_fair_jumprelu_gated_k26",
        "mixed_fair_k34",
        "mixed_fair_trained",
    ),
    "SmolLM2, block 6": ("mixed_fair_block6_bae", "mixed_fair_block6"),
    "SmolLM2, block 24": ("mixed_fair_block24_bae", "mixed_fair_block24"),
    "Gemma 3 270M, block 10": (
        "fisher_gemma",
        "fisher_gemma_low",
        "fisher_gemma_fair",
        "fisher_gemma_fair_search",
    ),
    "Qwen2.5-Coder 1.5B, block 14": (
        "mixed_fair_qwen_bae",
        "mixed_fair_qwen_low",
        "mixed_fair_qwen",
        "mixed_fair_qwen_search",
    ),
}
FAIR_BITS = (140, 155, 170, 180, 190, 200)
# what changes with the seed, the layer and the language model, on the same text
REPEATS: dict[str, tuple[str, ...]] = {
    "SmolLM2, block 12": ("mixed_seeds", "mixed_seeds_rivals"),
    "SmolLM2, block 12, `dense_bits` 12": ("mixed_dense", "mixed_seeds_rivals"),
    "SmolLM2, block 6": ("mixed_block6", "mixed_block6_rivals"),
    "Gemma 3 270M, block 10": ("mixed_gemma", "mixed_gemma_rivals"),
    "Qwen2.5-Coder 1.5B, block 14": ("mixed_qwen", "mixed_qwen_rivals"),
}
REPEATS_BITS = (180, 200, 220, 230)
# the same text with errors in the language model's own metric, a matrix
FISHER: dict[str, tuple[str, ...]] = {
    "SmolLM2, block 12": ("fisher_smollm",),
    "Gemma 3 270M, block 10": ("fisher_gemma", "fisher_gemma_low", "fisher_gemma_rivals"),
}
FISHER_BITS = (140, 160, 180, 200)
# searches of one model, without and with ones of dense features made dearer, and trained on
DENSE: dict[str, tuple[str, ...]] = {
    "SmolLM2, block 12": ("mixed_fair_bae", "mixed_dense", "mixed_fair_trained"),
    "Gemma 3 270M, block 10": ("fisher_gemma_low", "fisher_gemma", "fisher_gemma_dense"),
}
# the runs whose features were probed, and put to the intruder test
FEATURES = ("mixed_fair_bae_features", "mixed_fair_features")

# and those of some ten epochs of a text of 113,000 or 81,920 tokens
SMALL_SOURCES: dict[str, tuple[tuple[str, ...], ...]] = {
    "SmolLM2, block 12": (("smollm", "smollm_k12"), ("smollm_metric",)),
    "Gemma 3 270M, block 10": (("gemma_metric",),),
}
SMALL_BITS = (125, 140, 150, 160, 170)


def points(run: dict[str, Any]) -> list[tuple[float, float]]:
    """(bits a row along the tree, KL in bits) of a run at each precision of its values."""
    return _points(run["scores"]["description"], run["scores"]["rounded"])


def searched_points(run: dict[str, Any]) -> list[tuple[float, float]]:
    """The same with codes that are searched for, at each price and precision."""
    return [one for point in run["scores"]["search"]["points"] for one in _points(point, point)]


def _of_point(point: dict[str, Any]) -> tuple[int, float]:
    """For how many steps a search was trained on, and how much dearer its dense features are."""
    return point.get("steps", 0), point.get("dense_bits", 0)


def _of_search(runs: Iterable[dict[str, Any]], *, trained: bool) -> list[dict[str, Any]]:
    """Runs whose dictionaries were trained on with searched codes, or fitted to them."""
    points = ((run, run["scores"].get("search", {}).get("points", [])) for run in runs)
    return [run for run, found in points if found and ("steps" in found[-1]) == trained]


def _points(coded: dict[str, Any], lost: dict[str, Any]) -> list[tuple[float, float]]:
    # results that were kept before values were coded charge each the whole number of bits
    values = coded.get("values_by_value_bits", {})
    return [
        (coded["tree_support"] + values.get(bits, int(bits) * coded["l0"]), kl)
        for bits, kl in lost["kl_by_value_bits"].items()
    ]


def frontier(some: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both, from few bits to many."""
    kept: list[tuple[float, float]] = []
    for bits, kl in sorted(some):
        if not kept or kl < kept[-1][1]:
            kept.append((bits, kl))
    return kept


def hull(some: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points of the lowest lines that join two, in the logarithms: a further run never raises
    what is read off between others."""
    kept: list[tuple[float, float]] = []
    for bits, kl in frontier(some):
        while len(kept) > 1:
            line = at([kept[-2], (bits, kl)], kept[-1][0])
            if line is None or line > kept[-1][1]:
                break
            kept.pop()
        kept.append((bits, kl))
    return kept


def at(line: list[tuple[float, float]], bits: float) -> float | None:
    """The loss at so many bits, None beyond the ends."""
    places = [place for place, _ in line]
    if not line or not places[0] <= bits <= places[-1]:
        return None
    right = min(bisect.bisect_left(places, bits), len(line) - 1)
    (b, kl), left = line[right], line[max(right - 1, 0)]
    if b == bits or right == 0:
        return kl
    share = math.log(bits / left[0]) / math.log(b / left[0])
    return math.exp(math.log(left[1]) + share * math.log(kl / left[1]))


def lines(
    some: Iterable[dict[str, Any]],
    places: Sequence[int],
    points: Callable[[dict[str, Any]], list[tuple[float, float]]] = points,
    front: Callable[[Iterable[tuple[float, float]]], list[tuple[float, float]]] = frontier,
) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """By method and steps of a tail: KL at so many bits, one entry a seed."""
    runs: dict[tuple[str, int], dict[int, list[tuple[float, float]]]] = {}
    for run in some:
        name = run["method"], run["variant"].get("kl_tail", 0)
        runs.setdefault(name, {}).setdefault(run["seed"], []).extend(points(run))
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for name, by_seed in runs.items():
        fronts = [front(some) for some in by_seed.values()]
        found[name] = [{str(bits): at(line, bits) for bits in places} for line in fronts]
    return found


def equal_bits_small(results: Path) -> str:
    """The runs on little text of one kind."""
    return _table(results, SMALL_SOURCES, SMALL_BITS)


def _table(
    results: Path, sources: dict[str, tuple[tuple[str, ...], ...]], places: Sequence[int]
) -> str:
    """A line a model, metric, tail and method; beside a rival's loss how far it is from that of the
    binary code with the same tail."""
    body = []
    for label, groups in sources.items():
        for folders in groups:
            found = (read_json(results / folder / "compare.json") for folder in folders)
            runs = [run for result in found for run in result["runs"]]
            metric = runs[0]["settings"].get("metric", "none")
            by_name = lines(runs, places)
            for (method, tail), seeds in sorted(by_name.items(), key=lambda line: line[0][1]):
                own = None if method == "bae" else by_name.get(("bae", tail))
                steps = f"{tail} steps" if tail else "no"
                cells = [_cell(seeds, own, str(bits)) for bits in places]
                body.append([label, metric, steps, LABELS.get(method, method), *cells])
    header = ["model", "metric", "KL tail", "code", *(f"KL at {bits} bits" for bits in places)]
    return "\n".join(tables.table(header, body))


def fair(results: Path) -> str:
    """Methods by the same rules, with the codes of encoders and with searched ones: a line each,
    and how far its loss is from that of the binary code's codes of the same kind."""
    return _searched(results, FAIR, FAIR_BITS, alike=True)


def repeats(results: Path) -> str:
    """Over seeds, at another layer and of another model: a line a dictionary and kind of codes, and
    how far its loss is from that of the binary code's searched ones."""
    return _searched(results, REPEATS, REPEATS_BITS)


def fisher(results: Path) -> str:
    """The same in the language model's own metric."""
    return _searched(results, FISHER, FISHER_BITS)


def dense(results: Path) -> str:
    """How many features are on in many rows or in none, at each price of searches: a line each.

    Of models of one seed, and of the entropy weights that all folders of a line have.
    """
    body = []
    for label, folders in DENSE.items():
        found = [
            [
                run
                for run in read_json(results / folder / "compare.json")["runs"]
                if run["method"] == "bae" and run["seed"] == 0
            ]
            for folder in folders
        ]
        weights = [{run["variant"]["entropy_weight"] for run in runs} for runs in found]
        shared = set.intersection(*weights)
        points = [
            point
            for runs in found
            for run in runs
            if run["variant"]["entropy_weight"] in shared
            for point in run["scores"]["search"]["points"]
        ]
        for point in sorted(points, key=lambda point: (*_of_point(point), -point["tree"])):
            steps, dearer = _of_point(point)
            shares = ("dense_share", "dead_share", "fitted_dead_share")
            cells = [f"{point[name]:.1%}" if name in point else "" for name in shares]
            lost = [f"{point[name]:.3f}" for name in ("fvu", "kl_bits")]
            trained = f"{steps:,} steps" if steps else "no"
            body.append([label, f"{dearer:g}", trained, f"{point['tree']:.0f}", *lost, *cells])
    header = [
        "model",
        "`dense_bits`",
        "trained on",
        "bits, tree",
        "FVU",
        "KL",
        "on in over a tenth of the rows",
        "never on, held-out rows",
        "never on, rows of the fit",
    ]
    return "\n".join(tables.table(header, body))


def _searched(
    results: Path,
    sources: dict[str, tuple[str, ...]],
    places: Sequence[int],
    *,
    alike: bool = False,
) -> str:
    """A line a dictionary and kind of codes; dictionaries without a search stand there too.

    Args:
        alike: losses are held against the binary code's of the same kind, not against those of its
            searched codes; and read off the lowest lines, as many runs of a method are joined.
    """
    body = []
    for label, folders in sources.items():
        found = (read_json(results / folder / "compare.json") for folder in folders)
        runs = [run for result in found for run in result["runs"]]
        front = hull if alike else frontier
        searches = {"search": False, "search, trained on": True}
        kinds = {"encoder": lines(runs, places, front=front)} | {
            kind: lines(_of_search(runs, trained=trained), places, searched_points, front)
            for kind, trained in searches.items()
        }
        for method, tail in kinds["encoder"]:
            for kind, by_name in kinds.items():
                seeds = by_name.get((method, tail))
                if seeds is None:
                    continue
                own = kinds[kind if alike else "search"]["bae", 0]
                other = None if seeds is own else own
                cells = [_cell(seeds, other, str(bits)) for bits in places]
                body.append([label, LABELS.get(method, method), kind, *cells])
    header = ["model", "dictionary", "codes by", *(f"KL at {bits} bits" for bits in places)]
    return "\n".join(tables.table(header, body))


def features(results: Path) -> str:
    """What single features tell, by the codes of an encoder and by searched ones where these were
    measured, of several prices the middle one: a line each."""
    found = (read_json(results / folder / "compare.json") for folder in FEATURES)
    body = []
    for run in (run for result in found for run in result["runs"]):
        scores = run["scores"]
        label = Group(run["method"], run["k"], tuple(run["variant"].items())).label
        measured = [("encoder", scores["description"], scores)]
        points = scores.get("searched_features", {}).get("points", [])
        if points:
            middle = len(points) // 2
            measured.append(("search", scores["search"]["points"][middle], points[middle]))
        for by, code, features_of in measured:
            probes, odd = features_of["probing"], features_of["intruder"]
            cells = [f"{probes[f'probe_{n}']:.3f}" for n in (1, 2, 5)]
            share = f"{odd['mean']:.2f} ({odd['low']:.2f} to {odd['high']:.2f})"
            body.append([label, by, f"{code['tree']:.0f}", *cells, share])
    header = [
        "dictionary",
        "codes by",
        "bits, tree",
        "probe, 1 feature",
        "2",
        "5",
        "intruder found",
    ]
    return "\n".join(tables.table(header, body))


def _cell(seeds: list[dict[str, Any]], own: list[dict[str, Any]] | None, bits: str) -> str:
    """The loss at so many bits, and its relative distance from another's where both are known."""
    text = tables.cell(seeds, bits, "{:.3f}")
    loss, other = _mean(seeds, bits), _mean(own or [], bits)
    if loss is None or other is None:
        return text
    more = round(loss / other - 1, 2)
    return f"{text}, {more:+.0%}" if more else f"{text}, 0%"


def _mean(seeds: list[dict[str, Any]], bits: str) -> float | None:
    known = [one for one in seeds if one[bits] is not None]
    return tables.spread(known, bits).mean if known else None
