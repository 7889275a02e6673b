"""bae_fast: the Binary Autoencoder of arXiv 2509.20997 on packed codes, fast and exact."""

# ruff: noqa: E402 (how threads wait and what signals do is settled before torch is loaded)
from bae_fast.starting import let_signals_end_commands
from bae_fast.waiting import let_commands_sleep

let_signals_end_commands()
let_commands_sleep()

from bae_fast import backends  # noqa: F401 (they register themselves)
from bae_fast._version import __version__
from bae_fast.codes import BinaryCode
from bae_fast.functional import BAEOutput, binary_autoencoder, decode, encode
from bae_fast.info import info, warmup
from bae_fast.model import BAEConfig, BinaryAutoencoder
from bae_fast.ops.registry import BackendUnavailableError
from bae_fast.released import load_released
from bae_fast.search import SearchedAutoencoder
from bae_fast.statistics import CodeStatistics

__all__ = [
    "BAEConfig",
    "BAEOutput",
    "BackendUnavailableError",
    "BinaryAutoencoder",
    "BinaryCode",
    "CodeStatistics",
    "SearchedAutoencoder",
    "__version__",
    "binary_autoencoder",
    "decode",
    "encode",
    "info",
    "load_released",
    "warmup",
]
