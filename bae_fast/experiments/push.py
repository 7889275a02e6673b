"""Saved autoencoders on the Hugging Face Hub, with a model card from the figures of their run."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from bae_fast import hub
from bae_fast.baselines import load_autoencoder
from bae_fast.experiments import runs
from bae_fast.files import publishing, read_json
from bae_fast.pretrained import CONFIG_NAME, WEIGHTS_NAME, publish_

# where commands leave figures, beside the model or beside the folders of a run's models
_EVALUATION, _METRICS = "evaluation.json", "metrics.json"


@dataclasses.dataclass(frozen=True)
class Config:
    """Put a saved autoencoder, or all of a training run, on the Hugging Face Hub with a card.

    Attributes:
        folder: The folder of a saved autoencoder, or of a run of bae-fast train.
        repo: The repository, user/name. It is made where it is missing.
        subfolder: Where in the repository the autoencoder lies. Without it that is the top, and
            those of a run lie in subfolders of their jobs' names. SAELens asks for a subfolder.
        figures: A JSON file of the numbers for the card. Without it they are those that bae-fast
            evaluate or bae-fast demo left beside the autoencoder.
        license: The Hub's short name of the license. Without it the card names none.
        private: Whether a repository that is made is private. With null the Hub decides.
        revision: The branch that is written to. Without it that is the main branch.
        out: A folder that the files are written to instead. Nothing is sent then.
    """

    OUT_IS_A_FOLDER: ClassVar[bool] = True

    folder: Path
    repo: str
    subfolder: str | None = None
    figures: Path | None = None
    license: str | None = None
    private: bool | None = None
    revision: str | None = None
    out: Path | None = None


def run(config: Config) -> runs.Result:
    """Check the autoencoders, write their card, and upload both in one commit.

    The two files of an autoencoder are sent as they are, with its id, so that files of codes that
    belong to it are still known. Only of paths on this machine, which their metadata may name, the
    last part alone is sent.

    Raises:
        ValueError, OSError, ImportError: naming the field, the file, the repository or the package.
    """
    if not hub.is_name(config.repo):
        raise ValueError(f"REPO must be user/name; got {config.repo!r}")
    if config.subfolder is not None and not _is_inside(config.subfolder):
        raise runs.ConfigError(
            "subfolder", f"must be a path within the repository; got {config.subfolder!r}"
        )
    found = _models(config)
    for place, folder in found.items():
        if config.out is not None and (config.out / place).resolve() == folder.resolve():
            raise runs.ConfigError(
                "out", f"must not be where the autoencoder lies itself; got {config.out}"
            )
    models = {
        place: (load_autoencoder(folder).config_values(), _figures(config, folder))
        for place, folder in found.items()
    }
    if config.out is not None:
        with publishing(config.out, fresh=True) as made:
            _write(config, made, found, models)
        address = None
    else:
        with tempfile.TemporaryDirectory() as made:
            _write(config, Path(made), found, models)
            address = hub.upload(
                made, config.repo, private=config.private, revision=config.revision
            )
    values: dict[str, Any] = {
        "repo": config.repo,
        "commit": address,
        "models": {place or ".": figures for place, (_, figures) in models.items()},
    }
    names = ", ".join(place or str(config.folder) for place in models)
    text = f"{names}: " + (f"{address}" if address else f"written for {config.repo}, not sent")
    card = () if config.out is None else (config.out / hub.CARD_NAME,)
    return runs.Result(values, text, card)


def _is_inside(path: str) -> bool:
    parts = path.strip("/").split("/")
    return all(part not in ("", ".", "..") for part in parts)


def _models(config: Config) -> dict[str, Path]:
    """Folder of each autoencoder by its subfolder in the repository, "" for the top."""
    if (config.folder / CONFIG_NAME).is_file():
        return {(config.subfolder or "").strip("/"): config.folder}
    found = sorted(path.parent for path in config.folder.glob(f"*/{CONFIG_NAME}"))
    if not found:
        raise FileNotFoundError(f"{config.folder} holds no saved autoencoder")
    above = [config.subfolder.strip("/")] if config.subfolder else []
    return {"/".join([*above, path.name]): path for path in found}


def _figures(config: Config, folder: Path) -> dict[str, Any] | None:
    """The numbers of one autoencoder, where there are any."""
    if config.figures is not None:
        values = read_json(config.figures)
        # a file of several autoencoders has those of each under its name
        for part in (folder.name, "heldout"):
            if isinstance(values.get(part), dict):
                return dict(values[part])
        return values
    for path, part in (
        (folder / _METRICS, "heldout"),
        (folder.parent / _EVALUATION, folder.name),
    ):
        if path.is_file():
            kept = read_json(path).get(part)
            if isinstance(kept, dict):
                return kept
    return None


def _write(
    config: Config,
    made: Path,
    found: dict[str, Path],
    models: dict[str, tuple[dict[str, Any], dict[str, Any] | None]],
) -> None:
    """The repository's files in a folder."""
    for place, folder in found.items():
        target = made / place
        target.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            shutil.copyfile(folder / name, target / name)
        publish_(target)
    card = made / hub.CARD_NAME
    if len(models) > 1:
        hub.write_run_card(card, config.repo, models, license=config.license)
        return
    ((place, (values, figures)),) = models.items()
    hub.write_card(
        card,
        config.repo,
        values,
        subfolder=place or None,
        figures=figures,
        license=config.license,
    )
