"""What the layer keeps for backward, what it makes on the way, and its peak resident memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bae_fast as bf
from bae_fast.backends import torch as torch_backend
from bae_fast.backends.cpp import covariance as cpp_covariance
from bae_fast.codes import keep_signs, sign_planes_megabytes
from bae_fast.ops import registry, schemas
from bae_fast.ops.products import column_chunks
from bench import memory

CPP = registry.BACKENDS["cpp"]

SURROGATES = ("identity", "official", "sigmoid", "rectangle")
WORD = 32


def words(k: int) -> int:
    return -(-k // WORD)


def inputs(n: int, d: int, f: int, n_bits: int = 1) -> list[torch.Tensor]:
    shapes = [(n, d), (d, f * n_bits), (f * n_bits,), (f, d), (d,)]
    x, *parameters = [torch.randn(shape) for shape in shapes]
    return [x, *(parameter.requires_grad_() for parameter in parameters)]


def saved_bytes(
    given: list[torch.Tensor], impl: str = "torch", **options
) -> tuple[dict[int, int], bf.BAEOutput]:
    """Bytes of each distinct storage kept for backward, x and the parameters left out."""
    found: dict[int, int] = {}
    apart = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept = []  # alive until the end: a freed storage's address could come again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart and storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = bf.binary_autoencoder(*given, impl=impl, **options)
    assert kept
    return found, out


def expected_bytes(
    n: int, k: int, *, surrogate: str, covariance: bool, signs: bool, mask: bool
) -> int:
    packed = n * words(k) * 4
    total = packed + 8 * k + 8  # bits, counts, the number of rows
    if surrogate == "rectangle":
        total += packed  # the window
    if covariance and signs:
        total += 2 * k * words(k) * 4  # [V > 0] and [V < 0]
    return total + (n if mask else 0)


@pytest.mark.usefixtures("by_bits")
@pytest.mark.parametrize("signs", [True, False], ids=["signs kept", "signs recomputed"])
@pytest.mark.parametrize("covariance", [False, True], ids=["plain", "covariance"])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_bytes_kept_for_backward_are_those_of_the_formula(
    surrogate, covariance, signs, monkeypatch
):
    n, k = 67, 333
    monkeypatch.setenv("BAE_FAST_SIGN_PLANES_MB", "256" if signs else "0")
    found, _ = saved_bytes(inputs(n, 9, k), surrogate=surrogate, covariance=covariance)
    assert sum(found.values()) == expected_bytes(
        n, k, surrogate=surrogate, covariance=covariance, signs=signs, mask=False
    )


@pytest.mark.usefixtures("by_lists")
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_sparse_codes_keep_the_same_with_the_covariance_as_without(surrogate):
    """Lists of their ones are made again in backward: nothing grows with pairs of features."""
    n, k = 67, 1200
    given = inputs(n, 9, k)
    with torch.no_grad():
        given[2] -= 7  # about ten ones a row
    found, out = saved_bytes(given, surrogate=surrogate, covariance=True)
    assert 0 < float(out.code.density().mean()) < 0.05
    assert float(out.covariance.detach()) > 0
    assert sum(found.values()) == expected_bytes(
        n, k, surrogate=surrogate, covariance=True, signs=False, mask=False
    )


@pytest.mark.skipif(CPP.unavailable is not None, reason=f"cpp: {CPP.unavailable}")
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_lists_of_sparse_codes_keep_twelve_bytes_a_one(surrogate, monkeypatch):
    table = dict.fromkeys(cpp_covariance.LIST_COST, 1e-9)
    monkeypatch.setattr(cpp_covariance, "LIST_COST", table)
    n, k = 67, 1200
    given = inputs(n, 9, k)
    with torch.no_grad():
        given[2] -= 7  # about ten ones a row
    found, out = saved_bytes(given, impl="cpp", surrogate=surrogate, covariance=True)
    counts = out.code.counts()
    used = (counts > 0) & (counts < n)
    ranks = 2 + k + 2 * int(used.sum())  # a head; by feature, and by rank
    # a head; by row, by rank; three numbers a one
    lists = 2 + (2 * n + 1) + (int(used.sum()) + 1) + 3 * int(counts[used].sum())
    expected = expected_bytes(n, k, surrogate=surrogate, covariance=True, signs=False, mask=False)
    assert sum(found.values()) == expected + 4 * (ranks + lists)


@pytest.mark.usefixtures("by_bits")
def test_the_sign_planes_are_the_part_that_grows_with_the_square_of_the_features(monkeypatch):
    k = 640
    found, _ = saved_bytes(inputs(33, 9, k), covariance=True)
    assert 2 * k * words(k) * 4 == k * k // 4
    assert k * k // 4 in found.values()


@pytest.mark.parametrize(("gib", "megabytes"), [(4, 256), (80, 2560), (141, 4512)])
def test_the_sign_planes_of_a_gpu_may_take_a_share_of_its_memory(gib, megabytes, monkeypatch):
    """1 GiB of them at 65,536 features: made again in backward they cost more than the rest."""
    memory_of = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory_of)
    gpu = torch.device("cuda")
    assert sign_planes_megabytes(gpu) == megabytes
    assert keep_signs(65536, gpu) == (gib >= 80)
    assert sign_planes_megabytes(torch.device("cpu")) == 256


@pytest.mark.parametrize("n_bits", [1, 3])
def test_a_row_mask_adds_its_own_bytes_and_one_filled_copy_of_x(n_bits):
    n, d, f = 67, 9, 100
    given = inputs(n, d, f, n_bits)
    found, _ = saved_bytes(given, surrogate="rectangle", mask=torch.rand(n) < 0.5, n_bits=n_bits)
    expected = expected_bytes(
        n, f * n_bits, surrogate="rectangle", covariance=False, signs=False, mask=True
    )
    copy_of_x = n * d * 4  # x with its dropped rows zeroed: it stands for x, kept in its place
    assert sum(found.values()) == expected + copy_of_x


def test_a_leading_shape_or_autocast_keeps_x_and_the_parameters_themselves():
    given = inputs(64, 8, 96)
    x = given[0]
    _, out = saved_bytes([x.view(4, 16, 8), *given[1:]])
    kept = {t.data_ptr() for t in function_of(out).saved_tensors if t is not None}
    assert {tensor.data_ptr() for tensor in given} <= kept
    with torch.autocast("cpu", torch.bfloat16):
        _, out = saved_bytes(given)
    saved = [t for t in function_of(out).saved_tensors if t is not None]
    assert {tensor.data_ptr() for tensor in given[1:]} <= {t.data_ptr() for t in saved}
    # only x is kept in the compute dtype: no bf16 copy of a weight
    assert [tuple(t.shape) for t in saved if t.dtype == torch.bfloat16] == [(64, 8)]


@pytest.mark.parametrize("covariance", [False, True], ids=["plain", "covariance"])
def test_past_statistics_add_the_words_of_all_counted_rows_for_the_covariance_alone(covariance):
    given, k = inputs(40, 9, 70), 70
    past = bf.encode(torch.randn(25, 9), given[1], given[2]).statistics()
    found, _ = saved_bytes(given, surrogate="identity", covariance=covariance, past=past)
    expected = expected_bytes(
        40, k, surrogate="identity", covariance=covariance, signs=True, mask=False
    )
    counted = 65 * words(k) * 4 if covariance else 0
    assert sum(found.values()) == expected + counted


def test_statistics_that_were_given_are_kept_and_not_copied():
    given = inputs(40, 9, 70)
    stats = bf.encode(given[0], given[1], given[2]).statistics(covariance=True)
    owned = {
        t.untyped_storage().data_ptr()
        for t in (stats.n_rows, stats.counts, stats.words, stats.signs)
    }
    found, _ = saved_bytes(given, surrogate="identity", covariance=True, stats=stats)
    assert {p: size for p, size in found.items() if p not in owned} == {
        p: 40 * words(70) * 4 for p in set(found) - owned
    }
    assert owned <= set(found)
    assert len(set(found) - owned) == 1


def function_of(out: bf.BAEOutput):
    """The autograd node of the layer behind recon."""
    pending = [out.recon.grad_fn]
    while pending:
        node = pending.pop()
        if "PackedAutoencoder" in type(node).__name__:
            return node
        pending += [parent for parent, _ in node.next_functions if parent is not None]
    raise AssertionError("no node of the layer")


@pytest.mark.parametrize("covariance", [False, True], ids=["plain", "covariance"])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_no_tensor_is_kept_on_the_context_outside_save_for_backward(surrogate, covariance):
    mask = torch.rand(40) < 0.8
    out = bf.binary_autoencoder(
        *inputs(40, 9, 70), surrogate=surrogate, covariance=covariance, mask=mask, impl="torch"
    )
    node = function_of(out)
    leaves = tree_leaves(dict(vars(node)))
    assert surrogate in leaves  # it is the right object
    for leaf in leaves:
        assert isinstance(leaf, (str, int, float, bool, torch.dtype, type(None))), type(leaf)


# -- what is made on the way -------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Records every tensor that an aten operator returns, inside the raw operators too.

    A raw operator is opaque to a mode (its body runs with the mode popped), so its body is
    entered again with the mode on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()
        self.bodies: set[str] = set()
        self.largest: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "bae_fast":
            name = func._schema.name.split("::")[1]
            self.bodies.add(name)
            with self:
                return torch_backend._BODIES[name](*args, **(kwargs or {}))
        self.operators.add(func.overloadpacket.__name__)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.largest[leaf.dtype] = max(self.largest.get(leaf.dtype, 0), leaf.numel())
        return result


def watched_step(n: int, f: int, *, d: int = 4, **options) -> Watch:
    given = inputs(n, d, f)
    given[0].requires_grad_()
    with Watch() as watch:
        out = bf.binary_autoencoder(*given, impl="torch", **options)
        loss = out.recon.square().mean() + out.entropy
        (loss if out.covariance is None else loss + out.covariance).backward()
    return watch


@pytest.mark.parametrize("signs", [True, False], ids=["signs kept", "signs recomputed"])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_no_float_of_n_by_f_and_no_number_of_f_by_f_is_ever_made(surrogate, signs, monkeypatch):
    # 1 MiB of scratch is 256 columns of 1024 rows: 9 chunks of features, 9 tiles of F x F
    n, f = 1024, 2304
    monkeypatch.setenv("BAE_FAST_SCRATCH_MB", "1")
    monkeypatch.setenv("BAE_FAST_SIGN_PLANES_MB", "256" if signs else "0")
    chunks = list(column_chunks(n, f, 1, torch.device("cpu")))
    assert len(chunks) >= 8
    watch = watched_step(n, f, surrogate=surrogate, covariance=True)

    assert watch.bodies == set(schemas.SCHEMAS)
    assert {"mm", "addmm", "addmm_"} & watch.operators == {"mm", "addmm", "addmm_"}
    assert len(watch.operators) > 20

    for dtype, size in watch.largest.items():
        if dtype.is_floating_point:
            assert size < n * f, f"{dtype} of {size} elements; N x F is {n * f}"
        if dtype is not torch.bool:
            assert size < f * f, f"{dtype} of {size} elements; F x F is {f * f}"
    assert watch.largest[torch.float32] >= n * 256  # it did see the chunks


def test_no_bool_of_n_by_f_is_made_either(monkeypatch):
    n, f = 1024, 2304
    monkeypatch.setenv("BAE_FAST_SCRATCH_MB", "1")
    watch = watched_step(n, f, surrogate="rectangle", covariance=True)
    assert watch.largest[torch.bool] < n * f


def test_the_watch_would_see_a_dense_program():
    given = inputs(64, 4, 96)
    with Watch() as watch:
        bf.binary_autoencoder(*given, covariance=True, impl="reference")
    assert watch.largest[torch.float32] >= 64 * 96
    assert watch.largest[torch.float64] >= 96 * 96


# -- resident memory ---------------------------------------------------------------------------


@pytest.mark.matrix
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")
def test_a_step_with_covariance_needs_at_most_an_eighth_of_the_dense_program():
    """At N = 256, F = 6144; ``python -m bench.memory`` gives the figures of the full size."""
    f = 6144
    found = memory.compare(256, 32, f, impl="torch")
    # the dense side has at least C, its absolute value's sign and one gradient: three F x F
    assert found["dense"]["peak_bytes"] > 3 * f**2 * 4
    # the packed side has at least the sign planes: the figure is not just zero
    assert found["packed"]["peak_bytes"] > f**2 // 4
    assert found["ratio"] <= 1 / 8, found
    assert "1 /" in memory.table({"rows": [found]})
