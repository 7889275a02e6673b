"""A set of hidden states as a file of codes.

The rate is that of the file on disk, header included, and the file is read again and compared bit
for bit before anything is reported. Beside it: the bound of independent columns, the entropy along
a tree, plainer forms of the same bits, and quantisers of the raw hidden states.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import lzma
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from bae_fast.analysis.row_quantisers import quantisers
from bae_fast.codes import BinaryCode
from bae_fast.compression import CODERS, CompressedSize, compress, decompress
from bae_fast.experiments import runs
from bae_fast.experiments.data import Data, OwnRows, Rows, pick_device, rows_of
from bae_fast.experiments.training import Training, check, features_of, new_autoencoder
from bae_fast.files import read_json, write_json, write_text
from bae_fast.lm.origin import check_origin
from bae_fast.model import BinaryAutoencoder
from bae_fast.progress import Stages
from bae_fast.search import MAX_SEARCH_COLUMNS, SearchedAutoencoder
from bae_fast.spacing import evenly, evenly_from
from bae_fast.training import Trainer, TrainingConfig, fit_search_
from bae_fast.training.recipe import MAX_REFIT_FEATURES

_T = TypeVar("_T")

# the file of codes among the results
CODES = "codes.bae"

# rows encoded and decoded at a time
_ROW_BLOCK = 8192

# rows a feature from which on a decoder is fitted to them: with fewer it fits their noise
FIT_ROWS = 32

# at least so many rows are those that quantisers are measured on
_QUANTISED_ROWS = 2**14


@dataclasses.dataclass(frozen=True)
class Config(runs.Overwriting, Training, OwnRows, Data):
    """Write hidden states as a file of codes, near the entropy of the code.

    Attributes:
        load: The folder of a saved model. Without it one is trained.
        rows: Which rows go into the file: all, or the held-out ones.
        block_rows: The number of rows of the file that are read together.
        bit_price: The mean squared error, in normalised units, that a bit is worth. With it the
            codes are searched for instead of encoded, and the decoder is fitted to searched codes
            where there are 32 training rows a feature; the model that does so is saved with the
            results. At the same number of bits the error was a fifth less on SmolLM2.
        dense_bits: The bits that a one of a feature on in many rows costs more in that search, for
            each doubling of the feature's share of rows beyond 1/16.
        coder: How the columns are coded: columns is each on its own, tree is each given the one it
            shares most with, which is smaller and some times slower.
        out: The folder of the results.
    """

    load: Path | None = None
    rows: Literal["all", "heldout"] = "all"
    block_rows: int = 4096
    bit_price: float | None = None
    dense_bits: float = 0.0
    coder: Literal["columns", "tree"] = "columns"
    out: Path = Path("results/compress")


def run(config: Config) -> runs.Result:
    """Encode, write, read again, compare and measure.

    Raises:
        ValueError, ImportError, OSError: naming the field, the package or the file.
        RuntimeError: the file does not hold the bits that were written.
        InterruptedRunError: it was interrupted while it trained.
    """
    from bae_fast.report import compress as report
    from bae_fast.report.plots import save_png

    constants = _checked(config)
    loaded = _loaded(config)  # a folder that is none is found before a language model is
    stages = Stages(config.progress)
    with runs.results(config) as folder:
        source = rows_of(config, stages, constants.batch_size)
        facts = {k: v for k, v in source.facts.items() if k != "harvest_tokens_per_second"}
        d = source.rows.shape[1]
        if loaded is not None:
            _check_reads(config, loaded[0], d, facts)
        bae, model_folder = loaded or _trained(config, constants, source, facts, folder, stages)
        if config.bit_price is not None:
            with stages.stage("search"):
                some = evenly(source.train_rows)
                bae = searching(bae, some, config.bit_price, config.dense_bits)
                model_folder = bae.save_pretrained(folder / "model")
        rows = source.rows if config.rows == "all" else source.heldout_rows
        timed = _Stopwatch()
        with stages.stage("encode, compress, read again and compare"):
            note = {"save_id": save_id(model_folder), "rows": config.rows, **facts}
            code, size = _write_codes(config, bae, rows, folder / CODES, note, timed)
        with stages.stage("reconstruct and measure"):
            measured, spectrum = _measure(bae, rows, code, size, len(source.heldout), timed)
        with stages.stage("quantise the raw hidden states"):
            some = evenly_from(rows, _QUANTISED_ROWS).float()
            quantised = quantisers(some, source.train_rows.float(), measured["fvu"])
        values = {
            "environment": runs.environment(),
            "data": facts,
            "rows": len(rows),
            "d_in": d,
            "d_sae": bae.config.d_sae,
            "raw_bits_a_row": {"float32": 32 * d, "bfloat16": 16 * d},
            "size": size.summary(),
            "coder": config.coder,
            "bit_price": bae.bit_price if isinstance(bae, SearchedAutoencoder) else None,
            "dense_bits": bae.dense_bits if isinstance(bae, SearchedAutoencoder) else None,
            **measured,
            "quantised": quantised,
            "seconds": timed.seconds,
        }
        write_json(folder / "compress.json", values)
        text = report.table(values)
        write_text(folder / "compress.md", text)
        save_png(folder / "compress.png", report.plot(values, spectrum))
    names = (CODES, "compress.json", "compress.md", "compress.png")
    return runs.Result(values, text, tuple(config.out / name for name in names))


def _checked(config: Config) -> TrainingConfig:
    """The constants of training, once nothing is found that would fail later.

    Raises:
        ImportError, ValueError: naming the package or the field.
    """
    from bae_fast.report.style import check_figures

    if importlib.util.find_spec("constriction") is None:
        raise ImportError("compress needs constriction: pip install 'bae-fast[compress]'")
    check_figures()
    runs.check_one_of("rows", config.rows, ("all", "heldout"))
    runs.check_one_of("coder", config.coder, CODERS)
    runs.check_at_least(config, 1, "block_rows")
    if config.bit_price is not None:
        runs.check_prices(config, "bit_price")
    runs.check_dense_bits(config, "dense_bits", "bit_price")
    return check(config)


# -- the model ---------------------------------------------------------------------------------


def _loaded(config: Config) -> tuple[BinaryAutoencoder, Path] | None:
    """The model that was asked for, and its folder."""
    if config.load is None:
        return None
    device = pick_device(config)
    return (
        BinaryAutoencoder.from_pretrained(config.load, impl=config.impl, device=device),
        config.load,
    )


def _check_reads(config: Config, bae: BinaryAutoencoder, width: int, facts: dict[str, Any]) -> None:
    """Refuse a model of other rows."""
    if bae.is_transcoder or bae.config.d_in != width:
        kind = "a transcoder" if bae.is_transcoder else f"of width {bae.config.d_in}"
        raise runs.ConfigError(
            "load", f"{config.load}: the model must be of width {width}; it is {kind}"
        )
    if facts.get("model_name"):
        check_origin(bae.config.metadata, facts)


def _trained(
    config: Config,
    constants: TrainingConfig,
    source: Rows,
    facts: dict[str, Any],
    folder: Path,
    stages: Stages,
) -> tuple[BinaryAutoencoder, Path]:
    """A model that is trained on the rows, and its folder."""
    width = source.rows.shape[1]
    if len(source.train) < constants.batch_size:
        raise runs.ConfigError(
            "batch_size",
            f"must be at most the {len(source.train):,} training rows; got {constants.batch_size}",
        )
    n_features = features_of(config, width)
    if config.bit_price is not None and n_features > MAX_SEARCH_COLUMNS:
        raise runs.ConfigError(
            "bit_price",
            f"needs at most {MAX_SEARCH_COLUMNS:,} features, products of all pairs of which are "
            f"held; got {n_features:,}",
        )
    with stages.stage("train"):
        bae = new_autoencoder(config, source.train_rows, facts, stages, source.cache)
        trainer = Trainer(bae, source.train_rows, constants)
        runs.fit(trainer, folder, progress=config.progress)
        saved = bae.save_pretrained(folder / "model")
    return bae.eval(), saved


def searching(
    bae: BinaryAutoencoder, rows: Tensor, bit_price: float, dense_bits: float
) -> SearchedAutoencoder:
    """A module that searches for its codes, fitted to raw training rows ``[n, d]``."""
    found = SearchedAutoencoder.of(bae, rows, bit_price=bit_price, dense_bits=dense_bits)
    enough = len(rows) >= FIT_ROWS * bae.d_sae and bae.d_sae <= MAX_REFIT_FEATURES
    return fit_search_(found, rows) if enough else found


def save_id(folder: Path) -> str | None:
    """What tells one saved model from another."""
    path = folder / "cfg.json"
    return read_json(path).get("save_id") if path.is_file() else None


# -- the file, and what is measured of it ------------------------------------------------------


class _Stopwatch:
    """Calls what it is given; ``seconds`` holds how long that took, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, call: Callable[[], _T]) -> _T:
        start = time.perf_counter()
        found = call()
        self.seconds[name] = round(time.perf_counter() - start, 3)
        return found


