"""PTX text to instructions with operands: what Triton, LLVM and nvcc write, not all of PTX.

Sections are those of the PTX ISA, version 9.0: 4.3 statements, 4.5 constants, 5.2 types, 5.4
variables, 6.4 operands, 9.3 guard predicates. Scopes in braces are kept apart by renaming what is
declared in them. Calls, tables of branches and global variables are refused where they are used.
"""

import dataclasses
import functools
import re
import struct


class PtxError(Exception):
    """What the parser or the machine does not know, or a kernel that no device would run."""


@dataclasses.dataclass(frozen=True)
class Register:
    name: str


@dataclasses.dataclass(frozen=True)
class Special:
    """A special register: %tid.x and others (section 10)."""

    name: str


@dataclasses.dataclass(frozen=True)
class Immediate:
    """A constant: an integer, or the bits of a float with their width."""

    value: int
    float_bits: int = 0

    def bits(self, width: int) -> int:
        """As an unsigned number of ``width`` bits."""
        if self.float_bits and self.float_bits != width:
            raise PtxError(f"a constant of {self.float_bits} bits stands for one of {width}")
        return self.value & ((1 << width) - 1)


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A variable in shared memory, or a parameter of the kernel."""

    name: str


@dataclasses.dataclass(frozen=True)
class Address:
    base: Register | Symbol | Immediate
    offset: int


@dataclasses.dataclass(frozen=True)
class Vector:
    items: tuple


@dataclasses.dataclass(frozen=True)
class Sink:
    """``_``: a result that nobody reads."""


@dataclasses.dataclass(frozen=True)
class Label:
    name: str


@dataclasses.dataclass
class Instruction:
    line: int
    text: str
    guard: Register | None
    negated: bool
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple

    def error(self, why: str) -> PtxError:
        return PtxError(f"line {self.line}: {why}: {self.text}")


@dataclasses.dataclass
class Kernel:
    name: str
    threads: int | None
    parameters: dict[str, tuple[int, int]]  # name to (offset, bytes), in order
    registers: dict[str, str]  # name to type
    labels: dict[str, int]
    shared: list[tuple[str, int, int | None]]  # name, alignment, bytes (None: at the start)
    body: list[Instruction]


_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8, "28": 16}
_REGISTER = re.compile(r"%[A-Za-z_$][\w$.]*")
_SPECIAL = re.compile(r"%(?:n?tid|n?ctaid)\.[xyz]|%laneid|%warpid")
_PARAMETER = re.compile(r"\.param\s+\.(\w+)\s+(?:\.ptr\s+[^,]*?)?([\w$]+)\s*(?:,|$)")


def _bare(text):
    """Without comments and debug lines, line by line: numbers of lines stay."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group(0).count("\n"), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"\"[^\"\n]*\"", '""', text)
    return re.sub(r"^[ \t]*(?:\.loc|\.file|\.pragma)\b[^\n]*", "", text, flags=re.M)


def _matching(text, start):
    """Where the brace at ``start`` is closed."""
    depth = 0
    for brace in re.compile("[{}]").finditer(text, start):
        depth += 1 if brace.group(0) == "{" else -1
        if depth == 0:
            return brace.start()
    raise PtxError("a brace is not closed")


def _split(text):
    """At commas outside of brackets and braces."""
    if not set(text) & set("[{("):
        parts = [part.strip() for part in text.split(",")]
        return parts if parts[-1] else parts[:-1]
    parts, depth, part = [], 0, ""
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += letter
    return [*parts, part.strip()] if part.strip() else parts


def _number(text):
    """A constant (section 4.5), or None."""
    found = re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text)
    if found and len(found.group(2)) == {"f": 8, "d": 16}[found.group(1).lower()]:
        return Immediate(int(found.group(2), 16), 4 * len(found.group(2)))
    found = re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|\d+)U?", text)
    if found:
        return Immediate(int(found.group(2), 0) * (-1 if found.group(1) else 1))
    if re.fullmatch(r"-?\d+\.\d*", text):
        return Immediate(struct.unpack("<I", struct.pack("<f", float(text)))[0], 32)
    return None


