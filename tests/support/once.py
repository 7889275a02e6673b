"""What is dear to make is made once for all processes of a run of tests."""

import fcntl
import os
from pathlib import Path


def folder_of_run(tmp_path_factory):
    """A temporary folder that the processes of a run share."""
    root = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


def once(tmp_path_factory, name, make):
    """A folder that ``make(folder)`` has filled, in the first process that asks for the name.

    The others wait for it; where it fails, the next one tries in a new folder.
    """
    with (folder_of_run(tmp_path_factory) / f"{name}.place").open("a+") as place:
        fcntl.flock(place, fcntl.LOCK_EX)
        place.seek(0)
        made = place.read()
        if not made:
            folder = tmp_path_factory.mktemp(name)
            make(folder)
            place.write(made := str(folder))
    return Path(made)
