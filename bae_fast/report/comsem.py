"""The table of ``interpret``: the scores of names."""

from __future__ import annotations

from typing import Any

from bae_fast.report import tables


def table(result: dict[str, Any]) -> str:
    """The scores as Markdown."""
    labels = (
        ("comsem", "ComSem, share of Yes"),
        ("shuffled", "with other features' phrases"),
        ("above_shuffled", "difference of the two"),
        ("detection", "detection, balanced accuracy"),
        ("auc", "detection, area under the curve"),
    )
    scored = [(label, result[name]) for name, label in labels if result[name] is not None]
    lines = tables.table(
        ["score", "mean", "95 % interval", "features"],
        (
            [label, f"{f['mean']:.3f}", f"{f['low']:.3f} to {f['high']:.3f}", str(f["n"])]
            for label, f in scored
        ),
    )
    counts, usage, settings = result["counts"], result["usage"], result["settings"]
    cost = "" if usage["cost"] is None else f", cost {usage['cost']:.4f}"
    agreement = [
        f"Cohen's kappa between {name} {value:.2f}."
        for name, value in result["agreement"].items()
        if value is not None
    ]
    if result["detection"] is not None:
        agreement.insert(
            0,
            f"Yes on {result['sensitivity']:.1%} of the feature's tokens, No on "
            f"{result['specificity']:.1%} of the others.",
        )
    lines += [
        "",
        f"{counts['scored']} of {counts['chosen']} chosen features scored; "
        f"{counts['with_enough_tokens']:,} of {counts['features']:,} have {settings['least']} "
        f"tokens in {settings['rows']:,} rows; {counts['dead']:,} never on. Named from "
        f"{settings['n_named']} tokens, order: {settings['order']}. " + " ".join(agreement),
        "",
        f"Judge: {settings['judge']}. {usage['calls']:,} calls ({usage['cached']:,} answers from "
        f"disk, {usage['failed']:,} failed), {usage['prompt_tokens']:,} prompt and "
        f"{usage['completion_tokens']:,} completion tokens{cost}, {usage['seconds']:.1f} s.",
    ]
    if counts["incomplete"]:
        lines.append(f"{counts['incomplete']} features lack an answer and are not in the means.")
    if counts["without_phrase"] or counts["unclear"]:
        lines.append(
            f"{counts['without_phrase']} features got no phrase; {counts['unclear']} judgments "
            "were neither Yes nor No and count as No."
        )
    return "\n".join(lines) + "\n"
