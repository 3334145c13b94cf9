"""The defaults of the service: every one in this file, with its unit and its reason. docs/defaults.md has measurements.

A name states the unit of its value: ``_S`` seconds, ``_BYTES`` bytes; the rest are counts, paths and addresses.
"""

from __future__ import annotations

import os
from typing import Final

DATA: Final = "data"
"""The directory that preprocessing writes and nodes read; it holds train.lmdb and val.lmdb."""

ADDRESS: Final = "tcp://127.0.0.1:5555"
"""The address that a node binds and a client connects to. Loopback, so that a default node is closed to other machines."""

WORKERS: Final = os.cpu_count() or 1
"""Worker processes of a node: one per CPU. A worker is CPU-bound, so more of them only add context switches."""

BATCH_SIZE: Final = 128
"""Samples per batch and rank, as in the AlexNet paper (section 5)."""

# Slots. A client owns PREFETCH + SPARE_SLOTS slots of one batch each; together they are its memory ceiling.

PREFETCH: Final = 4
"""Batches that a client requests ahead: two being written, one ready, one in reserve."""

SPARE_SLOTS: Final = 2
"""Slots in addition to PREFETCH: one for the batch that the caller holds, one for a slot that a late writer blocks."""

SLICES_PER_WORKER: Final = 2
"""Slices per worker of a node into which the prefetched batches are cut: one that the worker writes, one that waits for
it; the spare slots keep a third on its way. A message costs the same for a slice of any size, so more slices only cost
more messages."""

MIN_SLICE_SAMPLES: Final = 8
MAX_SLICE_SAMPLES: Final = 128
"""Bounds of a slice, in samples. Such a slice takes a worker 0.2 to 3 ms: long against the 0.1 ms of its messages, short
against the time lost when the worker dies."""

ASKS_PER_WORKER: Final = 3
"""Slices that a client asks a node for at a time, per worker: one in work, one waiting at the worker, one at the dispatcher. A
node bounds its queues by it."""

MAX_BAD: Final = 100
"""Bad records that a client replaces before it stops. More than these point at a broken disk or dataset."""

# Slices in frames, for clients on other machines.

SEND_SLOT_BYTES: Final = 20 * 2**20
"""Size of a node's send slot. It fits a slice of 128 uint8 samples of 224 x 224, 69 of float16, 34 of float32, or 13
ten-crop ones."""

CONNECTIONS: Final = max(2, min(4, WORKERS // 4))
"""TCP connections between a client and a node that cannot write into its slots, and I/O threads of libzmq at each end. Encryption
saturates a core per connection, so a machine with more cores takes more of them; two gain 5 % even on two cores."""

SEND_SLOTS_PER_WORKER: Final = 3
"""Send slots per worker: one being written, one waiting to be sent, one being sent."""

# Timeouts. Their order matters: STALL_WARNING_S < WORKER_STALL_S, so that a log names the stage before the worker is killed;
# WORKER_STALL_S < NODE_STALL_S, so that a node can replace a hung worker before its clients go elsewhere; and
# NODE_SILENT_S < CLIENT_SILENT_S, so that the client, which owns the ledger, acts before the node forgets it.

PING_AFTER_S: Final = 1.0
"""Seconds of silence after which one side of a connection sends a Ping."""

NODE_SILENT_S: Final = 10.0
"""Seconds of silence after which a client declares a node lost and requests its slices from other nodes."""

NODE_STALL_S: Final = 30.0
"""Seconds in which a node answers pings but delivers none of the slices it owes, after which its client reports it and
requests them from other nodes. Long enough for the node to replace a hung worker (WORKER_STALL_S) and write the slice again,
also with many clients."""

CLIENT_SILENT_S: Final = 30.0
"""Seconds of silence after which a node forgets a client."""

WORKER_STALL_S: Final = 10.0
"""Seconds that a worker may spend on one record. After that it is stopped or hung; the node kills and replaces it."""

STALL_WARNING_S: Final = 5.0
"""Seconds without any progress, although slices are requested, after which a node logs the stage where it stands."""
