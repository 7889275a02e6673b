"""Sparse codes by lists of their ones, in Triton's interpreter."""

import numpy as np
import pytest
import torch
from triton_steps import NAMES, OPS, assert_as_good_as_eager, exact_covariance, problem

from bae_fast.kernels import bits, configs, pair_lists
from bae_fast.kernels.bodies import covariance as covariance_body
from bae_fast.ops import nvidia
from bae_fast.packing import pack_rows, unpack_rows


@pytest.fixture
def sparse(monkeypatch):
    """Lists serve as far as their capacity goes; the programs that run are two."""
    monkeypatch.setattr(nvidia, "DENSE_A_STEP", 1)
    monkeypatch.setattr(nvidia, "LEAST_PRODUCTS", 1)
    monkeypatch.setattr(pair_lists, "WINDOW_SHARE", 1)
    small = {"pair_lists": (configs.Config(4, 8, 1, 4, 1),)}
    monkeypatch.setitem(
        configs.DEFAULTS, "interpreter", {**configs.DEFAULTS["interpreter"], **small}
    )


def few_ones(n, k, ones=3.0, seed=0):
    """Sparse bits with constant columns, twins, columns that never meet, ties."""
    g = torch.Generator().manual_seed(seed)
    dense = torch.rand(n, k, generator=g) < ones / k
    dense[:, 0], dense[:, 1] = True, False
    dense[:, 2] = dense[:, 3]
    dense[:, 4] = torch.arange(n) % 2 == 0
    dense[:, 5], dense[:, 6] = ~dense[:, 4], torch.arange(n) % 4 < 2
    return dense


@pytest.mark.parametrize("lines", [(5, 33), (17, 7), (3, 2100)], ids=str)
def test_lists_are_where_the_ones_are(lines):
    dense = torch.rand(lines) < 0.3
    dense[1] = False
    on, off = (torch.tensor([value], dtype=torch.int32) for value in (1, 0))
    found = pair_lists.Lists(pack_rows(dense), dense.numel())
    found.entries.fill_(-7)
    found.fill(off)
    assert (found.entries == -7).all()
    found.fill(on)
    assert bool(found.fit())
    assert torch.equal(found.lengths(), dense.sum(1))
    expected = torch.cat([row.nonzero().flatten() for row in dense])
    assert torch.equal(found.entries[: len(expected)].long(), expected)
    short = pair_lists.Lists(pack_rows(dense), 5)  # more ones than there is room for
    short.fill(on)
    assert not bool(short.fit())
    assert torch.equal(short.entries.long(), expected[:5])
    assert torch.equal(short.starts, found.starts)


@pytest.mark.parametrize("shape", [(2, 9), (17, 20), (9, 33)], ids=str)
def test_the_covariance_by_lists_equals_integers(shape, sparse):
    dense = few_ones(*shape)
    counts, v = exact_covariance(dense)
    words, total = pack_rows(dense), torch.tensor(shape[0])
    args = (torch.from_numpy(counts), total)
    pairs = pair_lists.PairLists(words, bits.feature_packed(words, shape[1]), *args)
    assert bool(pairs.serves)
    total, planes = torch.tensor(-7), torch.zeros(2, 3, 1, dtype=torch.int32)
    pairs.settle(total, planes)
    assert int(total) == int(np.abs(v).sum())
    assert planes.flatten().tolist() == [-1, 0, 0, -1, 0, 0]
    numerator, signs = OPS["covariance"](words, *args, True)
    assert int(numerator) == int(np.abs(v).sum())
    # the dense kernel made nothing, and the planes say so
    assert covariance_body.made(signs) == 0


def test_a_code_with_too_many_ones_is_counted_by_products(sparse, monkeypatch):
    n, k = 12, 20
    dense = few_ones(n, k)
    counts, v = exact_covariance(dense)
    for name, value in (("MOST_ONES", 2), ("MOST_ONES", 256)):
        monkeypatch.setattr(pair_lists, name, value)
        step = 1 if value == 2 else k * k * n // 2  # lists too short; one step allowed
        monkeypatch.setattr(nvidia, "DENSE_A_STEP", step)
        monkeypatch.setattr(nvidia, "lists_may_serve", lambda n, k: True)
        args = (pack_rows(dense), torch.from_numpy(counts), torch.tensor(n), True)
        numerator, signs = OPS["covariance"](*args)
        assert int(numerator) == int(np.abs(v).sum())
        assert covariance_body.made(signs) != 0
        above, below = unpack_rows(signs, k, torch.int8)
        np.testing.assert_array_equal((above - below).numpy(), np.sign(v))


