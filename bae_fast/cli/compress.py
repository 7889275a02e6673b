"""``bae-fast compress`` and ``decompress``: a set of hidden states as a file of codes.

The rate is that of the file on disk, header included, and the file is read again and compared bit
for bit before anything is reported. Beside it: the bound of independent columns, the entropy along
a tree, plainer forms of the same bits, and quantisers of the raw hidden states.
"""

from __future__ import annotations

import argparse
import importlib.util
import lzma
import math
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bae_fast.cli import demo
from bae_fast.cli.runs import environment
from bae_fast.codes import BinaryCode
from bae_fast.compression import CompressedCode, compress, decompress
from bae_fast.files import read_json, write_json, write_safetensors, write_text
from bae_fast.model import PRESETS, BinaryAutoencoder
from bae_fast.training import Trainer

# rows encoded and decoded at a time
_ROW_BLOCK = 8192

# rows that quantisers are measured on, evenly over all
_QUANTISED_ROWS = 2**14

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "compress",
        help="write hidden states as a file of codes, near the entropy of the code",
        description="Encode hidden states, write the codes compressed, read them again and report "
        "bits a row on disk beside the bound, FVU, and quantisers of the raw states.",
    )
    demo.add_data_arguments(parser)
    parser.add_argument(
        "--load", type=Path, default=None, metavar="FOLDER", help="a saved model; default: train"
    )
    parser.add_argument("--expansion", type=int, default=4, help="features over width, F / d")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="sparse")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=None, help="rows a step")
    parser.add_argument("--precision", choices=("auto", "bfloat16", "float32"), default=None)
    parser.add_argument("--impl", default="auto", help="implementation of the layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--rows", choices=("all", "heldout"), default="all", help="which rows go into the file"
    )
    parser.add_argument("--block-rows", type=int, default=4096, help="rows read together")
    parser.add_argument("--out", type=Path, default=Path("results/compress"))
    parser.set_defaults(
        run=run, lr=None, entropy_weight=None, covariance_weight=None, no_refit=False
    )

    parser = commands.add_parser(
        "decompress",
        help="read a file of codes",
        description="Write a compressed file's codes, or with a model their reconstructions, as "
        "safetensors.",
    )
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--load", type=Path, default=None, metavar="FOLDER",
        help="the model it was made with: write `rows`, the reconstructions",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="float32", help="of `rows`")
    parser.add_argument(
        "--out", type=Path, default=None, help="default: FILE with the suffix .safetensors"
    )
    parser.set_defaults(run=run_decompress)


