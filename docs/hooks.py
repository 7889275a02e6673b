"""The site's pictures are those of bench/results: they are read there and not copied into docs/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"


def on_files(files: Files, *, config: Any) -> Files:
    """Add every picture as ``images/results/<path with dashes>``."""
    for path in sorted(RESULTS.rglob("*.png")):
        name = "-".join(path.relative_to(RESULTS).parts)
        files.append(File.generated(config, f"images/results/{name}", abs_src_path=str(path)))
    return files
