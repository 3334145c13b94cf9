"""Preprocessing, inspection, sample data and benchmarks. Anything may be imported here; nothing imports it."""
