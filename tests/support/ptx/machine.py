"""A multiprocessor that runs one CTA: registers, threads, barriers, what is asynchronous.

Registers are arrays over the threads of a CTA. Threads that stand at one instruction run it
together; where they part, those that are behind go first. With ``apart`` each warp (each warpgroup
where there are asynchronous products) goes alone as far as it can, the last first. Every order that
barriers allow is legal, and shared memory finds accesses that only an order kept right.

Asynchronous instructions run at the latest legal moment: a copy writes, and a product reads its
operands, when a wait covers it (PTX ISA 9.7.9.25, cp.async; 9.7.15, wgmma). With ``late`` off
they run where they stand. The hazards are the same in both. Copies of cp.async need no proxy fence
before wgmma here: neither Triton nor CUTLASS gives one, though they are of the generic proxy.

Not modelled: time, caches, races in global memory, clusters, and accesses of single lanes between
the synchronisations of their warp (a warp's clock stands for its lanes).
"""

import dataclasses

import numpy as np

from . import instructions, memory
from .parse import Address, Immediate, Kernel, PtxError, Register, Special, Symbol, Vector

LANES = 32
WARPGROUP = 128
# agents of mbarriers beside the warps
MBARRIERS = 32
# instructions that a group of threads may run: more is a loop without an end
MOST_STEPS = 5_000_000

TYPES = {
    "pred": np.bool_,
    "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64,
    "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64,
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.uint16,
    "f16x2": np.uint32, "bf16x2": np.uint32,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, order=True)
class Fault:
    line: int
    what: str
    text: str


def unsigned(dtype):
    return np.dtype(f"u{np.dtype(dtype).itemsize}")


