"""Measurements of this project, and of the machine that it runs on."""
