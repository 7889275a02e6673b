"""How well the best few features tell a label: sparse probing, with balanced accuracy held out.

For each label the k features of the largest absolute correlation with it on training rows are
taken, a logistic regression on them is fitted there with both classes weighing alike, and judged
on held-out rows: the mean of the shares of either class that are told right, 1/2 by chance. (The
choice by correlation is that of the mean difference of Gurnee et al., arXiv 2305.01610, in units
of each feature's deviation.) Intervals draw groups of held-out rows, windows of text, with
replacement.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bae_fast.autoencoder import Autoencoder
from bae_fast.normalization import check_rows

# rows of either class in both parts below which a label says nothing
LEAST_OF_A_CLASS = 20

_RESAMPLES = 1000

# groups of rows drawn at a time: 128 MiB
_DRAWN = 2**22

# of the logistic regression, on standardised features
_RIDGE, _NEWTON_STEPS = 1e-3, 30


@dataclasses.dataclass(frozen=True)
class Probe:
    """One label by its best k features.

    Attributes:
        label: its name.
        features: which, the best first.
        accuracy: balanced accuracy of held-out rows.
        low, high: 95 % interval, groups drawn with replacement.
        missed: share of the held-out rows with the label that were told to be without.
        share: share of the held-out rows that have the label.
    """

    label: str
    features: tuple[int, ...]
    accuracy: float
    low: float
    high: float
    missed: float
    share: float

    def summary(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return {**dataclasses.asdict(self), "features": list(self.features)}


@torch.no_grad()
def sparse_probes(
    model: Autoencoder,
    train: Tensor,
    train_labels: dict[str, Tensor],
    heldout: Tensor,
    heldout_labels: dict[str, Tensor],
    *,
    k: tuple[int, ...] = (1, 2, 5),
    groups: Tensor | None = None,
    seed: int = 0,
) -> dict[int, list[Probe]]:
    """Probe every label that both parts have enough rows of.

    Args:
        model: the autoencoder, in eval mode.
        train, heldout: raw rows ``[n, d_in]`` and ``[m, d_in]``.
        train_labels, heldout_labels: bool ``[n]`` and ``[m]`` by name.
        k: numbers of features.
        groups: int64 ``[m]``, which held-out rows are drawn together; None: each for itself.
        seed: the seed of the interval.

    Returns:
        For each k the probes of the labels, in their order.

    Raises:
        ValueError: labels of another length, k out of range, or no label with enough rows.
    """
    for name, rows, labels in (
        ("train", train, train_labels), ("heldout", heldout, heldout_labels),
    ):  # fmt: skip
        check_rows(name, rows, model.d_in)
        for label, values in labels.items():
            if values.shape != (len(rows),):
                raise ValueError(
                    f"{name}_labels must have shape [{len(rows)}]; {label!r} has "
                    f"{list(values.shape)}"
                )
    if not k or not all(isinstance(n, int) and 1 <= n <= model.d_sae for n in k):
        raise ValueError(f"k must be ints of 1 to d_sae={model.d_sae}; got {k!r}")
    names = [
        name
        for name in train_labels
        if all(
            min(int(part[name].sum()), int((~part[name]).sum())) >= LEAST_OF_A_CLASS
            for part in (train_labels, heldout_labels)
        )
    ]
    if not names:
        raise ValueError(
            f"labels must have at least {LEAST_OF_A_CLASS} rows of either class in both parts; "
            f"none of {', '.join(train_labels) or 'none'} has"
        )
    truth = torch.stack([train_labels[name] for name in names], 1)
    best = _correlated(model, train, truth, max(k))
    wanted = best.flatten().unique()
    place = torch.full((model.d_sae,), -1).scatter_(0, wanted, torch.arange(len(wanted)))
    fit, held = (_strengths(model, rows, wanted) for rows in (train, heldout))
    if groups is None:
        groups = torch.arange(len(heldout))
    which = groups.unique(return_inverse=True)[1]
    n_groups = int(which.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n_groups, (_RESAMPLES, n_groups), generator=generator)
    draws = drawn.split(max(_DRAWN // n_groups, 1))
    found: dict[int, list[Probe]] = {}
    for n in k:
        found[n] = []
        for i, name in enumerate(names):
            features = best[i, :n]
            columns = place[features]
            said = _classify(fit[:, columns], truth[:, i], held[:, columns])
            right = heldout_labels[name]
            cells = torch.stack([right & said, right, ~right & ~said, ~right], 1).double()
            by_group = torch.zeros(n_groups, 4, dtype=torch.float64)
            by_group.index_add_(0, which, cells)
            accuracy = _balanced(by_group.sum(0))
            resampled = torch.cat([_balanced(by_group[part].sum(1)) for part in draws])
            low, high = resampled.nanquantile(torch.tensor([0.025, 0.975]).double()).tolist()
            found[n].append(
                Probe(
                    label=name,
                    features=tuple(features.tolist()),
                    accuracy=float(accuracy),
                    low=low,
                    high=high,
                    missed=float((right & ~said).sum() / right.sum()),
                    share=float(right.double().mean()),
                )
            )
    return found


def _balanced(cells: Tensor) -> Tensor:
    """Balanced accuracy of ``[..., 4]``: right and all of the label, right and all without."""
    return (cells[..., 0] / cells[..., 1] + cells[..., 2] / cells[..., 3]) / 2


def _read(model: Autoencoder, block: Tensor) -> Tensor:
    """What a code holds of every feature, float64 ``[n, F]`` on the CPU: the value, or the bit.

    A binary code's margins are the encoder's, and no part of what is kept of a row.
    """
    if model.is_binary:
        return model.active(block).to_dense(torch.float64).cpu()
    return model.strength(block).double().cpu()


def _strengths(model: Autoencoder, rows: Tensor, features: Tensor) -> Tensor:
    """Some features, float64 ``[n, f]`` on the CPU."""
    return torch.cat([_read(model, block)[:, features] for block in model.blocks(rows)])


def _correlated(model: Autoencoder, rows: Tensor, truth: Tensor, k: int) -> Tensor:
    """The k features of the largest absolute correlation with each label: int64 ``[L, k]``."""
    n, labels = len(rows), truth.double()
    labels = labels - labels.mean(0)
    product = torch.zeros(truth.shape[1], model.d_sae, dtype=torch.float64)
    total, square = torch.zeros(2, model.d_sae, dtype=torch.float64)
    first = 0
    for block in model.blocks(rows):
        strength = _read(model, block)
        product += labels[first : first + len(block)].T @ strength
        total += strength.sum(0)
        square += strength.square().sum(0)
        first += len(block)
    variance = (square / n - (total / n).square()).clamp_min(0)
    # a feature that never varies tells nothing
    correlation = torch.where(variance > 0, product / variance.sqrt().clamp_min(1e-30), 0)
    return correlation.abs().topk(k, dim=1).indices


def _classify(fit: Tensor, truth: Tensor, held: Tensor) -> Tensor:
    """Whether held-out rows have the label, by a logistic regression: bool ``[m]``."""
    mean, deviation = fit.mean(0), fit.std(0).clamp_min(1e-12)
    x, z = ((part - mean) / deviation for part in (fit, held))
    x, z = (torch.cat([part, torch.ones_like(part[:, :1])], 1) for part in (x, z))
    y = truth.double()
    weight = torch.where(truth, 0.5 / y.mean(), 0.5 / (1 - y.mean())) / len(y)
    ridge = torch.full((x.shape[1],), _RIDGE, dtype=torch.float64)
    ridge[-1] = 1e-9  # the bias
    beta = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(_NEWTON_STEPS):
        p = torch.sigmoid(x @ beta)
        gradient = x.T @ (weight * (p - y)) + ridge * beta
        curvature = (x * (weight * (p * (1 - p)).clamp_min(1e-6))[:, None]).T @ x + ridge.diag()
        step = torch.linalg.solve(curvature, gradient)
        # a whole step of Newton overshoots where the classes are nearly apart
        beta -= step * min(1.0, 3.0 / max(float(step.norm()), 1e-12))
        if float(step.norm()) < 1e-9:
            break
    return z @ beta > 0
