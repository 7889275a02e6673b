"""Features in the format that Neuronpedia imports: release, model, source, features, activations.

A source is one autoencoder at one place of one model. Its folder ``<model>/<layer>-<set>`` holds
``release.jsonl``, ``model.jsonl``, ``sourceset.jsonl`` and ``source.jsonl`` with one object each,
and gzipped JSON lines by batches of features: ``features/batch-<i>.jsonl.gz`` and
``activations/batch-<i>.jsonl.gz``. Neuronpedia shows activations as strengths, which bits alone do
not have: here a bit's activation is its margin, the pre-activation.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import gzip
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bae_fast.analysis.text import token_text
from bae_fast.autoencoder import Autoencoder
from bae_fast.files import publishing, replacing
from bae_fast.hub import public_metadata
from bae_fast.lm.cache import ActivationCache
from bae_fast.progress import progress_bar

# ids and names are parts of addresses and of paths
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")

# tokens that the logit lens shows at each end, and bars of a histogram
_N_LOGITS, _N_BARS = 10, 30


@dataclasses.dataclass(frozen=True)
class Release:
    """Who publishes what; the words that Neuronpedia shows.

    Attributes:
        name: the release's id, a part of its address.
        title: one line.
        source_set: the id of the set of sources, such as ``res-bae-2k``; one a place and width.
        source_title: one line of that set.
        creator: the publisher's name.
        creator_id: the id of the publisher's account.
        urls: addresses of a paper or of code.
        hf_repo_id, hf_folder_id: where on the Hugging Face Hub the weights lie.

    Raises:
        ValueError: a name that could be no part of an address.
    """

    name: str
    title: str
    source_set: str
    creator: str
    creator_id: str
    source_title: str = ""
    urls: tuple[str, ...] = ()
    hf_repo_id: str | None = None
    hf_folder_id: str | None = None

    def __post_init__(self) -> None:
        for field in ("name", "source_set"):
            value = getattr(self, field)
            if not isinstance(value, str) or not _NAME.fullmatch(value):
                raise ValueError(
                    f"{field} must be letters, digits, dots, dashes and underscores; got {value!r}"
                )


@torch.no_grad()
def write_neuronpedia_export(
    folder: str | os.PathLike[str],
    model: Autoencoder,
    cache: ActivationCache,
    tokenizer: Any,
    release: Release,
    *,
    layer: int,
    rows: range | None = None,
    unembedding: Tensor | None = None,
    examples: int = 20,
    batch_features: int = 128,
    progress: bool = False,
) -> Path:
    """Write one source.

    Args:
        folder: the one that holds all models.
        model: the autoencoder, in eval mode, with one bit a feature.
        cache: harvested hidden states and their tokens; its manifest names the language model and
            the hook. Rows that it dropped have no features on.
        tokenizer: the language model's.
        release: see :class:`Release`.
        layer: number of the block, from 0; a part of the source's id.
        rows: row numbers, in steps of 1; None: all.
        unembedding: ``[vocabulary, d_out]``, for the tokens that a feature raises and lowers; None
            leaves these lists empty.
        examples: windows of text shown for a feature, those of its strongest activation.
        batch_features: features a file.
        progress: show how far it is.

    Returns:
        The source's folder.

    Raises:
        ValueError: rows outside the cache, a number below 1, several bits a feature, or an
            unembedding of another width.
    """
    rows = range(cache.n_rows) if rows is None else rows
    cache.check_rows(rows)
    for name, number in (("examples", examples), ("batch_features", batch_features)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1; got {number}")
    if layer < 0:
        raise ValueError(f"layer must not be negative; got {layer}")
    if model.n_bits != 1:
        raise ValueError(f"model must have n_bits=1; got {model.n_bits}")
    if unembedding is not None and unembedding.shape[1:] != (model.d_out,):
        raise ValueError(
            f"unembedding must have shape [vocabulary, {model.d_out}]; got "
            f"{list(unembedding.shape)}"
        )
    source = _Source(model, cache, rows, tokenizer, release, layer)
    target = Path(folder) / source.model_id / source.source_id
    with publishing(target, fresh=True) as made:
        for name, value in source.described().items():
            _write_lines(made / f"{name}.jsonl", [value])
        total = model.d_sae
        with progress_bar(total, what="neuronpedia", unit="features", show=progress) as bar:
            for batch, first in enumerate(range(0, total, batch_features)):
                features, activations = [], []
                for feature in range(first, min(first + batch_features, total)):
                    features.append(source.feature(feature, unembedding))
                    activations += source.examples(feature, examples)
                    bar.update(1)
                name = f"batch-{batch}.jsonl.gz"
                _write_lines(made / "features" / name, features)
                _write_lines(made / "activations" / name, activations)
    return target


def _last_part(name: str) -> str:
    """A language model's name without its owner, or the name of its folder, however it is given."""
    path = Path(name).expanduser()
    return path.resolve().name if path.is_dir() else path.name


