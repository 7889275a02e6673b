"""An interpreter of PTX for tests: kernels as a compiler emits them, run without a device.

``parse`` reads the text, ``machine`` has registers, threads and what is asynchronous, ``memory``
bounds and hazards; ``instructions``, ``matrix`` and ``mbarrier`` have what instructions do. It
covers what the kernels of this package hold and refuses the rest by name. What it shows is that a
kernel computes the right numbers in a legal order of its own, and which hazards the order hid; not
how a chip behaves.
"""

from .machine import Fault, Machine
from .memory import Global
from .parse import Kernel, PtxError, parse

__all__ = ["Fault", "Global", "Kernel", "PtxError", "parse", "run"]


def run(
    kernel: Kernel,
    grid: tuple[int, ...],
    arguments: list[int],
    store: Global,
    *,
    threads: int,
    shared_bytes: int,
    late: bool = True,
    apart: bool = False,
) -> list[Fault]:
    """Run every CTA of a grid, one after the other; what they did wrong, in order of lines.

    What only follows from a fault, such as threads that wait for ever, is one more of them.

    Args:
        arguments: one number a parameter, as bits; those behind the last are zero.
        store: the tensors that pointers among the arguments point into.
        shared_bytes: of shared memory that the host gives.
        late, apart: see :mod:`ptx.machine`.

    Raises:
        PtxError: an instruction is not known, or, before any fault, an address lies outside of its
            memory or threads wait for ever.
    """
    machine = Machine(kernel, arguments, threads, shared_bytes, store, late=late, apart=apart)
    x, y, z = (*grid, 1, 1)[:3]
    for name, size in zip("xyz", (x, y, z), strict=True):
        machine.special[f"%nctaid.{name}"][:] = size
    try:
        for k in range(z):
            for j in range(y):
                for i in range(x):
                    machine.run(i, j, k)
    except PtxError as error:
        if not machine.faults:
            raise
        machine.faults.add(Fault(kernel.body[-1].line, f"after that: {error}", ""))
    return sorted(machine.faults)
