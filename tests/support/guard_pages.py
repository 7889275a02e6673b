"""Every operator of impl="cpp" with each tensor against a page that faults.

    BAE_FAST_SIMD=<level> python guard_pages.py [back] [front] [heap] [some] [all]

``back``: tensors end at the page behind them; ``front``: they start right after the one before
them; ``heap``: torch allocates them, for a run under AddressSanitizer; ``some``: every other size;
``all``: views of every size with rows next to each other and apart, else one of the two. Between
the rows of a view lies garbage. Each result must equal that of the same operator on plain tensors:
bit for bit, but where torch sums products that are not integers, whose order goes with strides and
alignment. The case is printed before it runs: after a fault, the last line names it.
test_cpp_memory.py runs this file.
"""

import ctypes
import itertools
import mmap
import sys

import torch

from bae_fast.backends.cpp import extension, units
from bae_fast.ops import registry
from bae_fast.packing import pack_rows

PLACES = [name for name in sys.argv[1:] if name not in ("some", "all")]
PAGE = mmap.PAGESIZE
PROT_NONE = 0
LIBC = ctypes.CDLL(None, use_errno=True)
# what lies beside the numbers of a view: a generator for every tensor would take most of the time
GARBAGE = torch.randint(0, 256, (2**23,), dtype=torch.uint8)


def protect(memory, offset):
    """Make the page at an offset fault at every touch."""
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + offset
    if LIBC.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(PAGE), PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded(tensor, place):
    """The same values and strides in memory that holds nothing else."""
    if tensor.numel() == 0:
        return tensor
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    if place == "heap":
        flat = torch.empty(span, dtype=tensor.dtype)
    else:
        size = span * tensor.element_size()
        inner = -(-size // PAGE) * PAGE
        memory = mmap.mmap(-1, inner + 2 * PAGE)  # lives as long as the tensor
        protect(memory, 0)
        protect(memory, PAGE + inner)
        offset = PAGE if place == "front" else PAGE + inner - size
        flat = torch.frombuffer(memory, dtype=tensor.dtype, count=span, offset=offset)
    if tensor.dtype == torch.bfloat16:
        flat.normal_()  # torch's own bf16 product reads past rows and takes their NaN times zero
    else:
        content = flat.view(torch.uint8)
        content.copy_(GARBAGE[: content.numel()])
    out = flat.as_strided(tensor.shape, tensor.stride())
    return out.copy_(tensor)


def strided(tensor, pad):
    """A view whose rows are ``pad`` elements further apart."""
    if pad == 0:
        return tensor
    wide = torch.zeros(tensor.shape[0], tensor.shape[1] + pad, dtype=tensor.dtype)
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


# of the largest entry
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}


def same(got, expected, exact):
    if isinstance(got, (tuple, list)):
        return all(same(a, b, exact) for a, b in zip(got, expected, strict=True))
    if not isinstance(got, torch.Tensor):
        return got == expected
    if exact or got.dtype not in ROUNDING or got.numel() == 0:
        # one element may have any stride, which view() refuses
        a, b = (t.new_empty(t.numel()).copy_(t.flatten()) for t in (got, expected))
        return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    a, b = got.double(), expected.double()
    return bool((a - b).abs().max() <= ROUNDING[got.dtype] * b.abs().max())


def check(name, operator, *args, exact=True):
    """Run on guarded and on plain arguments; what is written in place counts as a result."""
    plain = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    expected = operator(*plain)
    for place in PLACES:
        print(f"{name}, {place}", flush=True)
        placed = [guarded(a, place) if isinstance(a, torch.Tensor) else a for a in args]
        assert same(operator(*placed), expected, exact), "results differ"
        for i, (a, b) in enumerate(zip(placed, plain, strict=True)):
            if isinstance(a, torch.Tensor):
                assert same(a, b, exact=True), f"argument {i} differs"
    return expected


def code(n, k, pad):
    bits = torch.rand(n, k) < torch.rand(k)
    bits[:, 3::7] = False
    bits[:, 5::7] = True
    return bits, strided(pack_rows(bits), pad)


