"""``make gpu``: every check and measurement that needs a GPU, in one command that can be killed and continued.

``prepare`` and ``wheels`` run before anything is installed and import the standard library alone. ``runner`` starts a
``worker`` process for each part, under a time limit, and keeps its results in ``results``; ``report`` writes docs/gpu.md.
"""
