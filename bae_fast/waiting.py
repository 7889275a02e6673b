"""How OpenMP threads wait, which must be settled before torch loads its OpenMP library.

Threads that spin while they wait make a step several times slower beside one busy process. The
commands let them sleep; a library leaves the choice to the program that imports it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "OMP_WAIT_POLICY"


def is_command() -> bool:
    """Whether this process is ``bae-fast`` or ``python -m bae_fast``."""
    if Path(sys.argv[0] if sys.argv else "").stem == "bae-fast":
        return True
    words = list(sys.orig_argv)
    module = words[words.index("-m") + 1 : words.index("-m") + 2] if "-m" in words else []
    return module in (["bae_fast"], ["bae_fast.cli"])


def let_commands_sleep() -> None:
    """Set ``OMP_WAIT_POLICY=PASSIVE`` in a command, unless the user has set a policy."""
    if is_command() and "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault(VARIABLE, "PASSIVE")


def policy() -> str:
    """The policy of this process, for ``bae_fast.info()``."""
    return os.environ.get(VARIABLE, "not set")
