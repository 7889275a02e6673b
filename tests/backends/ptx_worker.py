"""Run the PTX that triton makes of the kernels, for one chip and without a GPU; print JSON.

In a process of its own, as all that compiles with triton. The backend's launchers run on CPU
tensors; in place of the start of a kernel it is compiled for the chip and its PTX interpreted
(tests/support/ptx). Each case runs once as it is, and once for each fault that is planted in it.

    python tests/backends/ptx_worker.py sm_80 encode late

``early`` runs what is asynchronous where it stands; with both words each case runs twice, and
faults are planted in the first. ``apart`` behind them runs warp after warp.
"""

import json
import os
import re
import struct
import sys

# serves CPU tensors, but with compiled kernels: triton itself must not see it
os.environ["TRITON_INTERPRET"] = "1"
import bae_fast as bf

del os.environ["TRITON_INTERPRET"]

import ptx
import torch
import triton
import triton_compile_worker as compiling
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bae_fast.kernels import bits, covariance, launch, pair_lists, products
from bae_fast.kernels import counts as count_kernels
from bae_fast.kernels.bodies import encode
from bae_fast.ops import nvidia
from bae_fast.packing import pack_rows

# text of PTX and what a planted fault makes of it
FENCE = (r"wgmma\.fence\.sync\.aligned;", "")
PLANTED = {
    ("sm_80", "encode"): {
        "a wait one short": (r"cp\.async\.wait_group\s+(\d+);", 1),
        "no barrier behind the wait": (r"(cp\.async\.wait_group\s+\d+;\s*)bar\.sync\s+0;", r"\1"),
    },
    ("sm_90", "encode"): {
        "no fence": FENCE,
        "a wait of products one short": (r"wgmma\.wait_group\.sync\.aligned\s+(\d+);", 1),
        "a wait of copies one short": (r"cp\.async\.wait_group\s+(\d+);", 1),
    },
    ("sm_90", "lists"): {
        "counters keep what was counted": (r"@%p\d+ red\.global\.gpu\.relaxed\.and[^;]*;", ""),
        "a count is read before all have counted": (r"bar\.sync\s+0;", ""),
    },
}


def planted(text, pattern, change):
    """PTX with a fault: every match replaced, or its number made larger."""
    if isinstance(change, int):
        more = lambda m: m.group(0).replace(m.group(1), str(int(m.group(1)) + change))  # noqa: E731
        changed = re.sub(pattern, more, text)
    else:
        changed = re.sub(pattern, change, text)
    return changed


class Interpreter(compiling.Recorder):
    """Stands in for :func:`bae_fast.kernels.launch.start`: compiles, and interprets the PTX."""

    def __init__(self, chip, apart):
        super().__init__()
        self.chip, self.late, self.apart = chip, True, apart
        self.compiled, self.fault, self.started, self.faults = {}, None, [], []
        self.changed = False

    def __call__(self, kernel, grid, *args, **constants):
        self.variants.clear()
        super().__call__(kernel, grid, *args, **constants)
        ((key, (_, signature, constants, attrs, options)),) = self.variants.items()
        if key not in self.compiled:
            source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
            target = GPUTarget("cuda", compiling.CAPABILITIES[self.chip], 32)
            result = triton.compile(source, target=target, options=options)
            self.compiled[key] = result.asm["ptx"], result.metadata.shared
        text, shared = self.compiled[key]
        if self.fault is not None:
            before, text = text, planted(text, *self.fault)
            self.changed |= text != before
        store, values = ptx.Global(), []
        names = [p.name for p in kernel.params if not p.is_constexpr]
        given = {p.name for p in kernel.params if not p.do_not_specialize}
        for name, value in zip(names, args, strict=True):
            if isinstance(value, torch.Tensor):
                aligned = name in given  # as the variant was compiled for
                assert not aligned or value.data_ptr() % 16 == 0, name
                values.append(store.add(value))
            elif isinstance(value, float):
                values.append(struct.unpack("<I", struct.pack("<f", value))[0])
            elif signature[name] != "constexpr":
                values.append(int(value))
        self.started.append(kernel.fn.__name__)
        try:
            found = ptx.run(
                ptx.parse(text), grid, values, store, threads=32 * options["num_warps"],
                shared_bytes=shared, late=self.late, apart=self.apart,
            )  # fmt: skip
        except ptx.PtxError as error:
            if self.fault is None:
                raise
            self.faults.append(f"{kernel.fn.__name__} ended: {error}")  # found all the same
        else:
            self.faults += [f"{kernel.fn.__name__} {f.line}: {f.what}: {f.text}" for f in found]


