"""Sharded caches: what is in them, who makes which shard, and what happens to damaged ones."""

import json
import os
import signal
import textwrap
from pathlib import Path

import processes
import pytest
import torch
from safetensors.torch import save_file
from tiny_lm import places_lm

from bae_fast.lm import ShardedCache, harvest, harvest_shards, shard_harvest
from bae_fast.lm.shards import shard_name

HOOKS = ["first", "second"]
CONTEXT = 16


def tokens(n=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 42, (n, CONTEXT), generator=generator)


def made(folder, lm=None, text=None, **options):
    settings = {"shard_windows": 8, "batch_size": 3, "progress": False, **options}
    text = tokens() if text is None else text
    return harvest_shards(lm or places_lm(), text, HOOKS, folder, **settings)


def everything(cache):
    blocks = [cache.read_block(i) for i in range(cache.n_blocks)]
    return {hook: torch.cat([block[hook] for block in blocks]) for hook in cache.widths}


def files(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and ".locks" not in path.parts
    }


def test_rows_are_those_of_the_model_in_the_order_of_the_text(tmp_path):
    lm, text = places_lm(), tokens()
    text[3, 5] = text[20, 1] = 0  # ends of documents are no text
    cache = made(tmp_path, lm, text, max_norm_ratio=float("inf"))
    assert cache.widths == {"first": 4, "second": 8}
    index = [cache.index(i) for i in range(len(cache.shards))]
    window = torch.cat([part.row_window for part in index]).long()
    position = torch.cat([part.row_position for part in index]).long()
    kept = (text != 0) & (torch.arange(CONTEXT) > 0)
    assert torch.equal(torch.stack([window, position], 1), kept.nonzero())
    assert torch.equal(torch.cat([part.tokens for part in index]).long(), text)
    first = lm.model.first(text)
    rows = everything(cache)
    assert torch.equal(rows["first"], first[kept])
    assert torch.equal(rows["second"], torch.cat([first, first.cumsum(1)], 2)[kept])
    assert cache.manifest["dropped"] == {"position": 50, "not_text": 2, "not_finite": 0, "norm": 0}
    cache.verify()


