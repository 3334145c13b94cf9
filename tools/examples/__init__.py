"""The environment in which the examples run, and the command that runs them."""
