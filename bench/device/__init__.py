"""A GPU: every operator and kernel checked against float64, then timed, in one command.

    python -m bench device [--out DIR] [--seconds 540] [--impl triton cuda] [--resume DIR]
                           [--only KIND ...] [--report-only]

It runs from a plain checkout: the kernels are found in its folders where nothing is installed.
What one command has no time for another one does: ``--resume`` goes on with its ``device.json``,
on the same device with the same versions, and ``--only`` names the kinds of cases that are run.

Kernels are compiled first, by a few processes at once: one process would take minutes.

Checks come first: each operator and the whole layer of each implementation in fp32, bf16 and fp16,
on odd shapes, several densities, constant and equal columns, ties; decode again and again on one
input, its bits compared; pairs and products with the signs by wgmma, which wait for this, at the
edges of their sizes; a training run with its steps in a CUDA graph, which has to be the run
without, bit for bit. Then a step, and its kernels by a profiler. Then, the most telling first,
whole steps and operators against the dense program in bf16; the covariance against int8 products;
steps replayed from a CUDA graph; the small checks once more under ``compute-sanitizer``; the tests
that need a device; last the compiled dense program. Every timed call is checked on its own inputs
before, and one that is wrong has no figure; a side of which an operator was refused in the checks
is timed all the same, and marked. Times are the device's, by events, the L2 cache overwritten
before every call and the host ahead. What the host takes to start a call is kept beside them: a
shorter step takes as long as the host, unless it is replayed from a graph. Peaks are above what is
there between steps: x, parameters, gradients, optimizer.

The whole ends within ``--seconds``: a case is not begun where its kind has shown that it would not
fit, and one process watches another that works. A kernel that ends that process or hangs costs the
The whole ends within ``--seconds``: a case is not begun where its kind has shown that it would not
fit, and one process watches another that works. A kernel that ends that process or hangs costs the
side at hand and no other, and whatever that process had started ends with it. ``device.json`` in
``--out`` is whole after every case. What a command's end cuts short the next one does again.

Exit status: 1 where anything was wrong, 2 without a GPU.

| file | what |
|---|---|
| ``cases.py``, ``deadlines.py`` | the cases in their order; how long everything may take |
| ``command.py``, ``resume.py`` | options, and what a later command goes on with |
| ``watching.py``, ``worker.py``, ``processes.py`` | a process that watches another; what ends it |
| ``job.py``, ``parts.py`` | a case in the worker's hands; what is done for one of each kind |
| ``layer.py``, ``wgmma.py``, ``repeats.py`` | checks: of the whole layer, at edges, again |
| ``comparisons.py``, ``times.py``, ``profiles.py`` | what is compared; its times; from inside |
| ``machine.py``, ``ceilings.py``, ``rate.cu``, ``chip.py`` | clock and memory; its best; its name |
| ``compiling.py``, ``warmup.py`` | kernels compiled ahead, and from nothing |
| ``sanitizer.py``, ``gpu_tests.py`` | checkers and tests, in processes of their own |
| ``report.py`` | lines, tables and the plot |
"""

from bench.device.command import main
from bench.device.report import table

__all__ = ["main", "table"]
