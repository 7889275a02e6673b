"""Autoencoders on the Hugging Face Hub: download, upload, and a card made from the run's figures.

Everything goes through ``huggingface_hub`` (which transformers brings along): its cache, its token,
its ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bae_fast._version import __version__
from bae_fast.files import write_text

# user/name, with the letters that the Hub allows
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

CARD_NAME = "README.md"

# what is shown first where a run has it: key of an evaluation, name, and how it is written
_FIGURES = {
    "fvu": ("FVU", "{:.4f}"),
    "bits": ("bits a row", "{:.1f}"),
    "l0": ("features on in a row", "{:.1f}"),
    "dead_share": ("dead features", "{:.1%}"),
    "n_rows": ("held-out rows", "{:,}"),
}


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("the Hub needs huggingface_hub: pip install huggingface_hub") from error
    return huggingface_hub


def is_repo_id(name: str | os.PathLike[str]) -> bool:
    """Whether a name could be that of a repository, ``user/name``, and is no path on disk."""
    return isinstance(name, str) and bool(_REPO_ID.fullmatch(name)) and not Path(name).exists()


def download(
    repo_id: str,
    names: Iterable[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Fetch some files of a repository into the Hub's cache; the folder they lie in.

    Args:
        repo_id: ``user/name``.
        names: names of the files; those that the repository lacks are left out.
        revision: a branch, tag or commit; None is the main branch.
        subfolder: where in the repository the files lie.
        token: as ``huggingface_hub`` takes it.

    Raises:
        FileNotFoundError: no such folder or repository, or the Hub cannot be reached.
    """
    hub = _library()
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    try:
        found = hub.snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=[prefix + name for name in names],
            token=token,
        )
    except (OSError, ValueError) as error:  # huggingface_hub's own errors are of these kinds
        raise FileNotFoundError(
            f"{repo_id} must be a folder, or a repository on the Hugging Face Hub: {_line(error)}"
        ) from error
    return Path(found) / prefix


def upload(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload an autoencoder",
    token: str | bool | None = None,
) -> str:
    """Put the files of a folder into a repository, which is made where it is missing.

    Returns:
        The address of the commit.

    Raises:
        ValueError: repo_id is not ``user/name``.
        OSError: the Hub refused or cannot be reached.
    """
    if not _REPO_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id must be user/name; got {repo_id!r}")
    api = _library().HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            revision=revision,
            commit_message=message,
        )
    except Exception as error:  # a connection that fails raises what its library has, no OSError
        raise OSError(f"{repo_id} cannot be uploaded: {_line(error)}") from error
    return str(done.commit_url)


def _line(error: Exception) -> str:
    """An error's text in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def write_card(
    path: str | os.PathLike[str],
    repo_id: str,
    values: dict[str, Any],
    *,
    subfolder: str | None = None,
    figures: dict[str, Any] | None = None,
    license: str = "mit",  # the card's own word for it
) -> Path:
    """Write a model card: what the module is, where its rows came from, figures, how to load it.

    Args:
        path: the card's.
        repo_id, subfolder: where the module will lie.
        values: the content of ``cfg.json``, ``metadata`` among them.
        figures: an evaluation (``bae_fast.analysis.evaluate(...).summary()``), or any numbers.
        license: the Hub's short name of a licence.
    """
    hub = _library()
    metadata = values.get("metadata") or {}
    name = repo_id.partition("/")[2]
    shown = {
        _FIGURES[key][0]: (key, _FIGURES[key][1].format(value))
        for key, value in (figures or {}).items()
        if key in _FIGURES and isinstance(value, (int, float))
    }
    base, dataset = metadata.get("model_name"), metadata.get("dataset_path")
    results = [
        hub.EvalResult(
            task_type="feature-extraction",
            dataset_type=str(dataset or "held-out-rows"),
            dataset_name=str(dataset or "held-out rows"),
            metric_type=key,
            metric_name=title,
            metric_value=figures[key] if figures else 0,
        )
        for title, (key, _) in shown.items()
        if key != "n_rows"
    ]
    data = hub.ModelCardData(
        license=license,
        library_name="bae-fast",
        tags=["interpretability", "sparse-autoencoder", str(values.get("architecture"))],
        # the Hub refuses names that are none of its own
        base_model=base if isinstance(base, str) and _REPO_ID.fullmatch(base) else None,
        datasets=[dataset] if isinstance(dataset, str) and _REPO_ID.fullmatch(dataset) else None,
        **({"model_name": name, "eval_results": results} if results else {}),
    )
    sizes = {key: values[key] for key in ("d_in", "d_sae", "d_out", "n_bits", "k") if key in values}
    lines = [
        f"# {name}",
        "",
        f"An autoencoder of hidden states, architecture `{values.get('architecture')}`: "
        + ", ".join(f"{key} = {value}" for key, value in sizes.items())
        + ".",
        "",
        "## Where the rows came from",
        "",
        *(_table("of the rows", metadata) if metadata else ["The module does not say."]),
        "",
    ]
    if shown:
        lines += ["## Figures", ""]
        lines += _table("measured", {title: text for title, (_, text) in shown.items()})
        lines += [""]
    lines += [
        "## Use",
        "",
        "```python",
        "from bae_fast.autoencoder import load_autoencoder",
        "",
        f"model = load_autoencoder({repo_id!r}"
        + (f", subfolder={subfolder!r})" if subfolder else ")"),
        "features = model.encode(rows)  # rows: [n, d_in]",
        "recon = model.decode(features)",
        "```",
        "",
        f"Written by bae_fast {__version__}.",
        "",
    ]
    card = hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines))
    return write_text(path, str(card))


def write_registry(
    path: str | os.PathLike[str],
    release: str,
    repo_id: str,
    model: str,
    saes: Iterable[dict[str, Any]],
) -> Path:
    """Write a release of published models as SAELens lists its own, in ``pretrained_saes.yaml``.

    Args:
        path: the YAML file's.
        release: the name that ``SAE.from_pretrained`` is given.
        repo_id: ``user/name`` of the repository.
        model: the language model's name.
        saes: for each model ``id`` and ``path`` (the subfolder), and where they are known ``l0``,
            ``variance_explained`` and ``neuronpedia``.

    Raises:
        ValueError: repo_id is not ``user/name``, or an entry lacks its id or its path.
    """
    if not _REPO_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id must be user/name; got {repo_id!r}")
    entries = [dict(entry) for entry in saes]
    for entry in entries:
        if not (entry.get("id") and entry.get("path")):
            raise ValueError(f"saes must have an id and a path each; got {entry!r}")
    value = {release: {"model": model, "repo_id": repo_id, "saes": entries}}
    # JSON is YAML
    return write_text(path, json.dumps(value, indent=2) + "\n")


def _table(head: str, values: dict[str, Any]) -> list[str]:
    def cell(value: Any) -> str:
        return str(value).replace("|", "\\|").replace("\n", " ")

    return [f"| {head} | |", "|---|---|", *(f"| {k} | {cell(v)} |" for k, v in values.items())]