# -- cases: what was wrong in them, by name; nothing where all is right ---------------------------


def integers(bound, *shape):
    """Small ones, so that sums of products are exact."""
    return torch.randint(-bound, bound + 1, shape).to(torch.bfloat16)


def differing(**pairs):
    return [name for name, (got, exact) in pairs.items() if not torch.equal(got, exact)]


def beyond(name, got, eager, exact):
    """The device tests' bound: twice the dense program's error in the same dtype."""
    allowed = 2 * (eager.double() - exact).abs().max()
    allowed += 4 * torch.finfo(got.dtype).eps * exact.abs().max()
    error = (got.double() - exact).abs().max()
    return [] if error <= allowed else [f"{name}: {error:.3g} over {allowed:.3g}"]


def encode_case(n=48, d=256, k=48):
    x, W, b = integers(2, n, d), integers(2, d, k), integers(3, k)
    keep = torch.arange(n) % 3 != 1
    words, window, counts, _ = encode.encode(x, W, b, keep, 2.5)
    pre = x.double() @ W.double() + b.double()
    on = (pre > 0) & keep[:, None]
    near = (pre.abs() < 2.5) & keep[:, None]
    return differing(
        words=(words, pack_rows(on)), window=(window, pack_rows(near)), counts=(counts, on.sum(0))
    )


def packed_case(n=48, k=256, d=64):
    """The product of packed bits, also on the chip where decode does not start it."""
    on = torch.rand(n, k) < 0.3
    W, b = torch.randn(k, d).bfloat16(), torch.randn(d).bfloat16()
    got = products.bits_product(pack_rows(on), W, b, torch.bfloat16)
    exact = on.double() @ W.double() + b.double()
    return beyond("recon", got, on.bfloat16() @ W + b, exact)


def covariance_case(n=300, k=200):
    on = torch.rand(n, k) < torch.rand(k)
    on[:, 5] = on[:, 6]
    words, counts, n_rows = pack_rows(on), on.sum(0), torch.tensor(n)
    b = on.double()
    v = n * b.t() @ b - torch.outer(b.sum(0), b.sum(0))  # below 2^53: exact
    v.fill_diagonal_(0)
    planes = torch.stack([pack_rows(v > 0), pack_rows(v < 0)])
    features = bits.feature_packed(words, k)
    total, signs = covariance.covariance(features, counts, n_rows, True, n)
    half = torch.tensor(n * (n - 1) / 4.0)  # the scale is 2/(n (n - 1)) times this
    digits, scale = count_kernels.sign_operands(counts, n_rows, half, n)
    product = covariance.sign_product(words, planes, digits, n_rows, scale)
    exact = n * (b @ v.sign()) - b.sum(0) @ v.sign()
    return differing(
        total=(total, v.abs().sum().long()),
        signs=(signs, planes),
        product=(product, exact.float() * 0.5),
    )


