"""Generators of parts of the documents."""
