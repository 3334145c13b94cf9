"""State of a run, and its results on disk: checkpoints, log, figures and summary."""