def step_case(n=40, d=32, k=96, d_out=48):
    """A whole step under autograd against ``reference``, as the device tests have it."""
    x, W, b = integers(2, n, d), integers(2, d, k), integers(3, k)
    W_dec, b_dec = torch.randn(k, d_out).bfloat16(), torch.randn(d_out).bfloat16()
    direction = torch.randn(n, d_out).bfloat16()
    wrong = []
    for surrogate, width, mask in (
        ("rectangle", 2.5, torch.arange(n) % 3 != 1),
        ("sigmoid", 3.0, None),
    ):
        options = {"surrogate": surrogate, "surrogate_width": width, "mask": mask}
        runs = {}
        for name, impl, wide in (
            ("exact", "reference", True), ("eager", "reference", False), ("got", "triton", False)
        ):  # fmt: skip
            dtype = torch.float64 if wide else torch.bfloat16
            leaves = [t.clone().to(dtype).requires_grad_() for t in (x, W, b, W_dec, b_dec)]
            out = bf.binary_autoencoder(*leaves, impl=impl, covariance=True, **options)
            loss = (out.recon * direction.to(dtype)).sum() * 0.25 + out.entropy * 3
            (loss + out.covariance * 2).backward()
            values = [out.recon, out.entropy, out.covariance, *(leaf.grad for leaf in leaves)]
            runs[name] = [value.detach() for value in values]
            runs[name, "code"] = out.code
        if not runs["got", "code"].equal(runs["exact", "code"]):
            wrong.append(f"{surrogate}: code")
        names = ("recon", "entropy", "covariance", "x", "W_enc", "b_enc", "W_dec", "b_dec")
        for name, got, eager, exact in zip(
            names, runs["got"], runs["eager"], runs["exact"], strict=True
        ):
            wrong += [f"{surrogate}: {each}" for each in beyond(name, got, eager, exact)]
    return wrong


def lists_case(n=12, k=10):
    """The kernels of lists: lengths, entries, pairs, and the signs in a window."""
    pair_lists._COUNTERS_BYTES = 2 * 4 * k  # two programs, each with several features
    on = torch.rand(n, k) < 0.25
    on[:, 5], on[:, 7] = on[:, 6], False
    words, counts, n_rows = pack_rows(on), on.sum(0), torch.tensor(n)
    b = on.double()
    v = n * b.t() @ b - torch.outer(b.sum(0), b.sum(0))  # below 2^53: exact
    v.fill_diagonal_(0)
    pairs = pair_lists.PairLists(words, bits.feature_packed(words, k), counts, n_rows)
    total = torch.tensor(-7)
    pairs.settle(total, torch.zeros(2, 0, 0, dtype=torch.int32))
    window, scale = torch.rand(n, k) < 0.2, torch.tensor(0.5)
    signs = pair_lists.WindowSigns(pairs, words, pack_rows(window), scale)
    out = torch.full((n, k), 7.0)
    signs.add_to(out, 0)
    exact = (n * (b @ v.sign()) - b.sum(0) @ v.sign()).float() * 0.5
    ones = [row.nonzero().flatten() for row in on]
    return differing(
        lists_serve=(pairs.serves & signs.serves, torch.ones(1, dtype=torch.int32)),
        entries=(pairs.by_row.entries[: int(on.sum())].long(), torch.cat(ones)),
        total=(total, v.abs().sum().long()),
        window=(out, torch.where(window, exact, 7.0)),
    )


CASES = {
    "encode": encode_case,
    "packed": packed_case,
    "covariance": covariance_case,
    "lists": lists_case,
    "step": step_case,
}


def main(chip, case, *modes):
    torch.set_num_threads(1)
    # what no kernel has written is the largest integer or NaN, not what the memory happened to hold
    torch.use_deterministic_algorithms(True, warn_only=True)
    interpreter = Interpreter(chip, "apart" in modes)
    launch.start = interpreter
    launch.family = launch._chip = lambda device: chip
    launch.multiprocessors = lambda device: compiling.MULTIPROCESSORS[chip]
    nvidia.interpreted = lambda: True
    nvidia.DENSE_A_STEP, pair_lists.WINDOW_SHARE = 1, 1  # lists serve codes of any size
    runs, times = [], [mode for mode in modes if mode in ("late", "early")]
    plans = [(mode, "", None) for mode in times]
    plans += [(times[0], *each) for each in PLANTED.get((chip, case), {}).items()]
    for mode, name, fault in plans:
        torch.manual_seed(0)
        interpreter.late, interpreter.fault = mode == "late", fault
        interpreter.started, interpreter.faults, interpreter.changed = [], [], False
        with launch.table_entry(0):
            wrong = CASES[case]()
        assert interpreter.changed == (fault is not None), f"nothing matches {fault}"
        runs.append({
            "mode": mode, "planted": name, "wrong": wrong, "faults": interpreter.faults,
            "started": interpreter.started,
        })  # fmt: skip
    print(json.dumps({"triton": triton.__version__, "runs": runs}))


if __name__ == "__main__":
    main(*sys.argv[1:])
