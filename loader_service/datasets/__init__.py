"""Datasets on disk: make them from pictures, verify, inspect and export them."""
