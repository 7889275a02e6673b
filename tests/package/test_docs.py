"""The documents: every example of Python runs, and what they name exists.

A page's blocks run one after the other in one namespace, as a reader would type them. A block whose
first line begins with ``# not run`` (it needs a language model, another package or minutes) is only
compiled.
"""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from bae_fast.autoencoder import ARCHITECTURES
from bae_fast.baselines import METHODS
from bae_fast.cli.options import JSON, make_parser, read
from bae_fast.experiments.methods import NAMED

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_RUN = "# not run"

# fields of a command that are given by their place
POSITIONAL = {
    "match": ("folders",),
    "decompress": ("file",),
    "evaluate": ("folder",),
    "push": ("folder", "repo"),
    "serve": ("folder",),
}


def blocks(page: Path) -> list[str]:
    """The page's examples; lines before each keep the numbers of lines in errors true."""
    text = page.read_text(encoding="utf-8")
    return [
        "\n" * text.count("\n", 0, found.start(1)) + found.group(1)
        for found in BLOCK.finditer(text)
    ]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


EXAMPLES = [page for page in PAGES if blocks(page)]


@pytest.fixture
def _own_names():
    """What an example registers is gone after it."""
    before = [(table, set(table)) for table in (METHODS, ARCHITECTURES, NAMED)]
    yield
    for table, keys in before:
        for key in set(table) - keys:
            del table[key]


@pytest.mark.usefixtures("_own_names")
@pytest.mark.parametrize("page", EXAMPLES, ids=name)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "example"}
    for block in blocks(page):
        code = compile(block, str(page), "exec")
        if not block.lstrip("\n").startswith(NOT_RUN):
            exec(code, namespace)


def anchors(page: Path) -> set[str]:
    """The places of a page that a link can lead to: its headings, as the site and hosts of
    repositories name them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("*.md")), *PAGES[1:]], ids=name)
def test_links_and_pictures_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    lost = []
    for link in re.findall(r"\]\(([^()\s]+)\)", text):
        if re.match(r"\w+:", link):  # an address
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


def test_the_readme_is_one_screen():
    assert len((ROOT / "README.md").read_text(encoding="utf-8")) <= 8000


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_objects_of_the_reference_exist(page):
    for path in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        module, _, attribute = path.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), path


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tests_and_modules_that_pages_name_exist(page):
    text = page.read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:tests|bae_fast|bench|csrc|kernels)/[\w/.-]+)`", text))
    missing = {path for path in paths if not (ROOT / path).exists()}
    assert missing == set()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_functions_of_tests_that_pages_name_exist(page):
    """As ``file``: ``test``, by a path or by a name in tests/backends."""
    text = page.read_text(encoding="utf-8")
    for file, test in re.findall(r"`([\w/]+\.py)`: `(test_\w+)`", text):
        path = ROOT / file if "/" in file else ROOT / "tests" / "backends" / file
        assert f"def {test}(" in path.read_text(encoding="utf-8"), f"{file}: {test}"


SHELL = re.compile(r"^```bash\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """What a page's blocks of the shell give to bae-fast."""
    text = "\n".join(SHELL.findall(page.read_text(encoding="utf-8"))).replace("\\\n", " ")
    lines = re.findall(r"(?:^|-m )bae[-_]fast (.*)", text, re.MULTILINE)
    return [shlex.split(line.partition(" > ")[0], comments=True) for line in lines]


COMMANDED = [page for page in PAGES if commands(page)]


@pytest.mark.parametrize("page", COMMANDED, ids=name)
def test_options_of_commands_that_pages_show_exist(page):
    pytest.importorskip("jsonargparse")
    for word, *given in commands(page):
        if word == "info":
            continue
        if word == "entropy":
            word = f"entropy.{given.pop(0)}"
        module = importlib.import_module(f"bae_fast.experiments.{word}")
        places = POSITIONAL.get(word, ())
        parser = make_parser(word, module.Config, places)
        shown = parser.format_help()
        if "--config" in given or "--print_config" in given:  # whose file is the reader's
            unknown = [one for one in given if one.startswith("--") and one not in shown]
            assert not unknown, (given, unknown)
        else:
            read(parser, module.Config, [one for one in given if one != JSON])