class _Source:
    """One autoencoder at one place of one model, and the objects that describe it."""

    def __init__(
        self,
        model: Autoencoder,
        cache: ActivationCache,
        rows: range,
        tokenizer: Any,
        release: Release,
        layer: int,
    ) -> None:
        self.model, self.cache, self.rows = model, cache, rows
        self.tokenizer, self.release = tokenizer, release
        self.model_id = _last_part(str(cache.manifest["model_name"]))
        self.source_id = f"{layer}-{release.source_set}"
        self._now = datetime.datetime.now(datetime.timezone.utc).isoformat()
        # the texts of tokens that were shown before
        self._words: dict[int, str] = {}

    def described(self) -> dict[str, dict[str, Any]]:
        """The objects that stand alone in their files."""
        release, now = self.release, self._now
        own = {"creatorId": release.creator_id, "createdAt": now, "visibility": "PUBLIC"}
        return {
            "release": {
                **own,
                "name": release.name,
                "description": release.title,
                "descriptionShort": release.title,
                "urls": list(release.urls),
                "creatorName": release.creator,
                "creatorNameShort": release.creator,
            },
            "model": {
                **own,
                "id": self.model_id,
                "instruct": "instruct" in self.model_id.lower() or self.model_id.endswith("-it"),
                "displayName": self.model_id,
                "displayNameShort": self.model_id,
                "updatedAt": now,
            },
            "sourceset": {
                **own,
                "modelId": self.model_id,
                "name": release.source_set,
                "creatorName": release.creator,
                "releaseName": release.name,
                "description": release.source_title or release.title,
            },
            "source": {
                **own,
                "id": self.source_id,
                "modelId": self.model_id,
                "setName": release.source_set,
                "dataset": str(public_metadata(self.cache.manifest).get("dataset_path", "")),
                "num_prompts": self.cache.n_windows,
                "num_tokens_in_prompt": self.cache.context_size,
                "hfRepoId": release.hf_repo_id,
                "hfFolderId": release.hf_folder_id,
                "inferenceEnabled": False,  # the site's own server knows SAELens' architectures
            },
        }

    @functools.cached_property
    def _entries(self) -> _Entries:
        return _entries(self.model, self.cache, self.rows)

    @functools.cached_property
    def _directions(self) -> Tensor | None:
        """What each feature adds to the raw reconstruction, if it has one direction."""
        directions = self.model.directions()
        return None if directions is None else self.model.in_raw_units(directions).float().cpu()

    def _common(self, feature: int) -> dict[str, Any]:
        return {
            "modelId": self.model_id,
            "layer": self.source_id,
            "creatorId": self.release.creator_id,
            "index": str(feature),
            "createdAt": self._now,
        }

    def feature(self, feature: int, unembedding: Tensor | None) -> dict[str, Any]:
        """How often and how strongly a feature is on, where it points, and to which tokens."""
        _, values = self._entries.of(feature)
        found = {
            **self._common(feature),
            "maxActApprox": float(values.max()) if len(values) else 0.0,
            "frac_nonzero": len(values) / len(self.rows),
            **_histogram(values),
        }
        if self._directions is None:
            return found
        direction = self._directions[feature]
        found |= {
            "hasVector": True,
            "vector": direction.tolist(),
            "vectorDefaultSteerStrength": found["maxActApprox"],
            "hookName": str(self.cache.manifest["hook_name"]),
        }
        if unembedding is not None:
            found |= self._logit_lens(direction, unembedding)
        return found

    def _logit_lens(self, direction: Tensor, unembedding: Tensor) -> dict[str, list[Any]]:
        """The tokens whose logits the direction raises and lowers most."""
        logits = (unembedding @ direction.to(unembedding)).float().cpu()
        n = min(_N_LOGITS, len(logits))
        highest, lowest = logits.topk(n), logits.topk(n, largest=False)
        return {
            "pos_str": self._texts(highest.indices.tolist()),
            "pos_values": highest.values.tolist(),
            "neg_str": self._texts(lowest.indices.tolist()),
            "neg_values": lowest.values.tolist(),
        }

    def examples(self, feature: int, wanted: int) -> list[dict[str, Any]]:
        """The windows of a feature's strongest activations, with all its values in each."""
        rows, values = self._entries.of(feature)
        cache, common = self.cache, self._common(feature)
        window = cache.row_window[rows.long()].long()
        found = []
        for one in dict.fromkeys(window[values.argsort(descending=True, stable=True)].tolist()):
            inside = window == one
            place = cache.row_position[rows[inside].long()].long()
            tokens = cache.tokens[one]
            line = torch.zeros(len(tokens), dtype=torch.float32)
            line[place] = values[inside]
            top = int(line.argmax())
            # the same export gets the same ids
            name = f"{self.source_id}/{feature}/{one}"
            found.append(
                {
                    **common,
                    "id": "c" + hashlib.sha256(name.encode()).hexdigest()[:24],
                    "tokens": self._texts(tokens.tolist()),
                    "values": line.tolist(),
                    "maxValue": float(line[top]),
                    "maxValueTokenIndex": top,
                    "minValue": float(line.min()),
                    "qualifyingTokenIndex": top,
                    "binMin": float(values.min()),
                    "binMax": float(values.max()),
                    "binContains": 1.0,
                }
            )
            if len(found) == wanted:
                break
        return found

    def _texts(self, ids: Iterable[int]) -> list[str]:
        """Each token's own text."""
        shown = []
        for one in ids:
            if one not in self._words:
                self._words[one] = token_text(self.tokenizer, one)
            shown.append(self._words[one])
        return shown


