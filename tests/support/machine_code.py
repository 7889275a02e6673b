"""What the machine code of a kernel shows without a device: for tests that compile kernels.

``rewritten_operands`` follows the asynchronous matrix instructions of sm_90a. One that takes its
left operand from registers reads them until a wait covers it (PTX ISA, wgmma.wait_group: anything
else is undefined); a compiler that unrolls or pipelines may write them before. ``serialized`` finds
the assembler's notes that it had to put such instructions one after the other.
"""

import functools
import re

# of the operand A: 64 rows a warpgroup, 256 bits a row, in four registers a thread
OPERAND_REGISTERS = 4
# groups that are told apart; older ones are taken together
MOST_GROUPS = 8

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_MATRIX = re.compile(r"([HIBQ]GMMA)\.\S+\s+R(\d+),\s*(R(\d+)|gdesc)")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")
# instructions whose first register is read, not written
_READERS = re.compile(
    "[IFD]SETP|HSETP2|PLOP3|R2P|R2UR|BAR|BRX|CALL|RET|WARPSYNC|STS|STG|STL|ST|RED|BRA|EXIT|BSYNC|"
    "BSSY|DEPBAR|WARPGROUP|NANOSLEEP|VOTEU|REDUX|SYNCS|UTMALDG|UTMASTG"
)
_SERIALIZED = re.compile(r"\(C75(?:1[0-9]|20)\)[^\n]*")


def serialized(log):
    """Notes C7510 to C7520 of ptxas: matrix instructions that wait for each other needlessly."""
    return [match.group(0) for match in _SERIALIZED.finditer(log)]


@functools.cache
def _written(text):
    """Registers that one instruction writes."""
    name, _, rest = text.partition(" ")
    if _READERS.fullmatch(name.split(".")[0]):
        return frozenset()
    for operand in (part.strip() for part in rest.split(",")):
        if re.fullmatch(r"!?U?P(\d|T)", operand):
            continue  # a predicate comes before the register
        match = re.fullmatch(r"R(\d+)", operand)
        if match is None:
            return frozenset()
        first = int(match.group(1))
        return frozenset(range(first, first + _width(name)))
    return frozenset()


def _width(name):
    """Registers of the result of an instruction of that name."""
    if name.startswith("LDSM"):
        return {"2": 2, "4": 4}.get(name[-1], 1)
    if ".128" in name or name.startswith(("HMMA", "IMMA", "BMMA")):
        return 4
    wide = ".64" in name or "WIDE" in name or name.startswith(("DADD", "DMUL", "DFMA", "CS2R"))
    return 2 if wide and not name.endswith(".32") else 1


def _blocks(sass):
    """Straight pieces of code, each a list of (address, text), and the pieces that may follow."""
    pieces, names, current = [[]], {}, []
    current = pieces[0]
    ends = []  # of a piece: (label it goes to or None, whether the next piece may follow)
    for line in sass.split("\n"):
        label = _LABEL.match(line)
        if label:
            ends.append((None, True))
            current = []
            pieces.append(current)
            names[label.group(1)] = len(pieces) - 1
            continue
        found = _INSTRUCTION.search(line)
        if not found:
            continue
        address, text = found.groups()
        bare = re.sub(r"^@!?U?P\w+\s+", "", text).strip()
        current.append((address, bare))
        goes = re.match(r"(?:BRA|BRX|EXIT|RET)\b", bare)
        if goes:
            to = re.search(r"`\((\.L_x_\d+)\)", bare)
            always = bare == text.strip() and not re.match(r"BRA\S*\s+!?U?P", bare)
            ends.append((to.group(1) if to else None, not always))
            current = []
            pieces.append(current)
    ends.append((None, False))
    after = [
        ([names[to]] if to in names else []) + ([at + 1] if falls and at + 1 < len(pieces) else [])
        for at, (to, falls) in enumerate(ends)
    ]
    return pieces, after


def operands_in_registers(sass):
    """How many asynchronous matrix instructions take their left operand from registers."""
    return sum(match.group(4) is not None for match in _MATRIX.finditer(sass))


def rewritten_operands(sass):
    """Writes to a register that a matrix instruction in flight may still read: sorted texts.

    Every path through the code is followed, loops until nothing new is in flight.
    """
    pieces, after = _blocks(sass)
    pieces = [[(*each, _MATRIX.match(each[1]), _WAIT.match(each[1])) for each in p] for p in pieces]
    found, seen, left = set(), set(), [(0, (), frozenset())]
    while left:
        state = left.pop()
        if state in seen:
            continue
        seen.add(state)
        at, groups, started = state
        flying = started.union(*groups)
        for address, text, matrix, wait in pieces[at]:
            if matrix:
                if matrix.group(4) is not None:
                    first = int(matrix.group(4))
                    reads = range(first, first + OPERAND_REGISTERS)
                    started |= {(register, address) for register in reads}
                if "gsb0" in text:
                    groups, started = (*groups, started), frozenset()
                    if len(groups) > MOST_GROUPS:
                        groups = (groups[0] | groups[1], *groups[2:])
                flying = started.union(*groups)
            elif wait:
                keep = int(wait.group(1), 16)
                groups = groups[len(groups) - keep :] if 0 < keep < len(groups) else groups
                groups = () if keep == 0 else groups
                flying = started.union(*groups)
            elif flying and (written := _written(text)):
                for register, reader in flying:
                    if register in written:
                        found.add(f"{address}: {text} while {reader} may read R{register}")
        left += [(to, groups, started) for to in after[at]]
    return sorted(found)
