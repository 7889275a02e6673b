"""Compile every kernel as impl="triton" starts it, for one chip and without a GPU; print JSON.

The backend's warm-up runs on CPU tensors with a recorder in place of the start of a kernel, so what
is compiled is what would be started: the same arguments, dtypes, alignments and tile sizes. One
row a compiled kernel: registers, spills and stack from the assembler, shared memory, and which
matrix instructions its PTX and SASS hold.

    python tests/backends/triton_compile_worker.py sm_90 bfloat16 all

A name behind these compiles that kernel alone.
``few`` in place of ``all`` compiles one variant a kernel, its largest; ``small`` its smallest;
``hard`` the largest and the ones that an assembler once spilled; ``ones`` what one feature, one
output and two rows need; ``packed`` products of packed bits, which not every chip starts;
``candidates`` the tiles that tuning tries; ``uncovered`` in place of the dtype prints what steps
start and the warm-up does not.
"""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import machine_code
import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bae_fast.kernels import configs, gradient, launch, products
from bae_fast.kernels import covariance as kernels
from bae_fast.kernels.bodies import covariance, decode, encode, encoder_backward, terms, warmup
from bae_fast.ops import nvidia
from bae_fast.surrogates import SURROGATES

BINARIES = Path(triton.backends.nvidia.__file__).parent / "bin"
CAPABILITIES = {"sm_80": 80, "sm_86": 89, "sm_90": 90, "sm_100": 100, "sm_120": 120}
MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_90": 132, "sm_100": 148, "sm_120": 188}
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
}


