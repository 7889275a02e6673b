"""The site's pictures are those of bench/results: they are read there and not copied into docs/.

Pages name them by their path in the repository, so that they are seen there too.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"
PICTURE = re.compile(r"(?<=\]\()(?:\.\./)+bench/results/([\w/.-]+\.png)(?=\))")


def place(name: str) -> str:
    """Where the site has a picture of the results."""
    return "images/results/" + name.replace("/", "-")


def on_files(files: Files, *, config: Any) -> Files:
    """Add every picture."""
    for path in sorted(RESULTS.rglob("*.png")):
        name = path.relative_to(RESULTS).as_posix()
        files.append(File.generated(config, place(name), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_others: Any) -> str:
    """Lead links to pictures to where the site has them."""
    folder = posixpath.dirname(page.file.src_uri)
    return PICTURE.sub(lambda found: posixpath.relpath(place(found[1]), folder or "."), markdown)
