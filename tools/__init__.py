"""Tools for developers of this project: demo, benchmarks, fault injection, fuzzing, containers and set-up. Nothing imports it."""
