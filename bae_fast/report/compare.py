"""The table and the plot of ``compare``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from bae_fast.report import tables
from bae_fast.report.plots import Point, plot_fvu_bits

LABELS = {
    "bae": "BAE (sparse)",
    "bae_paper": "BAE (paper)",
    "relu": "ReLU",
    "rescaled_relu": "rescaled ReLU",
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "gated": "Gated",
    "jumprelu": "JumpReLU",
    "transcoder": "transcoder",
    "binary_topk": "binary top-k",
    "random": "random",
}
VARIANTS = {
    "entropy_weight": "a_e={:g}",
    "covariance_weight": "a_c={:g}",
    "bank_batches": "{} past batches",
    "lr": "lr={:g}",
    "kl_tail": "KL tail {}",
}


class Group(NamedTuple):
    """What the seeds of one line have in common: k and ``variant`` tell a method's lines apart."""

    method: str
    k: int | None
    variant: tuple[tuple[str, float], ...]

    @property
    def series(self) -> str | None:
        """The method's name where it has several lines."""
        return None if self.k is None and not self.variant else LABELS.get(self.method, self.method)

    @property
    def label(self) -> str:
        """The line's name."""
        signs = [] if self.k is None else [f"k={self.k}"]
        signs += [VARIANTS[name].format(value) for name, value in self.variant]
        return " ".join([LABELS.get(self.method, self.method), *signs])


def _groups(result: dict[str, Any]) -> dict[Group, list[dict[str, Any]]]:
    groups: dict[Group, list[dict[str, Any]]] = {}
    for one_run in result["runs"]:
        # scores beside the rest, under names that cannot meet
        row = dict(one_run["heldout"])
        for name, found in one_run.get("scores", {}).items():
            row |= {f"{name}.{key}": value for key, value in found.items()}
        variant = tuple(one_run.get("variant", {}).items())
        groups.setdefault(Group(one_run["method"], one_run["k"], variant), []).append(row)
    return groups


# key among a line's numbers, title of the column, form of a number
_COLUMNS = (
    ("l0", "L0", "{:.1f}"),
    ("fvu", "FVU", "{:.4f}"),
    ("fvu_quantized", "FVU, values rounded", "{:.4f}"),
    ("bits", "bits a row", "{:.0f}"),
    ("support_bits", "of these, which features", "{:.0f}"),
    ("dead_share", "dead", "{:.1%}"),
    ("dense_share", "p > 0.1", "{:.1%}"),
    ("always_on_share", "p > 0.9", "{:.1%}"),
)


def table(result: dict[str, Any]) -> str:
    """Markdown: mean and range over seeds, a line a method."""
    scores = [
        (f"{name}.{key}", header, form) for name, key, header, form in result.get("columns", [])
    ]
    columns = [*_COLUMNS, *scores]
    lines = tables.table(
        ["code", *(title for _, title, _ in columns)],
        (
            [group.label + ("*" if group.method == "transcoder" else "")]
            + [tables.cell(found, key, form) for key, _, form in columns]
            for group, found in _groups(result).items()
        ),
    )
    lines += ["", " ".join(_notes(result))]
    if any(one_run["method"] == "transcoder" for one_run in result["runs"]):
        lines.append(
            "\\* of another target, the MLP's output, and in its place: not comparable by FVU, nor "
            "by what the model loses."
        )
    return "\n".join(lines) + "\n"


def _notes(result: dict[str, Any]) -> Iterator[str]:
    """What was run, and what each column that is there means."""
    data, all_runs = result["data"], result["runs"]
    first = all_runs[0]["settings"]
    training = first["training"]
    seeds = len({one_run["seed"] for one_run in all_runs})
    bits = max(one_run["settings"]["value_bits"] for one_run in all_runs)
    yield (
        f"{data['model_label']}, `{data['hook_name']}`, F = {first['d_sae']}, {training['steps']} "
        f"steps of {training['batch_size']} rows, {data['split']['n_heldout']} rows held out by "
        f"whole windows, {seeds} seed{'s' if seeds > 1 else ''}. Bits: entropy of the active set "
        f"summed over features and pooled over the held-out rows, plus {bits} bits for each value "
        "of a code that is not of bits; the rounded FVU is that of such values. p: share of the "
        "rows in which a feature is on."
    )
    metric = first.get("metric")
    if metric is not None:
        yield f"Trained with dimensions in the unit {metric}; every FVU is in raw units."
    tails = [one_run["settings"]["tail"] for one_run in all_runs if "tail" in one_run["settings"]]
    if tails:
        yield (
            "KL tail: so many further steps with the reconstruction in the language model, in "
            f"which the KL divergence on windows of text, {tails[0]['windows']} a step, takes the "
            f"place of {tails[0]['kl_share']:.0%} of the squared error."
        )
    scores = [one_run.get("scores", {}) for one_run in all_runs]
    tokens = [found["substitution"]["n_tokens"] for found in scores if "substitution" in found]
    if tokens:
        yield (
            "JS and KL: divergence of the next-token distribution with every state of "
            f"`{data['hook_name']}` replaced by its reconstruction, mean of {max(tokens):,} "
            "held-out tokens; loss recovered: 1 where that costs nothing, 0 where it costs what "
            "the mean state in the same places costs."
        )
    if any("rounded" in found for found in scores):
        yield (
            "JS and KL with values of these bits: the same with each value in one of as many even "
            "steps as the bits a value in the line say, read as the mean of training values there; "
            "the code lengths beside it count these steps by their shares."
        )
    named = {
        f"{score['counts']['chosen']} ({name.removeprefix('comsem-')})"
        for found in scores
        for name, score in found.items()
        if name.startswith("comsem-")
    }
    if named:
        yield (
            "ComSem: share of Yes of a judge shown a feature's tokens and its name, mean of "
            f"{', '.join(sorted(named))} features; others' names: with another feature's "
            "name; detection: balanced accuracy, tokens of other features among them."
        )


def plot(result: dict[str, Any]) -> bytes:
    """FVU, values rounded, against bits; PNG. The transcoder has another target: left out."""
    points = []
    for group, found in _groups(result).items():
        fvu = sum(row["fvu_quantized"] for row in found) / len(found)
        bits = sum(row["bits"] for row in found) / len(found)
        # a code without a bit, or worse than the mean, has no place in the plane
        if group.method != "transcoder" and bits > 0 and math.isfinite(fvu) and fvu < 1:
            points.append(Point(group.label, fvu, bits, group.k is None, group.series))
    return plot_fvu_bits(torch.tensor(result["spectrum"], dtype=torch.float64), points)
