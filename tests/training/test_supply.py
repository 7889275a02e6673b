"""Supplies: the order of rows is one for every number of processes, and a state brings it back."""

import pytest
import torch

from bae_fast.spacing import even_numbers, evenly, evenly_from
from bae_fast.training import MemorySupply, Supply, merge_states


def rows(n=40, d=3, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def taken(supply, n, times):
    return torch.cat([supply.next(n).ids for _ in range(times)])


def test_one_stream_is_the_order_of_random_permutations():
    x = rows()
    supply = MemorySupply(x, seed=5)
    generator, order = torch.Generator().manual_seed(5), torch.empty(0, dtype=torch.int64)
    for _ in range(9):
        if len(order) < 12:
            order = torch.randperm(40, generator=generator)
        want, order = order[:12], order[12:]
        batch = supply.next(12)
        assert torch.equal(batch.ids, want)
        assert torch.equal(batch.x["rows"], x[want])


def test_a_generator_that_is_shared_draws_order_and_samples_in_turn():
    shared, alone = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    supply = MemorySupply(rows(), generator=shared)
    first, batch = supply.sample(7, shared), supply.next(8)
    assert torch.equal(first.ids, torch.randperm(40, generator=alone)[:7])
    assert torch.equal(batch.ids, torch.randperm(40, generator=alone)[:8])


def test_a_sample_moves_nothing_and_depends_on_its_seed_alone():
    one, other = MemorySupply(rows(), streams=4), MemorySupply(rows(), streams=4, rank=1, world=2)
    one.next(8)
    assert torch.equal(one.sample(9, 3).ids, other.sample(9, 3).ids)
    assert not torch.equal(one.sample(9, 3).ids, one.sample(9, 4).ids)
    assert torch.equal(one.sample(100, 3).ids.sort().values, torch.arange(40))
    again = MemorySupply(rows(), streams=4)
    again.next(8)
    assert torch.equal(one.next(8).ids, again.next(8).ids)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batches_of_one_process(world):
    whole = MemorySupply(rows(), streams=4, seed=2)
    parts = [MemorySupply(rows(), streams=4, seed=2, rank=r, world=world) for r in range(world)]
    for _ in range(12):
        want = whole.next(12)
        got = [part.next(12) for part in parts]
        assert torch.equal(torch.cat([batch.ids for batch in got]), want.ids)
        assert torch.equal(torch.cat([batch.x["rows"] for batch in got]), want.x["rows"])


@pytest.mark.parametrize("n", [8, 12])
def test_an_epoch_of_every_stream_has_each_row_once(n):
    supply = MemorySupply(rows(48), streams=4, seed=2)
    for _ in range(3):
        assert torch.equal(taken(supply, n, 48 // n).sort().values, torch.arange(48))


def test_a_state_of_two_ranks_goes_on_in_four_and_in_one(tmp_path):
    def made(rank=0, world=1):
        return MemorySupply(rows(), streams=4, seed=2, rank=rank, world=world)

    whole, halves = made(), [made(r, 2) for r in range(2)]
    for supply in (whole, *halves):
        taken(supply, 12, 5)
    torch.save(merge_states([half.state_dict() for half in halves]), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    want = [whole.next(12).ids for _ in range(6)]
    for world in (1, 4):
        parts = [made(r, world) for r in range(world)]
        for part in parts:
            part.load_state_dict(state)
        assert all(torch.equal(torch.cat([p.next(12).ids for p in parts]), ids) for ids in want)


def test_several_hooks_come_row_by_row():
    x, y = rows(), rows(d=5, seed=1)
    supply = MemorySupply({"a": x, "b": y}, streams=2)
    assert supply.widths == {"a": 3, "b": 5}
    batch = supply.next(6)
    assert torch.equal(batch.x["a"], x[batch.ids])
    assert torch.equal(batch.x["b"], y[batch.ids])


@pytest.mark.parametrize(("n", "step"), [(10, 1), (262_144, 1), (262_145, 2), (600_000, 3)])
def test_rows_for_a_fit_are_spread_over_all_of_them(n, step):
    rows = torch.arange(n)[:, None]
    assert evenly(rows).flatten().tolist() == list(range(0, n, step))


@pytest.mark.parametrize(("n", "step"), [(3, 1), (4, 1), (7, 1), (8, 2), (11, 2), (12, 3)])
def test_at_least_so_many_rows_are_spread_over_all_of_them(n, step):
    assert evenly_from(torch.arange(n), 4).tolist() == list(range(0, n, step))


def test_so_many_numbers_are_spread_over_all_of_them():
    assert even_numbers(10, 4).tolist() == [0, 2, 5, 7]
    assert even_numbers(4, 4).tolist() == [0, 1, 2, 3]
    assert even_numbers(2**40, 3).tolist() == [0, 2**40 // 3, 2**41 // 3]


def test_heldout_rows_come_in_order_under_numbers_of_their_own():
    held = rows(5000, seed=3)
    supply = MemorySupply(rows(), heldout=held)
    blocks = list(supply.heldout())
    assert torch.equal(torch.cat([block.x["rows"] for block in blocks]), held)
    assert torch.equal(torch.cat([block.ids for block in blocks]), torch.arange(40, 5040))
    assert list(MemorySupply(rows()).heldout()) == []


def test_rows_in_memory_are_a_supply():
    supply = MemorySupply(rows())
    assert isinstance(supply, Supply)
    with supply.pause():
        supply.close()


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: MemorySupply({}), ValueError, "rows must be a tensor, or tensors by hook; got"),
        (lambda: MemorySupply({"a": [1]}), TypeError, r"rows\['a'\] must be a tensor; got list"),
        (lambda: MemorySupply(rows()[0]), ValueError, r"must be floating point of shape \[n, d\]"),
        (lambda: MemorySupply({"a": rows(), "b": rows(3)}), ValueError, "as many rows of every"),
        (lambda: MemorySupply(rows(), heldout=rows(d=4)), ValueError, "heldout must have the hook"),
        (lambda: MemorySupply(rows(), streams=0), ValueError, "streams must be an int >= 1; got 0"),
        (lambda: MemorySupply(rows(), streams=4, world=3), ValueError, "world must divide the num"),
        (lambda: MemorySupply(rows(), rank=1), ValueError, "rank must be an int from 0 to 0; got"),
        (lambda: MemorySupply(rows(3), streams=4), ValueError, "at least one a stream, 4; got 3"),
        (
            lambda: MemorySupply(rows(), streams=2, generator=torch.Generator()),
            ValueError,
            "generator must be None for several streams; got 2",
        ),
        (lambda: MemorySupply(rows(), streams=4).next(10), ValueError, "multiple of the 4 streams"),
        (
            lambda: MemorySupply(rows()).next(41),
            ValueError,
            "n, the rows of a batch, must be at most 40",
        ),
        (lambda: MemorySupply(rows()).sample(0, 1), ValueError, "n must be an int >= 1; got 0"),
    ],
)
def test_what_is_not_allowed_is_said(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (dict, "state must be what state_dict of a supply gave; it lacks identity"),
        (lambda: MemorySupply(rows(seed=1), streams=2).state_dict(), "state must be of the same r"),
        (lambda: MemorySupply(rows()).state_dict(), "state must be of 2 streams; it is of 1"),
        (
            lambda: MemorySupply(rows(), streams=2, rank=1, world=2).state_dict(),
            r"state must hold the streams \[0, 1\]; it lacks \[0\]",
        ),
    ],
)
def test_a_state_of_something_else_is_refused_and_changes_nothing(state, text):
    supply, same = (MemorySupply(rows(), streams=2) for _ in range(2))
    with pytest.raises(ValueError, match=text):
        supply.load_state_dict(state())
    assert torch.equal(supply.next(8).ids, same.next(8).ids)


def test_states_of_unlike_supplies_are_not_merged():
    one = MemorySupply(rows(), streams=2, rank=0, world=2).state_dict()
    with pytest.raises(ValueError, match=r"states must hold every stream; missing are \[1\]"):
        merge_states([one])
    with pytest.raises(ValueError, match="states must be of one supply"):
        merge_states([one, MemorySupply(rows(seed=1), streams=2).state_dict()])
    with pytest.raises(ValueError, match="at least one state"):
        merge_states([])
