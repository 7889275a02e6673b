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

from bae_fast.autoencoder import Autoencoder
from bae_fast.files import publishing, replacing
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
    if rows.step != 1 or not 0 <= rows.start < rows.stop <= cache.n_rows:
        raise ValueError(
            f"rows must be a range in steps of 1 within the cache's {cache.n_rows:,} rows; "
            f"got {rows!r}"
        )
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
    manifest: dict[str, Any] = cache.manifest
    model_id = str(manifest["model_name"]).rpartition("/")[2]
    source_id = f"{layer}-{release.source_set}"
    target = Path(folder) / model_id / source_id
    now = datetime.datetime.now(datetime.timezone.utc).isoformat()
    with publishing(target, fresh=True) as made:
        for name, value in _described(release, manifest, model_id, source_id, now, cache).items():
            _write_lines(made / f"{name}.jsonl", [value])

        entries = _entries(model, cache, rows)
        directions = model.directions()
        if directions is not None:
            directions = (directions * model.target_scale).float().cpu()
        words: dict[int, str] = {}
        common = {"modelId": model_id, "layer": source_id, "creatorId": release.creator_id}
        total = model.d_sae
        with progress_bar(total, what="neuronpedia", unit="features", show=progress) as bar:
            for first in range(0, total, batch_features):
                found_features, found_activations = [], []
                for feature in range(first, min(first + batch_features, total)):
                    at, values = entries.of(feature)
                    one = {
                        **common,
                        "index": str(feature),
                        "createdAt": now,
                        "maxActApprox": float(values.max()) if len(values) else 0.0,
                        "frac_nonzero": len(values) / len(rows),
                        **_histogram(values),
                    }
                    if directions is not None:
                        direction = directions[feature]
                        one |= {
                            "hasVector": True,
                            "vector": direction.tolist(),
                            "vectorDefaultSteerStrength": one["maxActApprox"],
                            "hookName": str(manifest["hook_name"]),
                        }
                        if unembedding is not None:
                            one |= _logit_lens(direction, unembedding, tokenizer, words)
                    found_features.append(one)
                    found_activations += [
                        {**common, "index": str(feature), "createdAt": now, **example}
                        for example in _examples(
                            cache, at, values, examples, tokenizer, words, f"{source_id}/{feature}"
                        )
                    ]
                    bar.update(1)
                name = f"batch-{first // batch_features}.jsonl.gz"
                _write_lines(made / "features" / name, found_features)
                _write_lines(made / "activations" / name, found_activations)
    return target


def _described(
    release: Release,
    manifest: dict[str, Any],
    model_id: str,
    source_id: str,
    now: str,
    cache: ActivationCache,
) -> dict[str, dict[str, Any]]:
    """The objects that stand alone in their files."""
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
            "id": model_id,
            "instruct": "instruct" in model_id.lower() or model_id.endswith("-it"),
            "displayName": model_id,
            "displayNameShort": model_id,
            "updatedAt": now,
        },
        "sourceset": {
            **own,
            "modelId": model_id,
            "name": release.source_set,
            "creatorName": release.creator,
            "releaseName": release.name,
            "description": release.source_title or release.title,
        },
        "source": {
            **own,
            "id": source_id,
            "modelId": model_id,
            "setName": release.source_set,
            "dataset": str(manifest.get("dataset_path", "")),
            "num_prompts": cache.n_windows,
            "num_tokens_in_prompt": cache.context_size,
            "hfRepoId": release.hf_repo_id,
            "hfFolderId": release.hf_folder_id,
            "inferenceEnabled": False,  # the site's own server knows SAELens' architectures
        },
    }


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


def _examples(
    cache: ActivationCache,
    rows: Tensor,
    values: Tensor,
    wanted: int,
    tokenizer: Any,
    words: dict[int, str],
    name: str,
) -> list[dict[str, Any]]:
    """The windows of a feature's strongest activations, with all its values in each."""
    window = cache.row_window[rows.long()].long()
    found = []
    for one in dict.fromkeys(window[values.argsort(descending=True, stable=True)].tolist()):
        inside = window == one
        place = cache.row_position[rows[inside].long()].long()
        tokens = cache.tokens[one]
        line = torch.zeros(len(tokens), dtype=torch.float32)
        line[place] = values[inside]
        top = int(line.argmax())
        found.append(
            {
                # the same export gets the same ids
                "id": "c" + hashlib.sha256(f"{name}/{one}".encode()).hexdigest()[:24],
                "tokens": _words(tokens.tolist(), tokenizer, words),
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


def _words(ids: Iterable[int], tokenizer: Any, known: dict[int, str]) -> list[str]:
    """Each token's own text."""
    shown = []
    for one in ids:
        if one not in known:
            known[one] = tokenizer.decode([one])
        shown.append(known[one])
    return shown


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


def _logit_lens(
    direction: Tensor, unembedding: Tensor, tokenizer: Any, words: dict[int, str]
) -> dict[str, list[Any]]:
    """The tokens whose logits the direction raises and lowers most."""
    logits = (unembedding @ direction.to(unembedding)).float().cpu()
    n = min(_N_LOGITS, len(logits))
    highest, lowest = logits.topk(n), logits.topk(n, largest=False)
    return {
        "pos_str": _words(highest.indices.tolist(), tokenizer, words),
        "pos_values": highest.values.tolist(),
        "neg_str": _words(lowest.indices.tolist(), tokenizer, words),
        "neg_values": lowest.values.tolist(),
    }


def _write_lines(path: Path, values: list[dict[str, Any]]) -> None:
    """JSON lines, gzipped where the name says so, whole or not at all."""
    text = "".join(json.dumps(value, allow_nan=False) + "\n" for value in values).encode()
    with replacing(path) as temporary:
        # no time in the header: the same lines are the same file
        temporary.write_bytes(gzip.compress(text, 5, mtime=0) if path.suffix == ".gz" else text)
