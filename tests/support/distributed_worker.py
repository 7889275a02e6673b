"""One rank of tests/layer/test_distributed.py: ``python distributed_worker.py RANK STORE RESULT``.

Runs every case on one process group, so that processes are started once, and saves what each
gave: case name -> result. The test compares with a single process. Rank r's rows come from
``rows(r)``, which the test imports too.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import traceback
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import bae_fast as bf

WORLD = 2
D_IN, D_SAE = 5, 37  # odd: FSDP's shards are uneven
TERMS = ("recon", "entropy", "covariance")
SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(TERMS, n)]
FROZEN = ((), ("W_enc",), ("W_dec",), ("b_enc", "b_dec"))
N_ROWS = (11, 6)  # of each rank, in the pooled cases


def make_module() -> bf.BinaryAutoencoder:
    torch.manual_seed(3)
    bae = bf.BinaryAutoencoder(D_IN, D_SAE, surrogate="identity", dtype=torch.float64, impl="torch")
    bae.fit_normalization_(torch.randn(64, D_IN, dtype=torch.float64) * 3 + 1)
    return bae.init_density_(torch.randn(64, D_IN, dtype=torch.float64), 0.4)


def rows(rank: int, n: int = 13) -> Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(n, D_IN, dtype=torch.float64, generator=generator) * 2 + 1


def masks(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(200 + rank)
    return torch.rand(N_ROWS[rank], generator=generator) < 0.7


def part_of_loss(bae: Any, out: bf.BAEOutput, x: Tensor, subset: tuple[str, ...]) -> Tensor:
    terms = {"recon": lambda: bae.mse(out, x), "entropy": lambda: 0.3 * out.entropy,
             "covariance": lambda: 0.7 * out.covariance}  # fmt: skip
    return torch.stack([terms[name]() for name in subset]).sum()


def freeze(bae: nn.Module, names: tuple[str, ...]) -> None:
    for name in names:
        bae.get_parameter(name).requires_grad_(False)


def gradients(bae: nn.Module) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = {}
    for name, parameter in bae.named_parameters():
        grad = parameter.grad
        if grad is not None and hasattr(grad, "full_tensor"):
            grad = grad.full_tensor()
        found[name] = None if grad is None else grad.clone()
    return found


def ddp(rank: int, subset: tuple[str, ...], frozen: tuple[str, ...]) -> dict[str, Any]:
    bae = make_module()
    freeze(bae, frozen)
    wrapped = nn.parallel.DistributedDataParallel(bae, find_unused_parameters=True)
    x = rows(rank)
    for _ in range(2):  # the second pass finds the buckets as the first left them
        wrapped.zero_grad()
        part_of_loss(bae, wrapped(x, covariance="covariance" in subset), x, subset).backward()
    return gradients(bae)


def fsdp(rank: int, subset: tuple[str, ...], frozen: tuple[str, ...]) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    bae = make_module()
    freeze(bae, frozen)
    fully_shard(bae, mesh=init_device_mesh("cpu", (WORLD,)), reshard_after_forward=True)
    x = rows(rank)
    out = bae(x, covariance="covariance" in subset)
    # resharded: what the backward needs of the parameters is not here any more
    assert isinstance(bae.W_enc, DTensor)
    assert bae.W_enc.to_local().numel() < D_IN * D_SAE
    part_of_loss(bae, out, x, subset).backward()
    return gradients(bae)


def fsdp_inside_a_model(rank: int) -> dict[str, Any]:
    """The layer between two linear maps, each sharded on its own: x asks for a gradient."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make_model()
    mesh = init_device_mesh("cpu", (WORLD,))
    for part in (*model, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    model_loss(model, rows(rank)).backward()
    return gradients(model)


def mixed_module() -> bf.BinaryAutoencoder:
    """Wide parameters whose bfloat16 copies lose nothing, and a normalisation that would."""
    bae = make_module()
    with torch.no_grad():
        for parameter in bae.parameters():
            parameter.copy_(parameter.bfloat16())
    return bae.float()


def fsdp_in_bfloat16(rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    bae = mixed_module()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(bae, mesh=init_device_mesh("cpu", (WORLD,)), mp_policy=policy)
    x = rows(rank).float()
    out = bae(x, covariance=True)
    part_of_loss(bae, out, x, TERMS).backward()
    return {"gradients": gradients(bae), "dtype": out.recon.dtype}


def ddp_in_parts(rank: int) -> dict[str, Any]:
    """Two micro-batches of one update, of which the first sends nothing."""
    bae = make_module()
    wrapped = nn.parallel.DistributedDataParallel(bae)
    parts = rows(rank, 14).chunk(2)
    with wrapped.no_sync():
        part_of_loss(bae, wrapped(parts[0], covariance=True), parts[0], TERMS).backward()
    part_of_loss(bae, wrapped(parts[1], covariance=True), parts[1], TERMS).backward()
    return gradients(bae)


def fsdp_methods(rank: int) -> dict[str, Any]:
    """Methods beside forward, before and after FSDP was told of them, and the two files."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    bae = make_module()
    fully_shard(bae, mesh=init_device_mesh("cpu", (WORLD,)), reshard_after_forward=True)
    x = rows(rank)
    refused = {}
    for name, given in (("preactivation", (x,)), ("init_density_", (x, 0.1))):
        try:
            getattr(bae, name)(*given)
        except TypeError as error:
            refused[name] = str(error)
    for name, given in (("encode", x), ("decode", bf.BinaryCode.from_dense(x.new_zeros(3, D_SAE)))):
        try:
            getattr(bae, name)(given)
        except TypeError as error:
            refused[name] = str(error)
        register_fsdp_forward_method(bae, name)
    code = bae.encode(x)
    decoded = bae.decode(code).detach()
    with tempfile.TemporaryDirectory() as folder:
        bae.save_pretrained(folder)
        saved = bf.BinaryAutoencoder.from_pretrained(folder).state_dict()
    register_fsdp_forward_method(bae, "init_density_")
    try:
        bae.init_density_(x, 0.1)
    except TypeError as error:
        refused["init_density_, registered"] = str(error)
    return {"refused": refused, "code": code, "decoded": decoded, "saved": saved}


class Sandwiched(nn.Module):
    """The layer as a step of a model: the reconstruction goes on, the statistics are a penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.bae = make_module()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.bae(x, covariance=True)
        return out.recon, 0.3 * out.entropy + 0.7 * out.covariance


def make_model() -> nn.Sequential:
    torch.manual_seed(4)
    first = nn.Linear(D_IN, D_IN, dtype=torch.float64)
    last = nn.Linear(D_IN, 3, dtype=torch.float64)
    return nn.Sequential(first, Sandwiched(), _First(last))


class _First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        recon, penalty = pair
        return self.inner(recon).square().mean() + penalty


def model_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def pooled(rank: int, masked: bool) -> dict[str, Any]:
    """This rank's part of the gradient of the whole batch, summed over ranks."""
    from bae_fast.distributed import all_gather_code

    bae = make_module()
    x = rows(rank, N_ROWS[rank])
    mask = masks(rank) if masked else None
    code = all_gather_code(bae.encode(x, mask=mask))
    out = bae(x, mask=mask, covariance=True, stats=code.statistics(covariance=True))
    kept = len(x) if mask is None else mask.sum()
    share = bae.mse(out, x) * kept / code.n_rows()
    (share + 0.3 * out.entropy + 0.7 * out.covariance).backward()
    summed = gradients(bae)
    for grad in summed.values():
        dist.all_reduce(grad)
    return {"gradients": summed, "code": code, "terms": (out.entropy, out.covariance)}


def gathered(rank: int, case: str) -> Any:
    """all_gather_code on codes of unlike ranks."""
    from bae_fast.distributed import all_gather_code

    bits = torch.rand(8, 40, generator=torch.Generator().manual_seed(rank)) < 0.5
    code = bf.BinaryCode.from_dense(bits)
    if case == "one rank without rows" and rank == 0:
        code = code[:0]
    if case == "leading dimensions" and rank == 1:
        code = bf.BinaryCode.from_dense(bits.view(2, 4, 40))
    if case == "mask on one rank" and rank == 1:
        code = bf.BinaryCode(code.words, 40, row_mask=torch.arange(8) % 3 > 0)
    if case == "multi-bit":
        code = bf.BinaryCode.from_dense(bits, n_bits=2)
    if case == "columns differ" and rank == 1:
        code = bf.BinaryCode.from_dense(bits[:, :39])
    if case == "bits differ" and rank == 1:
        code = bf.BinaryCode.from_dense(bits, n_bits=2)
    if case == "group of one":
        groups = [dist.new_group([r]) for r in range(WORLD)]
        return all_gather_code(code, groups[rank])
    if case == "group of others":
        groups = [dist.new_group([r]) for r in range(WORLD)]
        return all_gather_code(code, groups[1 - rank])
    return all_gather_code(code)


GATHERED = (
    "equal", "one rank without rows", "leading dimensions", "mask on one rank", "multi-bit",
    "columns differ", "bits differ", "group of one", "group of others",
)  # fmt: skip


def cases() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in (ddp, fsdp):
        for subset in SUBSETS:
            found[f"{kind.__name__} {'+'.join(subset)}"] = (kind, subset, ())
        for frozen in FROZEN[1:]:
            found[f"{kind.__name__} without {'+'.join(frozen)}"] = (kind, TERMS, frozen)
    found["fsdp inside a model"] = (fsdp_inside_a_model,)
    found["fsdp methods"] = (fsdp_methods,)
    found["fsdp in bfloat16"] = (fsdp_in_bfloat16,)
    found["ddp in parts"] = (ddp_in_parts,)
    found["pooled"] = (pooled, False)
    found["pooled masked"] = (pooled, True)
    for case in GATHERED:
        found[f"gathered {case}"] = (gathered, case)
    return found


def main(rank: int, store: str, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    results: dict[str, Any] = {}
    for name, (body, *arguments) in cases().items():
        try:
            results[name] = body(rank, *arguments)
        except Exception as error:
            traceback.print_exc()
            results[name] = error
    torch.save(results, result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