class _Body:
    """Instructions of one kernel, scope by scope."""

    def __init__(self):
        self.registers, self.labels, self.shared, self.body = {}, {}, [], []
        self.scopes, self.opened = [{}], 0

    def declare(self, kind, names):
        suffix = f"@{self.opened}" if len(self.scopes) > 1 else ""
        for name in _split(names):
            counted = re.fullmatch(r"([%\w$.]+)<(\d+)>", name)
            all_names = [name]
            if counted:
                all_names = [f"{counted.group(1)}{at}" for at in range(int(counted.group(2)))]
            for each in all_names:
                self.scopes[-1][each] = each + suffix
                self.registers[each + suffix] = kind

    def name(self, text):
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        return None

    def operand(self, text):
        text = text.strip()
        if text == "_":
            return Sink()
        if text.startswith("{"):
            return Vector(tuple(self.operand(part) for part in _split(text[1:-1])))
        if text.startswith("["):
            parts = text[1:-1].strip()
            found = re.fullmatch(r"(.+?)\s*(?:\+\s*(-?\w+))?", parts)
            offset = _number(found.group(2)) if found.group(2) else Immediate(0)
            return Address(self.operand(found.group(1)), offset.value)
        if "|" in text:  # a result and a predicate beside it
            return Vector(tuple(self.operand(part) for part in text.split("|")))
        number = _number(text)
        if number is not None:
            return number
        if _SPECIAL.fullmatch(text):
            return Special(text)
        known = self.name(text)
        if known is not None:
            return Register(known)
        if text.startswith("%"):
            raise PtxError(f"the register {text} is not declared")
        return Symbol(text)

    def statement(self, text, line):
        """One statement without its semicolon (section 4.3)."""
        text = " ".join(text.split())
        found = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text)
        if found:
            self.declare(*found.groups())
            return
        if text.startswith(".shared"):
            self.shared.append(shared_variable(text))
            return
        found = re.fullmatch(r"(?:@(!?)([%\w$.]+)\s+)?([a-z]\w*)((?:\.[\w:]+)*)(?:\s+(.*))?", text)
        if not found:
            raise PtxError(f"line {line}: cannot be read: {text}")
        negated, guard, opcode, modifiers, operands = found.groups()
        self.body.append(
            Instruction(
                line=line,
                text=text,
                guard=self.operand(guard) if guard else None,
                negated=bool(negated),
                opcode=opcode,
                modifiers=tuple(modifiers.split(".")[1:]),
                operands=tuple(self.operand(part) for part in _split(operands or "")),
            )
        )

    def read(self, text, line):
        at = 0
        while True:
            blank = re.compile(r"\s*").match(text, at)
            line += blank.group(0).count("\n")
            at = blank.end()
            if at == len(text):
                return
            label = re.compile(r"([$\w]+):(?!:)").match(text, at)
            if text[at] == "{":
                self.opened += 1
                self.scopes.append({})
                at += 1
            elif text[at] == "}":
                self.scopes.pop()
                at += 1
            elif label:
                self.labels[label.group(1)] = len(self.body)
                at = label.end()
            else:
                end = text.index(";", at)
                if end > at:
                    self.statement(text[at:end], line)
                line += text.count("\n", at, end)
                at = end + 1


def shared_variable(text):
    """Name, alignment and bytes of a variable in shared memory (section 5.4)."""
    found = re.search(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?", text)
    if not found:
        raise PtxError(f"cannot be read: {text}")
    align, kind, name, count = found.groups()
    size = _BYTES.get(re.sub(r"\D", "", kind)[-2:], 1)
    total = None if count == "" else size * int(count or 1)
    return name, int(align or size), total


@functools.lru_cache(maxsize=64)
def parse(text: str, name: str | None = None) -> Kernel:
    """The kernel ``name`` of a PTX file, or its only one. One object a text: not to be changed."""
    bare = _bare(text)
    entries = {m.group(1): m for m in re.finditer(r"\.entry\s+([\w$]+)\s*\(", bare)}
    if name is None and len(entries) == 1:
        name = next(iter(entries))
    if name not in entries:
        raise PtxError(f"kernel must be one of {sorted(entries)}; got {name!r}")
    start = entries[name].end()
    head_end = bare.index(")", start)
    parameters, offset = {}, 0
    for part in bare[start:head_end].split(","):
        found = _PARAMETER.search(" ".join(part.split()))
        if not found:
            continue
        size = _BYTES[re.sub(r"\D", "", found.group(1))[-2:]]
        offset = -(-offset // size) * size
        parameters[found.group(2)] = (offset, size)
        offset += size
    brace = bare.index("{", head_end)
    directives = bare[head_end:brace]
    found = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", directives)
    body = _Body()
    end = _matching(bare, brace)
    body.read(bare[brace + 1 : end], bare.count("\n", 0, brace) + 1)
    before = bare[: min(m.start() for m in entries.values())]
    outside = [
        shared_variable(m) for m in re.findall(r"^\s*\.[^;{}\n]*\.shared[^;]*;", before, re.M)
    ]
    seen = {each[0] for each in body.shared}
    return Kernel(
        name=name,
        threads=int(found.group(1)) if found else None,
        parameters=parameters,
        registers=body.registers,
        labels=body.labels,
        shared=body.shared + [each for each in outside if each[0] not in seen],
        body=body.body,
    )
