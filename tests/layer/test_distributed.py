"""Two gloo ranks: DistributedDataParallel, FSDP2, and statistics pooled over ranks.

The ranks are two subprocesses that run every case once (distributed_worker.py); each test here
compares one case with the same computation in this single process.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import distributed_worker as worker
import processes
import pytest
import torch
from distributed_worker import FROZEN, N_ROWS, SUBSETS, TERMS, WORLD
from once import once
from torch import Tensor

import bae_fast as bf
from bae_fast.distributed import all_gather_code

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="torch was built without gloo",
    ),
]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found: case -> result, or the exception it raised."""
    folder = once(tmp_path_factory, "ranks", start_ranks)
    return [torch.load(folder / f"result{r}", weights_only=False) for r in range(WORLD)]


def start_ranks(folder: Path) -> None:
    """Run every rank to its end; what it found is in the folder."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    )
    script = ROOT / "tests" / "support" / "distributed_worker.py"
    logs = [folder / f"log{rank}" for rank in range(WORLD)]
    started = [
        processes.start(
            script, rank, folder / "store", folder / f"result{rank}", output=log, env=environment
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(240) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0] * WORLD, "\n".join(log.read_text() for log in logs)


def result(ranks: list[dict[str, Any]], name: str) -> list[Any]:
    found = [rank[name] for rank in ranks]
    for value in found:
        if isinstance(value, Exception):
            raise value
    return found


def mean_gradients(subset: tuple[str, ...], frozen: tuple[str, ...]) -> dict[str, Tensor]:
    """The mean over ranks of each rank's gradients, in one process; None counts as zero."""
    bae = worker.make_module()
    worker.freeze(bae, frozen)
    for rank in range(WORLD):
        x = worker.rows(rank)
        out = bae(x, covariance="covariance" in subset)
        (worker.part_of_loss(bae, out, x, subset) / WORLD).backward()
    return zero_filled(bae, worker.gradients(bae))


def zero_filled(module: torch.nn.Module, gradients: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(parameter) if gradients[name] is None else gradients[name]
        for name, parameter in module.named_parameters()
    }


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        difference = (actual[name] - want).abs().max().item()
        assert difference <= 1e-12 * want.abs().max().item(), name


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_gradients_are_the_mean_over_ranks_whatever_outputs_are_used(ranks, kind, subset):
    expected = mean_gradients(subset, ())
    assert any(grad.any() for grad in expected.values())
    for found in result(ranks, f"{kind} {'+'.join(subset)}"):
        assert_same(zero_filled(worker.make_module(), found), expected)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("frozen", FROZEN[1:], ids="+".join)
def test_frozen_parameters_stay_without_gradient_and_the_others_are_right(ranks, kind, frozen):
    expected = mean_gradients(TERMS, frozen)
    for found in result(ranks, f"{kind} without {'+'.join(frozen)}"):
        assert [name for name, grad in found.items() if grad is None] == [
            name for name in found if name in frozen
        ]
        assert_same(zero_filled(worker.make_module(), found), expected)


def test_fsdp_shards_the_layer_inside_a_model_and_passes_the_gradient_on(ranks):
    model = worker.make_model()
    for rank in range(WORLD):
        (worker.model_loss(model, worker.rows(rank)) / WORLD).backward()
    expected = worker.gradients(model)
    assert expected["0.weight"].any()
    for found in result(ranks, "fsdp inside a model"):
        assert_same(found, expected)


def test_fsdps_mixed_precision_computes_with_bfloat16_parameters(ranks):
    """The normalisation is a buffer, which FSDP leaves as it is: it is applied in float32."""
    expected: dict[str, Tensor] = {}
    for rank in range(WORLD):
        bae = worker.mixed_module()
        for parameter in bae.parameters():
            parameter.data = parameter.data.bfloat16()
        x = worker.rows(rank).bfloat16()
        worker.part_of_loss(bae, bae(x, covariance=True), x, TERMS).backward()
        for name, grad in worker.gradients(bae).items():
            expected[name] = expected.get(name, 0) + grad.float() / WORLD
    for found in result(ranks, "fsdp in bfloat16"):
        assert found["dtype"] == torch.bfloat16
        for name, want in expected.items():
            assert want.any()
            difference = (found["gradients"][name] - want).abs().max()
            assert difference <= 0.01 * want.abs().max(), name


def test_ddp_adds_up_micro_batches_of_which_only_the_last_sends(ranks):
    bae = worker.make_module()
    for rank in range(WORLD):
        for part in worker.rows(rank, 14).chunk(2):
            out = bae(part, covariance=True)
            (worker.part_of_loss(bae, out, part, TERMS) / WORLD).backward()
    for found in result(ranks, "ddp in parts"):
        assert_same(found, worker.gradients(bae))