@pytest.mark.parametrize("enough", [True, False])
def test_all_hooks_come_of_one_pass_and_norms_too_where_the_first_shard_has_enough(
    tmp_path, monkeypatch, enough
):
    monkeypatch.setattr(shard_harvest, "LIMIT_TOKENS", 8 * CONTEXT if enough else 9 * CONTEXT)
    lm = places_lm()
    made(tmp_path, lm)
    again = 0 if enough else 3  # the first 9 windows, for the limit
    assert lm.model.calls == sum(-(-n // 3) for n in [8] * 6 + [2]) + again


def test_a_text_that_fills_its_only_small_shard_is_read_once(tmp_path):
    lm = places_lm()
    cache = made(tmp_path, lm, tokens(8))
    assert (cache.n_windows, len(cache.shards), lm.model.calls) == (8, 1, 3)


def test_the_norm_limit_is_that_of_a_harvest_and_a_row_goes_for_all_hooks(tmp_path):
    lm, text = places_lm(), tokens()
    lm.model.first.weight[7] *= 100
    text[:, 2] = torch.where(torch.arange(50) % 9 == 0, 7, text[:, 2])
    text[torch.arange(CONTEXT).expand(50, -1) != 2] %= 7
    text += text == 0
    with pytest.warns(RuntimeWarning, match="of outlying norms"):
        cache = made(tmp_path / "shards", lm, text)
    alone = harvest(lm, text, "first", folder=tmp_path / "one", progress=False)
    assert torch.equal(
        ((text == 7) & (torch.arange(CONTEXT) > 0)).sum(),
        torch.tensor(alone.manifest["dropped"]["norm"]),
    )
    rows = everything(cache)["first"]
    # what "second" drops beside is gone from "first" too
    assert len(rows) <= len(alone.rows)
    assert set(map(tuple, rows.tolist())) <= set(map(tuple, alone.rows.tolist()))
    assert cache.manifest["dropped"]["norm"] >= alone.manifest["dropped"]["norm"] > 0


def test_a_second_call_opens_what_is_there(tmp_path):
    lm = places_lm()
    made(tmp_path, lm)
    before = lm.model.calls
    made(tmp_path, lm)
    assert lm.model.calls == before


def test_any_process_makes_a_missing_shard_to_the_same_bytes(tmp_path):
    made(tmp_path)
    want = files(tmp_path)
    for missing in ([0], [3], [6, 2], range(7)):
        for number in missing:
            for folder in (*HOOKS, "index"):
                (tmp_path / folder / shard_name(number)).unlink()
        (tmp_path / "manifest.json").unlink()
        made(tmp_path, rank=1, world=3)
        assert files(tmp_path) == want


@pytest.mark.parametrize("n", [48, 50, 3])
def test_ranks_beyond_the_end_of_the_text_have_nothing_to_do(tmp_path, n):
    made(tmp_path / "one", text=tokens(n))
    made(tmp_path / "many", text=tokens(n), rank=6, world=9)
    assert files(tmp_path / "many") == files(tmp_path / "one")


WORKER = """
    import os, signal, sys, time
    sys.path.insert(0, {support!r})
    import torch
    torch.set_num_threads(1)
    from tiny_lm import places_lm
    from bae_fast.lm import harvest_shards

    lm = places_lm()
    stop = int(sys.argv[3])
    def count(module, arguments, output):
        count.calls += 1
        if count.calls == stop:
            os.kill(os.getpid(), signal.SIGKILL)
    count.calls = 0
    count.__module__ = "bae_fast.lm.test"  # no hook of the user's own
    lm.model.second.register_forward_hook(count)
    tokens = torch.randint(1, 42, (50, 16), generator=torch.Generator().manual_seed(0))
    harvest_shards(lm, tokens, ["first", "second"], sys.argv[1], shard_windows=8, batch_size=3,
                   rank=int(sys.argv[2]), world=2, max_norm_ratio=float("inf"), progress=False)
"""


def worker(folder, rank=0, stop=0):
    code = textwrap.dedent(WORKER).format(support=str(Path(__file__).parents[1] / "support"))
    return processes.start("-c", code, folder, rank, stop)


def test_processes_side_by_side_and_killed_ones_give_the_bytes_of_one(tmp_path):
    made(tmp_path / "one", max_norm_ratio=float("inf"))
    many = tmp_path / "many"
    killed = worker(many, rank=0, stop=5)  # within the second shard it makes
    assert killed.wait(120) == -signal.SIGKILL
    done = [p.name for p in (many / "index").iterdir() if not p.name.startswith(".")]
    assert done == [shard_name(0)]
    both = [worker(many, rank) for rank in (0, 1)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert files(many) == files(tmp_path / "one")


def test_a_folder_of_other_settings_is_refused_and_the_setting_named(tmp_path):
    made(tmp_path)
    for change, name in (
        ({"lm": places_lm(seed=1)}, "model_revision"),
        ({"text": tokens(seed=1)}, "text"),
        ({"drop_positions": 2}, "drop_positions"),
        ({"shard_windows": 9}, "shard_windows"),
    ):
        with pytest.raises(
            ValueError, match=f"must hold a harvest of the same settings; its {name} is"
        ):
            made(tmp_path, **change)


def test_an_unfinished_cache_is_not_opened(tmp_path):
    made(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"has no manifest\.json: the harvest is not finished"):
        ShardedCache(tmp_path)
    with pytest.raises(ValueError, match="must hold a sharded cache"):
        ShardedCache(tmp_path / "nothing")


def test_damage_is_named(tmp_path):
    cache = made(tmp_path)
    path = tmp_path / "second" / shard_name(2)
    whole = path.read_bytes()

    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{path} must have [\d,]+ bytes; it has [\d,]+ bytes"):
        ShardedCache(tmp_path)

    path.unlink()
    with pytest.raises(ValueError, match=f"{path} must have .* it is missing"):
        ShardedCache(tmp_path)

    for at in (600, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        damaged = ShardedCache(tmp_path)
        with pytest.raises(ValueError, match=f"{path} is corrupt: rows 0 to 119 are not those"):
            damaged.read_block(2)
        with pytest.raises(ValueError, match=f"{path} is corrupt: its digest"):
            damaged.verify()
        assert len(damaged.read_block(1)["second"]) == 120
    path.write_bytes(whole)
    cache.verify()

    index = tmp_path / "index" / shard_name(1)
    data = index.read_bytes()
    index.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{index} is corrupt"):
        ShardedCache(tmp_path).read_block(1)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (["hooks"], 3),
        (["hooks", "first"], 10**19),
        (["dtype"], "float99"),
        (["context_size"], None),
        (["shards"], []),
        (["shards", 1], {"n_rows": 3}),
        (["shards", 1, "n_rows"], -(10**19)),
        (["shards", 1, "first_row"], 0),
        (["shards", 2, "files"], {}),
    ],
)
def test_a_damaged_manifest_is_one_line(where, value, tmp_path):
    made(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = inside = json.loads(path.read_text())
    for name in where[:-1]:
        inside = inside[name]
    inside[where[-1]] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"{path} is corrupt") as caught:
        ShardedCache(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["limits", "no limits", "truncated", "not about a shard"])
def test_going_on_from_damaged_files_is_one_line(damage, tmp_path):
    made(tmp_path)
    (tmp_path / "manifest.json").unlink()
    path = tmp_path / "index" / shard_name(1)
    if "limits" in damage:
        path = tmp_path / "limits.json"
        path.write_text('{"limits": {"first": NaN}}' if damage == "limits" else "[]")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:30])
    else:
        save_file({"a": torch.zeros(2)}, path, {"shard": '{"n_windows": "many"}'})
    with pytest.raises(ValueError, match=f"{path} is corrupt") as caught:
        made(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model_that_the_rows_are_not_of_is_named(tmp_path):
    cache = made(tmp_path)
    cache.check_model(places_lm())
    with pytest.raises(
        ValueError, match=r"whose model_revision is 'parameters-.*; got 'parameters-"
    ):
        cache.check_model(places_lm(seed=1))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_named_and_nothing_half_written_stays(tmp_path, monkeypatch):
    from bae_fast.lm import cache

    def full(self, rows):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"0")

    monkeypatch.setattr(cache.RowsFile, "append", full)
    with pytest.raises(OSError, match="No space left on device") as raised:
        made(tmp_path)
    assert raised.value.filename == str(tmp_path / "first" / shard_name(0))
    assert not [p for p in tmp_path.rglob("*.safetensors*") if p.is_file()]
    monkeypatch.undo()
    made(tmp_path).verify()


