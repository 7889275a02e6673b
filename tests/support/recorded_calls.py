"""Calls of the compiled operators with their results, as a file that a program without torch reads.

    BAE_FAST_SIMD=scalar python recorded_calls.py FILE

tests/backends/csrc/operators_replay.cpp says what is in the file. The calls are those of
guard_pages.py, which compares the same operators with torch at every level of this machine.
"""

import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import guard_pages
import torch

from bae_fast.backends.cpp import extension
from bae_fast.packing import pack_rows

DTYPES = [torch.int32, torch.int64, torch.float32, torch.float64, torch.bfloat16, torch.bool]

SHAPES = [(1, 1, 1), (2, 65, 1), (17, 100, 47), (33, 129, 63), (65, 257, 15), (70, 577, 3)]


def number(value):
    return struct.pack("<q", value)


def tensor(t):
    """Its dtype, sizes, strides, and the memory that they reach."""
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    flat = t.as_strided([span if t.numel() else 0], [1]).contiguous()
    sizes = [DTYPES.index(t.dtype), t.dim(), *t.shape, *t.stride()]
    return b"".join(map(number, sizes)) + flat.view(torch.uint8).numpy().tobytes()


def value(one, optional=False):
    if one is None:
        return number(ord("n"))
    if isinstance(one, torch.Tensor):
        return number(ord("o" if optional else "t")) + tensor(one)
    if isinstance(one, bool):
        return number(ord("b")) + number(int(one))
    if isinstance(one, int):
        return number(ord("i")) + number(one)
    return number(ord("f")) + struct.pack("<d", one)


class Recorder:
    """Stands for the extension: its operators write down what they are asked and answer."""

    def __init__(self):
        self.calls, self.n_calls = [], 0

    def op(self, name):
        real = extension.op(name)
        schema = real._schema.arguments

        def call(*args):
            optional = ["Optional" in str(argument.type) for argument in schema]
            typed = [
                float(a) if str(s.type) == "float" else a for a, s in zip(args, schema, strict=True)
            ]
            before = [value(*pair) for pair in zip(typed, optional, strict=True)]
            out = real(*args)
            after = [value(*pair) for pair in zip(typed, optional, strict=True)]
            results = [] if out is None else [*out] if isinstance(out, (tuple, list)) else [out]
            full = f"cpp_{name}".encode()
            self.calls.append(number(len(full)) + full + number(len(args)))
            self.calls += [*before, *after, number(len(results)), *map(value, results)]
            self.n_calls += 1
            return out

        return call


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    recorder = Recorder()
    guard_pages.PLACES = []  # calls alone
    guard_pages.extension = SimpleNamespace(op=recorder.op)
    for i, (n, k, d) in enumerate(SHAPES):
        pad = i % 2 * 3
        guard_pages.private_operators(n, k, d, pad)
        if n > 1:
            guard_pages.listed_operators(n, k, pad)
        words = pack_rows(torch.rand(n, k) < 0.3)
        order = torch.randperm(2 * k).to(torch.int32)
        chosen = recorder.op("salient")(words, order, k, 4)
        recorder.op("grouped")(chosen.flatten(), k)
    Path(sys.argv[1]).write_bytes(number(recorder.n_calls) + b"".join(recorder.calls))


if __name__ == "__main__":
    main()