@pytest.mark.parametrize(
    ("other_rows", "fits"),
    [
        pytest.param(False, True, id="own-lists"),
        pytest.param(True, False, id="more rows-window too large"),
        pytest.param(True, True, id="more rows-lists", marks=pytest.mark.long),
        pytest.param(False, False, id="own-window too large", marks=pytest.mark.long),
    ],
)
def test_the_gradient_by_lists_is_that_by_products(fits, other_rows, sparse, monkeypatch):
    """To the last bit, with planes that were marked, kept or not kept."""
    n, k, d = 11, 16, 4
    g = torch.Generator().manual_seed(1)
    counted = few_ones(n, k)
    if other_rows:  # at hand: ones in columns that the counted rows do not have
        counted = torch.cat([counted, few_ones(5, k, seed=2)])
    at_hand = counted[:n].clone()
    at_hand[0, 1] = other_rows
    words, window = pack_rows(at_hand), pack_rows(torch.rand(n, k, generator=g) < 0.2)
    stats, total = pack_rows(counted), torch.tensor(len(counted))
    counts = counted.sum(0)
    x, W = torch.randn(n, d, generator=g), torch.randn(d, k, generator=g)
    b, W_dec = torch.randn(k, generator=g), torch.randn(k, d, generator=g)
    served = []
    plain = pair_lists.WindowSigns.add_to

    def noted(self, out, start):
        served.append(bool(self.serves))
        plain(self, out, start)

    monkeypatch.setattr(pair_lists.WindowSigns, "add_to", noted)
    if not fits:
        monkeypatch.setattr(pair_lists, "WINDOW_SHARE", 16)
    monkeypatch.setenv("BAE_FAST_SCRATCH_MB", "0")

    def gradients(planes, surrogate="rectangle"):
        return OPS["encoder_backward"](
            x, W, b, W_dec, words, window, None, None, None, None, torch.tensor(0.25), planes,
            stats, counts, total, surrogate, 0.5, 1, [True] * 3,
        )  # fmt: skip

    marked = OPS["covariance"](stats, counts, total, True)[1]
    assert covariance_body.made(marked) == 0
    got = [gradients(planes) for planes in (marked.clone(), None)]
    assert served == [fits] * 2
    got_identity = gradients(marked.clone(), "identity")
    monkeypatch.setattr(nvidia, "DENSE_A_STEP", 10**9)
    signs = OPS["covariance"](stats, counts, total, True)[1]
    expected = gradients(signs)
    assert len(served) == 2
    for found in got:
        for left, right in zip(found, expected, strict=True):
            assert right.any()
            assert torch.equal(left, right)
    for left, right in zip(got_identity, gradients(signs, "identity"), strict=True):
        assert torch.equal(left, right)


def test_the_gradient_by_lists_where_the_sum_of_pairs_is_left_to_products(sparse, monkeypatch):
    """Few enough steps for the gradient, which the products take twice for, and not for the sum."""
    n, k, d = 12, 32, 4
    dense = few_ones(n, k, ones=2.0)
    words, counts, total = pack_rows(dense), dense.sum(0), torch.tensor(n)
    inside = torch.zeros(n, k, dtype=torch.bool)
    inside[::5, ::4] = True
    window = pack_rows(inside)
    steps = int(dense.sum(1).square().sum())
    monkeypatch.setattr(nvidia, "DENSE_A_STEP", -(-n * k * k // (2 * (steps - 1))))
    pairs = pair_lists.PairLists(words, bits.feature_packed(words, k), counts, total)
    assert not bool(pairs.serves)
    assert bool(pair_lists.WindowSigns(pairs, words, window, torch.tensor(1.0)).serves)

    made = pair_lists.Lists.__init__

    def emptied(self, *arguments):
        made(self, *arguments)
        self.entries.zero_()  # what was never written must not be right by chance

    monkeypatch.setattr(pair_lists.Lists, "__init__", emptied)
    g = torch.Generator().manual_seed(1)
    x, W = torch.randn(n, d, generator=g), torch.randn(d, k, generator=g)
    b, W_dec = torch.randn(k, generator=g), torch.randn(k, d, generator=g)

    def gradients():
        _, planes = OPS["covariance"](words, counts, total, True)
        return OPS["encoder_backward"](
            x, W, b, W_dec, words, window, None, None, None, None, torch.tensor(0.25), planes,
            words, counts, total, "rectangle", 0.5, 1, [True] * 3,
        )  # fmt: skip

    found = gradients()
    monkeypatch.setattr(nvidia, "DENSE_A_STEP", 10**9)
    for left, right in zip(found, gradients(), strict=True):
        assert right.any()
        assert torch.equal(left, right)


def test_a_whole_step_of_a_sparse_code(sparse):
    x, parameters, direction = problem(11, 5, 20, 1, 4, torch.bfloat16)
    parameters[1] = parameters[1] - 6
    assert_as_good_as_eager(
        x, parameters, direction, NAMES[:3], surrogate="rectangle", surrogate_width=1.5
    )


def test_small_codes_are_not_listed():
    assert not nvidia.lists_may_serve(10**6, 1024)  # dense enough wherever they are not empty
    assert not nvidia.lists_may_serve(512, 16384)  # done before a list would be
    assert nvidia.lists_may_serve(4096, 16384)
