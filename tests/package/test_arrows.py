"""Which module may import which: one order over every file that is shipped, and bench.

The imports are read from the text, wherever in it they stand. Names of modules in strings count
too: that is how a module is imported on first use.
"""

from __future__ import annotations

import ast
import functools
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# name of a package -> its folder, as pyproject.toml maps them
FOLDERS = {
    "bae_fast": "bae_fast",
    "bae_fast.kernels": "kernels/triton",
    "bae_fast.kernels_cuda": "kernels/cuda",
    "bench": "bench",
}

# Arrows point down this list or stay on a line, where they make no circle. "" is the public face,
# bae_fast/__init__, which imports down to the line of `backends`.
LINES = (
    {"bench", "cli", "__main__"},
    {"experiments"},
    {"report"},
    {"interpret"},
    {"baselines", "entropy", "causal"},
    {"training", "analysis", "saelens", "released", "search", ""},
    {"model"},
    {"functional", "columns", "autoencoder", "normalization", "compression", "distributed"},
    {"backends", "kernels", "kernels_cuda", "codes", "pairs", "info", "flops"},
    {"ops", "reference", "lm"},
    {
        "arguments",
        "packing",
        "statistics",
        "surrogates",
        "files",
        "pretrained",
        "devices",
        "hub",
        "progress",
        "spacing",
        "starting",
        "units",
        "waiting",
        "_version",
    },
)
LEVEL = {part: level for level, parts in enumerate(LINES) for part in parts}

PARSERS = {"argparse", "jsonargparse"}
# a released file holds the pickled namespace of the program that wrote it; nothing is parsed
READS_A_NAMESPACE = {"bae_fast.released"}


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module that is shipped, and of bench."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = (*package.split("."), *path.relative_to(ROOT / folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """All that is in a file."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def source(name: str, node: ast.ImportFrom) -> str:
    """The module that ``from ... import`` names, in full where it is relative."""
    if not node.level:
        return node.module or ""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for _ in range(node.level - 1):
        package = package.rpartition(".")[0]
    return f"{package}.{node.module}" if node.module else package


def imports(name: str) -> frozenset[str]:
    """Modules of ours that one module imports.

    ``from bae_fast import BinaryAutoencoder`` counts as ``bae_fast``, the whole public face.
    """
    return imports_of(name, MODULES[name])


@functools.cache
def imports_of(name: str, path: Path) -> frozenset[str]:
    """The same of what a file holds, as the module of that name."""
    found: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = source(name, node)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.add(whole if whole in MODULES else base)
        elif isinstance(node, ast.Call):
            found |= {text for text in called_with(node) if text in MODULES}
        elif isinstance(node, ast.Assign):
            found |= {text for text in texts(node.value) if "." in text and text in MODULES}
    return frozenset(
        target for target in found if target.partition(".")[0] in ("bae_fast", "bench")
    )


