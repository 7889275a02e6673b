"""Autoencoders on the Hugging Face Hub: download, upload, and a card made from the run's figures.

Everything goes through ``huggingface_hub`` (which transformers brings along): its cache, its token,
its ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE``.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from typing import Any

from bae_fast._version import __version__
from bae_fast.files import write_text

# user/name, with the letters that the Hub allows
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

CARD_NAME = "README.md"

# errors of the cache's own disk, which say nothing of the repository
_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)

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


def is_name(name: str) -> bool:
    """Whether a text is written as a repository's name, ``user/name``."""
    return bool(_REPO_ID.fullmatch(name))


def is_repo_id(name: str | os.PathLike[str]) -> bool:
    """Whether a name could be that of a repository, ``user/name``, and is no path on disk."""
    return isinstance(name, str) and is_name(name) and not Path(name).exists()


# what metadata name that may be a path: the language model, the text, and rows of a file
_NAMES = ("model_name", "dataset_path", "rows")


def public_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata as others may read them: of a path on this machine the last part alone.

    Names of the Hub, addresses and all other values stay whole. A relative path is known as one
    only where the name of a model, a text or rows stands.
    """
    found = {key: _public(value, relative=key in _NAMES) for key, value in metadata.items()}
    files = metadata.get("text_files")
    if isinstance(files, (list, tuple)) and files:  # no names of the Hub
        found["text_files"] = [_last_part(str(path)) for path in files]
        # several files are one text, whose name is all of theirs
        if metadata.get("dataset_path") == " ".join(map(str, files)):
            found["dataset_path"] = " ".join(found["text_files"])
    return found


def _public(value: Any, *, relative: bool) -> Any:
    if isinstance(value, dict):
        return {key: _public(one, relative=relative) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(one, relative=relative) for one in value]
    if not isinstance(value, str) or "://" in value:
        return value
    path = PureWindowsPath(value)
    here = value.startswith(("/", "~", "./", "../", "\\", ".\\", "..\\")) or path.is_absolute()
    if relative and len(path.parts) > 1:
        here |= not is_name(value) or Path(value).exists()
    return _last_part(value) if here else value


def _last_part(path: str) -> str:
    return PureWindowsPath(path).name or "a folder"  # it understands both kinds of slashes


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
        OSError: the cache's disk is full, or may not be written.
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
        if getattr(error, "errno", None) in _OF_A_DISK:
            raise
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
    if not is_name(repo_id):
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
    license: str | None = None,  # the card's own word for it
) -> Path:
    """Write a model card: what the module is, where its rows came from, figures, how to load it.

    Of a path on this machine the card has the last part, see :func:`public_metadata`.

    Args:
        path: the card's.
        repo_id, subfolder: where the module will lie.
        values: the content of ``cfg.json``, ``metadata`` among them.
        figures: an evaluation (``bae_fast.analysis.evaluate(...).summary()``), or any numbers.
        license: the Hub's short name of a licence; with None the card names none.
    """
    hub = _library()
    name = repo_id.partition("/")[2]
    shown = _shown(figures)
    dataset = _metadata(values).get("dataset_path")
    results = [
        hub.EvalResult(
            task_type="feature-extraction",
            dataset_type=str(dataset or "held-out-rows"),
            dataset_name=str(dataset or "held-out rows"),
            metric_type=key,
            metric_name=_FIGURES[key][0],
            metric_value=figures[key] if figures else 0,
        )
        for key in shown
        if key != "n_rows"
    ]
    sizes = {
        key: values[key]
        for key in ("d_in", "d_sae", "d_out", "n_bits", "k", "bit_price", "dense_bits")
        if key in values
    }
    lines = [
        f"An autoencoder of hidden states, architecture `{values.get('architecture')}`: "
        + ", ".join(f"{key} = {value}" for key, value in sizes.items())
        + ".",
        "",
        *_origin([values]),
    ]
    if shown:
        lines += ["## Figures", ""]
        lines += _table("measured", {_FIGURES[key][0]: text for key, text in shown.items()})
        lines += [""]
    more = {"model_name": name, "eval_results": results} if results else {}
    return _write_card(path, repo_id, [values], lines, subfolder, license, more)


def write_run_card(
    path: str | os.PathLike[str],
    repo_id: str,
    models: dict[str, tuple[dict[str, Any], dict[str, Any] | None]],
    *,
    license: str | None = None,
) -> Path:
    """Write the card of a repository with several modules, each in a subfolder: a table of them.

    Args:
        path: the card's.
        repo_id: where the modules will lie.
        models: subfolder -> the content of ``cfg.json`` and the figures, see :func:`write_card`.
        license: the Hub's short name of a licence; with None the card names none.

    Raises:
        ValueError: no module.
    """
    if not models:
        raise ValueError("models must hold a module; got none")
    keys = [key for key in _FIGURES if any(key in _shown(found) for _, found in models.values())]
    heads = ["subfolder", "hook", "architecture", "d_in", "d_sae"]
    lines = [
        f"Autoencoders of hidden states: {len(models)}, each in a subfolder.",
        "",
        _row([*heads, *(_FIGURES[key][0] for key in keys)]),
        "|" + "---|" * (len(heads) + len(keys)),
    ]
    for subfolder, (values, figures) in models.items():
        shown = _shown(figures)
        facts = [values.get(key, "") for key in heads[2:]]
        hook = _metadata(values).get("hook_name", "")
        lines.append(_row([subfolder, hook, *facts, *(shown.get(key, "") for key in keys)]))
    every = [values for values, _ in models.values()]
    lines += ["", *_origin(every)]
    return _write_card(path, repo_id, every, lines, next(iter(models)), license, {})


def _write_card(
    path: str | os.PathLike[str],
    repo_id: str,
    every: list[dict[str, Any]],
    lines: list[str],
    subfolder: str | None,
    license: str | None,
    more: dict[str, Any],
) -> Path:
    """A card of what ``lines`` say, with how to load the module in ``subfolder``."""
    hub = _library()
    common = _common(every)
    base, dataset = common.get("model_name"), common.get("dataset_path")
    data = hub.ModelCardData(
        license=license,
        library_name="bae-fast",
        tags=[
            "interpretability",
            "sparse-autoencoder",
            *sorted({str(values.get("architecture")) for values in every}),
        ],
        # the Hub refuses names that are none of its own
        base_model=base if isinstance(base, str) and is_name(base) else None,
        datasets=[dataset] if isinstance(dataset, str) and is_name(dataset) else None,
        **more,
    )
    text = [
        f"# {repo_id.partition('/')[2]}",
        "",
        *lines,
        "## Use",
        "",
        "```python",
        "from bae_fast.baselines import load_autoencoder",
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
    return write_text(path, str(hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(text))))


def _metadata(values: dict[str, Any]) -> dict[str, Any]:
    return public_metadata(values.get("metadata") or {})


def _common(every: list[dict[str, Any]]) -> dict[str, Any]:
    """What the metadata of all modules agree on."""
    first, *rest = map(_metadata, every)
    return {k: v for k, v in first.items() if all(k in one and one[k] == v for one in rest)}


def _origin(every: list[dict[str, Any]]) -> list[str]:
    """The card's part on the rows."""
    common = _common(every)
    said = _table("of the rows", common) if common else ["The metadata do not say."]
    return ["## Where the rows came from", "", *said, ""]


def _shown(figures: dict[str, Any] | None) -> dict[str, str]:
    """The figures that a card has, by key, as they are written."""
    return {
        key: form.format(figures[key])
        for key, (_, form) in _FIGURES.items()
        if figures and isinstance(figures.get(key), (int, float))
    }


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
    if not is_name(repo_id):
        raise ValueError(f"repo_id must be user/name; got {repo_id!r}")
    entries = [dict(entry) for entry in saes]
    for entry in entries:
        if not (entry.get("id") and entry.get("path")):
            raise ValueError(f"saes must have an id and a path each; got {entry!r}")
    value = {release: {"model": model, "repo_id": repo_id, "saes": entries}}
    # JSON is YAML
    return write_text(path, json.dumps(value, indent=2) + "\n")


def _table(head: str, values: dict[str, Any]) -> list[str]:
    return [_row([head, ""]), "|---|---|", *(_row([k, v]) for k, v in values.items())]


def _row(cells: list[Any]) -> str:
    shown = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
    return "| " + " | ".join(shown) + " |"