def private_operators(n, k, d, pad):
    """Those of csrc/operators.cpp, as the Python bodies call them."""
    op = extension.op
    bits, words = code(n, k, pad)
    shape = f"N {n}, K {k}, d {d}, rows {pad} words apart"
    counts = bits.sum(0)
    columns = check(f"rows_to_columns: {shape}", op("rows_to_columns"), words, k)
    check(f"column_counts: {shape}", op("column_counts"), words, k)
    check(f"count_ones: {shape}", op("count_ones"), words)
    check(f"rows_to_features: {shape}", op("rows_to_features"), words, k)

    added = torch.randn(k, d)
    squares = added.square().sum(1)
    for most in (0, 1, 2 * k):
        check(
            f"search: {shape}, most {most}", op("search"), 3 * torch.randn(n, k), added @ added.T,
            (squares + 0.1) / 2, (0.1 - squares) / 2, most, 1e-3, words,
        )  # fmt: skip

    start = k // 64 * 32
    for dtype, windowed in itertools.product(
        (torch.float32, torch.float64, torch.bfloat16), (False, True)
    ):
        pre = torch.randn(n, k - start).to(dtype)
        window = torch.zeros_like(words) if windowed else torch.empty(0, dtype=torch.int32)
        biases = [None] if dtype == torch.bfloat16 else [None, torch.randn(k - start).to(dtype)]
        for keep, bias in itertools.product((None, torch.rand(n) < 0.7), biases):
            given = f"window {windowed}, keep {keep is not None}, bias {bias is not None}"
            check(
                f"threshold {dtype}: {shape}, start {start}, {given}",
                op("threshold"), strided(pre, pad), bias, keep, 0.5, start, words, window,
            )  # fmt: skip

    signs = torch.zeros(0)
    if n > 1:
        for keep_signs in (False, True):
            _, signs = check(
                f"covariance: {shape}, signs {keep_signs}",
                op("covariance"), words, counts, n, keep_signs,
            )  # fmt: skip
    places = torch.arange(n.bit_length())
    digits = pack_rows((counts >> places[:, None]) & 1)
    for dtype, source, keep in itertools.product(
        (torch.float32, torch.float64), ("none", "stored", "computed"), (False, True)
    ):
        if source != "none" and n < 2:
            continue
        used = k - start
        check(
            f"backward {dtype}: {shape}, start {start}, signs {source}, keep {keep}",
            op("backward"),
            torch.randn(n, used, dtype=dtype), words, start,
            torch.randn(used, dtype=dtype) if keep else None,
            torch.randn(used, dtype=dtype) if keep else None,
            source != "none", signs if source == "stored" else None,
            columns if source == "computed" else None, None, None, None, counts, n,
            digits if source != "none" else None, 0.25,
            words if keep else None,
            None if keep else torch.rand(n, used, dtype=dtype),
            torch.rand(n) < 0.7 if keep else None, keep, torch.zeros(used, dtype=torch.float64),
        )  # fmt: skip

    gathers = (True, False)
    features = op("rows_to_features")(words, k)
    for gather, add in itertools.product(gathers, (False, True)):
        dense, out = torch.randn(k, d), torch.randn(n, d)
        check(
            f"bits_product: {shape}, gather {gather}, add {add}",
            op("bits_product"), words, strided(dense, pad), gather, add, strided(out, pad),
        )  # fmt: skip
        dense, out = torch.randn(n, d), torch.randn(k, d)
        check(
            f"bits_product of features: {shape}, gather {gather}, add {add}",
            op("bits_product"), features, strided(dense, pad), gather, add, out,
        )  # fmt: skip
    halves = (torch.float32, torch.bfloat16)
    for dtype, bias in itertools.product(halves, (None, torch.randn(d))):
        dense, out = torch.randn(k, d).to(dtype), torch.randn(n, d).to(dtype)
        check(
            f"gather_rows {dtype}: {shape}, bias {bias is not None}",
            op("gather_rows"), words, strided(dense, pad), bias, strided(out, pad),
        )  # fmt: skip

    check(f"entropy: K {k}", op("entropy"), counts, n)
    for dtype in (torch.float32, torch.float64):
        check(
            f"entropy_slopes {dtype}: K {k}",
            op("entropy_slopes"), counts, n, 0.5, torch.zeros(k, dtype=dtype),
        )  # fmt: skip
    unit, kept = torch.rand(d) + 0.5, torch.rand(n) < 0.7
    for ours, theirs, some in itertools.product(halves, halves, (None, kept)):
        recon = strided(torch.randn(n, d).to(ours), pad)
        target = strided(torch.randn(n, d).to(theirs), pad)
        name = f"{ours} and {theirs}: N {n}, d {d}, rows {pad} apart, mask {some is not None}"
        check(f"squared_error {name}", op("squared_error"), recon, target, unit, some)
        check(
            f"squared_error_gradient {name}", op("squared_error_gradient"),
            recon, target, unit, some, 0.3, torch.zeros(n, d).to(ours),
        )  # fmt: skip


