"""``python -m tools.bench.altered NAME=VALUE,... COMMAND...``: loader-service with altered defaults.

The benchmark compares values of defaults that have no option, in the processes that use them.
"""

from __future__ import annotations

import runpy
import sys
from typing import Final

from loader_service import defaults
from tools.errors import ToolFailed

READ_LATE: Final = ("PREFETCH", "SPARE_SLOTS", "SLICES_PER_WORKER", "SEND_SLOTS_PER_WORKER", "CONNECTIONS")
"""Defaults that are read when a node or a loader starts. Others are read on import, too early to alter them here."""


def alter(changes: str) -> None:
    """Change defaults in this process.

    Args:
        changes: ``NAME=VALUE`` with commas between; names of READ_LATE, whole numbers from 1.

    Raises:
        ToolFailed: one is not such a change.
    """
    for change in filter(None, changes.split(",")):
        name, _, value = change.partition("=")
        if name not in READ_LATE or not value.isdecimal() or int(value) < 1:
            raise ToolFailed(f"{change!r} is not NAME=VALUE, with one of {', '.join(READ_LATE)} and a number from 1.")
        setattr(defaults, name, int(value))  # seen by code that reads `defaults.NAME` when it runs


if __name__ == "__main__":
    _, chosen, *words = sys.argv
    alter(chosen)
    # In this process, as __main__: a new interpreter would have the defaults of the file again.
    sys.argv = ["loader-service", *words]
    runpy.run_module("loader_service", run_name="__main__")