def test_the_split_is_that_of_one_file(tmp_path):
    lm, text = places_lm(), tokens()
    cache = made(tmp_path / "shards", lm, text, max_norm_ratio=float("inf"))
    one = harvest(lm, text, "first", folder=tmp_path, max_norm_ratio=float("inf"), progress=False)
    for n in (15, 100, 16, 200, 700):
        assert cache.split(n) == one.split(n)
    for n in (1, 735, 5000):
        with pytest.raises(ValueError, match="leaves no whole window to"):
            cache.split(n)
        with pytest.raises(ValueError, match="leaves no whole window to"):
            one.split(n)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"shard_windows": 0}, ValueError, "shard_windows must be an int >= 1; got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be an int >= 1; got 0"),
        ({"drop_positions": 16}, ValueError, "drop_positions must be below context_size=16"),
        ({"text": torch.zeros(3)}, TypeError, "text must be an integer tensor"),
        (
            {"text": torch.full((2, 16), 42)},
            ValueError,
            "text must have ids between 0 and 41; got 42 to 42",
        ),
        ({"text": torch.zeros(2, 16, dtype=torch.int64)}, ValueError, "of the first 0 rows"),
    ],
)
def test_bad_arguments_are_named(tmp_path, change, error, text):
    with pytest.raises(error, match=text):
        made(tmp_path, **change)


def test_hooks_of_ones_own_are_refused(tmp_path):
    lm = places_lm()
    lm.model.second.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="lm must have no forward hooks of your own"):
        made(tmp_path, lm)
    assert os.listdir(tmp_path) == []