def _write_codes(
    config: Config,
    bae: BinaryAutoencoder,
    rows: Tensor,
    path: Path,
    note: dict[str, Any],
    timed: _Stopwatch,
) -> tuple[BinaryCode, CompressedSize]:
    """Write the codes of rows; what the file holds, and its size.

    Raises:
        RuntimeError: that is not what was written.
    """
    code = timed("encode", lambda: encode(bae, rows))
    size = timed(
        "compress",
        lambda: compress(
            code, path, block_rows=config.block_rows, coder=config.coder, metadata=note
        ),
    )
    again = timed("decompress", lambda: decompress(path))
    if not again.equal(code) or path.stat().st_size != size.file_bytes:
        raise RuntimeError(f"{path} does not hold the bits that were written")
    return again, size


def _measure(
    bae: BinaryAutoencoder,
    rows: Tensor,
    code: BinaryCode,
    size: CompressedSize,
    n_heldout: int,
    timed: _Stopwatch,
) -> tuple[dict[str, Any], Tensor]:
    """Rates and errors of a file's codes, and the eigenvalues of the rows' covariance."""
    from bae_fast.analysis.metrics import covariance_eigenvalues, gaussian_rate_distortion_bits
    from bae_fast.entropy import estimate_entropy

    n, d = rows.shape
    fvu, fvu_heldout = timed("decode", lambda: errors(bae, rows, code, n_heldout))
    spectrum = covariance_eigenvalues(rows)
    raw = code.words.numpy().tobytes()
    plain_bytes = {
        "packed": size.packed_bytes,
        "listed": size.listed_bytes,
        "gzip": len(timed("gzip", lambda: zlib.compress(raw, 6))),
        "xz": len(timed("xz", lambda: lzma.compress(raw))),
    }
    values = {
        "bound_bits_a_row": size.entropy_bits / n,
        "tree_bits_a_row": estimate_entropy(code).tree,
        "plain_bits_a_row": {name: 8 * value / n for name, value in plain_bytes.items()},
        "ratio_to_bfloat16": 16 * d / size.bits_a_row,
        "fvu": fvu,
        "fvu_heldout": fvu_heldout,
        "gaussian_bound_bits": float(gaussian_rate_distortion_bits(spectrum, fvu)),
        "decoder_bytes": 4 * (bae.W_dec.numel() + bae.b_dec.numel() + d + 1),
    }
    return values, spectrum


def encode(bae: BinaryAutoencoder, rows: Tensor) -> BinaryCode:
    """Codes of all rows, on the CPU."""
    kind = {"device": bae.W_enc.device, "dtype": bae.W_enc.dtype}
    return BinaryCode.cat(bae.encode(part.to(**kind)).to("cpu") for part in rows.split(_ROW_BLOCK))


@torch.no_grad()
def errors(
    bae: BinaryAutoencoder, rows: Tensor, code: BinaryCode, n_heldout: int
) -> tuple[float, float]:
    """FVU of the reconstructions, of all rows and of the last ``n_heldout``."""
    from bae_fast.analysis.metrics import FVUAccumulator

    found = []
    for first in (0, len(rows) - n_heldout):
        error = FVUAccumulator()
        for top in range(first, len(rows), _ROW_BLOCK):
            part = rows[top : top + _ROW_BLOCK]
            recon = bae.decode(code[top : top + _ROW_BLOCK].to(bae.W_dec.device))
            error.update(part.float(), recon.float().cpu())
        found.append(error.compute())
    return found[0], found[1]