class Machine:
    """Runs CTAs of ``kernel``; ``faults`` is what they did wrong.

    Args:
        arguments: one number a parameter, as bits; missing ones are zero.
        threads: of a CTA.
        shared_bytes: of shared memory whose size the kernel does not say.
        late, apart: see the file.
    """

    def __init__(
        self, kernel: Kernel, arguments, threads, shared_bytes, store, *, late=True, apart=False
    ):
        if threads % LANES:
            raise PtxError(f"threads must be a multiple of {LANES}; got {threads}")
        self.kernel, self.store, self.late = kernel, store, late
        self.threads, self.warps = threads, threads // LANES
        self.index = np.arange(threads)
        self.warp_of = self.index // LANES
        self.faults = set()
        self.parameters = np.zeros(sum(8 for _ in kernel.parameters) + 8, np.uint8)
        for (offset, size), value in zip(kernel.parameters.values(), arguments, strict=False):
            raw = (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
            self.parameters[offset : offset + size] = np.frombuffer(raw, np.uint8)
        self.symbols, self.shared_bytes = {}, 0
        for name, align, size in sorted(kernel.shared, key=lambda each: each[2] is None):
            start = -(-self.shared_bytes // align) * align
            self.symbols[name] = memory.SHARED_BASE + start
            self.shared_bytes = start + (shared_bytes if size is None else size)
        # registers of one width are rows of one array: a product takes many of them at once
        names = {}
        for name, kind in kernel.registers.items():
            if kind not in TYPES:
                raise PtxError(f"register type {kind} is not known")
            dtype = np.dtype(np.bool_) if kind == "pred" else unsigned(TYPES[kind])
            names.setdefault(dtype, []).append(name)
        self.banks = {dtype: np.zeros((len(some), threads), dtype) for dtype, some in names.items()}
        self.rows = {name: row for some in names.values() for row, name in enumerate(some)}
        self.registers = {
            name: self.banks[dtype][self.rows[name]] for dtype in names for name in names[dtype]
        }
        self.special = {
            f"%{name}.{axis}": np.zeros(threads, np.uint32)
            for name in ("tid", "ntid", "ctaid", "nctaid")
            for axis in "xyz"
        }
        self.special["%tid.x"][:] = self.index
        self.special["%ntid.x"][:] = threads
        self.special["%ntid.y"][:] = self.special["%ntid.z"][:] = 1
        self.special["%laneid"] = (self.index % LANES).astype(np.uint32)
        self.special["%warpid"] = self.warp_of.astype(np.uint32)
        self.piece = min((self._narrowest(each) for each in kernel.body), default=4)
        asynchronous = any(each.opcode == "wgmma" for each in kernel.body)
        unit = WARPGROUP if asynchronous else LANES
        self.parts = [np.ones(threads, bool)]
        if apart:
            self.parts = [self.index // unit == at for at in range(-(-threads // unit))][::-1]
        # registers of asynchronous products: which are in flight, and when they were written last
        self.accumulators, self.lefts = instructions.asynchronous_registers(kernel)
        self.tracked = {
            name: row for row, name in enumerate(sorted(self.accumulators | self.lefts))
        }
        self.program = [self._compiled(each) for each in kernel.body]

    # -- operands, for the instructions ----------------------------------------------------------

    def reader(self, operand, kind, instruction):
        """A function that gives the operand as an array, or one number, of a PTX type."""
        dtype = np.dtype(TYPES[kind])
        if isinstance(operand, Immediate):
            if kind == "pred":
                value = np.bool_(operand.value != 0)
            else:
                raw = operand.bits(8 * dtype.itemsize)
                value = np.array(raw, unsigned(dtype)).view(dtype)[()]
            return lambda: value
        if isinstance(operand, Symbol):
            if operand.name not in self.symbols:
                raise instruction.error(f"{operand.name} is not in shared memory")
            value = dtype.type(self.symbols[operand.name])
            return lambda: value
        if isinstance(operand, Special):
            array = self.special[operand.name].astype(unsigned(dtype))
            if "ctaid" in operand.name:  # changes from one CTA to the next
                return lambda: self.special[operand.name].astype(unsigned(dtype))
            return lambda: array.view(dtype)
        if not isinstance(operand, Register):
            raise instruction.error("an operand is not one register")
        array = self.registers[operand.name]
        if (array.dtype == np.bool_) != (kind == "pred") or array.itemsize < dtype.itemsize:
            raise instruction.error(f"{operand.name} does not hold a {kind}")
        if array.itemsize == dtype.itemsize:
            view = array.view(dtype)
            return lambda: view
        return lambda: array.astype(unsigned(dtype)).view(dtype)

    def writer(self, operand, kind, instruction):
        """A function (values, mask) that puts a PTX type into a register."""
        if type(operand).__name__ == "Sink":
            return lambda values, mask: None
        if not isinstance(operand, Register):
            raise instruction.error("a result is not one register")
        dtype = np.dtype(TYPES[kind])
        array = self.registers[operand.name]
        if (array.dtype == np.bool_) != (kind == "pred") or array.itemsize < dtype.itemsize:
            raise instruction.error(f"{operand.name} does not take a {kind}")
        if array.itemsize == dtype.itemsize:
            view = array.view(dtype)
        else:  # extended as the type says (PTX ISA 9.4.1)
            view = array.view(f"{'i' if dtype.kind == 'i' else 'u'}{array.itemsize}")
            if dtype.kind == "f":
                raise instruction.error(f"{operand.name} is wider than {kind}")

        def write(values, mask):
            if mask is None:
                view[...] = values
            else:
                np.copyto(view, values, where=mask, casting="unsafe")

        return write

    def addresses(self, operand, instruction):
        """A function that gives addresses as int64, one a thread."""
        if not isinstance(operand, Address):
            raise instruction.error("an operand is not an address")
        base, offset = operand.base, operand.offset
        if isinstance(base, Register):
            array = self.registers[base.name]
            signed = array.view(f"i{array.itemsize}")
            return lambda: signed.astype(np.int64) + offset
        if isinstance(base, Symbol) and base.name in self.symbols:
            value = np.full(self.threads, self.symbols[base.name] + offset, np.int64)
            return lambda: value
        raise instruction.error("an address is not known")

    def items(self, operand):
        return operand.items if isinstance(operand, Vector) else (operand,)

    def active(self, mask):
        """Indices of the threads that run."""
        return self.index if mask is None else np.flatnonzero(mask)

    def everywhere(self, true, mask):
        """Whether something holds for all threads that run."""
        return bool(np.all(true if mask is None else np.broadcast_to(true, self.threads)[mask]))

    def whole_warps(self, mask, instruction):
        """The warps that run; every lane of them must."""
        if mask is None:
            return np.arange(self.warps)
        lanes = mask.reshape(self.warps, LANES)
        some = lanes.any(1)
        if not lanes[some].all():
            raise instruction.error("part of a warp runs what all of it must run")
        return np.flatnonzero(some)

    def fault(self, what, instruction):
        self.faults.add(Fault(instruction.line, what, instruction.text[:120]))

    # -- compiling -------------------------------------------------------------------------------

    @staticmethod
    def _narrowest(instruction):
        """Bytes of the narrowest access to shared memory of one thread."""
        if instruction.opcode in ("ld", "st") and "shared" in instruction.modifiers[0]:
            return np.dtype(TYPES[instruction.modifiers[-1]]).itemsize
        return 4

    def _compiled(self, instruction):
        guard = None
        if instruction.guard is not None:
            guard = self.registers[instruction.guard.name]
        kind, run = instructions.compiled(self, instruction)
        return kind, run, guard, instruction.negated, instruction

    # -- running ---------------------------------------------------------------------------------

    def run(self, *block):
        """Run the CTA of these coordinates to its end."""
        for axis, at in zip("xyz", (*block, 0, 0, 0), strict=False):
            self.special[f"%ctaid.{axis}"][:] = at
        for bank in self.banks.values():  # nothing is zero by itself
            bank[...] = (
                True
                if bank.dtype == np.bool_
                else 0xA5A5A5A5A5A5A5A5 & ((1 << 8 * bank.itemsize) - 1)
            )
        self.clocks = memory.Clocks(self.warps + MBARRIERS)
        self.shared = memory.Shared(self.shared_bytes, self.piece, self.clocks, self.fault)
        self.exited = np.zeros(self.threads, bool)
        self.barriers, self.mbarriers = {}, {}
        self.registers_of_warpgroups = {}  # as setmaxnreg has set them
        self.reset_asynchronous()
        queues = [{0: part.copy()} for part in self.parts]
        self.queues, self.steps = queues, 0
        with np.errstate(all="ignore"):
            while not self.exited.all():
                ran = False
                for queue in queues:
                    while queue:
                        ran = True
                        self._advance(queue)
                if not ran and not self.deliver():
                    waiting = sorted({why for _, _, why in self._waiting()})
                    raise PtxError(f"threads wait for ever: {', '.join(waiting)}")
        if self.copies_left() or any(self.products) or self.bulk:
            self.fault("an asynchronous operation is never waited for", self.kernel.body[-1])

    def _waiting(self):
        for name, (_, waits) in self.barriers.items():
            yield from ((mask, pc, f"barrier {name}") for mask, pc in waits)
        for address, barrier in self.mbarriers.items():
            yield from ((mask, pc, f"mbarrier {address}") for mask, pc, *_ in barrier.waits)

    def resume(self, mask, pc):
        """Threads go on at an instruction."""
        for part, queue in zip(self.parts, self.queues, strict=True):
            here = mask & part
            if here.any():
                queue[pc] = queue[pc] | here if pc in queue else here

    def _advance(self, queue):
        """Run the threads that are furthest behind until they stop or part."""
        pc = min(queue)
        mask = queue.pop(pc)
        full = None if mask.all() else mask
        while True:
            kind, run, guard, negated, instruction = self.program[pc]
            self.steps += 1
            if self.steps > MOST_STEPS:
                raise instruction.error("a loop does not end")
            active = full
            if guard is not None:
                active = ~guard if negated else guard.copy()
                if full is not None:
                    active &= full
                if not active.any():
                    pc += 1
                    if pc in queue:
                        queue[pc] = queue[pc] | mask
                        return
                    continue
                if active.all():
                    active = None
            self.pc = pc
            if kind == "plain":
                run(active)
            else:
                left = mask.copy() if active is not None else np.zeros_like(mask)
                if active is not None:
                    left &= ~active
                going = mask if active is None else active
                if kind == "branch":
                    target = self.kernel.labels[run]
                    queue[target] = queue[target] | going if target in queue else going.copy()
                elif kind == "exit":
                    self.exited |= going
                    self._exit()
                else:
                    left |= run(going)
                if not left.any():
                    return
                mask = left
                full = None if mask.all() else mask
                if kind == "branch" or any(at <= pc + 1 for at in queue):
                    queue[pc + 1] = queue[pc + 1] | mask if pc + 1 in queue else mask
                    return
            pc += 1
            if pc in queue:
                queue[pc] = queue[pc] | mask
                return

    def _exit(self):
        """Barriers of the whole CTA do not wait for threads that have ended."""
        for name in list(self.barriers):
            self._try_barrier(name)

    # -- barriers (9.7.13.1) ---------------------------------------------------------------------

    def arrive(self, name, count, mask, instruction, waits):
        """Threads arrive at a barrier; those that go on at once."""
        here = np.isin(self.warp_of, self.warp_of[mask])  # of other warps some lanes may have ended
        self.whole_warps((mask | self.exited) & here, instruction)
        arrived, waiting = self.barriers.setdefault(name, ([count, np.zeros_like(mask)], []))
        if (arrived[1] & mask).any():
            raise instruction.error("a thread arrives twice")
        if arrived[0] != count:
            raise instruction.error("threads disagree on the number that a barrier waits for")
        arrived[1] |= mask
        if waits:
            waiting.append((mask.copy(), self.pc + 1))
        self._try_barrier(name)
        return np.zeros_like(mask) if waits else mask

    def _try_barrier(self, name):
        (count, arrived), waiting = self.barriers[name]
        enough = (arrived | self.exited).all() if count is None else arrived.sum() >= count
        if not enough:
            return
        del self.barriers[name]
        agents = np.unique(self.warp_of[arrived])
        clock = self.clocks.release(agents)
        for mask, pc in waiting:
            self.clocks.acquire(np.unique(self.warp_of[mask]), clock)
            self.resume(mask, pc)

    # -- cp.async (9.7.9.25) ---------------------------------------------------------------------

    def reset_asynchronous(self):
        self.copies = []  # places, offsets, values, threads, groups
        self.groups = np.zeros(self.threads, np.int64)  # committed by every thread
        n = -(-self.threads // WARPGROUP)
        self.products = [[] for _ in range(n)]  # (group, product) in order
        self.product_groups = [0] * n
        self.bulk = []
        self.written = np.zeros((len(self.tracked), self.threads), np.int64)
        self.in_flight = np.zeros_like(self.written)
        self.fenced = np.zeros(self.threads, np.int64)

    def copies_left(self):
        return any(len(copy[3]) for copy in self.copies)

    def copy(self, places, offsets, values, threads, instruction):
        """Threads start a copy of bytes ``values`` to shared memory."""
        agents = self.warp_of[threads]
        self.shared.check_write(places, agents, threads, instruction)
        np.add.at(self.shared.pending_writes, places.ravel(), 1)
        if not self.late:
            self.shared.store(offsets, values(), instruction)
        self.copies.append((places, offsets, values, threads, self.groups[threads], instruction))

    def wait_copies(self, mask, left):
        """Threads wait until at most ``left`` of their groups of copies are unfinished."""
        kept = []
        for places, offsets, values, threads, groups, instruction in self.copies:
            done = groups < self.groups[threads] - left
            if mask is not None:
                done &= mask[threads]
            if done.any():
                here, who = places[done], threads[done]
                np.subtract.at(self.shared.pending_writes, here.ravel(), 1)
                if self.late:
                    self.shared.store(offsets[done], values()[done], instruction)
                self.shared.note_write(here, self.warp_of[who], who, unfenced=False)
            if not done.all():
                rest = ~done
                chosen = (lambda v, r: lambda: v()[r])(values, rest)
                kept.append(
                    (places[rest], offsets[rest], chosen, threads[rest], groups[rest], instruction)
                )
        self.copies = kept

    # -- wgmma (9.7.15) --------------------------------------------------------------------------

    def start_product(self, warpgroup, product):
        if not self.late:
            product.compute()
        self.products[warpgroup].append((self.product_groups[warpgroup], product))

    def wait_products(self, warpgroup, left):
        edge = self.product_groups[warpgroup] - left
        kept = []
        for group, product in self.products[warpgroup]:
            if group < edge:
                if self.late:
                    product.compute()
                product.finish()
            else:
                kept.append((group, product))
        self.products[warpgroup] = kept

    # -- bulk copies -----------------------------------------------------------------------------

    def deliver(self):
        """Let the newest bulk copy arrive (mbarrier.py); whether there was one."""
        if not self.bulk:
            return False
        self.bulk.pop()()
        return True
