"""The two-GPU AlexNet of Krizhevsky, Sutskever and Hinton (2012), with everything its paper describes.

The network is ``trainer.model.alexnet.AlexNet``; ``trainer run`` trains it on batches from a loader service, which only
``trainer.data.feed`` knows of.
"""

import os

# A thread of GNU OpenMP that waits for the others spins for milliseconds by default. Where the loader's workers share
# the cores with a trainer on the CPU, it so takes the very core that it waits for: steps then take 20 times as long
# (measured on 2 cores: 1.5 s for 0.08 s). 1,000 turns are some microseconds. libgomp reads this as torch loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
