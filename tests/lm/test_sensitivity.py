"""Gradients of the language model at a hook: against what an error really costs."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from tiny_lm import save_tiny_model

pytest.importorskip("transformers")

from bae_fast.lm import fisher, load_language_model, sensitivity
from bae_fast.lm.hooks import with_first_part

WORDS = [f"word{i}" for i in range(40)]
HOOK = "model.layers.0"


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("lm"), WORDS)
    lm = load_language_model(str(folder), dtype="float32")
    lm.model.double()
    return lm


def windows(n: int, length: int = 6) -> torch.Tensor:
    return torch.randint(1, 41, (n, length), generator=torch.Generator().manual_seed(0))


def divergence(lm, ids: torch.Tensor, position: int, error: torch.Tensor) -> float:
    """KL in nats, summed over all next tokens, of one state moved by an error."""

    def move(_module, _arguments, output):
        states = output[0] if isinstance(output, tuple) else output
        states[:, position] += error
        return output

    with torch.no_grad():
        before = lm.model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        handle = lm.model.get_submodule(HOOK).register_forward_hook(move)
        try:
            after = lm.model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        finally:
            handle.remove()
    return float((before.exp() * (before - after)).sum())


def exact(lm, ids: torch.Tensor) -> torch.Tensor:
    """What is drawn, summed over every token that could be drawn: the Fisher information."""
    kept = []

    def leaf(_module, _arguments, output):
        state = (output[0] if isinstance(output, tuple) else output).detach().requires_grad_()
        kept.append(state)
        return (state, *output[1:]) if isinstance(output, tuple) else state

    handle = lm.model.get_submodule(HOOK).register_forward_hook(leaf)
    try:
        log_p = lm.model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    finally:
        handle.remove()
    total = torch.zeros(16, dtype=torch.float64)
    for place in range(len(ids)):
        for token in range(log_p.shape[1]):
            one = log_p[place, token]
            (gradient,) = torch.autograd.grad(one, kept[0], retain_graph=True)
            total += float(one.detach().exp()) * gradient[0].double().square().sum(0)
    return total / len(ids)


def test_half_of_it_times_the_square_of_an_error_is_the_divergence(lm):
    ids, step = windows(1, 4)[0], 5e-4
    true = torch.zeros(16, dtype=torch.float64)
    for i in range(16):
        for place in range(len(ids)):
            error = step * torch.nn.functional.one_hot(torch.tensor(i), 16).double()
            # to either side: the third order cancels
            both = divergence(lm, ids, place, error) + divergence(lm, ids, place, -error)
            true[i] += both / step**2 / len(ids)
    expected = exact(lm, ids)
    torch.testing.assert_close(expected, true, rtol=0.01, atol=0)
    found = sensitivity(lm, ids[None].expand(250, -1), HOOK, max_norm_ratio=None, drop_positions=0)
    torch.testing.assert_close(found, expected, rtol=0.4, atol=0)


def test_the_matrix_says_what_an_error_in_any_direction_costs(lm):
    ids, step = windows(1, 4)[0], 5e-4
    options = {"max_norm_ratio": None, "drop_positions": 0}
    found = fisher(lm, ids[None].expand(1500, -1), HOOK, **options)
    torch.testing.assert_close(found, found.T)
    diagonal = sensitivity(lm, ids[None].expand(1500, -1), HOOK, **options)
    torch.testing.assert_close(found.diagonal(), diagonal)
    values, vectors = torch.linalg.eigh(found)
    assert values[-1] > 4 * diagonal.max() / 3  # some direction that is no dimension's
    for column in (-1, -2, -3):
        error = vectors[:, column]
        cost = 0.0
        for place in range(len(ids)):
            both = divergence(lm, ids, place, step * error) + divergence(
                lm, ids, place, -step * error
            )
            cost += both / step**2 / len(ids)
        assert float(values[column]) == pytest.approx(cost, rel=0.3)


def test_another_first_part_leaves_the_kind_of_the_output():
    class Named(NamedTuple):
        states: int
        cache: str

    for output, expected in (
        (1, 5),
        ((1, "c"), (5, "c")),
        ([1, "c"], [5, "c"]),
        (Named(1, "c"), Named(5, "c")),
    ):
        found = with_first_part(output, 5)
        assert found == expected
        assert type(found) is type(expected)


def test_the_model_is_left_as_it_was(lm):
    learned = [p.requires_grad for p in lm.model.parameters()]
    first = sensitivity(lm, windows(3), HOOK)
    assert torch.equal(sensitivity(lm, windows(3), HOOK), first)
    assert [p.requires_grad for p in lm.model.parameters()] == learned
    assert all(p.grad is None for p in lm.model.parameters())
    assert not lm.model.get_submodule(HOOK)._forward_hooks


def test_what_it_cannot_take_is_named(lm):
    with pytest.raises(ValueError, match=r"windows must be \[n, length\]"):
        sensitivity(lm, windows(2, 1), HOOK)
    with pytest.raises(ValueError, match=r"no\.such"):
        sensitivity(lm, windows(2), "no.such")
