"""What each instruction does, over all threads of a CTA; chapter 9 of the PTX ISA, version 9.0.

Those are here that the kernels hold, with the types and modifiers that they use; anything else is
an error that names it. An instruction becomes a function of a mask of threads, None for all.
"""

import numpy as np

from . import matrix, mbarrier
from .memory import as_words
from .parse import Immediate, Register, Vector

_KNOWN = {}
# instructions whose first operand is no result
_NO_RESULT = {"st", "stmatrix", "red", "cp", "bar", "barrier", "bra", "ret", "exit", "fence",
              "membar", "wgmma", "setmaxnreg"}  # fmt: skip


def known(*opcodes):
    def keep(function):
        _KNOWN.update(dict.fromkeys(opcodes, function))
        return function

    return keep


def registers_of(operand):
    """Names of the registers in an operand."""
    if isinstance(operand, Register):
        return {operand.name}
    if isinstance(operand, Vector):
        return set().union(*map(registers_of, operand.items))
    return registers_of(operand.base) if hasattr(operand, "base") else set()


def asynchronous_registers(kernel):
    """Accumulators and left operands of wgmma."""
    accumulators, lefts = set(), set()
    for each in kernel.body:
        if each.opcode == "wgmma" and each.modifiers[0] == "mma_async":
            accumulators |= registers_of(each.operands[0])
            if isinstance(each.operands[1], Vector):
                lefts |= registers_of(each.operands[1])
    return accumulators, lefts


def compiled(machine, instruction):
    """How the machine treats an instruction (plain, branch, exit, block), and its function."""
    make = _KNOWN.get(instruction.opcode)
    if make is None:
        raise unknown(instruction)
    made = make(machine, instruction)
    kind, run = made if isinstance(made, tuple) else ("plain", made)
    if instruction.opcode == "wgmma" or not machine.accumulators:
        return kind, run
    results = [] if instruction.opcode in _NO_RESULT else instruction.operands[:1]
    writes = set().union(*map(registers_of, results))
    others = instruction.operands[1:] if results else instruction.operands
    reads = set().union(*map(registers_of, others))
    if results and isinstance(results[0], Vector) is False and hasattr(results[0], "base"):
        writes, reads = set(), reads | writes
    if instruction.guard is not None:
        reads.add(instruction.guard.name)
    touched = (reads | writes) & machine.accumulators
    written = writes & (machine.accumulators | machine.lefts)
    if not touched and not written:
        return kind, run

    rows = [(machine.tracked[name], name in written) for name in touched | written]

    def guarded(mask):
        for row, is_written in rows:
            flying = machine.in_flight[row] if mask is None else machine.in_flight[row][mask]
            if flying.any():
                what = "write to" if is_written else "read of"
                machine.fault(f"{what} a register of a product in flight", instruction)
            if is_written:
                machine.written[row][slice(None) if mask is None else mask] = machine.steps
        return run(mask)

    return kind, guarded


def unknown(instruction):
    name = ".".join((instruction.opcode, *instruction.modifiers))
    return instruction.error(f"the opcode {name} is not known")


def allow(instruction, *sets):
    """Modifiers in order, one of each set; a set with "" may be absent. What was found."""
    left, found = list(instruction.modifiers), []
    for each in sets:
        if left and left[0] in each:
            found.append(left.pop(0))
        elif "" in each:
            found.append("")
        else:
            raise unknown(instruction)
    if left:
        raise unknown(instruction)
    return found


INTEGERS = {"s16", "u16", "s32", "u32", "s64", "u64"}
BITS = {"b16", "b32", "b64"}
FLOATS = {"f32", "f64"}


def _operands(machine, instruction, kind, *others):
    """Writer of the result, readers of the rest."""
    kinds = others or [kind] * (len(instruction.operands) - 1)
    readers = [
        machine.reader(operand, each, instruction)
        for operand, each in zip(instruction.operands[1:], kinds, strict=True)
    ]
    return machine.writer(instruction.operands[0], kind, instruction), *readers


