"""Rows, tables and panels of the entropy experiments."""

from __future__ import annotations

from typing import Any

from bae_fast.report.series import Panel, Series
from bae_fast.report.tables import cell, grouped, spread, table


def synthetic_rows(one: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the CSV of one run."""
    settings, estimate = one["settings"], one["estimate"]
    names = ("kind", "r", "d", "group", "start", "steps", "seed", "n_train", "n_heldout")
    truth = one["joint_bits"]
    return [
        {name: settings[name] for name in names}
        | {
            "d_sae": one["d_sae"],
            "joint_bits": truth,
            "marginal_bits": one["marginal_bits"],
            "true_bits_marginal": one["of_true_bits"]["marginal"],
            "true_bits_tree": one["of_true_bits"]["tree"],
            "true_bits_chain": one["of_true_bits"]["chain"],
            **estimate,
            "marginal_error": estimate["marginal"] / truth - 1,
            "tree_error": estimate["tree"] / truth - 1,
            "chain_error": estimate["chain"] / truth - 1,
            **({"bound_error": estimate["bound"] / truth - 1} if "bound" in estimate else {}),
            "seconds": one["seconds"],
        }
    ]


_ERRORS = ("marginal_error", "tree_error", "chain_error")

# errors below this are one row of the table for several r
_EXACT = 0.005


def synthetic_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: relative errors, mean and range over seeds; neighbouring r without error as one."""
    titles = [
        "set", "start", "rows", "d", "r", "truth, bits", "FVU", "error of the sum of marginals",
        "of the tree", "of the chain",
    ]  # fmt: skip
    with_bound = any("bound_error" in row for row in rows)
    if with_bound:
        titles.append("of the bound")
    lines: list[list[str]] = []
    keys = ("kind", "group", "start", "n_train", "d")
    for (kind, group, start, n_train, d), part in grouped(rows, keys).items():
        together: list[list[dict[str, Any]]] = []
        exact_before = False
        for _, of_r in sorted(grouped(part, ("r",)).items()):
            exact = all(abs(row[key]) < _EXACT for row in of_r for key in _ERRORS)
            if exact and exact_before:
                together[-1].extend(of_r)
            else:
                together.append(list(of_r))
            exact_before = exact
        what = f"{kind}, of {group}" if kind in ("copies", "exclusive") else kind
        for some in together:
            cells = [", ".join(str(r) for (r,) in grouped(some, ("r",)))]
            truth = [f"{bits:.1f}" for (bits,) in grouped(some, ("joint_bits",))]
            cells.append(truth[0] if len(truth) == 1 else f"{truth[0]} to {truth[-1]}")
            cells.append(cell(some, "fvu", "{:.3f}"))
            cells += [cell(some, key, "{:+.1%}") for key in _ERRORS]
            if with_bound:
                having = [row for row in some if "bound_error" in row]
                cells.append(cell(having, "bound_error", "{:+.1%}") if having else "")
            lines.append([what, start, str(n_train), str(d), *cells])
    return "\n".join(table(titles, lines))


def synthetic_panels(rows: list[dict[str, Any]]) -> list[Panel]:
    """Estimates against the truth, a panel a kind of set."""
    panels = []
    keys = ("kind", "group", "start", "n_train")
    for (kind, group, start, n_train), of_kind in grouped(rows, keys).items():
        series = []
        dependent = any(row["marginal_bits"] > 1.01 * row["joint_bits"] for row in of_kind)
        for key, what in (("chain", "chain"), ("tree", "tree"), ("marginal", "sum of marginals")):
            if key != "chain" and not dependent:
                continue
            for (d,), of_d in grouped(of_kind, ("d",)).items():
                points = sorted(grouped(of_d, ("joint_bits",)).items())
                x = [truth for (truth,), _ in points]
                estimates = [spread(part, key) for _, part in points]
                series.append(Series(f"{what}, d = {d}", x, estimates))
        exact = sorted({(row["joint_bits"], row["marginal_bits"]) for row in of_kind})
        x = [truth for truth, _ in exact]
        series.append(Series("truth", x, [(t, t, t) for t in x], dashed=True))
        if dependent:
            y = [(m, m, m) for _, m in exact]
            series.append(Series("sum of marginals of the true bits", x, y, dashed=True))
        title = f"{kind}, of {group}" if dependent else kind
        title += f", {n_train} rows" + (", random start" if start == "random" else "")
        panels.append(
            Panel(title, "joint entropy, bits", "estimate, bits", series,
                  logarithmic=True)
        )  # fmt: skip
    return panels


def layers_rows(one: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the CSV of one run."""
    settings = one["settings"]
    base = {
        "hook": settings["hook"],
        "windows": settings["windows"],
        "seed": settings["training"]["seed"],
    }
    return [
        {**base, "fit": fit, **found} for fit in ("shared", "own") for found in one.get(fit, [])
    ]


def layers_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the tree's bits, mean and range over seeds, and the mean FVU, by position."""
    positions = sorted({row["position"] for row in rows})
    titles = ["module", "windows", "autoencoder", *(f"position {p}" for p in positions), "FVU"]
    lines: list[list[str]] = []
    for (hook, windows, fit), part in grouped(rows, ("hook", "windows", "fit")).items():
        at = grouped(part, ("position",))
        cells = [cell(at[p,], "tree", "{:.0f}") if (p,) in at else "" for p in positions]
        cells.append(f"{spread(part, 'fvu')[0]:.2f}")
        what = "one for all" if fit == "shared" else "one each"
        lines.append([hook, str(windows), what, *cells])
    return "\n".join(table(titles, lines))


def layers_panels(rows: list[dict[str, Any]]) -> list[Panel]:
    """Bits against the position, a panel a fit and estimator."""
    most = max(row["windows"] for row in rows)
    rows = [row for row in rows if row["windows"] == most]
    titles = {"shared": "one autoencoder for all positions", "own": "one for each position"}
    panels = []
    for (fit,), of_fit in grouped(rows, ("fit",)).items():
        for key, what in (
            ("marginal", "sum of marginals"),
            ("tree", "tree"),
            ("chain", "chain"),
        ):
            series = []
            for (hook,), group in grouped(of_fit, ("hook",)).items():
                by_position = sorted(grouped(group, ("position",)).items())
                series.append(
                    Series(
                        hook,
                        [position for (position,), _ in by_position],
                        [spread(part, key) for _, part in by_position],
                    )
                )
            panels.append(Panel(f"{titles[fit]}, {what}", "token position", "bits", series))
    return panels


def icl_rows(one: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the CSV of one run."""
    settings = one["settings"]
    base = {"task": settings["task"], "seed": settings["training"]["seed"]}
    return [{**base, **cell} for cell in one["cells"]]


def icl_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: bits of the state by shots, then accuracy and next-token bits, first to last."""
    shots = sorted({row["shots"] for row in rows})
    titles = ["task", "module", "demonstrations", "labels", *(f"{k} shots" for k in shots)]
    titles += [f"accuracy, {shots[0]} to {shots[-1]} shots", "next token, bits"]
    lines: list[list[str]] = []
    keys = ("task", "hook", "draw", "labels")
    for group, part in grouped(rows, keys).items():
        at = grouped(part, ("shots",))
        cells = [cell(at[k,], "tree", "{:.0f}") if (k,) in at else "" for k in shots]
        for key, form in (("accuracy", "{:.2f}"), ("next_token_bits", "{:.1f}")):
            ends = (form.format(spread(at[k], key)[0]) for k in (min(at), max(at)))
            cells.append(" to ".join(ends))
        lines.append([*group, *cells])
    return "\n".join(table(titles, lines))


def icl_panels(rows: list[dict[str, Any]]) -> list[Panel]:
    """Bits and accuracy against demonstrations, panels of each task."""

    def curves(part: list[dict[str, Any]], key: str) -> list[Series]:
        found = []
        for (draw, labels), group in grouped(part, ("draw", "labels")).items():
            by_shots = sorted(grouped(group, ("shots",)).items())
            found.append(
                Series(
                    f"{draw} demonstrations, {labels} labels",
                    [k for (k,), _ in by_shots],
                    [spread(cells, key) for _, cells in by_shots],
                )
            )
        return found

    panels = []
    for (task,), of_task in grouped(rows, ("task",)).items():
        for (hook,), part in grouped(of_task, ("hook",)).items():
            panels.append(
                Panel(f"{task}, {hook}", "demonstrations", "entropy of the state, bits",
                      curves(part, "chain"))
            )  # fmt: skip
        first = next(iter(grouped(of_task, ("hook",)).values()))
        panels.append(Panel(task, "demonstrations", "accuracy", curves(first, "accuracy")))
        panels.append(
            Panel(task, "demonstrations", "next token, bits", curves(first, "next_token_bits"))
        )
    return panels


def rows_table(result: dict[str, Any]) -> str:
    """Markdown: the estimates of the user's own rows, mean and range over seeds."""
    runs = result["runs"]
    rows = [one["estimate"] for one in runs]
    data = result["data"]
    names = {"marginal": "sum of marginals, bits", "tree": "tree, bits", "chain": "chain, bits"}
    if all("bound" in row for row in rows):
        names |= {
            "bound": "bound, bits",
            "bound_low": "from",
            "bound_high": "to",
            "shared": "shared, bits",
        }
    lines = table(
        ["features", "FVU", *names.values()],
        [
            [str(runs[0]["settings"]["d_sae"]), cell(rows, "fvu", "{:.4f}")]
            + [cell(rows, key, "{:.2f}") for key in names]
        ],
    )
    lines += [
        "",
        f"{data['model_label']}: {data['split']['n_heldout']:,} of {data['rows']:,} rows held out "
        "and measured. All are upper bounds of the code's entropy but for sampling; the least is "
        "the closest.",
    ]
    if "bound" in names:
        lines[-1] += (
            " Bound: cross-entropy of an autoregressive model on a quarter of these rows that it "
            "was not fitted to, with the 95 % interval over blocks of rows; shared: the sum of "
            "marginals less the bound."
        )
    return "\n".join(lines) + "\n"
