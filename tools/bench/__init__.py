"""Benchmarks of this project, of other loaders, and of the limits of the machine."""