def texts(node: ast.expr) -> list[str]:
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def called_with(node: ast.Call) -> list[str]:
    """Strings that ``import_module`` is given."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return [text for argument in node.args for text in texts(argument)] * (name == "import_module")


def part(name: str) -> str:
    """``bae_fast.ops.registry`` -> ``ops``; ``bae_fast`` itself -> ""; ``bench`` for all of it."""
    first, _, rest = name.partition(".")
    return first if first == "bench" else rest.partition(".")[0]


def breaches(name: str) -> set[tuple[str, str, str]]:
    """What one module does against the order and the rules."""
    found = {
        ("arrow", name, target)
        for target in imports(name)
        if LEVEL[part(target)] < LEVEL[part(name)]
    }
    free_to_ask = (
        part(name) in ("model", "baselines", "search") or name == "bae_fast.experiments.compress"
    )
    for node in nodes(MODULES[name]):
        if isinstance(node, ast.Import):
            outer = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = source(name, node)
            outer = {base.partition(".")[0]}
            if outer & {"bae_fast", "bench"}:
                found |= {
                    ("private", name, f"{base}.{alias.name}")
                    for alias in node.names
                    if alias.name.startswith("_") and not alias.name.startswith("__")
                    if f"{base}.{alias.name}" not in MODULES
                }
        else:
            outer = set()
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                kinds = {getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(node.args[1])}
                if "BinaryAutoencoder" in kinds and not free_to_ask:
                    found.add(("isinstance", name, "BinaryAutoencoder"))
        if part(name) not in ("cli", "bench") and name not in READS_A_NAMESPACE:
            found |= {("parser", name, parser) for parser in outer & PARSERS}
    return found


def test_every_module_has_a_place_in_the_order():
    assert {part(name) for name in MODULES} - LEVEL.keys() == set()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_points_up_or_breaks_a_rule(name):
    assert breaches(name) == set()


def test_the_order_names_only_what_is_there():
    assert LEVEL.keys() - {part(name) for name in MODULES} == set()


def test_no_command_imports_another():
    shared = {f"bae_fast.cli.{name}" for name in ("command", "errors", "fields", "net", "options")}
    for name in MODULES:
        assert {t for t in imports(name) if t.startswith("bae_fast.cli.")} <= shared, name
        if part(name) == "bench":
            assert not any(part(target) == "cli" for target in imports(name)), name


def test_every_file_of_the_commands_is_short():
    for name, path in MODULES.items():
        if part(name) == "cli":
            assert len(path.read_text(encoding="utf-8").splitlines()) < 120, name


def test_no_circle_within_a_line():
    """So that the parts have one order, and a new one cannot hide behind a line of many."""
    below: dict[str, set[str]] = {}
    for name in MODULES:
        targets = {part(target) for target in imports(name)} - {part(name)}
        same = {target for target in targets if LEVEL[target] == LEVEL[part(name)]}
        below.setdefault(part(name), set()).update(same)
    assert len(list(graphlib.TopologicalSorter(below).static_order())) == len(below)


def circle(names: set[str]) -> list[str]:
    """Modules of which each imports the next, and the last the first; none where none do."""
    try:
        graphlib.TopologicalSorter({n: imports(n) & names - {n} for n in names}).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_circle_between_modules():
    """Within a part too, and for the sake of an annotation neither: every import counts, wherever
    in a file it stands."""
    assert circle(set(MODULES)) == []


def test_the_imports_are_read_from_the_text():
    """The tests of the arrows would pass on an empty graph."""
    assert "bae_fast.functional" in imports("bae_fast.model")
    assert "bae_fast.ops.registry" in imports("bae_fast.functional.layer")
    assert "bae_fast.packing" in imports("bae_fast.backends.torch.encode")
    assert "bae_fast.model" in imports("bae_fast")
    assert "bae_fast.kernels.covariance" in imports("bae_fast.kernels_cuda.covariance")
    assert "bae_fast.kernels_cuda.covariance" in imports("bae_fast.backends.cuda")  # in a string
    assert "bench.tables" in imports("bench.step")


@pytest.mark.parametrize(
    ("name", "text", "breach"),
    [
        ("bae_fast.packing", "def f():\n    from bae_fast.model import BAEConfig", "arrow"),
        ("bae_fast.packing", "import importlib\nimportlib.import_module('bae_fast.cli')", "arrow"),
        ("bae_fast.report.page", "import bench.step", "arrow"),
        ("bae_fast.training.trainer", "import argparse as a", "parser"),
        ("bae_fast.interpret.facts", "from jsonargparse import CLI", "parser"),
        ("bae_fast.causal.splice", "isinstance(x, (int, bf.BinaryAutoencoder))", "isinstance"),
        ("bench.step", "from bae_fast.codes import _rebuild", "private"),
        ("bae_fast.lm.harvest", "from .states import _hidden", "private"),
    ],
)
def test_a_planted_breach_is_found(monkeypatch, tmp_path, name, text, breach):
    path = tmp_path / "planted.py"
    path.write_text(text)
    monkeypatch.setitem(MODULES, name, path)
    assert {rule for rule, _, _ in breaches(name)} == {breach}


def test_a_planted_circle_is_found(monkeypatch, tmp_path):
    path = tmp_path / "planted.py"
    path.write_text("if TYPE_CHECKING:\n    from bae_fast.lm.loading import LanguageModel")
    monkeypatch.setitem(MODULES, "bae_fast.lm.hooks", path)
    assert {"bae_fast.lm.hooks", "bae_fast.lm.loading"} <= set(circle(set(MODULES)))


def test_no_backend_imports_another():
    for name in MODULES:
        if name.startswith("bae_fast.backends."):
            own = ".".join(name.split(".")[:3])
            for target in imports(name):
                if target.startswith("bae_fast.backends"):
                    assert target == own or target.startswith(own + "."), f"{name}: {target}"


def test_nothing_but_the_public_face_names_a_backend():
    """Callers reach backends through the registry, so that one is added without touching them."""
    for name in MODULES:
        if part(name) not in ("backends", "bench"):
            named = {target for target in imports(name) if part(target) == "backends"}
            assert named <= ({"bae_fast.backends"} if name == "bae_fast" else set()), name


def test_the_reference_and_the_packed_side_share_no_arithmetic():
    allowed = {"bae_fast.packing", "bae_fast.statistics"}
    assert imports("bae_fast.reference") <= allowed
    packed = ("backends", "kernels", "kernels_cuda")
    assert all("reference" not in t for n in MODULES if part(n) in packed for t in imports(n))


def test_backends_and_kernels_use_only_layouts_operators_and_themselves():
    allowed = {
        "packing",
        "ops",
        "backends",
        "kernels",
        "kernels_cuda",
        "statistics",
        "surrogates",
        "files",  # compiled programs are kept
        "devices",
    }
    for name in MODULES:
        if part(name) in ("backends", "kernels", "kernels_cuda"):
            assert {part(target) for target in imports(name)} <= allowed, name
