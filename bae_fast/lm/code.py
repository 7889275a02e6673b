"""What code computes, as bytes for a digest: a user's own functions, classes and their values.

Code of installed packages is known by its name. Everything else may change under the same name, in
a notebook between two cells, so its bytecode counts, with all that it reads: default values, what
it closes over, globals that it names, attributes of the objects among them.
"""

from __future__ import annotations

import dis
import enum
import functools
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# packages that are themselves wherever they lie; transformers_modules is code of a model's files
_PACKAGES = frozenset({"accelerate", "bae_fast", "peft", "torch", "transformers"})
_MODEL_FILES = "transformers_modules"
_PLAIN = (
    bool, int, float, complex, str, bytes, enum.Enum, np.generic, range, torch.device,
    torch.dtype, type(None), type(...),
)  # fmt: skip
# values inside values; deeper ones are known by their type
_DEEPEST = 6


@functools.cache
def is_installed(module: str) -> bool:
    """Whether a module's code belongs to an installed package or to Python."""
    root = module.partition(".")[0]
    if root in _PACKAGES or root == _MODEL_FILES or root in sys.stdlib_module_names - {"__main__"}:
        return True
    file = getattr(sys.modules.get(root), "__file__", None)
    if file is None:
        return root != "__main__" and root in sys.builtin_module_names
    path = Path(file).resolve()
    folders = {sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")}
    return bool({"site-packages", "dist-packages"} & set(path.parts)) or any(
        path.is_relative_to(Path(folder).resolve()) for folder in folders
    )


class Walk:
    """Feeds what code computes with into a digest.

    Attributes:
        known: modules whose contents are digested elsewhere: here their type is enough.
    """

    def __init__(
        self,
        update: Callable[[bytes], None],
        tensor_digest: Callable[[Tensor], bytes],
        known: Iterable[nn.Module] = (),
    ) -> None:
        self._update, self._tensor_digest = update, tensor_digest
        self.known = {id(module) for module in known}
        # values met before are a number, which also ends cycles; kept, so that no id is used twice
        self._seen: dict[int, tuple[int, Any]] = {}

    def _say(self, *parts: Any) -> None:
        self._update((" ".join(map(str, parts)) + "\n").encode(errors="surrogatepass"))

    def value(self, value: Any, depth: int = 0) -> None:
        """Any value: what is plain by its contents, the rest by its type."""
        if isinstance(value, _PLAIN):
            self._say(repr(value))
            return
        if isinstance(value, types.ModuleType):
            self._say("module", value.__name__)
            return
        if id(value) in self._seen:
            self._say("again", self._seen[id(value)][0])
            return
        self._seen[id(value)] = (len(self._seen), value)
        self._say(type(value).__qualname__)
        if depth > _DEEPEST:
            return
        if isinstance(value, Tensor):
            self._say(tuple(value.shape), value.dtype, self._tensor_digest(value).hex())
        elif isinstance(value, np.ndarray):
            self._say(value.shape, value.dtype)
            self._update(value.tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=repr):
                self._say(repr(key) if isinstance(key, _PLAIN) else type(key).__qualname__)
                self.value(value[key], depth + 1)
        elif isinstance(value, (list, tuple)):
            for item in value:
                self.value(item, depth + 1)
        elif isinstance(value, (set, frozenset)):
            self._say(*sorted(repr(item) for item in value if isinstance(item, _PLAIN)))
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self.value(part, depth + 1)
        elif isinstance(value, types.MethodType):
            self.value(value.__func__, depth + 1)
            self.value(value.__self__, depth + 1)
        elif isinstance(value, types.FunctionType):
            self._function(value, depth)
        elif isinstance(value, type):
            self.own_class(value, depth)
        elif isinstance(value, nn.Module):
            if id(value) not in self.known:
                self.value(dict(value.state_dict(keep_vars=True)), depth + 1)
        elif callable(value) and hasattr(value, "__qualname__"):  # of C
            self._say(getattr(value, "__module__", None), value.__qualname__)
        elif hasattr(value, "__dict__"):
            kind = type(value)
            if kind is types.SimpleNamespace or not is_installed(kind.__module__):
                self.own_class(kind, depth)
                self.value(vars(value), depth + 1)

    def _function(self, function: types.FunctionType, depth: int) -> None:
        self._say(function.__module__, function.__qualname__)
        if is_installed(str(function.__module__)):
            return
        self._code(function.__code__)
        values = [function.__defaults__, function.__kwdefaults__]
        for cell in function.__closure__ or ():
            try:
                values.append(cell.cell_contents)
            except ValueError:  # not filled yet
                continue
        for name in _names(function.__code__):
            if name in function.__globals__:
                values.append(function.__globals__[name])
        for value in values:
            self.value(value, depth + 1)

    def _code(self, code: types.CodeType) -> None:
        self._update(code.co_code)
        self._say(code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant)
            else:
                self._say(repr(constant) if not isinstance(constant, frozenset) else "")

    def own_class(self, kind: type, depth: int = 0) -> None:
        """A class: its name, and what of it and its bases is no installed package's own."""
        self._say(kind.__module__, kind.__qualname__)
        for base in kind.__mro__:
            if base in (object, nn.Module):
                continue
            own = not is_installed(base.__module__)
            for name, member in sorted(vars(base).items()):
                found = getattr(member, "__func__", getattr(member, "fget", member))
                # a function that another module put there
                foreign = isinstance(found, types.FunctionType) and (
                    str(found.__module__).partition(".")[0] != base.__module__.partition(".")[0]
                )
                wanted = isinstance(found, (types.FunctionType, *_PLAIN))
                if foreign or (own and wanted and not name.startswith("__")):
                    self._say(base.__qualname__, name)
                    self.value(found, depth + 1)

    def foreign_functions(self, module: str) -> None:
        """Functions that another package put among those of a module."""
        root = module.partition(".")[0]
        for name, found in sorted(vars(sys.modules.get(module, types)).items()):
            if not isinstance(found, types.FunctionType):
                continue
            origin = str(found.__module__)
            if origin.partition(".")[0] not in (root, "torch", *sys.stdlib_module_names):
                self._say(module, name)
                self.value(found)


def written_by_a_pass(kind: type) -> set[str]:
    """Attributes that ``forward`` of a module's class sets, or a method that it calls by name.

    Counters and what is kept of the last pass: a pass makes them, so they are no settings.
    """
    own = [vars(one) for one in kind.__mro__ if not is_installed(one.__module__)]
    written: set[str] = set()
    waiting, seen = ["forward"], {"__init__"}
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for method in (members.get(name) for members in own):
            if not isinstance(method, types.FunctionType):
                continue
            waiting += _names(method.__code__)
            written.update(
                str(each.argval)
                for each in dis.get_instructions(method)
                if each.opname == "STORE_ATTR"
            )
    return written


def _names(code: types.CodeType) -> list[str]:
    """Names that a code looks up, those of functions inside it too."""
    found = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found += _names(constant)
    return found