# -- where features are on ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Entries:
    """Rows and strengths by feature: feature j has ``offsets[j]`` to ``offsets[j + 1]``."""

    offsets: Tensor
    rows: Tensor
    values: Tensor

    def of(self, feature: int) -> tuple[Tensor, Tensor]:
        start, stop = self.offsets[feature : feature + 2].tolist()
        return self.rows[start:stop], self.values[start:stop]


def _entries(model: Autoencoder, cache: ActivationCache, rows: range) -> _Entries:
    where, features, values = [], [], []
    start = rows.start
    for block in model.blocks(cache.rows[rows.start : rows.stop]):
        strength = model.strength(block)
        at = strength.nonzero()
        values.append(strength[at[:, 0], at[:, 1]].cpu())
        where.append((at[:, 0].cpu() + start).int())
        features.append(at[:, 1].cpu().int())
        start += len(block)
    owner = torch.cat(features)
    order = owner.argsort(stable=True)  # rows stay in order
    counts = torch.bincount(owner, minlength=model.d_sae)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return _Entries(offsets, torch.cat(where)[order], torch.cat(values)[order])


def _histogram(values: Tensor) -> dict[str, list[float]]:
    """How often the activation, where it is not zero, lies where: heights and middles of bars."""
    if not len(values):
        return {"freq_hist_data_bar_heights": [], "freq_hist_data_bar_values": []}
    top = max(float(values.max()), torch.finfo(torch.float32).tiny)
    heights = torch.histc(values.float(), _N_BARS, 0, top)
    middles = (torch.arange(_N_BARS) + 0.5) * (top / _N_BARS)
    return {
        "freq_hist_data_bar_heights": heights.tolist(),
        "freq_hist_data_bar_values": middles.tolist(),
    }


def _write_lines(path: Path, values: list[dict[str, Any]]) -> None:
    """JSON lines, gzipped where the name says so, whole or not at all."""
    text = "".join(json.dumps(value, allow_nan=False) + "\n" for value in values).encode()
    with replacing(path) as temporary:
        # no time in the header: the same lines are the same file
        temporary.write_bytes(gzip.compress(text, 5, mtime=0) if path.suffix == ".gz" else text)
