"""Training on several processes against one: statistics, parameters, bytes, failures, going on."""

import dataclasses
import json
import random
import types
from pathlib import Path

import mesh_worker as worker
import pytest
import torch
from once import once

from bae_fast.baselines import METHODS, TRAINING, make_baseline
from bae_fast.distributed import Mesh
from bae_fast.training import Job, JobTrainer, MemorySupply, Pool, RunConfig, SparseObjective
from bae_fast.training.sharded_adam import ShardedAdam
from bench.scale import predicted_ms, sent_bytes, table

PAIRS = ([2, 1], [1, 2])
FOURS = ([4, 1], [1, 4], [2, 2])


def cases_of(grids, folder):
    for grid in grids:
        name = "x".join(map(str, grid))
        yield f"exact {name}", "exact", grid, {}
        yield f"steps {name}", "steps", grid, {}
        yield f"micro {name}", "steps", grid, {"micro_batches": 4, "steps": 6}
        yield f"sharded {name}", "steps", grid, {"shard_optimizer": True, "steps": 12}
        yield f"refit {name}", "steps", grid, {"steps": 4, "refit": True, "init": "density"}
        for covariance in (False, True):
            yield f"sent {covariance} {name}", "sent", grid, {"covariance": covariance}
        divided = {"covariance": False, "shard_optimizer": True}
        yield f"sent divided {name}", "sent", grid, divided
        yield f"not finite {name}", "not_finite", grid, {}
        stop = {"folder": str(folder / f"stop {name}"), "rank": 1, "step": 5}
        yield f"stopped {name}", "stopped", grid, stop
        for method in METHODS if grid[1] == 1 else ():
            yield f"baseline {method} {name}", "baseline", grid, {"method": method}


def ranks_of(tmp_path_factory, name, world, grids):
    def make(folder):
        worker.launch(folder / "ranks", world, list(cases_of(grids, folder)))

    return worker.results_of(once(tmp_path_factory, name, make) / "ranks", world)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return ranks_of(tmp_path_factory, "two", 2, PAIRS)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return ranks_of(tmp_path_factory, "four", 4, FOURS)


def on_grids(pairs, fours):
    """A test of two processes, and of four as a long proof."""
    marks = [pytest.param(grid, "two", id="x".join(map(str, grid))) for grid in pairs]
    together = [pytest.mark.long, pytest.mark.slow, pytest.mark.xdist_group("four")]
    marks += [
        pytest.param(grid, "four", id="x".join(map(str, grid)), marks=together) for grid in fours
    ]
    return pytest.mark.parametrize(("grid", "ranks"), marks)


every_grid = on_grids(PAIRS, FOURS)
every_data_grid = on_grids(PAIRS[:1], FOURS[:1])


def results(request, ranks, case, grid):
    name = f"{case} {'x'.join(map(str, grid))}"
    return [rank[name] for rank in request.getfixturevalue(ranks)]


@pytest.fixture(scope="module")
def alone():
    """The same trainings in this process, made once."""
    torch.set_num_threads(1)
    kept = {}

    def get(case, **arguments):
        key = (case, *sorted(arguments.items()))
        if key not in kept:
            kept[key] = worker.CASES[case](None, **arguments)
        return kept[key]

    return get


@every_grid
def test_counts_covariance_and_entropy_of_integers_are_those_of_one_process(
    request, alone, grid, ranks
):
    one = alone("exact")
    assert 0 < one["counts"].sum() < one["counts"].numel() * worker.N
    assert one["terms"][0] > 0
    for found in results(request, ranks, "exact", grid):
        assert torch.equal(found["counts"], one["counts"])
        assert found["terms"] == one["terms"]
        assert found["mse"] == one["mse"]
        assert found["l0"] == one["l0"]


def assert_same_training(found, one, within=1e-9):
    assert torch.equal(found["counts"], one["counts"])
    assert found["parameters"].keys() == one["parameters"].keys()
    for name, value in one["parameters"].items():
        assert (found["parameters"][name] - value).abs().max() <= within, name
    for name in ("mse", "entropy_bits", "covariance", "l0", "dead_share"):
        assert found["line"][name] == pytest.approx(one["line"][name], rel=1e-9, abs=1e-12), name


@every_grid
def test_fifty_steps_give_the_parameters_of_one_process(request, alone, grid, ranks):
    for found in results(request, ranks, "steps", grid):
        assert_same_training(found, alone("steps"))


@every_grid
def test_micro_batches_of_every_process_give_the_parameters_of_one(request, alone, grid, ranks):
    one = alone("steps", steps=6)
    for found in results(request, ranks, "micro", grid):
        assert_same_training(found, one)


