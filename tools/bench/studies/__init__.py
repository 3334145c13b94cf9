"""Measurements of one question each, run by hand with ``python -m tools.bench.studies.NAME``."""
