"""The documents that a run of the benchmark writes: tables, targets and a chart."""
