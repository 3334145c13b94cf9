"""The shortened timeouts of nodes and clients under fault injection."""

from __future__ import annotations

import subprocess
import sys

from loader_service import defaults

SCRIPT = """
from tools.chaos import haste
from loader_service import defaults
haste.hurry()
from loader_service.node.dispatcher import Settings
settings = Settings("tcp://127.0.0.1:*", 1, 1)
print(defaults.PING_AFTER_S, settings.standstill_s, settings.stall_s, defaults.NODE_SILENT_S, settings.client_silent_s,
      defaults.NODE_STALL_S)
"""


def test_timeouts_are_shorter_and_keep_their_order() -> None:
    """A node and a client in haste have shorter timeouts, in the order that defaults.py demands."""
    said = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=60).stdout
    ping, warning, worker, silent, forget, stall = map(float, said.split())
    assert ping < warning < worker < stall < defaults.NODE_STALL_S
    assert silent < forget < defaults.CLIENT_SILENT_S