class Recorder:
    """Stands in for :func:`bae_fast.kernels.launch.start`; keeps each variant once."""

    def __init__(self):
        self.variants = {}

    def __call__(self, kernel, grid, *args, **constants):
        options = {
            f"num_{name}": constants.pop(f"num_{name}")
            for name in ("warps", "stages")
            if f"num_{name}" in constants
        }
        signature, attrs = {}, {}
        names = [p for p in kernel.params if not p.is_constexpr]
        assert len(names) == len(args), kernel
        for p, value in zip(names, args, strict=True):
            if isinstance(value, torch.Tensor):
                signature[p.name] = TYPES[value.dtype]
                if not p.do_not_specialize:
                    attrs[p.num,] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[p.name] = "fp32"
            elif value == 1 and not p.do_not_specialize:
                signature[p.name] = "constexpr"
                constants[p.name] = 1
            else:
                signature[p.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0 and not p.do_not_specialize:
                    attrs[p.num,] = [["tt.divisibility", 16]]
        for p in kernel.params:
            if p.is_constexpr:
                signature[p.name] = "constexpr"
        key = (kernel.fn.__name__, repr((signature, constants, attrs, options)))
        self.variants[key] = (kernel, signature, dict(constants), attrs, options)


def step(dtype, kind, n, d, k, surrogate, n_bits, masked, d_out):
    """Everything that a step of these sizes starts, with rows of ``dtype``, weights of ``kind``."""
    x, G = torch.zeros(n, d, dtype=dtype), torch.zeros(n, d_out, dtype=dtype)
    W_enc, b_enc = torch.zeros(d, k, dtype=kind), torch.zeros(k, dtype=kind)
    W_dec, b_dec = torch.zeros(k // n_bits, d_out, dtype=kind), torch.zeros(d_out, dtype=kind)
    keep = torch.ones(n, dtype=torch.bool) if masked else None
    width = 0.25 if surrogate == "rectangle" else None
    words, window, counts, n_rows = encode.encode(x, W_enc, b_enc, keep, width)
    decode.decode(words, W_dec, b_dec, n_bits, dtype)
    decode.decoder_backward(words, G, k, n_bits, kind)
    numerator, signs = covariance.covariance(kernels, words, counts, n_rows, masked)
    terms.terms(counts, n_rows, numerator if masked else None, torch.float32)
    terms.slopes(counts, n_rows, torch.zeros(()), torch.float32)
    columns, scale = torch.zeros(k, dtype=torch.float64), torch.zeros(())
    for planes, spread in ((signs if masked else None, scale), (None, None)):
        for curvature in (columns, None):
            encoder_backward.encoder_backward(
                kernels, x, W_enc, b_enc, W_dec, words, window, keep, G, columns, curvature,
                spread, planes, words, counts, n_rows, surrogate, 0.25, n_bits, [True] * 3,
            )  # fmt: skip


def uncovered(recorder):
    """Kernels that steps of many kinds start and that the whole warm-up did not."""
    dense = nvidia.DENSE_A_STEP
    for constant in (1, dense):  # compiled into a kernel; the last steps below have another
        nvidia.DENSE_A_STEP = constant
        warmup.warmup(kernels, torch.device("cpu"), SURROGATES, True)
    warm = set(recorder.variants)
    recorder.variants.clear()
    for (dtype, kind), surrogate in itertools.product(warmup._DTYPES, SURROGATES):
        masked = surrogate in ("rectangle", "identity")
        for n, d, k, n_bits in ((17, 48, 512, 1), (160, 64, 768, 1), (48, 80, 320, 2)):
            step(dtype, kind, n, d, k, surrogate, n_bits, masked, d + 16)
    nvidia.DENSE_A_STEP = nvidia.LEAST_PRODUCTS = 1  # as in larger codes
    for masked in (False, True):
        step(torch.bfloat16, torch.bfloat16, 160, 64, 768, "rectangle", 1, masked, 80)
    assert recorder.variants
    return sorted(set(recorder.variants) - warm)


def candidates(chip, dtype):
    """Start every kernel with each of the tiles that tuning tries, but products of packed bits."""
    n, d, k = 64, 64, 1024
    rows, W = torch.zeros(n, d, dtype=dtype), torch.zeros(d, k, dtype=dtype)
    words, features = torch.zeros(n, k // 32).int(), torch.zeros(k, n // 8).int()
    counts, n_rows, columns = torch.zeros(k).long(), torch.tensor(n), torch.zeros(k)
    signs, scale = torch.zeros(2, k, k // 32).int(), torch.zeros(())
    calls = {
        "encode": lambda: encode.kernels.encode(
            rows, W, columns, None, 0.25, 0, words, words.clone(), counts
        ),
        "gradient": lambda: gradient.product_gradient(
            rows, W.t().contiguous(), dtype, (0, k), 1, words, words, None, columns, None, None,
            None, "identity", 0.25,
        ),
        "covariance": lambda: kernels.covariance(features, counts, n_rows, True, n),
        "sign_product": lambda: kernels._sign_product(
            words, signs, counts, n_rows, scale, torch.empty(n, k), None
        ),
    }  # fmt: skip
    own = configs.DEFAULTS[chip]
    for name, call in calls.items():
        for tile in configs.CANDIDATES[name]:
            configs.DEFAULTS[chip] = {**own, name: (tile,)}
            call()
    configs.DEFAULTS[chip] = own


def keep_notes(folder):
    """Let triton call its assemblers through scripts that keep what they write; the file's path."""
    notes = Path(folder) / "notes"
    to = shlex.quote(str(notes))
    for name in ("ptxas", "ptxas-blackwell"):
        script, own = Path(folder) / name, shlex.quote(str(BINARIES / name))
        script.write_text(f'#!/bin/sh\n{own} "$@" 2>{to}\nstatus=$?\ncat {to} >&2\nexit $status\n')
        script.chmod(0o755)
        os.environ[f"TRITON_{name.replace('-', '_').upper()}_PATH"] = str(script)
    return notes


def compiled(kernel, signature, constants, attrs, options, capability, notes):
    """What one variant becomes; ``notes``: where the assembler's words are."""
    notes.write_text("")
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(result.asm["cubin"])
        usage = subprocess.run(
            [BINARIES / "cuobjdump", "-res-usage", cubin],
            capture_output=True,
            text=True,
            check=True,
        )
        sass = subprocess.run(
            [BINARIES / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True
        ).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr))
    ptx = result.asm["ptx"]
    return {
        "kernel": kernel.fn.__name__,
        "constants": {k: str(v) for k, v in constants.items()},
        "dtypes": sorted({t for t in signature.values() if t.startswith("*")}),
        **options,
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "local": int(usage["LOCAL"]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "instructions": len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE)),
        "shared": result.metadata.shared,
        "ptx_local": len(re.findall(r"\b(?:ld|st)\.local\b", ptx)),
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "tcgen05": len(re.findall(r"tcgen05\.mma", ptx)),
        "imma": len(re.findall(r"\b(?:IMMA|IGMMA)\b", sass)),
        "float_atomics": len(re.findall(r"(?:atom|red)\.[a-z0-9.]*add[a-z0-9.]*\.f\d\d", ptx)),
        "cp_async": len(re.findall(r"cp\.async", ptx)),
        "rewritten": machine_code.rewritten_operands(sass),
        "in_registers": machine_code.operands_in_registers(sass),
        "serialized": machine_code.serialized(notes.read_text()),
        "wide_global_stores": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
        "barriers": len(re.findall(r"\bbar(?:rier)?\.sync", ptx)),
        "wide_stores": len(re.findall(r"st\.shared\.v[24]|stmatrix", ptx)),
        "byte_stores": len(re.findall(r"st\.shared\.b8", ptx)),
    }


# terms and surrogate of products of the gradient that some tile has spilled with some assembler
SPILLED = {(0, "rectangle"), (1, "official"), (3, "sigmoid")}


def chosen(variants, amount):
    """The variants to compile: all, or of every kernel the last, which has the largest tile.

    ``small``: of every kernel the first.
    """
    if amount == "all":
        return list(variants)
    if amount == "small":
        variants = list(variants)[::-1]
    spilled = {(terms, gradient.NUMBERS[surrogate]) for terms, surrogate in SPILLED}
    last, hard = {}, {}
    for at, variant in enumerate(variants):
        name, constants = variant[0].fn.__name__, variant[2]
        last[name, constants.get("PRODUCT"), constants.get("SIGNS")] = at, variant
        kind = constants.get("TERMS"), constants.get("SURROGATE")
        if amount == "hard" and constants.get("PRODUCT") and kind in spilled:
            hard[at] = variant
    return list((dict(last.values()) | hard).values())


def main(chip, what, amount="all", kernel=None):
    torch.set_num_threads(1)
    launch.start = recorder = Recorder()
    launch.family = launch._chip = lambda device: chip
    launch.multiprocessors = lambda device: MULTIPROCESSORS[chip]
    if what == "uncovered":
        print(json.dumps(uncovered(recorder)))
        return
    dtype = getattr(torch, what)
    if amount == "packed":  # what decode does not start on every chip
        words, dense = torch.zeros(64, 32, dtype=torch.int32), torch.zeros(1024, 64, dtype=dtype)
        for entry in (0, 1):
            with launch.table_entry(entry):
                products.bits_product(words, dense, None, dtype)
        amount = "all"
    elif amount == "candidates":
        candidates(chip, dtype)
        amount = "all"
    elif amount == "ones":
        step(dtype, dtype, 2, 1, 1, "rectangle", 1, False, 1)
    else:
        # one dtype, and rows of a multiple of 16 words: the others differ by conversions
        warmup._DTYPES, warmup._COLUMNS = ((dtype,) * 2,), (1024,)
        warmup.warmup(kernels, torch.device("cpu"), SURROGATES, True)
    with tempfile.TemporaryDirectory() as folder:
        notes = keep_notes(folder)
        variants = chosen(recorder.variants.values(), amount)
        variants = [v for v in variants if kernel in (None, v[0].fn.__name__)]
        rows = [compiled(*v, CAPABILITIES[chip], notes) for v in variants]
    print(json.dumps({"triton": triton.__version__, "kernels": rows}))


if __name__ == "__main__":
    main(*sys.argv[1:])
