"""The kinds of faults: each has a name, a description, a duration and a function that begins it."""

from __future__ import annotations

import os
from typing import Final

from tools.chaos.faults.clients import interrupt_client, kill_client
from tools.chaos.faults.data import damage_node, sicken_node
from tools.chaos.faults.fault import CLIENTS_S, LONG_S, LOOK_UPS_S, SHORT_S, Effect, Fault
from tools.chaos.faults.network import (
    cut_lane,
    cut_link,
    delay_link,
    fail_names,
    half_open_link,
    hide_address,
    hold_link,
)
from tools.chaos.faults.nodes import (
    add_node,
    fill_node,
    kill_worker,
    lose_node,
    restart_node,
    starve_node,
    stop_dispatcher,
    stop_node,
    stop_worker,
)
from tools.chaos.faults.people import let_a_stranger_in, revoke_key

__all__ = ["FAULTS", "Effect", "Fault", "obstacle"]

FAULTS: Final[dict[str, Fault]] = {
    "worker-killed": Fault("worker killed (SIGKILL)", (0, 0), kill_worker),
    "worker-stopped": Fault("worker suspended (SIGSTOP) for longer than its node waits", LONG_S, stop_worker),
    "dispatcher-stopped": Fault("dispatcher suspended (SIGSTOP) for longer than clients wait", LONG_S, stop_dispatcher),
    "node-stopped": Fault("all of a node suspended (SIGSTOP), workers while writing a slice", LONG_S, stop_node),
    "node-restarted": Fault("node killed (SIGKILL) and restarted at its address", SHORT_S, restart_node),
    "node-lost": Fault("node killed (SIGKILL) and not restarted", (0, 0), lose_node),
    "node-added": Fault("node added during an epoch", (0, 0), add_node),
    "node-sick": Fault(
        "node whose records are all gone, so that it refuses everything at once", CLIENTS_S, sicken_node
    ),
    "node-damaged": Fault("node with a flipped bit in 20 records", CLIENTS_S, damage_node),
    "node-full": Fault("node restarted, its room for clients taken by 256 idle ones", CLIENTS_S, fill_node),
    "node-starved": Fault("node limited to 64 descriptors, with 80 idle connections", CLIENTS_S, starve_node),
    "link-cut": Fault("link: connections reset, new ones refused", SHORT_S, cut_link),
    "lane-cut": Fault("link: one of several connections reset", (0, 0), cut_lane),
    "link-held": Fault("link: all bytes held for longer than clients wait, then delivered", LONG_S, hold_link),
    "link-half-open": Fault("link: connections closed for the node, open for the client", LONG_S, half_open_link),
    "link-delayed": Fault("link: every byte delayed by 20 to 400 ms", SHORT_S, delay_link),
    "name-shrunk": Fault("name: a running node's address left out of it", LOOK_UPS_S, hide_address),
    "name-failing": Fault("name: look-ups fail", LOOK_UPS_S, fail_names),
    "client-killed": Fault("client killed (SIGKILL) and resumed from its saved state", SHORT_S, kill_client),
    "client-interrupted": Fault(
        "client interrupted (SIGINT) hundreds of times, and looping on", SHORT_S, interrupt_client
    ),
    "second-user": Fault(
        "another user plants files in /dev/shm and floods the nodes",
        SHORT_S,
        let_a_stranger_in,
        needs_keys=True,
        needs_root=True,
    ),
    "key-revoked": Fault("client's key taken off a node's list, and put back", CLIENTS_S, revoke_key, needs_keys=True),
}


def obstacle(name: str, *, curve: bool) -> str:
    """Return the reason why a kind of fault cannot be injected in this run; empty if it can."""
    fault = FAULTS[name]
    if fault.needs_keys and not curve:
        return "nodes and clients have no keys"
    if fault.needs_root and os.geteuid() != 0:
        return "only root can run a process as another user"
    return ""
