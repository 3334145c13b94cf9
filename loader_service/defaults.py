"""Every default of the service, in one place, with its reason; docs/defaults.md has the figures."""

from __future__ import annotations

import os
from typing import Final

DATA: Final = "data"
"""Where preprocessing writes and nodes read: train.lmdb and val.lmdb under it."""

ADDRESS: Final = "tcp://127.0.0.1:5555"
"""Where a node listens and a client looks: this machine alone, so that nothing is open to strangers by default."""

WORKERS: Final = os.cpu_count() or 1
"""A worker keeps a core busy; more of them only switch."""

BATCH_SIZE: Final = 128
"""The paper's (section 5)."""

PREFETCH: Final = 4
"""Batches that a client has room for beside the one in the caller's hands: two in the making, one ready, one to spare."""

SPARE_SLOTS: Final = 2
"""Beside the prefetched batches: one for the batch in the caller's hands, one in case a late writer blocks a slot."""

SLICES_PER_WORKER: Final = 2
"""Slices that a client's prefetched batches are cut into, for each worker of a node: one in work, one waiting at the
worker; the spare slots keep a third on its way. More cost messages for nothing: a slice's cost the same whatever its
size."""

MIN_SLICE_SAMPLES: Final = 8
MAX_SLICE_SAMPLES: Final = 128
"""A slice takes 0.2 to 3 ms of a worker's time: large against its messages' 0.1 ms, small against what a death costs."""

MAX_BAD: Final = 100
"""Bad records that are replaced before the run stops all the same: more is no accident."""

SEND_SLOT_BYTES: Final = 20 * 2**20
"""A node's slot for a slice that goes in frames: a batch of 128 uint8 samples of 224 x 224 fits,
or 69 of float16, 34 of float32, or 13 ten-crop ones."""

CONNECTIONS: Final = max(1, min(4, WORKERS // 4))
"""Connections between a client and a node on another machine, and I/O threads at either end: each keeps a core busy, so
a machine of few cores has little to gain by a second."""

SEND_SLOTS_PER_WORKER: Final = 3
"""One being written, one waiting to leave, one on its way."""

PING_AFTER_S: Final = 1.0
"""Silence after which either side of a connection asks for a sign of life."""

NODE_SILENT_S: Final = 10.0
"""Silence after which a client gives a node up and asks others for what it had asked of it."""

NODE_STILL_S: Final = 30.0
"""How long a node may owe slices and give nothing, though it answers pings, before its client says so and asks others:
time for it to replace a hung worker (STALL_S) and to make the slice after all, also for many clients."""

CLIENT_SILENT_S: Final = 30.0
"""Silence after which a node forgets a client; longer than the client's patience, so that the client acts first."""

STALL_S: Final = 10.0
"""A worker that has been at one record for so long is stopped or hung: it is killed and replaced."""

STANDSTILL_S: Final = 5.0
"""Nothing has moved for so long though something is asked for: time to say where, before STALL_S ends the worker."""
