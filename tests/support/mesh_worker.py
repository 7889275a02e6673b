"""One rank of tests of several processes: ``python mesh_worker.py RANK WORLD STORE RESULT CASES``.

CASES is JSON: a list of [name, case, arguments]. Every case runs on one process group, so that
processes are started once, and its result is saved under its name. :func:`launch` starts the ranks;
what a case needs of rows and modules comes from functions that the tests import too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import processes
import torch
import torch.distributed as dist
from sparse_rows import synthetic
from torch import Tensor

import bae_fast as bf
from bae_fast.baselines import TRAINING, make_baseline
from bae_fast.distributed import Mesh
from bae_fast.training import Job, JobTrainer, MemorySupply, RunConfig, StoppedError, TrainingConfig

D, F, N, STREAMS = 16, 128, 64, 4
CONFIG = TrainingConfig(
    steps=50,
    batch_size=N,
    precision="float32",
    covariance_weight=1e-4,
    entropy_weight=1e-3,
    bank_batches=3,
    revive_every=10,
    dead_below=0.01,
    refit=False,
)


def module(seed: int = 0, **options: Any) -> bf.BinaryAutoencoder:
    torch.manual_seed(seed)
    bae = bf.BinaryAutoencoder(D, F, dtype=torch.float64, **options)
    return bae.fit_normalization_(synthetic(d=D).double())


def integer_module() -> bf.BinaryAutoencoder:
    """Small integers everywhere: every sum is exact, in any order."""
    g = torch.Generator().manual_seed(5)
    bae = bf.BinaryAutoencoder(D, F, dtype=torch.float64, surrogate_width=2.5)
    for parameter in bae.parameters():
        parameter.data = torch.randint(-2, 3, parameter.shape, generator=g).double()
    bae.b_enc.data -= 5
    return bae


def integer_rows() -> Tensor:
    return torch.randint(-3, 4, (800, D), generator=torch.Generator().manual_seed(6)).double()


def trainer(
    mesh: Mesh | None,
    config: TrainingConfig = CONFIG,
    rows: Tensor | None = None,
    bae: bf.BinaryAutoencoder | None = None,
    **run: Any,
) -> JobTrainer:
    rank, world = (0, 1) if mesh is None else (mesh.data_rank, mesh.data)
    rows = synthetic(d=D).double() if rows is None else rows
    supply = MemorySupply(rows, seed=3, streams=STREAMS, rank=rank, world=world)
    job = Job("a", bae or module(), config, hook="rows")
    return JobTrainer([job], supply, RunConfig(**run), mesh=mesh)


def parameters(run: JobTrainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in run.whole("a").state_dict().items()}


# -- cases: what each gives is compared with one process ------------------------------------------


def exact(mesh: Mesh | None) -> dict[str, Any]:
    """One step on integers: counts, D and H of it, and the gradients."""
    config = dataclasses.replace(CONFIG, init="none", revive_every=0)
    run = trainer(mesh, config, integer_rows(), integer_module(), log_every=1)
    line = run.train_step()["a"]
    learner = run.learners["a"]
    counts = learner.objective.bank.counts[-1][1]
    if mesh is not None:
        counts = mesh.gather(counts, "feature", "counts")
    return {
        "counts": counts,
        "terms": (line["covariance"], line["entropy_bits"]),
        "mse": line["mse"],
        "l0": line["l0"],
    }


def steps(
    mesh: Mesh | None, micro_batches: int = 1, shard_optimizer: bool = False, **changes: Any
) -> dict[str, Any]:
    """A whole training: its parameters, last line and the counts of the last batch."""
    options = {"micro_batches": micro_batches, "shard_optimizer": shard_optimizer}
    run = trainer(mesh, dataclasses.replace(CONFIG, **changes), **options)
    line = run.fit()["a"]
    counts = run.learners["a"].objective.bank.counts[-1][1]
    if mesh is not None:
        counts = mesh.gather(counts, "feature", "counts")
    moments = [
        list(value.shape)
        for state in run.learners["a"].optimizer.state.values()
        for name, value in state.items()
        if name == "exp_avg"
    ]
    return {"parameters": parameters(run), "line": line, "counts": counts, "moments": moments}


def baseline(mesh: Mesh | None, method: str) -> dict[str, Any]:
    """A whole training of a baseline, with features that die: parameters, buffers, last line."""
    x = synthetic(d=D).double()
    torch.manual_seed(0)
    sizes = {"d_out": D} if method == "transcoder" else {}
    sae = make_baseline(method, D, F, k=8, dtype=torch.float64, **sizes)
    with torch.no_grad():
        for bias in (getattr(sae, name, None) for name in ("b_enc", "b_gate")):
            if bias is not None:
                bias[: F // 4] -= 3  # dead until AuxK revives them
    targets = {"targets": x.roll(1, 1)} if sizes else {}
    sae.fit_normalization_(x, *targets.values())
    rank, world = (0, 1) if mesh is None else (mesh.data_rank, mesh.data)
    supply = MemorySupply({"rows": x, **targets}, seed=3, streams=STREAMS, rank=rank, world=world)
    config = dataclasses.replace(TRAINING, steps=12, batch_size=N, precision="float32", lr=1e-2)
    job = Job("a", sae, config, "rows", next(iter(targets), None))
    run = JobTrainer([job], supply, RunConfig(log_every=1), mesh=mesh)
    learner = run.learners["a"]
    learner.last_fired -= 1000 * (torch.arange(F) < F // 4)  # dead from the first step
    line = run.fit()["a"]
    return {"parameters": parameters(run), "line": line, "counts": learner.last_fired}


def sent(mesh: Mesh, covariance: bool, shard_optimizer: bool = False) -> dict[str, Any]:
    """Bytes that a rank sends in a step by ring algorithms: of what torch.distributed is given."""
    config = dataclasses.replace(
        CONFIG, init="none", revive_every=0, covariance_weight=1e-4 * covariance
    )
    run = trainer(mesh, config, shard_optimizer=shard_optimizer)
    run.train_step()
    total = 0.0
    reduce, gather = dist.all_reduce, dist.all_gather

    def count_reduce(tensor, *args, group=None, **kwargs):
        nonlocal total
        ranks = dist.get_world_size(group)
        total += 2 * tensor.numel() * tensor.element_size() * (ranks - 1) / ranks
        return reduce(tensor, *args, group=group, **kwargs)

    def count_gather(received, tensor, *args, group=None, **kwargs):
        nonlocal total
        total += tensor.numel() * tensor.element_size() * (len(received) - 1)
        return gather(received, tensor, *args, group=group, **kwargs)

    dist.all_reduce, dist.all_gather = count_reduce, count_gather
    try:
        run.train_step()
    finally:
        dist.all_reduce, dist.all_gather = reduce, gather
    return {"bytes": total}


def not_finite(mesh: Mesh) -> dict[str, Any]:
    """NaN in one row of one rank: the update that is left out, on every rank."""
    run = trainer(mesh, dataclasses.replace(CONFIG, init="none"))
    run.train_step()
    give = run.supply.next

    def spoiled(n):
        batch = give(n)
        if mesh.data_rank == mesh.data - 1:
            batch.x["rows"][2, 3] = float("nan")
            run.spoiled_id = int(batch.ids[2])
        return batch

    before = parameters(run)
    run.supply.next = spoiled
    run.train_step()
    run.supply.next = give
    after = parameters(run)
    run.train_step()
    return {
        "skipped": run.skipped,
        "id": getattr(run, "spoiled_id", None),
        "same": all(torch.equal(before[name], after[name]) for name in before),
        "went_on": all(value.isfinite().all() for value in parameters(run).values())
        and not torch.equal(parameters(run)["W_enc"], after["W_enc"]),
    }


def stopped(mesh: Mesh, folder: str, rank: int, step: int) -> dict[str, Any]:
    """SIGTERM to one rank in the middle of a step: where every rank ends."""
    run = trainer(mesh, out=Path(folder))
    backward = run.learners["a"].backward

    def interrupted(x, target):
        if run.step + 1 == step and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(x, target)

    run.learners["a"].backward = interrupted
    try:
        run.fit()
    except StoppedError as error:
        return {"step": run.step, "text": str(error), "signal": error.signal}
    return {"step": run.step}


def ids(mesh: Mesh | None, folder: str, n: int, **options: Any) -> dict[str, Any]:
    """Go on for n steps from the last checkpoint, and leave another: the rows of every step."""
    run = trainer(mesh, out=Path(folder), **options)
    run.resume()
    give, seen = run.supply.next, []

    def noted(n_rows):
        batch = give(n_rows)
        seen.append(batch.ids.clone())
        return batch

    run.supply.next = noted
    for _ in range(n):
        run.train_step()
    run.save()
    run.close()
    rows = torch.stack(seen)
    if mesh is not None:
        rows = mesh.gather(rows, "data", "ids", dim=1)
    return {"ids": rows, "parameters": parameters(run)}


def trained(mesh: Mesh | None, folder: str, kill: dict[str, int] | None = None) -> dict[str, Any]:
    """A run with checkpoints that goes on where one is; ``kill`` names a step of each rank."""
    run = trainer(mesh, out=Path(folder), checkpoint_every=3, log_every=1)
    run.resume()
    at = (kill or {}).get(str(0 if mesh is None else dist.get_rank()))
    step = run.train_step

    def killed():
        if run.step == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step()

    run.train_step = killed
    run.fit()
    run.close()
    return {"parameters": parameters(run)}


def asleep(mesh: Mesh, rank: int, folder: str) -> dict[str, Any]:
    """One rank does not come to a collective until the others have ended: what they are told."""
    ended = [Path(folder) / f"ended-{other}" for other in range(dist.get_world_size())]
    run = trainer(mesh)
    run.train_step()
    if dist.get_rank() == rank:
        while not all(path.exists() for path in ended[:rank] + ended[rank + 1 :]):
            time.sleep(0.05)
        return {}
    text = ""
    try:
        run.train_step()
    except RuntimeError as error:
        text = str(error)
    ended[dist.get_rank()].touch()
    return {"text": text}


CASES = {
    f.__name__: f for f in (exact, steps, baseline, sent, not_finite, stopped, ids, trained, asleep)
}


# -- processes ------------------------------------------------------------------------------------


def launch(
    folder: Path,
    world: int,
    cases: list[tuple[str, str, list[int], dict[str, Any]]],
    **options: Any,
) -> list[dict[str, Any]]:
    """Run cases on ``world`` processes and give every rank's results, by case name.

    Args:
        folder: a new folder for the store and the results.
        cases: (name, case, [data, feature], arguments).
        options: ``timeout`` of collectives in seconds; ``killed``: ranks may die, and the others
            are then ended.
    """
    folder.mkdir(parents=True)
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), environment.get("PYTHONPATH", "")]
    )
    results = [folder / f"{rank}.pt" for rank in range(world)]
    ranks = [
        processes.start(
            __file__, rank, world, folder / "store", results[rank], json.dumps(cases),
            options.get("timeout", 120), output=folder / f"{rank}.log", env=environment,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        if options.get("killed"):
            while all(process.poll() is None for process in ranks):
                time.sleep(0.05)
            return []
        for process in ranks:
            process.wait()
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for rank, process in enumerate(ranks):
        assert process.poll() == 0, (folder / f"{rank}.log").read_text()[-3000:]
    return results_of(folder, world)


def results_of(folder: Path, world: int) -> list[dict[str, Any]]:
    """What the ranks that :func:`launch` started there found."""
    found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
    for rank in found:
        for name, value in rank.items():
            if isinstance(value, str) and value.startswith("Traceback"):
                raise AssertionError(f"{name}: {value}")
    return found


def main(rank: int, world: int, store: str, result: str, cases: Any, timeout: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    meshes: dict[tuple[int, ...], Mesh] = {}
    results: dict[str, Any] = {}
    for name, case, grid, arguments in cases:
        try:
            if tuple(grid) not in meshes:
                meshes[tuple(grid)] = Mesh(*grid, timeout=timeout)
            results[name] = CASES[case](meshes[tuple(grid)], **arguments)
        except Exception:
            results[name] = traceback.format_exc()
            break  # the others may be anywhere
    torch.save(results, result)
    if not any(case == "asleep" for _, case, _, _ in cases):
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # a collective that was given up leaves threads behind


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], json.loads(sys.argv[5]),
         float(sys.argv[6]))  # fmt: skip