def listed_operators(n, k, pad):
    """Lists of ones, and what is computed from them."""
    op = extension.op
    bits = torch.rand(n, k) < torch.rand(k) * 0.2
    bits[:, ::9] = torch.rand(n, len(range(0, k, 9))) < 0.6  # dense where the cost is 6
    bits[:, 3::7], bits[:, 5::11] = False, True
    words, counts = strided(pack_rows(bits), pad), bits.sum(0)
    at_hand = strided(pack_rows(torch.rand(n + 3, k) < 0.3), pad)
    window = pack_rows(torch.rand(n + 3, k) < 0.2)
    thin = pack_rows(torch.rand(n + 3, k) < 0.001)
    # every second column, in falling order; and all of them
    place = torch.full((k,), -1, dtype=torch.int32)
    place[::2] = torch.arange(len(place[::2]), dtype=torch.int32).flip(0)
    for cost, chosen in itertools.product((1e-9, 1e9), (place, torch.arange(k).int())):
        check(
            f"pair_counts: N {n}, K {k}, rows {pad} words apart, cost {cost}",
            op("pair_counts"), words, chosen, int(chosen.max()) + 1, cost,
        )  # fmt: skip
    rows, groups = strided(pack_rows(bits.T), 0), torch.randint(k, (4, 5), dtype=torch.int32)
    left = pack_rows(torch.rand(4 * 3, n) < 0.5).view(4, 3, -1)
    check(f"common_ones: N {n}, K {k}", op("common_ones"), left, rows, groups)
    found = 0
    for cost, all_rows in itertools.product((1e-9, 6.0), (False, True)):
        shape = f"N {n}, K {k}, rows {pad} words apart, cost {cost}"
        ranks, counted = check(
            f"pair_lists: {shape}, all rows {all_rows}",
            op("pair_lists"), words, counts, n, cost, all_rows,
        )  # fmt: skip
        if ranks.numel() == 0:
            continue
        found += 1
        here = check(f"list_rows: {shape}", op("list_rows"), at_hand, ranks, k)
        check(f"listed_covariance: {shape}", op("listed_covariance"), ranks, counted, k, n)
        for dtype, start in itertools.product((torch.float32, torch.float64), (0, k // 64 * 32)):
            check(
                f"backward from lists {dtype}: {shape}, start {start}",
                op("backward"),
                torch.randn(n + 3, k - start, dtype=dtype), at_hand, start, None, None, True, None,
                None, ranks, counted, here, counts, n, None, 0.25, window, None, None, False,
                torch.zeros(k - start, dtype=torch.float64),
            )  # fmt: skip
            d = start % 3 * 8 + 16 if start else 5  # rows of whole cache lines are read in place
            empty = torch.empty(0, dtype=dtype)
            keep = torch.rand(n + 3) < 0.7 if all_rows else None
            entries = check(
                f"list_window: {shape}, keep {all_rows}",
                op("list_window"), thin if start else window, keep, (n + 3) * k,
            )  # fmt: skip
            check(
                f"sparse_backward from lists {dtype}: {shape}, d {d}",
                op("sparse_backward"),
                entries, at_hand, torch.randn(n + 3, d, dtype=dtype),
                torch.randn(k, d, dtype=dtype), None, None, True, None, None, ranks, counted, here,
                counts, n, None, 0.25,
                strided(torch.randn(n + 3, d, dtype=dtype), pad), torch.randn(d, k, dtype=dtype),
                torch.zeros(n + 3, d, dtype=dtype) if all_rows else empty,
                torch.zeros(d, k, dtype=dtype), torch.zeros(k, dtype=torch.float64),
            )  # fmt: skip
    return found


def raw_operators(n, k, d, pad, n_bits, dtype):
    """The overloads bae_fast::<name>.cpp; k columns are k / n_bits features."""
    ops = registry.BACKENDS["cpp"].ops
    k = -(-k // n_bits) * n_bits
    shape = f"N {n}, K {k}, d {d}, rows {pad} elements apart, {n_bits} bits, {dtype}"
    wide = torch.promote_types(dtype, torch.float32)
    # small integers: products are exact in any order, but for multi-bit values, sigmoids and the
    # covariance's scale
    x, W_enc, b_enc, W_dec, b_dec, grad = (
        torch.randint(-3, 4, size).to(dtype)
        for size in ((n, d), (d, k), (k,), (k // n_bits, d), (d,), (n, d))
    )
    x, W_enc, W_dec, grad = (strided(t, pad) for t in (x, W_enc, W_dec, grad))
    mask = torch.rand(n) < 0.7
    mask[0] = True
    empty = torch.empty(0, dtype=torch.int32)
    for row_mask, width in ((None, None), (mask, 0.5)):
        words, window, counts, n_rows = check(
            f"encode: {shape}, mask {row_mask is not None}, width {width}",
            ops["encode"], x, W_enc, b_enc, row_mask, width,
        )  # fmt: skip
    words, window = strided(words, pad), strided(window, pad)
    check(
        f"decode: {shape}",
        ops["decode"], words, W_dec, b_dec, n_bits, dtype, exact=n_bits == 1,
    )  # fmt: skip
    check(
        f"decoder_backward: {shape}",
        ops["decoder_backward"], words, grad, k, n_bits, dtype, exact=n_bits == 1,
    )  # fmt: skip
    signs = None
    if n_rows > 1:
        _, signs = check(f"covariance: {shape}", ops["covariance"], words, counts, n_rows, True)
    kept = signs is not None and signs.numel() > 0  # lists keep none
    for surrogate, stored, need_x in (
        ("rectangle", True, True),
        ("sigmoid", False, True),
        ("official", True, False),
    ):
        covariance = signs is not None
        check(
            f"encoder_backward: {shape}, {surrogate}, covariance {covariance}, stored {stored}",
            ops["encoder_backward"], x, W_enc, b_enc, W_dec, words,
            window if surrogate == "rectangle" else empty, mask, grad,
            torch.randn(k, dtype=wide), torch.randn(k, dtype=wide),
            torch.ones((), dtype=wide) if covariance else None,
            signs if kept and stored else None,
            words if covariance and not (kept and stored) else None,
            counts, n_rows, surrogate, 0.5, n_bits, [need_x, True, True], exact=False,
        )  # fmt: skip


SHAPES = [
    # N, K, d
    (1, 1, 1), (1, 33, 5), (2, 1, 17), (2, 65, 1), (3, 31, 33), (5, 97, 16), (15, 63, 31),
    (17, 100, 47), (31, 127, 49), (32, 32, 32), (33, 129, 63), (63, 1, 65), (65, 257, 15),
    (64, 64, 64), (129, 513, 129), (70, 577, 3), (257, 33, 130), (1, 1100, 7), (1030, 70, 9),
]  # fmt: skip


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    units.LEAST_ROWS = units.LEAST_COLUMNS = 1  # small sizes too
    listed = 0
    shapes = SHAPES[::2] if "some" in sys.argv[1:] else SHAPES
    for i, (n, k, d) in enumerate(shapes):
        for pad in (0, 3) if "all" in sys.argv[1:] else (i // 2 % 2 * 3,):
            private_operators(n, k, d, pad)
            listed += listed_operators(n, k, pad) if n > 1 else 0
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            raw_operators(n, k, d, i % 2 * 3, 1, dtype)
        raw_operators(n, k, d, 0, 2 + i % 2, torch.float32)
    assert listed >= len(shapes) // 2, "lists were hardly taken"
    print("done")


if __name__ == "__main__":
    main()
