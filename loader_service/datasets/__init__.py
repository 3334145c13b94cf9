"""Datasets on disk: make them from images, verify, inspect and export them."""
