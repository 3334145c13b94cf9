"""The two-GPU AlexNet of Krizhevsky, Sutskever and Hinton (2012), with everything its paper describes.

The network is ``trainer.model.AlexNet``; ``trainer run`` trains it on batches from a loader service. Only
``trainer.data.feed`` talks to that service.
"""

import os

# A waiting thread of GNU OpenMP spins for milliseconds by default. On a CPU that the trainer shares with the loader's
# workers, it occupies the very core that it waits for: a step took 1.5 s instead of 0.08 s (measured on 2 cores).
# 1,000 turns last some microseconds. libgomp reads the variable when torch loads it, so it is set before any import.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
