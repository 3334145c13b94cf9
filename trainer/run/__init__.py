"""The state of a run and what it leaves in its folder: checkpoints, logs, curves and the summary."""
