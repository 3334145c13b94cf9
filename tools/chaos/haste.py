"""Haste: nodes and clients whose timeouts are a part of the defaults, so that a run has room for more faults.

A node that is suspended stalls its clients until they declare it lost. With the default of ten seconds, a storm would spend
most of its time in such waits, and most faults would meet clients that wait already. The order of the timeouts stays.

`python -m tools.chaos.haste start ...` is `loader-service start ...` in haste.
"""

from __future__ import annotations

import runpy
from typing import Final

from loader_service import defaults
from loader_service.wire import sockets

SHARE: Final = 0.4
"""Long enough for two busy cores: the shortest of the timeouts, libzmq's heartbeat, becomes two seconds."""

_SECONDS: Final = (
    "PING_AFTER_S",
    "NODE_SILENT_S",
    "NODE_STALL_S",
    "CLIENT_SILENT_S",
    "WORKER_STALL_S",
    "STALL_WARNING_S",
)
_MILLISECONDS: Final = ("HEARTBEAT_INTERVAL_MS", "HEARTBEAT_TIMEOUT_MS")


def hurry() -> None:
    """Shorten the timeouts in this process."""
    for name in _SECONDS:
        setattr(defaults, name, getattr(defaults, name) * SHARE)
    for name in _MILLISECONDS:
        setattr(sockets, name, int(getattr(sockets, name) * SHARE))


if __name__ == "__main__":
    hurry()
    # Imports the node's modules only now: they take some of the defaults when they are imported.
    runpy.run_module("loader_service", run_name="__main__")