def test_under_fsdp_methods_that_it_knows_give_what_a_whole_module_gives(ranks):
    bae = worker.make_module()
    for rank, found in enumerate(result(ranks, "fsdp methods")):
        x = worker.rows(rank)
        refused = found["refused"]
        for name in ("init_density_", "init_density_, registered"):
            assert "init_density_ must come before fully_shard" in refused.pop(name)
        assert refused.keys() == {"encode", "decode", "preactivation"}
        for error in refused.values():
            assert " must be whole; got one process's shard of it (DTensor)" in error
            assert "register_fsdp_forward_method" in error
        assert found["code"].equal(bae.encode(x))
        assert torch.equal(found["decoded"], bae.decode(bae.encode(x)))
        assert found["saved"].keys() == bae.state_dict().keys()
        for name, value in bae.state_dict().items():
            assert torch.equal(found["saved"][name], value), name


@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "masked rows"])
def test_pooled_statistics_give_the_gradients_of_the_whole_batch(ranks, masked):
    bae = worker.make_module()
    x = torch.cat([worker.rows(rank, N_ROWS[rank]) for rank in range(WORLD)])
    mask = torch.cat([worker.masks(rank) for rank in range(WORLD)]) if masked else None
    out = bae(x, mask=mask, covariance=True)
    (bae.mse(out, x) + 0.3 * out.entropy + 0.7 * out.covariance).backward()
    expected = worker.gradients(bae)
    for found in result(ranks, "pooled masked" if masked else "pooled"):
        assert found["code"].equal(out.code)
        assert found["terms"] == (out.entropy, out.covariance)
        assert_same(found["gradients"], expected)


def bits_of(rank: int) -> Tensor:
    return torch.rand(8, 40, generator=torch.Generator().manual_seed(rank)) < 0.5


def test_gathered_rows_stand_in_rank_order_on_every_rank(ranks):
    for code in result(ranks, "gathered equal"):
        assert torch.equal(code.to_dense(), torch.cat([bits_of(0), bits_of(1)]))
        assert code.row_mask is None


def test_a_rank_without_rows_adds_none(ranks):
    for code in result(ranks, "gathered one rank without rows"):
        assert torch.equal(code.to_dense(), bits_of(1))


def test_leading_dimensions_become_rows(ranks):
    for code in result(ranks, "gathered leading dimensions"):
        assert torch.equal(code.to_dense(), torch.cat([bits_of(0), bits_of(1)]))


def test_a_mask_on_one_rank_is_kept_and_the_other_ranks_rows_all_count(ranks):
    for code in result(ranks, "gathered mask on one rank"):
        expected = torch.cat([torch.ones(8, dtype=torch.bool), torch.arange(8) % 3 > 0])
        assert torch.equal(code.row_mask, expected)
        assert code.n_rows() == 13


def test_multi_bit_codes_stay_multi_bit(ranks):
    for code in result(ranks, "gathered multi-bit"):
        assert (code.n_bits, code.n_features, len(code)) == (2, 20, 16)


def test_only_the_ranks_of_the_group_are_gathered(ranks):
    for rank, code in enumerate(result(ranks, "gathered group of one")):
        assert torch.equal(code.to_dense(), bits_of(rank))


@pytest.mark.parametrize(
    ("case", "words"),
    [("columns differ", "columns [40, 39]"), ("bits differ", "n_bits [1, 2]")],
)
def test_unlike_codes_are_refused_on_every_rank(ranks, case, words):
    for rank in ranks:
        error = rank[f"gathered {case}"]
        assert type(error) is ValueError
        assert "code must have the same columns and n_bits on every rank" in str(error)
        assert words in str(error)
        assert "\n" not in str(error)


def test_a_group_without_this_process_is_refused(ranks):
    for rank in ranks:
        error = rank["gathered group of others"]
        assert type(error) is ValueError
        assert str(error) == "group must contain this process"


def test_gathering_without_a_process_group_says_what_to_call():
    code = bf.BinaryCode.from_dense(bits_of(0))
    with pytest.raises(RuntimeError, match=r"^all_gather_code needs .*init_process_group\(\)"):
        all_gather_code(code)


def test_gathering_something_else_names_the_type():
    with pytest.raises(TypeError, match=r"^code must be a BinaryCode; got Tensor$"):
        all_gather_code(bits_of(0))  # type: ignore[arg-type]