def run(arguments: argparse.Namespace) -> int:
    from bae_fast.analysis.metrics import covariance_eigenvalues, gaussian_rate_distortion_bits
    from bae_fast.entropy import estimate_entropy
    from bae_fast.report.plots import Point, plot_fvu_bits, save_png

    if importlib.util.find_spec("constriction") is None:
        raise ImportError("compress needs constriction: pip install 'bae-fast[compress]'")
    config = demo.check(arguments)
    out: Path = arguments.out
    stages = demo.Stages()
    cache, _, facts = demo.harvest_rows(arguments, stages, config.batch_size)
    del facts["harvest_tokens_per_second"]  # of this call, not of the result
    split = cache.split(demo.N_HELDOUT)
    facts["split"] = split.as_dict()
    train = cache.rows[split.train.start : split.train.stop]
    if arguments.load is not None:
        bae = BinaryAutoencoder.from_pretrained(
            arguments.load, impl=arguments.impl, device=arguments.device
        )
        folder = arguments.load
        check_model(bae, cache.d_in, folder)
    else:
        with stages.stage("train"):
            bae = demo.new_autoencoder(arguments, train, facts)
            Trainer(bae, train, config).fit(progress=not arguments.no_progress)
            folder = bae.save_pretrained(out / "model")
            bae.eval()
    rows = cache.rows if arguments.rows == "all" else cache.rows[split.heldout.start :]

    seconds: dict[str, float] = {}

    def timed(name: str, call: Any) -> Any:
        start = time.perf_counter()
        found = call()
        seconds[name] = round(time.perf_counter() - start, 3)
        return found

    path = out / "codes.bae"
    with stages.stage("encode, compress, read again and compare"):
        code = timed("encode", lambda: encode(bae, rows))
        note = {"save_id": save_id(folder), "rows": arguments.rows, **facts}
        size = timed(
            "compress",
            lambda: compress(code, path, block_rows=arguments.block_rows, metadata=note),
        )
        again = timed("decompress", lambda: decompress(path))
        if not again.equal(code) or path.stat().st_size != size.file_bytes:
            raise RuntimeError(f"{path} does not hold the bits that were written")
    with stages.stage("reconstruct and measure"):
        n_heldout = len(split.heldout)
        fvu, fvu_heldout = timed("decode", lambda: errors(bae, rows, again, n_heldout))
        entropy = estimate_entropy(code)
        spectrum = covariance_eigenvalues(rows)
        raw = code.words.numpy().tobytes()
        plain = {
            "packed": size.packed_bytes,
            "listed": size.listed_bytes,
            "gzip": len(timed("gzip", lambda: zlib.compress(raw, 6))),
            "xz": len(timed("xz", lambda: lzma.compress(raw))),
        }
    with stages.stage("quantise the raw hidden states"):
        every = max(len(rows) // _QUANTISED_ROWS, 1)
        quantised = quantisers(rows[::every].float(), train.float(), fvu)
    d, n = cache.d_in, len(rows)
    result = {
        "environment": environment(),
        "data": facts,
        "rows": n,
        "d_in": d,
        "d_sae": bae.config.d_sae,
        "raw_bits_a_row": {"float32": 32 * d, "bfloat16": 16 * d},
        "size": size.summary(),
        "bound_bits_a_row": size.entropy_bits / n,
        "tree_bits_a_row": entropy.tree,
        "plain_bits_a_row": {name: 8 * value / n for name, value in plain.items()},
        "ratio_to_bfloat16": 16 * d / size.bits_a_row,
        "fvu": fvu,
        "fvu_heldout": fvu_heldout,
        "gaussian_bound_bits": float(gaussian_rate_distortion_bits(spectrum, fvu)),
        "decoder_bytes": 4 * (bae.W_dec.numel() + bae.b_dec.numel() + d + 1),
        "quantised": quantised,
        "seconds": seconds,
    }
    write_json(out / "compress.json", result)
    text = table(result)
    write_text(out / "compress.md", text)
    points = [Point("BAE, on disk", fvu, size.bits_a_row, True)]
    points += [Point(row["name"], row["fvu"], row["bits"]) for row in quantised if row["fvu"] < 1]
    save_png(out / "compress.png", plot_fvu_bits(spectrum, points))
    print("\n" + text)
    print(f"{path}, {out / 'compress.json'}, compress.md, compress.png")
    return 0


def run_decompress(arguments: argparse.Namespace) -> int:
    start = time.perf_counter()
    compressed = CompressedCode.open(arguments.file)
    target: Path = arguments.out or arguments.file.with_suffix(".safetensors")
    if target.resolve() == arguments.file.resolve():
        raise ValueError(f"--out {target} is the file that is read")
    if arguments.load is None:
        code = compressed.code()
        code.save(target, {"source": arguments.file.name})
        print(f"{code}")
    else:
        bae = BinaryAutoencoder.from_pretrained(arguments.load)
        if compressed.shape[-1] != bae.W_enc.shape[1] or compressed.n_bits != bae.config.n_bits:
            raise ValueError(
                f"--load {arguments.load} has {bae.W_enc.shape[1]} columns of {bae.config.n_bits} "
                f"bits; {arguments.file} has {compressed.shape[-1]} of {compressed.n_bits}"
            )
        made_with = compressed.metadata.get("save_id")
        if made_with is not None and made_with != save_id(arguments.load):
            raise ValueError(f"--load {arguments.load} is not the model {arguments.file} came from")
        with torch.no_grad():
            parts = [
                bae.decode(compressed.block(i)).to(_DTYPES[arguments.dtype])
                for i in range(compressed.n_blocks)
            ]
        rows = torch.cat(parts).reshape(*compressed.shape[:-1], -1)
        write_safetensors(target, {"rows": rows}, {"source": arguments.file.name})
        print(f"rows {list(rows.shape)}, {arguments.dtype}")
    print(f"{target}: {time.perf_counter() - start:.1f} s")
    return 0


def check_model(bae: BinaryAutoencoder, width: int, folder: Path) -> None:
    """Refuse a model of another width, or of another target than its input."""
    if bae.is_transcoder or bae.config.d_in != width:
        kind = "a transcoder" if bae.is_transcoder else f"of width {bae.config.d_in}"
        raise ValueError(f"--load {folder}: the model must be of width {width}; it is {kind}")


def save_id(folder: Path) -> str | None:
    """What tells one saved model from another."""
    path = folder / "cfg.json"
    return read_json(path).get("save_id") if path.is_file() else None


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


# -- quantisers of the raw hidden states -------------------------------------------------------


def absmax(rows: Tensor, bits: int) -> tuple[Tensor, float]:
    """Integers of a row with one bf16 scale: (reconstructions, bits a row)."""
    most = 2 ** (bits - 1) - 1
    scale = (rows.abs().amax(1, keepdim=True) / most).bfloat16().float()
    scale = torch.where(scale > 0, scale, 1.0)
    found = (rows / scale).round().clamp(-most - 1, most)
    return found * scale, rows.shape[1] * bits + 16.0


def entropy_of_levels(levels: Tensor) -> float:
    """Sum over columns of the plug-in entropy of whole numbers ``[n, d]``, in bits."""
    n, total = len(levels), 0.0
    for column in levels.long().T:
        share = torch.bincount(column - column.min()).double() / n
        total -= float(torch.special.xlogy(share, share).sum()) / math.log(2)
    return total


def step_for(values: Tensor, variance: float, fvu: float) -> float:
    """The step of a uniform quantiser of centred values whose FVU is the one given."""
    low, high = 1e-4 * math.sqrt(variance), 100 * math.sqrt(variance)
    for _ in range(20):
        step = math.sqrt(low * high)
        error = (values - (values / step).round() * step).square().mean()
        low, high = (step, high) if float(error) < fvu * variance else (low, step)
    return math.sqrt(low * high)


@torch.no_grad()
def quantisers(rows: Tensor, train: Tensor, fvu: float) -> list[dict[str, Any]]:
    """Rate and FVU of what one would do without a model.

    Whole numbers of 8 to 2 bits with a scale a row; and, entropy coded at the code's own FVU, one
    step for all dimensions, of the states as they are and on their principal axes. Entropies are
    empirical, without any header: bounds, not files.
    """
    from bae_fast.analysis.metrics import fvu as fvu_of

    found = []
    for bits in (8, 4, 3, 2):
        recon, rate = absmax(rows, bits)
        found.append({"name": f"int{bits}", "fvu": fvu_of(rows, recon), "bits": rate})
    mean = train.mean(0)
    centred = rows - mean
    axes = torch.linalg.eigh(torch.cov(train.T.double())).eigenvectors.float()
    variance = float((rows - rows.mean(0)).square().mean())
    for name, values in (("entropy coded", centred), ("PCA, entropy coded", centred @ axes)):
        step = step_for(values, variance, fvu)
        levels = (values / step).round()
        found.append(
            {
                "name": name,
                "fvu": float((values - levels * step).square().mean()) / variance,
                "bits": entropy_of_levels(levels),
            }
        )
    return found


def table(result: dict[str, Any]) -> str:
    """Markdown: one line a form, all in bits a row."""
    raw, size, fvu = result["raw_bits_a_row"], result["size"], result["fvu"]
    lines = ["| form | bits a row | of bf16 | FVU |", "|---|---|---|---|"]

    def line(name: str, bits: float, error: float | None) -> None:
        shown = "" if error is None else f"{error:.4f}"
        lines.append(f"| {name} | {bits:,.1f} | 1 / {raw['bfloat16'] / bits:.1f} | {shown} |")

    line("raw, float32", raw["float32"], 0)
    line("raw, bfloat16", raw["bfloat16"], 0)
    line("**code, on disk**", size["bits_a_row"], fvu)
    line("bound of independent columns, sum of entropies", result["bound_bits_a_row"], None)
    line("entropy along a tree (estimate)", result["tree_bits_a_row"], None)
    names = {
        "packed": "one bit a feature",
        "listed": "lists of differing columns",
        "gzip": "packed bits, gzip -6",
        "xz": "packed bits, xz -6",
    }
    for key, name in names.items():
        line(name, result["plain_bits_a_row"][key], fvu)
    line("Gaussian bound at this FVU", result["gaussian_bound_bits"], fvu)
    for row in result["quantised"]:
        line(f"raw states, {row['name']}", row["bits"], row["fvu"])
    data, seconds = result["data"], result["seconds"]
    overhead = f"{size['overhead']:.2%}" if size["overhead"] is not None else "all"
    lines += [
        "",
        f"{data['model_label']}, `{data['hook_name']}`, {result['rows']:,} rows of "
        f"{result['d_in']}, {result['d_sae']} features. The file: {size['file_bytes']:,} bytes, "
        f"{overhead} above the bound, header and index {size['header_bytes']:,} bytes; every bit "
        f"compared after reading. FVU of the held-out rows {result['fvu_heldout']:.4f}. Not "
        f"counted: the decoder, {result['decoder_bytes'] / 1e6:.1f} MB in float32, once for any "
        f"number of rows. Seconds: encode {seconds['encode']:.1f}, compress "
        f"{seconds['compress']:.1f}, decompress {seconds['decompress']:.1f}, decode "
        f"{seconds['decode']:.1f}. Entropy coded: empirical entropy of the levels of each "
        "dimension, no file; its axes and tables are not counted. The bound is that of independent "
        "columns: xz goes below it where rows, or groups of features, repeat.",
    ]
    return "\n".join(lines) + "\n"