# -- integers (9.7.1), floats (9.7.3), logic (9.7.8) ---------------------------------------------


@known("add", "sub", "min", "max", "and", "or", "xor")
def _two(machine, instruction):
    _, kind = allow(instruction, {"rn", ""}, INTEGERS | BITS | FLOATS | {"pred"})
    write, a, b = _operands(machine, instruction, kind)
    function = {
        "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }[instruction.opcode]  # fmt: skip
    if kind in FLOATS:
        function = {"min": np.fmin, "max": np.fmax}.get(instruction.opcode, function)
    return lambda mask: write(function(a(), b()), mask)


@known("not", "neg", "abs", "popc")
def _one(machine, instruction):
    (kind,) = allow(instruction, INTEGERS | BITS | FLOATS | {"pred"})
    function = {"not": np.invert, "neg": np.negative, "abs": np.abs}.get(instruction.opcode)
    if instruction.opcode == "popc":
        write, a = _operands(machine, instruction, "u32", kind)
        return lambda mask: write(_ones(a()), mask)
    write, a = _operands(machine, instruction, kind)
    return lambda mask: write(function(a()), mask)


def _ones(words):
    return np.unpackbits(words[:, None].view(np.uint8), axis=1).sum(1, dtype=np.uint32)


@known("mul", "mad")
def _multiply(machine, instruction):
    if instruction.modifiers[-1] in FLOATS:
        _, kind = allow(instruction, {"rn", ""}, FLOATS)
        write, a, b = _operands(machine, instruction, kind)
        return lambda mask: write(a() * b(), mask)
    half, kind = allow(instruction, {"lo", "wide"}, INTEGERS)
    result = kind[0] + str(2 * int(kind[1:])) if half == "wide" else kind
    more = [result] * (len(instruction.operands) - 3)
    write, a, b, *c = _operands(machine, instruction, result, kind, kind, *more)
    wide = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(result[1:]) // 8}")

    def run(mask):
        product = np.asarray(a()).astype(wide) * np.asarray(b()).astype(wide)
        write(product + c[0]() if c else product, mask)

    return run


@known("fma")
def _fma(machine, instruction):
    _, kind = allow(instruction, {"rn"}, FLOATS)
    write, a, b, c = _operands(machine, instruction, kind)
    # the product of two float64 is rounded here to the 64 bits of a long double
    wider, own = (np.float64, np.float32) if kind == "f32" else (np.longdouble, np.float64)

    def run(mask):
        wide = [np.asarray(each()).astype(wider) for each in (a, b, c)]
        write((wide[0] * wide[1] + wide[2]).astype(own), mask)

    return run


@known("div", "rem")
def _divide(machine, instruction):
    if instruction.opcode == "div" and instruction.modifiers in (("full", "f32"), ("rn", "f32")):
        write, a, b = _operands(machine, instruction, "f32")
        return lambda mask: write(np.divide(a(), b(), dtype=np.float32), mask)
    if instruction.opcode == "div" and instruction.modifiers == ("rn", "f64"):
        write, a, b = _operands(machine, instruction, "f64")
        return lambda mask: write(np.divide(a(), b(), dtype=np.float64), mask)
    (kind,) = allow(instruction, INTEGERS)
    write, a, b = _operands(machine, instruction, kind)

    def run(mask):
        x, y = np.broadcast_arrays(a(), b())
        if not machine.everywhere(y != 0, mask):
            raise instruction.error("division by zero")
        safe = np.where(y == 0, 1, y)
        rest = np.fmod(x, safe)
        write((x - rest) // safe if instruction.opcode == "div" else rest, mask)

    return run


@known("rcp")
def _reciprocal(machine, instruction):
    """The upper half of the reciprocal's bits, the lower half zero (9.7.3.14)."""
    allow(instruction, {"approx"}, {"ftz"}, {"f64"})
    write, a = _operands(machine, instruction, "f64")

    def run(mask):
        with np.errstate(divide="ignore"):
            bits = np.asarray(np.divide(1.0, a(), dtype=np.float64)).view(np.uint64)
        write((bits & np.uint64(0xFFFFFFFF00000000)).view(np.float64), mask)

    return run


@known("ex2")
def _power(machine, instruction):
    allow(instruction, {"approx"}, {"ftz", ""}, {"f32"})
    write, a = _operands(machine, instruction, "f32")
    return lambda mask: write(np.exp2(a()), mask)


@known("shl", "shr")
def _shift(machine, instruction):
    (kind,) = allow(instruction, INTEGERS | BITS)
    write, a, places = _operands(machine, instruction, kind, kind, "u32")
    width, left = int(kind[1:]), instruction.opcode == "shl"

    def run(mask):
        value, by = np.asarray(a()), np.asarray(places())
        inside = np.minimum(by, width - 1).astype(value.dtype)
        shifted = value << inside if left else value >> inside
        if kind[0] != "s" or left:  # an amount beyond the width leaves nothing (9.7.8.7)
            shifted = np.where(by < width, shifted, 0)
        write(shifted, mask)

    return run


@known("bfe")
def _extract(machine, instruction):
    (kind,) = allow(instruction, {"u32", "s32", "u64", "s64"})
    write, a, start, length = _operands(machine, instruction, kind, kind, "u32", "u32")
    width = int(kind[1:])

    def run(mask):
        value = np.asarray(a()).astype(np.int64 if kind[0] == "s" else np.uint64)
        at, size = np.asarray(start()) & 255, np.asarray(length()) & 255
        if not machine.everywhere((at + size <= width) & (size > 0), mask):
            raise instruction.error("a field beyond the word")
        up = (64 - at - size).astype(value.dtype)
        write(((value << up) >> (64 - size).astype(value.dtype)).astype(f"{value.dtype.kind}8"),
              mask)  # fmt: skip

    return run


@known("bfi")
def _insert(machine, instruction):
    (kind,) = allow(instruction, {"b32", "b64"})
    write, a, b, start, length = _operands(machine, instruction, kind, kind, kind, "u32", "u32")

    def run(mask):
        at, size = (np.asarray(each()).astype(np.uint64) for each in (start, length))
        if not machine.everywhere((at + size <= int(kind[1:])) & (size < 64), mask):
            raise instruction.error("a field beyond the word")
        field = ((np.uint64(1) << size) - np.uint64(1)) << at
        new = np.asarray(a()).astype(np.uint64) << at
        write((np.asarray(b()).astype(np.uint64) & ~field) | (new & field), mask)

    return run


@known("prmt")
def _permute(machine, instruction):
    allow(instruction, {"b32"})
    write, a, b, chosen = _operands(machine, instruction, "b32")

    def run(mask):
        both = np.asarray(a()).astype(np.uint64) | (np.asarray(b()).astype(np.uint64) << 32)
        out = np.uint64(0)
        for at in range(4):
            digit = (np.asarray(chosen()).astype(np.uint64) >> np.uint64(4 * at)) & np.uint64(15)
            byte = (both >> ((digit & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            out = out | (np.where(digit & np.uint64(8), sign, byte) << np.uint64(8 * at))
        write(out, mask)

    return run


# -- comparison (9.7.6), conversion and moves (9.7.9) --------------------------------------------

_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_UNORDERED = {"ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt", "neu": "eq"}


@known("setp")
def _compare(machine, instruction):
    name, kind = allow(instruction, {*_COMPARE, *_UNORDERED}, INTEGERS | BITS | FLOATS)
    write, a, b = _operands(machine, instruction, "pred", kind, kind)
    if name in _UNORDERED:
        function = _COMPARE[_UNORDERED[name]]
        return lambda mask: write(~function(a(), b()), mask)
    if kind in FLOATS and name == "ne":  # ordered: false where one is NaN
        return lambda mask: write((a() != b()) & (a() == a()) & (b() == b()), mask)
    function = _COMPARE[name]
    return lambda mask: write(function(a(), b()), mask)


@known("selp")
def _select(machine, instruction):
    (kind,) = allow(instruction, INTEGERS | BITS | FLOATS | {"f16"})
    write, a, b, which = _operands(machine, instruction, kind, kind, kind, "pred")
    return lambda mask: write(np.where(which(), a(), b()), mask)


@known("mov")
def _move(machine, instruction):
    (kind,) = allow(instruction, INTEGERS | BITS | FLOATS | {"pred"})
    to, source = instruction.operands
    if isinstance(to, Vector):  # unpacked, the least significant part first
        part = f"b{int(kind[1:]) // len(to.items)}"
        read = machine.reader(source, "b" + kind[1:], instruction)
        writers = [machine.writer(each, part, instruction) for each in to.items]

        def unpack(mask):
            word = np.broadcast_to(read(), machine.threads)
            parts = np.ascontiguousarray(word)[:, None].view(f"u{int(part[1:]) // 8}").copy()
            for at, write in enumerate(writers):
                write(parts[:, at], mask)

        return unpack
    write = machine.writer(to, kind, instruction)
    if isinstance(source, Vector):
        part = f"b{int(kind[1:]) // len(source.items)}"
        readers = [machine.reader(each, part, instruction) for each in source.items]

        def pack(mask):
            parts = [np.broadcast_to(read(), machine.threads) for read in readers]
            write(np.stack(parts, 1).view(f"u{int(kind[1:]) // 8}")[:, 0], mask)

        return pack
    read = machine.reader(source, kind, instruction)
    return lambda mask: write(read(), mask)


def to_bfloat(values):
    """fp32 to the bits of bf16, to the nearest, ties to even; NaN stays."""
    word = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def from_bfloat(bits):
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


@known("cvt")
def _convert(machine, instruction):
    modifiers = instruction.modifiers
    if modifiers in (("rn", "bf16x2", "f32"), ("rn", "f16x2", "f32")):
        write, high, low = _operands(machine, instruction, "b32", "f32", "f32")
        half = to_bfloat if modifiers[1] == "bf16x2" else _to_half

        def two(mask):
            parts = [half(np.broadcast_to(each(), machine.threads)) for each in (low, high)]
            write(parts[0].astype(np.uint32) | (parts[1].astype(np.uint32) << 16), mask)

        return two
    if modifiers in (("rn", "bf16", "f32"), ("rn", "f16", "f32")):
        write, a = _operands(machine, instruction, "b16", "f32")
        half = to_bfloat if modifiers[1] == "bf16" else _to_half
        return lambda mask: write(half(a()), mask)
    if modifiers == ("f32", "bf16"):
        write, a = _operands(machine, instruction, "f32", "b16")
        return lambda mask: write(from_bfloat(a()), mask)
    if modifiers == ("f32", "f16"):
        write, a = _operands(machine, instruction, "f32", "f16")
        return lambda mask: write(np.asarray(a()).astype(np.float32), mask)
    small = INTEGERS | {"u8", "s8"}
    if modifiers == ("f64", "f32"):  # exact
        write, a = _operands(machine, instruction, "f64", "f32")
        return lambda mask: write(np.asarray(a()).astype(np.float64), mask)
    rounding, to, source = allow(instruction, {"rn", ""}, small | FLOATS, small | {"f64"})
    if (rounding == "rn") != (to in FLOATS) or (source == "f64" and to != "f32"):
        raise unknown(instruction)
    write, a = _operands(machine, instruction, to, source)
    floats = {"f32": np.float32, "f64": np.float64}
    dtype = floats.get(to) or f"{'i' if to[0] == 's' else 'u'}{int(to[1:]) // 8}"
    return lambda mask: write(np.asarray(a()).astype(dtype), mask)


def _to_half(values):
    return np.ascontiguousarray(values, np.float32).astype(np.float16).view(np.uint16)


@known("cvta")
def _generic(machine, instruction):
    """Generic addresses of global memory are its own."""
    allow(instruction, {"to", ""}, {"global"}, {"u64"})
    write, a = _operands(machine, instruction, "u64")
    return lambda mask: write(a(), mask)


@known("shfl")
def _shuffle(machine, instruction):
    _, mode, _ = allow(instruction, {"sync"}, {"bfly", "idx", "down", "up"}, {"b32"})
    to, *others = instruction.operands
    flag = None
    if isinstance(to, Vector):
        to, flag = to.items
        flag = machine.writer(flag, "pred", instruction)
    write = machine.writer(to, "b32", instruction)
    a, b, c, members = (machine.reader(each, "u32", instruction) for each in others)

    def run(mask):
        machine.whole_warps(mask, instruction)
        if not machine.everywhere(np.asarray(members()) == 0xFFFFFFFF, mask):
            raise instruction.error("lanes must be all of a warp's")
        lane = machine.index % 32
        clamp, segment = np.asarray(c()) & 31, (np.asarray(c()) >> 8) & 31
        least, most = lane & segment, (lane & segment) | (clamp & ~segment & 31)
        by = np.asarray(b()).astype(np.int64) & 31
        source = {
            "bfly": lane ^ by, "down": lane + by, "up": lane - by,
            "idx": least | (by & ~segment & 31),
        }[mode]  # fmt: skip
        inside = source >= most if mode == "up" else source <= most
        source = machine.index - lane + np.where(inside, source, lane)
        write(np.broadcast_to(a(), machine.threads)[source], mask)
        if flag is not None:
            flag(inside, mask)

    return run


_REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum}


@known("redux")
def _reduce(machine, instruction):
    """One result for all lanes of a warp (9.7.13.9)."""
    _, name, kind = allow(instruction, {"sync"}, set(_REDUCTIONS), {"s32", "u32"})
    to, number, members = instruction.operands
    write, read = machine.writer(to, kind, instruction), machine.reader(number, kind, instruction)
    members = machine.reader(members, "u32", instruction)

    def run(mask):
        machine.whole_warps(mask, instruction)
        if not machine.everywhere(np.asarray(members()) == 0xFFFFFFFF, mask):
            raise instruction.error("lanes must be all of a warp's")
        lanes = np.broadcast_to(read(), machine.threads).reshape(-1, 32)
        found = _REDUCTIONS[name].reduce(lanes, axis=1, dtype=lanes.dtype)
        write(np.repeat(found, 32), mask)

    return run


# -- loads and stores (9.7.9.8 to 9.7.9.12), atomics (9.7.13.4) -----------------------------------

_CACHE = {
    "cg",
    "L1::evict_last",
    "L1::evict_first",
    "L1::evict_normal",
    "L1::no_allocate",
    "nc",
    "",
}
_WIDTHS = {"b8", "u8", "s8", "b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64",
           "f64"}  # fmt: skip


def _size(kind):
    return int(kind.lstrip("bfus")) // 8


def _unsigned(kind):
    return np.dtype(f"u{_size(kind)}")


@known("ld")
def _load(machine, instruction):
    space, _, vector, kind = allow(
        instruction, {"param", "global", "shared", "shared::cta"}, _CACHE, {"v2", "v4", ""}, _WIDTHS
    )
    to, source = instruction.operands
    if space == "param":
        start, size = machine.kernel.parameters[source.base.name]
        raw = machine.parameters[start + source.offset :][: _size(kind)]
        write = machine.writer(to, kind, instruction)
        value = raw.copy().view(_signed_or_not(kind))[0]
        return lambda mask: write(value, mask)
    writers = [machine.writer(each, kind, instruction) for each in machine.items(to)]
    if len(writers) != int(vector[1:] or 1):
        raise instruction.error("registers do not fit the vector")
    addresses, size = machine.addresses(source, instruction), _size(kind)
    total = size * len(writers)

    def run(mask):
        active, at = machine.active(mask), addresses()
        if space == "global":
            found = machine.store.read(at[active], total, instruction)
        else:
            offsets = machine.shared.offsets(at[active], total, instruction)
            places = machine.shared.places(offsets, total)
            agents = machine.warp_of[active]
            machine.shared.check_read(places, agents, active, instruction)
            machine.shared.note_read(places, agents, active)
            found = machine.shared.load(offsets, total)
        words = as_words(found, _signed_or_not(kind))
        for part, write in enumerate(writers):
            values = np.zeros(machine.threads, words.dtype)
            values[active] = words[:, part]
            write(values, mask)

    return run


def _signed_or_not(kind):
    if kind in FLOATS:
        return np.dtype(np.float32 if kind == "f32" else np.float64)
    return np.dtype(f"{'i' if kind[0] == 's' else 'u'}{_size(kind)}")


@known("st")
def _store(machine, instruction):
    space, _, vector, kind = allow(
        instruction, {"global", "shared", "shared::cta"}, _CACHE, {"v2", "v4", ""}, _WIDTHS
    )
    to, source = instruction.operands
    raw = f"b{kind[1:]}"
    readers = [machine.reader(each, raw, instruction) for each in machine.items(source)]
    if len(readers) != int(vector[1:] or 1):
        raise instruction.error("registers do not fit the vector")
    addresses = machine.addresses(to, instruction)

    def run(mask):
        active, at = machine.active(mask), addresses()
        words = [np.broadcast_to(read(), machine.threads)[active] for read in readers]
        values = np.stack(words, 1).view(np.uint8).reshape(len(active), -1)
        if space == "global":
            machine.store.write(at[active], values, instruction)
            return
        store_shared(machine, at[active], values, active, active, instruction)

    return run


def store_shared(machine, addresses, values, threads, writers, instruction):
    """Bytes to shared memory by threads; ``writers`` as hazards know them."""
    size = values.shape[1]
    offsets = machine.shared.offsets(addresses, size, instruction)
    places, agents = machine.shared.places(offsets, size), machine.warp_of[threads]
    unchanged = machine.shared.unchanged(offsets, values)
    machine.shared.check_write(places, agents, writers, instruction, unchanged)
    machine.shared.store(offsets, values, instruction)
    machine.shared.note_write(places, agents, writers, unfenced=True)


_ATOMICS = {"add": (np.add, {"u32", "s32", "u64", "s64"}), "and": (np.bitwise_and, {"b32"})}


@known("atom", "red")
def _atomic(machine, instruction):
    *_, name, kind = allow(
        instruction, {"global"}, {"gpu"}, {"relaxed"}, set(_ATOMICS), {"b32", *INTEGERS}
    )
    what, numbers = _ATOMICS[name]
    if kind not in numbers:
        raise unknown(instruction)
    operands = instruction.operands
    write = None
    if instruction.opcode == "atom":
        write, operands = machine.writer(operands[0], kind, instruction), operands[1:]
    addresses = machine.addresses(operands[0], instruction)
    read = machine.reader(operands[1], f"u{kind[1:]}", instruction)

    def run(mask):
        active = machine.active(mask)
        values = np.broadcast_to(read(), machine.threads)[active]
        before = machine.store.change(what, addresses()[active], values, instruction)
        if write is not None:
            all_before = np.zeros(machine.threads, before.dtype)
            all_before[active] = before
            write(all_before, mask)

    return run


# -- control (9.7.12) and barriers (9.7.13.1 to 9.7.13.2) ------------------------------------------


@known("bra")
def _branch(machine, instruction):
    allow(instruction, {"uni", ""})
    name = instruction.operands[0].name
    if name not in machine.kernel.labels:
        raise instruction.error("a label is not known")
    return "branch", name


@known("ret", "exit")
def _end(machine, instruction):
    allow(instruction)
    return "exit", None


@known("bar", "barrier")
def _barrier(machine, instruction):
    if instruction.modifiers == ("warp", "sync"):
        if instruction.operands not in ((Immediate(-1),), (Immediate(0xFFFFFFFF),)):
            raise instruction.error("lanes must be all of a warp's")

        def warp(mask):
            for agent in machine.whole_warps(mask, instruction):
                machine.clocks.release(np.array([agent]))

        return warp
    kind, *_ = allow(instruction, {"sync", "arrive"}, {"aligned", ""})
    numbers = [machine.reader(each, "u32", instruction) for each in instruction.operands]

    def run(mask):
        names, *counts = (np.broadcast_to(each(), machine.threads) for each in numbers)
        going = np.zeros_like(mask)
        for name in np.unique(names[mask]):  # warps may name different barriers
            here = mask & (names == name)
            count = np.unique(counts[0][here]) if counts else [None]
            if len(count) != 1:
                raise instruction.error("threads disagree on the number that a barrier waits for")
            number = None if count[0] is None else int(count[0])
            going |= machine.arrive(int(name), number, here, instruction, kind == "sync")
        return going

    return "block", run


@known("fence")
def _fence(machine, instruction):
    if instruction.modifiers in (("proxy", "async"), ("proxy", "async", "shared::cta")):

        def proxy(mask):
            machine.shared.fence(machine.whole_warps(mask, instruction))
            mbarrier.publish(machine, mask)

        return proxy
    if instruction.modifiers == ("mbarrier_init", "release", "cluster"):
        return lambda mask: mbarrier.publish(machine, mask)
    raise unknown(instruction)


@known("setmaxnreg")
def _registers(machine, instruction):
    """Registers of a warpgroup's threads (9.7.19.5): those of all must fit the multiprocessor."""
    allow(instruction, {"inc", "dec"}, {"sync"}, {"aligned"}, {"u32"})
    (number,) = (each.value for each in instruction.operands)
    if number % 8 or not 24 <= number <= 256:
        raise instruction.error("registers are a multiple of 8 from 24 to 256")

    def run(mask):
        warps = machine.whole_warps(mask, instruction)
        for each in np.unique(warps // 4):
            if (warps // 4 == each).sum() < 4:
                raise instruction.error("part of a warpgroup runs what all of it must run")
            machine.registers_of_warpgroups[each] = number
        taken = 128 * sum(machine.registers_of_warpgroups.values())
        if taken > 65536:
            raise instruction.error(f"warpgroups take {taken} registers of 65536")

    return run


# -- asynchronous copies (9.7.9.25.3) --------------------------------------------------------


@known("cp")
def _copy(machine, instruction):
    modifiers = instruction.modifiers
    if modifiers == ("async", "commit_group"):

        def commit(mask):
            machine.groups[slice(None) if mask is None else mask] += 1

        return commit
    if modifiers == ("async", "wait_group"):
        left = instruction.operands[0].value
        return lambda mask: machine.wait_copies(mask, left)
    if modifiers == ("async", "wait_all"):

        def everything(mask):
            machine.groups[slice(None) if mask is None else mask] += 1
            machine.wait_copies(mask, 0)

        return everything
    if modifiers[:2] == ("async", "bulk"):
        return mbarrier.bulk_copy(machine, instruction)
    allow(instruction, {"async"}, {"ca", "cg"}, {"shared"}, {"global"})
    to, source, size, *given = instruction.operands
    targets = machine.addresses(to, instruction)
    sources = machine.addresses(source, instruction)
    total = size.value
    if total not in (4, 8, 16):
        raise instruction.error("a copy is of 4, 8 or 16 bytes")
    number = machine.reader(given[0], "u32", instruction) if given else lambda: np.uint32(total)

    def run(mask):
        threads = machine.active(mask)
        count = np.broadcast_to(number(), machine.threads)[threads].astype(np.int64)
        if (count > total).any():
            raise instruction.error("more bytes are read than copied")
        offsets = machine.shared.offsets(targets()[threads], total, instruction)
        begin = sources()[threads].copy()

        def values():
            found = np.zeros((len(threads), total), np.uint8)
            for bytes_read in np.unique(count[count > 0]):
                here = count == bytes_read
                unit = min(int(bytes_read & -bytes_read), total)
                for at in range(0, int(bytes_read), unit):
                    part = machine.store.read(begin[here] + at, unit, instruction)
                    found[here, at : at + unit] = part
            return found

        machine.copy(machine.shared.places(offsets, total), offsets, values, threads, instruction)

    return run


for _name, _make in (matrix.INSTRUCTIONS | mbarrier.INSTRUCTIONS).items():
    known(_name)(_make)
