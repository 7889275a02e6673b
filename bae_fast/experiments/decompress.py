"""Read a file of codes: the codes themselves, or with a model their reconstructions."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import torch

from bae_fast.compression import CompressedCode
from bae_fast.experiments import runs
from bae_fast.experiments.compress import CODES, save_id
from bae_fast.files import write_safetensors
from bae_fast.model import BinaryAutoencoder
from bae_fast.progress import Stages, tracked

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Config:
    """Write a compressed file's codes, or with a model their reconstructions, as safetensors.

    Attributes:
        file: The file of codes that is read, or the folder that compress wrote it into.
        load: The folder of the model that made the file. With it the reconstructions are written,
            as rows.
        dtype: The type of the reconstructions.
        out: The file that is written. Without it that is the file's name with .safetensors.
        progress: Progress is shown, as a bar on a terminal and as lines elsewhere.
    """

    file: Path
    load: Path | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    out: Path | None = None
    progress: bool = True


def run(config: Config) -> runs.Result:
    """Read a file of codes and write it as safetensors.

    Raises:
        ValueError, OSError: naming the file or the field.
    """
    start = time.perf_counter()
    runs.check_one_of("dtype", config.dtype, DTYPES)
    file = config.file / CODES if config.file.is_dir() else config.file
    compressed = CompressedCode.open(file)
    target = config.out or file.with_suffix(".safetensors")
    if target.resolve() == file.resolve():
        raise runs.ConfigError("out", f"{target} is the file that is read")
    values: dict[str, Any] = {"shape": list(compressed.shape), "n_bits": compressed.n_bits}
    stages = Stages(config.progress)
    if config.load is None:
        with stages.stage("read the codes"):
            code = compressed.code()
        code.save(target, {"source": file.name})
        text = str(code)
    else:
        bae = BinaryAutoencoder.from_pretrained(config.load)
        if compressed.shape[-1] != bae.W_enc.shape[1] or compressed.n_bits != bae.config.n_bits:
            raise runs.ConfigError(
                "load",
                f"{config.load} has {bae.W_enc.shape[1]} columns of {bae.config.n_bits} bits; "
                f"{file} has {compressed.shape[-1]} of {compressed.n_bits}",
            )
        made_with = compressed.metadata.get("save_id")
        if made_with is not None and made_with != save_id(config.load):
            raise runs.ConfigError("load", f"{config.load} is not the model {file} came from")
        n = compressed.n_blocks
        with stages.stage("read and decode"), torch.no_grad():
            parts = [
                bae.decode(compressed.block(i)).to(DTYPES[config.dtype])
                for i in tracked(range(n), n, "blocks")
            ]
        rows = torch.cat(parts).reshape(*compressed.shape[:-1], -1)
        write_safetensors(target, {"rows": rows}, {"source": file.name})
        values["rows"] = list(rows.shape)
        text = f"rows {list(rows.shape)}, {config.dtype}"
    text += f"\n{target}: {time.perf_counter() - start:.1f} s"
    return runs.Result(values, text, (target,))
