"""Matrix instructions: mma.sync, ldmatrix, stmatrix and wgmma; PTX ISA 9.7.14 and 9.7.15.

Every product has 256 bits of the inner index a row (128 where it says so), in fragments that differ
by the width of their numbers alone (9.7.14.5, figures of mma.m16n8k*): lane 4 g + t holds of row g
the words t, one word of every 128 bits a register. Products are summed in float64 and rounded to
the accumulator's fp32 once an instruction: the hardware's order and truncation are not given.
"""

import re

import numpy as np

from .memory import ANY, SHARED_BASE
from .parse import Immediate, Vector

# what a register of a product is
WORD = np.dtype(np.uint32)
# bits of a number, and how its bits become one
_WIDTH = {"b1": 1, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "tf32": 32}


def numbers(words, kind):
    """uint32 ``[..., n]`` to float64 ``[..., n, 32 / bits]``, the lowest bits first."""
    words = np.ascontiguousarray(words)[..., None]
    if kind == "b1":
        return np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little").astype(np.float64)
    if kind in ("s8", "u8"):
        return words.view(np.int8 if kind == "s8" else np.uint8).astype(np.float64)
    if kind == "bf16":
        return (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if kind == "f16":
        return words.view(np.float16).astype(np.float64)
    return (words & 0xFFFFE000).view(np.float32).astype(np.float64)  # tf32: 19 bits are read


def left_matrix(registers, kind):
    """Registers uint32 ``[2 or 4, threads]`` to A ``[warps, 16, K]``."""
    n, threads = registers.shape
    lanes = registers.T.reshape(threads // 32, 8, 4, n // 2, 2)  # g, t, half of K, half of rows
    return numbers(lanes.transpose(0, 4, 1, 3, 2), kind).reshape(threads // 32, 16, -1)


def right_matrix(registers, kind):
    """Registers uint32 ``[1 or 2, threads]`` to B transposed ``[warps, 8, K]``."""
    n, threads = registers.shape
    lanes = registers.T.reshape(threads // 32, 8, 4, n).transpose(0, 1, 3, 2)
    return numbers(lanes, kind).reshape(threads // 32, 8, -1)


def result_registers(matrix):
    """C ``[warps, 16, N]`` to registers ``[N / 2, threads]``, and back by :func:`result_matrix`."""
    warps, _, n = matrix.shape
    parts = matrix.reshape(warps, 2, 8, n // 8, 4, 2)  # half of rows, g, columns by 8, t, one of 2
    return parts.transpose(3, 1, 5, 0, 2, 4).reshape(n // 2, warps * 32)


def result_matrix(registers):
    n, threads = registers.shape
    parts = registers.reshape(n // 4, 2, 2, threads // 32, 8, 4)
    return parts.transpose(3, 1, 4, 0, 5, 2).reshape(threads // 32, 16, 2 * n)


def _added(product, before, kind):
    """C + A B in the accumulator's type, as bits."""
    if kind == "f32":
        return (product + before.view(np.float32)).astype(np.float32).view(np.uint32)
    return (product.astype(np.int64) + before.view(np.int32)).astype(np.int32).view(np.uint32)


# -- mma.sync (9.7.14.5.14) ------------------------------------------------------------------------

_SHAPE = re.compile(r"m16n8k(\d+)")


def _multiply(machine, instruction):
    names = [each for each in instruction.modifiers if each not in ("sync", "aligned")]
    names = [each for each in names if each != "satfinite"]  # no sum here comes near 2^31
    bits = names[-2:] == ["and", "popc"]
    names = names[:-2] if bits else names
    if len(names) != 7 or names[1:3] != ["row", "col"] or not _SHAPE.fullmatch(names[0]):
        raise instruction.error("the product is not known")
    shape, _, _, kind, left, right, before = names
    inner = int(_SHAPE.fullmatch(shape).group(1))
    if kind != before or left not in _WIDTH or left != right or (left == "b1") != bits:
        raise instruction.error("the product is not known")
    if kind != ("f32" if left in ("bf16", "f16", "tf32") else "s32"):
        raise instruction.error("the accumulator is not known")
    halves = inner * _WIDTH[left] // 128
    sizes = [len(machine.items(each)) for each in instruction.operands]
    if halves not in (1, 2) or sizes != [4, 2 * halves, halves, 4]:
        raise instruction.error("registers do not fit the product")
    result, *others = instruction.operands
    writers = [machine.writer(each, "b32", instruction) for each in machine.items(result)]
    a, b, c = ([machine.reader(each, "b32", instruction) for each in machine.items(operand)]
               for operand in others)  # fmt: skip

    def run(mask):
        machine.whole_warps(mask, instruction)
        x, y, z = (_stacked(machine, each) for each in (a, b, c))
        product = left_matrix(x, left) @ right_matrix(y, right).transpose(0, 2, 1)
        total = _added(product, np.ascontiguousarray(result_matrix(z)), kind)
        for write, values in zip(writers, result_registers(total), strict=True):
            write(values, mask)

    return run


def _stacked(machine, readers):
    return np.stack([np.broadcast_to(read(), machine.threads) for read in readers])


# -- ldmatrix, stmatrix (9.7.14.5.15, 9.7.14.5.16) ------------------------------------------


def _matrices(instruction):
    names = list(instruction.modifiers)
    found = re.fullmatch(r"sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", ".".join(names))
    if not found:
        raise instruction.error("the matrices are not known")
    return int(found.group(1)), bool(found.group(2))


def _rows(machine, addresses, mask, count, instruction):
    """Offsets of the rows that lanes name, ``[warps, 8 count]``, and the warps."""
    warps = machine.whole_warps(mask, instruction)
    at = addresses().reshape(machine.warps, 32)[warps, : 8 * count]
    offsets = machine.shared.offsets(at.ravel(), 16, instruction)
    agents = np.repeat(warps, 8 * count)
    return warps, offsets, agents, np.full(len(agents), ANY)


def _load(machine, instruction):
    count, transposed = _matrices(instruction)
    to, source = instruction.operands
    writers = [machine.writer(each, "b32", instruction) for each in machine.items(to)]
    if len(writers) != count:
        raise instruction.error("registers do not fit the matrices")
    addresses = machine.addresses(source, instruction)

    def run(mask):
        warps, offsets, agents, nobody = _rows(machine, addresses, mask, count, instruction)
        places = machine.shared.places(offsets, 16)
        machine.shared.check_read(places, agents, nobody, instruction)
        machine.shared.note_read(places, agents, nobody)
        parts = machine.shared.load(offsets, 16).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            parts = parts.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(parts).view(np.uint32).reshape(len(warps), count, 32)
        values = np.zeros((count, machine.warps, 32), np.uint32)
        values[:, warps] = words.transpose(1, 0, 2)
        for write, each in zip(writers, values, strict=True):
            write(each.ravel(), mask)

    return run


def _store(machine, instruction):
    count, transposed = _matrices(instruction)
    to, source = instruction.operands
    readers = [machine.reader(each, "b32", instruction) for each in machine.items(source)]
    if len(readers) != count:
        raise instruction.error("registers do not fit the matrices")
    addresses = machine.addresses(to, instruction)

    def run(mask):
        warps, offsets, agents, nobody = _rows(machine, addresses, mask, count, instruction)
        words = _stacked(machine, readers).reshape(count, machine.warps, 8, 4)[:, warps]
        parts = np.ascontiguousarray(words).view(np.uint16)  # matrix, warp, row, column
        parts = parts.transpose(1, 0, 3, 2) if transposed else parts.transpose(1, 0, 2, 3)
        values = np.ascontiguousarray(parts).view(np.uint8).reshape(-1, 16)
        places = machine.shared.places(offsets, 16)
        unchanged = machine.shared.unchanged(offsets, values)
        machine.shared.check_write(places, agents, nobody, instruction, unchanged)
        machine.shared.store(offsets, values, instruction)
        machine.shared.note_write(places, agents, nobody, unfenced=True)

    return run


# -- wgmma (9.7.15.5) ------------------------------------------------------------------------

_ASYNC = re.compile(
    r"mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.(f32|s32)\.(\w+)\.(\w+)(\.and\.popc)?"
)
# bytes of a row of a swizzle's atom, by the descriptor's bits 62 and 63 (9.7.15.5.1.2)
_ATOM = {0: 16, 1: 128, 2: 64, 3: 32}


def operand_offsets(descriptor, rows, width, transposed, instruction):
    """Where each 16 bits of an operand in shared memory lie: addresses ``[rows, width / 2]``.

    Canonical layouts of 9.7.15.5.1.2, in bytes. ``width``: of the inner index. With ``transposed``
    the rows are contiguous: numbers are of 16 bits then.
    """
    start = (descriptor & 0x3FFF) << 4
    leading, stride = (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    if descriptor >> 49 & 7:
        raise instruction.error("a base offset is not known")
    atom = _ATOM[descriptor >> 62 & 3]
    row = np.arange(rows)[:, None]
    if transposed:
        byte, inner = row * 2, np.arange(width // 2)[None, :]
        near, far = (stride, leading) if atom == 16 else (leading, stride)
        at = byte // atom * near + inner // 8 * far + inner % 8 * atom + byte % atom
    else:
        byte = np.arange(0, width, 2)[None, :]
        at = row // 8 * stride + row % 8 * atom + byte
        if atom == 16:
            at = row // 8 * stride + byte // 16 * leading + row % 8 * 16 + byte % 16
        elif width > atom:
            raise instruction.error("the inner index is wider than the swizzle")
    at = at + start
    if atom > 16:  # 16-byte units of a row change places with the row of the atom
        at ^= (at >> 7 & (atom // 16 - 1)) << 4
    return at


class Product:
    """One wgmma.mma_async of one warpgroup, from its start to its end."""

    def __init__(self, machine, threads, plan, instruction):
        self.machine, self.plan, self.instruction = machine, plan, instruction
        self.threads = slice(threads[0], threads[-1] + 1)
        self.warps = np.unique(machine.warp_of[threads])
        self.pieces, self.places, shared = [], [], machine.shared
        self.scale = bool(plan.scale()[threads[0]])
        for operand in (plan.left, plan.right):
            if operand.registers is not None:
                self.pieces.append(None)
                continue
            descriptor = np.broadcast_to(operand.descriptor(), machine.threads)[threads]
            if (descriptor != descriptor[0]).any():
                raise instruction.error("lanes name different operands")
            offsets, places = operand.found(int(descriptor[0]), shared, instruction)
            self.pieces.append(offsets)
            self.places.append(places)
            self._by_all(places, shared.check_read, instruction)
            if shared.unfenced[places].any():
                machine.fault(
                    "an asynchronous product reads what was written without a proxy fence",
                    instruction,
                )
            shared.pending_reads[places] += 1
        self._check_registers()

    def _by_all(self, places, call, *more):
        """For every warp, each of which reads all of it."""
        n = len(places)
        agents = np.repeat(self.warps, n)
        call(np.tile(places, (len(self.warps), 1)), agents, np.full(len(agents), ANY), *more)

    def _check_registers(self):
        """wgmma.fence before the first, and behind every write to a register (9.7.15.7.1)."""
        machine, plan = self.machine, self.plan
        fenced = machine.fenced[self.threads]
        behind = machine.written[plan.tracked, self.threads] > fenced
        if behind.any() or not fenced.all():
            machine.fault(
                "no fence between a product and what wrote its registers", self.instruction
            )
        np.add.at(machine.in_flight, (plan.tracked, self.threads), 1)

    def compute(self):
        """Read the operands, write the accumulators."""
        machine, threads, plan = self.machine, self.threads, self.plan
        matrices = []
        for operand, at in zip((plan.left, plan.right), self.pieces, strict=True):
            if at is None:
                words = machine.banks[WORD][operand.registers, threads]
                matrices.append(left_matrix(words, plan.kind).reshape(64, -1))
            else:
                raw = machine.shared.data[at[..., None] + np.arange(2)]
                raw = np.ascontiguousarray(raw).reshape(operand.rows, -1)
                matrices.append(numbers(raw.view(np.uint32), plan.kind).reshape(operand.rows, -1))
        product = (matrices[0] @ matrices[1].T).reshape(4, 16, -1)
        before = machine.banks[WORD][plan.result, threads]
        before = np.ascontiguousarray(result_matrix(before))
        total = _added(product, before if self.scale else np.zeros_like(before), plan.accumulator)
        machine.banks[WORD][plan.result, threads] = result_registers(total)

    def finish(self):
        """A wait has covered it."""
        machine, shared = self.machine, self.machine.shared
        for places in self.places:
            shared.pending_reads[places] -= 1
            self._by_all(places, shared.note_read)
        np.subtract.at(machine.in_flight, (self.plan.tracked, self.threads), 1)


class _Operand:
    """A matrix in registers, of which it has the rows of their bank, or in shared memory."""

    def __init__(self, rows, registers=None, descriptor=None, transposed=False):
        self.rows, self.registers = rows, registers
        self.descriptor, self.transposed = descriptor, transposed
        self.known = {}

    def found(self, descriptor, shared, instruction):
        """Of a descriptor, offsets of each 16 bits and the pieces of shared memory they are in."""
        if descriptor not in self.known:
            at = operand_offsets(descriptor, self.rows, 32, self.transposed, instruction)
            offsets = shared.offsets(at, 2, instruction)
            self.known[descriptor] = offsets, np.unique(offsets // shared.piece)[:, None]
        return self.known[descriptor]


class _Plan:
    """What all executions of one wgmma.mma_async share."""

    def __init__(self, machine, instruction):
        found = _ASYNC.fullmatch(".".join(instruction.modifiers))
        if not found or found.group(4) != found.group(5) or found.group(4) not in _WIDTH:
            raise instruction.error("the product is not known")
        n, inner, self.accumulator, self.kind, _, bits = found.groups()
        if int(inner) * _WIDTH[self.kind] != 256 or (self.kind == "b1") != bool(bits):
            raise instruction.error("the product is not known")
        result, left, right, scale, *flags = instruction.operands
        flags = [each.value for each in flags]
        floats = self.accumulator == "f32"
        halves = self.kind in ("bf16", "f16")
        in_registers = isinstance(left, Vector)
        expected = (2 if floats else 0) + (2 - in_registers if halves else 0)
        if len(flags) != expected or any(each != 1 for each in flags[:2]):
            raise instruction.error("signs or layouts are not known")
        turned = [bool(each) for each in flags[2:]]
        self.result, self.tracked = self._words(machine, result, instruction)
        if len(self.result) != int(n) // 2:
            raise instruction.error("registers do not fit the product")
        if in_registers:
            rows, tracked = self._words(machine, left, instruction)
            self.left = _Operand(64, registers=rows)
            self.tracked = np.concatenate([tracked, self.tracked])
        else:
            self.left = self._shared(machine, left, 64, turned[:1], instruction)
        self.right = self._shared(machine, right, int(n), turned[-1:], instruction)
        if isinstance(scale, Immediate):
            value = np.full(machine.threads, bool(scale.value))
            self.scale = lambda: value
        else:
            self.scale = machine.reader(scale, "pred", instruction)

    @staticmethod
    def _words(machine, operand, instruction):
        """Of registers of 32 bits their rows in the bank, and among those that are tracked."""
        names = [each.name for each in operand.items]
        if any(machine.registers[name].dtype != WORD for name in names):
            raise instruction.error("registers of a product are not of 32 bits")
        rows, tracked = ([of[name] for name in names] for of in (machine.rows, machine.tracked))
        return np.array(rows), np.array(tracked)

    @staticmethod
    def _shared(machine, operand, rows, turned, instruction):
        read = machine.reader(operand, "u64", instruction)
        return _Operand(rows, descriptor=read, transposed=bool(turned and turned[0]))


def _asynchronous(machine, instruction):
    what = instruction.modifiers[0]

    def warpgroups(mask):
        warps = machine.whole_warps(mask, instruction)
        if len(warps) % 4 or (warps[::4] % 4).any() or (np.diff(warps.reshape(-1, 4)) != 1).any():
            raise instruction.error("part of a warpgroup runs what all of it must run")
        return warps[::4] // 4

    if instruction.modifiers == ("fence", "sync", "aligned"):

        def fence(mask):
            warpgroups(mask)
            machine.fenced[slice(None) if mask is None else mask] = machine.steps

        return fence
    if instruction.modifiers == ("commit_group", "sync", "aligned"):

        def commit(mask):
            for each in warpgroups(mask):
                machine.product_groups[each] += 1

        return commit
    if instruction.modifiers == ("wait_group", "sync", "aligned"):
        left = instruction.operands[0].value

        def wait(mask):
            for each in warpgroups(mask):
                machine.wait_products(each, left)

        return wait
    if what != "mma_async":
        raise instruction.error("the opcode is not known")
    plan = _Plan(machine, instruction)

    def run(mask):
        for each in warpgroups(mask):
            threads = np.arange(each * 128, each * 128 + 128)
            machine.start_product(each, Product(machine, threads, plan, instruction))

    return run


INSTRUCTIONS = {
    "mma": _multiply, "ldmatrix": _load, "stmatrix": _store, "wgmma": _asynchronous
}  # fmt: skip
assert SHARED_BASE % 1024 == 0, "swizzles go by addresses"
