"""Known features: how rows are made, and what the scores say of what was found."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import bae_fast as bf
from bae_fast.analysis.recovery import FeatureSpec, recovery
from bae_fast.baselines import make_baseline
from bae_fast.training import SparseConfig, Trainer

SPEC = FeatureSpec(d=32, roots=6, children=2, p_root=0.2, p_child=0.4, group=2, noise=0.0)


def planted(spec: FeatureSpec, order: torch.Tensor) -> bf.BinaryAutoencoder:
    """Bits that are the true features in another order, read by the pseudo-inverse."""
    directions = spec.directions()
    bae = bf.BinaryAutoencoder(spec.d, spec.n_features).eval()
    with torch.no_grad():
        bae.W_enc.copy_(torch.linalg.pinv(directions)[:, order])
        bae.b_enc.fill_(-0.3)
        bae.W_dec.copy_(directions[order])
        bae.b_dec.zero_()
    return bae


def test_children_need_their_root_and_groups_go_together():
    spec = dataclasses.replace(SPEC, correlation=0.9)
    x, on = spec.sample(20000, 0)
    assert x.shape == (20000, 32)
    assert on.shape == (20000, 18)
    parents = spec.parents()
    children = (parents >= 0).nonzero().flatten()
    assert not bool((on[:, children] & ~on[:, parents[children]]).any())
    share = on.double().mean(0)
    assert share[:6].tolist() == pytest.approx([0.2] * 6, abs=0.02)
    assert share[6:].tolist() == pytest.approx([0.08] * 12, abs=0.015)
    together, apart = (on[:, i] & on[:, j] for i, j in ((0, 1), (0, 2)))
    assert float(together.double().mean()) > 0.1
    assert float(apart.double().mean()) == pytest.approx(0.04, abs=0.01)
    again, _ = spec.sample(20000, 0)
    assert torch.equal(again, x)


def test_planted_features_are_recovered_in_any_order_and_metric():
    x, on = SPEC.sample(2000, 1)
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    model = planted(SPEC, order)
    found = recovery(model, x, on, SPEC.directions(), SPEC.parents())
    assert found.cosine == pytest.approx(1, abs=1e-5)
    assert (found.f1, found.f1_roots, found.f1_children, found.absorbed) == (1, 1, 1, 0)
    assert torch.equal(order[found.partners], torch.arange(18))
    # the same features in units of their own
    metric = torch.linspace(0.5, 2, 32)
    model.x_metric = metric
    with torch.no_grad():
        model.W_enc.mul_(metric[:, None])
        model.W_dec.div_(metric)
    again = recovery(model, x, on, SPEC.directions(), SPEC.parents())
    assert again.cosine == pytest.approx(1, abs=1e-5)
    assert again.f1 == 1


def test_a_root_that_is_off_where_a_child_is_on_is_absorbed():
    x, on = SPEC.sample(4000, 2)
    model = planted(SPEC, torch.arange(18))
    child_on = torch.zeros(4000, 6, dtype=torch.bool)
    for column, root in enumerate(SPEC.parents()[6:].tolist()):
        child_on[:, root] |= on[:, 6 + column]
    swallowed = on.clone()
    swallowed[:, :6] &= ~child_on
    model.active = lambda rows: bf.BinaryCode.from_dense(swallowed)
    found = recovery(model, x, on, SPEC.directions(), SPEC.parents())
    assert found.absorbed == 1
    assert found.f1_children == 1
    roots = on[:, :6].sum(0).double()
    kept = swallowed[:, :6].sum(0).double()
    assert found.f1_roots == pytest.approx(float((2 * kept / (kept + roots)).mean()))


def test_random_features_find_little_and_trained_ones_much():
    spec = FeatureSpec(d=24, roots=8, children=1, p_root=0.1, p_child=0.4, correlation=0.3)
    x, _ = spec.sample(4096, 0)
    held, on = spec.sample(1000, 1)
    torch.manual_seed(0)
    random = bf.BinaryAutoencoder(24, 24).fit_normalization_(x).init_density_(x, 0.1).eval()
    sae = make_baseline("topk", 24, 24, k=2).fit_normalization_(x)
    Trainer(sae, x, SparseConfig(steps=150, batch_size=128, lr=2e-2)).fit()
    low, high = (
        recovery(model, held, on, spec.directions(), spec.parents())
        for model in (random, sae.eval())
    )
    assert low.cosine < 0.5 < 0.7 < high.cosine
    assert low.f1 < 0.3 < 0.5 < high.f1


def test_what_it_cannot_take_is_named():
    x, on = SPEC.sample(10, 0)
    model = planted(SPEC, torch.arange(18))
    with pytest.raises(ValueError, match=r"on must have shape \[n, T\]"):
        recovery(model, x, on[:5], SPEC.directions(), SPEC.parents())
    with pytest.raises(ValueError, match=r"parents must have shape \[18\]; got \[3\]"):
        recovery(model, x, on, SPEC.directions(), SPEC.parents()[:3])
    with pytest.raises(ValueError, match="p_root must lie between 0 and 1; got 1"):
        FeatureSpec(p_root=1)
    with pytest.raises(ValueError, match="correlation must lie in"):
        FeatureSpec(correlation=1.0)
    with pytest.raises(ValueError, match="n must be at least 1; got 0"):
        SPEC.sample(0, 0)