@every_grid
def test_divided_moments_give_the_parameters_of_one_process(request, alone, grid, ranks):
    data, feature = grid
    one = alone("steps", steps=12)  # beyond the first revival
    for found in results(request, ranks, "sharded", grid):
        assert_same_training(found, one)
        f, d = worker.F // feature, worker.D
        assert found["moments"] == [[d // data, f], [f], [d], [f, d // data]]


@every_grid
def test_the_refit_is_of_all_features(request, alone, grid, ranks):
    one = alone("steps", steps=4, refit=True, init="density")
    for found in results(request, ranks, "refit", grid):
        assert_same_training(found, one, within=1e-7)


@every_grid
@pytest.mark.parametrize(
    ("case", "options"),
    [("False", {}), ("True", {"covariance": True}), ("divided", {"shard_optimizer": True})],
    ids=["no covariance", "covariance", "divided moments"],
)
def test_a_rank_sends_the_bytes_of_the_formulas(request, grid, ranks, case, options):
    expected = sent_bytes(worker.N, worker.D, worker.F, *grid, itemsize=8, **options)
    for found in results(request, ranks, f"sent {case}", grid):
        assert found["bytes"] - expected.total == 0


@every_grid
def test_nan_on_one_rank_leaves_out_one_update_on_all_and_names_the_row(request, grid, ranks):
    found = results(request, ranks, "not finite", grid)
    (spoiled,) = {one["id"] for one in found} - {None}
    for one in found:
        assert one["skipped"] == [(2, "a", [spoiled])]
        assert one["same"]
        assert one["went_on"]


@every_grid
def test_sigterm_to_one_rank_stops_all_after_the_same_step(request, grid, ranks):
    for one in results(request, ranks, "stopped", grid):
        assert one["step"] == 5
        assert one["signal"] == 15
        assert "stopped by SIGTERM after step 5; the same call goes on from" in one["text"]
        assert one["text"].endswith("step-5")


def go_on(folder, worlds, n):
    """Ids of all steps, of runs of so many processes one after the other, and the parameters.

    Every other of them has divided moments.
    """
    seen, last = [], None
    for number, grid in enumerate(worlds):
        world = grid[0] * grid[1]
        given = {"folder": str(folder / "run"), "n": n, "shard_optimizer": number % 2 == 0}
        (last, *_) = [
            rank["ids"] for rank in worker.launch(
                folder / f"ranks {number}", world, [("ids", "ids", grid, given)]
            )
        ]  # fmt: skip
        seen.append(last["ids"])
    return torch.cat(seen), last["parameters"]


def test_divided_moments_go_on_undivided_and_the_other_way(tmp_path):
    one = worker.ids(None, str(tmp_path / "one"), 6)
    folder = str(tmp_path / "run")
    divided = {"folder": folder, "n": 2, "shard_optimizer": True}
    worker.launch(tmp_path / "a", 2, [("ids", "ids", [2, 1], divided)])
    worker.ids(None, folder, 2)
    found, *_ = worker.launch(tmp_path / "b", 2, [("ids", "ids", [2, 1], divided)])
    for name, value in one["parameters"].items():
        assert (found["ids"]["parameters"][name] - value).abs().max() <= 1e-9, name
    # what the second of two processes wrote is compared by one that reads it alone
    path = tmp_path / "run" / "checkpoints" / "step-6" / "__1_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"step-6 is not .*: __1_0\.distcp is damaged: the checksum"
    ):
        worker.trainer(None, out=tmp_path / "run").resume()


@pytest.mark.long
def test_four_processes_then_one_then_two_see_the_rows_of_one(tmp_path):
    one = worker.ids(None, str(tmp_path / "one"), 12)
    found, parameters = go_on(tmp_path, ([2, 2], [1, 1], [2, 1]), 4)
    assert torch.equal(found, one["ids"])
    for name, value in one["parameters"].items():
        assert (parameters[name] - value).abs().max() <= 1e-9, name


@pytest.mark.long
@pytest.mark.slow
def test_a_killed_run_of_four_goes_on_to_the_bit_and_logs_each_step_once(tmp_path):
    grid, draw = [2, 2], random.Random(0)
    whole = {"folder": str(tmp_path / "whole")}
    expected = worker.launch(tmp_path / "w", 4, [("run", "trained", grid, whole)])[0]["run"]
    given = {"folder": str(tmp_path / "cut")}
    for number, step in enumerate(sorted(draw.sample(range(1, worker.CONFIG.steps), 10))):
        kill = {**given, "kill": {str(draw.randrange(4)): step}}
        worker.launch(tmp_path / f"k{number}", 4, [("run", "trained", grid, kill)], killed=True)
    found = worker.launch(tmp_path / "last", 4, [("run", "trained", grid, given)])[0]["run"]
    assert_equal_runs(tmp_path, expected, found)


def assert_equal_runs(folder, expected, found):
    for name, value in expected["parameters"].items():
        assert torch.equal(found["parameters"][name], value), name
    lines = [
        [json.loads(line) for line in (folder / name / "a" / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    ]
    for line in (*lines[0], *lines[1]):
        del line["seconds"], line["rows_per_second"]
    assert [line["step"] for line in lines[1]] == list(range(1, worker.CONFIG.steps + 1))
    assert lines[0] == lines[1]


def test_a_killed_run_goes_on_to_the_bit_and_logs_each_step_once(tmp_path):
    expected = worker.trained(None, str(tmp_path / "whole"))
    given = {"folder": str(tmp_path / "cut")}
    for number, step in enumerate((8, 20)):
        kill = {**given, "kill": {"0": step}}
        worker.launch(tmp_path / f"k{number}", 1, [("run", "trained", [1, 1], kill)], killed=True)
    found = worker.trained(None, given["folder"])
    assert_equal_runs(tmp_path, expected, found)


@pytest.mark.long
def test_a_rank_that_does_not_come_ends_the_others_by_name(tmp_path):
    cases = [("asleep", "asleep", [4, 1], {"rank": 2, "folder": str(tmp_path)})]
    for rank, found in enumerate(worker.launch(tmp_path / "r", 4, cases, timeout=20)):
        if rank != 2:
            assert "did not end at step 2" in found["asleep"]["text"]
            assert "over data" in found["asleep"]["text"]


def test_a_mesh_without_a_process_group_says_what_to_call():
    with pytest.raises(RuntimeError, match=r"^Mesh needs .*init_process_group\(\)"):
        Mesh(1, 2)
    with pytest.raises(ValueError, match=r"^data must be an int >= 1; got 0$"):
        Mesh(0, 2)


@every_data_grid
@pytest.mark.parametrize("method", METHODS)
def test_a_baseline_on_several_processes_has_the_parameters_of_one(
    request, alone, grid, ranks, method
):
    one = alone("baseline", method=method)
    assert not one["parameters"]["W_dec"].isnan().any()
    for found in results(request, ranks, f"baseline {method}", grid):
        assert torch.equal(found["counts"], one["counts"])
        assert found["parameters"].keys() == one["parameters"].keys()
        for name, value in one["parameters"].items():
            assert (found["parameters"][name] - value).abs().max() <= 1e-9, name
        assert found["line"].keys() == one["line"].keys()
        for name in set(one["line"]) - {"seconds", "rows_per_second"}:
            assert found["line"][name] == pytest.approx(one["line"][name], rel=1e-6), name


def test_a_width_that_cannot_be_divided_is_refused():
    bae = worker.module()
    names = {p: n for n, p in bae.named_parameters()}
    groups = [{"params": list(names)}]
    with pytest.raises(ValueError, match=r"no multiple of the 3 processes .* W_enc of width 16"):
        ShardedAdam(groups, names, types.SimpleNamespace(data=3), lr=1e-3)


def test_the_largest_of_all_processes_are_picked_once_where_values_are_equal():
    flat = torch.tensor([3.0, 1.0, 3.0, 2.0, 3.0, 0.0])

    class Half:
        data, data_rank = 2, 0

        def gather(self, tensor, axis, what):
            return torch.cat([flat[:3].topk(3).values, flat[3:].topk(3).values])

    kept = []
    for rank in range(2):
        mesh = Half()
        mesh.data_rank = rank
        found = Pool(mesh).largest(flat[3 * rank : 3 * rank + 3], 4, "values")
        assert found.least == 2
        assert torch.equal(flat[3 * rank : 3 * rank + 3][found.indices], found.values)
        kept += found.values.tolist()
    assert sorted(kept) == [2, 3, 3, 3]
    alone = Pool().largest(flat, 4, "values")
    assert sorted(alone.values.tolist()) == sorted(kept)
    assert alone.least == 2


def test_what_a_baseline_cannot_do_on_several_processes_is_refused():
    x = worker.synthetic(d=worker.D)
    config = dataclasses.replace(TRAINING, steps=2, batch_size=64, precision="float32")
    sae = make_baseline("topk", worker.D, 64, k=4).fit_normalization_(x)
    with pytest.raises(ValueError, match=r"micro_batches must be 1 for TopK.*; got 2"):
        JobTrainer([Job("a", sae, config, "rows")], MemorySupply(x), RunConfig(micro_batches=2))
    grid = types.SimpleNamespace(world=4, data=1, feature=4)
    with pytest.raises(ValueError, match=r"feature must be 1 for TopK: .*; got 4"):
        SparseObjective(sae, config).spread(grid, 1)

    class Own(torch.nn.Linear):
        d_sae = 64
        training_loss = before_update = after_update = finish = print

    own = Own(2, 2)
    grid = types.SimpleNamespace(world=4, data=4, feature=1)
    with pytest.raises(ValueError, match=r"data must be 1 for Own, which has no method pooled"):
        SparseObjective(own, config).spread(grid, 1)


def test_the_guide_has_the_table_of_the_formulas():
    page = Path(__file__).resolve().parents[2] / "docs" / "guide" / "scale.md"
    assert table() in page.read_text(encoding="utf-8")


def test_a_step_that_does_not_fit_is_no_prediction():
    assert predicted_ms(4096, 2**20, 1, 1) is None
    assert sent_bytes(4096, 4096, 65536, 1, 1).total == 0
