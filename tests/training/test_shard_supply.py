"""Rows from disk: each once an epoch, in an order that no number of processes changes."""

import collections
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tiny_lm import places_lm

from bae_fast.lm import harvest_shards
from bae_fast.lm.shards import shard_name
from bae_fast.training import ShardSupply, Supply, merge_states
from bae_fast.training.buffer import Buffer, distinct

CONTEXT = 65


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12,288 rows of two hooks in 8 shards of 6 blocks."""
    folder = tmp_path_factory.mktemp("cache")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 42, (192, CONTEXT), generator=generator)
    harvest_shards(
        places_lm(), tokens, ["first", "second"], folder,
        shard_windows=24, batch_size=24, max_norm_ratio=float("inf"), progress=False,
    )  # fmt: skip
    return folder


def made(folder, rank=0, world=1, **options):
    settings = {"buffer_rows": 2048, "n_heldout": 0, "streams": 4, "seed": 3, **options}
    return ShardSupply(folder, rank=rank, world=world, **settings)


def taken(supply, n, times):
    return torch.stack([supply.next(n).ids for _ in range(times)])


def rows_of(supply):
    blocks = [supply.cache.read_block(i) for i in range(supply.cache.n_blocks)]
    return {hook: torch.cat([block[hook] for block in blocks]) for hook in supply.widths}


@pytest.mark.parametrize("buffer_rows", [512, 2048, 1 << 20])
def test_an_epoch_has_every_row_exactly_once(folder, buffer_rows):
    supply = made(folder, buffer_rows=buffer_rows)
    n_rows = supply.cache.n_rows
    for _ in range(2):
        ids = taken(supply, 384, n_rows // 384)
        assert torch.equal(ids.flatten().sort().values, torch.arange(n_rows))


def test_a_stream_has_every_row_once_where_batches_do_not_divide_its_epoch(folder):
    supply = made(folder, n_heldout=1000)
    seen = taken(supply, 400, 90).view(90, 4, 100)
    for stream in range(4):
        ids = seen[:, stream].flatten()
        blocks = range(stream, supply.n_blocks, 4)
        own = sum(int(supply.sizes[block]) for block in blocks)
        for epoch in range(len(ids) // own):
            part = ids[epoch * own : (epoch + 1) * own]
            assert len(part.unique()) == own
            assert set((part // 256 % 4).tolist()) == {stream}
    assert int(seen.max()) < supply.n_train


def test_rows_belong_to_their_numbers_and_hooks_to_each_other(folder):
    supply = made(folder)
    rows = rows_of(supply)
    for _ in range(40):
        batch = supply.next(512)
        for hook, x in batch.x.items():
            assert torch.equal(x, rows[hook][batch.ids])


def test_few_rows_of_a_batch_come_from_one_block(folder):
    """At most N b / Q of a row's block beside it, in the mean, in every part of an epoch."""
    n, buffer_rows = 64, 2048
    supply = made(folder, buffer_rows=buffer_rows)
    n_batches = supply.cache.n_rows // n
    mates = torch.empty(n_batches)
    for i, ids in enumerate(taken(supply, n, n_batches)):
        counts = collections.Counter((ids // 256).tolist())
        mates[i] = sum(c * (c - 1) for c in counts.values()) / n
    bound = n * 256 / buffer_rows
    assert mates.mean() <= bound
    for quarter in mates.chunk(4):
        assert quarter.mean() <= bound * 1.1
    assert mates.mean() > 1  # rows in the order of the text would have 63, rows at random 1.3


def test_every_epoch_has_another_order(folder):
    supply = made(folder)
    first, second = (taken(supply, 384, 32).flatten() for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(taken(made(folder, seed=4), 384, 1), first[None, :384])
    assert torch.equal(taken(made(folder), 384, 32).flatten(), first)


def test_four_processes_then_one_then_two_see_the_batches_of_one(folder, tmp_path):
    n, parts = 256, (4, 1, 2)
    want = taken(made(folder), n, 30)
    got, state = [], None
    for world in parts:
        ranks = [made(folder, rank, world) for rank in range(world)]
        for supply in ranks:
            if state is not None:
                supply.load_state_dict(state)
        got += [torch.cat([supply.next(n).ids for supply in ranks]) for _ in range(10)]
        torch.save(merge_states([supply.state_dict() for supply in ranks]), tmp_path / "state")
        state = torch.load(tmp_path / "state", weights_only=True)
        for supply in ranks:
            supply.close()
    assert int((torch.stack(got) != want).sum()) == 0


@pytest.mark.parametrize("done", [0, 1, 7, 31, 32, 50])
def test_a_state_goes_on_with_the_same_rows_at_any_place_of_an_epoch(folder, done):
    supply = made(folder)
    for _ in range(done):
        supply.next(384)
    state = supply.state_dict()
    other = made(folder)
    other.next(384)
    other.load_state_dict(state)
    for _ in range(45):
        one, two = supply.next(384), other.next(384)
        assert torch.equal(one.ids, two.ids)
        assert all(torch.equal(x, two.x[hook]) for hook, x in one.x.items())


def test_a_sample_moves_nothing_and_is_the_same_on_all_ranks(folder):
    supply, other = made(folder), made(folder, 1, 2)
    rows = rows_of(supply)
    for n in (1, 100, 5000, 12_288, 20_000):
        sample = supply.sample(n, 5)
        assert len(sample.ids.unique()) == len(sample.ids) == min(n, 12_288)
        assert torch.equal(sample.ids, other.sample(n, 5).ids)
        assert all(torch.equal(x, rows[hook][sample.ids]) for hook, x in sample.x.items())
    assert torch.equal(taken(supply, 384, 3), taken(made(folder), 384, 3))


def test_heldout_rows_are_whole_windows_and_never_trained_on(folder):
    supply = made(folder, n_heldout=1000)
    held = list(supply.heldout())
    ids = torch.cat([part.ids for part in held])
    assert torch.equal(ids, torch.arange(12_288 - 960, 12_288))  # 15 windows of 64 rows
    rows = rows_of(supply)
    for hook in supply.widths:
        assert torch.equal(torch.cat([part.x[hook] for part in held]), rows[hook][ids])
    assert supply.n_train == 12_288 - 960 - 64
    assert int(supply.sample(20_000, 0).ids.max()) == supply.n_train - 1
    assert list(made(folder).heldout()) == []


def test_damage_is_named_when_it_is_met_and_not_trained_on(folder, tmp_path):
    copy = tmp_path / "cache"
    shutil.copytree(folder, copy)
    path = copy / "second" / shard_name(5)
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    supply = made(copy)
    with pytest.raises(ValueError, match=f"{path} is corrupt: rows 0 to 255 are not those"):
        taken(supply, 384, 32)


def test_the_supply_pauses_and_ends(folder):
    supply = made(folder)
    assert isinstance(supply, Supply)
    supply.next(384)
    with supply.pause():
        assert supply._filling.done()
    supply.close()
    supply.close()
    with pytest.raises(ValueError, match="supply must be open"):
        supply.next(384)


@pytest.mark.parametrize(
    ("options", "n", "text"),
    [
        ({"buffer_rows": 3}, 4, "buffer_rows must be an int >= 4; got 3"),
        ({"streams": 49}, 49, "streams must be at most the number of blocks of 256 rows, 48"),
        ({"streams": 4, "world": 3}, 4, "world must divide the number of streams, 4"),
        ({}, 4096, "must be at most 2,048, 512 rows a stream, by buffer_rows=2,048"),
        ({}, 10, "n must be a positive multiple of the 4 streams; got 10"),
    ],
)
def test_what_is_not_allowed_is_said(folder, options, n, text):
    with pytest.raises(ValueError, match=text):
        made(folder, **options).next(n)


def test_states_of_other_supplies_are_refused(folder):
    supply = made(folder)
    with pytest.raises(ValueError, match=r"state must be of the same rows; it is of seed 4"):
        supply.load_state_dict(made(folder, seed=4).state_dict())
    with pytest.raises(ValueError, match="state must be of 4 streams; it is of 2"):
        supply.load_state_dict(made(folder, streams=2).state_dict())


# -- the buffer --------------------------------------------------------------------------------


def test_choices_are_distinct_and_all_as_likely():
    generator = torch.Generator().manual_seed(0)
    hits = torch.zeros(12)
    for _ in range(6000):
        picked = distinct(12, 3, generator)
        assert len(picked.unique()) == 3
        hits[picked] += 1
    # of 6,000 draws each number is in a quarter; five standard deviations
    assert (hits - 1500).abs().max() < 5 * (6000 * 0.25 * 0.75) ** 0.5


def test_rows_of_the_next_epoch_wait():
    buffer = Buffer(6, {"a": 1}, torch.float32, torch.Generator().manual_seed(0))
    numbers = torch.arange(6)
    buffer.put({"a": numbers[:4, None].float()}, numbers[:4])
    buffer.put({"a": numbers[4:, None].float()}, numbers[4:], coming=True)
    out, ids = {"a": torch.empty(5, 1)}, torch.empty(5, dtype=torch.int64)
    buffer.draw(out, ids)
    assert ids[:4].sort().values.tolist() == [0, 1, 2, 3]
    assert int(ids[4]) in (4, 5)
    assert torch.equal(out["a"][:, 0].long(), ids)
    assert (len(buffer), buffer.room, buffer.turns) == (1, 5, 1)


LARGE = """
    import sys
    sys.path.insert(0, {support!r})
    import torch
    torch.set_num_threads(1)
    from tiny_lm import places_lm
    from bae_fast.lm import harvest_shards
    from bae_fast.training import ShardSupply

    def peak():
        lines = open("/proc/self/status").read().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM"))

    tokens = torch.randint(1, 42, (480, 257), generator=torch.Generator().manual_seed(0))
    lm = places_lm(width=1024)
    harvest_shards(lm, tokens[:8], ["first"], sys.argv[1] + "/small", progress=False)
    with_small = ShardSupply(sys.argv[1] + "/small", buffer_rows=1024, n_heldout=0, streams=4)
    with_small.next(256)
    before = peak()
    harvest_shards(lm, tokens, ["first"], sys.argv[1] + "/large", shard_windows=40, batch_size=4,
                   progress=False)
    supply = ShardSupply(sys.argv[1] + "/large", buffer_rows=4096, n_heldout=0)
    seen = torch.zeros(supply.n_train, dtype=torch.int64)
    for _ in range(supply.n_train // 512):
        seen[supply.next(512).ids] += 1
    print(peak() - before, supply.n_train * 4096, int((seen != 1).sum()))
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells its memory on Linux")
def test_memory_stays_far_below_the_size_of_the_cache(tmp_path):
    """503 MB on disk through a buffer of 17 MB; limits of norms and a shard's index are beside."""
    code = textwrap.dedent(LARGE).format(support=str(Path(__file__).parents[1] / "support"))
    call = [sys.executable, "-c", code, str(tmp_path)]
    # Large blocks go back to the system when they are freed. Otherwise the C library keeps them,
    # and small ones that lie between cost 10 to 200 MB from one run to the next.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    printed = subprocess.run(
        call, check=True, capture_output=True, text=True, timeout=240, env=environment
    ).stdout
    grown, size, wrong = map(int, printed.split())
    assert wrong == 0
    assert size > 500e6
    assert grown < 120e6
