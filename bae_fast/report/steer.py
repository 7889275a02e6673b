"""What ``steer`` found: features that differ, what setting them does, and a plot."""

from __future__ import annotations

from typing import Any

from bae_fast.report.series import Panel, Series, plot_panels
from bae_fast.report.tables import cell, spread, table

# features in the table
_N_SHOWN = 12


def _features(n: int, random: bool = False) -> str:
    return f"{n} {'random ' if random else ''}feature{'' if n == 1 else 's'}"


def _groups(rows: list[dict[str, Any]]) -> dict[tuple[str, int, float], list[dict[str, Any]]]:
    groups: dict[tuple[str, int, float], list[dict[str, Any]]] = {}
    for one in rows:
        if "strength" in one:
            groups.setdefault((one["what"], one["features"], one["strength"]), []).append(one)
    return groups


def report(result: dict[str, Any]) -> str:
    """Markdown: features that differ, what steering does, examples."""
    settings = result["settings"]
    lines = [
        f"# Steering, {settings['model_label']}, `{settings['hook']}`",
        "",
        *_differing(result),
        "",
        *_steered(result),
    ]
    for example in result["examples"]:
        lines += [
            "",
            f"{_features(example['features'])}, x {example['strength']:g}:",
            "",
            *("    " + line for line in example["prompt"].splitlines()),
            "",
            f"- as it is: {example['plain']!r}",
            f"- steered: {example['steered']!r}",
        ]
    return "\n".join(lines) + "\n"


def _set_names(settings: dict[str, Any]) -> tuple[str, str]:
    """What the two sets of prompts are called."""
    if settings["task"]:
        return f"{settings['shots']}-shot", "zero-shot"
    return "positive", "negative"


def _differing(result: dict[str, Any]) -> list[str]:
    """The features that differ most between the two sets."""
    settings = result["settings"]
    a, b = _set_names(settings)
    rows = [
        [
            str(one["feature"]),
            f"{one['share_a']:.0%}",
            f"{one['share_b']:.0%}",
            f"{one['z']:.1f}",
            f"{one['p']:.1g}",
        ]
        for one in result["features"][:_N_SHOWN]
    ]
    return [
        *table(["feature", f"on in {a}", f"on in {b}", "z", "p"], rows),
        "",
        f"Share of prompts with the feature on at the last token, of {settings['n_chosen_on'][0]} "
        f"and {settings['n_chosen_on'][1]}; z of two proportions, p two-sided, times the number "
        f"of features that vary. {settings['autoencoder']}, F = {settings['d_sae']}.",
    ]


def _steered(result: dict[str, Any]) -> list[str]:
    """What the model says after the prompts as they are, and after each way to steer them."""
    settings = result["settings"]
    a, b = _set_names(settings)
    columns = [("distance_to_a", f"JS to {a}", "{:.3f}"), ("js_to_b", "JS to unsteered", "{:.3f}")]
    if settings["task"]:
        columns = [
            ("accuracy", "accuracy", "{:.1%}"), ("label_mass", "on labels", "{:.1%}"), *columns
        ]  # fmt: skip
    named = [(a, result["rows"][:1]), (b, result["rows"][1:2])]
    named += [
        (f"{b}, difference of mean states added", [one])
        for one in result["rows"]
        if one["what"] == "state"
    ]
    named += [
        (f"{b}, {_features(n, what == 'control')}, x {strength:g}", rows)
        for (what, n, strength), rows in _groups(result["rows"]).items()
    ]
    return [
        *table(
            ["prompts", *(title for _, title, _ in columns)],
            ([name, *(cell(rows, key, form) for key, _, form in columns)] for name, rows in named),
        ),
        "",
        f"{settings['n_measured_on'][1]} prompts, none of whose questions chose the features. "
        f"Features are {'set' if settings['mode'] == 'clamp' else 'raised or lowered'} at the last "
        f"token as they mostly are in {a}, x strength. Random features: each as common in {b} as "
        f"the one it stands for; draws: {settings['controls']}, mean and range. Difference of mean "
        f"states: between the last tokens of {a} and {b}, whatever the features: about what this "
        f"state can do at all. JS to {a}: in bits, between the mean next-token distributions of "
        "the two sets; to unsteered: mean over prompts.",
    ]


def plot(result: dict[str, Any]) -> bytes:
    """Accuracy (of a task) and distance to set A against strength; PNG."""
    labelled = bool(result["settings"]["task"])
    few, zero = result["rows"][:2]
    panels = []
    wanted = [("accuracy", "accuracy")] if labelled else []
    for key, title in [*wanted, ("distance_to_a", "JS to set A, bits")]:
        by_set: dict[tuple[str, int], list[tuple[float, tuple[float, float, float]]]] = {}
        for (what, n, strength), rows in _groups(result["rows"]).items():
            found = spread(rows, key)
            by_set.setdefault((what, n), []).append((strength, found))
        series = [
            Series(_features(n, what == "control"),
                   [x for x, _ in sorted(points)], [y for _, y in sorted(points)])
            for (what, n), points in by_set.items()
        ]  # fmt: skip
        ends = [s for points in by_set.values() for s, _ in points]
        for name, one in (("set A", few), ("set B, as it is", zero)):
            level = (one[key],) * 3
            series.append(Series(name, [min(ends), max(ends)], [level, level], dashed=True))
        panels.append(Panel(title, "strength", title, series))
    return plot_panels(panels)
