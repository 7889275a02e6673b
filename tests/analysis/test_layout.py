"""The map of decoder directions: what is near stays near, and every input has its place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bae_fast.analysis import layout
from bae_fast.analysis.layout import layout_directions, nearest_directions


def groups(n_groups: int, of_each: int, d: int, spread: float):
    """Directions around ``n_groups`` random ones, in shuffled order, and the group of each."""
    generator = torch.Generator().manual_seed(0)
    middles = torch.randn(n_groups, d, generator=generator)
    group = torch.arange(n_groups).repeat_interleave(of_each)
    group = group[torch.randperm(len(group), generator=generator)]
    return middles[group] + spread * torch.randn(len(group), d, generator=generator), group


def kept_by_hand(directions, places) -> float:
    """The share of each one's ten nearest by cosine that are within its nearest 2 % of the map."""
    x = directions.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine, p = x @ x.T, places.double().numpy()
    far = ((p[:, None] - p[None]) ** 2).sum(-1)
    np.fill_diagonal(cosine, -np.inf)
    np.fill_diagonal(far, np.inf)
    n = max(round(0.02 * len(x)), 10)
    found = 0
    for i in range(len(x)):
        near = np.argsort(-cosine[i], kind="stable")[:10]
        found += int((far[i][near] <= np.sort(far[i])[n - 1] + 1e-12).sum())
    return found / (10 * len(x))


def test_directions_of_one_group_stand_together():
    directions, group = groups(20, 30, 64, 0.3)
    places, kept, near = layout_directions(directions)
    assert near == 12  # 2 % of 600
    far = torch.cdist(places, places).fill_diagonal_(torch.inf)
    nearest = group[far.topk(5, largest=False).indices]
    assert float((nearest == group[:, None]).float().mean()) > 0.9
    assert kept == pytest.approx(kept_by_hand(directions, places), abs=2e-3)
    assert kept > 0.4
    # a map of other directions keeps what chance keeps
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(1))
    assert kept_by_hand(directions, places[order]) < 0.05


def test_every_coordinate_takes_each_rank_once_and_every_call_gives_the_same():
    directions = torch.randn(500, 24, generator=torch.Generator().manual_seed(2))
    places, kept, near = layout_directions(directions)
    assert near == 10  # 2 % of 500
    ranks = torch.arange(500).float() / 499
    assert all(column.sort().values.equal(ranks) for column in places.T)
    again = layout_directions(directions)
    assert again.places.equal(places)
    assert again.kept == kept
    # neither length nor dtype of a direction is its direction
    longer = layout_directions((directions * torch.arange(1, 501)[:, None]).double())
    assert float((longer.places - places).abs().mean()) < 0.02


def test_of_many_directions_some_tell_how_much_is_kept(monkeypatch):
    directions, _ = groups(40, 30, 32, 0.4)
    whole = layout_directions(directions)
    monkeypatch.setattr(layout, "_MEASURED", 300)
    some = layout_directions(directions)
    assert some.places.equal(whole.places)
    assert some.kept == pytest.approx(whole.kept, abs=0.05)


def test_the_nearest_are_those_of_the_largest_cosine(monkeypatch):
    monkeypatch.setattr(layout, "_ROWS", 7)  # several blocks
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(3))
    unit = torch.nn.functional.normalize(x, dim=1)
    cosine = unit.double().numpy() @ unit.double().numpy().T
    np.fill_diagonal(cosine, -np.inf)
    expected = np.argsort(-cosine, axis=1)[:, :4]
    assert nearest_directions(unit, 4).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "directions",
    [
        torch.ones(12, 5),  # all the same
        torch.zeros(12, 5),  # none has a direction
        torch.eye(5)[[0, 0, 0, 1, 1, 2, 3, 3, 4, 4, 4, 4]],  # many twice
        torch.eye(3),  # the fewest
        torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]),  # two that oppose, one of no length
    ],
)
def test_directions_that_repeat_or_vanish_have_places(directions):
    places, kept, near = layout_directions(directions)
    assert near == min(10, len(directions) - 1)
    f = len(directions)
    assert all(column.sort().values.equal(torch.arange(f) / (f - 1)) for column in places.T)
    assert 0 <= kept <= 1


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (torch.ones(1, 5), r"at least 3 and d at least 2; got \[1, 5\]"),
        (torch.ones(2, 5), r"at least 3 and d at least 2; got \[2, 5\]"),
        (torch.ones(5, 1), r"at least 3 and d at least 2; got \[5, 1\]"),
        (torch.ones(5), r"directions must have shape \[F, d\]"),
        (torch.full((5, 4), float("nan")), "directions must be finite"),
        (torch.full((5, 4), float("inf")), "directions must be finite"),
    ],
)
def test_what_has_no_map_is_refused(directions, message):
    with pytest.raises(ValueError, match=message):
        layout_directions(directions)
